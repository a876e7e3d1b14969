from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from configurator import UserError, build, configure, run
from model import GPTConfig
from model_k_ahead import KAheadConfig
from model_mla import MLAConfig
from train import TrainConfig


@dataclass
class Settings:
    text: str = 'a'  # some text
    count: int = 1  # how many
    rate: float = 0.5
    switch: Literal[True, False, 'auto'] = 'auto'
    flag: bool = False
    maybe: int | None = None


def settings(*argv):
    return configure(argv, Settings)[0]


def config_file(folder, text, name='c.py'):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_values_by_type():
    s = settings('--text=1e3=x', '--count=7', '--rate=2', '--switch=False', '--flag=True', '--maybe=3')
    assert s == Settings(text='1e3=x', count=7, rate=2.0, switch=False, flag=True, maybe=3)
    assert type(s.rate) is float
    assert settings('--switch=auto', '--maybe=None', '--text=').text == ''
    assert settings('--flag').flag and not settings('--flag', '--flag=False').flag


@pytest.mark.parametrize('arg, words', [
    ('--count=x', "--count='x' must be a whole number"), ('--count=1.0', 'a whole number'), ('--count=True', 'whole'),
    ('--rate=fast', "must be a number"), ('--rate=1e999', 'finite'), ('--flag=1', 'True or False'),
    ('--switch=1', "True, False or auto"), ('--switch=on', 'True, False or auto'), ('--count=' + '9' * 30, '2**63'),
    ('--maybe=x', 'a whole number or None'), ('--cuont=3', 'did you mean count?'), ('--count', '--key=value'),
    ('--switch', '--key=value'), ('flag', 'no config file'), ('-flag', '--key=value'),
    ('-count=3', '--count='), ('nothing.py', 'no config file'), ('count=3', 'did you mean --count=3?'),
    ('--rate=' + '(' * 5000, 'a number'),
])
def test_what_is_wrong_is_said(arg, words):
    with pytest.raises(UserError) as e:
        settings(arg)
    assert words in str(e.value)


def test_later_ones_win_and_files_see_what_stands(tmp_path):
    path = config_file(tmp_path, 'import time\nfrom math import sqrt\n_x = 2\ndef f(): return _x\n'
                                 'count = count * 2\ncount += f()\ntext = "file"\nclass C: pass\n')
    assert settings('--count=5', path) == Settings(text='file', count=12)
    assert settings(path, '--count=5') == Settings(text='file', count=5)


@pytest.mark.parametrize('text, words', [
    ('count = 1 / 0', 'raised ZeroDivisionError in line 1'), ('\ncount = (', 'raised SyntaxError in line 2'),
    ('import sys\nsys.exit(3)', 'raised SystemExit in line 2'), ('cuont = 3', ': cuont; did you mean count, or is the file for another program?'), ('count = lambda: 3', 'whole number'),
    ('count = "3"', "must be a whole number"), ('rate = None', 'a number'),
])
def test_a_bad_file_is_named(tmp_path, text, words):
    path = config_file(tmp_path, text)
    with pytest.raises(UserError) as e:
        settings(path)
    assert words in str(e.value) and path in str(e.value)


def test_model_keys_are_handed_back_only_if_given():
    config, model_args = configure(['--n_layer=3', '--max_iters=5'], TrainConfig, MLAConfig, bias=False, out_dir='o')
    assert (config.max_iters, config.out_dir, model_args) == (5, 'o', {'n_layer': 3})
    with pytest.raises(UserError, match='n_embd=768 is not divisible by n_head=5'):
        build(GPTConfig, {'n_head': 5})


def test_numbers_of_numpys_are_numbers(tmp_path):
    path = config_file(tmp_path, 'import numpy as np\ncount = np.int64(3)\nrate = np.sqrt(4.0)\nflag = np.bool_(True)\n')
    assert settings(path) == Settings(count=3, rate=2.0, flag=True)


def test_help_prints_every_key_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as e:
        configure(['--help'], TrainConfig, MLAConfig, out_dir='out_mla')
    out = capsys.readouterr().out
    assert e.value.code == 0
    assert "--out_dir='out_mla'" in out and '--n_latent=None' in out and 'width of the latent' in out
    for key in (*TrainConfig.__dataclass_fields__, *MLAConfig.__dataclass_fields__):
        line = next(line for line in out.splitlines() if line.startswith(f'  --{key}='))
        assert len(line.split(maxsplit=1)) == 2, f'{key} has no comment'


# every key that a config file or command line of nanoGPT's trainer can set, with nanoGPT's default
NANOGPT = dict(
    out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True,
    init_from='scratch', wandb_log=False, wandb_project='owt', wandb_run_name='gpt2', dataset='openwebtext',
    gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0,
    bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend='nccl', device='cuda',
    dtype='bfloat16', compile=True)


def test_a_config_file_of_nanogpts_works(tmp_path):
    text = 'import time\n' + ''.join(f'{k} = {v!r}\n' for k, v in NANOGPT.items()) + 'wandb_run_name = str(time.time())\n'
    config, model_args = configure([config_file(tmp_path, text)], TrainConfig, GPTConfig)
    for key, value in NANOGPT.items():
        if key != 'wandb_run_name':
            assert (model_args[key] if key in model_args else getattr(config, key)) == value
    ours = {f: getattr(TrainConfig(), f) for f in TrainConfig.__dataclass_fields__ if f in NANOGPT}
    decide_themselves = ('device', 'dtype', 'compile', 'backend')
    assert ours == {k: v for k, v in NANOGPT.items() if k in ours} | {k: 'auto' for k in decide_themselves}


@pytest.mark.parametrize('name, model_config', [
    ('train_shakespeare_char', GPTConfig), ('train_shakespeare_char_mla', MLAConfig), ('train_gpt2', GPTConfig),
    ('train_gpt2_mla', MLAConfig), ('finetune_shakespeare', GPTConfig), ('eval_gpt2', GPTConfig),
    ('train_shakespeare_char_k_ahead', KAheadConfig), ('train_gpt2_k_ahead', KAheadConfig), ('train_shakespeare_char_cpu', GPTConfig),
    ('eval_gpt2_medium', GPTConfig), ('eval_gpt2_large', GPTConfig), ('eval_gpt2_xl', GPTConfig)])
def test_our_config_files(name, model_config):
    config, model_args = configure([f'config/{name}.py'], TrainConfig, model_config)
    if name.endswith('_mla'):
        twin, twin_args = configure([f'config/{name[:-4]}.py'], TrainConfig, MLAConfig)
        assert model_args == twin_args | {'n_latent': None} and MLAConfig(**model_args).n_latent * 2 == MLAConfig(**model_args).n_embd
        assert {k for k, v in vars(config).items() if v != getattr(twin, k)} == {'out_dir', 'wandb_run_name'}
        with pytest.raises(UserError, match='n_latent; .* for another program'):  # train.py would train MHA with it
            configure([f'config/{name}.py'], TrainConfig, GPTConfig)
    if name.endswith('_k_ahead'):
        assert KAheadConfig(**model_args).k_ahead == 4


def test_only_what_is_for_want_of_memory_is_called_so(capsys):

    for broken in (lambda: torch.zeros(6).view(4, 2), lambda: torch.zeros(2) @ torch.zeros(3)):
        with pytest.raises(RuntimeError):
            run(broken)
    with pytest.raises(SystemExit):
        run(lambda: torch.zeros(10 ** 15))
    assert 'not enough memory' in capsys.readouterr().err
