"""
Which tokens of a text does a model find hard, and where do two models differ most.

    python -m analysis.token_loss out_shakespeare_quick/ckpt.pt out_shakespeare_quick/ckpt_mla.pt
    python -m analysis.token_loss out/ckpt.pt --text=FILE:book.txt

It needs a model and a text: the data that the model was trained on, a dataset, or a file. A second
model has to read the same tokens. The loss is that of each token given those before it in its
window, in nats. The first token of a window has nothing before it, and its loss is unknown.

The error of a mean difference is that over windows. With one window it is unknown.
"""

from dataclasses import dataclass

from configurator import run

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from analysis.plots import is_dark, token_labels
from analysis.program import AnalysisConfig, main
from analysis.record import final_stream, record
from analysis.subject import load_subject, name_pair, same_tokens
from evaluate import stream_losses
from runtime.figures import Figure
from runtime.progress import progress_bar

COLUMNS, LINES = 64, 16  # of the picture


@dataclass
class Config(AnalysisConfig):
    other: str = ''  # a second model; '': none
    text: str = ''  # FILE:book.txt or a dataset; '': the val split that the checkpoint names
    max_tokens: int = 1024  # of the text, in windows of the context's length
    top: int = 12  # tokens in the table
    least = dict(max_tokens=2, top=1)


@dataclass
class TokenLoss:
    models: list  # one or two names
    tokens: list  # (windows, T + 1) texts
    losses: np.ndarray  # (models, windows, T + 1) nats; nan for the first token of a window
    guess: float  # the loss of a guess among all tokens, nats
    top: int


def losses_of(subject, windows):
    """The loss (windows, T + 1) of each token of windows (B, T + 1)."""
    found = []
    for idx in progress_bar(windows, 'losses'):
        idx = idx.to(subject.device)
        losses = stream_losses(subject.model, final_stream(record(subject.model, idx[:, :-1])),
                               idx[:, 1:])
        found.append(torch.cat([torch.full_like(losses[:, :1], torch.nan), losses], dim=1))
    return torch.cat(found).numpy()


def compare(first, other, config):
    """The TokenLoss of a Subject and another, which may be None. Raises UserError where they do not
    read the same tokens."""
    subjects = [first] if other is None else [first, other]
    if other is not None:
        same_tokens('token_loss', first, other)
    T = min([config.max_tokens, *(s.model.config.block_size for s in subjects)])
    windows = first.windows(config.text, config.max_tokens, T)
    tokens = [token_labels(first.tokenizer, row) for idx in windows for row in idx.tolist()]
    losses = np.stack([losses_of(subject, windows) for subject in subjects])
    return TokenLoss([subject.label for subject in subjects], tokens, losses,
                     float(np.log(first.n_vocab)), config.top)


def analyse(subject, config):
    other = None
    if config.other:
        other = load_subject(config.other, subject.device, key='other')
        name_pair(subject, other)
    return compare(subject, other, config)


def where(result, values):
    """(window, place) of the largest absolute values (windows, T + 1), largest first."""
    order = np.argsort(-abs(np.nan_to_num(values)), axis=None, kind='stable')[:result.top]
    return list(zip(*np.unravel_index(order, values.shape)))


def before(tokens, place):
    """The text before a token, short."""
    text = ''.join(tokens[max(0, place - 24):place])
    return f'{text[-24:]:>24}'


def table(result):
    means = np.nanmean(result.losses, axis=(1, 2))
    lines = [f'{name}: mean loss {mean:.4f} nats, a guess {result.guess:.2f}'
             for name, mean in zip(result.models, means)]
    n = np.isfinite(result.losses[0]).sum()
    lines[-1] += f'     {n:,} tokens in {len(result.tokens):,} windows'
    if len(result.models) == 1:
        lines += ['', f'{"hardest":>24}   token{"nats":>12}']
        for window, place in where(result, result.losses[0]):
            tokens = result.tokens[window]
            lines.append(f'{before(tokens, place)}   {tokens[place]:<8}'
                         f'{result.losses[0, window, place]:>9.2f}')
        return '\n'.join(lines)
    difference = result.losses[1] - result.losses[0]
    each = np.nanmean(difference, axis=1)  # of each window
    error = each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.nan
    spread = f'+- {error:.4f}' if np.isfinite(error) else '+- unknown'
    lines.append(f'{result.models[1]} less {result.models[0]}: {means[1] - means[0]:+.4f} {spread} '
                 f'nats, {result.models[1]} is better at '
                 f'{(difference < 0).sum() / max(1, n):.0%} of the tokens')
    names = [name[-12:] for name in result.models]
    lines += ['', f'{"they differ most":>24}   token   {names[0]:>14}{names[1]:>14}{"less":>9}']
    for window, place in where(result, difference):
        tokens, (a, b) = result.tokens[window], result.losses[:, window, place]
        lines.append(f'{before(tokens, place)}   {tokens[place]:<8}{a:>14.2f}{b:>14.2f}'
                     f'{b - a:>+9.2f}')
    return '\n'.join(lines)


def lay_out(tokens):
    """(line, column, width) of each token where a line has COLUMNS characters. A line break ends a
    line."""
    line = column = 0
    for text in tokens:
        width = max(1, len(text))
        if column + width > COLUMNS and column:
            line, column = line + 1, 0
        yield line, column, width
        column += width
        if '↵' in text:
            line, column = line + 1, 0


def draw_text(ax, tokens, values, colours):
    """Draw tokens line by line, each on the colour of its value; grey where that is unknown."""
    for text, value, (line, column, width) in zip(tokens, values, lay_out(tokens)):
        if line >= LINES:
            break
        colour = colours.to_rgba(value) if np.isfinite(value) else '#dddddd'
        ax.add_patch(Rectangle((column, line), width, 1, color=colour, linewidth=0))
        ax.text(column + width / 2, line + 0.55, text, ha='center', va='center', fontsize=7,
                family='monospace', parse_math=False,
                color='white' if is_dark(colours, value) else 'black')
    ax.set(xlim=(0, COLUMNS), ylim=(LINES, 0))
    ax.axis('off')


def plot(results):
    (result,) = results.values()
    tokens = [text for row in result.tokens for text in row]
    kinds = [(name, losses.ravel(), ScalarMappable(Normalize(0, result.guess), 'Blues'))
             for name, losses in zip(result.models, result.losses)]
    units = ['loss, nats; the scale ends at a guess'] * len(kinds)
    if len(kinds) == 2:
        difference = (result.losses[1] - result.losses[0]).ravel()
        end = max(0.5, float(np.nanquantile(abs(difference), 0.98)))
        kinds.append((f'{result.models[1]} less {result.models[0]}', difference,
                      ScalarMappable(Normalize(-end, end), 'RdBu_r')))
        units.append('difference, nats')
    figure = Figure(figsize=(11, 0.5 + 3.2 * len(kinds)), layout='constrained')
    figure.suptitle('The loss of every token')
    axes = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    for ax, (name, values, colours), unit in zip(axes, kinds, units):
        draw_text(ax, tokens, values, colours)
        ax.set_title(name, fontsize=9)
        figure.colorbar(colours, ax=ax, label=unit, pad=0.01)
    return figure


if __name__ == '__main__':
    run(lambda: main('token_loss', Config, analyse, table, plot))
