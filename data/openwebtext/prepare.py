"""
Prepare OpenWebText, another dataset of the Hugging Face Hub, or local files in GPT-2's byte pairs:
writes train.bin and val.bin (uint16), as nanoGPT has them, into --out_dir.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --dataset=HuggingFaceFW/fineweb-edu \\
        --subset=sample-10BT --out_dir=data/fineweb
    python data/openwebtext/prepare.py --source='corpus/**/*.jsonl.gz' --out_dir=data/mine

OpenWebText gives 9,035,582,198 and 4,434,897 tokens (18 GB). It needs the network and until it is
done about 105 GB of disk, and another dataset of the Hub 2.6 times the size of its text. Local
files need no network, and until they are done twice the size of their text.

Local files are first copied to out_dir/parts as plain text, of which any document can be read at
once. The documents are then tokenized in shuffled order, in parts of fixed size, each a file in
out_dir/parts. An interrupted run that is started again goes on after the parts that are complete.
At the end the parts are joined and the folder is removed.
"""

import codecs
import glob
import gzip
import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import UserError, check_least, configure, run

import numpy as np

from runtime.lock import locked
from runtime.progress import progress_bar
from runtime.tokenizer import gpt2_encoding

VAL_SHARE, SEED = 0.0005, 2357  # nanoGPT's split
MOST_SHUFFLED = 100_000_000  # their order takes 0.8 GB of memory
OPENWEBTEXT_DOCUMENTS, OPENWEBTEXT_BYTES = 8_013_769, 40e9
BATCH = 64_000_000  # bytes of source files that a worker copies at a time
PIECE = 1_000_000  # bytes; a longer document is tokenized in pieces, so that memory is bounded
BINS_PER_TEXT = 0.5  # bytes: a token takes 2 and stands for 4 to 5 of English
CACHE_PER_TEXT = 1.6  # bytes: the download and the Arrow files that datasets makes of it
EXPANSION = 4  # of compressed files and Parquet, about
LEAST_PARTS = 100  # of a small corpus, so that the workers end together
KINDS = {'.txt': 'text', '.jsonl': 'lines', '.json': 'lines', '.ndjson': 'lines',
         '.parquet': 'parquet'}
END_OF_TEXT = np.array([50256], dtype='<u2').tobytes()


@dataclass
class PrepareConfig:
    dataset: str = 'openwebtext'  # its name on the Hub, for instance HuggingFaceFW/fineweb-edu
    subset: str = ''  # configuration of the dataset, for instance sample-10BT
    split: str = 'train'  # split of the dataset, which is divided into train.bin and val.bin
    source: str = ''  # in place of a dataset, a glob of local files: .txt (each a document),
                      # .jsonl or .json (a line each), .parquet (a row each)
    text_key: str = 'text'  # key or column that holds the text
    out_dir: str = ''  # folder for train.bin and val.bin; it must be given, except for OpenWebText,
                       # which goes to data/openwebtext
    workers: int = 0  # processes; 0: one for each core, at most 12. The bins do not depend on it
    part_documents: int = 10_000  # documents of a part at most; a worker that is interrupted has to
                                  # do these again

    def __post_init__(self):
        check_least(self, workers=0, part_documents=1)
        if self.workers > 1000:
            raise ValueError(f'workers={self.workers} must be at most 1000')
        of_the_hub = self.dataset != 'openwebtext'
        if self.source and (self.subset or of_the_hub or self.split != 'train'):
            raise ValueError(f'source={self.source} takes the place of dataset, subset and split: '
                             'leave those out')
        if not self.out_dir and (self.source or of_the_hub):
            raise ValueError('out_dir is needed: give a folder, for instance --out_dir=data/mine')
        self.out_dir = self.out_dir or str(HERE)


def main():
    config, _ = configure(sys.argv[1:], PrepareConfig)
    try:
        with locked(config.out_dir):
            prepare(config)
    except BrokenProcessPool:
        raise UserError('a worker was ended from outside, perhaps for want of memory: start again, '
                        'perhaps with fewer --workers, which goes on from here') from None
    except OSError as e:
        reason = e.strerror or e
        raise UserError(f'out_dir={config.out_dir} cannot be written ({reason}): mend that and '
                        'start again, which goes on from here') from None


