import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import configurator
from configurator import UserError, build, configure, is_out_of_memory, nearest_key, run

import pytest
import torch

import train
from model import GPT, GPTConfig
from model_k_ahead import KAheadConfig
from model_mla import GPT_MLA, MLAConfig
from sample import SampleConfig
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
    s = settings('--text=1e3=x', '--count=7', '--rate=2', '--switch=False', '--flag=True',
                 '--maybe=3')
    assert s == Settings(text='1e3=x', count=7, rate=2.0, switch=False, flag=True, maybe=3)
    assert type(s.rate) is float
    assert settings('--switch=auto', '--maybe=None', '--text=').text == ''
    assert settings('--flag').flag and not settings('--flag', '--flag=False').flag


@pytest.mark.parametrize('arg, words', [
    ('--count=x', "--count='x' must be a whole number"), ('--count=1.0', 'a whole number'),
    ('--count=True', 'whole'), ('--rate=fast', "must be a number"), ('--rate=1e999', 'finite'),
    ('--flag=1', 'True or False'), ('--switch=1', "True, False or auto"),
    ('--switch=on', 'True, False or auto'), ('--count=' + '9' * 30, '2**63'),
    ('--maybe=x', 'a whole number or None'), ('--cuont=3', 'did you mean count?'),
    ('--count', '--key=value'), ('--switch', '--key=value'), ('flag', 'no config file'),
    ('-flag', '--key=value'), ('-count=3', '--count='), ('nothing.py', 'no config file'),
    ('count=3', 'did you mean --count=3?'),
    ('--rate=' + '(' * 5000, 'a number'),
])
def test_what_is_wrong_is_said(arg, words):
    with pytest.raises(UserError) as e:
        settings(arg)
    assert words in str(e.value)


def test_later_ones_win_and_files_see_what_stands(tmp_path):
    path = config_file(tmp_path, 'import time\nfrom math import sqrt\n_x = 2\n'
                                 'def f(): return _x\ncount = count * 2\ncount += f()\n'
                                 'text = "file"\nclass C: pass\n')
    assert settings('--count=5', path) == Settings(text='file', count=12)
    assert settings(path, '--count=5') == Settings(text='file', count=5)


@pytest.mark.parametrize('text, words', [
    ('count = 1 / 0', 'raised ZeroDivisionError in line 1'),
    ('\ncount = (', 'raised SyntaxError in line 2'),
    ('import sys\nsys.exit(3)', 'raised SystemExit in line 2'),
    ('cuont = 3', ': cuont; did you mean count, or is the file for another program?'),
    ('count = lambda: 3', 'whole number'), ('count = "3"', "must be a whole number"),
    ('rate = None', 'a number'),
])
def test_a_bad_file_is_named(tmp_path, text, words):
    path = config_file(tmp_path, text)
    with pytest.raises(UserError) as e:
        settings(path)
    assert words in str(e.value) and path in str(e.value)


def test_model_keys_are_handed_back_only_if_given():
    argv = ['--n_layer=3', '--max_iters=5']
    config, model_args = configure(argv, TrainConfig, MLAConfig, bias=False, out_dir='o')
    assert (config.max_iters, config.out_dir, model_args) == (5, 'o', {'n_layer': 3})
    with pytest.raises(UserError, match='n_embd=768 is not divisible by n_head=5'):
        build(GPTConfig, {'n_head': 5})


def test_numbers_of_numpys_are_numbers(tmp_path):
    path = config_file(tmp_path, 'import numpy as np\ncount = np.int64(3)\nrate = np.sqrt(4.0)\n'
                                 'flag = np.bool_(True)\n')
    assert settings(path) == Settings(count=3, rate=2.0, flag=True)


def test_help_prints_every_key_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as e:
        configure(['--help'], TrainConfig, MLAConfig, out_dir='out_mla')
    out = capsys.readouterr().out
    assert e.value.code == 0
    assert "--out_dir='out_mla'" in out and '--n_latent=None' in out
    assert 'width of the latent' in out
    for key in (*TrainConfig.__dataclass_fields__, *MLAConfig.__dataclass_fields__):
        line = next(line for line in out.splitlines() if line.startswith(f'  --{key}='))
        assert len(line.split(maxsplit=1)) == 2, f'{key} has no comment'


