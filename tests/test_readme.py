from dataclasses import fields
from pathlib import Path

import pytest

from bench import DecodeConfig, KAheadDecodeConfig, StepConfig
from convert_mla import ConvertConfig
from model_k_ahead import KAheadConfig
from sample import SampleConfig
from train import TrainConfig

README = (Path(__file__).parents[1] / 'README.md').read_text()


@pytest.mark.parametrize('config_class', [TrainConfig, KAheadConfig, SampleConfig, ConvertConfig, DecodeConfig, StepConfig,
                                          KAheadDecodeConfig])
def test_every_key_is_explained_with_its_default(config_class):
    missing = [f.name for f in fields(config_class) if f'| `{f.name}` | `{f.default!r}` | ' not in README]
    assert missing == []


def test_the_two_commands_come_first():
    blocks = README.split('```')
    assert 'make quick' in blocks[1] and 'make test' in blocks[1]
