"""What is measured by running a model: induction, patterns, IOI, ablation, similarity."""

import copy
from contextlib import contextmanager

from configurator import UserError

import numpy as np
import pytest
import torch
from analysis_models import (
    copying_model,
    edit_z,
    exact_mla,
    induction_model,
    random_model,
    same_function,
    subject,
)
from conftest import ALL, BOTH, CHARS, tiny_model
from torch.nn import functional as F

from analysis import (
    ablation,
    attention_patterns,
    induction_heads,
    induction_in_text,
    ioi,
    similarity,
)
from analysis.attribution import attribute
from analysis.program import read_heads
from analysis.record import BlockRecord, Taps, final_stream, record, run_from
from analysis.subject import Subject
from data.induction.prepare import CHARACTERS, draw_sequences
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.dataset import write_splits
from runtime.tokenizer import make_tokenizer


def letters(model):
    tokenizer = make_tokenizer([chr(97 + i) for i in range(model.config.vocab_size)])
    return Subject(model, tokenizer, '', 'a/model')


# induction and patterns

def two_ahead(model):
    return GPT_KAhead.from_gpt(model, k_ahead=2)


@pytest.mark.parametrize('convert', [lambda model: model, exact_mla, two_ahead])
def test_the_induction_model_is_found_out(convert):
    s = letters(convert(induction_model()))
    scores = induction_heads.analyse(s, induction_heads.Config(sequences=6)).scores
    assert scores[1, 0] > 0.99 and np.delete(scores.ravel(), 4).max() < 0.1
    found = attention_patterns.analyse(s, attention_patterns.Config(sequences=6))
    assert found.previous[0, 0] > 0.99 and np.delete(found.previous.ravel(), 0).max() < 0.4
    assert found.relative_entropy[0, 1] == pytest.approx(1, abs=1e-6)
    assert found.relative_entropy[0, 0] < 0.01
    assert found.entropy[0, 1] == pytest.approx(np.mean(np.log(np.arange(2, 17))), abs=1e-5)
    # even attention: 1 / (position + 1)
    even = 1 / np.arange(1, 17)
    for kind, expected in (('first', even[1:]), ('current', even[1:]), ('previous', even[1:]),
                           ('duplicate', even[8:])):
        assert getattr(found, kind)[1, 3] == pytest.approx(expected.mean(), abs=1e-6)


@ALL
def test_scores_are_means_over_the_patterns_as_defined(model_class, monkeypatch):
    model = random_model(model_class)
    config = induction_heads.Config(sequences=5, length=6)
    monkeypatch.setattr(induction_heads, 'batch_size', lambda *a: 2)
    result = induction_heads.analyse(subject(model), config)
    idx = induction_heads.repeated_tokens(len(CHARS), 5, 6, config.seed)
    for block in record(model, idx):
        for head in range(2):
            each = []
            for row, pattern in zip(idx.tolist(), block.pattern()[:, head]):
                total = 0
                for i in range(6, 12):
                    total += pattern[i, row.index(row[i]) + 1].item()
                each.append(total / 6)
            assert result.scores[block.layer, head] == pytest.approx(np.mean(each), abs=1e-6)
            assert result.spread[block.layer, head] == pytest.approx(np.std(each), abs=1e-6)


def test_two_copies_that_do_not_fit_are_shortened_and_too_short_a_context_is_an_error():
    config = induction_heads.Config(sequences=2)
    assert induction_heads.analyse(subject(tiny_model(GPT)), config).length == 8
    with pytest.raises(UserError, match='block_size=3'):
        induction_heads.analyse(subject(tiny_model(GPT, block_size=3)), induction_heads.Config())


def test_even_attention_scores_at_chance():
    model = random_model(GPT)
    for block in model.transformer.h:
        block.attn.c_attn.weight.data[:32] = 0  # queries and keys
        block.attn.c_attn.bias.data[:32] = 0
    result = induction_heads.analyse(subject(model), induction_heads.Config())
    assert result.scores == pytest.approx(np.full((2, 2), result.chance))
    assert result.shifted == pytest.approx(np.full(result.shifted.shape, result.chance_shifted))


