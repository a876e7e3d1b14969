"""
GPT-2 with multi-head attention (MHA), the whole model in this file. It needs torch alone.

model_mla.py replaces the attention and nothing else. Parameter names, initialisation and call
signatures are nanoGPT's (https://github.com/karpathy/nanoGPT), so checkpoints travel both ways.

An attention is a module made from the model's config. The rest of the project knows this of it:

    forward(x, cache=None)   causal attention over x (B, T, n_embd), and over what a cache holds:
                             cache.append(*rows) -> (*all rows so far, mask)
    heads(x)                 q, k, v per head, each (B, n_head, T, head_dim)
    head_weights()           maps of row vectors: W_Q, W_K, W_V (n_head, n_embd, head_dim) and
                             W_O (n_head, head_dim, n_embd)
    cache_shapes(B, length)  what must be remembered: a list of shapes (B, ..., length, width)
    init_weights()           optional: draws what starts otherwise than GPT-2's weights do
    c_proj                   the linear map that sums up the heads, which lie side by side

References
    GPT-2        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
    attention    Vaswani et al. 2017, "Attention Is All You Need", eq. 1
    FLOP count   Chowdhery et al. 2022, "PaLM", appendix B
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F


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

    def __post_init__(self):
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)} must be at least 1')
        if self.n_layer > 10_000:
            raise ValueError(f'n_layer={self.n_layer} must be at most 10000')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: make '
                             f'n_embd a multiple of {self.n_head} or choose another n_head')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and below 1')


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


def attend(q, k, v, mask=None, dropout_p=0.0):
    """Causal softmax(q k^T / sqrt(head_dim)) v (Vaswani et al. 2017, eq. 1) in one fused kernel.
    q (B, n_head, T, head_dim) are the last T of the S tokens of k and v (B, n_head, S, head_dim).
    mask, which broadcasts to (B, n_head, T, S), says which of them each may look at. T = S and
    T = 1 need none. Returns the heads side by side, (B, T, n_embd)."""
    B, n_head, T, head_dim = q.shape
    if T == 1 < k.size(2) and mask is None and q.device.type == 'cpu' and q.dtype.itemsize == 2:
        y = F.softmax(q @ k.mT * head_dim ** -0.5, dim=-1) @ v  # three times as fast as the kernel
    else:
        is_causal = mask is None and T == k.size(2)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=is_causal)
    return y.transpose(1, 2).reshape(B, T, n_head * head_dim)


def weights_into_heads(linear, n_head):
    """The weight of a Linear whose outputs are the heads side by side, as maps (n_head, n_in,
    head_dim) of row vectors: x @ W[h] is what head h gets."""
    return linear.weight.unflatten(0, (n_head, -1)).transpose(1, 2)


def weights_out_of_heads(linear, n_head):
    """The same of a Linear whose inputs are the heads: (n_head, head_dim, n_out)."""
    return linear.weight.T.unflatten(0, (n_head, -1))


class CausalSelfAttention(nn.Module):
    """Multi-head attention: every head reads its keys and values from the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout
        self.n_head = config.n_head

    def heads(self, x):
        return tuple(split_heads(part, self.n_head) for part in self.c_attn(x).chunk(3, dim=-1))

    def forward(self, x, cache=None):
        q, k, v = self.heads(x)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)  # k, v (B, n_head, S, head_dim)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y))  # (B, T, n_embd)

    def cache_shapes(self, B, length):
        """Keys and values: 2 n_embd numbers per token."""
        shape = B, self.n_head, length, self.c_proj.in_features // self.n_head
        return [shape, shape]

    def head_weights(self):
        W_Q, W_K, W_V = weights_into_heads(self.c_attn, 3 * self.n_head).chunk(3)
        return W_Q, W_K, W_V, weights_out_of_heads(self.c_proj, self.n_head)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.gelu = config.gelu

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu)))


class Block(nn.Module):
    def __init__(self, config, attention_class):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = attention_class(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


# Dense bf16 peaks in FLOP/s from data sheets. The first key that is in the device's name counts.
PEAK_FLOPS = {'GB200': 2500e12, 'B200': 2250e12, 'H200 NVL': 835e12, 'H200': 989e12,
              'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12,
              'RTX 4090': 165e12, 'RTX 3090': 71e12}


class GPT(nn.Module):
    model_type = 'gpt'
    config_class = GPTConfig
    attention_class = CausalSelfAttention
    n_predictions = 1  # tokens that are predicted at each position

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, self.attention_class) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, bias=config.bias),
        ))
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
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def embed(self, idx, start=0):
        """The residual stream (B, T, n_embd) before the first block for idx (B, T). start is the
        first token's position, a number or a tensor (B, 1). Positions past the context, where only
        unused drafts of speculation lie, get its last one."""
        pos = start + torch.arange(idx.size(1), device=idx.device)
        pos = pos.clamp(max=self.config.block_size - 1)  # (T,) or (B, T)
        return self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))

    def unembed(self, x):
        """The logits (..., vocab_size) of the last residual stream (..., n_embd)."""
        return self.lm_head(self.transformer.ln_f(x))

    def check_length(self, T):
        if T > self.config.block_size:
            raise ValueError(f'a sequence of {T} tokens does not fit into '
                             f'block_size={self.config.block_size}')

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) are token ids, targets (B, T) the next ones, -1 where none is to be learned.
        A cache (generate.new_cache) holds the tokens before idx, and takes up idx.

        Returns logits (B, T, vocab_size) and the mean cross-entropy in nats; without targets only
        the last position's, (B, 1, vocab_size), and None. Raises ValueError beyond block_size.
        """
        start = cache[0].start if cache else 0
        self.check_length(start + idx.size(1))
        x = self.embed(idx, start)  # (B, T, n_embd)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache[i] if cache else None)
        if targets is None:
            return self.unembed(x[:, [-1]]), None  # the list keeps the time dimension
        logits = self.unembed(x)  # (B, T, vocab_size)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1), ignore_index=-1)

    def next_logits(self, idx, cache=None):
        """The logits (B, vocab_size) of the token after idx (B, T)."""
        return self(idx, cache=cache)[0][:, -1]

    def losses(self, idx, targets):
        """Each prediction's loss in nats and share of positions that learn from it, both (1,)."""
        loss = self(idx, targets)[1].view(1)
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
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
        wpe.num_embeddings = block_size

    @classmethod
    def from_state_dict(cls, config, state_dict):
        """A model whose parameters are the tensors of state_dict, not copies. None is initialised
        first. Raises RuntimeError where they do not fit the config."""
        with torch.device('meta'):
            model = cls(config)
        model.load_state_dict(state_dict, assign=True)
        model.transformer.wte.weight = model.lm_head.weight
        return model

    @classmethod
    def from_pretrained(cls, source, override_args=None):
        """GPT-2's published weights: see export_huggingface.from_hugging_face."""
        from export_huggingface import from_hugging_face  # which needs transformers
        return from_hugging_face(cls, source, override_args)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW, fused where torch has it. Matrices and embeddings decay, the rest does not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        fused = device_type in ('cuda', 'cpu', 'mps')
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak=None):
        """Model FLOPs utilisation, between 0 and 1, when fwdbwd_per_iter sequences of block_size
        tokens went forward and backward in dt seconds. peak is in FLOP/s (default: the published
        bf16 peak of the model's device). None if that is not known."""
        if peak is None:
            device = next(self.parameters()).device
            name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
            peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
            if peak is None:
                return None
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak

    def flops_per_token(self):
        """FLOPs per token of a pass forward and backward: 6 N + 12 L H Q T (PaLM, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
