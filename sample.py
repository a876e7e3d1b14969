"""
Sample from a trained model:

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt

sample_mla.py is this program with another default: which checkpoint it looks for in out_dir.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint import describe, load_model
from configurator import UserError, configure, run
from data.tokenizer import make_tokenizer
from device import autocast, pick_device, pick_dtype
from generate import generate


@dataclass
class SampleConfig:
    init_from: str = 'resume'  # 'resume' (the checkpoint in out_dir) or a GPT-2 by name, such as 'gpt2-xl'
    out_dir: str = 'out'  # a folder with a checkpoint, or the checkpoint itself; not read if init_from is a GPT-2
    start: str = '\n'  # the prompt, or FILE:prompt.txt to read it from a file
    num_samples: int = 10  # how many samples to draw
    max_new_tokens: int = 500  # tokens in each sample, after the prompt
    temperature: float = 0.8  # 1 is the model's own distribution, less is less random, 0 takes the likeliest token
    top_k: int = 200  # draw among the top_k likeliest tokens only
    seed: int = 1337  # of the random draws
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # 'auto': bfloat16 on a GPU that has it
    compile: bool = False  # torch.compile the model

    def __post_init__(self):
        for key, least in dict(num_samples=1, max_new_tokens=0, temperature=0, top_k=1, seed=0).items():
            if getattr(self, key) < least:
                raise ValueError(f'{key}={getattr(self, key)} must be at least {least}')
        if 0 < self.temperature < 1e-3:
            raise ValueError(f'temperature={self.temperature} must be 0 or at least 0.001')
        if self.init_from != 'resume' and not self.init_from.startswith('gpt2'):
            raise ValueError(f"init_from={self.init_from!r} must be 'resume' or a GPT-2 by name, such as 'gpt2'")


def read_prompt(start):
    if start.startswith('FILE:'):
        try:
            start = Path(start[5:]).read_text(encoding='utf-8')
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'start={start} cannot be read: {e}') from None
    if not start:
        raise UserError("start is empty: give at least one character, or leave start out for a line break")
    return start


def main(model_type='gpt', **defaults):
    config, _ = configure(sys.argv[1:], SampleConfig, **defaults)
    device, device_type = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device_type)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision('high')

    model, spec = load_model(config.out_dir if config.init_from == 'resume' else config.init_from, device, model_type)
    tokenizer = make_tokenizer(spec)
    idx = torch.tensor([tokenizer.encode(read_prompt(config.start))], device=device)  # (1, T)
    n_vocab = min(tokenizer.n_vocab, model.config.vocab_size)
    if idx.max() >= n_vocab:
        raise UserError(f'the prompt has token id {idx.max()}, the model knows ids below {n_vocab}: use other words')
    if config.compile:
        model.compile()
    print(describe(model))
    with autocast(device_type, dtype):
        for _ in range(config.num_samples):
            y = generate(model, idx, config.max_new_tokens, n_vocab, config.temperature, config.top_k)
            print(tokenizer.decode(y[0].tolist()))
            print('---------------')


if __name__ == '__main__':
    run(main)