@dataclass
class Long:
    short: int = 1  # a few words
    # a remark on what comes next
    long: Literal['one', 'two'] = 'one'  # a comment that does not fit
                                         # in one line, {so} it goes on in the next
    bare: int = 2


def test_help_begins_with_the_docstring_and_wraps_long_comments(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules['__main__'], '__doc__', '\nWhat it does:\n\n    example\n')
    with pytest.raises(SystemExit):
        configure(['-h'], Long, positional=('long', 'bare'))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ['What it does:', '', '    example', '']
    assert '[LONG] [BARE] [CONFIG.py ...] [--key=value ...]' in lines[4]
    assert lines[6] == f"{'  --short=1':<47}a few words"
    assert lines[7][:47].rstrip() == "  --long='one'" and len(lines[7]) <= 100
    assert lines[7][47:] == 'a comment that does not fit in one line, {so} it goes'
    assert lines[8:] == [' ' * 47 + 'on in the next', '  --bare=2']


def test_values_may_stand_without_their_key(tmp_path):
    def read(*argv):
        return configure(argv, Settings, positional=('text', 'count'))[0]
    path = config_file(tmp_path, 'rate = 2\n')
    assert read('b', '7') == read('--flag=False', 'b', '--count=7') == Settings(text='b', count=7)
    assert read(path, 'b') == read('b', path) == Settings(text='b', rate=2.0)
    assert read('b', '--text=c').text == 'c' and read('--text=c', 'b').text == 'b'
    for argv, words in ((['b', 'x'], "--count='x' must be a whole number"),
                        (['b', '7', '8'], "no config file '8'"), ([''], "no config file ''"),
                        (['count=3'], 'did you mean --count=3?'), (['x.py'], "file 'x.py'")):
        with pytest.raises(UserError) as e:
            read(*argv)
        assert words in str(e.value)
    (tmp_path / 'count=3').touch()
    assert read(str(tmp_path / 'count=3')).text == str(tmp_path / 'count=3')


def test_a_key_of_another_program_names_it(tmp_path):
    path = config_file(tmp_path, 'n_latent = 3\n')
    for arg in ('--n_latent=3', path):
        with pytest.raises(UserError, match='n_latent: it is a key of train_mla.py$'):
            configure([arg], Settings, elsewhere={'n_latent': 'train_mla.py'})
        with pytest.raises(UserError, match='unknown key'):
            configure([arg], Settings, elsewhere={'k_ahead': 'train_k_ahead.py'})


@pytest.mark.parametrize('model_class, arg, key, other', [
    (GPT, '--n_latent=32', '--n_latent', 'train_mla.py'),
    (GPT, 'config/train_gpt2_k_ahead.py', 'k_ahead', 'train_k_ahead.py'),
    (GPT_MLA, '--k_ahead=4', '--k_ahead', 'train_k_ahead.py')])
def test_a_trainer_names_the_trainer_that_has_a_key(model_class, arg, key, other, program):
    code, out, err = program(lambda: train.main(model_class), arg)
    assert code == 2 and out == '' and err.count('\n') == 1
    assert f'{key}: it is a key of {other}\n' in err and err.startswith('error: ')


@pytest.mark.parametrize('venv', [True, False])
def test_without_torch_a_program_says_how_to_go_on(venv, tmp_path):
    (tmp_path / 'configurator.py').write_bytes(Path(configurator.__file__).read_bytes())
    if venv:
        (tmp_path / '.venv' / 'lib' / 'python3.12' / 'site-packages' / 'torch').mkdir(parents=True)
    program = 'import sys; sys.modules["torch"] = None; import configurator'
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
    assert done.stderr.startswith('error: torch is not installed here: run ')
    assert 'source .venv/bin/activate' in done.stderr and ('make quick' in done.stderr) != venv


