"""Weight space: the same function gives the same numbers, and the formulas hold."""

import functools
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from analysis_models import exact_mla, induction_model, random_model, same_function, subject
from conftest import BOTH, CHARS, tiny_model

from analysis import circuits, composition, copying, latent_directions, spectrum, subspaces
from analysis.program import as_json
from model import GPT, GPTConfig
from model_mla import GPT_MLA, MLAConfig
from runtime.tokenizer import make_tokenizer


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(one, other, tolerance):
    """Whether two results as_json are the same up to tolerance."""
    if isinstance(one, dict):
        return (one.keys() == other.keys()
                and all(close(one[key], other[key], tolerance) for key in one))
    if isinstance(one, list):
        return len(one) == len(other) and all(close(a, b, tolerance) for a, b in zip(one, other))
    if isinstance(one, float):
        return abs(one - other) <= tolerance * max(1, abs(one))
    return one == other


def analysed(module, model):
    """The result of an analysis of a model, as_json."""
    return as_json(module.analyse(subject(model), module.Config()))


@BOTH
@pytest.mark.parametrize('module', [composition, copying, spectrum, subspaces, latent_directions])
def test_the_same_function_gives_the_same_numbers(model_class, module):
    if module is latent_directions and model_class is GPT:
        pytest.skip('MHA has no latent')
    model = random_model(model_class)
    other = same_function(model)
    idx = torch.arange(13)[None]
    assert torch.allclose(*(m(idx, idx)[0].log_softmax(-1) for m in (model, other)), atol=1e-4)
    gain, other_gain = (m.transformer.h[0].ln_1.weight for m in (model, other))
    assert not torch.allclose(gain, other_gain, atol=0.1)
    result = analysed(module, model)
    assert close(result, analysed(module, other), 2e-3)
    assert not close(result, analysed(module, random_model(model_class, seed=5)), 2e-3)


@pytest.mark.parametrize('module', [composition, copying, spectrum, subspaces])
def test_mha_and_its_exact_mla_conversion_give_the_same_numbers(module):
    model = random_model(GPT)
    assert close(analysed(module, model), analysed(module, exact_mla(model)), 2e-3)


@BOTH
def test_folded_weights_compute_what_the_model_does(model_class):
    """Scores and outputs of every head follow from the residual stream divided by its standard
    deviation alone, without biases."""
    model = random_model(model_class, bias=False).double()
    heads = circuits.folded_heads(model)
    x = rand(1, 7, 16)
    normed = x / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    for layer, block in enumerate(model.transformer.h):
        q, k, v = block.attn.heads(block.ln_1(x))
        scores = torch.einsum('btn,hnd,hmd,bsm->bhts', normed, heads.W_Q[layer], heads.W_K[layer],
                              normed)
        assert torch.allclose(scores, q @ k.mT)
        written = torch.einsum('bsn,hnd,hdm->bhsm', normed, heads.W_V[layer], heads.W_O[layer])
        expected = v @ block.attn.head_weights()[-1]
        assert torch.allclose(written, expected - expected.mean(-1, keepdim=True))
    logits = model.unembed(x)
    W_U = circuits.folded_unembedding(model, len(CHARS))
    assert torch.allclose(normed @ W_U, logits - logits.mean(-1, keepdim=True))
    assert circuits.folded_embedding(model, 5).shape == (5, 16)


def test_token_vectors_are_what_ln_1_sees_behind_the_first_mlp():
    model = random_model(GPT).double()
    block, x = model.transformer.h[0], model.lm_head.weight[:5]
    bare = torch.nn.functional.layer_norm
    assert torch.allclose(circuits.token_vectors(model, range(5), first_mlp=False), bare(x, (16,)))
    x = x + block.mlp(block.ln_2(x))
    assert torch.allclose(circuits.token_vectors(model, range(5)), bare(x, (16,)))


