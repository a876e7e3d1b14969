import pickle
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from configurator import UserError

import numpy as np
import pytest
import torch
from conftest import BOTH, CHARS, ROOT, tiny_model

import convert_mla
import export_huggingface
import sample
import train
from model import GPT, GPTConfig
from model_mla import GPT_MLA
from runtime import checkpoint as ckpt
from runtime.loading import load_model
from runtime.tokenizer import make_tokenizer
from train import TrainConfig


def save(path, model, spec=CHARS):
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    ckpt.save_checkpoint(path, model, make_tokenizer(spec), asdict(TrainConfig()), 7,
                         best_val_loss=1.5, optimizer=optimizer.state_dict(),
                         scaler=scaler.state_dict())


@dataclass
class NanoGPTConfig:
    """The seven keys of nanoGPT's GPTConfig; any other makes its constructor fail."""
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


def nanogpt_names(n_layer, bias):
    """The names in the state dict of nanoGPT's GPT."""
    norms = ['ln_1', 'ln_2']
    linears = ['attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj']
    kinds = ['weight', 'bias'] if bias else ['weight']
    blocks = {f'transformer.h.{i}.{module}.{kind}'
              for i in range(n_layer) for module in norms + linears for kind in kinds}
    return blocks | {f'transformer.ln_f.{kind}' for kind in kinds} | {
        'transformer.wte.weight', 'transformer.wpe.weight', 'lm_head.weight'}


@pytest.mark.parametrize('bias', [True, False])
def test_loads_the_way_nanogpt_loads(tmp_path, bias):
    model = tiny_model(GPT, bias=bias)
    save(tmp_path / 'ckpt.pt', model)
    checkpoint = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    keys = {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'}
    assert keys <= checkpoint.keys()
    config = NanoGPTConfig(**checkpoint['model_args'])
    assert set(checkpoint['model']) == nanogpt_names(config.n_layer, bias)
    assert checkpoint['model']['transformer.h.0.attn.c_attn.weight'].shape == (48, 16)
    groups = checkpoint['optimizer']['param_groups']
    assert [g['weight_decay'] for g in groups] == [0.1, 0.0]
    assert checkpoint['config']['dataset'] == 'openwebtext'


def test_gelu_is_written_only_where_nanogpt_would_compute_something_else(tmp_path):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT, gelu='tanh'))
    assert ckpt.read_checkpoint(tmp_path / 'ckpt.pt')['model_args']['gelu'] == 'tanh'
    assert load_model(tmp_path).model.config.gelu == 'tanh'


def test_a_checkpoint_of_nanogpts_loads(tmp_path, capsys):
    model = tiny_model(GPT)
    weights = {f'_orig_mod.{k}': v for k, v in model.state_dict().items()}
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16)
    model_args = dict(block_size=16, vocab_size=14, n_layer=2, n_head=2, n_embd=16, dropout=0.0,
                      bias=True)
    torch.save({'model': weights, 'optimizer': {}, 'model_args': model_args, 'iter_num': 10,
                'best_val_loss': torch.tensor(1.5), 'config': {'dataset': str(tmp_path)}},
               tmp_path / 'ckpt.pt')
    assert load_model(tmp_path).tokenizer.spec == {'unknown': 14}
    assert 'what its 14 ids mean, and dataset' in capsys.readouterr().err
    chars = ''.join(CHARS)
    with open(tmp_path / 'meta.pkl', 'wb') as f:
        stoi = {c: i for i, c in enumerate(chars)}
        pickle.dump({'itos': dict(enumerate(chars)), 'stoi': stoi}, f)
    trained = load_model(tmp_path)
    idx = torch.randint(14, (2, 16))
    assert torch.equal(trained.model(idx, idx)[0], model(idx, idx)[0])
    assert trained.tokenizer.spec == CHARS
    with open(tmp_path / 'meta.pkl', 'wb') as f:  # other data's: its ids mean other characters
        pickle.dump({'itos': dict(enumerate(chars[1:]))}, f)
    assert load_model(tmp_path).tokenizer.spec == {'unknown': 14}
    assert 'the 13 characters of its dataset are not as many' in capsys.readouterr().err


