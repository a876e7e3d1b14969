"""Work in several processes: they end with the program, whatever ends it."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager

from runtime.progress import progress_bar


@contextmanager
def worker_pool(workers):
    # a forked child can wait for ever for a thread of Arrow's that it does not have
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(workers, spawn, follow_parent) as pool:
        yield pool


def default_workers():
    """A worker for each core that this process may use, at most twelve, which together stay under
    2 GB."""
    has_affinity = hasattr(os, 'sched_getaffinity')
    return min(12, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count())


def follow_parent():
    """Let this worker end when its parent ends in whatever way, and at Ctrl-C without a
    traceback."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_workers(pool, function, tasks, **bar):
    """Call function(*arguments) in the pool for each (arguments, amount of work) of tasks. Returns
    what it returns, in no particular order."""
    futures = {pool.submit(function, *arguments): amount for arguments, amount in tasks}
    total = sum(futures.values())
    with progress_bar(total=total, unit_scale=True, **bar) as progress:
        try:
            for future in as_completed(futures):
                future.result()
                progress.update(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
