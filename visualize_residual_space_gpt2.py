"""
The residual stream of a model in two dimensions: where each token goes, from the embedding through
every block.

    python visualize_residual_space_gpt2.py gpt2 --prompt="The cat sat on the mat" --drop_first
    python visualize_residual_space_gpt2.py out_shakespeare_quick/ckpt_mla.pt --repeat=2 --animation

It needs a model; without a prompt it takes random tokens. The two dimensions are the principal
components (Pearson 1901) of all tokens at all layers together, or of each layer on its own. The
mean over n_embd, which every layer norm removes, is subtracted first. Fewer tokens and layers can
be plotted, and the components do not change with that.

In GPT-2 a few dimensions are hundreds of times larger than the rest, and the norm of the first
position dwarfs all others. --drop_first leaves that position out. --normalize scales every vector
to the same length, as a layer norm does. The picture says which of the two was done.
"""

import math
from dataclasses import dataclass
from typing import Literal

from configurator import UserError, run

import numpy as np
import torch
from matplotlib.animation import PillowWriter

from analysis import program
from analysis.plots import set_title, token_labels
from analysis.record import residual_streams
from models import describe
from runtime.figures import Figure
from runtime.progress import progress_bar

MARKERS = 'os^Dv<>Pp*hX'  # of the copies of a repeated sequence
FRAMES_PER_LAYER = 8
EMBEDDING = 'embed'


@dataclass
class ResidualConfig(program.AnalysisConfig):
    model: str = 'gpt2'  # a checkpoint, an out_dir, the directory of a Hugging Face GPT-2, or a
        # name such as gpt2-xl
    prompt: str = ''  # the text; FILE:prompt.txt reads it from a file, - from standard input; '':
        # random tokens
    random_tokens: int = 24  # how many, where there is no prompt
    repeat: int = 1  # copies of the sequence, one after the other
    tokens: str = ''  # which to plot, such as 0:32 or 0,5,9 (numbered from 0); '': all
    layers: str = ''  # which to plot, such as 0,4,11 or 0:6: after those blocks, embed for before;
        # '': all
    basis: Literal['shared', 'per_layer'] = 'shared'  # one pair of components for all
        # layers, or one for each
    drop_first: bool = False  # leave out the first position
    normalize: bool = False  # take each vector as a layer norm hands it on
    labels: bool = True  # write each token beside its point
    animation: bool = False  # also residual_space.gif
    least = dict(random_tokens=1, repeat=1)


@dataclass
class ResidualSpace:
    coordinates: np.ndarray  # (layer, token, 2) of the layers and tokens that are plotted
    layers: list  # their names: embed, 0, 1, ...
    tokens: list  # texts of the tokens
    copies: list  # which copy of the sequence each token is in, from 0
    places: list  # where in its copy it is, from 0
    explained: np.ndarray  # (layer, 2) share of the variance, of all layers or of its own, that
    # each component explains
    within: np.ndarray  # (layer,) share of the layer's own variance that the two show together
    basis: str
    drop_first: bool
    normalize: bool


def principal_components(X, count=2):
    """Of X (samples, n): its mean (n,), the count directions of largest variance (count, n), and
    the share of the variance that each explains (count,). Where there are fewer samples or
    dimensions than count, the other directions are zeros."""
    mean = X.mean(0)
    _, S, V = np.linalg.svd(X - mean, full_matrices=False)
    components, explained = np.zeros((count, X.shape[1])), np.zeros(count)
    least = 1e-12 * (np.abs(X).max() + 1e-300)  # what is below is rounding
    found = min(count, int((S > least).sum()))
    components[:found] = V[:found]
    explained[:found] = S[:found] ** 2 / (S ** 2).sum() if found else 0
    return mean, components, explained


def project(streams, basis):
    """streams (layer, token, n) -> coordinates (layer, token, 2) and the share of the variance
    explained (layer, 2). basis is 'shared' for one basis for all layers, or 'per_layer' for one
    each, whose signs follow from layer to layer."""
    if basis == 'shared':
        mean, components, explained = principal_components(streams.reshape(-1, streams.shape[-1]))
        return (streams - mean) @ components.T, np.tile(explained, (len(streams), 1))
    coordinates, shares = [], []
    for X in streams:
        mean, components, explained = principal_components(X)
        own = (X - mean) @ components.T
        if coordinates:  # a component's sign is free: take that of the layer before
            own = own * np.where((own * coordinates[-1]).sum(0) < 0, -1, 1)
        coordinates.append(own)
        shares.append(explained)
    return np.stack(coordinates), np.stack(shares)