def test_low_rank_maths():
    A, B = rand(20, 4, seed=1), rand(4, 15, seed=2)
    assert torch.allclose(circuits.r_factor(A).mT @ circuits.r_factor(A), A.mT @ A)
    values = circuits.product_singular_values(A, B)
    assert torch.allclose(values, torch.linalg.svdvals(A @ B)[:4])
    basis = circuits.orthonormal(torch.cat([A, A[:, :2] + A[:, 2:]], dim=1))
    assert basis.shape == (20, 4)
    assert torch.allclose(basis.mT @ basis, torch.eye(4, dtype=torch.float64))
    assert torch.allclose(basis @ basis.mT @ A, A)


# copying

def test_an_ov_circuit_made_to_copy_scores_1_and_one_made_to_negate_minus_1():
    model = tiny_model(GPT, n_layer=2)
    for block, sign in zip(model.transformer.h, (1, -1)):
        W_V = block.attn.c_attn.weight.data[32:]  # values of all heads
        # W_O = W_V^T, so that W_V W_O has no eigenvalue below 0
        block.attn.c_proj.weight.data = sign * W_V.T.clone()
    result = copying.analyse(subject(model), copying.Config())
    assert result.eigenvalue_score == pytest.approx(np.array([[1, 1], [-1, -1]]))


def test_eigenvalue_score_is_that_of_the_whole_circuit():
    shapes = (30, 16), (16, 4), (4, 16), (16, 30)
    W_E, W_V, W_O, W_U = (rand(*shape, seed=seed) for seed, shape in enumerate(shapes, start=1))
    eigenvalues = torch.linalg.eigvals(W_E @ W_V @ W_O @ W_U)
    expected = (eigenvalues.sum().real / eigenvalues.abs().sum()).item()
    assert copying.eigenvalue_score(W_V, W_O, W_U @ W_E) == pytest.approx(expected)
    assert abs(expected) < 0.9


def test_top_5_score_counts_the_tokens_that_a_head_raises():
    """One head writes the embedding of the token that it reads, and one writes it with its sign
    turned."""
    config = GPTConfig(block_size=8, vocab_size=12, n_layer=1, n_head=2, n_embd=64, bias=False)
    model = GPT(config).eval()
    for name, p in model.named_parameters():
        p.data.fill_(1.0 if 'ln_' in name else 0.0)
    eye = torch.eye(12)
    model.lm_head.weight.data[:, :12], model.lm_head.weight.data[:, 63] = eye, -1
    attn = model.transformer.h[0].attn
    values = attn.c_attn.weight.data[128:]
    values[:12, :12] = values[32:44, :12] = eye
    attn.c_proj.weight.data[:12, :12], attn.c_proj.weight.data[:12, 32:44] = eye, -eye
    result = copying.analyse(subject(model), copying.Config())
    assert result.top5.tolist() == [[1, 0]] and result.bottom5.tolist() == [[0, 1]]
    assert result.n_names == 12


# composition

def test_compositions_are_the_norms_of_the_whole_products():
    heads = circuits.folded_heads(random_model(GPT))
    first, second = (composition.layers(heads, slice(i, i + 1)) for i in range(2))
    scores = composition.compositions(first, second)
    for i in range(2):
        for j in range(2):
            OV_1, OV_2 = heads.W_V[0, i] @ heads.W_O[0, i], heads.W_V[1, j] @ heads.W_O[1, j]
            QK_2 = heads.W_Q[1, j] @ heads.W_K[1, j].T
            for kind, product in (('q', OV_1 @ QK_2), ('k', OV_1 @ QK_2.T), ('v', OV_1 @ OV_2)):
                size = OV_1.norm() * (OV_2 if kind == 'v' else QK_2).norm()
                assert scores[kind][i, j].item() == pytest.approx((product.norm() / size).item())


def test_random_heads_compose_by_chance():
    torch.manual_seed(0)
    model = tiny_model(GPT, n_layer=2, n_head=4, n_embd=64)
    result = composition.analyse(subject(model), composition.Config())
    for kind in composition.KINDS:
        scores = getattr(result, kind)
        assert np.isfinite(scores).sum() == 16 and np.isfinite(scores[:4, 4:]).all()
        assert abs(np.nanmean(scores)) < 3 * result.chance_spread[kind] / 16 ** 0.5


