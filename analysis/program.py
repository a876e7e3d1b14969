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
from functools import cached_property
from pathlib import Path
from typing import Literal

from configurator import UserError, check_least, configure

import numpy as np
import torch

from analysis.notebook import Run, activation_shapes
from models import describe, label_of
from runtime.device import pick_float64_device
from runtime.loading import Trained, load_model
from sample import encode, read_prompt

BATCH_TOKENS = 2048  # at once


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


@dataclass
class Subject(Trained):
    """The trained model that an analysis is about."""
    label: str = ''  # what pictures call it; '': the end of source

    def __post_init__(self):
        self.label = self.label or '/'.join(Path(self.source).parts[-2:])

    def __repr__(self):
        return f'{self.source}: {describe(self.model)}'

    @property
    def device(self):
        return self.model.lm_head.weight.device

    @cached_property
    def activation_shapes(self):
        """The shape of each activation for two tokens, by its name."""
        return activation_shapes(self.model)

    @property
    def names(self):
        """The names of all activations that a Run can read and edit."""
        return list(self.activation_shapes)

    def run(self, text, edit=None, reference=None, seed=1337):
        """A Run (analysis/notebook.py) on a text, on several of as many tokens, or on ids (T,) or
        (B, T).

        edit says what becomes of activations: a dictionary of name -> a number, a tensor, 'zero',
        'mean', 'resample', or a function that gets the activation and returns what comes in its
        place. at(name, head, position) in place of a name edits a part. Means and resampled values
        are those of reference, another text or Run, by default of this text without edits. Raises
        UserError.
        """
        if reference is not None and not isinstance(reference, Run):
            reference = self.run(reference)
        return Run(self, self.read_text(text), edit, reference, seed)

    def read_text(self, text):
        """The ids (B, T) of a text, of several of as many tokens, or of ids. Raises UserError."""
        if isinstance(text, str):
            ids = [encode(self.tokenizer, 'text', text)]
        elif len(text) and isinstance(text[0], str):
            ids = [encode(self.tokenizer, 'text', one) for one in text]
        else:
            ids = torch.as_tensor(text, dtype=torch.long)
            ids = ids.view(-1, ids.size(-1)).tolist() if ids.numel() else [[]]
        lengths = sorted({len(row) for row in ids})
        if len(lengths) > 1:
            raise UserError(f'the texts have {lengths[0]} to {lengths[-1]} tokens: give texts of '
                            'as many, or run them one by one')
        self.check_fits('text', lengths[0])
        idx = torch.tensor(ids, dtype=torch.long, device=self.device)
        if idx.min() < 0 or idx.max() >= self.model.config.vocab_size:
            raise UserError(f'text has the id {idx.max()}, and vocab_size='
                            f'{self.model.config.vocab_size}: give ids of this model')
        return idx

    def prompt(self, text, key='prompt', most=48):
        """The ids, a list, of the text that was given for key, by default of how the val split of
        the model's data begins: most tokens of it, and no more than fit. Raises UserError."""
        if text:
            ids = self.tokens(key, text)
            self.check_fits(key, len(ids))
            return ids
        if not self.dataset:
            raise UserError(f'{key} is empty, and {self.source} names no data to take one from: '
                            f'give --{key}=TEXT')
        return self.open_data(key=key).val[:min(most, self.model.config.block_size)].tolist()

    def one_token(self, key, text):
        """The id of the token that the text given for key is. Raises UserError."""
        ids = encode(self.tokenizer, key, text)
        if len(ids) != 1:
            raise UserError(f'{key}={text!r} is {len(ids)} tokens: give a text that is a single '
                            "one, such as ' Mary' with the space before it")
        return ids[0]

    def check_fits(self, key, length):
        """Raise a UserError unless length tokens, given for key, are a text for the model."""
        block_size = self.model.config.block_size
        if not 0 < length <= block_size:
            raise UserError(f'{key} has {length} tokens, and 1 to block_size={block_size} fit: '
                            f'give a {"shorter" if length else "longer"} one')

    def tokens(self, key, text):
        """The ids, a list, of the text that was given for key, as read_prompt takes it. Raises
        UserError."""
        return encode(self.tokenizer, key, read_prompt(key, text))

    def windows(self, text, max_tokens, length):
        """The first windows of length + 1 tokens of a text, in batches (B, length + 1) of about
        BATCH_TOKENS. They have at most max_tokens together, but there is at least one.

        text is '' for the val split of the data that the model was trained on, FILE:path, or a
        dataset. Of one that holds sequences, the windows are those, or how they begin. Raises
        UserError where there is none or it is too short.
        """
        ids, sequence = text_tokens(self, text)
        span = sequence or length + 1
        if len(ids) < span or span <= length:
            raise UserError(f'text={text!r} has {min(len(ids), span):,} tokens, and {length + 1:,} '
                            'are needed: give a longer one')
        count = min(max(1, max_tokens // length), len(ids) // span)
        ids = torch.from_numpy(np.array(ids[:count * span], dtype=np.int64)).view(count, span)
        ids = ids[:, :length + 1]
        return ids.to(self.device).split(max(1, BATCH_TOKENS // length))


def text_tokens(subject, text):
    """The ids of a text as Subject.windows takes it, and how many of them a sequence has, None
    where it holds none. Raises UserError."""
    if text.startswith('FILE:'):
        return subject.tokens('text', text), None
    try:
        data = subject.open_data(text, key='text')
    except UserError as e:
        raise UserError(f'{e}, or --text=FILE:book.txt') from None
    data.check(data.sequence - 1 if data.sequence else 1, subject.model.config.vocab_size)
    return data.val, data.sequence


def load_subject(source, device, key='model', dtype='float32'):
    """The Subject at source, whose weights are in dtype. key is the setting that names source.
    Raises UserError."""
    if not source:
        raise UserError(f'{key} is empty: give --{key}=CHECKPOINT, an out_dir, a Hugging Face '
                        'directory, or gpt2')
    return Subject(**vars(load_model(source, device, dtype=getattr(torch, dtype))))


def same_tokens(name, subject, other):
    """Raise a UserError unless two Subjects read the same tokens, which the analysis name needs."""
    are_known = subject.tokenizer.knows_text or subject.dataset == other.dataset
    if subject.tokenizer != other.tokenizer or not are_known:
        raise UserError(f'{name} needs two models that read the same tokens, and '
                        f'{subject.source} and {other.source} do not: give two that were trained '
                        'on the same data')


def name_pair(*pair):
    """Label two Subjects by their kinds, MHA and MLA, or where these are the same by their
    sources too."""
    names = [label_of(subject.model.model_type, subject.model.config) for subject in pair]
    for name, subject in zip(names, pair):
        subject.label = f'{name}, {subject.source}' if len({*names}) < len(names) else name


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
    pictures = ', '.join(f'{picture}.{ending}' for picture in figures
                         for ending in dict.fromkeys(['png', config.format]))
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


def save_figures(figures, out_dir, format='png'):
    """Write the figures, a dictionary by name, as .png and, if that is the format, as .pdf too.
    Raises UserError."""
    with writing_to(out_dir):
        for name, figure in figures.items():
            for ending in dict.fromkeys(['png', format]):
                figure.savefig(out_dir / f'{name}.{ending}')


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
