"""
GPT-2 that predicts k tokens at once: one trunk, k heads, head i for the token i places after the next (counted from 0).

    head='block'     trunk = n_layer - 1 blocks    head i = one block more
    head='linear'    trunk = n_layer blocks        head 0 = the trunk itself, head i = x + W_i x

All heads share the final norm and the unembedding. Head 0 with the trunk is the ordinary model of n_layer blocks, in the
same parameters under the same names: a GPT_KAhead is a GPT or GPT_MLA with k - 1 heads beside it, and all that reads such a
model reads this one. Users count the heads from 1.

Reference: Gloeckle et al. 2024, "Better & Faster Large Language Models via Multi-token Prediction", eq. 2 and section 2.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model import GPT, Block, Cache, CausalSelfAttention, Linear
from model_mla import GPT_MLA, MLAConfig, MultiLatentAttention


@dataclass
class KAheadConfig(MLAConfig):
    k_ahead: int = 4  # tokens predicted at each position: the next one and those after it
    attention: Literal['mha', 'mla'] = 'mha'  # of the trunk and of the heads
    head: Literal['block', 'linear'] = 'block'  # what a head is: a block, or a lighter linear map
    positions: Literal['all', 'greedy'] = 'all'  # where further heads learn: 'greedy': after text that head 1 finds likeliest
    loss_weights: str = ''  # weights of the heads' losses in the mean, with commas, such as '1,0.5,0.5,0.5'; '': equal

    def __post_init__(self):
        for key, known in dict(attention=('mha', 'mla'), head=('block', 'linear'), positions=('all', 'greedy')).items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key}={getattr(self, key)!r} must be {' or '.join(map(repr, known))}")
        if self.attention == 'mha' and self.n_latent is not None:
            raise ValueError(f"n_latent={self.n_latent} is for attention='mla', attention is 'mha': leave it out, or give "
                             '--attention=mla')
        super().__post_init__()
        if self.attention == 'mha':
            self.n_latent = None
        if not 1 <= self.k_ahead < self.block_size:
            raise ValueError(f'k_ahead={self.k_ahead} must be at least 1 and below block_size={self.block_size}')
        if self.head == 'block' and self.n_layer < 2:
            raise ValueError(f"n_layer={self.n_layer} must be at least 2 with head='block': a block for the trunk, one for "
                             "the heads; or use head='linear'")
        self.normalised_weights()

    def normalised_weights(self):
        """The weights of the heads' losses, a list of k_ahead numbers that add up to 1."""
        try:
            weights = [float(part) for part in self.loss_weights.split(',')] if self.loss_weights else [1.0] * self.k_ahead
            good = len(weights) == self.k_ahead and min(weights) >= 0 and 0 < sum(weights) < float('inf')
        except ValueError:
            good = False
        if not good:
            raise ValueError(f'loss_weights={self.loss_weights!r} must be {self.k_ahead} numbers (k_ahead) with commas between '
                             'them, none below 0 and not all 0')
        return [weight / sum(weights) for weight in weights]


class LinearHead(nn.Module):
    """x + W x: the lighter head. It looks at no other position, so it remembers nothing."""

    def __init__(self, config):
        super().__init__()
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        return x + self.c_proj(x)