@BOTH
def test_load_model_finds_file_and_folder(tmp_path, model_class):
    model = tiny_model(model_class)
    path = ckpt.checkpoint_path(tmp_path, model_class.model_type)
    save(path, model, CHARS)
    idx = torch.randint(14, (2, 16))
    for source in (path, tmp_path):
        trained = load_model(str(source))
        loaded = trained.model
        assert type(loaded) is model_class and not loaded.training
        assert trained.tokenizer.spec == CHARS
        assert torch.equal(loaded(idx, idx)[0], model(idx, idx)[0])


def test_a_folder_with_both_gives_the_one_asked_for(tmp_path):
    for model_class, name in ((GPT, 'ckpt.pt'), (GPT_MLA, 'ckpt_mla.pt')):
        save(tmp_path / name, tiny_model(model_class))
    assert type(load_model(tmp_path, model_type='mla').model) is GPT_MLA
    assert type(load_model(tmp_path, model_type='gpt').model) is GPT
    words = 'several checkpoints: give one of .*ckpt.pt, .*ckpt_mla.pt'
    with pytest.raises(UserError, match=words):
        load_model(tmp_path)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'ckpt.pt'
    save(path, tiny_model(GPT))
    assert [p.name for p in tmp_path.iterdir()] == ['ckpt.pt']
    before = path.read_bytes()

    def full_disk(checkpoint, f):
        f.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(OSError):
        save(path, tiny_model(GPT, seed=1))
    assert path.read_bytes() == before


class Evil:
    def __reduce__(self):
        return (print, ('owned',))


@pytest.mark.parametrize('content', [
    lambda good: good[:len(good) // 2], lambda good: b'', lambda good: b'x' * 100,
    lambda good: pickle.dumps(Evil(), protocol=2)])
def test_what_cannot_be_read_is_reported(tmp_path, content, capsys):
    path = tmp_path / 'ckpt.pt'
    save(path, tiny_model(GPT))
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(UserError, match='damaged'):
        load_model(path)
    assert 'owned' not in capsys.readouterr().out


@pytest.mark.parametrize('change, words', [
    (lambda c: c.pop('model_args'), 'lacks model and model_args'),
    (lambda c: c['model_args'].update(n_embd=32), 'do not fit'),
    (lambda c: c['model_args'].update(rotary=1), 'do not fit'),
    (lambda c: c['model'].popitem(), 'do not fit'),
    (lambda c: c.update(model_type='mamba'), "model_type 'mamba'"),
    (lambda c: c['model_args'].update(n_head=3), 'not divisible'),
    (lambda c: c.update(tokenizer=5), 'its tokenizer'),
    (lambda c: c.update(model=[1]), 'damaged'),
    (lambda c: c.update(model_type=['gpt']), 'model_type')])
def test_what_does_not_fit_is_reported(tmp_path, change, words):
    path = tmp_path / 'ckpt.pt'
    save(path, tiny_model(GPT))
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=words):
        load_model(path)


