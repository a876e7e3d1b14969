"""
The comparison: train the same GPT-2 with multi-head attention (MHA) and with multi-latent attention
(MLA) on the same Shakespeare, in the same order, and show side by side what changed.

    python test_shakespeare_quick.py                    about three minutes on a laptop's CPU
    python test_shakespeare_quick.py --max_iters=200    every key of the trainer can be given
    python test_shakespeare_quick.py --models=mha,gqa,mla,mla_decoupled --out_dir=out_family

On a GPU the models are larger than what --help says (ON_GPU below).
It needs the data: python data/shakespeare_char/prepare.py first. Despite its name this is a program
and no test. It writes results.json, comparison.png, samples.txt and the checkpoints to out_dir. GQA
and the kinds of MLA have caches of one size where that can be: the table says what they have.
"""

import json
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import textwrap
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from configurator import UserError, build, configure, run

import torch

from evaluate import split_loss
from generate import generate
from model_mla import MLAConfig
from models import MODELS, VARIANTS, cached_numbers, label_of
from runtime.checkpoint import checkpoint_path, read_checkpoint
from runtime.cpu_linear import use_cpu_linear
from runtime.dataset import open_data
from runtime.device import autocast, pick_device, pick_dtype
from runtime.figures import Figure
from runtime.progress import progress_bar
from runtime.run_folder import StopSignal, newest_metrics
from runtime.run_log import plot_losses
from runtime.workers import default_workers, worker_pool
from train import TrainConfig, launch

SAME = dict(out_dir='out_shakespeare_quick', dataset='shakespeare_char',
            gradient_accumulation_steps=1, eval_interval=200, log_interval=50, learning_rate=1e-3,
            min_lr=1e-4, beta2=0.99, warmup_iters=100, max_iters=2000, bias=False)
# In so few iterations nothing overfits and every step counts. Against the trainer's defaults (beta1
# 0.9, weight_decay 0.1, grad_clip 1) the last three lower the val loss by 1.9 % for MHA and 1.5 %
# for MLA.
ON_CPU = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0,
              eval_iters=40, beta1=0.8, weight_decay=0.0, grad_clip=0.0, dtype='float32')
ON_GPU = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2,
              eval_iters=40)
SAMPLE_TOKENS = 300


@dataclass
class QuickConfig(TrainConfig):
    models: str = 'mha,mla'  # two or more, with commas: mha, gqa, mla, mla_decoupled, mha_rotary,
                             # gqa_rotary, mla_rotary

    def __post_init__(self):
        super().__post_init__()
        names = self.models.split(',')
        if not set(names) <= VARIANTS.keys() or len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f'models={self.models!r} must be two or more of '
                             f"{', '.join(VARIANTS)}, with commas between them, each once")


def measure(result, data, config):
    """The figures of one trained model, as results.json has them."""
    model, device, tokenizer = result.model.eval(), result.device, result.tokenizer
    dtype = pick_dtype(config.dtype, device.type)
    attentions = [block.attn for block in model.transformer.h]
    n_params = sum(p.numel() for attention in attentions for p in attention.parameters())
    use_cpu_linear(model)  # it decodes now
    torch.manual_seed(config.seed)
    prompt = torch.tensor([tokenizer.start()], device=device)
    with autocast(device.type, dtype):
        ids = generate(model, prompt, SAMPLE_TOKENS, tokenizer.n_vocab, temperature=0.8, top_k=200)
    return {
        'label': label_of(model.model_type, model.config),
        'params': model.get_num_params(non_embedding=False),
        'attention_params': n_params,
        'train_loss': result.history[-1]['train_loss'],
        'val_loss': split_loss(model, data.val, dtype, sequence=data.sequence),
        'ms_per_iter': result.ms_per_iter,
        'tokens_per_second': result.tokens_per_second,
        'cache_bytes_per_token': cached_numbers(model) * dtype.itemsize,
        'sample': tokenizer.decode(ids[0, prompt.size(1):].tolist()),
    }


def print_table(results):
    first, *others = results.values()
    rows = [('parameters', 'params', '{:,}'), ('in attention', 'attention_params', '{:,}'),
            ('train loss, nats', 'train_loss', '{:.4f}'),
            ('val loss, nats', 'val_loss', '{:.4f}'),
            ('ms per iteration', 'ms_per_iter', '{:.1f}'),
            ('tokens per second', 'tokens_per_second', '{:,.0f}'),
            ('cache bytes per token', 'cache_bytes_per_token', '{:,}')]
    labels = [result['label'] for result in results.values()]
    ratios = [f'{label} / {labels[0]}' for label in labels[1:]] if len(labels) == 2 else []
    print('\n' + ' ' * 22 + ''.join(f'{name:>15}' for name in labels + ratios))
    for title, key, form in rows:
        cells = [form.format(result[key]) for result in results.values()]
        cells += [f'{other[key] / first[key]:.3f}' for other in others if ratios]
        print(f'{title:<22}' + ''.join(f'{cell:>15}' for cell in cells))
    if not ratios:
        changes = [f'{other["val_loss"] / first["val_loss"] - 1:+.1%}' for other in others]
        print(f'{"val loss against " + labels[0]:<22}{"":>15}'
              + ''.join(f'{change:>15}' for change in changes))


