from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from analysis import NAMES
from analysis.program import AnalysisConfig
from bench import DecodeConfig, KAheadDecodeConfig, PrepareBenchConfig, StepConfig
from convert_mla import ConvertConfig
from data.openwebtext.prepare import PrepareConfig
from evaluate import EvaluateConfig
from model_k_ahead import KAheadConfig
from sample import SampleConfig
from train import TrainConfig
from visualize_residual_space_gpt2 import ResidualConfig

README = (Path(__file__).parents[1] / 'README.md').read_text()


@pytest.mark.parametrize('config_class', [TrainConfig, KAheadConfig, SampleConfig, ConvertConfig, DecodeConfig, StepConfig,
                                          KAheadDecodeConfig, AnalysisConfig, ResidualConfig,
                                          EvaluateConfig, PrepareConfig, PrepareBenchConfig])
def test_every_key_is_explained_with_its_default(config_class):
    missing = [f.name for f in fields(config_class) if f'| `{f.name}` | `{f.default!r}` | ' not in README]
    assert missing == []


@pytest.mark.parametrize('name', NAMES)
def test_every_key_of_an_analysis_is_explained(name):
    config_class, common = import_module(f'analysis.{name}').Config, {f.name for f in fields(AnalysisConfig)}
    own = [f for f in fields(config_class) if f.name not in common]
    assert [f.name for f in own if f'| `{name}` | `{f.name}` | `{f.default!r}` | ' not in README] == []
    assert f'| `{name}` | ' in README


def test_the_two_commands_come_first():
    blocks = README.split('```')
    assert 'make quick' in blocks[1] and 'make test' in blocks[1]
