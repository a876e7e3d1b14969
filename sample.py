"""
Sample from a trained model:

    python sample.py out-shakespeare-char --start="ROMEO:" --stream
    python sample.py gpt2 --start=FILE:prompt.txt --top_p=0.95 --top_k=50257 --stop="<|endoftext|>"
    echo "To be" | python sample.py out/ckpt.pt --start=- --json

It needs a checkpoint, or GPT-2's weights, which transformers downloads. It takes every model of
this project. sample_mla.py and sample_k_ahead.py are this program with another default: which
checkpoint they look for, and where.
"""

import codecs
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_least, configure, run

import numpy as np
import torch

from generate import CompiledStep, DecodeStats, decode
from models import describe
from runtime.checkpoint import latest_path, read_checkpoint
from runtime.cpu_linear import use_cpu_linear
from runtime.device import pick_compile, pick_device, pick_dtype
from runtime.loading import GPT2_NAMES, find_checkpoint, is_hugging_face, load_model
from runtime.progress import progress_bar


@dataclass
class SampleConfig:
    model: str = ''  # a checkpoint, an out_dir, the directory of a Hugging Face GPT-2, or a name
                     # such as gpt2; '': what init_from and out_dir say
    init_from: str = 'resume'  # older name of model; 'resume' is the checkpoint in out_dir
    out_dir: str = 'out'  # older name of model, for a folder with a checkpoint or the checkpoint
    start: str = '\n'  # the prompt, in which \n is a line break; FILE:prompt.txt reads it from a
                       # file, - from standard input. Where the vocabulary has no line break, its
                       # first token takes its place
    num_samples: int = 10  # how many samples to draw
    batch_size: int = 10  # how many of them side by side: more are faster and take more memory
    max_new_tokens: int = 500  # tokens in each sample, after the prompt
    temperature: float = 0.8  # 1 is the model's own distribution, less is less random, 0 takes the
                              # likeliest token
    top_k: int = 200  # draw among the top_k likeliest tokens only
    top_p: float = 1.0  # and among the likeliest that together have this probability
    stop: str = ''  # a token, such as <|endoftext|> or \n, that ends a sample and is not printed
    past_context: Literal['slide', 'drop'] = 'slide'  # past block_size: 'slide' as nanoGPT;
                                                      # 'drop' half: fast, other text
    speculative: bool = True  # a k-ahead model drafts with its heads; False: one token at a time
    stream: bool = False  # print each token as it is drawn, one sample after the other
    json: bool = False  # print a line of JSON for each sample
    seed: int = 1337  # of the random draws; in float32 a sample depends on it and its number alone
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # of weights and cache;
                                                                       # 'auto': bfloat16 on a GPU
    compile: bool = False  # torch.compile a step, which takes seconds and pays in long runs of a
                           # small model

    def __post_init__(self):
        check_least(self, num_samples=1, batch_size=1, max_new_tokens=0, temperature=0, top_k=1,
                    seed=0)
        check_temperature(self.temperature)
        if not 0 < self.top_p <= 1:
            raise ValueError(f'top_p={self.top_p} must be above 0 and at most 1')
        if self.stream and self.json:
            raise ValueError('stream=True and json=True exclude each other: choose one')
        if self.init_from != 'resume' and not is_hugging_face(self.init_from):
            raise ValueError(f"init_from={self.init_from!r} must be 'resume', "
                             f"{', '.join(GPT2_NAMES)} or the directory of a Hugging Face GPT-2")

    @property
    def source(self):
        """Where the model is."""
        return self.model or (self.out_dir if self.init_from == 'resume' else self.init_from)


def check_temperature(temperature):
    if 0 < temperature < 1e-3:
        raise ValueError(f'temperature={temperature} must be 0 or at least 0.001')


