"""
What is in the latent: remove a few of its directions, and see whether the model still copies.

    python -m analysis.latent_surgery out_study/runs/decoupled32-1/ckpt_mla.pt

It needs a model of a context of 4 tokens or more, and no text. The keys and values of a layer read
some directions of the residual stream: n_latent of them in MLA, which is the latent, and in MHA up
to all of them. That space is the same however the weights divide the work, so it stands for the
latent in both. To remove directions of it is to hold what keys and values read of the stream there
at its mean. Queries, and the shared rotary key of a decoupled MLA, still read everything.

Directions are at right angles where what is read along them is uncorrelated: the space is whitened
first, as Belrose et al. 2023 do ("LEACE: Perfect linear concept erasure in closed form"). In the
space as it is, to remove a direction can bring in noise from another one of more variance, which
does harm without removing what is asked about.

The fewest directions that cost 90 % of copy accuracy are searched for by gradient descent on the
probability of the copied tokens, on other sequences than those that are counted (as Geiger et al.
2023 search for subspaces to patch, "Finding Alignments Between Interpretable Causal Variables and
Distributed Neural Representations"). Fewer may do that were not found. Beside them stand as many
directions drawn at random, and as many of the most variance, which count as found where they do
more.

Last, what keys and values read in the found directions is patched from another prompt, which copies
other tokens between the same places.
"""

from dataclasses import dataclass

from configurator import UserError, run

import numpy as np
import torch

from analysis.circuits import orthonormal
from analysis.induction_circuit import COPIES
from analysis.induction_heads import copies_with_lags
from analysis.program import AnalysisConfig, main
from analysis.record import record, run_block
from runtime.figures import Figure
from runtime.progress import progress_bar

COUNTS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256)
STEPS, RATE, DRAWS = 40, 0.5, 8  # of the descent; random subspaces
CHOICES = ('found', 'variance', 'random')


@dataclass
class Config(AnalysisConfig):
    sequences: int = 200  # random sequences on which accuracy is counted
    search: int = 200  # other sequences, on which directions are searched for
    cost: float = 0.9  # the part of copy accuracy that removal is to cost
    most: int = 64  # directions that are removed at most
    least = dict(sequences=1, search=1, most=1)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.cost < 1:
            raise ValueError(f'cost={self.cost} must be above 0 and below 1')


@dataclass
class Surgery:
    accuracy: float  # of copying, by the whole model
    chance: float  # accuracy of a guess
    cost: float
    dimensions: list  # of each layer: how many directions its keys and values read
    counts: list  # of each layer: how many directions were removed
    left: list  # of each layer, by the names in CHOICES: the accuracy after each removal; for
                # 'found', None past the first that costs enough
    needed: list  # of each layer, by the same names: the fewest of counts that cost enough, or None
    patched: list  # of each layer: accuracy after a patch in the found directions, and how often
                   # the model says the other prompt's token; None where none was found


def reading_basis(attention):
    """An orthonormal basis (n_embd, rank) of what keys and values read of the attention's input."""
    _, W_K, W_V, _ = attention.head_weights()
    return orthonormal(torch.cat([*W_K, *W_V], dim=-1).double()).to(W_K.dtype)


class Space:
    """What keys and values of a layer read, whitened: y = (x - mean) B / scale for what is read, x
    (B, T, n_embd). The axes of y are those of the most variance of x, first."""

    def __init__(self, read, basis):
        """read (B, T, n_embd) is what is seen to be read, basis (n_embd, rank) the directions in
        which. Those without variance are left out."""
        self.mean = read.mean((0, 1))
        z = ((read - self.mean) @ basis).flatten(0, 1).double()
        variance, axes = torch.linalg.eigh(z.mT @ z / len(z))
        seen = variance > variance.max() * 1e-9
        self.scale = variance[seen].flip(-1).sqrt().to(read.dtype)  # (rank,)
        self.B = basis @ axes[:, seen].flip(-1).to(read.dtype)  # (n_embd, rank)
        self.rank = len(self.scale)

    def white(self, x):
        return (x - self.mean) @ self.B / self.scale

    def held(self, V, y=0):
        """What run_block's reads may be: what x has in the directions V (rank, k) of the whitened
        space becomes that of y (B, T, rank), by default its mean."""
        return lambda x: x + ((y - self.white(x)) @ V @ V.mT * self.scale) @ self.B.mT

    def random(self, generator):
        """A random basis (rank, rank) of the whitened space."""
        draw = torch.randn(self.rank, self.rank, generator=generator)
        return torch.linalg.qr(draw.to(self.B)).Q


