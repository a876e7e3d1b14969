"""
How much rank is used: singular values of W_Q W_K^T and W_V W_O, in the weights and over a text.

    effective rank    exp(entropy of the singular values over their sum) (Roy and Vetterli 2007), 1 to head_dim
    outliers          singular values beyond what noise of the same shape reaches once in a thousand times

Noise has a known edge. The eigenvalues of X^T X for a matrix X (n, p) of independent entries end at
(1 + sqrt(p/n))^2 times their mean (Marchenko and Pastur 1967); for products of such matrices, as W_Q W_K^T is one, the edge
follows from the S-transform of free probability (Burda et al. 2010): with c_1, c_2, ... the number p of eigenvalues over each of
the other dimensions, they are at most the minimum over z > 0 of (1 + z) / z * (1 + c_1 z)(1 + c_2 z)... The mean is taken
over what is no outlier.

MLA's keys and values are read through a narrower latent, and so would noise be: one factor more, and a wider edge. Outliers are
counted against both: noise through the model's own latent, of which a model that has learned nothing has none, and noise
without one (common), the same yardstick for both attentions. The two can order MHA and MLA differently.
Noise here has entries of one variance. Gains of ln_1 that differ by half or more between dimensions look like outliers too.

Over a text the same is asked of the scores q k^T (keys less their mean, which no softmax feels) and of what the heads write
for each token read, v W_O (less its mean). Noise there would be independent tokens with uncorrelated coordinates of one size,
and no text is like it, so that most singular values are outliers; the effective rank says more.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis.circuits import centred, folded_heads, joint_reading_space, product_singular_values
from analysis.program import AnalysisConfig, main, progress
from analysis.record import record
from configurator import UserError, check_least, run

TRACY_WIDOM = 3.27  # 99.9 % of the largest eigenvalues of noise lie below this, in Tracy and Widom's unit
PRODUCTS = {'QK': 'W_Q W_K^T', 'OV': 'W_V W_O'}
WRITTEN = {'QK': 'scores q k^T', 'OV': 'written v W_O'}


@dataclass
class Config(AnalysisConfig):
    text: str = ''  # for the activations: FILE:book.txt or a dataset; '': the val split that the checkpoint names
    max_tokens: int = 4096  # of the text, in windows of the context's length

    def __post_init__(self):
        super().__post_init__()
        check_least(self, max_tokens=2)


@dataclass
class Spectra:
    """Of one product in all heads."""
    singular_values: np.ndarray  # (n_layer, n_head, head_dim) largest first
    effective_rank: np.ndarray  # (n_layer, n_head)
    outliers: np.ndarray  # (n_layer, n_head) number of singular values beyond the edge of noise through the same latent
    outliers_common: np.ndarray  # (n_layer, n_head) beyond the edge of noise that is read through none


@dataclass
class Spectrum:
    weights: dict  # 'QK' and 'OV' -> Spectra
    activations: dict  # the same; empty where there was no text
    n_tokens: int  # of the text
    no_text: str = ''  # why there was none


def effective_rank(singular_values):
    """exp of the entropy of singular_values (..., n) over their sum; 0 where all are 0. (...)"""
    p = singular_values / singular_values.sum(-1, keepdim=True).clamp_min(1e-300)
    rank = torch.exp(-torch.special.xlogy(p, p).sum(-1))
    return torch.where(singular_values.sum(-1) > 0, rank, torch.zeros_like(rank))


@lru_cache(maxsize=None)  # all heads ask for the same
def noise_edge(p, ratios):
    """What the largest of p eigenvalues of noise stays below in 999 of 1,000 cases, over their mean. ratios are p over each
    other dimension of the product: one for a plain matrix (Marchenko-Pastur), two for a product of two through p."""
    def edge(z):
        return (1 + z) / z * math.prod(1 + c * z for c in ratios)
    low, high = 1e-6, 1e6  # log(edge) is convex in log(z)
    for _ in range(200):
        one, other = low ** (2 / 3) * high ** (1 / 3), low ** (1 / 3) * high ** (2 / 3)
        low, high = (low, other) if edge(one) < edge(other) else (one, high)
    z = math.sqrt(low * high)
    step = 1e-4 * z
    curvature = (edge(z + step) - 2 * edge(z) + edge(z - step)) / step ** 2
    # near the edge the density is (a / pi) sqrt(edge - l), and the largest of p eigenvalues scatters around it by (a p)^(-2/3)
    a = math.sqrt(2 / curvature) / edge(z)
    return edge(z) + TRACY_WIDOM * (a * p) ** (-2 / 3)


def count_outliers(singular_values, ratios):
    """How many of singular_values (p,) lie beyond the edge of noise, whose scale is that of those that do not. It goes
    outwards from the middle, so that it finds at most half of them: large ones, had they a part in the scale, would hide
    behind each other."""
    eigenvalues = np.sort(np.asarray(singular_values, dtype=float))[::-1] ** 2
    p = len(eigenvalues)
    for place in range(p // 2, -1, -1):
        rest = eigenvalues[place:]
        without = tuple((p - place) / (p / c - place) for c in ratios)  # outliers take their dimensions with them
        if rest[0] > noise_edge(len(rest), without) * rest.mean():
            return place + 1
    return 0


def spectra(A, B, n, m, latents):
    """Spectra of the products A B of all heads, A (n_layer, n_head, n, r) and B (n_layer, n_head, r, m). n and m are the
    dimensions that count for noise, latents (n_layer) those of what it would be read through, None for nothing."""
    values, r = product_singular_values(A, B), A.size(-1)

    def count(layer, latent):
        p, *others = sorted([r, n, m, *([latent] if latent else [])])  # noise has p singular values, and then zeros
        return [count_outliers(head[:p].cpu(), tuple(p / other for other in others)) for head in layer]
    return Spectra(values.cpu().numpy(), effective_rank(values).cpu().numpy(),
                   np.array([count(layer, latent) for layer, latent in zip(values, latents)]),
                   np.array([count(layer, None) for layer in values]))


def of_weights(model):
    heads = folded_heads(model)
    n = heads.W_Q.size(-2) - 1  # the centring takes one dimension away
    ranks = [joint_reading_space(heads, layer).size(1) for layer in range(len(heads.W_Q))]
    latents = [rank if rank < n else None for rank in ranks]
    return {'QK': spectra(heads.W_Q, heads.W_K.mT, n, n, latents), 'OV': spectra(heads.W_V, heads.W_O, n, n, latents)}


def of_activations(model, windows):
    """Spectra of the scores and of what is written, over windows of tokens, tensors (B, T)."""
    per_layer = [[] for _ in model.transformer.h]
    for idx in progress(windows, 'activations'):
        for block in record(model, idx):
            per_layer[block.layer].append(torch.stack([block.q, block.k, block.v]).transpose(1, 2).flatten(2, 3))
    found = {'QK': [], 'OV': []}
    for block, parts in zip(model.transformer.h, per_layer):
        q, k, v = torch.cat(parts, dim=2).double()  # each (n_head, tokens, head_dim)
        W_O = centred(block.attn.head_weights()[-1].detach().double())
        n_tokens = q.size(1)
        found['QK'].append(spectra(q[None], centred(k, 1).mT[None], n_tokens, n_tokens, [None]))
        found['OV'].append(spectra(centred(v, 1)[None], W_O[None], n_tokens, W_O.size(-1) - 1, [None]))
    return {name: Spectra(*(np.concatenate([getattr(one, field) for one in layers]) for field in
                            ('singular_values', 'effective_rank', 'outliers', 'outliers_common'))) for name, layers in found.items()}


def analyse(subject, config):
    weights = of_weights(subject.model)
    try:
        length = min(subject.model.config.block_size, config.max_tokens)
        windows = subject.windows(config.text, config.max_tokens, length)
    except UserError as e:
        if config.text:
            raise
        return Spectrum(weights, {}, 0, str(e))  # none was asked for
    windows = [idx[:, :-1] for idx in windows]
    n_tokens = sum(idx.numel() for idx in windows)
    head_dim = subject.model.config.n_embd // subject.model.config.n_head
    if n_tokens < 2 * head_dim:
        raise UserError(f'spectrum has only {n_tokens} tokens for heads of {head_dim} dimensions: give a longer text, and '
                        f'max_tokens={2 * head_dim} or more')
    return Spectrum(weights, of_activations(subject.model, windows), n_tokens)


def table(result):
    columns = {f'{PRODUCTS[name]}, weights': found for name, found in result.weights.items()}
    columns |= {f'{WRITTEN[name]}, {result.n_tokens:,} tokens': found for name, found in result.activations.items()}
    lines = [f'{"layer":>5}' + ''.join(f'{name:>26}' for name in columns)]
    for layer in range(len(result.weights['QK'].effective_rank)):
        cells = ''
        for name, found in columns.items():
            outliers = found.outliers[layer].mean(), found.outliers_common[layer].mean()
            cells += f'{f"{found.effective_rank[layer].mean():.1f} ({outliers[0]:.1f}, {outliers[1]:.1f})":>26}'
        lines.append(f'{layer:>5}{cells}')
    lines.append('effective rank (outliers against noise of its own kind, against common noise), mean over heads')
    return '\n'.join(lines + ([f'no activations: {result.no_text}'] if result.no_text else []))


def plot(results):
    """Singular values over the largest one, a line for each head, and effective ranks with outliers."""
    rows = [('weights', 'QK'), ('weights', 'OV')]
    if all(result.activations for result in results.values()):
        rows += [('activations', 'QK'), ('activations', 'OV')]
    figure = Figure(figsize=(5.5 * len(results) + 0.5, 2.6 * len(rows) + 0.6), layout='constrained')
    figure.suptitle('How much rank is used: singular values of every head', fontsize=12)
    axes = figure.subplots(len(rows), len(results), squeeze=False, sharex=True, sharey='row')
    for row, (where, product) in zip(axes, rows):
        for ax, (name, result) in zip(row, results.items()):
            found = getattr(result, where)[product]
            n_layer, n_head, r = found.singular_values.shape
            for layer in range(n_layer):
                for head in range(n_head):
                    values = found.singular_values[layer, head]
                    ax.semilogy(np.arange(1, r + 1), np.maximum(values / max(values[0], 1e-300), 1e-6), color=f'C{layer % 10}',
                                linewidth=0.8, alpha=0.7, label=f'layer {layer}' if head == 0 else None)
            what = PRODUCTS[product] if where == 'weights' else WRITTEN[product]
            outliers = f', outliers {found.outliers.mean():.1f} (against common noise {found.outliers_common.mean():.1f})'
            ax.set_title(f'{name}: {what}, {where}\nmean effective rank {found.effective_rank.mean():.1f} of {r}'
                         f'{outliers if where == "weights" else ""}', fontsize=9)
            ax.set_ylabel('singular value / largest')
    for ax in axes[-1]:
        ax.set_xlabel('number of the singular value')
    axes[0, 0].legend(fontsize=7, ncols=2)
    return figure


if __name__ == '__main__':
    run(lambda: main('spectrum', Config, analyse, table, plot))
