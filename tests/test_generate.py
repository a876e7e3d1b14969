import pytest
import torch
from conftest import BOTH, tiny_model
from torch.nn import functional as F

from generate import generate
from model import GPT


@BOTH
def test_greedy_takes_the_likeliest_token_past_the_context_too(model_class):
    model = tiny_model(model_class)
    idx = torch.randint(14, (2, 5))
    out = generate(model, idx, 30, n_vocab=14, temperature=0)
    assert out.shape == (2, 35) and torch.equal(out[:, :5], idx)
    for t in range(5, 35):
        window = out[:, max(0, t - 16):t]
        assert torch.equal(model(window, window)[0][:, -1].argmax(-1), out[:, t])
    assert torch.equal(generate(model, idx, 30, n_vocab=14, temperature=0.7, top_k=1), out)


class FixedLogits(torch.nn.Module):
    """A model whose distribution is the same everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.config = type('Config', (), {'block_size': 4})
        self.logits = torch.tensor(logits)

    def forward(self, idx):
        return self.logits.expand(len(idx), 1, -1), None


def frequencies(n_vocab, **settings):
    torch.manual_seed(0)
    model = FixedLogits([1.0, 2.0, 0.0, 1.5, 9.0])  # the last is padding where n_vocab is 4
    drawn = generate(model, torch.zeros(20_000, 1, dtype=torch.long), 1, n_vocab, **settings)[:, 1]
    return torch.bincount(drawn, minlength=5) / 20_000


def test_distribution_temperature_padding_and_top_k():
    logits = torch.tensor([1.0, 2.0, 0.0, 1.5])
    torch.testing.assert_close(frequencies(4), F.pad(F.softmax(logits, -1), (0, 1)), atol=0.01, rtol=0)
    torch.testing.assert_close(frequencies(4, temperature=0.5), F.pad(F.softmax(2 * logits, -1), (0, 1)), atol=0.01, rtol=0)
    two = F.softmax(torch.tensor([2.0, 1.5]), -1)
    torch.testing.assert_close(frequencies(4, top_k=2), torch.tensor([0, two[0], 0, two[1], 0]), atol=0.01, rtol=0)
    assert frequencies(5)[4] > 0.9 and frequencies(4, top_k=99).gt(0).sum() == 4
    assert frequencies(4, temperature=0)[1] == 1


def test_the_model_sees_the_last_block_size_tokens():
    seen = []
    model = FixedLogits([1.0, 2.0])
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    out = generate(model, torch.tensor([[0, 1]]), 5, 2)
    for i, window in enumerate(seen):
        assert torch.equal(window, out[:, max(0, i + 2 - 4):i + 2])


def test_half_precision_does_not_overflow_at_a_low_temperature():
    model = FixedLogits([-90.0, -80.0, -100.0]).half()
    model.logits = model.logits.half()
    assert generate(model, torch.zeros(1, 1, dtype=torch.long), 3, 3, temperature=1e-3)[0].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize('seed', [1, 2])
def test_a_seed_decides_the_sample(seed):
    model = tiny_model(GPT)
    runs = []
    for s in (seed, seed, seed + 10):
        torch.manual_seed(s)
        runs.append(generate(model, torch.zeros(1, 1, dtype=torch.long), 40, 14))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
