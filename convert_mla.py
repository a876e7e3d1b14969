"""
Turn a trained GPT into a GPT_MLA, whose keys and values come from a latent of n_latent numbers:

    python convert_mla.py out-shakespeare-char/ckpt.pt --n_latent=64 --out_dir=out_mla
    python convert_mla.py out-shakespeare-char/ckpt.pt --cache_share=0.25 --heal_iters=200

and train it on:

    python train_mla.py --init_from=resume --out_dir=out_mla

The checkpoint has settings for that: TRAIN_ON and SCHEDULE. --heal_iters does so at once, and
prints how the loss falls. convert_mla.py needs a checkpoint of train.py, or GPT-2's weights, and
preferably the data of its training.

Keys and values of each layer become products of two factors of rank n_latent, which lose least over
a calibration text: runtime/factors.py says how.

--cache_share gives each layer a width of its own (as CARE does, "Covariance-Aware and Rank-Enhanced
Decomposition", 2026). The widths add up to that share of MHA's cache, so that each layer loses the
same part of its keys and values.

A model with rotary='all' becomes one whose keys are rebuilt and turned for each token. With
--rotary=decoupled its keys are split in two (as TransMLA does, Meng et al. 2025). Of each of the
n_rotary / 2 fastest frequencies, the leading complex principal component of the keys of all heads
becomes the shared rotary key. The rest turns no more and goes into the latent, as it is on average
over the distances at which the head looks in the calibration text.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from configurator import UserError, check_least, configure, run

import torch

from evaluate import split_loss
from model import GPT
from model_mla import GPT_MLA
from models import cached_numbers, describe
from runtime.checkpoint import checkpoint_path, save_checkpoint
from runtime.dataset import draw_batch
from runtime.device import pick_float64_device
from runtime.factors import activation_moments, convert
from runtime.loading import load_model
from runtime.progress import progress_bar
from train import TrainConfig, launch

# for training on: the batches and AdamW of the model's own training where it says them, a third of
# its learning rate, and 1,000 iterations
TRAIN_ON = {'batch_size': 12, 'gradient_accumulation_steps': 1, 'learning_rate': 3e-4,
            'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95, 'grad_clip': 1.0}
SCHEDULE = {'max_iters': 1000, 'lr_decay_iters': 1000, 'warmup_iters': 50, 'eval_interval': 100,
            'eval_iters': 50, 'log_interval': 10}


@dataclass
class ConvertConfig:
    model: str = ''  # a GPT's checkpoint, its out_dir, the directory of a Hugging Face GPT-2, or a
                     # name such as gpt2
    n_latent: int | None = None  # width of the latent, at most n_embd; None: n_embd // 2
    cache_share: float | None = None  # in place of n_latent: the part of MHA's cache, 2 n_embd
                                      # numbers a layer, that is left, with each layer's own width
    rotary: Literal['as it is', 'decoupled'] = 'as it is'  # 'decoupled': of a model that has
                                                           # rotary='all'
    n_rotary: int | None = None  # of rotary='decoupled': at most head_dim; None: half of it
    heal_iters: int = 0  # iterations to train on at once, by the settings of the checkpoint
    out_dir: str = 'out_mla'  # where ckpt_mla.pt goes
    dataset: str = ''  # calibration and val text, a folder as the trainer takes it; '': the one of
                       # the checkpoint
    calibration_tokens: int = 32_768  # of the training split; 0 weighs all directions of x alike
    val_tokens: int = 32_768  # of the val split, from its beginning, on which the loss is measured
    seed: int = 1337  # of the choice of calibration tokens
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1'

    def __post_init__(self):
        check_least(self, calibration_tokens=0, val_tokens=2, seed=0, heal_iters=0)
        if self.n_latent is not None and self.n_latent < 1:
            raise ValueError(f'n_latent={self.n_latent} must be at least 1')
        if self.cache_share is not None and self.n_latent is not None:
            raise ValueError(f'cache_share={self.cache_share} and n_latent={self.n_latent} both '
                             'say how large the latents are: give one of them')
        if self.cache_share is not None and not 0 < self.cache_share <= 1:
            raise ValueError(f'cache_share={self.cache_share} must be above 0 and at most 1')
        if self.n_rotary is not None and self.rotary != 'decoupled':
            raise ValueError(f'n_rotary={self.n_rotary} is for rotary=decoupled: give '
                             '--rotary=decoupled, or leave it out')
        if not self.out_dir:
            raise ValueError('out_dir is empty: give a folder')


def calibration_windows(data, block_size, config, device):
    """About calibration_tokens of the training split, in windows (1, block_size)."""
    count = -(-config.calibration_tokens // block_size)
    for number in progress_bar(range(count), 'calibration'):
        x, _ = draw_batch(data.train, 1, block_size, (config.seed,), number, data.sequence)
        yield torch.from_numpy(x).to(device)


def open_text(config, trained):
    """The Data for calibration and val loss. None where none was named and that of the training
    is not on this disk."""
    try:
        data = trained.open_data(config.dataset)
        data.check(trained.model.config.block_size, trained.model.config.vocab_size)
        return data
    except UserError:
        if config.dataset:
            raise
        return None


def settings_to_train_on(settings, dataset):
    """The training settings of a converted model. settings are those of the model's training."""
    own = {key: settings[key] if isinstance(settings.get(key), (int, float)) else value
           for key, value in TRAIN_ON.items()}
    rate = float(f"{own['learning_rate'] / 3:.1g}")
    own |= SCHEDULE | {'learning_rate': rate, 'min_lr': float(f'{rate / 10:.1g}')}
    return own | {'dataset': dataset}


