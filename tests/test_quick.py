import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model
from test_faults import wait_for

import test_shakespeare_quick as quick
from model import GPT
from runtime.dataset import open_data, write_splits
from runtime.loading import load_model
from runtime.run_folder import newest_metrics
from runtime.tokenizer import make_tokenizer

SIZE = ['--device=cpu', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16',
        '--batch_size=4', '--eval_iters=4', '--max_iters=6']


@pytest.fixture
def trained(data_dir, tmp_path, program):
    out_dir = f'--out_dir={tmp_path / "quick"}'
    code, out, err = program(quick.main, f'--dataset={data_dir}', out_dir, *SIZE)
    assert code == 0, err
    return tmp_path / 'quick', out


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_whole_comparison(number, data_dir, tmp_path):
    out_dir = tmp_path / 'quick'
    process = subprocess.Popen(
        [sys.executable, 'test_shakespeare_quick.py', f'--dataset={data_dir}', *SIZE,
         f'--out_dir={out_dir}', '--max_iters=1000000'], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: all(newest_metrics(out_dir / name, kind).get('iter', 0) > 3
                         for name, kind in (('mha', 'gpt'), ('mla', 'mla'))), 120)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and 'starts anew' in out and 'Traceback' not in err
    assert not (out_dir / 'results.json').exists()


def test_side_by_side_they_end_as_one_by_one(data_dir, tmp_path, program, monkeypatch):
    losses = []
    for workers in (1, 2):
        monkeypatch.setattr(quick, 'default_workers', lambda: workers)
        out_dir = tmp_path / str(workers)
        code, out, err = program(quick.main, f'--dataset={data_dir}', f'--out_dir={out_dir}', *SIZE)
        assert code == 0, err
        results = json.loads((out_dir / 'results.json').read_text())
        losses.append([results[name][key] for name in ('mha', 'mla')
                       for key in ('train_loss', 'val_loss')])
        assert (out_dir / 'mla' / 'log.txt').exists() == (workers == 2)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_what_fails_in_one_of_them_is_one_line(data_dir, tmp_path, program):
    code, _, err = program(quick.main, f'--dataset={data_dir}', f'--out_dir={tmp_path / "quick"}',
                           *SIZE, '--learning_rate=1e30')
    assert code == 2 and err.count('error:') == 1 and 'learning_rate' in err


def test_what_it_leaves_behind(trained, data_dir):
    folder, out = trained
    results = json.loads((folder / 'results.json').read_text())
    assert results.keys() == {'mha', 'mla', 'settings'}
    kinds = dict(label=str, params=int, attention_params=int, train_loss=float, val_loss=float,
                 ms_per_iter=float, tokens_per_second=float, cache_bytes_per_token=int, sample=str)
    for name in ('mha', 'mla'):
        assert {k: type(v) for k, v in results[name].items()} == kinds
        sample = results[name]['sample']
        assert len(sample) == 300 and set(sample) <= set('\n abcdefghijkl')
        assert sample.strip()[:20] in out
        assert sample.strip().split('\n')[0] in (folder / 'samples.txt').read_text()
    # by hand, two layers: 4 matrices 16 x 16 for MHA; query, c_proj 16 x 16 and three 16 x 8 for
    # MLA; 4 bytes a number
    assert results['mha']['attention_params'] == 2 * 4 * 256
    assert results['mla']['attention_params'] == 2 * (2 * 256 + 3 * 128)
    assert results['mha']['cache_bytes_per_token'] == 2 * 32 * 4
    assert results['mla']['cache_bytes_per_token'] == 2 * 8 * 4
    assert results['settings']['max_iters'] == results['settings']['lr_decay_iters'] == 6
    assert results['settings']['n_latent'] == 8 and results['settings']['seed'] == 1337
    assert {p.name for p in folder.iterdir()} == {
        'comparison.png', 'results.json', 'samples.txt', 'ckpt.pt', 'ckpt_mla.pt', 'mha', 'mla'}
    assert (folder / 'comparison.png').read_bytes().startswith(b'\x89PNG')
    assert 'MLA / MHA' in out and 'cache bytes per token' in out
    for name, file in (('mha', 'ckpt.pt'), ('mla', 'ckpt_mla.pt')):
        model = load_model(folder / file).model
        loss = quick.split_loss(model, open_data(data_dir).val)
        assert loss == pytest.approx(results[name]['val_loss'], abs=1e-6)
    next_steps = out.strip().splitlines()[-2:]
    assert next_steps[0].endswith(f'python sample.py {folder / "ckpt_mla.pt"}')
    assert 'python -m analysis.report' in next_steps[1] and str(folder / 'ckpt.pt') in next_steps[1]


