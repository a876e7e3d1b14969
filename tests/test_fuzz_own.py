"""Hundreds of generated faults in one's own texts, vocabularies and checkpoints: each ends in one
clear line or in a sound run, and nothing of the user's is changed."""

import csv
import gzip
import io
import json
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHARS, tiny_model
from test_openwebtext import in_this_process
from test_tokenizer import learned

import convert_mla
import evaluate
import export_huggingface
import runs
import sample
import train
from data import prepare
from model import GPT
from model_mla import GPT_MLA
from runtime.checkpoint import save_checkpoint
from runtime.dataset import write_splits
from runtime.tokenizer import make_tokenizer

pytestmark = pytest.mark.usefixtures('no_picture')
TEXTS = ['', ' ', '\n', 'a', 'ab', 'word ' * 50, 'line\n' * 40, '東京' * 60, '\ufeffab\r\ncd\r' * 9,
         '\0' * 20, '<|endoftext|>' * 9, 'a\u2028b\x85c\x0b' * 20, '🙂' * 30, '\x1a' * 9]
VALUES = [None, True, 0, -1, 1, 7, 14, 15, 50_257, 70_000, 2 ** 40, 1.5, float('nan'), '', 'gpt2',
          'x', [], [1], ['a'], ['a', 'a'], [b'a', b'ab'], ['', 'a'], ['a', b'a'], CHARS, {},
          {'a': 1}, {0: 'a', 1: 'b'}, {'unknown': 14}, {'unknown': None}, {'unknown': -1},
          {'unknown': 1.5}, {'bpe': '{}'}, {'bpe': 3}, {'bpe': learned().to_str()}, b'gpt2',
          (1, 2), OrderedDict(a=1), torch.ones(2), torch.tensor(float('inf')), '../..', '/', 'data']


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_this_process(monkeypatch)
    return tmp_path


def run_all(cases, program):
    """Run (main, arguments, the user's files) of cases. Returns how many ended with 0, with 2."""
    codes = []
    for main, args, files in cases:
        before = {path: path.read_bytes() for path in files if path.is_file()}
        torch.manual_seed(0)
        try:
            code, out, err = program(main, *args)
        except BaseException as e:
            raise AssertionError(f'{type(e).__name__}: {str(e)[:200]} for {args}') from e
        assert code in (0, 2) and 'Traceback' not in err, (args, err)
        if code == 2:
            errors = [line for line in err.splitlines() if line.startswith('error: ')]
            assert len(errors) == 1 and 20 < len(errors[0]) < 2000, (args, err)
            assert not any(word in err for word in ('delete it', 'train anew', 'retrain')) or (
                'is damaged' in err), err
        assert {path: path.read_bytes() for path in before} == before, args
        codes.append(code)
    return codes.count(0), codes.count(2)


def random_file(rng, folder, number):
    """A source of a random kind, whose content may be of another."""
    texts = [rng.choice(TEXTS) for _ in range(rng.randint(0, 6))]
    rows = [rng.choice([{'text': text}, {'text': text}, {'body': text}, {'text': None}, text,
                        [text], 3]) for text in texts]
    table = io.StringIO()
    csv.writer(table).writerows([['id', rng.choice(['text', 'body'])], *([1, t] for t in texts)])
    contents = [''.join(texts).encode(), '\n'.join(map(json.dumps, rows)).encode(),
                json.dumps(rows).encode(), json.dumps(rows).encode()[:-3],
                table.getvalue().encode(), ''.join(texts).encode('utf-16'),
                ''.join(texts).encode('latin-1', 'replace'),
                bytes(rng.randrange(256) for _ in range(60)), b'PAR1' + b'\0' * 30]
    content = rng.choice(contents)
    ending = rng.choice(['.txt', '.md', '.jsonl', '.ndjson', '.json', '.csv', '.parquet', '.pdf',
                         ''])
    if rng.random() < 0.2:
        ending, content = f'{ending}.gz', rng.choice([content, gzip.compress(content),
                                                      gzip.compress(content)[:-5]])
    path = folder / f'source {number}{ending}'
    path.write_bytes(content)
    return path


def test_one_hundred_and_twenty_texts(folder, program):
    rng, cases = random.Random(0), []
    (folder / 'tokenizer.json').write_text(learned().to_str()[:rng.randint(1, 5000)])
    for number in range(120):
        path = random_file(rng, folder, number)
        tokenizer = rng.choice(['chars', 'chars', 'gpt2', 'bpe', 'tokenizer.json', str(folder), ''])
        args = [f'--source={path}', f'--out_dir={folder / f"bins{number}"}', '--workers=1',
                f'--tokenizer={tokenizer}']
        args += [f'--vocab_size={rng.choice([257, 300, 0])}'] * (tokenizer == 'bpe')
        args += rng.sample(['--skip_bad=True', '--val_share=0.5', '--val_share=0.999',
                            '--text_key=body', '--part_documents=1'], rng.randint(0, 2))
        cases.append((prepare.main, args, [path]))
    good, bad = run_all(cases, program)
    assert good > 5 and bad > 60


