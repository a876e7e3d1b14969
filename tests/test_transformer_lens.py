"""The models as TransformerLens runs them: logits, streams and what is inside. It is an extra, and
without it these tests are skipped."""

from configurator import UserError

import pytest
import torch
from analysis_models import random_model, subject
from family import member

from analysis import to_transformer_lens
from analysis.subject import Subject
from model import GPT
from model_k_ahead import GPT_KAhead
from runtime.tokenizer import make_tokenizer

TEXT = 'abcabdab cab'
# with the settings that their forms in transformers need
KINDS = {'mha': {}, 'mha, rotary': {}, 'mha, gated': dict(bias=False), 'gqa, rotary': {},
         'mla': {}, 'mla, query latent': {}, # the scale of a latent is in their next matrix
         'deepseek': dict(bias=False, mlp='gated', latent_scale=False)}


@pytest.fixture
def lens():
    return pytest.importorskip('transformer_lens')


def as_theirs(value):
    """Heads behind positions."""
    return value.transpose(1, 2) if value.dim() == 4 else value


@pytest.mark.parametrize('name', KINDS)
def test_logits_streams_and_patterns_are_theirs(name, lens):
    s = subject(member(name, **KINDS[name]))
    bridge, run = to_transformer_lens(s), s.run(TEXT)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(run.idx)
    theirs, mine = (x - x.mean(-1, keepdim=True) for x in (logits, run.logits[..., :s.n_vocab]))
    assert torch.allclose(theirs, mine, atol=1e-4)
    asked = ['hook_resid_pre', 'hook_resid_post', 'attn.hook_pattern']
    if name == 'deepseek':
        asked += ['attn.hook_kv_latent', 'attn.hook_q_latent']
    for layer in range(s.model.config.n_layer):
        for short in asked:
            theirs, mine = cache[f'blocks.{layer}.{short}'], run[f'blocks.{layer}.{short}']
            if short.startswith('hook_resid'):  # our readers subtract the mean
                theirs, mine = (x - x.mean(-1, keepdim=True) for x in (theirs, mine))
            assert torch.allclose(theirs.view_as(mine), mine, atol=1e-4), (layer, short)


def test_names_that_both_have_are_the_same(lens):
    """Of MHA, where nothing was folded or multiplied out."""
    s = subject(random_model(GPT))
    run = s.run(TEXT)
    _, cache = to_transformer_lens(s).run_with_cache(run.idx)
    shared = {key: own for own in s.names for key in [with_hook(own)] if key in cache}
    assert len(shared) >= 2 * 14 + 3
    for theirs, own in shared.items():
        mine = run[own] if own.endswith(('pattern', 'attn_scores')) else as_theirs(run[own])
        their = cache[theirs].view_as(mine) if cache[theirs].numel() == mine.numel() else (
            cache[theirs][:len(mine)])
        finite = mine.isfinite() & (their > -1e30)
        assert torch.allclose(their[finite], mine[finite], atol=1e-4), own


def with_hook(name):
    parts = name.split('.')
    return '.'.join([*parts[:-1], f'hook_{parts[-1]}'])


def test_a_k_ahead_model_is_its_trunk_and_unknown_ids_are_numbers(lens):
    model = GPT_KAhead.from_gpt(random_model(GPT), k_ahead=3)
    s = Subject(model, make_tokenizer({'unknown': 14}), '', 'a/model')
    bridge = to_transformer_lens(s)
    with torch.no_grad():
        theirs = bridge('5 12 7', prepend_bos=False)
    assert torch.allclose(theirs, s.run([5, 12, 7]).logits, atol=1e-4)


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'transformer_lens.model_bridge', None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[lens\]"'):
        to_transformer_lens(subject(random_model(GPT)))
