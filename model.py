"""
GPT-2 with multi-head attention (MHA), the whole model in this file.

model_mla.py replaces the attention and nothing else. Parameter names, initialisation and call signatures are
nanoGPT's (https://github.com/karpathy/nanoGPT), so checkpoints travel both ways.

References
    GPT-2        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"
    attention    Vaswani et al. 2017, "Attention Is All You Need", eq. 1
    FLOP count   Chowdhery et al. 2022, "PaLM", appendix B
"""

import math
from dataclasses import dataclass
from functools import lru_cache
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
    bias: bool = True  # biases in Linear and LayerNorm, as GPT-2 has; False is a bit better and faster
    gelu: Literal['none', 'tanh'] = 'none'  # how GELU is approximated: 'none' as in nanoGPT, 'tanh' for GPT-2's weights

    def __post_init__(self):
        for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, key) < 1:
                raise ValueError(f'{key}={getattr(self, key)} must be at least 1')
        if self.n_layer > 10_000:
            raise ValueError(f'n_layer={self.n_layer} must be at most 10000')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: '
                             f'make n_embd a multiple of {self.n_head} or choose another n_head')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} must be at least 0 and below 1')


class LayerNorm(nn.Module):
    """Layer norm whose bias is optional and whose parameter names are nanoGPT's."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Linear(nn.Linear):
    """nn.Linear, with ways round what torch does slowly on a CPU without gradients, that is in decoding."""

    def forward(self, x):
        if x.device.type != 'cpu' or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        n_rows = x.numel() // self.in_features
        if x.dtype == torch.float32 and n_rows <= 8 and self.weight.numel() > 100_000:
            return self.in_groups(x, n_rows)
        if x.dtype == self.weight.dtype == torch.bfloat16 and n_rows == 1 and torch.backends.mkldnn.enabled:
            torch.backends.mkldnn.enabled = False  # oneDNN first reorders the weight, which takes longer than the product
            try:
                return super().forward(x)
            finally:
                torch.backends.mkldnn.enabled = True
        if x.dtype.itemsize == 2 and n_rows > 8 and torch.backends.cpu.get_cpu_capability() in ('DEFAULT', 'AVX2'):
            # which have no fast product of half-precision matrices
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)
        return super().forward(x)

    def in_groups(self, x, n_rows):
        """The weight times a few rows in groups of outputs, side by side: a single row would be left to one core. Up to
        four rows are fastest as columns to the right of the weight."""
        threads = torch.get_num_threads()
        groups = next((n for n in range(threads, 16 * threads) if self.out_features % n == 0), 1)
        columns = x.reshape(1, n_rows, -1).mT.expand(groups, -1, -1)  # (groups, n_in, n_rows)
        weight = self.weight.view(groups, -1, self.in_features)  # (groups, n_out / groups, n_in)
        y = torch.bmm(weight, columns) if n_rows <= 4 else torch.bmm(columns.mT, weight.mT).mT
        y = y.reshape(self.out_features, n_rows).T.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


@dataclass
class Cache:
    """What one attention layer remembers of the n tokens that it has read: tensors (B, ..., length, width), of which the
    first n rows are filled. To forget the last tokens, lower n. Sequences that remember different numbers of tokens have a
    tensor n (B,). The tensors start as zeros: what a mask hides is weighed by 0, and 0 times whatever lay there may be NaN."""
    tensors: list
    n: int | torch.Tensor = 0

    def append(self, *rows):
        """Add T tokens, one tensor (B, ..., T, width) for each that is kept. Returns all that is remembered, with room up to
        the longest sequence, and which of it each of the T tokens may look at, as attend takes it."""
        T = rows[0].size(-2)
        if isinstance(self.n, int):
            end = self.n + T
            for tensor, new in zip(self.tensors, rows):
                tensor[..., self.n:end, :] = new
            mask = None if T in (1, end) else causal_mask(T, end, rows[0].dtype, rows[0].device)
        else:
            at = self.n[:, None] + torch.arange(T, device=self.n.device)  # (B, T)
            end = int(self.n.max()) + T
            for tensor, new in zip(self.tensors, rows):
                tensor.movedim(-2, 1)[torch.arange(len(at), device=at.device)[:, None], at] = new.movedim(-2, 1)
            mask = torch.arange(end, device=at.device) <= at[:, None, :, None]  # (B, 1, T, end)
        self.n = self.n + T
        return *(tensor[..., :end, :] for tensor in self.tensors), mask

    @property
    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.tensors)


def split_heads(x, n_head):
    """(B, T, n_embd) -> (B, n_head, T, head_dim)"""
    B, T, n_embd = x.shape
    return x.view(B, T, n_head, n_embd // n_head).transpose(1, 2)


@lru_cache(maxsize=8)  # all layers want the same
def causal_mask(T, S, dtype, device):
    """What keeps the last T of S tokens from looking at later ones: 0 or -inf (T, S), which is added to the scores. The kernel's
    own is_causal would take them for the first T, and of True and False it would make the same anew for every layer."""
    return torch.full((T, S), -math.inf, dtype=dtype, device=device).triu(S - T + 1)


def attend(q, k, v, mask=None, dropout_p=0.0):
    """Causal softmax(q k^T / sqrt(head_dim)) v (Vaswani et al. 2017, eq. 1) in one fused kernel.

    q (B, n_head, T, head_dim) are the last T of the S tokens of k and v (B, n_head, S, head_dim). mask, of a shape that
    broadcasts to (B, n_head, T, S), says which of them each may look at; it may be left out for T = S and for T = 1, which
    sees all. Returns the heads side by side, (B, T, n_embd).
    """
    B, n_head, T, head_dim = q.shape
    if T == 1 < k.size(2) and mask is None and q.device.type == 'cpu' and q.dtype.itemsize == 2:  # thrice the kernel's speed
        y = F.softmax(q @ k.mT * head_dim ** -0.5, dim=-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=mask is None and k.size(2) == T)
    return y.transpose(1, 2).reshape(B, T, n_head * head_dim)


def weights_into_heads(linear, n_head):
    """The weight of a Linear whose outputs are the heads side by side, as maps of row vectors: x @ W[h] is what head h
    gets. (n_head, n_in, head_dim)"""
    return linear.weight.unflatten(0, (n_head, -1)).transpose(1, 2)


def weights_out_of_heads(linear, n_head):
    """The weight of a Linear whose inputs are the heads side by side, as maps of row vectors (n_head, head_dim, n_out)."""
    return linear.weight.T.unflatten(0, (n_head, -1))


class CausalSelfAttention(nn.Module):
    """Multi-head attention: every head has keys and values of its own, read from the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key, value of all heads
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout
        self.n_head = config.n_head

    def heads(self, x):
        """x (B, T, n_embd) -> q, k, v, each (B, n_head, T, head_dim)"""
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, n_embd)
        return split_heads(q, self.n_head), split_heads(k, self.n_head), split_heads(v, self.n_head)

    def forward(self, x, cache=None):
        q, k, v = self.heads(x)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)  # k, v (B, n_head, S, head_dim)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y))  # (B, T, n_embd)

    def new_cache(self, B, length, dtype, device):
        """Room for the keys and values of length tokens: 2 n_embd numbers per token."""
        shape = B, self.n_head, length, self.c_proj.in_features // self.n_head
        return Cache([torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)])

    def head_weights(self):
        """W_Q, W_K, W_V (n_head, n_embd, head_dim) and W_O (n_head, head_dim, n_embd), acting on row vectors."""
        W_Q, W_K, W_V = weights_into_heads(self.c_attn, 3 * self.n_head).chunk(3)
        return W_Q, W_K, W_V, weights_out_of_heads(self.c_proj, self.n_head)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
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


