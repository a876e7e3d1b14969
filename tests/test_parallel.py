"""Several processes: one run in all they do, and it survives the loss of one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_metrics, without_times
from family import DEEPSEEK
from test_faults import assert_same_end, end_state, start, wait_for

import train as trainer
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime import dataset
from runtime.loading import load_model
from runtime.parallel import Processes
from train import TrainConfig

pytestmark = pytest.mark.usefixtures('no_picture')
OF_DEEPSEEK = [f'--{key}={value}' for key, value in DEEPSEEK.items()]
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
ENV = os.environ | {'OMP_NUM_THREADS': '1'}


def torchrun(args, script='train.py'):
    """Train in two processes of torchrun's to the end: its exit code, stdout and stderr."""
    done = subprocess.run([*TORCHRUN, script, *args], cwd=ROOT, env=ENV, capture_output=True,
                          text=True, timeout=180)
    return done.returncode, done.stdout, done.stderr


def two_ranks():
    """What torchrun tells each of two processes of its own in the environment."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1])}
    return [address | {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': '2'} for rank in '01']


def two_processes(args, model_class=GPT):
    """Train in two processes to the end, much sooner than torchrun's would: they are forked, with
    torch imported already. Returns the first one's stdout."""
    processes = [start(args, model_class, partial(os.environ.update, rank)) for rank in two_ranks()]
    for process in processes:
        process.join(120)
    out, err = (Path(processes[0].log + end).read_text() for end in ('0.out', '0.err'))
    assert [process.exitcode for process in processes] == [0, 0], err
    return out


@pytest.fixture
def args(tiny_args):
    return [*tiny_args, '--max_iters=8', '--eval_interval=4', '--eval_iters=3', '--init_from=auto']


def losses(out_dir):
    return [value for row in read_metrics(out_dir)
            for key, value in row.items() if key.endswith('loss')]


@pytest.mark.parametrize('model_class, options', [
    (GPT_MLA, []), (GPT_MLA, OF_DEEPSEEK), (GPT_KAhead, ['--rotary=all', '--n_kv_head=1'])])
def test_two_processes_see_what_one_sees(model_class, options, tiny_args, tmp_path, program):
    args = [*tiny_args, '--gradient_accumulation_steps=4', '--dropout=0.1', '--eval_iters=3',
            *options]
    assert program(lambda: trainer.main(model_class), *args)[0] == 0
    two_processes([*args, f'--out_dir={tmp_path / "two"}'], model_class)
    rows = [without_times(read_metrics(tmp_path / name)) for name in ('out', 'two')]
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert one[key] == pytest.approx(two[key], abs=1e-5), key


def test_micro_batches_that_two_processes_cannot_share(tiny_args, program, monkeypatch):
    args = tiny_args + ['--gradient_accumulation_steps=3']
    code, _, err = torchrun(args, 'train_mla.py')
    errors = [line for line in err.splitlines() if line.startswith('error:')]
    assert code != 0 and len(errors) == 1 and 'use a multiple of 2' in errors[0]
    for name, value in {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '2'}.items():
        monkeypatch.setenv(name, value)
    for model_class in (GPT, GPT_KAhead):
        code, _, err = program(lambda: trainer.main(model_class), *args)
        assert code == 2 and err.count('\n') == 1 and 'use a multiple of 2' in err


@pytest.mark.parametrize('model_class, name', [(GPT, 'ckpt.pt'), (GPT_KAhead, 'ckpt_k_ahead.pt')])
def test_two_processes_resume_bit_for_bit_and_one_goes_on_with_a_note(model_class, name, args,
                                                                      tmp_path, program):
    whole, half, one = (tmp_path / name for name in ('whole', 'half', 'one'))
    args += ['--dropout=0.1']
    two_processes([*args, f'--out_dir={whole}'], model_class)
    two_processes([*args, f'--out_dir={half}', '--max_iters=4'], model_class)
    shutil.copytree(half, one)
    two_processes([*args, f'--out_dir={half}'], model_class)
    assert_same_end(end_state(half, name), end_state(whole, name))
    code, out, err = program(lambda: trainer.main(model_class), *args, f'--out_dir={one}')
    assert code == 0 and 'note: the number of processes was 2 and is 1 now' in out, err
    assert losses(one) == pytest.approx(losses(whole), abs=1e-5)


def test_one_process_goes_on_as_two_with_a_note(args, tmp_path, program):
    args += ['--dropout=0.1']
    two_processes([*args, f'--out_dir={tmp_path / "whole"}'])
    assert program(trainer.main, *args, '--max_iters=4')[0] == 0
    assert 'note: the number of processes was 1 and is 2 now' in two_processes(args)
    assert losses(tmp_path / 'out') == pytest.approx(losses(tmp_path / 'whole'), abs=1e-5)


