"""
Do heads write to and read from the same directions of the residual stream?

Each head has a space that it writes to (its output: the rows of W_O) and two that all tokens are read through (keys: the
columns of W_K; values: those of W_V), each of at most head_dim dimensions. Two spaces are compared by their principal angles
(Bjorck and Golub 1973): the cosines are the singular values of A^T B for orthonormal bases A, B. The overlap is the mean
squared cosine: 1 if one space lies in the other, and for random spaces of dimension a >= b among n it is a / n.

The latent space of a layer is what all its keys and values read together: n_latent dimensions for MLA, in general the whole
residual stream for MHA. So the keys and values of an MLA layer share fewer dimensions, and chance within the latent is higher.
"""

from dataclasses import dataclass

import numpy as np
import torch

from analysis.circuits import folded_heads, head_names, joint_reading_space, orthonormal
from analysis.plots import Panel, draw_panels
from analysis.program import AnalysisConfig, main, progress
from configurator import run

PAIRS = (('output', 'output'), ('key', 'key'), ('value', 'value'), ('output', 'key'), ('output', 'value'), ('key', 'value'))


@dataclass
class Config(AnalysisConfig):
    pass


@dataclass
class Subspaces:
    names: list  # layer.head of each head
    overlap: dict  # of each pair of spaces, (heads, heads): first space of the row's head, second of the column's
    chance: dict  # of each pair, the overlap of random spaces of the same size
    smallest_angle: dict  # of each pair, (heads, heads), the smallest principal angle in degrees
    within: dict  # of each pair, the mean overlap between different heads of one layer
    across: dict  # and between heads of different layers, where one writes and one reads those in which the reader is later
    angles_within: dict  # of each pair, (head_dim,) principal angles in degrees, smallest first, mean over the same
    angles_across: dict  # where a space has fewer dimensions than head_dim, the missing angles count as 90
    latent_rank: list  # dimensions that the keys and values of each layer read together
    latent_overlap: np.ndarray  # (n_layer, n_layer) of those spaces
    latent_chance: np.ndarray  # (n_layer, n_layer) of random spaces of their sizes
    chance_in_latent: float  # overlap of two heads' keys or values if they lay at random within the latent of a layer


def padded_bases(W):
    """An orthonormal basis of what the columns of each W (heads, n_embd, head_dim) span, filled up with columns of zeros
    where that has fewer than head_dim dimensions; and the number of dimensions (heads,)."""
    bases, ranks = torch.zeros_like(W), []
    for basis, one in zip(bases, W):
        columns = orthonormal(one)
        basis[:, :columns.size(1)] = columns
        ranks.append(columns.size(1))
    return bases, torch.tensor(ranks, device=W.device)


def squared_cosines(A, B):
    """Squared cosines of the principal angles between the spaces with bases A (n, a), as padded_bases gives them, and each of
    B (heads, n, a), largest first: (heads, a)"""
    products = A.mT @ B  # (heads, a, a)
    return torch.linalg.eigvalsh(products.mT @ products).flip(-1).clamp(0, 1)


def degrees(squared_cosines):
    return torch.rad2deg(torch.arccos(squared_cosines.sqrt()))


def mean_where(values, where):
    """The mean of values (heads, heads, ...) over the pairs of heads in where (heads, heads); nan if there is none."""
    return values[where].mean(0) if where.any() else values[0, 0] * np.nan


