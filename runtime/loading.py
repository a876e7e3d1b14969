"""
Which model, which tokenizer, which text belongs to it: answered once for the sampler, the
evaluator, the converter, the analyses and the benchmarks.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError

import torch

from model import GPT
from models import MODELS
from runtime.checkpoint import (
    build_model,
    checkpoint_path,
    read_checkpoint,
    run_checkpoints,
    verify_checksums,
)
from runtime.dataset import data_folder, open_data
from runtime.tokenizer import Tokenizer, dataset_tokenizer, make_tokenizer

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')


@dataclass
class Trained:
    """A trained model and what belongs to it."""
    model: torch.nn.Module  # in eval mode
    tokenizer: Tokenizer
    dataset: str  # what it was trained on; '' where it does not say, as GPT-2 does not
    source: str  # where it was found

    @property
    def n_vocab(self):
        """Ids below this mean something. A model's vocab_size may be padded beyond it."""
        return min(self.tokenizer.n_vocab, self.model.config.vocab_size)

    def open_data(self, name='', key='dataset'):
        """The Data of the dataset name, by default of the one that the model was trained on. key
        is what the program calls it. Raises UserError where there is none, or where its vocabulary
        is not the model's."""
        name = name or self.dataset
        if not name:
            raise UserError(f'{self.source} does not name the data of its training: give '
                            f'--{key}=NAME')
        data = open_data(name)
        if data.tokenizer != self.tokenizer:
            raise UserError(f'{key}={name} has another vocabulary than the model: use data that '
                            'was prepared for it')
        return data


def load_model(source, device='cpu', model_type=None, dtype=torch.float32):
    """The Trained at source, its weights in dtype on device. On a CPU in float32 the weights are
    the file's own pages, mapped into memory and not copied.

    source is a checkpoint, an out_dir (its only checkpoint, or the one of model_type), the
    directory of a Hugging Face GPT-2, or a name such as 'gpt2'. Raises UserError.
    """
    if is_hugging_face(source):
        model = from_pretrained(MODELS[model_type or 'gpt'].model_class, str(source))
        tokenizer, dataset = make_tokenizer('gpt2'), ''
        if model.config.vocab_size < tokenizer.n_vocab:
            raise UserError(f'{source} has a vocabulary of {model.config.vocab_size} tokens, which '
                            f"is not GPT-2's {tokenizer.n_vocab}: what they mean is not known, so "
                            'give the checkpoint that it was exported from')
    else:
        path = find_checkpoint(source, model_type)
        checkpoint = read_checkpoint(path, mmap=True)
        verify_checksums(path)
        model, tokenizer = build_model(checkpoint, path), checkpoint_tokenizer(checkpoint, path)
        dataset = checkpoint_dataset(checkpoint)
    return Trained(model.to(device, dtype).eval(), tokenizer, dataset, str(source))


def is_hugging_face(source):
    """Whether source is a GPT-2 by name or the directory of a Hugging Face model, and not a
    checkpoint or an out_dir."""
    # os.path takes what can be no path for one that does not exist
    is_name = str(source) in GPT2_NAMES and not os.path.exists(source)
    return is_name or os.path.isfile(Path(source) / 'config.json')


def find_checkpoint(source, model_type=None):
    """The path of a checkpoint: source itself, or in the out_dir source its only one, or the one
    of model_type. Raises UserError."""
    path = Path(source)
    if not os.path.isdir(path) and (os.path.exists(path) or path.suffix == '.pt'):
        return path
    found = [p for name in MODELS for p in run_checkpoints(path, name)[:1]]
    wanted = checkpoint_path(path, model_type or 'gpt')
    if len(found) > 1 and (model_type is None or wanted not in found):
        raise UserError(f"{path} has several checkpoints: give one of {', '.join(map(str, found))}")
    if not found and model_type is None:
        raise UserError(f'there is no checkpoint in {str(path)[:300]}: train one first, or name '
                        'another')
    return found[0] if len(found) == 1 else wanted


def checkpoint_dataset(checkpoint):
    """The dataset that a checkpoint's model was trained on; '' where it does not say."""
    return (checkpoint.get('config') or {}).get('dataset', '')


def checkpoint_tokenizer(checkpoint, path, dataset=None):
    """The Tokenizer of the text that a checkpoint was trained on. One of nanoGPT's does not say.
    Then the meta.pkl of dataset (default: the one that its config names) does, and its number of
    characters must be the model's vocab_size. Raises UserError."""
    if 'tokenizer' in checkpoint:
        return make_tokenizer(checkpoint['tokenizer'])
    dataset = dataset or checkpoint_dataset(checkpoint)
    tokenizer = dataset_tokenizer(data_folder(dataset))
    vocab_size = checkpoint['model_args']['vocab_size']
    is_gpt2 = tokenizer.spec == 'gpt2'
    if vocab_size < tokenizer.n_vocab if is_gpt2 else vocab_size != tokenizer.n_vocab:
        raise UserError(f'checkpoint {path} carries no tokenizer, and dataset {dataset!r} has no '
                        f'meta.pkl for a vocabulary of {vocab_size}: prepare the data that it was '
                        'trained on')
    return tokenizer


def from_pretrained(model_class, name, **overrides):
    """model_class.from_pretrained, with what is wrong as a UserError."""
    try:
        return model_class.from_pretrained(name, overrides)
    except ImportError:
        raise UserError(f'{name} is read with transformers, which is not installed: pip install -r '
                        'requirements.txt') from None
    except Exception as e:  # a damaged file can raise nearly anything
        reason = ' '.join(str(e).split()).split('. ')[0][:200]
        if model_class is not GPT:
            raise UserError(reason) from None
        if name in GPT2_NAMES and isinstance(e, OSError):
            remedy = 'the network is needed once'
        else:
            remedy = 'give the directory of a GPT-2, or a checkpoint'
        raise UserError(f'{name} cannot be loaded ({type(e).__name__}: {reason}): {remedy}'
                        ) from None
