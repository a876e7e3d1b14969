"""Pictures that several analyses draw: maps of numbers, with the models side by side on one
scale."""

from dataclasses import dataclass
from textwrap import fill

import numpy as np
from matplotlib import colormaps

from runtime.figures import Figure


@dataclass
class Panel:
    """A part of a picture: a map of numbers for each model."""
    title: str
    maps: dict  # name of the model -> array (rows, columns); nan is left grey
    unit: str  # of the colour bar
    low: float | None = None  # ends of the colour scale; None: those of all the maps together
    high: float | None = None
    colors: str = 'Blues'
    rows: str = 'layer'
    columns: str = 'head'
    numbers: bool = True  # written into the cells of a small map
    names: dict | None = None  # name of the model -> names of its rows and of its columns
    chance: float | None = None  # marked on the colour bar


def with_notes(title, results):
    """The title of a picture, and below it what the results of the models note."""
    return '\n'.join([title, *(f'{name}: {result.note}' for name, result in results.items()
                               if result.note)])


def field_maps(results, field):
    """One field of each result, by the name of its model: the maps of a Panel."""
    return {name: getattr(result, field) for name, result in results.items()}


def name_cells(ax, rows, columns):
    """Write the names of rows and columns beside a map, as many as can be read."""
    for names, set_ticks, rotation in ((rows, ax.set_yticks, 0), (columns, ax.set_xticks, 90)):
        step = -(-len(names) // 24)
        set_ticks(range(0, len(names), step), names[::step], rotation=rotation, fontsize=7)


def draw_map(ax, values, panel, low, high):
    image = ax.imshow(values, vmin=low, vmax=high, cmap=panel.colors, aspect='auto',
                      interpolation='nearest')
    ax.set_facecolor('#dddddd')
    ax.set_xlabel(panel.columns)
    ax.set_ylabel(panel.rows)
    rows, columns = values.shape
    if panel.numbers and rows <= 16 and columns <= 8:
        ax.set_xticks(range(columns))
        ax.set_yticks(range(rows))
        write_numbers(ax, image, values, max(abs(low), abs(high)))
    return image


def write_numbers(ax, image, values, largest):
    """Write each number into its cell, with digits that suit the largest one."""
    digits = 2 if largest >= 0.1 else 3 if largest >= 0.01 else 4
    for (i, j), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        ax.text(j, i, f'{value:.{digits}f}', ha='center', va='center', fontsize=7,
                color='white' if is_dark(image, value) else 'black')


def set_title(figure, title):
    """Write the title over a figure, in as many lines as its width needs."""
    n_characters = int(12 * figure.get_figwidth())  # that fit beside each other
    figure.suptitle('\n'.join(fill(line, n_characters) for line in title.splitlines()))


def draw_panels(title, panels):
    """A Figure of Panels. In each of them the models stand side by side on one colour scale."""
    n_models = max(len(panel.maps) for panel in panels)
    rows = max(len(values) for panel in panels for values in panel.maps.values())
    height = 1.1 + 0.24 * min(max(rows, 4), 12)
    width = 0.9 + 2.7 * n_models
    most = 3 if n_models == 1 else 2 if len(panels) > 3 else 1
    side_by_side = min(len(panels), most)
    n_rows = -(-len(panels) // side_by_side)
    figure = Figure(figsize=(side_by_side * width, 0.5 + height * n_rows), layout='constrained')
    set_title(figure, title)
    boxes = figure.subfigures(n_rows, side_by_side, squeeze=False)
    for box, panel in zip(boxes.flat, panels):
        draw_panel(box, panel)
    return figure


def draw_panel(box, panel):
    numbers = np.concatenate([np.ravel(values) for values in panel.maps.values()]).astype(float)
    numbers = numbers[np.isfinite(numbers)] if np.isfinite(numbers).any() else np.zeros(1)
    low = numbers.min() if panel.low is None else panel.low
    high = numbers.max() if panel.high is None else panel.high
    axes = box.subplots(1, len(panel.maps), squeeze=False)[0]
    for ax, (name, values) in zip(axes, panel.maps.items()):
        image = draw_map(ax, np.asarray(values, dtype=float), panel, low, high)
        if panel.names:
            name_cells(ax, *panel.names[name])
        title = fill(panel.title, 40)
        ax.set_title(f'{title}\n{name}' if len(panel.maps) > 1 else title, fontsize=9)
    bar = box.colorbar(image, ax=list(axes), label=panel.unit, pad=0.01)
    if panel.chance is not None:
        bar.ax.axhline(panel.chance, color='black', linewidth=1.5)
        bar.ax.annotate('chance', (0, panel.chance), (-2, 0), textcoords='offset points',
                        ha='right', va='center', fontsize=7, annotation_clip=False)


def draw_tokens_grid(ax, values, texts, rows, columns, colors='Blues', low=0.0, high=1.0):
    """Draw values (rows, columns) with a token's text in each cell. rows and columns are their
    names. nan is left grey."""
    image = ax.imshow(values, vmin=low, vmax=high, cmap=colors, aspect='auto',
                      interpolation='nearest')
    ax.set_facecolor('#dddddd')
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.set_xticks(range(len(columns)), columns, fontsize=8, parse_math=False)
    ax.tick_params(length=0)
    for (i, j), value in np.ndenumerate(values):
        ax.text(j, i, texts[i][j][:7], ha='center', va='center', fontsize=7, parse_math=False,
                color='white' if is_dark(image, value) else 'black')
    return image


def is_dark(image, value):
    """Whether white text can be read on the colour that an image gives a value."""
    red, green, blue, alpha = image.cmap(image.norm(value)) if np.isfinite(value) else (1, 1, 1, 1)
    return 0.3 * red + 0.6 * green + 0.1 * blue < 0.5


def layer_colours(n_layer):
    """A colour for each layer, from dark to light: in grey too they are in order."""
    return colormaps['viridis'](np.linspace(0, 0.85, n_layer))


def symmetric(maps, at_least=1e-12):
    """The end of a colour scale around zero that fits all the maps."""
    ends = [float(np.abs(values[np.isfinite(values)]).max(initial=0)) for values in maps.values()]
    return max([at_least, *ends])


def token_labels(tokenizer, ids):
    """The texts of tokens, with their white space visible. Draw them with parse_math=False, since
    a $ is a $."""
    marks = str.maketrans({'\n': '↵', ' ': '␣', '\t': '⇥'})
    return [tokenizer.decode([i]).translate(marks) for i in ids]
