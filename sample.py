"""
Sample from a trained model:

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --stream
    python sample.py --init_from=gpt2 --start=FILE:prompt.txt --top_p=0.95 --top_k=50257 --stop="<|endoftext|>"
    echo "To be" | python sample.py --out_dir=out --start=- --json

sample_mla.py and sample_k_ahead.py are this program with another default: which checkpoint it looks for in out_dir.
"""

import codecs
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import GPT2_NAMES, describe, is_hugging_face, load_model
from configurator import UserError, check_least, configure, run
from data.tokenizer import make_tokenizer
from device import pick_device, pick_dtype
from generate import Tally, decode


@dataclass
class SampleConfig:
    init_from: str = 'resume'  # 'resume' (the checkpoint in out_dir), a GPT-2 by name such as 'gpt2-xl', or its directory
    out_dir: str = 'out'  # a folder with a checkpoint, or the checkpoint itself; read if init_from is 'resume'
    start: str = '\n'  # the prompt; FILE:prompt.txt reads it from a file, - from standard input
    num_samples: int = 10  # how many samples to draw
    batch_size: int = 10  # how many of them side by side: more are faster and take more memory
    max_new_tokens: int = 500  # tokens in each sample, after the prompt
    temperature: float = 0.8  # 1 is the model's own distribution, less is less random, 0 takes the likeliest token
    top_k: int = 200  # draw among the top_k likeliest tokens only
    top_p: float = 1.0  # and among the likeliest that together have this probability
    stop: str = ''  # a token, such as <|endoftext|>, that ends a sample and is not printed
    past_context: Literal['slide', 'drop'] = 'slide'  # past block_size: 'slide' as nanoGPT; 'drop' half: fast, other text
    speculative: bool = True  # a k-ahead model guesses with all its heads, False: one token at a time
    stream: bool = False  # print each token as it is drawn, one sample after the other
    json: bool = False  # print a line of JSON for each sample
    seed: int = 1337  # of the random draws; in float32 a sample depends on it and its number alone
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # weights and cache; 'auto': bfloat16 on a GPU
    compile: bool = False  # torch.compile the model

    def __post_init__(self):
        check_least(self, num_samples=1, batch_size=1, max_new_tokens=0, temperature=0, top_k=1, seed=0)
        check_temperature(self.temperature)
        if not 0 < self.top_p <= 1:
            raise ValueError(f'top_p={self.top_p} must be above 0 and at most 1')
        if self.stream and self.json:
            raise ValueError('stream=True and json=True exclude each other: choose one')
        if self.init_from != 'resume' and not is_hugging_face(self.init_from):
            raise ValueError(f"init_from={self.init_from!r} must be 'resume', {', '.join(GPT2_NAMES)} or the directory of a "
                             'Hugging Face GPT-2')


def check_temperature(temperature):
    if 0 < temperature < 1e-3:
        raise ValueError(f'temperature={temperature} must be 0 or at least 0.001')


def read_prompt(key, text):
    """The text that was given for key: itself, what is in a file (FILE:path), or what comes in (-). Raises UserError."""
    try:
        if text == '-':
            text = sys.stdin.buffer.read().decode('utf-8')
        elif text.startswith('FILE:'):
            text = Path(text[5:]).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{key}={text} cannot be read: {e}') from None
    if not text:
        raise UserError(f'{key} is empty: give at least one character, or leave {key} out')
    return text


def encode(tokenizer, key, text):
    try:
        return tokenizer.encode(text)
    except UserError as e:
        raise UserError(f'{key}: {e}') from None


def stop_token(text, tokenizer):
    """The id of the token that text is, None for no text."""
    ids = encode(tokenizer, 'stop', text)
    if len(ids) > 1:
        raise UserError(f'stop={text!r} is {len(ids)} tokens: give a text that is a single one, such as a line break')
    return ids[0] if ids else None


