import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import BOTH, tiny_model
from torch.nn import functional as F

from generate import Sampling, decode, generate
from model import GPT
from model_mla import GPT_MLA


@torch.no_grad()
def without_cache(model, idx, n, n_vocab, temperature=1.0, top_k=None,
                  window=lambda idx, block_size: idx[:, -block_size:]):
    """Decoding as nanoGPT does it: every token is drawn from a pass over all that the model may
    see."""
    for _ in range(n):
        logits = model(window(idx, model.config.block_size))[0][:, -1, :n_vocab]
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                kth = logits.topk(min(top_k, n_vocab)).values[:, [-1]]
                logits[logits < kth] = -float('inf')
            new = torch.multinomial(logits.softmax(-1), 1)
        idx = torch.cat((idx, new), 1)
    return idx


@BOTH
@pytest.mark.parametrize('case', range(40))
def test_same_tokens_with_and_without_cache(model_class, case):
    rng = random.Random(case)
    n_head = rng.choice([1, 2, 3])
    settings = dict(n_layer=rng.randint(1, 3), n_head=n_head, n_embd=8 * n_head,
                    block_size=rng.choice([1, 2, 7, 16, 33]), bias=rng.random() < 0.5)
    if model_class is GPT_MLA:
        settings['n_latent'] = rng.choice([1, 5, 8 * n_head, 40])
    model = tiny_model(model_class, seed=case, **settings)
    for p in model.parameters():  # far enough from the start that all tokens occur
        p.data += 0.3 * torch.randn_like(p)
    idx = torch.randint(14, (rng.randint(1, 3), rng.randint(1, 40)))
    n = rng.randint(1, 40)
    settings = rng.choice([dict(temperature=0), dict(temperature=0.7),
                           dict(temperature=1.3, top_k=3), dict(top_k=99)])
    runs = []
    for function in (generate, without_cache):
        torch.manual_seed(case)
        runs.append(function(model, idx, n, 14, **settings))
    assert torch.equal(*runs)


@BOTH
def test_the_cases_above_are_not_all_one_token(model_class):
    model = tiny_model(model_class, seed=3)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    assert len(generate(model, prompt, 60, 14, temperature=0).unique()) > 2
    assert len(generate(model, prompt, 60, 14).unique()) > 6


def drop_older_half(idx, block_size, prompt):
    """What the model sees of idx if it forgets the older half of its context whenever the next
    token finds it full."""
    first = max(0, prompt - block_size)
    while idx.size(1) - first > block_size:
        first += block_size + 1 - (block_size + 1) // 2
    return idx[:, first:]


@BOTH
@pytest.mark.parametrize('block_size, prompt', [(1, 1), (2, 3), (7, 3), (8, 8), (16, 30)])
def test_dropping_the_older_half(model_class, block_size, prompt):
    model = tiny_model(model_class, block_size=block_size)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    idx = torch.randint(14, (2, prompt))
    torch.manual_seed(0)
    dropped = generate(model, idx, 60, 14, past_context='drop')
    torch.manual_seed(0)
    window = partial(drop_older_half, prompt=prompt)
    assert torch.equal(dropped, without_cache(model, idx, 60, 14, window=window))
    torch.manual_seed(0)
    slid = generate(model, idx, 60, 14)
    # the first token past the context is drawn from the same window
    inside = max(block_size + 1, prompt + 1)
    assert torch.equal(dropped[:, :inside], slid[:, :inside])
    if block_size > 2:
        assert not torch.equal(dropped, slid)


def test_dropping_reads_each_token_less_than_three_times():
    model, read = tiny_model(GPT), []
    model.register_forward_pre_hook(lambda module, args: read.append(args[0].size(1)))
    generate(model, torch.zeros(1, 1, dtype=torch.long), 400, 14, past_context='drop')
    assert sum(read) < 2 * 400 and max(read[1:]) == 8


class FixedLogits(torch.nn.Module):
    """A model whose distribution is the same everywhere."""
    n_predictions = 1

    def __init__(self, logits):
        super().__init__()
        self.config = type('Config', (), {'block_size': 4})
        self.logits = torch.tensor(logits)
        self.lm_head = SimpleNamespace(weight=self.logits)

    def cache_shapes(self, B, length):
        return []

    def next_logits(self, idx, cache=None):
        return self.logits.expand(len(idx), -1)


def frequencies(n_vocab, **settings):
    torch.manual_seed(0)
    model = FixedLogits([1.0, 2.0, 0.0, 1.5, 9.0])  # the last is padding where n_vocab is 4
    drawn = generate(model, torch.zeros(20_000, 1, dtype=torch.long), 1, n_vocab, **settings)[:, 1]
    return torch.bincount(drawn, minlength=5) / 20_000


def assert_near(seen, wanted):
    torch.testing.assert_close(seen, wanted, atol=0.01, rtol=0)


