"""Decoding with all heads gives what decoding one token at a time gives: the same text, or the same
distribution."""

from itertools import product

import pytest
import torch
from conftest import tiny_model

from generate import DecodeStats, Sampling, decode, generate
from model_k_ahead import ATTENTIONS, HEADS, GPT_KAhead

KINDS = pytest.mark.parametrize('attention, head', list(product(ATTENTIONS, HEADS)))


def random_model(attention, head, seed=0, n_vocab=3, **settings):
    """Its heads agree now and then, since there are few tokens."""
    settings |= dict(attention=attention, head=head, vocab_size=n_vocab)
    model = tiny_model(GPT_KAhead, seed, **settings)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.double()


@KINDS
@pytest.mark.parametrize('past_context', ['slide', 'drop'])
def test_greedy_text_is_that_of_one_token_at_a_time(attention, head, past_context):
    """Prompts of all lengths, batches, every k, and texts that end before, at and past
    block_size."""
    stats = DecodeStats()
    cases = [(1, 1, 15, 4), (3, 1, 16, 4), (4, 3, 12, 2), (2, 15, 9, 3), (3, 16, 5, 4),
             (2, 20, 9, 4), (5, 2, 60, 4), (1, 7, 40, 15), (1, 5, 1, 4), (2, 5, 2, 4), (2, 3, 0, 4)]
    for case, (B, T, n, k) in enumerate(cases):
        model = random_model(attention, head, seed=case, k_ahead=k)
        idx = torch.randint(3, (B, T))
        settings = dict(temperature=0, past_context=past_context)
        wanted = generate(model, idx, n, 3, speculative=False, **settings)
        assert wanted.shape == (B, T + n)
        assert torch.equal(generate(model, idx, n, 3, stats=stats, **settings), wanted)
    assert 1.05 < stats.tokens_per_pass < 6  # some drafts were accepted and some were not


@KINDS
@pytest.mark.parametrize('settings', [dict(temperature=0.7), dict(temperature=1.5, top_k=2),
                                      dict(temperature=1.0, top_p=0.8)])
def test_sampling_has_the_models_own_distribution(attention, head, settings):
    """The frequencies of all texts of 5 tokens against the probabilities that the passes without
    cache give them."""
    model = random_model(attention, head, seed=3, k_ahead=3)
    prompt, n, N = torch.tensor([[0, 2]]), 5, 40_000
    top_k, top_p = settings.get('top_k'), settings.get('top_p', 1.0)
    sampling = Sampling(3, settings['temperature'], top_k, top_p, None)
    texts = torch.tensor(list(product(range(3), repeat=n)))
    whole = torch.cat((prompt.expand(len(texts), -1), texts), dim=1)
    with torch.no_grad():
        p = sampling.probabilities(model(whole)[0][:, 0, 1:-1])  # of each next token
    p = p.gather(-1, texts.unsqueeze(-1)).squeeze(-1).prod(dim=1).double()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)

    torch.manual_seed(0)
    stats = DecodeStats()
    drawn = generate(model, prompt.expand(N, -1), n, 3, stats=stats, **settings)[:, 2:]
    number = (drawn * 3 ** torch.arange(n - 1, -1, -1)).sum(dim=1)
    seen = torch.bincount(number, minlength=len(texts)).double()
    assert seen[p == 0].sum() == 0
    common = p * N > 5
    seen, expected = (torch.cat((x[common], x[~common].sum().view(1))) for x in (seen, p * N))
    possible = expected > 0
    chi2 = ((seen - expected)[possible] ** 2 / expected[possible]).sum().item()
    degrees = possible.sum().item() - 1
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations
    assert 0.05 < stats.acceptance_rate(1) < 0.95


def test_a_draft_that_is_rejected_by_rounding_alone(monkeypatch):
    """p is q, so nothing is left of p - q to draw the token from that takes its place."""
    monkeypatch.setattr(Sampling, 'uniform', lambda self, like: torch.ones_like(like))
    sampling = Sampling(3, 1.0, None, 1.0, None)
    logits = torch.tensor([[[0.0, 1.0, -30.0], [0.0, 0.0, 0.0]]])
    draft_probs = sampling.probabilities(logits[:, :1])
    n_accepted, new = sampling.accept(torch.tensor([[1]]), draft_probs, logits)
    assert n_accepted.tolist() == [0] and new.item() in (0, 1)


@KINDS
def test_a_row_draws_the_same_in_any_company(attention, head):
    model = random_model(attention, head, n_vocab=14)

    def rows(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = torch.zeros(len(seeds), 1, dtype=torch.long)
        return generate(model, prompts, 50, 14, past_context='drop', generators=generators)
    together = rows(5, 6, 7)
    assert not torch.equal(together[0], together[1])
    for row, seed in zip(together, (5, 6, 7)):
        assert torch.equal(rows(seed)[0], row)


@KINDS
def test_stop_token(attention, head):
    model, idx = random_model(attention, head, n_vocab=5), torch.randint(5, (4, 2))
    for stop in range(5):
        wanted = generate(model, idx, 30, 5, temperature=0, stop=stop, speculative=False)
        assert torch.equal(generate(model, idx, 30, 5, temperature=0, stop=stop), wanted)


def test_padding_is_never_drawn():
    model = random_model('mha', 'block', n_vocab=8)
    for settings in (dict(temperature=0), dict(temperature=3.0)):
        prompts = torch.zeros(20, 1, dtype=torch.long)
        assert generate(model, prompts, 15, 3, **settings).max() < 3


def test_a_model_that_foresees_all_needs_a_kth_of_the_passes():
    """Whatever it reads, every head of it says 1: each draft is accepted."""
    model = random_model('mha', 'block', block_size=64)
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[1] = 1
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.fill_(1)
    stats, passes = DecodeStats(), []
    model.ahead[0].register_forward_hook(lambda module, args, out: passes.append(args[0].shape))
    prompt = torch.zeros(1, 3, dtype=torch.long)
    tokens = list(decode(model, prompt, 61, 3, temperature=0, stats=stats))
    assert [int(x) for x in tokens] == [1] * 61
    # 61 tokens: one from the prompt, 15 times 4
    assert [shape[1] for shape in passes] == [3] + [4] * 15
    assert stats.gained == [4] * 15 and stats.tokens_per_pass == 4
    assert stats.acceptance_rate(3) == 1


def test_tokens_are_handed_over_as_they_come():
    model, passes = random_model('mha', 'block'), []
    model.ahead[0].register_forward_hook(lambda module, args, out: passes.append(args[0].shape))
    tokens = decode(model, torch.zeros(1, 3, dtype=torch.long), 9, 3, temperature=0)
    next(tokens)
    assert len(passes) == 1
    rest = list(tokens)
    assert len(rest) == 8 and 1 + 2 <= len(passes) <= 9
