"""Decoding: from a model and a prompt to token ids, for every model of the project."""

import torch
from torch.nn import functional as F


@torch.no_grad()
def generate(model, idx, max_new_tokens, n_vocab, temperature=1.0, top_k=None):
    """Continue the prompts idx (B, T), which must not be empty, by max_new_tokens each; returns (B, T + max_new_tokens).

    Ids at or above n_vocab, with which a vocabulary was padded, are never drawn. A temperature of 0 takes the likeliest
    token; top_k draws among the top_k likeliest alone. The model sees the last block_size tokens, as in nanoGPT.
    """
    block_size = model.config.block_size
    for _ in range(max_new_tokens):
        logits = model(idx[:, -block_size:])[0][:, -1, :n_vocab].float()  # (B, n_vocab); half could overflow below
        if temperature == 0:
            idx_next = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        else:
            logits = logits / temperature
            if top_k is not None:
                kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
                logits = logits.masked_fill(logits < kth, -float('inf'))
            idx_next = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)  # (B, 1)
        idx = torch.cat((idx, idx_next), dim=1)
    return idx
