"""The tokenizer of a corpus: a known one, the characters of its text, or byte pairs learned from
it."""

import itertools
import json
import math
import os
import sys

from configurator import UserError

import numpy as np

from data.pipeline import LEAST_PARTS, whole_file
from runtime.record import read_record
from runtime.tokenizer import file_tokenizer
from runtime.workers import in_workers

END_OF_TEXT = '<|endoftext|>'
MOST_LEARNED = 1_000_000_000  # characters that byte pairs are learned from


def known_spec(name):
    """The spec of a tokenizer that does not depend on the text, None for chars and bpe. name is
    'gpt2', the path of a tokenizer.json, or a folder of bins that has a record. Raises
    UserError."""
    if name in ('chars', 'bpe'):
        return None
    if name == 'gpt2':
        return name
    if os.path.isdir(name):
        tokenizer, _ = read_record(name)
        if not tokenizer.knows_text:
            raise UserError(f'tokenizer={name} has no record of what its ids mean: give another '
                            'folder, gpt2, or the path of a tokenizer.json')
        return tokenizer.spec
    if not os.path.isfile(name):
        raise UserError(f'tokenizer={name} is neither chars, gpt2 nor bpe, and there is no such '
                        'path: give one of these, a tokenizer.json, or the folder of other bins')
    return file_tokenizer(name).spec


def write_tokenizer(path, config, pool, documents, order, cut):
    """Write the spec of config.tokenizer for the documents to path, unless an interrupted run has
    done so."""
    if path.exists():
        return
    spec = known_spec(config.tokenizer)
    if config.tokenizer == 'chars':
        spec = collect_characters(pool, documents, config.part_documents)
    elif config.tokenizer == 'bpe':
        spec = {'bpe': learn(pool, documents, order, cut, config.vocab_size)}
    with whole_file(path) as f:
        f.write(json.dumps(spec).encode())


def collect_characters(pool, documents, part_documents):
    """The sorted list of the characters of all documents and, where one must be added between two
    of them, the line break."""
    step = max(1, min(part_documents, math.ceil(len(documents) / LEAST_PARTS)))
    firsts = range(0, len(documents), step)
    tasks = [((documents, first, min(first + step, len(documents))), step) for first in firsts]
    found = in_workers(pool, characters_of, tasks, desc='characters', unit=' documents')
    return sorted(set().union(*found))


def characters_of(documents, first, end):
    """The characters of the documents from number first up to end, as a string."""
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for pieces in documents.read([(number, 0, None) for number in range(first, end)]):
        piece = '\n'
        for piece in pieces:
            seen[np.frombuffer(piece.encode('utf-32-le'), dtype='<u4')] = True
        seen[ord('\n')] |= len(documents) > 1 and not piece.endswith('\n')
    return ''.join(map(chr, np.flatnonzero(seen)))


def learn(pool, documents, order, cut, vocab_size):
    """The text of a tokenizer.json with the byte pairs of train's text."""
    task = (documents, order, cut, vocab_size), 1
    (text, is_all), = in_workers(pool, learn_pairs, [task], desc='byte pairs')
    if not is_all:
        print(f'note: the byte pairs are learned from {MOST_LEARNED:,} characters, of documents '
              'drawn at random')
    n_vocab = len(json.loads(text)['model']['vocab'])
    if n_vocab < vocab_size:
        print(f'note: the text has byte pairs for {n_vocab:,} ids and not for '
              f'vocab_size={vocab_size:,}')
    return text


def learn_pairs(documents, order, cut, vocab_size):
    """(text of a tokenizer.json, whether all the text was used). What it says does not depend on
    the number of threads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    unused = []
    tokenizer.train_from_iterator(train_text(documents, order, cut, unused), trainer)
    return tokenizer.to_str(), not unused


def train_text(documents, order, cut, unused):
    """Yield the text of train in pieces, in the shuffled order, until MOST_LEARNED characters are
    reached. The piece that would go beyond them is put into the list unused."""
    n = 0
    for first, end in cut.ranges(order, 'train', 100):
        spans = cut.spans(order, 'train', first, end)
        for piece in itertools.chain.from_iterable(documents.read(spans)):
            n += len(piece)
            if n > MOST_LEARNED:
                unused.append(piece)
                return
            yield piece
