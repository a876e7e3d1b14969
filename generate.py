"""
Decoding: from a model and a prompt to token ids, for every model of the project. The prompt is read once into a cache,
after which each pass of the model reads one token (one_by_one) or, where a model has several heads, what its heads guess
that comes next as well (speculate).
"""

from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F


@dataclass
class Tally:
    """What came of the passes of decoding; the one in which speculate reads the prompt is left out."""
    gained: list = field(default_factory=list)  # the tokens by which each of them brought each sequence on

    @property
    def tokens_per_pass(self):
        return sum(self.gained) / max(len(self.gained), 1)

    def stood(self, n):
        """The share of the passes in which the first n guesses stood."""
        return sum(gained > n for gained in self.gained) / max(len(self.gained), 1)


def generate(model, idx, max_new_tokens, n_vocab, **settings):
    """Continue the prompts idx (B, T) by max_new_tokens each, or until all have met the stop token: (B, T + new tokens).
    The settings are those of decode."""
    new = decode(model, idx, max_new_tokens, n_vocab, **settings)
    return torch.cat([idx, *(ids.unsqueeze(1) for ids in new)], dim=1)


@torch.no_grad()
def decode(model, idx, max_new_tokens, n_vocab, temperature=1.0, top_k=None, top_p=1.0, stop=None, past_context='slide',
           generators=None, speculative=True, tally=None):
    """Yield the next token of each of the prompts idx (B, T), then the one after it, and so on: tensors (B,).

    Ids at or above n_vocab, with which a vocabulary was padded, are never drawn. A temperature of 0, or a top_k of 1, takes the
    likeliest token; top_k draws among the top_k likeliest alone, top_p among the likeliest that together have that probability
    (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"). A row that has met the id stop repeats it
    until all rows have. generators, one torch.Generator a row, make a row's draws independent of the others'.

    The model sees the last block_size tokens. Once there are more of them, every token has another position at every
    step, and all that is cached is stale: past_context='slide' reads the whole window anew for every token, as nanoGPT
    does; 'drop' forgets the older half of it, reads the rest and goes on from the cache, which gives another text.

    A model of several heads decodes with all of them, unless speculative is False: see speculate. The tally is told what came
    of each pass.

    Raises ValueError for an empty prompt and for settings out of range.
    """
    block_size = model.config.block_size
    if idx.size(1) < 1:
        raise ValueError('the prompt is empty: give at least one token')
    if temperature < 0 or top_k is not None and top_k < 1 or not 0 < top_p <= 1:
        raise ValueError(f'temperature={temperature}, top_k={top_k}, top_p={top_p}: temperature must be at least 0, '
                         'top_k at least 1, top_p above 0 and at most 1')
    rule = Rule(n_vocab, temperature, top_k, top_p, generators)
    stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    n_left, window = max_new_tokens, idx[:, -block_size:]
    tally = tally or Tally()
    while n_left > 0:
        n_new = min(n_left, block_size + 1 - window.size(1))  # until the model has seen block_size tokens and drawn one more
        if speculative and n_new > 1 and getattr(model.config, 'k_ahead', 1) > 1:
            steps = speculate(model, window, n_new, rule, tally)
        else:
            steps = one_by_one(model, window, n_new, rule, tally)
        drawn = [window]
        for new in steps:
            if stop is not None:
                new = new.masked_fill(stopped, stop)
                stopped |= new == stop
            yield new
            if stop is not None and stopped.all():
                return
            drawn.append(new.unsqueeze(1))
        n_left -= n_new
        window = torch.cat(drawn, dim=1)[:, -(block_size if past_context == 'slide' else (block_size + 1) // 2):]


def one_by_one(model, window, n_new, rule, tally):
    """Yield the n_new tokens (B,) after the window (B, T)."""
    B, T = window.shape
    cache = model.new_cache(B, T + n_new - 1) if n_new > 1 else None
    for _ in range(n_new):
        new = rule.choose(model.next_logits(window, cache))  # (B,)
        tally.gained += [1] * B
        yield new
        window = new.unsqueeze(1)


def speculate(model, window, n_new, rule, tally):
    """one_by_one for a GPT_KAhead: tokens of the same distribution, and at a temperature of 0 the same tokens but for ties
    within rounding, in fewer passes (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", with
    the model's own heads as the draft, as in Gloeckle et al. 2024).

    A pass reads the newest token and the k - 1 guesses that the further heads made for what follows it. Its first head then
    says of each guess whether it stands, and gives the token after the last that does. The cache forgets the others. Each
    row comes on by its own count.
    """
    B, T = window.shape
    cache = model.new_cache(B, T + n_new + model.config.k_ahead)  # with room for guesses past the end
    logits = model.unembed(torch.stack([state[:, -1] for state in model.head_states(window, cache)], dim=1))
    new, ahead = rule.choose(logits[:, 0]), logits[:, 1:]  # (B,) and (B, k - 1, vocab_size), of the tokens after new
    drawn, rows, n_yielded = [[token] for token in new.tolist()], range(B), 1
    yield new
    while n_yielded < n_new:
        going = [len(drawn[b]) < n_new for b in rows]
        if not all(going):  # rows that are complete leave
            new, ahead, rule = new[going], ahead[going], rule.of_rows(going)
            rows = [b for b, goes_on in zip(rows, going) if goes_on]
            for layer in cache:
                layer.tensors = [tensor[going] for tensor in layer.tensors]
        n_read = [T + len(drawn[b]) - 1 for b in rows]  # all but the newest token
        for layer in cache:
            layer.n = n_read[0] if len(rows) == 1 else torch.tensor(n_read, device=new.device)

        guesses, chances = rule.guess(ahead)  # (rows, k - 1)
        states = model.head_states(torch.cat((new.unsqueeze(1), guesses), dim=1), cache)  # k tensors (rows, k, n_embd)
        n_right, new = rule.verify(guesses, chances, model.unembed(states[0]))  # both (rows,)
        ahead = model.unembed(torch.stack(states[1:], dim=1)[torch.arange(len(rows), device=new.device), :, n_right])

        for b, right, tokens, last in zip(rows, n_right.tolist(), guesses.tolist(), new.tolist()):
            # what stands counts even where fewer tokens were wanted, but not past the context, where guesses are void
            tally.gained.append(min(right + 1, model.config.block_size + 1 - T - len(drawn[b])))
            drawn[b] += (tokens[:right] + [last])[:n_new - len(drawn[b])]
        for i in range(n_yielded, min(map(len, drawn))):
            yield torch.tensor([tokens[i] for tokens in drawn], device=new.device)
            n_yielded = i + 1


@dataclass
class Rule:
    """How tokens are chosen: the settings of decode."""
    n_vocab: int
    temperature: float
    top_k: int | None
    top_p: float
    generators: list | None

    @property
    def greedy(self):
        return self.temperature == 0 or self.top_k == 1

    def of_rows(self, chosen):
        """The rule for the rows for which the list chosen says True."""
        return self if self.generators is None else replace(
            self, generators=[g for g, yes in zip(self.generators, chosen) if yes])

    def likeliest(self, logits):
        return logits[..., :self.n_vocab].argmax(dim=-1)

    def probabilities(self, logits):
        """The distributions (..., n_vocab) that logits (..., vocab_size) and a temperature above 0 define."""
        logits = logits[..., :self.n_vocab].float() / self.temperature  # half could overflow
        if self.top_k is not None:
            kth = torch.topk(logits, min(self.top_k, logits.size(-1))).values[..., [-1]]
            logits = logits.masked_fill(logits < kth, -float('inf'))
        probs = F.softmax(logits, dim=-1)
        if self.top_p < 1:
            likeliest, ids = probs.sort(descending=True)
            likelier = likeliest.cumsum(-1) - likeliest  # the probability of all that come before
            kept = (likelier < self.top_p).index_fill(-1, torch.zeros(1, dtype=torch.long, device=ids.device), True)
            probs = torch.zeros_like(probs).scatter(-1, ids, likeliest * kept)
            probs = probs / probs.sum(dim=-1, keepdim=True)
        return probs

    def draw(self, probs):
        """An id (B, n) from each of the distributions (B, n, n_vocab), which need not add up to 1."""
        if self.generators is None:
            return torch.multinomial(probs.flatten(0, 1), num_samples=1).view(probs.shape[:2])
        return torch.cat([torch.multinomial(p, 1, generator=g).T for p, g in zip(probs, self.generators)])

    def uniform(self, like):
        """Random numbers between 0 and 1 of the shape (B, n) of like."""
        if self.generators is None:
            return torch.rand_like(like)
        return torch.stack([torch.rand(x.shape, generator=g, device=x.device) for x, g in zip(like, self.generators)])

    def choose(self, logits):
        """One id (B,) from each row of the logits (B, vocab_size)."""
        if self.greedy:
            return self.likeliest(logits)
        return self.draw(self.probabilities(logits).unsqueeze(1)).squeeze(1)

    def guess(self, logits):
        """Ids (B, n) by the logits (B, n, vocab_size), and the distributions that they were drawn from, if any."""
        if self.greedy:
            return self.likeliest(logits), None
        chances = self.probabilities(logits)
        return self.draw(chances), chances

    def verify(self, guesses, chances, logits):
        """How many of the guesses (B, k - 1) stand in each row, and the token after those (B,), so that all are distributed
        as the logits (B, k, vocab_size) say (Leviathan et al. 2023, algorithm 1): guess x, drawn with probability q(x),
        stands with probability min(1, p(x) / q(x)); in place of the first that falls comes a token drawn from max(0, p - q).
        """
        at = torch.arange(len(guesses), device=guesses.device)
        if self.greedy:
            wanted = self.likeliest(logits)  # (B, k)
            n_right = (guesses == wanted[:, :-1]).cumprod(dim=1).sum(dim=1)
            return n_right, wanted[at, n_right]
        p = self.probabilities(logits)  # (B, k, n_vocab)
        q = F.pad(chances, (0, 0, 0, 1))  # after the last guess nothing was drawn: 0
        of_guess = [x[:, :-1].gather(-1, guesses.unsqueeze(-1)).squeeze(-1) for x in (p, q)]  # each (B, k - 1)
        n_right = (self.uniform(of_guess[1]) * of_guess[1] < of_guess[0]).cumprod(dim=1).sum(dim=1)
        p, rest = p[at, n_right], (p - q)[at, n_right].clamp(min=0)  # (B, n_vocab)
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)  # p and q differ by rounding alone
        return n_right, self.draw(rest.unsqueeze(1)).squeeze(1)