@pytest.mark.parametrize('convert', [lambda model: model, exact_mla])
def test_the_k_composition_of_the_induction_model_is_found(convert):
    s = subject(convert(induction_model()))
    s.tokenizer = make_tokenizer([chr(97 + i) for i in range(16)])
    result = composition.analyse(s, composition.Config())
    (best, writer, reader), (second, *_) = composition.strongest(result, 'k', 2)
    assert (writer, reader) == ('0.0', '1.0') and best > second + 0.1


# subspaces

def test_rotated_and_equal_spaces_have_the_angles_that_they_were_given():
    Q = torch.linalg.qr(rand(10, 10)).Q  # a basis in which nothing is special
    angles = torch.tensor([0.0, 10, 35, 90], dtype=torch.float64)
    A = Q[:, :4]
    B = Q[:, :4] * torch.deg2rad(angles).cos() + Q[:, 4:8] * torch.deg2rad(angles).sin()
    mix = rand(4, 4, seed=3)

    def principal_angles(A, B):
        (A, B), _ = subspaces.padded_bases(torch.stack([A, B]))
        return subspaces.degrees(subspaces.squared_cosines(A, B[None])[0])
    assert torch.allclose(principal_angles(A @ mix, B), angles, atol=1e-5)
    assert torch.allclose(principal_angles(A @ mix, A), torch.zeros_like(angles), atol=1e-5)
    C = rand(10, 4, seed=4)
    expected = np.degrees(scipy.linalg.subspace_angles(A.numpy(), C.numpy()))[::-1]
    assert principal_angles(A, C).numpy() == pytest.approx(expected)


def test_overlaps_of_a_model_with_known_spaces():
    """Two heads read the same values. Their keys share one of eight dimensions. Both write to what
    they read."""
    config = GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=2, n_embd=16, bias=False)
    model = GPT(config).eval()
    Q = torch.linalg.qr(rand(16, 16)).Q
    ones = torch.ones(16, 1, dtype=torch.float64)
    Q = torch.linalg.qr(torch.cat([ones, Q[:, :15]], dim=1)).Q[:, 1:].float()  # all means are 0
    attn = model.transformer.h[0].attn
    attn.c_attn.weight.data[16:32] = Q[:, :15].T[[*range(8), *range(7, 15)]]
    attn.c_attn.weight.data[32:] = torch.cat([Q[:, :8].T, Q[:, :8].T.flip(0)])
    attn.c_proj.weight.data = attn.c_attn.weight.data[32:].T.clone()
    result = subspaces.analyse(subject(model), subspaces.Config())
    assert result.overlap['value-value'] == pytest.approx(np.ones((2, 2)), abs=1e-6)
    assert result.overlap['output-value'] == pytest.approx(np.ones((2, 2)), abs=1e-6)
    assert result.overlap['key-key'] == pytest.approx(np.array([[1, 1 / 8], [1 / 8, 1]]), abs=1e-6)
    assert result.smallest_angle['key-key'] == pytest.approx(np.zeros((2, 2)), abs=0.1)
    assert result.angles_within['key-key'] == pytest.approx([0] + [90] * 7, abs=0.1)
    assert result.within['key-key'] == pytest.approx(1 / 8, abs=1e-6)
    assert np.isnan(result.across['key-key'])
    assert result.latent_rank == [15]


def test_across_layers_only_what_a_later_head_can_read_counts():
    model = random_model(GPT, n_layer=2)
    result = subspaces.analyse(subject(model), subspaces.Config())
    for pair in ('output-value', 'value-value'):  # the second one is symmetric
        assert result.across[pair] == pytest.approx(result.overlap[pair][:2, 2:].mean())


