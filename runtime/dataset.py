"""
Token bins: data/<name>/train.bin and val.bin, flat files of uint16 token ids. They are
memory-mapped, so their size does not matter. meta.pkl lies beside them if tokens are characters.
"""

import os
import pickle
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from configurator import UserError

import numpy as np

from runtime.tokenizer import Tokenizer, dataset_tokenizer

DATA = Path(__file__).resolve().parents[1] / 'data'
CHECK_WHOLE = 100_000_000  # bytes; of a larger bin a sample is checked, and then each batch
SPLITS = ('train', 'val')


def write_splits(folder, train_ids, val_ids, chars=None):
    """Write train.bin, val.bin and, for a character vocabulary, meta.pkl into folder. Print what
    they hold."""
    contents = {f'{split}.bin': np.array(ids, dtype=np.uint16).tobytes()
                for split, ids in zip(SPLITS, (train_ids, val_ids))}
    if chars is not None:
        meta = {'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
                'stoi': {char: i for i, char in enumerate(chars)}}
        contents['meta.pkl'] = pickle.dumps(meta)
    for name, content in contents.items():
        partial = Path(folder) / f'{name}.partial'
        partial.write_bytes(content)
        os.replace(partial, Path(folder) / name)
    print(f'tokens     {len(train_ids):,} in train.bin, {len(val_ids):,} in val.bin')


@dataclass
class Data:
    train: np.ndarray  # uint16, memory-mapped
    val: np.ndarray
    tokenizer: Tokenizer
    folder: Path
    name: str = ''  # what the user calls it

    def check(self, block_size, vocab_size):
        """Raise UserError if a split is not longer than block_size or holds an id at or above
        vocab_size."""
        for split in SPLITS:
            tokens, path = getattr(self, split), self.folder / f'{split}.bin'
            if len(tokens) <= block_size:
                raise UserError(f'block_size={block_size} is too long for {path}, which has '
                                f'{len(tokens):,} tokens: use a block_size below that')
            sample = [tokens]
            if tokens.nbytes > CHECK_WHOLE:
                starts = np.linspace(0, len(tokens) - 1024, 1000, dtype=np.int64)
                sample = [tokens[i:i + 1024] for i in starts]
            check_ids(max(part.max() for part in sample), vocab_size, path)


def check_ids(largest, vocab_size, path):
    if largest >= vocab_size:
        raise UserError(f'{path} holds token id {largest}, which vocab_size={vocab_size} does not '
                        'allow: the data was prepared for another vocabulary, so prepare it again '
                        'or set vocab_size')


def data_folder(name):
    """data/<name>, or the folder at the path name if there is none in data/."""
    return DATA / name if (DATA / name).is_dir() else Path(name)


def open_data(name):
    """Open the bins in data_folder(name) as Data. Raises UserError if one is missing or
    damaged."""
    try:
        folder = data_folder(name)
        is_folder = folder.is_dir()
    except OSError as e:
        raise UserError(f'dataset={name} cannot be opened: {e.strerror}') from None
    if not is_folder:
        known = ', '.join(sorted(path.parent.name for path in DATA.glob('*/prepare.py')))
        raise UserError(f'dataset={name}: there is no folder {DATA / name}; known are {known}')
    prepare = folder / 'prepare.py'
    again = f'python {prepare}' if prepare.exists() else 'the prepare.py of the data'
    bins = {}
    for split in SPLITS:
        path = folder / f'{split}.bin'
        if not path.is_file():
            raise UserError(f'dataset={name}: {path} is missing: run {again} first')
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise UserError(f'{path} has {size:,} bytes, which is not a row of uint16 tokens: run '
                            f'{again} again')
        bins[split] = np.memmap(path, dtype=np.uint16, mode='r')
    return Data(**bins, tokenizer=dataset_tokenizer(folder), folder=folder, name=str(name))


def count_windows(n_tokens, block_size):
    """The windows of an epoch: as many as fit behind any offset below block_size."""
    return max(1, n_tokens // block_size - 1)


@lru_cache(maxsize=4)
def window_starts(n_tokens, block_size, seed, epoch):
    """Where the windows of an epoch start: end to end from a random offset, in random order."""
    rng = np.random.default_rng((*seed, epoch))
    n_windows = count_windows(n_tokens, block_size)
    offset = rng.integers(min(block_size, n_tokens - n_windows * block_size))
    return offset + block_size * rng.permutation(n_windows)


def draw_batch(tokens, batch_size, block_size, seed, number):
    """Batch number of an endless row of them. Its windows of the tokens are each seen once before
    any is seen again, in an order that seed, a tuple of whole numbers, decides. Returns inputs and
    the tokens that follow them, two int64 arrays (batch_size, block_size)."""
    n_windows = count_windows(len(tokens), block_size)
    epochs, places = np.divmod(number * batch_size + np.arange(batch_size), n_windows)
    starts = {epoch: window_starts(len(tokens), block_size, seed, epoch)
              for epoch in set(epochs.tolist())}
    starts = np.array([starts[epoch][place] for epoch, place in zip(epochs.tolist(), places)])
    windows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    # contiguous arrays copy to a GPU at once
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
