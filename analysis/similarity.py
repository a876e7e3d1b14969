"""
Do two models build the same thing? Residual streams and heads, compared on the same text.

    python -m analysis.similarity out/ckpt.pt out/ckpt_mla.pt

It needs two models that read the same tokens, and a text: the data that the first model was
trained on, a dataset, or a file. Linear CKA (Kornblith et al. 2019, eq. 3 with linear kernels) of
activations X (tokens, a) and Y (tokens, b), with centred columns, is

    |Y^T X|^2 / (|X^T X| |Y^T Y|)      in Frobenius norms

It is 1 for activations that are the same up to rotation and scale. Residual streams are taken less
their mean over n_embd, which every reader subtracts. Heads are compared by what they write, and
matched one to one so that the sum of the CKAs is largest.

The value of a CKA alone says little. Compare it with the CKA between neighbouring layers of one
model, and with chance: the CKA with the tokens in random order. With few tokens for the width,
chance is far above 0.
"""

from dataclasses import dataclass

from configurator import UserError, run

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from analysis.circuits import centred, head_names, r_factor
from analysis.plots import Panel, draw_panels
from analysis.program import AnalysisConfig, main
from analysis.record import record
from analysis.subject import load_subject, same_tokens
from runtime.progress import progress_bar


@dataclass
class Config(AnalysisConfig):
    other: str = ''  # the model to compare with, given as model is
    text: str = ''  # FILE:book.txt or a dataset; '': the val split that the checkpoint of model
        # names
    max_tokens: int = 4096  # of the text, in windows of the shorter context
    least = dict(max_tokens=2)


@dataclass
class Similarity:
    residual: np.ndarray  # (n_layer + 1, n_layer + 1 of the other) CKA after each block, and
    # first after the embedding
    residual_chance: np.ndarray  # its diagonal, with the tokens of one model in random order
    residual_self: np.ndarray  # (n_layer + 1, n_layer + 1) of the model with itself
    heads: np.ndarray  # (heads, heads of the other) CKA of what they write
    names: list  # layer.head of each head
    other_names: list
    matches: list  # [head, head of the other, CKA], best first, each head at most once
    n_tokens: int
    models: tuple


def cka_table(rows, columns):
    """Linear CKA, 0 to 1, of each of rows with each of columns, both lists of (tokens, n):
    (rows, columns). It is 0 where one of them never varies."""
    rows, columns = ([centred(X.double(), 0) for X in side] for side in (rows, columns))
    sizes = [(X.mT @ X).norm().item() for X in rows]
    other_sizes = [(Y.mT @ Y).norm().item() for Y in columns]
    scores = np.zeros((len(rows), len(columns)))
    everything, widths = torch.cat(columns, dim=1), [Y.size(1) for Y in columns]
    for i, X in enumerate(progress_bar(rows, 'CKA')):
        products = (X.mT @ everything).split(widths, dim=1)
        for j, product in enumerate(products):
            scores[i, j] = product.square().sum() / max(sizes[i] * other_sizes[j], 1e-300)
    return scores


def activations(model, windows):
    """Residual streams, n_layer + 1 tensors (tokens, n_embd), and what each head writes, tensors
    (tokens, head_dim) up to a rotation, which does not change a CKA. windows are tensors
    (B, T)."""
    streams = [[] for _ in range(model.config.n_layer + 1)]
    written = [[] for _ in range(model.config.n_layer)]
    # W_O is the product of a triangular and an orthogonal map. z W_O has the lengths and angles of
    # z times the triangular one.
    factors = [r_factor(centred(block.attn.head_weights()[-1].detach()).mT).mT
               for block in model.transformer.h]
    for idx in progress_bar(windows, 'activations'):
        for block in record(model, idx):
            if block.layer == 0:
                streams[0].append(centred(block.before).flatten(0, 1))
            streams[block.layer + 1].append(centred(block.after).flatten(0, 1))
            by_head = block.z @ factors[block.layer]  # (B, n_head, T, head_dim)
            written[block.layer].append(by_head.transpose(0, 1).flatten(1, 2))
    heads = [head for layer in written for head in torch.cat(layer, dim=1)]
    return [torch.cat(parts) for parts in streams], heads


