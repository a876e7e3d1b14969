"""data/openwebtext/prepare.py, which is data/prepare.py with other defaults: the bins against
nanoGPT's procedure, interruptions, memory, mistakes. No network."""

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from configurator import UserError

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import documents as local
from data import pipeline
from data.openwebtext import prepare
from runtime.lock import locked
from runtime.tokenizer import gpt2_encoding

PROGRAM = Path(prepare.__file__)
SPLITS = ('train', 'val')
VAL_SHARE = 0.005


def make_documents(n, seed=0):
    rng = np.random.default_rng(seed)
    words = ['the', 'Naïve', "don't", '你好', '🙂', '<|endoftext|>', '\n\n', '1,234', ' ', '\t',
             'é', 'x\n\ny', '\u3000', 'Tok']
    return ['a ' + ' '.join(rng.choice(words, rng.integers(60))) for _ in range(n)]


def tokenize_row(row):
    return {'ids': gpt2_encoding().encode_ordinary(row['text']) + [50256]}


def nanogpt_bins(documents, val_share=VAL_SHARE):
    """What nanoGPT's prepare.py makes of the documents, by its own means: the bytes of train.bin
    and val.bin."""
    split = datasets.Dataset.from_list([{'text': d} for d in documents]).train_test_split(
        test_size=val_share, seed=2357, shuffle=True)
    tokenized = split.map(tokenize_row, remove_columns=['text'])
    ids = [tokenized[name].with_format('numpy')['ids'][:] for name in ('train', 'test')]
    return [np.concatenate(rows).astype(np.uint16).tobytes() for rows in ids]


@pytest.fixture(scope='module')
def documents():
    datasets.disable_progress_bars()
    return make_documents(2100)  # of which 11 go to val


@pytest.fixture(scope='module')
def expected(documents):
    return nanogpt_bins(documents)


def write_source(folder, kind, documents, key='text'):
    """The documents as files of a kind in folder. Returns the glob."""
    folder.mkdir()
    half = len(documents) // 2
    for name, group in (('a', documents[:half]), ('b', documents[half:])):
        lines = ''.join(json.dumps({'id': 1, key: d}, ensure_ascii=name == 'a') + '\n'
                        for d in group).encode()
        if kind == 'txt':
            for i, document in enumerate(group):
                (folder / f'{name}{i:05d}.txt').write_bytes(document.encode())
        elif kind == 'jsonl':
            (folder / f'{name}.jsonl').write_bytes(b'\n' + lines)
        elif kind == 'json.gz':
            (folder / f'{name}.json.gz').write_bytes(gzip.compress(lines))
        else:
            table = pyarrow.table({'id': list(range(len(group))), key: group})
            pyarrow.parquet.write_table(table, folder / f'{name}.parquet', row_group_size=400)
    return f'{folder}/*.{kind}'


def bins(folder):
    return [(folder / f'{split}.bin').read_bytes() for split in SPLITS]


@pytest.mark.parametrize('kind, workers', [
    ('txt', 3), ('jsonl', 1), ('json.gz', 2), ('parquet', 2)])
def test_bins_are_those_of_nanogpt(kind, workers, documents, expected, tmp_path, program):
    key = 'text' if kind == 'txt' else 'body'
    source = write_source(tmp_path / 'source', kind, documents, key)
    code, out, err = program(prepare.main, f'--source={source}', f'--out_dir={tmp_path / "out"}',
                             f'--workers={workers}', f'--text_key={key}',
                             f'--val_share={VAL_SHARE}')
    assert (code, err) == (0, '') and 'documents  2,100' in out
    assert f'{len(expected[0]) // 2:,} in train.bin, {len(expected[1]) // 2:,} in val.bin' in out
    assert bins(tmp_path / 'out') == expected
    assert sorted(os.listdir(tmp_path / 'out')) == ['.lock', 'meta.json', 'train.bin', 'val.bin']