def shown_variance(streams, coordinates):
    """The share (layer,) of the variance of streams (layer, token, n) within each layer that their
    coordinates (layer, token, 2) have."""
    whole, shown = (X.var(axis=1).sum(-1) for X in (streams, coordinates))
    return np.where(whole > 0, shown / np.maximum(whole, 1e-300), 0.0)


def read_numbers(key, text, names):
    """'0:3' or '0,2' -> places in names, the list of what can be asked for. Raises UserError."""
    try:
        if not text:
            chosen = list(range(len(names)))
        elif '-' in text:
            chosen = []
        elif ':' in text:
            first, last = (int(end) if end else None for end in text.split(':'))
            numbers = range(first or 0, len(names) if last is None else last)
            chosen = [i for i, name in enumerate(names) if name != EMBEDDING
                      and int(name) in numbers]
        else:
            places = [names.index(part.strip()) for part in text.split(',')]
            chosen = list(dict.fromkeys(places))
    except ValueError:
        chosen = []
    if not chosen:
        raise UserError(f'{key}={text!r} must be numbers such as 0,2,5 or a range such as 0:6, and '
                        f'there are {names[0]} to {names[-1]}')
    return chosen


def sequence(subject, config):
    """The token ids of one copy. Raises UserError."""
    ids = subject.tokens('prompt', config.prompt) if config.prompt else []
    n_once, block_size = len(ids) or config.random_tokens, subject.model.config.block_size
    count = n_once * config.repeat
    if count > block_size:
        what = f'prompt of {n_once} tokens' if ids else f'random_tokens={n_once}'
        times = f', repeat={config.repeat} times,' if config.repeat > 1 else ''
        raise UserError(f'{what}{times} does not fit into block_size={block_size}: give fewer')
    if count - config.drop_first < 2:
        raise UserError(f"{'prompt' if ids else 'random_tokens'}: {count} tokens are too few to "
                        'compare: give more, or repeat them')
    generator = torch.Generator().manual_seed(config.seed)
    return ids or torch.randint(subject.n_vocab, (n_once,), generator=generator).tolist()


def analyse(subject, config):
    return analyse_ids(subject, sequence(subject, config), config)


