"""
What an MLA latent stores: the tokens that excite its directions, and what heads write for them.

    python -m analysis.latent_directions out/ckpt_mla.pt

It needs an MLA model and no text, or one whose heads share few keys and values (GQA); there the
shares of keys and values are even by construction. A latent c = W_E^T x can be written in any basis
(W_E A and A^-1 W_K, A^-1 W_V are the same model), so the singular values of W_E alone mean nothing.
What counts is how the heads use it. All maps out of a layer's latent, side by side, are

    M = [W_E W_K,h W_Q,h^T / |all of these| for each head h,
         W_E W_V,h W_O,h / |all of these| for each head h]

The left singular vectors of M are directions of x, in the order in which the layer's attention
reacts to them. Keys and values count the same. The tokens that excite a direction are those whose
embedding (from layer 1 on: behind the first MLP) has the largest part along it. What a head writes
for it is W_V W_O W_U. Of rotary scores, W_Q and W_K are the content part, as circuits.py has it:
the shared rotary key is no part of the latent.

Who uses the latent: let G_K and G_V be the Gram matrices of the two halves of M over the latent.
The eigenvalues l of G_K against G_K + G_V are the same in any basis: 1 for a direction of the
latent that keys alone read, 0 for values alone.
"""

from dataclasses import dataclass

from configurator import UserError, run

import numpy as np
import torch

from analysis.circuits import (
    folded_heads,
    folded_unembedding,
    joint_reading_space,
    part_of_scores,
    token_vectors,
)
from analysis.plots import layer_colours, set_title, token_labels, with_notes
from analysis.program import AnalysisConfig, main
from runtime.figures import Figure
from runtime.progress import progress_bar


@dataclass
class Config(AnalysisConfig):
    directions: int = 3  # of each layer, in the numbers
    tokens: int = 6  # at either end of a direction
    alone: float = 0.9  # from this share on, a direction is used by keys (or values) alone
    least = dict(directions=1, tokens=1)

    def __post_init__(self):
        super().__post_init__()
        if not 0.5 < self.alone <= 1:
            raise ValueError(f'alone={self.alone} must be above 0.5 and at most 1')


@dataclass
class Direction:
    """Of the residual stream, into one layer's latent. Its sign is free, so both ends are given."""
    strength: float  # singular value of M; the squares of all of them add up to 2
    key_share: float  # of its square that is due to keys
    excite: list  # texts of the tokens that go furthest along it
    inhibit: list  # and against it
    writes: list  # for each head: texts of the tokens whose logits an excited direction raises most
    suppresses: list  # and lowers most
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
    note: str = ''  # which part of the scores the keys are about


def users(heads, layer, basis):
    """G_K and G_V (rank, rank), each of trace 1: how keys and values use the directions of basis
    (n_embd, rank)."""
    keys = heads.W_K[layer], heads.W_Q[layer].mT
    values = heads.W_V[layer], heads.W_O[layer]
    grams = []
    for reads, goes_on in (keys, values):
        half = basis.mT @ reads @ goes_on  # (n_head, rank, n_embd)
        gram = (half @ half.mT).sum(0)
        grams.append(gram / gram.trace().clamp_min(1e-300))
    return grams


def key_shares(G_K, G_V):
    """The eigenvalues l of G_K v = l (G_K + G_V) v, largest first: the part of the keys in each
    direction, whatever the basis. Directions that nobody uses do not occur."""
    total, directions = torch.linalg.eigh(G_K + G_V)
    used = total > total.max() * 1e-12
    whiten = directions[:, used] / total[used].sqrt()
    return torch.linalg.eigvalsh(whiten.mT @ G_K @ whiten).flip(-1).clamp(0, 1)


def find_latents(subject, heads):
    """A basis (n_embd, rank) of what each layer's latent reads. Raises UserError for a model that
    has no latent."""
    n_layer, _, n_embd, _ = heads.W_Q.shape
    latents = [joint_reading_space(heads, layer) for layer in range(n_layer)]
    if any(latent.size(1) >= n_embd - 1 for latent in latents):
        raise UserError('latent_directions needs a latent narrower than the residual stream, and '
                        f'the keys and values of {subject.source} read all {n_embd - 1} dimensions '
                        'of it (LayerNorm takes the mean out), as those of MHA do: give an MLA '
                        'model')
    if not all(latent.size(1) for latent in latents):
        raise UserError(f'the keys and values of {subject.source} read nothing in some layer: give '
                        'a trained model')
    return latents


class Vocabulary:
    """The tokens of a model, with which directions of the residual stream are compared."""

    def __init__(self, subject, count):
        model, n_vocab = subject.model, subject.n_vocab
        ids = torch.arange(n_vocab, device=subject.device).split(8192)
        # (n_vocab, n_embd) the embeddings, and with what the first MLP adds
        self.bare, self.behind_mlp = (
            torch.cat([token_vectors(model, part, first_mlp) for part in ids])
            for first_mlp in (False, True))
        self.W_U = folded_unembedding(model, n_vocab)
        self.labels = token_labels(subject.tokenizer, range(n_vocab))
        self.count = min(count, n_vocab)  # tokens to name at either end

    def furthest(self, along):
        """Texts of the tokens at the two ends of along (n_vocab,)."""
        return [[self.labels[i] for i in (sign * along).topk(self.count).indices.tolist()]
                for sign in (1, -1)]