def test_every_program_checks_for_torch_before_it_imports_a_package():
    root = Path(configurator.__file__).parent
    paths = [*root.glob('*.py'), *root.glob('data/*/prepare.py')]
    programs = [[path] for path in sorted(paths) if '\n    run(' in path.read_text()]
    assert len(programs) > 10
    for program in [*programs, ['-m', 'analysis']]:
        # Without -S and -E, Python would find the packages that are installed.
        done = subprocess.run([sys.executable, '-SE', *program, '--help'], cwd=root,
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and done.stdout == '' and done.stderr.count('\n') == 1
        package = 'numpy' if 'prepare.py' in str(program) else 'torch'
        assert done.stderr.startswith(f'error: {package} is not installed here: run '), program


# every key that a config file or command line of nanoGPT's trainer can set, with nanoGPT's default
NANOGPT = dict(
    out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
    always_save_checkpoint=True, init_from='scratch', wandb_log=False, wandb_project='owt',
    wandb_run_name='gpt2', dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12,
    block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False,
    learning_rate=6e-4, max_iters=600000, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend='nccl',
    device='cuda', dtype='bfloat16', compile=True)


def test_a_config_file_of_nanogpts_works(tmp_path):
    keys = ''.join(f'{k} = {v!r}\n' for k, v in NANOGPT.items())
    path = config_file(tmp_path, f'import time\n{keys}wandb_run_name = str(time.time())\n')
    config, model_args = configure([path], TrainConfig, GPTConfig)
    for key, value in NANOGPT.items():
        if key != 'wandb_run_name':
            assert (model_args[key] if key in model_args else getattr(config, key)) == value
    ours = {f: getattr(TrainConfig(), f) for f in TrainConfig.__dataclass_fields__ if f in NANOGPT}
    decide_themselves = {k: 'auto' for k in ('device', 'dtype', 'compile', 'backend')}
    assert ours == {k: v for k, v in NANOGPT.items() if k in ours} | decide_themselves


@pytest.mark.parametrize('name, model_config', [
    ('train_shakespeare_char', GPTConfig), ('train_shakespeare_char_mla', MLAConfig),
    ('train_gpt2', GPTConfig), ('train_gpt2_mla', MLAConfig), ('finetune_shakespeare', GPTConfig),
    ('eval_gpt2', GPTConfig), ('train_shakespeare_char_k_ahead', KAheadConfig),
    ('train_gpt2_k_ahead', KAheadConfig), ('train_shakespeare_char_cpu', GPTConfig),
    ('eval_gpt2_medium', GPTConfig), ('eval_gpt2_large', GPTConfig), ('eval_gpt2_xl', GPTConfig)])
def test_our_config_files(name, model_config):
    config, model_args = configure([f'config/{name}.py'], TrainConfig, model_config)
    if name.endswith('_mla'):
        twin, twin_args = configure([f'config/{name[:-4]}.py'], TrainConfig, MLAConfig)
        model_config = MLAConfig(**model_args)
        assert model_args == twin_args | {'n_latent': None}
        assert model_config.n_latent * 2 == model_config.n_embd
        different = {k for k, v in vars(config).items() if v != getattr(twin, k)}
        assert different == {'out_dir', 'wandb_run_name'}
        # train.py would train MHA with it
        with pytest.raises(UserError, match='n_latent; .* for another program'):
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
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError('CUDA out of memory'))
    assert not is_out_of_memory(ValueError('out of memory'))


PRINT_AND_FAIL = '''
import sys
from configurator import UserError, run
def main():
    print(sys.argv[1])
    print('still here', flush=True)
    print(sys.argv[1], file=sys.stderr)
    raise UserError(sys.argv[1])
run(main)
'''


@pytest.mark.parametrize('encoding, lost', [('ascii', 'é東🙂\udcff'), ('cp1252', '東🙂\udcff'),
                                            ('utf-8', '\udcff')])
def test_what_the_encoding_lacks_is_printed_as_its_number(encoding, lost):
    """stdout and stderr are redirected, as to a log. The last character is the byte 0xff of an
    argument that is no UTF-8."""
    env = os.environ | {'PYTHONIOENCODING': encoding, 'PYTHONUTF8': '1'}
    done = subprocess.run([sys.executable, '-c', PRINT_AND_FAIL, 'é東🙂\udcff'], env=env,
                          cwd=Path(configurator.__file__).parent, capture_output=True, timeout=60)
    numbers = {'é': r'\xe9', '東': r'\u6771', '🙂': r'\U0001f642', '\udcff': r'\udcff'}
    text = ''.join(numbers[c] if c in lost else c for c in 'é東🙂\udcff')
    assert done.returncode == 2
    assert done.stdout.decode(encoding) == f'{text}\nstill here\n'
    assert done.stderr.decode(encoding) == f'{text}\nerror: {text}\n'


