"""A mistake of the user ends the trainer in one clear line and exit code 2. Nothing is written or
lost."""

import numpy as np
import pytest
import torch
from conftest import CHARS

import train
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime import dataset
from runtime.record import write_record
from runtime.tokenizer import make_tokenizer

pytestmark = pytest.mark.usefixtures('no_picture')


def write_tokens(path, tokens):
    np.array(tokens, dtype=np.uint16).tofile(path)


@pytest.mark.parametrize('args, words', [
    (['--max_itres=5'], 'unknown key --max_itres; did you mean max_iters?'),
    (['--max_iters=many'], "--max_iters='many' must be a whole number"),
    (['--n_head=3'], 'n_embd=16 is not divisible by n_head=3'),
    (['--n_latent=0'], 'n_latent=0 must be at least 1'),
    (['--n_layer=0'], 'n_layer=0 must be at least 1'),
    (['--n_layer=1000000000000'], 'n_layer=1000000000000 must be at most 10000'),
    (['--n_embd=1000000000000'], 'not enough memory'),
    (['--n_latent=1000000000000'], 'not enough memory'),
    (['--dropout=1.5'], 'dropout=1.5 must be'),
    (['--block_size=600'], 'block_size=600 is too long for'),
    (['--vocab_size=13'], 'token id 13, which vocab_size=13 does not allow'),
    (['--dataset=nothing'], 'dataset=nothing: there is no folder'),
    (['--init_from=resume'], 'there is no checkpoint'),
    (['--init_from=bert'], "init_from='bert' must be"),
    (['--init_from=gpt2'], 'another vocabulary'),
    (['--device=cuda:99'], "device='cuda:99'"),
    (['--device=gpu'], "device='gpu'"),
    (['--dtype=float8'], "--dtype='float8' must be auto, float32, bfloat16 or float16"),
    (['--eval_interval=0'], 'eval_interval=0 must be at least 1'),
    (['--batch_size=-1'], 'batch_size=-1 must be at least 1'),
    (['--beta2=1'], 'beta2=1.0 must be at least 0 and below 1'),
    (['--seed=-1'], 'seed=-1'),
    (['--out_dir=/proc/nowhere/out'], 'out_dir=/proc/nowhere/out cannot be written to'),
    (['nothing.py'], "there is no config file 'nothing.py'"),
])
def test_bad_input(args, words, tiny_args, tmp_path, program):
    code, _, err = program(lambda: train.main(GPT_MLA), *tiny_args, *args)
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and words in err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('args, words', [
    (['--k_ahead=0'], 'k_ahead=0 must be at least 1 and below block_size=16'),
    (['--k_ahead=16'], 'k_ahead=16 must be'),
    (['--n_layer=1'], "n_layer=1 must be at least 2 with head='block'"),
    (['--attention=gqa'], "--attention='gqa' must be mha or mla"),
    (['--head=mlp'], "--head='mlp' must be block or linear"),
    (['--positions=some'], "--positions='some' must be all or greedy"),
    (['--n_latent=8'], 'n_latent=8 is for'),
    (['--loss_weights=1,2'], "loss_weights='1,2' must be 4 numbers"),
    (['--loss_weights=1'], "loss_weights='1' must be 4"),
    (['--init_from=gpt2'], 'another vocabulary'),
    (['--init_from=resume'], 'there is no checkpoint'),
])
def test_bad_input_to_the_k_ahead_trainer(args, words, tiny_args, tmp_path, program):
    code, _, err = program(lambda: train.main(GPT_KAhead), *tiny_args, *args)
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and words in err
    assert not (tmp_path / 'out').exists()


def test_a_checkpoint_of_another_model_type(tiny_args, tmp_path, program):
    assert program(train.main, *tiny_args)[0] == 0
    (tmp_path / 'out' / 'ckpt.pt').rename(tmp_path / 'out' / 'ckpt_k_ahead.pt')
    code, _, err = program(lambda: train.main(GPT_KAhead), *tiny_args, '--init_from=resume')
    assert code == 2 and err.count('\n') == 1
    assert 'holds a GPT, this program trains a GPT_KAhead' in err


def test_gpt2s_weights_do_not_fit_mla(tiny_args, data_dir, program):
    write_record(data_dir, make_tokenizer('gpt2'))
    code, _, err = program(lambda: train.main(GPT_MLA), *tiny_args, '--init_from=gpt2')
    assert code == 2 and 'multi-head attention' in err


