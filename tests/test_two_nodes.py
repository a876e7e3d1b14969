"""Two nodes for real: two network namespaces joined by a virtual cable. In each of them torchrun is
started as docs/long_runs.md says."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

from configurator import UserError

import pytest
import torch
from conftest import ROOT, read_metrics
from test_faults import assert_same_end, end_state, wait_for
from test_parallel import ENV, two_processes, workers_of

from model_mla import GPT_MLA
from runtime.parallel import name_gloo_interface

GUIDE = (ROOT / 'docs' / 'long_runs.md').read_text()
ADDRESSES = {1: '10.0.0.1', 2: '10.0.0.2'}
MISSING = 'network namespaces need rights that are missing here'


def sh(command):
    return subprocess.run(command, shell=True, capture_output=True, text=True, timeout=30)


@pytest.fixture
def nodes():
    """The names of two network namespaces that reach each other. The test is skipped where they
    cannot be made."""
    names = {i: f'node{i}-{os.getpid()}' for i in ADDRESSES}
    cables = {i: f'veth{i}x{os.getpid() % 10 ** 6}' for i in ADDRESSES}
    known = [f'{ADDRESSES[i]} {names[i]}\n' for i in names]
    try:
        cable = f'ip link add {cables[1]} type veth peer name {cables[2]}'
        if os.geteuid() or sh(cable).returncode:
            pytest.skip(MISSING)
        for i, name in names.items():
            hosts = Path('/etc/netns') / name / 'hosts'
            hosts.parent.mkdir(parents=True, exist_ok=True)
            # Debian and Ubuntu have a node find itself at 127.0.1.1
            of_others = [line for line in known if name not in line]
            hosts.write_text(f'127.0.0.1 localhost\n127.0.1.1 {name}\n' + ''.join(of_others))
            for command in (f'ip netns add {name}', f'ip link set {cables[i]} netns {name}',
                            f'ip -n {name} addr add {ADDRESSES[i]}/24 dev {cables[i]}',
                            f'ip -n {name} link set {cables[i]} up', f'ip -n {name} link set lo up',
                            f'ip netns exec {name} unshare --uts hostname {name}'):
                done = sh(command)
                if done.returncode:
                    pytest.skip(f'{MISSING}: {done.stderr.strip()}')
        yield list(names.values())
    finally:
        sh(f'ip link del {cables[1]}')
        for name in names.values():
            sh(f'ip netns del {name}')
            sh(f'rm -rf /etc/netns/{name}')


def guide_command(first):
    """The guide's line for two nodes, the first of which has this name, up to the program, and with
    one process a node."""
    lines = re.findall(r'^.*torchrun --nnodes=2 .*$', GUIDE, re.M)
    assert len(lines) == 1 and '--nproc_per_node=8' in lines[0] and '--init_from=auto' in lines[0]
    assert '--rdzv_endpoint=node1:' in lines[0] and ' train_mla.py ' in lines[0]
    command = lines[0].split(' train_mla.py ')[0].replace('=node1:', f'={first}:')
    return command.replace('--nproc_per_node=8', '--nproc_per_node=1')


@pytest.mark.parametrize('lost', ['worker', 'node'])
def test_one_is_lost_and_the_run_ends_as_if_it_had_not_been(lost, nodes, tiny_args, tmp_path):
    """A worker comes back by itself. On a node that died with its torchrun, the same line is
    started again."""
    args = [*tiny_args, '--max_iters=120', '--eval_interval=20', '--init_from=auto']
    torchrun = f'{sys.executable} -m torch.distributed.run'
    command = guide_command(nodes[0]).replace('torchrun', torchrun, 1)

    def start(node):
        on_node = f'hostname {node}; exec env {command} train_mla.py "$@"'
        return subprocess.Popen(['ip', 'netns', 'exec', node, 'unshare', '--uts', 'sh', '-c',
                                 on_node, 'sh', *args], cwd=ROOT, env=ENV,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out, whole = tmp_path / 'out', tmp_path / 'whole'
    processes = [start(node) for node in nodes]
    try:
        wait_for((out / 'ckpt_mla.pt').exists, 120)
        dead = workers_of(processes[1].pid)
        for pid in [processes[1].pid, *dead] if lost == 'node' else dead:
            os.kill(pid, signal.SIGKILL)
        newest = torch.load(out / 'ckpt_mla.pt', weights_only=True)
        assert dead and newest['iter_num'] < 120  # the kill fell inside the run
        if lost == 'node':
            processes[1].wait(10)
            processes[1] = start(nodes[1])
        assert [process.wait(180) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert [row['iter'] for row in read_metrics(out) if 'loss' in row] == list(range(120))
    two_processes([*args, f'--out_dir={whole}'], GPT_MLA)
    assert_same_end(end_state(out, 'ckpt_mla.pt'), end_state(whole, 'ckpt_mla.pt'))


def test_the_slurm_script_starts_what_the_guide_says():
    script = ROOT / 'config' / 'train_gpt2_mla.slurm'
    assert sh(f'bash -n {script}').returncode == 0
    text = script.read_text()
    for option in ('TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1', '--rdzv_backend=c10d',
                   '--max-restarts=3', '--nproc_per_node=8',
                   'train_mla.py config/train_gpt2_mla.py', '--gradient_accumulation_steps=48',
                   '--init_from=auto'):
        assert option in text and option in GUIDE, option


def test_a_node_that_finds_itself_at_127_names_the_variable(monkeypatch):
    """With one interface beside lo there is nothing to ask."""
    environment = {'LOCAL_WORLD_SIZE': '8'}
    monkeypatch.setattr(os, 'environ', environment)
    monkeypatch.setattr(socket, 'gethostname', lambda: 'node7')
    monkeypatch.setattr(socket, 'gethostbyname', lambda name: '127.0.1.1')
    interfaces = [(1, 'lo'), (2, 'eth0'), (3, 'ib0')]
    monkeypatch.setattr(socket, 'if_nameindex', lambda: interfaces)
    with pytest.raises(UserError, match='node7 .* eth0, ib0: put GLOO_SOCKET_IFNAME=NAME in front'):
        name_gloo_interface(16)
    name_gloo_interface(8)  # one node alone
    assert environment == {'LOCAL_WORLD_SIZE': '8'}
    interfaces.pop()
    name_gloo_interface(16)
    assert environment['GLOO_SOCKET_IFNAME'] == 'eth0'
