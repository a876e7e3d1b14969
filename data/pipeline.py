"""
From documents to bins, in parallel and so that an interrupted run goes on where it was.

The documents of local files are first copied to out_dir/parts as plain text, of which any document
can be read at once. A dataset of the Hub has its own such files. The documents are then tokenized
in shuffled order, in parts of fixed size, each a file in out_dir/parts. At the end the parts are
joined and the folder is removed.
"""

import codecs
import hashlib
import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from configurator import UserError

import numpy as np

from data.documents import Counts, read_documents
from runtime.dataset import SPLITS
from runtime.progress import progress_bar
from runtime.record import id_dtype, write_record
from runtime.tokenizer import make_tokenizer
from runtime.workers import in_workers

SEED = 2357  # nanoGPT's
MOST_SHUFFLED = 100_000_000  # their order takes 0.8 GB of memory
BATCH = 64_000_000  # bytes of source files that a worker copies at a time
PIECE = 1_000_000  # bytes; a longer document is tokenized in pieces, so that memory is bounded
LEAST_PARTS = 100  # of a small corpus, so that the workers end together
LEAST_WHOLE = 10  # documents of val; fewer are too few to be the share of the text that is wanted
OWN_FILES = ('train.bin', 'val.bin', 'meta.pkl', 'meta.json')


# The work folder


def open_work(work, identity):
    """Make the folder work, or empty it if it is of another identity. Returns whether the bins are
    complete already."""
    digest = hashlib.sha256()
    for item in identity:
        digest.update(repr(item).encode('utf-8', 'backslashreplace'))
    state = work / 'state'
    found = state.read_text().split() if state.exists() else []
    if found[:1] == [digest.hexdigest()]:
        return found[1:] == ['done']
    check_unused(work.parent)
    if found and set(os.listdir(work)) - {'state'}:
        print('note: the source or the settings are not those of the interrupted run: '
              'starting over')
    if found:
        remove_work(work)
    elif work.exists() and set(os.listdir(work)) - {'state.partial'}:
        raise UserError(f'{work} holds files that are not of this program: move it away, or choose '
                        'another --out_dir')
    work.mkdir(exist_ok=True)
    with whole_file(state) as f:
        f.write(digest.hexdigest().encode())
    return False


def check_unused(out_dir):
    """Raise UserError if out_dir has data already. It may have cost hours."""
    there = [name for name in OWN_FILES if (out_dir / name).exists()]
    if there:
        *most, last = there
        names = f'{", ".join(most)} and {last}' if most else last
        raise UserError(f'out_dir={out_dir} holds {names} already: choose another --out_dir, or '
                        f'remove {"them" if most else "it"} first')


def close_work(work):
    """Remove the folder. First note in it that the bins are complete, in case the removal is
    interrupted."""
    digest = (work / 'state').read_text().split()[0]
    with whole_file(work / 'state') as f:
        f.write(f'{digest} done'.encode())
    remove_work(work)


def remove_work(work):
    for name in set(os.listdir(work)) - {'state'}:
        (work / name).unlink()
    shutil.rmtree(work)  # with the state, which says whose the other files were


@contextmanager
def whole_file(path):
    """A file to write that has its name only once it is complete."""
    with open(f'{path}.partial', 'wb') as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(f'{path}.partial', path)


def check_space(out_dir, needed):
    """Raise UserError if out_dir lacks room for needed bytes. What an unfinished run has written
    there counts."""
    needed -= sum(path.stat().st_size for path in (out_dir / 'parts').glob('*'))
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise UserError(f'out_dir={out_dir} has {free / 1e9:,.3g} GB free, and about '
                        f'{needed / 1e9:,.3g} GB more are needed: make room, or choose another '
                        '--out_dir')


# The text of local files


