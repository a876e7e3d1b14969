"""Which checkpoint is written when: the saver alone, with losses that are given to it."""

from types import SimpleNamespace

from configurator import UserError

import pytest
import torch
from conftest import CHARS, tiny_model

from model import GPT
from runtime import saver as saver_module
from runtime.parallel import Processes
from runtime.resume import RunState
from runtime.run_folder import RunFolder
from runtime.saver import CheckpointSaver
from runtime.tokenizer import make_tokenizer
from train import TrainConfig

ONE = Processes(0, 1, torch.device('cpu'), sharded=False)


@pytest.fixture
def make_saver(tmp_path):
    """A function that makes a saver for tmp_path; warnings go to the list saver.log.lines."""
    def make(resumed_from=None, iter_num=0, best_val_loss=float('inf'), **settings):
        config = TrainConfig(out_dir=str(tmp_path), **settings)
        model = tiny_model(GPT)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        state = RunState(model, None, optimizer, scaler, iter_num, best_val_loss,
                         resumed_from=resumed_from)
        lines = []
        log = SimpleNamespace(warn=lines.append, lines=lines)
        folder = RunFolder(config, 'gpt', ONE)
        return CheckpointSaver(state, make_tokenizer(CHARS), config, folder, ONE, log)
    return make


def evaluate_at(saver, iter_num, val_loss):
    saver.state.iter_num = iter_num
    return saver.after_evaluation(val_loss)


def on_disk(folder):
    """{file: (iter_num, best_val_loss)} of all checkpoints in a folder."""
    checkpoints = {path.name: torch.load(path, weights_only=True) for path in folder.glob('ckpt*')}
    return {name: (c['iter_num'], c['best_val_loss']) for name, c in checkpoints.items()}


def test_the_best_and_the_latest(make_saver, tmp_path):
    saver = make_saver(always_save_checkpoint=False)
    assert evaluate_at(saver, 0, 3.0) == '' and on_disk(tmp_path) == {}  # nothing to lose yet
    assert evaluate_at(saver, 1, 2.0) == f' | saved {tmp_path}/ckpt.pt'
    assert on_disk(tmp_path) == {'ckpt.pt': (1, 2.0)}
    assert evaluate_at(saver, 2, 2.5) == f' | saved {tmp_path}/ckpt_last.pt'
    assert on_disk(tmp_path) == {'ckpt.pt': (1, 2.0), 'ckpt_last.pt': (2, 2.0)}
    evaluate_at(saver, 3, 1.5)  # the best is the newest again
    assert on_disk(tmp_path) == {'ckpt.pt': (3, 1.5)}


def test_with_always_every_evaluation_is_saved_and_the_best_loss_is_kept(make_saver, tmp_path):
    saver = make_saver()
    for iter_num, val_loss in ((1, 2.0), (2, 2.5)):
        evaluate_at(saver, iter_num, val_loss)
    assert on_disk(tmp_path) == {'ckpt.pt': (2, 2.0)}


def test_a_loss_that_is_equal_is_not_better(make_saver, tmp_path):
    saver = make_saver(always_save_checkpoint=False)
    for iter_num in (1, 2):
        evaluate_at(saver, iter_num, 2.0)
    assert on_disk(tmp_path)['ckpt.pt'] == (1, 2.0)


def test_older_ones_are_kept(make_saver, tmp_path):
    saver = make_saver(keep_checkpoints=2)
    for iter_num in (1, 2, 3):
        evaluate_at(saver, iter_num, 2.0)
    assert on_disk(tmp_path) == {'ckpt.pt': (3, 2.0), 'ckpt.pt.1': (2, 2.0)}


@pytest.mark.parametrize('resumed_from, iter_num, wanted', [
    ('ckpt.pt', 6, ''),  # the file holds this state already
    ('ckpt_last.pt', 6, 'ckpt.pt'), ('ckpt.pt.1', 6, 'ckpt.pt'), (None, 0, '')])
def test_what_is_there_is_not_written_again(resumed_from, iter_num, wanted, make_saver, tmp_path):
    saver = make_saver(resumed_from and tmp_path / resumed_from, iter_num)
    assert evaluate_at(saver, iter_num, 1.0).endswith(wanted)
    assert set(on_disk(tmp_path)) == ({wanted} if wanted else set())
    evaluate_at(saver, iter_num + 1, 0.9)
    assert on_disk(tmp_path) == {'ckpt.pt': (iter_num + 1, 0.9)}


def test_a_save_that_fails_leaves_the_old_best_and_is_tried_again(
        make_saver, tmp_path, monkeypatch):
    saver, save = make_saver(always_save_checkpoint=False), saver_module.save_checkpoint
    evaluate_at(saver, 1, 3.0)

    def full_disk(path, *args, **state):
        raise OSError(f'{path} cannot be written')
    monkeypatch.setattr(saver_module, 'save_checkpoint', full_disk)
    assert evaluate_at(saver, 2, 2.0) == ''
    assert saver.log.lines == [f'{tmp_path}/ckpt.pt cannot be written; training goes on']
    assert on_disk(tmp_path) == {'ckpt.pt': (1, 3.0)} and saver.state.best_val_loss == 3.0
    with pytest.raises(UserError, match='iteration 2 and its newest checkpoint at 1, since'):
        saver.check_saved()
    monkeypatch.setattr(saver_module, 'save_checkpoint', save)
    evaluate_at(saver, 3, 2.5)  # better than what is on the disk
    assert on_disk(tmp_path) == {'ckpt.pt': (3, 2.5)}
    saver.check_saved()


def test_nothing_at_all_could_be_saved(make_saver, monkeypatch):
    def full_disk(path, *args, **state):
        raise OSError('no room')
    monkeypatch.setattr(saver_module, 'save_checkpoint', full_disk)
    saver = make_saver()
    evaluate_at(saver, 1, 2.0)
    with pytest.raises(UserError, match='nothing of it is saved, since no room'):
        saver.check_saved()


def test_a_stop_is_saved_once(make_saver, tmp_path):
    saver = make_saver()
    evaluate_at(saver, 1, 2.0)
    assert saver.at_stop() == ''  # ckpt.pt has it
    saver.state.iter_num = 2
    assert saver.at_stop() == f' | saved {tmp_path}/ckpt_last.pt'
    assert on_disk(tmp_path) == {'ckpt.pt': (1, 2.0), 'ckpt_last.pt': (2, 2.0)}


def test_eval_only_writes_nothing(make_saver, tmp_path):
    saver = make_saver(eval_only=True)
    assert evaluate_at(saver, 5, 1.0) == '' and saver.at_stop() == '' and on_disk(tmp_path) == {}