def test_loading_maps_the_file_and_copies_nothing(tmp_path):
    """Peak memory beyond the interpreter's. The file holds an optimizer of twice the size too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=4, n_head=8, n_embd=512))
    weights = sum(p.nbytes for p in model.parameters())
    state = {i: {'exp_avg': torch.ones_like(p), 'exp_avg_sq': torch.ones_like(p)}
             for i, p in enumerate(model.parameters())}
    ckpt.save_checkpoint(tmp_path / 'ckpt.pt', model, make_tokenizer('gpt2'), {}, 1,
                         optimizer={'state': state})
    assert (tmp_path / 'ckpt.pt').stat().st_size > 2.9 * weights
    program = f'''
import sys, torch, generate
from runtime import loading
from model import GPT, GPTConfig

def peak():
    line = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))
    return int(line.split()[1]) * 1024

tiny = GPT(GPTConfig(64, 50304, 1, 1, 8)).eval()
generate.generate(tiny, torch.zeros(1, 1, dtype=torch.long), 2, 50304)
before = peak()
model = loading.load_model({str(tmp_path)!r}).model
generate.generate(model, torch.zeros(1, 1, dtype=torch.long), 2, 50304)
print(peak() - before)
'''
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True,
                          text=True)
    # every page of the weights counts once it has been read; torch's late imports take some more
    assert weights * 0.9 < int(done.stdout) < 1.3 * weights + 80e6, done.stderr


@BOTH
def test_weights_in_other_dtypes_are_read_as_float32(model_class, tmp_path):
    model = tiny_model(model_class).bfloat16()
    path = ckpt.checkpoint_path(tmp_path, model_class.model_type)
    ckpt.save_checkpoint(path, model, make_tokenizer(CHARS), {}, 1)
    loaded = load_model(path).model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())
    half = load_model(path, dtype=torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_what_is_not_there_is_reported(tmp_path):
    for source in (tmp_path, tmp_path / 'x.pt'):
        with pytest.raises(UserError, match='there is no checkpoint'):
            load_model(source)


def test_a_full_disk_costs_nothing_and_leaves_nothing(tmp_path, program):
    """A limit on the size of a file stands for it. convert and export say it in one line, and the
    old checkpoint stays."""
    resource = pytest.importorskip('resource', reason='needs limits on the size of files')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=1, n_head=2, n_embd=16))
    ckpt.save_checkpoint(tmp_path / 'ckpt.pt', model, make_tokenizer('gpt2'), {}, 1)
    before = (tmp_path / 'ckpt.pt').read_bytes()
    for main, option in ((convert_mla.main, f'--out_dir={tmp_path / "mla"}'),
                         (export_huggingface.main, tmp_path / 'hf')):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        try:
            code, _, err = program(main, tmp_path / 'ckpt.pt', option)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 2 and err.startswith('error: '), err
        assert err.count('\n') == 1 and 'cannot be written' in err
    assert [p for p in tmp_path.rglob('*') if p.is_file()] == [tmp_path / 'ckpt.pt']
    assert (tmp_path / 'ckpt.pt').read_bytes() == before


@pytest.mark.parametrize('message, error', [
    ('Storage size calculation overflowed', ckpt.DamagedError),  # of a size that is damaged
    ("DefaultCPUAllocator: can't allocate memory", RuntimeError)])
def test_a_size_that_cannot_be_is_damage_and_a_full_memory_is_not(
        message, error, tmp_path, monkeypatch):
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))

    def fail(*args, **kwargs):
        raise RuntimeError(message)
    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises(error) as e:
        ckpt.read_checkpoint(tmp_path / 'ckpt.pt')
    assert type(e.value) is error


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'module._orig_mod.',
                                    '_orig_mod.module.'])
def test_what_compile_and_ddp_leave_before_names_is_taken_off(prefix, tmp_path):
    model = tiny_model(GPT)
    save(tmp_path / 'ckpt.pt', model)
    checkpoint = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    checkpoint['model'] = {prefix + name: p for name, p in checkpoint['model'].items()}
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    loaded = load_model(tmp_path).model
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters()))


@pytest.mark.parametrize('value, kind', [
    (np.float64(1.5), 'numpy.*scalar'), (np.zeros(2), 'numpy.ndarray'),
    (Path('out'), 'pathlib.PosixPath')])
def test_a_whole_checkpoint_with_more_than_numbers_and_text(value, kind, tmp_path, program):
    """It is neither damaged nor lost: the message says what it holds, and a resume leaves it."""
    save(tmp_path / 'ckpt.pt', tiny_model(GPT))
    checkpoint = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    torch.save(checkpoint | {'best_val_loss': value}, tmp_path / 'ckpt.pt')
    whole = (tmp_path / 'ckpt.pt').read_bytes()
    with pytest.raises(UserError, match=f'is whole but holds .*{kind}.*save it again') as e:
        load_model(tmp_path)
    assert 'damaged' not in str(e.value) and 'train anew' not in str(e.value)
    code, _, err = program(train.main, '--init_from=resume', f'--out_dir={tmp_path}')
    assert code == 2
    assert (tmp_path / 'ckpt.pt').read_bytes() == whole
    # damaged in the same place, it is damaged again
    at = whole.index(b'best_val_loss') + 3
    (tmp_path / 'ckpt.pt').write_bytes(whole[:at] + b'?' + whole[at + 1:])
    with pytest.raises(UserError, match='is damaged'):
        load_model(tmp_path)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite(value, tmp_path, program):
    model = tiny_model(GPT)
    model.transformer.h[1].mlp.c_fc.weight.data[3, 2] = value
    save(tmp_path / 'ckpt.pt', model)
    words = f'{tmp_path} has weights that are not finite, in transformer.h.1.mlp.c_fc.weight'
    to = f'--out_dir={tmp_path}/m'
    for main, args in ((sample.main, ['--top_k=1']), (convert_mla.main, [to]),
                       (export_huggingface.main, [tmp_path / 'hf'])):
        code, out, err = program(main, tmp_path, *args)
        assert code == 2 and out == '' and words in err and err.count('\n') == 1
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']
