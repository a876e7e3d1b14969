"""
Run a model once and hand over what happened, a block at a time, so that no more than one block's attention patterns is
ever alive. What a head adds to the residual stream can be changed on the way, which is all that ablation and patching need.

It goes through the seams that both attentions have (heads, c_proj), so it never asks which one a model has.
"""

from dataclasses import dataclass

import torch

from model import attend


@dataclass
class BlockRecord:
    """What happened in one block."""
    layer: int
    before: torch.Tensor  # (B, T, n_embd) the residual stream that enters the block
    q: torch.Tensor  # (B, n_head, T, head_dim)
    k: torch.Tensor
    v: torch.Tensor
    z: torch.Tensor  # (B, n_head, T, head_dim) the values as each head weighs them
    attention_out: torch.Tensor  # (B, T, n_embd)
    mlp_out: torch.Tensor  # (B, T, n_embd)
    after: torch.Tensor  # (B, T, n_embd) before + attention_out + mlp_out

    def pattern(self):
        """The attention pattern: softmax(q k^T / sqrt(head_dim)) over the tokens so far (B, n_head, T, T)."""
        T, head_dim = self.q.shape[-2:]
        later = torch.ones(T, T, dtype=torch.bool, device=self.q.device).triu(1)
        return (self.q @ self.k.mT * head_dim ** -0.5).masked_fill_(later, -torch.inf).softmax(dim=-1)


def record(model, idx, edit=None):
    """Run model (a GPT of any kind, in eval mode) on idx (B, T) and yield a BlockRecord for each block in turn.

    edit(layer, z), if given, returns what takes the place of z (B, n_head, T, head_dim) in that block.
    Raises ValueError for more tokens than block_size.
    """
    model.check_length(idx.size(1))
    with torch.no_grad():
        x = model.embed(idx)
    return go_on(model, x, 0, edit)


@torch.no_grad()
def go_on(model, x, layer, edit=None):
    """As record, from the residual stream x (B, T, n_embd) that enters the block of that number."""
    for number in range(layer, len(model.transformer.h)):
        block = model.transformer.h[number]
        q, k, v = block.attn.heads(block.ln_1(x))
        z = attend(q, k, v).unflatten(-1, (q.size(1), -1)).transpose(1, 2)  # (B, n_head, T, head_dim)
        if edit is not None:
            z = edit(number, z)
        attention_out = block.attn.c_proj(z.transpose(1, 2).flatten(2))
        mlp_out = block.mlp(block.ln_2(x + attention_out))
        after = x + attention_out + mlp_out
        yield BlockRecord(number, x, q, k, v, z, attention_out, mlp_out, after)
        x = after


def last(records):
    """The residual stream (B, T, n_embd) at the end of a run, of which nothing else is kept."""
    for done in records:
        pass
    return done.after


def residual_streams(model, idx):
    """The residual stream after the embedding and after each block, for idx (B, T): (n_layer + 1, B, T, n_embd)."""
    streams = []
    for done in record(model, idx):
        streams += [done.before, done.after] if done.layer == 0 else [done.after]
    return torch.stack(streams)


def repeated_tokens(n_vocab, sequences, length, seed):
    """Random token ids, each sequence twice: (sequences, 2 * length) of int64. Within a copy no token comes twice,
    so that what precedes a token in the text determines it, unless the vocabulary is smaller than length."""
    generator = torch.Generator().manual_seed(seed)
    if n_vocab < length:
        once = torch.randint(n_vocab, (sequences, length), generator=generator)
    else:
        once = torch.stack([torch.randperm(n_vocab, generator=generator)[:length] for _ in range(sequences)])
    return once.repeat(1, 2)
