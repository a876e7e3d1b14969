"""
For the person at the notebook: run a model on a text, read any activation by its name, change any,
and ask what follows.

    from analysis import at, load
    m = load('out_shakespeare_quick/ckpt_mla.pt')
    run = m.run('To be, or not to be')
    run['blocks.1.attn.pattern'], run['blocks.1.attn.latent'], run.logits, run.loss
    m.run('To be', edit={'blocks.0.mlp_out': 0, at('blocks.2.attn.z', head=1): 'mean'})

docs/notebook.md has a table of the names. They are those of TransformerLens without its hook_, and
names with it are understood too.
"""

import zlib
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import NamedTuple

from configurator import UserError

import numpy as np
import torch

from analysis.plots import token_labels
from analysis.record import Taps, record

SAME_AS = {'.attn.latent': '.attn.kv_latent', '.attn.scores': '.attn.attn_scores',
           '.attn.out': '.attn_out', '.mlp.out': '.mlp_out'}
WORDS = ('zero', 'mean', 'resample')
OVER_PAIRS = ('attn_scores', 'pattern')  # activations of pairs of positions
LAST = ('ln_final.out', 'logits')  # what comes behind the last block


class Place(NamedTuple):
    """A part of an activation: some heads, some positions, or all."""
    name: str
    head: tuple | None = None
    position: tuple | None = None

    def index(self, value):
        """What picks the part out of value, (B, T, n) or (B, n_head, T, n)."""
        index = [slice(None)] * value.dim()
        if self.position is not None:
            index[-2] = torch.tensor(self.position, device=value.device)
        if self.head is not None:
            index[1] = torch.tensor(self.head, device=value.device)
            if self.position is not None:  # all pairs of the two
                index[1] = index[1][:, None]
        return tuple(index)


def at(name, head=None, position=None):
    """The key of an edit of some heads and positions, each a number or several, None for all. A
    position of a pattern is that of the query."""
    one, other = (given if given is None else tuple(torch.as_tensor(given).reshape(-1).tolist())
                  for given in (head, position))
    return Place(name, one, other)


def own_name(name):
    """TransformerLens's name and the other ones in SAME_AS as that of record.py."""
    name = name.replace('hook_', '')
    for ending, own in SAME_AS.items():
        if name.endswith(ending):
            name = name.removesuffix(ending) + own
    return name


class Everything:
    """A set of names that has them all."""

    def __contains__(self, name):
        return True


@torch.no_grad()
def activation_shapes(model):
    """The names of all activations of a model with their shapes for a sequence of two tokens, or
    of one where no more fit."""
    idx = torch.zeros(1, min(2, model.config.block_size), dtype=torch.long,
                      device=model.lm_head.weight.device)
    taps = Taps(keep=Everything())
    for block in record(model, idx, taps):
        pass
    predict(model, block.after, taps)
    return {name: tuple(value.shape) for name, value in taps.found.items()}


@torch.no_grad()
def predict(model, x, taps):
    """The logits (B, T, vocab_size) of the last residual stream x (B, T, n_embd)."""
    return taps('logits', model.lm_head(taps('ln_final.out', model.transformer.ln_f(x))))


@dataclass
class Edit:
    """What becomes of a part of an activation."""
    place: Place
    how: object  # a number, a tensor, 'zero', 'mean', 'resample', or a function
    reference: object  # the Run that means and resampled values are taken from
    seed: int

    def __call__(self, value):
        index = self.place.index(value)
        part = value[index]
        changed = self.change(part, value)
        if changed.shape != part.shape:
            raise UserError(f'the edit of {self.place.name} gives {tuple(changed.shape)}, and what '
                            f'it replaces is {tuple(part.shape)}: give that shape')
        value = value.clone()
        value[index] = changed
        return value

    def change(self, part, value):
        """What comes in the place of part, which is value[index]."""
        if callable(self.how):
            return torch.as_tensor(self.how(part.clone())).to(part)
        if isinstance(self.how, str) and self.how != 'zero':
            return getattr(self, self.how)(value).expand_as(value)[self.place.index(value)]
        how = torch.as_tensor(0 if isinstance(self.how, str) else self.how).to(part)
        return how.expand(part.shape) if how.dim() == 0 else how

    def others(self, value):
        """The reference's values of this activation. Raises UserError where pairs of positions are
        not as many as those of value."""
        others = self.reference[self.place.name]
        if self.place.name.endswith(OVER_PAIRS) and others.shape[1:] != value.shape[1:]:
            raise UserError(f'{self.place.name} is over pairs of tokens: give a reference of '
                            f'{value.size(-1)} tokens, as the text has')
        return others

    def mean(self, value):
        """The mean over the reference's sequences, and its positions where that makes sense."""
        is_over_pairs = self.place.name.endswith(OVER_PAIRS)
        return self.others(value).mean(0 if is_over_pairs else (0, -2), keepdim=True)

    def resample(self, value):
        """Each position's value from a place of the reference drawn at random, or each sequence's
        where the activation is over pairs of positions."""
        others = self.others(value)
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(self.place.name.encode()))
        if self.place.name.endswith(OVER_PAIRS):
            return others[torch.randint(len(others), (len(value),), generator=generator)]
        size = len(value), value.size(-2)
        rows = torch.randint(len(others), size, generator=generator)
        columns = torch.randint(others.size(-2), size, generator=generator)
        return others.movedim(-2, 1)[rows, columns].movedim(1, -2)


