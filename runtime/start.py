"""
What a run starts with: a new model, GPT-2's weights, those of another run, or where this one
stopped, and the data in the ids of that model.
"""

import math
import os
import shlex
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import get_type_hints

from configurator import UserError, build, checked

import torch

from runtime.checkpoint import build_model, read_checkpoint, run_checkpoints, verify_checksums
from runtime.dataset import (
    Data,
    note_on_unknown_ids,
    open_data,
    record_remedy,
    translate,
)
from runtime.device import bfloat16_ratio
from runtime.loading import (
    checkpoint_settings,
    checkpoint_tokenizer,
    find_checkpoint,
    fits,
    from_pretrained,
    hugging_face_tokenizer,
    is_hugging_face,
)
from runtime.muon import add_muon
from runtime.parallel import recompute_blocks
from runtime.resume import Found, RunState, check_class, check_resumable, newest_sound, restore
from runtime.run_log import check_other_logs
from runtime.schedule import contradictions
from runtime.tokenizer import make_tokenizer

# what a resumed run does not take from its checkpoint
OF_THE_MACHINE = {'out_dir', 'init_from', 'eval_only', 'device', 'backend'}
MAY_CHANGE = ('dropout', 'positions', 'loss_weights')  # model settings, with the weights kept


def taken_from_checkpoint(config, model_type):
    """(path, settings): what a run takes from its checkpoint where the command line says nothing.
    A resumed run takes all but where it runs, and one that starts from another's checkpoint the
    dataset. (None, {}) where there is no such checkpoint; what is wrong with it, start_run says."""
    try:
        if config.init_from in ('resume', 'auto'):
            path = newest_readable(config.out_dir, model_type)
        else:
            path = own_checkpoint(config, model_type)
        checkpoint = read_checkpoint(path, mmap=True) if path else {}
    except UserError:
        return None, {}
    settings, hints = checkpoint_settings(checkpoint), get_type_hints(type(config))
    kept = hints.keys() - OF_THE_MACHINE if config.init_from in ('resume', 'auto') else {'dataset'}
    if 'model_type' not in checkpoint:  # nanoGPT's defaults of these are for its author's GPU
        kept -= {'dtype', 'compile'}
    taken = {}
    for key in sorted(kept & settings.keys()):
        with suppress(UserError):
            taken[key] = checked(settings[key], hints[key], key)
    if not taken.get('dataset'):
        taken.pop('dataset', None)
    return path, taken


def tell_taken(path, taken, before, config):
    """Print which settings of a checkpoint, taken, have made config of what it was before."""
    now = {key: value for key, value in taken.items() if getattr(config, key) == value}
    told = {key: f'{value:g}' if isinstance(value, float) else value
            for key, value in now.items() if value != getattr(before, key)}
    if told and os.environ.get('RANK', '0') == '0':
        listed = ' '.join(shlex.quote(f'--{key}={value}') for key, value in told.items())
        print(f'note: {path} decides what the command line does not: {listed}', flush=True)


def newest_readable(out_dir, model_type):
    """The file of a run with the highest iteration, None if there is none."""
    found = []
    for path in run_checkpoints(out_dir, model_type):
        with suppress(UserError):
            iter_num = read_checkpoint(path, mmap=True).get('iter_num', 0)
            found.append((iter_num if type(iter_num) is int else -1, path))
    return max(found, key=lambda entry: entry[0])[1] if found else None


def own_checkpoint(config, model_type):
    """The path of the checkpoint that init_from names; None for GPT-2's weights and for what is no
    path. Raises UserError."""
    if config.init_from in ('scratch', 'resume', 'auto') or is_hugging_face(config.init_from):
        return None
    return find_checkpoint(config.init_from, model_type)


def start_run(model_class, config, model_args, dtype, processes):
    """The RunState to begin with. model_args are the model settings that were asked for. Raises
    UserError for what cannot be trained."""
    if processes.is_first:
        check_other_logs(config)
    start = begin(model_class, config, model_args, processes)
    model, found, data = start.model, start.found, start.data
    iter_num = found.checkpoint.get('iter_num', 0) if found else 0
    if processes.any(processes.max(iter_num) != iter_num):
        raise UserError(f'out_dir={config.out_dir} does not hold the same checkpoint for all '
                        'processes: it must be a folder that all nodes see')
    data.check(model.config.block_size, model.config.vocab_size)
    notes = start.notes + contradictions(config, model.config)
    if config.gradient_checkpointing:
        recompute_blocks(model)
    model = processes.place(model, dtype)
    if processes.sharded and dtype == torch.float16:
        raise UserError("parallel='fsdp' is not for dtype=float16: use bfloat16 or float32")
    device_type = processes.device.type
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate,
                                           (config.beta1, config.beta2), device_type)
    if config.optimizer == 'muon':
        optimizer = add_muon(model, optimizer)
    state = RunState(model, data, optimizer, scaler, notes=notes)
    if found:
        restore(state, found, config, processes)
    return state


