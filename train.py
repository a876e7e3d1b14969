"""
Train a GPT; train_mla.py trains a GPT_MLA with the same loop.

    python train.py config/train_shakespeare_char.py --batch_size=32                          one process
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py                    one node, 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=IP:29500 train.py ...   on each of two nodes

A micro-batch is known by its number, counted over the whole run and all processes. (seed, number) alone decides its
data and its dropout. So two processes see what one would, and a resumed run goes on with the data it has not seen.
"""

import itertools
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import (GPT2_NAMES, build_model, checkpoint_path, checkpoint_tokenizer, describe, from_pretrained,
                        is_hugging_face, last_path, read_newest, run_checkpoints, save_checkpoint)
from configurator import UserError, build, check_least, configure, run
from dataset import SPLITS, check_ids, draw_batch, open_data
from device import autocast, pick_dtype
from lock import locked
from model import GPT
from parallel import team


@dataclass
class TrainConfig:
    out_dir: str = 'out'  # where checkpoint, metrics.jsonl and loss.png go
    eval_interval: int = 2000  # iterations between evaluations, after which a checkpoint may be written
    log_interval: int = 1  # iterations between lines in the log
    eval_iters: int = 200  # batches per evaluation and split
    eval_only: bool = False  # evaluate once and stop, writing nothing
    always_save_checkpoint: bool = True  # after every evaluation, not only when the val loss is the best so far
    keep_checkpoints: int = 1  # of each kind; the ones before the newest are ckpt.pt.1, ckpt.pt.2 and so on
    init_from: str = 'scratch'  # 'scratch', 'resume', 'auto' (resume if there is something), 'gpt2-xl', a GPT-2's directory
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = 'owt'  # its project
    wandb_run_name: str = 'gpt2'  # its name for this run
    dataset: str = 'openwebtext'  # the folder in data/ with train.bin and val.bin, or the path of one
    gradient_accumulation_steps: int = 5 * 8  # micro-batches per iteration, of all processes together
    batch_size: int = 12  # sequences in a micro-batch
    learning_rate: float = 6e-4  # highest learning rate
    max_iters: int = 600000  # optimizer steps in all
    weight_decay: float = 1e-1  # AdamW's, on matrices and embeddings
    beta1: float = 0.9  # AdamW's decay of the mean
    beta2: float = 0.95  # AdamW's decay of the variance
    grad_clip: float = 1.0  # clip the gradient's norm at this value, 0 for never
    decay_lr: bool = True  # warm up and decay the learning rate; else it is constant
    warmup_iters: int = 2000  # iterations of linear warm-up
    lr_decay_iters: int = 600000  # where the cosine ends, about max_iters
    min_lr: float = 6e-5  # learning rate at the end, about learning_rate / 10
    parallel: Literal['ddp', 'fsdp'] = 'ddp'  # 'fsdp': each process holds a part of the model, for models past one GPU's memory
    backend: str = 'auto'  # between processes: 'nccl', 'gloo' or 'auto', which is nccl on GPUs
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # autocast; 'auto': bfloat16 on a GPU that has it
    compile: Literal[True, False, 'auto'] = 'auto'  # torch.compile; 'auto': on a GPU
    seed: int = 1337  # decides weights, data order and dropout

    def __post_init__(self):
        check_least(self, eval_interval=1, log_interval=1, eval_iters=1, gradient_accumulation_steps=1, batch_size=1,
                    max_iters=0, learning_rate=0, min_lr=0, weight_decay=0, grad_clip=0, warmup_iters=0, lr_decay_iters=0,
                    seed=0, keep_checkpoints=1)
        if self.keep_checkpoints > 1000:
            raise ValueError(f'keep_checkpoints={self.keep_checkpoints} must be at most 1000')
        for key in ('out_dir', 'dataset'):
            if not getattr(self, key):
                raise ValueError(f'{key} is empty: give a folder')
        for key in ('beta1', 'beta2'):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)} must be at least 0 and below 1')
        if self.init_from not in ('scratch', 'resume', 'auto') and not is_hugging_face(self.init_from):
            raise ValueError(f"init_from={self.init_from!r} must be 'scratch', 'resume', 'auto', {', '.join(GPT2_NAMES)} or the "
                             'directory of a Hugging Face GPT-2')


