"""What the benchmarks share: the models that they measure, of a given shape, and the machine."""

import contextlib
import importlib.util
import platform
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from configurator import UserError, build

import torch

from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from models import MODELS, VARIANTS, label_of
from runtime.device import pick_compile

Dtype = Literal['auto', 'float32', 'bfloat16', 'float16']


def check_models(names):
    """Raise ValueError for a name that is none of VARIANTS."""
    if names and not set(names.split(',')) <= VARIANTS.keys():
        raise ValueError(f'models={names!r} must be some of {", ".join(VARIANTS)}, with commas '
                         'between them')


def describe_machine(device_type):
    is_cuda = device_type == 'cuda'
    return {'device': torch.cuda.get_device_name() if is_cuda else platform.machine(),
            'threads': torch.get_num_threads(), 'torch': torch.__version__}


def conditions(config, dtype, machine):
    return (f'batch of {config.batch_size}, {str(dtype).removeprefix("torch.")}, '
            f'{machine["device"]}, {machine["threads"]} threads, torch {machine["torch"]}')


def check_compiler(wanted, device):
    if note := pick_compile(wanted, device)[1]:
        raise UserError(f'compile=True: {note.split(": it goes")[0]}: leave it out')


def synchronize(device_type):
    """Wait for the GPU, so that the time until now is that of its work."""
    if device_type == 'cuda':
        torch.cuda.synchronize()


def attention_entries():
    """The models of the registry that differ in their attention alone."""
    return [entry for entry in MODELS.values() if not issubclass(entry.model_class, GPT_KAhead)]


def keys_of(entries):
    """A dataclass with the keys of all the entries' models."""
    classes = dict.fromkeys(entry.model_class.config_class for entry in entries)
    bases = sorted(classes, key=lambda cls: len(cls.__mro__), reverse=True)  # subclasses first

    @dataclass
    class ModelKeys(*bases):
        pass
    return ModelKeys


def build_config(model_class, given, **more):
    """The config of a model class, from those of the given keys that it has."""
    known = {f.name for f in fields(model_class.config_class)}
    settings = {key: value for key, value in given.items() if key in known}
    return build(model_class.config_class, settings | more)


def variants(given, names):
    """[(label, model class, config)] of the VARIANTS with these names, or of all and every other
    attention in the registry. given are keys of the models. Raises UserError."""
    for key in ('rotary', 'n_rotary', 'n_kv_head'):
        if key in given:
            raise UserError(f'{key}={given[key]!r} is what the variants differ in: leave it out, '
                            'and choose among them with --models')
    shape, found = build_config(GPT_MLA, given), []
    for name in names.split(',') if names else VARIANTS:
        model_type, _, settings = VARIANTS[name]
        model_class = MODELS[model_type].model_class
        config = build_config(model_class, given, **settings(shape))
        found.append((label_of(model_type, config), model_class, config))
    known = {variant.model_type for variant in VARIANTS.values()}
    for entry in attention_entries():
        if not names and entry.model_class.model_type not in known:
            config = build_config(entry.model_class, given)
            found.append((entry.label, entry.model_class, config))
    return found


def new_nanogpt(folder, config, or_else=''):
    """A model of one of our configs from the nanoGPT checkout in folder, which says how large it
    is. Raises UserError where there is none; or_else is what else could be given."""
    path = Path(folder) / 'model.py'
    if not path.is_file():
        raise UserError(f'against={folder!r}: there is no {path}; give a nanoGPT checkout'
                        f'{or_else}')
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    keys = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
    try:
        spec.loader.exec_module(module)
        with contextlib.redirect_stdout(sys.stderr):
            return module.GPT(module.GPTConfig(**{key: getattr(config, key) for key in keys}))
    except Exception as e:  # it is another program
        raise not_nanogpt(folder, e) from None


def not_nanogpt(folder, e):
    path = Path(folder) / 'model.py'
    return UserError(f"against={folder!r}: {path} is not nanoGPT's ({type(e).__name__}: {e})")
