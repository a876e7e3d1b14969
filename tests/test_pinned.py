"""With every key of the attention at its default, a model is bit for bit what it was before there
were such keys: the same parameters in the same order, the same weights for a seed, the same loss
and the same gradients. The numbers here are those of version 0.7."""

import pytest
import torch
from conftest import tiny_model

from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA

CASES = {
    'mha': (GPT, {}),
    'mha, no bias': (GPT, dict(bias=False, gelu='tanh')),
    'mla': (GPT_MLA, dict(n_latent=6)),
    'k ahead': (GPT_KAhead, dict(k_ahead=3)),
    'k ahead, mla, linear': (GPT_KAhead, dict(k_ahead=3, attention='mla', head='linear')),
}
# number of tensors, weights, loss in nats, gradients
PINNED = {
    'mha': [29, -7.7400639514, 2.63372493, 1.3786412925],
    'mha, no bias': [16, -3.2194724636, 2.73263764, 1.8137229466],
    'mla': [39, -1.2321392911, 2.56967187, 9.4257610881],
    'k ahead': [53, -8.7583207894, 2.56162405, 0.7281965639],
    'k ahead, mla, linear': [43, -1.2222969163, 2.51806092, 2.4998142498],
}


def checksum(tensors):
    """A number to which each entry of the tensors adds with a weight of its own."""
    total = 0.0
    for number, tensor in enumerate(tensors, start=1):
        flat = tensor.detach().double().flatten()
        total += (flat * torch.cos(number + torch.arange(len(flat), dtype=torch.float64))).sum()
    return total.item()


def figures(model_class, settings):
    model = tiny_model(model_class, seed=1337, **settings).train()
    idx = (torch.arange(34).view(2, 17) * 7 + 3) % 14
    weights = [p for _, p in model.named_parameters()]
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    return [len(model.state_dict()), checksum(weights), loss.item(),
            checksum([p.grad for p in weights])]


@pytest.mark.parametrize('name', CASES)
def test_defaults_are_the_models_of_before(name):
    found = figures(*CASES[name])
    assert found == pytest.approx(PINNED[name], rel=1e-5, abs=1e-7)