@dataclass
class Result:
    """What a run leaves behind. Times leave evaluations out."""
    model: torch.nn.Module
    tokenizer: str | list
    device: torch.device
    history: list  # the dictionaries of metrics.jsonl
    ms_per_iter: float  # median over the logged stretches
    tokens_per_second: float  # of all processes together
    stopped: bool  # by a signal, before max_iters


@contextmanager
def caught_signals():
    """A list that SIGINT and SIGTERM join, in place of ending the program; the second of a kind ends it at once. Not so SIGTERM
    under torchrun, which passes every signal on as one, to processes that may have had it already."""
    caught = []

    def catch(number, frame):
        if number in caught and not (number == signal.SIGTERM and 'RANK' in os.environ):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        caught.append(number)
        with suppress(OSError):  # nobody may be there to read it
            if os.environ.get('RANK', '0') != '0':
                return
            os.write(2, f'\n{signal.Signals(number).name}: finishing the step, then saving; once more stops at once\n'.encode())
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_model(model_class, config, model_args, data, device):
    """The model to train and, if init_from is 'resume', the checkpoint that it comes from (else None)."""
    if config.init_from == 'scratch':
        vocab_size = 50304 if data.tokenizer == 'gpt2' else len(data.tokenizer)
        settings = {'bias': False, 'vocab_size': vocab_size} | model_args
        return model_class(build(model_class.config_class, settings)), None
    may_change = 'dropout', 'positions', 'loss_weights'  # with the weights kept
    kept = {k: v for k, v in model_args.items() if k in may_change}
    if config.init_from == 'resume':
        path, checkpoint, damaged = read_newest(config.out_dir, model_class.model_type, device)
        checkpoint |= {'damaged': damaged, 'resumed_from': path}
        model = build_model(checkpoint, path, **kept)
        if type(model) is not model_class:
            raise UserError(f'checkpoint {path} holds a {type(model).__name__}, this program trains a '
                            f'{model_class.__name__}')
        if checkpoint_tokenizer(checkpoint, path, config.dataset) != data.tokenizer:
            raise UserError(f'dataset={config.dataset} has another vocabulary than the one that checkpoint {path} was '
                            'trained on: use the same data')
        iter_num = checkpoint.get('iter_num', 0)
        if type(iter_num) is not int or iter_num < 0:
            raise UserError(f'checkpoint {path} has iter_num={iter_num!r}, which is no iteration to resume from')
        if iter_num > config.max_iters and not config.eval_only:
            raise UserError(f'checkpoint {path} is at iteration {iter_num}, max_iters={config.max_iters}: nothing is left '
                            'to train, so give a larger max_iters')
    else:
        if data.tokenizer != 'gpt2':
            raise UserError(f'dataset={config.dataset} holds characters, init_from={config.init_from} was trained on '
                            "GPT-2's byte pairs: use data prepared with those, such as dataset=shakespeare")
        checkpoint, model = None, from_pretrained(model_class, config.init_from, **kept)
        if model_args.get('block_size', math.inf) < model.config.block_size:
            model.crop_block_size(model_args['block_size'])
    for key, value in model_args.items():
        if value is not None and value != getattr(model.config, key):
            raise UserError(f'{key}={value} was asked for, but init_from={config.init_from} brings a model with '
                            f'{key}={getattr(model.config, key)}: leave {key} out, or start from scratch')
    return model, checkpoint