def read_windows(subject, other, config):
    """Windows of the text, tensors (B, T), that both models read. Raises UserError."""
    same_tokens('similarity', subject, other)
    one, two = subject.model.config, other.model.config
    T = min(one.block_size, two.block_size, config.max_tokens)
    windows = [idx[:, :-1] for idx in subject.windows(config.text, config.max_tokens, T)]
    n_tokens, width = sum(idx.numel() for idx in windows), max(one.n_embd, two.n_embd)
    if n_tokens < 2 * width:
        raise UserError(f'similarity has only {n_tokens:,} tokens for streams of width {width}: '
                        f'give a longer text, and max_tokens={2 * width} or more')
    return windows


def compare(subject, other, config):
    """The Similarity of two Subjects. Raises UserError where they do not read the same tokens."""
    windows = read_windows(subject, other, config)
    n_tokens = sum(idx.numel() for idx in windows)
    streams, heads = activations(subject.model, windows)
    other_streams, other_heads = activations(other.model, [idx.to(other.device) for idx in windows])
    names, other_names = head_names(subject.model), head_names(other.model)
    scores = cka_table(heads, other_heads)
    pairs = zip(*linear_sum_assignment(scores, maximize=True))
    matches = [[names[i], other_names[j], scores[i, j]] for i, j in pairs]
    order = torch.randperm(n_tokens, generator=torch.Generator().manual_seed(config.seed))
    chance = [cka_table([mine], [others[order]]).item()
              for mine, others in zip(streams, other_streams)]
    return Similarity(
        cka_table(streams, other_streams), np.array(chance), cka_table(streams, streams), scores,
        names, other_names, sorted(matches, key=lambda match: -match[2]), n_tokens,
        (subject.label, other.label))


def analyse(subject, config):
    return compare(subject, load_subject(config.other, subject.device, key='other'), config)


def row(label, values):
    cells = [f'{value:>7.2f}' if np.isfinite(value) else f'{"-":>7}' for value in values]
    return f'{label:>28}' + ''.join(cells)


def table(result):
    same_layer = result.residual.diagonal()
    layer_before = [np.nan, *result.residual_self.diagonal(1)][:len(same_layer)]
    names = ['embed', *range(len(same_layer) - 1)]
    best = '  '.join(f'{mine} ~ {others} {score:.2f}' for mine, others, score in result.matches[:8])
    mean = np.mean([score for *_, score in result.matches])
    return '\n'.join([
        f'{"after":>28}' + ''.join(f'{name:>7}' for name in names),
        row('the same layer of the other', same_layer),
        row('the layer before, same model', layer_before),
        row('tokens in random order', result.residual_chance),
        f'heads matched ({result.n_tokens:,} tokens), mean {mean:.2f}: {best}'])


def plot(results):
    (result,) = results.values()
    model, other = result.models
    layers = [['embed', *range(n - 1)] for n in result.residual.shape]
    return draw_panels(f'Do they build the same thing? CKA over {result.n_tokens:,} tokens', [
        Panel('residual streams', {'': result.residual}, 'CKA', 0, 1, rows=f'{model}, layer',
              columns=f'{other}, layer', names={'': layers}),
        Panel('with itself, for comparison', {'': result.residual_self}, 'CKA', 0, 1,
              rows=f'{model}, layer', columns=f'{model}, layer',
              names={'': (layers[0], layers[0])}),
        Panel('what heads write', {'': result.heads}, 'CKA', 0, 1, rows=f'head of {model}',
              columns=f'head of {other}', numbers=False,
              names={'': (result.names, result.other_names)})])


if __name__ == '__main__':
    run(lambda: main('similarity', Config, analyse, table, plot))