def test_names_of_heads():
    assert read_heads('heads', '0.1, 1.0', tiny_model(GPT).config) == [(0, 1), (1, 0)]
    for wrong in ('2.0', '0.2', '1', 'x.y', '', '-1.0', '²2.0'):
        with pytest.raises(UserError, match='heads='):
            read_heads('heads', wrong, tiny_model(GPT).config)


def test_patterns_are_computed_in_chunks(monkeypatch):
    """No more than 64 MB of them at once, and of one sequence at least."""
    sizes, pattern = [], BlockRecord.pattern
    monkeypatch.setattr(BlockRecord, 'pattern',
                        lambda self: sizes.append(self.q.shape) or pattern(self))
    s = subject(tiny_model(GPT, block_size=512, n_head=16))
    attention_patterns.analyse(s, attention_patterns.Config(sequences=5, length=256))
    assert len(sizes) == 2 * 2
    assert max(B * n_head * T * T * 4 for B, n_head, T, _ in sizes) <= 2 ** 26
    assert induction_heads.batch_size(s.model, 10 ** 4) == 1


# indirect objects

def gpt2_subject(model):
    return Subject(model, make_tokenizer('gpt2'), '', 'a/model')


def gpt2_like(model_class=GPT):
    return gpt2_subject(random_model(model_class, vocab_size=50257, block_size=32))


def test_prompts_say_what_they_should():
    s = gpt2_like()
    clean, corrupted = ioi.make_prompts(s, 2 * len(ioi.TEMPLATES), seed=1)
    decode = s.tokenizer.decode
    assert len({decode(row) for row in clean.idx.tolist()}) == 2 * len(ioi.TEMPLATES)
    for i in range(2 * len(ioi.TEMPLATES)):
        end, io, subject_name = clean.end[i] + 1, decode([clean.io[i]]), decode([clean.s[i]])
        text, other = decode(clean.idx[i, :end].tolist()), decode(corrupted.idx[i, :end].tolist())
        assert text.endswith(' to') and text.count(io) == 1 and text.count(subject_name) == 2
        assert (text.index(io) < text.index(subject_name)) == (i < len(ioi.TEMPLATES))
        changed = clean.idx[i] != corrupted.idx[i]
        named = (clean.roles[0] | clean.roles[1] | clean.roles[3])[i]
        assert torch.equal(changed, named) and named.sum() == 3
        assert io not in other and subject_name not in other
        s1 = clean.roles[1, i].nonzero().item()
        assert clean.roles[2, i].nonzero().item() == s1 + 1
        assert clean.roles[4, i].nonzero().item() == end - 1
        assert clean.roles[3, i].nonzero().item() > s1
        # each token of the prompt has one role, the padding has none
        assert torch.equal(clean.roles[:, i].sum(0), (torch.arange(clean.idx.size(1)) < end).long())


