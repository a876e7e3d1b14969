import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ALL, ROOT, read_metrics, without_times
from family import DEEPSEEK

import train as trainer
from evaluate import split_loss
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime import dataset, run_log
from runtime.checkpoint import checkpoint_path
from runtime.dataset import open_data
from runtime.loading import load_model
from runtime.run_folder import kind_path
from runtime.run_log import draw_loss
from train import TrainConfig, learning_rate_at

pytestmark = pytest.mark.usefixtures('no_picture')


def weights(path):
    return torch.load(path, weights_only=True)['model']


@ALL
def test_it_learns_and_leaves_checkpoint_metrics_and_picture(model_class, tiny_args, tmp_path,
                                                             program, monkeypatch):
    monkeypatch.setattr(run_log, 'draw_loss', draw_loss)
    longer = ['--max_iters=60', '--eval_interval=30', '--lr_decay_iters=60', '--n_embd=32']
    code, out, _ = program(lambda: trainer.main(model_class), *tiny_args, *longer)
    assert code == 0 and 'val loss' in out and 'tokens/s' in out
    rows = read_metrics(tmp_path / 'out')
    evaluations = [row for row in rows if 'val_loss' in row]
    assert [row['iter'] for row in evaluations] == [0, 30, 60]
    assert abs(evaluations[0]['val_loss'] - math.log(14)) < 0.1
    assert evaluations[-1]['val_loss'] < 2.0
    assert [row['iter'] for row in rows if 'loss' in row] == list(range(60))
    for row in rows:
        if 'loss' in row:  # 2 micro-batches of 4 sequences of 16 tokens
            assert row['tokens_per_second'] * row['ms_per_iter'] == pytest.approx(2 * 4 * 16 * 1e3)
    picture = kind_path(tmp_path / 'out', 'loss.png', model_class.model_type)
    assert picture.read_bytes().startswith(b'\x89PNG')
    trained = load_model(checkpoint_path(tmp_path / 'out', model_class.model_type))
    assert type(trained.model) is model_class and trained.tokenizer.n_vocab == 14


def test_each_heads_loss_is_kept_and_the_first_ones_decides(tiny_args, tmp_path, program):
    settings = ['--k_ahead=3', '--loss_weights=2,1,1']
    code, out, _ = program(lambda: trainer.main(GPT_KAhead), *tiny_args, *settings)
    assert code == 0
    rows, heads = read_metrics(tmp_path / 'out'), range(1, 4)
    for row in rows:
        if 'val_loss' in row:
            assert row['val_loss'] == row['val_loss/head_1']
            assert row['train_loss'] == row['train_loss/head_1']
            assert len({row[f'val_loss/head_{i}'] for i in heads}) == 3
        else:
            first, second, third = (row[f'loss/head_{i}'] for i in heads)
            assert row['loss'] == pytest.approx((2 * first + second + third) / 4, abs=1e-5)
    said = [line.split(' | ')[:3] for line in out.splitlines() if line.startswith('iter ')]
    assert said == [[f"iter {row['iter']:6d}", f"loss {row['loss/head_1']:.4f}",
                     f"all heads {row['loss']:.4f}"] for row in rows if 'loss' in row]
    assert len(said) == 6
    best = min(row['val_loss'] for row in rows if 'val_loss' in row)
    checkpoint = torch.load(tmp_path / 'out' / 'ckpt_k_ahead.pt', weights_only=True)
    assert checkpoint['best_val_loss'] == best
    val = open_data(tmp_path / 'data').val
    model = load_model(tmp_path / 'out').model
    assert split_loss(model, val) == pytest.approx(split_loss(ordinary(model), val), abs=1e-6)


def ordinary(model):
    """The GPT that trunk and first head of a GPT_KAhead are."""
    names = [name for name in model.state_dict() if not name.startswith('ahead.')]
    state = {name: model.state_dict()[name] for name in names}
    settings = {f.name: getattr(model.config, f.name) for f in fields(GPT.config_class)}
    return GPT.from_state_dict(GPT.config_class(**settings), state).eval()