def random_bins(rng, folder):
    """Bins and records, each of which may be wrong."""
    folder.mkdir()
    if rng.random() < 0.2:  # or sound
        write_splits(folder, [3, 2, 1] * 30, [1, 2] * 20, make_tokenizer(CHARS[:4]))
        return
    for split in ('train', 'val'):
        dtype = rng.choice([np.uint16, np.uint16, np.uint32, np.float32, np.uint8])
        ids = np.random.default_rng(rng.randrange(99)).integers(rng.choice([2, 14, 200]), size=90)
        end = rng.choice([None, None, None, -1])
        (folder / f'{split}.bin').write_bytes(ids.astype(dtype).tobytes()[:end])
    kind = rng.choice(['pkl', 'json', 'both', 'none'])
    if kind in ('pkl', 'both'):
        meta = {key: rng.choice(VALUES) for key in rng.sample(['itos', 'stoi', 'vocab_size'], 2)}
        content = pickle.dumps(rng.choice([meta, meta, rng.choice(VALUES), {'itos': list('abc')},
                                           {'vocab_size': 200}, {'vocab_size': np.int64(7)}]))
        (folder / 'meta.pkl').write_bytes(content[:rng.choice([None, None, None, 9])])
    if kind in ('json', 'both'):
        spec = rng.choice([value for value in VALUES if json_able(value)])
        meta = {'tokenizer': spec, 'dtype': rng.choice(['uint16', 'uint16', 'uint32', 'int8', 3])}
        (folder / 'meta.json').write_text(rng.choice([json.dumps(meta), json.dumps(meta),
                                                      json.dumps(spec), '{', '']))


def json_able(value):
    try:
        return bool(json.dumps(value))
    except (TypeError, ValueError):
        return False


def test_one_hundred_bins(folder, tiny_args, program):
    rng, cases = random.Random(1), []
    save_checkpoint(folder / 'ckpt.pt', tiny_model(GPT), make_tokenizer(CHARS), {}, 1)
    for number in range(100):
        bins = folder / f'bins{number}'
        random_bins(rng, bins)
        main, args = rng.choice([
            (train.main, [*tiny_args, f'--dataset={bins}', '--max_iters=1', '--eval_iters=1',
                          f'--out_dir={folder / f"out{number}"}', '--sample_interval=1',
                          *[f'--init_from={folder / "ckpt.pt"}'] * rng.randint(0, 1)]),
            (evaluate.main, [folder / 'ckpt.pt', f'--dataset={bins}']),
            (prepare.main, [f'--out_dir={bins}', f'--tokenizer={rng.choice(["gpt2", "unknown"])}',
                            *['--vocab_size=200'] * rng.randint(0, 1)])])
        files = [bins / f'{split}.bin' for split in ('train', 'val')] + [bins / 'meta.pkl']
        cases.append((main, args, [*files, folder / 'ckpt.pt']))
    good, bad = run_all(cases, program)
    assert good > 8 and bad > 40


def test_one_hundred_checkpoints(folder, data_dir, program):
    rng, cases = random.Random(2), []
    save_checkpoint(folder / 'good.pt', tiny_model(GPT), make_tokenizer(CHARS),
                    {'dataset': str(data_dir), 'max_iters': 1, 'eval_iters': 1}, 1)
    save_checkpoint(folder / 'mla.pt', tiny_model(GPT_MLA), make_tokenizer(CHARS), {}, 1)
    for number in range(110):
        out = folder / f'out{number}'
        out.mkdir()
        checkpoint = torch.load(folder / rng.choice(['good.pt', 'good.pt', 'mla.pt']),
                                weights_only=True)
        change = rng.random()
        if change < 0.5:
            key = rng.choice(['tokenizer', 'tokenizer', 'config', 'iter_num', 'best_val_loss',
                              'model_type', 'model_args', 'metrics', 'wandb_id', 'best_iter'])
            checkpoint[key] = rng.choice(VALUES)
        elif change < 0.8:
            part = checkpoint[rng.choice(['config', 'model_args'])]
            part[rng.choice(list(part))] = rng.choice(VALUES)
        else:
            del checkpoint[rng.choice(list(checkpoint))]
            checkpoint['extra'] = rng.choice([np.float64(1), Path('x'), np.zeros(2), 3])
        torch.save(checkpoint, out / 'ckpt.pt')
        resume = [f'--out_dir={out}', '--init_from=resume', '--device=cpu', '--max_iters=1',
                  '--eval_iters=1', '--batch_size=2', '--gradient_accumulation_steps=1']
        main, args = rng.choice([
            (train.main, resume),
            (train.main, [*resume, f'--init_from={out}', f'--dataset={data_dir}',
                          f'--out_dir={folder / f"new{number}"}']),
            (sample.main, [out, '--num_samples=1', '--max_new_tokens=2', '--device=cpu']),
            (evaluate.main, [out, '--max_tokens=20']), (runs.main, [out]),
            (export_huggingface.main, [out, folder / f'hf{number}']),
            (convert_mla.main, [out, f'--out_dir={folder / f"mla{number}"}'])])
        cases.append((main, args, [] if '--init_from=resume' in args else [out / 'ckpt.pt']))
    good, bad = run_all(cases, program)
    assert good > 20 and bad > 20
