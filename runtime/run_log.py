"""What a run tells: on the terminal, in metrics.jsonl, in loss.png, at Weights & Biases and in
TensorBoard."""

import html
import json
import math
import os
import statistics
import sys
import textwrap
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module

from configurator import UserError

import torch
from tqdm import tqdm

from models import MODELS, describe

# what the other logs call an entry of a row
WANDB_NAMES = {'loss': 'train/batch_loss', 'train_loss': 'train/loss', 'val_loss': 'val/loss',
               'grad_norm': 'train/grad_norm'}


class RunLog:
    """The log of a run. Only the first process speaks, and nothing that goes wrong here may cost
    the run."""

    def __init__(self, config, state, folder, processes):
        self.state, self.folder, self.processes = state, folder, processes
        self.is_first = processes.is_first
        self.metrics_are_whole = False  # whether the file holds all rows so far
        self.picture_failed = False  # whether a warning has said so
        self.drawn_at, self.is_drawn = -math.inf, True  # the picture, and whether it has all
        self.label = MODELS[state.model.model_type].model_class.__name__
        self.others = start_other_logs(config, state, folder) if self.is_first else []
        self.bar = tqdm(initial=state.iter_num, unit='iter', dynamic_ncols=True,
                        total=None if config.eval_only else config.max_iters,
                        leave=not config.eval_only,
                        disable=not (self.is_first and sys.stderr.isatty()))

    def begin(self, tokens_per_iter, dtype, compiled):
        """Say what is trained, and what is not as it was when the run was stopped."""
        processes = self.processes
        how = str(dtype).removeprefix('torch.')
        how += ', compiled' if compiled else ''
        how += ', sharded' if processes.sharded else ''
        self.say(f'{describe(self.state.model)}; {tokens_per_iter:,} tokens per iteration on '
                 f'{processes.size} x {processes.device.type}, {how}')
        for note in self.state.notes:
            self.say(f'note: {note}')

    def say(self, line):
        if not self.is_first:
            return
        try:
            try:
                self.write_line(line)
            except UnicodeEncodeError:
                encoding = sys.stdout.encoding or 'ascii'
                self.write_line(line.encode(encoding, 'replace').decode(encoding))
        except OSError:  # nobody reads any more, or the disk of the log is full
            sys.stdout = open(os.devnull, 'w', encoding='utf-8')

    def write_line(self, line):
        if self.bar.disable:
            print(line, flush=True)
        else:
            self.bar.write(line)

    def warn(self, line):
        self.say(f'warning: {line}')

    def progress(self, text):
        """What the progress bar says beside its count."""
        self.bar.set_postfix_str(text)

    def iteration(self, row):
        """Keep the row of metrics of an iteration, and say it. The loss that is shown is that of
        the next token, as in evaluations; that of all heads together stands beside it."""
        self.record(row)
        loss = f"loss {row.get('loss/head_1', row['loss']):.4f}"
        speed = f"{row['tokens_per_second']:,.0f} tokens/s"
        self.progress(f'{loss}, {speed}')
        if self.bar.disable:
            heads = f" | all heads {row['loss']:.4f}" if 'loss/head_1' in row else ''
            mfu = f" | mfu {row['mfu']:.1%}" if 'mfu' in row else ''
            self.say(f"iter {row['iter']:6d} | {loss}{heads} | {row['ms_per_iter']:.1f} ms | "
                     f'{speed}{mfu}')

    def evaluation(self, row, saved):
        """Say the losses of an evaluation and what was saved after it, and draw loss.png. It takes
        0.4 s, a fifth of a small run that evaluates often, so 10 s lie between two drawings."""
        self.is_drawn = not self.folder.writes
        if not self.is_drawn and time.monotonic() - self.drawn_at > 10:
            self.draw()
        self.say(f"step {row['iter']:6d} | train loss {row['train_loss']:.4f} | "
                 f"val loss {row['val_loss']:.4f}{saved}")

    def draw(self):
        """Draw loss.png. A warning is given once: the next drawing tries again."""
        self.drawn_at, self.is_drawn = time.monotonic(), True
        try:
            draw_loss(self.state.metrics, self.label, self.folder.picture)
        except Exception as e:  # it is another package's, and can raise anything
            if not self.picture_failed:
                self.warn(f'{self.folder.picture} cannot be drawn ({reason(e)}); training goes on')
            self.picture_failed = True

    def sample(self, iter_num, text):
        """Say what the model has written at an evaluation."""
        self.say(f'sample at step {iter_num}:\n' + textwrap.indent(text.strip(), '  '))
        self.tell_others({'iter': iter_num, 'sample': text})

    def record(self, row):
        """Keep a row of metrics where a person, a plot and other logs find it."""
        if self.folder.writes:
            self.state.metrics.append(row)
            self.write_metrics(row)
        if 'mfu' in row:
            row = row | {'mfu': 100 * row['mfu']}  # in percent, as nanoGPT logs it
        self.tell_others(row)

    def tell_others(self, row):
        """Write a row of numbers and texts to the other logs. One that fails gets no more."""
        values = {WANDB_NAMES.get(key, key): value for key, value in row.items()}
        for other in list(self.others):
            try:
                other.write(values, row['iter'])
            except Exception as e:  # it is another program's, and can raise anything
                self.others.remove(other)
                self.warn(f'training goes on without {other.name} ({reason(e)})')

    def write_metrics(self, row):
        """Add a row to metrics.jsonl. The first one, and one after a failure, writes all anew."""
        path = self.folder.metrics
        try:
            if self.metrics_are_whole:
                with open(path, 'a', encoding='utf-8') as f:
                    f.write(to_lines([row]))
            else:
                write_whole(path, to_lines(self.state.metrics))
                self.metrics_are_whole = True
        except OSError as e:
            self.metrics_are_whole = False
            self.warn(f'{path} cannot be written ({e.strerror}); training goes on')

    def close(self):
        """Draw losses that are not drawn yet, and end what the other logs have begun. It may take a
        minute: without a network wandb would wait for ever."""
        if not self.is_drawn:
            self.draw()
        for other in self.others:
            finish = threading.Thread(target=close_quietly, args=(other,), daemon=True)
            finish.start()
            finish.join(60)


