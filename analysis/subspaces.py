"""
Do heads write to and read from the same directions of the residual stream?

    python -m analysis.subspaces out/ckpt.pt

It needs a model and no text. Each head has a space that it writes to (its output: the rows of W_O)
and two spaces through which it reads all tokens (keys: the columns of W_K; values: those of W_V).
Each has at most head_dim dimensions. Two spaces are compared by their principal angles (Bjorck and
Golub 1973): the cosines are the singular values of A^T B for orthonormal bases A, B. The overlap
is the mean squared cosine. It is 1 if one space lies in the other. For random spaces of dimension
a >= b among n it is a / n.

The latent space of a layer is what all its keys and values read together: n_latent dimensions for
MLA, in general the n_embd - 1 that LayerNorm leaves for MHA. So the keys and values of an MLA layer
share fewer dimensions, and chance within the latent is higher. Heads of a group (GQA) have the same
keys and values. Such pairs are not counted, since their overlap is 1 whatever was learned. Of
rotary keys, the content part is meant, as circuits.py has it.
"""

from dataclasses import dataclass

from configurator import run

import numpy as np
import torch

from analysis.circuits import (
    folded_heads,
    head_names,
    joint_reading_space,
    orthonormal,
    part_of_scores,
)
from analysis.plots import Panel, draw_panels, with_notes
from analysis.program import AnalysisConfig as Config
from analysis.program import main
from runtime.progress import progress_bar

PAIRS = (('output', 'output'), ('key', 'key'), ('value', 'value'), ('output', 'key'),
         ('output', 'value'), ('key', 'value'))


@dataclass
class Subspaces:
    """overlap to angles_across are dictionaries over pairs of spaces, such as output-key."""
    names: list  # layer.head of each head
    overlap: dict  # (heads, heads): the first space of the row's head, the second of the column's
    chance: dict  # the overlap of random spaces of the same size
    smallest_angle: dict  # (heads, heads), the smallest principal angle in degrees
    within: dict  # the mean overlap between different heads of one layer
    across: dict  # and of different layers; where one writes and one reads, the reader is later
    angles_within: dict  # (head_dim,) principal angles in degrees, smallest first, mean over the
    angles_across: dict  # same; an angle that a space of fewer dimensions lacks counts as 90
    latent_rank: list  # dimensions that the keys and values of each layer read together
    latent_overlap: np.ndarray  # (n_layer, n_layer) of those spaces
    latent_chance: np.ndarray  # (n_layer, n_layer) of random spaces of their sizes
    n_dimensions: int  # of the residual stream, without its mean
    chance_in_latent: float  # overlap of two heads' keys or values, random within a layer's latent
    note: str = ''  # which part of the scores the keys are about


def padded_bases(W):
    """An orthonormal basis of what the columns of each W (heads, n_embd, head_dim) span, padded
    with columns of zeros to head_dim, and the number of dimensions (heads,)."""
    bases, ranks = torch.zeros_like(W), []
    for basis, one in zip(bases, W):
        columns = orthonormal(one)
        basis[:, :columns.size(1)] = columns
        ranks.append(columns.size(1))
    return bases, torch.tensor(ranks, device=W.device)


def squared_cosines(A, B):
    """Squared cosines of the principal angles between the space with basis A (n, a), as
    padded_bases gives it, and each of B (heads, n, a), largest first: (heads, a)."""
    products = A.mT @ B  # (heads, a, a)
    return torch.linalg.eigvalsh(products.mT @ products).flip(-1).clamp(0, 1)


def degrees(squared_cosines):
    return torch.rad2deg(torch.arccos(squared_cosines.sqrt()))


def mean_where(values, where):
    """The mean of values (heads, heads, ...) over the pairs of heads in where (heads, heads); nan
    if there is none."""
    return values[where].mean(0) if where.any() else values[0, 0] * np.nan


def compare_spaces(first, second, n_dimensions):
    """Overlap (heads, heads), principal angles in degrees (heads, heads, head_dim), and the
    overlap of random spaces among n_dimensions. first and second are pairs from padded_bases."""
    (A, sizes), (B, other_sizes) = first, second
    squares = torch.stack([squared_cosines(one, B) for one in A])  # (heads, heads, head_dim)
    smaller = torch.minimum(sizes[:, None], other_sizes).clamp(min=1)
    larger = torch.maximum(sizes[:, None], other_sizes)
    overlap = (squares.sum(-1) / smaller).cpu().numpy()
    chance = (larger.double().mean() / n_dimensions).item()
    return overlap, degrees(squares).cpu().numpy(), chance


def equal_pairs(W):
    """Which pairs of heads (heads, heads) have the same map, as the heads of a group have. W is
    (n_layer, n_head, n_embd, head_dim)."""
    W = W.flatten(0, 1)
    return torch.stack([(W == one).flatten(1).all(1) for one in W]).cpu().numpy()


def overlaps_of_latents(latents):
    """The overlap (n_layer, n_layer) of the spaces with bases latents."""
    overlap = np.zeros((len(latents), len(latents)))
    for i, j in np.ndindex(overlap.shape):
        product = latents[i].mT @ latents[j]
        overlap[i, j] = product.square().sum() / max(1, min(product.shape))
    return overlap


