"""
Which heads matter: the loss with each head's output set to zero, or to its mean over the text.

    python -m analysis.ablation out/ckpt.pt
    python -m analysis.ablation gpt2 --text=FILE:book.txt

It needs a text: the data that the model was trained on, a dataset, or a file.

    loss               mean next-token cross-entropy in nats
    in-context loss    loss at token 500 less that at token 50 of a context of 512, scaled to the
                       model's context: how much more reading helps, where it is below 0
                       (Olsson et al. 2022, "in-context learning score")

A mean is taken position by position over all windows. So what a head always writes, for instance
about the position, remains.
"""

from dataclasses import dataclass

from configurator import UserError, run

import numpy as np
import torch

from analysis.plots import Panel, draw_panels, field_maps, symmetric
from analysis.program import AnalysisConfig, main, top_heads
from analysis.record import edit_head, final_stream, record, run_from
from evaluate import stream_losses
from runtime.progress import progress_bar


@dataclass
class Config(AnalysisConfig):
    text: str = ''  # FILE:book.txt or a dataset; '': the val split that the checkpoint names
    max_tokens: int = 8192  # of the text, in windows of the context's length
    top: int = 8  # heads in the table
    least = dict(max_tokens=2, top=1)


@dataclass
class Ablation:
    loss: float  # of the whole model, nats
    in_context: float  # in-context loss of the whole model
    zero_loss: np.ndarray  # (n_layer, n_head) how much the loss rises without the head
    mean_loss: np.ndarray  # with the head at its mean
    zero_in_context: np.ndarray  # change of the in-context loss: above 0, the head helps to use
    mean_in_context: np.ndarray  # the context
    zero_in_context_error: np.ndarray  # standard errors of these two over the windows
    mean_in_context_error: np.ndarray
    positions: tuple  # of the early and the late token, from 0
    in_context_error: float  # standard error of in_context over the windows
    n_windows: int
    top: int


def in_context_positions(T):
    """Where tokens 50 and 500 of 512 are in a context of T, as positions counted from 0. Raises
    UserError where those are not two positions."""
    early, late = 50 * T // 512 - 1, 500 * T // 512 - 1
    if not 0 <= early < late:
        raise UserError(f'a context of {T} tokens (the smaller of block_size and max_tokens) is '
                        'too short for an in-context loss: take a model with a longer one, or give '
                        'more tokens')
    return early, late


def mean_outputs(model, windows):
    """The mean output of each head over windows, tensors (B, T): for each layer
    (n_head, T, head_dim)."""
    totals, count = [0.0] * model.config.n_layer, 0
    for idx in progress_bar(windows, 'mean outputs'):
        for block in record(model, idx):
            totals[block.layer] = totals[block.layer] + block.z.sum(0)
        count += len(idx)
    return [total / count for total in totals]


def measure(model, x, targets, positions):
    """The loss and the in-context loss of each window, from the final residual stream x
    (B, T, n_embd): (2, B) in nats."""
    losses = stream_losses(model, x, targets)  # (B, T)
    early, late = positions
    return torch.stack([losses.mean(1), losses[:, late] - losses[:, early]]).numpy()


def ablate(model, idx, means, positions, what):
    """measure windows idx (B, T + 1): with the whole model (2, B), and without each head, which is
    at zero or at its mean (2, n_layer, n_head, 2, B)."""
    tokens, targets = idx[:, :-1], idx[:, 1:]
    entering = []
    for block in record(model, tokens):
        entering.append(block.before)
    whole = measure(model, block.after, targets, positions)
    without = np.empty((2, len(entering), model.config.n_head, *whole.shape))
    for layer, head in progress_bar(list(np.ndindex(without.shape[1:3])), what):
        for method, change in enumerate((torch.zeros_like, means[layer][head].expand_as)):
            edit = edit_head(layer, head, change)
            x = final_stream(run_from(model, entering[layer], layer, edit))
            without[method, layer, head] = measure(model, x, targets, positions)
    return whole, without


def analyse(subject, config):
    model = subject.model
    T = min(model.config.block_size, config.max_tokens)
    positions = in_context_positions(T)
    windows = subject.windows(config.text, config.max_tokens, T)
    means = mean_outputs(model, [idx[:, :-1] for idx in windows])
    parts = []
    for number, idx in enumerate(windows, start=1):
        what = f'ablation, batch {number} of {len(windows)}'
        parts.append(ablate(model, idx, means, positions, what))
    whole, without = (np.concatenate(part, axis=-1) for part in zip(*parts))
    changes = without - whole  # (2, n_layer, n_head, 2, n_windows)
    rise = changes.mean(-1)
    errors = standard_error(changes[..., 1, :])
    loss, in_context = whole.mean(1).tolist()
    return Ablation(
        loss, in_context, zero_loss=rise[0, ..., 0], mean_loss=rise[1, ..., 0],
        zero_in_context=rise[0, ..., 1], mean_in_context=rise[1, ..., 1],
        zero_in_context_error=errors[0], mean_in_context_error=errors[1], positions=positions,
        in_context_error=float(standard_error(whole[1])), n_windows=whole.shape[1], top=config.top)


def standard_error(samples):
    """The standard error of the mean over the last dimension; nan for a single sample."""
    n = samples.shape[-1]
    return samples.std(-1, ddof=1) / n ** 0.5 if n > 1 else np.full(samples.shape[:-1], np.nan)


def table(result):
    early, late = result.positions
    lines = [f'loss {result.loss:.4f} nats, in-context loss {result.in_context:+.3f} +- '
             f'{result.in_context_error:.3f} (token {late + 1} less token {early + 1}, '
             f'{result.n_windows} windows)', '',
             f'{"head":>6}{"loss, zero":>13}{"loss, mean":>13}{"in-context, zero":>20}'
             f'{"in-context, mean":>20}     change in nats']
    for place in top_heads(result.mean_loss, result.top):
        name = f'{place[0]}.{place[1]}'
        lines.append(
            f'{name:>6}{result.zero_loss[place]:>+13.4f}{result.mean_loss[place]:>+13.4f}'
            f'{result.zero_in_context[place]:>+11.3f} +- {result.zero_in_context_error[place]:.3f}'
            f'{result.mean_in_context[place]:>+11.3f} +- {result.mean_in_context_error[place]:.3f}')
    return '\n'.join(lines)


def plot(results):
    titles = {'zero_loss': 'loss without the head',
              'mean_loss': 'loss with the head at its mean',
              'zero_in_context': 'in-context loss without the head',
              'mean_in_context': 'in-context loss, head at its mean'}
    panels = []
    for kind in ('loss', 'in_context'):
        maps = {field: field_maps(results, field) for field in (f'zero_{kind}', f'mean_{kind}')}
        end = max(symmetric(one) for one in maps.values())
        panels += [Panel(titles[field], one, 'change in nats', -end, end, 'RdBu_r')
                   for field, one in maps.items()]
    return draw_panels('Which heads matter: change against the whole model', panels)


if __name__ == '__main__':
    run(lambda: main('ablation', Config, analyse, table, plot))