def copy_texts(pool, files, work, key, cut):
    """Copy the documents of local files to work as plain text, in batches of files. Returns Texts
    and Counts."""
    batches, size = [], BATCH
    for path, n_bytes, _ in files:
        if size >= BATCH:
            batches.append([])
            size = 0
        batches[-1].append(path)
        size += n_bytes
    targets = [work / f'text.{number:06d}' for number in range(len(batches))]
    tasks = [((batch, target, key), sum(map(os.path.getsize, batch)))
             for batch, target in zip(batches, targets) if not target.exists()]
    in_workers(pool, copy_batch, tasks, desc='reading', unit='B')
    counts, n_documents = Counts(), [0]
    for target in targets:
        counts.add(Counts(**json.loads(Path(f'{target}.counts').read_bytes())))
        n_documents.append(Path(f'{target}.ends').stat().st_size // 8 - 1)
    return Texts(targets, np.cumsum(n_documents), cut), counts


def copy_batch(paths, target, key):
    """Write the documents of the files end to end to target, 0 and where each ends as uint64 to
    target.ends, and what was found to target.counts."""
    counts = Counts()
    # the text gets its name last
    with (whole_file(target) as text, whole_file(f'{target}.ends') as ends,
          whole_file(f'{target}.counts') as found):
        end = 0
        ends.write(end.to_bytes(8, 'little'))
        for path in paths:
            for chunk, is_last in read_documents(path, key, counts):
                end += text.write(chunk)
                if is_last:
                    ends.write(end.to_bytes(8, 'little'))
        found.write(json.dumps(asdict(counts)).encode())


@dataclass
class Texts:
    """Documents in files that copy_batch wrote."""
    targets: list  # the files
    firsts: np.ndarray  # the number of each file's first document, then the number of documents
    cut: str  # where long documents may be cut: 'at spaces', 'anywhere' or 'nowhere'

    def __len__(self):
        return int(self.firsts[-1])

    def bounds(self, number):
        """(file, where the document begins in it, where it ends)."""
        batch = np.searchsorted(self.firsts, number, side='right') - 1
        ends = reader(f'{self.targets[batch]}.ends')
        ends.seek(8 * int(number - self.firsts[batch]))
        start, end = np.frombuffer(ends.read(16), dtype='<u8').tolist()
        return reader(self.targets[batch]), start, end

    def sizes(self, numbers):
        """The bytes of the documents with the numbers."""
        bounds = (self.bounds(number) for number in numbers)
        return np.array([end - start for _, start, end in bounds])

    def count_bytes(self):
        return sum(os.path.getsize(target) for target in self.targets)

    def read_bytes(self, number, start, end):
        f, begin, _ = self.bounds(number)
        f.seek(begin + start)
        return f.read(end - start)

    def read(self, spans):
        """Yield each (number, start, end) of spans as an iterable of strings. start and end are
        bytes, end None is the document's end."""
        for number, start, end in spans:
            f, begin, last = self.bounds(number)
            f.seek(begin + start)
            yield read_pieces(f, (last - begin if end is None else end) - start, self.cut)


@lru_cache(maxsize=200)  # open files, fewer than systems allow
def reader(path):
    # not memory-mapped: pages that were read would count as memory of the process
    return open(path, 'rb')


def read_pieces(f, n_bytes, cut):
    """Yield the next n_bytes of f as strings, of some PIECE bytes if a cut is allowed. 'at spaces'
    they are cut before a space or a line end that follows something else. A token of GPT-2's
    pattern ends there in any case."""
    decode, text = codecs.getincrementaldecoder('utf-8')().decode, ''
    while n_bytes > PIECE and cut != 'nowhere':
        searched = max(0, len(text) - 1)
        text += decode(f.read(PIECE))
        n_bytes -= PIECE
        if cut == 'anywhere':
            yield text
            text = ''
        elif match := LAST_SPACE.match(text, searched):
            yield text[:match.end()]
            text = text[match.end():]
    yield text + decode(f.read(n_bytes))


LAST_SPACE = re.compile(r'(?s).*\S(?=[ \n])')


# The order and the split


@dataclass
class Order:
    """The documents in shuffled order: that of train_test_split of Hugging Face datasets. Of more
    than MOST_SHUFFLED documents, runs of consecutive ones are shuffled in place of single ones, so
    that the order fits in memory."""
    path: Path
    n_documents: int
    run: int  # documents

    def __len__(self):
        """The number of places. Of runs, the last one may have places without a document."""
        return math.ceil(self.n_documents / self.run) * self.run

    def numbers(self, first, end):
        """The numbers of the documents at the places from first up to end. That of a place without
        a document is not below n_documents."""
        runs, within = np.divmod(np.arange(first, end), self.run)
        offset = first // self.run
        starts = np.fromfile(self.path, np.int64, -(-end // self.run) - offset, offset=8 * offset)
        return starts[runs - offset] * self.run + within


def shuffle(documents, work):
    order = Order(work / 'order', len(documents), math.ceil(len(documents) / MOST_SHUFFLED))
    with whole_file(order.path) as f:
        np.random.default_rng(SEED).permutation(len(order) // order.run).tofile(f)
    return order


@dataclass
class Cut:
    """val has the places of the order up to this one, of which it has what follows the first
    `byte` bytes. train has the rest."""
    place: int
    byte: int = 0

    def spans(self, order, split, first, end):
        """(number, start, end) of the documents, or of their parts, that the places from first up
        to end have in a split. end is None unless the document goes on in the other split."""
        found = []
        for place, number in enumerate(order.numbers(first, end), first):
            is_cut = place == self.place
            start = self.byte if is_cut and split == 'val' else 0
            stop = self.byte if is_cut and split == 'train' else None
            if number < order.n_documents:
                found.append((number, start, stop))
        return found

    def ranges(self, order, split, step):
        """The places of a split as pairs (first, end), of at most step places. The document that
        goes on in val is the last of train, so that no other follows where it is cut."""
        start, end = (0, self.place + 1) if split == 'val' else (self.place + 1, len(order))
        found = [(first, min(first + step, end)) for first in range(start, end, step)]
        is_cut = split == 'train' and self.byte
        return [*found, (self.place, self.place + 1)] if is_cut else found


def find_cut(documents, order, val_share):
    """Where to cut so that val has val_share of the bytes. As in nanoGPT, val has that share of the
    documents, where these are LEAST_WHOLE or more and of usual size. Raises UserError where the
    text is too short."""
    n_bytes = documents.count_bytes()
    if not n_bytes:
        raise UserError('the documents have no text: give others')
    wanted = val_share * n_bytes
    n_whole = math.ceil(val_share * (len(order) // order.run)) * order.run
    if LEAST_WHOLE <= n_whole < len(order):
        held = documents_bytes(documents, order, 0, n_whole).sum()
        if wanted / 2 <= held <= wanted * 2:
            print(f'val        {held / n_bytes:.3%} of the text, {n_whole:,} documents')
            return Cut(n_whole - 1)
    before = 0
    for first in range(0, len(order), 10_000):
        sizes = documents_bytes(documents, order, first, min(first + 10_000, len(order)))
        if before + sizes.sum() >= wanted:
            break
        before += sizes.sum()
    i = int(np.searchsorted(before + sizes.cumsum(), wanted))
    before, size, place = before + sizes[:i].sum(), int(sizes[i]), first + i
    number = order.numbers(place, place + 1)[0]
    # there are no bytes in a place without a document
    whole = [0] * (place + 1 < len(order)) + [size] * (place > 0)
    byte, where = find_byte(lambda *bounds: documents.read_bytes(number, *bounds), size,
                            size - (wanted - before), wanted / 2, whole)
    if byte is None:
        raise UserError(f'the text has {n_bytes} byte{"s" * (n_bytes > 1)}, too few for train.bin '
                        'and val.bin: give more text')
    print(f'val        {(before + size - byte) / n_bytes:.3%} of the text, cut {where}')
    return Cut(place - 1) if byte == size else Cut(place, byte)


def documents_bytes(documents, order, first, end):
    """The bytes of the documents at the places from first up to end of the order."""
    numbers = order.numbers(first, end)
    sizes = np.zeros(len(numbers), dtype=np.int64)
    is_document = numbers < order.n_documents
    sizes[is_document] = documents.sizes(numbers[is_document])
    return sizes


def find_byte(read, size, target, radius, whole):
    """The byte at which to cut a document of size bytes, which read(start, end) reads: the one
    nearest to target that begins a line, else one before a space, else between characters. It is
    at most radius away, and PIECE. whole are those of 0 and size that are allowed; a document ends
    as a line does. Returns the byte, or None if there is none, and what is there in words."""
    radius = max(4, int(min(radius, PIECE)))  # 4 bytes have the beginning of a character
    first = max(0, int(target) - radius)
    text = np.frombuffer(read(first, min(size, int(target) + radius + 1)), dtype=np.uint8)
    near = [byte for byte in whole if abs(byte - target) <= radius]
    begins_line = np.flatnonzero(text == ord('\n')) + first + 1
    is_space = np.flatnonzero(text == ord(' ')) + first
    begins_character = np.flatnonzero(text & 0xC0 != 0x80) + first
    for found, where in ((begins_line, 'at a line'), (is_space, 'at a space'),
                         (begins_character, 'between characters')):
        found = np.concatenate([found[(0 < found) & (found < size)], near]).astype(np.int64)
        if len(found):
            byte = int(found[np.abs(found - target).argmin()])
            return byte, 'between documents' if byte in whole else where
    return None, ''


# Tokenizing


@lru_cache(maxsize=1)
def tokenizer_at(path):
    """The tokenizer whose spec is in the file at path."""
    return make_tokenizer(json.loads(Path(path).read_bytes()))


def tokenize(pool, documents, order, cut, work, part_documents):
    """Tokenize all the documents. Returns for each split the files that hold its tokens, in
    order."""
    step = max(1, min(part_documents, math.ceil(len(order) / LEAST_PARTS)))
    parts, tasks = {}, []
    for split in SPLITS:
        ranges = cut.ranges(order, split, step)
        parts[split] = [work / f'{split}.{i:06d}.part' for i in range(len(ranges))]
        for (first, end), target in zip(ranges, parts[split]):
            if not target.exists():
                task = (documents, order, cut, split, first, end, work / 'tokenizer', target)
                tasks.append((task, end - first))
    n_parts = sum(map(len, parts.values()))
    if len(tasks) < n_parts:
        print(f'goes on    {n_parts - len(tasks):,} of {n_parts:,} parts are there')
    in_workers(pool, tokenize_part, tasks, desc='tokenizing', unit=' documents')
    return parts


def tokenize_part(documents, order, cut, split, first, end, tokenizer, target):
    """Write the tokens of the places from first up to end of a split to target. A document ends
    with the end-of-text token. Where there is none, a line break separates documents."""
    tokenizer = tokenizer_at(tokenizer)
    dtype = id_dtype(tokenizer.n_vocab).newbyteorder('<')
    separates = tokenizer.end_of_text is None and len(documents) > 1

    def to_bytes(ids):
        return np.asarray(ids).astype(dtype).tobytes()
    spans = cut.spans(order, split, first, end)
    with whole_file(target) as f:
        for (_, _, stop), pieces in zip(spans, documents.read(spans)):
            piece = None
            for piece in pieces:
                f.write(to_bytes(tokenizer.encode_document(piece)))
            if stop is not None or piece is None:  # it goes on in val, or is a row without text
                continue
            if tokenizer.end_of_text is not None:
                f.write(to_bytes([tokenizer.end_of_text]))
            elif separates and not piece.endswith('\n'):
                f.write(to_bytes(tokenizer.encode_document('\n')))


def join_parts(parts, out_dir, tokenizer):
    """Write the bin of each split from its parts. Both get their names after both are complete and
    the record lies beside them."""
    for split in parts:
        with open(out_dir / f'{split}.bin.partial', 'wb') as out:
            for path in progress_bar(parts[split], f'{split}.bin'):
                with open(path, 'rb') as part:
                    shutil.copyfileobj(part, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())  # before the parts are removed
            if not out.tell():
                raise UserError(f'{split}.bin would be empty: give more text, or another '
                                '--val_share')
    write_record(out_dir, tokenizer)
    for split in parts:
        os.replace(out_dir / f'{split}.bin.partial', out_dir / f'{split}.bin')
