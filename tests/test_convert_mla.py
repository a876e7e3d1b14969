import math
import sys

import pytest
import torch
from conftest import CHARS, tiny_model
from test_checkpoint import save

import convert_mla
import train_mla
from evaluate import split_loss
from model import GPT
from model_mla import GPT_MLA
from runtime.checkpoint import read_checkpoint
from runtime.dataset import open_data
from runtime.factors import Moments, activation_moments, convert, factor
from runtime.loading import load_model
from train import main as train_main


def trained_like(seed=0, **settings):
    model = tiny_model(GPT, seed, **settings)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def some_moments(model):
    return activation_moments(model, [torch.randint(14, (8, 16)) for _ in range(20)])


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('weighted', [True, False])
@torch.no_grad()
def test_with_all_of_the_width_it_is_exact(bias, weighted):
    model = trained_like(bias=bias, gelu='tanh')
    idx = torch.randint(14, (4, 16))
    moments = some_moments(model) if weighted else None
    single, _ = convert(model, 16, moments)
    assert type(single) is GPT_MLA and single.config.gelu == 'tanh' and not single.training
    assert single.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(single(idx, idx)[0], model(idx, idx)[0], atol=1e-4, rtol=0)
    model.double()
    double, errors = convert(model, 16, moments)
    torch.testing.assert_close(double(idx, idx)[0], model(idx, idx)[0], atol=1e-10, rtol=0)
    assert max(max(row) for row in errors) < 1e-12
    if bias:
        for ours, theirs in zip(double.transformer.h, model.transformer.h):
            assert torch.equal(ours.attn.query.bias, theirs.attn.c_attn.bias[:16])
            ours_kv = torch.cat([ours.attn.key.bias, ours.attn.value.bias])
            torch.testing.assert_close(ours_kv, theirs.attn.c_attn.bias[16:])
    else:
        assert double.transformer.h[0].attn.key.bias is None


@torch.no_grad()
def test_moments_are_those_of_the_attentions_input():
    model = trained_like(n_layer=2).double()
    idx = torch.randint(14, (6, 10))
    moments = activation_moments(model, idx.split(2))
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(10))
    for block, ours in zip(model.transformer.h, moments):
        rows = block.ln_1(x).reshape(-1, 16)
        torch.testing.assert_close(ours.mean, rows.mean(0))
        torch.testing.assert_close(ours.second, rows.T @ rows / 60)
        x = block(x)


@pytest.mark.parametrize('bias', [True, False])
def test_no_other_factors_of_this_rank_lose_less_on_the_text(bias):
    torch.manual_seed(0)
    spread, mixing, mean = (torch.randn(*shape, dtype=torch.float64)
                            for shape in ((4000, 6), (6, 6), (6,)))
    x = spread @ mixing + mean
    W = torch.randn(12, 6, dtype=torch.float64)
    b = torch.randn(12, dtype=torch.float64) if bias else None
    D, E, b_new, errors = factor(W, b, Moments(x.mean(0), x.T @ x / len(x)), 3)
    assert D.shape == (12, 3) and E.shape == (3, 6)
    wanted = x @ W.T + (b if bias else 0)
    least = (wanted - x @ (D @ E).T - (b_new if bias else 0)).square().mean().item()
    # what no rank can go below, by Eckart and Young: the outputs' own singular values, about their
    # mean if a bias may have it
    singular = torch.linalg.svdvals(wanted - wanted.mean(0) if bias else wanted)
    assert least == pytest.approx((singular[3:].square().sum() / wanted.numel()).item(), rel=1e-3)
    assert errors[2] == pytest.approx((singular[3:].norm() / singular.norm()).item(), rel=1e-3)
    # and a search from there finds nothing better
    free = [t.clone().requires_grad_() for t in ((D, E, b_new) if bias else (D, E))]
    optimizer = torch.optim.Adam(free, lr=1e-3)
    for _ in range(200):
        loss = (wanted - x @ (free[0] @ free[1]).T - (free[2] if bias else 0)).square().mean()
        assert loss.item() > least * (1 - 1e-6)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_without_a_text_the_weights_singular_values_decide():
    W = torch.randn(12, 6, dtype=torch.float64)
    D, E, b, errors = factor(W, None, None, 2)
    singular = torch.linalg.svdvals(W)
    assert (W - D @ E).norm().item() == pytest.approx(singular[2:].norm().item()) and b is None
    assert errors[2] == pytest.approx((singular[2:].norm() / singular.norm()).item())
    keys, values = W[:6], W[6:]
    for error, part, ours in ((errors[0], keys, (D @ E)[:6]), (errors[1], values, (D @ E)[6:])):
        assert error == pytest.approx(((part - ours).norm() / part.norm()).item())


