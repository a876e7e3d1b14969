"""
Which heads, MLPs and layers matter: the loss with each of them at zero, at its mean, or resampled.

    python -m analysis.ablation out/ckpt.pt
    python -m analysis.ablation gpt2 --text=FILE:book.txt

It needs a text: the data that the model was trained on, a dataset, or a file.

    loss               mean next-token cross-entropy in nats
    in-context loss    loss at token 500 less that at token 50 of a context of 512, scaled to the
                       model's context: how much more reading helps, where it is below 0
                       (Olsson et al. 2022, "in-context learning score")

What a head, an MLP, or both parts of a layer write is replaced: by zero, by its mean, or by what it
writes at the same position of the next window of the text (resampling, Chan et al. 2022, "Causal
Scrubbing"). A mean is taken position by position over all windows. So what a head always writes,
for instance about the position, remains.

Models with more than 64 parts are screened first, on the first tokens of the text with each part at
its mean. The heads that matter most there are measured on all of it. MLPs and layers are measured
in all three ways on the tokens of the screening.
"""

from dataclasses import dataclass
from functools import partial

from configurator import UserError, run

import numpy as np
import torch

from analysis.plots import Panel, draw_panels, field_maps, symmetric
from analysis.program import AnalysisConfig, main, top_heads
from analysis.record import Taps, final_stream, record, run_from
from evaluate import stream_losses
from runtime.progress import progress_bar

METHODS = {'zero': 'at zero', 'mean': 'at its mean', 'resample': 'resampled'}
WRITTEN = {'attn.z': 'z', 'attn_out': 'attention_out', 'mlp_out': 'mlp_out'}
MOST_PARTS = 64  # that are measured without a screening


@dataclass
class Config(AnalysisConfig):
    text: str = ''  # FILE:book.txt or a dataset; '': the val split that the checkpoint names
    max_tokens: int = 8192  # of the text, in windows of the context's length
    screen: int = 256  # tokens on which a model with more than 64 parts is screened; 0: measure all
        # parts on the whole text
    top: int = 8  # parts in the table, and heads that are measured after a screening
    least = dict(max_tokens=2, top=1, screen=0)


@dataclass
class Ablation:
    loss: float  # of the whole model, nats
    in_context: float  # in-context loss of the whole model
    zero_loss: np.ndarray  # (n_layer, n_head + 2) how much the loss rises without the part: each
    mean_loss: np.ndarray  # head, the MLP, the whole layer; nan where it was not measured
    resample_loss: np.ndarray  # nan where there is one window
    zero_in_context: np.ndarray  # change of the in-context loss: above 0, the part helps to use
    mean_in_context: np.ndarray  # the context
    resample_in_context: np.ndarray
    zero_in_context_error: np.ndarray  # standard errors of these over the windows
    mean_in_context_error: np.ndarray
    resample_in_context_error: np.ndarray
    positions: tuple  # of the early and the late token, from 0
    in_context_error: float  # standard error of in_context over the windows
    n_windows: int
    screened: np.ndarray | None  # (n_layer, n_head + 2) rise of the loss in the screening, with the
                                 # part at its mean; None where there was none
    screen: int  # tokens of the screening
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


def part_names(n_layer, n_head):
    """The names of the parts (n_layer, n_head + 2)."""
    return [[*(f'head {layer}.{head}' for head in range(n_head)), f'MLP {layer}', f'layer {layer}']
            for layer in range(n_layer)]


def mean_written(model, windows):
    """The mean over windows, tensors (B, T), of what is written: for each layer a dictionary of
    WRITTEN, attn.z (n_head, T, head_dim) and the others (T, n_embd)."""
    totals, count = [dict.fromkeys(WRITTEN, 0.0) for _ in model.transformer.h], 0
    for idx in progress_bar(windows, 'mean outputs'):
        for block in record(model, idx):
            for name, field in WRITTEN.items():
                totals[block.layer][name] = totals[block.layer][name] + getattr(block, field).sum(0)
        count += len(idx)
    return [{name: total / count for name, total in layer.items()} for layer in totals]


def mean_outputs(model, windows):
    """The mean output of each head over windows, tensors (B, T): for each layer
    (n_head, T, head_dim)."""
    return [layer['attn.z'] for layer in mean_written(model, windows)]


