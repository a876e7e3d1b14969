"""The log, the losses that are not read yet, the run's folder and the signals, each alone."""

import json
import os
import signal
from types import SimpleNamespace

from configurator import UserError

import pytest
import torch
from conftest import tiny_model

from model import GPT
from runtime import run_log
from runtime.parallel import Processes
from runtime.run_folder import RunFolder, StopSignal
from runtime.run_log import PendingLosses, RunLog, by_head, check_finite
from train import TrainConfig

ONE = Processes(0, 1, torch.device('cpu'), sharded=False)
SECOND = Processes(1, 1, torch.device('cpu'), sharded=False)
ROW = {'iter': 0, 'loss': 2.5, 'lr': 0.1, 'ms_per_iter': 10.0, 'tokens_per_second': 1000.0}


def make_log(out_dir, processes=ONE, **settings):
    config = TrainConfig(out_dir=str(out_dir), **settings)
    state = SimpleNamespace(model=tiny_model(GPT), metrics=[], iter_num=0)
    return RunLog(config, state, RunFolder(config, 'gpt', processes), processes)


def test_rows_are_on_the_disk_as_they_come(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"iter": 7}\n')  # of an earlier run
    log = make_log(tmp_path)
    for i in range(3):
        log.record({'iter': i})
        lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
        assert [json.loads(line)['iter'] for line in lines] == list(range(i + 1))
    assert [row['iter'] for row in log.state.metrics] == [0, 1, 2]


def test_after_a_failure_all_rows_are_written_anew(tmp_path, monkeypatch, capsys):
    log, lines = make_log(tmp_path), run_log.to_lines

    def full_disk(rows):
        raise OSError(28, 'No space left on device')
    log.record({'iter': 0})
    monkeypatch.setattr(run_log, 'to_lines', full_disk)
    log.record({'iter': 1})
    assert 'No space left on device); training goes on' in capsys.readouterr().out
    monkeypatch.setattr(run_log, 'to_lines', lines)
    log.record({'iter': 2})
    assert (tmp_path / 'metrics.jsonl').read_text() == lines([{'iter': i} for i in range(3)])


@pytest.mark.parametrize('processes, settings', [(SECOND, {}), (ONE, {'eval_only': True})])
def test_others_write_nothing(processes, settings, tmp_path):
    log = make_log(tmp_path, processes, **settings)
    log.record({'iter': 0})
    log.evaluation({'iter': 0, 'train_loss': 1.0, 'val_loss': 1.0}, '')
    assert list(tmp_path.iterdir()) == []


def test_one_scale_with_several_heads(tmp_path, capsys):
    """What an iteration shows is the loss of the next token, as evaluations do."""
    log = make_log(tmp_path)
    log.iteration(ROW)
    assert 'iter      0 | loss 2.5000 | 10.0 ms | 1,000 tokens/s' in capsys.readouterr().out
    log.iteration(ROW | {'loss/head_1': 1.5, 'loss/head_2': 3.5})
    assert '| loss 1.5000 | all heads 2.5000 |' in capsys.readouterr().out
    assert by_head('loss', [1.0, 0.0, 3.0]) == {'loss/head_1': 1.0, 'loss/head_3': 3.0}
    assert by_head('loss', [1.0]) == {}


def test_nobody_reads_the_terminal(tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        raise BrokenPipeError
    log = make_log(tmp_path)
    monkeypatch.setattr(run_log, 'print', gone, raising=False)
    monkeypatch.setattr(run_log.sys, 'stdout', run_log.sys.stdout)  # put back at the end
    log.say('hello')
    assert run_log.sys.stdout.name == os.devnull
    run_log.sys.stdout.close()


def test_pending_losses_are_read_together(monkeypatch):
    now = iter([0.0, 8.0, 100.0, 101.0, 103.0])  # made, settled, restarted, settled, settled
    monkeypatch.setattr(run_log.time, 'perf_counter', lambda: next(now))
    pending = PendingLosses(ONE, 0.1)
    assert pending.settle() is None
    for i in range(4):
        pending.add(i, torch.tensor([float(i), 10.0 * i]))
    assert pending.settle() == ([3.0, 30.0], 2.0)
    assert pending.settle() is None
    pending.restart_clock()
    for seconds in (1.0, 2.0):
        pending.add(4, torch.zeros(1))
        assert pending.settle() == ([0.0], seconds)
    assert pending.median_seconds() == 1.5  # without the first stretch


def test_a_pending_loss_that_is_not_finite_names_its_iteration():
    pending = PendingLosses(ONE, 0.25)
    for i, loss in enumerate((1.0, float('nan'), 2.0)):
        pending.add(i + 5, torch.tensor([loss]))
    with pytest.raises(UserError, match='the loss is nan in step 6.*learning_rate than 0.25'):
        pending.settle()
    with pytest.raises(UserError, match='it is 1.0 and inf in step 2'):
        check_finite('it', 2, [1.0, float('inf')], 0.1)


def folder_of(out_dir, processes=ONE, **settings):
    return RunFolder(TrainConfig(out_dir=str(out_dir), **settings), 'gpt', processes)


def test_a_folder_is_made_by_claim_and_is_one_runs_alone(tmp_path):
    out_dir = tmp_path / 'out'
    with folder_of(out_dir) as folder:
        assert not out_dir.exists()
        folder.claim([])
        assert out_dir.exists()
        with pytest.raises(UserError, match='in use by another run'), folder_of(out_dir):
            pass
        with folder_of(out_dir, eval_only=True), folder_of(out_dir, SECOND):
            pass  # they write nothing
    with folder_of(out_dir):
        pass


def test_a_new_folder_that_another_run_took_meanwhile(tmp_path):
    with folder_of(tmp_path / 'out') as folder:
        (tmp_path / 'out').mkdir()
        (tmp_path / 'out' / 'ckpt.pt').write_bytes(b'other')
        with pytest.raises(UserError, match='has been taken by another run meanwhile'):
            folder.claim([])


def test_damaged_files_and_earlier_runs_are_put_aside(tmp_path, capsys):
    for name in ('ckpt.pt', 'ckpt.pt.1', 'ckpt_mla.pt', 'metrics.jsonl', 'notes.txt'):
        (tmp_path / name).write_text(name)
    (tmp_path / 'before-1').mkdir()
    log = make_log(tmp_path)
    with folder_of(tmp_path) as folder:
        folder.claim([(tmp_path / 'ckpt.pt.1', 'it is damaged')])
        folder.archive_earlier_run(log)
        folder.archive_earlier_run(log)  # there is none any more
    assert f'{tmp_path}/before-2 now' in capsys.readouterr().out
    left = {path.name for path in tmp_path.iterdir()} - {'.lock'}
    assert left == {'before-1', 'before-2', 'ckpt.pt.1.damaged', 'ckpt_mla.pt', 'notes.txt'}
    assert {path.name for path in (tmp_path / 'before-2').iterdir()} == {'ckpt.pt', 'metrics.jsonl'}


def test_signals_ask_for_a_stop_and_are_put_back(monkeypatch, capfd):
    monkeypatch.delenv('RANK', raising=False)
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.received == [signal.SIGTERM, signal.SIGINT]
        monkeypatch.setenv('RANK', '1')  # torchrun passes SIGTERM on: the second one ends nothing
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(stop.received) == 3
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err.count('finishing the step') == 2