def test_every_process_evaluates_its_share(data_dir, tmp_path, monkeypatch):
    class OneOfTwo(Processes):
        """Without the other."""
        mean = staticmethod(torch.Tensor.tolist)
        max = staticmethod(lambda value: value)
        wrap = staticmethod(lambda model, compiled: model)
    draw, seen = dataset.draw_batch, []
    monkeypatch.setattr(dataset, 'draw_batch',
                        lambda *args: (seen.append(args[3:5]), draw(*args))[1])
    config = TrainConfig(dataset=str(data_dir), out_dir=str(tmp_path / 'out'), eval_iters=5,
                         eval_only=True, batch_size=2, gradient_accumulation_steps=2, device='cpu')
    for rank, share in ((0, [0, 2, 4]), (1, [1, 3, 5])):  # the sixth one is not counted
        processes = OneOfTwo(rank, 2, torch.device('cpu'), sharded=False)
        monkeypatch.setattr(trainer, 'join_processes', lambda config: nullcontext(processes))
        trainer.launch(GPT, config, dict(n_layer=1, n_head=2, n_embd=8, block_size=16))
        assert seen == [((config.seed, 1, split), number) for split in (0, 1) for number in share]
        seen.clear()


@pytest.mark.parametrize('model_class, script, options', [
    (GPT_MLA, 'train_mla.py', OF_DEEPSEEK), (GPT, 'train.py', ['--n_kv_head=1', '--rotary=all']),
    (GPT_KAhead, 'train_k_ahead.py', ['--head=linear'])])
def test_sharded_it_is_the_same_run_and_its_checkpoints_need_no_shards(model_class, script, options,
                                                                       args, tmp_path, program):
    one, two = ([*args, *options, f'--out_dir={tmp_path / name}'] for name in ('one', 'two'))
    assert program(lambda: trainer.main(model_class), *one)[0] == 0
    code, out, err = torchrun([*two, '--parallel=fsdp', '--max_iters=4'], script)
    assert code == 0 and 'sharded' in out, err
    two_processes([*two, '--parallel=fsdp'], model_class)
    assert losses(tmp_path / 'two') == pytest.approx(losses(tmp_path / 'one'), abs=1e-5)
    mine, theirs = (load_model(tmp_path / name).model for name in ('one', 'two'))
    for (name, p), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, other, atol=1e-4), name
    # it goes on in one process without shards
    code, out, err = program(lambda: trainer.main(model_class), *two, '--max_iters=10')
    assert code == 0 and 'note: the number of processes was 2 and is 1 now' in out, err


def test_a_killed_worker_comes_back_and_the_run_ends_as_if_it_had_not_died(args, tmp_path):
    """torchrun --max-restarts with --init_from=auto, as docs/long_runs.md says. One restart is all
    that it takes."""
    args += ['--max_iters=120', '--eval_interval=20']
    two_processes([*args, f'--out_dir={tmp_path / "whole"}'])
    out = tmp_path / 'out'
    process = start_torchrun(args, '--max-restarts=1')
    wait_for((out / 'ckpt.pt').exists, 120)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    newest = torch.load(out / 'ckpt.pt', weights_only=True)
    assert newest['iter_num'] < 120  # the kill fell inside the run
    assert process.wait(180) == 0
    assert_same_end(end_state(out), end_state(tmp_path / 'whole'))


def start_torchrun(args, *options):
    """Train in two processes of torchrun's, quietly: torchrun's process."""
    command = [*TORCHRUN, *options, 'train.py', *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL,
                            env=ENV | {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})


def workers_of(pid):
    """The processes that torchrun started, oldest first."""
    found = subprocess.run(['ps', '-o', 'pid=,args=', '--ppid', str(pid)], capture_output=True,
                           text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if 'train' in line]


# True: as Slurm and systemd do, after which torchrun sends its own
@pytest.mark.parametrize('to_all', [False, True])
def test_sigterm_to_torchrun_saves(to_all, args, tmp_path):
    out = tmp_path / 'out'
    process = start_torchrun([*args, '--max_iters=100000', '--eval_interval=100000',
                              '--lr_decay_iters=100000'])
    wait_for(lambda: (out / 'metrics.jsonl').exists() and len(read_metrics(out)) > 3, 120)
    workers = workers_of(process.pid)
    for pid in [process.pid, *(workers if to_all else [])]:
        os.kill(pid, signal.SIGTERM)
    process.wait(60)
    wait_for((out / 'ckpt_last.pt').exists, 10)
    assert torch.load(out / 'ckpt_last.pt', weights_only=True)['iter_num'] >= 3
