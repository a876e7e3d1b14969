"""What a run starts with: another run's weights and vocabulary, or what its own checkpoint says."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import ALL, CHARS, read_metrics, tiny_model

import convert_mla
import evaluate
import sample
import train
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import checkpoint_path, read_checkpoint
from runtime.dataset import open_data, translate, write_splits
from runtime.parallel import recompute_blocks
from runtime.tokenizer import make_tokenizer

pytestmark = pytest.mark.usefixtures('no_picture')
OTHER = list('ba\n')


@pytest.fixture
def other_dir(tmp_path):
    folder = tmp_path / 'other'
    folder.mkdir()
    write_splits(folder, [0] * 1000, [0] * 200, make_tokenizer(OTHER))  # b, and nothing else
    return folder


@pytest.fixture
def run_a(tiny_args, tmp_path, program):
    """A function that trains a model_class in out_a."""
    def make(model_class=GPT, *args):
        code, _, err = program(lambda: train.main(model_class), *tiny_args,
                               f'--out_dir={tmp_path / "out_a"}', *args)
        assert code == 0, err
        return tmp_path / 'out_a'
    return make


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()
            if path.name != '.lock'}


def without(args, *keys):
    return [arg for arg in args if not arg.startswith(tuple(f'--{key}' for key in keys))]


@ALL
def test_a_new_run_from_ones_own_checkpoint(model_class, tiny_args, other_dir, tmp_path, program,
                                            run_a):
    out_a = run_a(model_class)
    before, out = contents(out_a), tmp_path / 'new'
    args = [*without(tiny_args, 'dataset', 'out_dir', 'n_', 'block_size'), f'--out_dir={out}',
            f'--dataset={other_dir}', '--max_iters=40', '--lr_decay_iters=40', '--log_interval=1',
            '--eval_interval=20', '--learning_rate=3e-2']
    for source in (out_a, checkpoint_path(out_a, model_class.model_type)):
        code, said, err = program(lambda: train.main(model_class), *args, f'--init_from={source}')
        assert code == 0, err
    rows = [row for row in read_metrics(out) if 'loss' in row]
    assert [row['iter'] for row in rows] == list(range(40))
    # warm-up from the beginning, the highest rate after it, and min_lr at the end
    assert [row['lr'] for row in rows[:3]] == pytest.approx([1e-2, 2e-2, 3e-2])
    assert rows[-1]['lr'] < 1e-3
    new = read_checkpoint(checkpoint_path(out, model_class.model_type))
    assert new['tokenizer'] == CHARS and new['best_val_loss'] < 2  # from 2.64
    assert contents(out_a) == before

    def text(folder):
        args = ['--start=b', '--num_samples=1', '--max_new_tokens=12', '--top_k=1',
                '--device=cpu', '--json']
        code, said, err = program(lambda: sample.main(model_class.model_type), folder, *args)
        assert code == 0, err
        return json.loads(said)['text']
    assert text(out) == 'b' * 12 != text(out_a)
    # what was trained on other bins is evaluated on them, in its own ids
    code, said, err = program(evaluate.main, out, '--json', '--device=cpu')
    assert code == 0 and json.loads(said)['loss'] < 2, err


def test_a_context_is_cropped_and_other_sizes_are_refused(tiny_args, tmp_path, program, run_a):
    source = f'--init_from={run_a()}'
    assert program(train.main, *tiny_args, source, '--block_size=8')[0] == 0
    assert read_checkpoint(tmp_path / 'out' / 'ckpt.pt')['model_args']['block_size'] == 8
    code, _, err = program(train.main, *tiny_args, source, '--n_layer=3')
    assert code == 2 and 'n_layer=3 was asked for, but init_from=' in err


@pytest.mark.parametrize('spec, words', [
    (['x', 'y', *CHARS[:3]], "has 'x', 'y', which the model's vocabulary of 14 characters lacks"),
    (['ab', *CHARS], 'has another vocabulary, 15 words, than the model, 14 characters: prepare'),
    ('gpt2', "has another vocabulary, GPT-2's byte pairs, than the model, 14 characters: prepare"),
    ({'unknown': 5}, 'does not say what its ids mean. If they are 14 characters, record that')])
def test_data_that_the_models_vocabulary_does_not_cover(spec, words, tiny_args, tmp_path, program,
                                                        run_a):
    out_a, folder = run_a(), tmp_path / 'more'
    before = contents(out_a)
    folder.mkdir()
    write_splits(folder, [0, 1, 2] * 200, [0, 1] * 100, make_tokenizer(spec))
    for init_from in (out_a, 'resume'):
        args = [f'--init_from={init_from}', f'--dataset={folder}']
        if init_from == 'resume':
            args.append(f'--out_dir={out_a}')
        code, _, err = program(train.main, *tiny_args, *args)
        assert code == 2 and words in err and err.count('\n') == 1
    assert contents(out_a) == before and not (tmp_path / 'out').exists()


def test_translated_tokens_are_those_of_the_text(other_dir):
    data = open_data(other_dir)
    data.train = np.array([0, 1, 2, 1, 0] * 200, dtype=np.uint16)
    tokens = translate(data, make_tokenizer(CHARS)).train
    text = data.tokenizer.decode(data.train.tolist())
    assert make_tokenizer(CHARS).decode(tokens[:].tolist()) == text and len(tokens) == 1000
    assert tokens[3:5].tolist() == [CHARS.index(text[3]), CHARS.index(text[4])]
    assert translate(data, make_tokenizer(OTHER)) is data


def test_a_resume_takes_what_the_command_line_does_not_say(tiny_args, tmp_path, program, run_a):
    out_a = run_a()
    code, said, err = program(train.main, '--init_from=resume', f'--out_dir={out_a}',
                              '--max_iters=12', '--device=cpu', '--learning_rate=2e-2')
    assert code == 0, err
    first = said.splitlines()[0]
    assert first.startswith(f'note: {out_a}/ckpt.pt decides what the command line does not: ')
    for taken in (f'--dataset={tmp_path / "data"}', '--batch_size=4', '--eval_interval=3',
                  '--lr_decay_iters=6', '--warmup_iters=2'):
        assert taken in first.split()
    assert '--max_iters' not in first and '--learning_rate' not in first and '--bias' not in first
    config = read_checkpoint(out_a / 'ckpt.pt')['config']
    assert config['learning_rate'] == 2e-2 and config['max_iters'] == 12
    assert [row['iter'] for row in read_metrics(out_a) if 'val_loss' in row] == [0, 3, 6, 9, 12]


def test_a_resumed_run_that_has_ended_says_so(program, run_a):
    out_a = run_a()
    before = contents(out_a)['ckpt.pt']
    code, said, _ = program(train.main, '--init_from=resume', f'--out_dir={out_a}')
    assert code == 0 and 'the run is at max_iters=6 already: give a larger --max_iters' in said
    assert contents(out_a)['ckpt.pt'] == before


def test_the_typed_command_goes_on_bit_for_bit(tiny_args, tmp_path, program, run_a):
    """--init_from=resume alone gives the run that all of the settings give."""
    whole, half = run_a(GPT, '--max_iters=8'), tmp_path / 'half'
    args = [*tiny_args, f'--out_dir={half}', '--max_iters=8']
    assert program(train.main, *args, '--max_iters=4', '--eval_interval=4')[0] == 0
    path = half / 'ckpt.pt'
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['config'] |= {'max_iters': 8, 'eval_interval': 3}  # as if it had died at 4
    torch.save(checkpoint, path)
    code, _, err = program(train.main, '--init_from=resume', f'--out_dir={half}', '--device=cpu')
    assert code == 0, err
    one, two = (torch.load(out / 'ckpt.pt', weights_only=True)['model'] for out in (whole, half))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize('damage', [
    {'learning_rate': 'fast', 'max_iters': 3.5, 'dataset': 7, 'beta1': None}, 'text', None])
def test_settings_in_a_checkpoint_that_are_none_are_not_taken(damage, tiny_args, program, run_a):
    out_a = run_a()
    checkpoint = torch.load(out_a / 'ckpt.pt', weights_only=True)
    checkpoint['config'] = damage
    torch.save(checkpoint, out_a / 'ckpt.pt')
    code, said, err = program(train.main, *tiny_args, f'--out_dir={out_a}', '--init_from=resume',
                              '--max_iters=7')
    assert code == 0 and 'decides what' not in said, err


def test_a_nanogpt_checkpoint_does_not_say_on_which_machine_it_is(tiny_args, program, run_a):
    out_a = run_a()
    checkpoint = torch.load(out_a / 'ckpt.pt', weights_only=True)
    del checkpoint['model_type'], checkpoint['tokenizer']
    checkpoint['config'] |= {'device': 'cuda', 'backend': 'nccl', 'dtype': 'float16',
                             'compile': True, 'bias': False, 'wandb_log': False}
    torch.save(checkpoint, out_a / 'ckpt.pt')
    code, said, err = program(train.main, f'--out_dir={out_a}', '--init_from=resume',
                              '--max_iters=7', '--device=cpu')
    assert code == 0 and 'float32' in said, err
    assert not any(f'--{key}' in said for key in ('device', 'backend', 'dtype', 'compile'))


def nanogpts(folder, dataset):
    """Make the checkpoint in folder one of nanoGPT's, trained on dataset."""
    checkpoint = torch.load(folder / 'ckpt.pt', weights_only=True)
    del checkpoint['model_type'], checkpoint['tokenizer']
    checkpoint['config'] = {'dataset': str(dataset)}
    torch.save(checkpoint, folder / 'ckpt.pt')