def test_device_cuda_without_one(tiny_args, program, monkeypatch):
    monkeypatch.setattr(train.torch.cuda, 'device_count', lambda: 0)
    code, _, err = program(train.main, *tiny_args, '--device=cuda')
    assert code == 2 and "use --device=cpu or 'auto'" in err


@pytest.mark.parametrize('damage, words', [
    (lambda folder: (folder / 'train.bin').write_bytes(b''), '0 bytes'),
    (lambda folder: (folder / 'val.bin').unlink(), 'val.bin is missing'),
    (lambda folder: (folder / 'val.bin').write_bytes(b'123'), '3 bytes'),
    (lambda folder: write_tokens(folder / 'val.bin', [50] * 99), 'token id 50')])
def test_bad_data(damage, words, tiny_args, data_dir, tmp_path, program):
    damage(data_dir)
    code, _, err = program(train.main, *tiny_args)
    assert code == 2 and words in err and err.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_a_mistake_costs_neither_checkpoint_nor_metrics(tiny_args, tmp_path, program):
    def files():
        return {path.name: path.read_bytes() for path in out.iterdir()}
    out, other = tmp_path / 'out', tmp_path / 'other'
    assert program(train.main, *tiny_args)[0] == 0
    before = files()
    other.mkdir()
    other_chars = make_tokenizer(['x', *CHARS[1:]])
    dataset.write_splits(other, [0, 1] * 100, [1, 0] * 50, other_chars)
    resume = '--init_from=resume'
    for args in (['--n_head=3'], [resume, '--n_layer=3'], ['--vocab_size=5'], ['--device=tpu'],
                 [resume, '--block_size=8'], [resume, f'--dataset={other}'],
                 [resume, '--max_iters=5'],
                 ['--learning_rate=1e30', '--decay_lr=False', '--eval_interval=1']):
        code, _, err = program(train.main, *tiny_args, *args)
        assert code == 2 and err.count('\n') == 1
        if 'e30' in args[0]:  # it could only be seen after the run had begun
            assert 'the loss' in err and 'is nan' in err and not (out / 'ckpt.pt').exists()
            for path in (out / 'before-1').iterdir():
                path.rename(out / path.name)
            (out / 'before-1').rmdir()
    (out / 'ckpt.pt').write_bytes(before['ckpt.pt'][:1000])
    assert program(train.main, *tiny_args, resume)[0] == 2
    (out / 'ckpt.pt').write_bytes(before['ckpt.pt'])
    assert files() == before


@pytest.mark.parametrize('change', [
    lambda c: c['optimizer']['state'][0].update(exp_avg=c['optimizer']['state'][0]['exp_avg'][:1]),
    lambda c: c['optimizer']['state'].pop(0),
    lambda c: c.update(best_val_loss=None),
    lambda c: c.update(iter_num='x'),
    lambda c: c.update(optimizer=5)])
def test_a_checkpoint_that_cannot_be_resumed(change, tiny_args, tmp_path, program):
    assert program(train.main, *tiny_args)[0] == 0
    path = tmp_path / 'out' / 'ckpt.pt'
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    metrics = (tmp_path / 'out' / 'metrics.jsonl').read_bytes()
    code, _, err = program(train.main, *tiny_args, '--init_from=resume', '--max_iters=9')
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1
    assert (tmp_path / 'out' / 'metrics.jsonl').read_bytes() == metrics


@pytest.mark.parametrize('where', [0, 1])  # among the inputs or the targets
def test_a_bin_too_large_to_be_checked_whole_is_checked_batch_by_batch(where, tiny_args, program,
                                                                       monkeypatch):
    def draw(tokens, batch_size, block_size, seed, number, sequence):
        batch = [np.zeros((batch_size, block_size), dtype=np.int64) for _ in range(2)]
        batch[where][0, 0] = 40
        return batch
    monkeypatch.setattr(dataset, 'draw_batch', draw)
    code, _, err = program(train.main, *tiny_args)
    assert code == 2 and 'token id 40' in err


def test_a_config_file_that_raises_ends_the_program_in_one_line(tmp_path, program, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'bad.py').write_text('max_iters = 1 / 0\n')
    what = 'raised ZeroDivisionError in line 1: division by zero'
    done = program(lambda: train.main(GPT_MLA), 'bad.py')
    assert done == (2, '', f'error: config file bad.py {what}\n')
    assert [p.name for p in tmp_path.iterdir()] == ['bad.py']
