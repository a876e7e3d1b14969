"""
GPT-2 with multi-latent attention (MLA): keys and values of all heads are read from one small latent
per token.

    MHA                              MLA
    k = W_K x,  v = W_V x            c = W_E x,  k = W_K c,  v = W_V c

The queries still read the residual stream x (B, T, n_embd); c is (B, T, n_latent). All else is
model.py. In decoding only c has to be remembered: n_latent numbers per token and layer instead of
2 n_embd.

Reference: DeepSeek-AI 2024, "DeepSeek-V2", eq. 9-11, without its rotary keys and its compressed
queries. Positions are GPT-2's learned ones here, so that the models differ in attention alone.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import GPT, GPTConfig, attend, split_heads, weights_into_heads, weights_out_of_heads


@dataclass
class MLAConfig(GPTConfig):
    n_latent: int | None = None  # width of the latent of keys and values; None: n_embd // 2

    def __post_init__(self):
        super().__post_init__()
        if self.n_latent is None:
            self.n_latent = max(1, self.n_embd // 2)
        if self.n_latent < 1:
            raise ValueError(f'n_latent={self.n_latent} must be at least 1, or None for '
                             'n_embd // 2')


class MultiLatentAttention(nn.Module):
    """Attention whose keys and values are linear maps of one latent per token, which all heads
    share."""

    def __init__(self, config):
        super().__init__()
        # no bias: the biases of key and value already stand for W_K b and W_V b
        self.latent_enc = nn.Linear(config.n_embd, config.n_latent, bias=False)
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.key = nn.Linear(config.n_latent, config.n_embd, bias=config.bias)
        self.value = nn.Linear(config.n_latent, config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout
        self.n_head = config.n_head

    def init_weights(self):
        """MHA's k and v have weights of standard deviation 0.02. The product of two matrices has it
        too if the first has n_latent**-0.5. With 0.02 in both, a comparison with MHA would be one
        of initialisations."""
        std = self.latent_enc.out_features ** -0.5
        nn.init.normal_(self.latent_enc.weight, mean=0.0, std=std)

    def keys_and_values(self, c):
        """c (B, S, n_latent) -> k, v, both (B, n_head, S, head_dim)"""
        return split_heads(self.key(c), self.n_head), split_heads(self.value(c), self.n_head)

    def heads(self, x):
        """x (B, T, n_embd) -> q, k, v, each (B, n_head, T, head_dim)"""
        return split_heads(self.query(x), self.n_head), *self.keys_and_values(self.latent_enc(x))

    def forward(self, x, cache=None):
        c = self.latent_enc(x)  # (B, T, n_latent)
        mask = None
        if cache is not None:
            c, mask = cache.append(c)  # c (B, S, n_latent)
        if c.size(1) == x.size(1):
            # training, or a prompt: keys and values exist during this pass alone
            q = split_heads(self.query(x), self.n_head)
            dropout_p = self.dropout if self.training else 0.0
            y = attend(q, *self.keys_and_values(c), mask, dropout_p)
        else:
            y = self.attend_absorbed(self.query(x), c, mask)
        return self.resid_dropout(self.c_proj(y))  # (B, T, n_embd)

    def attend_absorbed(self, q, c, mask=None):
        """attend() in the latent space, where no key and no value is ever computed.

        Scores are (W_K^T q) . c, and W_V acts on the mean of the latents that they weigh
        (DeepSeek-V2, section 2.1.2). The bias of the keys adds the same to all scores of a query,
        which the softmax does not feel. The bias of the values comes last.

        q (B, T, n_embd) are the last T of the S tokens of c (B, S, n_latent). mask is attend's,
        (B, 1, T, S) or (T, S). Returns (B, T, n_embd).
        """
        B, T, n_embd = q.shape
        H = self.n_head
        W_K = self.key.weight.view(H, n_embd // H, -1)  # (n_head, head_dim, n_latent)
        W_V = self.value.weight.view(H, n_embd // H, -1)
        q = torch.bmm(q.view(B * T, H, -1).transpose(0, 1), W_K)  # (n_head, B * T, n_latent)
        q = q.transpose(0, 1).reshape(B, 1, T * H, -1)  # all heads as rows of one: they share c
        if mask is not None:
            mask = mask.repeat_interleave(H, dim=-2)  # (..., T * n_head, S)
        c = c.unsqueeze(1)  # (B, 1, S, n_latent)
        scale = (n_embd // H) ** -0.5
        z = F.scaled_dot_product_attention(q, c, c, mask, scale=scale)  # (B, 1, T * H, n_latent)
        y = torch.bmm(W_V, z.reshape(B * T, H, -1).permute(1, 2, 0))  # (n_head, head_dim, B * T)
        y = y.permute(2, 0, 1).reshape(B, T, n_embd)
        return y if self.value.bias is None else y + self.value.bias

    def cache_shapes(self, B, length):
        """The latents: n_latent numbers per token."""
        return [(B, length, self.latent_enc.out_features)]

    def head_weights(self):
        """The latent is multiplied out. So over all heads together, W_K and W_V have at most rank
        n_latent."""
        W_E = self.latent_enc.weight.T  # (n_embd, n_latent)
        W_Q = weights_into_heads(self.query, self.n_head)
        W_K = W_E @ weights_into_heads(self.key, self.n_head)
        W_V = W_E @ weights_into_heads(self.value, self.n_head)
        return W_Q, W_K, W_V, weights_out_of_heads(self.c_proj, self.n_head)


class GPT_MLA(GPT):
    model_type = 'mla'
    config_class = MLAConfig
    attention_class = MultiLatentAttention