def samples_text(results):
    texts = []
    for result in results.values():
        sample = textwrap.indent(result['sample'].strip(), '    ')
        texts.append(f'{result["label"]}, {SAMPLE_TOKENS} tokens at temperature 0.8\n{sample}\n')
    return '\n'.join(texts)


def draw_comparison(histories, results, settings, path):
    figure = Figure(figsize=(8, 5), layout='constrained')
    ax = figure.subplots()
    first = next(iter(results.values()))
    losses = {name: f'{result["label"]} {result["val_loss"]:.4f}' + (
        f' ({result["val_loss"] / first["val_loss"] - 1:+.1%})' if result is not first else '')
        for name, result in results.items()}
    for name, history in histories.items():
        if len(histories) == 2:
            plot_losses(ax, history, results[name]['label'], VARIANTS[name].colour)
        else:  # more curves than these could not be read
            points = [(row['iter'], row['val_loss']) for row in history if 'val_loss' in row]
            ax.plot(*zip(*points), '.-' if name in ('mha', 'gqa', 'mla') else '.--',
                    color=VARIANTS[name].colour, label=losses[name])
    rows = [row for history in histories.values() for row in history]
    lowest = min(row['val_loss'] for row in rows if 'val_loss' in row)
    # the start is the same for all and would flatten the rest
    ax.set_ylim(top=min(ax.get_ylim()[1], lowest + 1.2))
    ax.set_xlim(left=0)
    title = (f"on {Path(settings['dataset']).name}, same data in the same order\n"
             f"{settings['n_layer']} layers, {settings['n_embd']} wide, latent "
             f"{settings['n_latent']}; whole val split")
    if len(histories) == 2:
        one, two = (result['label'] for result in results.values())
        title = f'{one} and {two} {title}: {", ".join(losses.values())}'
    else:
        title = f'{len(histories)} attentions {title} beside the names'
        ax.legend()
        ax.grid(alpha=0.3)
        ax.set(xlabel='iteration', ylabel='val loss (nats per token)')
    ax.set_title(title, fontsize=10)
    figure.savefig(path, dpi=130)


def read_settings(argv):
    """The QuickConfig for all models and the model settings, sized for the device."""
    if {'-h', '--help'} & set(argv):  # which does not ask torch for a GPU
        configure(argv, QuickConfig, MLAConfig, **SAME, **ON_CPU)
    device = configure(argv, QuickConfig, MLAConfig, **SAME)[0].device
    size = ON_GPU if pick_device(device)[1] == 'cuda' else ON_CPU
    config, model_args = configure(argv, QuickConfig, MLAConfig, **SAME, **size)
    model_args = of_model(SAME | size, MLAConfig) | model_args
    if config.lr_decay_iters == TrainConfig.lr_decay_iters:
        config = replace(config, lr_decay_iters=config.max_iters)
    if config.init_from != 'scratch':
        raise UserError(f'init_from={config.init_from}: the comparison trains all models from '
                        'scratch, leave it out')
    if config.eval_only or config.max_iters < 1:
        raise UserError(f'eval_only={config.eval_only}, max_iters={config.max_iters}: the '
                        'comparison needs at least one iteration')
    if 'RANK' in os.environ:
        raise UserError('the comparison runs in one process: start it with python, not torchrun')
    build(MLAConfig, model_args)
    # what is kept are the models in the table
    return replace(config, always_save_checkpoint=True), model_args


def of_model(settings, model_config_class):
    """Those of the settings that are keys of the model."""
    keys = {f.name for f in fields(model_config_class)}
    return {key: value for key, value in settings.items() if key in keys}


def print_next_steps(checkpoints):
    """Say how to go on with the checkpoints, in the user's shell."""
    first, *_, last = [shlex.quote(str(path)) for path in checkpoints]
    print('\nTo go on:')
    if Path(__file__).with_name('.venv').is_dir() and 'VIRTUAL_ENV' not in os.environ:
        print('    source .venv/bin/activate')
    print(f'    python sample.py {last}\n'
          f'    python -m analysis.report {first} {last}')


def variant_of(name, model_args):
    """(the class of a model of the comparison, its own model settings)"""
    variant = VARIANTS[name]
    model_class = MODELS[variant.model_type].model_class
    shape = build(MLAConfig, model_args)
    return model_class, of_model(model_args, model_class.config_class) | variant.settings(shape)


def train_one(name, config, model_args):
    """Train a model of the comparison in its folder and measure it. Returns its history and its
    figures, None if it was stopped."""
    model_class, args = variant_of(name, model_args)
    print(f'\n{label_of(model_class.model_type, build(model_class.config_class, args))}')
    folder = str(Path(config.out_dir) / name)
    result = launch(model_class, replace(config, out_dir=folder), args)
    if result.stopped:
        return None
    return result.history, measure(result, open_data(config.dataset), config)


