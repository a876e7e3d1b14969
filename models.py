"""
The models of this project. Checkpoints, samplers, benchmarks, comparison and report look them up
here by their model_type. A new attention needs its import and one line in MODELS.

VARIANTS are settings of these models, whose caches are of one size where that can be chosen. The
comparison and the benchmarks know them by their names.
"""

import math
from typing import Callable, Literal, NamedTuple, get_args, get_origin, get_type_hints

from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA, MLAConfig


class Entry(NamedTuple):
    model_class: type
    label: str  # in tables and pictures
    colour: str  # in pictures, one of matplotlib's


MODELS = {
    'gpt': Entry(GPT, 'MHA', 'C0'),
    'mla': Entry(GPT_MLA, 'MLA', 'C1'),
    'k_ahead': Entry(GPT_KAhead, 'k ahead', 'C2'),
}


class Variant(NamedTuple):
    model_type: str
    colour: str
    settings: Callable  # from an MLAConfig of the same sizes, whose n_latent is that of MLA


def kv_heads(c):
    """The n_kv_head whose keys and values are nearest to n_latent numbers per token."""
    divisors = [n for n in range(1, c.n_head) if c.n_head % n == 0] or [1]
    return min(divisors, key=lambda n: abs(2 * n * c.head_dim - c.n_latent))


def decoupled(c):
    """A latent that is as wide as MLA's together with the rotary key."""
    n_rotary = MLAConfig(n_head=c.n_head, n_embd=c.n_embd, rotary='decoupled').n_rotary
    return dict(rotary='decoupled', n_rotary=n_rotary, n_latent=max(1, c.n_latent - n_rotary))


VARIANTS = {
    'mha': Variant('gpt', 'C0', lambda c: {}),
    'gqa': Variant('gpt', '#009E73', lambda c: dict(n_kv_head=kv_heads(c))),
    'mla': Variant('mla', 'C1', lambda c: dict(n_latent=c.n_latent)),
    'mla_decoupled': Variant('mla', '#CC79A7', decoupled),
    'mha_rotary': Variant('gpt', '#56B4E9', lambda c: dict(rotary='all')),
    'gqa_rotary': Variant('gpt', 'C7', lambda c: dict(rotary='all', n_kv_head=kv_heads(c))),
    'mla_rotary': Variant('mla', 'C5', lambda c: dict(rotary='all', n_latent=c.n_latent)),
}


def label_of(model_type, c):
    """What tables and pictures call a model of the config c: MHA, GQA rotary, MLA decoupled."""
    name = MODELS[model_type].label
    if name == 'MHA' and c.n_kv_head not in (None, c.n_head):
        name = 'GQA'
    return name + {'none': '', 'all': ' rotary'}.get(c.rotary, f' {c.rotary}')


def describe(model):
    """One line: class, size and number of parameters."""
    c = model.config
    parts = [f'{c.n_layer} layers', f'{c.n_head} heads']
    if c.n_kv_head not in (None, c.n_head):
        parts.append(f'{c.n_kv_head} of keys and values')
    parts.append(f'{c.n_embd} wide')
    if getattr(c, 'n_latent', None):
        parts.append('latent ' + '/'.join(map(str, widths(c))))
        parts += [f'query latent {c.n_query_latent}'] if c.n_query_latent else []
        norms = [name for name in ('norm', 'scale') if getattr(c, f'latent_{name}')]
        parts += [f'latent {" and ".join(norms)}'] if norms else []
    if c.rotary != 'none':
        turned = f' {c.n_rotary}' if c.rotary == 'decoupled' else ''
        parts.append(f'rotary {c.rotary}{turned} (base {c.rotary_base:g})')
    parts += {False: ['no MLP'], 'gated': ['gated MLP']}.get(c.mlp, [])
    if hasattr(c, 'k_ahead'):
        parts.append(f'{c.k_ahead} tokens ahead by {c.head} heads')
    name = MODELS[model.model_type].model_class.__name__  # not type(model), which fsdp replaces
    millions = model.get_num_params(non_embedding=False) / 1e6
    return f'{name}: {", ".join(parts)}, context {c.block_size}, {millions:.2f} M parameters'


def widths(config):
    """The n_latent of each layer; the only one where all have the same."""
    return config.n_latent if isinstance(config.n_latent, tuple) else (config.n_latent,)


def cached_numbers(model):
    """How many numbers decoding remembers of each token, in all layers together."""
    return sum(math.prod(shape) for layer in model.cache_shapes(1, 1) for shape in layer)


def keys_elsewhere(model_class):
    """The keys, and pairs of key and value, that other models have and model_class has not, and the
    programs that take them."""
    own, found = get_type_hints(model_class.config_class), {}
    for model_type, entry in reversed(MODELS.items()):
        for key, hint in get_type_hints(entry.model_class.config_class).items():
            options = get_args(hint) if get_origin(hint) is Literal else ()
            more = [(key, option) for option in options if option not in get_args(own.get(key))]
            found |= dict.fromkeys([key] if key not in own else more, f'train_{model_type}.py')
    return found
