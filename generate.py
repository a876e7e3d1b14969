"""
Decoding: from a model and a prompt to token ids, for every model of the project. The prompt is read once into a cache,
after which each pass of the model reads one token.
"""

import torch
from torch.nn import functional as F


def generate(model, idx, max_new_tokens, n_vocab, **settings):
    """Continue the prompts idx (B, T) by max_new_tokens each, or until all have met the stop token: (B, T + new tokens).
    The settings are those of decode."""
    new = decode(model, idx, max_new_tokens, n_vocab, **settings)
    return torch.cat([idx, *(ids.unsqueeze(1) for ids in new)], dim=1)


@torch.no_grad()
def decode(model, idx, max_new_tokens, n_vocab, temperature=1.0, top_k=None, top_p=1.0, stop=None, past_context='slide',
           generators=None):
    """Yield the next token of each of the prompts idx (B, T), then the one after it, and so on: tensors (B,).

    Ids at or above n_vocab, with which a vocabulary was padded, are never drawn. A temperature of 0 takes the likeliest
    token; top_k draws among the top_k likeliest alone, top_p among the likeliest that together have that probability
    (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"). A row that has met the id stop repeats it
    until all rows have. generators, one torch.Generator a row, make a row's draws independent of the others'.

    The model sees the last block_size tokens. Once there are more of them, every token has another position at every
    step, and all that is cached is stale: past_context='slide' reads the whole window anew for every token, as nanoGPT
    does; 'drop' forgets the older half of it, reads the rest and goes on from the cache, which gives another text.

    Raises ValueError for an empty prompt and for settings out of range.
    """
    block_size = model.config.block_size
    B, T = idx.shape
    if T < 1:
        raise ValueError('the prompt is empty: give at least one token')
    if temperature < 0 or top_k is not None and top_k < 1 or not 0 < top_p <= 1:
        raise ValueError(f'temperature={temperature}, top_k={top_k}, top_p={top_p}: temperature must be at least 0, '
                         'top_k at least 1, top_p above 0 and at most 1')
    cache, n_cached = model.new_cache(B, min(block_size, T + max_new_tokens)), 0
    unread = idx[:, -block_size:]  # what the model has not seen yet
    stopped = torch.zeros(B, dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        if n_cached + unread.size(1) > block_size:
            if past_context == 'slide':
                cache, unread = None, idx[:, -block_size:]
            else:
                cache, n_cached, unread = model.new_cache(B, block_size), 0, idx[:, -((block_size + 1) // 2):]
        logits = model(unread, cache=cache)[0][:, -1, :n_vocab].float()  # (B, n_vocab); half could overflow below
        n_cached += unread.size(1)
        new = draw(logits, temperature, top_k, top_p, generators)  # (B,)
        if stop is not None:
            new = new.masked_fill(stopped, stop)
            stopped |= new == stop
        yield new
        if stop is not None and stopped.all():
            return
        unread = new.unsqueeze(1)
        idx = torch.cat((idx, unread), dim=1)


def draw(logits, temperature, top_k, top_p, generators):
    """One id (B,) from each row of the logits (B, n_vocab)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
        logits = logits.masked_fill(logits < kth, -float('inf'))
    probs = F.softmax(logits, dim=-1)
    if top_p < 1:
        likeliest, ids = probs.sort(descending=True)
        likelier = likeliest.cumsum(-1) - likeliest  # the probability of all that come before
        probs = torch.zeros_like(probs).scatter(-1, ids, likeliest.masked_fill(likelier >= top_p, 0))
    if generators is None:
        return torch.multinomial(probs, num_samples=1).squeeze(1)
    return torch.cat([torch.multinomial(p, 1, generator=generator) for p, generator in zip(probs, generators)])
