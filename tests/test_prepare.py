"""data/prepare.py: one's own files, of every kind and in every state. No network."""

import codecs
import csv
import gzip
import io
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_openwebtext import make_documents
from tokenizers import Tokenizer

from data import documents as local
from data import pipeline, prepare
from runtime.dataset import open_data
from runtime.record import write_record
from runtime.tokenizer import gpt2_encoding, make_tokenizer

TEXT = 'To be, or not to be,\nthat is the question:\n\nWhether it is nobler — 東京 🙂\n' * 20


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Threads in place of worker processes, and nothing is kept from one run to the next."""
    monkeypatch.setattr('runtime.workers.ProcessPoolExecutor',
                        lambda workers, *args: ThreadPoolExecutor(workers))
    monkeypatch.setattr(pipeline, 'reader', lambda path: open(path, 'rb'))
    monkeypatch.setattr(pipeline, 'tokenizer_at', pipeline.tokenizer_at.__wrapped__)


@pytest.fixture
def make(tmp_path, program):
    """A function that prepares sources in tmp_path/out. Returns the Data and what was said, or the
    error of exit code 2."""
    def call(*args, out='out'):
        code, said, err = program(prepare.main, f'--out_dir={tmp_path / out}', '--workers=1',
                                  *args)
        if code == 2:
            assert err.count('\n') == 1 and 'delete' not in err
            return err
        assert (code, err) == (0, ''), err
        return open_data(tmp_path / out), said
    return call


def texts(data):
    """The documents in both splits of data that ends them with a token, sorted."""
    end, found = data.tokenizer.end_of_text, []
    for tokens in (data.val, data.train):
        parts = np.split(tokens, np.flatnonzero(tokens == end) + 1)
        found += [data.tokenizer.decode(part[part != end].tolist()) for part in parts if len(part)]
    return sorted(found)


def write_file(path, kind, documents):
    """The documents as a file of a kind."""
    rows = [{'id': i, 'text': document} for i, document in enumerate(documents)]
    if kind in ('.jsonl', '.ndjson'):
        content = ''.join(json.dumps(row) + '\n' for row in rows)
    elif kind == '.json':
        content = json.dumps(rows, indent=1)
    elif kind == '.csv':
        f = io.StringIO()
        writer = csv.DictWriter(f, ['id', 'text'])
        writer.writeheader()
        writer.writerows(rows)
        content = f.getvalue()
    else:
        pyarrow.parquet.write_table(pyarrow.table({'id': [1] * len(rows), 'text': documents}), path)
        return path.read_bytes()
    path.write_text(content, encoding='utf-8', newline='')
    return content.encode()


@pytest.mark.parametrize('zipped', [False, True])
@pytest.mark.parametrize('kind', ['.jsonl', '.ndjson', '.json', '.csv', '.parquet'])
def test_every_kind_of_file_gives_the_same_documents(kind, zipped, make, tmp_path):
    documents = make_documents(60, seed=3) + ['"quoted",\nwith a comma', "it's"]
    path = tmp_path / f'a{kind}'
    content = write_file(path, kind, documents)
    if zipped:
        path.unlink()
        path = tmp_path / f'a{kind}.gz'
        path.write_bytes(gzip.compress(content))
    data, _ = make(f'--source={path}', '--tokenizer=gpt2', '--val_share=0.3')
    assert texts(data) == sorted(documents)


def test_files_folders_globs_and_commas(make, tmp_path):
    corpus = tmp_path / 'corpus'
    (corpus / 'deep').mkdir(parents=True)
    (corpus / '.hidden').mkdir()
    for name in ('a.txt', 'deep/b.md', 'deep/c.TXT', 'notes.pdf', '.hidden/d.txt', '.e.txt'):
        (corpus / name).write_text(f'document {name} ' * 3)
    (corpus / 'deep' / 'f.txt.gz').write_bytes(gzip.compress(b'document f'))
    expected = sorted(f'document {name} ' * 3 for name in ('a.txt', 'deep/b.md', 'deep/c.TXT'))
    expected.append('document f')
    data, said = make(f'--source={corpus}', '--tokenizer=gpt2')
    assert ''.join(sorted(''.join(texts(data)))) == ''.join(sorted(''.join(expected)))
    assert 'documents  4,' in said and 'note: 1 file of other kinds is left out: .pdf' in said
    for source in (f'{corpus}/*.txt,{corpus}/deep', f'{corpus}/**/*.txt, {corpus}/deep/*'):
        _, said = make(f'--source={source}', '--tokenizer=gpt2', out=str(len(source)))
        assert 'documents  4,' in said  # each once
    # what is in out_dir is not the source
    _, said = make(f'--source={tmp_path}', '--tokenizer=gpt2', out='.')
    assert 'documents  4,' in said


@pytest.mark.parametrize('mark, encoding', [
    (b'', 'utf-8'), (codecs.BOM_UTF8, 'utf-8'), (codecs.BOM_UTF16_LE, 'utf-16-le'),
    (codecs.BOM_UTF16_BE, 'utf-16-be'), (codecs.BOM_UTF32_LE, 'utf-32-le'),
    (codecs.BOM_UTF32_BE, 'utf-32-be')])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_marks_go_and_lines_end_alike(mark, encoding, end, make, tmp_path, monkeypatch):
    monkeypatch.setattr(local, 'PIECE', 10)  # characters and line ends fall across pieces
    (tmp_path / 'a.txt').write_bytes(mark + TEXT.replace('\n', end).encode(encoding))
    data, said = make(f'--source={tmp_path}/a.txt', '--tokenizer=chars')
    decode = data.tokenizer.decode
    assert decode(data.train.tolist()) + decode(data.val.tolist()) == TEXT
    assert data.tokenizer.spec == sorted(set(TEXT))
    changes = ['1 byte order mark'] * (mark != b'') + ['80 line ends'] * (end != '\n')
    assert ('cleaned    ' + ', '.join(changes) in said) if changes else 'cleaned' not in said


def test_line_ends_in_records_are_cleaned_too(make, tmp_path):
    write_file(tmp_path / 'a.jsonl', '.jsonl', ['one\r\ntwo', 'three\rfour', 'a\r\rb\n'])
    data, said = make(f'--source={tmp_path}/a.jsonl', '--tokenizer=chars', '--val_share=0.5')
    assert '\r' not in data.tokenizer.spec and 'cleaned    4 line ends' in said


@pytest.mark.parametrize('n_bad, skip, kept', [(0, False, True), (1, False, True),
                                               (2, False, False), (2, True, True)])
def test_records_without_text(n_bad, skip, kept, make, tmp_path):
    documents = make_documents(100, seed=4)
    bad = ['{"body": "x"}', '{"text": null}', '{"text": ""}', '{"text": " \\n"}', '{"text": 7}',
           '[1]', 'null', '{']
    lines = [json.dumps({'text': document}) for document in documents]
    for i in range(n_bad):
        lines[40 + i] = bad[i]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines) + '\n\n')
    args = [f'--source={tmp_path}/a.jsonl', '--tokenizer=gpt2', *['--skip_bad=True'] * skip]
    made = make(*args)
    if not kept:
        assert '2 of 100 records have no text, the first: ' in made
        assert 'line 41 has no text' in made
        assert '--skip_bad=True' in made and not list((tmp_path / 'out').glob('*.bin'))
        return
    data, said = made
    verb = 'has' if n_bad == 1 else 'have'
    assert (f'skipped    {n_bad} of 100 records {verb} no text' in said) == (n_bad > 0)
    assert texts(data) == sorted(documents[:40] + documents[40 + n_bad:])
    for line in bad:  # each kind of them
        (tmp_path / 'b.jsonl').write_text(line + '\n' + '\n'.join(lines))
        assert 'line 1 ' in make(f'--source={tmp_path}/b.jsonl', '--tokenizer=gpt2', out=line[:3] +
                                 str(len(line))) or n_bad == 0


@pytest.mark.parametrize('text, where', [
    (TEXT, 'at a line'), ('word ' * 2000, 'at a space'), ('ACGT' * 3000, 'between characters'),
    ('東京の夏' * 900, 'between characters')])
@pytest.mark.parametrize('share', [0.0, 0.25])
def test_one_document_is_cut_through(text, where, share, make, tmp_path):
    (tmp_path / 'a.txt').write_text(text)
    args = [f'--val_share={share}'] if share else []
    data, said = make(f'--source={tmp_path}/a.txt', '--tokenizer=chars', *args)
    train, val = (data.tokenizer.decode(tokens.tolist()) for tokens in (data.train, data.val))
    assert train + val == text and f'cut {where}' in said
    held = len(val.encode()) / len(text.encode())
    assert held == pytest.approx(share or 0.1, rel=0.5 if where == 'at a line' else 0.01)
    if where == 'at a line':
        assert train.endswith('\n')


@pytest.mark.parametrize('n, length', [(2, 3000), (3, 3000), (9, 3000), (275, 30)])
def test_few_or_short_documents_give_val_its_share(n, length, make, tmp_path):
    rng = np.random.default_rng(0)
    documents = []
    for i in range(n):
        words = rng.choice(['alpha', 'beta', 'gamma', 'delta'], size=length // 6)
        documents.append(f'document {i}\n' + '\n'.join(map(' '.join, np.array_split(words, 9))))
        (tmp_path / f'{i:03d}.txt').write_text(documents[-1])
    data, said = make(f'--source={tmp_path}/*.txt', '--tokenizer=gpt2')
    n_bytes = [len(data.tokenizer.decode(t[t != 50256].tolist()).encode())
               for t in (data.train, data.val)]
    assert sum(n_bytes) == sum(len(d.encode()) for d in documents)
    assert n_bytes[1] / sum(n_bytes) == pytest.approx(0.1, rel=0.25)
    whole = [i for text in documents for i in gpt2_encoding().encode_ordinary(text) + [50256]]
    assert abs(len(data.train) + len(data.val) - len(whole)) <= 2  # where it is cut
    assert ('a block_size must be below that' in said) == (len(data.val) < 1025)


def test_a_cut_document_ends_in_val_alone(make, tmp_path):
    for i in range(3):
        (tmp_path / f'{i}.txt').write_text(f'{i}\n' * 500)
    data, _ = make(f'--source={tmp_path}/*.txt', '--tokenizer=gpt2')
    assert (data.train == 50256).sum() == 2 and (data.val == 50256).sum() == 1
    assert data.val[-1] == 50256 and data.tokenizer.decode(data.train[-2:].tolist()) in (
        '0\n', '1\n', '2\n')  # it is the last of train, at a line


def test_documents_of_characters_are_separated_by_a_line_break(make, tmp_path):
    for name, text in (('a', 'AAAA' * 50), ('b', 'BBBB\n' * 40), ('c', 'CCCC' * 50)):
        (tmp_path / f'{name}.txt').write_text(text)
    data, _ = make(f'--source={tmp_path}/*.txt', '--tokenizer=chars')
    text = data.tokenizer.decode(data.train.tolist() + data.val.tolist())
    assert data.tokenizer.spec == ['\n', 'A', 'B', 'C'] and '\n\n' not in text
    assert all(len(set(line)) <= 1 for line in text.split('\n'))  # no line has two documents
    (tmp_path / 'one.md').write_text('ACGT' * 50)  # one document needs none
    data, _ = make(f'--source={tmp_path}/one.md', '--tokenizer=chars', out='one')
    assert data.tokenizer.spec == list('ACGT')


def test_byte_pairs_are_learned_and_encode_as_the_library_does(make, tmp_path):
    documents = [TEXT, 'another <|endoftext|> text ' * 50, 'a third one\n' * 60]
    for i, document in enumerate(documents):
        (tmp_path / f'{i}.txt').write_text(document)
    args = [f'--source={tmp_path}/*.txt', '--tokenizer=bpe']
    data, said = make(*args, '--vocab_size=300')
    assert data.tokenizer.n_vocab == 300 and 'tokenizer  300 byte pairs' in said
    peer = Tokenizer.from_str(data.tokenizer.spec['bpe'])
    end = peer.token_to_id('<|endoftext|>')
    assert data.tokenizer.end_of_text == end and (data.train == end).sum() == 2
    peer.encode_special_tokens = True
    ids = [peer.encode(document).ids for document in documents]
    parts = np.split(data.train, np.flatnonzero(data.train == end) + 1)
    assert sum(part[:-1].tolist() in ids for part in parts) == 2  # the third is cut
    assert ''.join(texts(data)).count('<|endoftext|>') == 50
    # the same text gives the same byte pairs; more than it has are not invented
    again, said = make(*args, '--vocab_size=300', out='again')
    assert again.tokenizer.spec == data.tokenizer.spec and np.array_equal(again.val, data.val)
    _, said = make(*args, '--vocab_size=4096', out='many')
    assert 'the text has byte pairs for' in said and 'and not for vocab_size=4,096' in said


def test_another_texts_vocabulary(make, tmp_path):
    (tmp_path / 'a.txt').write_text(TEXT)
    (tmp_path / 'b.txt').write_text('be not to be, or to be' * 30)
    for tokenizer in ('chars', 'bpe --vocab_size=280'):
        name, *more = tokenizer.split()
        first, _ = make(f'--source={tmp_path}/a.txt', f'--tokenizer={name}', *more, out=name)
        second, _ = make(f'--source={tmp_path}/b.txt', f'--tokenizer={tmp_path / name}',
                         out=f'{name}2')
        assert second.tokenizer.spec == first.tokenizer.spec
        assert second.tokenizer.decode(second.train[:9].tolist()).startswith('be not')
    (tmp_path / 't.json').write_text(first.tokenizer.spec['bpe'])
    third, _ = make(f'--source={tmp_path}/b.txt', f'--tokenizer={tmp_path}/t.json', out='third')
    assert np.array_equal(third.train, second.train)
    (tmp_path / 'c.txt').write_text('xyz Ω' * 9)
    err = make(f'--source={tmp_path}/c.txt', f'--tokenizer={tmp_path}/chars', out='c')
    assert "the text has 'x', 'y', 'z', 'Ω', which" in err and 'lacks' in err


def test_a_vocabulary_past_65535_takes_32_bits(make, tmp_path):
    chars = [chr(i) for i in range(32, 90_000) if not 0xD800 <= i < 0xE000][:70_000]
    (tmp_path / 'a.txt').write_text(''.join(chars) * 2)
    data, said = make(f'--source={tmp_path}/a.txt', '--tokenizer=chars')
    assert data.train.dtype == np.uint32 and data.tokenizer.n_vocab == 70_000
    assert data.tokenizer.decode(data.train[:70_000].tolist()) == ''.join(chars)
    assert os.path.getsize(tmp_path / 'out' / 'train.bin') == 4 * len(data.train)


def test_what_bins_mean_is_recorded_for_bins_that_are_there(make, tmp_path):
    folder = tmp_path / 'out'
    folder.mkdir()
    ids = gpt2_encoding().encode_ordinary(TEXT)
    for split in ('train', 'val'):
        np.array(ids, dtype=np.uint16).tofile(folder / f'{split}.bin')
    before = (folder / 'train.bin').read_bytes()
    data, said = make('--tokenizer=gpt2')
    assert data.tokenizer.spec == 'gpt2' and "recorded   the ids are GPT-2's byte pairs" in said
    assert "'To be, or not to be,\\nthat" in said and (folder / 'train.bin').read_bytes() == before
    make('--tokenizer=gpt2')  # twice is the same
    err = make('--tokenizer=unknown', '--vocab_size=60000')
    assert "meta.json says that the ids are GPT-2's byte pairs, and not ids of unknown" in err
    assert open_data(folder).tokenizer.spec == 'gpt2'
    (folder / 'meta.json').unlink()
    assert 'holds id ' in make('--tokenizer=unknown', '--vocab_size=50')
    data, _ = make('--tokenizer=unknown', '--vocab_size=60000')
    assert data.tokenizer.spec == {'unknown': 60_000}


def test_bins_of_32_bits_are_recorded(make, tmp_path):
    folder = tmp_path / 'out'
    folder.mkdir()
    ids = np.random.default_rng(0).integers(100_000, size=900).astype(np.uint32)
    for split in ('train', 'val'):
        ids.tofile(folder / f'{split}.bin')
    data, said = make('--tokenizer=unknown', '--vocab_size=100000')
    assert np.array_equal(data.train, ids) and 'uint32' in said
    (folder / 'meta.json').unlink()
    small = ids % 50_000  # GPT-2's ids may have been written so too
    for split in ('train', 'val'):
        small.tofile(folder / f'{split}.bin')
    data, _ = make('--tokenizer=gpt2')
    assert np.array_equal(data.val, small) and data.tokenizer.spec == 'gpt2'
    (folder / 'val.bin').write_bytes(b'odd')
    (folder / 'meta.json').unlink()
    assert 'val.bin has 3 bytes, which is not a row of uint32 ids' in make('--tokenizer=gpt2')


def test_nanogpts_meta_pkl_says_it_already(make, tmp_path):
    folder = tmp_path / 'out'
    folder.mkdir()
    for split in ('train', 'val'):
        np.array([0, 1, 2] * 9, dtype=np.uint16).tofile(folder / f'{split}.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 1500}))
    assert open_data(folder).tokenizer.spec == {'unknown': 1500}
    assert 'says that the ids are ids of unknown meaning below 1,500' in make('--tokenizer=gpt2')


@pytest.mark.parametrize('args, words', [
    ([], 'source is needed'), (['--source={a}'], 'tokenizer is needed: chars'),
    (['--source={a}', '--tokenizer=words'], 'tokenizer=words is neither chars, gpt2 nor bpe'),
    (['--source={a}', '--tokenizer=bpe'], 'vocab_size=0 must be at least 257'),
    (['--source={a}', '--tokenizer=chars', '--vocab_size=99'], 'vocab_size=99 is for tokeni'),
    (['--source={a}', '--tokenizer=unknown', '--vocab_size=9'], 'is for bins that are there'),
    (['--source={a}', '--tokenizer={a}'], 'it is no tokenizer.json'),
    (['--source={a}', '--tokenizer={folder}'], 'has no record of what its ids mean'),
    (['--source={a}', '--tokenizer=chars', '--val_share=1'], 'val_share=1.0 must be above 0 and'),
    (['--source={a}', '--tokenizer=chars', '--out_dir='], 'out_dir is needed'),
    (['--source={folder}/none.txt', '--tokenizer=chars'], 'none.txt matches no file'),
    (['--source={folder}', '--tokenizer=chars'], 'matches no file'),
    (['--source={a}', '--tokenizer=chars', '--vocab=3'], '--vocab; did you mean vocab_s'),
    (['--tokenizer=gpt2', '--out_dir={folder}'], 'has no train.bin and no val.bin: give --source'),
    (['--tokenizer=chars', '--out_dir={folder}'], 'has no train.bin')])
def test_mistakes(args, words, tmp_path, program):
    (tmp_path / 'a.txt').write_text(TEXT)
    (tmp_path / 'folder').mkdir()
    known = {'a': tmp_path / 'a.txt', 'folder': tmp_path / 'folder'}
    args = [f'--out_dir={tmp_path / "out"}', *[arg.format(**known) for arg in args]]
    code, _, err = program(prepare.main, *(args[1:] if args[1:] == [] else args))
    assert code == 2 and words in err and err.count('\n') == 1, err
    assert not list(tmp_path.glob('**/*.bin')) and (tmp_path / 'a.txt').read_text() == TEXT


@pytest.mark.parametrize('name, content, words', [
    ('a.json', '[{"text": "one"}, {"text": "two"', 'its array has no end or a mistake'),
    ('a.json', '[{"text": "one"} {"text": "two"}]', 'its array has no end or a mistake'),
    ('a.csv', 'id,body\n1,x\n', "has no column 'text' but id, body: set --text_key"),
    ('a.csv', 'text\n"open', 'cannot be read'), ('a.csv', '', "has no column 'text'"),
    ('a.txt', ' \n\t', 'none of 1 records has text'), ('a.json', '[]', 'source has no documents'),
    ('a.txt.gz', 'no gzip', 'cannot be read')])
def test_files_that_are_damaged_or_empty(name, content, words, make, tmp_path):
    (tmp_path / name).write_text(content)
    assert words in make(f'--source={tmp_path / name}', '--tokenizer=chars')


def test_a_json_array_is_read_in_pieces(make, tmp_path, monkeypatch):
    monkeypatch.setattr(local, 'PIECE', 7)
    documents = ['a, ] [ "b" {c}', '\\ é 🙂', '1', *make_documents(30, seed=5)]
    (tmp_path / 'a.json').write_text('\n ' + json.dumps([*documents[:3], *(
        {'text': text, 'n': [1, {'x': []}]} for text in documents[3:])], indent=2))
    data, _ = make(f'--source={tmp_path}/a.json', '--tokenizer=gpt2', '--val_share=0.5')
    assert texts(data) == sorted(documents)


def test_a_folder_whose_vocabulary_is_given_may_be_of_any_kind(make, tmp_path):
    words = make_tokenizer(['to', 'be', 'or', 'not'])
    (tmp_path / 'words').mkdir()
    write_record(tmp_path / 'words', words)
    (tmp_path / 'a.txt').write_text('to be or not to be\n' * 30)
    data, _ = make(f'--source={tmp_path}/a.txt', f'--tokenizer={tmp_path}/words')
    assert data.train[:6].tolist() == [0, 1, 2, 3, 0, 1] and data.tokenizer == words