def learning_rate_at(iter_num, config):
    """Linear warm-up to learning_rate, cosine down to min_lr at lr_decay_iters, min_lr from there on."""
    if not config.decay_lr:
        return config.learning_rate
    if iter_num < config.warmup_iters:
        return config.learning_rate * (iter_num + 1) / (config.warmup_iters + 1)
    if iter_num >= config.lr_decay_iters:
        return config.min_lr
    ratio = (iter_num - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (config.learning_rate - config.min_lr)


def train(model_class, config, model_args):
    """Train a model_class by a TrainConfig. model_args are the model settings that were asked for; the data and the
    class decide the others. Returns a Result. Raises UserError for what is wrong, before anything is written, and for a
    loss that is not finite."""
    with team(config) as processes, caught_signals() as signals, ExitStack() as at_end:
        return training_loop(model_class, config, model_args, processes, signals, at_end)


def training_loop(model_class, config, model_args, processes, signals, at_end):
    rank, world_size = processes.rank, processes.size
    device, device_type = processes.device, processes.device_type
    master = rank == 0  # the process that prints
    writes = master and not config.eval_only
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision('high')  # tf32
    # torchrun may start anew before the old processes are gone
    lock = locked(config.out_dir, patience=30 if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0' else 0)
    has_folder = os.path.isdir(config.out_dir)
    if writes and has_folder:  # before anything is read there that another run may be writing
        at_end.enter_context(lock)
    processes.any(False)  # all wait for it
    if config.init_from == 'auto':
        config = replace(config, init_from='resume' if run_checkpoints(config.out_dir, model_class.model_type) else 'scratch')
    data = open_data(config.dataset)
    model, checkpoint = make_model(model_class, config, model_args, data, 'cpu' if processes.sharded else device)
    iter_num = checkpoint.get('iter_num', 0) if checkpoint else 0
    if processes.any(processes.highest(iter_num) != iter_num):
        raise UserError(f'out_dir={config.out_dir} does not hold the same checkpoint for all processes: it must be a folder that '
                        'all nodes see')
    block_size = model.config.block_size
    data.check(block_size, model.config.vocab_size)
    model = processes.place(model)

    dtype = pick_dtype(config.dtype, device_type)
    if processes.sharded and dtype == torch.float16:
        raise UserError("parallel='fsdp' is not for dtype=float16: use bfloat16 or float32")
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == torch.float16)
    optimizer = model.configure_optimizers(config.weight_decay, config.learning_rate, (config.beta1, config.beta2),
                                           device_type)
    path = checkpoint_path(config.out_dir, model_class.model_type)
    best_val_loss, history, notes, resumed_from, damaged = math.inf, [], [], None, []
    if checkpoint:
        best_val_loss, history, notes = restore(checkpoint, optimizer, scaler, config, processes)
        resumed_from, damaged = checkpoint['resumed_from'], checkpoint['damaged']
        checkpoint = None  # its memory is wanted for training
        is_lost = path in [bad for bad, _ in damaged] or not path.exists() and os.path.exists(f'{path}.damaged')
        if is_lost and resumed_from.name.startswith(last_path(path).name):
            best_val_loss = math.inf  # the next best takes its place
    compiled = device_type == 'cuda' if config.compile == 'auto' else config.compile
    net = torch.compile(model) if compiled else model
    net = processes.wrap(net)

    micro_steps = config.gradient_accumulation_steps // world_size  # of this process
    tokens_per_iter = config.gradient_accumulation_steps * config.batch_size * block_size
    metrics = Path(config.out_dir) / 'metrics.jsonl'
    if writes and not has_folder:
        at_end.enter_context(lock)
        if run_checkpoints(config.out_dir, model_class.model_type):
            raise UserError(f'out_dir={config.out_dir} has been taken by another run meanwhile: give another')
    for bad, _ in damaged if writes else []:
        bad.rename(f'{bad}.damaged')  # which must not take the place of an older one that is whole
    wandb = start_wandb(config, model.config) if master and config.wandb_log else None
    progress = tqdm(initial=iter_num, total=None if config.eval_only else config.max_iters, unit='iter', dynamic_ncols=True,
                    leave=not config.eval_only, disable=not (master and sys.stderr.isatty()))
    write = partial(print, flush=True) if progress.disable else progress.write

    def say(line):
        if master:
            try:
                write(line)
            except OSError:  # nobody reads any more, or the disk of the log is full: neither may cost the run
                sys.stdout = open(os.devnull, 'w')
    say(f'{describe(model)}; {tokens_per_iter:,} tokens per iteration on {world_size} x {device_type}, '
        f'{str(dtype).removeprefix("torch.")}{", compiled" if compiled else ""}{", sharded" if processes.sharded else ""}')
    for note in notes:
        say(f'note: {note}')

    n_heads = getattr(model.config, 'k_ahead', 1)

    def by_head(name, values):
        """{'loss/head_1': ...} for a model of several heads, without those that had nothing to learn, whose loss is 0."""
        return {f'{name}/head_{i}': value for i, value in enumerate(values, start=1) if value} if n_heads > 1 else {}

    def batch(split, stream, number):
        """Batch number of a stream (0 training, 1 evaluation): inputs and targets, both (batch_size, block_size)."""
        seed = (config.seed, stream, SPLITS.index(split))
        x, y = draw_batch(getattr(data, split), config.batch_size, block_size, seed, number)
        check_ids(max(x.max(), y.max()), model.config.vocab_size, data.folder / f'{split}.bin')
        torch.manual_seed(int(np.random.default_rng((*seed, number)).integers(2 ** 63)))  # of the dropout
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        if device_type == 'cuda':  # from pinned memory the copy does not wait
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)

    @torch.no_grad()
    def estimate_loss():
        """Mean loss of each split over the same eval_iters batches every time; each process takes its share. The loss is
        that of the next token; where there are more heads, theirs stand beside it, over the positions at which they learn."""
        model.eval()
        losses = {}
        for split in SPLITS:
            total = torch.zeros(2, n_heads, device=device)  # of losses times shares, and of shares
            # as many batches in each process, since with fsdp they take every one together; what is too many is not counted
            for k in range(rank, config.eval_iters + -config.eval_iters % world_size, world_size):
                progress.set_postfix_str(f'{split} loss, batch {k + 1} of {config.eval_iters}')
                with autocast(device_type, dtype):
                    batch_losses, shares = model.losses(*batch(split, 1, k))
                if k < config.eval_iters:
                    total += torch.stack((batch_losses * shares, shares))
            mean = [a / b if b else 0.0 for a, b in zip(*processes.mean(total))]
            losses |= {f'{split}_loss': mean[0]} | by_head(f'{split}_loss', mean)
        model.train()
        return losses

    def record(row):
        """Keep a row of metrics where a person, a plot and wandb find it."""
        nonlocal whole_metrics, wandb
        if writes:
            history.append(row)
            try:
                if whole_metrics:
                    with open(metrics, 'a') as f:
                        f.write(to_lines([row]))
                else:  # the first row, before which all stays as it was
                    write_metrics(metrics, history)
                    whole_metrics = True
            except OSError as e:
                whole_metrics = False  # the next row tries to write all of them
                say(f'warning: {metrics} cannot be written ({e.strerror}); training goes on')
        if wandb:
            names = {'loss': 'train/batch_loss', 'train_loss': 'train/loss', 'val_loss': 'val/loss'}
            row = row | {'mfu': 100 * row['mfu']} if 'mfu' in row else row  # in percent, as nanoGPT logs it
            try:
                wandb.log({names.get(key, key): value for key, value in row.items()}, step=row['iter'])
            except Exception as e:
                say(f'warning: training goes on without wandb ({type(e).__name__}: {e})')
                wandb = None

    def save(path):
        """The state of the run as a checkpoint at path. Returns what to say of it; where it cannot be written the run goes on.
        All processes have to come here."""
        nonlocal saved_iter, not_saved
        weights = processes.whole(model.state_dict()) if processes.sharded else None
        state = processes.whole(optimizer.state_dict()) if processes.sharded else optimizer.state_dict()
        if writes:
            if weights:
                weights['transformer.wte.weight'] = weights['lm_head.weight']  # tied, and written once
            not_saved = ''
            try:
                save_checkpoint(path, model, data.tokenizer, asdict(config), iter_num, weights, config.keep_checkpoints,
                                best_val_loss=best_val_loss, optimizer=state, scaler=scaler.state_dict(), processes=world_size,
                                metrics=to_lines(history))
            except OSError as e:
                not_saved = str(e)
                say(f'warning: {e}; training goes on')
        if processes.any(bool(not_saved)):
            return ''
        saved_iter = iter_num
        return f' | saved {path}'

    def check_finite(what, step, *values):
        """Raise UserError if one of values is not finite, before it can spoil a checkpoint."""
        if not all(map(math.isfinite, values)):
            raise UserError(f"{what} is {' and '.join(map(str, values))} in step {step}, so the run stops, and what "
                            f'it has saved stays: try a lower learning_rate than {config.learning_rate}')

    def settle():
        """Wait for the steps since the last time, and check their losses. Returns those of the last of them, over all
        processes, and the seconds that each took."""
        nonlocal unsettled, t0
        losses = processes.mean(torch.stack([*unsettled.values()]))  # waits for the device
        for step, (loss, *_) in zip(unsettled, losses):
            check_finite('the loss', step, loss)
        now = time.perf_counter()
        durations.append((now - t0) / len(unsettled))
        unsettled, t0 = {}, now
        return losses[-1], durations[-1]

    saved_iter, not_saved, whole_metrics = iter_num, '', False
    durations, unsettled, t0 = [], {}, time.perf_counter()  # unsettled: the losses of steps that may be under way
    while True:
        stopped = processes.any(bool(signals))
        if stopped:
            break
        lr = learning_rate_at(iter_num, config)
        for group in optimizer.param_groups:
            group['lr'] = lr

        if iter_num % config.eval_interval == 0 or iter_num >= config.max_iters or config.eval_only:
            if unsettled:
                settle()
            losses = estimate_loss()
            check_finite('the loss in training and validation', iter_num, losses['train_loss'], losses['val_loss'])
            if iter_num == 0 < config.max_iters and writes and not resumed_from:  # a new run, which has gone well so far
                if before := set_aside(config.out_dir, model_class.model_type):
                    say(f'note: what an earlier run left here is in {before} now')
            record({'iter': iter_num, **losses, 'lr': lr})
            best, best_before = losses['val_loss'] < best_val_loss, best_val_loss
            best_val_loss = min(losses['val_loss'], best_val_loss)
            saved = ''
            if iter_num > (saved_iter if resumed_from == path else 0) and not config.eval_only:
                if best or config.always_save_checkpoint:
                    saved = save(path)
                    if not saved:
                        best_val_loss = best_before  # the best that is on the disk
                    elif writes:
                        last_path(path).unlink(missing_ok=True)  # older now
                else:
                    saved = save(last_path(path))
            if writes:
                try:
                    draw_loss(history, model_class.__name__, Path(config.out_dir) / 'loss.png')
                except OSError as e:
                    say(f'warning: loss.png cannot be written ({e.strerror}); training goes on')
            say(f"step {iter_num:6d} | train loss {losses['train_loss']:.4f} | val loss {losses['val_loss']:.4f}{saved}")
            t0 = time.perf_counter()
        if iter_num >= config.max_iters or config.eval_only:
            break

        loss_sum = torch.zeros(1 + n_heads, device=device)  # of all heads together and of each
        for step in range(micro_steps):
            x, y = batch('train', 0, iter_num * config.gradient_accumulation_steps + rank + step * world_size)
            with processes.averages(net, now=step == micro_steps - 1):
                with autocast(device_type, dtype):
                    loss = net(x, y)[1] / micro_steps
                scaler.scale(loss).backward()
            loss_sum[0] += loss.detach()
            if n_heads > 1:
                loss_sum[1:] += model.head_losses / micro_steps
        if config.grad_clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        unsettled[iter_num] = loss_sum

        if iter_num % config.log_interval == 0:
            (loss, *head_losses), dt = settle()
            row = {'iter': iter_num, 'loss': loss, **by_head('loss', head_losses), 'lr': lr, 'ms_per_iter': dt * 1e3,
                   'tokens_per_second': tokens_per_iter / dt}
            mfu = model.estimate_mfu(config.gradient_accumulation_steps * config.batch_size / world_size, dt)
            if mfu is not None:
                row['mfu'] = mfu
            record(row)
            progress.set_postfix_str(f"loss {loss:.4f}, {row['tokens_per_second']:,.0f} tokens/s")
            if progress.disable:
                say(f"iter {iter_num:6d} | loss {loss:.4f} | {dt * 1e3:.1f} ms | {row['tokens_per_second']:,.0f} tokens/s"
                    + (f' | mfu {mfu:.1%}' if mfu is not None else ''))
        iter_num += 1
        progress.update()

    progress.close()
    if stopped:
        if unsettled:
            settle()
        check_finite('the largest weight', iter_num, processes.largest(model.parameters()))
        said = save(last_path(path)) if iter_num > saved_iter and not config.eval_only else ''
        say(f'stopped before iteration {iter_num}{said}' + ('; go on with --init_from=resume' if said or resumed_from else ''))
    if wandb:
        finish = threading.Thread(target=finish_quietly, args=(wandb,), daemon=True)
        finish.start()
        finish.join(60)  # without a network it would wait for ever
    if not_saved:
        newest = f'its newest checkpoint at {saved_iter}' if saved_iter else 'nothing of it is saved'
        raise UserError(f'the run is at iteration {iter_num} and {newest}, since {not_saved}: make room and start it again, with '
                        '--init_from=auto')
    seconds = statistics.median(durations[1:] or durations or [math.nan])  # the first holds the warm-up
    return Result(model, data.tokenizer, device, history, seconds * 1e3, tokens_per_iter / seconds, stopped)


