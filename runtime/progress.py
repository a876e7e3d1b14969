"""The progress bar of every program but the trainer, whose log has one of its own."""

import sys

from tqdm import tqdm


def progress_bar(items=None, desc=None, disable=False, **settings):
    """tqdm's bar over items, or over a total. It is shown on a terminal alone, and goes when it is
    done. desc says what is counted."""
    hidden = disable or not sys.stderr.isatty()
    return tqdm(items, desc=desc, leave=False, disable=hidden, **settings)