def describe_direction(u, strength, key_share, heads, layer, vocabulary):
    """The Direction of u (n_embd,), which leads into the latent of a layer."""
    tokens = vocabulary.behind_mlp if layer else vocabulary.bare
    along = tokens @ u
    sign = along[along.abs().argmax()].sign()  # the end that is excited most comes first
    u, (excite, inhibit) = sign * u, vocabulary.furthest(sign * along)
    written = [u @ W_V @ W_O for W_V, W_O in zip(heads.W_V[layer], heads.W_O[layer])]
    writes, suppresses = zip(*(vocabulary.furthest(one @ vocabulary.W_U) for one in written))
    return Direction(strength, key_share, excite, inhibit, list(writes), list(suppresses),
                     [one.norm().item() for one in written])


def analyse(subject, config):
    heads = folded_heads(subject.model)
    latents = find_latents(subject, heads)
    vocabulary = Vocabulary(subject, config.tokens)
    result = LatentDirections([], [], *np.zeros((3, len(latents))), [], config.alone,
                              part_of_scores(subject.model))
    for layer, basis in enumerate(progress_bar(latents, 'latent directions')):
        G_K, G_V = users(heads, layer, basis)
        squares, vectors = (part.flip(-1) for part in torch.linalg.eigh(G_K + G_V))
        strengths = squares.clamp_min(0).sqrt().tolist()
        shares = key_shares(G_K, G_V)
        result.strengths.append(strengths)
        result.key_share.append(shares.tolist())
        result.keys_alone[layer] = (shares >= config.alone).double().mean()
        result.values_alone[layer] = (shares <= 1 - config.alone).double().mean()
        result.both[layer] = 1 - result.keys_alone[layer] - result.values_alone[layer]
        found = []
        for number in range(min(config.directions, len(strengths))):
            v = vectors[:, number]  # (rank,)
            key_share = (v @ G_K @ v / squares[number].clamp_min(1e-300)).item()
            found.append(describe_direction(basis @ v, strengths[number], key_share, heads, layer,
                                            vocabulary))
        result.directions.append(found)
    return result


def table(result):
    lines = [f'{"layer":>5}{"keys alone":>12}{"values alone":>14}{"both":>7}      share of the '
             f'latent (alone: {result.alone:.0%} or more)']
    shares = zip(result.keys_alone, result.values_alone, result.both)
    for layer, (keys, values, both) in enumerate(shares):
        lines.append(f'{layer:>5}{keys:>12.0%}{values:>14.0%}{both:>7.0%}')
    lines += ['', 'the strongest direction of each layer: part of the keys, tokens at both ends -> '
                  'what the head that it moves most writes']
    for layer, (direction, *_) in enumerate(result.directions):
        head = int(np.argmax(direction.head_strength))
        excite, inhibit, writes, suppresses = (
            ' '.join(texts[:4]) for texts in (direction.excite, direction.inhibit,
                                              direction.writes[head], direction.suppresses[head]))
        lines.append(f'{layer:>5}{direction.key_share:>6.0%}   {excite}  |  {inhibit}  ->  '
                     f'{layer}.{head}  {writes}  |  {suppresses}')
    return '\n'.join(lines + [result.note] * bool(result.note))


def plot(results):
    figure = Figure(figsize=(4.5 * len(results) + 0.5, 6), layout='constrained')
    set_title(figure, with_notes('What the latent stores, layer by layer', results))
    axes = figure.subplots(2, len(results), squeeze=False, sharey='row')
    for (top, bottom), (name, result) in zip(axes.T, results.items()):
        colours = layer_colours(len(result.strengths))
        for layer, (strengths, shares) in enumerate(zip(result.strengths, result.key_share)):
            color, number = colours[layer], np.arange(1, len(strengths) + 1)
            values = np.array(strengths)
            values[values < 1e-6 * values.max(initial=1e-300)] = np.nan  # rounding
            top.semilogy(number, values, color=color, label=f'layer {layer}')
            bottom.plot(np.linspace(0, 1, len(shares)), shares, color=color)
        top.set(title=f'{name}\nhow strongly attention reacts to each direction',
                xlabel='direction', ylabel='singular value of M')
        top.legend(fontsize=7)
        bottom.axhspan(result.alone, 1, color='C0', alpha=0.12)
        bottom.axhspan(0, 1 - result.alone, color='C1', alpha=0.12)
        bottom.text(0.98, 0.95, 'keys alone', ha='right', va='center', fontsize=8)
        bottom.text(0.02, 0.05, 'values alone', ha='left', va='center', fontsize=8)
        bottom.set(title='who uses it', xlabel="share of the latent's dimensions",
                   ylabel='part of the keys', ylim=(0, 1))
    return figure


if __name__ == '__main__':
    run(lambda: main('latent_directions', Config, analyse, table, plot))