def test_a_text_that_takes_few_directions_is_kept_with_few():
    """Activations in two dimensions: a latent of two loses nothing on them, and one of all six
    nothing anywhere."""
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q[:, :2]
    moments = Moments(torch.zeros(6, dtype=torch.float64), basis @ basis.T)
    W = torch.randn(12, 6, dtype=torch.float64)
    D, E, _, _ = factor(W, None, moments, 2)
    assert (W @ basis - D @ E @ basis).norm() < 1e-4
    D, E, _, _ = factor(W, None, moments, 6)
    torch.testing.assert_close(D @ E, W, atol=1e-10, rtol=0)


def test_program_reports_saves_and_training_goes_on(tiny_args, data_dir, tmp_path, program):
    args = ['--max_iters=60', '--eval_interval=30', '--bias=True']
    assert program(train_main, *tiny_args, *args)[0] == 0
    source, out_dir = tmp_path / 'out' / 'ckpt.pt', tmp_path / 'mla'
    code, out, err = program(convert_mla.main, source, '--n_latent=16', f'--out_dir={out_dir}',
                             '--device=cpu', '--calibration_tokens=500', '--val_tokens=400')
    assert code == 0, err
    assert f'weighted by the activations of {data_dir}' in out
    assert [p.name for p in out_dir.iterdir()] == ['ckpt_mla.pt']
    before, after = (float(out.split(end)[0].split()[-1]) for end in (' nats before', ' after'))
    assert before == pytest.approx(after, abs=1e-4)
    val = open_data(data_dir).val[:400]
    gpt, converted = load_model(source).model, load_model(out_dir)
    assert before == pytest.approx(split_loss(gpt, val), abs=1e-4)
    idx = torch.randint(14, (2, 16))
    logits = converted.model(idx, idx)[0]
    torch.testing.assert_close(logits, gpt(idx, idx)[0], atol=1e-4, rtol=0)
    assert converted.tokenizer.spec == CHARS and converted.dataset == str(data_dir)
    assert read_checkpoint(out_dir / 'ckpt_mla.pt')['iter_num'] == 0

    args = [a for a in tiny_args if not a.startswith(('--out_dir', '--n_'))]
    code, out, err = program(lambda: train_mla.main(GPT_MLA), *args, f'--out_dir={out_dir}',
                             '--init_from=resume')
    assert code == 0, err
    assert 'note: the checkpoint has no optimizer state: it starts fresh, at iteration 0' in out
    assert 'step      0 ' in out and 'step      6 ' in out
    first = float(out.split('step      0 ')[1].split('val loss ')[1].split()[0])
    assert abs(first - after) < 0.3 < math.log(14) - first  # it goes on from what was learned


def test_settings_to_train_on():
    """A third of the learning rate in one digit; what is no number is not taken."""
    own = {'learning_rate': 1e-3, 'batch_size': 7, 'beta1': 'x', 'weight_decay': None, 'seed': 3}
    found = convert_mla.settings_to_train_on(own, 'book')
    assert (found['learning_rate'], found['min_lr'], found['batch_size']) == (3e-4, 3e-5, 7)
    assert (found['beta1'], found['weight_decay'], found['dataset']) == (0.9, 0.1, 'book')
    assert found['max_iters'] == found['lr_decay_iters'] == 1000 and 'seed' not in found
    assert convert_mla.settings_to_train_on({}, '')['learning_rate'] == 1e-4