@pytest.mark.parametrize('active', [True, False])
def test_the_last_lines_name_the_environment_unless_it_is_active(active, tmp_path, monkeypatch,
                                                                 capsys):
    monkeypatch.setattr(quick, '__file__', str(tmp_path / 'program.py'))
    monkeypatch.setenv('VIRTUAL_ENV', 'x') if active else monkeypatch.delenv('VIRTUAL_ENV', False)
    for exists in (False, True):
        quick.print_next_steps(['a b/ckpt.pt', 'a b/ckpt_mla.pt'])
        out = capsys.readouterr().out
        assert ('source .venv/bin/activate' in out) == (exists and not active)
        assert "python sample.py 'a b/ckpt_mla.pt'" in out
        (tmp_path / '.venv').mkdir(exist_ok=True)


@pytest.mark.parametrize('losses', [[4.0, 3.9, 3.8], [4.2, 1.9, 1.5], [9.0, 8.0, 7.9]])
def test_the_picture_shows_the_curves(losses, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(quick.Figure, 'savefig',
                        lambda figure, *args, **kwargs: drawn.append(figure.axes[0]))
    history = [{'iter': i, 'train_loss': loss, 'val_loss': loss} for i, loss in enumerate(losses)]
    settings = dict(dataset='d', n_layer=1, n_embd=1, n_latent=1)
    results = {name: {'val_loss': 1.0, 'label': name.upper()} for name in ('mha', 'mla')}
    quick.draw_comparison(dict(mha=history, mla=history), results, settings, 'x')
    bottom, top = drawn[0].get_ylim()
    assert bottom < min(losses) < sorted(losses)[1] < top


def test_split_loss_predicts_every_token_but_the_first_once():
    model = tiny_model(GPT)
    for length in (17, 18, 33, 50, 16, 2):
        tokens = torch.randint(14, (length,))
        losses = []
        for i in range(1, length):
            start = (i - 1) // 16 * 16
            logits = model(tokens[None, start:i])[0][0, -1]
            losses.append(-logits.log_softmax(-1)[tokens[i]].item())
        loss = quick.split_loss(model, tokens.numpy().astype(np.uint16), batch_size=2)
        assert loss == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize('arg', ['--init_from=resume', '--eval_only=True', '--max_iters=0'])
def test_what_makes_no_comparison_is_refused(arg, data_dir, tmp_path, program):
    out_dir = tmp_path / 'quick'
    code, _, err = program(quick.main, f'--dataset={data_dir}', f'--out_dir={out_dir}', *SIZE, arg)
    assert code == 2 and 'the comparison' in err and not out_dir.exists()


def test_a_family_is_compared_at_one_cache(data_dir, tmp_path, program):
    """At the quick size: 4,096 bytes for MHA, a quarter of it for GQA and both kinds of MLA."""
    names = ['mha', 'gqa', 'mla', 'mla_decoupled', 'mha_rotary', 'gqa_rotary', 'mla_rotary']
    out_dir = tmp_path / 'family'
    args = [f'--dataset={data_dir}', f'--out_dir={out_dir}', f'--models={",".join(names)}',
            '--device=cpu', '--batch_size=2', '--eval_iters=1', '--max_iters=1']
    code, out, err = program(quick.main, *args)
    assert code == 0, err
    results = json.loads((out_dir / 'results.json').read_text())
    assert list(results) == [*names, 'settings']
    sizes = {name: results[name]['cache_bytes_per_token'] for name in names}
    assert sizes == {name: 4096 if 'mha' in name else 1024 for name in names}
    assert 'val loss against MHA' in out and 'MLA decoupled' in out
    for path in ('ckpt.pt', 'gqa/ckpt.pt', 'ckpt_mla.pt', 'mla_decoupled/ckpt_mla.pt'):
        assert load_model(out_dir / path).model
    assert load_model(out_dir / 'mla_decoupled').model.config.n_rotary == 16


@pytest.mark.parametrize('names', ['mha', 'mha,mha', 'mha,mqa', 'mha,', ''])
def test_models_that_are_none_are_named(names, data_dir, tmp_path, program):
    out_dir = tmp_path / 'quick'
    code, _, err = program(quick.main, f'--models={names}', f'--out_dir={out_dir}')
    assert code == 2 and f'models={names!r} must be two or more of mha, gqa' in err
    assert err.count('\n') == 1 and not out_dir.exists()


def test_a_text_without_line_breaks_is_compared_too(tiny_args, tmp_path, program):
    """The sample then starts with the first token of the vocabulary."""
    folder = tmp_path / 'dna'
    folder.mkdir()
    write_splits(folder, [0, 1, 2, 3] * 100, [3, 2, 1, 0] * 50, make_tokenizer(list('ACGT')))
    args = [arg for arg in tiny_args if not arg.startswith('--dataset')]
    code, _, err = program(quick.main, *args, f'--dataset={folder}', '--max_iters=2')
    assert code == 0, err
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert set(results['mha']['sample']) <= set('ACGT') and len(results['mla']['sample']) == 300