def settle_dtype(config, state, dtype, processes):
    """(config, dtype): bfloat16 in place of 'auto' on a CPU where it has proved to be faster. The
    config then says what it is, so that a resumed run does not try again."""
    model = state.model
    if config.dtype != 'auto' or processes.device.type != 'cpu' or processes.size > 1:
        return config, dtype
    ratio = bfloat16_ratio(model, config.batch_size)
    if ratio is None:
        return config, dtype
    if ratio > 0.9:
        return replace(config, dtype='float32'), dtype
    state.notes.append(f'dtype=bfloat16: a block takes {ratio:.2f} of the time of float32 here; '
                       '--dtype=float32 is more precise')
    return replace(config, dtype='bfloat16'), torch.bfloat16


@dataclass
class Start:
    """What a run starts with."""
    model: torch.nn.Module
    data: Data  # in the ids of the model
    found: Found | None = None  # where it resumes
    notes: list = field(default_factory=list)


def begin(model_class, config, model_args, processes):
    """The Start that init_from names. A model that is going to be sharded lies on the CPU, and its
    weights in the file that they are read from. Raises UserError."""
    where = dict(device='cpu', mmap=True) if processes.sharded else dict(device=processes.device)
    if config.init_from == 'scratch':
        return from_scratch(model_class, model_args, open_data(config.dataset))
    kept = {key: value for key, value in model_args.items() if key in MAY_CHANGE}
    if config.init_from == 'resume':
        found = newest_sound(config.out_dir, model_class.model_type, **where)
        model = build_model(found.checkpoint, found.path, **kept)
        check_resumable(found, model, model_class, config)
        data = open_data(config.dataset)
        start = in_its_ids(model, data, found.checkpoint, found.path, config.dataset)
        start.found = found
    elif path := own_checkpoint(config, model_class.model_type):
        checkpoint = read_checkpoint(path, **where)
        verify_checksums(path)
        model = build_model(checkpoint, path, **kept)
        check_class(path, model, model_class)
        start = in_its_ids(model, open_data(config.dataset), checkpoint, path)
    else:
        start = from_hugging_face(model_class, config, kept)
    model_config = start.model.config
    if not start.found and model_args.get('block_size', math.inf) < model_config.block_size:
        start.model.crop_block_size(model_args['block_size'])
    for key, value in model_args.items():
        has = getattr(model_config, key)
        if value is not None and value != has:
            raise UserError(f'{key}={value} was asked for, but init_from={config.init_from} brings '
                            f'a model with {key}={has}: leave {key} out, or start from scratch')
    return start


def from_scratch(model_class, model_args, data):
    """A new model for the data, whose vocabulary is padded as nanoGPT pads it where it is GPT-2's
    or of unknown size."""
    tokenizer, notes = data.tokenizer, []
    padded = tokenizer.spec in ('gpt2', {'unknown': None})
    vocab_size = 50304 if padded else tokenizer.n_vocab
    settings = {'bias': False, 'vocab_size': vocab_size} | model_args
    if not tokenizer.knows_text:
        remedy = ''
        if tokenizer.spec == {'unknown': None}:
            remedy = f'. {record_remedy(data, make_tokenizer("gpt2"))}'
        notes.append(f'{data.folder} does not say what its ids mean (the largest is '
                     f'{data.largest_id()}): samples are numbers, and bits per byte are unknown'
                     + remedy)
    return Start(model_class(build(model_class.config_class, settings)), data, notes=notes)


def in_its_ids(model, data, checkpoint, path, resumed_on=''):
    """The Start with a checkpoint's model and the data in its ids. Raises UserError."""
    tokenizer, note = checkpoint_tokenizer(checkpoint, path, resumed_on)
    own_dataset = str(checkpoint_settings(checkpoint).get('dataset', ''))
    notes = [note, note_on_unknown_ids(data, tokenizer, own_dataset)]
    return Start(model, translate(data, tokenizer), notes=[*filter(None, notes)])


def from_hugging_face(model_class, config, kept):
    """The Start with the weights of a Hugging Face GPT-2. Where that has no tokenizer, that of the
    data counts if its size fits. Raises UserError."""
    data, (tokenizer, note) = open_data(config.dataset), hugging_face_tokenizer(config.init_from)
    if tokenizer.knows_text:
        data = translate(data, tokenizer)  # before a download of gigabytes
    model = from_pretrained(model_class, config.init_from, **kept)
    if not fits(data.tokenizer, model.config.vocab_size):
        data = translate(data, tokenizer)
    return Start(model, data, notes=[note] if note else [])