class GPT_KAhead(GPT_MLA):
    model_type = 'k_ahead'
    config_class = KAheadConfig

    def __init__(self, config):
        self.attention_class = {'mha': CausalSelfAttention, 'mla': MultiLatentAttention}[config.attention]
        super().__init__(config)  # trunk and head 0, initialised as the ordinary model of the same seed
        self.ahead = nn.ModuleList(Block(config, self.attention_class) if config.head == 'block' else LinearHead(config)
                                   for _ in range(config.k_ahead - 1))
        self.ahead.apply(self._init_weights)
        self._init_residual_writers(self.ahead)
        self.head_losses = None  # (k,) nats, of the last batch with targets

    @classmethod
    def from_gpt(cls, gpt, **settings):
        """A GPT_KAhead whose trunk and head 0 have the weights of a GPT or GPT_MLA; settings are k_ahead, head,
        positions and loss_weights. Heads that the GPT lacks start at random."""
        attention = 'mla' if isinstance(gpt, GPT_MLA) else 'mha'
        model = cls(KAheadConfig(**asdict(gpt.config), attention=attention, **settings)).to(gpt.lm_head.weight)
        model.load_state_dict(gpt.state_dict(), strict=False)
        return model.train(gpt.training)

    def head_states(self, idx, cache=None):
        """The last residual stream of each head, k tensors (B, T, n_embd), for idx (B, T); with a cache, idx goes on after
        the tokens that it remembers, whose number may differ from sequence to sequence."""
        start = cache[0].n if cache else 0
        x = self.embed(idx, start[:, None] if torch.is_tensor(start) else start)  # (B, T, n_embd)
        cache = cache or [None] * (len(self.transformer.h) + len(self.ahead))
        *trunk, last = zip(self.transformer.h, cache)
        for block, layer_cache in trunk:
            x = block(x, layer_cache)
        block, layer_cache = last
        head_0 = block(x, layer_cache)
        if self.config.head == 'linear':
            x = head_0
        return [head_0, *(head(x, layer_cache) for head, layer_cache in zip(self.ahead, cache[len(self.transformer.h):]))]

    def head_targets(self, x, targets):
        """What each head learns from the next tokens, targets (B, T): k tensors (B, T - i), in which head i has
        targets[t + i] at t, and no place where that lies past the end.

        With positions='greedy' a further head learns only where each token between is the likeliest by head 0, whose last
        residual stream is x (B, T, n_embd); elsewhere stands -1. Its guess is then one of what follows the model's own
        choices, which is what decoding asks of it, not of what follows all that might have come.
        """
        shifted = [targets[:, i:] for i in range(self.config.k_ahead)]
        if self.config.positions == 'greedy':
            with torch.no_grad():
                chosen = self.unembed(x).argmax(dim=-1) == targets  # (B, T)
            all_chosen = chosen
            for i in range(1, len(shifted)):
                all_chosen = all_chosen[:, :-1]
                shifted[i] = shifted[i].masked_fill(~all_chosen, -1)
                all_chosen = all_chosen & chosen[:, i:]
        return shifted

    def head_loss(self, x, targets):
        """The mean loss in nats of a head with the last residual stream x (B, T, n_embd) on its targets (B, T - i); 0 where
        it has none."""
        logits = self.unembed(x[:, :targets.size(1)])
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='sum')
        return total / (targets != -1).sum().clamp(min=1)

    @torch.compiler.disable  # which would compute the next head's logits while it still has those of the last
    def checkpointed_loss(self, x, targets):
        """head_loss, whose logits the backward pass computes again rather than keep them."""
        return checkpoint(self.head_loss, x, targets, use_reentrant=False, preserve_rng_state=False)

    def losses(self, idx, targets):
        """The loss of each head, (k,), in nats, and the share (k,) of the positions with a target at which it learns: 1 with
        positions='all'. Only one head's logits are alive at a time, since k times the vocabulary is what would fill the
        memory. Raises ValueError for more tokens than block_size."""
        self.check_length(idx.size(1))
        return self.losses_of(self.head_states(idx), targets)

    def losses_of(self, states, targets):
        """losses, of the heads' last residual streams, k tensors (B, T, n_embd)."""
        learned = self.head_targets(states[0], targets)
        losses = [self.checkpointed_loss(x, wanted) for x, wanted in zip(states, learned)]
        counts = [((wanted != -1).sum(), (targets[:, i:] != -1).sum().clamp(min=1)) for i, wanted in enumerate(learned)]
        return torch.stack(losses), torch.stack([n / n_all for n, n_all in counts])

    def forward(self, idx, targets=None):
        """idx (B, T) token ids, targets (B, T) the next ones, -1 where none is to be learned.

        Returns logits (B, k, T, vocab_size) and the weighted mean of the heads' losses, which head_losses (k,) keeps; None
        without targets. In training the logits are None: see losses. With positions='greedy' each loss counts by the share
        of the positions at which its head learns, so that each position weighs the same. Raises ValueError for more tokens
        than block_size.
        """
        self.check_length(idx.size(1))
        states, logits, loss = self.head_states(idx), None, None
        if targets is None or not self.training:
            logits = torch.stack([self.unembed(x) for x in states], dim=1)  # (B, k, T, vocab_size)
        if targets is not None:
            losses, shares = self.losses_of(states, targets)
            self.head_losses = losses.detach()
            weights = losses.new_tensor(self.config.normalised_weights())
            loss = (losses * shares * weights).sum()  # no @, which autocast would take for a matrix product in half precision
        return logits, loss

    def next_logits(self, idx, cache=None):
        return GPT.forward(self, idx, cache=cache)[0][:, -1]  # of head 0 alone

    def new_cache(self, B, length):
        """The cache of the ordinary model, then that of each further head."""
        weight = self.lm_head.weight
        return super().new_cache(B, length) + [
            head.attn.new_cache(B, length, weight.dtype, weight.device) if self.config.head == 'block' else Cache([])
            for head in self.ahead]

    def flops_per_token(self):
        """GPT's count, in which the unembedding occurs once for each head."""
        c = self.config
        blocks = len(self.ahead) if c.head == 'block' else 0
        return (super().flops_per_token() + 12 * blocks * c.n_embd * c.block_size
                + 6 * (c.k_ahead - 1) * c.vocab_size * c.n_embd)
