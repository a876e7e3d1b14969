"""
What every analysis does beside its question: read the settings, load the model, print a table,
save the picture and the numbers.

An analysis is a module with a docstring, a Config, and three functions:

    analyse(subject, config)     the numbers, a dataclass of arrays
    table(result)                the short answer as text
    plot(results)                a matplotlib Figure of one or more results, a dictionary by the
                                 names of their models, on one scale
"""

import dataclasses
import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_least, configure

import numpy as np
import torch

from analysis.subject import load_subject
from models import describe
from runtime.device import pick_float64_device


@dataclass
class AnalysisConfig:
    model: str = ''  # a checkpoint, an out_dir, the directory of a Hugging Face GPT-2, or a name
        # such as gpt2
    out_dir: str = ''  # where picture and numbers go; '': out_analysis/ and the name of the model
    seed: int = 1337  # of all that is drawn at random
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    format: Literal['png', 'pdf'] = 'png'  # of pictures; 'pdf': a .pdf for a paper beside each .png

    least = {}  # of an analysis's own keys: the least values that are allowed

    def __post_init__(self):
        check_least(self, seed=0, **self.least)


def read_command(config_class):
    """Read the command line of an analysis into a config_class, and load the model that it names.
    The models may be given without --model= and --other=. Returns config and Subject. Raises
    UserError."""
    keys = [f.name for f in dataclasses.fields(config_class)]
    models = [key for key in ('model', 'other') if key in keys]
    config, _ = configure(sys.argv[1:], config_class, positional=models)
    return config, load_subject(config.model, pick_float64_device(config.device))


def settings(module, config, source):
    """The Config of one analysis of several, about the model at source. What the settings config
    of all have no key for is at its default."""
    known = {f.name for f in dataclasses.fields(module.Config)}
    shared = [key for key in ('out_dir', 'seed', 'device', 'format', 'text', 'other', 'prompt')
              if key in known and hasattr(config, key)]
    given = {key: getattr(config, key) for key in shared}
    if 'clean' in known:  # the prompt of patching
        given['clean'] = config.prompt
    return module.Config(model=source, **given)


def main(name, Config, analyse, table, plot, plot_prompt=None):
    """The program of one analysis. plot_prompt(label, result), if given, may return a second
    Figure."""
    config, subject = read_command(Config)
    print(describe(subject.model))
    out_dir = make_folder(config.out_dir or default_folder(subject))
    result = analyse(subject, config)
    print(f'\n{table(result)}\n')
    figures = {name: plot({subject.label: result})}
    if plot_prompt and (figure := plot_prompt(subject.label, result)):
        figures[f'{name}_prompt'] = figure
    save(name, result, figures, config, out_dir)
    pictures = ', '.join(picture_files(figures, config.format))
    print(f'saved {pictures} and {name}.json in {out_dir}')


def default_folder(subject):
    """The folder in out_analysis for a model's results: the path from here to the model. So the
    numbers of one model do not replace those of another."""
    parts = Path(os.path.relpath(subject.source)).parts
    return Path('out_analysis', *(part.removesuffix('.pt') for part in parts if part != '..'))


@contextmanager
def writing_to(out_dir):
    """Raise a UserError for what goes wrong in writing to out_dir."""
    try:
        yield
    except OSError as e:
        raise UserError(f'out_dir={out_dir} cannot be written to ({e.strerror or e}): give another'
                        ) from None


def make_folder(out_dir):
    with writing_to(out_dir):
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    return Path(out_dir)


def save(name, result, figures, config, out_dir):
    """Write the figures, a dictionary by name, and the numbers of result, a dataclass or a
    dictionary, with the settings that led to them. Raises UserError."""
    save_figures(figures, out_dir, config.format)
    with writing_to(out_dir):
        numbers = {'settings': dataclasses.asdict(config), **as_json(result)}
        text = json.dumps(numbers, allow_nan=False)
        (out_dir / f'{name}.json').write_text(text + '\n')


def picture_files(figures, format):
    """The files that figures, a dictionary by name, are saved in: file -> name."""
    return {f'{name}.{ending}': name for name in figures
            for ending in dict.fromkeys(['png', format])}


def save_figures(figures, out_dir, format='png'):
    """Write the figures, a dictionary by name, as .png and, if that is the format, as .pdf too.
    Raises UserError."""
    with writing_to(out_dir):
        for file, name in picture_files(figures, format).items():
            figures[name].savefig(out_dir / file)


def as_json(value):
    """A result as plain lists and numbers of six digits. What is not finite becomes None."""
    if dataclasses.is_dataclass(value):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return as_json(value.tolist())
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f'{value:.6g}') if math.isfinite(value) else None
    return value


def top_heads(scores, count=None, threshold=None):
    """(layer, head) of the highest scores (n_layer, n_head), highest first: all, or count of them,
    or those above threshold."""
    order = np.argsort(-scores, axis=None, kind='stable')[:count]
    pairs = [tuple(map(int, np.unravel_index(place, scores.shape))) for place in order]
    return [pair for pair in pairs if threshold is None or scores[pair] > threshold]


def read_heads(key, text, c):
    """'5.1,6.9', given for key, -> [(5, 1), (6, 9)]. c is the model's config. Raises UserError."""
    pairs = []
    for part in text.split(','):
        layer, dot, head = part.strip().partition('.')
        is_pair = dot and layer.isdecimal() and head.isdecimal()
        if not (is_pair and int(layer) < c.n_layer and int(head) < c.n_head):
            raise UserError(f'{key}={text!r} must be heads as layer.head, from 0.0 to '
                            f'{c.n_layer - 1}.{c.n_head - 1}, with commas between them')
        pairs.append((int(layer), int(head)))
    return pairs
