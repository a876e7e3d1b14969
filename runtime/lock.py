"""One program at a time in a folder. The system takes the lock back however the program ends."""

import os
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from configurator import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextmanager
def locked(out_dir, patience=0):
    """Make the folder out_dir, and keep others out of it meanwhile. Raises UserError if another
    program is in it and stays there for patience seconds, or if it cannot be written to."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        f = open(Path(out_dir) / '.lock', 'a+')
    except OSError as e:
        raise UserError(f'out_dir={out_dir} cannot be written to ({e.strerror}): give another'
                        ) from None
    if fcntl:
        os.register_at_fork(after_in_child=f.close)  # else a child that lives on keeps the lock
    with f:
        if fcntl:
            wait_for_lock(f, out_dir, patience)
        with suppress(OSError):  # on a full disk nobody learns whose it is
            f.truncate(0)
            os.write(f.fileno(), f'process {os.getpid()} on {socket.gethostname()}'.encode())
        yield


def wait_for_lock(f, out_dir, patience):
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                f.seek(0)
                owner = f.read().strip() or 'unknown'
                raise UserError(f'out_dir={out_dir} is in use by another run ({owner}): wait for '
                                'it, or give another') from None
            time.sleep(0.5)
        except OSError:  # a file system without locks
            return None