def main(model_type='gpt', **defaults):
    config, _ = configure(sys.argv[1:], SampleConfig, **defaults)
    device, device_type = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device_type)
    torch.set_float32_matmul_precision('high')

    source = config.out_dir if config.init_from == 'resume' else config.init_from
    model, spec = load_model(source, device, model_type, dtype)
    if model_type == 'k_ahead' and model.model_type != model_type:
        raise UserError(f'{source} holds a {type(model).__name__}, which has no heads to guess with: sample.py takes it')
    if config.compile and model.model_type == 'k_ahead':
        raise UserError('compile=True is not for a k-ahead model: leave it out')
    tokenizer = make_tokenizer(spec)
    prompt = encode(tokenizer, 'start', read_prompt('start', config.start))
    stop = stop_token(config.stop, tokenizer)
    n_vocab = min(tokenizer.n_vocab, model.config.vocab_size)
    if max(prompt) >= n_vocab:
        raise UserError(f'the prompt has token id {max(prompt)}, the model knows ids below {n_vocab}: use other words')
    if config.compile:
        model.compile()
    print(describe(model), file=sys.stderr if config.json else sys.stdout)

    tally = Tally()

    def samples(first, count, speculative=config.speculative):
        """Decode samples number first to first + count - 1."""
        seeds = [np.random.default_rng((config.seed, number)).integers(2 ** 63) for number in range(first, first + count)]
        generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
        return decode(model, torch.tensor([prompt] * count, device=device), config.max_new_tokens, n_vocab,
                      config.temperature, config.top_k, config.top_p, stop, config.past_context, generators, speculative, tally)

    batch_size = 1 if config.stream else config.batch_size
    progress = tqdm(total=config.num_samples * config.max_new_tokens, unit=' tokens', leave=False,
                    disable=config.stream or not sys.stderr.isatty())
    n_tokens, n_decoded, in_decode, t0 = 0, 0, 0.0, time.perf_counter()
    for first in range(0, config.num_samples, batch_size):
        count = min(batch_size, config.num_samples - first)
        text = codecs.getincrementaldecoder('utf-8')('replace')  # holds back a character until all its bytes are there

        def show(ids, final=False):
            print(text.decode(tokenizer.to_bytes(ids), final), end='', flush=True)

        if config.stream:
            show(prompt)
        drawn = []  # tensors (count,), one for each step
        steps, started = samples(first, count), time.perf_counter()
        for ids in steps:
            in_decode += time.perf_counter() - started
            drawn.append(ids)
            progress.update(count)
            if config.stream and ids[0] != stop:
                show(ids.tolist())
            started = time.perf_counter()
        n_decoded += count * len(drawn)
        for number, ids in enumerate(torch.stack(drawn, dim=1).tolist() if drawn else [[]] * count, start=first):
            stopped = stop in ids
            ids = ids[:ids.index(stop)] if stopped else ids
            n_tokens += len(ids)
            if config.json:
                print(json.dumps({'sample': number, 'prompt': tokenizer.decode(prompt), 'text': tokenizer.decode(ids),
                                  'tokens': ids, 'stopped': stopped}), flush=True)
            elif config.stream:
                show([], final=True)
                print('\n---------------')
            else:
                print(tokenizer.decode(prompt + ids))
                print('---------------')
    progress.close()
    seconds = time.perf_counter() - t0
    print(f'{n_tokens:,} tokens in {seconds:.1f} s: {n_tokens / seconds:,.0f} tokens/s', file=sys.stderr)
    if config.speculative and tally.gained and getattr(model.config, 'k_ahead', 1) > 1:
        per_pass, count, t0 = tally.tokens_per_pass, min(batch_size, config.num_samples), time.perf_counter()
        slow = count * sum(1 for _ in samples(0, count, speculative=False)) / (time.perf_counter() - t0)
        print(f'{per_pass:.2f} tokens per pass, {per_pass - 1:.2f} of them accepted guesses; one token at a time: {slow:,.0f} '
              f'tokens/s, so {n_decoded / in_decode / slow:.2f} times as fast', file=sys.stderr)


if __name__ == '__main__':
    run(main)