def analyse(subject, config):
    heads = folded_heads(subject.model)
    n_layer, n_head, n_embd, head_dim = heads.W_Q.shape
    n_dimensions = n_embd - 1  # the centring leaves one less
    bases = {'output': padded_bases(heads.W_O.flatten(0, 1).mT),
             'key': padded_bases(heads.W_K.flatten(0, 1)),
             'value': padded_bases(heads.W_V.flatten(0, 1))}
    layer = np.arange(n_layer * n_head) // n_head
    same_layer = layer[:, None] == layer
    within = same_layer & ~np.eye(len(layer), dtype=bool)
    latents = [joint_reading_space(heads, number) for number in range(n_layer)]
    ranks = np.array([latent.size(1) for latent in latents])
    chance_in_latent = np.mean(np.minimum(head_dim, ranks) / ranks.clip(min=1))
    by_pair = {field: {} for field in ('overlap', 'chance', 'smallest_angle', 'within', 'across',
                                       'angles_within', 'angles_across')}
    shared = {'key': equal_pairs(heads.W_K), 'value': equal_pairs(heads.W_V)}
    result = Subspaces(
        head_names(subject.model), **by_pair, latent_rank=ranks.tolist(),
        note=part_of_scores(subject.model),
        latent_overlap=overlaps_of_latents(latents),
        latent_chance=np.maximum.outer(ranks, ranks) / n_dimensions,
        n_dimensions=n_dimensions,
        chance_in_latent=float(chance_in_latent))
    for first, second in progress_bar(PAIRS, 'subspaces'):
        overlap, angles, chance = compare_spaces(bases[first], bases[second], n_dimensions)
        across = ~same_layer
        if first == 'output' != second:
            across = layer[:, None] < layer  # only later heads read what a head writes
        pair = f'{first}-{second}'
        result.overlap[pair], result.chance[pair] = overlap, chance
        result.smallest_angle[pair] = angles[..., 0]
        counted = within & ~shared[first] if first == second != 'output' else within
        result.within[pair] = float(mean_where(overlap, counted))
        result.across[pair] = float(mean_where(overlap, across))
        result.angles_within[pair] = mean_where(angles, counted)
        result.angles_across[pair] = mean_where(angles, across)
    return result


def or_dash(value, form):
    return form.format(value) if np.isfinite(value) else '-'


def table(result):
    lines = [f'{"overlap of":>15}{"within a layer":>16}{"across layers":>15}{"chance":>9}'
             f'{"smallest angle, within":>25}']
    for pair in result.overlap:
        within = or_dash(result.within[pair], '{:.3f}')
        across = or_dash(result.across[pair], '{:.3f}')
        angle = or_dash(np.atleast_1d(result.angles_within[pair])[0], '{:.0f} degrees')
        lines.append(f'{pair:>15}{within:>16}{across:>15}{result.chance[pair]:>9.3f}{angle:>25}')
    ranks = ', '.join(map(str, result.latent_rank))
    lines.append(f'keys and values together read {ranks} dimensions (by layer); random keys or '
                 f'values within that overlap {result.chance_in_latent:.3f}')
    return '\n'.join(lines + [result.note] * bool(result.note))


def overlap_maps(results, first, second):
    """The overlaps of a pair of spaces by the names of the models. The overlap of a space with
    itself is nan."""
    maps = {}
    for name, result in results.items():
        itself = np.eye(len(result.names), dtype=bool) & (first == second)
        maps[name] = np.where(itself, np.nan, result.overlap[f'{first}-{second}'])
    return maps


def means_map(result):
    """The mean overlap of each pair of spaces: within a layer, across layers, and by chance."""
    return np.array([[result.within[pair], result.across[pair], result.chance[pair]]
                     for pair in result.overlap])


def has_latent(result):
    """Whether keys and values of a layer read less than all there is."""
    return min(result.latent_rank) < max(result.n_dimensions, 1)


def plot(results):
    """The means of all pairs, and maps of those in which heads differ: keys and values. The maps of
    what heads write are near chance and the numbers say so."""
    names = {name: (result.names, result.names) for name, result in results.items()}
    labels = {name: ([f'{first} and {second}' for first, second in PAIRS],
                     ['same layer', 'other layers', 'chance']) for name in results}
    panels = [Panel('mean overlap of two spaces',
                    {name: means_map(result) for name, result in results.items()},
                    'mean squared cosine', 0, 1, rows='', columns='', names=labels)]
    for kind in ('key', 'value'):
        panels.append(Panel(f'{kind} spaces of two heads', overlap_maps(results, kind, kind),
                            'mean squared cosine', 0, 1, rows='head', columns='head',
                            numbers=False, names=names))
    latents = {name: result.latent_overlap for name, result in results.items()
               if has_latent(result)}
    if latents:
        panels.append(Panel('latent spaces of two layers', latents, 'mean squared cosine', 0, 1,
                            rows='layer', columns='layer'))
    chance = '; '.join(f'{name}, {result.chance_in_latent:.2f}' for name, result in results.items()
                       if has_latent(result))
    title = 'Overlap of the spaces that heads write to and read from'
    if chance:
        title += f' (random keys or values in a latent: {chance})'
    return draw_panels(with_notes(title, results), panels)


if __name__ == '__main__':
    run(lambda: main('subspaces', Config, analyse, table, plot))
