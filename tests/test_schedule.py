"""The learning rate's schedules, and notes on settings that contradict each other."""

import math
import re
from dataclasses import replace
from pathlib import Path

from configurator import configure

import pytest

from model import GPTConfig
from model_k_ahead import KAheadConfig
from model_mla import MLAConfig
from runtime.schedule import contradictions, learning_rate_at
from train import TrainConfig

BASE = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110,
                   max_iters=110)


def rates(schedule, **settings):
    config = replace(BASE, lr_schedule=schedule, **settings)
    return [learning_rate_at(i, config) for i in range(130)]


def test_all_warm_up_alike_and_all_but_constant_end_at_min_lr():
    for schedule in ('cosine', 'linear', 'wsd', 'constant'):
        found = rates(schedule)
        assert found[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
        assert max(found) == found[10] == 1.0
        assert set(found[110:]) == {1.0 if schedule == 'constant' else 0.1}
        assert all(a >= b for a, b in zip(found[10:], found[11:]))


def test_each_schedule_at_known_points():
    assert rates('cosine')[60] == pytest.approx(0.55)
    assert rates('cosine')[35] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert [rates('linear')[i] for i in (35, 60, 85)] == pytest.approx([0.775, 0.55, 0.325])
    wsd = rates('wsd')  # it cools down from iteration 88 of 110 on
    assert set(wsd[10:89]) == {1.0} and wsd[89] < 1
    assert wsd[99] == pytest.approx(1 - 0.9 * math.sqrt(0.5))
    assert set(rates('constant')[10:]) == {1.0}
    assert set(rates('wsd', decay_lr=False)) == {1.0}


def test_a_warm_up_into_the_cooldown():
    found = rates('wsd', warmup_iters=100)
    assert found[100] == 1.0 and found[105] == pytest.approx(1 - 0.9 * math.sqrt(0.5))


@pytest.mark.parametrize('settings, words', [
    ({'min_lr': 2.0}, 'min_lr=2.0 is above learning_rate=1.0: the rate rises'),
    ({'warmup_iters': 110}, 'never leaves warm-up, and its highest learning rate is 0.991'),
    ({'max_iters': 50}, 'lr_decay_iters=110 is far above max_iters=50: .* ends at 0.7'),
    ({'max_iters': 50}, '--lr_decay_iters=50 --warmup_iters=2 would fit'),
    ({'lr_decay_iters': 50}, 'lr_decay_iters=50 is far below max_iters=110'),
    ({'lr_decay_iters': 600_000}, 'ends at 1 and not at min_lr=0.1; --lr_decay_iters=110'),
    ({'lr_decay_iters': 600_000, 'warmup_iters': 2000}, '--lr_decay_iters=110 --warmup_iters=5')])
def test_contradictions_are_noted(settings, words):
    line, = contradictions(replace(BASE, **settings), GPTConfig())
    assert re.search(words, line), line


@pytest.mark.parametrize('settings', [
    {}, {'lr_decay_iters': 100}, {'lr_decay_iters': 130}, {'eval_only': True, 'min_lr': 2.0},
    {'max_iters': 0}, {'decay_lr': False, 'min_lr': 2.0},
    {'lr_schedule': 'constant', 'lr_decay_iters': 600_000, 'min_lr': 2.0}])
def test_settings_that_can_be_meant(settings):
    assert contradictions(replace(BASE, **settings), GPTConfig()) == []


def test_a_latent_that_is_too_wide():
    for width, words in ((768, None), (769, "smaller than MHA's of 1536"),
                         (1536, "as large as MHA's"), (1537, "larger than MHA's")):
        lines = contradictions(BASE, MLAConfig(n_latent=width))
        assert [words in line for line in lines] == [True] * (words is not None)
    assert contradictions(BASE, KAheadConfig()) == []


def test_a_rotary_base_without_rotary_positions():
    line, = contradictions(BASE, GPTConfig(rotary_base=1000.0))
    assert line.startswith('rotary_base=1000 does nothing')
    for settings in ({}, {'rotary': 'all', 'rotary_base': 1000.0}):
        assert contradictions(BASE, GPTConfig(**settings)) == []


@pytest.mark.parametrize('path', sorted(Path(__file__).parents[1].glob('config/*.py')), ids=str)
def test_no_config_of_ours_contradicts_itself(path):
    config, _ = configure([str(path)], TrainConfig, KAheadConfig)
    assert contradictions(config, GPTConfig()) == []