def read_prompt(key, text, escapes=False):
    r"""The text that was given for key: itself, the contents of a file (FILE:path), or standard
    input (-). With escapes, \n in the text itself is a line break. Raises UserError."""
    try:
        if text == '-':
            text = sys.stdin.buffer.read().decode('utf-8')
        elif text.startswith('FILE:'):
            text = Path(text[5:]).expanduser().read_text(encoding='utf-8')
        elif escapes:
            text = with_line_breaks(text)
    except (OSError, RuntimeError, UnicodeError) as e:
        raise UserError(f'{key}={text} cannot be read: {e}') from None
    if not text:
        raise UserError(f'{key} is empty: give at least one character, or leave {key} out')
    return text


def with_line_breaks(text):
    r"""text with a line break for each \n, since a line break is hard to type in a shell."""
    return text.replace(r'\n', '\n')


def encode(tokenizer, key, text):
    """The ids of the text that was given for key. Raises UserError, which begins with key."""
    try:
        return tokenizer.encode(text)
    except UserError as e:
        raise UserError(f'{key}: {e}') from None


def stop_token(text, tokenizer):
    """The id of the token that text is, None for no text. Raises UserError."""
    ids = encode(tokenizer, 'stop', text)
    if len(ids) > 1:
        raise UserError(f'stop={text!r} is {len(ids)} tokens: give a text that is a single one, '
                        'such as a line break')
    return ids[0] if ids else None


def load_trained(config, model_type, device, dtype):
    """The Trained that config asks for, ready to decode. Raises UserError."""
    trained = load_model(config.source, device, model_type, dtype)
    model = trained.model
    if model_type == 'k_ahead' and model.model_type != model_type:
        raise UserError(f'{config.source} holds a {type(model).__name__}, which has no heads to '
                        'guess with: sample.py takes it')
    if config.compile and model.model_type == 'k_ahead':
        raise UserError('compile=True is not for a k-ahead model: leave it out')
    if device.type == 'cpu':
        use_cpu_linear(model)
    if newer := newer_state(trained.source, model_type):
        print(f'note: {newer}', file=sys.stderr)
    return trained


def newer_state(source, model_type):
    """A line on a state of the run that is newer than the checkpoint at source, '' if there is
    none. The trainer leaves one where the checkpoint has a better val loss."""
    if is_hugging_face(source):
        return ''
    path = find_checkpoint(source, model_type)
    latest = latest_path(path)
    if path.suffix != '.pt' or not latest.exists():
        return ''
    try:
        here, there = (read_checkpoint(p, mmap=True).get('iter_num') for p in (path, latest))
    except UserError:  # it is damaged, and not asked for
        return ''
    if not type(here) is type(there) is int or there <= here:
        return ''
    return f'{path} is of iteration {here}; {latest} is newer, of iteration {there}'


def read_ids(config, trained):
    """The ids of the prompt, and the id of the stop token or None. Raises UserError."""
    tokenizer = trained.tokenizer
    text = read_prompt('start', config.start, escapes=True)
    prompt = tokenizer.start() if text == '\n' else encode(tokenizer, 'start', text)
    if text == '\n' and tokenizer.decode(prompt) != '\n':
        print(f'note: the vocabulary has no line break: samples start with '
              f'{tokenizer.decode(prompt)!r}', file=sys.stderr)
    if not prompt:
        raise UserError(f'start={text!r} has no token: give some text')
    stop = stop_token(with_line_breaks(config.stop), tokenizer)
    if max(prompt) >= trained.n_vocab:
        raise UserError(f'the prompt has token id {max(prompt)}, the model knows ids below '
                        f'{trained.n_vocab}: use other words')
    return prompt, stop


