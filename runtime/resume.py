"""
How a run starts: from scratch, from GPT-2's weights, or where an earlier one stopped. A resumed
run has the weights, the optimizer state and the metrics that one without a stop would have.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from configurator import UserError, build

import torch

from runtime.checkpoint import (
    DamagedError,
    build_model,
    checkpoint_path,
    latest_path,
    read_checkpoint,
    run_checkpoints,
    verify_checksums,
)
from runtime.loading import checkpoint_tokenizer, from_pretrained

MAY_CHANGE = ('dropout', 'positions', 'loss_weights')  # model settings, with the weights kept
DECIDE_BATCHES = ('dataset', 'seed', 'batch_size', 'gradient_accumulation_steps')


@dataclass
class RunState:
    """What changes in the course of a run and goes into its checkpoints, and how it began."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    iter_num: int = 0
    best_val_loss: float = math.inf
    metrics: list = field(default_factory=list)  # the rows of metrics.jsonl
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


def start_run(model_class, config, model_args, data, dtype, processes):
    """The RunState to begin with. model_args are the model settings that were asked for. Raises
    UserError for what cannot be trained."""
    device = 'cpu' if processes.sharded else processes.device
    model, found = make_model(model_class, config, model_args, data, device)
    iter_num = found.checkpoint.get('iter_num', 0) if found else 0
    if processes.any(processes.max(iter_num) != iter_num):
        raise UserError(f'out_dir={config.out_dir} does not hold the same checkpoint for all '
                        'processes: it must be a folder that all nodes see')
    data.check(model.config.block_size, model.config.vocab_size)
    model = processes.place(model)
    if processes.sharded and dtype == torch.float16:
        raise UserError("parallel='fsdp' is not for dtype=float16: use bfloat16 or float32")
    device_type = processes.device.type
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate,
                                           (config.beta1, config.beta2), device_type)
    state = RunState(model, optimizer, scaler)
    if found:
        restore(state, found, config, processes)
    return state


def make_model(model_class, config, model_args, data, device):
    """The model to train, and what was Found if init_from is 'resume' (else None)."""
    if config.init_from == 'scratch':
        vocab_size = 50304 if data.tokenizer.spec == 'gpt2' else data.tokenizer.n_vocab
        settings = {'bias': False, 'vocab_size': vocab_size} | model_args
        return model_class(build(model_class.config_class, settings)), None
    kept = {key: value for key, value in model_args.items() if key in MAY_CHANGE}
    if config.init_from == 'resume':
        found = newest_sound(config.out_dir, model_class.model_type, device)
        model = build_model(found.checkpoint, found.path, **kept)
        check_resumable(found, model, model_class, config, data)
    else:
        found = None
        model = pretrained_model(model_class, config, model_args, data, kept)
    for key, value in model_args.items():
        has = getattr(model.config, key)
        if value is not None and value != has:
            raise UserError(f'{key}={value} was asked for, but init_from={config.init_from} brings '
                            f'a model with {key}={has}: leave {key} out, or start from scratch')
    return model, found


def check_resumable(found, model, model_class, config, data):
    """Raise UserError if a run of model_class cannot go on from what was found."""
    path = found.path
    if type(model) is not model_class:
        raise UserError(f'checkpoint {path} holds a {type(model).__name__}, this program trains a '
                        f'{model_class.__name__}')
    if checkpoint_tokenizer(found.checkpoint, path, config.dataset) != data.tokenizer:
        raise UserError(f'dataset={config.dataset} has another vocabulary than the one that '
                        f'checkpoint {path} was trained on: use the same data')
    iter_num = found.checkpoint.get('iter_num', 0)
    if type(iter_num) is not int or iter_num < 0:
        raise UserError(f'checkpoint {path} has iter_num={iter_num!r}, which is no iteration to '
                        'resume from')
    if iter_num > config.max_iters and not config.eval_only:
        raise UserError(f'checkpoint {path} is at iteration {iter_num}, '
                        f'max_iters={config.max_iters}: nothing is left to train, so give a larger '
                        'max_iters')


def pretrained_model(model_class, config, model_args, data, kept):
    """A model with GPT-2's weights, cropped to the block_size that was asked for."""
    if data.tokenizer.spec != 'gpt2':
        raise UserError(f'dataset={config.dataset} holds characters, init_from={config.init_from} '
                        "was trained on GPT-2's byte pairs: use data prepared with those, such as "
                        'dataset=shakespeare')
    model = from_pretrained(model_class, config.init_from, **kept)
    if model_args.get('block_size', math.inf) < model.config.block_size:
        model.crop_block_size(model_args['block_size'])
    return model


def newest_sound(out_dir, model_type, device='cpu'):
    """The newest checkpoint of a run whose checksums are right. Raises UserError if there is
    none."""
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
            return Found(path, read_checkpoint(path, device), damaged)
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
    state.notes = differences(found, config, processes)
    try:
        state.best_val_loss = float(checkpoint.get('best_val_loss', math.inf))
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


def restore_optimizer(optimizer, saved, processes):
    """Load AdamW's state. Its settings stay those that were asked for now."""
    asked_for = [(group['betas'], group['weight_decay']) for group in optimizer.param_groups]
    processes.load_optimizer(optimizer, saved)
    for group, (betas, weight_decay) in zip(optimizer.param_groups, asked_for):
        group.update(betas=betas, weight_decay=weight_decay)
    for p in (p for group in optimizer.param_groups for p in group['params']):
        moments = optimizer.state[p]
        if not p.shape == moments['exp_avg'].shape == moments['exp_avg_sq'].shape:
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
    settings = checkpoint.get('config')
    settings = settings if isinstance(settings, dict) else {}
    for key in DECIDE_BATCHES:
        was, now = settings.get(key), getattr(config, key)
        if was not in (None, now):
            notes.append(f'{key} was {was} and is {now} now: the batches are others than the run '
                         'would have seen')
    if 'model_type' not in checkpoint:
        notes.append("the checkpoint is another program's, nanoGPT's for instance, and does not "
                     'say which data it has seen: the order of the data and the dropout start '
                     f'fresh, as those of iteration {iter_num} here')
    if not checkpoint.get('optimizer'):
        notes.append('the checkpoint has no optimizer state: it starts fresh, at iteration '
                     f'{iter_num}')
    return notes
