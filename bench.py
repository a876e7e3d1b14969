"""
Speed and memory, measured with random weights of a given shape (default: GPT-2's 124 M), several models in one run:

    python bench.py decode                                                        MHA and MLA
    python bench.py decode --contexts=1 --against=../nanoGPT,transformers         and a nanoGPT checkout, and transformers
    python bench.py decode --dtype=bfloat16 --batch_size=8 --json
"""

import contextlib
import importlib.util
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from checkpoint import describe
from configurator import UserError, build, configure, run
from device import pick_device, pick_dtype
from export_huggingface import to_hugging_face
from generate import generate
from model import GPT
from model_mla import GPT_MLA, MLAConfig

TEMPERATURE, TOP_K = 0.8, 200  # the sampler's defaults, for all


@dataclass
class DecodeConfig:
    contexts: str = '1,500,1000'  # lengths of the prompts, in tokens
    new_tokens: int = 64  # to decode after each prompt, fewer where block_size leaves less room
    batch_size: int = 1  # sequences side by side
    rounds: int = 3  # times that each model is measured, in turn; the median counts
    against: str = ''  # a nanoGPT checkout, 'transformers', or both with a comma between them
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # weights and cache; 'auto': bfloat16 on a GPU
    seed: int = 1337  # of weights and prompts
    json: bool = False  # print JSON in place of the table

    def __post_init__(self):
        for key, least in dict(new_tokens=2, batch_size=1, rounds=1, seed=0).items():
            if getattr(self, key) < least:
                raise ValueError(f'{key}={getattr(self, key)} must be at least {least}')


@dataclass
class Contender:
    name: str
    model: torch.nn.Module  # each pass of which gives one token
    generate: object  # (idx, new_tokens) -> None
    cache_bytes: object  # tokens -> bytes, None where it is not known


def read_contexts(text, block_size):
    try:
        contexts = [int(part) for part in text.split(',')]
    except ValueError:
        contexts = [0]
    if not all(1 <= n <= block_size - 2 for n in contexts):
        raise UserError(f'contexts={text!r} must be lengths between 1 and block_size - 2 = {block_size - 2}, with commas '
                        'between them')
    return contexts


def our_contender(name, model, config):
    def cache_bytes(length):
        return sum(layer.nbytes for layer in model.new_cache(config.batch_size, length))

    def decode(idx, n):
        generate(model, idx, n, model.config.vocab_size, temperature=TEMPERATURE, top_k=TOP_K)
    return Contender(name, model, decode, cache_bytes)


def nanogpt_contender(folder, gpt):
    """The model of the nanoGPT checkout in folder, with the weights of gpt."""
    path = Path(folder) / 'model.py'
    if not path.is_file():
        raise UserError(f"against={folder!r}: there is no {path}; give a nanoGPT checkout, or 'transformers'")
    spec = importlib.util.spec_from_file_location('nanogpt_model', path)
    module = sys.modules['nanogpt_model'] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        keys = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
        with contextlib.redirect_stdout(sys.stderr):
            model = module.GPT(module.GPTConfig(**{key: getattr(gpt.config, key) for key in keys}))
        model.load_state_dict(gpt.state_dict())
    except Exception as e:  # it is another program
        raise UserError(f'against={folder!r}: {path} is not nanoGPT\'s ({type(e).__name__}: {e})') from None
    model = model.to(gpt.lm_head.weight.device, gpt.lm_head.weight.dtype).eval()
    return Contender('nanoGPT', model, lambda idx, n: model.generate(idx, n, TEMPERATURE, TOP_K), None)


def transformers_contender(gpt):
    model = to_hugging_face(gpt).to(gpt.lm_head.weight.device, gpt.lm_head.weight.dtype)
    model.generation_config.eos_token_id = None  # which would end a text

    def decode(idx, n):
        model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=True, temperature=TEMPERATURE,
                       top_k=TOP_K, use_cache=True, pad_token_id=0)
    return Contender('transformers', model, decode, None)


