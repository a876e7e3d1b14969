"""A run loses nothing: killed, stopped, on a full disk, with damaged files, it ends as one that
nothing happened to."""

import importlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

from configurator import UserError, run

import pytest
import torch
from conftest import ALL, ROOT, read_metrics, tiny_model, without_times

import train as trainer
from model import GPT
from model_mla import GPT_MLA
from runtime import dataset, run_log, saver
from runtime import start as run_start
from runtime.checkpoint import checkpoint_path, save_checkpoint
from runtime.loading import load_model
from runtime.lock import locked
from runtime.resume import newest_sound
from runtime.run_log import draw_loss
from runtime.tokenizer import make_tokenizer

pytestmark = pytest.mark.usefixtures('no_picture')
GPT2 = make_tokenizer('gpt2')
FORK = multiprocessing.get_context('fork')  # such a child has imported what its parent has
LATE_IMPORTS = 'torch._dynamo', 'matplotlib.figure', 'matplotlib.backends.backend_agg'


def start(args, model_class=GPT, before=None):
    """Train in a child process. before() is called in it first. What it prints goes to the files
    process.log + '.out' and '.err'."""
    def child():
        if before:
            before()
        process.log += os.environ.get('RANK', '')
        sys.stdout, sys.stderr = (open(process.log + end, 'w') for end in ('.out', '.err'))
        sys.argv = ['train.py', *args]
        run(lambda: trainer.main(model_class))
    for name in LATE_IMPORTS:  # once here is sooner than in every child
        importlib.import_module(name)
    process = FORK.Process(target=child)
    process.log = [a for a in args if a.startswith('--out_dir=')][-1].removeprefix('--out_dir=')
    process.start()
    return process


def finish(args, model_class=GPT, before=None):
    """Train in a child process to the end: its exit code and stderr."""
    process = start(args, model_class, before)
    process.join(120)
    with open(process.log + '.err') as f:
        return process.exitcode, f.read()


def end_state(out_dir, name='ckpt.pt'):
    state = torch.load(out_dir / name, weights_only=True)
    return state, without_times(read_metrics(out_dir, state['model_type']))


def assert_same_end(one, other):
    (state, metrics), (other_state, other_metrics) = one, other
    assert metrics == other_metrics
    for key, value in state['model'].items():
        assert torch.equal(value, other_state['model'][key]), key
    for i, of_one in state['optimizer']['state'].items():
        for key, value in of_one.items():
            assert torch.equal(value, other_state['optimizer']['state'][i][key]), (i, key)
    for key in ('iter_num', 'best_val_loss', 'scaler'):
        assert state[key] == other_state[key], key


@pytest.fixture
def args(tiny_args):
    return [*tiny_args, '--dropout=0.1', '--max_iters=8', '--eval_interval=2', '--eval_iters=2',
            '--init_from=auto']


