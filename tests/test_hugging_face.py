"""The family in transformers: its attentions are peers of ours, and what is exported computes the
same there and comes back."""

import json

import pytest
import torch
from conftest import CHARS
from family import DEEPSEEK, member
from test_checkpoint import save

import export_huggingface
import train
from analysis.circuits import centred
from analysis.record import residual_streams
from generate import Cache, generate
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import checkpoint_path
from runtime.hugging_face import HAS_RMS_NORM, form_of
from runtime.loading import load_model


def causal(T, S=None):
    return torch.full((1, 1, T, S or T), -torch.inf).triu(1 + (S or T) - T)


@pytest.mark.parametrize('query_latent', [10, None])
@torch.no_grad()
def test_with_all_keys_on_attention_is_deepseeks(query_latent):
    """transformers' attention, prompt and cached, for the same weights."""
    from transformers import DeepseekV3Config, DynamicCache
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as peer
    settings = DEEPSEEK | dict(n_query_latent=query_latent, latent_scale=False, bias=False)
    attn = member('deepseek', **settings).transformer.h[0].attn
    config = DeepseekV3Config(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=6,
        q_lora_rank=query_latent, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        rope_interleave=False, max_position_embeddings=16, attn_implementation='eager')
    theirs, rope = peer.DeepseekV3Attention(config, 0), peer.DeepseekV3RotaryEmbedding(config)
    gain, query_gain = torch.rand(6) + 0.5, torch.rand(query_latent or 16) + 0.5
    theirs.kv_a_proj_with_mqa.weight.copy_(attn.latent_enc.weight)
    theirs.kv_a_layernorm.weight.copy_(gain)
    # our norm has no gain: the weights after it take it up
    key, value = (part.weight.unflatten(0, (2, 8)) / gain for part in (attn.key, attn.value))
    theirs.kv_b_proj.weight.copy_(torch.cat((key, value), dim=1).flatten(0, 1))
    theirs.o_proj.weight.copy_(attn.c_proj.weight)
    if query_latent:
        theirs.q_a_proj.weight.copy_(attn.query_enc.weight)
        theirs.q_a_layernorm.weight.copy_(query_gain)
        theirs.q_b_proj.weight.copy_(attn.query.weight / query_gain)
    else:
        theirs.q_proj.weight.copy_(attn.query.weight)
    x = torch.randn(3, 12, 16)
    wanted, _ = theirs(x, rope(x, torch.arange(12)[None]), causal(12))
    torch.testing.assert_close(attn(x), wanted, atol=1e-5, rtol=0)

    cache, past = Cache([torch.zeros(3, 12, 10)]), DynamicCache()
    for part, start in zip(x.split([5, 1, 1, 3, 2], dim=1), (0, 5, 6, 7, 10)):
        T = part.size(1)
        position = torch.arange(start, start + T)[None]
        wanted, _ = theirs(part, rope(part, position), causal(T, start + T), past_key_values=past)
        torch.testing.assert_close(attn(part, cache), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@torch.no_grad()
def test_grouped_and_rotary_attention_is_llamas(n_kv_head):
    from transformers import DynamicCache, LlamaConfig
    from transformers.models.llama import modeling_llama as peer
    attn = member('gqa, rotary', n_kv_head=n_kv_head, bias=False).transformer.h[0].attn
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=n_kv_head, head_dim=4,
        max_position_embeddings=16, attn_implementation='eager',
        rope_parameters=dict(rope_type='default', rope_theta=50.0))
    theirs, rope = peer.LlamaAttention(config, 0), peer.LlamaRotaryEmbedding(config)
    q, k, v = attn.c_attn.weight.split((16, 4 * n_kv_head, 4 * n_kv_head))
    for linear, W in ((theirs.q_proj, q), (theirs.k_proj, k), (theirs.v_proj, v),
                      (theirs.o_proj, attn.c_proj.weight)):
        linear.weight.copy_(W)
    x = torch.randn(3, 12, 16)
    wanted, _ = theirs(x, rope(x, torch.arange(12)[None]), causal(12))
    torch.testing.assert_close(attn(x), wanted, atol=1e-5, rtol=0)

    shape, past = (3, n_kv_head, 12, 4), DynamicCache()
    cache = Cache([torch.zeros(shape), torch.zeros(shape)])
    for part, start in zip(x.split([7, 1, 4], dim=1), (0, 7, 8)):
        T = part.size(1)
        position = torch.arange(start, start + T)[None]
        wanted, _ = theirs(part, rope(part, position), causal(T, start + T), past_key_values=past)
        torch.testing.assert_close(attn(part, cache), wanted, atol=1e-5, rtol=0)


