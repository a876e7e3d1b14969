"""What is known of two models and of their training: the top of a report."""

import html
import json
from datetime import datetime
from pathlib import Path

from analysis.page import table
from models import cached_numbers, describe
from runtime.checkpoint import read_checkpoint
from runtime.figures import Figure
from runtime.loading import find_checkpoint, is_hugging_face

# settings in which two models that are compared may differ: those of their attention, and of where
# and how fast they ran
MAY_DIFFER = {'n_kv_head', 'rotary', 'rotary_base', 'n_latent', 'n_rotary', 'latent_norm',
              'latent_scale', 'n_query_latent', 'out_dir', 'device', 'dtype', 'compile', 'backend',
              'log_interval', 'eval_interval', 'eval_iters', 'eval_only', 'always_save_checkpoint',
              'keep_checkpoints', 'model_type', 'parallel', 'progress'}


def checkpoint_of(subject):
    """The checkpoint of a subject, {} where it is none."""
    if is_hugging_face(subject.source):
        return {}
    return read_checkpoint(find_checkpoint(subject.source), mmap=True)


def written_at(source):
    path = Path(source) if is_hugging_face(source) else find_checkpoint(source)
    return datetime.fromtimestamp(path.stat().st_mtime).strftime('%Y-%m-%d') if path.exists() else (
        'unknown')


def unlike(subjects):
    """How two Subjects were trained otherwise than each other, as lines. Their attentions may
    differ."""
    one, two = (subject.settings for subject in subjects)
    missing = [subject.label for subject in subjects if not subject.settings]
    if missing:
        return [f'how {name} was trained is unknown' for name in missing]
    keys = sorted((one.keys() & two.keys()) - MAY_DIFFER)
    return [f'{key} is {one[key]!r} and {two[key]!r}' for key in keys if one[key] != two[key]]


def summary(subjects, checkpoints):
    """The HTML of a table of two Subjects, by their labels, and of their checkpoints, and a warning
    where they were not trained alike."""
    both = list(subjects.values())

    def known(key, form):
        return [form.format(checkpoint[key]) if key in checkpoint else 'unknown'
                for checkpoint in checkpoints]
    rows = [['', *subjects],
            ['model', *(describe(s.model) for s in both)],
            ['val loss, estimated in training, nats', *known('best_val_loss', '{:.4f}')],
            ['parameters', *(f'{s.model.get_num_params(non_embedding=False):,}' for s in both)],
            ['cache, bytes per token in float32', *(f'{4 * cached_numbers(s.model):,}'
                                                    for s in both)],
            ['iterations', *known('iter_num', '{:,}')],
            ['data', *(s.dataset or 'unknown' for s in both)],
            ['tokens', *(s.tokenizer.name for s in both)],
            ['written', *(written_at(s.source) for s in both)],
            ['from', *(s.source for s in both)]]
    differing = unlike(both)
    warning = differing and ('<p class="warning"><b>Not trained alike, or not known to be:</b> '
                             + html.escape('; '.join(differing)) + '. What differs below may come '
                             'from that.</p>')
    return table(rows, 'summary') + (warning or '')


def draw_curves(labels, checkpoints):
    """A Figure of the losses that checkpoints remember; None where none does."""
    figure = Figure(figsize=(9, 4), layout='constrained')
    ax, found = figure.subplots(), 0
    for number, (label, checkpoint) in enumerate(zip(labels, checkpoints)):
        rows = list(map(json.loads, checkpoint.get('metrics', '').splitlines()))
        for key, style in (('train_loss', ':'), ('val_loss', '-')):
            points = [(row['iter'], row[key]) for row in rows if row.get(key) is not None]
            found += len(points)
            if points:
                ax.plot(*zip(*points), style, color=f'C{number}',
                        label=f'{label}, {key.replace("_", " ")}')
    if not found:
        return None
    ax.set(xlabel='iteration', ylabel='loss, nats')
    ax.grid(alpha=0.3)
    ax.legend()
    return figure