def measure(model, x, targets, positions):
    """The loss and the in-context loss of each window, from the final residual stream x
    (B, T, n_embd): (2, B) in nats."""
    losses = stream_losses(model, x, targets)  # (B, T)
    early, late = positions
    return torch.stack([losses.mean(1), losses[:, late] - losses[:, early]]).numpy()


def replace(values, head, now):
    """now (B, ..., T, n) replaced by values that broadcast to it, of one head or of all."""
    if head is None:
        return values.expand_as(now)
    now = now.clone()
    now[:, head] = values.expand_as(now[:, head])
    return now


def edits_of(layer, column, n_head, values):
    """The edits of Taps that put values, a dictionary of WRITTEN, in the place of what a part
    writes: a head, the MLP (column n_head), or the layer (column n_head + 1)."""
    name = f'blocks.{layer}.{{}}'.format
    if column < n_head:
        z = values['attn.z']
        return {name('attn.z'): partial(replace, z[..., column, :, :], column)}
    names = ['mlp_out'] if column == n_head else ['attn_out', 'mlp_out']
    return {name(one): partial(replace, values[one], None) for one in names}


def ablate(model, idx, others, means, positions, asked, what):
    """measure windows idx (B, T + 1): with the whole model (2, B), and with each part of asked,
    (layer, column) -> its methods, replaced: (3, n_layer, n_head + 2, 2, B), nan where that is not
    asked. others (B, T + 1) are the windows from which parts are resampled."""
    tokens, targets, T = idx[:, :-1], idx[:, 1:], idx.size(1) - 1
    c, entering, written = model.config, [], []
    for block in record(model, tokens):
        entering.append(block.before)
    whole = measure(model, block.after, targets, positions)
    if any('resample' in methods for methods in asked.values()):
        written = [{name: getattr(block, field) for name, field in WRITTEN.items()}
                   for block in record(model, others[:, :-1])]
    found = np.full((len(METHODS), c.n_layer, c.n_head + 2, *whole.shape), np.nan)
    for (layer, column), methods in progress_bar(list(asked.items()), what):
        zeros = {name: value.new_zeros(()).expand_as(value) for name, value in means[layer].items()}
        for method in methods:
            values = {'zero': zeros, 'mean': means[layer]}.get(method) or written[layer]
            values = {name: value[..., :T, :] for name, value in values.items()}
            taps = Taps(edits_of(layer, column, c.n_head, values))
            x = final_stream(run_from(model, entering[layer], layer, taps))
            found[[*METHODS].index(method), layer, column] = measure(model, x, targets, positions)
    return whole, found


def measure_parts(model, windows, means, positions, asked, what):
    """ablate all windows, a list of tensors (B, T + 1): (2, n_windows) and (3, n_layer, n_head + 2,
    2, n_windows). A window's parts are resampled from the next one."""
    following = torch.cat(windows).roll(-1, dims=0).split([len(idx) for idx in windows])
    parts = [ablate(model, idx, others, means, positions, asked,
                    f'{what}, batch {number} of {len(windows)}')
             for number, (idx, others) in enumerate(zip(windows, following), start=1)]
    return (np.concatenate(part, axis=-1) for part in zip(*parts))


