"""
Run a model once and hand over what happened, one block at a time. So the attention patterns of no
more than one block are alive. The output of a head can be changed on the way: ablation and
patching need nothing else.

Every attention has heads() and c_proj, so nothing here asks which one a model has.
"""

from dataclasses import dataclass

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

    def pattern(self):
        """The attention pattern: causal softmax(q k^T / sqrt(width)), (B, n_head, T, T)."""
        T, width = self.q.shape[-2:]
        later = torch.ones(T, T, dtype=torch.bool, device=self.q.device).triu(1)
        scores = self.q @ self.k.mT * width ** -0.5
        return scores.masked_fill_(later, -torch.inf).softmax(dim=-1)


def record(model, idx, edit=None):
    """Run model (a GPT of any kind, in eval mode) on idx (B, T). Yield a BlockRecord per block.

    edit(layer, z), if given, returns what replaces z (B, n_head, T, head_dim) in that layer.
    Raises ValueError for more tokens than block_size.
    """
    model.check_length(idx.size(1))
    with torch.no_grad():
        x = model.embed(idx)
    return run_from(model, x, 0, edit)


@torch.no_grad()
def run_from(model, x, layer, edit=None):
    """As record, from the residual stream x (B, T, n_embd) that enters the block number layer."""
    for number in range(layer, len(model.transformer.h)):
        block = run_block(model, number, x, edit)
        yield block
        x = block.after


def run_block(model, number, x, edit=None, reads=None):
    """The BlockRecord of the block number, which x (B, T, n_embd) enters. edit is record's. reads,
    if given, returns from the input of the attention (B, T, n_embd) what keys and values are read
    from in its place. Queries and a shared rotary key still read the input."""
    block = model.transformer.h[number]
    q, k, v = block.attn.heads(read := block.ln_1(x))
    if reads is not None:
        _, content, v = block.attn.heads(reads(read))
        width = v.size(-1)  # of the content part of a key
        k = torch.cat((content[..., :width], k[..., width:]), dim=-1)
    z = attend(q, k, v).unflatten(-1, (q.size(1), -1)).transpose(1, 2)  # (B, n_head, T, head_dim)
    if edit is not None:
        z = edit(number, z)
    attention_out = block.attn.c_proj(z.transpose(1, 2).flatten(2))
    mlp_out = block.mlp_out(x + attention_out)
    after = x + attention_out + mlp_out
    return BlockRecord(number, x, q, k, v, z, attention_out, mlp_out, after)


def edit_head(layer, head, change):
    """An edit for record: the output z (B, T, head_dim) of one head becomes change(z)."""
    def edit(number, z):
        if number == layer:
            z = z.clone()
            z[:, head] = change(z[:, head])
        return z
    return edit


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
