"""The log, the losses that are not read yet, the run's folder and the signals, each alone."""

import io
import json
import os
import re
import signal
import sys
from types import SimpleNamespace

from configurator import UserError, configure

import pytest
import torch
from conftest import read_metrics, tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import train
from model import GPT
from model_mla import GPT_MLA
from runtime import run_log
from runtime.parallel import Processes
from runtime.run_folder import RunFolder, StopSignal, kind_path
from runtime.run_log import PendingLosses, RunLog, by_head, check_finite
from train import TrainConfig, launch

ONE = Processes(0, 1, torch.device('cpu'), sharded=False)
SECOND = Processes(1, 1, torch.device('cpu'), sharded=False)
ROW = {'iter': 0, 'loss': 2.5, 'lr': 0.1, 'ms_per_iter': 10.0, 'tokens_per_second': 1000.0}


def make_log(out_dir, processes=ONE, wandb_id='', **settings):
    config = TrainConfig(out_dir=str(out_dir), **settings)
    state = SimpleNamespace(model=tiny_model(GPT), metrics=[], iter_num=0, wandb_id=wandb_id)
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
    log = make_log(tmp_path, processes, tensorboard_log=True, **settings)
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


@pytest.mark.parametrize('with_bar', [False, True])
def test_a_terminal_without_the_characters(with_bar, tmp_path, monkeypatch):
    log, written = make_log(tmp_path), io.BytesIO()
    log.bar = tqdm(disable=not with_bar, file=io.StringIO())
    with monkeypatch.context() as m:
        m.setattr(sys, 'stdout', io.TextIOWrapper(written, encoding='ascii'))
        log.say('caf\u00e9 \udcff')
        log.say('on')
        sys.stdout.flush()
        assert written.getvalue() == b'caf? ?\non\n'


def test_a_picture_that_cannot_be_drawn_costs_a_line(tmp_path, monkeypatch, capsys):
    def broken(metrics, label, path):
        raise RuntimeError('no\nfont')
    log, evaluation = make_log(tmp_path), {'iter': 0, 'train_loss': 1.0, 'val_loss': 1.0}
    monkeypatch.setattr(run_log, 'draw_loss', broken)
    for _ in range(2):
        log.evaluation(evaluation, '')
    lines = capsys.readouterr().out.splitlines()
    warning = f'warning: {tmp_path}/loss.png cannot be drawn (RuntimeError: no font); training '
    assert lines[0] == warning + 'goes on' and [line[:4] for line in lines[1:]] == ['step'] * 2


def test_a_picture_is_drawn_again_after_ten_seconds_and_at_the_end(tmp_path, monkeypatch):
    drawn, now = [], [100.0]
    monkeypatch.setattr(run_log, 'draw_loss', lambda metrics, *rest: drawn.append(len(metrics)))
    monkeypatch.setattr(run_log.time, 'monotonic', lambda: now[0])
    log = make_log(tmp_path)
    for seconds in (0, 5, 4, 2, 3):
        now[0] += seconds
        row = {'iter': 0, 'train_loss': 1.0, 'val_loss': 1.0}
        log.record(row)
        log.evaluation(row, '')
    assert drawn == [1, 4]
    log.close()
    log.close()
    assert drawn == [1, 4, 5]
    make_log(tmp_path).close()  # one that has evaluated nothing has nothing to draw
    assert drawn == [1, 4, 5]


def stub_wandb(monkeypatch):
    """A wandb that remembers what it is told: a list of init's settings and of rows with steps."""
    told = []
    wandb = SimpleNamespace(init=lambda **settings: told.append(settings), finish=lambda: None,
                            log=lambda row, step: told.append((row, step)), Html=lambda text: text,
                            run=SimpleNamespace(id='id-of-the-run'))
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    return told


@pytest.mark.parametrize('wandb_id, entity, eval_only, begun', [
    ('', '', False, (None, None, None)),
    ('earlier', 'team', False, ('earlier', 'allow', 'team')),
    ('earlier', '', True, (None, None, None))])  # it is no part of the run
def test_a_resumed_run_goes_on_at_wandb(wandb_id, entity, eval_only, begun, tmp_path, monkeypatch):
    told = stub_wandb(monkeypatch)
    log = make_log(tmp_path, wandb_id=wandb_id, wandb_log=True, wandb_entity=entity,
                   eval_only=eval_only)
    assert tuple(told[0][key] for key in ('id', 'resume', 'entity')) == begun
    assert told[0]['config']['n_layer'] == 2 and told[0]['config']['wandb_entity'] == entity
    assert log.state.wandb_id == 'id-of-the-run'


def test_what_wandb_is_told(tmp_path, monkeypatch, capsys):
    told = stub_wandb(monkeypatch)
    log = make_log(tmp_path, wandb_log=True)
    log.iteration(ROW | {'iter': 3, 'mfu': 0.25, 'grad_norm': 1.5})
    log.record({'iter': 4, 'train_loss': 2.0, 'val_loss': 3.0})
    log.sample(4, 'a <b>\n\nc\n')
    log.close()
    assert told[1:] == [
        ({'iter': 3, 'train/batch_loss': 2.5, 'lr': 0.1, 'ms_per_iter': 10.0, 'mfu': 25.0,
          'tokens_per_second': 1000.0, 'train/grad_norm': 1.5}, 3),
        ({'iter': 4, 'train/loss': 2.0, 'val/loss': 3.0}, 4),
        ({'iter': 4, 'sample': '<pre>a &lt;b&gt;\n\nc\n</pre>'}, 4)]
    said = capsys.readouterr().out
    assert 'grad' not in said and said.endswith('\nsample at step 4:\n  a <b>\n\n  c\n')
    assert read_metrics(tmp_path)[0]['mfu'] == 0.25 and len(read_metrics(tmp_path)) == 2