def test_a_step_is_adamws_on_the_clipped_mean_gradient(tiny_args, tmp_path, program, monkeypatch):
    """The first step, done again by hand on the batches that the loop drew."""
    drawn = []
    draw = dataset.draw_batch
    monkeypatch.setattr(dataset, 'draw_batch',
                        lambda *args: drawn.append(draw(*args)) or drawn[-1])
    settings = ['--max_iters=1', '--eval_iters=1', '--weight_decay=0.2', '--grad_clip=0.05',
                '--warmup_iters=0']
    assert program(trainer.main, *tiny_args, *settings)[0] == 0
    stepped = weights(tmp_path / 'out' / 'ckpt.pt')
    torch.manual_seed(1337)
    model = GPT(GPT.config_class(block_size=16, vocab_size=14, n_layer=2, n_head=2, n_embd=16,
                                 bias=False))
    # two batches of the first evaluation, then two micro-batches
    micro_batches = [[torch.from_numpy(a) for a in batch] for batch in drawn[2:4]]
    (sum(model(x, y)[1] for x, y in micro_batches) / 2).backward()
    norm = math.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
    assert norm > 0.05
    for name, p in model.named_parameters():
        gradient = p.grad * 0.05 / norm
        decay = 0.2 if p.dim() == 2 else 0.0
        # after one step Adam's bias-corrected mean and variance are the gradient and its square
        wanted = p.data * (1 - 1e-2 * decay) - 1e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(stepped[name], wanted, atol=2e-5, rtol=1e-4)


def test_dropout_is_on_in_steps_and_off_in_evaluations_and_differs_from_batch_to_batch(
        tiny_args, program, monkeypatch):
    seen = []
    last_stream = GPT.last_stream

    def watched(self, *args):
        seen.append((self.training, torch.initial_seed()))
        return last_stream(self, *args)
    monkeypatch.setattr(GPT, 'last_stream', watched)
    assert program(trainer.main, *tiny_args, '--eval_iters=3')[0] == 0
    evaluation = [False] * 6  # two splits of three batches
    steps = [True] * 6  # three iterations of two micro-batches
    modes = [training for training, _ in seen]
    assert modes == evaluation + steps + evaluation + steps + evaluation
    seeds = [seed for training, seed in seen if training]
    assert len(set(seeds)) == len(seeds) == 12


def test_a_float16_step_clips_the_gradient_that_float32_clips(tiny_args, tmp_path, program):
    means = []
    for dtype in ('float32', 'float16'):
        settings = ['--max_iters=1', '--grad_clip=0.05', f'--dtype={dtype}']
        out = tmp_path / dtype
        assert program(trainer.main, *tiny_args, *settings, f'--out_dir={out}')[0] == 0
        state = torch.load(out / 'ckpt.pt', weights_only=True)['optimizer']['state']
        means.append(torch.cat([state[i]['exp_avg'].flatten() for i in sorted(state)]))
    # (1 - beta1) times the clipped gradient
    assert means[0].norm() == pytest.approx(0.1 * 0.05, rel=1e-3)
    assert (means[0] - means[1]).norm() < 0.05 * means[0].norm()


def test_adamws_settings_are_those_asked_for_on_a_resume_too(tiny_args, tmp_path, program):
    resume = ['--init_from=resume', '--max_iters=7']
    for beta1, beta2, decay, others in ((0.8, 0.99, 0.3, []), (0.7, 0.9, 0.2, resume)):
        settings = [f'--beta1={beta1}', f'--beta2={beta2}', f'--weight_decay={decay}', *others]
        assert program(trainer.main, *tiny_args, *settings)[0] == 0
        checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
        groups = checkpoint['optimizer']['param_groups']
        assert [tuple(group['betas']) for group in groups] == [(beta1, beta2)] * 2
        assert [group['weight_decay'] for group in groups] == [decay, 0.0]


def test_learning_rate_at_hand_computed_points():
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=9, lr_decay_iters=109)
    quarter = 0.1 + 0.45 * (1 + math.sqrt(0.5))
    points = {0: 0.1, 4: 0.5, 9: 1.0, 59: 0.55, 34: quarter, 109: 0.1, 500: 0.1}
    for iter_num, lr in points.items():
        assert learning_rate_at(iter_num, config) == pytest.approx(lr)
    config.decay_lr = False
    assert learning_rate_at(3, config) == 1.0


