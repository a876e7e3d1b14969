"""python bench.py train: what a training step takes, and which part of it takes how long."""

import json
import multiprocessing
import re
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from configurator import check_least, configure

import numpy as np
import torch

from bench_models import (
    Dtype,
    build_config,
    check_compiler,
    check_models,
    conditions,
    describe_machine,
    keys_of,
    new_nanogpt,
    synchronize,
    variants,
)
from model import GPTConfig
from model_k_ahead import HEADS, GPT_KAhead, KAheadConfig
from model_mla import MLAConfig
from models import MODELS, describe
from runtime.batches import TRAINING, Batches
from runtime.device import autocast, pick_device, pick_dtype
from runtime.muon import add_muon
from runtime.progress import progress_bar

PARTS = 'data', 'forward', 'backward', 'optimizer'


@dataclass
class StepConfig:
    batch_size: int = 1  # sequences of block_size tokens in a step
    steps: int = 3  # that are measured in a round, after a first one
    rounds: int = 1  # times that each model is measured, in turn; the median of all steps counts
    models: str = ''  # some of mha, gqa, mla, mla_decoupled, mha_rotary, gqa_rotary, mla_rotary,
                      # with commas; '': all, and k-ahead
    against: str = ''  # a nanoGPT checkout
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # of ours
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1'
    dtype: Dtype = 'auto'  # of autocast; 'auto': bfloat16 on a GPU
    compile: bool = False  # torch.compile
    seed: int = 1337  # of weights and batches
    json: bool = False  # print JSON in place of the table

    def __post_init__(self):
        check_least(self, batch_size=1, steps=1, rounds=1, seed=0)
        check_models(self.models)


def train(argv):
    """
    Measure a training step: milliseconds, tokens per second, peak memory, what its parts take, and
    the share that it reaches of the fastest matrix product of this machine. Every variant and model
    of models.py is measured, k-ahead with each kind of head, with random weights of a given shape
    (default: GPT-2's 124 M) and random tokens. --against adds nanoGPT's model.

        python bench.py train --batch_size=1
        python bench.py train --n_layer=6 --n_embd=384 --n_head=6 --block_size=256 --steps=10
        python bench.py train --models=mha,mla --rounds=3 --against=../nanoGPT

    It needs no data and no network, and at the default shape about 4 GB of memory. Each model has a
    process of its own, one after the other.
    """
    config, given = configure(argv, StepConfig, keys_of(MODELS.values()))
    contenders = step_contenders(given, config.models)
    device, device_type = pick_device(config.device)
    check_compiler(config.compile, device)
    if config.against:
        plain = build_config(MODELS['gpt'].model_class, given)
        new_nanogpt(config.against, GPTConfig(**asdict(plain) | dict(n_layer=1)))  # or says why not
        contenders.append(('nanoGPT', None, plain))
    measured = {name: [] for name, *_ in contenders}
    turns = progress_bar(contenders * config.rounds)
    for name, model_class, model_config in turns:
        turns.set_description(name)
        # a process's peak never falls again, so each has a new one
        spawn = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            measured[name].append(pool.submit(measure_steps, model_class, model_config,
                                              config).result())
    peak_flops = max(product for rounds in measured.values() for *_, product in rounds)
    rows = [row_of(name, measured[name], config.batch_size * model_config.block_size, peak_flops)
            for name, _, model_config in contenders]
    machine = describe_machine(device_type)
    if config.json:
        settings = asdict(config) | asdict(contenders[0][2]) | machine
        print(json.dumps({'rows': rows, 'product_flops': peak_flops, 'settings': settings},
                         indent=2))
        return
    print('\n'.join(row['description'] for row in rows if row['description']))
    dtype, compiled = pick_dtype(config.dtype, device_type), ', compiled' if config.compile else ''
    print(f'{conditions(config, dtype, machine)}{compiled}, {config.optimizer}; median of '
          f'{config.steps * config.rounds}; fastest matrix product {peak_flops / 1e9:,.0f} '
          'GFLOP/s\n')
    print_step_table(rows)


def row_of(name, rounds, tokens_per_step, peak_flops):
    """The figures of a model from what measure_steps returned in each round."""
    description, flops_per_token, *_ = rounds[0]
    steps = [step for _, _, times, *_ in rounds for step in times]
    seconds = statistics.median(map(sum, steps))
    parts = [statistics.median(part) * 1e3 for part in zip(*steps)]
    return {'model': name, 'description': description, 'ms_per_step': seconds * 1e3,
            **{f'{part}_ms': ms for part, ms in zip(PARTS, parts)},
            'tokens_per_second': tokens_per_step / seconds,
            'share_of_product': flops_per_token * tokens_per_step / seconds / peak_flops,
            'peak_bytes': max(peak for *_, peak, _ in rounds)}


