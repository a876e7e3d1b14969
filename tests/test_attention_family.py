"""Every attention of the family: rotary positions, groups of heads, latents with norms."""

import re

import configurator

import pytest
import torch
from conftest import CHARS, ROOT, tiny_model
from family import EACH, FAMILY, member

import train
from generate import generate, new_cache
from model import GPT, rotate
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import build_model, read_checkpoint, save_checkpoint
from runtime.hugging_face import form_of
from runtime.tokenizer import make_tokenizer


@torch.no_grad()
def uncached_greedy(model, idx, n):
    for _ in range(n):
        idx = torch.cat([idx, model.next_logits(idx).argmax(-1, keepdim=True)], dim=1)
    return idx


@EACH
def test_decoding_with_a_cache_gives_the_uncached_text(name):
    """Twenty random prompts, each alone and all of one length together."""
    model = member(name).double()
    for seed in range(20):
        torch.manual_seed(seed)
        length = int(torch.randint(1, 9, ()))
        idx = torch.randint(14, (2, length))
        wanted = uncached_greedy(model, idx, 16 - length)
        assert torch.equal(generate(model, idx, 16 - length, 14, temperature=0), wanted)
        assert torch.equal(generate(model, idx[:1], 16 - length, 14, top_k=1), wanted[:1])


@EACH
@pytest.mark.parametrize('head', ['block', 'linear'])
def test_speculation_gives_the_uncached_text(name, head):
    model = member(name)
    ahead = GPT_KAhead.from_gpt(model, k_ahead=3, head=head).double().eval()
    for seed in range(20):
        torch.manual_seed(seed)
        length = int(torch.randint(1, 9, ()))
        idx = torch.randint(14, (3, length))
        wanted = uncached_greedy(model.double(), idx, 16 - length)
        assert torch.equal(generate(ahead, idx, 16 - length, 14, temperature=0), wanted)


@EACH
@torch.no_grad()
def test_a_prompt_in_chunks_has_the_same_logits(name):
    model = member(name).double()
    idx = torch.randint(14, (2, 11))
    wanted = model(idx, idx)[0]
    for chunks in ([4, 1, 3, 3], [1] * 11, [10, 1], [2, 9]):
        cache, logits = new_cache(model, 2, 11), []
        for part in idx.split(chunks, dim=1):
            logits.append(model(part, part, cache=cache)[0])
        torch.testing.assert_close(torch.cat(logits, 1), wanted, atol=1e-12, rtol=1e-12)


@EACH
@torch.no_grad()
def test_no_token_sees_a_later_one(name):
    model = member(name)
    idx = torch.randint(14, (1, 12))
    other = idx.clone()
    other[0, 7] = (idx[0, 7] + 1) % 14
    one, two = (model(ids, ids)[0] for ids in (idx, other))
    assert torch.equal(one[0, :7], two[0, :7]) and not torch.equal(one[0, 7:], two[0, 7:])


@EACH
def test_every_parameter_learns_and_checkpoints_come_back(name, tmp_path):
    model = member(name).train()
    idx = torch.randint(14, (4, 16))
    model(idx, idx.roll(-1, 1))[1].backward()
    still = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [key for key in still if not key.endswith('attn.key.bias')], still
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(path, model, make_tokenizer(CHARS), {}, 3)
    back = build_model(read_checkpoint(path), path).eval()
    assert back.config == model.config
    assert torch.equal(back(idx)[0], model.eval()(idx)[0])