def slow_saves():
    """Saving takes as long as training does, so that a kill falls into it."""
    for module, name in ((os, 'replace'), (os, 'fsync')):
        original = getattr(module, name)
        setattr(module, name, lambda *a, original=original: (time.sleep(0.015), original(*a))[1])
    save = torch.save

    def in_two_parts(value, f):
        buffer = io.BytesIO()
        save(value, buffer)
        content = buffer.getvalue()
        f.write(content[:len(content) // 2])
        f.flush()
        time.sleep(0.015)
        f.write(content[len(content) // 2:])
    torch.save = in_two_parts


@ALL
def test_killed_at_random_moments(model_class, args, tmp_path):
    """kill -9 at 21 moments over the three models, two of three on the way back from another."""
    name = checkpoint_path('', model_class.model_type).name
    process = start([*args, f'--out_dir={tmp_path / "whole"}'], model_class, slow_saves)
    started = time.monotonic()
    process.join(120)
    duration = time.monotonic() - started
    assert process.exitcode == 0
    whole, moments = end_state(tmp_path / 'whole', name), random.Random(1)
    for number in range(4):
        options = [*args, f'--out_dir={tmp_path / f"out{number}"}', '--keep_checkpoints=2']
        for _ in range(2 if number else 1):
            process = start(options, model_class, slow_saves)
            time.sleep(moments.uniform(0, duration))
            process.kill()
            process.join()
        code, err = finish(options, model_class)
        assert code == 0, err
        assert_same_end(end_state(tmp_path / f'out{number}', name), whole)


@pytest.mark.parametrize('which', ['ckpt.pt.partial', 'ckpt.pt.1.partial'])
def test_killed_during_the_save(which, args, tmp_path):
    assert finish([*args, f'--out_dir={tmp_path / "whole"}'])[0] == 0
    options = [*args, '--keep_checkpoints=2']
    process = start(options, before=slow_saves)
    wait_for((tmp_path / 'out' / which).exists)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / 'out' / 'ckpt.pt.partial').exists()
    assert finish(options)[0] == 0
    assert_same_end(end_state(tmp_path / 'out'), end_state(tmp_path / 'whole'))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(number, args, tmp_path):
    whole = tmp_path / 'whole'
    assert finish([*args, f'--out_dir={whole}', '--eval_interval=8'])[0] == 0
    out = tmp_path / 'out'
    options = [*args, f'--out_dir={out}', '--eval_interval=8']
    process = start(options, before=lambda: slow_steps(0.1))
    wait_for(lambda: len(rows(out)) >= 3)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 0
    stopped = torch.load(out / 'ckpt_last.pt', weights_only=True)
    assert 2 <= stopped['iter_num'] < 8 and not (out / 'ckpt.pt').exists()
    assert load_model(out).model.config.n_layer == 2  # the sampler and the analyses take it too
    assert finish(options)[0] == 0
    assert_same_end(end_state(out), end_state(whole))
    assert not (out / 'ckpt_last.pt').exists()  # older than ckpt.pt now


def slow_steps(seconds):
    draw = dataset.draw_batch
    dataset.draw_batch = lambda *a: (time.sleep(seconds), draw(*a))[1]


def rows(out_dir):
    path = out_dir / 'metrics.jsonl'
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_second_signal_ends_it_at_once(args, tmp_path):
    process = start([*args, '--eval_iters=1'], before=lambda: slow_steps(0.7))
    wait_for(lambda: len(rows(tmp_path / 'out')) >= 1)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    process.join(2)
    assert process.exitcode == -signal.SIGINT


def test_the_best_and_the_newest_are_both_kept(args, tmp_path):
    """From iteration 4 on the loss rises, so ckpt.pt stays the best. A resume goes on from
    ckpt_last.pt and costs neither."""
    args = [*args, '--always_save_checkpoint=False', '--decay_lr=False']
    for name, stops in (('whole', [12]), ('half', [8, 12])):
        out = tmp_path / name
        options = [*args, f'--out_dir={out}']
        assert finish([*options, '--max_iters=4'])[0] == 0
        before = (out / 'ckpt.pt').read_bytes()
        for stop in stops:
            assert finish([*options, '--learning_rate=3', f'--max_iters={stop}'])[0] == 0
            assert (out / 'ckpt.pt').read_bytes() == before
            state = torch.load(out / 'ckpt_last.pt', weights_only=True)
            assert state['iter_num'] == stop
            assert state['best_val_loss'] == end_state(out)[0]['best_val_loss']
    assert_same_end(*(end_state(tmp_path / name, 'ckpt_last.pt') for name in ('half', 'whole')))


def test_older_checkpoints_are_kept_as_many_as_asked_for(args, tmp_path):
    out = tmp_path / 'out'
    assert finish([*args, '--keep_checkpoints=3'])[0] == 0
    names = sorted(p.name for p in out.glob('ckpt*'))
    assert names == ['ckpt.pt', 'ckpt.pt.1', 'ckpt.pt.2']
    states = [torch.load(out / name, weights_only=True) for name in names]
    assert [state['iter_num'] for state in states] == [8, 6, 4]


def damage(path, how, seed=0):
    content = bytearray(path.read_bytes())
    if how == 'truncated':
        content = content[:len(content) * 2 // 3]
    elif how == 'empty':
        content = b''
    else:
        content[random.Random(seed).randrange(len(content))] ^= 1 << seed % 8
    path.write_bytes(content)


@pytest.mark.parametrize('how', ['truncated', 'empty', 'flipped'])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, args, tmp_path, program):
    out = tmp_path / 'out'
    assert finish([*args, '--keep_checkpoints=2'])[0] == 0
    whole = end_state(out)
    damage(out / 'ckpt.pt', how, seed=3)
    code, stdout, err = program(trainer.main, *args, '--keep_checkpoints=2')
    assert code == 0 and 'ckpt.pt' in stdout and 'resuming from ckpt.pt.1, at iteration 6' in stdout
    assert (out / 'ckpt.pt.damaged').exists()
    assert_same_end(end_state(out), whole)
    for path in out.glob('ckpt*'):
        damage(path, 'truncated')
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    code, _, err = program(trainer.main, *args)
    assert code == 2 and err.count('\n') == 1 and 'damaged' in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_kill_on_the_way_back_from_a_damaged_checkpoint_costs_nothing(args, tmp_path):
    options = [*args, '--keep_checkpoints=2', '--max_iters=10']
    assert finish([*options, f'--out_dir={tmp_path / "whole"}'])[0] == 0
    assert finish([*options, '--max_iters=8'])[0] == 0
    damage(tmp_path / 'out' / 'ckpt.pt', 'truncated')
    process = start(options, before=slow_saves)
    wait_for((tmp_path / 'out' / 'ckpt.pt.partial').exists)
    process.kill()
    process.join()
    assert finish(options)[0] == 0
    assert_same_end(end_state(tmp_path / 'out'), end_state(tmp_path / 'whole'))


def test_a_new_run_sets_an_earlier_one_aside(args, tmp_path, program):
    out, new = tmp_path / 'out', ['--seed=2', '--max_iters=6']
    assert finish([*args, '--keep_checkpoints=3', '--seed=1'])[0] == 0  # the earlier one
    earlier = {path.name: path.read_bytes() for path in out.iterdir() if path.name != '.lock'}
    assert finish([*args, *new, f'--out_dir={tmp_path / "whole"}'])[0] == 0
    scratch = [*args, '--init_from=scratch']
    process = start([*scratch, *new], before=lambda: slow_steps(0.1))
    wait_for(lambda: '"iter": 3, "loss"' in ''.join(rows(out)[:9]) and len(rows(out)) < 9)
    process.kill()
    process.join()
    assert {path.name: path.read_bytes() for path in (out / 'before-1').iterdir()} == earlier
    assert finish([*args, *new])[0] == 0  # the new one goes on
    assert_same_end(end_state(out), end_state(tmp_path / 'whole'))
    # a run that would put nothing in its place
    assert program(trainer.main, *scratch, '--max_iters=0')[0] == 0
    assert 'before-2 now' in program(trainer.main, *scratch, '--seed=3')[1]
    assert_same_end((end_state(out / 'before-2')[0], []), (end_state(tmp_path / 'whole')[0], []))
    assert {path.name: path.read_bytes() for path in (out / 'before-1').iterdir()} == earlier
    (out / 'before-3').write_text('x')
    (out / 'before-4').mkdir()
    assert 'before-5 now' in program(trainer.main, *scratch, '--seed=4')[1]


def test_a_run_that_comes_second_to_a_new_folder_writes_over_nothing(args, tmp_path, program,
                                                                     monkeypatch):
    """While it loaded, another began there and ended."""
    begin, out = run_start.begin, tmp_path / 'out'

    def late(*args_of_begin):
        monkeypatch.setattr(run_start, 'begin', begin)
        assert finish(args)[0] == 0
        return begin(*args_of_begin)
    monkeypatch.setattr(run_start, 'begin', late)
    code, _, err = program(trainer.main, *args, '--seed=2')
    assert code == 2 and err.count('\n') == 1 and 'has been taken by another run meanwhile' in err
    assert torch.load(out / 'ckpt.pt', weights_only=True)['config']['seed'] == 1337


def test_a_run_keeps_its_metrics_whatever_became_of_the_file(args, tmp_path):
    """Another model's run in the same folder has its own files."""
    assert finish([*args, f'--out_dir={tmp_path / "whole"}'])[0] == 0
    assert finish([*args, '--max_iters=4'])[0] == 0
    assert finish([*args, '--max_iters=6'], GPT_MLA)[0] == 0
    assert finish(args)[0] == 0
    assert_same_end(end_state(tmp_path / 'out'), end_state(tmp_path / 'whole'))
    mla = read_metrics(tmp_path / 'out', 'mla')
    assert [row['iter'] for row in mla if 'loss' in row] == list(range(6))
    pictures = {path.name: path.read_text()[:4] for path in (tmp_path / 'out').glob('*.png')}
    assert pictures == {'loss.png': 'GPT:', 'loss_mla.png': 'GPT_'}


def test_other_batches_on_a_resume_are_noted(args, data_dir, tmp_path, program):
    assert program(trainer.main, *args, '--max_iters=4')[0] == 0
    other = shutil.copytree(data_dir, tmp_path / 'other')
    options = ['--seed=5', '--batch_size=3', '--gradient_accumulation_steps=4']
    code, out, _ = program(trainer.main, *args, *options, f'--dataset={other}')
    for words in ('seed was 1337 and is 5', 'batch_size was 4 and is 3',
                  'gradient_accumulation_steps was 2 and is 4',
                  f'dataset was {data_dir} and is {other}'):
        assert code == 0 and f'note: {words} now' in out


def test_what_is_best_is_what_is_best_on_the_disk(args, tmp_path, program, monkeypatch):
    """A save that failed does not keep the next best from being saved."""
    save, failing = saver.save_checkpoint, [True]

    def full_once(path, *rest, **state):
        if failing and path.name == 'ckpt.pt':
            failing.pop()
            raise OSError(f'{path} cannot be written: no space')
        save(path, *rest, **state)
    monkeypatch.setattr(saver, 'save_checkpoint', full_once)
    losses = iter([9.0, 3.0, 9.0, 2.0, 9.0, 2.5, 9.0, 2.4, 9.0, 2.6])  # training, validation
    monkeypatch.setattr(GPT, 'losses',
                        lambda self, x, y: (torch.full((1,), next(losses)), torch.ones(1)))
    code, out, _ = program(trainer.main, *args, '--always_save_checkpoint=False', '--eval_iters=1')
    assert code == 0 and 'no space' in out
    best, last = (torch.load(tmp_path / 'out' / name, weights_only=True)
                  for name in ('ckpt.pt', 'ckpt_last.pt'))
    assert best['best_val_loss'] == pytest.approx(2.4)
    assert last['iter_num'] == 8 and last['best_val_loss'] == pytest.approx(2.4)


@pytest.mark.parametrize('how', ['truncated', 'flipped'])
def test_when_the_best_is_damaged_the_next_best_takes_its_place(how, args, tmp_path, program):
    args = [*args, '--always_save_checkpoint=False', '--decay_lr=False']
    assert finish([*args, '--max_iters=4'])[0] == 0
    assert finish([*args, '--learning_rate=3', '--max_iters=6'])[0] == 0  # now the loss rises
    damage(tmp_path / 'out' / 'ckpt.pt', how, seed=3)
    process = start(args, before=lambda: slow_steps(0.2))
    wait_for((tmp_path / 'out' / 'ckpt.pt.damaged').exists)
    process.kill()
    process.join()
    assert not (tmp_path / 'out' / 'ckpt.pt').exists()
    assert program(trainer.main, *args)[0] == 0
    assert torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)['iter_num'] == 8


def test_what_is_written_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(fd):
        calls.append(('fsync', os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))))
        fsync(fd)

    def noted_replace(source, target):
        calls.append(('replace', os.path.basename(source)))
        replace(source, target)
    monkeypatch.setattr(os, 'fsync', noted_fsync)
    monkeypatch.setattr(os, 'replace', noted_replace)
    save_checkpoint(tmp_path / 'ckpt.pt', tiny_model(GPT), GPT2, {}, 0)
    assert calls == [('fsync', 'ckpt.pt.partial'), ('replace', 'ckpt.pt.partial'),
                     ('fsync', tmp_path.name)]


