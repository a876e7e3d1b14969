"""
When something forms: any score of the analyses, over the checkpoints that a run has kept.

    python train.py config/train_induction.py                 keeps each evaluation's checkpoint
    python -m analysis.development out_induction/ckpt.pt
    python -m analysis.development out/ckpt.pt --scores=induction_heads.scores,copying.top5.mean

It needs a run with --keep_checkpoints, or a list of checkpoints. A score is ANALYSIS.FIELD, a field
of the numbers that an analysis saves. Of a field of many numbers it is the largest, or with .mean
their mean, or with .1.3 that of layer 1, head 3. Analyses run with their default settings. Without
a list of scores there are nine, for which a model has two layers or more:

    copy accuracy       how often the next token is right in a stretch that comes twice
    induction           the most attention of a head to its best shift (induction_heads.py)
    classical           the most attention at shift 1
    previous token      the most attention of a head in the first layer to the token before
    K-composition       of the second layer's head that induces most with the first layer's that
                        attends most to as many tokens back as its shift, less chance
                        (composition.py)
    effective rank      of W_Q W_K^T, over head_dim, mean over the heads of the second layer
    outliers            of W_Q W_K^T beyond noise, mean over those heads (spectrum.py)
    used by keys        effective rank of what the second layer's keys use of what its keys and
                        values read together, over the dimensions of that: the latent's, for MLA
    used by values      the same of values (latent_directions.py)
"""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from configurator import UserError, run

import numpy as np
import torch

from analysis import NAMES
from analysis.circuits import folded_heads, joint_reading_space
from analysis.composition import chance, compositions, layers
from analysis.induction_circuit import attention_back, copy_accuracy
from analysis.induction_heads import copies_with_lags, shift_scores
from analysis.latent_directions import users
from analysis.plots import set_title
from analysis.program import AnalysisConfig, main, settings
from analysis.spectrum import effective_rank, of_weights
from analysis.subject import load_subject
from runtime.checkpoint import read_checkpoint, run_checkpoints
from runtime.figures import Figure
from runtime.progress import progress_bar

SCORES = {'accuracy': 'copy accuracy', 'induction': 'induction', 'classical': 'classical',
          'previous': 'previous token', 'k_composition': 'K-composition',
          'rank': 'effective rank', 'outliers': 'outliers', 'keys': 'used by keys',
          'values': 'used by values'}

# the analyses of one model
ALONE = [name for name in NAMES if name not in ('development', 'similarity', 'report')]


@dataclass
class Config(AnalysisConfig):
    scores: str = ''  # such as induction_heads.scores,ablation.mean_loss.0.3; '': the nine
    checkpoints: str = ''  # paths with commas between them; '': those that the run of the model
        # has kept
    text: str = ''  # for the analyses that read one: FILE:book.txt or a dataset; '': the val split
    prompt: str = ''  # for those that read one; '': how the val split begins
    sequences: int = 64  # random sequences of the nine
    least = dict(sequences=1)


@dataclass
class Development:
    iters: list  # of the checkpoints, in order
    losses: list  # the val loss of each in nats; None where the checkpoint does not say
    scores: dict  # by name, each (checkpoints,)


def kept_checkpoints(subject, config):
    """[(iteration, path)] of the checkpoints that a subject's run has kept or that config lists, in
    order, and the val loss in nats by iteration. Raises UserError where there is one alone."""
    folder, found, losses = Path(subject.source), {}, {}
    paths = [Path(part.strip()) for part in config.checkpoints.split(',') if part.strip()] or (
        run_checkpoints(folder if folder.is_dir() else folder.parent, subject.model.model_type))
    for path in paths:
        checkpoint = read_checkpoint(path, mmap=True)
        n = checkpoint.get('iter_num', 0)
        if config.checkpoints and n in found:
            raise UserError(f'checkpoints has two of iteration {n:,}, {found[n]} and {path}: give '
                            'those of one run')
        found[n] = path
        rows = map(json.loads, checkpoint.get('metrics', '').splitlines())
        losses |= {row['iter']: row['val_loss'] for row in rows if 'val_loss' in row}
    if len(found) < 2:
        raise UserError(f'model={subject.source} has one checkpoint, which shows no development: '
                        'train with --keep_checkpoints=100, or list some with --checkpoints=')
    return sorted(found.items()), losses


def read_scores(text):
    """The scores that a text names: (name, module of the analysis, its fields, how). Raises
    UserError."""
    found = []
    for name in filter(None, map(str.strip, text.split(','))):
        analysis, *fields = name.split('.')
        if analysis not in ALONE or not fields:
            raise UserError(f'scores={name!r} must be ANALYSIS.FIELD, such as '
                            'induction_heads.scores, of one of ' + ', '.join(ALONE))
        found.append((name, analysis, fields))
    return found


def pick(name, value, fields):
    """The number that fields lead to in a result: names of fields, then numbers of places, or mean.
    Raises UserError."""
    while fields and not isinstance(value, (np.ndarray, list, float, int)):
        there = value if isinstance(value, dict) else vars(value)
        if fields[0] not in there:
            raise UserError(f'scores={name!r} is not there: {fields[0]!r} is none of '
                            + ', '.join(map(str, there)))
        value, fields = there[fields[0]], fields[1:]
    try:
        values = np.asarray(value, dtype=float)
        places = [int(field) for field in fields if field != 'mean']
        values = values[tuple(places)]
    except (ValueError, TypeError, IndexError):
        raise UserError(f'scores={name!r} leads to no number: end it with a field of numbers, '
                        'then .mean, or the places of one of them') from None
    values = values[np.isfinite(values)]
    if not values.size:
        return np.nan
    return float(values.mean() if 'mean' in fields else values.max())


