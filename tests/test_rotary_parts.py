"""Scores are content plus rotary, at every distance; and what is free in the rotary part changes no
number."""

import numpy as np
import pytest
import torch
from analysis_models import subject
from conftest import CHARS, tiny_model
from family import FAMILY, member
from test_circuits import analysed, close

import evaluate
import runs
import sample
import visualize_residual_space_gpt2 as visualize
from analysis import (
    circuits,
    composition,
    copying,
    latent_directions,
    report,
    spectrum,
    subspaces,
)
from analysis.record import record
from generate import generate
from model_mla import GPT_MLA
from models import describe, label_of
from runtime.checkpoint import save_checkpoint
from runtime.tokenizer import make_tokenizer

ROTARY = [name for name, (_, settings) in FAMILY.items() if 'rotary' in settings]
LINEAR = [name for name, (_, settings) in FAMILY.items() if 'latent_norm' not in settings]
MODULES = [composition, copying, spectrum, subspaces, latent_directions]


@pytest.mark.parametrize('name', LINEAR)
@torch.no_grad()
def test_content_and_rotary_part_are_the_pattern_at_every_offset(name):
    model = member(name, bias=False).double()
    c, T = model.config, 16
    for block in record(model, torch.randint(14, (1, T))):
        own = model.transformer.h[block.layer]
        x = own.ln_1(block.before)[0]  # (T, n_embd)
        W_Q, W_K, *_ = own.attn.head_weights()
        content = W_Q @ W_K.mT if c.rotary != 'all' else torch.zeros(1, 1, 1)
        scores = torch.full((c.n_head, T, T), -torch.inf, dtype=torch.float64)
        for distance in range(T):
            M = content
            if c.rotary != 'none':
                M = M + circuits.rotary_part(own.attn, c.rotary_base, distance)
            for t in range(distance, T):
                scores[:, t, t - distance] = x[t] @ M @ x[t - distance]
        width = c.head_dim + (getattr(c, 'n_rotary', None) or 0)
        pattern = (scores * width ** -0.5).softmax(-1)
        torch.testing.assert_close(pattern, block.pattern()[0], atol=1e-9, rtol=0)


@torch.no_grad()
def test_a_norm_on_the_latents_scales_each_part_by_a_number_per_token():
    """Of normed latents the maps are right up to one positive number for each query, which both
    parts share, and one for each key's content."""
    model = member('deepseek', bias=False).double()
    attn, base = model.transformer.h[0].attn, model.config.rotary_base
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    q, k, _ = attn.heads(x)
    W_Q, W_K, W_V, _ = attn.head_weights()
    by_map = torch.einsum('tn,hnm,sm->hts', x[0], W_Q @ W_K.mT, x[0])
    ratio = (q[..., :8] @ k[..., :8].mT)[0] / by_map  # (n_head, T, T)
    assert (ratio > 0).all()
    torch.testing.assert_close(ratio, ratio[:, :, :1] * ratio[:, :1] / ratio[:, :1, :1])
    of_query = (q[0, 0, :, :8] / (x[0] @ W_Q[0]))[:, 0]
    for distance in range(9):
        M = circuits.rotary_part(attn, base, distance)
        for t in range(distance, 9):
            found = (q[0, :, t, 8:] * k[0, :, t - distance, 8:]).sum(-1)
            wanted = x[0, t] @ M @ x[0, t - distance] * of_query[t]
            torch.testing.assert_close(found, wanted)
    assert circuits.rotary_part(member('mla').transformer.h[0].attn, base, 1) is None