def read_edits(subject, edit, length):
    """The edits that were given, by Place. Raises UserError for what the model has not."""
    found = {}
    for key, how in edit.items():
        place = Place(key) if isinstance(key, str) else key
        place = place._replace(name=known_name(subject, place.name))
        shape = subject.activation_shapes[place.name]
        n_heads = shape[1] if len(shape) == 4 else 0
        for what, asked, count in (('head', place.head, n_heads),
                                   ('position', place.position, length)):
            wrong = [i for i in asked or () if not -count <= i < count]
            if wrong:
                raise UserError(f'{what}={wrong[0]} of {place.name} is not there: it has {count}')
        is_known = how in WORDS if isinstance(how, str) else (
            callable(how) or isinstance(how, (int, float, torch.Tensor, np.ndarray, np.number)))
        if not is_known:
            raise UserError(f"edit={how!r} of {place.name} must be a number, a tensor, 'zero', "
                            "'mean', 'resample' or a function")
        if place in found:
            raise UserError(f'{place.name} is edited twice, under two of its names: leave one out')
        found[place] = how
    return found


def known_name(subject, name):
    """The name of an activation of the model. Raises UserError."""
    own, shapes = own_name(name), subject.activation_shapes
    if own not in shapes:
        near = get_close_matches(own, shapes, 1)
        raise UserError(f'there is no activation {name!r} in this model: '
                        + (f'did you mean {near[0]!r}?' if near else 'm.names lists them'))
    return own


class Run:
    """A run of a model. It goes through the model when something is asked for, as far as is needed,
    and keeps what was asked for. So the functions among its edits are called each time, and have to
    give the same answer."""

    def __init__(self, subject, idx, edit=None, reference=None, seed=1337):
        """subject is a Subject. idx (B, T) are its tokens' ids. edit, reference and seed are those
        of Subject.run."""
        self.subject, self.idx, self.kept = subject, idx, {}
        edits = read_edits(subject, edit or {}, idx.size(1))
        asked_for_others = any(how in ('mean', 'resample') for how in edits.values()
                               if isinstance(how, str))
        if reference is None and asked_for_others:
            reference = Run(subject, idx)
        self.edits = {}
        for place, how in edits.items():
            one = Edit(place, how, reference, seed)
            before = self.edits.get(place.name)
            self.edits[place.name] = one if before is None else partial(both, before, one)

    def __repr__(self):
        B, T = self.idx.shape
        changed = f', {len(self.edits)} edited' if self.edits else ''
        return f'Run of {B} x {T} tokens{changed}: {"".join(self.tokens[0])[:60]!r}'

    @cached_property
    def tokens(self):
        """The text of each token, a list for each sequence."""
        decode = self.subject.tokenizer.decode
        return [[decode([i]) for i in row] for row in self.idx.tolist()]

    def labels(self, sequence=0):
        """The texts of the tokens of a sequence with their white space visible."""
        return token_labels(self.subject.tokenizer, self.idx[sequence].tolist())

    def label(self, token):
        """The text of a token id with its white space visible."""
        return token_labels(self.subject.tokenizer, [token])[0]

    def __getitem__(self, name):
        """The activation of a name, or a dictionary for one with * such as
        'blocks.*.attn.pattern'."""
        if '*' in name:
            found = [known for known in self.subject.activation_shapes
                     if fnmatchcase(known, own_name(name))]
            if not found:
                raise UserError(f'no activation is called {name!r}: m.names lists them')
            return self.read(found)
        return self.read([name])[known_name(self.subject, name)]

    def read(self, names):
        """The activations of several names in one pass, a dictionary."""
        names = [known_name(self.subject, name) for name in names]
        missing = frozenset(names) - self.kept.keys()
        if missing:
            model, taps = self.subject.model, Taps(self.edits, missing, self.kept)
            for block in record(model, self.idx, taps):
                if missing <= self.kept.keys():
                    break
            if missing & {*LAST}:
                predict(model, block.after, taps)
        return {name: self.kept[name] for name in names}

    @property
    def logits(self):
        """The logits (B, T, vocab_size)."""
        return self['logits']

    @cached_property
    def loss(self):
        """The loss in nats (B, T - 1) of each token but the first, given those before it."""
        logits = self.logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.mT, self.idx[:, 1:], reduction='none')

    def logit_lens(self, sequence=0):
        """analysis.logit_lens of a sequence: a LogitLens."""
        from analysis.logit_lens import lens  # which imports this file
        return lens(self, sequence)

    def attribution(self, token, against='', position=-1, sequence=0):
        """analysis.attribution of the logit of a token, less that of against: an Attribution."""
        from analysis.attribution import attribute_run
        return attribute_run(self, token, against, position, sequence)


def both(first, second, value):
    return second(first(value))