def test_dataset_of_the_hub(documents, tmp_path, program, monkeypatch):
    """Its texts are taken as they are: empty ones, and any line ends."""
    rows = ['', 'x\r\ny', *documents]
    expected, calls = nanogpt_bins(rows), []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if kwargs['revision'] is None:
            raise RuntimeError('Dataset scripts are no longer supported, but found '
                               'openwebtext.py')
        return datasets.Dataset.from_list([{'body': d, 'url': ''} for d in rows])
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    builder = SimpleNamespace(info=SimpleNamespace(dataset_size=None), cache_dir=tmp_path / 'cache')
    monkeypatch.setattr(datasets, 'load_dataset_builder', lambda *args, **kwargs: builder)
    args = ['--dataset=some/web', '--subset=sample', '--split=all', '--workers=2',
            f'--val_share={VAL_SHARE}',
            f'--out_dir={tmp_path}']
    code, out, err = program(prepare.main, *args, '--text_key=body')
    assert (code, err) == (0, '') and bins(tmp_path) == expected
    settings = dict(split='all', revision='refs/convert/parquet', num_proc=2)
    assert calls[-1] == (('some/web', 'sample'), settings)
    calls.clear()
    code, _, err = program(prepare.main, *args)
    assert code == 2 and 'holds train.bin, val.bin and meta.json already' in err and not calls
    args[-1] = f'--out_dir={tmp_path / "other"}'
    code, _, err = program(prepare.main, *args)
    assert code == 2 and "no column 'text' but body, url" in err and err.count('\n') == 1
    calls.clear()
    builder.info.dataset_size = 50e9
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path)
    monkeypatch.setattr(pipeline.shutil, 'disk_usage', lambda path: SimpleNamespace(free=100e9))
    code, _, err = program(prepare.main, *args)
    assert code == 2 and 'has 100 GB free, and about 130 GB more are needed' in err
    assert err.count('\n') == 1 and not calls


@pytest.mark.parametrize('fault', [
    ConnectionError('no route\nto host'), ValueError("BuilderConfig 'x' not found")])
def test_a_download_that_fails_is_one_line(fault, tmp_path, program, monkeypatch):
    def load(*args, **kwargs):
        raise fault
    monkeypatch.setattr(datasets, 'load_dataset_builder', load)
    code, _, err = program(prepare.main, f'--out_dir={tmp_path}')
    assert code == 2 and 'dataset=openwebtext cannot be had' in err and err.count('\n') == 1


def test_a_killed_run_goes_on_where_it_was(tmp_path, program, monkeypatch):
    documents = [d * 15 for d in make_documents(600, seed=1)]
    source, out_dir = write_source(tmp_path / 'source', 'jsonl', documents), tmp_path / 'out'
    args = [f'--source={source}', f'--out_dir={out_dir}', '--part_documents=1', '--workers=2',
            '--val_share=0.02']
    process = subprocess.Popen([sys.executable, PROGRAM, *args], stdout=subprocess.DEVNULL)
    while len(list(out_dir.glob('parts/*.part'))) < 20:
        assert process.poll() is None
        time.sleep(0.005)
    workers = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, 'a worker outlives its parent'
        time.sleep(0.01)
    assert len(workers) >= 2 and not (out_dir / 'train.bin').exists()
    (out_dir / 'parts' / 'train.000100.part.partial').write_bytes(b'half')

    def stamps():
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
                for path in out_dir.glob('parts/*')
                if path.suffix == '.part' or path.name.startswith('text.')}
    before, after = stamps(), {}
    monkeypatch.setattr(pipeline, 'close_work', lambda work, close=pipeline.close_work:
                        (after.update(stamps()), close(work)))
    code, out, _ = program(prepare.main, *args)
    n_parts = sum(name.endswith('.part') for name in before)
    assert code == 0 and f'goes on    {n_parts:,} of 600 parts are there' in out
    assert 20 <= n_parts < 600
    assert after.items() > before.items()  # none was written again
    assert bins(out_dir) == nanogpt_bins(documents, 0.02)


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


