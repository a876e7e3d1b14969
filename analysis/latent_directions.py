"""
What an MLA latent stores: the tokens that excite its directions, and what heads write for them.

A latent c = W_E^T x can be written in any basis (W_E A and A^-1 W_K, A^-1 W_V are the same model), so the singular values of
W_E alone mean nothing. What counts is what the heads make of it. All maps out of a layer's latent, side by side, are

    M = [W_E W_K,h W_Q,h^T / |all of these| for each head,  W_E W_V,h W_O,h / |all of these| for each head]

its left singular vectors are the directions of x in the order in which the layer's attention reacts to them, keys and values
counting the same. Tokens that excite a direction are those whose embedding (behind the first MLP, from layer 1 on) has the
largest part along it; what a head writes for it is W_V W_O W_U.

Who uses the latent: with G_K and G_V the Gram matrices of the two halves of M over the latent, the eigenvalues l of
G_K against G_K + G_V are the same in any basis: 1 for a direction of the latent that keys alone read, 0 for values alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis.circuits import folded_heads, folded_unembedding, joint_reading_space, token_vectors
from analysis.plots import token_labels
from analysis.program import AnalysisConfig, main, progress
from configurator import UserError, check_least, run


@dataclass
class Config(AnalysisConfig):
    directions: int = 3  # of each layer, in the numbers
    tokens: int = 6  # at either end of a direction
    alone: float = 0.9  # from this share on, a direction is used by keys (or values) alone

    def __post_init__(self):
        super().__post_init__()
        check_least(self, directions=1, tokens=1)
        if not 0.5 < self.alone <= 1:
            raise ValueError(f'alone={self.alone} must be above 0.5 and at most 1')


@dataclass
class Direction:
    """Of the residual stream, into one layer's latent. Its sign is free, so both ends are given."""
    strength: float  # singular value of M, of which the squares add up to 2
    key_share: float  # of its square that is due to keys
    excite: list  # texts of the tokens that go furthest along it
    inhibit: list  # and against it
    writes: list  # for each head: texts of the tokens whose logits it raises most, where the direction is excited
    suppresses: list
    head_strength: list  # for each head: the length of what it writes, over that of the direction


@dataclass
class LatentDirections:
    strengths: np.ndarray  # (n_layer, n_latent) singular values of M
    key_share: np.ndarray  # (n_layer, n_latent) eigenvalues of G_K against G_K + G_V, largest first
    keys_alone: np.ndarray  # (n_layer,) share of the latent's dimensions
    values_alone: np.ndarray
    both: np.ndarray
    directions: list  # for each layer, the strongest ones
    alone: float


def users(heads, layer, basis):
    """G_K and G_V (rank, rank): what keys and values make of each direction of basis (n_embd, rank), each of trace 1."""
    grams = []
    for reads, goes_on in ((heads.W_K[layer], heads.W_Q[layer].mT), (heads.W_V[layer], heads.W_O[layer])):
        half = basis.mT @ reads @ goes_on  # (n_head, rank, n_embd)
        gram = (half @ half.mT).sum(0)
        grams.append(gram / gram.trace().clamp_min(1e-300))
    return grams


def key_shares(G_K, G_V):
    """The eigenvalues l of G_K v = l (G_K + G_V) v, largest first: the part of the keys in each direction, whatever the
    basis. Directions that nobody uses do not occur."""
    total, directions = torch.linalg.eigh(G_K + G_V)
    used = total > total.max() * 1e-12
    whiten = directions[:, used] / total[used].sqrt()
    return torch.linalg.eigvalsh(whiten.mT @ G_K @ whiten).flip(-1).clamp(0, 1)