@pytest.mark.parametrize('count, wanted', [(2, 8), (7, 4), (8, 3), (16, 8)])
def test_some_of_the_prompts_are_of_both_orders(count, wanted):
    clean, corrupted = ioi.make_prompts(gpt2_like(), count, seed=1)
    for prompts in (clean.first(wanted), corrupted.first(wanted)):
        n = min(count, wanted)
        assert len(prompts.idx) == len(prompts.io) == prompts.roles.size(1) == n
        assert len({tuple(row) for row in prompts.idx.tolist()}) == n
    positions = clean.first(wanted).roles.int().argmax(-1)  # of IO and S1
    assert (positions[0] < positions[1]).sum() == -(-min(count, wanted) // 2)
    result = ioi.analyse(gpt2_like(), ioi.Config(prompts=count, patch_prompts=wanted))
    assert np.isfinite(result.clean) and np.isfinite(result.corrupted)


def test_all_names_are_single_tokens():
    names = ioi.single_token_names(gpt2_like().tokenizer)
    assert len(names) == len(set(names)) == len(ioi.NAMES)


@BOTH
def test_direct_logit_attribution_adds_up_to_the_logit_difference(model_class):
    s = gpt2_like(model_class)
    prompts, _ = ioi.make_prompts(s, 6, seed=1)
    parts = attribute(s.model, prompts.idx, prompts.end, ioi.towards_io(s.model, prompts))
    assert parts.heads.shape == (2, 2, 6)
    rest = parts.embedding + parts.positions + parts.biases
    assert torch.allclose(parts.heads.sum((0, 1)) + parts.mlps.sum(0) + rest, parts.total)
    for i in range(6):
        logits = s.model.next_logits(prompts.idx[i:i + 1, :prompts.end[i] + 1])[0]
        expected = (logits[prompts.io[i]] - logits[prompts.s[i]]).item()
        assert parts.total[i].item() == pytest.approx(expected, abs=1e-4)
    result = ioi.analyse(s, ioi.Config(prompts=6, patch_prompts=0))
    total = result.attribution.sum() + result.mlp_attribution.sum() + result.rest
    assert total == pytest.approx(result.logit_difference)
    assert np.isnan(result.restored).all()


def test_attribution_of_a_head_is_what_is_missing_without_it_on_the_direct_path():
    """In the last layer without an MLP there is no other path. With the norm's scale held fixed,
    the logit difference changes by the head's attribution when its output is taken away."""
    s = gpt2_like()
    s.model.transformer.h[1].mlp.c_proj.weight.data.zero_()
    prompts, _ = ioi.make_prompts(s, 4, seed=1)
    direction = ioi.towards_io(s.model, prompts)
    heads = attribute(s.model, prompts.idx, prompts.end, direction).heads
    with torch.no_grad():
        *_, block = record(s.model, prompts.idx)
        W_O = s.model.transformer.h[1].attn.head_weights()[-1]
        x = ioi.at_end(block.after, prompts)
        without = x - ioi.at_end(block.z[:, 1], prompts) @ W_O[1]
        scale = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        ln_f = s.model.transformer.ln_f

        def difference(x):
            x = (x - x.mean(-1, keepdim=True)) / scale * ln_f.weight + ln_f.bias
            W_U = s.model.lm_head.weight
            return ((W_U[prompts.io] - W_U[prompts.s]) * x).sum(-1)
    assert torch.allclose((difference(x) - difference(without)).double(), heads[1, 1], atol=1e-4)


@BOTH
def test_patching_everything_restores_the_clean_difference(model_class):
    s = gpt2_like(model_class)
    clean, corrupted = ioi.make_prompts(s, 4, seed=1)
    clean_z = [block.z for block in record(s.model, clean.idx)]
    with torch.no_grad():
        x = s.model.embed(corrupted.idx)
    x = final_stream(run_from(s.model, x, 0, edit_z(s.model, lambda layer, z: clean_z[layer])))
    expected = final_stream(record(s.model, clean.idx))
    assert torch.allclose(ioi.logit_differences(s.model, x, clean),
                          ioi.logit_differences(s.model, expected, clean), atol=1e-4)


def test_patching_one_head_is_what_a_hook_does():
    s = gpt2_like()
    clean, corrupted = ioi.make_prompts(s, 4, seed=1)
    results, before, after = ioi.patch(s.model, clean, corrupted)
    assert results.shape == (2, 2, len(ioi.ROLES), 4)
    seen, c_proj = {}, s.model.transformer.h[1].attn.c_proj

    def difference(i, idx, hook=None):
        handle = c_proj.register_forward_pre_hook(hook) if hook else None
        with torch.no_grad():
            logits = s.model.next_logits(idx[i:i + 1, :clean.end[i] + 1])[0]
        if handle:
            handle.remove()
        return (logits[clean.io[i]] - logits[clean.s[i]]).item()
    for i in range(4):
        assert before[i].item() == pytest.approx(difference(i, clean.idx), abs=1e-4)
        assert after[i].item() == pytest.approx(difference(i, corrupted.idx), abs=1e-4)

        def keep(module, args):
            seen['z'] = args[0].clone()
        difference(i, clean.idx, keep)
        for role in (1, 4, 5):
            def change(module, args):
                z = args[0].clone()
                where = clean.roles[role, i, :z.size(1)]
                z[0, where, 8:] = seen['z'][0, where, 8:]  # head 1 of two, 8 numbers each
                return (z,)
            expected = difference(i, corrupted.idx, change)
            assert results[1, 1, role, i].item() == pytest.approx(expected, abs=1e-4)


def test_ioi_says_whom_it_cannot_serve():
    with pytest.raises(UserError, match='one token'):
        ioi.analyse(subject(tiny_model(GPT)), ioi.Config())
    with pytest.raises(UserError, match='block_size=8'):
        ioi.analyse(gpt2_subject(tiny_model(GPT, vocab_size=50257, block_size=8)), ioi.Config())


# ablation

def text_subject(model, data_dir):
    """A Subject whose text is that of data_dir."""
    return Subject(model, make_tokenizer(CHARS), str(data_dir), 'a/model')


@ALL
def test_ablation_is_the_loss_with_the_heads_weights_at_zero(model_class, data_dir):
    model = random_model(model_class, block_size=32)
    s = text_subject(model, data_dir)
    result = ablation.analyse(s, ablation.Config(max_tokens=320))
    idx = torch.cat(s.windows('', 320, 32))
    assert len(idx) == result.n_windows == 10 and result.positions == (2, 30)

    def measure(model, edit=None):
        logits = model.unembed(final_stream(record(model, idx[:, :-1], edit)))
        losses = F.cross_entropy(logits.transpose(1, 2), idx[:, 1:], reduction='none')
        return losses.mean().item(), (losses[:, 30] - losses[:, 2]).mean().item()
    with torch.no_grad():
        loss, in_context = measure(model)
        assert result.loss == pytest.approx(loss, abs=1e-5)
        assert result.in_context == pytest.approx(in_context, abs=1e-5)
        for layer, head in np.ndindex(2, 2):
            without = copy.deepcopy(model)
            without.transformer.h[layer].attn.c_proj.weight.data[:, 8 * head:8 * head + 8] = 0
            rise, change = np.subtract(measure(without), (loss, in_context))
            assert result.zero_loss[layer, head] == pytest.approx(rise, abs=1e-5)
            assert result.zero_in_context_error[layer, head] > 0
            assert result.zero_in_context[layer, head] == pytest.approx(change, abs=1e-4)

            def at_mean(number, z):
                if number == layer:
                    z = z.clone()
                    z[:, head] = [b for b in record(model, idx[:, :-1])][layer].z[:, head].mean(0)
                return z
            rise, change = np.subtract(measure(model, edit_z(model, at_mean)), (loss, in_context))
            assert result.mean_loss[layer, head] == pytest.approx(rise, abs=1e-5)
            assert result.mean_in_context[layer, head] == pytest.approx(change, abs=1e-4)

            def resampled(number, z):
                if number == layer:
                    z = z.clone()
                    z[:, head] = list(record(model, idx.roll(-1, 0)[:, :-1]))[layer].z[:, head]
                return z
            rise, _ = np.subtract(measure(model, edit_z(model, resampled)), (loss, in_context))
            assert result.resample_loss[layer, head] == pytest.approx(rise, abs=1e-5)


@contextmanager
def writes(modules, value_of):
    """Modules return value_of(number, value) in the place of value."""
    handles = [module.register_forward_hook(lambda _, x, y, i=i: value_of(i, y))
               for i, module in enumerate(modules)]
    yield
    for handle in handles:
        handle.remove()


@BOTH
def test_ablation_of_mlps_and_layers_is_what_hooks_do(model_class, data_dir):
    model = random_model(model_class)
    s = text_subject(model, data_dir)
    result = ablation.analyse(s, ablation.Config(max_tokens=160))
    idx = torch.cat(s.windows('', 160, 16))

    def loss():
        with torch.no_grad():
            logits = model.unembed(model.last_stream(idx[:, :-1]))
        return F.cross_entropy(logits.transpose(1, 2), idx[:, 1:]).item()
    whole = loss()
    for layer, block in enumerate(model.transformer.h):
        for column, modules in ((2, [block.mlp]), (3, [block.attn, block.mlp])):
            seen = {}
            with writes(modules, lambda i, y: seen.setdefault(i, y)):
                loss()
            changes = {'zero': lambda i, y: 0 * y,
                       'mean': lambda i, y: seen[i].mean(0).expand_as(y),
                       'resample': lambda i, y: seen[i].roll(-1, 0)}
            for method, change in changes.items():
                with writes(modules, change):
                    rise = loss() - whole
                got = getattr(result, f'{method}_loss')[layer, column]
                assert got == pytest.approx(rise, abs=1e-5), (layer, column, method)
    assert f'layer {np.nanargmax(result.mean_loss[:, 3])}' in ablation.table(result)


def test_a_screening_measures_the_heads_that_matter(data_dir, monkeypatch):
    model = random_model(GPT, n_layer=3)
    s = text_subject(model, data_dir)
    everything = ablation.analyse(s, ablation.Config(max_tokens=160))
    assert everything.screened is None and np.isfinite(everything.mean_loss).all()
    monkeypatch.setattr(ablation, 'MOST_PARTS', 4)
    one = ablation.analyse(s, ablation.Config(max_tokens=160, screen=32, top=2))
    idx = torch.cat(s.windows('', 160, 16))[:3]  # two windows, and one to resample from
    assert np.isfinite(one.mean_loss[:, :2]).sum() == 2
    chosen = np.isfinite(one.mean_loss[:, :2])
    assert one.mean_loss[:, :2][chosen] == pytest.approx(everything.mean_loss[:, :2][chosen])
    assert abs(one.screened[:, :2][chosen]).min() >= abs(one.screened[:, :2][~chosen]).max()
    means = ablation.mean_written(model, [idx[:, :-1] for idx in s.windows('', 160, 16)])

    def loss(taps=None):
        logits = model.unembed(final_stream(record(model, idx[:2, :-1], taps)))
        return F.cross_entropy(logits.transpose(1, 2), idx[:2, 1:]).item()
    with torch.no_grad():
        for layer in range(3):
            taps = Taps({f'blocks.{layer}.mlp_out': lambda y: means[layer]['mlp_out'].expand_as(y)})
            assert one.mean_loss[layer, 2] == pytest.approx(loss(taps) - loss(), abs=1e-5)
            assert one.mean_loss[layer, 2] == one.screened[layer, 2]
    assert 'screened on 32 tokens' in ablation.table(one)
    ablation.plot({'one': one})
    full = ablation.analyse(s, ablation.Config(max_tokens=160, screen=0))
    assert full.screened is None and np.isfinite(full.mean_loss).all()


def test_one_window_has_nothing_to_resample_from(data_dir):
    s = text_subject(random_model(GPT), data_dir)
    result = ablation.analyse(s, ablation.Config(max_tokens=16))
    assert result.n_windows == 1 and np.isnan(result.resample_loss).all()
    assert 'resampling is unknown' in ablation.table(result)


def test_a_head_that_writes_a_constant_matters_only_when_it_is_put_to_zero(data_dir):
    model = random_model(GPT)
    attn = model.transformer.h[0].attn
    attn.c_attn.weight.data[32:40] = 0  # values of head 0.0: the bias alone is left
    attn.c_attn.bias.data[32:40] = 1
    result = ablation.analyse(text_subject(model, data_dir), ablation.Config(max_tokens=160))
    assert abs(result.zero_loss[0, 0]) > 0.01 and abs(result.mean_loss[0, 0]) < 1e-5


def test_in_context_positions():
    assert ablation.in_context_positions(512) == (49, 499)  # tokens 50 and 500
    assert ablation.in_context_positions(1024) == (99, 999)
    with pytest.raises(UserError, match='too short'):
        ablation.in_context_positions(8)


# similarity

def test_cka_is_its_definition_and_does_not_feel_rotation_and_scale():
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(30, n, dtype=torch.float64, generator=generator) for n in (8, 5))
    H = torch.eye(30, dtype=torch.float64) - 1 / 30

    def hsic(K, L):
        return torch.trace(K @ H @ L @ H)
    K, L = X @ X.T, Y @ Y.T
    expected = (hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()).item()
    def cka(X, Y):
        return similarity.cka_table([X], [Y]).item()
    assert cka(X, Y) == pytest.approx(expected) and 0.05 < expected < 0.95
    Q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator)).Q
    assert cka(X, 3 * X @ Q + 5) == pytest.approx(1)
    assert cka(X, torch.ones(30, 4, dtype=torch.float64)) == 0
    both = np.array([[expected, 1], [1, expected]])
    assert similarity.cka_table([X, Y], [Y, X]) == pytest.approx(both)


