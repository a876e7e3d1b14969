"""
The comparison: train the same GPT-2 with multi-head attention (MHA) and with multi-latent attention
(MLA) on the same Shakespeare, in the same order, and show side by side what changed.

    python test_shakespeare_quick.py                    about three minutes on a laptop's CPU
    python test_shakespeare_quick.py --max_iters=200    every key of the trainer can be given

It needs the data: python data/shakespeare_char/prepare.py first. Despite its name this is a program
and no test. It writes results.json, comparison.png, samples.txt and both checkpoints to out_dir.
"""

import json
import os
import platform
import shlex
import sys
import textwrap
from dataclasses import asdict, fields, replace
from pathlib import Path

from configurator import UserError, build, configure, run

import torch
from matplotlib.figure import Figure

from evaluate import split_loss
from generate import generate
from model_mla import MLAConfig
from models import MODELS, cached_numbers
from runtime.checkpoint import checkpoint_path
from runtime.cpu_linear import use_cpu_linear
from runtime.dataset import open_data
from runtime.device import autocast, pick_device, pick_dtype
from runtime.run_log import plot_losses
from train import TrainConfig, launch

PAIR = {name: MODELS[name] for name in ('gpt', 'mla')}
KEYS = {name: entry.label.lower() for name, entry in PAIR.items()}  # 'mha', 'mla' in results.json
SAME = dict(out_dir='out_shakespeare_quick', dataset='shakespeare_char',
            gradient_accumulation_steps=1, eval_interval=100, log_interval=50, learning_rate=1e-3,
            min_lr=1e-4, beta2=0.99, warmup_iters=100, max_iters=2000, bias=False)
# In so few iterations nothing overfits and every step counts. Against the trainer's defaults (beta1
# 0.9, weight_decay 0.1, grad_clip 1) the last three lower the val loss by 1.9 % for MHA and 1.5 %
# for MLA.
ON_CPU = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0,
              eval_iters=40, beta1=0.8, weight_decay=0.0, grad_clip=0.0)
ON_GPU = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2,
              eval_iters=40)
SAMPLE_TOKENS = 300


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
        'params': model.get_num_params(non_embedding=False),
        'attention_params': n_params,
        'train_loss': result.history[-1]['train_loss'],
        'val_loss': split_loss(model, data.val, dtype),
        'ms_per_iter': result.ms_per_iter,
        'tokens_per_second': result.tokens_per_second,
        'cache_bytes_per_token': cached_numbers(model) * dtype.itemsize,
        'sample': tokenizer.decode(ids[0, prompt.size(1):].tolist()),
    }


def print_table(results):
    mha, mla = results['mha'], results['mla']
    rows = [('parameters', 'params', '{:,}'), ('in attention', 'attention_params', '{:,}'),
            ('train loss, nats', 'train_loss', '{:.4f}'),
            ('val loss, nats', 'val_loss', '{:.4f}'),
            ('ms per iteration', 'ms_per_iter', '{:.1f}'),
            ('tokens per second', 'tokens_per_second', '{:,.0f}'),
            ('cache bytes per token', 'cache_bytes_per_token', '{:,}')]
    print(f"\n{'':<22}{'MHA':>12}{'MLA':>12}{'MLA / MHA':>12}")
    for title, key, form in rows:
        print(f'{title:<22}{form.format(mha[key]):>12}{form.format(mla[key]):>12}'
              f'{mla[key] / mha[key]:>12.3f}')


def samples_text(results):
    texts = []
    for name, entry in PAIR.items():
        sample = textwrap.indent(results[KEYS[name]]['sample'].strip(), '    ')
        texts.append(f'{entry.label}, {SAMPLE_TOKENS} tokens at temperature 0.8\n{sample}\n')
    return '\n'.join(texts)


def draw_comparison(histories, results, settings, path):
    figure = Figure(figsize=(8, 5), layout='constrained')
    ax = figure.subplots()
    for name, entry in PAIR.items():
        plot_losses(ax, histories[KEYS[name]], entry.label, entry.colour)
    mha, mla = results['mha']['val_loss'], results['mla']['val_loss']
    rows = [row for history in histories.values() for row in history]
    lowest = min(row['val_loss'] for row in rows if 'val_loss' in row)
    # the start is the same for all and would flatten the rest
    ax.set_ylim(top=min(ax.get_ylim()[1], lowest + 1.2))
    ax.set_xlim(left=0)
    ax.set_title(f"MHA and MLA on {Path(settings['dataset']).name}, same data in the same order\n"
                 f"{settings['n_layer']} layers, {settings['n_embd']} wide, "
                 f"latent {settings['n_latent']}; whole val split: MHA {mha:.4f}, MLA {mla:.4f} "
                 f'({mla / mha - 1:+.1%})', fontsize=10)
    figure.savefig(path, dpi=130)


def read_settings(argv):
    """The TrainConfig for both models and the model settings, sized for the device."""
    without_help = [arg for arg in argv if arg not in ('-h', '--help')]
    device = configure(without_help, TrainConfig, MLAConfig, **SAME)[0].device
    size = ON_GPU if pick_device(device)[1] == 'cuda' else ON_CPU
    config, model_args = configure(argv, TrainConfig, MLAConfig, **SAME, **size)
    model_args = of_model(SAME | size, MLAConfig) | model_args
    if config.lr_decay_iters == TrainConfig.lr_decay_iters:
        config = replace(config, lr_decay_iters=config.max_iters)
    if config.init_from != 'scratch':
        raise UserError(f'init_from={config.init_from}: the comparison trains both models from '
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
    mha, mla = [shlex.quote(str(path)) for path in checkpoints]
    print('\nTo go on:')
    if Path(__file__).with_name('.venv').is_dir() and 'VIRTUAL_ENV' not in os.environ:
        print('    source .venv/bin/activate')
    print(f'    python sample.py {mla}\n'
          f'    python -m analysis.report {mha} {mla}')


def main():
    config, model_args = read_settings(sys.argv[1:])
    out_dir = Path(config.out_dir)
    data = open_data(config.dataset)

    results, histories = {}, {}
    for name, entry in PAIR.items():
        key = KEYS[name]
        print(f'\n{entry.label}')
        args = of_model(model_args, entry.model_class.config_class)
        result = launch(entry.model_class, replace(config, out_dir=str(out_dir / key)), args)
        if result.stopped:
            print('the comparison is not finished and starts anew next time')
            return
        histories[key], results[key] = result.history, measure(result, data, config)
    checkpoints = []
    for name in PAIR:
        checkpoint = checkpoint_path(out_dir / KEYS[name], name)
        checkpoints.append(out_dir / checkpoint.name)
        os.replace(checkpoint, checkpoints[-1])
    is_cuda = result.device.type == 'cuda'
    settings = asdict(config) | asdict(result.model.config) | {
        'device_name': torch.cuda.get_device_name() if is_cuda else platform.machine(),
        'torch': torch.__version__, 'threads': torch.get_num_threads()}

    print_table(results)
    print('\n' + samples_text(results))
    text = json.dumps(results | {'settings': settings}, indent=2) + '\n'
    (out_dir / 'results.json').write_text(text)
    (out_dir / 'samples.txt').write_text(samples_text(results), encoding='utf-8')
    draw_comparison(histories, results, settings, out_dir / 'comparison.png')
    names = ' and '.join(path.name for path in checkpoints)
    print(f'saved comparison.png, results.json, samples.txt, {names} in {out_dir}')
    print_next_steps(checkpoints)


if __name__ == '__main__':
    run(main)
