"""
When a circuit forms: scores of every checkpoint that a run has kept.

    python train.py config/train_induction.py                 keeps each evaluation's checkpoint
    python -m analysis.development out_induction/ckpt.pt

It needs a run with --keep_checkpoints, whose models have two layers or more, and no text.

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
from pathlib import Path

from configurator import UserError, run

import numpy as np
import torch
from matplotlib.figure import Figure

from analysis.circuits import folded_heads, joint_reading_space
from analysis.composition import chance, compositions, layers
from analysis.induction_circuit import attention_back, copy_accuracy
from analysis.induction_heads import copies_with_lags, shift_scores
from analysis.latent_directions import users
from analysis.program import AnalysisConfig, load_subject, main
from analysis.spectrum import effective_rank, of_weights
from runtime.checkpoint import read_checkpoint, run_checkpoints
from runtime.progress import progress_bar

SCORES = {'accuracy': 'copy accuracy', 'induction': 'induction', 'classical': 'classical',
          'previous': 'previous token', 'k_composition': 'K-composition',
          'rank': 'effective rank', 'outliers': 'outliers', 'keys': 'used by keys',
          'values': 'used by values'}


@dataclass
class Config(AnalysisConfig):
    sequences: int = 64  # random sequences
    least = dict(sequences=1)


@dataclass
class Development:
    iters: list  # of the checkpoints, in order
    losses: list  # the val loss of each in nats; None where the checkpoint does not say
    scores: dict  # of SCORES, each (checkpoints,)


def kept_checkpoints(subject):
    """[(iteration, path)] of the checkpoints that a subject's run has kept, in order, and the val
    loss in nats by iteration. Raises UserError where there is one alone."""
    folder, found, losses = Path(subject.source), {}, {}
    for path in run_checkpoints(folder if folder.is_dir() else folder.parent,
                                subject.model.model_type):
        checkpoint = read_checkpoint(path, mmap=True)
        found[checkpoint.get('iter_num', 0)] = path
        rows = map(json.loads, checkpoint.get('metrics', '').splitlines())
        losses |= {row['iter']: row['val_loss'] for row in rows if 'val_loss' in row}
    if len(found) < 2:
        raise UserError(f'model={subject.source} has one checkpoint, which shows no development: '
                        'train with --keep_checkpoints=100')
    return sorted(found.items()), losses


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
    if subject.model.config.n_layer < 2 or subject.model.config.block_size < 4:
        raise UserError(f'development needs two layers and a context of 4 tokens, and '
                        f'{subject.source} has n_layer={subject.model.config.n_layer} and '
                        f'block_size={subject.model.config.block_size}: take another model')
    checkpoints, losses = kept_checkpoints(subject)
    rows = [scores_of(load_subject(path, subject.device), config)
            for _, path in progress_bar(checkpoints, 'checkpoints')]
    return Development([n for n, _ in checkpoints], [losses.get(n) for n, _ in checkpoints],
                       {key: np.array([row[key] for row in rows]) for key in SCORES})


def first_above(iters, values, level):
    """The first of iters at which values reach level; None if they never do."""
    return next((n for n, value in zip(iters, values) if value >= level), None)


def table(result):
    lines = [f'{"":<16}{"first":>9}{"last":>9}{"highest":>9}']
    for key, name in SCORES.items():
        values = result.scores[key]
        lines.append(f'{name:<16}{values[0]:>9.3f}{values[-1]:>9.3f}{values.max():>9.3f}')
    at = {level: first_above(result.iters, result.scores['induction'], level)
          for level in (0.4, 0.8)}
    for level, n in at.items():
        when = f'iteration {n:,}' if n is not None else f'not by iteration {result.iters[-1]:,}'
        lines.append(f'induction above {level}: {when}')
    return '\n'.join(lines)


def plot(results):
    figure = Figure(figsize=(14, 6), layout='constrained')
    figure.suptitle('When the circuit forms')
    axes = figure.subplots(2, 5, sharex=True).ravel()
    for number, (name, result) in enumerate(results.items()):
        axes[0].plot(result.iters, [np.nan if x is None else x for x in result.losses],
                     label=name, color=f'C{number}')
        for ax, (key, title) in zip(axes[1:], SCORES.items()):
            ax.plot(result.iters, result.scores[key], color=f'C{number}')
            ax.set_title(title, fontsize=10)
            if key != 'outliers':
                ax.set_ylim(-0.02, 1.02)
    axes[0].set_title('val loss, nats', fontsize=10)
    axes[0].legend(fontsize=8)
    for ax in axes:
        ax.grid(alpha=0.3)
    for ax in axes[5:]:
        ax.set_xlabel('iteration')
    return figure


if __name__ == '__main__':
    run(lambda: main('development', Config, analyse, table, plot))
