"""Conversion by a share of the cache, of groups of heads, and of rotary positions."""

import math

import pytest
import torch
from conftest import tiny_model
from family import member
from test_checkpoint import save

import convert_mla
from model import GPT
from models import cached_numbers
from runtime.dataset import open_data
from runtime.factors import (
    activation_moments,
    attention_by_distance,
    convert,
    decouple,
    maps_of,
    mean_turn,
)
from runtime.loading import load_model
from train import main as train_main


def some_moments(model):
    return activation_moments(model, [torch.randint(14, (8, 16)) for _ in range(20)])


@pytest.mark.parametrize('name', ['mha, rotary', 'gqa, rotary', 'gqa', 'mqa', 'mha, gated',
                                  'mha, attention only'])
@torch.no_grad()
def test_the_family_is_converted_exactly_at_full_width(name):
    """Where heads share keys, the width of what they share is enough."""
    model = member(name).double()
    c, idx = model.config, torch.randint(14, (3, 16))
    n_kv = c.n_kv_head or c.n_head
    for moments in (None, some_moments(model)):
        mla, errors = convert(model, min(16, 2 * n_kv * c.head_dim), moments)
        assert mla.config.rotary == c.rotary and max(map(max, errors)) < 1e-5
        torch.testing.assert_close(mla(idx, idx)[0], model(idx, idx)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_keys_that_heads_share_become_the_rotary_key_exactly(bias):
    """Multi-query keys are one key for all heads. With all its frequencies as the shared rotary
    key, nothing of them is left for the latent, and the model is the same."""
    model = member('mqa', rotary='all', bias=bias).double()
    if bias:  # a shared rotary key has none
        for block in model.transformer.h:
            block.attn.c_attn.bias[16:24] = 0
    idx = torch.randint(14, (3, 16))
    mla, errors = convert(model, 16, some_moments(model), n_rotary=8)
    assert mla.config.rotary == 'decoupled' and mla.config.n_rotary == 8
    torch.testing.assert_close(mla(idx, idx)[0], model(idx, idx)[0], atol=1e-8, rtol=0)


@torch.no_grad()
def test_at_distance_0_decoupling_changes_no_score():
    """What turns and what does not then add up to what was there, for whatever keys."""
    attn = member('gqa, rotary', bias=True)
    maps = maps_of(attn, 0)
    covariance = torch.eye(16, dtype=torch.float64)
    apart = decouple(maps, 4, 2, covariance, torch.ones(4, 2))
    x, y = torch.randn(2, 7, 16, dtype=torch.float64)
    scores = torch.einsum('thd,shd->hts', (x @ maps.query.T + maps.query_bias).unflatten(1, (4, 4)),
                          (y @ maps.kv[:16].T).unflatten(1, (4, 4))) / 4 ** 0.5
    queries = (x @ apart.query.T + apart.query_bias).unflatten(1, (4, 6))
    keys = torch.cat(((y @ apart.kv[:16].T).unflatten(1, (4, 4)),
                      (y @ apart.rotary_key.T)[:, None].expand(-1, 4, -1)), dim=-1)
    found = torch.einsum('thd,shd->hts', queries, keys) / 6 ** 0.5
    torch.testing.assert_close(found, scores)
    assert torch.equal(apart.kv[16:], maps.kv[16:])


@torch.no_grad()
def test_what_turns_no_more_is_the_mean_over_the_distances_that_are_attended():
    """By hand, and no other factor has a smaller squared error."""
    attended = torch.rand(2, 9, dtype=torch.float64)
    attended /= attended.sum(1, keepdim=True)
    worth = mean_turn(attended, 4, 100.0)  # angles per token: 1 and 0.1
    for head in range(2):
        for pair, theta in enumerate((1.0, 0.1)):
            turns = [complex(math.cos(theta * d), -math.sin(theta * d)) for d in range(9)]
            wanted = sum(p * turn for p, turn in zip(attended[head].tolist(), turns))
            assert worth[head, pair].item() == pytest.approx(wanted)
    model = member('mha, rotary')
    moments = some_moments(model)
    for layer, block in zip(moments, model.transformer.h):
        torch.testing.assert_close(layer.attended.sum(1), torch.ones(2, dtype=torch.float64))
    x = torch.randn(1, 6, 16)
    found = attention_by_distance(model.transformer.h[0].attn, x)
    q, k, _ = model.transformer.h[0].attn.heads(x)
    for t in range(6):
        row = (q[0, :, t:t + 1] @ k[0, :, :t + 1].mT / 8 ** 0.5).softmax(-1)[:, 0]
        found[:, :t + 1] -= row.flip(-1)
    assert found.abs().max() < 1e-6


@torch.no_grad()
def test_a_share_of_the_cache_goes_where_the_keys_and_values_are_wide():
    """By hand: layer 0 has keys and values of rank 2, layer 1 of rank 8 with equal values."""
    model = tiny_model(GPT, bias=False).double()
    U = torch.linalg.qr(torch.randn(32, 8, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(16, 8, dtype=torch.float64)).Q
    for block, rank in zip(model.transformer.h, (2, 8)):
        block.attn.c_attn.weight[16:] = U[:, :rank] @ V[:, :rank].T
    idx = torch.randint(14, (2, 16))
    mla, errors = convert(model, 0, share=10 / 64)  # 2 layers of 2 n_embd = 32 numbers
    assert mla.config.n_latent == (2, 8) and max(map(max, errors)) < 1e-12
    torch.testing.assert_close(mla(idx, idx)[0], model(idx, idx)[0], atol=1e-10, rtol=0)
    mla, errors = convert(model, 0, share=5 / 64)
    assert mla.config.n_latent == (1, 4)  # both layers lose half
    assert [both for *_, both in errors] == pytest.approx([0.5 ** 0.5] * 2)
    assert convert(model, 0, share=1.0)[0].config.n_latent == 16
    model = member('mha, rotary').double()
    mla, _ = convert(model, 0, some_moments(model), n_rotary=4, share=0.5)
    assert cached_numbers(mla) == 32


@pytest.fixture
def trained(tiny_args, tmp_path, program):
    args = [*tiny_args, '--max_iters=200', '--eval_interval=100', '--rotary=all']
    code, _, err = program(train_main, *args)
    assert code == 0, err
    return tmp_path / 'out'


def test_program_heals_at_once_and_prints_the_curve(trained, data_dir, tmp_path, program):
    code, out, err = program(
        convert_mla.main, trained, '--rotary=decoupled', '--cache_share=0.25', '--heal_iters=40',
        f'--out_dir={tmp_path / "mla"}', '--device=cpu', '--calibration_tokens=500')
    assert code == 0, err
    curve = [line.split() for line in out.split('healing, val loss')[1].splitlines()[3:]]
    assert [int(step) for step, _ in curve] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    losses = [float(loss) for _, loss in curve]
    assert min(losses[1:]) < losses[0] and 'cache  16 numbers per token, 64 before' in out
    model = load_model(tmp_path / 'mla').model
    assert model.config.rotary == 'decoupled' and model.config.n_rotary == 4
    assert open_data(data_dir)


@pytest.mark.parametrize('options, words', [
    (['--rotary=decoupled'], "rotary=decoupled is for a model with rotary='all'"),
    (['--n_rotary=4'], 'n_rotary=4 is for rotary=decoupled'),
    (['--cache_share=0.25', '--n_latent=4'], 'cache_share=0.25 and n_latent=4 both say'),
    (['--cache_share=1.5'], 'cache_share=1.5 must be above 0 and at most 1'),
    (['--cache_share=0.001'], 'cache_share=0.001 leaves no latent in some layer'),
    (['--heal_iters=5'], 'heal_iters=5 needs the data of the training'),
    (['--rotary=all'], "'all' must be as it is or decoupled")])
def test_bad_settings_write_nothing(options, words, tmp_path, program):
    save(tmp_path / 'ckpt.pt', member('mha'))
    out_dir = f'--out_dir={tmp_path / "mla"}'
    code, out, err = program(convert_mla.main, tmp_path / 'ckpt.pt', '--device=cpu', out_dir,
                             *options)
    assert code == 2 and words in err and err.count('\n') == 1, err
    assert not (tmp_path / 'mla').exists()


@pytest.mark.parametrize('n_rotary', [0, 3, 10])
def test_a_rotary_width_that_heads_do_not_have(n_rotary, tmp_path, program):
    save(tmp_path / 'ckpt.pt', member('mha, rotary'))
    code, _, err = program(convert_mla.main, tmp_path / 'ckpt.pt', '--device=cpu',
                           '--rotary=decoupled', f'--n_rotary={n_rotary}',
                           f'--out_dir={tmp_path / "mla"}')
    assert code == 2 and f'n_rotary={n_rotary} must be even, from 2 to head_dim=8' in err