def test_heads_of_an_mla_model_share_its_latent():
    model = random_model(GPT_MLA, n_latent=8, n_embd=32)
    result = subspaces.analyse(subject(model), subspaces.Config())
    assert result.latent_rank == [8, 8]
    assert result.within['key-key'] == pytest.approx(1)  # of 16 dimensions, a head reads only those
    assert result.across['key-key'] < 0.6 and result.chance['key-key'] == pytest.approx(8 / 31)
    assert result.chance_in_latent == 1


# spectrum

def test_marchenko_pastur_finds_no_outlier_in_noise_and_one_in_noise_plus_a_spike():
    for n, p in ((400, 100), (300, 300), (64, 768)):
        noise = rand(n, p, seed=n)
        def outliers(X):
            return spectrum.count_outliers(torch.linalg.svdvals(X), (min(n, p) / max(n, p),))
        assert outliers(noise) == 0
        u, v = rand(n, 1, seed=n + 1), rand(1, p, seed=n + 2)
        spike = 2 * (n ** 0.5 + p ** 0.5) * u / u.norm() * v / v.norm()
        assert outliers(noise + spike) == 1
        assert outliers(3.7 * (noise + spike)) == 1


def test_the_edge_of_noise():
    """Without its margin it is Marchenko and Pastur's. Products of noise stay below it as often as
    it says."""
    margin = spectrum.noise_edge(10 ** 12, (0.25,))
    assert margin == pytest.approx((1 + 0.25 ** 0.5) ** 2, abs=1e-6)
    for shapes in (((200, 16), (16, 200)), ((100, 16), (16, 40), (40, 100)), ((200, 16),)):
        above = 0
        for seed in range(300):
            generator = torch.Generator().manual_seed(seed)
            dtype = torch.float64 if len(shapes) > 1 else torch.float32
            factors = [torch.randn(*shape, dtype=dtype, generator=generator) for shape in shapes]
            product = functools.reduce(torch.matmul, factors).double()
            values = torch.linalg.svdvals(product)[:16]
            sizes = [shape[0] for shape in shapes] + [shapes[-1][1]]
            ratios = tuple(16 / n for n in sizes if n != 16)
            above += spectrum.count_outliers(values, ratios) > 0
        assert above <= 6  # 0.3 expected of 300


@pytest.mark.parametrize('spikes', [1, 4, 9])
def test_many_equal_spikes_do_not_hide_behind_each_other(spikes):
    """In a product read through a latent of 24, of 16 singular values."""
    noise = rand(63, 24, seed=1) @ rand(24, 16, seed=2) @ rand(16, 63, seed=3)
    U, V = (torch.linalg.qr(rand(63, spikes, seed=seed)).Q for seed in (4, 5))
    values = torch.linalg.svdvals(noise + 1e3 * torch.linalg.matrix_norm(noise, 2) * U @ V.T)[:16]
    assert spectrum.count_outliers(values, (16 / 63, 16 / 24, 16 / 63)) == spikes


@pytest.mark.parametrize('n_latent', [1, 2, 4, 8, 12, 16])
def test_a_latent_narrower_than_a_head(n_latent):
    """Heads of 16 dimensions: noise has as many singular values as the latent has dimensions, and
    no outlier."""
    weights = spectrum.of_weights(tiny_model(GPT_MLA, n_head=4, n_embd=64, n_latent=n_latent))
    assert weights['QK'].outliers.sum() == weights['OV'].outliers.sum() == 0
    assert (weights['QK'].effective_rank <= n_latent + 1e-6).all()


def test_effective_rank():
    assert spectrum.effective_rank(torch.ones(3, 7)).tolist() == pytest.approx([7] * 3)
    assert spectrum.effective_rank(torch.tensor([5.0, 0, 0])).item() == pytest.approx(1)
    assert spectrum.effective_rank(torch.zeros(4)).item() == 0


@BOTH
def test_a_model_that_has_learned_nothing_has_no_outliers_and_a_spike_is_found(model_class):
    model = tiny_model(model_class, n_head=4, n_embd=64)
    weights = spectrum.of_weights(model)
    assert weights['QK'].outliers.sum() == weights['OV'].outliers.sum() == 0
    assert model_class is GPT_MLA or weights['OV'].outliers_common.sum() == 0
    assert weights['OV'].singular_values.shape == (2, 4, 16)
    model.transformer.h[1].attn.c_proj.weight.data[:, :16] += 0.3 * rand(64, 1) @ rand(1, 16)
    weights = spectrum.of_weights(model)
    assert weights['OV'].outliers.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert weights['QK'].outliers.sum() == 0