@pytest.mark.parametrize('model_class, dtype', [
    (GPT, 'float32'), (GPT_MLA, 'float32'), (GPT_KAhead, 'float32'), (GPT, 'float16')])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(model_class, dtype, tiny_args, tmp_path,
                                                        program, monkeypatch):
    """Weights, metrics and the scaler of float16, which grows every second step here."""
    monkeypatch.setattr(torch.amp, 'GradScaler', partial(torch.amp.GradScaler, growth_interval=2))
    args = tiny_args + ['--dropout=0.2', '--max_iters=9', f'--dtype={dtype}']
    name = checkpoint_path('', model_class.model_type)
    assert program(lambda: trainer.main(model_class), *args)[0] == 0
    whole = torch.load(tmp_path / 'out' / name, weights_only=True)
    metrics = read_metrics(tmp_path / 'out')
    half = [f'--out_dir={tmp_path / "half"}']
    # lr_decay_iters is the same, so stopping at 6 is what a machine that dies there would have left
    assert program(lambda: trainer.main(model_class), *args, *half, '--max_iters=6')[0] == 0
    with open(kind_path(tmp_path / 'half', 'metrics.jsonl', model_class.model_type), 'a') as f:
        f.write('{"iter": 6, "lo')  # it died while it wrote a line
    assert program(lambda: trainer.main(model_class), *args, *half, '--init_from=resume')[0] == 0
    resumed = torch.load(tmp_path / 'half' / name, weights_only=True)
    for key, value in resumed['model'].items():
        assert torch.equal(value, whole['model'][key]), key
    for key in ('scaler', 'iter_num', 'best_val_loss'):
        assert resumed[key] == whole[key], key
    assert without_times(read_metrics(tmp_path / 'half')) == without_times(metrics)


def test_both_models_see_the_same_batches_and_a_seed_decides_them(tiny_args, program, monkeypatch):
    draw, seen = dataset.draw_batch, []
    monkeypatch.setattr(dataset, 'draw_batch',
                        lambda *args: seen[-1].append(draw(*args)[0]) or draw(*args))
    for main, seed in ((trainer.main, 1), (lambda: trainer.main(GPT_MLA), 1), (trainer.main, 2)):
        seen.append([])
        assert program(main, *tiny_args, f'--seed={seed}')[0] == 0
    mha, mla, other = (np.stack(batches) for batches in seen)
    assert (mha == mla).all() and not (mha == other).all()


@pytest.mark.parametrize('dtype, tolerance', [('bfloat16', 0.05), ('float16', 0.02)])
def test_reduced_precision_follows_float32(dtype, tolerance, tiny_args, tmp_path, program):
    losses = []
    for name in ('float32', dtype):
        out_dir = tmp_path / name
        assert program(trainer.main, *tiny_args, f'--dtype={name}', f'--out_dir={out_dir}')[0] == 0
        losses.append([row['loss'] for row in read_metrics(out_dir) if 'loss' in row])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], atol=tolerance)
    scaler = torch.load(out_dir / 'ckpt.pt', weights_only=True)['scaler']
    assert (scaler.get('scale', 0) > 1) == (dtype == 'float16')


def test_the_best_val_loss_outlives_a_resume(tiny_args, tmp_path, program):
    args = tiny_args + ['--decay_lr=False', '--always_save_checkpoint=False']
    assert program(trainer.main, *args)[0] == 0
    before = (tmp_path / 'out' / 'ckpt.pt').read_bytes()
    worse = ['--init_from=resume', '--max_iters=8', '--learning_rate=3', '--eval_interval=100']
    assert program(trainer.main, *args, *worse)[0] == 0
    rows = read_metrics(tmp_path / 'out')
    assert rows[-1]['val_loss'] > rows[0]['val_loss']
    assert (tmp_path / 'out' / 'ckpt.pt').read_bytes() == before


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler on a CPU')
@pytest.mark.parametrize('model_class, settings', [
    (GPT_MLA, DEEPSEEK | dict(mlp='gated')), (GPT, dict(n_kv_head=1, rotary='all')),
    (GPT_KAhead, {})])
def test_a_compiled_model_learns_the_same(model_class, settings, tiny_args, tmp_path, program):
    losses, own = [], [f'--{key}={value}' for key, value in settings.items()]
    for switch in ('False', 'True'):
        args = [*tiny_args, *own, f'--compile={switch}', f'--out_dir={tmp_path / switch}']
        assert program(lambda: trainer.main(model_class), *args)[0] == 0
        losses.append([value for row in read_metrics(tmp_path / switch)
                       for key, value in row.items() if 'loss' in key])
    np.testing.assert_allclose(*losses, atol=1e-4)


@pytest.mark.parametrize('strip, steps, notes', [
    (('optimizer',), 2, ['no optimizer state: it starts fresh, at iteration 6']),
    (('model_type', 'tokenizer', 'scaler'), 8, ["is another program's"]),  # as nanoGPT writes it
    (('model_type', 'tokenizer', 'scaler', 'optimizer', 'iter_num', 'best_val_loss', 'config'), 8,
     ["is another program's", 'no optimizer state: it starts fresh, at iteration 0'])])
