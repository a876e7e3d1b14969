"""The notebook's runs: what is read and edited by name is what hooks written by hand read and edit,
in float64, for every attention."""

import copy
from contextlib import ExitStack, contextmanager

from configurator import UserError

import pytest
import torch
from analysis_models import random_model, subject
from conftest import CHARS, save_hugging_face, tiny_model
from family import EACH, FAMILY, member

import analysis
import model as model_file
import model_mla
from analysis import at
from analysis.record import repeated_tokens
from analysis.subject import Subject
from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import save_checkpoint
from runtime.tokenizer import make_tokenizer

TEXT = 'abcabdab cab'


def double(name):
    return subject(member(name).double())


@contextmanager
def hook(module, change, reads=False):
    """Change what a module returns, or reads."""
    if reads:
        handle = module.register_forward_pre_hook(lambda _, x: (change(x[0]), *x[1:]))
    else:
        handle = module.register_forward_hook(lambda _, x, y: change(y))
    yield
    handle.remove()


def logits(s, text, *contexts):
    """All logits of the model's own forward, with hooks by hand in place."""
    idx = s.read_text(text)
    with torch.no_grad(), ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return s.model.unembed(s.model.last_stream(idx))


def scale(value):
    return -1.5 * value + 0.3


def by_hand(s, layer):
    """A context for each edit by scale, by the name of what is edited."""
    block, c = s.model.transformer.h[layer], s.model.config
    attn = block.attn
    found = {'resid_pre': [hook(block, scale, reads=True)], 'resid_post': [hook(block, scale)],
             'ln1.out': [hook(block.ln_1, scale)], 'attn_out': [hook(attn, scale)],
             'attn.z': [hook(attn.c_proj, scale, reads=True)]}
    if block.mlp:
        found |= {'ln2.out': [hook(block.ln_2, scale)], 'mlp_out': [hook(block.mlp, scale)],
                  'mlp.post': [hook(block.mlp.c_proj, scale, reads=True)]}
        gate = block.mlp.c_gate if block.mlp.is_gated else block.mlp.c_fc
        found['mlp.pre'] = [hook(gate, scale)]
        if block.mlp.is_gated:
            found['mlp.pre_linear'] = [hook(block.mlp.c_fc, scale)]
    if isinstance(s.model, GPT_MLA):
        found |= {'attn.v': [hook(attn.value, scale)],
                  'attn.latent': [hook(attn.key, scale, True), hook(attn.value, scale, True)]}
        if attn.query_enc:
            found['attn.q_latent'] = [hook(attn.query, scale, reads=True)]
        if not attn.n_rotary:
            found |= {'attn.q': [hook(attn.query, scale)], 'attn.k': [hook(attn.key, scale)]}
    else:
        first, last = c.n_embd, c.n_embd + attn.n_kv_head * c.head_dim
        parts = {'q': slice(first), 'k': slice(first, last), 'v': slice(last, None)}
        for name, part in parts.items():
            def change(y, part=part):
                y = y.clone()
                y[..., part] = scale(y[..., part])
                return y
            found[f'attn.{name}'] = [hook(attn.c_attn, change)]
    return found


@EACH
def test_edits_are_those_of_hooks_by_hand(name):
    s = double(name)
    plain = logits(s, TEXT)
    assert torch.allclose(s.run(TEXT).logits, plain, atol=1e-10)
    for layer in (0, 1):
        for edited, contexts in by_hand(s, layer).items():
            wanted = logits(s, TEXT, *contexts)
            run = s.run(TEXT, edit={f'blocks.{layer}.{edited}': scale})
            assert torch.allclose(run.logits, wanted, atol=1e-10), (layer, edited)
            assert (wanted - plain).abs().max() > 1e-4, (layer, edited)


