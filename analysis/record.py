"""
Run a model once and hand over what happened, one block at a time. So the attention patterns of no
more than one block are alive. Whatever has a name can be kept or changed on the way: ablation,
patching and the notebook need nothing else.

The names are those of TransformerLens, without its hook_. docs/notebook.md has a table of them. The
attention itself taps what is its own (q, k, v, the latents), so nothing here asks which one a model
has.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from model import attend


@dataclass
class BlockRecord:
    """What happened in one block."""
    layer: int
    before: torch.Tensor  # (B, T, n_embd) the residual stream that enters the block
    q: torch.Tensor  # (B, n_head, T, width) with positions, as the scores see them
    k: torch.Tensor
    v: torch.Tensor  # (B, n_head, T, head_dim)
    z: torch.Tensor  # (B, n_head, T, head_dim) each head's output: values weighted by attention
    attention_out: torch.Tensor  # (B, T, n_embd)
    mlp_out: torch.Tensor  # (B, T, n_embd)
    after: torch.Tensor  # (B, T, n_embd) before + attention_out + mlp_out

    def scores(self):
        """The scores q k^T / sqrt(width), -inf for later tokens, (B, n_head, T, T)."""
        T, width = self.q.shape[-2:]
        later = torch.ones(T, T, dtype=torch.bool, device=self.q.device).triu(1)
        return (self.q @ self.k.mT * width ** -0.5).masked_fill_(later, -torch.inf)

    def pattern(self):
        """The attention pattern: the softmax of the scores, (B, n_head, T, T)."""
        return self.scores().softmax(dim=-1)


@dataclass
class Taps:
    """What a run changes and what it keeps. edits has a function for each name, which returns what
    goes on in the place of what it is given. keep has the names of what is put into found."""
    edits: dict = field(default_factory=dict)
    keep: frozenset = frozenset()
    found: dict = field(default_factory=dict)

    def __call__(self, name, value):
        if name in self.edits:
            value = self.edits[name](value)
        if name in self.keep:
            self.found[name] = value
        return value

    def ask_for(self, *names):
        """Whether any of names is changed or kept. What costs time or memory is made only then."""
        return any(name in self.edits or name in self.keep for name in names)

    def under(self, prefix):
        """A function that taps the names which begin with prefix, and are given without it."""
        return lambda name, value: self(prefix + name, value)


def record(model, idx, taps=None):
    """Run model (a GPT of any kind, in eval mode) on idx (B, T). Yield a BlockRecord per block.
    taps, if given, are the Taps of the run. Raises ValueError for more tokens than block_size."""
    model.check_length(idx.size(1))
    taps = taps or Taps()
    with torch.no_grad():
        x = embed(model, idx, taps)
    return run_from(model, x, 0, taps)


@contextmanager
def tapped(taps, parts):
    """As long as this is open, tap what modules read or return. parts are (module, name, reads).
    Nothing is hooked that taps do not ask for."""
    hooks = []
    for module, name, reads in parts:
        if taps.ask_for(name):
            hooks.append(module.register_forward_pre_hook(partial(tap_read, taps, name)) if reads
                         else module.register_forward_hook(partial(tap_returned, taps, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tap_read(taps, name, module, read):
    return (taps(name, *read),)


def tap_returned(taps, name, module, read, value):
    return taps(name, value.view(-1, *value.shape[-2:]))  # positions have no batch


def embed(model, idx, taps):
    """The residual stream before the first block. Its parts have names too."""
    parts = [(model.transformer.wte, 'embed', False)]
    if 'wpe' in model.transformer:
        parts.append((model.transformer.wpe, 'pos_embed', False))
    with tapped(taps, parts):
        return model.embed(idx)


@torch.no_grad()
def run_from(model, x, layer, taps=None):
    """As record, from the residual stream x (B, T, n_embd) that enters the block number layer."""
    for number in range(layer, len(model.transformer.h)):
        block = run_block(model, number, x, taps)
        yield block
        x = block.after


def run_block(model, number, x, taps=None, reads=None):
    """The BlockRecord of the block number, which x (B, T, n_embd) enters. taps is record's. reads,
    if given, returns from the input of the attention (B, T, n_embd) what keys and values are read
    from in its place. Queries and a shared rotary key still read the input."""
    block, name, taps = model.transformer.h[number], f'blocks.{number}.', taps or Taps()
    tap, tap_attn = taps.under(name), taps.under(f'{name}attn.')
    x = tap('resid_pre', x)
    q, k, v = block.attn.heads(read := tap('ln1.out', block.ln_1(x)), tap=tap_attn)
    if reads is not None:
        _, content, v = block.attn.heads(reads(read))
        width = v.size(-1)  # of the content part of a key
        k = torch.cat((content[..., :width], k[..., width:]), dim=-1)
    made = BlockRecord(number, x, q, k, v, None, None, None, None)
    if taps.ask_for(f'{name}attn.attn_scores', f'{name}attn.pattern'):
        scores = tap_attn('attn_scores', made.scores())
        z = tap_attn('pattern', scores.softmax(dim=-1)) @ v
    else:
        z = attend(q, k, v).unflatten(-1, (q.size(1), -1)).transpose(1, 2)
    made.z = tap_attn('z', z)  # (B, n_head, T, head_dim)
    made.attention_out = tap('attn_out', heads_sum(block.attn, made.z, taps, f'{name}attn.result'))
    x = tap('resid_mid', x + made.attention_out)
    made.mlp_out = tap('mlp_out', mlp_out(block, x, taps, name))
    made.after = tap('resid_post', x + made.mlp_out)
    return made


def heads_sum(attn, z, taps, name):
    """What the heads write together (B, T, n_embd). Where taps ask for name, what each of them
    writes (B, n_head, T, n_embd) is made and tapped."""
    if not taps.ask_for(name):
        return attn.c_proj(z.transpose(1, 2).flatten(2))
    total, bias = taps(name, z @ attn.head_weights()[-1]).sum(1), attn.c_proj.bias
    return total if bias is None else total + bias


def mlp_out(block, x, taps, name):
    """What the MLP of the block writes (B, T, n_embd): zeros where there is none."""
    if not block.mlp:
        return torch.zeros_like(x)
    read, mlp = taps(f'{name}ln2.out', block.ln_2(x)), block.mlp
    parts = [(mlp.c_proj, 'mlp.post', True)]
    if mlp.is_gated:
        parts += [(mlp.c_gate, 'mlp.pre', False), (mlp.c_fc, 'mlp.pre_linear', False)]
    else:
        parts.append((mlp.c_fc, 'mlp.pre', False))
    with tapped(taps, ((module, name + short, reads) for module, short, reads in parts)):
        return mlp(read)


def edit_head(layer, head, change):
    """Taps in which the output z (B, T, head_dim) of one head becomes change(z)."""
    def edit(z):
        z = z.clone()
        z[:, head] = change(z[:, head])
        return z
    return Taps({f'blocks.{layer}.attn.z': edit})


def final_stream(records):
    """The residual stream (B, T, n_embd) at the end of a run. Nothing else of the run is kept."""
    for block in records:
        pass
    return block.after


def residual_streams(model, idx):
    """The residual stream after the embedding and after each block, for idx (B, T):
    (n_layer + 1, B, T, n_embd)."""
    streams = []
    for block in record(model, idx):
        if block.layer == 0:
            streams.append(block.before)
        streams.append(block.after)
    return torch.stack(streams)


def repeated_tokens(n_vocab, sequences, length, seed):
    """Random token ids, each sequence twice: (sequences, 2 * length) of int64. No token occurs
    twice in a copy, so each token determines the next one. A vocabulary smaller than length makes
    an exception."""
    generator = torch.Generator().manual_seed(seed)
    if n_vocab < length:
        once = torch.randint(n_vocab, (sequences, length), generator=generator)
    else:
        once = torch.stack([torch.randperm(n_vocab, generator=generator)[:length]
                            for _ in range(sequences)])
    return once.repeat(1, 2)