GATED = dict(mlp='gated', bias=False)
WRITTEN = {  # name of the family, settings, the class, what is said of the cache
    'mha': ('mha', {}, 'GPT2LMHeadModel', ''),
    'gqa': ('gqa', {}, 'GPT2LMHeadModel', '32 numbers per token and layer in place of 16'),
    'attention only': ('mha, attention only', {}, 'GPT2LMHeadModel', ''),
    'query latent': ('mla, query latent', {}, 'GPT2LMHeadModel', '32 numbers per token and layer '
                                                                 'in place of 6'),
    'each layer': ('mla, a latent for each layer', {}, 'GPT2LMHeadModel', 'in place of 6/3'),
    'scaled': ('mla', dict(latent_scale=True), 'GPT2LMHeadModel', 'in place of 6'),
    'rotary': ('mha, rotary', {}, 'GPTNeoXForCausalLM', ''),
    'rotary, tanh': ('mha, rotary', dict(gelu='tanh', mlp=True), 'GPTNeoXForCausalLM', ''),
    'rotary, attention only': ('mha, rotary', dict(mlp=False), 'GPTNeoXForCausalLM', ''),
    'mla, rotary': ('mla, rotary', {}, 'GPTNeoXForCausalLM', 'in place of 6'),
    'gqa, rotary': ('gqa, rotary', {}, 'Starcoder2ForCausalLM', ''),
    'gated': ('mha, gated', GATED, 'LlamaForCausalLM', ''),
    'gated, gqa': ('gqa, rotary', GATED, 'LlamaForCausalLM', ''),
    'gated, mla': ('mla, rotary', GATED, 'LlamaForCausalLM', 'in place of 6'),
    'deepseek': ('deepseek', GATED, 'DeepseekV3ForCausalLM', ''),
    'deepseek without query latent': ('deepseek', GATED | dict(n_query_latent=None),
                                      'DeepseekV3ForCausalLM', ''),
    'deepseek, attention only': ('deepseek', dict(mlp=False, bias=False, latent_scale=False),
                                 'DeepseekV3ForCausalLM', ''),
}


