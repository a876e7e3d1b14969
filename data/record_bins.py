"""What the ids in bins mean, for bins that are there already."""

import os
from pathlib import Path

from configurator import UserError

import numpy as np

from data.vocabulary import known_spec
from runtime.dataset import SPLITS
from runtime.record import id_dtype, looks_like_uint32, read_record, write_record
from runtime.tokenizer import make_tokenizer

CHECK_WHOLE = 100_000_000  # bytes; of a larger bin a sample is checked
RECORDS = ('meta.pkl', 'meta.json')


def record_bins(config):
    """Note beside the bins in config.out_dir that their ids are those of config.tokenizer. Raises
    UserError if they cannot be, or if another tokenizer is noted already."""
    out_dir = Path(config.out_dir)
    lacking = [f'{split}.bin' for split in SPLITS if not (out_dir / f'{split}.bin').is_file()]
    if lacking:
        raise UserError(f'out_dir={out_dir} has no {" and no ".join(lacking)}: give --source, the '
                        'texts to make them of')
    if config.tokenizer in ('chars', 'bpe'):
        raise UserError(f'tokenizer={config.tokenizer} is not known from the bins: give gpt2, the '
                        'path of a tokenizer.json, or unknown, or make the bins with --source')
    is_unknown = config.tokenizer == 'unknown'
    spec = {'unknown': config.vocab_size} if is_unknown else known_spec(config.tokenizer)
    tokenizer = make_tokenizer(spec)
    for name in RECORDS:
        if (out_dir / name).exists() and read_record(out_dir)[0] != tokenizer:
            raise UserError(f'{out_dir / name} says that the ids are {read_record(out_dir)[0].name}'
                            f', and not {tokenizer.name}: if that is wrong, move it away')
    dtype = bins_dtype(out_dir / 'train.bin', tokenizer)
    for split in SPLITS:
        tokens = check_bin(out_dir / f'{split}.bin', tokenizer, dtype)
        text = '' if is_unknown else repr(tokenizer.decode(tokens[:400].tolist())[:80])
        print(f'{split + ".bin":<11}{len(tokens):,} tokens{text and ": " + text}')
    write_record(out_dir, tokenizer, dtype)
    print(f'recorded   the ids are {tokenizer.name}, {dtype}')


def bins_dtype(path, tokenizer):
    """The dtype of the ids in the bin at path. Small ids may have been written as uint32 too."""
    if os.path.getsize(path) % 4 == 0 and looks_like_uint32(np.memmap(path, dtype=np.uint16)):
        return np.dtype(np.uint32)
    return id_dtype(tokenizer.n_vocab)


def check_bin(path, tokenizer, dtype):
    """The ids in the bin at path. Raises UserError if they cannot be the tokenizer's."""
    n_bytes = os.path.getsize(path)
    if not n_bytes or n_bytes % dtype.itemsize:
        raise UserError(f'{path} has {n_bytes:,} bytes, which is not a row of {dtype} ids, as '
                        f'{tokenizer.n_vocab:,} ids have: give another --tokenizer')
    tokens = np.memmap(path, dtype=dtype, mode='r')
    sample = tokens
    if n_bytes > CHECK_WHOLE:
        starts = np.linspace(0, len(tokens) - 1024, 1000, dtype=np.int64)
        sample = np.concatenate([tokens[i:i + 1024] for i in starts])
    if sample.max() >= tokenizer.n_vocab:
        raise UserError(f'{path} holds id {sample.max()}, but the tokenizer has ids below '
                        f'{tokenizer.n_vocab}: give the --tokenizer that it was made with')
    return tokens
