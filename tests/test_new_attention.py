"""What CONTRIBUTING.md promises: a new attention takes one file, a line in models.py and two entry
files. Here it is multi-query attention (Shazeer 2019): all heads share a key and a value."""

import json
import runpy

import pytest
import torch
from conftest import CHARS, tiny_model

import models
import train
from analysis import report
from generate import generate
from models import Entry

MODEL_MQA = '''
import torch.nn as nn

from model import GPT, as_is, attend, split_heads, weights_into_heads


class MultiQueryAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        head_dim = config.n_embd // config.n_head
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.key_value = nn.Linear(config.n_embd, 2 * head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.head_dim = config.n_head, head_dim

    def key_and_value(self, x):
        k, v = self.key_value(x).chunk(2, dim=-1)
        return k.unsqueeze(1), v.unsqueeze(1)  # each (B, 1, T, head_dim)

    def shared(self, k):
        return k.expand(-1, self.n_head, -1, -1)

    def heads(self, x, start=0, tap=as_is):
        k, v = self.key_and_value(x)
        q, k, v = tap('q', split_heads(self.query(x), self.n_head)), tap('k', k), tap('v', v)
        return q, self.shared(k), self.shared(v)

    def forward(self, x, cache=None):
        q, (k, v), mask = split_heads(self.query(x), self.n_head), self.key_and_value(x), None
        if cache is not None:
            k, v, mask = cache.append(k, v)
        return self.c_proj(attend(q, self.shared(k), self.shared(v), mask))

    def cache_shapes(self, B, length):
        return [(B, 1, length, self.head_dim)] * 2

    def head_weights(self):
        W_K, W_V = weights_into_heads(self.key_value, 2).expand(-1, -1, -1).chunk(2)
        return (weights_into_heads(self.query, self.n_head), W_K.expand(self.n_head, -1, -1),
                W_V.expand(self.n_head, -1, -1),
                self.c_proj.weight.T.unflatten(0, (self.n_head, -1)))


class GPT_MQA(GPT):
    model_type = 'mqa'
    attention_class = MultiQueryAttention
'''
TRAIN_MQA = '''
"""Train a GPT_MQA: python train_mqa.py config/train_shakespeare_char_cpu.py"""

from configurator import run
from model_mqa import GPT_MQA
from train import main

if __name__ == '__main__':
    run(lambda: main(GPT_MQA, out_dir='out_mqa'))
'''
SAMPLE_MQA = '''
"""Sample from a GPT_MQA: python sample_mqa.py out_mqa"""

from configurator import run
from sample import main

if __name__ == '__main__':
    run(lambda: main('mqa', out_dir='out_mqa'))
'''


@pytest.fixture
def mqa(tmp_path, monkeypatch):
    """The new files in a folder, and the line in the registry. Returns a function that starts one
    of them as a program does."""
    files = {'model_mqa': MODEL_MQA, 'train_mqa': TRAIN_MQA, 'sample_mqa': SAMPLE_MQA}
    for name, text in files.items():
        (tmp_path / f'{name}.py').write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import model_mqa
    monkeypatch.setitem(models.MODELS, 'mqa', Entry(model_mqa.GPT_MQA, 'MQA', 'C3'))
    return lambda name: runpy.run_path(str(tmp_path / f'{name}.py'), run_name='__main__')


def test_it_is_trained_sampled_and_analysed(mqa, tiny_args, tmp_path, program):
    out = tmp_path / 'out'
    code, _, err = program(lambda: mqa('train_mqa'), *tiny_args, '--max_iters=4')
    assert code == 0, err
    resume = [*tiny_args, '--init_from=auto']
    code, text, err = program(lambda: mqa('train_mqa'), *resume)
    assert code == 0 and text.startswith('GPT_MQA: 2 layers'), err
    assert (out / 'ckpt_mqa.pt').exists()

    sampled = [out, '--device=cpu', '--num_samples=2', '--max_new_tokens=30']
    code, text, err = program(lambda: mqa('sample_mqa'), *sampled)
    assert code == 0 and text.count('---------------') == 2, err

    mha, pages = tmp_path / 'mha', tmp_path / 'report'
    assert program(train.main, *tiny_args, f'--out_dir={mha}')[0] == 0
    code, text, err = program(report.main, mha, out, f'--out_dir={pages}')
    assert code == 0, err
    page = (pages / 'report.html').read_text()
    assert '<h3>MQA</h3>' in page and '<h3>MHA</h3>' in page
    found = json.loads((pages / 'induction_heads.json').read_text())
    assert set(found) >= {'MHA', 'MQA'}


@torch.no_grad()
def test_its_cache_is_exact(mqa):
    model = tiny_model(models.MODELS['mqa'].model_class)
    assert model.cache_shapes(1, 16) == [[(1, 1, 16, 8)] * 2] * 2
    idx = torch.tensor([[1, 2, 3]])
    greedy = generate(model, idx, 12, len(CHARS), temperature=0)
    for _ in range(12):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(greedy, idx)