# Dense bf16 peaks in FLOP/s from the vendor's data sheets; the first key that occurs in the device's name counts.
PEAK_FLOPS = {'GB200': 2500e12, 'B200': 2250e12, 'H200 NVL': 835e12, 'H200': 989e12, 'H100 PCIe': 756e12,
              'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


class GPT(nn.Module):
    model_type = 'gpt'
    config_class = GPTConfig
    attention_class = CausalSelfAttention

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
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied, as in GPT-2

        self.apply(self._init_weights)
        self._init_residual_writers(self)

    def _init_residual_writers(self, module):
        """What writes to the residual stream starts smaller, so that the stream's size does not grow with depth."""
        for name, p in module.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; position embeddings do not count, token embeddings do, since the unembedding is the
        same matrix. With non_embedding=False all of them count."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def embed(self, idx, start=0):
        """The residual stream (B, T, n_embd) before the first block for idx (B, T), whose first token is number start of its
        sequence, a number or a tensor (B, 1). Positions past the context get its last one: only guesses lie there."""
        pos = (start + torch.arange(idx.size(1), device=idx.device)).clamp(max=self.config.block_size - 1)
        return self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))

    def unembed(self, x):
        """The logits (..., vocab_size) that the last residual stream (..., n_embd) stands for."""
        return self.lm_head(self.transformer.ln_f(x))

    def check_length(self, T):
        if T > self.config.block_size:
            raise ValueError(f'a sequence of {T} tokens does not fit into block_size={self.config.block_size}')

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) token ids, targets (B, T) the next ones, -1 where none is to be learned. With a cache (new_cache),
        idx goes on after the tokens that it remembers, and joins them.

        Returns logits and loss: (B, T, vocab_size) and the mean cross-entropy in nats with targets; without, the
        logits of the last position alone, (B, 1, vocab_size), and None. Raises ValueError for more tokens than block_size.
        """
        start = cache[0].n if cache else 0
        self.check_length(start + idx.size(1))
        x = self.embed(idx, start)  # (B, T, n_embd)
        for i, block in enumerate(self.transformer.h):
            x = block(x, cache[i] if cache else None)
        if targets is None:
            return self.unembed(x[:, [-1]]), None  # the list keeps the time dimension
        logits = self.unembed(x)  # (B, T, vocab_size)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)

    def next_logits(self, idx, cache=None):
        """The logits (B, vocab_size) of the token after idx (B, T), with what the cache remembers before it."""
        return self(idx, cache=cache)[0][:, -1]

    def losses(self, idx, targets):
        """The loss of each head and the share of the positions at which it learns, both (1,): a GPT has one head, and all."""
        loss = self(idx, targets)[1].view(1)
        return loss, torch.ones_like(loss)

    def new_cache(self, B, length):
        """An empty cache for B sequences of up to length tokens: one entry a layer, in the model's dtype."""
        weight = self.lm_head.weight
        return [block.attn.new_cache(B, length, weight.dtype, weight.device) for block in self.transformer.h]

    def crop_block_size(self, block_size):
        """Forget the positions from block_size on, for instance to finetune GPT-2 with a shorter context."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'block_size={block_size} must lie between 1 and the model\'s {self.config.block_size}')
        self.config.block_size = block_size
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
        wpe.num_embeddings = block_size

    @classmethod
    def from_state_dict(cls, config, state_dict):
        """A model whose parameters are the tensors of state_dict themselves: none is initialised first, none is copied.
        Raises RuntimeError where they do not fit the config."""
        with torch.device('meta'):
            model = cls(config)
        model.load_state_dict(state_dict, assign=True)
        model.transformer.wte.weight = model.lm_head.weight
        return model

    @classmethod
    def from_pretrained(cls, source, override_args=None):
        """GPT-2's published weights: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a directory that
        transformers' GPT2LMHeadModel.save_pretrained wrote. override_args may hold a dropout.

        Raises ValueError for a model class whose attention those weights do not fit and for what is no GPT-2, OSError
        where they cannot be read.
        """
        if cls.model_type != GPT.model_type:
            raise ValueError(f'{source} has the weights of a GPT with multi-head attention, which is no {cls.__name__}: '
                             'train.py takes them, convert_mla.py makes an MLA model of them')
        import huggingface_hub
        from transformers import AutoConfig, GPT2LMHeadModel
        from transformers.utils import logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        huggingface_hub.utils.logging.set_verbosity_error()

        def read(load, **settings):
            try:
                return load(source, local_files_only=True, **settings)
            except OSError:  # it is not on the disk, or not all of it
                return load(source, **settings)
        c = read(AutoConfig.from_pretrained)
        if c.model_type != 'gpt2':
            raise ValueError(f'{source} holds a model of type {c.model_type!r}, not a GPT-2')
        gelu = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}.get(c.activation_function)
        if (gelu is None or c.scale_attn_by_inverse_layer_idx or not c.scale_attn_weights or not c.tie_word_embeddings
                or c.layer_norm_epsilon != 1e-5 or c.n_inner not in (None, 4 * c.n_embd)):
            raise ValueError(f'{source} is a variant of GPT-2 that model.py does not compute: it needs a GELU, layer norms '
                             'with epsilon 1e-5, an MLP 4 times as wide, tied embeddings and attention scaled by head_dim '
                             'alone')
        hf, report = read(GPT2LMHeadModel.from_pretrained, config=c, dtype=torch.float32, output_loading_info=True,
                          ignore_mismatched_sizes=True)
        masks = ('.attn.bias', '.attn.masked_bias')  # buffers in weights that old versions wrote
        for problem in ('missing', 'unexpected', 'mismatched'):
            names = [k for k in sorted(map(str, report[f'{problem}_keys'])) if not k.endswith(masks)]
            if names:
                raise ValueError(f'{source} has weights that do not fit its config.json: {problem} {names[0]}')
        config = cls.config_class(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head,
                                  n_embd=c.n_embd, bias=True, gelu=gelu, **(override_args or {}))
        # GPT-2's Conv1D keeps its weights the other way round than Linear
        transposed = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
        return cls.from_state_dict(config, {k: v.t().contiguous() if k.endswith(transposed) else v
                                            for k, v in hf.state_dict().items() if not k.endswith(masks)})

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW, fused where torch has it for this device. Matrices and embeddings decay, biases and norms do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu', 'mps'))

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak=None):
        """Model FLOPs utilisation, between 0 and 1: FLOP/s achieved over the device's peak.

        fwdbwd_per_iter sequences of block_size tokens went forward and backward in dt seconds. peak is in FLOP/s
        (default: the published bf16 peak of the device that holds the model); None if that is not known.
        FLOPs per token are 6 N + 12 L H Q T (PaLM, appendix B).
        """
        if peak is None:
            device = next(self.parameters()).device
            name = torch.cuda.get_device_name(device) if device.type == 'cuda' else ''
            peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
            if peak is None:
                return None
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak

    def flops_per_token(self):
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size