def test_the_same_function_in_other_weights_is_the_same_and_swapped_heads_are_matched(data_dir):
    model = random_model(GPT)
    other = same_function(model)
    attn = other.transformer.h[1].attn
    for tensor in (*attn.c_attn.weight.data.split(16), *attn.c_attn.bias.data.split(16),
                   attn.c_proj.weight.data.T):
        tensor.copy_(tensor.roll(8, dims=0))
    pair = text_subject(model, data_dir), text_subject(other, data_dir)
    result = similarity.compare(*pair, similarity.Config(max_tokens=320))
    assert result.residual.diagonal() == pytest.approx(np.ones(3), abs=1e-4)
    assert result.residual == pytest.approx(result.residual_self, abs=1e-4)
    matches = {(mine, others) for mine, others, _ in result.matches}
    assert matches == {('0.0', '0.0'), ('0.1', '0.1'), ('1.0', '1.1'), ('1.1', '1.0')}
    assert min(score for *_, score in result.matches) == pytest.approx(1, abs=1e-3)
    assert result.residual[0, 2] < 0.95 and result.n_tokens == 320


def test_heads_are_compared_by_what_they_write(data_dir):
    models = random_model(GPT), random_model(GPT_MLA, seed=3)
    s, other = (text_subject(model, data_dir) for model in models)
    result = similarity.compare(s, other, similarity.Config(max_tokens=160))
    written = []
    for m in models:
        block = list(record(m, torch.cat(s.windows('', 160, 16))[:, :-1]))[1]
        with torch.no_grad():
            out = block.z[:, 1] @ m.transformer.h[1].attn.head_weights()[-1][1]
        written.append((out - out.mean(-1, keepdim=True)).flatten(0, 1))
    expected = similarity.cka_table(written[:1], written[1:]).item()
    assert result.heads[3, 3] == pytest.approx(expected, abs=1e-4)


