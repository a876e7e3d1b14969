"""
The trained model that an analysis or a notebook is about, and the texts that belong to it.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from configurator import UserError

import numpy as np
import torch

from analysis.notebook import Run, activation_shapes
from models import describe, label_of
from runtime.loading import Trained, load_model
from sample import encode, read_prompt

BATCH_TOKENS = 2048  # at once


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
