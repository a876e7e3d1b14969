"""
GPT-2 with multi-head attention (MHA), the whole model in this file. It needs torch alone.
To learn it needs runtime/cross_entropy.py too, which is the loss.

model_mla.py replaces the attention and nothing else. Parameter names, initialisation and call
signatures are nanoGPT's (https://github.com/karpathy/nanoGPT), so checkpoints travel both ways.

An attention is a module made from the model's config. The rest of the project knows this of it:

    forward(x, cache=None)   causal attention over x (B, T, n_embd), and over what a cache holds:
                             cache.append(*rows) -> (*all rows so far, mask)
    heads(x, start=0, tap)   q, k, v per head, (B, n_head, T, width), as the scores see them: x's
                             first token is at the position start; tap is that of analysis/record
    head_weights()           maps of row vectors: W_Q, W_K, W_V (n_head, n_embd, head_dim) and
                             W_O (n_head, head_dim, n_embd). W_Q and W_K are without positions
    rotary_weights()         optional: maps Q, K (n_head, n_embd, width) of the part of the scores
                             whose pairs of numbers turn, before they do; None where none turns
    cache_shapes(B, length)  what must be remembered: a list of shapes (B, ..., length, width)
    init_weights()           optional: draws what starts otherwise than GPT-2's weights do
    c_proj                   the linear map that sums up the heads, which lie side by side

References
    GPT-2        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
    attention    Vaswani et al. 2017, "Attention Is All You Need", eq. 1
    rotary       Su et al. 2021, "RoFormer", eq. 34
    GQA          Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models"
    gated MLP    Shazeer 2020, "GLU Variants Improve Transformer", eq. 6, SwiGLU
    FLOP count   Chowdhery et al. 2022, "PaLM", appendix B
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F


def require(fine, message):
    if not fine:
        raise ValueError(message)


def as_is(name, value):
    return value


@dataclass
class GPTConfig:
    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which is faster
    n_layer: int = 12  # number of transformer blocks
    n_head: int = 12  # attention heads per block; must divide n_embd
    n_embd: int = 768  # width of the residual stream
    dropout: float = 0.0  # 0 for pretraining, 0.1 or more for finetuning
    bias: bool = True  # biases in Linear and LayerNorm, like GPT-2; False: a bit better and faster
    gelu: Literal['none', 'tanh'] = 'none'  # approximation of GELU; GPT-2's weights want 'tanh'
    n_kv_head: int | None = None  # heads of keys and values; None: n_head (MHA); fewer are shared
                                  # by groups of queries (GQA); 1: by all (MQA)
    rotary: Literal['none', 'all'] = 'none'  # 'all': queries and keys are turned by their positions
                                             # (RoPE), and learned positions (wpe) are not there
    rotary_base: float = 10000.0  # of the angles; 1000 suits contexts of some hundred tokens
    mlp: Literal[True, False, 'gated'] = True  # False: attention only; 'gated': SwiGLU, as in Llama

    def __post_init__(self):
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            require(getattr(self, key) >= 1, f'{key}={getattr(self, key)} must be at least 1')
        require(self.n_layer <= 10_000, f'n_layer={self.n_layer} must be at most 10000')
        require(self.n_embd % self.n_head == 0,
                f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: make n_embd a '
                f'multiple of {self.n_head} or choose another n_head')
        require(0 <= self.dropout < 1, f'dropout={self.dropout} must be at least 0 and below 1')
        n_kv_head = self.n_head if self.n_kv_head is None else self.n_kv_head
        require(n_kv_head >= 1 and self.n_head % n_kv_head == 0,
                f'n_kv_head={n_kv_head} must divide n_head={self.n_head}, or be None for as many')
        require(self.rotary != 'all' or self.head_dim % 2 == 0,
                f"rotary='all' turns pairs of numbers, and n_embd={self.n_embd} with n_head="
                f'{self.n_head} gives heads of {self.head_dim}: make that even')
        require(self.rotary_base > 1, f'rotary_base={self.rotary_base} must be above 1')

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    def of_layer(self, layer):
        """The config that a layer is made from. A tuple has a value for each layer."""
        own = {key: value[layer] for key, value in vars(self).items() if isinstance(value, tuple)}
        return replace(self, **own) if own else self

    def attention_flops(self):
        """FLOPs of a layer's scores and sums per token, forward and backward (PaLM, appendix B)."""
        return 12 * self.n_embd * self.block_size


