"""
Which heads feed which: what one head writes is read by the queries, keys or values of a later one.

Elhage et al. 2021, "Analyzing a Two-Layer Model", for maps of row vectors, with OV = W_V W_O and QK = W_Q W_K^T:

    Q-composition    |OV_1 QK_2|    / (|OV_1| |QK_2|)
    K-composition    |OV_1 QK_2^T|  / (|OV_1| |QK_2|)
    V-composition    |OV_1 OV_2|    / (|OV_1| |OV_2|)          in Frobenius norms

less what random matrices of the same shape give, so that 0 is chance. 1 is possible for maps of rank 1 alone: two that use
all of r directions alike, the same ones, have 1 / sqrt(r). Chance and its spread are those of heads that share nothing; the heads of an
MLA layer share its latent, and where they have learned nothing their scores scatter somewhat more around the same mean.
"""

from dataclasses import dataclass

import numpy as np
import torch

from analysis.circuits import Heads, centred, folded_heads, head_names, triangle
from analysis.plots import Panel, draw_panels, symmetric
from analysis.program import AnalysisConfig, main, progress
from configurator import UserError, check_least, run

KINDS = {'q': 'Q', 'k': 'K', 'v': 'V'}


@dataclass
class Config(AnalysisConfig):
    random_pairs: int = 200  # pairs of random heads that say what chance gives
    top: int = 5  # strongest pairs of each kind in the table

    def __post_init__(self):
        super().__post_init__()
        check_least(self, random_pairs=2, top=1)


@dataclass
class Composition:
    names: list  # layer.head of each head
    q: np.ndarray  # (heads, heads) Q-composition of the row's output with the column's query, less chance; nan where the
    k: np.ndarray  # column does not come in a later layer
    v: np.ndarray
    chance: dict  # of each kind, the mean over random pairs
    chance_spread: dict  # and its standard deviation
    top: int


def norms(X):
    return X.flatten(-2).norm(dim=-1)


def compositions(first, second):
    """Q-, K- and V-composition of every head of first with every head of second, both Heads of shape (n, head, ...) that
    flatten: three tensors (heads, heads)."""
    W_V, W_O = first.W_V.flatten(0, 1), first.W_O.flatten(0, 1)
    # a factor with orthonormal columns or rows does not change a Frobenius norm, so that of W_V only its triangle is needed
    writes = triangle(W_V) @ W_O  # (heads, head_dim, n_embd), in place of OV_1
    Q, K = second.W_Q.flatten(0, 1), second.W_K.flatten(0, 1)
    V, O = second.W_V.flatten(0, 1), second.W_O.flatten(0, 1)
    reads = {'q': Q @ triangle(K).mT, 'k': K @ triangle(Q).mT, 'v': V @ triangle(O.mT).mT}  # each (heads, n_embd, head_dim)
    size = norms(writes)
    scores = {}
    for kind, read in reads.items():
        columns = [norms(writes @ one) / (size * one.norm()).clamp_min(1e-300) for one in read]
        scores[kind] = torch.stack(columns, dim=-1)  # (heads, heads)
    return scores


def chance(n_embd, head_dim, pairs, seed):
    """Mean and standard deviation of each composition over pairs of heads whose entries are independent and normal."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {kind: [] for kind in KINDS}
    for _ in range(pairs):
        one, other = (Heads(*(centred(torch.randn(1, 1, n_embd, head_dim, dtype=torch.float64, generator=generator), -2)
                              for _ in range(3)),
                            centred(torch.randn(1, 1, head_dim, n_embd, dtype=torch.float64, generator=generator)))
                      for _ in range(2))
        for kind, score in compositions(one, other).items():
            drawn[kind].append(score.item())
    return {kind: float(np.mean(values)) for kind, values in drawn.items()}, \
        {kind: float(np.std(values)) for kind, values in drawn.items()}


def layers(heads, which):
    return Heads(heads.W_Q[which], heads.W_K[which], heads.W_V[which], heads.W_O[which])


def analyse(subject, config):
    c = subject.model.config
    if c.n_layer < 2:
        raise UserError('composition is between heads of different layers, and n_layer=1: take a model with more')
    heads = folded_heads(subject.model)
    means, spreads = chance(c.n_embd, c.n_embd // c.n_head, config.random_pairs, config.seed)
    result = {kind: np.full((c.n_layer * c.n_head,) * 2, np.nan) for kind in KINDS}
    for layer in progress(range(1, c.n_layer), 'composition'):
        later = slice(layer * c.n_head, (layer + 1) * c.n_head)
        for kind, scores in compositions(layers(heads, slice(layer)), layers(heads, slice(layer, layer + 1))).items():
            result[kind][:layer * c.n_head, later] = scores.cpu().numpy() - means[kind]
    return Composition(head_names(subject.model), **result, chance=means, chance_spread=spreads, top=config.top)


def strongest(result, kind, count):
    """(score, writer, reader) of the pairs with the highest scores."""
    scores = getattr(result, kind)
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=None, kind='stable')[:count]
    places = [np.unravel_index(place, scores.shape) for place in order]
    return [(scores[i, j], result.names[i], result.names[j]) for i, j in places if np.isfinite(scores[i, j])]


def table(result):
    lines = []
    for kind, name in KINDS.items():
        lines.append(f'{name}-composition, less chance ({result.chance[kind]:.3f} +- {result.chance_spread[kind]:.3f}), '
                     f'mean {np.nanmean(getattr(result, kind)):+.3f}')
        lines += [f'   {writer:>5} -> {reader:<5} {score:+.3f}' for score, writer, reader in strongest(result, kind, result.top)]
    return '\n'.join(lines)


def plot(results):
    panels = []
    for kind, name in KINDS.items():
        maps = {label: getattr(result, kind) for label, result in results.items()}
        end = symmetric(maps)
        panels.append(Panel(f'{name}-composition', maps, 'score less chance', -end, end, 'RdBu_r', 'head that writes',
                            'head that reads', numbers=False,
                            names={label: (result.names,) * 2 for label, result in results.items()}))
    return draw_panels('Which heads feed which (grey: not in a later layer)', panels)


if __name__ == '__main__':
    run(lambda: main('composition', Config, analyse, table, plot))
