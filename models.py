"""
The models of this project. Checkpoints, samplers, benchmarks, comparison and report look them up
here by their model_type. A new attention needs its import and one line in MODELS.
"""

import math
from typing import NamedTuple

from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA


class Entry(NamedTuple):
    model_class: type
    label: str  # in tables and pictures
    colour: str  # in pictures, one of matplotlib's


MODELS = {
    'gpt': Entry(GPT, 'MHA', 'C0'),
    'mla': Entry(GPT_MLA, 'MLA', 'C1'),
    'k_ahead': Entry(GPT_KAhead, 'k ahead', 'C2'),
}


def describe(model):
    """One line: class, size and number of parameters."""
    c = model.config
    latent = f', latent {c.n_latent}' if getattr(c, 'n_latent', None) else ''
    ahead = f', {c.k_ahead} tokens ahead by {c.head} heads' if hasattr(c, 'k_ahead') else ''
    name = MODELS[model.model_type].model_class.__name__  # not type(model), which fsdp replaces
    millions = model.get_num_params(non_embedding=False) / 1e6
    return (f'{name}: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide{latent}{ahead}, '
            f'context {c.block_size}, {millions:.2f} M parameters')


def cached_numbers(model):
    """How many numbers decoding remembers of each token, in all layers together."""
    return sum(math.prod(shape) for layer in model.cache_shapes(1, 1) for shape in layer)