@EACH
def test_what_is_read_is_what_passes_by(name):
    s = double(name)
    seen = {}

    def keep(key):
        def change(value):
            seen[key] = value.clone()
            return value
        return change
    for layer, block in enumerate(s.model.transformer.h):
        pairs = {f'blocks.{layer}.resid_pre': hook(block, keep(f'{layer}.resid_pre'), True),
                 f'blocks.{layer}.attn_out': hook(block.attn, keep(f'{layer}.attn_out')),
                 f'blocks.{layer}.attn.z': hook(block.attn.c_proj, keep(f'{layer}.attn.z'), True)}
        logits(s, TEXT, *pairs.values())
        for asked in pairs:
            got, wanted = s.run(TEXT)[asked], seen[asked.removeprefix('blocks.')]
            if asked.endswith('.z'):
                got = got.transpose(1, 2).flatten(2)
            assert torch.allclose(got, wanted, atol=1e-10), asked
    run = s.run(TEXT)
    for layer in range(s.model.config.n_layer):
        everything = run[f'blocks.{layer}.*']
        part = {key.removeprefix(f'blocks.{layer}.'): value for key, value in everything.items()}
        pattern = part['attn.pattern']
        assert torch.allclose(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
        assert pattern.triu(1).abs().max() == 0
        n = s.model.config.n_head // part['attn.v'].size(1)
        z = pattern @ part['attn.v'].repeat_interleave(n, 1)
        assert torch.allclose(part['attn.z'], z, atol=1e-10)
        bias = s.model.transformer.h[layer].attn.c_proj.bias
        total = part['attn.result'].sum(1) + bias
        assert torch.allclose(total, part['attn_out'], atol=1e-10)
        assert torch.allclose(part['resid_pre'] + part['attn_out'], part['resid_mid'], atol=1e-10)


def naive_attend(change):
    """model.attend by its definition, with a pattern or scores that are changed."""
    def attend(q, k, v, mask=None, dropout_p=0.0):
        n, T = q.size(1) // k.size(1), q.size(2)
        k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
        scores = torch.einsum('bhtd,bhsd->bhts', q, k) / q.size(-1) ** 0.5
        later = torch.ones(T, T).triu(1).bool()
        y = change(scores.masked_fill(later, -torch.inf)) @ v
        return y.transpose(1, 2).flatten(2)
    return attend


@EACH
def test_patterns_and_scores_are_edited_as_their_definition_says(name, monkeypatch):
    s = double(name)
    edits = {'attn.pattern': lambda scores: scale(scores.softmax(-1)),
             'attn.scores': lambda scores: scale(scores).tril().softmax(-1)}
    for edited, change in edits.items():
        for file in (model_file, model_mla):
            monkeypatch.setattr(file, 'attend', naive_attend(change))
        wanted = logits(s, TEXT)
        monkeypatch.undo()
        own = scale if edited.endswith('pattern') else lambda scores: scale(scores).tril()
        run = s.run(TEXT, edit={f'blocks.{layer}.{edited}': own for layer in (0, 1)})
        assert torch.allclose(run.logits, wanted, atol=1e-10, equal_nan=True), edited


ROTARY = [name for name, (_, settings) in FAMILY.items() if 'rotary' in settings]


@pytest.mark.parametrize('name', ROTARY)
def test_turned_queries_and_keys_are_what_rotation_returns(name, monkeypatch):
    s, seen = double(name), []
    rotate = model_file.rotate

    def spy(x, start, base):
        seen.append(rotate(x, start, base))
        return seen[-1]
    for file in (model_file, model_mla):
        monkeypatch.setattr(file, 'rotate', spy)
    logits(s, TEXT)
    monkeypatch.undo()
    run = s.run(TEXT)
    for layer in (0, 1):
        mine = [run[f'blocks.{layer}.attn.{part}'] for part in ('rot_q', 'rot_k')]
        theirs = seen[2 * layer:2 * layer + 2]
        for one, other in zip(mine, theirs):
            assert torch.allclose(one, other, atol=1e-10)

    def turned(x, start, base):
        return scale(rotate(x, start, base))
    for file in (model_file, model_mla):
        monkeypatch.setattr(file, 'rotate', turned)
    wanted = logits(s, TEXT)
    monkeypatch.undo()
    edit = {f'blocks.{layer}.attn.{part}': scale for layer in (0, 1) for part in ('rot_q', 'rot_k')}
    assert torch.allclose(s.run(TEXT, edit=edit).logits, wanted, atol=1e-10)


def test_parts_of_an_activation_are_edited():
    s = double('mla')
    z, other = s.run(TEXT)['blocks.1.attn.z'], s.run('bbbbaaaacccc')
    T = z.size(2)
    cases = {
        (0, None): 0, (1, 3): 2.0, ((0, 1), (2, -1)): 'zero', (None, (0, 5)): z[:, :, [0, 5]] + 1,
        (0, (1, 2)): lambda part: part.flip(-1)}
    for (head, position), how in cases.items():
        def change(flat):
            value = flat.clone().unflatten(-1, (2, 8))  # (B, T, n_head, head_dim)
            for h in range(2) if head is None else torch.as_tensor(head).reshape(-1).tolist():
                for t in range(T) if position is None else torch.as_tensor(
                        position).reshape(-1).tolist():
                    if callable(how):
                        value[:, t, h] = value[:, t, h].flip(-1)
                    elif isinstance(how, torch.Tensor):
                        value[:, t, h] += 1
                    else:
                        value[:, t, h] = 0 if how == 'zero' else how
            return value.flatten(2)
        wanted = logits(s, TEXT, hook(s.model.transformer.h[1].attn.c_proj, change, reads=True))
        run = s.run(TEXT, edit={at('blocks.1.attn.z', head, position): how})
        assert torch.allclose(run.logits, wanted, atol=1e-10), (head, position)

    means = s.run(TEXT, edit={at('blocks.1.attn.z', 1): 'mean'}, reference=other)
    wanted = other['blocks.1.attn.z'][:, 1].mean(1)
    got = means['blocks.1.attn.z']
    assert torch.allclose(got[:, 1], wanted[:, None].expand_as(got[:, 1]))
    assert torch.equal(got[:, 0], z[:, 0])
    drawn = s.run(TEXT, edit={'blocks.1.resid_pre': 'resample'}, reference=other)
    rows = {tuple(row.tolist()) for row in other['blocks.1.resid_pre'][0]}
    got = [tuple(row.tolist()) for row in drawn['blocks.1.resid_pre'][0]]
    assert set(got) <= rows and len(set(got)) > 3
    again = s.run(TEXT, edit={'blocks.1.resid_pre': 'resample'}, reference=other)
    assert torch.equal(drawn.logits, again.logits)
    own = s.run(TEXT, edit={'blocks.0.mlp_out': 'mean'})['blocks.0.mlp_out']
    assert torch.allclose(own[0, 3], s.run(TEXT)['blocks.0.mlp_out'][0].mean(0))
    patterns = s.run([TEXT, TEXT[::-1]], edit={'blocks.0.attn.pattern': 'mean'})
    rows = patterns['blocks.0.attn.pattern']
    assert torch.equal(rows[0], rows[1]) and rows.triu(1).abs().max() == 0


def test_two_edits_of_one_activation_come_one_after_the_other():
    s = double('mha')
    edit = {at('blocks.0.attn.z', 0): 1.0, at('blocks.0.attn.z', position=2): scale}
    z = s.run(TEXT, edit=edit)['blocks.0.attn.z']
    assert torch.equal(z[:, 0, 2], scale(torch.ones_like(z[:, 0, 2])))
    assert torch.equal(z[:, 0, 3], torch.ones_like(z[:, 0, 3]))


def test_names_are_transformer_lens_ones_and_nothing_else_is_kept():
    s = subject(random_model(GPT_MLA))
    run = s.run(TEXT)
    assert run.kept == {}
    pattern = run['blocks.1.attn.hook_pattern']
    assert list(run.kept) == ['blocks.1.attn.pattern'] and pattern is run['blocks.1.attn.pattern']
    assert run['blocks.0.mlp.out'] is run['blocks.0.hook_mlp_out']
    assert run['blocks.0.attn.latent'] is run['blocks.0.attn.kv_latent']
    assert list(run['blocks.*.attn.pattern']) == [f'blocks.{i}.attn.pattern' for i in (0, 1)]
    calls = []

    def count(value):
        calls.append(1)
        return value
    run = s.run(TEXT, edit={'blocks.1.mlp_out': count})
    run['blocks.0.resid_post']
    assert not calls  # the second block has not run
    run.logits, run.loss, run['blocks.1.mlp_out']
    assert len(calls) == 2


@pytest.mark.parametrize('model_class', [GPT, GPT_MLA, GPT_KAhead])
def test_losses_and_the_trunk_of_a_k_ahead_model(model_class):
    s = subject(random_model(model_class))
    run, idx = s.run(TEXT), s.read_text(TEXT)
    with torch.no_grad():
        all_logits = s.model.unembed(s.model.last_stream(idx))
    wanted = torch.nn.functional.cross_entropy(all_logits[0, :-1], idx[0, 1:], reduction='none')
    assert torch.allclose(run.loss[0], wanted, atol=1e-5)
    assert run.tokens == [list(TEXT)] and 'Run of 1 x 12 tokens' in repr(run)


def test_texts_ids_and_several(tmp_path):
    s = subject(random_model(GPT))
    ids = s.tokenizer.encode(TEXT)
    one = s.run(TEXT).logits
    assert torch.equal(one, s.run(ids).logits)
    assert torch.equal(one, s.run(torch.tensor([ids])).logits)
    both = s.run([TEXT, TEXT[::-1]])
    assert torch.allclose(both.logits[:1], one, atol=1e-5) and len(both.tokens) == 2


@pytest.mark.parametrize('text, edit, words', [
    ('', {}, ['0 tokens']), (17 * 'a', {}, ['17 tokens', 'block_size=16']),
    (['ab', 'abc'], {}, ['2 to 3 tokens']), ('abX', {}, ["'X'"]), ([99], {}, ['id 99']),
    ([], {}, ['0 tokens']),
    ('abc', {'blocks.0.attn.pattren': 0}, ['pattren', "did you mean 'blocks.0.attn.pattern'"]),
    ('abc', {at('blocks.0.mlp_out', head=0): 0}, ['head=0', 'has 0']),
    ('abc', {at('blocks.0.attn.z', head=2): 0}, ['head=2', 'has 2']),
    ('abc', {at('blocks.0.attn.z', position=3): 0}, ['position=3', 'has 3']),
    ('abc', {'blocks.0.attn.z': 'median'}, ["'median'", "'mean'"]),
    ('abc', {'blocks.0.attn.z': None}, ['edit=None', 'a function']),
    ('abc', {'blocks.0.mlp_out': 0, 'blocks.0.mlp.out': 1}, ['mlp_out is edited twice']),
    ('abc', {'blocks.0.attn.z': torch.zeros(2, 2)}, ['(2, 2)', '(1, 2, 3, 8)']),
    ('abc', {'blocks.0.attn.z': lambda z: z[0]}, ['(2, 3, 8)', '(1, 2, 3, 8)']),
])
def test_mistakes_name_what_is_wrong(text, edit, words):
    with pytest.raises(UserError) as e:
        subject(random_model(GPT)).run(text, edit=edit).logits
    assert all(word in str(e.value) for word in words), e.value
    with pytest.raises(UserError, match='over pairs of tokens'):
        subject(random_model(GPT)).run('abc', {'blocks.0.attn.pattern': 'mean'}, 'abcd').logits


def test_models_are_loaded_as_they_are_published(tmp_path):
    model = random_model(GPT, vocab_size=50257)
    save_hugging_face(model, tmp_path / 'hf')
    s = analysis.load(tmp_path / 'hf', device='cpu', dtype='float64')
    text = 'Mary and John'
    assert s.run(text)['blocks.0.attn.z'].dtype == torch.float64
    double = copy.deepcopy(model).double()
    wanted = logits(Subject(double, make_tokenizer('gpt2'), '', 'a/model'), text)
    assert torch.allclose(s.run(text).logits, wanted, atol=1e-8)

    mla = tiny_model(GPT_MLA)
    save_checkpoint(tmp_path / 'ckpt_mla.pt', mla, make_tokenizer(CHARS), {}, 0)
    s = analysis.load(tmp_path / 'ckpt_mla.pt', device='cpu')
    assert 'GPT_MLA: 2 layers' in repr(s) and 'blocks.1.attn.kv_latent' in s.names
    idx = repeated_tokens(len(CHARS), 2, 8, seed=0)
    assert torch.allclose(s.run(idx).logits[:, [-1]], mla(idx)[0], atol=1e-5)