def test_no_flipped_bit_goes_unseen(args, tmp_path):
    """A checkpoint with one bit changed is either refused or holds what it held."""
    out = tmp_path / 'out'
    assert finish([*args, '--max_iters=2', f'--out_dir={out}'])[0] == 0
    newest = newest_sound(out, 'gpt')
    path, whole = newest.path, newest.checkpoint
    content, refused = path.read_bytes(), 0
    for seed in range(60):
        path.write_bytes(content)
        damage(path, 'flipped', seed)
        try:
            found = newest_sound(out, 'gpt').checkpoint
        except UserError:
            refused += 1
            with pytest.raises(UserError):  # nor do the sampler and the analyses take it
                load_model(path)
            continue
        assert all(torch.equal(value, found['model'][key]) for key, value in whole['model'].items())
        assert found['iter_num'] == whole['iter_num'] and found['config'] == whole['config']
    assert refused > 20


def test_a_full_disk_stops_neither_the_run_nor_costs_the_old_file(args, tmp_path):
    out = tmp_path / 'out'
    assert finish([*args, '--max_iters=4'])[0] == 0
    before, size = (out / 'ckpt.pt').read_bytes(), (out / 'ckpt.pt').stat().st_size

    def small_files():
        run_log.draw_loss = draw_loss  # which is too large as well
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    code, err = finish([*args, f'--out_dir={tmp_path / "new"}'], before=small_files)
    assert code == 2 and err.count('\n') == 1 and 'nothing of it is saved' in err
    code, err = finish(args, before=small_files)
    assert code == 2 and err.count('\n') == 1
    assert 'newest checkpoint at 4' in err and 'make room and start it again' in err
    assert (out / 'ckpt.pt').read_bytes() == before and not list(out.glob('*.partial'))
    evaluated = [row['iter'] for row in read_metrics(out) if 'val_loss' in row]
    assert evaluated == [0, 2, 4, 6, 8]  # it went on to the end
    assert finish(args)[0] == 0
    assert finish([*args, f'--out_dir={tmp_path / "whole"}'])[0] == 0
    assert_same_end(end_state(out), end_state(tmp_path / 'whole'))


