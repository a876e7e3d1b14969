import copy

import numpy as np
import pytest
import torch
from analysis_models import edit_z, random_model
from conftest import ALL, CHARS

from analysis.program import as_json, top_heads
from analysis.record import (
    edit_head,
    final_stream,
    record,
    repeated_tokens,
    residual_streams,
    run_from,
)
from export_huggingface import to_hugging_face
from model import GPT


def tokens(model, B=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(len(CHARS), (B, model.config.block_size), generator=generator)


@ALL
def test_the_run_is_the_models_own(model_class):
    model = random_model(model_class)
    idx = tokens(model)
    with torch.no_grad():
        logits = model.next_logits(idx)
    assert torch.allclose(model.unembed(final_stream(record(model, idx)))[:, -1], logits, atol=1e-4)
    streams = residual_streams(model, idx)
    assert streams.shape == (3, 3, 16, 16)
    assert torch.allclose(model.unembed(streams[-1])[:, -1], logits, atol=1e-4)


@ALL
def test_what_is_written_adds_up(model_class):
    model = random_model(model_class)
    for block, weights in zip(record(model, tokens(model)), model.transformer.h):
        total = block.before + block.attention_out + block.mlp_out
        assert torch.allclose(block.after, total, atol=1e-4)
        W_O = weights.attn.head_weights()[-1]
        by_head = torch.einsum('bhtd,hdn->bhtn', block.pattern() @ block.v, W_O)
        written = by_head.sum(1) + weights.attn.c_proj.bias
        assert torch.allclose(written, block.attention_out, atol=1e-4)


def test_residual_streams_and_patterns_are_those_of_transformers():
    model = random_model(GPT, vocab_size=50257)
    hf = to_hugging_face(model)
    hf.config._attn_implementation = 'eager'
    idx = torch.randint(50257, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out = hf(idx, output_attentions=True, output_hidden_states=True)
    streams = residual_streams(model, idx)
    *theirs, behind_norm = out.hidden_states  # the last one is behind the final norm
    for mine, their in zip(streams, theirs):
        assert torch.allclose(mine, their, atol=1e-4)
    assert torch.allclose(model.transformer.ln_f(streams[-1]), behind_norm, atol=1e-4)
    for block, theirs in zip(record(model, idx), out.attentions):
        assert torch.allclose(block.pattern(), theirs, atol=1e-5)


@ALL
def test_an_edit_is_a_change_of_the_weights(model_class):
    """A head whose output is put to zero is one whose W_O is zero."""
    model = random_model(model_class)
    without = copy.deepcopy(model)
    without.transformer.h[1].attn.c_proj.weight.data[:, 8:] = 0

    def edit(layer, z):
        return torch.cat([z[:, :1], 0 * z[:, 1:]], dim=1) if layer == 1 else z
    idx = tokens(model)
    edit = edit_z(model, edit)
    x = final_stream(record(model, idx, edit))
    assert torch.allclose(x, final_stream(record(without, idx)), atol=1e-5)
    entering = list(record(model, idx))[1].before
    assert torch.equal(x, final_stream(run_from(model, entering, 1, edit)))
    assert torch.equal(x, final_stream(record(model, idx, edit_head(1, 1, torch.zeros_like))))


def test_more_tokens_than_the_context_are_refused():
    model = random_model(GPT)
    with pytest.raises(ValueError, match='block_size=16'):
        record(model, torch.zeros(1, 17, dtype=torch.int64))


def test_repeated_tokens():
    idx = repeated_tokens(13, 5, 8, seed=1)
    assert torch.equal(idx[:, :8], idx[:, 8:])
    assert all(len(set(row.tolist())) == 8 for row in idx[:, :8])
    assert torch.equal(idx, repeated_tokens(13, 5, 8, seed=1))
    assert not torch.equal(idx, repeated_tokens(13, 5, 8, seed=2))
    assert repeated_tokens(4, 5, 8, seed=1).max() == 3  # fewer tokens than places


def test_numbers_that_json_lacks_become_null():
    numbers = {'a': np.array([1.0, np.nan]), 'b': torch.tensor([0.1234567891]),
               'c': (1, 'x', float('inf'))}
    assert as_json(numbers) == {'a': [1.0, None], 'b': [0.123457], 'c': [1, 'x', None]}


def test_the_highest_scores():
    scores = np.array([[0.1, 0.5], [0.9, 0.2]])
    assert top_heads(scores, 2) == [(1, 0), (0, 1)]
    assert top_heads(scores, threshold=0.4) == [(1, 0), (0, 1)]