def test_chance_is_what_is_left_when_the_tokens_do_not_match(data_dir):
    s = text_subject(random_model(GPT, n_layer=1), data_dir)
    few, many = (similarity.compare(s, s, similarity.Config(max_tokens=n)) for n in (64, 512))
    assert few.residual.diagonal() == pytest.approx(np.ones(2))
    assert (many.residual_chance < few.residual_chance).all() and many.residual_chance.max() < 0.2
    with pytest.raises(UserError, match='max_tokens=32 or more'):
        similarity.compare(s, s, similarity.Config(max_tokens=16))


def test_models_that_read_other_tokens_cannot_be_compared(data_dir):
    other = Subject(tiny_model(GPT), make_tokenizer(CHARS[::-1]), '', 'b/model')
    with pytest.raises(UserError, match='same tokens'):
        similarity.compare(text_subject(tiny_model(GPT), data_dir), other, similarity.Config())


# published figures

def published_gpt2():
    """GPT-2's weights where they lie on this disk; the test is skipped where they do not."""
    import transformers
    try:
        transformers.GPT2LMHeadModel.from_pretrained('gpt2', local_files_only=True)
    except OSError:
        pytest.skip("GPT-2's weights are not on this disk")
    return gpt2_subject(GPT.from_pretrained('gpt2').eval())