def events(folder):
    """The numbers in a TensorBoard folder, by their names, as pairs of step and value."""
    found = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)]
            for name in found.Tags()['scalars']}


def expected_events(rows):
    names = {'loss': 'train/batch_loss', 'train_loss': 'train/loss', 'val_loss': 'val/loss',
             'grad_norm': 'train/grad_norm'}
    found = {}
    for row in rows:
        for key, value in row.items():
            as_float32 = torch.tensor(value, dtype=torch.float32).item()
            found.setdefault(names.get(key, key), []).append((row['iter'], as_float32))
    return found


@pytest.mark.usefixtures('no_picture')
def test_tensorboard_has_the_metrics_also_after_a_resume(tiny_args, tmp_path, monkeypatch):
    # files of one second are read in the order of their numbers as text: 9 is after 10
    monkeypatch.setattr(event_file_writer, '_global_uid', event_file_writer.AtomicCounter(0))

    def train(*args):
        settings = [*tiny_args, '--tensorboard_log', '--log_interval=1', *args]
        launch(GPT_MLA, *configure(settings, TrainConfig, GPT_MLA.config_class, bias=False))
    out = tmp_path / 'out'
    folder = out / 'tensorboard' / 'mla'
    train('--max_iters=3')
    first = expected_events(read_metrics(out))
    assert events(folder) == first and len(first['train/batch_loss']) == 3
    with SummaryWriter(folder) as writer:  # what a run wrote that was killed before it saved
        for step in (3, 4, 9):
            writer.add_scalar('train/batch_loss', 100.0, step)
    train('--init_from=resume')
    whole = expected_events(read_metrics(out))
    assert events(folder) == whole and len(whole['train/batch_loss']) == 6

    train('--max_iters=2')  # a new run: the earlier one's events move with its checkpoint
    assert events(out / 'before-1' / 'tensorboard' / 'mla') == whole
    assert events(folder) == expected_events(read_metrics(out))


def test_a_sample_in_tensorboard(tmp_path):
    log = make_log(tmp_path, tensorboard_log=True)
    log.sample(7, 'a *b*\n\n  c')
    log.close()
    found = EventAccumulator(str(tmp_path / 'tensorboard' / 'gpt')).Reload()
    event, = found.Tensors('sample/text_summary')
    # each line is indented by four: Markdown shows it as it is
    assert event.step == 7
    assert event.tensor_proto.string_val[0] == b'    a *b*\n    \n      c'


def test_a_tensorboard_that_fails_never_stops_training(tmp_path, capsys):
    (tmp_path / 'tensorboard').write_text('a file where the folder should be')
    log = make_log(tmp_path, tensorboard_log=True)
    for i in range(3):
        log.record({'iter': i})
    log.close()
    assert capsys.readouterr().out.count('goes on without TensorBoard (') == 1
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.parametrize('module, key', [('wandb', 'wandb_log'),
                                         ('torch.utils.tensorboard', 'tensorboard_log')])
def test_a_log_that_is_not_installed(module, key, tiny_args, tmp_path, program, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = program(train.main, *tiny_args, f'--{key}=True')
    assert code == 2 and err.count('\n') == 1 and not (tmp_path / 'out').exists()
    assert re.match(f'error: {key}=True needs .*: pip install .*--{key}=False$', err)


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
    others = {'ckpt_mla.pt', 'metrics_mla.jsonl', 'loss_mla.png', 'notes.txt'}
    for name in {'ckpt.pt', 'ckpt.pt.1', 'metrics.jsonl', 'loss.png'} | others:
        (tmp_path / name).write_text(name)
    for model_type in ('gpt', 'mla'):
        (tmp_path / 'tensorboard' / model_type).mkdir(parents=True)
    (tmp_path / 'before-1').mkdir()
    log = make_log(tmp_path)
    with folder_of(tmp_path) as folder:
        folder.claim([(tmp_path / 'ckpt.pt.1', 'it is damaged')])
        folder.archive_earlier_run(log)
        folder.archive_earlier_run(log)  # there is none any more
    assert f'{tmp_path}/before-2 now' in capsys.readouterr().out
    left = {path.name for path in tmp_path.iterdir()} - {'.lock'}
    assert left == others | {'before-1', 'before-2', 'ckpt.pt.1.damaged', 'tensorboard'}
    moved = {'ckpt.pt', 'metrics.jsonl', 'loss.png', 'tensorboard'}
    assert {path.name for path in (tmp_path / 'before-2').iterdir()} == moved
    assert [path.name for path in (tmp_path / 'tensorboard').iterdir()] == ['mla']
    assert [path.name for path in (tmp_path / 'before-2' / 'tensorboard').iterdir()] == ['gpt']


def test_each_kind_of_model_has_files_of_its_own():
    names = [(folder.checkpoint.name, folder.metrics.name, folder.picture.name)
             for folder in (RunFolder(TrainConfig(), kind, ONE) for kind in ('gpt', 'k_ahead'))]
    assert names == [('ckpt.pt', 'metrics.jsonl', 'loss.png'),
                     ('ckpt_k_ahead.pt', 'metrics_k_ahead.jsonl', 'loss_k_ahead.png')]
    assert str(kind_path('a.b', 'loss.png', 'mla')) == 'a.b/loss_mla.png'


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
