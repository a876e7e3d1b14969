"""
GPT-2 that predicts k tokens at once: one trunk, k heads. Head i, counted from 0, predicts the token
i places after the next. Users count the heads from 1.

    head='block'     trunk = n_layer - 1 blocks    head i = one block more
    head='linear'    trunk = n_layer blocks        head 0 = the trunk itself, head i = x + W_i x

All heads share the final norm and the unembedding. Head 0 with the trunk is the ordinary model of
n_layer blocks, in the same parameters under the same names. So a GPT_KAhead is a GPT with k - 1
heads beside it, and all that reads a GPT reads this one.

Another kind of head is a class like BlockHead and an entry in HEADS.

Reference: Gloeckle et al. 2024, "Better & Faster Large Language Models via Multi-token Prediction",
eq. 2 and section 2.
"""

from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
import torch.nn as nn

from model import GPT, Block, CausalSelfAttention, GPTConfig
from model_mla import MLAConfig, MultiLatentAttention

ATTENTIONS = {'mha': CausalSelfAttention, 'mla': MultiLatentAttention}


class BlockHead(Block):
    """A block of its own, beside the ordinary model's last one."""
    reads_before_last_block = True  # otherwise a head reads the stream after all n_layer blocks

    def __init__(self, config):
        super().__init__(config.of_layer(config.n_layer - 1), ATTENTIONS[config.attention])

    def cache_shapes(self, B, length):
        return self.attn.cache_shapes(B, length)

    def extra_flops(self, config):
        """FLOPs per token, forward and backward, beyond 6 for each parameter (PaLM, appendix B)."""
        return config.attention_flops()


class LinearHead(nn.Module):
    """x + W x: the lighter head. It looks at no other position, so it remembers nothing."""
    reads_before_last_block = False

    def __init__(self, config):
        super().__init__()
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, cache=None):
        return x + self.c_proj(x)

    def cache_shapes(self, B, length):
        return []

    def extra_flops(self, config):
        return 0


HEADS = {'block': BlockHead, 'linear': LinearHead}


@dataclass
class KAheadConfig(MLAConfig):
    k_ahead: int = 4  # tokens predicted at each position: the next one and those after it
    attention: Literal[*ATTENTIONS] = 'mha'  # of the trunk and of the heads
    head: Literal[*HEADS] = 'block'  # what a head is: a block, or a lighter linear map
    positions: Literal['all', 'greedy'] = 'all'  # where further heads learn: 'greedy':
                                                 # after text that head 1 finds likeliest
    loss_weights: str = ''  # weights of the heads' losses in the mean, with commas, such as
                            # '1,0.5,0.5,0.5'; '': equal

    def __post_init__(self):
        options = dict(attention=ATTENTIONS, head=HEADS, positions=('all', 'greedy'))
        for key, known in options.items():
            value = getattr(self, key)
            if value not in known:
                raise ValueError(f"{key}={value!r} must be {' or '.join(map(repr, known))}")
        if self.attention == 'mla':
            super().__post_init__()
        else:
            self.refuse_latent()
            GPTConfig.__post_init__(self)
        if not 1 <= self.k_ahead < self.block_size:
            raise ValueError(f'k_ahead={self.k_ahead} must be at least 1 and below '
                             f'block_size={self.block_size}')
        if HEADS[self.head].reads_before_last_block and self.n_layer < 2:
            raise ValueError(f'n_layer={self.n_layer} must be at least 2 with head={self.head!r}: '
                             "a block for the trunk, one for the heads; or use head='linear'")
        self.normalised_weights()

    def refuse_latent(self):
        """Raise ValueError for a setting of MLA."""
        of_mla = {f.name: f.default for f in fields(MLAConfig)}
        for f in fields(GPTConfig):
            del of_mla[f.name]
        given = {key: getattr(self, key) for key in of_mla if getattr(self, key) != of_mla[key]}
        if self.rotary == 'decoupled':
            given['rotary'] = self.rotary
        for key, value in given.items():
            raise ValueError(f"{key}={value!r} is for attention='mla', attention is "
                             f'{self.attention!r}: leave it out, or give --attention=mla')

    def normalised_weights(self):
        """The weights of the heads' losses, a list of k_ahead numbers that add up to 1. Raises
        ValueError for loss_weights that are no such numbers."""
        if not self.loss_weights:
            return [1.0 / self.k_ahead] * self.k_ahead
        try:
            weights = [float(part) for part in self.loss_weights.split(',')]
        except ValueError:
            weights = []
        total = sum(weights)
        if len(weights) != self.k_ahead or not min(weights) >= 0 or not 0 < total < float('inf'):
            raise ValueError(f'loss_weights={self.loss_weights!r} must be {self.k_ahead} numbers '
                             '(k_ahead) with commas between them, none below 0 and not all 0')
        return [weight / total for weight in weights]


