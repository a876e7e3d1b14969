"""dtype='auto' on a CPU: bfloat16 only where it has been timed and is faster."""

import pytest
import torch
from conftest import ALL, tiny_model

import train as trainer
from runtime import device

pytestmark = pytest.mark.usefixtures('no_picture')


@pytest.fixture
def able(monkeypatch):
    """A CPU with instructions for bfloat16, on which any model is worth a try."""
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx512_bf16': True}, raising=False)
    monkeypatch.setattr(device, 'WORTH_A_TRY', 0)


def times(monkeypatch, bfloat16):
    monkeypatch.setattr(device, 'seconds_of', lambda block, x, dtype: {
        torch.float32: 1.0, torch.bfloat16: bfloat16}[dtype])


@pytest.mark.parametrize('seconds, wins', [(0.5, True), (0.95, False), (3.0, False)])
def test_the_faster_one_is_taken_and_a_resumed_run_keeps_it(seconds, wins, able, tiny_args,
                                                           monkeypatch, tmp_path, program):
    times(monkeypatch, seconds)
    code, out, err = program(trainer.main, *tiny_args)
    assert code == 0 and ('note: dtype=bfloat16: a block takes 0.50' in out) == wins, err
    name = 'bfloat16' if wins else 'float32'
    assert f'1 x cpu, {name}' in out
    times(monkeypatch, 2.0 - seconds)  # it would go the other way
    code, out, err = program(trainer.main, *tiny_args, '--init_from=resume', '--max_iters=7')
    assert code == 0 and f'1 x cpu, {name}' in out, err
    code, out, err = program(trainer.main, *tiny_args, '--dtype=float32')
    assert code == 0 and '1 x cpu, float32' in out, err


@ALL
def test_a_block_is_timed_and_left_as_it_was(model_class, able):
    model = tiny_model(model_class)
    before = [p.clone() for p in model.parameters()]
    assert 0 < device.bfloat16_ratio(model, 4) < 100
    assert all(torch.equal(p, was) and p.grad is None
               for p, was in zip(model.parameters(), before))


def test_small_models_and_other_cpus_are_not_tried(able, monkeypatch):
    model = tiny_model(trainer.GPT)
    monkeypatch.setattr(device, 'WORTH_A_TRY', 1e10)
    assert device.bfloat16_ratio(model, 4) is None
    monkeypatch.setattr(device, 'WORTH_A_TRY', 0)
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {'avx2': True}, raising=False)
    assert device.bfloat16_ratio(model, 4) is None
