"""
How much rank is used: singular values of W_Q W_K^T and W_V W_O, in the weights and over a text.

    python -m analysis.spectrum out/ckpt.pt
    python -m analysis.spectrum gpt2 --text=FILE:book.txt

It needs a model. Without a text, only the weights are analysed.

    effective rank    exp(entropy of the singular values over their sum), 1 to head_dim
                      (Roy and Vetterli 2007)
    outliers          singular values beyond what noise of the same shape reaches once in a
                      thousand times

Noise has a known edge. The eigenvalues of X^T X for a matrix X (n, p) of independent entries end
at (1 + sqrt(p/n))^2 times their mean (Marchenko and Pastur 1967). For products of such matrices,
as W_Q W_K^T is one, the edge follows from the S-transform of free probability (Burda et al. 2010):
let c_1, c_2, ... be the number p of eigenvalues over each of the other dimensions. The eigenvalues
are at most the minimum over z > 0 of (1 + z) / z * (1 + c_1 z)(1 + c_2 z)... The mean leaves
outliers out.

MLA's keys and values are read through a narrower latent. Noise through it has one factor more and
a wider edge. Outliers are counted against two kinds of noise: noise through the model's own
latent, of which an untrained model has none, and noise without a latent (common), the same
yardstick for both attentions. The two can order MHA and MLA differently. The entries of this noise
have one variance. Gains of ln_1 that differ by half or more between dimensions look like outliers
too. At most half of the singular values and one more can be told from noise. A head whose count
has reached that has at least so many, and so has a mean over heads with such a one. Where many
more stand out alike, they are taken for the noise, and the count is too low.

In the weights, rotary scores count with their content part alone, as circuits.py has it; over a
text they count whole. The same is asked there of the scores q k^T (keys less their mean, which no
softmax sees where positions are not rotary)
and of what the heads write for each token that they read, v W_O (less its mean). Noise there would
be independent tokens with uncorrelated coordinates of one size. No text is like it, so most
singular values are outliers, and the effective rank says more.
"""

import math
from dataclasses import dataclass, fields
from functools import lru_cache

from configurator import UserError, run

import numpy as np
import torch

from analysis.circuits import (
    centred,
    folded_heads,
    joint_reading_space,
    part_of_scores,
    product_singular_values,
)
from analysis.plots import layer_colours, set_title, with_notes
from analysis.program import AnalysisConfig, main
from analysis.record import record
from runtime.figures import Figure
from runtime.progress import progress_bar

TRACY_WIDOM = 3.27  # 99.9 % of noise's largest eigenvalues are below it, in Tracy-Widom's unit
PRODUCTS = {'QK': 'W_Q W_K^T', 'OV': 'W_V W_O'}
ROUNDING = 1e-6  # smaller shares of the largest singular value are not drawn
WRITTEN = {'QK': 'scores q k^T', 'OV': 'written v W_O'}


@dataclass
class Config(AnalysisConfig):
    text: str = ''  # for the activations: FILE:book.txt or a dataset; '': the val split that the
        # checkpoint names
    max_tokens: int = 4096  # of the text, in windows of the context's length
    least = dict(max_tokens=2)


@dataclass
class Spectra:
    """Of one product in all heads."""
    singular_values: np.ndarray  # (n_layer, n_head, head_dim) largest first
    effective_rank: np.ndarray  # (n_layer, n_head)
    outliers: np.ndarray  # (n_layer, n_head) number beyond the edge of noise through the latent
    outliers_common: np.ndarray  # (n_layer, n_head) number beyond the edge of noise without one
    at_least: np.ndarray  # (n_layer, n_head) whether outliers has reached the most that can be told
    at_least_common: np.ndarray  # the same of outliers_common


@dataclass
class Spectrum:
    weights: dict  # 'QK' and 'OV' -> Spectra
    activations: dict  # the same; empty where there was no text
    n_tokens: int  # of the text
    no_text: str = ''  # why there was none
    note: str = ''  # which part of the scores the weights are about


def effective_rank(singular_values):
    """exp of the entropy of singular_values (..., n) over their sum; 0 where all are 0: (...)"""
    total = singular_values.sum(-1)
    p = singular_values / total.unsqueeze(-1).clamp_min(1e-300)
    rank = torch.exp(-torch.special.xlogy(p, p).sum(-1))
    return torch.where(total > 0, rank, torch.zeros_like(rank))


def edge_at(z, ratios):
    """The function of z whose minimum is the edge of noise."""
    return (1 + z) / z * math.prod(1 + c * z for c in ratios)