def test_a_stream_that_cannot_be_configured_is_left_alone(monkeypatch):
    class Lines(list):
        def write(self, text):
            self.append(text)
    lines = Lines()
    monkeypatch.setattr(sys, 'stdout', lines)
    monkeypatch.setattr(sys, 'stderr', None)  # as under pythonw
    run(lambda: print('here'))
    assert lines == ['here', '\n']


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('USERPROFILE', str(tmp_path / 'home'))
    (tmp_path / 'home').mkdir()
    return tmp_path / 'home'


def test_a_tilde_is_the_home_folder(home):
    path = config_file(home, 'text = "~/y"\n')
    assert settings('--text=~/x').text == f'{home}/x' and settings('--text=~').text == str(home)
    assert settings('~/c.py').text == settings(path).text == f'{home}/y'
    read = configure(['~/x'], SampleConfig, positional=('model',), out_dir='~')[0]
    assert read.model == f'{home}/x'
    for text in ('~x', 'a/~/x', './~/x', '', ' ~/x', 'FILE:~/x'):
        assert settings(f'--text={text}').text == text
    with pytest.raises(UserError, match=f'there is no config file .{home}/none.py'):
        settings('~/none.py')


def test_a_tilde_in_a_text_that_the_model_reads_is_a_character(home):
    read = configure(['--start=~/x', '--stop=~', '--out_dir=~/x'], SampleConfig)[0]
    assert read == SampleConfig(start='~/x', stop='~', out_dir=f'{home}/x')


def test_a_config_file_is_looked_for_in_the_projects_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = 'config/train_gpt2.py'
    assert configure([name], TrainConfig, GPTConfig)[0].wandb_project == 'owt'
    (tmp_path / 'config').mkdir()
    config_file(tmp_path / 'config', 'wandb_project = "mine"\n', 'train_gpt2.py')
    assert configure([name], TrainConfig, GPTConfig)[0].wandb_project == 'mine'
    for missing in ('config/none.py', 'README.md', 'config'):
        with pytest.raises(UserError, match=f'no config file {missing!r}'):
            configure([missing], TrainConfig, GPTConfig)


def keys(*classes):
    return [key for cls in classes for key in cls.__dataclass_fields__]


@pytest.mark.parametrize('typed, meant', [
    ('batchsize', 'batch_size'), ('max_iter', 'max_iters'), ('n_heads', 'n_head'),
    ('learningrate', 'learning_rate'), ('learning-rate', 'learning_rate'), ('outdir', 'out_dir'),
    ('OUT_DIR', 'out_dir'), ('datset', 'dataset'), ('dropuot', 'dropout'), ('n_layers', 'n_layer'),
    ('layers', 'n_layer'), ('n_embed', 'n_embd'), ('latent', 'n_latent'),
    ('warmup', 'warmup_iters'), ('weight_decya', 'weight_decay'), ('compil', 'compile'),
    ('Seed', 'seed'), ('max_itters', 'max_iters'), ('evalinterval', 'eval_interval')])
def test_a_slip_of_the_pen_names_the_key(typed, meant):
    assert nearest_key(typed, keys(TrainConfig, MLAConfig)) == meant
    with pytest.raises(UserError, match=f'unknown key --{typed}; did you mean {meant}.$'):
        configure([f'--{typed}=1'], TrainConfig, MLAConfig)


@pytest.mark.parametrize('typed', [
    'momentum', 'epochs', 'foo', 'steps', 'gpus', 'num_workers',
    'precision', 'resume', 'prompt', 'size', 'x', '', 'eval', 'la'])
def test_a_word_that_is_near_no_key_names_none(typed):
    assert nearest_key(typed, keys(TrainConfig, MLAConfig)) is None
    with pytest.raises(UserError, match=f'unknown key --{typed}; --help lists the keys$'):
        configure([f'--{typed}=1'], TrainConfig, MLAConfig)


def test_slips_in_keys_of_other_programs():
    sampling = keys(SampleConfig)
    for typed, meant in (('temp', 'temperature'), ('topk', 'top_k'), ('num_sample', 'num_samples'),
                         ('samples', 'num_samples'), ('max_token', 'max_new_tokens')):
        assert nearest_key(typed, sampling) == meant
    assert nearest_key('lenght', ['sequences', 'length', 'seed']) == 'length'
    assert nearest_key('beam', sampling) is nearest_key('length', sampling) is None