@pytest.mark.parametrize('spikes', [8, 9])
def test_a_count_at_its_ceiling_is_a_bound(spikes):
    """Of 16 singular values at most 9 can be told from noise, and it is said."""
    noise = rand(63, 16, seed=1)
    U, V = (torch.linalg.qr(rand(n, spikes, seed=seed)).Q for n, seed in ((63, 4), (16, 5)))
    values = torch.linalg.svdvals(noise + 1e3 * U @ V.T)
    counts, is_bound = spectrum.layer_outliers(values[None], [16, 63])
    assert counts[0] == spikes and bool(is_bound[0]) == (spikes == 9)
    assert spectrum.most_outliers(16) == 9


def test_the_table_says_at_least_and_its_headings_stand_apart():
    model = tiny_model(GPT, n_head=2, n_embd=32)
    model.transformer.h[1].attn.c_proj.weight.data[:, :9] *= 1e3
    result = spectrum.Spectrum(spectrum.of_weights(model), {}, 0)
    found = result.weights['OV']
    assert found.at_least.tolist() == [[False] * 2, [True, False]]
    assert found.at_least_common.tolist() == found.at_least.tolist()
    head, first, second = spectrum.table(result).splitlines()[:3]
    assert re.split(r' {3,}', head) == ['layer', 'W_Q W_K^T, weights', 'W_V W_O, weights']
    assert 'at least' not in first and second.count('at least 4.5') == 2
    assert len({len(line) for line in (head, first, second)}) == 1


# latent directions

def one_layer(vocab_size, n_latent):
    return GPT_MLA(MLAConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=32,
                             n_latent=n_latent, bias=False)).eval()


def test_who_uses_the_latent_is_what_it_was_built_for():
    """Of 8 dimensions, keys alone read 3, values alone 4, and both read 1. The basis of the latent
    is then changed."""
    model = one_layer(vocab_size=9, n_latent=8)
    attn = model.transformer.h[0].attn
    attn.key.weight.data[:, 3:7] = 0
    attn.value.weight.data[:, :3] = 0
    A = rand(8, 8).float()
    attn.latent_enc.weight.data = A @ attn.latent_enc.weight.data
    for reader in (attn.key, attn.value):
        reader.weight.data = reader.weight.data @ A.inverse()
    result = latent_directions.analyse(subject(model), latent_directions.Config())
    assert result.keys_alone[0] == 3 / 8 and result.values_alone[0] == 4 / 8
    assert result.both[0] == pytest.approx(1 / 8)
    assert result.key_share[0][:3] == pytest.approx([1] * 3, abs=1e-3)
    assert result.key_share[0][4:] == pytest.approx([0] * 4, abs=1e-3)
    assert 0.1 < result.key_share[0][3] < 0.9


def test_the_strongest_direction_names_the_token_that_it_was_built_to_read_and_the_one_it_writes():
    model = one_layer(vocab_size=13, n_latent=4)
    attn, wte = model.transformer.h[0].attn, model.lm_head.weight.data
    attn.latent_enc.weight.data[0] = 30 * wte[5]
    attn.value.weight.data[:, 0] = 0
    attn.value.weight.data[16:, 0] = 1  # through the second head alone
    attn.c_proj.weight.data[:, 16:] = 5 * wte[7][:, None]
    result = latent_directions.analyse(subject(model), latent_directions.Config(tokens=1))
    best = result.directions[0][0]
    assert best.excite == [CHARS[5]] and best.writes[1] == [CHARS[7]] and best.key_share < 0.6
    assert best.head_strength[1] > 10 * best.head_strength[0]
    assert sum(np.square(result.strengths[0])) == pytest.approx(2)