def time_decoding(contender, idx, n):
    """Seconds until the first token, and tokens per second after it, of all sequences together. Each pass of the model is
    noted as it ends, so that the same is measured whoever calls it."""
    times = []

    def note(*_):
        if idx.device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    handle = contender.model.register_forward_hook(note)
    note()
    contender.generate(idx, n)
    handle.remove()
    return times[1] - times[0], len(idx) * (len(times) - 2) / (times[-1] - times[1])


def decode(argv):
    config, model_args = configure(argv, DecodeConfig, MLAConfig)
    shape = build(MLAConfig, model_args)
    contexts = read_contexts(config.contexts, shape.block_size)
    device, device_type = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device_type)
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(config.seed)
    gpt_args = {key: value for key, value in asdict(shape).items() if key != 'n_latent'}
    gpt, mla = (cls(cls.config_class(**args)).to(device, dtype).eval()
                for cls, args in ((GPT, gpt_args), (GPT_MLA, asdict(shape))))
    contenders = [our_contender('MHA', gpt, config), our_contender('MLA', mla, config)]
    for name in filter(None, config.against.split(',')):
        contenders.append(transformers_contender(gpt) if name == 'transformers' else nanogpt_contender(name, gpt))

    jobs = []
    for context in contexts:
        idx = torch.randint(min(50257, shape.vocab_size), (config.batch_size, context), device=device)
        jobs += [(contender, idx, min(config.new_tokens, shape.block_size - context)) for contender in contenders]
    for contender in contenders:
        contender.generate(idx[:, :1], 2)  # the first call of anything is slow
    measured = [[] for _ in jobs]
    with tqdm(total=config.rounds * len(jobs), leave=False, disable=not sys.stderr.isatty()) as progress:
        for _ in range(config.rounds):
            for (contender, idx, n), results in zip(jobs, measured):
                progress.set_description(f'{contender.name} at {idx.size(1)}')
                results.append(time_decoding(contender, idx, n))
                progress.update()

    rows = []
    for (contender, idx, n), results in zip(jobs, measured):
        first, rate = (statistics.median(column) for column in zip(*results))
        rows.append({'context': idx.size(1), 'new_tokens': n, 'model': contender.name, 'first_token_seconds': first,
                     'tokens_per_second': rate,
                     'cache_bytes': contender.cache_bytes and contender.cache_bytes(idx.size(1) + n)})
    machine = {'device': torch.cuda.get_device_name() if device_type == 'cuda' else platform.machine(),
               'threads': torch.get_num_threads(), 'torch': torch.__version__}
    if config.json:
        print(json.dumps({'rows': rows, 'settings': asdict(config) | asdict(shape) | machine}, indent=2))
        return
    print(f'{describe(gpt)}\n{describe(mla)}\nbatch of {config.batch_size}, {str(dtype).removeprefix("torch.")}, '
          f'{machine["device"]}, {machine["threads"]} threads, torch {machine["torch"]}; median of {config.rounds}\n')
    print(f'{"context":>8}{"new":>6}  {"model":<14}{"first token":>12}{"tokens/s":>10}{"against MHA":>13}{"cache":>12}')
    for row in rows:
        mha = next(r for r in rows if r['context'] == row['context'])
        cache = '' if row['cache_bytes'] is None else f"{row['cache_bytes'] / 1e6:.2f} MB"
        print(f"{row['context']:>8}{row['new_tokens']:>6}  {row['model']:<14}{row['first_token_seconds'] * 1e3:>9.0f} ms"
              f"{row['tokens_per_second']:>10.1f}{row['tokens_per_second'] / mha['tokens_per_second']:>12.2f}x{cache:>12}")


COMMANDS = {'decode': decode}


def main():
    command, *argv = sys.argv[1:] or ['']
    if command in ('-h', '--help'):
        print(__doc__.strip())
    elif command not in COMMANDS:
        raise UserError(f"what to measure is {command!r}, it must be {' or '.join(COMMANDS)}: python bench.py decode --key=value")
    else:
        COMMANDS[command](argv)


if __name__ == '__main__':
    run(main)
