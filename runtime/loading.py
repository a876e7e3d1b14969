"""
Which model, which tokenizer, which text belongs to it: answered once for the sampler, the
evaluator, the converter, the analyses and the benchmarks.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from configurator import UserError

import torch

from models import MODELS
from runtime.checkpoint import (
    build_model,
    checkpoint_path,
    read_checkpoint,
    run_checkpoints,
    verify_checksums,
)
from runtime.dataset import data_folder, note_on_unknown_ids, open_data, translate
from runtime.record import read_record
from runtime.tokenizer import (
    Tokenizer,
    file_tokenizer,
    is_gpt2_vocabulary,
    make_tokenizer,
)

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
GPT2_DATASETS = ('openwebtext', 'shakespeare')  # nanoGPT's own, with bins of GPT-2's byte pairs
GPT2_SIZES = (50257, 50304)  # of its vocabulary, and as nanoGPT pads it


@dataclass
class Trained:
    """A trained model and what belongs to it."""
    model: torch.nn.Module  # in eval mode
    tokenizer: Tokenizer
    dataset: str  # what it was trained on; '' where it does not say, as GPT-2 does not
    source: str  # where it was found
    settings: dict = field(default_factory=dict)  # those of its training, as far as it says

    @property
    def n_vocab(self):
        """Ids below this mean something. A model's vocab_size may be padded beyond it."""
        return min(self.tokenizer.n_vocab, self.model.config.vocab_size)

    def open_data(self, name='', key='dataset'):
        """The Data of the dataset name, by default of the one that the model was trained on, in the
        ids of the model. key is what the program calls it. Raises UserError where there is none,
        or where its vocabulary is another one."""
        name = name or self.dataset
        if not name:
            raise UserError(f'{self.source} does not name the data of its training: give '
                            f'--{key}=NAME')
        data = translate(open_data(name), self.tokenizer, key)
        if note := note_on_unknown_ids(data, self.tokenizer, self.dataset):
            print(f'note: {note}', file=sys.stderr)
        return data


def load_model(source, device='cpu', model_type=None, dtype=torch.float32):
    """The Trained at source, its weights in dtype on device. On a CPU in float32 the weights are
    the file's own pages, mapped into memory and not copied.

    source is a checkpoint, an out_dir (its only checkpoint, or the one of model_type), the
    directory of a Hugging Face model, or a name such as 'gpt2'. Raises UserError.
    """
    if is_hugging_face(source):
        model = from_pretrained(None, str(source))
        tokenizer, note = hugging_face_tokenizer(source, model.config.vocab_size)
        settings = {}
    else:
        path = find_checkpoint(source, model_type)
        checkpoint = read_checkpoint(path, mmap=True)
        verify_checksums(path)
        model, settings = build_model(checkpoint, path), checkpoint_settings(checkpoint)
        tokenizer, note = checkpoint_tokenizer(checkpoint, path)
    if note:
        print(f'note: {note}', file=sys.stderr)
    for name, p in model.named_parameters():
        if not all(end.isfinite() for end in p.aminmax()):  # which makes no copy
            raise UserError(f'{source} has weights that are not finite, in {name}: give another '
                            'checkpoint')
    dataset = settings.get('dataset')
    return Trained(model.to(device, dtype).eval(), tokenizer,
                   dataset if isinstance(dataset, str) else '',
                   str(source), settings)


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


def checkpoint_settings(checkpoint):
    """The settings of a checkpoint's training, as far as it says."""
    settings = checkpoint.get('config')
    return settings if isinstance(settings, dict) else {}


def checkpoint_tokenizer(checkpoint, path, resumed_on=''):
    """The Tokenizer of the text that a checkpoint was trained on, and a line where it is unknown,
    else ''.

    One of nanoGPT's does not say. Then the record of the dataset that its config names does, if it
    fits the model's vocab_size. Where that has none here, the record of resumed_on, the dataset
    that the run goes on with, does, and nanoGPT's own datasets of these sizes have GPT-2's byte
    pairs. A checkpoint that says that its ids are unknown was trained on bins without a record,
    which may have one by now.
    """
    vocab_size = checkpoint['model_args']['vocab_size']
    dataset = str(checkpoint_settings(checkpoint).get('dataset', ''))
    says = make_tokenizer(checkpoint['tokenizer']) if 'tokenizer' in checkpoint else None
    claim = f'does not say what its {vocab_size:,} ids mean'
    if says and says.spec == 'gpt2' and vocab_size < says.n_vocab:  # older trainers guessed so
        claim = f"says that its ids are GPT-2's, but has only {vocab_size:,} of them"
        says = make_tokenizer({'unknown': vocab_size})
    if says and says.knows_text:
        return says, ''
    recorded = recorded_tokenizer(dataset) or (None if says else recorded_tokenizer(resumed_on))
    if recorded and fits(recorded, vocab_size):
        return recorded, ''
    if not recorded and not says and dataset in GPT2_DATASETS and vocab_size in GPT2_SIZES:
        return make_tokenizer('gpt2'), ''
    found = f'dataset {dataset!r} has no record of them here'
    if recorded:
        found = f'the {recorded.name} of its dataset are not as many'
    return says or make_tokenizer({'unknown': vocab_size}), (
        f'checkpoint {path} {claim}, and {found}: what they mean is unknown')


def recorded_tokenizer(dataset):
    """The Tokenizer that a dataset's record names, None where there is none."""
    tokenizer = read_record(data_folder(dataset))[0] if dataset else None
    return tokenizer if tokenizer and tokenizer.knows_text else None


def fits(tokenizer, vocab_size):
    """Whether a vocab_size is the tokenizer's: its own or, of byte pairs, padded to a multiple of
    up to 128."""
    padding = 0 if isinstance(tokenizer.spec, list) else 127
    return tokenizer.n_vocab <= vocab_size <= tokenizer.n_vocab + padding


def hugging_face_tokenizer(source, vocab_size=None):
    """The Tokenizer of a Hugging Face GPT-2, by name or in a directory, and a line where it is
    unknown, else ''."""
    folder, reason = Path(source), 'it has no tokenizer.json'
    if not folder.is_dir() or is_gpt2_vocabulary(folder / 'vocab.json'):
        return make_tokenizer('gpt2'), ''
    if (folder / 'tokenizer.json').is_file():
        try:
            return file_tokenizer(folder / 'tokenizer.json'), ''
        except UserError as e:
            reason = str(e)
    return make_tokenizer({'unknown': vocab_size}), (
        f'what the ids of {source} mean is unknown: {reason}')


def from_pretrained(model_class, name, **overrides):
    """model_class.from_pretrained, with what is wrong as a UserError. Without a model_class, that
    of the model which is there."""
    try:
        if model_class is None:
            from runtime.hugging_face import model_class_of  # which needs transformers
            model_class = model_class_of(name)
        return model_class.from_pretrained(name, overrides)
    except ImportError:
        raise UserError(f'{name} is read with transformers, which is not installed: pip install -r '
                        'requirements.txt') from None
    except Exception as e:  # a damaged file can raise nearly anything
        reason = ' '.join(str(e).split()).split('. ')[0][:200]
        if reason.startswith(f'{name} has the weights of'):
            raise UserError(reason) from None
        if name in GPT2_NAMES and isinstance(e, OSError):
            remedy = 'the network is needed once'
        else:
            remedy = 'give a directory as of export_huggingface.py, a GPT-2, or a checkpoint'
        raise UserError(f'{name} cannot be loaded ({type(e).__name__}: {reason}): {remedy}'
                        ) from None