@pytest.mark.parametrize('name', WRITTEN)
@pytest.mark.parametrize('ahead', [False, True])
def test_what_is_written_computes_the_same(name, ahead, tmp_path, program):
    """transformers gives the logits and the greedy text. Ids past the vocabulary are cut."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    of_family, settings, class_name, said = WRITTEN[name]
    model = member(of_family, vocab_size=20, **settings)
    for key, p in model.named_parameters():  # larger weights would enlarge rounding
        p.data *= 0.5 if 'ln_' not in key else 1
    if ahead:
        model = GPT_KAhead.from_gpt(model, k_ahead=3).eval()
    path = checkpoint_path(tmp_path, model.model_type)
    save(path, model)
    code, out, err = program(export_huggingface.main, path, tmp_path / 'hf')
    assert code == 0 and said in out and ('in place of' in out) == bool(said), out + err
    assert ('2 heads further ahead are left out' in out) == ahead
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    assert type(hf).__name__ == class_name
    idx = torch.randint(14, (4, 16))
    with torch.no_grad():
        logits = torch.stack([model.next_logits(idx[:, :t]) for t in range(1, 17)], dim=1)
        found = hf(idx).logits
    assert found.shape == (4, 16, 14)
    torch.testing.assert_close(found, logits[..., :14], atol=2e-5, rtol=0)
    ours = generate(model, idx[:, :4], 12, 14, top_k=1)
    theirs = hf.generate(idx[:, :4], attention_mask=torch.ones(4, 4), max_new_tokens=12,
                         do_sample=False, pad_token_id=0)
    assert torch.equal(theirs, ours)
    assert AutoTokenizer.from_pretrained(tmp_path / 'hf').encode('ab') == [2, 3]

    back = load_model(tmp_path / 'hf')
    assert type(back.model) is (GPT_MLA if 'Deepseek' in class_name else GPT)
    assert back.tokenizer.spec == CHARS and form_of(back.model.config) == hf.config.model_type
    torch.testing.assert_close(back.model(idx, idx)[0], logits[..., :14], atol=2e-5, rtol=0)


@pytest.mark.parametrize('name, settings, words', [
    ('mla, decoupled', {}, 'a DeepSeek-V3 with dense MLPs would, with latent_norm=True, '
                           "bias=False, mlp='gated' or mlp=False"),
    ('mla, normed', {}, "with rotary='decoupled', bias=False, mlp='gated' or mlp=False"),
    ('deepseek', dict(bias=False), "would, with mlp='gated' or mlp=False"),
    ('deepseek, each layer, attention only', dict(bias=False), 'one n_latent for all layers'),
    ('mha, gated', {}, 'a Llama would, with bias=False'),
    ('mha', GATED, "a Llama would, with rotary='all'")])
def test_what_has_no_class_says_what_would(name, settings, words, tmp_path, program):
    model = member(name, **settings)
    path = checkpoint_path(tmp_path, model.model_type)
    save(path, model)
    code, out, err = program(export_huggingface.main, path, tmp_path / 'hf')
    assert code == 2 and words in err and err.count('\n') == 1 and out == ''
    assert not (tmp_path / 'hf').exists()


@pytest.mark.parametrize('name', ['rotary', 'gqa, rotary', 'gated', 'deepseek'])
def test_a_run_starts_from_what_was_written(name, tmp_path, program, tiny_args):
    of_family, settings, *_ = WRITTEN[name]
    model = member(of_family, **settings)
    path = checkpoint_path(tmp_path, model.model_type)
    save(path, model)
    assert program(export_huggingface.main, path, tmp_path / 'hf')[0] == 0
    args = [arg for arg in tiny_args if not arg.startswith(('--n_', '--block_size'))]
    args.append(f'--init_from={tmp_path / "hf"}')
    code, out, err = program(lambda: train.main(type(model)), *args)
    assert code == 0 and 'unknown' not in out + err, err
    assert load_model(tmp_path / 'out').tokenizer.spec == CHARS
    other = GPT if isinstance(model, GPT_MLA) else GPT_MLA
    code, out, err = program(lambda: train.main(other), *args)
    assert code == 2 and 'which is no' in err and err.count('\n') == 1, err


@pytest.mark.parametrize('name, changes, words', [
    ('rotary', dict(use_parallel_residual=True), 'use_parallel_residual is True'),
    ('gqa, rotary', dict(sliding_window=8), 'sliding_window is 8'),
    ('gated', dict(tie_word_embeddings=True), 'tie_word_embeddings is True'),
    ('deepseek', dict(rope_interleave=True), 'rope_interleave is True'),
    ('deepseek', dict(first_k_dense_replace=1), 'first_k_dense_replace is 1'),
    ('mha', dict(model_type='mamba'), "'mamba', not one of gpt2")])
def test_a_variant_of_theirs_is_refused(name, changes, words, tmp_path, program, data_dir):
    of_family, settings, *_ = WRITTEN[name]
    model = member(of_family, **settings)
    path = checkpoint_path(tmp_path, model.model_type)
    save(path, model)
    assert program(export_huggingface.main, path, tmp_path / 'hf')[0] == 0
    config = tmp_path / 'hf' / 'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    code, out, err = program(train.main, f'--init_from={tmp_path / "hf"}',
                             f'--dataset={data_dir}')
    assert code == 2 and words in err and err.count('\n') == 1, err


def test_a_llama_that_is_not_centred_is_refused(tmp_path, program):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        hidden_size=16, num_attention_heads=2, head_dim=8, num_key_value_heads=2, vocab_size=14,
        num_hidden_layers=1, intermediate_size=42, rms_norm_eps=1e-5, pretraining_tp=1,
        bos_token_id=None, eos_token_id=None)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='RMS norms are no layer norms'):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('name', ['mha', 'query latent', 'gqa', 'rotary', 'gqa, rotary', 'gated',
                                  'deepseek'])
def test_transformer_lens_has_the_same_residual_streams(name, tmp_path, program):
    """TransformerLens 4 reads what was written. Where that has RMS norms, its stream is centred."""
    bridge = pytest.importorskip('transformer_lens.model_bridge')
    of_family, settings, *_ = WRITTEN[name]
    model = member(of_family, **settings)
    path = checkpoint_path(tmp_path, model.model_type)
    save(path, model)
    assert program(export_huggingface.main, path, tmp_path / 'hf')[0] == 0
    theirs = bridge.TransformerBridge.boot_transformers(str(tmp_path / 'hf'), device='cpu')
    idx = torch.randint(14, (2, 16))
    logits, cache = theirs.run_with_cache(idx)
    n_layer = model.config.n_layer
    streams = torch.stack([cache['blocks.0.hook_resid_pre'],
                           *(cache[f'blocks.{i}.hook_resid_post'] for i in range(n_layer))])
    wanted = residual_streams(model, idx)
    if form_of(model.config) in HAS_RMS_NORM:
        wanted = centred(wanted)
    torch.testing.assert_close(streams, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[:, -1], model.next_logits(idx), atol=1e-4, rtol=1e-4)