def test_what_the_ids_of_a_nanogpt_checkpoint_mean(tiny_args, tmp_path, data_dir, program, run_a):
    """The record of its own dataset says it; that of a text to start anew with does not, though it
    may have as many characters."""
    out_a, other = run_a(), tmp_path / 'as_many'
    other.mkdir()
    write_splits(other, [1, 2] * 100, [2, 1] * 50, make_tokenizer([*CHARS[:-1], 'z']))
    nanogpts(out_a, 'gone')
    args = [*without(tiny_args, 'dataset'), f'--init_from={out_a}']
    code, _, err = program(train.main, *args, f'--dataset={other}')
    assert code == 2 and "the model's are ids of unknown meaning below 14" in err
    args[-1:] = ['--init_from=resume', f'--out_dir={out_a}', '--max_iters=8']
    code, said, err = program(train.main, *args, f'--dataset={data_dir}')  # it may have moved
    assert code == 0 and read_checkpoint(out_a / 'ckpt.pt')['tokenizer'] == CHARS, err
    nanogpts(out_a, data_dir)
    code, _, err = program(train.main, *args, f'--dataset={other}')
    assert code == 2 and "has 'z', which the model's vocabulary of 14 characters lacks" in err


def test_ids_that_are_recorded_later(tiny_args, tmp_path, data_dir, program):
    """A model of unknown ids has text as soon as its bins have a record."""
    meta = (data_dir / 'meta.pkl').read_bytes()
    (data_dir / 'meta.pkl').unlink()
    assert program(train.main, *tiny_args, '--vocab_size=14')[0] == 0
    args = [tmp_path / 'out', '--device=cpu', '--num_samples=1', '--max_new_tokens=9', '--json']
    code, out, err = program(sample.main, *args)
    sampled = json.loads(out)
    assert [int(word) for word in sampled['text'].split()] == sampled['tokens']
    assert 'ids mean, and dataset' in err and 'what they mean is unknown' in err
    (data_dir / 'meta.pkl').write_bytes(meta)
    code, out, err = program(sample.main, *args)
    sampled = json.loads(out)
    assert sampled['text'] == ''.join(CHARS[i] for i in sampled['tokens']) and 'unknown' not in err
    assert program(train.main, *tiny_args, '--init_from=resume', '--max_iters=9')[0] == 0
    assert read_checkpoint(tmp_path / 'out' / 'ckpt.pt')['tokenizer'] == CHARS