def prepare(config):
    """Write train.bin and val.bin into config.out_dir. Raises UserError, and OSError where that
    folder cannot be written."""
    out_dir = Path(config.out_dir)
    work = out_dir / 'parts'
    workers = config.workers or default_workers()
    if not work.exists():
        check_unused(out_dir)
    if config.source:
        identity = files = find_files(config.source)
        check_space(out_dir, estimate_text_bytes(files) * (1 + 2 * BINS_PER_TEXT))
    else:
        dataset = load_from_hub(config, workers)
        identity = [config.dataset, dataset._fingerprint]
        check_space(out_dir, dataset.data.nbytes * 2 * BINS_PER_TEXT)
    is_done = open_work(work, [config.text_key, config.part_documents, *identity])
    if not is_done:
        # a forked child can wait for ever for a thread of Arrow's that it does not have
        spawn = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(workers, spawn, follow_parent) as pool:
            if config.source:
                documents = copy_texts(pool, files, work, config.text_key)
            else:
                documents = Rows(dataset, config.text_key)
            parts = tokenize(pool, documents, work, config.part_documents)
        join_parts(parts, out_dir)
    close_work(work)
    train, val = ((out_dir / f'{split}.bin').stat().st_size // 2 for split in ('train', 'val'))
    print(f'tokens     {train:,} in train.bin, {val:,} in val.bin')


def default_workers():
    """A worker for each core that this process may use, at most twelve, which together stay under
    2 GB."""
    has_affinity = hasattr(os, 'sched_getaffinity')
    return min(12, len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count())


def join_parts(parts, out_dir):
    """Write the bin of each split from its parts. Both get their names after both are complete."""
    for split in parts:
        with open(out_dir / f'{split}.bin.partial', 'wb') as out:
            for path in progress_bar(parts[split], f'{split}.bin'):
                with open(path, 'rb') as part:
                    shutil.copyfileobj(part, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())  # before the parts are removed
    for split in parts:
        os.replace(out_dir / f'{split}.bin.partial', out_dir / f'{split}.bin')


def find_files(pattern):
    """[(path, bytes, time of change in ns)] of the files that match the glob, sorted by path. An
    entry takes some 0.3 KB of memory."""
    if os.path.isdir(pattern):
        example = os.path.join(pattern, '*.jsonl')
        raise UserError(f"source={pattern} is a folder: say which files, for instance "
                        f"--source='{example}'")
    found = glob.glob(pattern, recursive=True)
    paths = sorted(os.path.abspath(path) for path in found if os.path.isfile(path))
    if not paths:
        raise UserError(f'source={pattern} matches no file: give a path or a pattern, for instance '
                        "--source='corpus/*.jsonl'")
    for path in paths:
        file_kind(path)
    return [(path, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in paths]


def file_kind(path):
    ending = Path(path.removesuffix('.gz')).suffix
    if ending not in KINDS:
        raise UserError(f'{path} ends in none of {", ".join(KINDS)}, with or without .gz: narrow '
                        '--source to such files')
    return KINDS[ending]


def estimate_text_bytes(files):
    return sum(n_bytes * (EXPANSION if path.endswith(('.gz', '.parquet')) else 1)
               for path, n_bytes, _ in files)


def read_documents(path, key):
    """Yield (bytes of UTF-8, whether a document ends with them) of a file. Raises UserError for a
    file that holds no documents."""
    readers = {'text': read_text, 'lines': read_lines, 'parquet': read_parquet}
    try:
        yield from readers[file_kind(path)](path, key)
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not UTF-8 ({e.reason}): convert it or leave it out') from None
    except (OSError, EOFError, ValueError, zlib.error) as e:  # Arrow's errors are ValueErrors
        raise UserError(f'{path} cannot be read ({type(e).__name__}: {e}): mend it or leave it out'
                        ) from None


def open_plain(path):
    return (gzip.open if path.endswith('.gz') else open)(path, 'rb')


def read_text(path, key):
    """The file is one document."""
    check = codecs.getincrementaldecoder('utf-8')().decode
    with open_plain(path) as f:
        while chunk := f.read(PIECE):
            check(chunk)
            yield chunk, False
    yield check(b'', final=True).encode(), True


def read_lines(path, key):
    """Each line of the file is a JSON object, whose key holds a document."""
    with open_plain(path) as f:
        for number, line in enumerate(f, 1):
            try:
                line = line.decode().removeprefix('\ufeff')  # some editors put it before line 1
                if not line.strip():
                    continue
                document = json.loads(line)
            except UnicodeDecodeError as e:
                raise UserError(f'{path} is not UTF-8 in line {number} ({e.reason}): convert it or '
                                'leave it out') from None
            except json.JSONDecodeError as e:
                raise UserError(f'{path}: line {number} is not JSON ({e.msg}): each line must be a '
                                'document') from None
            if isinstance(document, list):
                raise UserError(f'{path}: line {number} is a list: each line must be a document, '
                                'as JSON lines have it')
            text = document.get(key) if isinstance(document, dict) else None
            yield to_utf8(text, f'{path}: line {number}', key), True


def read_parquet(path, key):
    """Each row of the table has a document in the column key."""
    import pyarrow.parquet
    # without a buffer it reads a whole row group at a time, which may be all of the file
    table = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    names = table.schema_arrow.names
    if key not in names:
        raise UserError(f'{path} has no column {key!r} but {", ".join(names)}: set --text_key')
    number = 0
    for batch in table.iter_batches(256, columns=[key], use_threads=False):
        for number, text in enumerate(batch.column(0).to_pylist(), number + 1):
            yield to_utf8(text, f'{path}: row {number}', key), True


def to_utf8(text, where, key):
    if not isinstance(text, str):
        raise UserError(f'{where} has no text under {key!r}: set --text_key to the name that the '
                        'text has, or leave it out')
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON allows; replaced as in tiktoken
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode()


def load_from_hub(config, workers):
    """The column of texts as a datasets.Dataset, whose files are memory-mapped."""
    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # no line for each of its retries
    name = config.dataset
    try:
        dataset = load_revision(config, workers, None)
    except UserError:
        raise
    except Exception as e:  # datasets and what it downloads with raise dozens of kinds
        raise UserError(f'dataset={name} cannot be had from the Hugging Face Hub '
                        f'({type(e).__name__}: {str(e)[:300]}): check the name, --subset, --split, '
                        'the network and the room in its cache, or give --source') from None
    if config.text_key not in dataset.column_names:
        raise UserError(f'dataset={name} has no column {config.text_key!r} but '
                        f'{", ".join(dataset.column_names)}: set --text_key')
    if name == 'openwebtext' and len(dataset) != OPENWEBTEXT_DOCUMENTS:
        print(f'note: this OpenWebText has {len(dataset):,} documents and not '
              f'{OPENWEBTEXT_DOCUMENTS:,}, as nanoGPT had')
    return dataset.select_columns([config.text_key])


def load_revision(config, workers, revision):
    """Download a dataset at a revision. datasets no longer runs the script that OpenWebText is on
    the Hub, so where that is what it finds it takes the Hub's conversion to Parquet."""
    import datasets
    name, subset = config.dataset, config.subset or None
    try:
        builder = datasets.load_dataset_builder(name, subset, revision=revision)
        known = OPENWEBTEXT_BYTES if name == 'openwebtext' else 0
        text_bytes = builder.info.dataset_size or known
        # what a download that has begun still needs is unknown
        begun = glob.glob(f'{builder.cache_dir}*')
        # datasets itself checks the room of a cache that is on another disk
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        is_here = cache.exists() and cache.stat().st_dev == os.stat(config.out_dir).st_dev
        needed = 2 * BINS_PER_TEXT + (CACHE_PER_TEXT if is_here and not begun else 0)
        check_space(Path(config.out_dir), text_bytes * needed)
        return datasets.load_dataset(name, subset, split=config.split, revision=revision,
                                     num_proc=workers)
    except RuntimeError as e:
        if revision or 'script' not in str(e):
            raise
    return load_revision(config, workers, 'refs/convert/parquet')


def open_work(work, identity):
    """Make the folder work, or empty it if it is of another identity. Returns whether the bins are
    complete already."""
    digest = hashlib.sha256()
    for item in identity:
        digest.update(repr(item).encode())
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
    there = [name for name in ('train.bin', 'val.bin', 'meta.pkl') if (out_dir / name).exists()]
    if there:
        them = 'it' if len(there) == 1 else 'them'
        raise UserError(f'out_dir={out_dir} holds {" and ".join(there)} already: choose another '
                        f'--out_dir, or remove {them} first')


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


def follow_parent():
    """Let this worker end when its parent ends in whatever way, and at Ctrl-C without a
    traceback."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_workers(pool, function, tasks, **bar):
    """Call function(*arguments) in the pool for each (arguments, amount of work) of tasks, in no
    particular order."""
    futures = {pool.submit(function, *arguments): amount for arguments, amount in tasks}
    total = sum(futures.values())
    with progress_bar(total=total, unit_scale=True, **bar) as progress:
        try:
            for future in as_completed(futures):
                future.result()
                progress.update(futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def copy_texts(pool, files, work, key):
    """Copy the documents of local files to work as plain text, in batches of files. Returns
    Texts."""
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
    counts = [(work / f'{target.name}.ends').stat().st_size // 8 - 1 for target in targets]
    return Texts(targets, np.cumsum([0] + counts))


def copy_batch(paths, target, key):
    """Write the documents of the files end to end to target, and 0 and where each ends as uint64
    to target.ends."""
    # the text gets its name last
    with whole_file(target) as text, whole_file(f'{target}.ends') as ends:
        end = 0
        ends.write(end.to_bytes(8, 'little'))
        for path in paths:
            for chunk, is_last in read_documents(path, key):
                end += text.write(chunk)
                if is_last:
                    ends.write(end.to_bytes(8, 'little'))


@dataclass
class Texts:
    """Documents in files that copy_batch wrote."""
    targets: list  # the files
    firsts: np.ndarray  # the number of each file's first document, then the number of documents

    def __len__(self):
        return int(self.firsts[-1])

    def read(self, numbers):
        """Yield each document as an iterable of strings."""
        for number in numbers:
            batch = np.searchsorted(self.firsts, number, side='right') - 1
            ends = reader(f'{self.targets[batch]}.ends')
            ends.seek(8 * int(number - self.firsts[batch]))
            start, end = np.frombuffer(ends.read(16), dtype='<u8').tolist()
            text = reader(self.targets[batch])
            text.seek(start)
            yield read_pieces(text, end - start)


@lru_cache(maxsize=200)  # open files, fewer than systems allow
def reader(path):
    # not memory-mapped: pages that were read would count as memory of the process
    return open(path, 'rb')


def read_pieces(f, n_bytes):
    """Yield the next n_bytes of f as strings of some PIECE bytes. They are cut before a space or a
    line end that follows something else. A token of GPT-2 ends there in any case."""
    decode, text = codecs.getincrementaldecoder('utf-8')().decode, ''
    while n_bytes > PIECE:
        text += decode(f.read(PIECE))
        n_bytes -= PIECE
        if match := re.match(r'(?s).*\S(?=[ \n])', text):
            yield match[0]
            text = text[match.end():]
    yield text + decode(f.read(n_bytes))


@dataclass
class Rows:
    """Documents in a dataset of the Hub."""
    dataset: object  # a datasets.Dataset, opened anew for each part: mapped pages do not add up
    key: str

    def __len__(self):
        return len(self.dataset)

    def read(self, numbers):
        """Yield each document as an iterable of strings."""
        for i in range(0, len(numbers), 100):
            for text in self.dataset[numbers[i:i + 100].tolist()][self.key]:
                yield [to_utf8(text, 'a row of the dataset', self.key).decode()]


def tokenize(pool, documents, work, part_documents):
    """Tokenize all the documents. Returns for each split the files that hold its tokens, in order.

    The order is that of train_test_split of Hugging Face datasets. Of more than MOST_SHUFFLED
    documents, runs of consecutive ones are shuffled in place of single ones, so that the order fits
    in memory.
    """
    if len(documents) < 2:
        raise UserError(f'{len(documents)} documents are too few, since train.bin and val.bin need '
                        'one each: give more (a .txt is one, and so is each line of .jsonl)')
    print(f'documents  {len(documents):,}')
    length = math.ceil(len(documents) / MOST_SHUFFLED)
    n_runs = math.ceil(len(documents) / length)
    with whole_file(work / 'order') as f:
        np.random.default_rng(SEED).permutation(n_runs).tofile(f)
    n_val = math.ceil(VAL_SHARE * n_runs)
    runs_per_part = max(1, min(part_documents // length, math.ceil(n_runs / LEAST_PARTS)))
    parts, tasks = {'train': [], 'val': []}, []
    for split, first, end in (('train', n_val, n_runs), ('val', 0, n_val)):
        for i in range(first, end, runs_per_part):
            target = work / f'{split}.{len(parts[split]):06d}.part'
            parts[split].append(target)
            n = min(runs_per_part, end - i)
            if not target.exists():
                tasks.append(((documents, work / 'order', i, n, length, target), n * length))
    n_parts = sum(map(len, parts.values()))
    if len(tasks) < n_parts:
        print(f'goes on    {n_parts - len(tasks):,} of {n_parts:,} parts are there')
    in_workers(pool, tokenize_part, tasks, desc='tokenizing', unit=' documents')
    return parts


def tokenize_part(documents, order, first, n_runs, length, target):
    """Write the tokens of the documents in n_runs runs of the order, from the run first on, to
    target."""
    starts = np.fromfile(order, dtype=np.int64, count=n_runs, offset=8 * first)
    numbers = (starts[:, None] * length + np.arange(length)).ravel()
    # faster than encode_ordinary, and the same where no special token is disallowed
    encode = gpt2_encoding().encode_to_numpy
    with whole_file(target) as f:
        for pieces in documents.read(numbers[numbers < len(documents)]):
            for text in pieces:
                f.write(encode(text, disallowed_special=()).astype('<u2').tobytes())
            f.write(END_OF_TEXT)


if __name__ == '__main__':
    run(main)
