import pickle

from configurator import UserError

import numpy as np
import pytest

from runtime import dataset
from runtime.dataset import draw_batch, open_data, write_splits
from runtime.record import read_record
from runtime.tokenizer import make_tokenizer


def test_what_is_written_is_what_is_opened(tmp_path):
    write_splits(tmp_path, [0, 1, 2, 65535], [2, 1], make_tokenizer(list('abc')))
    data = open_data(tmp_path)
    assert data.train.tolist() == [0, 1, 2, 65535] and data.val.tolist() == [2, 1]
    assert np.fromfile(tmp_path / 'val.bin', dtype='<u2').tolist() == [2, 1]  # as nanoGPT reads it
    assert data.tokenizer.spec == ['a', 'b', 'c']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['meta.pkl', 'train.bin', 'val.bin']


def test_targets_are_the_next_tokens():
    tokens = np.arange(50, dtype=np.uint16)
    x, y = draw_batch(tokens, 30, 4, (0,), 3)
    assert x.shape == y.shape == (30, 4) and x.dtype == np.int64
    assert (y == x + 1).all() and (x == x[:, :1] + np.arange(4)).all()


@pytest.mark.parametrize('n_tokens', [50, 51, 52, 53])
def test_an_epoch_sees_each_token_once_and_the_next_goes_another_way(n_tokens):
    tokens = np.arange(n_tokens, dtype=np.uint16)
    n_windows = 50 // 4 - 1 if n_tokens < 52 else 52 // 4 - 1
    batches = [draw_batch(tokens, 1, 4, (7,), number)[0][0, 0] for number in range(200 * n_windows)]
    epochs = np.array(batches).reshape(200, n_windows)
    for starts in epochs:
        assert (np.diff(np.sort(starts)) == 4).all()  # end to end
    assert len(np.unique(epochs, axis=0)) == 200
    assert set(epochs.flat) == set(range(n_windows * 4))  # every start occurs
    # the batches are the same row of windows however it is cut, and another seed gives another row
    wide = np.concatenate([draw_batch(tokens, 5, 4, (7,), number)[0][:, 0] for number in range(10)])
    other = draw_batch(tokens, 50, 4, (8,), 0)[0][:, 0]
    assert wide.tolist() == epochs.flat[:50].tolist() != other.tolist()


@pytest.mark.parametrize('n_tokens', [5, 6, 7, 8, 9])
def test_data_hardly_longer_than_a_window(n_tokens):
    x, y = draw_batch(np.arange(n_tokens, dtype=np.uint16), 100, 4, (0,), 0)
    assert set(x[:, 0]) == set(range(min(4, n_tokens - 4))) and y.max() <= n_tokens - 1


@pytest.mark.parametrize('damage, words', [
    (lambda folder: (folder / 'val.bin').unlink(), 'val.bin is missing'),
    (lambda folder: (folder / 'train.bin').write_bytes(b''), '0 bytes'),
    (lambda folder: (folder / 'train.bin').write_bytes(b'abc'), '3 bytes'),
    (lambda folder: (folder / 'meta.pkl').write_bytes(b'abc'), 'meta.pkl cannot be used'),
])
def test_damage_is_reported(data_dir, damage, words):
    damage(data_dir)
    with pytest.raises(UserError, match=words):
        open_data(data_dir)


def test_a_folder_that_is_not_there():
    with pytest.raises(UserError, match='dataset=nothing.*known are .*shakespeare_char'):
        open_data('nothing')


def test_check_of_length_and_ids(data_dir, monkeypatch):
    data = open_data(data_dir)
    data.check(599, 14)
    words = 'block_size=600 is too long for .*val.bin, which has 600 tokens'
    with pytest.raises(UserError, match=words):
        data.check(600, 14)
    with pytest.raises(UserError, match='token id 13, which vocab_size=13'):
        data.check(16, 13)
    monkeypatch.setattr(dataset, 'CHECK_WHOLE', 10)  # then a sample is checked, of the ends too
    tokens = np.zeros(3_000_000, dtype=np.uint16)
    tokens[-1] = 20
    with pytest.raises(UserError, match='token id 20'):
        dataset.Data(tokens, tokens, make_tokenizer(list('abc')), data_dir).check(16, 14)


def test_meta_that_carries_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'owned'), 'w'))

    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'itos': Evil()}))
    with pytest.raises(UserError, match='meta.pkl cannot be used .it holds io.open'):
        read_record(tmp_path)
    assert not (tmp_path / 'owned').exists()


def test_meta_is_as_nanogpt_reads_it(data_dir):
    meta = pickle.loads((data_dir / 'meta.pkl').read_bytes())
    assert meta['vocab_size'] == len(meta['stoi']) == 14
    assert meta['itos'][meta['stoi']['a']] == 'a'


