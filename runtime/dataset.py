"""
Token bins: data/<name>/train.bin and val.bin, flat files of token ids of 16 or 32 bits. They are
memory-mapped, so their size does not matter. A record beside them says what the ids mean.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from configurator import UserError

import numpy as np

from runtime.record import (
    id_dtype,
    looks_like_uint32,
    read_record,
    read_sequence,
    write_file,
    write_record,
)
from runtime.tokenizer import CharTokenizer, Tokenizer

DATA = Path(__file__).resolve().parents[1] / 'data'
CHECK_WHOLE = 100_000_000  # bytes; of a larger bin a sample is checked, and then each batch
SPLITS = ('train', 'val')
NO_ID = 2 ** 31 - 1  # what an id past its vocabulary is translated to: no model takes it


def write_splits(folder, train_ids, val_ids, tokenizer, sequence=None):
    """Write train.bin, val.bin and the record of their tokenizer into folder. Print what they
    hold. sequence is how many tokens each sequence has, where the ids are sequences end to end."""
    write_record(folder, tokenizer, sequence=sequence)
    for split, ids in zip(SPLITS, (train_ids, val_ids)):
        content = np.asarray(ids).astype(id_dtype(tokenizer.n_vocab)).tobytes()
        write_file(Path(folder) / f'{split}.bin', content)
    print(f'tokens     {len(train_ids):,} in train.bin, {len(val_ids):,} in val.bin')


@dataclass
class Data:
    train: np.ndarray  # uint16 or uint32, memory-mapped
    val: np.ndarray
    tokenizer: Tokenizer
    folder: Path
    name: str = ''  # what the user calls it
    sequence: int | None = None  # tokens in each of the sequences that the bins hold; None: a text

    def largest_id(self):
        """The largest id in what check() looks at."""
        return max(sampled(getattr(self, split)).max() for split in SPLITS)

    def check(self, block_size, vocab_size):
        """Raise UserError if a split is not longer than block_size, or holds an id at or above
        vocab_size or sequences of another length."""
        if self.sequence and self.sequence != block_size + 1:
            raise UserError(f'block_size={block_size} does not suit {self.folder}, whose sequences '
                            f'have {self.sequence} tokens each: give --block_size='
                            f'{self.sequence - 1}')
        for split in SPLITS:
            tokens, path = getattr(self, split), self.folder / f'{split}.bin'
            if len(tokens) <= block_size:
                raise UserError(f'block_size={block_size} is too long for {path}, which has '
                                f'{len(tokens):,} tokens: use a block_size below that')
            check_ids(sampled(tokens).max(), vocab_size, path)


def sampled(tokens):
    """All tokens of a small bin, and of a large one some from all over it."""
    if tokens.nbytes <= CHECK_WHOLE:
        return tokens[:]
    starts = np.linspace(0, len(tokens) - 1024, 1000, dtype=np.int64)
    return tokens[starts[:, None] + np.arange(1024)]


def check_ids(largest, vocab_size, path):
    if largest >= vocab_size:
        raise UserError(f'{path} holds token id {largest}, which vocab_size={vocab_size} does not '
                        'allow: the data was prepared for another vocabulary, so prepare it again '
                        'or set vocab_size')


@dataclass
class Translated:
    """Tokens in the ids of another vocabulary."""
    tokens: np.ndarray
    ids: np.ndarray  # for each id of the tokens that of the other vocabulary, and NO_ID

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, places):
        return self.ids[np.minimum(self.tokens[places], len(self.ids) - 1)]

    @property
    def nbytes(self):
        return self.tokens.nbytes


def translate(data, tokenizer, key='dataset'):
    """data with the ids of tokenizer, which must have all its characters. key is what the program
    calls data. Raises UserError where the ids mean something else."""
    ours, what = data.tokenizer, f'{key}={data.name}'
    if ours == tokenizer or not (ours.knows_text or tokenizer.knows_text):
        return data
    if not tokenizer.knows_text:
        raise UserError(f"{what} holds {ours.name}, and the model's are {tokenizer.name}: use the "
                        'data that it was trained on')
    if not ours.knows_text:
        raise UserError(f'{what} does not say what its ids mean. {record_remedy(data, tokenizer)}')
    if not (isinstance(ours, CharTokenizer) and isinstance(tokenizer, CharTokenizer)):
        raise UserError(f'{what} has another vocabulary, {ours.name}, than the model, '
                        f'{tokenizer.name}: prepare its text with {as_option(tokenizer)}')
    ids = {entry: i for i, entry in enumerate(tokenizer.spec)}
    missing = [repr(entry) for entry in ours.spec if entry not in ids]
    if missing:
        more = f' and {len(missing) - 20:,} others' if len(missing) > 20 else ''
        raise UserError(f"{what} has {', '.join(missing[:20])}{more}, which the model's vocabulary "
                        f'of {tokenizer.name} lacks: take them out of the text')
    for split in SPLITS:
        check_ids(sampled(getattr(data, split)).max(), ours.n_vocab, data.folder / f'{split}.bin')
    ids = np.array([*(ids[entry] for entry in ours.spec), NO_ID])
    return replace(data, train=Translated(data.train, ids), val=Translated(data.val, ids),
                   tokenizer=tokenizer)


def note_on_unknown_ids(data, tokenizer, own_dataset):
    """A line where neither other data than a model's own nor the model says what its ids mean, else
    ''."""
    if data.tokenizer.knows_text or tokenizer.knows_text or same_data(data, own_dataset):
        return ''
    return (f'neither {data.folder} nor the model says what its ids mean: they are taken to mean '
            'the same')


def record_remedy(data, tokenizer):
    """How to record that the ids of data are those of tokenizer, in words."""
    return (f'If they are {tokenizer.name}, record that: python data/prepare.py '
            f'--out_dir={data.folder} {as_option(tokenizer)}')


def as_option(tokenizer):
    """How data/prepare.py is given a tokenizer, in words."""
    if tokenizer.spec == 'gpt2':
        return '--tokenizer=gpt2'
    return '--tokenizer=FOLDER, where FOLDER has bins of that vocabulary'


def data_folder(name):
    """data/<name>, or the folder at the path name if there is none in data/."""
    return DATA / name if (DATA / name).is_dir() else Path(name)


def same_data(data, name):
    """Whether name is that of data, however it is written."""
    return name != '' and data_folder(name).resolve() == data.folder.resolve()


def open_data(name):
    """Open the bins in data_folder(name) as Data. Raises UserError if one is missing or damaged,
    or if its ids look wider than is recorded."""
    try:
        folder = data_folder(name)
        is_folder = folder.is_dir()
    except OSError as e:
        raise UserError(f'dataset={name} cannot be opened: {e.strerror}') from None
    if folder.is_file():
        raise UserError(f'dataset={name} is a file: python data/prepare.py --source={name} '
                        f'--out_dir={DATA.name}/{folder.stem} --tokenizer=chars makes '
                        f'--dataset={folder.stem} of a text')
    if not is_folder:
        known = {path.parent.name for file in ('prepare.py', 'train.bin')
                 for path in DATA.glob(f'*/{file}')}
        raise UserError(f'dataset={name}: there is no folder {DATA / name}; known are '
                        f"{', '.join(sorted(known))}; python data/prepare.py makes another of your "
                        'text')
    prepare = folder / 'prepare.py'
    again = f'python {prepare if prepare.exists() else "data/prepare.py"}'
    tokenizer, dtype = read_record(folder)
    bins = {}
    for split in SPLITS:
        path = folder / f'{split}.bin'
        if not path.is_file():
            raise UserError(f'dataset={name}: {path} is missing: run {again} first')
        size = path.stat().st_size
        if size == 0 or size % dtype.itemsize:
            raise UserError(f'{path} has {size:,} bytes, which is not a row of {dtype} tokens: run '
                            f'{again} again')
        bins[split] = np.memmap(path, dtype=dtype, mode='r')
        if tokenizer.spec == {'unknown': None} and looks_like_uint32(bins[split]):
            raise UserError(f'{path} looks like ids of 32 bits: say what they are with python '
                            f'data/prepare.py --out_dir={folder} --tokenizer=unknown '
                            '--vocab_size=100000, for instance')
    return Data(**bins, tokenizer=tokenizer, folder=folder, name=str(name),
                sequence=read_sequence(folder))


def count_windows(n_tokens, block_size, sequence=None):
    """The windows of an epoch: as many as fit behind any offset below block_size, or as there are
    sequences."""
    return max(1, n_tokens // sequence if sequence else n_tokens // block_size - 1)


@lru_cache(maxsize=4)
def window_starts(n_tokens, block_size, seed, epoch, sequence=None):
    """Where the windows of an epoch start, in random order: end to end from a random offset, or
    where the sequences do."""
    rng = np.random.default_rng((*seed, epoch))
    n_windows = count_windows(n_tokens, block_size, sequence)
    if sequence:
        return sequence * rng.permutation(n_windows)
    offset = rng.integers(min(block_size, n_tokens - n_windows * block_size))
    return offset + block_size * rng.permutation(n_windows)


def draw_batch(tokens, batch_size, block_size, seed, number, sequence=None):
    """Batch number of an endless row of them. Its windows of the tokens are each seen once before
    any is seen again, in an order that seed, a tuple of whole numbers, decides. Where the tokens
    are sequences of block_size + 1 each, the windows are those. Returns inputs and the tokens that
    follow them, two int64 arrays (batch_size, block_size)."""
    n_windows = count_windows(len(tokens), block_size, sequence)
    epochs, places = np.divmod(number * batch_size + np.arange(batch_size), n_windows)
    starts = {epoch: window_starts(len(tokens), block_size, seed, epoch, sequence)
              for epoch in set(epochs.tolist())}
    starts = np.array([starts[epoch][place] for epoch, place in zip(epochs.tolist(), places)])
    windows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)
    # contiguous arrays copy to a GPU at once
    return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])
