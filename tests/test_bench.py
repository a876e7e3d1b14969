import json
from pathlib import Path

import pytest

import bench

TINY = ['decode', '--n_layer=2', '--n_head=2', '--n_embd=16', '--block_size=32', '--vocab_size=50', '--device=cpu', '--rounds=1',
        '--contexts=4']

# A stand-in for a nanoGPT checkout: what bench.py touches of its model.py, on top of this project's GPT.
PEER = '''
from dataclasses import dataclass
import torch, model

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(model.GPT):
    def __init__(self, config):
        super().__init__(model.GPTConfig(**vars(config)))
        print('number of parameters: 1')

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            idx = torch.cat((idx, self(idx[:, -self.config.block_size:])[0][:, -1:].argmax(-1)), 1)
        return idx
'''


def test_decode_measures_all_in_one_run(tmp_path, program):
    (tmp_path / 'model.py').write_text(PEER)
    code, out, err = program(bench.main, *TINY, '--contexts=1,20', '--new_tokens=15', f'--against={tmp_path},transformers',
                             '--batch_size=3', '--json=True')
    assert code == 0, err
    report = json.loads(out)
    rows = {(row['context'], row['model']): row for row in report['rows']}
    assert set(rows) == {(n, name) for n in (1, 20) for name in ('MHA', 'MLA', 'nanoGPT', 'transformers')}
    assert all(row['tokens_per_second'] > 0 and row['first_token_seconds'] > 0 for row in rows.values())
    assert [rows[n, 'MHA']['new_tokens'] for n in (1, 20)] == [15, 12]  # block_size leaves 12 behind the 20
    for n, length in ((1, 16), (20, 32)):
        assert rows[n, 'MHA']['cache_bytes'] == 2 * 3 * length * 2 * 16 * 4  # layers, rows, tokens, k and v, n_embd, bytes
        assert rows[n, 'MLA']['cache_bytes'] * 4 == rows[n, 'MHA']['cache_bytes']
        assert rows[n, 'nanoGPT']['cache_bytes'] is None
    assert report['settings']['n_latent'] == 8


def test_decode_prints_a_table(program):
    code, out, err = program(bench.main, *TINY, '--contexts=4', '--new_tokens=3', '--dtype=bfloat16')
    assert code == 0 and 'bfloat16' in out and out.count('MLA') == 2, err
    assert ' MHA ' in out and '1.00x' in out and '0.00 MB' in out


def test_passes_are_counted_whoever_makes_them():
    """A model of known slowness: the measured rate is that of its passes."""
    import time

    import torch

    class Slow(torch.nn.Module):
        def forward(self, idx):
            time.sleep(0.05 if idx.size(1) > 1 else 0.01)

    model = Slow()

    def decode(idx, n):
        model(idx)
        for _ in range(n - 1):
            model(idx[:, :1])
    first, rate = bench.time_decoding(bench.Contender('slow', model, decode, None), torch.zeros(4, 9), 6)
    assert first >= 0.05 and rate <= 4 / 0.01 and not model._forward_hooks


@pytest.mark.parametrize('args, words', [
    ([], "what to measure is ''"), (['training'], "what to measure is 'training'"), (TINY + ['--contexts=a'], "contexts='a'"),
    
    (TINY + ['--contexts=31'], 'between 1 and block_size - 2 = 30'), (TINY + ['--contexts='], "contexts=''"),
    (TINY + ['--against=nowhere'], "against='nowhere'"), (TINY + ['--new_tokens=1'], 'new_tokens=1 must be at least 2'),
    (TINY + ['--n_head=3'], 'not divisible'), (TINY + ['--context=3'], 'did you mean contexts?')])
def test_bad_input(args, words, program):
    code, out, err = program(bench.main, *args)
    assert code == 2 and words in err and err.count('\n') == 1 and out == ''


def test_another_program_is_no_nanogpt(tmp_path, program):
    (tmp_path / 'model.py').write_text('x = 1')
    code, _, err = program(bench.main, *TINY, f'--against={tmp_path}')
    assert code == 2 and "is not nanoGPT's (AttributeError" in err and err.count('\n') == 1