def analyse_ids(subject, once, config):
    """The ResidualSpace of the token ids of one copy."""
    ids, dropped = once * config.repeat, int(config.drop_first)
    names = [EMBEDDING, *map(str, range(subject.model.config.n_layer))]
    layers = read_numbers('layers', config.layers, names)
    tokens = read_numbers('tokens', config.tokens, list(map(str, range(len(ids)))))
    tokens = [t for t in tokens if t >= dropped]
    if not tokens:
        raise UserError(f'tokens={config.tokens!r} is only the first position, which drop_first '
                        'leaves out: give others')
    streams = residual_streams(subject.model, torch.tensor([ids], device=subject.device))
    streams = streams[:, 0].double().cpu().numpy()  # (n_layer + 1, T, n_embd)
    streams = streams - streams.mean(-1, keepdims=True)  # no reader sees the mean
    if config.normalize:
        streams = streams / np.linalg.norm(streams, axis=-1, keepdims=True).clip(1e-12)
    coordinates, explained = project(streams[:, dropped:], config.basis)
    return ResidualSpace(
        coordinates[layers][:, [t - dropped for t in tokens]], [names[i] for i in layers],
        token_labels(subject.tokenizer, [ids[t] for t in tokens]),
        copies=[t // len(once) for t in tokens], places=[t % len(once) for t in tokens],
        explained=explained[layers],
        within=shown_variance(streams[:, dropped:], coordinates)[layers],
        basis=config.basis, drop_first=config.drop_first,
        normalize=config.normalize)


def layer_title(name):
    return 'embedding' if name == EMBEDDING else f'after block {name}'


def how(result):
    """A line that says how a result was computed."""
    return ', '.join([
        'one basis for all layers' if result.basis == 'shared' else 'a basis for each layer',
        'vectors normalised' if result.normalize else 'vectors as they are',
        'first position left out' if result.drop_first else 'with the first position'])


def label_axes(ax, result, layer):
    """Name the components. Of one basis for all layers the shares are those of all together."""
    of = 'all variance' if result.basis == 'shared' else "this layer's variance"
    for number, set_label in enumerate((ax.set_xlabel, ax.set_ylabel)):
        set_label(f'PC {number + 1} ({result.explained[layer, number]:.0%} of {of})', fontsize=8)


def scatter(ax, points, result):
    """Draw points (token, 2). The colour is the place in the sequence, the marker tells the copies
    apart."""
    copies, places = np.array(result.copies), np.array(result.places)
    for copy in dict.fromkeys(result.copies):
        mine = copies == copy
        image = ax.scatter(*points[mine].T, c=places[mine], vmin=0, vmax=max(1, places.max()),
                           cmap='viridis', s=24, marker=MARKERS[copy % len(MARKERS)],
                           edgecolors='black' if copy else 'none', linewidths=0.7,
                           label=f'copy {copy + 1}', zorder=3)
    return image


def write_labels(ax, points, result, size=8):
    """Write each token beside its point where there is room: on one of four sides, and not over
    another label or point. Those that find no room are left out."""
    scale = ax.figure.dpi / 72
    pixels = ax.transData.transform(points)
    taken = [(x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale) for x, y in pixels]
    for own, ((x, y), point, text) in enumerate(zip(pixels, points, result.tokens)):
        width, height = (0.62 * size * max(1, len(text)) * scale, 1.1 * size * scale)
        for side in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
            left = x + 3 * scale if side[0] > 0 else x - 3 * scale - width
            low = y + scale if side[1] > 0 else y - scale - height
            box = left, low, left + width, low + height
            if not any(overlaps(box, other) for number, other in enumerate(taken)
                       if number != own):
                taken.append(box)
                ax.annotate(text, point, (3 * side[0], side[1]), textcoords='offset points',
                            fontsize=size, parse_math=False, zorder=4,
                            ha='left' if side[0] > 0 else 'right',
                            va='bottom' if side[1] > 0 else 'top')
                break


def overlaps(one, other):
    """Whether two boxes (left, low, right, high) overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def fit_axes(ax, points):
    """Let the axes end a little beyond points (..., 2), which may be all at one place."""
    low, high = (end(points.reshape(-1, 2), axis=0) for end in (np.min, np.max))
    margin = 0.1 * (high - low) + 1e-9
    ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]),
           ylim=(low[1] - margin[1], high[1] + margin[1]))


def name_copies(ax, result):
    if 1 < len(set(result.copies)) <= len(MARKERS):
        ax.legend(loc='best')


def draw_grid(name, result, labels=True):
    """A Figure with a picture of each layer, each on a scale of its own: in the first layers all
    tokens would be one spot on that of the last."""
    columns = math.ceil(math.sqrt(len(result.layers)))
    rows = -(-len(result.layers) // columns)
    figure = Figure(figsize=(3.8 * columns + 0.8, 3.5 * rows + 0.7), layout='constrained')
    set_title(figure, f'Residual stream of {name}, layer by layer, each on its own scale\n'
                      f'{how(result)}')
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(result.layers):]:
        ax.axis('off')
    for number, (ax, points) in enumerate(zip(axes.flat, result.coordinates)):
        image = scatter(ax, points, result)
        fit_axes(ax, points)
        ax.set_title(f'{layer_title(result.layers[number])}: {result.within[number]:.0%} of its '
                     'variance', fontsize=9)
        if result.basis == 'per_layer':
            label_axes(ax, result, number)
    if result.basis == 'shared':
        shares = result.explained[-1]
        figure.supxlabel(f'PC 1 of all layers together ({shares[0]:.0%} of the variance)',
                         fontsize=9)
        figure.supylabel(f'PC 2 ({shares[1]:.0%})', fontsize=9)
    name_copies(axes.flat[0], result)
    figure.colorbar(image, ax=axes, label='place in the sequence, from 0', shrink=0.6)
    figure.draw_without_rendering()  # where the labels have room is known then
    for ax, points in zip(axes.flat, result.coordinates):
        if labels:
            write_labels(ax, points, result)
    return figure


def draw_paths(ax, result):
    """Join each token's points through the layers: x is the first, the large point the last."""
    for path in result.coordinates.transpose(1, 0, 2):
        ax.plot(*path.T, color='#bbbbbb', linewidth=0.8, zorder=1)
        ax.plot(*path[0], marker='x', color='#666666', markersize=4, zorder=2)
    for points in result.coordinates[1:-1]:
        ax.scatter(*points.T, c=result.places, vmin=0, vmax=max(1, max(result.places)),
                   cmap='viridis', s=6, zorder=2)
    return scatter(ax, result.coordinates[-1], result)


def draw_trajectories(name, result, labels=True):
    """A Figure of the way of each token through the layers, and of its beginning enlarged. It needs
    one basis for all layers."""
    figure = Figure(figsize=(12, 6), layout='constrained')
    whole, centre = figure.subplots(1, 2)
    for ax in (whole, centre):
        image = draw_paths(ax, result)
        label_axes(ax, result, -1)
    fit_axes(whole, result.coordinates)
    half = result.coordinates[:max(1, (len(result.layers) + 1) // 2)]
    fit_axes(centre, half)
    whole.indicate_inset(bounds=[centre.get_xlim()[0], centre.get_ylim()[0],
                                 np.ptp(centre.get_xlim()), np.ptp(centre.get_ylim())],
                         edgecolor='#666666')
    first, last = layer_title(result.layers[0]), layer_title(result.layers[-1])
    whole.set_title(f'from x ({first}) to the large point ({last})')
    centre.set_title(f'the framed part; letters: {layer_title(result.layers[len(half) - 1])}')
    figure.suptitle(f'Residual stream of {name}\n{how(result)}')
    name_copies(whole, result)
    figure.colorbar(image, ax=[whole, centre], label='place in the sequence, from 0', shrink=0.6)
    figure.draw_without_rendering()  # where the labels have room is known then
    if labels:
        write_labels(whole, result.coordinates[-1], result)
        write_labels(centre, half[-1], result)
    return figure


def save_animation(path, name, result, labels=True):
    """A GIF in which the tokens move from layer to layer. The scale follows them."""
    figure = Figure(figsize=(6, 5.5), layout='constrained')
    ax = figure.subplots()
    writer = PillowWriter(fps=FRAMES_PER_LAYER)
    last = len(result.layers) - 1
    moments = np.linspace(0, last, last * FRAMES_PER_LAYER + 1)
    with writer.saving(figure, path, dpi=90):
        for moment in progress_bar(moments, 'animation'):
            before, part = int(moment), moment % 1
            after = min(before + 1, last)
            points = (1 - part) * result.coordinates[before] + part * result.coordinates[after]
            ax.clear()
            scatter(ax, points, result)
            fit_axes(ax, points)
            label_axes(ax, result, before)
            ax.set_title(f'{name}\n{layer_title(result.layers[round(moment)])}', fontsize=9)
            name_copies(ax, result)
            figure.draw_without_rendering()
            if labels:
                write_labels(ax, points, result)
            writer.grab_frame()


def main():
    config, subject = program.read_command(ResidualConfig)
    print(describe(subject.model))
    result = analyse(subject, config)
    out_dir = program.make_folder(config.out_dir or program.default_folder(subject))
    print(f'\n{len(result.tokens)} tokens, {how(result)}; share of the variance in the two '
          'components, and of the variance within the layer:')
    for layer, (first, second), within in zip(result.layers, result.explained, result.within):
        print(f'{layer_title(layer):>18}{first:>8.1%}{second:>8.1%}{within:>8.1%}')
    figures = {'residual_space': draw_grid(subject.label, result, config.labels)}
    if result.basis == 'shared':  # points in different bases cannot be joined
        figures['residual_trajectories'] = draw_trajectories(subject.label, result, config.labels)
    program.save('residual_space', result, figures, config, out_dir)
    saved = [*program.picture_files(figures, config.format), 'residual_space.json']
    if config.animation:
        saved.append('residual_space.gif')
        with program.writing_to(out_dir):
            save_animation(out_dir / saved[-1], subject.label, result, config.labels)
    print(f"\nsaved {', '.join(saved)} in {out_dir}")


if __name__ == '__main__':
    run(main)