def test_ids_that_an_older_trainer_took_for_gpt2s(tiny_args, tmp_path, data_dir, program, run_a):
    """It wrote 'gpt2' for bins without a record, whatever they were."""
    out_a = run_a()
    checkpoint = torch.load(out_a / 'ckpt.pt', weights_only=True)
    torch.save(checkpoint | {'tokenizer': 'gpt2'}, out_a / 'ckpt.pt')
    args = [out_a, '--device=cpu', '--num_samples=1', '--max_new_tokens=9', '--json']
    code, out, err = program(sample.main, *args)
    assert code == 0 and 'note' not in err and set(json.loads(out)['text']) <= set(CHARS)
    (data_dir / 'meta.pkl').unlink()
    code, out, err = program(sample.main, *args)
    assert "says that its ids are GPT-2's, but has only 14 of them" in err
    assert [int(word) for word in json.loads(out)['text'].split()] == json.loads(out)['tokens']


def test_two_that_do_not_say_what_their_ids_mean(tiny_args, tmp_path, data_dir, program):
    (data_dir / 'meta.pkl').unlink()
    assert program(train.main, *tiny_args, '--vocab_size=14')[0] == 0
    other = tmp_path / 'other'
    other.mkdir()
    for split in ('train', 'val'):
        (other / f'{split}.bin').write_bytes((data_dir / f'{split}.bin').read_bytes())
    for dataset, is_noted in ((data_dir, False), (other, True)):
        line = f'neither {other} nor the model says what its ids mean'
        args = [tmp_path / 'out', f'--dataset={dataset}', '--max_tokens=40', '--device=cpu']
        assert (line in program(evaluate.main, *args)[2]) == is_noted
        args = [*tiny_args[1:], f'--dataset={dataset}', f'--out_dir={tmp_path / "new"}']
        said = program(train.main, *without(args, 'n_'), f'--init_from={tmp_path / "out"}')[1]
        assert (line in said) == is_noted and 'step' in said


