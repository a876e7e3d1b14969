import math

import pytest
import torch
from conftest import tiny_model

from generate import new_cache
from model import GPT, CausalSelfAttention
from model_mla import GPT_MLA, MLAConfig


def randomised(model):
    for p in model.parameters():
        p.data = p.data + 0.3 * torch.randn_like(p)
    return model


def test_attention_is_its_definition_in_absorbed_form_in_float64():
    attn = randomised(tiny_model(GPT_MLA, bias=True, n_latent=6).double()).transformer.h[0].attn
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    weights = {name: p.detach() for name, p in attn.named_parameters()}
    out = torch.zeros(2, 7, 16, dtype=torch.float64)
    for batch in range(2):
        c = x[batch] @ weights['latent_enc.weight'].T  # (T, n_latent)
        for head in (slice(0, 8), slice(8, 16)):
            W_K, W_V = weights['key.weight'][head], weights['value.weight'][head]
            for t in range(7):
                q = weights['query.weight'][head] @ x[batch, t] + weights['query.bias'][head]
                # the score is taken in the latent space; q . b_K is the same for every key and
                # drops out
                a = torch.softmax(c[:t + 1] @ (W_K.T @ q) / math.sqrt(8), 0)
                out[batch, t, head] = W_V @ (a @ c[:t + 1]) + weights['value.bias'][head]
    wanted = out @ weights['c_proj.weight'].T + weights['c_proj.bias']
    torch.testing.assert_close(attn(x), wanted, atol=1e-12, rtol=1e-12)


def test_with_a_latent_that_keeps_everything_it_is_multi_head_attention():
    mha = randomised(tiny_model(GPT, bias=True).double())
    mla = tiny_model(GPT_MLA, bias=True, n_latent=16).double()
    state = mla.state_dict()
    for name, value in mha.state_dict().items():
        if '.c_attn.' in name:
            for part, chunk in zip(('query', 'key', 'value'), value.chunk(3)):
                state[name.replace('c_attn', part)] = chunk
            attn = name.rsplit('.', 2)[0]
            state[f'{attn}.latent_enc.weight'] = torch.eye(16, dtype=torch.float64)
        else:
            state[name] = value
    mla.load_state_dict(state)
    idx = torch.randint(14, (2, 16))
    torch.testing.assert_close(mla(idx, idx)[0], mha(idx, idx)[0], atol=1e-12, rtol=1e-12)


def test_differs_from_gpt_in_attention_alone():
    a, b = tiny_model(GPT), tiny_model(GPT_MLA)
    others = [{k: v.shape for k, v in m.state_dict().items() if '.attn.' not in k} for m in (a, b)]
    assert others[0] == others[1]
    names = {k.split('.attn.')[1].split('.')[0] for k in b.state_dict() if '.attn.' in k}
    assert names == {'latent_enc', 'query', 'key', 'value', 'c_proj'}


def test_n_latent_is_half_the_width_unless_given():
    assert MLAConfig(n_embd=48, n_head=4).n_latent == 24
    assert MLAConfig(n_embd=48, n_head=4, n_latent=5).n_latent == 5
    with pytest.raises(ValueError, match='n_latent=0'):
        MLAConfig(n_latent=0)


@pytest.mark.parametrize('n_latent', [16, 128, 300])
def test_keys_and_values_start_with_the_spread_of_mhas(n_latent):
    settings = dict(block_size=64, vocab_size=60, n_layer=1, n_head=4, n_embd=256, bias=False)
    x = torch.nn.functional.layer_norm(torch.randn(8, 64, 256), (256,))
    mha = tiny_model(GPT, **settings).transformer.h[0].attn
    mla = tiny_model(GPT_MLA, n_latent=n_latent, **settings).transformer.h[0].attn
    for ours, theirs in zip(mla.heads(x), mha.heads(x)):
        assert ours.std().item() == pytest.approx(0.02 * 16, rel=0.15)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.15)


def test_keys_of_all_heads_together_have_no_more_rank_than_the_latent():
    attn = randomised(tiny_model(GPT_MLA, n_latent=3)).transformer.h[0].attn
    _, W_K, W_V, _ = attn.double().head_weights()
    for W in (W_K, W_V):
        assert torch.linalg.matrix_rank(W.transpose(0, 1).reshape(16, 16), atol=1e-9) == 3


def test_cache_is_a_quarter_at_the_default():
    mla, mha = (sum(layer.nbytes for layer in new_cache(tiny_model(model_class), 3, 5))
                for model_class in (GPT_MLA, GPT))
    # layers, rows, tokens, key and value, n_embd, bytes
    assert mla * 4 == mha == 2 * 3 * 5 * 2 * 16 * 4
    assert not isinstance(tiny_model(GPT_MLA).transformer.h[0].attn, CausalSelfAttention)