def restore(checkpoint, optimizer, scaler, config, processes):
    """Optimizer and scaler as they were. Returns the best val loss, the rows of metrics before the checkpoint's iteration, and a
    line for each thing that is not as it was."""
    iter_num, best_val_loss = checkpoint.get('iter_num', 0), checkpoint.get('best_val_loss', math.inf)
    notes = [f'{line}; resuming from {checkpoint["resumed_from"].name}, at iteration {iter_num}'
             for _, line in checkpoint['damaged']]
    before = checkpoint.get('processes', processes.size)
    if before != processes.size:
        notes.append(f'the number of processes was {before} and is {processes.size} now: sums are taken in another order, so that '
                     'the run goes on as it would have but for rounding')
    settings = checkpoint.get('config')
    settings = settings if isinstance(settings, dict) else {}
    for key in ('dataset', 'seed', 'batch_size', 'gradient_accumulation_steps'):
        was, now = settings.get(key), getattr(config, key)
        if was not in (None, now):
            notes.append(f'{key} was {was} and is {now} now: the batches are others than the run would have seen')
    if 'model_type' not in checkpoint:
        notes.append('the checkpoint is another program\'s, nanoGPT\'s for instance, and does not say which data it has '
                     f'seen: the order of the data and the dropout start fresh, as those of iteration {iter_num} here')
    if not checkpoint.get('optimizer'):
        notes.append(f'the checkpoint has no optimizer state: it starts fresh, at iteration {iter_num}')
    try:
        best_val_loss = float(best_val_loss)
        history = [row for row in map(json.loads, checkpoint.get('metrics', '').splitlines()) if row['iter'] < iter_num]
        if not checkpoint.get('optimizer'):
            return best_val_loss, history, notes
        asked_for = [(group['betas'], group['weight_decay']) for group in optimizer.param_groups]
        processes.load_optimizer(optimizer, checkpoint['optimizer'])
        for group, (betas, weight_decay) in zip(optimizer.param_groups, asked_for):
            group.update(betas=betas, weight_decay=weight_decay)
        for group in optimizer.param_groups:
            for p in group['params']:
                if not p.shape == optimizer.state[p]['exp_avg'].shape == optimizer.state[p]['exp_avg_sq'].shape:
                    raise ValueError(f'it has other shapes than {tuple(p.shape)} for a weight of that shape')
        if scaler.is_enabled() and checkpoint.get('scaler'):
            scaler.load_state_dict(checkpoint['scaler'])
        return best_val_loss, history, notes
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f'the optimizer, metrics or best_val_loss in the checkpoint cannot be used ({type(e).__name__}: {e}): '
                        'start from scratch, or from another checkpoint') from None


