"""
What would each layer predict: the residual stream after each block, read as if it were the last.

    python -m analysis.logit_lens out/ckpt_mla.pt --prompt="To be, or not to be"

It needs a model and a prompt; without one it takes how the val split of the model's data begins.
The stream goes through the final norm and the unembedding (nostalgebraist 2020, "interpreting GPT:
the logit lens"). The right token is the prompt's next one. Its rank is 1 where it is likeliest. At
the last position it is unknown.

The second picture leaves out the rest of the stream. It reads what the heads of a layer write if
each token attends to itself alone: in MLA all of that comes from the latent of that token, in MHA
from its values. So it says which tokens a latent speaks for by itself. Through the final norm it
has the size of a whole stream, which it has not in the model: the ranks mean more than the
probabilities.
"""

from dataclasses import dataclass

from configurator import run

import numpy as np
import torch

from analysis.plots import draw_tokens_grid, set_title
from analysis.program import AnalysisConfig, main
from analysis.record import Taps, run_block
from runtime.figures import Figure

TOP = 5  # guesses that are kept of each place


@dataclass
class Config(AnalysisConfig):
    prompt: str = ''  # a text or FILE:prompt.txt; '': how the val split of the model's data begins


@dataclass
class Lens:
    """Of several vectors at each position, read as if they were the last residual stream."""
    rows: list  # their names
    rank: np.ndarray  # (rows, T) of the right token, from 1; nan where it is unknown
    probability: np.ndarray  # (rows, T) of the right token; nan where it is unknown
    guesses: list  # (rows, T, TOP) texts of the likeliest tokens
    guess_probability: np.ndarray  # (rows, T, TOP)


@dataclass
class LogitLens:
    tokens: list  # texts of the prompt's tokens
    stream: Lens  # the residual stream before the first block, and after each
    alone: Lens  # what the heads of each layer write if each token attends to itself alone
    source: str  # what those read: 'latent' or 'values'


@torch.no_grad()
def read_as_last(subject, vectors, rows, labels, targets):
    """The Lens of vectors (rows, T, n_embd). targets (T - 1,) are the right tokens."""
    shape = len(vectors), vectors.size(1)
    rank, probability = np.full((2, *shape), np.nan)
    guesses, chances = [], np.empty((*shape, min(TOP, subject.n_vocab)))
    for i, x in enumerate(vectors):
        logits = subject.model.unembed(x).float()  # (T, vocab_size)
        p = logits.softmax(-1)
        right = logits[:-1].gather(1, targets[:, None])
        rank[i, :-1] = (1 + (logits[:-1] > right).sum(-1)).cpu()
        probability[i, :-1] = p[:-1].gather(1, targets[:, None])[:, 0].cpu()
        best = p.topk(chances.shape[-1])
        chances[i] = best.values.cpu()
        guesses.append([[labels(token) for token in place] for place in best.indices.tolist()])
    return Lens(rows, rank, probability, guesses, chances)


def lens(run, sequence=0):
    """The LogitLens of a sequence of a Run, whose edits count."""
    subject, model = run.subject, run.subject.model
    n = model.config.n_layer
    names = ['blocks.0.resid_pre', *(f'blocks.{i}.resid_post' for i in range(n))]
    streams = run.read(names)
    stream = torch.stack([streams[name][sequence] for name in names])
    alone = torch.stack([write_alone(run, i)[sequence] for i in range(n)])
    targets, known = run.idx[sequence, 1:], {}

    def labels(token):
        if token not in known:
            known[token] = run.label(token)
        return known[token]
    return LogitLens(
        run.labels(sequence),
        read_as_last(subject, stream, ['embedding', *(f'after {i}' for i in range(n))], labels,
                     targets),
        read_as_last(subject, alone, [f'block {i}' for i in range(n)], labels, targets),
        'latent' if 'blocks.0.attn.kv_latent' in subject.activation_shapes else 'values')


@torch.no_grad()
def write_alone(run, layer):
    """What the heads of a layer write (B, T, n_embd) where each token attends to itself alone."""
    x = run[f'blocks.{layer}.resid_pre']

    def itself(pattern):
        return torch.eye(pattern.size(-1)).to(pattern).expand_as(pattern)
    edits = run.edits | {f'blocks.{layer}.attn.pattern': itself}
    edits.pop(f'blocks.{layer}.resid_pre', None)  # it is made already
    return run_block(run.subject.model, layer, x, Taps(edits)).attention_out


def analyse(subject, config):
    return lens(subject.run(subject.prompt(config.prompt)))


def rows_of(lens):
    """A line for each row of a Lens: what it says of the right tokens."""
    for i, name in enumerate(lens.rows):
        rank, p = lens.rank[i, :-1], lens.probability[i, :-1]
        if not len(rank):
            continue
        loss = -np.log(np.maximum(p, 1e-300)).mean()
        yield (f'{name:>12}{np.median(rank):>13.0f}{(rank == 1).mean():>12.1%}{p.mean():>15.3f}'
               f'{loss:>12.3f}')


def table(result):
    head = f'{"median rank":>13}{"rank 1":>12}{"probability":>15}{"loss, nats":>12}'
    return '\n'.join([f'{"stream":>12}{head}', *rows_of(result.stream), '',
                      f'{result.source + " alone":>12}{head}', *rows_of(result.alone)])


def plot(results):
    """A grid for each model: the likeliest token of each layer at each position, coloured by the
    probability of the right one."""
    first = next(iter(results.values()))
    shown = min(len(first.tokens), 24)
    n_rows = sum(len(result.stream.rows) + len(result.alone.rows) for result in results.values())
    figure = Figure(figsize=(2.2 + 0.46 * shown, 1.2 + 0.3 * n_rows + 0.9 * 2 * len(results)),
                    layout='constrained')
    set_title(figure, 'Logit lens: what each layer would predict. Colour: probability of the right '
                      'next token')
    heights = [len(one.rows) + 2 for result in results.values()
               for one in (result.stream, result.alone)]
    axes = iter(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    for name, result in results.items():
        for kind, one in (('residual stream', result.stream),
                          (f'what the {result.source} of a token writes alone', result.alone)):
            ax = next(axes)
            texts = [[place[0] for place in row[:shown]] for row in one.guesses]
            image = draw_tokens_grid(ax, one.probability[:, :shown], texts, one.rows,
                                     result.tokens[:shown])
            ax.set_title(f'{name}: {kind}', fontsize=9)
    figure.colorbar(image, ax=figure.axes, label='probability of the right token', shrink=0.6)
    return figure


if __name__ == '__main__':
    run(lambda: main('logit_lens', Config, analyse, table, plot))
