"""
The documents of local files as clean text: byte order marks go, and every line ends with \\n. A
record without text is counted, and skipped where there are few of them.
"""

import codecs
import csv
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from configurator import UserError

KINDS = {'.txt': 'text', '.md': 'text', '.jsonl': 'lines', '.ndjson': 'lines', '.json': 'json',
         '.csv': 'csv', '.parquet': 'parquet'}
BOMS = ((codecs.BOM_UTF8, 'utf-8'), (codecs.BOM_UTF32_LE, 'utf-32-le'),
        (codecs.BOM_UTF32_BE, 'utf-32-be'), (codecs.BOM_UTF16_LE, 'utf-16-le'),
        (codecs.BOM_UTF16_BE, 'utf-16-be'))  # UTF-16's is the beginning of UTF-32's
PIECE = 1_000_000  # bytes of a file that are read at a time
EXPANSION = 4  # of compressed files and Parquet, about
MOST_BAD = 0.01  # the share of records without text that are skipped without being asked
ELEMENT_START = re.compile(r'\s*[\[,]\s*(?=[^\s\]])')
ELEMENT_END = re.compile(r'\s*[,\]]')


@dataclass
class Counts:
    """What was found in files."""
    records: int = 0
    bad: int = 0  # records without text
    first_bad: str = ''  # where the first of them is, and what is wrong with it
    marks: int = 0  # byte order marks
    line_ends: int = 0  # of those that were changed

    def add(self, other):
        self.first_bad = self.first_bad or other.first_bad
        for name in ('records', 'bad', 'marks', 'line_ends'):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def note_bad(self, where):
        self.bad += 1
        self.first_bad = self.first_bad or where