def test_a_changed_source_starts_over_and_an_end_while_tidying_up_does_not(tmp_path, program,
                                                                           monkeypatch):
    in_this_process(monkeypatch)
    documents = make_documents(30, seed=2)
    source = write_source(tmp_path / 'source', 'jsonl', documents)
    args = [f'--source={source}', f'--out_dir={tmp_path}', '--workers=1', '--val_share=0.7']

    def stop(*args):
        raise UserError('stop')
    with monkeypatch.context() as patch:  # when all is tokenized, before the parts are joined
        patch.setattr(pipeline, 'tokenize',
                      lambda *args, tokenize=pipeline.tokenize: stop(tokenize(*args)))
        assert program(prepare.main, *args)[0] == 2
    (tmp_path / 'source' / 'a.jsonl').write_text(json.dumps({'text': 'new'}))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.shutil, 'rmtree', lambda path, rmtree=shutil.rmtree:
                      stop() if (path / 'state').read_text().endswith('done') else rmtree(path))
        code, out, _ = program(prepare.main, *args)
    assert code == 2 and 'starting over' in out
    assert bins(tmp_path) == nanogpt_bins(['new'] + documents[15:], 0.7)
    assert os.listdir(tmp_path / 'parts') == ['state']
    code, out, _ = program(prepare.main, *args)
    assert code == 0 and 'documents' not in out and 'tokens' in out
    assert not (tmp_path / 'parts').exists()


@pytest.mark.parametrize('files, args, message', [
    ({}, ['--source={}/*.txt'], 'matches no file'),
    ({'a.doc': b''}, ['--source={}/a.doc'], 'a.doc ends in none of .txt, .md, .jsonl'),
    ({'a.txt': b'o'}, ['--source={}/*.txt'], 'the text has 1 byte, too few for train.bin and val'),
    ({'a.jsonl': b''}, ['--source={}/*.jsonl'], 'source has no documents: give files that are not'),
    ({'a.txt': b'good', 'b.txt': b'bad \xff'}, ['--source={}/*.txt'], 'b.txt is not UTF-8'),
    ({'a.txt': b'good', 'b.txt': 'é'.encode()[:1]}, ['--source={}/*.txt'], 'b.txt is not UTF-8'),
    ({'a.jsonl': b'{"text": "a"}\n{"text": "\xff"}\n'}, ['--source={}/*.jsonl'],
     'a.jsonl is not UTF-8 in line 2'),
    ({'a.jsonl': b'{"text": "a"}\n{"body": "b"}\n'}, ['--source={}/*.jsonl'],
     "1 of 2 records has no text, the first: "),
    ({'a.json': b'{\n"text": "a"}'}, ['--source={}/*.json'], 'a.json: line 1 is not JSON'),
    ({'a.json.gz': b'no gzip'}, ['--source={}/*.gz'], 'a.json.gz cannot be read'),
    ({'a.parquet': b'no parquet'}, ['--source={}/*.parquet'], 'a.parquet cannot be read'),
    ({'a.txt': b'', 'parts/mine': b''}, ['--source={}/*.txt'],
     'parts holds files that are not of this program'),
    ({'a.txt': b''}, ['--source={}/*.txt', '--out_dir={}/a.txt/x'], 'a.txt/x cannot be written'),
    ({'a.txt': b''}, ['--source={}/*.txt', '--dataset=other'], 'takes the place of dataset'),
    ({'a.txt': b''}, ['--source={}/*.txt', '--split=none'], 'takes the place of dataset'),
    ({'a.txt': b''}, ['--source={}/*.txt', '--out_dir='], 'out_dir is needed'),
    ({'a.txt': b'', 'meta.pkl': b''}, ['--source={}/*.txt'],
     'holds meta.pkl already: choose another --out_dir, or remove it first'),
    ({'a.txt': b''}, ['--source={}'], 'none of 1 records has text, for instance '),
    ({'a.jsonl': b'[{"text": "a"}]'}, ['--source={}/*.jsonl'], 'a.jsonl: line 1 is a list'),
    ({}, ['--dataset=other', '--out_dir='], 'out_dir is needed'),
    ({}, ['--workers=-1'], 'workers=-1 must be at least 0'),
])
def test_mistakes_are_one_line(files, args, message, tmp_path, program, monkeypatch):
    in_this_process(monkeypatch)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    args = [f'--out_dir={tmp_path}', '--workers=1', *[arg.format(tmp_path) for arg in args]]
    code, _, err = program(prepare.main, *args)
    assert code == 2 and message in err and err.count('\n') == 1, err
    assert not list(tmp_path.glob('*.bin'))