class Layer:
    """A layer of a model on some Copies, of which keys and values may be edited."""

    def __init__(self, model, number, copies):
        self.model, self.number = model, number
        self.idx = copies.idx.to(model.lm_head.weight.device)
        self.places = copies.queries()[:, :-1].to(self.idx.device)  # whose next tokens are known
        self.targets = self.idx.gather(1, self.places + 1)
        self.entering = [block.before for block in record(model, self.idx)][number]
        with torch.no_grad():
            self.read = model.transformer.h[number].ln_1(self.entering)

    def logits(self, reads=None):
        """At the places (sequences, length - 1, vocab_size), with reads as run_block takes it."""
        x = run_block(self.model, self.number, self.entering, reads=reads).after
        for number in range(self.number + 1, len(self.model.transformer.h)):
            x = run_block(self.model, number, x).after
        rows = self.places.unsqueeze(-1).expand(-1, -1, x.size(-1))
        return self.model.unembed(x.gather(1, rows))

    def trust(self, reads=None):
        """The mean probability of the right token. A loss would reward a few sure mistakes."""
        p = self.logits(reads).softmax(-1)
        return p.gather(-1, self.targets.unsqueeze(-1)).mean()

    @torch.no_grad()
    def accuracy(self, reads=None, targets=None):
        targets = self.targets if targets is None else targets
        return float((self.logits(reads).argmax(-1) == targets).double().mean())


def search(layer, space, start, n):
    """The n directions (rank, n) of a Space whose removal costs most accuracy. The descent begins
    with those of start (rank, k) and the steepest further ones, or with those of most variance."""
    variance, further = torch.eye(space.rank)[:, :n].to(start), n - start.size(1)
    begins = [variance, torch.linalg.qr(torch.cat(
        [start, steepest(layer, space, start)[:, :further]], dim=-1)).Q]
    with torch.no_grad():
        A = min(begins, key=lambda V: layer.trust(space.held(V)).item()).clone()
    A.requires_grad_()
    optimizer = torch.optim.Adam([A], lr=RATE / space.rank ** 0.5)
    for _ in range(STEPS):
        A.grad, = torch.autograd.grad(layer.trust(space.held(torch.linalg.qr(A).Q)), A)
        optimizer.step()
    return min((torch.linalg.qr(A.detach()).Q, variance),
               key=lambda V: layer.accuracy(space.held(V)))


def steepest(layer, space, without):
    """The directions (rank, rank) whose removal takes most trust away to first order, first, where
    the directions without (rank, k) are removed already: the eigenvectors of E[g y^T], made
    symmetric, for the whitened y and the gradient of trust by it, g."""
    y = space.white(space.held(without)(layer.read)).requires_grad_()
    g, = torch.autograd.grad(layer.trust(
        lambda x: x + ((y - space.white(x)) * space.scale) @ space.B.mT), y)
    M = g.flatten(0, 1).mT @ y.detach().flatten(0, 1)
    return torch.linalg.eigh(M + M.mT).eigenvectors.flip(-1)


