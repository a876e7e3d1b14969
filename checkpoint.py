"""
Checkpoints: nanoGPT's dictionary plus model_type, tokenizer and metrics, so that a nanoGPT ckpt.pt loads here and a GPT's loads
in nanoGPT. Only plain data and tensors are ever loaded (weights_only), never code.

No random generator's state is stored: train.py seeds torch anew for every micro-batch from (seed, its number).
"""

import os
import pickle
import re
import shutil
import zipfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import UserError, build
from data.tokenizer import dataset_tokenizer
from dataset import data_folder
from model import GPT, GPTConfig
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA

MODELS = {cls.model_type: cls for cls in (GPT, GPT_MLA, GPT_KAhead)}
GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


class DamagedError(UserError):
    """A file that is no checkpoint, or no longer one."""


def checkpoint_path(out_dir, model_type):
    return Path(out_dir) / ('ckpt.pt' if model_type == 'gpt' else f'ckpt_{model_type}.pt')


def last_path(path):
    """Where the newest state of a run lies when the checkpoint at path is an older, better one."""
    return path.with_name(f'{path.stem}_last.pt')


def save_checkpoint(path, model, tokenizer, config, iter_num, weights=None, keep=1, **state):
    """Write a model (weights, if given, in place of its own) and the state of its run: config is a dictionary of settings,
    state what else to remember, such as the optimizer's. The file at path is either the old one or the new one, never half
    of it; with keep > 1, keep - 1 older ones stay as path.1, path.2 and so on. Raises OSError where it cannot be written."""
    added = {'gelu': GPTConfig.gelu}  # nanoGPT has no such key, so it is written only where it says something
    checkpoint = {
        'model': model.state_dict() if weights is None else weights,
        'model_args': {k: v for k, v in asdict(model.config).items() if k not in added or v != added[k]},
        'iter_num': iter_num,
        'config': config | asdict(model.config),
        'model_type': model.model_type,
        'tokenizer': tokenizer,
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
        raise OSError(f'{path} cannot be written ({getattr(e, "strerror", None) or "there may be no room for it"})') from None


def keep_older(path, keep):
    """path.1 becomes path.2 and so on, and path.1 what path is, which stays there until the new one takes its place."""
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


def run_checkpoints(out_dir, model_type):
    """The files that a run has left to resume from: its checkpoint, the newest state beside it, and older ones."""
    if not os.path.isdir(out_dir):
        return []
    path = checkpoint_path(out_dir, model_type)
    kinds = (path, last_path(path))
    older = [p for p in path.parent.glob('*.pt.*') if re.fullmatch(r'\d+', p.suffix[1:]) and p.stem in [k.name for k in kinds]]
    return [p for p in (*kinds, *sorted(older)) if os.path.exists(p)]


def read_newest(out_dir, model_type, device='cpu'):
    """The newest whole checkpoint of a run: its path, the dictionary in it, and for each damaged file its path and a line on it.
    Raises UserError if there is none."""
    found, damaged = [], []
    for path in run_checkpoints(out_dir, model_type):
        try:
            iter_num = read_checkpoint(path, mmap=True).get('iter_num', 0)
            if path.suffix == '.pt':  # of the older ones only those that are wanted
                check_whole(path)
            found.append((iter_num if type(iter_num) is int else -1, path))
        except DamagedError as e:
            damaged.append((path, str(e)))
    for _, path in sorted(found, key=lambda entry: -entry[0]):
        try:
            if path.suffix != '.pt':
                check_whole(path)
            return path, read_checkpoint(path, device), damaged
        except DamagedError as e:
            damaged.append((path, str(e)))
    if damaged:
        others = ', '.join(path.name for path, _ in damaged[1:])
        raise UserError(damaged[0][1] + (f' (so {"is" if len(damaged) == 2 else "are"} {others})' if others else ''))
    return (path := checkpoint_path(out_dir, model_type)), read_checkpoint(path), []  # which says that there is none


def check_whole(path):
    """Raise DamagedError if a checkpoint's contents do not have the checksums that they were written with."""
    try:
        with zipfile.ZipFile(path) as f:
            part = f.testzip()
    except Exception as e:  # a damaged file can raise nearly anything
        part = f'{type(e).__name__}: {e}'
    if part is not None:
        raise DamagedError(f'checkpoint {path} is damaged ({part}): take another, or train anew')


def read_checkpoint(path, device='cpu', mmap=False):
    """The dictionary in the file at path, its tensors on device. With mmap they stay in the file until they are used.
    Raises UserError if there is none, DamagedError if there is none to trust."""
    if not os.path.isfile(path):
        raise UserError(f'there is no checkpoint {str(path)[:300]}: train one first, or name another')
    try:
        open(path, 'rb').close()
    except OSError as e:  # which says nothing about what is in it
        raise UserError(f'checkpoint {path} cannot be read ({e.strerror}): mend that, or name another') from None
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
        if not isinstance(checkpoint, dict) or not {'model', 'model_args'} <= checkpoint.keys():
            raise ValueError('it lacks model and model_args')
        prefix = '_orig_mod.'  # left in the names by torch.compile in old nanoGPT checkpoints
        checkpoint['model'] = {k.removeprefix(prefix): v for k, v in checkpoint['model'].items()
                               if not k.endswith(('.attn.bias', '.attn.masked_bias'))}
        checkpoint['model_args'].setdefault('vocab_size', GPTConfig.vocab_size)
        tokenizer = checkpoint.get('tokenizer', 'gpt2')
        if tokenizer != 'gpt2' and not (isinstance(tokenizer, list) and all(isinstance(c, str) for c in tokenizer)):
            raise ValueError("its tokenizer is neither 'gpt2' nor a list of characters")
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as e:  # a damaged file can raise nearly anything
        if "can't allocate memory" in str(e):
            raise
        reason = (str(e) if type(e) is ValueError else 'it holds more than numbers and text, or other bytes than were written'
                  if isinstance(e, pickle.UnpicklingError) else 'it is cut off, or another kind of file')
        raise DamagedError(f'checkpoint {path} is damaged or none of this project\'s ({reason}): take another, or train anew'
                           ) from None
    return checkpoint


def build_model(checkpoint, path, **overrides):
    """The model that a checkpoint holds, in float32, of the class that its model_type names (a GPT where it names none).
    overrides are model settings that do not change the weights' shapes."""
    name = str(checkpoint.get('model_type', 'gpt'))
    if name not in MODELS:
        raise UserError(f"checkpoint {path} has model_type {name!r}; known are {', '.join(MODELS)}")
    try:
        config = build(MODELS[name].config_class, {**checkpoint['model_args'], **overrides})
        return MODELS[name].from_state_dict(config, checkpoint['model']).float()
    except (TypeError, RuntimeError) as e:
        reason = ' '.join(str(e).split())[:200]
        raise UserError(f'the weights in checkpoint {path} do not fit its model_args: {reason}') from None


def checkpoint_tokenizer(checkpoint, path, dataset=None):
    """What tokenized the text a checkpoint was trained on. One of nanoGPT's does not say: the meta.pkl of dataset
    (default: the one that its config names) does, and its number of characters must be the model's vocab_size."""
    if 'tokenizer' in checkpoint:
        return checkpoint['tokenizer']
    dataset = dataset or (checkpoint.get('config') or {}).get('dataset', '')
    tokenizer, vocab_size = dataset_tokenizer(data_folder(dataset)), checkpoint['model_args']['vocab_size']
    if vocab_size < 50257 if tokenizer == 'gpt2' else vocab_size != len(tokenizer):
        raise UserError(f"checkpoint {path} carries no tokenizer, and dataset {dataset!r} has no meta.pkl for a "
                        f'vocabulary of {vocab_size}: prepare the data that it was trained on')
    return tokenizer


def from_pretrained(model_class, name, **overrides):
    """model_class.from_pretrained, with what is wrong as a UserError."""
    try:
        return model_class.from_pretrained(name, overrides)
    except ImportError:
        raise UserError(f'{name} is read with transformers, which is not installed: pip install -r requirements.txt'
                        ) from None
    except Exception as e:  # a damaged file can raise nearly anything
        reason = ' '.join(str(e).split()).split('. ')[0][:200]
        if model_class is not GPT:
            raise UserError(reason) from None
        remedy = ('the network is needed once' if name in GPT2_NAMES and isinstance(e, OSError) else
                  'give the directory of a GPT-2, or a checkpoint')
        raise UserError(f'{name} cannot be loaded ({type(e).__name__}: {reason}): {remedy}') from None


def is_hugging_face(source):
    """Whether source is a GPT-2 by name or the directory of a Hugging Face model, and not a checkpoint or an out_dir."""
    # os.path, which takes what can be no path for one that does not exist
    return os.path.isfile(Path(source) / 'config.json') or str(source) in GPT2_NAMES and not os.path.exists(source)


def find_checkpoint(source, model_type=None):
    """The path of a checkpoint: source itself, or in the out_dir source its only one, or the one of model_type."""
    path = Path(source)
    if not os.path.isdir(path) and (os.path.exists(path) or path.suffix == '.pt'):
        return path
    found = [p for name in MODELS for p in run_checkpoints(path, name)[:1]]
    wanted = checkpoint_path(path, model_type or 'gpt')
    if len(found) > 1 and (model_type is None or wanted not in found):
        raise UserError(f"{path} has several checkpoints: give one of {', '.join(map(str, found))}")
    if not found and model_type is None:
        raise UserError(f'there is no checkpoint in {str(path)[:300]}: train one first, or name another')
    return found[0] if len(found) == 1 else wanted


def dataset_of(source, model_type=None):
    """The dataset that the model at source, as load_model finds it, was trained on; '' where it does not say, as GPT-2 does not."""
    if is_hugging_face(source):
        return ''
    return (read_checkpoint(find_checkpoint(source, model_type), mmap=True).get('config') or {}).get('dataset', '')


def load_model(source, device='cpu', model_type=None, dtype=torch.float32):
    """A trained model in eval mode on device, its weights in dtype, and what tokenizes its text ('gpt2' or a list of
    characters). On a CPU in float32 the weights are the file's own pages, mapped into memory and not copied.

    source is a checkpoint, an out_dir (its only checkpoint, or the one of model_type), the directory of a Hugging Face
    GPT-2, or a name such as 'gpt2'.
    """
    if is_hugging_face(source):
        model, tokenizer = from_pretrained(MODELS[model_type or 'gpt'], str(source)), 'gpt2'
        if model.config.vocab_size < 50257:
            raise UserError(f"{source} has a vocabulary of {model.config.vocab_size} tokens, which is not GPT-2's 50257: what "
                            'they mean is not known, so give the checkpoint that it was exported from')
    else:
        path = find_checkpoint(source, model_type)
        checkpoint = read_checkpoint(path, mmap=True)
        check_whole(path)
        model, tokenizer = build_model(checkpoint, path), checkpoint_tokenizer(checkpoint, path)
    return model.to(device, dtype).eval(), tokenizer


def describe(model):
    """One line: class, size and number of parameters."""
    c = model.config
    latent = f', latent {c.n_latent}' if getattr(c, 'n_latent', None) else ''
    ahead = f', {c.k_ahead} tokens ahead by {c.head} heads' if hasattr(c, 'k_ahead') else ''
    return (f'{MODELS[model.model_type].__name__}: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide{latent}{ahead}, '
            f'context {c.block_size}, {model.get_num_params(non_embedding=False) / 1e6:.2f} M parameters')