def test_finished_bins_are_not_written_over(tmp_path, program, monkeypatch):
    in_this_process(monkeypatch)
    source = write_source(tmp_path / 'source', 'jsonl', make_documents(30))
    args = [f'--source={source}', f'--out_dir={tmp_path / "out"}', '--workers=1']
    assert program(prepare.main, *args)[0] == 0
    before = bins(tmp_path / 'out')
    (tmp_path / 'source' / 'a.jsonl').write_text('{"text": "new"}')
    code, _, err = program(prepare.main, *args)
    assert code == 2 and err.count('\n') == 1
    assert 'holds train.bin, val.bin and meta.json already' in err
    assert bins(tmp_path / 'out') == before


def in_this_process(monkeypatch):
    """Threads in place of worker processes, which take a second to start."""
    monkeypatch.setattr('runtime.workers.ProcessPoolExecutor',
                        lambda workers, *args: ThreadPoolExecutor(workers))
    # none is kept open from one run to the next
    monkeypatch.setattr(pipeline, 'reader', lambda path: open(path, 'rb'))
    monkeypatch.setattr(pipeline, 'tokenizer_at', pipeline.tokenizer_at.__wrapped__)


def test_missing_column_and_null(tmp_path, program, monkeypatch):
    in_this_process(monkeypatch)
    pyarrow.parquet.write_table(pyarrow.table({'body': ['a', None]}), tmp_path / 'a.parquet')
    args = [f'--source={tmp_path}/*.parquet', f'--out_dir={tmp_path}', '--workers=1']
    code, _, err = program(prepare.main, *args)
    assert code == 2 and "a.parquet has no column 'text' but body: set --text_key" in err
    assert err.count('\n') == 1
    code, _, err = program(prepare.main, *args, '--text_key=body')
    assert code == 2 and "a.parquet: row 2 has no text under 'body'" in err
    assert err.count('\n') == 1 and '--skip_bad=True' in err


def test_a_real_worker_hands_its_mistake_on(tmp_path, program):
    (tmp_path / 'a.txt').write_bytes(b'\xff')
    code, _, err = program(prepare.main, f'--source={tmp_path}/a.txt', f'--out_dir={tmp_path}',
                           '--workers=1')
    assert code == 2 and 'a.txt is not UTF-8' in err and err.count('\n') == 1


def test_two_runs_in_one_folder_are_refused(tmp_path, program):
    source = write_source(tmp_path / 'source', 'jsonl', make_documents(4))
    with locked(tmp_path):
        code, _, err = program(prepare.main, f'--source={source}', f'--out_dir={tmp_path}')
    assert code == 2 and err.count('\n') == 1 and 'is in use by another run' in err
    assert not (tmp_path / 'train.bin').exists() and not (tmp_path / 'parts').exists()


