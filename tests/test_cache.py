"""Attention with a cache is attention without one."""

import math
from itertools import combinations

import pytest
import torch
from conftest import ALL, BOTH, tiny_model
from torch.nn import functional as F

from generate import RaggedCache, causal_mask, new_cache
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.cpu_linear import CpuLinear, use_cpu_linear


def randomised(model_class, **settings):
    model = tiny_model(model_class, **settings)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def read_in_chunks(model, idx, chunks, length=16):
    cache, logits, start = new_cache(model, len(idx), length), [], 0
    for size in chunks:
        part = idx[:, start:start + size]
        logits.append(model(part, part, cache=cache)[0])
        start += size
    assert [layer.n for layer in cache] == [start] * len(cache)
    return torch.cat(logits, 1)


@BOTH
@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_every_way_of_cutting_a_prompt_into_chunks(model_class, bias):
    model = randomised(model_class, bias=bias).double()
    idx = torch.randint(14, (2, 8))
    wanted = model(idx, idx)[0]
    for n_cuts in range(8):
        for cuts in combinations(range(1, 8), n_cuts):
            chunks = [b - a for a, b in zip((0, *cuts), (*cuts, 8))]
            chunked = read_in_chunks(model, idx, chunks)
            torch.testing.assert_close(chunked, wanted, atol=1e-12, rtol=1e-12)


@BOTH
@torch.no_grad()
def test_float32_and_bfloat16_stay_close(model_class):
    model = randomised(model_class)
    idx = torch.randint(14, (3, 16))
    wanted = model(idx, idx)[0]
    chunked = read_in_chunks(model, idx, [5, 1, 1, 4, 5])
    torch.testing.assert_close(chunked, wanted, atol=1e-4, rtol=1e-4)
    model.bfloat16()
    cache = new_cache(model, 3, 16)
    assert all(tensor.dtype == torch.bfloat16 for layer in cache for tensor in layer.tensors)
    error = (read_in_chunks(model, idx, [5, 1, 1, 4, 5]).float() - wanted).std() / wanted.std()
    assert error < 0.05


@BOTH
@torch.no_grad()
def test_under_autocast(model_class):
    model = randomised(model_class)
    idx = torch.randint(14, (3, 16))
    with torch.amp.autocast('cpu', torch.bfloat16):
        chunked, whole = read_in_chunks(model, idx, [5, 1, 10]), model(idx, idx)[0]
    assert (chunked - whole).float().std() / whole.float().std() < 0.05


@BOTH
@torch.no_grad()
def test_what_the_cache_forgets_has_never_been(model_class):
    model = randomised(model_class).double()
    idx, other = torch.randint(14, (2, 2, 9))
    cache = new_cache(model, 2, 9)
    model(idx[:, :4], cache=cache)
    model(other[:, 4:], cache=cache)
    for layer in cache:
        layer.n = 4
    rest, _ = model(idx[:, 4:], cache=cache)
    torch.testing.assert_close(rest, model(idx)[0], atol=1e-12, rtol=1e-12)


@BOTH
def test_a_cache_that_is_full_is_refused(model_class):
    model = tiny_model(model_class)
    cache = new_cache(model, 1, 16)
    model(torch.zeros(1, 10, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match='17 tokens does not fit into block_size=16'):
        model(torch.zeros(1, 7, dtype=torch.long), cache=cache)


@torch.no_grad()
def test_mla_remembers_the_latent_and_builds_no_key_or_value_after_the_prompt():
    model, built = randomised(GPT_MLA), []
    for block in model.transformer.h:
        for linear in (block.attn.key, block.attn.value):
            linear.register_forward_hook(lambda module, args, out: built.append(out.shape))
    cache = new_cache(model, 2, 16)
    assert [tensor.shape for layer in cache for tensor in layer.tensors] == [(2, 16, 8)] * 2
    idx = torch.randint(14, (2, 16))
    model(idx[:, :6], cache=cache)
    assert built == [(2, 6, 16)] * 4  # once for each layer's keys and values
    for t in range(6, 10):
        model(idx[:, t:t + 1], cache=cache)
    model(idx[:, 10:], cache=cache)
    assert len(built) == 4
    x = model.transformer.drop(model.transformer.wte(idx) + model.transformer.wpe(torch.arange(16)))
    attn = model.transformer.h[0].attn
    latents = attn.latent_enc(model.transformer.h[0].ln_1(x))
    torch.testing.assert_close(cache[0].tensors[0], latents, atol=1e-5, rtol=1e-5)


@BOTH
@torch.no_grad()
def test_a_prompt_runs_through_the_fused_causal_kernel(model_class, monkeypatch):
    calls, kernel = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **settings):
        calls.append((tuple(q.shape), is_causal, attn_mask is None))
        return kernel(q, k, v, attn_mask, dropout_p, is_causal, **settings)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    model = tiny_model(model_class)
    model(torch.zeros(3, 7, dtype=torch.long), cache=new_cache(model, 3, 16))
    assert calls == [((3, 2, 7, 8), True, True)] * 2