@lru_cache(maxsize=None)  # all heads ask for the same
def noise_edge(p, ratios):
    """What the largest of p eigenvalues of noise stays below in 999 of 1,000 cases, over their
    mean. ratios, a tuple, are p over each other dimension of the product: one for a plain matrix
    (Marchenko-Pastur), two for a product of two matrices through p."""
    low, high = 1e-6, 1e6  # log(edge) is convex in log(z)
    for _ in range(200):
        one = low ** (2 / 3) * high ** (1 / 3)
        other = low ** (1 / 3) * high ** (2 / 3)
        if edge_at(one, ratios) < edge_at(other, ratios):
            high = other
        else:
            low = one
    z = math.sqrt(low * high)
    edge, step = edge_at(z, ratios), 1e-4 * z
    bend = edge_at(z + step, ratios) - 2 * edge + edge_at(z - step, ratios)
    # Near the edge the density is (a / pi) sqrt(edge - l). The largest of p eigenvalues scatters
    # around the edge by (a p)^(-2/3).
    a = math.sqrt(2 / (bend / step ** 2)) / edge
    return edge + TRACY_WIDOM * (a * p) ** (-2 / 3)


def count_outliers(singular_values, ratios):
    """How many of singular_values (p,) are beyond the edge of noise. The scale of the noise is
    that of the others. The count goes outwards from the middle, so it is at most most_outliers(p):
    if large values took part in the scale, they would hide behind each other."""
    eigenvalues = np.sort(np.asarray(singular_values, dtype=float))[::-1] ** 2
    p = len(eigenvalues)
    for place in range(p // 2, -1, -1):
        rest = eigenvalues[place:]
        # outliers take their dimensions with them
        without = tuple((p - place) / (p / c - place) for c in ratios)
        if rest[0] > noise_edge(len(rest), without) * rest.mean():
            return place + 1
    return 0


def most_outliers(p):
    """What count_outliers can count of p singular values."""
    return p // 2 + 1


def layer_outliers(values, dimensions):
    """count_outliers for each head of a layer, values (n_head, r), whose noise is a product with
    these dimensions, and whether each is most_outliers: (2, n_head)"""
    p, *others = sorted(dimensions)  # noise has p singular values, and then zeros
    ratios = tuple(p / other for other in others)
    counts = np.array([count_outliers(head[:p].cpu(), ratios) for head in values])
    return np.stack([counts, counts == most_outliers(p)])


def spectra(A, B, n, m, latents):
    """Spectra of the products A B of all heads, A (n_layer, n_head, n, r), B (n_layer, n_head, r,
    m). n and m are the dimensions that count for noise. latents has a list for each layer: the
    dimensions of the latents that noise is read through."""
    values = product_singular_values(A, B)
    common = [A.size(-1), n, m]
    own = np.stack([layer_outliers(layer, [*common, *through])
                    for layer, through in zip(values, latents)], axis=1)  # (2, n_layer, n_head)
    shared = np.stack([layer_outliers(layer, common) for layer in values], axis=1)
    return Spectra(values.cpu().numpy(), effective_rank(values).cpu().numpy(), own[0], shared[0],
                   own[1].astype(bool), shared[1].astype(bool))


def of_weights(model):
    """Spectra of W_Q W_K^T and W_V W_O, by name."""
    heads = folded_heads(model)
    n = heads.W_Q.size(-2) - 1  # the centring takes one dimension away
    latents = latent_widths(model, heads, n)
    n_query = getattr(model.config, 'n_query_latent', None) or n
    both = [[*through, n_query] if n_query < n else through for through in latents]
    return {'QK': spectra(heads.W_Q, heads.W_K.mT, n, n, both),
            'OV': spectra(heads.W_V, heads.W_O, n, n, latents)}


def latent_widths(model, heads, n):
    """For each layer a list: the dimensions of the latent of keys and values, nothing where there
    is none or where it keeps all n. The few keys and values of GQA are no latent: each head reads
    them as noise would read the stream."""
    if not getattr(model.config, 'n_latent', None):
        return [[] for _ in heads.W_Q]
    ranks = [joint_reading_space(heads, layer).size(1) for layer in range(len(heads.W_Q))]
    return [[rank] if rank < n else [] for rank in ranks]


def joined(layers):
    """One Spectra of a list of them, one for each layer."""
    return Spectra(*(np.concatenate([getattr(one, field.name) for one in layers])
                     for field in fields(Spectra)))


def of_activations(model, windows):
    """Spectra of the scores and of what is written, over windows of tokens, tensors (B, T)."""
    per_layer = [[] for _ in model.transformer.h]
    for idx in progress_bar(windows, 'activations'):
        for block in record(model, idx):
            # each (n_head, B * T, width)
            per_layer[block.layer].append([part.transpose(0, 1).flatten(1, 2)
                                           for part in (block.q, block.k, block.v)])
    QK, OV = [], []
    for block, parts in zip(model.transformer.h, per_layer):
        q, k, v = (torch.cat(part, dim=1).double() for part in zip(*parts))
        k, v = centred(k, 1), centred(v, 1)
        W_O = centred(block.attn.head_weights()[-1].detach().double())
        n_tokens = q.size(1)
        QK.append(spectra(q[None], k.mT[None], n_tokens, n_tokens, [[]]))
        OV.append(spectra(v[None], W_O[None], n_tokens, W_O.size(-1) - 1, [[]]))
    return {'QK': joined(QK), 'OV': joined(OV)}


def analyse(subject, config):
    c, note = subject.model.config, part_of_scores(subject.model)
    weights = of_weights(subject.model)
    try:
        length = min(c.block_size, config.max_tokens)
        windows = subject.windows(config.text, config.max_tokens, length)
    except UserError as e:
        if config.text:
            raise
        return Spectrum(weights, {}, 0, str(e), note)  # none was asked for
    windows = [idx[:, :-1] for idx in windows]
    n_tokens = sum(idx.numel() for idx in windows)
    head_dim = c.n_embd // c.n_head
    if n_tokens < 2 * head_dim:
        raise UserError(f'spectrum has only {n_tokens} tokens for heads of {head_dim} dimensions: '
                        f'give a longer text, and max_tokens={2 * head_dim} or more')
    return Spectrum(weights, of_activations(subject.model, windows), n_tokens, note=note)


def outliers_text(found, layers=slice(None), kind=''):
    """The mean count of outliers of one layer or of all, which may be a bound."""
    is_bound = getattr(found, f'at_least{kind}')[layers].any()
    mean = getattr(found, f'outliers{kind}')[layers].mean()
    return ('at least ' if is_bound else '') + f'{mean:.1f}'


def table(result):
    columns = {f'{PRODUCTS[name]}, weights': found for name, found in result.weights.items()}
    for name, found in result.activations.items():
        columns[f'{WRITTEN[name]}, {result.n_tokens:,} tokens'] = found
    cells = {name: [f'{found.effective_rank[layer].mean():.1f} ({outliers_text(found, layer)}, '
                    f'{outliers_text(found, layer, "_common")})'
                    for layer in range(len(found.outliers))] for name, found in columns.items()}
    widths = [max(map(len, [name, *column])) + 3 for name, column in cells.items()]
    rows = [cells, *zip(*cells.values())]
    lines = [f'{name:>5}' + ''.join(f'{cell:>{width}}' for cell, width in zip(row, widths))
             for name, row in zip(['layer', *range(len(rows))], rows)]
    lines.append('effective rank (outliers against noise of its own kind, against common noise), '
                 'mean over heads')
    if result.no_text:
        lines.append(f'no activations: {result.no_text}')
    if result.note:
        lines.append(f'weights: {result.note}')
    return '\n'.join(lines)


def plot(results):
    """Singular values over the largest one: for each layer the median over its heads, from their
    least to their most. With effective ranks and outliers."""
    rows = [('weights', 'QK'), ('weights', 'OV')]
    if all(result.activations for result in results.values()):
        rows += [('activations', 'QK'), ('activations', 'OV')]
    size = 4.2 * len(results) + 0.5, 2.3 * len(rows) + 0.6
    figure = Figure(figsize=size, layout='constrained')
    title = 'How much rank is used: singular values, median and range over the heads of a layer'
    set_title(figure, with_notes(title, results))
    axes = figure.subplots(len(rows), len(results), squeeze=False, sharex=True, sharey='row')
    for row, (where, product) in zip(axes, rows):
        for ax, (name, result) in zip(row, results.items()):
            found = getattr(result, where)[product]
            if where == 'weights':
                what, outliers = PRODUCTS[product], (
                    f', outliers {outliers_text(found)} '
                    f'(common noise: {outliers_text(found, kind="_common")})')
            else:
                what, outliers = WRITTEN[product], ''
            rank = f'mean effective rank {found.effective_rank.mean():.1f}'
            ax.set_title(f'{name}: {what}, {where}\n{rank} of {found.singular_values.shape[-1]}'
                         f'{outliers}', fontsize=8)
            draw_spectra(ax, found)
    for ax in axes[-1]:
        ax.set_xlabel('number of the singular value')
    axes[0, 0].legend(ncols=2)
    return figure


def draw_spectra(ax, found):
    n_layer, _, r = found.singular_values.shape
    shares = found.singular_values / found.singular_values[..., :1].clip(1e-300)
    shares[shares < ROUNDING] = np.nan  # no number, and none that could be drawn
    places = np.arange(1, r + 1)
    for layer, colour in enumerate(layer_colours(n_layer)):
        known = np.isfinite(shares[layer]).all(0)
        x, values = places[known], shares[layer][:, known]
        ax.semilogy(x, np.median(values, axis=0), color=colour, label=f'layer {layer}')
        ax.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    ax.set_ylabel('singular value / largest')


if __name__ == '__main__':
    run(lambda: main('spectrum', Config, analyse, table, plot))
