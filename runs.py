"""
List runs: which model, how far it is trained, how good it is, and how large it and its cache are.

    python runs.py                    the runs in the folders here, and in the folders in those
    python runs.py out* --json        the runs in some folders, a line of JSON for each
    python runs.py out/ckpt.pt        one

It needs checkpoints, and reads none of their weights. A folder with several kinds of model has a
row for each. The val loss is the run's best, in nats. The cache is that of decoding in float32, in
bytes per token. A - stands where the checkpoint does not say.
"""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from glob import glob
from pathlib import Path

from configurator import UserError, configure, run

import torch

from models import cached_numbers, label_of
from runtime.checkpoint import build_model, latest_path, read_checkpoint

HEADINGS = {'folder': 'folder', 'model': 'model', 'n_latent': 'latent', 'iterations': 'iterations',
            'val_loss': 'val loss', 'params': 'parameters', 'cache_bytes_per_token': 'cache bytes',
            'saved': 'saved'}


@dataclass
class RunsConfig:
    json: bool = False  # print a line of JSON for each run in place of the table


@dataclass
class Row:
    """What is known of a run. None is what its checkpoint does not say."""
    folder: str
    checkpoint: str  # its newest file
    error: str | None = None  # why nothing else is known
    model: str | None = None
    n_latent: int | str | None = None  # a text where each layer has its own
    iterations: int | None = None
    val_loss: float | None = None  # the best, in nats
    params: int | None = None
    cache_bytes_per_token: int | None = None  # in float32
    saved: str | None = None  # local time


def checkpoints_in(source):
    """The checkpoint of each run in a folder and the folders in it, or the one at source. Raises
    UserError where there is no such path."""
    # os.path takes what can be no path for one that does not exist
    if not os.path.exists(source):
        raise UserError(f'there is no {source[:300]!r}: give folders or checkpoints')
    source = Path(source)
    if not source.is_dir():
        return {source}
    found = [*source.glob('ckpt*.pt'), *source.glob('*/ckpt*.pt')]
    return {path.with_name(path.name.replace('_last.pt', '.pt')) for path in found
            if path.is_file()}


def rows_of(path):
    """The Row of the run with its checkpoint at path, from its newest state, and one for each file
    that cannot be used."""
    sound, failed = [], []
    for file in (path, latest_path(path)):
        if file.exists():
            try:
                sound.append(read_row(file))
            except UserError as e:
                failed.append(Row(str(file.parent), str(file), str(e)))
    return [*sorted(sound, key=lambda row: -(row.iterations or 0))[:1], *failed]


def read_row(path):
    """The Row of a checkpoint. Raises UserError for what is none."""
    checkpoint = read_checkpoint(path, mmap=True)
    # to make the model of weights without values takes no memory, and checks their shapes
    checkpoint['model'] = {name: weight.to('meta') if torch.is_tensor(weight) else weight
                           for name, weight in checkpoint['model'].items()}
    model = build_model(checkpoint, path)
    iterations, val_loss = checkpoint.get('iter_num'), checkpoint.get('best_val_loss')
    return Row(str(path.parent), str(path), model=label_of(model.model_type, model.config),
               n_latent=one_or_text(getattr(model.config, 'n_latent', None)),
               iterations=iterations if type(iterations) is int else None,
               val_loss=finite_or_none(val_loss),
               params=model.get_num_params(non_embedding=False),
               cache_bytes_per_token=cached_numbers(model) * torch.float32.itemsize,
               saved=datetime.fromtimestamp(path.stat().st_mtime).isoformat(' ', 'minutes'))


def one_or_text(n_latent):
    return '/'.join(map(str, n_latent)) if isinstance(n_latent, tuple) else n_latent


def finite_or_none(value):
    """A loss as a float. nanoGPT keeps it as a tensor, and before the first evaluation it is
    infinite."""
    is_number = isinstance(value, (int, float)) or torch.is_tensor(value) and value.numel() == 1
    return float(value) if is_number and math.isfinite(value) else None


def table(rows):
    """The rows as text. One that could not be read says why in place of its figures."""
    forms = {int: '{:,}', float: '{:.4f}', str: '{}', type(None): '-'}
    lines = [list(HEADINGS.values())]
    for row in rows:
        values = [getattr(row, key) for key in HEADINGS]
        lines.append([forms[type(value)].format(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = []
    for line, error in zip(lines, [None, *(row.error for row in rows)]):
        cells = [text.ljust(width) if key in ('folder', 'model') else text.rjust(width)
                 for key, text, width in zip(HEADINGS, line, widths)]
        texts.append('  '.join([cells[0], error] if error else cells))
    return '\n'.join(texts)


def main():
    sources = [arg for arg in sys.argv[1:] if not arg.startswith('-')]
    config, _ = configure([arg for arg in sys.argv[1:] if arg.startswith('-')], RunsConfig)
    paths = {path for source in sources or glob('*/') for path in checkpoints_in(source)}
    rows = [row for path in paths for row in rows_of(path)]
    if not rows:
        where = ', '.join(sources) or 'the folders here'
        raise UserError(f'there is no checkpoint in {where[:300]}: train one first, or name its '
                        'folder')
    rows.sort(key=lambda row: (row.folder, row.checkpoint))
    print('\n'.join(json.dumps(asdict(row)) for row in rows) if config.json else table(rows))


if __name__ == '__main__':
    run(main)