def train_beside(name, config, model_args):
    """train_one in a process beside others, with one thread. What it prints goes to log.txt."""
    os.setpgrp()  # Ctrl-C reaches the first process alone, which passes it on
    torch.set_num_threads(1)
    folder = Path(config.out_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'log.txt', 'w') as log, redirect_stdout(log), redirect_stderr(log):
        return train_one(name, config, model_args)


def train_side_by_side(names, config, model_args, workers):
    """What train_one returns for each name, workers of them at a time, with a bar for each. None if
    they were stopped."""
    folders = {name: Path(config.out_dir) / name for name in names}
    bars = {name: progress_bar(total=config.max_iters, desc=f'{name:<14}') for name in names}
    with StopSignal() as stop, worker_pool(workers) as pool:
        futures = [pool.submit(train_beside, name, config, model_args) for name in names]
        pending, failed = set(futures), None
        while pending and not failed and not stop.requested:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            show_progress(bars, folders)
            failed = next((future for future in done if future.exception()), None)
        if pending:  # nobody resumes the others
            for process in multiprocessing.active_children():
                process.kill()
    for bar in bars.values():
        bar.close()
    if failed:
        failed.result()
    for folder in folders.values():
        if (folder / 'log.txt').exists():
            lines = (folder / 'log.txt').read_text().splitlines()
            print('\n'.join(line for line in lines if not line.startswith('iter ')))
    return None if pending else [future.result() for future in futures]


def show_progress(bars, folders):
    for name, bar in bars.items():
        now = newest_metrics(folders[name], VARIANTS[name].model_type)
        if 'val_loss' in now:
            bar.set_postfix_str(f"val loss {now['val_loss']:.4f}", refresh=False)
        bar.update(now.get('iter', 0) - bar.n)


def time_alone(name, config, model_args):
    """How long an iteration takes that has all threads for itself: figures. None if it was
    stopped."""
    model_class, args = variant_of(name, model_args)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, 'w') as nowhere:
        short = replace(config, out_dir=folder, max_iters=100, eval_interval=100, eval_iters=1,
                        log_interval=10, wandb_log=False, tensorboard_log=False)
        with redirect_stdout(nowhere), redirect_stderr(nowhere):
            result = launch(model_class, short, args)
    if result.stopped:
        return None
    return {'ms_per_iter': result.ms_per_iter, 'tokens_per_second': result.tokens_per_second}


def train_all(names, config, model_args):
    """What train_one returns for each name, None if they were stopped. On a CPU they train side by
    side, since a second thread gives a small model little. Then their times are taken one by
    one."""
    workers = min(default_workers(), len(names))
    if pick_device(config.device)[1] == 'cpu' and workers > 1:
        trained = train_side_by_side(names, config, model_args, workers)
        for name, (_, figures) in zip(names, trained or []):
            times = time_alone(name, config, model_args)
            if not times:
                return None
            figures |= times
        return trained
    trained = []
    for name in names:
        trained.append(train_one(name, config, model_args))
        if not trained[-1]:
            return None
    return trained


def main():
    config, model_args = read_settings(sys.argv[1:])
    out_dir, names = Path(config.out_dir), config.models.split(',')
    open_data(config.dataset)  # which says what is wrong with it
    trained = train_all(names, config, model_args)
    if not trained:
        print('the comparison is not finished and starts anew next time')
        return
    histories, results = (dict(zip(names, of_each)) for of_each in zip(*trained))
    checkpoints = [checkpoint_path(out_dir / name, VARIANTS[name].model_type) for name in names]
    for number, path in enumerate(checkpoints):
        if path.parent.name in ('mha', 'mla'):  # the others keep to their folders
            checkpoints[number] = out_dir / path.name
            os.replace(path, checkpoints[number])
    is_cuda = pick_device(config.device)[1] == 'cuda'
    settings = asdict(config) | asdict(build(MLAConfig, model_args)) | {
        'vocab_size': read_checkpoint(checkpoints[0], mmap=True)['model_args']['vocab_size'],
        'device_name': torch.cuda.get_device_name() if is_cuda else platform.machine(),
        'torch': torch.__version__, 'threads': torch.get_num_threads()}

    print_table(results)
    print('\n' + samples_text(results))
    text = json.dumps(results | {'settings': settings}, indent=2) + '\n'
    (out_dir / 'results.json').write_text(text)
    (out_dir / 'samples.txt').write_text(samples_text(results), encoding='utf-8')
    draw_comparison(histories, results, settings, out_dir / 'comparison.png')
    names = ' and '.join(str(path.relative_to(out_dir)) for path in checkpoints)
    print(f'saved comparison.png, results.json, samples.txt, {names} in {out_dir}')
    print_next_steps(checkpoints)


if __name__ == '__main__':
    run(main)
