"""What a program imports before it knows that it needs it, from modules that take long."""

import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT

SLOW = ('torch._dynamo', 'torch._inductor', 'transformers', 'datasets', 'scipy', 'sklearn', 'wandb',
        'tensorboard', 'pandas')


def imported(statement):
    """Those of SLOW, torch and matplotlib that a fresh Python has after a statement."""
    done = subprocess.run(
        [sys.executable, '-c', f'{statement}\nimport sys\nprint(*sys.modules)'], cwd=ROOT,
        capture_output=True, text=True, check=True)
    return {name for name in done.stdout.splitlines()[-1].split()
            if name in (*SLOW, 'torch', 'matplotlib')}


@pytest.mark.parametrize('module', ['train', 'train_k_ahead', 'sample', 'evaluate', 'generate',
                                    'runs', 'test_shakespeare_quick', 'convert_mla', 'bench'])
def test_a_program_imports_torch_and_nothing_else_that_takes_long(module):
    assert imported(f'import {module}') - {'matplotlib'} == {'torch'}


def test_the_list_of_analyses_needs_no_torch():
    assert not imported('from analysis.__main__ import main; main()')


def test_a_loss_of_k_heads_does_not_import_the_compiler():
    assert imported('''
import torch
from model_k_ahead import GPT_KAhead, KAheadConfig
config = KAheadConfig(n_layer=2, n_head=2, n_embd=8, block_size=16, vocab_size=14, bias=False)
model, idx = GPT_KAhead(config), torch.zeros(1, 8, dtype=torch.long)
model(idx, idx)[1].backward()
''') == {'torch'}


def test_loading_a_model_does_not_import_the_compiler():
    """torch.nn.init's functions do on the device meta. Nothing is drawn, and the weights come."""
    assert imported('''
import torch
from model_mla import GPT_MLA, MLAConfig
config = MLAConfig(n_layer=2, n_head=2, n_embd=8, block_size=16, vocab_size=14)
model, before = GPT_MLA(config), torch.get_rng_state()
other = GPT_MLA.from_state_dict(config, model.state_dict())
assert torch.equal(before, torch.get_rng_state()) and not any(p.is_meta for p in other.parameters())
assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
''') == {'torch'}


PROGRAMS = sorted(str(path.relative_to(ROOT))
                  for path in [*ROOT.glob('*.py'), *ROOT.glob('data/**/prepare.py')]
                  if "__name__ == '__main__'" in path.read_text())


ANALYSES = ['copying', 'report', 'latent_surgery']


def help_of(arguments):
    done = subprocess.run([sys.executable, *arguments, '--help'], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize('arguments', [
    *([name] for name in PROGRAMS), *(['-m', f'analysis.{name}'] for name in ANALYSES)],
    ids=lambda arguments: arguments[-1])
def test_help_is_the_same_without_torch(arguments):
    """It is printed with empty modules in place of those that take long."""
    code = textwrap.dedent(f"""
        import runpy, sys
        import runtime.stand_in
        runtime.stand_in.use_stand_ins = lambda: None
        sys.argv = [{arguments[-1]!r}, '--help']
        if {arguments[0] == '-m'}:
            runpy.run_module({arguments[-1]!r}, run_name='__main__', alter_sys=True)
        else:
            runpy.run_path({arguments[-1]!r}, run_name='__main__')""")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    with_torch = done.stdout.splitlines()
    without = help_of(arguments).splitlines()
    assert len(without) > 5 and [line for line in without if not line.startswith('usage:')] == [
        line for line in with_torch if not line.startswith('usage:')]