class PendingLosses:
    """Losses of iterations that the device may still be computing. To read one is to wait for it,
    so they are read together, where the log wants them."""

    def __init__(self, processes, learning_rate):
        self.processes, self.learning_rate = processes, learning_rate
        self.pending = {}  # iter_num -> tensor of losses
        self.durations = []  # seconds per iteration, of each stretch
        self.stride = 1  # iterations from one question for signals to the next
        self.started = time.perf_counter()

    def add(self, iter_num, losses):
        self.pending[iter_num] = losses

    def asks_at(self, iter_num):
        """Whether the processes ask each other for signals before an iteration: every 10 ms, where
        iterations are shorter and are not settled one by one."""
        return iter_num % self.stride == 0

    def restart_clock(self):
        """Leave out of the next stretch what came since the last one, such as an evaluation."""
        self.started = time.perf_counter()

    def settle(self):
        """Wait for all that is pending. Returns the losses of the last iteration, their mean over
        all processes, and the seconds that each iteration took; None if nothing is pending.
        Raises UserError if the first of an iteration's losses is not finite."""
        if not self.pending:
            return None
        losses = self.processes.mean(torch.stack([*self.pending.values()]))
        for iter_num, (loss, *_) in zip(self.pending, losses):
            check_finite('the loss', iter_num, [loss], self.learning_rate)
        now = time.perf_counter()
        self.durations.append((now - self.started) / len(self.pending))
        if self.processes.size > 1 and len(self.pending) > 1:
            slowest = self.processes.max(int(self.durations[-1] * 1e6))  # all have to agree
            self.stride = max(1, 10_000 // max(1, slowest))
        self.pending, self.started = {}, now
        return losses[-1], self.durations[-1]

    def median_seconds(self):
        """Median seconds per iteration, without the first stretch, which holds the warm-up."""
        return statistics.median(self.durations[1:] or self.durations or [math.nan])


def check_finite(what, iter_num, values, learning_rate):
    """Raise UserError if one of values is not finite, before it can spoil a checkpoint."""
    if not all(map(math.isfinite, values)):
        raise UserError(f"{what} is {' and '.join(map(str, values))} in step {iter_num}, so the "
                        'run stops, and what it has saved stays: try a lower learning_rate than '
                        f'{learning_rate}')


def by_head(name, losses):
    """{'loss/head_1': ...} for a model of several heads, without those that had nothing to learn,
    whose loss is 0. Heads are counted from 1."""
    if len(losses) == 1:
        return {}
    return {f'{name}/head_{i}': loss for i, loss in enumerate(losses, start=1) if loss}


def to_lines(rows):
    """The text of a metrics.jsonl. The checkpoint holds it too, so that the two cannot part."""
    return ''.join(json.dumps(row) + '\n' for row in rows)


def write_whole(path, text):
    """Write a file that has its name only once it is complete. Raises OSError."""
    partial = path.with_suffix('.partial')
    try:
        partial.write_text(text, encoding='utf-8')
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def reason(error):
    """An exception in one line."""
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


class Wandb:
    """A run at Weights & Biases. That of a resumed run goes on: the checkpoint has its id. wandb
    itself drops rows of steps that it has."""
    name = 'wandb'

    def __init__(self, wandb, config, state, run_id):
        self.wandb = wandb
        wandb.init(project=config.wandb_project, name=config.wandb_run_name,
                   entity=config.wandb_entity or None,
                   config=asdict(config) | asdict(state.model.config),
                   id=run_id or None, resume='allow' if run_id else None)
        state.wandb_id = wandb.run.id

    def write(self, values, step):
        shown = {key: self.wandb.Html(f'<pre>{html.escape(value)}</pre>')
                 if isinstance(value, str) else value for key, value in values.items()}
        self.wandb.log(shown, step=step)

    def close(self):
        self.wandb.finish()


class TensorBoard:
    """Event files in a folder. It is opened with the first row: until then it may be an earlier
    run's, which is moved away. Rows that a stopped run did not save are purged."""
    name = 'TensorBoard'

    def __init__(self, writer_class, folder, purge_step):
        self.writer_class, self.folder, self.purge_step = writer_class, folder, purge_step
        self.writer = None

    def write(self, values, step):
        if self.writer is None:
            self.writer = self.writer_class(self.folder, purge_step=self.purge_step)
        for key, value in values.items():
            if isinstance(value, str):  # Markdown, in which an indented text stands as it is
                text = textwrap.indent(value, '    ', lambda line: True)
                self.writer.add_text(key, text, step)
            else:
                self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self):
        if self.writer is not None:
            self.writer.close()


