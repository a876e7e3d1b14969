"""
The comparison: train the same GPT-2 with multi-head attention (MHA) and with multi-latent attention (MLA) on the same
Shakespeare, in the same order, and show side by side what changed.

    python test_shakespeare_quick.py                    about three minutes on a laptop's CPU
    python test_shakespeare_quick.py --max_iters=200    every key of the trainer can be given

Despite its name this is a program and no test. It writes results.json, comparison.png, samples.txt and both checkpoints
to out_dir.
"""

import json
import os
import platform
import sys
import textwrap
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure

from checkpoint import checkpoint_path
from configurator import UserError, build, configure, run
from data.tokenizer import make_tokenizer
from dataset import open_data
from device import autocast, pick_device, pick_dtype
from evaluate import split_loss
from generate import generate
from model import GPT
from model_mla import GPT_MLA, MLAConfig
from train import TrainConfig, plot_losses, train

MODELS = {'mha': GPT, 'mla': GPT_MLA}
SAME = dict(out_dir='out_shakespeare_quick', dataset='shakespeare_char', gradient_accumulation_steps=1, eval_interval=100,
            log_interval=50, learning_rate=1e-3, min_lr=1e-4, beta2=0.99, warmup_iters=100, max_iters=2000,
            bias=False)
# In so few iterations nothing overfits and every step counts. Against the trainer's defaults (beta1 0.9, weight_decay
# 0.1, grad_clip 1) these three lower the val loss by 1.9 % for MHA and 1.5 % for MLA (README.md).
ON_CPU = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0, eval_iters=40,
              beta1=0.8, weight_decay=0.0, grad_clip=0.0)
ON_GPU = dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2, eval_iters=40)
PROMPT, SAMPLE_CHARS = '\n', 300


def measure(result, data, config):
    """The figures of one trained model, as results.json has them."""
    model, device = result.model.eval(), result.device
    dtype = pick_dtype(config.dtype, device.type)
    attentions = [block.attn for block in model.transformer.h]
    tokenizer = make_tokenizer(result.tokenizer)
    torch.manual_seed(config.seed)
    prompt = torch.tensor([tokenizer.encode(PROMPT)], device=device)
    with autocast(device.type, dtype):
        ids = generate(model, prompt, SAMPLE_CHARS, tokenizer.n_vocab, temperature=0.8, top_k=200)
    return {
        'params': model.get_num_params(non_embedding=False),
        'attention_params': sum(p.numel() for attention in attentions for p in attention.parameters()),
        'train_loss': result.history[-1]['train_loss'],
        'val_loss': split_loss(model, data.val, dtype),
        'ms_per_iter': result.ms_per_iter,
        'tokens_per_second': result.tokens_per_second,
        'cache_bytes_per_token': sum(a.new_cache(1, 1, dtype, device).nbytes for a in attentions),
        'sample': tokenizer.decode(ids[0].tolist())[len(PROMPT):][:SAMPLE_CHARS],
    }


def print_table(results):
    mha, mla = results['mha'], results['mla']
    rows = [('parameters', 'params', '{:,}'), ('in attention', 'attention_params', '{:,}'),
            ('train loss, nats', 'train_loss', '{:.4f}'), ('val loss, nats', 'val_loss', '{:.4f}'),
            ('ms per iteration', 'ms_per_iter', '{:.1f}'), ('tokens per second', 'tokens_per_second', '{:,.0f}'),
            ('cache bytes per token', 'cache_bytes_per_token', '{:,}')]
    print(f"\n{'':<22}{'MHA':>12}{'MLA':>12}{'MLA / MHA':>12}")
    for title, key, form in rows:
        print(f'{title:<22}{form.format(mha[key]):>12}{form.format(mla[key]):>12}{mla[key] / mha[key]:>12.3f}')


def samples_text(results):
    return '\n\n'.join(f"{name.upper()}, {SAMPLE_CHARS} characters at temperature 0.8\n"
                       f"{textwrap.indent(results[name]['sample'].strip(), '    ')}" for name in MODELS) + '\n'


