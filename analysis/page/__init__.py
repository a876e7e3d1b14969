"""
Pages in one file: style, script, pictures and numbers inside, and nothing from a network. page.js
draws the parts that answer to hover, click and keys, from the dictionaries that are made here.
"""

import base64
import html
import json
from pathlib import Path

import numpy as np

from analysis.patching import COMPONENTS, is_by_head, row_names

FOLDER = Path(__file__).parent
MOST_TOKENS = 1024  # of a text that is coloured


def page(title, body, data=None):
    """The HTML of a page. data is what page.js fills the parts of body from."""
    style = (FOLDER / 'page.css').read_text(encoding='utf-8')
    # </ cannot end the element, and JSON's \\u003c is a <
    numbers = json.dumps(data or {}, ensure_ascii=False, allow_nan=False).replace('<', '\\u003c')
    script = (FOLDER / 'page.js').read_text(encoding='utf-8') if data else ''
    return '\n'.join([
        '<!doctype html>', '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title>{html.escape(title)}</title>', f'<style>{style}</style></head><body>', body,
        f'<script type="application/json" id="data">{numbers}</script>',
        f'<script>{script}</script>', '</body></html>', ''])


def part(kind, key, title):
    """The HTML of a part that page.js fills: kind is its function, key that of its data."""
    return (f'<section><h3>{html.escape(title)}</h3><div data-part="{kind}" '
            f'data-key="{html.escape(key)}"></div></section>')


def pair(parts):
    """The HTML of parts side by side, or below each other where there is no room."""
    return f'<div class="pair">{"".join(parts)}</div>'


def picture(name, path, is_wide=False):
    """The HTML of a .png, which is in the page itself. A wide one is not made smaller than can be
    read."""
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return (f'<div class="picture{" wide" if is_wide else ""}"><img alt="{html.escape(name)}" '
            f'src="data:image/png;base64,{data}"></div>')


def table(rows, kind='plain'):
    """The HTML of rows of cells, of which the first has the heads."""
    head, *body = [[html.escape(str(cell)) for cell in row] for row in rows]
    lines = ['<tr>' + ''.join(f'<th>{cell}</th>' for cell in head) + '</tr>']
    lines += ['<tr>' + ''.join(f'<td>{cell}</td>' for cell in row) + '</tr>' for row in body]
    return f'<div class="scroll"><table class="{kind}">{"".join(lines)}</table></div>'


def numbers(values, digits=4):
    """An array as lists of rounded numbers. What is not finite becomes None."""
    if isinstance(values, np.ndarray) and values.ndim or isinstance(values, (list, tuple)):
        return [numbers(value, digits) for value in values]
    return round(float(values), digits) if np.isfinite(values) else None


def attention_data(run):
    """For attention(): the patterns of all heads over a Run's first sequence, in thousandths."""
    patterns = run['blocks.*.attn.pattern'].values()
    found = [[[[round(1000 * value) for value in row[:i + 1]] for i, row in enumerate(pattern)]
              for pattern in layer[0].tolist()] for layer in patterns]
    # the head that looks most sharply at one token comes first
    sharpness = [[np.mean([max(row) for row in pattern[1:]] or [0]) for pattern in layer]
                 for layer in found]
    first = np.unravel_index(np.argmax(sharpness), np.shape(sharpness))
    return {'tokens': run.labels(), 'patterns': found, 'first': [int(i) for i in first]}


def lens_data(lens, tokens):
    """For logit_lens(): a Lens."""
    return {'tokens': tokens, 'rows': lens.rows, 'probability': numbers(lens.probability),
            'rank': [[None if value is None else int(value) for value in row]
                     for row in numbers(lens.rank)],
            'guesses': lens.guesses, 'chances': numbers(lens.guess_probability, 3)}


def patching_data(result):
    """For patching(): the maps of a Patching."""
    maps = []
    positions = [f'{t} {text}' for t, text in enumerate(result.clean_tokens)]
    for component, shares in result.restored.items():
        by_head = is_by_head(component)
        names = row_names(component, shares, result.n_layer)
        maps.append({
            'title': COMPONENTS.get(component, component), 'values': numbers(shares, 3),
            'rows': names, 'row': 'layer' if by_head or len(shares) == result.n_layer else 'head',
            'columns': [str(head) for head in range(shares.shape[1])] if by_head else positions,
            'column': 'head' if by_head else 'position'})
    return {'maps': maps, 'end': 1}


def token_loss_data(result):
    """For token_loss(): a TokenLoss."""
    tokens = [text for row in result.tokens for text in row][:MOST_TOKENS]
    kinds = [(name, losses, result.guess, False) for name, losses in
             zip(result.models, result.losses)]
    if len(kinds) == 2:
        kinds.append((f'{result.models[1]} less {result.models[0]}',
                      result.losses[1] - result.losses[0], 2.0, True))
    return {'tokens': tokens,
            'kinds': [{'title': title, 'values': numbers(values.ravel()[:MOST_TOKENS], 3),
                       'end': round(end, 3), 'isSigned': is_signed}
                      for title, values, end, is_signed in kinds]}