def test_gpt2_has_the_published_induction_heads():
    scores = induction_heads.analyse(published_gpt2(), induction_heads.Config()).scores
    published = {(5, 1): .89, (5, 5): .92, (6, 9): .91, (7, 2): .83, (7, 10): .91}
    for place, score in published.items():
        assert scores[place] == pytest.approx(score, abs=0.06)
    above = {(layer, head) for layer, head in np.argwhere(scores > 0.4)}
    assert above == {*published, (5, 0), (9, 6), (9, 9), (10, 0), (10, 1)}


def test_gpt2_identifies_indirect_objects_as_published():
    """Wang et al. 2023: 3.56 nats and 99.3 % over templates of their own."""
    result = ioi.analyse(published_gpt2(), ioi.Config(patch_prompts=0))
    assert result.logit_difference == pytest.approx(3.56, abs=0.8) and result.share > 0.97
    name_movers = {(9, 9), (9, 6), (10, 0)}
    assert name_movers & {pair for pair in ioi.top_heads(result.attribution, 3)}


# induction in a text


def test_repeats_are_those_of_the_definition():
    idx = torch.randint(6, (5, 13), generator=torch.Generator().manual_seed(0))
    behind, kinds = induction_in_text.find_repeats(idx)
    for b, window in enumerate(idx.tolist()):
        for t in range(12):
            places = [j for j in range(t) if window[j] == window[t]]
            expected = places[-1] + 1 if places else 0
            assert behind[b, t] == expected
            is_repeat = bool(places) and window[expected] == window[t + 1]
            came = window[t + 1] in window[:t + 1]
            assert [bool(kinds[kind][b, t]) for kind in ('repeat', 'elsewhere', 'new')] == [
                is_repeat, came and not is_repeat, not came]