def test_a_resume_on_another_text_counts_the_best_anew(tiny_args, other_dir, program, run_a):
    out_a = run_a(GPT, '--max_iters=12', '--eval_interval=12')
    checkpoint = torch.load(out_a / 'ckpt.pt', weights_only=True)
    torch.save(checkpoint | {'best_val_loss': 0.01}, out_a / 'ckpt.pt')
    args = [f'--out_dir={out_a}', '--init_from=resume', '--max_iters=24', '--device=cpu',
            '--lr_decay_iters=24', '--always_save_checkpoint=False']
    code, said, err = program(train.main, *args, f'--dataset={other_dir}')
    assert code == 0, err
    assert 'and is counted anew' in said and 'the batches are others' in said
    after = torch.load(out_a / 'ckpt.pt', weights_only=True)
    assert after['iter_num'] == 24 and 0.01 < after['best_val_loss'] < 2.7
    assert not (out_a / 'ckpt_last.pt').exists()
    # on the same text it is kept, however the folder is written
    checkpoint = torch.load(out_a / 'ckpt.pt', weights_only=True)
    torch.save(checkpoint | {'best_val_loss': 0.01}, out_a / 'ckpt.pt')
    same = f'--dataset={other_dir.parent / "x" / ".." / other_dir.name}'
    (other_dir.parent / 'x').mkdir()
    code, said, err = program(train.main, *args, same, '--max_iters=36', '--lr_decay_iters=36')
    assert code == 0 and 'counted anew' not in said, err
    assert torch.load(out_a / 'ckpt.pt', weights_only=True)['iter_num'] == 24


def test_the_sampler_says_that_there_is_a_newer_state(tiny_args, program, run_a):
    out_a = run_a()
    args = [out_a, '--num_samples=1', '--max_new_tokens=1', '--device=cpu']
    assert 'newer' not in program(sample.main, *args)[2]
    checkpoint = torch.load(out_a / 'ckpt.pt', weights_only=True)
    torch.save(checkpoint | {'iter_num': 9}, out_a / 'ckpt_last.pt')
    line = f'note: {out_a}/ckpt.pt is of iteration 6; {out_a}/ckpt_last.pt is newer, of iteration 9'
    for source in (out_a, out_a / 'ckpt.pt'):
        code, _, err = program(sample.main, source, *args[1:])
        assert code == 0 and err.splitlines()[0] == line
    assert 'newer' not in program(sample.main, out_a / 'ckpt_last.pt', *args[1:])[2]
    (out_a / 'ckpt_last.pt').write_bytes(b'damaged')
    code, _, err = program(sample.main, *args)
    assert code == 0 and 'newer' not in err


def test_a_converted_model_is_trained_on_as_convert_says(tmp_path, program, run_a):
    out_a, out_c = run_a(), tmp_path / 'converted'
    code, said, err = program(convert_mla.main, out_a, f'--out_dir={out_c}', '--device=cpu')
    assert code == 0, err
    command = said.splitlines()[-1].split('train on with python train_mla.py ')[1].split()
    assert command == ['--init_from=resume', f'--out_dir={out_c}']
    code, said, err = program(lambda: train.main(GPT_MLA, out_dir='out_mla'), *command,
                              '--device=cpu', '--max_iters=2')
    assert code == 0, err
    first = said.splitlines()[0].split()
    for taken in ('--lr_decay_iters=1000', '--learning_rate=0.003', '--min_lr=0.0003',
                  '--batch_size=4', '--gradient_accumulation_steps=2', '--warmup_iters=50'):
        assert taken in first, first


def test_patience(tiny_args, tmp_path, program, monkeypatch):
    losses = itertools.chain([3.0, 2.0, 2.5, 2.0, 2.1], itertools.repeat(2.3))
    real = train.estimate_loss

    def estimate(*args):
        return real(*args) | {'val_loss': next(losses)}
    monkeypatch.setattr(train, 'estimate_loss', estimate)
    args = [*tiny_args, '--eval_interval=2', '--max_iters=20', '--patience=3']
    code, said, err = program(train.main, *args)
    assert code == 0, err
    assert 'no better val loss in patience=3 evaluations than the 2.0000 of iteration 2' in said
    assert read_metrics(tmp_path / 'out')[-1]['iter'] == 8
    assert read_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter_num'] == 8
    code, said, err = program(train.main, *args, '--init_from=resume', '--patience=4')
    assert code == 0 and 'patience=4 evaluations than the 2.0000 of iteration 2' in said
    assert read_metrics(tmp_path / 'out')[-1]['iter'] == 10


