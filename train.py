"""
Train a GPT with multi-head attention. train_mla.py and train_k_ahead.py train the other models with
the same loop.

    python data/shakespeare_char/prepare.py       first: the data, here 1 MB of Shakespeare
    python train.py config/train_shakespeare_char_cpu.py --batch_size=32        one process
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py      8 GPUs

A micro-batch is known by its number, counted over the whole run and all processes. (seed, number)
alone decides its data and its dropout. So two processes see what one would, and a resumed run goes
on with the data that it has not seen.
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

from configurator import check_least, configure, run

import torch

from generate import sample_text
from model import GPT
from models import keys_elsewhere
from runtime.batches import EVALUATION, TRAINING, Batches
from runtime.dataset import SPLITS
from runtime.device import peak_flops, pick_compile, pick_dtype
from runtime.loading import GPT2_NAMES
from runtime.parallel import join_processes, whole
from runtime.resume import resolve_init_from
from runtime.run_folder import RunFolder, StopSignal
from runtime.run_log import PendingLosses, RunLog, by_head, check_finite
from runtime.saver import CheckpointSaver
from runtime.schedule import learning_rate_at
from runtime.start import settle_dtype, start_run, taken_from_checkpoint, tell_taken
from runtime.tokenizer import Tokenizer


def train(model_class, config, model_args, processes, stop, folder):
    """Train a model_class by a TrainConfig, in this process of several. See launch."""
    device = processes.device
    dtype = pick_dtype(config.dtype, device.type)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision('high')  # tf32

    # the state to begin with: new, from a checkpoint, or with GPT-2's weights
    config = resolve_init_from(config, model_class.model_type)
    state = start_run(model_class, config, model_args, dtype, processes)
    config, dtype = settle_dtype(config, state, dtype, processes)
    model, data, optimizer, scaler = state.model, state.data, state.optimizer, state.scaler
    compiled, note = pick_compile(config.compile, device)
    peak = peak_flops(device, dtype)
    state.notes += [note] if note else []
    net = processes.wrap(model, compiled)

    # all checks have passed: take the folder, then batches, log, checkpoints
    folder.claim(state.damaged)
    batches = Batches(data, config.batch_size, model.config.block_size,
                      model.config.vocab_size, config.seed, device)
    log = RunLog(config, state, folder, processes)
    saver = CheckpointSaver(state, data.tokenizer, config, folder, processes, log)
    pending = PendingLosses(processes, config.learning_rate)
    micro_steps = config.gradient_accumulation_steps // processes.size  # of this process
    sequences_per_iter = config.gradient_accumulation_steps * config.batch_size
    tokens_per_iter = sequences_per_iter * model.config.block_size
    log.begin(tokens_per_iter, dtype, compiled)

    while not (stopped := pending.asks_at(state.iter_num) and processes.any(stop.requested)):
        lr = learning_rate_at(state.iter_num, config)
        for group in optimizer.param_groups:
            group['lr'] = lr

        # evaluate, and save what is worth it
        is_final = state.iter_num >= config.max_iters or config.eval_only
        if is_final or state.iter_num % config.eval_interval == 0:
            pending.settle()
            losses = estimate_loss(model, batches, config, dtype, processes, log)
            check_finite('the loss in training and validation', state.iter_num,
                         [losses['train_loss'], losses['val_loss']], config.learning_rate)
            if state.iter_num == 0 < config.max_iters and not state.resumed_from:
                folder.archive_earlier_run(log)  # a new run, which has gone well so far
            row = {'iter': state.iter_num, **losses, 'lr': lr}
            log.record(row)
            saved = saver.after_evaluation(losses['val_loss'])
            log.evaluation(row, saved)
            n_evaluations = state.iter_num // config.eval_interval
            samples = config.sample_interval and n_evaluations % config.sample_interval == 0
            if samples and processes.is_first:
                log.sample(state.iter_num, sample_text(model, data.tokenizer, config.seed))
            pending.restart_clock()
            if not is_final and saver.is_out_of_patience():
                is_final = True
        if is_final:
            break

        # forward and backward, one micro-batch after the other
        loss_sum = torch.zeros(1 + model.n_predictions, device=device)  # all heads, and each
        first_number = state.iter_num * config.gradient_accumulation_steps + processes.rank
        for micro_step in range(micro_steps):
            x, y = batches.draw('train', TRAINING, first_number + micro_step * processes.size)
            processes.gradient_sync(net, now=micro_step == micro_steps - 1)
            with processes.autocast(dtype):
                loss = net(x, y)[1] / micro_steps
            scaler.scale(loss).backward()
            loss_sum[0] += loss.detach()
            if model.n_predictions > 1:
                loss_sum[1:] += model.head_losses / micro_steps

        # clip the gradient and step
        if config.grad_clip:
            scaler.unscale_(optimizer)
            grad_norm = whole(
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        pending.add(state.iter_num, loss_sum)

        # log
        if state.iter_num % config.log_interval == 0:
            (loss, *head_losses), seconds = pending.settle()
            row = {'iter': state.iter_num, 'loss': loss, **by_head('loss', head_losses),
                   'lr': lr, 'ms_per_iter': seconds * 1e3,
                   'tokens_per_second': tokens_per_iter / seconds}
            row |= {'grad_norm': grad_norm.item()} if config.grad_clip else {}
            if peak:
                row['mfu'] = model.estimate_mfu(sequences_per_iter / processes.size, seconds, peak)
            log.iteration(row)
        state.iter_num += 1
        log.bar.update()

    # end well: a run that a signal stopped is saved too
    log.bar.close()
    if stopped:
        pending.settle()
        check_finite('the largest weight', state.iter_num,
                     [processes.max_abs(model.parameters())], config.learning_rate)
        saved = saver.at_stop()
        hint = '; go on with --init_from=resume' if saved or state.resumed_from else ''
        log.say(f'stopped before iteration {state.iter_num}{saved}{hint}')
    log.close()
    saver.check_saved()
    seconds = pending.median_seconds()
    return Result(model, data.tokenizer, device, state.metrics, seconds * 1e3,
                  tokens_per_iter / seconds, stopped)


def launch(model_class, config, model_args):
    """Join the processes, take out_dir, and train. model_args are the model settings that were
    asked for; the data and the class decide the others. Returns a Result. Raises UserError for
    what is wrong, before anything is written, and for a loss that is not finite."""
    # train returns, and DDP is gone, before the process group ends: else they wait for each other
    with (join_processes(config) as processes, StopSignal() as stop,
          RunFolder(config, model_class.model_type, processes) as folder):
        return train(model_class, config, model_args, processes, stop, folder)


@torch.no_grad()
def estimate_loss(model, batches, config, dtype, processes, log):
    """Mean loss of each split over the same eval_iters batches every time, in nats. Each process
    takes its share. The loss is that of the next token. Where there are more heads, theirs stand
    beside it, over the positions at which they learn."""
    model.eval()
    losses = {}
    # as many batches in each process: with fsdp all take every one together
    n_batches = config.eval_iters + -config.eval_iters % processes.size
    for split in SPLITS:
        total = torch.zeros(2, model.n_predictions, device=processes.device)
        for number in range(processes.rank, n_batches, processes.size):
            log.progress(f'{split} loss, batch {number + 1} of {config.eval_iters}')
            x, y = batches.draw(split, EVALUATION, number)
            with processes.autocast(dtype):
                batch_losses, shares = model.losses(x, y)
            if number < config.eval_iters:  # what is too many does not count
                total += torch.stack((batch_losses * shares, shares))
        mean = [loss / share if share else 0.0 for loss, share in zip(*processes.mean(total))]
        losses |= {f'{split}_loss': mean[0]} | by_head(f'{split}_loss', mean)
    model.train()
    return losses


@dataclass
class TrainConfig:
    out_dir: str = 'out'  # where checkpoint, metrics and the picture of the losses go
    eval_interval: int = 2000  # iterations between evaluations; each may write a checkpoint
    log_interval: int = 1  # iterations between lines in the log
    eval_iters: int = 200  # batches per evaluation and split
    eval_only: bool = False  # evaluate once and stop, writing nothing
    always_save_checkpoint: bool = True  # after every evaluation, not only after the best so far
    keep_checkpoints: int = 1  # of each kind; the older ones are ckpt.pt.1, ckpt.pt.2 and so on
    sample_interval: int = 0  # evaluations between samples in the log; 0: none
    patience: int = 0  # evaluations without a better val loss after which it stops; 0: never
    init_from: str = 'scratch'  # 'scratch', 'resume', 'auto' (resume if there is something); for a
                                # new run a checkpoint, an out_dir, 'gpt2-xl', a GPT-2's directory
    wandb_log: bool = False  # log to Weights & Biases too
    wandb_project: str = 'owt'  # its project
    wandb_run_name: str = 'gpt2'  # its name for this run
    wandb_entity: str = ''  # the user or team there; '': your own
    tensorboard_log: bool = False  # log to TensorBoard too, in out_dir/tensorboard
    dataset: str = 'openwebtext'  # the folder in data/ with the bins, or the path of one
    gradient_accumulation_steps: int = 5 * 8  # micro-batches per iteration, of all processes
    batch_size: int = 12  # sequences in a micro-batch
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # 'muon': for the matrices of the blocks, and
                                                   # AdamW for the rest, in fewer iterations
    learning_rate: float = 6e-4  # highest learning rate
    max_iters: int = 600000  # optimizer steps in all
    weight_decay: float = 1e-1  # on matrices and embeddings
    beta1: float = 0.9  # AdamW's decay of the mean
    beta2: float = 0.95  # AdamW's decay of the variance
    grad_clip: float = 1.0  # clip the gradient's norm at this value, 0 for never
    decay_lr: bool = True  # warm up and decay the learning rate; else it is constant
    warmup_iters: int = 2000  # iterations of linear warm-up
    lr_schedule: Literal['cosine', 'wsd', 'linear', 'constant'] = 'cosine'  # after warm-up; 'wsd':
                                                             # constant, but for the last fifth
    lr_decay_iters: int = 600000  # where the decay ends, about max_iters
    min_lr: float = 6e-5  # learning rate at the end, about learning_rate / 10
    gradient_checkpointing: bool = False  # compute each block twice, to save memory
    parallel: Literal['ddp', 'fsdp'] = 'ddp'  # 'fsdp': each process holds a part of the model,
                                              # for models past one GPU's memory
    backend: str = 'auto'  # between processes: 'nccl', 'gloo' or 'auto', which is nccl on GPUs
    device: str = 'auto'  # 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'
    dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # autocast; 'auto': bfloat16
                                             # on a GPU that has it, and where a CPU gains by it
    compile: Literal[True, False, 'auto'] = 'auto'  # torch.compile; 'auto': on a GPU
    seed: int = 1337  # decides weights, data order and dropout

    def __post_init__(self):
        check_least(self, eval_interval=1, log_interval=1, eval_iters=1,
                    gradient_accumulation_steps=1, batch_size=1, max_iters=0, learning_rate=0,
                    min_lr=0, weight_decay=0, grad_clip=0, warmup_iters=0, lr_decay_iters=0,
                    seed=0, keep_checkpoints=1, sample_interval=0, patience=0)
        if self.keep_checkpoints > 1000:
            raise ValueError(f'keep_checkpoints={self.keep_checkpoints} must be at most 1000')
        for key in ('out_dir', 'dataset'):
            if not getattr(self, key):
                raise ValueError(f'{key} is empty: give a folder')
        for key in ('beta1', 'beta2'):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)} must be at least 0 and below 1')
        known = (*GPT2_NAMES, 'scratch', 'resume', 'auto')
        if self.init_from not in known and not os.path.exists(self.init_from):
            raise ValueError(f"init_from={self.init_from!r} must be 'scratch', 'resume', 'auto', a "
                             f"checkpoint, an out_dir, {', '.join(GPT2_NAMES)} or the directory of "
                             'a Hugging Face GPT-2')
        if self.sample_interval and self.parallel == 'fsdp':
            raise ValueError(f"sample_interval={self.sample_interval} is not for parallel='fsdp', "
                             'where no process has the whole model: leave it out')


@dataclass
class Result:
    """What a run leaves behind. Times leave evaluations out."""
    model: torch.nn.Module
    tokenizer: Tokenizer
    device: torch.device
    history: list  # the dictionaries of metrics.jsonl
    ms_per_iter: float  # median over the logged stretches
    tokens_per_second: float  # of all processes together
    stopped: bool  # by a signal, before max_iters


def main(model_class=GPT, **defaults):
    def read(**taken):  # nanoGPT trains without biases, though its GPTConfig has them
        return configure(sys.argv[1:], TrainConfig, model_class.config_class,
                         elsewhere=keys_elsewhere(model_class),
                         **{'bias': False} | defaults | taken)
    config, model_args = read()
    path, taken = taken_from_checkpoint(config, model_class.model_type)
    if taken:
        before, (config, model_args) = config, read(**taken)
        tell_taken(path, taken, before, config)
    launch(model_class, config, model_args)


if __name__ == '__main__':
    run(main)