def draw_comparison(histories, results, settings, path):
    figure = Figure(figsize=(8, 5), layout='constrained')
    ax = figure.subplots()
    for name, color in zip(MODELS, ('C0', 'C1')):
        plot_losses(ax, histories[name], name.upper(), color)
    gap = results['mla']['val_loss'] / results['mha']['val_loss'] - 1
    lowest = min(row['val_loss'] for history in histories.values() for row in history if 'val_loss' in row)
    ax.set_ylim(top=min(ax.get_ylim()[1], lowest + 1.2))  # the start, which is the same for all, would flatten the rest
    ax.set_xlim(left=0)
    ax.set_title(f"MHA and MLA on {Path(settings['dataset']).name}, same data in the same order\n"
                 f"{settings['n_layer']} layers, {settings['n_embd']} wide, latent {settings['n_latent']}; "
                 f"whole val split: MHA {results['mha']['val_loss']:.4f}, MLA {results['mla']['val_loss']:.4f} "
                 f'({gap:+.1%})', fontsize=10)
    figure.savefig(path, dpi=130)


def read_settings(argv):
    """The TrainConfig for both models and the model settings, sized for the device."""
    device = configure([a for a in argv if a not in ('-h', '--help')], TrainConfig, MLAConfig, **SAME)[0].device
    size = ON_GPU if pick_device(device)[1] == 'cuda' else ON_CPU
    config, model_args = configure(argv, TrainConfig, MLAConfig, **SAME, **size)
    model_keys = {f.name for f in fields(MLAConfig)}
    model_args = {k: v for k, v in (SAME | size).items() if k in model_keys} | model_args
    if config.lr_decay_iters == TrainConfig.lr_decay_iters:
        config = replace(config, lr_decay_iters=config.max_iters)
    if config.init_from != 'scratch':
        raise UserError(f'init_from={config.init_from}: the comparison trains both models from scratch, leave it out')
    if config.eval_only or config.max_iters < 1:
        raise UserError(f'eval_only={config.eval_only}, max_iters={config.max_iters}: the comparison needs at least one '
                        'iteration')
    if 'RANK' in os.environ:
        raise UserError('the comparison runs in one process: start it with python, not torchrun')
    build(MLAConfig, model_args)
    return replace(config, always_save_checkpoint=True), model_args  # what is kept are the models in the table


def main():
    config, model_args = read_settings(sys.argv[1:])
    out_dir = Path(config.out_dir)
    data = open_data(config.dataset)
    make_tokenizer(data.tokenizer).encode(PROMPT)  # fails now rather than after the training if it must

    results, histories = {}, {}
    for name, model_class in MODELS.items():
        print(f'\n{name.upper()}')
        args = {k: v for k, v in model_args.items() if k != 'n_latent' or name == 'mla'}
        result = train(model_class, replace(config, out_dir=str(out_dir / name)), args)
        if result.stopped:
            print('the comparison is not finished and starts anew next time')
            return
        histories[name], results[name] = result.history, measure(result, data, config)
    for name, model_class in MODELS.items():
        checkpoint = checkpoint_path(out_dir / name, model_class.model_type)
        os.replace(checkpoint, out_dir / checkpoint.name)
    settings = asdict(config) | asdict(result.model.config) | {
        'device_name': torch.cuda.get_device_name() if result.device.type == 'cuda' else platform.machine(),
        'torch': torch.__version__, 'threads': torch.get_num_threads()}

    print_table(results)
    print('\n' + samples_text(results))
    (out_dir / 'results.json').write_text(json.dumps(results | {'settings': settings}, indent=2) + '\n')
    (out_dir / 'samples.txt').write_text(samples_text(results), encoding='utf-8')
    draw_comparison(histories, results, settings, out_dir / 'comparison.png')
    print(f'saved comparison.png, results.json, samples.txt, ckpt.pt and ckpt_mla.pt in {out_dir}')


if __name__ == '__main__':
    run(main)