@torch.no_grad()
def turned(model):
    """A model whose rotary pairs are turned, each by an angle of its own, in queries and keys."""
    c, state = model.config, {name: p.clone() for name, p in model.state_dict().items()}
    n = c.n_rotary if c.rotary == 'decoupled' else c.head_dim

    def turn(rows, angles):  # rows (heads, n, ...), angles (heads, n / 2)
        a, b = rows.split(n // 2, dim=1)
        angles = angles.view(*angles.shape, *[1] * (rows.dim() - 2))
        return torch.cat((angles.cos() * a - angles.sin() * b,
                          angles.cos() * b + angles.sin() * a), dim=1)
    for i in range(c.n_layer):
        n_kv = c.n_kv_head or c.n_head
        shared = c.rotary == 'decoupled'
        angles = 6 * torch.rand(1 if shared else n_kv, n // 2)
        of_queries = angles.repeat_interleave(c.n_head // len(angles), dim=0)
        for end in ('weight', 'bias'):
            names = {part: f'transformer.h.{i}.attn.{part}.{end}'
                     for part in ('c_attn', 'query', 'key', 'latent_enc')}
            if names['c_attn'] in state:
                heads = state[names['c_attn']].unflatten(0, (c.n_head + 2 * n_kv, n))
                heads[:c.n_head] = turn(heads[:c.n_head], of_queries)
                heads[c.n_head:c.n_head + n_kv] = turn(heads[c.n_head:c.n_head + n_kv], angles)
            elif names['query'] in state:
                queries = state[names['query']].unflatten(0, (c.n_head, -1))
                queries[:, -n:] = turn(queries[:, -n:], of_queries)
                if not shared:
                    keys = state[names['key']].unflatten(0, (c.n_head, -1))
                    keys[:] = turn(keys, angles)
                elif end == 'weight':
                    keys = state[names['latent_enc']][-n:]
                    keys[:] = turn(keys[None], angles)[0]
    return type(model).from_state_dict(c, state).eval()


@pytest.mark.parametrize('name', ROTARY)
def test_turning_a_pair_alike_in_queries_and_keys_changes_no_number(name):
    model = member(name)
    other = turned(model)
    weights = [m.transformer.h[0].attn.rotary_weights()[1] for m in (model, other)]
    assert not torch.allclose(*weights, atol=0.1)
    idx = torch.randint(14, (2, 16))
    assert torch.allclose(*(m(idx, idx)[0] for m in (model, other)), atol=1e-4)
    for distance in (0, 3):
        parts = [circuits.rotary_part(m.transformer.h[1].attn, m.config.rotary_base, distance)
                 for m in (model, other)]
        assert torch.allclose(*parts, atol=1e-4)
    for module in MODULES:
        if module is latent_directions and 'mla' not in name and 'deepseek' not in name:
            continue
        assert close(analysed(module, model), analysed(module, other), 1e-3), module.__name__


@pytest.mark.parametrize('name, label, words, note', [
    ('mha', 'MHA', '2 heads, 16 wide, context', ''),
    ('gqa', 'GQA', '4 heads, 2 of keys and values, 16 wide', ''),
    ('gqa, rotary', 'GQA rotary', 'rotary all (base 50)', 'scores at distance 0'),
    ('mla, rotary', 'MLA rotary', 'latent 6, rotary all (base 100)', 'scores at distance 0'),
    ('mla, decoupled', 'MLA decoupled', 'rotary decoupled 4 (base 10000)', 'content part of the'),
    ('mla, normed', 'MLA', 'latent 6, latent norm and scale', 'without the norms'),
    ('deepseek', 'MLA decoupled', 'query latent 10', 'the scores, without the norms'),
    ('mla, a latent for each layer', 'MLA', 'latent 6/3', ''),
    ('mha, attention only', 'MHA', 'no MLP', ''), ('mha, gated', 'MHA rotary', 'gated MLP',
                                                           'scores at distance 0')])
def test_each_says_what_it_is_and_tables_say_which_part_they_are_about(name, label, words, note):
    model = member(name)
    assert label_of(model.model_type, model.config) == label and words in describe(model)
    for module in (composition, subspaces, spectrum, latent_directions):
        if module is latent_directions and label[:3] != 'MLA':
            continue
        result = module.analyse(subject(model), module.Config())
        assert note in result.note and bool(note) == bool(result.note)
        assert module.table(result).endswith(result.note)


def test_heads_of_a_group_are_not_counted_as_alike():
    """Their keys are the same map, which says nothing about what was learned."""
    of_gqa = subspaces.analyse(subject(member('gqa')), subspaces.Config())
    pairs = [(layer + i, layer + j) for layer in (0, 4) for i in range(4) for j in range(4)
             if i // 2 != j // 2]
    wanted = np.mean([of_gqa.overlap['key-key'][pair] for pair in pairs])
    assert of_gqa.within['key-key'] == pytest.approx(wanted) and wanted < 0.9
    assert of_gqa.overlap['key-key'][0, 1] == pytest.approx(1)
    of_mqa = subspaces.analyse(subject(member('mqa')), subspaces.Config())
    assert np.isnan(of_mqa.within['value-value']) and np.isfinite(of_mqa.within['key-value'])
    assert '-' in subspaces.table(of_mqa)


def test_noise_through_a_latent_of_the_queries_is_expected():
    """An untrained model has no outliers against noise of its own kind."""
    model = tiny_model(GPT_MLA, n_embd=128, n_head=4, n_latent=24, n_query_latent=20, n_layer=2)
    found = spectrum.of_weights(model)['QK']
    assert found.outliers.mean() < 0.3 < found.outliers_common.mean()
    gqa = spectrum.of_weights(member('gqa', n_embd=64, n_kv_head=1))
    assert np.array_equal(gqa['OV'].outliers, gqa['OV'].outliers_common)


@pytest.mark.parametrize('name', ['mha, rotary', 'mla, decoupled', 'mla, rotary'])
def test_past_the_context_slide_is_exact_and_drop_goes_on(name):
    model = member(name).double()
    idx = torch.randint(14, (1, 5))
    slid = generate(model, idx, 40, 14, temperature=0)
    wanted = idx
    for _ in range(40):
        new = model.next_logits(wanted[:, -16:]).argmax(-1, keepdim=True)
        wanted = torch.cat((wanted, new), dim=1)
    assert torch.equal(slid, wanted)
    dropped = generate(model, idx, 40, 14, temperature=0, past_context='drop')
    assert dropped.shape == (1, 45) and torch.equal(dropped[:, :17], wanted[:, :17])


@pytest.mark.parametrize('one, two', [('gqa, rotary', 'deepseek'),
                                      ('mha, attention only', 'mla, a latent for each layer'),
                                      ('mla, rotary', 'mla, decoupled')])
def test_all_that_reads_a_model_reads_the_family(one, two, data_dir, tmp_path, program,
                                                 monkeypatch):
    """Report, residual stream, evaluation and the list of runs."""
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda _, path: path.write_bytes(b''))
    paths = []
    for name, file in ((one, 'a.pt'), (two, 'b.pt')):
        model = member(name, block_size=24)
        paths.append(tmp_path / file)
        save_checkpoint(paths[-1], model, make_tokenizer(CHARS), {'dataset': str(data_dir)}, 1)
    code, out, err = program(report.main, *paths, f'--out_dir={tmp_path / "report"}')
    assert code == 0, err
    line, = [line for line in out.splitlines() if line.startswith('left out: ')]
    wanted = {'ioi'} | ({'latent_directions'} if 'mla' not in one else set())
    parts = line.removeprefix('left out: ').split('; ')
    assert {part.split(' for ')[0] for part in parts} == wanted
    for main, *args in ((evaluate.main, '--max_tokens=200'), (runs.main,),
                        (sample.main, '--num_samples=1', '--max_new_tokens=40', '--device=cpu'),
                        (visualize.main, '--prompt=abcabc', f'--out_dir={tmp_path / "stream"}')):
        for path in paths:
            code, _, err = program(main, path, *args)
            assert code == 0, err