def find_files(source, out_dir):
    """[(path, bytes, time of change in ns)] of the files that source names, each once, sorted by
    path: files, folders and globs, separated by commas. What this program writes is not among
    them. An entry takes some 0.3 KB of memory. Raises UserError."""
    paths, others = set(), []
    own = os.path.join(os.path.abspath(out_dir), '')
    for pattern in [source] if os.path.exists(source) else source.split(','):
        pattern = pattern.strip()
        if os.path.isfile(pattern) and not file_kind(pattern):
            raise UserError(f'source={pattern} ends in none of {", ".join(KINDS)}, with or without '
                            '.gz: convert it to one of them')
        for path in map(os.path.abspath, match(pattern)):
            folder, name = os.path.split(path)
            is_record = name == 'meta.json' and os.path.exists(os.path.join(folder, 'train.bin'))
            if is_record or path.startswith(f'{own}parts{os.sep}'):
                continue
            if file_kind(path):
                paths.add(path)
            else:
                others.append(path)
    if others:
        endings = sorted({os.path.splitext(path)[1] or 'no ending' for path in others})
        n = len(others)
        print(f'note: {n:,} file{"s" * (n > 1)} of other kinds {"are" if n > 1 else "is"} left '
              f'out: {", ".join(endings[:10])}{", ..." * (len(endings) > 10)}')
    if not paths:
        raise UserError(f'source={source} has no file of the kinds {", ".join(KINDS)}, with or '
                        'without .gz: give such files')
    return [(path, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in sorted(paths)]


def match(pattern):
    """The files that a path or a glob stands for. Of a folder they are all in it, as far as no
    name on the way begins with a dot."""
    if os.path.isfile(pattern):
        return [pattern]
    found = []
    if os.path.isdir(pattern):
        for folder, folders, names in os.walk(pattern, onerror=refuse_folder):
            folders[:] = [name for name in folders if not name.startswith('.')]
            found += [os.path.join(folder, name) for name in names if not name.startswith('.')]
    else:
        found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not found:
        raise UserError(f'source={pattern} matches no file: give a path, a folder or a pattern, '
                        "for instance --source='corpus/*.jsonl'")
    return found


def refuse_folder(error):
    raise UserError(f'source: {error.filename} cannot be read ({error.strerror}): allow it or give '
                    'other folders')


def file_kind(path):
    """'text', 'lines', 'json', 'csv', 'parquet', or None."""
    return KINDS.get(Path(path.lower().removesuffix('.gz')).suffix)


def estimate_text_bytes(files):
    return sum(n_bytes * (EXPANSION if path.lower().endswith(('.gz', '.parquet')) else 1)
               for path, n_bytes, _ in files)


def read_documents(path, key, counts):
    """Yield (bytes of UTF-8, whether a document ends with them) of a file, and add what is found to
    counts. Raises UserError for a file that cannot be read."""
    readers = {'lines': read_lines, 'json': read_json, 'csv': read_csv, 'parquet': read_parquet}
    kind = file_kind(path)
    try:
        if kind == 'text':
            yield from read_text(path, counts)
            return
        for place, text, problem in readers[kind](path, key, counts):
            counts.records += 1
            if problem:
                counts.note_bad(f'{path}: {place} {problem}')
            else:
                yield to_utf8(clean(text, counts)), True
    # Arrow's errors are ValueErrors
    except (OSError, EOFError, ValueError, RecursionError, zlib.error, csv.Error) as e:
        raise UserError(f'{path} cannot be read ({type(e).__name__}: {e}): mend it or leave it out'
                        ) from None


def open_plain(path):
    return (gzip.open if str(path).lower().endswith('.gz') else open)(path, 'rb')


def decoded(path, counts):
    """Yield the text of a file in pieces, without its byte order mark. Raises UserError where it is
    not UTF-8 and no mark says that it is UTF-16 or UTF-32."""
    with open_plain(path) as f:
        start, line = f.read(4), 1
        mark, encoding = next((pair for pair in BOMS if start.startswith(pair[0])), (b'', 'utf-8'))
        counts.marks += mark != b''
        decode = codecs.getincrementaldecoder(encoding)().decode
        chunk = start.removeprefix(mark) + f.read(PIECE)
        while chunk:
            following = f.read(PIECE)
            try:
                yield decode(chunk, final=not following)
            except UnicodeDecodeError as e:
                line += e.object[:e.start].count(b'\n')
                raise UserError(f'{path} is not {encoding.upper()} in line {line} ({e.reason}): '
                                'convert it to UTF-8 or leave it out') from None
            line += chunk.count(b'\n')
            chunk = following


def clean(text, counts):
    """Let every line end with \\n."""
    if '\r' in text:
        counts.line_ends += text.count('\r')
        text = text.replace('\r\n', '\n').replace('\r', '\n')
    return text


def clean_pieces(pieces, counts):
    """As clean does, where \\r\\n may fall across two pieces."""
    held = ''
    for piece in pieces:
        piece = held + piece
        held = '\r' if piece.endswith('\r') else ''
        yield clean(piece[:len(piece) - len(held)], counts)
    yield clean(held, counts)


def read_text(path, counts):
    """The file is one document."""
    counts.records += 1
    begun, waiting = False, ''  # white space waits until something else follows
    for piece in clean_pieces(decoded(path, counts), counts):
        waiting += piece
        if begun or waiting.strip():
            begun = True
            yield waiting.encode(), False
            waiting = ''
    if begun:
        yield b'', True
    else:
        counts.note_bad(f'{path} has no text')


def lines_of(path, counts):
    """Yield the lines of a file, which end with \\n alone, without it."""
    parts = []
    for piece in decoded(path, counts):
        first, *others = piece.split('\n')
        parts.append(first)
        for part in others:
            yield ''.join(parts)
            parts = [part]
    yield ''.join(parts)


def read_lines(path, key, counts):
    """Yield (place, text, problem) of each line of a file of JSON lines. Either the text or the
    problem is empty."""
    for number, line in enumerate(lines_of(path, counts), 1):
        if line.strip():
            yield f'line {number}', *parse(line, key)


def parse(line, key):
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        return '', f'is not JSON ({getattr(e, "msg", e)})'
    return text_of(record, key)


def text_of(record, key):
    """(text, problem) of a record. A string is a text itself."""
    if isinstance(record, list):
        return '', 'is a list (a .json file may be one list of all documents)'
    text = record.get(key) if isinstance(record, dict) else record
    if isinstance(text, str) and text.strip():
        return text, ''
    names = [] if not isinstance(record, dict) or key in record else [*record][:20]
    return '', f'has no text under {key!r}' + (f' but {", ".join(names)}' if names else '')


def read_json(path, key, counts):
    """(place, text, problem) of each element, if the file is one array, else of each line."""
    start = next((text for piece in decoded(path, Counts()) if (text := piece.lstrip())), '')
    if not start.startswith('['):
        yield from read_lines(path, key, counts)
        return
    for number, record in enumerate(array_elements(decoded(path, counts)), 1):
        yield f'element {number}', *text_of(record, key)


def array_elements(pieces):
    """Yield the elements of the JSON array whose text comes in pieces. Raises ValueError."""
    decode = json.JSONDecoder().raw_decode
    text, new, error = '', [], 'it ends within the array'
    for piece in itertools.chain(pieces, [None]):
        new.append(piece or '')
        if piece and sum(map(len, new)) < len(text):
            continue  # a long element is tried again when twice as much of it is there
        text, new, end = text + ''.join(new), [], 0
        while start := ELEMENT_START.match(text, end):
            try:
                record, stop = decode(text, start.end())
            except json.JSONDecodeError as e:
                error = e.msg
                break
            if not ELEMENT_END.match(text, stop):  # a number may go on in the next piece
                break
            yield record
            end = stop
        text = text[end:]
    if text.replace('[', '', 1).strip() != ']':
        raise ValueError(f'its array has no end or a mistake: {error}')


def read_csv(path, key, counts):
    """(place, text, problem) of each row below the header."""
    csv.field_size_limit(2 ** 31 - 1)
    rows = csv.reader((line + '\n' for line in lines_of(path, counts)), strict=True)
    names = next(rows, [])
    if key not in names:
        raise UserError(f'{path} has no column {key!r} but {", ".join(names)[:300]}: set '
                        '--text_key')
    column = names.index(key)
    for row in rows:
        if row:
            text = row[column] if column < len(row) else ''
            yield f'row up to line {rows.line_num}', *text_of({key: text}, key)


def read_parquet(path, key, counts):
    """(place, text, problem) of each row of the table."""
    import pyarrow.parquet
    file = open_plain(path) if path.lower().endswith('.gz') else path
    # without a buffer it reads a whole row group at a time, which may be all of the file
    table = pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
    names = table.schema_arrow.names
    if key not in names:
        raise UserError(f'{path} has no column {key!r} but {", ".join(names)[:300]}: set '
                        '--text_key')
    number = 0
    for batch in table.iter_batches(256, columns=[key], use_threads=False):
        for number, text in enumerate(batch.column(0).to_pylist(), number + 1):
            yield f'row {number}', *text_of({key: text}, key)


def to_utf8(text):
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON allows; replaced as in tiktoken
        return text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace').encode()


def tell_changes(counts):
    changes = [f'{n:,} {what}{"s" * (n > 1)}' for n, what in (
        (counts.marks, 'byte order mark'), (counts.line_ends, 'line end')) if n]
    if changes:
        print(f'cleaned    {", ".join(changes)}')


def check_counts(counts, skip_bad):
    """Print what was cleaned and skipped. Raises UserError where more records than MOST_BAD have no
    text and skip_bad does not allow it, or where none has text."""
    tell_changes(counts)
    if not counts.records:
        raise UserError('source has no documents: give files that are not empty')
    if counts.bad == counts.records:
        raise UserError(f'none of {counts.records:,} records has text, for instance '
                        f'{counts.first_bad}: set --text_key to the name that the text has, or '
                        'give another source')
    if not counts.bad:
        return
    what = f'{counts.bad:,} of {counts.records:,} records {"has" if counts.bad == 1 else "have"}'
    if counts.bad > MOST_BAD * counts.records and not skip_bad:
        raise UserError(f'{what} no text, the first: {counts.first_bad}: set --text_key to the '
                        'name that the text has, or give --skip_bad=True to leave such records out')
    print(f'skipped    {what} no text')