def test_smaller_latents_and_no_text(tmp_path, program):
    save(tmp_path / 'ckpt.pt', trained_like())  # of openwebtext, which is not here
    args = [tmp_path / 'ckpt.pt', f'--out_dir={tmp_path / "mla"}', '--device=cpu']
    code, out, err = program(convert_mla.main, *args)
    assert code == 0 and 'of the weights alone, no text' in out and 'no val loss' in out, err
    assert load_model(tmp_path / 'mla').model.config.n_latent == 8
    for number, source in enumerate((f'--model={tmp_path / "ckpt.pt"}', tmp_path)):
        args = (source, f'--out_dir={tmp_path / str(number)}', '--device=cpu')
        assert program(convert_mla.main, *args)[1].splitlines()[:-1] == out.splitlines()[:-1]


def test_help_names_the_checkpoint_as_a_key_and_without(program, monkeypatch):
    monkeypatch.setitem(sys.modules, '__main__', convert_mla)
    for word in ('--help', '-h'):
        code, out, err = program(convert_mla.main, word)
        assert (code, err) == (0, '') and out.startswith('Turn a trained GPT into a GPT_MLA')
        assert '[MODEL] [CONFIG.py ...] [--key=value ...]' in out
        assert "  --model='' " in out and "a GPT's checkpoint, its out_dir" in out


def test_bad_input_writes_nothing(tmp_path, data_dir, program):
    save(tmp_path / 'ckpt.pt', trained_like())
    save(tmp_path / 'gpt2.pt', trained_like(vocab_size=50304), 'gpt2')
    save(tmp_path / 'ckpt_mla.pt', tiny_model(GPT_MLA))
    before = sorted(tmp_path.rglob('*'))
    new = f'--out_dir={tmp_path / "new"}'
    gpt = tmp_path / 'ckpt.pt'
    for args, words in (((), 'no checkpoint was given'),
                        (('--n_latent=4',), 'no checkpoint was given'),
                        ((tmp_path / 'no.pt', new), 'there is no checkpoint'),
                        ((tmp_path / 'ckpt_mla.pt', new), 'only a GPT'),
                        ((gpt, new, '--n_latent=17'), 'n_latent=17 must be at most n_embd=16'),
                        ((gpt, new, '--n_latent=0'), 'n_latent=0'),
                        ((gpt, new, '--dataset=nothing'), 'no folder'),
                        ((tmp_path / 'gpt2.pt', new, f'--dataset={data_dir}'),
                         'another vocabulary'),
                        ((gpt, new, '--latent=3'), 'did you mean n_latent?'),
                        ((gpt, f'--out_dir={tmp_path}'), 'has a ckpt_mla.pt already')):
        code, out, err = program(convert_mla.main, *args)
        assert code == 2 and words in err and err.count('\n') == 1, err
    assert sorted(tmp_path.rglob('*')) == before


def test_the_reported_errors_are_those_of_the_layers(tmp_path, program):
    """Against the weights of both models, in float64, without calibration. The checkpoint may stand
    anywhere in the line."""
    model = tiny_model(GPT, n_layer=2)
    save(tmp_path / 'ckpt.pt', model)
    code, out, err = program(convert_mla.main, '--n_latent=4', tmp_path / 'ckpt.pt',
                             f'--out_dir={tmp_path / "mla"}', '--device=cpu')
    assert code == 0, err
    mla = load_model(tmp_path / 'mla').model
    for i, (ours, theirs) in enumerate(zip(mla.transformer.h, model.transformer.h)):
        W = theirs.attn.c_attn.weight.double()[16:]
        D = torch.cat((ours.attn.key.weight, ours.attn.value.weight)).double()
        lost = W - D @ ours.attn.latent_enc.weight.double()
        wanted = [(lost[part].norm() / W[part].norm()).item()
                  for part in (slice(0, 16), slice(16, None), slice(None))]
        row = next(line for line in out.splitlines() if line.split()[:1] == [str(i)])
        assert [float(x) for x in row.split()[2:]] == pytest.approx(wanted, abs=6e-5)
        assert min(wanted) > 0.1
