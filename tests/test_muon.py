"""optimizer='muon': against torch's own, singular values, and runs that are stopped and shared."""

import pytest
import torch
from conftest import ALL, read_metrics, tiny_model, without_times
from test_faults import assert_same_end, end_state
from test_parallel import losses, two_processes

import train as trainer
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import checkpoint_path
from runtime.muon import add_muon, orthogonal

pytestmark = pytest.mark.usefixtures('no_picture')
SETTINGS = dict(weight_decay=0.5, learning_rate=1e-2, betas=(0.8, 0.99), device_type='cpu')


@pytest.mark.parametrize('shape', [(3, 24, 24), (2, 12, 40), (2, 40, 12)])
def test_singular_values_come_near_one_and_their_vectors_stay(shape):
    torch.manual_seed(0)
    G = torch.randn(shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    found = U.mT @ orthogonal(G) @ Vh.mT  # diagonal, if U and V are those of the result too
    values = found.diagonal(dim1=1, dim2=2)
    assert (found - torch.diag_embed(values)).abs().max() < 1e-9
    # what the iteration is made to bring near 1, by its authors
    large = S / S.norm(dim=1, keepdim=True) > 0.01
    assert large.double().mean() > 0.9 and (values[large] - 1).abs().max() < 0.35


def test_no_gradient_is_no_step():
    assert orthogonal(torch.zeros(1, 4, 4)).abs().max() == 0


@ALL
def test_matrices_of_the_blocks_step_as_torchs_muon_does_and_the_rest_as_adamw(model_class,
                                                                               monkeypatch):
    """torch's own iterates in bfloat16, of which this one does not know here."""
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.float)
    mine, theirs = (tiny_model(model_class, n_latent=4) if model_class is GPT_MLA
                    else tiny_model(model_class) for _ in range(2))
    optimizer = add_muon(mine, mine.configure_optimizers(**SETTINGS))
    own = [name for name, p in theirs.named_parameters()
           if p.dim() == 2 and name.startswith(('transformer.h.', 'ahead.'))]
    parameters = dict(theirs.named_parameters())
    muon = torch.optim.Muon([parameters[name] for name in own], lr=1e-2, weight_decay=0.5,
                            adjust_lr_fn='match_rms_adamw')
    adamw = theirs.configure_optimizers(**SETTINGS)
    for step in range(3):
        idx = torch.randint(14, (4, 17), generator=torch.Generator().manual_seed(step))
        for model in (mine, theirs):
            model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        muon.step()
        for name in own:
            parameters[name].grad = None
        adamw.step()
        for model in (mine, theirs):
            model.zero_grad()
    for name, p in mine.named_parameters():
        torch.testing.assert_close(p, parameters[name], atol=1e-5, rtol=1e-4, msg=name)
    assert len(own) >= 4 * len(mine.transformer.h)


def test_few_are_iterated_at_a_time_where_they_are_large(monkeypatch):
    found = []
    for at_once in (2 ** 24, 1):
        monkeypatch.setattr('runtime.muon.AT_ONCE', at_once)
        model = tiny_model(GPT)
        optimizer = add_muon(model, model.configure_optimizers(**SETTINGS))
        idx = torch.arange(14)[None]
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('model_class, dtype', [
    (GPT, 'float32'), (GPT_MLA, 'float32'), (GPT_KAhead, 'float32'), (GPT, 'float16')])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(model_class, dtype, tiny_args, tmp_path,
                                                        program):
    name = checkpoint_path('', model_class.model_type)
    args = [*tiny_args, '--max_iters=9', f'--dtype={dtype}']
    whole, half = tmp_path / 'whole', tmp_path / 'half'
    runs = ([f'--out_dir={whole}', '--optimizer=muon'],
            [f'--out_dir={half}', '--optimizer=muon', '--max_iters=6'],
            [f'--out_dir={half}', '--init_from=resume'])  # which takes the optimizer along
    for own in runs:
        code, _, err = program(lambda: trainer.main(model_class), *args, *own)
        assert code == 0, err
    assert_same_end(end_state(half, name), end_state(whole, name))
    assert without_times(read_metrics(half)) == without_times(read_metrics(whole))


def test_scaled_gradients_of_float16_are_unscaled_before_a_step(tiny_args, tmp_path, program):
    """Also where nothing is clipped, and after a resume."""
    found = []
    for dtype in ('float32', 'float16'):
        args = [*tiny_args, '--optimizer=muon', '--grad_clip=0', f'--dtype={dtype}',
                f'--out_dir={tmp_path / dtype}', '--weight_decay=0.5']
        for own in (['--max_iters=3'], ['--init_from=resume']):
            code, _, err = program(trainer.main, *args, *own)
            assert code == 0, err
        found.append(losses(tmp_path / dtype))
    assert found[0] == pytest.approx(found[1], abs=0.02)


@pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])
def test_two_processes_end_as_one_does(parallel, tiny_args, tmp_path, program):
    args = [*tiny_args, '--optimizer=muon']
    one, two = tmp_path / 'one', tmp_path / 'two'
    assert program(lambda: trainer.main(GPT_MLA), *args, f'--out_dir={one}')[0] == 0
    args += [f'--out_dir={two}', f'--parallel={parallel}']
    two_processes([*args, '--max_iters=4'], GPT_MLA)
    two_processes([*args, '--init_from=resume'], GPT_MLA)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.parametrize('first, second', [('adamw', 'muon'), ('muon', 'adamw')])
def test_another_optimizer_cannot_go_on_and_says_so(first, second, tiny_args, program):
    assert program(trainer.main, *tiny_args, f'--optimizer={first}')[0] == 0
    code, _, err = program(trainer.main, *tiny_args, '--init_from=resume', '--max_iters=8',
                           f'--optimizer={second}')
    assert code == 2 and err.count('\n') == 1
    assert f'optimizer={second} cannot go on from the state of {first}' in err
    assert 'leave optimizer out' in err