def rotary_width(config, c):
    """The n_rotary of the conversion of a model with the config c; 0 if none. Raises UserError."""
    if config.rotary != 'decoupled':
        return 0
    if c.rotary != 'all':
        raise UserError(f"rotary=decoupled is for a model with rotary='all', and "
                        f'{config.model} has {c.rotary!r}: leave it out')
    n_rotary = max(2, c.head_dim // 4 * 2) if config.n_rotary is None else config.n_rotary
    if n_rotary % 2 or not 2 <= n_rotary <= c.head_dim:
        raise UserError(f'n_rotary={n_rotary} must be even, from 2 to head_dim={c.head_dim}')
    return n_rotary


def print_errors(errors, mla, weighing):
    """A table of the relative errors of each layer."""
    print(f'\nrelative error, {weighing}\n')
    print(f'{"layer":>7}{"latent":>8}{"keys":>10}{"values":>10}{"both":>10}')
    for layer, (keys, values, both) in enumerate(errors):
        width = mla.config.of_layer(layer).n_latent
        print(f'{layer:>7}{width:>8}{keys:>10.4f}{values:>10.4f}{both:>10.4f}')


def heal(config, settings):
    """Train on for heal_iters iterations by the settings of the checkpoint, and print the val loss
    on the way."""
    n = config.heal_iters
    own = {f.name: settings[f.name] for f in fields(TrainConfig) if f.name in settings}
    own |= dict(out_dir=config.out_dir, init_from='resume', device=config.device, max_iters=n,
                lr_decay_iters=n, warmup_iters=max(1, n // 20), eval_interval=max(1, n // 8))
    result = launch(GPT_MLA, TrainConfig(**own), {})
    print(f'\nhealing, val loss in nats\n\n{"iteration":>11}{"val loss":>11}')
    for row in result.history:
        if 'val_loss' in row:
            print(f'{row["iter"]:>11,}{row["val_loss"]:>11.4f}')


def main():
    config, _ = configure(sys.argv[1:], ConvertConfig, positional=('model',))
    if not config.model:
        raise UserError('no checkpoint was given: python convert_mla.py CKPT --n_latent=N')
    path = checkpoint_path(config.out_dir, 'mla')
    if path.exists():
        raise UserError(f'out_dir={config.out_dir} has a {path.name} already: give another '
                        'out_dir')
    device = pick_float64_device(config.device)
    trained = load_model(config.model, device)
    model = trained.model
    if type(model) is not GPT:
        raise UserError(f'{config.model} holds a {type(model).__name__}: only a GPT can be '
                        'converted')
    c = model.config
    n_latent = config.n_latent or max(1, c.n_embd // 2)
    if n_latent > c.n_embd:
        raise UserError(f'n_latent={n_latent} must be at most n_embd={c.n_embd}, which already '
                        'keeps everything')
    n_rotary = rotary_width(config, c)
    data = open_text(config, trained)
    if config.heal_iters and not data:
        raise UserError(f'heal_iters={config.heal_iters} needs the data of the training: give '
                        '--dataset=NAME')

    moments, weighing = None, 'of the weights alone, no text'
    if data and config.calibration_tokens:
        windows = calibration_windows(data, c.block_size, config, device)
        moments = activation_moments(model, windows)
        weighing = f'weighted by the activations of {data.name}'
    mla, errors = convert(model, n_latent, moments, n_rotary, config.cache_share)
    print(describe(model))
    print(describe(mla))
    print(f'cache  {cached_numbers(mla):,} numbers per token, {cached_numbers(model):,} before')
    print_errors(errors, mla, weighing)
    if data:
        tokens = data.val[:config.val_tokens]
        before, after = (split_loss(m, tokens, sequence=data.sequence) for m in (model, mla))
        change = after / before - 1
        print(f'\nval loss {before:.4f} nats before, {after:.4f} after ({change:+.1%})')
    else:
        print('\nno val loss: give --dataset=NAME, on which the model was trained')
    try:
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        settings = settings_to_train_on(trained.settings, data.name if data else '')
        save_checkpoint(path, mla, trained.tokenizer, settings, 0)
    except OSError as e:
        raise UserError(f'out_dir={config.out_dir} cannot be written to ({e.strerror or e}): give '
                        'another') from None
    if config.heal_iters:
        heal(config, settings)
        return
    named = '' if data else ' --dataset=NAME'
    print(f'saved {path}; train on with python train_mla.py --init_from=resume '
          f'--out_dir={config.out_dir}{named}')


if __name__ == '__main__':
    run(main)