@torch.no_grad()
def test_absorbed_attention_is_the_naive_one_in_float64():
    attn = randomised(GPT_MLA, bias=True, n_latent=6).double().transformer.h[0].attn
    c, x = torch.randn(2, 11, 6, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    q, (k, v) = attn.queries(x), attn.keys_and_values(c)
    for T in (1, 4):
        wanted = torch.zeros(2, T, 16, dtype=torch.float64)
        for b in range(2):
            for h in range(2):
                for t in range(T):
                    seen = 11 - T + t + 1
                    query = q[b, h, 4 - T + t]
                    weights = torch.softmax(k[b, h, :seen] @ query / math.sqrt(8), 0)
                    wanted[b, t, 8 * h:8 * h + 8] = weights @ v[b, h, :seen]
        mask = causal_mask(T, 11, torch.float64, 'cpu')
        absorbed = attn.attend_absorbed(q[:, :, 4 - T:], c, mask)
        torch.testing.assert_close(absorbed, wanted, atol=1e-12, rtol=1e-12)


def in_float64(layer, x):
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.weight.double(), bias)


# the last two numbers of outputs: a prime, and 3 times one
@pytest.mark.parametrize('n_in, n_out', [(300, 512), (128, 1009), (64, 3 * 569)])
@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_linear_is_torchs(n_in, n_out, bias, monkeypatch):
    torch.manual_seed(0)
    ours = CpuLinear(n_in, n_out, bias=bias)
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
        for shape in ((1, 1), (1, 8), (4, 2), (3, 3), (), (5,)):
            x = torch.randn(*shape, n_in)
            wanted = in_float64(ours, x)
            assert ours(x).shape == wanted.shape
            torch.testing.assert_close(ours(x).double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize('bias', [True, False])
@torch.no_grad()
def test_linear_in_half_precision(dtype, tolerance, bias):
    ours, enabled = CpuLinear(64, 32, bias=bias).to(dtype), torch.backends.mkldnn.enabled
    for n_rows in (1, 8, 9, 40):
        x = torch.randn(1, n_rows, 64, dtype=dtype)
        wanted = in_float64(ours, x)
        assert ours(x).dtype == dtype
        torch.testing.assert_close(ours(x).double(), wanted, atol=tolerance, rtol=tolerance)
    assert torch.backends.mkldnn.enabled == enabled


def test_linear_has_gradients():
    layer, x = CpuLinear(400, 300), torch.randn(1, 1, 400, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0, 0], layer.weight.sum(0))


@ALL
def test_use_cpu_linear_leaves_no_other_linear(model_class):
    model = tiny_model(model_class)
    assert not any(isinstance(m, CpuLinear) for m in model.modules())
    assert use_cpu_linear(model) is model
    assert all(type(m) is CpuLinear for m in model.modules() if isinstance(m, torch.nn.Linear))


@ALL
@torch.no_grad()
def test_use_cpu_linear_leaves_outputs_and_names(model_class):
    model = tiny_model(model_class, n_embd=256, vocab_size=500)  # large enough for the ways round
    idx, names = torch.randint(500, (1, 6)), list(model.state_dict())
    wanted = model.next_logits(idx)
    cache = new_cache(use_cpu_linear(model), 1, 6)
    model.next_logits(idx[:, :5], cache)
    torch.testing.assert_close(model.next_logits(idx[:, 5:], cache), wanted, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_a_cache_of_sequences_that_remember_different_numbers_of_tokens():
    """Each row reads on after its own tokens, as it does in a cache of its own."""
    model = GPT_KAhead.from_gpt(randomised(GPT).double(), k_ahead=2)
    idx, n_read = torch.randint(14, (3, 9)), [2, 5, 3]
    cache = new_cache(model, 3, 9)
    model.head_states(idx, cache)
    more = torch.randint(14, (3, 4))
    ragged = [RaggedCache(layer.tensors, torch.tensor(n_read)) for layer in cache]
    assert ragged[0].start.tolist() == [[n] for n in n_read]
    together = model.head_states(more, ragged)
    assert ragged[0].n.tolist() == [n + 4 for n in n_read]
    for row, n in enumerate(n_read):
        alone = model.head_states(torch.cat((idx[[row], :n], more[[row]]), dim=1))
        for ours, wanted in zip(together, alone):
            torch.testing.assert_close(ours[[row]], wanted[:, n:], atol=1e-12, rtol=1e-12)
