"""A step of decoding that is compiled once, and gives what one does that is not."""

import shutil

import pytest
import torch
from conftest import tiny_model
from family import EACH, member
from torch._dynamo.testing import CompileCounter

import sample
from generate import CompiledStep, StaticCache, generate, new_cache
from model import GPT
from runtime.checkpoint import save_checkpoint
from runtime.tokenizer import make_tokenizer

N_VOCAB = 14


@EACH
@torch.no_grad()
def test_the_static_cache_is_attention_without_a_cache(name):
    model = member(name).double()
    idx = torch.randint(N_VOCAB, (3, 16))
    cache = new_cache(model, 3, 16)
    model(idx[:, :4], cache=cache)
    n = torch.full((1,), 4)
    cache = [StaticCache(layer.tensors, n) for layer in cache]
    for i in range(4, 16):
        found = model.next_logits(idx[:, i:i + 1], cache)
        n.add_(1)
        wanted = model.next_logits(idx[:, :i + 1])
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


@EACH
def test_one_compilation_serves_every_prompt_and_every_position(name, monkeypatch):
    torch.compiler.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f, mode, **settings: compile(
        f, backend=counter, **settings))
    model = member(name)
    step = CompiledStep(model)
    for length, past_context in ((1, 'drop'), (5, 'slide'), (15, 'drop'), (16, 'slide')):
        idx = torch.randint(N_VOCAB, (2, length))
        texts = [generate(model, idx, 20, N_VOCAB, temperature=0, past_context=past_context,
                          step=each) for each in (None, step)]
        assert torch.equal(*texts)
    assert counter.frame_count == 1
    generate(model, idx[:1, :4], 5, N_VOCAB, temperature=0, step=step)
    assert counter.frame_count == 2  # another number of sequences


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler on a CPU')
def test_samples_of_a_compiled_model_are_the_same(tmp_path, program):
    save_checkpoint(tmp_path / 'ckpt.pt', tiny_model(GPT), make_tokenizer(list('\n abcdefghijkl')),
                    {}, 1)
    args = [tmp_path, '--device=cpu', '--num_samples=3', '--batch_size=3', '--max_new_tokens=40',
            '--past_context=drop']
    texts = []
    for switch in ('False', 'True'):
        code, out, err = program(sample.main, *args, f'--compile={switch}')
        assert code == 0 and 'note' not in err, err
        texts.append(out)
    assert texts[0] == texts[1]