def chosen_scores(subject, config, asked):
    """The scores of one model that read_scores has found, a dictionary. Each analysis runs once."""
    results, found = {}, {}
    for name, analysis, fields in asked:
        module = import_module(f'analysis.{analysis}')
        if analysis not in results:
            results[analysis] = module.analyse(subject, settings(module, config, subject.source))
        found[name] = pick(name, results[analysis], fields)
    return found


@torch.no_grad()
def scores_of(subject, config):
    """The SCORES of one model, a dictionary."""
    model, c = subject.model, subject.model.config
    copies = copies_with_lags(model, subject.n_vocab, config.sequences, config.seed)
    shifted = shift_scores(subject, copies)
    back = attention_back(model, copies.idx.to(subject.device), shifted.shape[-1])
    heads = folded_heads(model)
    reader, before = np.unravel_index(shifted[1, :, 1:].argmax(), shifted[1, :, 1:].shape)
    carrier = back[0, :, before + 1].argmax()
    composed = compositions(layers(heads, slice(1)), layers(heads, slice(1, 2)))['k']
    means, _ = chance(c.n_embd, c.head_dim, 50, 0)
    basis = joint_reading_space(heads, 1)
    used = [effective_rank(torch.linalg.eigvalsh(gram).clamp_min(0)) / len(gram)
            for gram in users(heads, 1, basis)]
    spectra = of_weights(model)['QK']
    return {'accuracy': copy_accuracy(model, copies), 'induction': shifted[1:, :, 1:].max(),
            'classical': shifted[1:, :, 1].max(), 'previous': back[0, :, 1].max(),
            'k_composition': composed[carrier, reader].item() - means['k'],
            'rank': spectra.effective_rank[1].mean() / c.head_dim,
            'outliers': spectra.outliers[1].mean(),
            'keys': used[0].item(), 'values': used[1].item()}


def analyse(subject, config):
    c, asked = subject.model.config, read_scores(config.scores)
    if not asked and (c.n_layer < 2 or c.block_size < 4):
        raise UserError(f'the nine scores need two layers and a context of 4 tokens, and '
                        f'{subject.source} has n_layer={c.n_layer} and block_size={c.block_size}: '
                        'take another model, or give others with --scores=')
    checkpoints, losses = kept_checkpoints(subject, config)
    rows = []
    for _, path in progress_bar(checkpoints, 'checkpoints'):
        one = load_subject(path, subject.device)
        rows.append(chosen_scores(one, config, asked) if asked else scores_of(one, config))
    return Development([n for n, _ in checkpoints], [losses.get(n) for n, _ in checkpoints],
                       {key: np.array([row[key] for row in rows]) for key in rows[0]})


def first_above(iters, values, level):
    """The first of iters at which values reach level; None if they never do."""
    return next((n for n, value in zip(iters, values) if value >= level), None)


def half_way(iters, values):
    """The first of iters at which values are half of the way from the first one to the highest;
    None where they never rise or are unknown."""
    values = np.asarray(values, dtype=float)
    if not np.isfinite(values).all() or values.max() <= values[0]:
        return None
    return first_above(iters, values, (values[0] + values.max()) / 2)


def table(result):
    width = max(16, *(len(SCORES.get(key, key)) + 2 for key in result.scores))
    lines = [f'{"":<{width}}{"first":>9}{"last":>9}{"highest":>9}{"half way at":>15}']
    for key, values in result.scores.items():
        n = half_way(result.iters, values)
        when = '-' if n is None else f'{n:,}'
        lines.append(f'{SCORES.get(key, key):<{width}}{values[0]:>9.3f}{values[-1]:>9.3f}'
                     f'{values.max():>9.3f}{when:>15}')
    for level in (0.4, 0.8) if 'induction' in result.scores else ():
        n = first_above(result.iters, result.scores['induction'], level)
        when = f'iteration {n:,}' if n is not None else f'not by iteration {result.iters[-1]:,}'
        lines.append(f'induction above {level}: {when}')
    return '\n'.join(lines)


def plot(results):
    keys = list(dict.fromkeys(key for result in results.values() for key in result.scores))
    columns = min(5, len(keys) + 1)
    rows = -(-(len(keys) + 1) // columns)
    figure = Figure(figsize=(max(7, 2.9 * columns), 0.6 + 2.6 * rows), layout='constrained')
    set_title(figure, 'When it forms: scores of the checkpoints of a run. Dotted: half way from '
                      'the first to the highest')
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for number, (name, result) in enumerate(results.items()):
        axes[0].plot(result.iters, [np.nan if x is None else x for x in result.losses],
                     label=name, color=f'C{number}')
        for ax, key in zip(axes[1:], keys):
            ax.plot(result.iters, result.scores[key], color=f'C{number}', marker='.', markersize=3)
            if (n := half_way(result.iters, result.scores[key])) is not None:
                ax.axvline(n, color=f'C{number}', linewidth=0.8, linestyle=':')
            ax.set_title(SCORES.get(key, key), fontsize=10)
            if key in SCORES and key != 'outliers':
                ax.set_ylim(-0.02, 1.02)
    axes[0].set_title('val loss, nats', fontsize=10)
    axes[0].legend(fontsize=8)
    for ax in axes[:len(keys) + 1]:
        ax.grid(alpha=0.3)
    for ax in axes[len(keys) + 1:]:
        ax.axis('off')
    for ax in axes[-columns:]:
        ax.set_xlabel('iteration')
    return figure


if __name__ == '__main__':
    run(lambda: main('development', Config, analyse, table, plot))