def print_step_table(rows):
    print(f'{"model":<22}{"ms/step":>8}{"time":>6}{"tokens/s":>9}'
          + ''.join(f'{part:>10}' for part in PARTS) + f'{"product":>8}{"peak":>9}{"":>7}')
    first = rows[0]
    for row in rows:
        times = ''.join(f'{row[f"{part}_ms"]:>10,.1f}' for part in PARTS)
        peak, of_first = row['peak_bytes'] / 1e6, row['peak_bytes'] / first['peak_bytes']
        print(f'{row["model"]:<22}{row["ms_per_step"]:>8,.1f}'
              f'{row["ms_per_step"] / first["ms_per_step"]:>5.2f}x'
              f'{row["tokens_per_second"]:>9,.0f}{times}{row["share_of_product"]:>8.0%}'
              f'{peak:>6,.0f} MB{of_first:>6.2f}x')
    print(f'\ntimes x and memory x: against {first["model"]}; parts in ms; product: share of the '
          'fastest one')


def step_contenders(given, names=''):
    """[(name, model class, config)] as variants() has them and, where no names were given, of
    k-ahead with every kind of head."""
    contenders = variants(given, names)
    if names:
        return contenders
    if given.get('attention') != 'mla':  # what only MLA has is then not for the heads
        of_mla = {f.name for f in fields(MLAConfig)} - {f.name for f in fields(GPTConfig)}
        given = {key: value for key, value in given.items() if key not in of_mla}
    contenders.append(('k-ahead', GPT_KAhead, build_config(GPT_KAhead, given)))
    for head in HEADS:
        if head != KAheadConfig.head:
            config = build_config(GPT_KAhead, given, head=head)
            contenders.append((f'k-ahead, {head} heads', GPT_KAhead, config))
    return contenders


def peak_bytes(device_type):
    """The most memory that this process has had: of the GPU, or of the machine."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:  # since the program began; getrusage would count what its parent had, if that was more
        status = Path('/proc/self/status').read_text()
        return int(re.search(r'VmHWM:\s*(\d+) kB', status)[1]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == 'darwin' else 1024)


def fastest_product(device, dtype, size=2048):
    """FLOP/s of a product of square matrices, the best of some."""
    torch.set_float32_matmul_precision('high')
    a, times = torch.randn(size, size, device=device, dtype=dtype), []
    for _ in range(6):
        synchronize(device.type)
        began = time.perf_counter()
        a @ a
        synchronize(device.type)
        times.append(time.perf_counter() - began)
    return 2 * size ** 3 / min(times)


def measure_steps(model_class, model_config, config):
    """Train a model for some steps; without a class it is nanoGPT's. Returns its description, its
    FLOPs per token, for each step the seconds of its PARTS, peak bytes, and fastest_product()."""
    device, device_type = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device_type)
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(config.seed)
    tokens = np.random.default_rng(config.seed).integers(model_config.vocab_size, size=2 ** 20)
    data = SimpleNamespace(train=tokens.astype(np.uint32), sequence=None, folder=Path())
    batches = Batches(data, config.batch_size, model_config.block_size, model_config.vocab_size,
                      config.seed, device)
    before = peak_bytes(device_type)
    is_ours = model_class is not None
    with redirect_stdout(sys.stderr):  # nanoGPT says what it has made
        model = model_class(model_config) if is_ours else new_nanogpt(config.against, model_config)
        model.to(device).train()
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device_type)
    if is_ours and config.optimizer == 'muon':
        optimizer = add_muon(model, optimizer)
    net, steps = torch.compile(model) if config.compile else model, []
    for number in range(config.steps + 1):
        marks = []

        def mark():
            synchronize(device_type)
            marks.append(time.perf_counter())
        mark()
        x, y = batches.draw('train', TRAINING, number)
        mark()
        with autocast(device_type, dtype):
            loss = net(x, y)[1]
        mark()
        loss.backward()
        del loss  # and with it its graph
        mark()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark()
        steps.append([end - start for start, end in zip(marks, marks[1:])])
    peak = peak_bytes(device_type) - before
    if not is_ours:
        with torch.device('meta'):
            model = MODELS['gpt'].model_class(model_config)
    return (describe(model) if is_ours else '', model.flops_per_token(), steps[1:], peak,
            fastest_product(device, dtype))