def operate(model, number, seen, counted, other, config, bar):
    """The dimensions, counts, left, needed and patched of one layer, as Surgery has them. seen are
    the Copies to search on, counted and other, with the same places, those to count on."""
    searched, layer = Layer(model, number, seen), Layer(model, number, counted)
    with torch.no_grad():
        space = Space(searched.read, reading_basis(model.transformer.h[number].attn))
    counts = [n for n in COUNTS if n <= min(space.rank, config.most)]
    if counts[-1] < space.rank <= config.most:
        counts.append(space.rank)
    limit = (1 - config.cost) * layer.accuracy()

    generator = torch.Generator().manual_seed(config.seed)
    draws = [space.random(generator) for _ in range(DRAWS)]
    variance = torch.eye(space.rank).to(space.B)
    left = {'variance': [layer.accuracy(space.held(variance[:, :n])) for n in counts],
            'random': [float(np.mean([layer.accuracy(space.held(V[:, :n])) for V in draws]))
                       for n in counts], 'found': [None] * len(counts)}
    V, patched = variance[:, :0], None
    for place, n in enumerate(counts):
        bar.set_description(f'layer {number}, {n} directions')
        V = search(searched, space, V, n)
        left['found'][place] = layer.accuracy(space.held(V))
        if left['found'][place] <= limit:
            theirs = Layer(model, number, other)
            patch = space.held(V, space.white(theirs.read))
            patched = [layer.accuracy(patch), layer.accuracy(patch, theirs.targets)]
            break
    needed = {name: next((n for n, value in zip(counts, left[name])
                          if value is not None and value <= limit), None) for name in CHOICES}
    return space.rank, counts, left, needed, patched


def analyse(subject, config):
    model = subject.model
    if model.config.block_size < 4:
        raise UserError(f'block_size={model.config.block_size} has no room for two copies of two '
                        'tokens: take a model with 4 or more')
    counted, seen, other = (
        copies_with_lags(model, subject.n_vocab, n, config.seed + i)
        for i, n in enumerate((config.sequences, config.search, config.sequences)))
    other.first, other.lag = counted.first, counted.lag
    other.repeat()
    whole = Layer(model, 0, counted).accuracy()
    if whole < COPIES:
        raise UserError(f'latent_surgery needs a model that copies, and {subject.source} copies '
                        f'{whole:.0%} of a stretch that comes twice: train one with '
                        'config/train_induction.py')
    bar = progress_bar(range(model.config.n_layer), 'surgery')
    parts = [operate(model, number, seen, counted, other, config, bar) for number in bar]
    return Surgery(whole, 1 / subject.n_vocab, config.cost, *map(list, zip(*parts)))


def table(result):
    lines = [f'copy accuracy {result.accuracy:.3f}, chance {result.chance:.3f}',
             f'directions whose removal costs {result.cost:.0%} of it',
             f'{"layer":>6}{"of":>7}{"found":>9}{"variance":>11}{"random":>9}']
    for layer, (n, needed) in enumerate(zip(result.dimensions, result.needed)):
        most = result.counts[layer][-1]
        cells = [str(needed[name] or f'> {most}') for name in CHOICES]
        lines.append(f'{layer:>6}{n:>7}{cells[0]:>9}{cells[1]:>11}{cells[2]:>9}')
    for layer, patched in enumerate(result.patched):
        if patched:
            lines.append(f"layer {layer}, found directions patched from another prompt: accuracy "
                         f"{patched[0]:.3f}, the other's token {patched[1]:.3f}")
    return '\n'.join(lines)


def plot(results):
    n_layer = max(len(result.counts) for result in results.values())
    figure = Figure(figsize=(1.5 + 4.5 * n_layer, 4), layout='constrained')
    figure.suptitle('Copy accuracy without directions of what keys and values read')
    axes = figure.subplots(1, n_layer, sharey=True, squeeze=False)[0]
    marks = {'found': 'o-', 'variance': 's--', 'random': '^:'}
    for number, (name, result) in enumerate(results.items()):
        for layer, (counts, left) in enumerate(zip(result.counts, result.left)):
            for choice, mark in marks.items():
                points = [(n, value) for n, value in zip(counts, left[choice]) if value is not None]
                axes[layer].plot(*zip(*[(0, result.accuracy), *points]), mark, ms=4,
                                 color=f'C{number}', label=f'{name}, {choice}')
    for layer, ax in enumerate(axes):
        ax.set(title=f'layer {layer}', xlabel='directions removed', ylim=(-0.02, 1.02))
        ax.set_xscale('symlog', linthresh=8, base=2)
        ax.set_xticks([0, 2, 4, 8, 16, 32, 64], [0, 2, 4, 8, 16, 32, 64])
        ax.grid(alpha=0.3)
    axes[0].set_ylabel('copy accuracy')
    axes[-1].legend(fontsize=8)
    return figure


if __name__ == '__main__':
    run(lambda: main('latent_surgery', Config, analyse, table, plot))
