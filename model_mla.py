"""
GPT-2 with multi-latent attention (MLA): keys and values of all heads are read from one small latent
per token.

    MHA                       MLA                         and with rotary='decoupled'
    k = W_K x,  v = W_V x     c = W_E x                   [c, r] = W_E x,  r turns with position
    q = W_Q x                 k = W_K c,  v = W_V c       k = [W_K c, r],  r is that of all heads
                              q = W_Q x                   q = W_Q x, its last n_rotary numbers turn

c is (B, T, n_latent) and r is (B, T, n_rotary). All else is model.py. In decoding only c and r have
to be remembered: n_latent + n_rotary numbers per token and layer instead of 2 n_embd.

Reference: DeepSeek-AI 2024, "DeepSeek-V2", eq. 9-11 (latent), 12-13 (n_query_latent), 14-19
(decoupled), section 3.1.2 (latent_norm).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import (
    GPT,
    GPTConfig,
    as_is,
    attend,
    require,
    rotate,
    split_heads,
    weights_into_heads,
)


@dataclass
class MLAConfig(GPTConfig):
    rotary: Literal['none', 'all', 'decoupled'] = 'none'  # 'all': queries and keys turn, without
        # wpe; decoding then rebuilds all keys each time. 'decoupled': n_rotary numbers beside them
    n_latent: int | tuple | None = None  # width of the latent, or each layer's; None: n_embd // 2
    n_rotary: int | None = None  # of rotary='decoupled'; None: half of a head's n_embd / n_head
    latent_norm: bool = False  # RMSNorm on the latents
    latent_scale: bool = False  # latents times sqrt(n_embd / their width), after the norm
    n_query_latent: int | None = None  # width of a latent of the queries; None: there is none

    def __post_init__(self):
        super().__post_init__()
        self.n_latent = max(1, self.n_embd // 2) if self.n_latent is None else self.n_latent
        if self.rotary == 'decoupled' and self.n_rotary is None:
            self.n_rotary = max(2, self.head_dim // 4 * 2)
        widths, turned, n = self.n_latent, self.n_rotary, self.n_query_latent
        each = widths if isinstance(widths, tuple) else [widths] * self.n_layer
        require(len(each) == self.n_layer and min(each) >= 1, f'n_latent={widths} must be at least '
                f'1, once or for each of n_layer={self.n_layer} layers, or None for n_embd // 2')
        require(turned is None or self.rotary == 'decoupled' and turned > 0 == turned % 2,
                f"n_rotary={turned} must be even, at least 2, and only with rotary='decoupled'")
        require(n is None or 0 < n <= self.n_embd, f'n_query_latent={n} must be 1 to {self.n_embd}')
        require(self.n_kv_head is None, f'n_kv_head={self.n_kv_head} is not for MLA: leave it out')

    def attention_flops(self):
        return super().attention_flops() + 6 * self.n_head * (self.n_rotary or 0) * self.block_size


class MultiLatentAttention(nn.Module):
    """Attention whose heads all read their keys and values from one latent per token."""

    def __init__(self, config):
        super().__init__()
        n_embd, n_latent, n_query = config.n_embd, config.n_latent, config.n_query_latent
        n_head, n_rotary = config.n_head, config.n_rotary or 0
        # no bias: the biases of key and value already stand for W_K b and W_V b
        self.latent_enc = nn.Linear(n_embd, n_latent + n_rotary, bias=False)
        self.query_enc = nn.Linear(n_embd, n_query, bias=False) if n_query else None
        self.query = nn.Linear(n_query or n_embd, n_embd + n_head * n_rotary, bias=config.bias)
        self.key = nn.Linear(n_latent, n_embd, bias=config.bias)
        self.value = nn.Linear(n_latent, n_embd, bias=config.bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=config.bias)
        self.resid_dropout, self.dropout = nn.Dropout(config.dropout), config.dropout
        self.n_head, self.n_latent, self.n_rotary = n_head, n_latent, n_rotary
        self.is_rotary, self.base = config.rotary == 'all', config.rotary_base
        self.norms, self.scales = config.latent_norm, config.latent_scale

    def init_weights(self):
        """MHA's k and v have weights of standard deviation 0.02. The product of two matrices has it
        too if the first has width**-0.5. With 0.02 in both, initialisations would be compared."""
        for encoder, n in ((self.latent_enc, self.n_latent), (self.query_enc, None)):
            if encoder is not None:
                W = encoder.weight[:n]  # without the rotary key, which is as MHA's
                nn.init.normal_(W, std=W.size(1 if self.scales else 0) ** -0.5)

    def scaled(self, c):
        return c * (self.c_proj.out_features / c.size(-1)) ** 0.5 if self.scales else c

    def latent(self, c):
        """c (..., width) of an encoder, normed and scaled. Gains are left to what reads it."""
        return self.scaled(F.rms_norm(c, c.shape[-1:], eps=1e-6) if self.norms else c)

    def remembered(self, x, start=0, tap=as_is):
        """x (B, T, n_embd) -> [c, r] (B, T, n_latent + n_rotary), all that decoding needs of it"""
        c, r = self.latent_enc(x).split((self.n_latent, self.n_rotary), dim=-1)
        c = tap('kv_latent', self.latent(c))
        if not self.n_rotary:
            return c
        r = tap('rot_k', rotate(r[:, None], start, self.base))  # (B, 1, T, n_rotary)
        return torch.cat((c, r[:, 0]), dim=-1)

    def queries(self, x, start=0, tap=as_is):
        """x (B, T, n_embd) -> q (B, n_head, T, head_dim + n_rotary)"""
        q = self.query(tap('q_latent', self.latent(self.query_enc(x))) if self.query_enc else x)
        q = split_heads(q, self.n_head)
        if self.is_rotary:
            return tap('rot_q', rotate(tap('q', q), start, self.base))
        if self.n_rotary:
            q, turned = q.split((q.size(-1) - self.n_rotary, self.n_rotary), dim=-1)
            q = torch.cat((q, tap('rot_q', rotate(turned, start, self.base))), dim=-1)
        return tap('q', q)

    def keys_and_values(self, m, start=0, tap=as_is):
        """m = [c, r] (B, S, n_latent + n_rotary) -> k and v, as of heads()"""
        c, r = m.split((self.n_latent, self.n_rotary), dim=-1)
        k, v = split_heads(self.key(c), self.n_head), split_heads(self.value(c), self.n_head)
        if self.n_rotary:
            k = torch.cat((k, r.unsqueeze(1).expand(-1, self.n_head, -1, -1)), dim=-1)
        k, v = tap('k', k), tap('v', v)
        return tap('rot_k', rotate(k, start, self.base)) if self.is_rotary else k, v

    def heads(self, x, start=0, tap=as_is):
        m = self.remembered(x, start, tap)
        return self.queries(x, start, tap), *self.keys_and_values(m, start, tap)

    def forward(self, x, cache=None):
        start = cache.start if cache else 0
        q, m = self.queries(x, start), self.remembered(x, start)
        m, mask = cache.append(m) if cache else (m, None)  # m (B, S, n_latent + n_rotary)
        if m.size(1) == x.size(1) or self.is_rotary:
            # training, or a prompt: keys and values exist during this pass alone
            y = attend(q, *self.keys_and_values(m), mask, self.dropout if self.training else 0.0)
        else:
            y = self.attend_absorbed(q, m, mask)
        return self.resid_dropout(self.c_proj(y))  # (B, T, n_embd)

    def attend_absorbed(self, q, m, mask=None):
        """attend() for q (B, n_head, T, head_dim + n_rotary) and m = [c, r] (B, S, n_latent +
        n_rotary), in which no key and no value is ever computed. Scores are [W_K^T q, turned q] . m
        and W_V acts on the mean of the latents that they weigh (DeepSeek-V2, section 2.1.2). The
        bias of the keys adds the same to all scores of a query, which the softmax does not feel.
        The bias of the values comes last."""
        B, H, T, width = q.shape
        W_K, W_V = (part.weight.unflatten(0, (H, -1)) for part in (self.key, self.value))
        q = q.transpose(0, 1).reshape(H, B * T, width)
        q, turned = q.split((width - self.n_rotary, self.n_rotary), dim=-1)
        q = torch.cat((torch.bmm(q, W_K), turned), dim=-1)  # (n_head, B * T, n_latent + n_rotary)
        q = q.transpose(0, 1).reshape(B, 1, T * H, -1)  # all heads as rows of one: they share m
        mask = None if mask is None else mask.repeat_interleave(H, dim=-2)  # (..., T * n_head, S)
        m = m.unsqueeze(1)  # (B, 1, S, n_latent + n_rotary)
        z = F.scaled_dot_product_attention(q, m, m, mask, scale=width ** -0.5)
        z = z[..., :self.n_latent].reshape(B * T, H, -1)  # the means of c; those of r are of no use
        y = torch.bmm(W_V, z.permute(1, 2, 0)).permute(2, 0, 1).reshape(B, T, -1)
        return y if self.value.bias is None else y + self.value.bias

    def cache_shapes(self, B, length):
        return [(B, length, self.n_latent + self.n_rotary)]

    def query_maps(self):
        """The queries, rotary part included, as maps (n_head, n_embd, head_dim + n_rotary) of x."""
        W = weights_into_heads(self.query, self.n_head)
        return self.scaled(self.query_enc.weight.T) @ W if self.query_enc else W

    def head_weights(self):
        """The latents are multiplied out, but for their norms, which divide each token by another
        number. So over all heads together, W_K and W_V have at most rank n_latent."""
        W_E = self.scaled(self.latent_enc.weight[:self.n_latent].T)  # (n_embd, n_latent)
        W_K, W_V = (W_E @ weights_into_heads(part, self.n_head) for part in (self.key, self.value))
        W_O = self.c_proj.weight.T.unflatten(0, (self.n_head, -1))
        return self.query_maps()[..., :W_K.size(-1)], W_K, W_V, W_O

    def rotary_weights(self):
        if self.n_rotary:
            K = self.latent_enc.weight[self.n_latent:].T  # (n_embd, n_rotary)
            return self.query_maps()[..., -self.n_rotary:], K.expand(self.n_head, -1, -1)
        return self.head_weights()[:2] if self.is_rotary else None


class GPT_MLA(GPT):
    model_type = 'mla'
    config_class = MLAConfig
    attention_class = MultiLatentAttention