class GPT_KAhead(GPT):
    model_type = 'k_ahead'
    config_class = KAheadConfig

    def __init__(self, config):
        self.attention_class = ATTENTIONS[config.attention]
        super().__init__(config)  # trunk and head 0, which start as the same seed's ordinary model
        self.n_predictions = config.k_ahead
        head_class = HEADS[config.head]
        self.ahead = nn.ModuleList(head_class(config) for _ in range(config.k_ahead - 1))
        self.ahead.apply(self._init_weights)
        self._init_residual_writers(self.ahead)
        self.head_losses = None  # (k,) nats, of the last batch with targets

    @classmethod
    def from_gpt(cls, gpt, **settings):
        """A GPT_KAhead whose trunk and head 0 have the weights of an ordinary model. settings are
        k_ahead, head, positions and loss_weights. Heads that the model lacks start at random."""
        names = {attention_class: name for name, attention_class in ATTENTIONS.items()}
        attention = names[gpt.attention_class]
        config = KAheadConfig(**asdict(gpt.config), attention=attention, **settings)
        model = cls(config).to(gpt.lm_head.weight)
        model.load_state_dict(gpt.state_dict(), strict=False)
        return model.train(gpt.training)

    def head_states(self, idx, cache=None):
        """The last residual stream of each head, k tensors (B, T, n_embd), for idx (B, T). A cache
        holds the tokens before idx, whose number may differ from sequence to sequence, and takes
        up idx."""
        *trunk, last_block = self.transformer.h
        caches = cache or [None] * (len(trunk) + 1 + len(self.ahead))
        x = self.embed(idx, cache[0].start if cache else 0)  # (B, T, n_embd)
        for block, layer_cache in zip(trunk, caches):
            x = block(x, layer_cache)
        head_0 = last_block(x, caches[len(trunk)])
        if not HEADS[self.config.head].reads_before_last_block:
            x = head_0
        further = zip(self.ahead, caches[len(trunk) + 1:])
        return [head_0, *(head(x, layer_cache) for head, layer_cache in further)]

    def head_targets(self, x, targets):
        """What each head learns from the next tokens, targets (B, T): k tensors (B, T - i), in
        which head i has targets[t + i] at t. There is no place where that lies past the end.

        With positions='greedy' a further head learns only where each token between is the
        likeliest by head 0, whose last residual stream is x (B, T, n_embd). Elsewhere stands -1.
        The head then predicts what follows the model's own choices, which is what decoding asks of
        it, and not what follows all that might have come.
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

    def losses(self, idx, targets):
        """The loss of each head, (k,), in nats, and the share (k,) of the positions with a target
        at which it learns: 1 with positions='all'. Raises ValueError beyond block_size."""
        self.check_length(idx.size(1))
        return self.losses_of(self.head_states(idx), targets)[1:]

    def losses_of(self, states, targets):
        """The loss to learn from and what losses() gives, of the heads' last residual streams, k
        tensors (B, T, n_embd). The unembedding reads those of all heads as one batch, so that it
        has one gradient."""
        from runtime.cross_entropy import linear_cross_entropy  # to learn, not to predict
        shifted = self.head_targets(states[0], targets)
        sizes = [wanted.numel() for wanted in shifted]
        x = torch.cat([x[:, :t.size(1)].flatten(0, 1) for x, t in zip(states, shifted)])
        wanted = torch.cat([t.flatten() for t in shifted])  # (N,), of all heads
        n_all = torch.stack([(targets[:, i:] != -1).sum() for i in range(len(shifted))])
        n_all = n_all.clamp(min=1)
        n_known = torch.stack([(t != -1).sum() for t in shifted])
        # of each row, but for 1 / n_all[0], which comes last: half precision could not hold it
        weights = torch.tensor(self.config.normalised_weights(), device=x.device,
                               dtype=torch.promote_types(x.dtype, torch.float32))
        weights = weights * n_all[0] / n_all
        row_weights = torch.cat([w.expand(n) for w, n in zip(weights, sizes)])
        loss_of_rows = linear_cross_entropy
        if torch.compiler.is_compiling():  # compiled, the logits of all heads would be alive
            loss_of_rows = torch.compiler.disable(linear_cross_entropy)
        loss, losses = loss_of_rows(self.transformer.ln_f(x), self.lm_head.weight, wanted,
                                    row_weights, self.max_logits)
        of_heads = torch.stack([part.sum() for part in losses.split(sizes)])
        return loss / n_all[0], of_heads / n_known.clamp(min=1), n_known / n_all

    def forward(self, idx, targets=None):
        """idx (B, T) are token ids, targets (B, T) the next ones, -1 where none is to be learned.

        Returns logits (B, k, T, vocab_size) and the weighted mean of the heads' losses, which
        head_losses (k,) keeps; None without targets. In training the logits are None.
        With positions='greedy' each loss counts by the share of the positions at which its head
        learns, so that each position weighs the same. Raises ValueError for more tokens than
        block_size.
        """
        self.check_length(idx.size(1))
        states = self.head_states(idx)
        logits, loss = None, None
        if targets is None or not self.training:
            logits = torch.stack([self.unembed(x) for x in states], dim=1)  # (B, k, T, vocab_size)
        if targets is not None:
            loss, self.head_losses, _ = self.losses_of(states, targets)
        return logits, loss

    def next_logits(self, idx, cache=None):
        return super().forward(idx, cache=cache)[0][:, -1]  # of head 0 alone

    def cache_shapes(self, B, length):
        """Those of the ordinary model's layers, then those of each further head."""
        of_heads = [head.cache_shapes(B, length) for head in self.ahead]
        return super().cache_shapes(B, length) + of_heads

    def flops_per_token(self):
        """GPT's count, in which the unembedding occurs once for each head."""
        c = self.config
        of_heads = sum(head.extra_flops(c) for head in self.ahead)
        return super().flops_per_token() + of_heads + 6 * (c.k_ahead - 1) * c.vocab_size * c.n_embd
