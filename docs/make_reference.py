"""Write docs/reference.md: every key of every program, from the dataclasses. make docs calls it."""

import sys
from dataclasses import fields
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from textwrap import fill
from typing import Literal, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import describe_type, field_comments

from analysis import NAMES
from analysis.program import AnalysisConfig
from model import GPTConfig
from model_k_ahead import KAheadConfig
from model_mla import MLAConfig

INTRO = """\
# Every key of every program

`make docs` writes this file from the programs. `--help` prints the same.

- Config files are Python that assigns keys. `--key=value` and config files may be mixed, and later
  ones win.
- A switch may go without its `=True`. A name that a config file needs for itself begins with `_`.
- A mistake ends in one line and exit code 2, and no checkpoint is overwritten. Under torchrun its
  own report follows, and the exit code is 1.
- train_mla.py and sample_mla.py have `out_mla` as `out_dir`, train_k_ahead.py and
  sample_k_ahead.py have `out_k_ahead`.
- In the trainers `bias` is False by default, and `vocab_size` is that of the data, as in nanoGPT.
"""
# title, module whose docstring describes the program, its dataclass of keys
PROGRAMS = [
    ('train.py, train_mla.py, train_k_ahead.py', 'train', 'TrainConfig'),
    ('sample.py, sample_mla.py, sample_k_ahead.py', 'sample', 'SampleConfig'),
    ('evaluate.py', 'evaluate', 'EvaluateConfig'),
    ('runs.py', 'runs', 'RunsConfig'),
    ('convert_mla.py', 'convert_mla', 'ConvertConfig'),
    ('export_huggingface.py', 'export_huggingface', 'ExportConfig'),
    ('bench.py decode', 'bench', 'DecodeConfig'),
    ('bench.py train', 'bench_train', 'StepConfig'),
    ('bench.py k-ahead', 'bench', 'KAheadDecodeConfig'),
    ('bench.py prepare', 'bench', 'PrepareBenchConfig'),
    ('bench.py race', 'bench_race', 'RaceConfig'),
    ('study.py', 'study', 'StudyConfig'),
    ('data/prepare.py', 'data.prepare', 'PrepareConfig'),
    ('data/induction/prepare.py', 'data.induction.prepare', 'InductionConfig'),
    ('visualize_residual_space_gpt2.py', 'visualize_residual_space_gpt2', 'ResidualConfig'),
]
MODEL_KEYS = [
    ('The keys of every model', GPTConfig, ()),
    ('and of MLA', MLAConfig, (GPTConfig,)),
    ('and of k-ahead', KAheadConfig, (MLAConfig,)),
]


def table(config_class, known=()):
    """The keys of a dataclass, less those that the classes in known explain in the same words."""
    told = {row for cls in known for row in key_rows(cls)}
    rows = [row for row in key_rows(config_class) if row not in told]
    return '\n'.join(['| key | default | |', '|---|---|---|', *rows]) + '\n' if rows else ''


def key_rows(config_class):
    """A row of a table for each key of a dataclass: its name, default, comment and choices."""
    comments, hints = field_comments(config_class), get_type_hints(config_class)
    for field in fields(config_class):
        comment = comments[field.name].replace('|', '\\|')
        if get_origin(hints[field.name]) is Literal:
            comment += f' ({describe_type(hints[field.name])})'
        yield f'| `{field.name}` | `{field.default!r}` | {comment} |'


def summary(doc):
    """The first paragraph of a docstring, as a sentence."""
    text = ' '.join(cleandoc(doc).split('\n\n')[0].split()).removesuffix(':')
    return fill(text if text[-1] in '.?' else text + '.', 100, break_on_hyphens=False)


def reference():
    """The text of docs/reference.md."""
    parts = [INTRO]
    for title, module_name, class_name in PROGRAMS:
        module = import_module(module_name)
        config_class = getattr(module, class_name)
        program = module
        if title.startswith('bench.py'):
            program = import_module('bench').COMMANDS[title.split()[1]]
        parts += [f'## {title}\n', summary(program.__doc__) + '\n', table(config_class)]
        if class_name == 'TrainConfig':
            for heading, model_config, known in MODEL_KEYS:
                parts += [f'### {heading}\n', table(model_config, known)]
        if class_name in ('DecodeConfig', 'StepConfig'):
            parts.append('It takes the keys of the models too.\n')
    parts += ['## The keys of every analysis\n', table(AnalysisConfig)]
    for name in NAMES:
        module = import_module(f'analysis.{name}')
        own = table(module.Config, (AnalysisConfig,)) or 'It has no keys of its own.\n'
        parts += [f'## python -m analysis.{name}\n', summary(module.__doc__) + '\n', own]
    return '\n'.join(parts)


if __name__ == '__main__':
    (ROOT / 'docs' / 'reference.md').write_text(reference(), encoding='utf-8')