def screen(model, windows, means, tokens, methods):
    """The rise of the loss (3, n_layer, n_head + 2) on the first tokens of windows: of heads at
    their means, of MLPs and layers by all methods."""
    c = model.config
    T = min(tokens, windows[0].size(1) - 1)
    count = max(1, tokens // T)
    first = torch.cat(windows)[:count + 1, :T + 1]  # one more, to resample the last from
    asked = {(layer, column): ['mean'] if column < c.n_head else methods
             for layer, column in np.ndindex(c.n_layer, c.n_head + 2)}
    whole, found = ablate(model, first[:count], first[1:count + 1], means, (0, T - 1), asked,
                          'screening')
    return (found[..., 0, :] - whole[0]).mean(-1)


def analyse(subject, config):
    model, c = subject.model, subject.model.config
    T = min(c.block_size, config.max_tokens)
    positions = in_context_positions(T)
    windows = subject.windows(config.text, config.max_tokens, T)
    n_windows = sum(map(len, windows))
    methods = [name for name in METHODS if name != 'resample' or n_windows > 1]
    means = mean_written(model, [idx[:, :-1] for idx in windows])
    parts, screened, rough = list(np.ndindex(c.n_layer, c.n_head + 2)), None, None
    if config.screen and len(parts) > MOST_PARTS:
        rough = screen(model, windows, means, config.screen, methods)
        screened = rough[[*METHODS].index('mean')]
        parts = top_heads(abs(screened[:, :c.n_head]), config.top)
    asked = {part: methods for part in parts}
    whole, found = measure_parts(model, windows, means, positions, asked, 'ablation')
    changes = found - whole  # (3, n_layer, n_head + 2, 2, n_windows)
    rise, errors = changes.mean(-1), standard_error(changes[..., 1, :])
    loss_rise = rise[..., 0]
    if rough is not None:
        loss_rise[..., c.n_head:] = rough[..., c.n_head:]
    loss, in_context = whole.mean(1).tolist()
    return Ablation(
        loss, in_context, *loss_rise, *rise[..., 1], *errors, positions=positions,
        in_context_error=float(standard_error(whole[1])), n_windows=n_windows, screened=screened,
        screen=config.screen, top=config.top)


def standard_error(samples):
    """The standard error of the mean over the last dimension; nan for a single sample."""
    n = samples.shape[-1]
    return samples.std(-1, ddof=1) / n ** 0.5 if n > 1 else np.full(samples.shape[:-1], np.nan)


def table(result):
    early, late = result.positions
    lines = [f'loss {result.loss:.4f} nats, in-context loss {result.in_context:+.3f} +- '
             f'{result.in_context_error:.3f} (token {late + 1} less token {early + 1}, '
             f'{result.n_windows} windows)']
    if result.screened is not None:
        lines.append(f'screened on {result.screen} tokens; MLPs and layers are measured on these '
                     f'alone, and {result.top} heads on all')
    if result.n_windows == 1:
        lines.append('resampling is unknown: there is one window')
    lines += ['', f'{"":>10}{"loss: zero":>13}{"mean":>10}{"resample":>11}'
                  f'{"in-context: zero":>21}{"mean":>18}     change in nats']
    n_layer, columns = result.mean_loss.shape
    names = part_names(n_layer, columns - 2)

    def cell(value, form):
        return form.format(value) if np.isfinite(value) else '-'

    def with_error(value, error):
        return f'{value:+.3f} +- {cell(error, "{:.3f}")}' if np.isfinite(value) else '-'
    for place in top_heads(np.nan_to_num(result.mean_loss, nan=-np.inf), result.top):
        if not np.isfinite(result.mean_loss[place]):
            continue
        losses = [cell(getattr(result, f'{method}_loss')[place], '{:+.4f}') for method in METHODS]
        changes = [with_error(getattr(result, f'{method}_in_context')[place],
                              getattr(result, f'{method}_in_context_error')[place])
                   for method in ('zero', 'mean')]
        lines.append(f'{names[place[0]][place[1]]:>10}{losses[0]:>13}{losses[1]:>10}'
                     f'{losses[2]:>11}{changes[0]:>21}{changes[1]:>18}')
    return '\n'.join(lines)


def plot(results):
    names = {name: (list(map(str, range(len(result.mean_loss)))),
                    [*map(str, range(result.mean_loss.shape[1] - 2)), 'MLP', 'layer'])
             for name, result in results.items()}
    panels = []

    def add(titles):
        maps = {field: field_maps(results, field) for field in titles}
        end = max(symmetric(one) for one in maps.values())
        panels.extend(Panel(titles[field], one, 'change in nats', -end, end, 'RdBu_r',
                            columns='part', names=names) for field, one in maps.items())
    add({f'{method}_loss': f'loss, the part {how}' for method, how in METHODS.items()})
    add({f'{method}_in_context': f'in-context loss, the part {how}'
         for method, how in METHODS.items()})
    if all(result.screened is not None for result in results.values()):
        add({'screened': 'screening: loss, the part at its mean'})
    return draw_panels('Which parts matter: change against the whole model', panels)


if __name__ == '__main__':
    run(lambda: main('ablation', Config, analyse, table, plot))