class LayerNorm(nn.Module):
    """Layer norm whose bias is optional, with nanoGPT's parameter names."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def split_heads(x, n_head):
    """(B, T, n_embd) -> (B, n_head, T, head_dim)"""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def rotate(x, start, base):
    """Rotary positions (RoFormer, eq. 34) of x (B, H, T, width), first at start, int or (B, 1).
    Numbers i and i + width / 2 are a pair, which turns by position / base^(2 i / width) radians."""
    position = start + torch.arange(x.size(2), device=x.device)  # (T,) or (B, T)
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(0, x.size(-1), 2, device=x.device, dtype=dtype) / x.size(-1)
    angle = position.view(-1, 1, x.size(2), 1) / base ** exponent  # (B or 1, 1, T, width / 2)
    cos, sin = angle.cos(), angle.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(q, k, v, mask=None, dropout_p=0.0):
    """Causal softmax(q k^T / sqrt(width)) v (Vaswani et al. 2017, eq. 1) in one fused kernel.
    q (B, n_head, T, width) are the last T of the S tokens of k (B, n_kv_head, S, width) and v
    (B, n_kv_head, S, head_dim), whose heads groups of queries share. mask, which broadcasts to
    (B, n_head, T, S), says which of the tokens each may look at. T = S and T = 1 need none. Returns
    the heads side by side, (B, T, n_embd)."""
    T, width, head_dim = q.size(2), q.size(3), v.size(3)
    is_grouped = q.size(1) != k.size(1)
    is_half = q.device.type == 'cpu' and q.dtype.itemsize == 2
    if T == 1 < k.size(2) and mask is None and is_half and not is_grouped:
        y = F.softmax(q @ k.mT * width ** -0.5, dim=-1) @ v  # three times as fast as the kernel
    else:
        is_causal = mask is None and T == k.size(2)
        if head_dim < width:  # the fast kernels want one width
            v = F.pad(v, (0, width - head_dim))
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=is_causal,
                                           enable_gqa=is_grouped)[..., :head_dim]
    return y.transpose(1, 2).flatten(2)


def weights_into_heads(linear, n_head):
    """The weight of a Linear whose outputs are the heads side by side, as maps (n_head, n_in,
    head_dim) of row vectors: x @ W[h] is what head h gets."""
    return linear.weight.unflatten(0, (n_head, -1)).transpose(1, 2)


class CausalSelfAttention(nn.Module):
    """Multi-head attention: every head reads its keys and values from the residual stream, or
    every group of heads if n_kv_head is below n_head."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        n_all = self.n_head + 2 * self.n_kv_head
        self.c_attn = nn.Linear(config.n_embd, n_all * config.head_dim, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout, self.dropout = nn.Dropout(config.dropout), config.dropout
        self.is_rotary, self.base = config.rotary == 'all', config.rotary_base

    def of_all(self, q, k, v):
        """k and v (n_kv_head in dimension -3) with a copy for each head, n_head like q."""
        n = self.n_head // self.n_kv_head
        return q, k.repeat_interleave(n, dim=-3), v.repeat_interleave(n, dim=-3)

    def project(self, x, start=0, tap=as_is):
        """x (B, T, n_embd) -> q (B, n_head, T, head_dim), k and v (B, n_kv_head, T, head_dim)"""
        all_heads = split_heads(self.c_attn(x), self.n_head + 2 * self.n_kv_head)
        parts = all_heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        q, k, v = (tap(name, part) for name, part in zip('qkv', parts))
        if self.is_rotary:
            q = tap('rot_q', rotate(q, start, self.base))
            k = tap('rot_k', rotate(k, start, self.base))
        return q, k, v

    def heads(self, x, start=0, tap=as_is):
        return self.of_all(*self.project(x, start, tap))

    def forward(self, x, cache=None):
        q, k, v = self.project(x, cache.start if cache else 0)
        k, v, mask = cache.append(k, v) if cache else (k, v, None)  # k, v (B, n_kv_head, S, ...)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y))  # (B, T, n_embd)

    def cache_shapes(self, B, length):
        """Keys and values: 2 n_kv_head head_dim numbers per token."""
        return 2 * [(B, self.n_kv_head, length, self.c_proj.in_features // self.n_head)]

    def head_weights(self):
        W = weights_into_heads(self.c_attn, self.n_head + 2 * self.n_kv_head)
        W_Q, W_K, W_V = self.of_all(*W.split((self.n_head, self.n_kv_head, self.n_kv_head)))
        return W_Q, W_K, W_V, self.c_proj.weight.T.unflatten(0, (self.n_head, -1))

    def rotary_weights(self):
        return self.head_weights()[:2] if self.is_rotary else None


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.is_gated = config.mlp == 'gated'
        # two thirds of the width in three matrices are as many parameters
        width = 8 * config.n_embd // 3 if self.is_gated else 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        if self.is_gated:
            self.c_gate = nn.Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.gelu = config.gelu

    def forward(self, x):
        h = self.c_fc(x)
        h = F.silu(self.c_gate(x)) * h if self.is_gated else F.gelu(h, approximate=self.gelu)
        return self.dropout(self.c_proj(h))


class Block(nn.Module):
    def __init__(self, config, attention_class):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = attention_class(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias) if config.mlp else None
        self.mlp = MLP(config) if config.mlp else None

    def mlp_out(self, x):
        """What the MLP makes of x (B, T, n_embd): zeros where there is none."""
        return self.mlp(self.ln_2(x)) if self.mlp else torch.zeros_like(x)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp_out(x)


class GPT(nn.Module):
    model_type = 'gpt'
    config_class = GPTConfig
    attention_class = CausalSelfAttention
    n_predictions = 1  # tokens that are predicted at each position
    max_logits = 2 ** 25  # that a loss has in memory at a time

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config.of_layer(layer), self.attention_class)
                             for layer in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, bias=config.bias),
        ))
        if config.rotary != 'none':
            del self.transformer['wpe']
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied, as in GPT-2

        self.apply(self._init_weights)
        self._init_residual_writers(self)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if hasattr(module, 'init_weights'):  # apply has been to its parts before
            module.init_weights()

    def _init_residual_writers(self, module):
        """What writes to the residual stream starts smaller, lest it grow with depth."""
        for name, p in module.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def get_num_params(self, non_embedding=True):
        """Number of parameters, by default without the position embeddings, as nanoGPT counts."""
        return sum(p.numel() for name, p in self.named_parameters()
                   if not (non_embedding and name == 'transformer.wpe.weight'))

    def embed(self, idx, start=0):
        """The residual stream (B, T, n_embd) before the first block for idx (B, T). start is the
        first token's position, a number or a tensor (B, 1). Positions past the context, where only
        unused drafts of speculation lie, get its last one."""
        x = self.transformer.wte(idx)
        if 'wpe' in self.transformer:
            pos = start + torch.arange(idx.size(1), device=idx.device)
            x = x + self.transformer.wpe(pos.clamp(max=self.config.block_size - 1))
        return self.transformer.drop(x)

    def unembed(self, x):
        """The logits (..., vocab_size) of the last residual stream (..., n_embd)."""
        return self.lm_head(self.transformer.ln_f(x))

    def check_length(self, T):
        if T > self.config.block_size:
            raise ValueError(f'a sequence of {T} tokens does not fit into '
                             f'block_size={self.config.block_size}')

    def last_stream(self, idx, cache=None):
        """The residual stream (B, T, n_embd) after the last block for idx (B, T)."""
        start = cache[0].start if cache else 0
        if not torch.is_tensor(start):  # to ask one would wait for a GPU
            self.check_length(start + idx.size(1))
        x = self.embed(idx, start)  # (B, T, n_embd)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache[i] if cache else None)
        return x

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) are token ids, targets (B, T) the next ones, -1 where none is to be learned.
        A cache (generate.new_cache) holds the tokens before idx, and takes up idx.

        Returns logits (B, T, vocab_size) and the mean cross-entropy in nats; without targets only
        the last position's, (B, 1, vocab_size), and None. In training with targets the logits are
        None: all of them would fill the memory. Raises ValueError beyond block_size.
        """
        x = self.last_stream(idx, cache)
        if targets is None:
            return self.unembed(x[:, [-1]]), None  # the list keeps the time dimension
        return None if self.training else self.unembed(x), self.mean_loss(x, targets)

    def mean_loss(self, x, targets):
        """The mean loss in nats of the last residual stream x (B, T, n_embd) on targets (B, T),
        -1 where there is none; 0 if all are."""
        from runtime.cross_entropy import linear_cross_entropy  # to learn, not to predict
        x, targets = self.transformer.ln_f(x).flatten(0, 1), targets.flatten()
        known, W = targets != -1, self.lm_head.weight
        total, _ = linear_cross_entropy(x, W, targets, known, self.max_logits)
        return total / known.sum().clamp(min=1)

    def next_logits(self, idx, cache=None):
        """The logits (B, vocab_size) of the token after idx (B, T)."""
        return self(idx, cache=cache)[0][:, -1]

    def losses(self, idx, targets):
        """Each prediction's loss in nats and share of positions that learn from it, both (1,)."""
        loss = self.mean_loss(self.last_stream(idx), targets).view(1)
        return loss, torch.ones_like(loss)

    def cache_shapes(self, B, length):
        """One list of shapes a layer: what it must remember of B sequences of length tokens."""
        return [block.attn.cache_shapes(B, length) for block in self.transformer.h]

    def crop_block_size(self, block_size):
        """Forget the positions from block_size on. Raises ValueError for a longer context."""
        known = self.config.block_size
        if not 1 <= block_size <= known:
            raise ValueError(f"block_size={block_size} must lie between 1 and the model's {known}")
        self.config.block_size = block_size
        if 'wpe' in self.transformer:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
            wpe.num_embeddings = block_size

    @classmethod
    def from_state_dict(cls, config, state_dict):
        """A model whose parameters are the tensors of state_dict, not copies. None is initialised
        first. Raises RuntimeError where they do not fit the config."""
        from runtime.skip_init import SkipInit
        with torch.device('meta'), SkipInit():
            model = cls(config)
        model.load_state_dict(state_dict, assign=True)
        model.transformer.wte.weight = model.lm_head.weight
        return model

    @classmethod
    def from_pretrained(cls, source, override_args=None):
        """Weights of transformers', such as GPT-2's: see runtime/hugging_face.py."""
        from runtime.hugging_face import from_hugging_face  # which needs transformers
        return from_hugging_face(cls, source, override_args)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW, fused where torch has it. Matrices and embeddings decay, the rest does not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        fused = device_type in ('cuda', 'cpu', 'mps')
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak):
        """Model FLOPs utilisation, between 0 and 1, when fwdbwd_per_iter sequences of block_size
        tokens went forward and backward in dt seconds, on a device of peak FLOP/s."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak

    def flops_per_token(self):
        """FLOPs per token of a pass forward and backward: 6 for each parameter (PaLM, appendix B),
        and what the scores of attention take."""
        return 6 * self.get_num_params() + self.config.n_layer * self.config.attention_flops()