def test_distribution_temperature_padding_and_top_k():
    logits = torch.tensor([1.0, 2.0, 0.0, 1.5])
    assert_near(frequencies(4), F.pad(F.softmax(logits, -1), (0, 1)))
    assert_near(frequencies(4, temperature=0.5), F.pad(F.softmax(2 * logits, -1), (0, 1)))
    two = F.softmax(torch.tensor([2.0, 1.5]), -1)
    assert_near(frequencies(4, top_k=2), torch.tensor([0, two[0], 0, two[1], 0]))
    assert frequencies(5)[4] > 0.9 and frequencies(4, top_k=99).gt(0).sum() == 4
    assert frequencies(4, temperature=0)[1] == 1


def test_top_p_keeps_the_likeliest_that_reach_it():
    p = F.softmax(torch.tensor([1.0, 2.0, 0.0, 1.5]), -1)  # .175 .475 .064 .288
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.94, [0, 1, 2, 3]), (0.93, [0, 1, 3]),
                        (0.77, [0, 1, 3]), (0.76, [1, 3]), (0.48, [1, 3]), (0.47, [1]),
                        (1e-9, [1])):
        wanted = torch.zeros(5)
        wanted[kept] = p[kept] / p[kept].sum()
        assert_near(frequencies(4, top_p=top_p), wanted)
    wanted = torch.zeros(5)  # of the two likeliest, renormalised, the first has .62
    wanted[1] = 1
    torch.testing.assert_close(frequencies(4, top_k=2, top_p=0.6), wanted)


def test_top_p_is_that_of_transformers():
    from transformers import TopPLogitsWarper
    torch.manual_seed(0)
    for top_p in (0.1, 0.5, 0.9, 0.99):
        logits = 3 * torch.randn(200, 30)
        theirs = F.softmax(TopPLogitsWarper(top_p)(None, logits), -1)
        for seed in range(5):
            torch.manual_seed(seed)
            ids = torch.multinomial(theirs, 1).squeeze(1)
            torch.manual_seed(seed)
            assert torch.equal(Sampling(30, 1.0, None, top_p, None).choose(logits), ids)


def test_top_k_1_is_greedy_where_logits_tie():
    for settings in (dict(temperature=0), dict(top_k=1)):
        model = FixedLogits([1.0, 2.0, 2.0, 2.0])
        text = generate(model, torch.zeros(300, 1, dtype=torch.long), 1, 4, **settings)
        assert set(text[:, 1].tolist()) == {1}


def test_the_smallest_top_p_keeps_the_likeliest():
    assert frequencies(4, top_p=1e-300)[1] == 1


def test_half_precision_does_not_overflow_at_a_low_temperature():
    model = FixedLogits([-90.0, -80.0, -100.0]).half()
    model.logits = model.logits.half()
    text = generate(model, torch.zeros(1, 1, dtype=torch.long), 3, 3, temperature=1e-3)
    assert text[0].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize('seed', [1, 2])
def test_a_seed_decides_the_sample(seed):
    model = tiny_model(GPT)
    runs = []
    for s in (seed, seed, seed + 10):
        torch.manual_seed(s)
        runs.append(generate(model, torch.zeros(1, 1, dtype=torch.long), 40, 14))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@BOTH
def test_with_a_generator_a_row_draws_the_same_in_any_company(model_class):
    model = tiny_model(model_class)

    def rows(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = torch.zeros(len(seeds), 1, dtype=torch.long)
        return generate(model, prompts, 40, 14, top_k=9, top_p=0.9, generators=generators)
    together = rows(5, 6, 7)
    assert not torch.equal(together[0], together[1])
    for row, seed in zip(together, (5, 6, 7)):
        assert torch.equal(rows(seed)[0], row)


@BOTH
def test_stop_token_ends_each_row_and_then_all(model_class):
    model = tiny_model(model_class)
    idx = torch.randint(14, (4, 3))
    torch.manual_seed(0)
    free = generate(model, idx, 60, 14)[:, 3:]
    stop = 5
    assert (free == stop).any(1).all()
    torch.manual_seed(0)
    out = generate(model, idx, 60, 14, stop=stop)[:, 3:]
    ends = [row.index(stop) for row in free.tolist()]
    assert out.size(1) == max(ends) + 1 < 60
    for row, wanted, end in zip(out.tolist(), free.tolist(), ends):
        assert row[:end + 1] == wanted[:end + 1] and set(row[end:]) == {stop}


def test_tokens_are_handed_over_as_they_are_drawn():
    model, passes = tiny_model(GPT), []
    model.register_forward_pre_hook(lambda module, args: passes.append(args[0].size(1)))
    tokens = decode(model, torch.zeros(2, 3, dtype=torch.long), 5, 14)
    assert passes == []
    for n in range(1, 6):
        assert next(tokens).shape == (2,) and passes == [3] + [1] * (n - 1)
    assert next(tokens, None) is None and len(passes) == 5


@pytest.mark.parametrize('idx, settings', [
    ([[]], {}), ([[0]], dict(temperature=-1)), ([[0]], dict(top_k=0)), ([[0]], dict(top_p=0)),
    ([[0]], dict(top_p=1.5))])
def test_what_makes_no_sense_is_refused(idx, settings):
    with pytest.raises(ValueError):
        generate(tiny_model(GPT), torch.tensor(idx, dtype=torch.long), 3, 14, **settings)
