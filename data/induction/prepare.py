"""
Prepare the task on which induction heads form: random sequences in which a stretch comes twice.
Writes train.bin, val.bin and meta.pkl, which says that the bins hold sequences.

    python data/induction/prepare.py
    python data/induction/prepare.py --vocabulary=256 --out_dir=data/induction_256

A sequence is 33 characters, each drawn alike from the vocabulary. Then n of 8 to 15 characters in a
row are copied to a later place. Length, place and lag differ in every sequence. So what comes next
can only be known by looking for the last character earlier in the sequence. Characters that no copy
explains cannot be predicted.

Two other tasks are controls. They are copied without induction:

    --task=period    16 characters, over and over: the same place back in every sequence
    --task=cycle     4 to 15 characters, over and over: another number in every sequence
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import UserError, check_least, configure, run

import numpy as np

from runtime.dataset import write_splits
from runtime.tokenizer import make_tokenizer

CHARACTERS = [c for c in map(chr, range(0x21, 0x3000)) if c.isalnum() and c.isprintable()]
SHORTEST, LONGEST = 8, 15  # characters that are copied
PERIOD, LEAST_CYCLE = 16, 4


@dataclass
class InductionConfig:
    out_dir: str = ''  # where the bins go; '': beside this program
    task: Literal['stretch', 'period', 'cycle'] = 'stretch'  # what comes again
    sequences: int = 160_000  # of the train split; a sixteenth as many more are the val split
    length: int = 33  # characters in a sequence: block_size and one
    vocabulary: int = 64  # different characters
    seed: int = 1337  # of all that is drawn

    def __post_init__(self):
        check_least(self, sequences=16, length=2 * LONGEST, vocabulary=2, seed=0)
        if self.vocabulary > len(CHARACTERS):
            raise ValueError(f'vocabulary={self.vocabulary} must be at most {len(CHARACTERS)}')


def draw_sequences(task, count, length, vocabulary, seed):
    """Sequences (count, length) of ids, and which of them the ones before decide (count, length):
    those that are copied, but for the first of a stretch."""
    rng = np.random.default_rng(seed)
    ids, place = rng.integers(vocabulary, size=(count, length)), np.arange(length)
    if task == 'stretch':
        n = rng.integers(SHORTEST, LONGEST + 1, size=(count, 1))
        first = rng.integers(length - 2 * n + 1)  # the copy has room behind it
        second = rng.integers(first + n, length - n + 1)
        is_copy = (second <= place) & (place < second + n)
        source = np.where(is_copy, place - (second - first), place)
        return np.take_along_axis(ids, source, axis=1), is_copy & (place > second)
    period = PERIOD if task == 'period' else rng.integers(LEAST_CYCLE, LONGEST + 1, size=(count, 1))
    source = np.broadcast_to(place % period, ids.shape)
    # once a cycle has come round
    known = place >= period if task == 'period' else place > period
    return np.take_along_axis(ids, source, axis=1), np.broadcast_to(known, ids.shape)


def main():
    config, _ = configure(sys.argv[1:], InductionConfig)
    ids, _ = draw_sequences(config.task, config.sequences + config.sequences // 16, config.length,
                            config.vocabulary, config.seed)
    out_dir = Path(config.out_dir or HERE)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'out_dir={out_dir} cannot be written to ({e.strerror}): give another'
                        ) from None
    train, val = ids[:config.sequences].ravel(), ids[config.sequences:].ravel()
    write_splits(out_dir, train, val, make_tokenizer(CHARACTERS[:config.vocabulary]),
                 config.length)


if __name__ == '__main__':
    run(main)
