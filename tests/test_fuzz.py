"""
Whatever is typed, a program runs or says in one line what is wrong: hundreds of random command
lines and config files.
"""

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import CHARS, tiny_model
from test_openwebtext import in_this_process

import convert_mla
import evaluate
import sample
import train
import visualize_residual_space_gpt2 as visualize
from analysis import ablation, induction_heads
from analysis.program import main as analysis_main
from data import prepare
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import save_checkpoint
from runtime.tokenizer import make_tokenizer

ROOT = Path(train.__file__).parent

VALUES = ['', '0', '1', '2', '3', '7', '16', '-1', '-0', '0.5', '1.0', '1e-3', '1e400', 'nan',
          '-inf', 'None', 'True', 'False', 'true', 'auto', '[]', '()', '{1: 2}', '"x"', "'", '"',
          '\\', '0x10', '1_0', '１', '²', '\0', ' 3 ', '3 3', '3,1', '1:2', 'a=b', '=', '--',
          '__import__("os")', '10**9', '1' + '0' * 18, '1' + '0' * 30, '-' + '9' * 25, 'ä',
          '\ud800', '\n', 'out', 'x' * 300, 'float16', 'mla', 'linear', 'greedy', 'slide', '1,1',
          '0.1,0.0', 'FILE:', 'FILE:none', 'scratch', 'resume', '9' * 5000]
WORDS = ['', '-', '--', '---', '--=', '-=3', '--=3', 'x', 'x.py', 'dir.py', '-h=1', '--n_layer',
         '--n_layer 3', 'n_layer=3', '--N_LAYER=3', '--n-layer=3', '--n_layer==3', '--n_layer=3=',
         '--\0=1', '--__class__=1', '--self=1', '--config=x', '--ä=1', '- -', '\n', '--lenght=3']
LINES = ['n_layer = 1', 'n_embd = 8 * n_head', 'import os', 'import math; dropout = math.nan',
         'def f(): pass', 'class A: pass', '_x = 3', 'n_layer = ', 'raise ValueError("no")',
         'exit()', '1 / 0', 'f = lambda: f()\nf()', 'x = unknown', 'batch_size = [1]', '\0', '#',
         'dropout = 10 ** 400', 'dropout = 1e-320', 'out_dir = None', 'device = b"cpu"',
         'def g(): return g()\ng()', 'seed = True', '\tx = 1', 'for n_head in (1, 2): pass',
         'n_latent = 3', 'k_ahead = 2', 'globals().clear()', 'del n_layer',
         'learning_rate = float("nan")', 'from dataclasses import dataclass', 'bias = 1',
         'import numpy\nbatch_size = numpy.int64(3)', 'ä = 1', 'print(end="")']
# what would write elsewhere, ask a server, or take long
UNTOUCHED = ('out_dir', 'wandb_log', 'init_from', 'compile')


def mutations(rng, config_classes, folder):
    """One to three random words to put behind a good command line."""
    keys = {f.name: f.default for cls in config_classes for f in fields(cls)
            if f.name not in UNTOUCHED}
    words = []
    for _ in range(rng.randint(1, 2)):
        kind = rng.random()
        if kind < 0.9:
            key = rng.choice(list(keys))
            words.append(f'--{key}={rng.choice(VALUES) if kind < 0.4 else keys[key]}')
        elif kind < 0.95:
            words.append(rng.choice(WORDS))
        else:
            path = folder / f'config{rng.randrange(10 ** 9)}.py'
            content = '\n'.join(rng.choice(LINES) for _ in range(rng.randint(1, 4))).encode()
            if rng.random() < 0.1:
                content = bytes(rng.randrange(256) for _ in range(40))
            path.write_bytes(content)
            words.append(str(path))
    return words