def analyse(subject, config):
    heads = folded_heads(subject.model)
    n_layer, n_head = heads.W_Q.shape[:2]
    bases = {'output': padded_bases(heads.W_O.flatten(0, 1).mT), 'key': padded_bases(heads.W_K.flatten(0, 1)),
             'value': padded_bases(heads.W_V.flatten(0, 1))}
    n_dimensions = heads.W_Q.size(2) - 1  # the centring leaves one less
    layer = np.arange(n_layer * n_head) // n_head
    same_layer = layer[:, None] == layer
    pairs_within = same_layer & ~np.eye(len(layer), dtype=bool)
    latents = [joint_reading_space(heads, number) for number in range(n_layer)]
    ranks = np.array([latent.size(1) for latent in latents])
    by_pair = {field: {} for field in ('overlap', 'chance', 'smallest_angle', 'within', 'across', 'angles_within', 'angles_across')}
    chance_in_latent = np.mean(np.minimum(heads.W_K.size(-1), ranks) / ranks.clip(min=1))
    result = Subspaces(head_names(subject.model), **by_pair, latent_rank=ranks.tolist(), latent_overlap=np.zeros((n_layer, n_layer)),
                       latent_chance=np.maximum.outer(ranks, ranks) / n_dimensions, chance_in_latent=float(chance_in_latent))
    for first, second in progress(PAIRS, 'subspaces'):
        pair, (A, sizes), (B, other_sizes) = f'{first}-{second}', bases[first], bases[second]
        squares = torch.stack([squared_cosines(one, B) for one in A])  # (heads, heads, head_dim)
        overlap = (squares.sum(-1) / torch.minimum(sizes[:, None], other_sizes).clamp(min=1)).cpu().numpy()
        angles = degrees(squares).cpu().numpy()
        result.overlap[pair], result.smallest_angle[pair] = overlap, angles[..., 0]
        result.chance[pair] = (torch.maximum(sizes[:, None], other_sizes).double().mean() / n_dimensions).item()
        pairs_across = layer[:, None] < layer if first == 'output' != second else ~same_layer  # what later heads can read
        result.within[pair], result.across[pair] = (float(mean_where(overlap, w)) for w in (pairs_within, pairs_across))
        result.angles_within[pair], result.angles_across[pair] = (mean_where(angles, w) for w in (pairs_within, pairs_across))
    for i, j in np.ndindex(n_layer, n_layer):
        product = latents[i].mT @ latents[j]
        result.latent_overlap[i, j] = product.square().sum() / max(1, min(product.shape))
    return result


def table(result):
    def or_dash(value, form):
        return form.format(value) if np.isfinite(value) else '-'
    lines = [f'{"overlap of":>15}{"within a layer":>16}{"across layers":>15}{"chance":>9}{"smallest angle, within":>25}']
    for pair in result.overlap:
        angle = np.atleast_1d(result.angles_within[pair])[0]
        lines.append(f'{pair:>15}{or_dash(result.within[pair], "{:.3f}"):>16}{or_dash(result.across[pair], "{:.3f}"):>15}'
                     f'{result.chance[pair]:>9.3f}{or_dash(angle, "{:.0f} degrees"):>25}')
    ranks = ', '.join(map(str, result.latent_rank))
    return '\n'.join(lines + [f'keys and values together read {ranks} dimensions (by layer); random keys or values within that '
                              f'overlap {result.chance_in_latent:.3f}'])


def plot(results):
    def maps(pair):
        """Without the diagonal, where a space is compared with itself."""
        self = len(set(pair.split('-'))) == 1
        return {name: np.where(np.eye(len(result.names), dtype=bool) & self, np.nan, result.overlap[pair])
                for name, result in results.items()}
    names = {name: (result.names,) * 2 for name, result in results.items()}
    chance = '; '.join(f'{name} {np.mean(list(result.chance.values())):.2f}, in a latent {result.chance_in_latent:.2f}'
                       for name, result in results.items())
    shown = [values for first, second in PAIRS for values in maps(f'{first}-{second}').values()]
    high = max(values[np.isfinite(values)].max(initial=0) for values in shown)
    sides = {'output': 'writes', 'key': 'reads keys', 'value': 'reads values'}
    panels = [Panel(f'{first} and {second} spaces', maps(f'{first}-{second}'), 'mean squared cosine', 0, high,
                    rows=f'head that {sides[first]}', columns=f'head that {sides[second]}', numbers=False, names=names)
              for first, second in PAIRS]
    panels.append(Panel('latent spaces of two layers', {name: result.latent_overlap for name, result in results.items()},
                        'mean squared cosine', 0, 1, rows='layer', columns='layer'))
    return draw_panels(f'Overlap of the spaces that heads write to and read from (random spaces: {chance})', panels)


if __name__ == '__main__':
    run(lambda: main('subspaces', Config, analyse, table, plot))