@EACH
def test_cache_bytes_are_what_is_remembered(name):
    model = member(name)
    c, shapes = model.config, model.cache_shapes(3, 5)
    for layer, (per_layer, cache) in enumerate(zip(shapes, new_cache(model, 3, 5))):
        own = c.of_layer(layer)
        if isinstance(model, GPT_MLA):
            assert per_layer == [(3, 5, own.n_latent + (c.n_rotary or 0))]
        else:
            n = c.n_kv_head or c.n_head
            assert per_layer == [(3, n, 5, 16 // c.n_head)] * 2
        assert [tensor.shape for tensor in cache.tensors] == per_layer


def test_rotary_models_have_no_learned_positions():
    for name, (model_class, settings) in FAMILY.items():
        model = tiny_model(model_class, **settings)
        is_rotary = settings.get('rotary', 'none') != 'none'
        assert ('transformer.wpe.weight' in model.state_dict()) != is_rotary, name
        model.crop_block_size(8)
        assert model(torch.zeros(1, 8, dtype=torch.long))[0].shape == (1, 1, 14)
        n = sum(p.numel() for p in model.parameters())
        assert model.get_num_params() == n - (0 if is_rotary else 8 * 16)


def test_rotation_is_its_definition():
    """RoFormer, eq. 34, as complex numbers: pair i times e^(j position / base^(2 i / n))."""
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    for start, n in ((0, 12), (7, 8), (torch.tensor([[2], [9]]), 12), (3, 2)):
        turned = rotate(x[..., :n], start, 100.0)
        for b in range(2):
            for t in range(5):
                position = t + (start if isinstance(start, int) else int(start[b]))
                for i in range(n // 2):
                    a, z = i, n // 2 + i
                    angle = torch.tensor(position / 100.0 ** (2 * i / n), dtype=torch.float64)
                    wanted = (torch.complex(x[b, :, t, a], x[b, :, t, z])
                              * torch.polar(torch.ones_like(angle), angle))
                    torch.testing.assert_close(turned[b, :, t, a], wanted.real)
                    torch.testing.assert_close(turned[b, :, t, z], wanted.imag)
    half = rotate(x.bfloat16(), 1000, 100.0)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), rotate(x.bfloat16().double(), 1000, 100.0),
                               atol=0.02, rtol=0.01)


@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@torch.no_grad()
def test_groups_of_heads_are_multi_head_attention_with_shared_keys(n_kv_head):
    gqa = member('gqa', n_kv_head=n_kv_head).double()
    mha = tiny_model(GPT, n_head=4).double()
    state = gqa.state_dict()
    for name in [name for name in state if '.c_attn.' in name]:
        q, k, v = state[name].split((16, 4 * n_kv_head, 4 * n_kv_head))
        k, v = (part.unflatten(0, (n_kv_head, 4)).repeat_interleave(4 // n_kv_head, 0).flatten(0, 1)
                for part in (k, v))
        state[name] = torch.cat((q, k, v))
    mha.load_state_dict(state)
    idx = torch.randint(14, (2, 16))
    torch.testing.assert_close(gqa(idx, idx)[0], mha(idx, idx)[0], atol=1e-12, rtol=1e-12)


def test_n_kv_head_of_n_head_is_multi_head_attention():
    one, two = tiny_model(GPT), tiny_model(GPT, n_kv_head=2)
    idx = torch.randint(14, (2, 16))
    assert torch.equal(one(idx)[0], two(idx)[0])


@torch.no_grad()
def test_keys_and_values_start_with_the_spread_of_mhas():
    """So a comparison is not one of initialisations."""
    x = torch.randn(4000, 1, 256)
    sizes = dict(n_embd=256, n_head=4, bias=False)
    _, k, v = tiny_model(GPT, **sizes).transformer.h[0].attn.heads(x)
    wanted = k.std()
    torch.testing.assert_close(v.std(), wanted, rtol=0.05, atol=0)
    for settings in (dict(n_latent=64), dict(n_latent=64, latent_norm=True, latent_scale=True),
                     dict(n_latent=64, n_query_latent=32, latent_scale=True),
                     dict(n_latent=64, rotary='decoupled', n_query_latent=32)):
        attn = tiny_model(GPT_MLA, **sizes, **settings).transformer.h[0].attn
        q, k, v = attn.heads(x)
        for part in (q[..., :64], q[..., 64:], k[..., :64], k[..., 64:], v):
            if part.numel():
                torch.testing.assert_close(part.std(), wanted, rtol=0.12, atol=0)


@pytest.mark.parametrize('model_class, settings, message', [
    (GPT, dict(n_kv_head=3, n_head=4), 'n_kv_head=3 must divide n_head=4'),
    (GPT, dict(n_kv_head=0), 'n_kv_head=0 must divide'),
    (GPT, dict(n_head=16, rotary='all'), "rotary='all' turns pairs"),
    (GPT, dict(rotary='all', rotary_base=1.0), 'rotary_base=1.0 must be above 1'),
    (GPT_MLA, dict(n_kv_head=1), 'n_kv_head=1 is not for MLA'),
    (GPT_MLA, dict(rotary='decoupled', n_rotary=3), 'n_rotary=3 must be even'),
    (GPT_MLA, dict(rotary='decoupled', n_rotary=0), 'n_rotary=0 must be even'),
    (GPT_MLA, dict(n_rotary=4), "n_rotary=4 must be even, at least 2, and only with rotary='dec"),
    (GPT_MLA, dict(n_query_latent=17), 'n_query_latent=17 must be 1 to 16'),
    (GPT_MLA, dict(n_latent=(4, 4, 4)), 'n_latent=(4, 4, 4) must be at least 1, once or for each'),
    (GPT_MLA, dict(n_latent=(4, 0)), 'n_latent=(4, 0) must be at least 1'),
    (GPT_MLA, dict(n_latent=()), 'n_latent=() must be at least 1'),
    (GPT_KAhead, dict(rotary='decoupled'), "rotary='decoupled' is for attention='mla'"),
    (GPT_KAhead, dict(latent_norm=True), "latent_norm=True is for attention='mla'"),
    (GPT_KAhead, dict(n_query_latent=4), "n_query_latent=4 is for attention='mla'"),
    (GPT_KAhead, dict(attention='mla', n_kv_head=1), 'n_kv_head=1 is not for MLA')])
def test_a_combination_that_cannot_be_is_one_clear_line(model_class, settings, message):
    with pytest.raises(ValueError) as e:
        tiny_model(model_class, **settings)
    assert str(e.value).startswith(message) and '\n' not in str(e.value)


@pytest.mark.parametrize('program_main, option, words', [
    (train.main, '--n_kv_head=3', 'n_kv_head=3 must divide n_head=2'),
    (train.main, '--rotary=decoupled', "--rotary='decoupled' is for train_mla.py"),
    (train.main, '--rotary=yes', "--rotary='yes' must be none or all"),
    (train.main, '--n_rotary=8', 'unknown key --n_rotary: it is a key of train_mla.py'),
    (train.main, '--mlp=no', "--mlp='no' must be True, False or gated"),
    (lambda: train.main(GPT_MLA), '--n_latent=(8,8.5)', '--n_latent=8.5 must be a whole number'),
    (lambda: train.main(GPT_MLA), '--n_latent=8,8,8', 'n_latent=(8, 8, 8) must be'),
    (lambda: train.main(GPT_MLA), '--rotary=yarn', "'yarn' must be none, all or decoupled"),
    (lambda: train.main(GPT_KAhead), '--latent_scale=True', "latent_scale=True is for attention=")])
def test_the_trainers_say_so(program_main, option, words, program, tiny_args):
    code, out, err = program(program_main, *tiny_args, option)
    assert code == 2 and words in err and err.count('\n') == 1, err


@pytest.mark.parametrize('name', ['gqa, rotary', 'deepseek', 'mla, rotary',
                                  'mla, a latent for each layer', 'mha, attention only'])
def test_they_are_trained_resumed_and_reported(name, program, tiny_args, tmp_path):
    model_class, settings = FAMILY[name]
    options = [f'--{key}={value}' for key, value in settings.items()]

    def main():
        train.main(model_class)
    code, out, err = program(main, *tiny_args, *options, '--max_iters=3')
    assert code == 0, err
    code, out, err = program(main, *tiny_args, *options, '--init_from=resume')
    assert code == 0 and 'note' not in err, err
    without = [arg for arg in tiny_args if not arg.startswith('--n_')]
    code, out, err = program(main, *without, '--init_from=resume', '--max_iters=8')
    assert code == 0, err


@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('train_*.py')), ids=lambda p: p.name)
def test_every_config_trains_the_model_that_it_names(path):
    """The program in its first comment takes it, and no key is one that the model refuses."""
    command = re.search(r'(train\w*\.py) config/' + path.name, path.read_text() + 'train.py config/'
                        + path.name)
    model_class = {'train.py': GPT, 'train_mla.py': GPT_MLA, 'train_k_ahead.py': GPT_KAhead}[
        command[1]]
    _, settings = configurator.configure([str(path)], train.TrainConfig, model_class.config_class,
                                         bias=False)
    config = model_class.config_class(**settings)
    assert config.n_embd % config.n_head == 0
    if 'deepseek' in path.name:
        assert form_of(config) == 'deepseek_v3'
    if 'gqa' in path.name:
        assert config.n_kv_head < config.n_head
    if 'decoupled' in path.name or path.name == 'train_gpt2_mla_deepseek.py':
        assert config.n_latent + config.n_rotary == config.n_embd // 2


@EACH
def test_in_half_precision(name):
    """Under autocast, as in training, and with weights and cache in bfloat16, as in decoding."""
    model = member(name)
    idx = torch.randint(14, (3, 16))
    with torch.no_grad():
        wanted = model(idx, idx)[0]
    with torch.amp.autocast('cpu', torch.bfloat16):
        logits, loss = model(idx, idx)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert (logits - wanted).float().std() / wanted.std() < 0.05
    with torch.no_grad():
        model.bfloat16()
        cache, logits = new_cache(model, 3, 16), []
        for part in idx.split([9, 1, 1, 5], dim=1):
            logits.append(model(part, part, cache=cache)[0])
        assert (torch.cat(logits, 1).float() - wanted).std() / wanted.std() < 0.05