def set_aside(out_dir, model_type):
    """Move what an earlier run with this kind of model left in out_dir to a new folder in it, and return that; None where there
    is no such run. Raises UserError where it cannot be moved."""
    out_dir = Path(out_dir)
    earlier = run_checkpoints(out_dir, model_type)
    if not earlier:
        return None
    before = next(path for number in itertools.count(1) if not (path := out_dir / f'before-{number}').exists())
    try:
        before.mkdir()
        for path in [out_dir / 'metrics.jsonl', out_dir / 'loss.png', *reversed(earlier)]:
            if path.exists():
                os.replace(path, before / path.name)
    except OSError as e:
        raise UserError(f'out_dir={out_dir} holds an earlier run, which cannot be moved to {before} ({e.strerror}): give another'
                        ) from None
    return before


def to_lines(rows):
    """The text of a metrics.jsonl; of which the run's own is in its checkpoint too, so that they cannot part."""
    return ''.join(json.dumps(row) + '\n' for row in rows)


def write_metrics(path, rows):
    partial = path.with_suffix('.partial')
    try:
        partial.write_text(to_lines(rows))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def start_wandb(config, model_config):
    """wandb, with a run begun; None with a warning if it cannot be, since training matters more than its log."""
    try:
        import wandb
    except ImportError:
        raise UserError('wandb_log=True needs wandb: pip install wandb, or use --wandb_log=False') from None
    try:
        wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=asdict(config) | asdict(model_config))
    except Exception as e:
        print(f'warning: training goes on without wandb ({type(e).__name__}: {e})', file=sys.stderr)
        return None
    return wandb


