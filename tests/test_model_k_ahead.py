"""Validates the k-ahead architecture: shapes, causality, the shift of the targets, gradients,
equality at k = 1."""

import weakref
from itertools import product

import pytest
import torch
from conftest import CHARS, tiny_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from generate import generate
from model import GPT
from model_k_ahead import ATTENTIONS, HEADS, GPT_KAhead, KAheadConfig
from model_mla import GPT_MLA

KINDS = pytest.mark.parametrize('attention, head', list(product(ATTENTIONS, HEADS)))
V = len(CHARS)


def tiny(attention='mha', head='block', **settings):
    settings = dict(attention=attention, head=head, k_ahead=3, n_layer=3) | settings
    return tiny_model(GPT_KAhead, **settings)


@KINDS
@torch.no_grad()
def test_shapes(attention, head):
    model, idx = tiny(attention, head), torch.randint(V, (2, 9))
    logits, loss = model(idx)
    assert logits.shape == (2, 3, 9, V) and loss is None
    logits, loss = model(idx, idx)
    assert logits.shape == (2, 3, 9, V) and loss.shape == ()
    assert model.head_losses.shape == (model.n_predictions,) == (3,)
    assert model.train()(idx, idx)[0] is None
    too_long = torch.zeros(1, 17, dtype=torch.long)
    for call in (lambda: model(too_long), lambda: model(too_long, too_long),
                 lambda: model.losses(too_long, too_long)):
        with pytest.raises(ValueError, match='17 tokens does not fit into block_size=16'):
            call()


def test_size():
    """The trunk has n_layer - 1 blocks and each head one; or n_layer, and each further head a
    matrix."""
    block = sum(p.numel() for p in tiny_model(GPT).transformer.h[0].parameters())
    ordinary = tiny_model(GPT, n_layer=3).get_num_params()
    assert tiny(head='block').get_num_params() - ordinary == 2 * block
    linear, ordinary = tiny(head='linear', bias=False), tiny_model(GPT, n_layer=3, bias=False)
    assert linear.get_num_params() - ordinary.get_num_params() == 2 * 16 ** 2


@KINDS
def test_every_head_is_causal(attention, head):
    model = tiny(attention, head)
    wte = model.transformer.wte
    for t in (0, 4, 8):
        for i in range(3):
            embedded = []

            def keep(module, args, out):
                out.requires_grad_().retain_grad()
                embedded.append(out)
            handle = wte.register_forward_hook(keep)
            model(torch.arange(9).view(1, 9))[0][0, i, t].square().sum().backward()
            handle.remove()
            seen = embedded[0].grad[0].abs().sum(-1) > 0
            assert seen.tolist() == [j <= t for j in range(9)]