def check_other_logs(config):
    """Raise UserError for a log that is asked for and not installed, before anything is written."""
    for key, module in (('wandb_log', 'wandb'), ('tensorboard_log', 'torch.utils.tensorboard')):
        if not getattr(config, key):
            continue
        try:
            import_module(module)
        except ImportError:
            package = key.removesuffix('_log')
            raise UserError(f'{key}=True needs {package}: pip install {package}, or use '
                            f'--{key}=False') from None


def start_other_logs(config, state, folder):
    """The logs that are asked for beside the terminal and metrics.jsonl, without one that cannot
    begin, of which a warning tells."""
    logs = []
    if config.wandb_log:
        import wandb
        try:
            # an evaluation alone is a run of its own
            run_id = state.wandb_id if folder.writes else ''
            logs.append(Wandb(wandb, config, state, run_id))
        except Exception as e:  # it is another program's, and can raise anything
            print(f'warning: training goes on without wandb ({reason(e)})', file=sys.stderr)
    if config.tensorboard_log and folder.writes:
        from torch.utils.tensorboard import SummaryWriter
        logs.append(TensorBoard(SummaryWriter, folder.tensorboard, state.iter_num))
    return logs


def close_quietly(log):
    with suppress(Exception):  # what it could not send is its own loss
        log.close()


def plot_losses(ax, metrics, label, color):
    """Draw a run's metrics: evaluated train loss (dashed) and val loss (solid) over the loss of
    each batch (faint). Further heads have a val loss each (dotted); then the other curves are
    those of the first head."""
    batches = [(row['iter'], row.get('loss/head_1', row['loss'])) for row in metrics
               if 'loss' in row]
    evaluations = [(row['iter'], row['train_loss'], row['val_loss']) for row in metrics
                   if 'val_loss' in row]
    if batches:
        ax.plot(*zip(*batches), color=color, alpha=0.3, linewidth=0.8,
                label=f"{label}, each batch's own")
    iters, train_losses, val_losses = zip(*evaluations)
    ax.plot(iters, train_losses, '--', color=color, label=f'{label}, train')
    ax.plot(iters, val_losses, '-o', color=color, markersize=3, label=f'{label}, val')
    prefix = 'val_loss/head_'
    heads = {int(key.removeprefix(prefix)) for row in metrics for key in row
             if key.startswith(prefix)}
    for i in sorted(heads - {1}):
        points = [(row['iter'], row[f'{prefix}{i}']) for row in metrics if f'{prefix}{i}' in row]
        ax.plot(*zip(*points), ':s', color=f'C{i - 1}', markersize=3,
                label=f'{label}, val, head {i}')
    ax.set(xlabel='iteration', ylabel='cross-entropy loss (nats per token)')
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend()


def draw_loss(metrics, label, path):
    """Draw loss.png. Raises OSError where it cannot be written."""
    from runtime.figures import Figure
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    ax = figure.subplots()
    plot_losses(ax, metrics, label, 'C0')
    last = [row for row in metrics if 'val_loss' in row][-1]
    ax.set_title(f"{label}: val loss {last['val_loss']:.4f} after {last['iter']:,} iterations",
                 fontsize=10)
    figure.savefig(path, dpi=130)