def test_a_full_disk_for_the_metrics(args, tmp_path, program, monkeypatch):
    """They are written again as soon as there is room."""
    failing, write = [3], json.dumps

    def dumps(row):
        if 'loss' in row and failing[0]:
            failing[0] -= 1
            raise OSError(28, 'No space left on device')
        return write(row)
    monkeypatch.setattr(json, 'dumps', dumps)
    code, out, _ = program(trainer.main, *args)
    assert code == 0 and out.count('No space left on device') == 3
    steps = [row['iter'] for row in read_metrics(tmp_path / 'out') if 'loss' in row]
    assert steps == list(range(8))


def test_an_unwritable_folder(args, tmp_path, program):
    (tmp_path / 'file').write_text('x')
    code, _, err = program(trainer.main, *args, f'--out_dir={tmp_path / "file" / "out"}')
    assert code == 2 and err.count('\n') == 1 and 'cannot be written to' in err


def test_a_read_only_folder_is_refused_and_left_alone(args, tmp_path):
    """By a mount, since these tests may be root's, who may write wherever a disk can be written."""
    out = tmp_path / 'out'
    assert finish([*args, '--max_iters=4'])[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if subprocess.run(['unshare', '--mount', 'true'], capture_output=True).returncode:
        pytest.skip('a mount needs rights that are missing here')
    mount = f'mount --bind "{out}" "{out}" && mount -o remount,bind,ro "{out}" && exec "$@"'
    command = ['unshare', '--mount', 'sh', '-c', mount, 'sh', sys.executable, 'train.py', *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert 'Read-only file system' in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_two_runs_in_one_folder_are_refused(args, tmp_path, program):
    out = tmp_path / 'out'
    process = start(args, before=lambda: slow_steps(0.1))
    wait_for(lambda: len(rows(out)) >= 1)
    code, _, err = program(trainer.main, *args)
    assert code == 2 and err.count('\n') == 1
    assert 'is in use by another run' in err and f'process {process.pid}' in err
    process.kill()
    process.join()
    assert program(trainer.main, *args)[0] == 0  # a killed run locks nobody out


def test_a_child_that_lives_longer_keeps_no_lock(tmp_path):
    with locked(tmp_path):
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
        with pytest.raises(UserError, match='in use'), locked(tmp_path):
            pass
    with locked(tmp_path, patience=20):
        child.kill()
        child.join()


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_carries_code_is_refused(args, tmp_path, program):
    out = tmp_path / 'out'
    assert finish([*args, '--max_iters=2'])[0] == 0
    state = torch.load(out / 'ckpt.pt', weights_only=True)
    torch.save(state | {'best_val_loss': Malice(str(tmp_path / 'run'))}, out / 'ckpt.pt')
    code, _, err = program(trainer.main, *args)
    assert code == 2 and err.count('\n') == 1 and not (tmp_path / 'run').exists()
    with open(out / 'ckpt.pt', 'wb') as f:
        pickle.dump(Malice(str(tmp_path / 'run')), f)
    assert program(trainer.main, *args)[0] == 2 and not (tmp_path / 'run').exists()


def test_truncated_bins_are_named(args, data_dir, program):
    with open(data_dir / 'train.bin', 'r+b') as f:
        f.truncate(1001)
    code, _, err = program(trainer.main, *args)
    assert code == 2 and err.count('\n') == 1 and 'train.bin has 1,001 bytes' in err


def test_a_loss_that_is_not_finite_stops_with_its_step(args, tmp_path, program, monkeypatch):
    """The step at which it was lost, though the log's next line is later."""
    assert program(trainer.main, *args, '--max_iters=4', '--eval_interval=4')[0] == 0
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    forward, steps = GPT.forward, iter(range(4, 8))

    def broken(self, idx, targets=None, cache=None):
        logits, loss = forward(self, idx, targets, cache)
        return logits, loss * float('nan') if self.training and next(steps) == 6 else loss
    monkeypatch.setattr(GPT, 'forward', broken)
    code, _, err = program(trainer.main, *args, '--eval_interval=4', '--log_interval=100',
                           '--gradient_accumulation_steps=1')
    assert code == 2 and err.count('\n') == 1 and 'the loss is nan in step 6' in err
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before


def test_a_loss_that_is_not_finite_is_not_saved_by_a_signal(args, tmp_path, program, monkeypatch):
    forward = GPT.forward

    def broken(self, idx, targets=None, cache=None):
        logits, loss = forward(self, idx, targets, cache)
        if self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return logits, loss * float('nan') if self.training else loss
    monkeypatch.setattr(GPT, 'forward', broken)
    code, _, err = program(trainer.main, *args, '--log_interval=100',
                           '--gradient_accumulation_steps=1')
    assert code == 2 and err.count('error: ') == 1 and 'nan in step 0' in err
    assert not list((tmp_path / 'out').glob('ckpt*'))


def test_a_wandb_that_fails_never_stops_training(args, program, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError('no way to the server')
    begun = {'init': lambda **kwargs: None, 'run': types.SimpleNamespace(id='x')}
    for calls in ({'init': fail}, {**begun, 'log': fail, 'finish': fail}):
        monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(**calls))
        code, out, err = program(trainer.main, *args, '--wandb_log', '--init_from=scratch')
        assert code == 0 and (out + err).count('without wandb') == 1


def test_a_disk_that_cannot_link_gets_a_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'link', lambda *a: (_ for _ in ()).throw(OSError('no links')))
    for iter_num in (1, 2):
        save_checkpoint(tmp_path / 'ckpt.pt', tiny_model(GPT), GPT2, {}, iter_num, keep=2)
    assert torch.load(tmp_path / 'ckpt.pt.1', weights_only=True)['iter_num'] == 1
    assert not list(tmp_path.glob('*.partial'))