@ALL
def test_samples_leave_the_run_as_it_would_have_been(model_class, tiny_args, tmp_path, program):
    ends = []
    for more in ([], ['--sample_interval=2']):
        out = tmp_path / f'out{len(ends)}'
        code, said, err = program(lambda: train.main(model_class), *tiny_args, '--dropout=0.1',
                                  f'--out_dir={out}', '--eval_interval=1', *more)
        assert code == 0, err
        assert said.count('sample at step') == (4 if more else 0)
        ends.append(read_checkpoint(checkpoint_path(out, model_class.model_type))['model'])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert 'sample at step 6:\n  ' in said


@ALL
@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_blocks_that_are_computed_twice_give_the_same_gradients(model_class, dropout):
    results = []
    for recompute in (False, True):
        model = tiny_model(model_class, dropout=dropout).train()
        if recompute:
            recompute_blocks(model)
        torch.manual_seed(1)
        idx = torch.randint(14, (3, 16))
        model(idx, idx.roll(-1))[1].backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_less_is_kept_for_the_backward_pass():
    def kept(model):
        n_bytes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: n_bytes.append(t.nbytes) or t, lambda t: t):
            model(torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long))
        return sum(n_bytes)
    model = tiny_model(GPT, n_layer=6).train()
    before = kept(model)
    recompute_blocks(model)
    assert kept(model) < before / 4


def test_the_norm_of_the_gradient_is_logged(tiny_args, tmp_path, program, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def clip_and_note(parameters, most):
        parameters = list(parameters)
        norms.append(sum(p.grad.double().square().sum() for p in parameters).sqrt().item())
        return clip(parameters, most)
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip_and_note)
    assert program(train.main, *tiny_args, '--log_interval=1', '--grad_clip=0.1')[0] == 0
    found = [row['grad_norm'] for row in read_metrics(tmp_path / 'out') if 'loss' in row]
    assert found == pytest.approx(norms, rel=1e-5) and len(found) == 6
    assert program(train.main, *tiny_args, '--grad_clip=0')[0] == 0
    assert not any('grad_norm' in row for row in read_metrics(tmp_path / 'out'))


def test_without_a_compiler_training_goes_on(tiny_args, tmp_path, program, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('InvalidCxxCompiler:\nNo working C++ compiler found')
    monkeypatch.setattr(torch, 'compile', fail)
    code, said, err = program(train.main, *tiny_args, '--compile=True')
    assert code == 0, err
    assert said.count('note: torch.compile does not work here (RuntimeError: InvalidCxxCompiler: '
                      'No working C++ compiler found): it goes on uncompiled') == 1
    assert 'compiled' not in said.splitlines()[0] and (tmp_path / 'out' / 'ckpt.pt').exists()
    code, _, err = program(sample.main, tmp_path / 'out', '--compile', '--num_samples=1',
                           '--max_new_tokens=2', '--device=cpu')
    assert code == 0 and err.count('it goes on uncompiled') == 1


@pytest.mark.parametrize('args, words', [
    (['--init_from=nowhere/ckpt.pt'], "init_from='nowhere/ckpt.pt' must be"),
    (['--init_from={tmp}'], 'there is no checkpoint'),
    (['--init_from={tmp}/data/train.bin'], 'is damaged or none of this project'),
    (['--patience=-1'], 'patience=-1 must be at least 0'),
    (['--lr_schedule=step'], 'must be cosine, wsd, linear or constant'),
    (['--sample_interval=1', '--parallel=fsdp'], "sample_interval=1 is not for parallel='fsdp'"),
    (['--dataset={tmp}/data/train.bin'], 'train.bin is a file: python data/prepare.py --source=')])
def test_mistakes(args, words, tiny_args, tmp_path, program):
    args = [arg.format(tmp=tmp_path) for arg in args]
    code, _, err = program(train.main, *tiny_args, *args)
    assert code == 2 and words in err and err.count('\n') == 1 and not (tmp_path / 'out').exists()


def test_another_kind_of_model(tiny_args, program, run_a):
    out_a = run_a()
    code, _, err = program(lambda: train.main(GPT_KAhead), *tiny_args, f'--init_from={out_a}')
    assert code == 2 and 'holds a GPT, this program trains a GPT_KAhead' in err
