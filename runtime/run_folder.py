"""A run's folder, which is its alone, and the signals that ask it to stop."""

import itertools
import json
import os
import signal
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from configurator import UserError

from runtime.checkpoint import checkpoint_path, latest_path, run_checkpoints
from runtime.lock import locked


def kind_path(out_dir, name, model_type):
    """Where a run keeps a file of its own in out_dir, named as its checkpoint is: for mla
    metrics.jsonl becomes metrics_mla.jsonl."""
    path = Path(out_dir) / name
    return path if model_type == 'gpt' else path.with_stem(f'{path.stem}_{model_type}')


def newest_metrics(out_dir, model_type):
    """The last value of each key in a run's metrics.jsonl, which another process may be writing; {}
    where there is none."""
    newest = {}
    with suppress(OSError), open(kind_path(out_dir, 'metrics.jsonl', model_type)) as f:
        for line in f:
            newest |= json.loads(line) if line.endswith('\n') else {}
    return newest


class RunFolder:
    """The out_dir of a run. As a context it keeps other runs out until it ends.

    A folder that exists is locked before anything in it is read. A new one is made by claim(),
    after all checks have passed. eval_only and all processes but the first write nothing and lock
    nothing.
    """

    def __init__(self, config, model_type, processes):
        self.out_dir, self.model_type, self.processes = config.out_dir, model_type, processes
        self.writes = processes.is_first and not config.eval_only
        self.checkpoint = checkpoint_path(self.out_dir, model_type)
        self.latest = latest_path(self.checkpoint)
        self.metrics = kind_path(self.out_dir, 'metrics.jsonl', model_type)
        self.picture = kind_path(self.out_dir, 'loss.png', model_type)
        self.tensorboard = Path(self.out_dir) / 'tensorboard' / model_type
        self.held = ExitStack()
        self.existed = os.path.isdir(self.out_dir)

    def __enter__(self):
        try:
            if self.writes and self.existed:
                self.lock()
            self.processes.barrier()
        except BaseException:
            self.held.close()
            raise
        return self

    def __exit__(self, *_):
        self.held.close()

    def lock(self):
        # torchrun may start new processes before the old ones are gone
        restarted = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0'
        self.held.enter_context(locked(self.out_dir, patience=30 if restarted else 0))

    def claim(self, damaged):
        """Take the folder, now that nothing can go wrong any more, and put damaged checkpoints,
        pairs of a path and a line, aside. Raises UserError if another run has taken it."""
        if not self.writes:
            return
        if not self.existed:
            self.lock()
            if run_checkpoints(self.out_dir, self.model_type):
                raise UserError(f'out_dir={self.out_dir} has been taken by another run meanwhile: '
                                'give another')
        for path, _ in damaged:
            path.rename(f'{path}.damaged')  # it must not replace an older one that is whole

    def archive_earlier_run(self, log):
        """Move what an earlier run with this kind of model left here to a new folder in out_dir,
        and say so. Raises UserError where it cannot be moved."""
        earlier = run_checkpoints(self.out_dir, self.model_type) if self.writes else []
        if not earlier:
            return
        candidates = (Path(self.out_dir) / f'before-{number}' for number in itertools.count(1))
        archive = next(path for path in candidates if not path.exists())
        try:
            archive.mkdir()
            for path in [self.metrics, self.picture, self.tensorboard, *reversed(earlier)]:
                if path.exists():
                    target = archive / path.relative_to(self.out_dir)
                    target.parent.mkdir(exist_ok=True)
                    os.replace(path, target)
        except OSError as e:
            raise UserError(f'out_dir={self.out_dir} holds an earlier run, which cannot be moved '
                            f'to {archive} ({e.strerror}): give another') from None
        log.say(f'note: what an earlier run left here is in {archive} now')


class StopSignal:
    """A context in which SIGINT and SIGTERM ask for a stop, in place of ending the program.

    The second signal of a kind ends it at once. SIGTERM under torchrun does not: torchrun passes
    every signal on as SIGTERM, to processes that may have had it already.
    """

    def __init__(self):
        self.received = []
        self.handlers = {}

    @property
    def requested(self):
        return bool(self.received)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self.catch)
                             for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def catch(self, number, frame):
        passed_on = number == signal.SIGTERM and 'RANK' in os.environ
        if number in self.received and not passed_on:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received.append(number)
        if os.environ.get('RANK', '0') == '0':
            line = (f'\n{signal.Signals(number).name}: finishing the step, then saving; once more '
                    'stops at once\n')
            with suppress(OSError):  # nobody may be there to read it
                os.write(2, line.encode())
