"""
Which heads matter: the loss with each head's output put to zero, or to its mean over the text.

    loss               mean next-token cross-entropy in nats
    in-context loss    loss at token 500 less that at token 50 of a context of 512 (Olsson et al. 2022, "in-context learning
                       score"), scaled to the model's context: how much reading more helps, below 0 where it does

A mean is taken position by position over all windows, so that what a head writes always (for instance of the position) stays.
"""

from dataclasses import dataclass

import numpy as np

from analysis.plots import Panel, draw_panels, symmetric
from analysis.program import AnalysisConfig, main, progress, top_heads
from analysis.record import go_on, last, record
from configurator import UserError, check_least, run
from evaluate import stream_losses

METHODS = ('zero', 'mean')


@dataclass
class Config(AnalysisConfig):
    text: str = ''  # FILE:book.txt or a dataset; '': the val split that the checkpoint names
    max_tokens: int = 8192  # of the text, in windows of the context's length
    top: int = 8  # heads in the table

    def __post_init__(self):
        super().__post_init__()
        check_least(self, max_tokens=2, top=1)


@dataclass
class Ablation:
    loss: float  # of the whole model, nats
    in_context: float  # its in-context loss
    zero_loss: np.ndarray  # (n_layer, n_head) how much the loss rises without the head
    mean_loss: np.ndarray  # with the head at its mean
    zero_in_context: np.ndarray  # how much the in-context loss changes: above 0, the head helps to use the context
    mean_in_context: np.ndarray
    zero_in_context_error: np.ndarray  # standard errors of these two over the windows
    mean_in_context_error: np.ndarray
    positions: tuple  # of the early and the late token, from 0
    in_context_error: float  # standard error of in_context over the windows
    n_windows: int
    top: int


def in_context_positions(T):
    """Where tokens 50 and 500 of 512 lie in a context of T, as positions counted from 0. Raises UserError where that is no
    two places."""
    early, late = 50 * T // 512 - 1, 500 * T // 512 - 1
    if not 0 <= early < late:
        raise UserError(f'a context of {T} tokens (the smaller of block_size and max_tokens) is too short for an in-context loss: '
                        'take a model with a longer one, or give more tokens')
    return early, late


def mean_outputs(model, windows):
    """What each head gives on average over windows, tensors (B, T): for each layer (n_head, T, head_dim)."""
    totals, count = [0.0] * model.config.n_layer, 0
    for idx in progress(windows, 'mean outputs'):
        for block in record(model, idx):
            totals[block.layer] = totals[block.layer] + block.z.sum(0)
        count += len(idx)
    return [total / count for total in totals]


def analyse(subject, config):
    model = subject.model
    c = model.config
    T = min(c.block_size, config.max_tokens)
    early, late = in_context_positions(T)
    windows = subject.windows(config.text, config.max_tokens, T)
    n_windows = sum(len(idx) for idx in windows)
    means = mean_outputs(model, [idx[:, :-1] for idx in windows])
    whole = [[], []]  # loss and in-context loss of each window
    without = {place: [[], []] for place in np.ndindex(len(METHODS), c.n_layer, c.n_head)}

    def measure(x, targets, into):
        losses = stream_losses(model, x, targets)  # (B, T)
        into[0] += losses.mean(1).tolist()
        into[1] += (losses[:, late] - losses[:, early]).tolist()
    for idx, layer, head in progress([(idx, *place) for idx in windows for place in np.ndindex(c.n_layer, c.n_head)], 'ablation'):
        tokens, targets = idx[:, :-1], idx[:, 1:]
        if layer == head == 0:
            blocks = list(record(model, tokens))
            entering = [block.before for block in blocks]
            measure(blocks[-1].after, targets, whole)
        for number, method in enumerate(METHODS):
            def edit(at, z):
                if at == layer:
                    z = z.clone()
                    z[:, head] = 0 if method == 'zero' else means[layer][head]
                return z
            measure(last(go_on(model, entering[layer], layer, edit)), targets, without[number, layer, head])
    whole = np.array(whole)  # (2, n_windows)
    changes = np.array(list(without.values())).reshape(len(METHODS), c.n_layer, c.n_head, 2, n_windows) - whole
    rise = changes.mean(-1)
    errors = standard_error(changes[..., 1, :])
    return Ablation(*whole.mean(1).tolist(), *rise[..., 0], *rise[..., 1], *errors, positions=(early, late),
                    in_context_error=float(standard_error(whole[1])), n_windows=n_windows, top=config.top)


def standard_error(samples):
    """Of the mean over the last dimension; nan for a single sample."""
    n = samples.shape[-1]
    return samples.std(-1, ddof=1) / n ** 0.5 if n > 1 else np.full(samples.shape[:-1], np.nan)


def table(result):
    lines = [f'loss {result.loss:.4f} nats, in-context loss {result.in_context:+.3f} +- {result.in_context_error:.3f} '
             f'(token {result.positions[1] + 1} less token {result.positions[0] + 1}, {result.n_windows} windows)', '',
             f'{"head":>6}{"loss, zero":>13}{"loss, mean":>13}{"in-context, zero":>20}{"in-context, mean":>20}     change in nats']
    for place in top_heads(result.mean_loss, result.top):
        lines.append(f'{f"{place[0]}.{place[1]}":>6}{result.zero_loss[place]:>+13.4f}{result.mean_loss[place]:>+13.4f}'
                     f'{result.zero_in_context[place]:>+11.3f} +- {result.zero_in_context_error[place]:.3f}'
                     f'{result.mean_in_context[place]:>+11.3f} +- {result.mean_in_context_error[place]:.3f}')
    return '\n'.join(lines)


def plot(results):
    titles = {'zero_loss': 'loss without the head', 'mean_loss': 'loss with the head at its mean',
              'zero_in_context': 'in-context loss without the head', 'mean_in_context': 'in-context loss, head at its mean'}
    panels = []
    for fields in (('zero_loss', 'mean_loss'), ('zero_in_context', 'mean_in_context')):
        maps = {field: {name: getattr(result, field) for name, result in results.items()} for field in fields}
        end = max(symmetric(one) for one in maps.values())
        panels += [Panel(titles[field], maps[field], 'change in nats', -end, end, 'RdBu_r') for field in fields]
    return draw_panels('Which heads matter: change against the whole model', panels)


if __name__ == '__main__':
    run(lambda: main('ablation', Config, analyse, table, plot))
