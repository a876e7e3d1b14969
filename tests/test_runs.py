"""runs.py: what it says of each kind of model, and of files that are no checkpoints."""

import json
import os
import subprocess
import sys
from datetime import datetime

import pytest
import torch
from conftest import CHARS, ROOT, tiny_model

import runs
from generate import new_cache
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import save_checkpoint
from runtime.tokenizer import make_tokenizer


def save(path, model_class=GPT, iter_num=5, val_loss=2.5, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    model = tiny_model(model_class, **settings)
    save_checkpoint(path, model, make_tokenizer(CHARS), {}, iter_num, best_val_loss=val_loss)
    return model


@pytest.fixture
def listed(program, tmp_path, monkeypatch):
    """Call runs.py in tmp_path with --json. Returns its objects."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        code, out, err = program(runs.main, *args, '--json')
        assert code == 0, err
        return [json.loads(line) for line in out.splitlines()]
    return call


def test_each_kind_of_model_has_a_row(listed, tmp_path):
    models = [save(tmp_path / 'out' / 'ckpt.pt', iter_num=7, val_loss=1.5),
              save(tmp_path / 'out' / 'ckpt_k_ahead.pt', GPT_KAhead),
              save(tmp_path / 'out' / 'ckpt_mla.pt', GPT_MLA, n_latent=4)]
    rows = listed('out')
    assert [(row['folder'], row['checkpoint']) for row in rows] == [
        ('out', f'out/{name}') for name in ('ckpt.pt', 'ckpt_k_ahead.pt', 'ckpt_mla.pt')]
    assert [(row['model'], row['n_latent']) for row in rows] == [
        ('MHA', None), ('k ahead', None), ('MLA', 4)]
    assert [(row['iterations'], row['val_loss']) for row in rows] == [(7, 1.5), (5, 2.5), (5, 2.5)]
    for row, model in zip(rows, models):
        assert row['params'] == sum(p.numel() for p in model.parameters())
        assert row['cache_bytes_per_token'] * 16 == sum(c.nbytes for c in new_cache(model, 1, 16))


def test_the_newest_state_counts_and_old_ones_have_no_row(listed, tmp_path):
    out = tmp_path / 'out'
    save(out / 'ckpt.pt', iter_num=5, val_loss=2.0)
    save(out / 'ckpt_last.pt', iter_num=9, val_loss=2.0)
    save(out / 'ckpt.pt.1', iter_num=3)
    save(tmp_path / 'stopped' / 'ckpt_mla_last.pt', GPT_MLA, val_loss=float('inf'))
    os.utime(out / 'ckpt_last.pt', (0, datetime(2026, 3, 4, 5, 6, 7).timestamp()))
    best, stopped = listed()
    assert (best['checkpoint'], best['iterations']) == ('out/ckpt_last.pt', 9)
    assert best['saved'] == '2026-03-04 05:06'
    assert (stopped['model'], stopped['val_loss']) == ('MLA', None)
    save(out / 'ckpt_last.pt', iter_num=4)  # an older one is left, where a run was killed
    assert listed('out')[0]['iterations'] == 5
    assert listed('out/ckpt.pt.1')[0]['iterations'] == 3


def test_what_is_searched(listed, tmp_path):
    for name in ('b/ckpt.pt', 'a/before-1/ckpt.pt', 'a/ckpt.pt', 'a/b/c/ckpt.pt', '.h/ckpt.pt'):
        save(tmp_path / name)
    (tmp_path / 'b' / 'ckpt.pt-vs-ckpt_mla.pt').mkdir()
    (tmp_path / 'empty').mkdir()
    everything = ['a', 'a/before-1', 'b']
    assert [row['folder'] for row in listed()] == everything
    assert [row['folder'] for row in listed('b', 'empty', 'a', 'a/before-1')] == everything
    assert [row['folder'] for row in listed('b/ckpt.pt')] == ['b']


def test_nanogpts_checkpoint_is_listed(listed, tmp_path):
    model = tiny_model(GPT)
    args = {key: getattr(model.config, key) for key in
            ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')}
    (tmp_path / 'out').mkdir()
    torch.save({'model': model.state_dict(), 'model_args': args, 'iter_num': 1,
                'best_val_loss': torch.tensor(2.25)}, tmp_path / 'out' / 'ckpt.pt')
    row, = listed()
    assert (row['model'], row['val_loss'], row['iterations']) == ('MHA', 2.25, 1)


def test_what_is_no_checkpoint_is_a_row_that_says_so(listed, program, tmp_path):
    out, weights = tmp_path / 'out', tiny_model(GPT).state_dict()
    save(out / 'ckpt.pt')
    content = (out / 'ckpt.pt').read_bytes()
    (out / 'ckpt_last.pt').write_bytes(content[:len(content) // 2])
    (out / 'ckpt_text.pt').write_text('text')
    (out / 'notes.txt').write_text('notes')
    foreign = [{'model': {'a': 5}, 'model_args': {}}, {'model': 5, 'model_args': 5},
               {'model': weights, 'model_args': {'n_layer': 'x'}},
               {'model': weights, 'model_args': {}, 'model_type': 'other'}]
    for number, checkpoint in enumerate(foreign):
        torch.save(checkpoint, out / f'ckpt_{number}.pt')
    odd = torch.load(out / 'ckpt.pt', weights_only=True)
    torch.save(odd | {'iter_num': 'x', 'best_val_loss': 'y'}, out / 'ckpt_odd.pt')

    rows = {row['checkpoint'].removeprefix('out/'): row for row in listed('out', 'out/notes.txt')}
    sound = [name for name, row in rows.items() if not row['error']]
    assert len(rows) == 9 and sorted(sound) == ['ckpt.pt', 'ckpt_odd.pt']
    assert (rows['ckpt_odd.pt']['iterations'], rows['ckpt_odd.pt']['val_loss']) == (None, None)
    code, text, _ = program(runs.main, 'out')
    assert code == 0 and "has model_type 'other'" in text and text.count('damaged') == 3
    assert len(text.splitlines()) == 9


def test_the_table_is_aligned(listed, program, tmp_path):
    save(tmp_path / 'a_longer_name' / 'ckpt.pt', iter_num=12345)
    save(tmp_path / 'b' / 'ckpt_mla.pt', GPT_MLA)
    code, text, _ = program(runs.main)
    heading, mha, mla = text.splitlines()
    assert code == 0 and len(heading) == len(mha) == len(mla)
    assert mha.split()[:6] == ['a_longer_name', 'MHA', '-', '12,345', '2.5000', '7,072']
    for word, cell in (('iterations', '12,345'), ('latent', '-'), ('val loss', '2.5000')):
        assert heading.index(word) + len(word) == mha.index(f' {cell} ') + 1 + len(cell)
    assert heading.index('model') == mha.index('MHA') == mla.index('MLA')


def test_half_precision_weights_are_not_read(listed, tmp_path, monkeypatch):
    """They are on the meta device before the model makes float32 of them."""
    save(tmp_path / 'out' / 'ckpt.pt')
    checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
    checkpoint['model'] = {name: w.bfloat16() for name, w in checkpoint['model'].items()}
    torch.save(checkpoint, tmp_path / 'out' / 'ckpt.pt')
    build, devices = runs.build_model, []

    def watched(checkpoint, path):
        devices.extend(w.device.type for w in checkpoint['model'].values())
        return build(checkpoint, path)
    monkeypatch.setattr(runs, 'build_model', watched)
    assert listed()[0]['params'] == 7072 and set(devices) == {'meta'}


@pytest.mark.parametrize('args, words', [
    ([], 'there is no checkpoint in the folders here'),
    (['empty'], 'there is no checkpoint in empty'),
    (['out*'], "there is no 'out*'"),
    (['x' * 5000], 'there is no'),
    (['empty', '--jsn=True'], 'did you mean json')])
def test_a_mistake_is_one_line(args, words, program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    code, out, err = program(runs.main, *args)
    assert code == 2 and err.count('\n') == 1 and words in err and not out


def test_it_is_a_program(tmp_path):
    save(tmp_path / 'out' / 'ckpt.pt')
    ran = subprocess.run([sys.executable, ROOT / 'runs.py'], cwd=tmp_path, capture_output=True,
                         text=True)
    assert ran.returncode == 0 and '7,072' in ran.stdout, ran.stderr