def test_disk_space_is_checked_first(tmp_path, program, monkeypatch):
    (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n' * 1000)
    monkeypatch.setattr(pipeline.shutil, 'disk_usage', lambda path: SimpleNamespace(free=20_000))
    code, _, err = program(prepare.main, f'--source={tmp_path}/a.jsonl', f'--out_dir={tmp_path}')
    assert code == 2 and 'has 2e-05 GB free, and about 2.8e-05 GB more are needed' in err
    assert err.count('\n') == 1
    assert sorted(os.listdir(tmp_path)) == ['.lock', 'a.jsonl']
    (tmp_path / 'parts').mkdir()
    (tmp_path / 'parts' / 'x').write_bytes(b'1' * 9000)  # what an unfinished run has written counts
    pipeline.check_space(tmp_path, 28_000)


def test_memory_does_not_hold_the_corpus(tmp_path):
    text = ' '.join(make_documents(200, seed=3)).encode()
    (tmp_path / 'a.txt').write_bytes(text * (20_000_000 // len(text)))  # a document of 20 MB
    with open(tmp_path / 'b.jsonl', 'w') as f:
        for _ in range(200):
            f.write(json.dumps({'text': 'word ' * 20_000}) + '\n')  # and 20 MB of others
    args = [f'--source={tmp_path}/*.*', f'--out_dir={tmp_path}/out', '--workers=2']
    process = subprocess.Popen([sys.executable, PROGRAM, *args], stdout=subprocess.DEVNULL)
    peaks = {}
    while process.poll() is None:
        for pid in [str(process.pid), *children(process.pid)]:
            peaks[pid] = max(peaks.get(pid, 0), peak_megabytes(pid))
        time.sleep(0.01)
    assert process.returncode == 0 and len(peaks) >= 3
    assert max(peaks.values()) < 105, peaks  # of which Python with tiktoken takes 70


def children(pid):
    try:
        return Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    except OSError:
        return []


def peak_megabytes(pid):
    try:
        return int(Path(f'/proc/{pid}/status').read_text().split('VmHWM:')[1].split()[0]) / 1000
    except (OSError, IndexError):
        return 0


def test_long_documents_are_cut_where_tokens_end(monkeypatch):
    encode = gpt2_encoding().encode_ordinary
    text = (''.join(make_documents(300, seed=4)) + '  \n\n a\u3000 b \x1c c' + 'x' * 500
            + '   ' * 100)
    for size in (16, 50, 333):
        monkeypatch.setattr(pipeline, 'PIECE', size)
        content = text.encode()
        pieces = list(pipeline.read_pieces(io.BytesIO(content), len(content), 'at spaces'))
        assert len(pieces) > 10 and ''.join(pieces) == text
        assert [i for piece in pieces for i in encode(piece)] == encode(text)


def test_half_a_surrogate_pair_is_replaced_as_tiktoken_does(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('\ufeff{"text": "a \\ud83d b \\ud83d\\ude42"}\n\n', encoding='utf-8')
    (content, is_last), = local.read_documents(str(path), 'text', local.Counts())
    encode = gpt2_encoding().encode_ordinary
    assert is_last and '🙂' in content.decode()
    assert encode(content.decode()) == encode('a \ud83d b 🙂')


def test_beyond_what_can_be_shuffled_runs_of_documents_are(tmp_path, program, monkeypatch):
    in_this_process(monkeypatch)
    monkeypatch.setattr(pipeline, 'MOST_SHUFFLED', 40)
    documents = make_documents(110, seed=5)
    source = write_source(tmp_path / 'source', 'jsonl', documents)
    code, *_ = program(prepare.main, f'--source={source}', f'--out_dir={tmp_path}', '--workers=1')
    assert code == 0
    runs = [documents[i:i + 3] for i in range(0, 110, 3)]
    order = [runs[i] for i in np.random.default_rng(2357).permutation(37)]
    encode = gpt2_encoding().encode_ordinary
    ids = [[i for run in part for d in run for i in encode(d) + [50256]]
           for part in (order[4:], order[:4])]  # a tenth of the runs
    assert bins(tmp_path) == [np.array(i, dtype=np.uint16).tobytes() for i in ids]