@torch.no_grad()
def test_targets_are_shifted_by_hand():
    """Text a b c d e: the next tokens are b c d e -, those after them c d e, then d e."""
    a, b, c, d, e = range(5)
    idx, targets = torch.tensor([[a, b, c, d, e]]), torch.tensor([[b, c, d, e, -1]])
    model = tiny()
    logits = model(idx)[0].double()
    by_hand = [[(0, b), (1, c), (2, d), (3, e)], [(0, c), (1, d), (2, e)], [(0, d), (1, e)]]
    wanted = torch.stack([
        -torch.stack([logits[0, i, t].log_softmax(-1)[token] for t, token in pairs]).mean()
        for i, pairs in enumerate(by_hand)])
    for mode in (True, False):
        loss = model.train(mode)(idx, targets)[1]
        torch.testing.assert_close(model.head_losses.double(), wanted, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(loss.double(), wanted.mean(), atol=1e-6, rtol=1e-6)
        losses, _ = model.losses(idx, targets)
        torch.testing.assert_close(losses.double(), wanted, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_greedy_positions_by_hand():
    """A further head learns at t only where the tokens between are the first head's own choices."""
    model = tiny(positions='greedy', k_ahead=4)
    idx = torch.randint(V, (3, 12))
    choice = model(idx)[0][:, 0].argmax(-1)
    targets = torch.where(torch.rand(3, 12) < 0.7, choice, torch.randint(V, (3, 12)))
    targets[:, -1] = -1
    logits, by_share = model(idx)[0].double().log_softmax(-1), 0.0
    losses, _ = model.losses(idx, targets)
    for i in range(4):
        learned = [-logits[b, i, t, targets[b, t + i]]
                   for b, t in product(range(3), range(12 - i)) if targets[b, t + i] >= 0
                   and all(choice[b, t + j] == targets[b, t + j] for j in range(i))]
        assert len(learned) > 2 and (i == 0 or len(learned) < 3 * (12 - i))
        wanted = torch.stack(learned).mean()
        torch.testing.assert_close(losses[i].double(), wanted, atol=1e-6, rtol=1e-6)
        by_share += len(learned) / (3 * (12 - i) - 3) * wanted / 4
    torch.testing.assert_close(model(idx, targets)[1].double(), by_share, atol=1e-6, rtol=1e-6)
    nothing_chosen = (choice + 1) % V
    losses, shares = model.losses(idx, nothing_chosen)
    assert losses[1:].tolist() == shares[1:].tolist() == [0, 0, 0] and shares[0] == 1


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_loss_in_float32(dtype):
    model, idx = tiny(loss_weights='1,1,0.3'), torch.randint(V, (2, 9))
    with torch.amp.autocast('cpu', dtype):
        loss = model.train()(idx, idx)[1]
    weights = torch.tensor(model.config.normalised_weights())
    wanted = (model.head_losses * weights).sum()
    torch.testing.assert_close(loss.detach(), wanted, atol=1e-6, rtol=1e-6)


def test_further_heads_start_as_blocks_do():
    """Against head 1, which is the ordinary model's last block."""
    model = tiny(n_embd=64, n_layer=4)
    of_block = dict(model.transformer.h[-1].named_parameters())
    for head in model.ahead:
        for name, p in head.named_parameters():
            wanted = of_block[name].std().item()
            assert p.std().item() == pytest.approx(wanted, rel=0.1) or p.dim() == 1
            assert p.dim() == 2 or torch.equal(p, of_block[name])
    linear = tiny(head='linear', n_embd=64, n_layer=4).ahead[0]
    x, weight, bias = torch.randn(2, 3, 64), linear.c_proj.weight, linear.c_proj.bias
    torch.testing.assert_close(linear(x), x + F.linear(x, weight, bias))
    assert weight.std().item() == pytest.approx(0.02 / 8 ** 0.5, rel=0.1) and not bias.any()


def test_flops_count_the_unembedding_once_for_each_head():
    ordinary = tiny_model(GPT, n_layer=3)
    for head in ('block', 'linear'):
        model = tiny(head=head)
        extra = 6 * (model.get_num_params() - ordinary.get_num_params()) + 6 * 2 * V * 16
        extra += 2 * 12 * 16 * 16 if head == 'block' else 0
        assert model.flops_per_token() - ordinary.flops_per_token() == extra


@torch.no_grad()
def test_loss_weights():
    idx = torch.randint(V, (2, 9))
    model = tiny(loss_weights='3, 0, 1')
    loss = model(idx, idx)[1]
    torch.testing.assert_close(loss, (3 * model.head_losses[0] + model.head_losses[2]) / 4)


@KINDS
def test_gradients_are_those_of_the_definition(attention, head):
    """Against plain autograd through the stacked logits in float64. Every parameter gets one."""
    model, idx = tiny(attention, head, loss_weights='1,0.5,2').double(), torch.randint(V, (2, 9))
    targets = torch.randint(V, (2, 9))
    model.train()(idx, targets)[1].backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in ours.values())
    model.zero_grad()
    logits = model(idx)[0]
    losses = [F.cross_entropy(logits[:, i, :9 - i].reshape(-1, V), targets[:, i:].reshape(-1))
              for i in range(3)]
    ((losses[0] + 0.5 * losses[1] + 2 * losses[2]) / 3.5).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize('attention, ordinary', [('mha', GPT), ('mla', GPT_MLA)])
@torch.no_grad()
def test_one_head_is_the_ordinary_model(attention, ordinary):
    gpt, idx = tiny_model(ordinary, n_layer=3, seed=5), torch.randint(V, (2, 9))
    model = GPT_KAhead.from_gpt(gpt, k_ahead=1)
    assert not model.training
    logits, loss = model(idx, idx)
    wanted, wanted_loss = gpt(idx, idx)
    torch.testing.assert_close((logits[:, 0], loss), (wanted, wanted_loss), atol=1e-6, rtol=1e-6)
    same_seed = tiny(attention, k_ahead=1, seed=5).state_dict()
    assert same_seed.keys() == gpt.state_dict().keys()
    assert all(torch.equal(same_seed[name], p) for name, p in gpt.state_dict().items())


@KINDS
@torch.no_grad()
def test_trunk_and_first_head_are_the_ordinary_model_for_any_k(attention, head):
    gpt = tiny_model(GPT if attention == 'mha' else GPT_MLA, n_layer=3, seed=5)
    idx = torch.randint(V, (2, 9))
    for model in (tiny(attention, head, seed=5), GPT_KAhead.from_gpt(gpt, k_ahead=3, head=head)):
        torch.testing.assert_close(model(idx)[0][:, 0], gpt(idx, idx)[0])
        torch.testing.assert_close(model.next_logits(idx), gpt(idx)[0][:, -1])


class LargestLogits(TorchDispatchMode):
    """Counts the elements of tensors as wide as the vocabulary that are alive at once, forward and
    backward."""

    def __init__(self, n_vocab):
        super().__init__()
        self.n_vocab, self.alive, self.most = n_vocab, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[-1] == self.n_vocab:
                key = x.untyped_storage()._cdata
                if key not in self.alive:
                    self.alive[key] = x.numel()
                    weakref.finalize(x.untyped_storage(), self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return out


def most_logits(model, idx):
    with LargestLogits(211) as mode:
        model.train()(idx, idx)[1].backward()
    return mode.most


@KINDS
def test_some_logits_at_a_time(attention, head):
    """A loss in chunks is the same, and has room for a few logits. A vocabulary of 211 tells them
    from other tensors."""
    idx = torch.randint(211, (2, 16))
    whole, chunked = (tiny(attention, head, vocab_size=211, k_ahead=4) for _ in range(2))
    chunked.max_logits = 3 * 211  # three rows
    most = [most_logits(model, idx) for model in (whole, chunked)]
    n_weight = 16 * 211  # as wide as the vocabulary too
    assert most[0] > n_weight + 4 * 16 * 211 and most[1] <= n_weight + 3 * 3 * 211
    for p, other in zip(whole.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad)


@pytest.mark.parametrize('settings, message', [
    (dict(k_ahead=0), 'k_ahead=0'), (dict(k_ahead=16), 'k_ahead=16'),
    (dict(n_layer=1), 'n_layer=1'), (dict(attention='mqa'), 'attention='),
    (dict(head='mlp'), 'head='), (dict(n_latent=4), 'n_latent=4'),
    (dict(loss_weights='1,2'), 'loss_weights='), (dict(loss_weights='1,a,3'), 'loss_weights='),
    (dict(loss_weights='0,0,0'), 'loss_weights='), (dict(loss_weights='1,-1,1'), 'loss_weights='),
    (dict(loss_weights='nan,1,1'), 'loss_weights=')])
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KAheadConfig(**dict(k_ahead=3, block_size=16, n_head=2, n_embd=16) | settings)
    KAheadConfig(n_layer=1, head='linear')


class IdentityHead(torch.nn.Module):
    """The least that a head can be."""
    reads_before_last_block = False

    def __init__(self, config):
        super().__init__()

    def forward(self, x, cache=None):
        return x

    def cache_shapes(self, B, length):
        return []

    def extra_flops(self, config):
        return 0


def test_another_kind_of_head_is_a_class_and_an_entry(monkeypatch):
    monkeypatch.setitem(HEADS, 'identity', IdentityHead)
    model, idx = tiny(head='identity'), torch.randint(V, (2, 4))
    logits, loss = model(idx, idx)
    assert torch.equal(logits[:, 0], logits[:, 2]) and loss > 0
    wanted = generate(model, idx, 9, V, temperature=0, speculative=False)
    assert torch.equal(generate(model, idx, 9, V, temperature=0), wanted)
    ordinary = tiny_model(GPT, n_layer=3)
    assert model.flops_per_token() == ordinary.flops_per_token() + 6 * 2 * V * 16