def finish_quietly(wandb):
    with suppress(Exception):  # what it could not send is its own loss
        wandb.finish()


def plot_losses(ax, history, label, color):
    """Draw a run's metrics: evaluated train loss (dashed) and val loss (solid), over the batches' own loss (faint). Further
    heads have a val loss each (dotted); the others are then those of the first."""
    batches = [(row['iter'], row.get('loss/head_1', row['loss'])) for row in history if 'loss' in row]
    evaluations = [(row['iter'], row['train_loss'], row['val_loss']) for row in history if 'val_loss' in row]
    if batches:
        ax.plot(*zip(*batches), color=color, alpha=0.3, linewidth=0.8, label=f"{label}, each batch's own")
    iters, train_losses, val_losses = zip(*evaluations)
    ax.plot(iters, train_losses, '--', color=color, label=f'{label}, train')
    ax.plot(iters, val_losses, '-o', color=color, markersize=3, label=f'{label}, val')
    heads = {int(key.removeprefix('val_loss/head_')) for row in history for key in row if key.startswith('val_loss/head_')}
    for i in sorted(heads - {1}):
        points = [(row['iter'], row[f'val_loss/head_{i}']) for row in history if f'val_loss/head_{i}' in row]
        ax.plot(*zip(*points), ':s', color=f'C{i - 1}', markersize=3, label=f'{label}, val, head {i}')
    ax.set(xlabel='iteration', ylabel='cross-entropy loss (nats per token)')
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend()


def draw_loss(history, label, path):
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    ax = figure.subplots()
    plot_losses(ax, history, label, 'C0')
    last = [row for row in history if 'val_loss' in row][-1]
    ax.set_title(f"{label}: val loss {last['val_loss']:.4f} after {last['iter']:,} iterations", fontsize=10)
    figure.savefig(path, dpi=130)


def main(model_class=GPT, **defaults):
    # nanoGPT trains without biases, though its GPTConfig has them
    config, model_args = configure(sys.argv[1:], TrainConfig, model_class.config_class, bias=False, **defaults)
    train(model_class, config, model_args)


if __name__ == '__main__':
    run(main)
