"""
Turn a trained GPT into a GPT_MLA, whose keys and values come from a latent of n_latent numbers:

    python convert_mla.py out-shakespeare-char/ckpt.pt --n_latent=64 --out_dir=out_mla

and train it on:

    python train_mla.py --init_from=resume --out_dir=out_mla

The checkpoint has settings for that: TRAIN_ON and SCHEDULE. convert_mla.py needs a checkpoint of
train.py, or GPT-2's weights, and preferably the data of its training.

In each layer [k; v] = W x + b. D E takes the place of W (2 n_embd, n_embd): E (n_latent, n_embd)
becomes the latent encoder, and the halves of D (2 n_embd, n_latent) become key and value. C is the
covariance of x over a calibration text. E|W x - D E x|^2 is least where D holds the leading left
singular vectors of W C^(1/2) and E = D^T W (Eckart and Young 1936).
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from configurator import UserError, check_least, configure, run

import torch

from evaluate import split_loss
from model import GPT
from model_mla import GPT_MLA, MLAConfig
from models import describe
from runtime.checkpoint import checkpoint_path, save_checkpoint
from runtime.dataset import draw_batch
from runtime.device import pick_float64_device
from runtime.loading import load_model
from runtime.progress import progress_bar

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
    out_dir: str = 'out_mla'  # where ckpt_mla.pt goes
    dataset: str = ''  # calibration and val text, a folder as the trainer takes it; '': the one of
                       # the checkpoint
    calibration_tokens: int = 32_768  # of the training split; 0 weighs all directions of x alike
    val_tokens: int = 32_768  # of the val split, from its beginning, on which the loss is measured
    seed: int = 1337  # of the choice of calibration tokens
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1'

    def __post_init__(self):
        check_least(self, calibration_tokens=0, val_tokens=2, seed=0)
        if self.n_latent is not None and self.n_latent < 1:
            raise ValueError(f'n_latent={self.n_latent} must be at least 1')
        if not self.out_dir:
            raise ValueError('out_dir is empty: give a folder')


@dataclass
class Moments:
    """The moments of x (n_embd), the input of a layer's attention, in float64."""
    mean: torch.Tensor  # (n_embd,)
    second: torch.Tensor  # (n_embd, n_embd), the mean of x x^T


@torch.no_grad()
def activation_moments(model, windows):
    """Moments of the input of each layer's attention over windows of tokens, tensors (B, T)."""
    totals = [Moments(0.0, 0.0) for _ in model.transformer.h]

    def add_to(total):
        def hook(attention, args):
            x = args[0].flatten(0, 1).double()  # (B * T, n_embd)
            total.mean = total.mean + x.sum(0)
            total.second = total.second + x.T @ x
        return hook
    handles = [block.attn.register_forward_pre_hook(add_to(total))
               for block, total in zip(model.transformer.h, totals)]
    n = 0
    for idx in windows:
        model(idx)
        n += idx.numel()
    for handle in handles:
        handle.remove()
    return [Moments(total.mean / n, total.second / n) for total in totals]


def low_rank(W, root, rank):
    """D (n_out, rank) and E (rank, n_in) that minimise |(W - D E) root|, where root root^T = C.
    They are the best approximation of W for inputs of covariance C. All in float64."""
    D = torch.linalg.svd(W @ root, full_matrices=False).U[:, :rank]
    return D, D.T @ W