def draw_samples(config, trained, prompt, stop, numbers, stats, step):
    """Yield the next token of each of the samples of these numbers, as decode does: tensors
    (count,). Each sample has a generator of its own, so what it draws does not depend on the
    batch that it is in."""
    device = next(trained.model.parameters()).device
    generators = []
    for number in numbers:
        seed = np.random.default_rng((config.seed, number)).integers(2 ** 63)
        generators.append(torch.Generator(device).manual_seed(int(seed)))
    idx = torch.tensor([prompt] * len(numbers), device=device)
    return decode(trained.model, idx, config.max_new_tokens, trained.n_vocab,
                  temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                  stop=stop, past_context=config.past_context, generators=generators,
                  speculative=config.speculative, stats=stats, step=step)


def show_while_drawn(steps, tokenizer, prompt, stop):
    """Yield the steps of one sample, and print the prompt and each token as it is drawn."""
    # A token may hold part of a character, which waits here for its other bytes.
    text = codecs.getincrementaldecoder('utf-8')('replace')

    def show(ids, final=False):
        print(text.decode(tokenizer.to_bytes(ids), final), end='', flush=True)

    show(prompt)
    for ids in steps:
        if ids[0] != stop:
            show(ids.tolist())
        yield ids
    show([], final=True)
    print('\n---------------')


def print_sample(config, tokenizer, number, prompt, ids, stopped):
    """Print a complete sample, as a line of JSON or as text, unless it has been streamed."""
    if config.json:
        row = {'sample': number, 'prompt': tokenizer.decode(prompt),
               'text': tokenizer.decode(ids), 'tokens': ids, 'stopped': stopped}
        print(json.dumps(row), flush=True)
    elif not config.stream:
        print(tokenizer.decode(prompt + ids))
        print('---------------')


def sample(config, trained, prompt, stop, stats, step):
    """Draw and print all samples. Returns the number of their tokens, without stop tokens."""
    batch_size = 1 if config.stream else config.batch_size
    n_tokens = 0
    progress = progress_bar(total=config.num_samples * config.max_new_tokens, unit=' tokens',
                            disable=config.stream)
    for first in range(0, config.num_samples, batch_size):
        numbers = range(first, min(first + batch_size, config.num_samples))
        steps = draw_samples(config, trained, prompt, stop, numbers, stats, step)
        if config.stream:
            steps = show_while_drawn(steps, trained.tokenizer, prompt, stop)
        drawn = []  # tensors (count,), one for each step
        for ids in steps:
            drawn.append(ids)
            progress.update(len(numbers))
        rows = torch.stack(drawn, dim=1).tolist() if drawn else [[]] * len(numbers)
        for number, ids in zip(numbers, rows):
            stopped = stop in ids
            ids = ids[:ids.index(stop)] if stopped else ids
            n_tokens += len(ids)
            print_sample(config, trained.tokenizer, number, prompt, ids, stopped)
    progress.close()
    return n_tokens


def main(model_type='gpt', **defaults):
    """The program. model_type says which checkpoint of an out_dir with several is meant. defaults
    take the place of SampleConfig's."""
    config, _ = configure(sys.argv[1:], SampleConfig, positional=('model',), **defaults)
    device, device_type = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device_type)
    torch.set_float32_matmul_precision('high')

    trained = load_trained(config, model_type, device, dtype)
    prompt, stop = read_ids(config, trained)
    compiles, note = pick_compile(config.compile, device)
    step = CompiledStep(trained.model) if compiles else None
    if note:
        print(f'note: {note}', file=sys.stderr)
    print(describe(trained.model), file=sys.stderr if config.json else sys.stdout)

    stats, started = DecodeStats(), time.perf_counter()
    n_tokens = sample(config, trained, prompt, stop, stats, step)
    seconds = time.perf_counter() - started
    print(f'{n_tokens:,} tokens in {seconds:.1f} s: {n_tokens / seconds:,.0f} tokens/s',
          file=sys.stderr)
    if config.speculative and trained.model.n_predictions > 1 and stats.tokens_per_pass:
        print(f'{stats.tokens_per_pass:.2f} tokens per pass, {stats.tokens_per_pass - 1:.2f} of '
              'them accepted drafts', file=sys.stderr)


if __name__ == '__main__':
    run(main)
