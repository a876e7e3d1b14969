"""
How a run resumes where an earlier one stopped: it has the weights, the optimizer state and the
metrics that one without a stop would have.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from configurator import UserError

import torch

from runtime.checkpoint import (
    DamagedError,
    checkpoint_path,
    latest_path,
    read_checkpoint,
    run_checkpoints,
    verify_checksums,
)
from runtime.dataset import Data, same_data
from runtime.loading import checkpoint_settings

DECIDE_BATCHES = ('dataset', 'seed', 'batch_size', 'gradient_accumulation_steps')


@dataclass
class RunState:
    """What changes in the course of a run and goes into its checkpoints, and how it began."""
    model: torch.nn.Module
    data: Data
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    iter_num: int = 0
    best_val_loss: float = math.inf
    best_iter: int = 0  # when it was reached
    metrics: list = field(default_factory=list)  # the rows of metrics.jsonl
    wandb_id: str = ''  # of its run at Weights & Biases
    resumed_from: Path | None = None
    damaged: list = field(default_factory=list)  # pairs: the path of a file and a line on it
    notes: list = field(default_factory=list)  # lines on what is not as it was


@dataclass
class Found:
    """The newest sound checkpoint of a run."""
    path: Path
    checkpoint: dict
    damaged: list  # files that are not sound: pairs of a path and a line on it


def resolve_init_from(config, model_type):
    """config, with init_from='auto' replaced by 'resume' if there is something, else 'scratch'."""
    if config.init_from != 'auto':
        return config
    found = run_checkpoints(config.out_dir, model_type)
    return replace(config, init_from='resume' if found else 'scratch')


def check_class(path, model, model_class):
    if type(model) is not model_class:
        raise UserError(f'checkpoint {path} holds a {type(model).__name__}, this program trains a '
                        f'{model_class.__name__}')


def check_resumable(found, model, model_class, config):
    """Raise UserError if a run of model_class cannot go on from what was found."""
    path = found.path
    check_class(path, model, model_class)
    iter_num = found.checkpoint.get('iter_num', 0)
    if type(iter_num) is not int or iter_num < 0:
        raise UserError(f'checkpoint {path} has iter_num={iter_num!r}, which is no iteration to '
                        'resume from')
    was = checkpoint_settings(found.checkpoint).get('optimizer', 'adamw')
    if was != config.optimizer and found.checkpoint.get('optimizer'):
        raise UserError(f'optimizer={config.optimizer} cannot go on from the state of {was} in '
                        f'{path}: leave optimizer out, or give --init_from={path} and another '
                        'out_dir for a new run with its weights')
    if iter_num > config.max_iters and not config.eval_only:
        raise UserError(f'checkpoint {path} is at iteration {iter_num}, '
                        f'max_iters={config.max_iters}: nothing is left to train, so give a larger '
                        'max_iters')


def newest_sound(out_dir, model_type, **where):
    """The newest checkpoint of a run whose checksums are right. where is read_checkpoint's. Raises
    UserError if there is none."""
    candidates, damaged = [], []
    for path in run_checkpoints(out_dir, model_type):
        try:
            iter_num = read_checkpoint(path, mmap=True).get('iter_num', 0)
            if path.suffix == '.pt':  # the checksums of older ones are read when they are wanted
                verify_checksums(path)
            candidates.append((iter_num if type(iter_num) is int else -1, path))
        except DamagedError as e:
            damaged.append((path, str(e)))
    for _, path in sorted(candidates, key=lambda entry: -entry[0]):
        try:
            if path.suffix != '.pt':
                verify_checksums(path)
            return Found(path, read_checkpoint(path, **where), damaged)
        except DamagedError as e:
            damaged.append((path, str(e)))
    if damaged:
        others = ', '.join(path.name for path, _ in damaged[1:])
        verb = 'is' if len(damaged) == 2 else 'are'
        raise UserError(damaged[0][1] + (f' (so {verb} {others})' if others else ''))
    path = checkpoint_path(out_dir, model_type)
    return Found(path, read_checkpoint(path), [])  # this raises, and says that there is none


def restore(state, found, config, processes):
    """Put what was found into a new RunState, but for the weights, which are there. Raises
    UserError for a checkpoint that cannot be used."""
    checkpoint = found.checkpoint
    state.resumed_from, state.damaged = found.path, found.damaged
    state.iter_num = checkpoint.get('iter_num', 0)
    state.notes += differences(found, config, processes)
    try:
        state.best_val_loss = float(checkpoint.get('best_val_loss', math.inf))
        state.best_iter = int(checkpoint.get('best_iter', state.iter_num))
        state.wandb_id = str(checkpoint.get('wandb_id', ''))
        rows = map(json.loads, checkpoint.get('metrics', '').splitlines())
        state.metrics = [row for row in rows if row['iter'] < state.iter_num]
        if checkpoint.get('optimizer'):
            restore_optimizer(state.optimizer, checkpoint['optimizer'], processes)
            if state.scaler.is_enabled() and checkpoint.get('scaler'):
                state.scaler.load_state_dict(checkpoint['scaler'])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError('the optimizer, metrics or best_val_loss in the checkpoint cannot be used '
                        f'({type(e).__name__}: {e}): start from scratch, or from another checkpoint'
                        ) from None
    best = checkpoint_path(config.out_dir, state.model.model_type)
    put_aside = not best.exists() and Path(f'{best}.damaged').exists()
    is_lost = put_aside or best in [path for path, _ in found.damaged]
    if is_lost and found.path.name.startswith(latest_path(best).name):
        state.best_val_loss = math.inf  # the next best takes its place
    was = checkpoint_settings(checkpoint).get('dataset')
    if isinstance(was, str) and not same_data(state.data, was):
        state.best_val_loss, state.best_iter = math.inf, state.iter_num
        state.notes.append(f'the best val loss so far was that of {was} and is counted anew')


def restore_optimizer(optimizer, saved, processes):
    """Load the state of AdamW or Muon. Its settings stay those that were asked for now."""
    asked_for = [(group['betas'], group['weight_decay']) for group in optimizer.param_groups]
    processes.load_optimizer(optimizer, saved)
    for group, (betas, weight_decay) in zip(optimizer.param_groups, asked_for):
        group.update(betas=betas, weight_decay=weight_decay)
    for p in (p for group in optimizer.param_groups for p in group['params']):
        shapes = {value.shape for key, value in optimizer.state[p].items() if key != 'step'}
        if shapes != {p.shape}:
            raise ValueError(f'it has other shapes than {tuple(p.shape)} for a weight of that '
                             'shape')


def differences(found, config, processes):
    """A line for each thing that is not as it was when the checkpoint was written."""
    checkpoint = found.checkpoint
    iter_num = checkpoint.get('iter_num', 0)
    notes = [f'{line}; resuming from {found.path.name}, at iteration {iter_num}'
             for _, line in found.damaged]
    before = checkpoint.get('processes', processes.size)
    if before != processes.size:
        notes.append(f'the number of processes was {before} and is {processes.size} now: sums are '
                     'taken in another order, so that the run goes on as it would have but for '
                     'rounding')
    settings = checkpoint_settings(checkpoint)
    for key in DECIDE_BATCHES:
        was, now = settings.get(key), getattr(config, key)
        if was not in (None, now):
            notes.append(f'{key} was {was} and is {now} now: the batches are others than the run '
                         'would have seen')
    if 'model_type' not in checkpoint:
        notes.append("the checkpoint is another program's, nanoGPT's for instance, and does not "
                     'say which data it has seen: the order of the data and the dropout start '
                     f'fresh, as those of iteration {iter_num} here')
    if iter_num == config.max_iters and iter_num and not config.eval_only:
        notes.append(f'the run is at max_iters={iter_num} already: give a larger --max_iters to '
                     'train it on')
    if not checkpoint.get('optimizer'):
        notes.append('the checkpoint has no optimizer state: it starts fresh, at iteration '
                     f'{iter_num}')
    return notes