@pytest.fixture
def stretches(tmp_path):
    """A dataset of sequences in which a stretch comes twice, for copying_model."""
    ids, _ = draw_sequences('stretch', 300, 33, 40, 0)
    write_splits(tmp_path, ids[:100].ravel(), ids[100:].ravel(), make_tokenizer(CHARACTERS[:40]),
                 33)
    return str(tmp_path)


@pytest.mark.parametrize('convert', [lambda m: m, exact_mla], ids=['mha', 'mla'])
def test_a_head_that_does_induction_in_a_text_is_told_and_is_the_cause(convert, stretches):
    model = convert(copying_model(1))
    s = Subject(model, make_tokenizer(CHARACTERS[:40]), stretches, 'a/model')
    result = induction_in_text.analyse(s, induction_in_text.Config())
    assert result.named == ['1.0'] and result.n_windows == 200
    assert result.attention[1, 0] > 0.7 and result.expected[1, 0] < 0.15
    others = np.delete((result.attention - result.expected).ravel(), 4)
    assert (abs(others) < 0.05).all()
    assert result.rise['repeat'] > 1 and result.rise['new'] < 0  # which it takes for repeats
    assert result.rise['difference'] > 10 * result.error['difference'] > 0
    circuit = result.alone[[0, 0, 1], [0, 1, 0]]
    assert circuit[0] > 0.5 and circuit[2] == pytest.approx(result.rise['difference'])
    assert abs(np.delete(result.alone.ravel(), [0, 1, 4])).max() < 1e-6
    assert sum(kind['count'] for kind in result.kinds.values()) == pytest.approx(
        result.shares['repeat'] * 200 * 32)
    assert '1.0' in induction_in_text.table(result)


def test_a_head_that_knows_no_tokens_attends_as_expected(stretches):
    model = tiny_model(GPT, block_size=32, vocab_size=40)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:2 * model.config.n_embd] = 0
            block.attn.c_attn.bias.zero_()
    s = Subject(model, make_tokenizer(CHARACTERS[:40]), stretches, 'a/model')
    result = induction_in_text.analyse(s, induction_in_text.Config())
    assert np.allclose(result.attention, result.expected, atol=1e-6) and result.named == []
    assert (result.attention > 0.03).all()
    assert 'no head behind the first layer' in induction_in_text.table(result)


def test_errors_are_those_of_draws():
    """Values that the places of a window share in part, and of which repeats have 0.5 more than
    the same token from elsewhere. Frequent repeats are of tokens whose values are low."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(300):
        targets = torch.randint(5, (64, 10), generator=generator)
        repeat = torch.rand(64, 10, generator=generator) < 0.6 - 0.1 * targets
        values = torch.randn(64, 10, generator=generator) + torch.randn(64, 1, generator=generator)
        values = (values + 2 * targets + 0.5 * repeat).double()
        found.append(induction_in_text.rises(values, targets,
                                             {'repeat': repeat, 'elsewhere': ~repeat}))
    means = {kind: np.array([means[kind] for means, _ in found]) for kind in found[0][0]}
    for kind, values in means.items():
        assert np.mean([errors[kind] for _, errors in found]) == pytest.approx(values.std(), rel=.1)
    assert abs(means['difference'].mean() - 0.5) < 4 * means['difference'].std() / 300 ** 0.5
    assert (means['repeat'] - means['elsewhere']).mean() < -0.2  # which other tokens make


def test_a_context_without_room_for_copies_is_refused(stretches):
    model = tiny_model(GPT, block_size=3, vocab_size=40)
    with pytest.raises(UserError, match='block_size=3 has no room'):
        induction_in_text.analyse(Subject(model, make_tokenizer(CHARACTERS[:40]), stretches, 'a'),
                                  induction_in_text.Config())


@pytest.mark.parametrize('text, kind', [(' the', 'begins a word'), ('ing', 'in a word'),
                                        ('HAM', 'capitals'), (':\n', 'line break'), (',', 'other'),
                                        ('I', 'in a word'), (' ', 'other')])
def test_kinds_of_tokens(text, kind):
    assert induction_in_text.kind_of(text) == kind
