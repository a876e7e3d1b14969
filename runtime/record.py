"""
What the ids in a folder of bins mean and how wide they are: recorded beside the bins, never
guessed.

meta.pkl has the characters or words of a vocabulary, in nanoGPT's form. Any other tokenizer is in
meta.json, {"tokenizer": spec, "dtype": "uint16"}. Ids of a vocabulary past 65,535 are uint32.
Either may have "sequence": then the bins are no text but sequences of that many tokens, end to end.
"""

import json
import os
import pickle
from pathlib import Path

from configurator import UserError

import numpy as np

from runtime.tokenizer import is_spec, make_tokenizer

LARGEST_HIGH_HALF = 32  # of a uint32 id, for vocabularies of up to two million


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries, and refuses whatever could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(
            f'it holds {module}.{name}, and only numbers, texts, lists and dictionaries are read, '
            'since others can run code: save it again with int() and str() of what it holds')


def id_dtype(n_vocab):
    """The dtype of ids below n_vocab. 65,536 are too many for uint16, as in nanoGPT's forks."""
    return np.dtype(np.uint16 if n_vocab <= 65_535 else np.uint32)


def write_record(folder, tokenizer, dtype=None, sequence=None):
    """Record in folder what the ids of its bins mean, their dtype (default: id_dtype's), and the
    tokens in a sequence where the bins hold sequences."""
    own = {'sequence': sequence} if sequence else {}
    if isinstance(tokenizer.spec, list):
        name, other = 'meta.pkl', 'meta.json'
        content = pickle.dumps({'vocab_size': tokenizer.n_vocab,
                                'itos': dict(enumerate(tokenizer.spec)),
                                'stoi': {entry: i for i, entry in enumerate(tokenizer.spec)},
                                **own})
    else:
        name, other = 'meta.json', 'meta.pkl'
        dtype = np.dtype(dtype or id_dtype(tokenizer.n_vocab)).name
        content = json.dumps({'tokenizer': tokenizer.spec, 'dtype': dtype, **own}).encode()
    write_file(Path(folder) / name, content)
    (Path(folder) / other).unlink(missing_ok=True)


def write_file(path, content):
    """Write a file that has its name only once it is complete."""
    partial = path.with_name(f'{path.name}.partial')
    partial.write_bytes(content)
    os.replace(partial, path)


def read_record(folder):
    """(Tokenizer, dtype) of the bins in folder. Without a record the tokenizer is unknown, and the
    dtype is nanoGPT's, uint16. Raises UserError."""
    found = []
    for name, read in (('meta.pkl', read_pickle), ('meta.json', read_json)):
        path = Path(folder) / name
        if not path.exists():
            continue
        try:
            spec, dtype = read(path)
            if not is_spec(spec):
                raise ValueError('its vocabulary is of no known form')
            tokenizer = make_tokenizer(spec)
            found.append((tokenizer, np.dtype(dtype or id_dtype(tokenizer.n_vocab))))
        except Exception as e:  # a damaged pickle can raise nearly anything
            kind = '' if isinstance(e, (pickle.UnpicklingError, UserError, ValueError)) else (
                f'{type(e).__name__}: ')
            raise UserError(f'{path} cannot be used ({kind}{str(e)[:300]}): put it right, or move '
                            'it away, and the ids count as unknown') from None
    if len(found) == 2 and found[0] != found[1]:
        raise UserError(f'{Path(folder) / "meta.pkl"} says that the ids are {found[0][0].name}, '
                        f'meta.json beside it {found[1][0].name}: move away the one that is wrong')
    return found[0] if found else (make_tokenizer({'unknown': None}), np.dtype(np.uint16))


def read_sequence(folder):
    """How many tokens a sequence in the bins in folder has; None where they hold a text. Raises
    UserError."""
    for name, load in (('meta.pkl', load_pickle), ('meta.json', load_json)):
        path = Path(folder) / name
        sequence = load(path).get('sequence') if path.exists() else None
        if sequence is not None and (type(sequence) is not int or sequence < 2):
            raise UserError(f'{path} has sequence={sequence!r}, which must be a whole number of 2 '
                            'or more: put it right')
        if sequence:
            return sequence
    return None


def load_pickle(path):
    with open(path, 'rb') as f:
        meta = PlainUnpickler(f).load()
    if not isinstance(meta, dict):
        raise ValueError(f'it holds a {type(meta).__name__}, not a dictionary')
    return meta


def read_pickle(path):
    """(spec, None) of nanoGPT's meta.pkl: the list in itos or, if it has none, vocab_size."""
    meta = load_pickle(path)
    itos = meta.get('itos')
    if not itos:
        if type(meta.get('vocab_size')) is not int:
            raise ValueError('it has neither itos nor vocab_size')
        return {'unknown': meta['vocab_size']}, None
    places = range(len(itos))
    if isinstance(itos, dict) and itos.keys() != set(places):
        raise ValueError(f'the keys of itos are not the ids from 0 to {len(itos) - 1}')
    return [itos[i] for i in places], None


def load_json(path):
    meta = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(meta, dict) or meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
        raise ValueError("it has no dtype 'uint16' or 'uint32'")
    return meta


def read_json(path):
    meta = load_json(path)
    spec = meta.get('tokenizer')
    return spec, meta.get('dtype')


def looks_like_uint32(tokens):
    """Whether uint16 tokens look like uint32 ids: every second one is nearly 0 though the others
    are not."""
    some = np.asarray(tokens[:200_000])
    low, high = some[::2], some[1::2]
    return len(some) > 1 and high.max() <= LARGEST_HIGH_HALF < low.max() // 4