def analyse(subject, config):
    model, n_vocab = subject.model, subject.n_vocab
    heads = folded_heads(model)
    n_layer, n_embd = len(heads.W_Q), model.config.n_embd
    latents = [joint_reading_space(heads, layer) for layer in range(n_layer)]
    if any(latent.size(1) >= n_embd - 1 for latent in latents):
        raise UserError(f'latent_directions needs a latent narrower than the residual stream, and the keys and values of '
                        f'{subject.source} read all {n_embd} dimensions, as those of MHA do: give an MLA model')
    if not all(latent.size(1) for latent in latents):
        raise UserError(f'the keys and values of {subject.source} read nothing in some layer: give a trained model')
    W_U = folded_unembedding(model, n_vocab)
    result = LatentDirections([], [], *np.zeros((3, n_layer)), [], config.alone)
    labels = token_labels(subject.tokenizer, range(n_vocab))

    def furthest(along):
        """Texts of the tokens at the two ends of along (n_vocab,)."""
        count = min(config.tokens, n_vocab)
        return [[labels[i] for i in (sign * along).topk(count).indices.tolist()] for sign in (1, -1)]
    ids = torch.arange(n_vocab, device=subject.device).split(8192)
    bare, behind_mlp = (torch.cat([token_vectors(model, part, first_mlp) for part in ids]) for first_mlp in (False, True))
    for layer in progress(range(n_layer), 'latent directions'):
        basis = latents[layer]
        G_K, G_V = users(heads, layer, basis)
        squares, vectors = torch.linalg.eigh(G_K + G_V)
        strengths, vectors = squares.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)
        shares = key_shares(G_K, G_V)
        result.strengths.append(strengths.tolist())
        result.key_share.append(shares.tolist())
        result.keys_alone[layer] = (shares >= config.alone).double().mean()
        result.values_alone[layer] = (shares <= 1 - config.alone).double().mean()
        result.both[layer] = 1 - result.keys_alone[layer] - result.values_alone[layer]
        tokens = behind_mlp if layer else bare
        found = []
        for number in range(min(config.directions, len(strengths))):
            u = basis @ vectors[:, number]  # (n_embd,)
            along = tokens @ u
            sign = along[along.abs().argmax()].sign()  # the end that is excited most comes first
            u, (excite, inhibit) = sign * u, furthest(sign * along)
            written = [u @ W_V @ W_O for W_V, W_O in zip(heads.W_V[layer], heads.W_O[layer])]
            ends = [furthest(one @ W_U) for one in written]
            key_part = (vectors[:, number] @ G_K @ vectors[:, number] / squares.flip(-1)[number].clamp_min(1e-300)).item()
            found.append(Direction(strengths[number].item(), key_part, excite, inhibit, *map(list, zip(*ends)),
                                   [one.norm().item() for one in written]))
        result.directions.append(found)
    return result


def table(result):
    lines = [f'{"layer":>5}{"keys alone":>12}{"values alone":>14}{"both":>7}      share of the latent (alone: {result.alone:.0%} or '
             'more)']
    lines += [f'{layer:>5}{keys:>12.0%}{values:>14.0%}{both:>7.0%}' for layer, (keys, values, both) in
              enumerate(zip(result.keys_alone, result.values_alone, result.both))]
    lines += ['', 'the strongest direction of each layer: part of the keys, tokens at both ends -> what the head that it moves '
              'most writes']
    for layer, (d, *_) in enumerate(result.directions):
        head = int(np.argmax(d.head_strength))
        lines.append(f'{layer:>5}{d.key_share:>6.0%}   {" ".join(d.excite[:4])}  |  {" ".join(d.inhibit[:4])}  ->  {layer}.{head}  '
                     f'{" ".join(d.writes[head][:4])}  |  {" ".join(d.suppresses[head][:4])}')
    return '\n'.join(lines)


def plot(results):
    figure = Figure(figsize=(5.5 * len(results) + 0.5, 7), layout='constrained')
    figure.suptitle('What the latent stores, layer by layer', fontsize=11)
    axes = figure.subplots(2, len(results), squeeze=False, sharey='row')
    for (top, bottom), (name, result) in zip(axes.T, results.items()):
        layers = np.arange(len(result.keys_alone))
        colors = [f'C{layer % 10}' for layer in layers]
        for strengths, shares, layer, color in zip(result.strengths, result.key_share, layers, colors):
            top.semilogy(np.arange(1, len(strengths) + 1), np.maximum(strengths, 1e-6), color=color, label=f'layer {layer}')
            bottom.plot(np.linspace(0, 1, len(shares)), shares, color=color)
        top.set(title=f'{name}\nhow strongly attention reacts to each direction', xlabel='direction', ylabel='singular value of M')
        top.legend(fontsize=7)
        bottom.axhspan(result.alone, 1, color='C0', alpha=0.12)
        bottom.axhspan(0, 1 - result.alone, color='C1', alpha=0.12)
        bottom.text(0.98, 0.95, 'keys alone', ha='right', va='center', fontsize=8)
        bottom.text(0.02, 0.05, 'values alone', ha='left', va='center', fontsize=8)
        bottom.set(title='who uses it', xlabel="share of the latent's dimensions", ylabel='part of the keys', ylim=(0, 1))
    return figure


if __name__ == '__main__':
    run(lambda: main('latent_directions', Config, analyse, table, plot))