@pytest.fixture
def programs(tiny_args, tmp_path, data_dir, monkeypatch):
    """Of each program: main, a command line that runs, the dataclasses of its keys, and what comes
    last so that it is short."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'dir.py').mkdir()
    for name, model_class in (('ckpt.pt', GPT), ('ckpt_mla.pt', GPT_MLA)):
        save_checkpoint(tmp_path / name, tiny_model(model_class), make_tokenizer(CHARS),
                        {'dataset': str(data_dir)}, 0)
    source = tmp_path / 'source.jsonl'
    source.write_text('{"text": "one"}\n{"text": "two", "x": "three"}\n')
    in_this_process(monkeypatch)
    short = ['--eval_only=True', '--eval_iters=1']
    model = f'--model={tmp_path / "ckpt_mla.pt"}'
    out = f'--out_dir={tmp_path / "analysis"}'
    trainers = [(lambda cls=cls: train.main(cls), tiny_args,
                 (train.TrainConfig, cls.config_class), short)
                for cls in (GPT, GPT_MLA, GPT_KAhead)]

    def analysis(name, module):
        return lambda: analysis_main(name, module.Config, module.analyse, module.table, module.plot)

    return trainers * 2 + [
        (sample.main, [f'--out_dir={tmp_path / "ckpt.pt"}'], (sample.SampleConfig,),
         ['--num_samples=1', '--max_new_tokens=2']),
        (evaluate.main, [model], (evaluate.EvaluateConfig,), ['--max_tokens=40']),
        (prepare.main, [f'--out_dir={tmp_path / "prepared"}', '--workers=1'],
         (prepare.PrepareConfig,), [f'--source={source}', '--tokenizer=gpt2']),
        (convert_mla.main, [str(tmp_path / 'ckpt.pt'), f'--out_dir={tmp_path / "converted"}'],
         (convert_mla.ConvertConfig,), ['--calibration_tokens=16', '--val_tokens=16']),
        (visualize.main, [model, out], (visualize.ResidualConfig,), ['--animation=False']),
        (analysis('induction_heads', induction_heads), [model, out], (induction_heads.Config,),
         ['--sequences=1']),
        (analysis('ablation', ablation), [model, out], (ablation.Config,), ['--max_tokens=32'])]


def test_hundreds_of_random_command_lines(programs, program, tmp_path, monkeypatch):
    # not what is tried here
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda *args, **kwargs: None)
    rng, codes = random.Random(7), []
    for number in range(600):
        main, good, config_classes, last = programs[number % len(programs)]
        words = mutations(rng, config_classes, tmp_path)
        torch.manual_seed(0)
        try:
            code, out, err = program(main, *good, *words, *last)
        except BaseException as e:
            raise AssertionError(f'{type(e).__name__} for {str(words)[:300]} of program '
                                 f'{number % len(programs)}') from e
        assert code in (0, 2), words
        if code == 2:
            errors = [line for line in err.splitlines() if line.startswith('error: ')]
            assert len(errors) == 1 and len(errors[0]) > 20 and 'Traceback' not in err, (words, err)
        codes.append(code)
        (tmp_path / 'converted' / 'ckpt_mla.pt').unlink(missing_ok=True)
    assert len(codes) == 600 and 100 < codes.count(0) < 400


def test_four_at_the_programs_themselves(tiny_args, tmp_path):
    rng, lines = random.Random(10), []
    for script, cls in (('train.py', GPT), ('train_mla.py', GPT_MLA),
                        ('train_k_ahead.py', GPT_KAhead), ('train_mla.py', GPT_MLA)):
        words = [word for word in mutations(rng, (train.TrainConfig, cls.config_class), tmp_path)
                 if '\0' not in word and '\ud800' not in word]
        lines.append([script, *tiny_args, *words, '--eval_only=True', '--eval_iters=1'])

    def start(line):
        return subprocess.run([sys.executable, *line], cwd=ROOT, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, timeout=120)
    with ThreadPoolExecutor(2) as pool:
        for line, process in zip(lines, pool.map(start, lines)):
            code, err = process.returncode, process.stderr
            assert code in (0, 2) and 'Traceback' not in err, (line, err)
            assert err.count('error: ') == (code == 2), (line, err)
