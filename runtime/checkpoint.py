"""
Checkpoints: nanoGPT's dictionary plus model_type, tokenizer and metrics. So a nanoGPT ckpt.pt
loads here, and a GPT's loads in nanoGPT. Only plain data and tensors are ever loaded
(weights_only), never code.

No random generator's state is stored: the trainer seeds torch anew for every micro-batch from
(seed, its number).
"""

import os
import pickle
import re
import shutil
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from configurator import UserError, build, is_out_of_memory

import torch

from model import GPTConfig
from models import MODELS
from runtime.tokenizer import is_spec


class DamagedError(UserError):
    """A file that is no checkpoint, or no longer one."""


def checkpoint_path(out_dir, model_type):
    return Path(out_dir) / ('ckpt.pt' if model_type == 'gpt' else f'ckpt_{model_type}.pt')


def latest_path(path):
    """Where the newest state of a run lies when the checkpoint at path is an older, better one."""
    return path.with_name(f'{path.stem}_last.pt')


def run_checkpoints(out_dir, model_type):
    """The files that a run has left to resume from: its checkpoint, the latest state beside it,
    and older ones."""
    if not os.path.isdir(out_dir):
        return []
    path = checkpoint_path(out_dir, model_type)
    kinds = (path, latest_path(path))
    older = [p for p in path.parent.glob('*.pt.*')
             if re.fullmatch(r'\d+', p.suffix[1:]) and p.stem in [kind.name for kind in kinds]]
    return [p for p in (*kinds, *sorted(older)) if os.path.exists(p)]


def save_checkpoint(path, model, tokenizer, config, iter_num, weights=None, keep=1, **state):
    """Write a model and the state of its run to path.

    config is a dictionary of settings. weights, if given, are written in place of the model's own.
    state is what else to remember, such as the optimizer's. The file at path is either the old one
    or the new one, never half of it. With keep > 1, keep - 1 older ones stay as path.1, path.2 and
    so on. Raises OSError where the file cannot be written.
    """
    # nanoGPT has no such keys, so they are written only where they say something
    added = ('gelu', 'n_kv_head', 'rotary', 'rotary_base', 'mlp')
    model_args = {key: value for key, value in asdict(model.config).items()
                  if key not in added or value != getattr(GPTConfig, key)}
    checkpoint = {
        'model': model.state_dict() if weights is None else weights,
        'model_args': model_args,
        'iter_num': iter_num,
        'config': config | asdict(model.config),
        'model_type': model.model_type,
        'tokenizer': tokenizer.spec,
        **state,
    }
    partial = Path(f'{path}.partial')
    try:
        with open(partial, 'wb') as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        if keep > 1:
            keep_older(path, keep)
        os.replace(partial, path)
        sync_folder(partial.parent)
    except (OSError, RuntimeError) as e:  # torch raises the latter where a disk is full
        partial.unlink(missing_ok=True)
        reason = getattr(e, 'strerror', None) or 'there may be no room for it'
        raise OSError(f'{path} cannot be written ({reason})') from None


def keep_older(path, keep):
    """Rename path.1 to path.2 and so on, and make path.1 what path is. path itself stays until the
    new file takes its place."""
    for number in range(keep - 1, 1, -1):
        if os.path.exists(f'{path}.{number - 1}'):
            os.replace(f'{path}.{number - 1}', f'{path}.{number}')
    if os.path.exists(path):
        partial = Path(f'{path}.1.partial')
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:  # not every file system can
            shutil.copyfile(path, partial)
        os.replace(partial, f'{path}.1')


def sync_folder(folder):
    """Have the disk remember what was renamed in a folder, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def bad_checksum(path):
    """The part of a checkpoint that has not the checksum that it was written with, None if there is
    none."""
    try:
        with zipfile.ZipFile(path) as f:
            return f.testzip()
    except Exception as e:  # a damaged file can raise nearly anything
        return f'{type(e).__name__}: {e}'


def verify_checksums(path):
    """Raise DamagedError if a checkpoint's contents do not have the checksums that they were
    written with."""
    part = bad_checksum(path)
    if part is not None:
        raise DamagedError(f'checkpoint {path} is damaged ({part}): take another, or train anew')


def read_checkpoint(path, device='cpu', mmap=False):
    """The dictionary in the file at path, its tensors on device. With mmap they stay in the file
    until they are used. Raises UserError if there is none, DamagedError if there is none to
    trust."""
    if not os.path.isfile(path):
        raise UserError(f'there is no checkpoint {str(path)[:300]}: train one first, or name '
                        'another')
    try:
        open(path, 'rb').close()
    except OSError as e:  # which says nothing about what is in it
        raise UserError(f'checkpoint {path} cannot be read ({e.strerror}): mend that, or name '
                        'another') from None
    try:
        return checked(torch.load(path, map_location=device, weights_only=True, mmap=mmap))
    except Exception as e:  # a damaged file can raise nearly anything
        if is_out_of_memory(e):
            raise
        if isinstance(e, pickle.UnpicklingError) and (kinds := refused_kinds(path)):
            raise UserError(
                f'checkpoint {path} is whole but holds {kinds}, and only numbers, texts and '
                'tensors are read, since others can run code: in the program that wrote it, save '
                'it again with int(), float() or str() of such values') from None
        if type(e) is ValueError:
            reason = str(e)
        elif isinstance(e, pickle.UnpicklingError):
            reason = 'it holds more than numbers and text, or other bytes than were written'
        else:
            reason = 'it is cut off, or another kind of file'
        raise DamagedError(f"checkpoint {path} is damaged or none of this project's ({reason}): "
                           'take another, or train anew') from None


def refused_kinds(path):
    """What a whole checkpoint holds beside plain data and tensors, in words; '' if it is damaged or
    holds nothing else."""
    if bad_checksum(path) is not None:
        return ''
    try:
        return ', '.join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # a damaged file can raise nearly anything
        return ''


def checked(checkpoint):
    """A checkpoint's dictionary, with the names that older nanoGPTs wrote put right. Raises
    ValueError for what is no checkpoint."""
    if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= checkpoint.keys():
        raise ValueError('it lacks model and model_args')
    # torch.compile and DDP leave these before the names
    checkpoint['model'] = {re.sub(r'^(_orig_mod\.|module\.)+', '', name): tensor
                           for name, tensor in checkpoint['model'].items()
                           if not name.endswith(('.attn.bias', '.attn.masked_bias'))}
    checkpoint['model_args'].setdefault('vocab_size', GPTConfig.vocab_size)
    if not is_spec(checkpoint.get('tokenizer', 'gpt2')):
        raise ValueError('its tokenizer is of no known form')
    return checkpoint


def build_model(checkpoint, path, **overrides):
    """The model that a checkpoint holds, in float32, of the class that its model_type names (a GPT
    where it names none). overrides are model settings that do not change the weights' shapes.
    Raises UserError."""
    model_type = str(checkpoint.get('model_type', 'gpt'))
    if model_type not in MODELS:
        raise UserError(f'checkpoint {path} has model_type {model_type!r}; known are '
                        f"{', '.join(MODELS)}")
    model_class = MODELS[model_type].model_class
    try:
        config = build(model_class.config_class, {**checkpoint['model_args'], **overrides})
        return model_class.from_state_dict(config, checkpoint['model']).float()
    except (TypeError, RuntimeError) as e:
        reason = ' '.join(str(e).split())[:200]
        raise UserError(f'the weights in checkpoint {path} do not fit its model_args: {reason}'
                        ) from None
