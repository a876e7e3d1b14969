"""
Which heads feed which: what one head writes is read by the queries, keys or values of a later one.

    python -m analysis.composition out/ckpt.pt

It needs a model of two layers or more, and no text. The scores are those of Elhage et al. 2021,
"Analyzing a Two-Layer Model", for maps of row vectors, with OV = W_V W_O and QK = W_Q W_K^T:

    Q-composition    |OV_1 QK_2|    / (|OV_1| |QK_2|)
    K-composition    |OV_1 QK_2^T|  / (|OV_1| |QK_2|)
    V-composition    |OV_1 OV_2|    / (|OV_1| |OV_2|)          in Frobenius norms

The scores of random matrices of the same shape are subtracted, so that 0 is chance. Only maps of
rank 1 reach 1: two maps that use the same r directions equally have 1 / sqrt(r). Chance and its
spread are those of heads that share nothing. The heads of an MLA layer share its latent. Where
they have learned nothing, their scores scatter somewhat more around the same mean. So it is with
the heads of a group (GQA). Of rotary scores, the content part is meant, as circuits.py has it.
"""

from dataclasses import dataclass

from configurator import UserError, run

import numpy as np
import torch

from analysis.circuits import (
    Heads,
    centred,
    folded_heads,
    head_names,
    part_of_scores,
    r_factor,
)
from analysis.plots import Panel, draw_panels, field_maps, symmetric, with_notes
from analysis.program import AnalysisConfig, main
from runtime.progress import progress_bar

KINDS = {'q': 'Q', 'k': 'K', 'v': 'V'}


@dataclass
class Config(AnalysisConfig):
    random_pairs: int = 200  # pairs of random heads that say what chance gives
    top: int = 5  # strongest pairs of each kind in the table
    least = dict(random_pairs=2, top=1)


@dataclass
class Composition:
    names: list  # layer.head of each head
    # (heads, heads) Q-composition of the row's output with the column's query, less chance; nan
    # where the column is not in a later layer
    q: np.ndarray
    k: np.ndarray  # the same for keys
    v: np.ndarray  # and values
    chance: dict  # of each kind, the mean over random pairs
    chance_spread: dict  # of each kind, the standard deviation over random pairs
    top: int
    note: str = ''  # which part of the scores Q and K are about


def norms(X):
    return X.flatten(-2).norm(dim=-1)


def compositions(first, second):
    """Q-, K- and V-composition of every head of first with every head of second, both Heads. Their
    first two dimensions are flattened to one. A dictionary of three tensors (heads, heads)."""
    W_V, W_O = first.W_V.flatten(0, 1), first.W_O.flatten(0, 1)
    # A factor with orthonormal columns or rows does not change a Frobenius norm, so the R of the
    # QR factorisation can replace one factor of each product.
    writes = r_factor(W_V) @ W_O  # (heads, head_dim, n_embd), in place of OV_1
    Q, K, V = (W.flatten(0, 1) for W in (second.W_Q, second.W_K, second.W_V))
    out = second.W_O.flatten(0, 1)
    reads = {'q': Q @ r_factor(K).mT,  # each (heads, n_embd, head_dim)
             'k': K @ r_factor(Q).mT,
             'v': V @ r_factor(out.mT).mT}
    size = norms(writes)
    scores = {}
    for kind, read in reads.items():
        columns = [norms(writes @ one) / (size * one.norm()).clamp_min(1e-300) for one in read]
        scores[kind] = torch.stack(columns, dim=-1)  # (heads, heads)
    return scores


def random_heads(n_embd, head_dim, generator):
    """The Heads of one head whose entries are independent and normal."""
    def draw(*shape):
        return torch.randn(1, 1, *shape, dtype=torch.float64, generator=generator)
    readers = [centred(draw(n_embd, head_dim), -2) for _ in range(3)]
    return Heads(*readers, centred(draw(head_dim, n_embd)))


def chance(n_embd, head_dim, pairs, seed):
    """Mean and standard deviation of each composition over pairs of random heads."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {kind: [] for kind in KINDS}
    for _ in range(pairs):
        one, other = (random_heads(n_embd, head_dim, generator) for _ in range(2))
        for kind, score in compositions(one, other).items():
            drawn[kind].append(score.item())
    means = {kind: float(np.mean(values)) for kind, values in drawn.items()}
    spreads = {kind: float(np.std(values)) for kind, values in drawn.items()}
    return means, spreads


def layers(heads, which):
    """The Heads of some layers, a slice."""
    return Heads(heads.W_Q[which], heads.W_K[which], heads.W_V[which], heads.W_O[which])


def analyse(subject, config):
    c = subject.model.config
    if c.n_layer < 2:
        raise UserError('composition is between heads of different layers, and n_layer=1: take a '
                        'model with more')
    heads = folded_heads(subject.model)
    means, spreads = chance(c.n_embd, c.n_embd // c.n_head, config.random_pairs, config.seed)
    n_heads = c.n_layer * c.n_head
    result = {kind: np.full((n_heads, n_heads), np.nan) for kind in KINDS}
    for layer in progress_bar(range(1, c.n_layer), 'composition'):
        start = layer * c.n_head
        earlier, own = layers(heads, slice(layer)), layers(heads, slice(layer, layer + 1))
        for kind, scores in compositions(earlier, own).items():
            result[kind][:start, start:start + c.n_head] = scores.cpu().numpy() - means[kind]
    return Composition(head_names(subject.model), **result, chance=means, chance_spread=spreads,
                       top=config.top, note=part_of_scores(subject.model))


def strongest(result, kind, count):
    """(score, writer, reader) of the count pairs with the highest scores, highest first."""
    scores = getattr(result, kind)
    order = np.argsort(-np.nan_to_num(scores, nan=-np.inf), axis=None, kind='stable')[:count]
    pairs = [np.unravel_index(place, scores.shape) for place in order]
    return [(scores[i, j], result.names[i], result.names[j]) for i, j in pairs
            if np.isfinite(scores[i, j])]


def table(result):
    lines = []
    for kind, name in KINDS.items():
        lines.append(f'{name}-composition, less chance ({result.chance[kind]:.3f} +- '
                     f'{result.chance_spread[kind]:.3f}), '
                     f'mean {np.nanmean(getattr(result, kind)):+.3f}')
        for score, writer, reader in strongest(result, kind, result.top):
            lines.append(f'   {writer:>5} -> {reader:<5} {score:+.3f}')
    return '\n'.join(lines + [result.note] * bool(result.note))


def plot(results):
    names = {label: (result.names, result.names) for label, result in results.items()}
    panels = []
    for kind, name in KINDS.items():
        maps = field_maps(results, kind)
        end = symmetric(maps)
        panels.append(Panel(f'{name}-composition', maps, 'score less chance', -end, end, 'RdBu_r',
                            'head that writes', 'head that reads', numbers=False, names=names))
    title = with_notes('Which heads feed which (grey: not in a later layer)', results)
    return draw_panels(title, panels)


if __name__ == '__main__':
    run(lambda: main('composition', Config, analyse, table, plot))