def factor(W, b, moments, rank):
    """D, E, b that take the place of W (2 n_embd, n_embd) and b (2 n_embd) or None, of keys and
    values, and the relative errors of keys, values and both. An error is the root mean square of
    what is lost over that of what was there."""
    n_embd = W.size(1)
    mean = torch.zeros(n_embd, dtype=W.dtype, device=W.device)
    covariance = torch.eye(n_embd, dtype=W.dtype, device=W.device)
    if moments:
        mean, covariance = moments.mean, moments.second
        if b is not None:  # b takes over the mean, and the factors have the spread around it alone
            covariance = covariance - mean.outer(mean)
    spread, directions = torch.linalg.eigh(covariance)
    if spread.max() <= 0:  # a text that never varies says nothing
        spread = torch.ones_like(spread)
    root = directions * spread.clamp_min(0).sqrt()
    # Directions that the text never took count a little. So full rank loses nothing anywhere.
    D, E = low_rank(W, directions * spread.clamp_min(1e-10 * spread.max()).sqrt(), rank)
    lost = W - D @ E
    if b is not None:
        b = b + lost @ mean
    errors = []
    for part in (slice(0, n_embd), slice(n_embd, None), slice(None)):
        errors.append(((lost[part] @ root).norm() / (W[part] @ root).norm()).item())
    return D, E, b, errors


def convert(model, n_latent, moments=None):
    """A GPT_MLA that does nearly what the GPT model does, and the relative errors of its layers'
    keys, values and both. moments are those of activation_moments. Without them all directions of
    x count alike. At n_latent = n_embd, the most there can be, it does exactly the same."""
    c = model.config
    state, errors = dict(model.state_dict()), []
    for i in range(c.n_layer):
        prefix = f'transformer.h.{i}.attn.'
        W = state.pop(prefix + 'c_attn.weight')  # (3 n_embd, n_embd)
        b = state.pop(prefix + 'c_attn.bias', None)
        b_kv = None if b is None else b[c.n_embd:].double()
        D, E, b_kv, error = factor(W[c.n_embd:].double(), b_kv, moments and moments[i], n_latent)
        errors.append(error)
        new = {'query.weight': W[:c.n_embd], 'latent_enc.weight': E,
               'key.weight': D[:c.n_embd], 'value.weight': D[c.n_embd:]}
        if b is not None:
            new |= {'query.bias': b[:c.n_embd], 'key.bias': b_kv[:c.n_embd],
                    'value.bias': b_kv[c.n_embd:]}
        for name, tensor in new.items():
            state[prefix + name] = tensor.to(W.dtype, copy=True)
    config = MLAConfig(**asdict(c), n_latent=n_latent)
    return GPT_MLA.from_state_dict(config, state).eval(), errors


def calibration_windows(data, block_size, config, device):
    """About calibration_tokens of the training split, in windows (1, block_size)."""
    count = -(-config.calibration_tokens // block_size)
    for number in progress_bar(range(count), 'calibration'):
        x, _ = draw_batch(data.train, 1, block_size, (config.seed,), number)
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


def print_errors(errors, weighing):
    """A table of the relative errors of each layer."""
    print(f'\nrelative error, {weighing}\n')
    print(f'{"layer":>7}{"keys":>10}{"values":>10}{"both":>10}')
    for layer, (keys, values, both) in enumerate(errors):
        print(f'{layer:>7}{keys:>10.4f}{values:>10.4f}{both:>10.4f}')


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
    n_latent = config.n_latent or max(1, model.config.n_embd // 2)
    if n_latent > model.config.n_embd:
        raise UserError(f'n_latent={n_latent} must be at most n_embd={model.config.n_embd}, which '
                        'already keeps everything')
    data = open_text(config, trained)

    moments, weighing = None, 'of the weights alone, no text'
    if data and config.calibration_tokens:
        windows = calibration_windows(data, model.config.block_size, config, device)
        moments = activation_moments(model, windows)
        weighing = f'weighted by the activations of {data.name}'
    mla, errors = convert(model, n_latent, moments)
    print(describe(model))
    print(describe(mla))
    print_errors(errors, weighing)
    if data:
        before, after = (split_loss(m, data.val[:config.val_tokens]) for m in (model, mla))
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
    named = '' if data else ' --dataset=NAME'
    print(f'saved {path}; train on with python train_mla.py --init_from=resume '
          f'--out_dir={config.out_dir}{named}')


if __name__ == '__main__':
    run(main)