def test_what_a_checkpoint_lacks_starts_fresh_and_is_said(strip, steps, notes, tiny_args, tmp_path,
                                                          program):
    assert program(trainer.main, *tiny_args)[0] == 0
    path = tmp_path / 'out' / 'ckpt.pt'
    checkpoint = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in checkpoint.items() if k not in strip}, path)
    code, out, err = program(trainer.main, *tiny_args, '--init_from=resume', '--max_iters=8')
    assert code == 0 and out.count('note: ') == len(notes), err
    assert all(note in out for note in notes)
    resumed = torch.load(path, weights_only=True)
    assert resumed['iter_num'] == 8
    assert {int(state['step']) for state in resumed['optimizer']['state'].values()} == {steps}


def test_eval_only_writes_nothing(tiny_args, tmp_path, program):
    code, out, _ = program(trainer.main, *tiny_args, '--eval_only=True')
    assert code == 0 and out.count('val loss') == 1 and not (tmp_path / 'out').exists()
    assert program(trainer.main, *tiny_args)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()}
    code, out, _ = program(trainer.main, *tiny_args, '--eval_only=True', '--init_from=resume')
    assert code == 0 and 'step      6' in out
    assert {p.name: p.read_bytes() for p in (tmp_path / 'out').iterdir()} == before


def test_only_the_best_is_kept_unless_every_one_is_wanted(tiny_args, tmp_path, program):
    args = tiny_args + ['--learning_rate=0.1', '--decay_lr=False', '--eval_interval=1',
                        '--max_iters=3']
    for always in (True, False):
        assert program(trainer.main, *args, f'--always_save_checkpoint={always}')[0] == 0
        evaluations = [row for row in read_metrics(tmp_path / 'out') if 'val_loss' in row]
        losses = {row['iter']: row['val_loss'] for row in evaluations}
        best = min(losses, key=losses.get)
        assert 0 < best < 3  # it went up again, so the two rules differ
        checkpoint = torch.load(tmp_path / 'out' / 'ckpt.pt', weights_only=True)
        assert checkpoint['iter_num'] == (3 if always else best)
        assert checkpoint['best_val_loss'] == losses[best]


def test_gpt2_weights_are_trained_on_with_a_shorter_context(tiny_args, tmp_path, data_dir, program,
                                                            monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel
    monkeypatch.chdir(tmp_path)
    gpt2_config = GPT2Config(vocab_size=14, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(gpt2_config).save_pretrained('gpt2-local')
    gpt2_config.vocab_size = 15
    GPT2LMHeadModel(gpt2_config).save_pretrained('other')
    code, _, err = program(trainer.main, *tiny_args, '--init_from=other')
    assert code == 2 and 'holds 14 characters' in err
    (data_dir / 'meta.pkl').unlink()  # then nobody says what the tokens are
    args = [a for a in tiny_args if not a.startswith(('--n_', '--block_size'))]
    args.append('--init_from=gpt2-local')
    assert program(trainer.main, *args, '--block_size=8')[0] == 0
    model = load_model(tmp_path / 'out').model
    assert model.config.block_size == 8 and model.config.gelu == 'tanh'
    code, _, err = program(trainer.main, *args, '--n_layer=3')
    assert code == 2 and 'n_layer=3 was asked for' in err


def test_wandb_is_imported_only_when_asked_for_and_works_offline(tiny_args, tmp_path):
    program = '''if True:
        import sys, train
        for more in [], ['--wandb_log=True']:
            sys.argv += more
            train.main()
            print('imported', 'wandb' in sys.modules)
        '''
    env = os.environ | {'WANDB_MODE': 'offline', 'WANDB_DIR': str(tmp_path), 'WANDB_SILENT': 'true'}
    done = subprocess.run([sys.executable, '-c', program, *tiny_args, '--max_iters=1'], cwd=ROOT,
                          env=env, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stdout.splitlines() if line.startswith('imported')]
    assert done.returncode == 0 and said == ['imported False', 'imported True'], done.stderr
    assert list(tmp_path.glob('wandb/offline-run-*/*.wandb'))


@pytest.mark.parametrize('key, script', [('n_latent', 'train_mla.py'),
                                         ('k_ahead', 'train_k_ahead.py')])
def test_a_key_of_another_trainer_names_it(key, script, tiny_args, tmp_path, program):
    code, _, err = program(trainer.main, *tiny_args, f'--{key}=2')
    assert code == 2 and err == f'error: unknown key --{key}: it is a key of {script}\n'
    assert not (tmp_path / 'out').exists()
