"""
Decoding: from a model and a prompt to token ids, for every model of the project.

The prompt is read once into a cache. After that each pass of the model reads one token (one_by_one)
or, where a model has several heads, also what its heads predict after it (speculate).
"""

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch.nn import functional as F


@dataclass
class Cache:
    """What one attention layer remembers of the n tokens that it has read: tensors (B, ..., length,
    width), of which the first n rows are filled. To forget the last tokens, lower n. The tensors
    start as zeros: a mask gives hidden rows the weight 0, and 0 times NaN would be NaN."""
    tensors: list
    n: int = 0

    @property
    def start(self):
        """The position of the next token, as model.embed takes it."""
        return self.n

    def append(self, *rows):
        """Add T tokens, one tensor (B, ..., T, width) for each that is kept. Returns each tensor up
        to the newest token, and which tokens each of the T may look at, as attend's mask."""
        T = rows[0].size(-2)
        end = self.n + T
        for tensor, new in zip(self.tensors, rows):
            tensor[..., self.n:end, :] = new
        self.n = end
        mask = None if T in (1, end) else causal_mask(T, end, rows[0].dtype, rows[0].device)
        return *(tensor[..., :end, :] for tensor in self.tensors), mask

    @property
    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass
class RaggedCache(Cache):
    """A Cache of sequences that remember different numbers of tokens: n is a tensor (B,). In
    speculation, each sequence accepts its own number of drafts."""
    n: torch.Tensor

    @property
    def start(self):
        return self.n[:, None]  # (B, 1)

    def append(self, *rows):
        """As Cache.append; the tensors go up to the longest sequence's newest token."""
        T = rows[0].size(-2)
        at = self.n[:, None] + torch.arange(T, device=self.n.device)  # (B, T)
        sequence = torch.arange(len(at), device=at.device)[:, None]  # (B, 1)
        end = int(self.n.max()) + T
        for tensor, new in zip(self.tensors, rows):
            tensor.movedim(-2, 1)[sequence, at] = new.movedim(-2, 1)
        self.n = self.n + T
        mask = torch.arange(end, device=at.device) <= at[:, None, :, None]  # (B, 1, T, end)
        return *(tensor[..., :end, :] for tensor in self.tensors), mask


@dataclass
class StaticCache(Cache):
    """A Cache whose steps all have the same shapes, so that one step can be compiled for all of
    them. n is a tensor (1,), the same one in every layer, and whoever takes a step counts it on.
    Each step reads one token, and looks at the whole of the tensors through a mask."""
    n: torch.Tensor

    def append(self, *rows):
        for tensor, new in zip(self.tensors, rows):
            tensor.index_copy_(-2, self.n, new)
        mask = torch.arange(self.tensors[0].size(-2), device=self.n.device) <= self.n
        return *self.tensors, mask[None]  # (1, length)


@lru_cache(maxsize=8)  # all layers want the same
def causal_mask(T, S, dtype, device):
    """What keeps the last T of S tokens from looking at later ones: 0 or -inf (T, S), which is
    added to the scores. The kernel's own is_causal would take them for the first T. From True and
    False it would make this mask anew for every layer."""
    return torch.full((T, S), -math.inf, dtype=dtype, device=device).triu(S - T + 1)


def new_cache(model, B, length):
    """An empty cache for B sequences of up to length tokens, in the model's dtype and on its
    device: a list with a Cache for each list of shapes in model.cache_shapes(B, length)."""
    weight = model.lm_head.weight
    like = dict(dtype=weight.dtype, device=weight.device)
    return [Cache([torch.zeros(shape, **like) for shape in shapes])
            for shapes in model.cache_shapes(B, length)]


class CompiledStep(torch.nn.Module):
    """The pass of a model that reads one token, compiled: on a GPU as one CUDA graph. Its caches
    are as long as the context and are kept, since a graph knows the addresses of their tensors."""

    def __init__(self, model):
        super().__init__()
        self.read = torch.compile(model.next_logits, mode='reduce-overhead', dynamic=False,
                                  fullgraph=True)
        self.model, self.caches = model, {}  # number of sequences -> cache

    def empty_cache(self, B):
        """A cache for the prompts of B sequences, in the memory of the steps after them."""
        if B not in self.caches:
            n = torch.zeros(1, dtype=torch.long, device=self.model.lm_head.weight.device)
            self.caches[B] = [StaticCache(layer.tensors, n)
                              for layer in new_cache(self.model, B, self.model.config.block_size)]
            for tensor in (n, *(t for layer in self.caches[B] for t in layer.tensors)):
                torch._dynamo.mark_static_address(tensor)
        return [Cache(layer.tensors) for layer in self.caches[B]]

    def after(self, cache):
        """The cache of the steps after the prompts that an empty_cache has taken up."""
        static = self.caches[cache[0].tensors[0].size(0)]
        static[0].n.fill_(cache[0].n)
        return static

    def forward(self, idx, cache):
        """next_logits for idx (B, 1)"""
        logits = self.read(idx, cache).clone()  # the next step writes where these are
        cache[0].n.add_(1)
        return logits


@dataclass
class DecodeStats:
    """How many tokens the passes of decoding gave. The pass in which speculate reads the prompt
    does not count."""
    gained: list = field(default_factory=list)  # tokens, one entry a pass and sequence

    @property
    def tokens_per_pass(self):
        return sum(self.gained) / max(len(self.gained), 1)

    def acceptance_rate(self, n):
        """The share of the passes that accepted the first n drafts."""
        return sum(gained > n for gained in self.gained) / max(len(self.gained), 1)


def generate(model, idx, max_new_tokens, n_vocab, **settings):
    """Continue the prompts idx (B, T) by max_new_tokens each, or until all have met the stop token:
    (B, T + new tokens). The settings are those of decode."""
    new = decode(model, idx, max_new_tokens, n_vocab, **settings)
    return torch.cat([idx, *(ids.unsqueeze(1) for ids in new)], dim=1)


def sample_text(model, tokenizer, seed, n_tokens=200):
    """What a model writes by itself, drawn as the sampler draws by default. The draws are those of
    seed alone."""
    device = next(model.parameters()).device
    idx = torch.tensor([tokenizer.start()], device=device)
    generators = [torch.Generator(device).manual_seed(seed)]
    n_vocab = min(tokenizer.n_vocab, model.config.vocab_size)
    was_training = model.training
    ids = generate(model.eval(), idx, n_tokens, n_vocab, temperature=0.8, top_k=200,
                   past_context='drop', generators=generators)
    model.train(was_training)
    return tokenizer.decode(ids[0].tolist())


@torch.no_grad()
def decode(model, idx, max_new_tokens, n_vocab, temperature=1.0, top_k=None, top_p=1.0, stop=None,
           past_context='slide', generators=None, speculative=True, stats=None, step=None):
    """Yield the next token of each of the prompts idx (B, T), then the one after it, and so on:
    tensors (B,).

    Ids at or above n_vocab, with which a vocabulary was padded, are never drawn. A temperature of
    0, or a top_k of 1, takes the likeliest token. top_k draws among the top_k likeliest alone,
    top_p among the likeliest that together have that probability (Holtzman et al. 2020, "The
    Curious Case of Neural Text Degeneration"). A row that has met the id stop repeats it until all
    rows have. generators, one torch.Generator a row, make a row's draws independent of the others'.

    The model sees the last block_size tokens. Once there are more, every token has another position
    at every step, and all that is cached is stale. With rotary positions it is too, but in the
    first layer: the others have read tokens that have left the window. past_context='slide' reads
    the whole window anew for every token, as nanoGPT does. 'drop' forgets the older half of it,
    reads the rest and goes on from the cache, which gives another text.

    A model of several heads decodes with all of them, unless speculative is False: see speculate.
    stats, a DecodeStats, counts the tokens of each pass. step, a CompiledStep of the model, reads
    the tokens after the prompt.

    Raises ValueError for an empty prompt and for settings out of range.
    """
    block_size = model.config.block_size
    if idx.size(1) < 1:
        raise ValueError('the prompt is empty: give at least one token')
    if temperature < 0 or top_k is not None and top_k < 1 or not 0 < top_p <= 1:
        raise ValueError(f'temperature={temperature}, top_k={top_k}, top_p={top_p}: temperature '
                         'must be at least 0, top_k at least 1, top_p above 0 and at most 1')
    sampling = Sampling(n_vocab, temperature, top_k, top_p, generators)
    stats = stats or DecodeStats()
    n_kept = block_size if past_context == 'slide' else (block_size + 1) // 2
    stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    n_left, window = max_new_tokens, idx[:, -block_size:]
    while n_left > 0:
        # until the model has seen block_size tokens and drawn one more
        n_new = min(n_left, block_size + 1 - window.size(1))
        speculates = speculative and n_new > 1 and model.n_predictions > 1
        tokens = (speculate(model, window, n_new, sampling, stats) if speculates else
                  one_by_one(model, window, n_new, sampling, stats, step))
        drawn = [window]
        for new in tokens:
            if stop is not None:
                new = new.masked_fill(stopped, stop)
                stopped |= new == stop
            yield new
            if stop is not None and stopped.all():
                return
            drawn.append(new.unsqueeze(1))
        n_left -= n_new
        window = torch.cat(drawn, dim=1)[:, -n_kept:]


def one_by_one(model, window, n_new, sampling, stats, step=None):
    """Yield the n_new tokens (B,) after the window (B, T)."""
    B, T = window.shape
    cache, read = None, model.next_logits
    if n_new > 1:
        cache = step.empty_cache(B) if step else new_cache(model, B, T + n_new - 1)
    for i in range(n_new):
        if step and i == 1:
            read, cache = step, step.after(cache)
        new = sampling.choose(read(window, cache))  # (B,)
        stats.gained += [1] * B
        yield new
        window = new.unsqueeze(1)


def speculate(model, window, n_new, sampling, stats):
    """one_by_one for a model of k prediction heads, in fewer passes: tokens of the same
    distribution, and at a temperature of 0 the same tokens but for ties within rounding (Leviathan
    et al. 2023, "Fast Inference from Transformers via Speculative Decoding", with the model's own
    heads as the draft, as in Gloeckle et al. 2024).

    A pass reads the newest token and k - 1 drafts of what follows it, from the further heads of the
    pass before. Its first head then says which of the drafts to accept, and gives the token after
    them. The cache forgets the others. Each row advances by its own count.
    """
    B, T = window.shape
    # read the prompt; there is room for drafts past the end
    cache = new_cache(model, B, T + n_new + model.n_predictions)
    states = model.head_states(window, cache)  # k tensors (B, T, n_embd)
    logits = model.unembed(torch.stack([state[:, -1] for state in states], dim=1))
    new = sampling.choose(logits[:, 0])  # (B,)
    draft_logits = logits[:, 1:]  # (B, k - 1, vocab_size) of the tokens after new
    drawn = [[token] for token in new.tolist()]
    rows = list(range(B))  # that still want tokens
    yield new
    n_yielded = 1

    while n_yielded < n_new:
        # rows that are complete leave
        going = [len(drawn[row]) < n_new for row in rows]
        if not all(going):
            rows = [row for row, goes_on in zip(rows, going) if goes_on]
            new, draft_logits, sampling = new[going], draft_logits[going], sampling.of_rows(going)
            for layer in cache:
                layer.tensors = [tensor[going] for tensor in layer.tensors]
        # the cache remembers all but the newest token
        cache = with_counts(cache, [T + len(drawn[row]) - 1 for row in rows], new.device)

        # draft, read, accept
        drafts, draft_probs = sampling.draft(draft_logits)  # drafts (rows, k - 1)
        states = model.head_states(torch.cat((new.unsqueeze(1), drafts), dim=1), cache)
        n_accepted, new = sampling.accept(drafts, draft_probs, model.unembed(states[0]))
        ahead = torch.stack(states[1:], dim=1)  # (rows, k - 1, k, n_embd)
        every_row = torch.arange(len(rows), device=new.device)
        draft_logits = model.unembed(ahead[every_row, :, n_accepted])  # (rows, k - 1, vocab_size)

        results = zip(rows, n_accepted.tolist(), drafts.tolist(), new.tolist())
        for row, n, tokens, last in results:
            # drafts count even where fewer tokens were wanted, but not past the context
            room = model.config.block_size + 1 - T - len(drawn[row])
            stats.gained.append(min(n + 1, room))
            drawn[row] += (tokens[:n] + [last])[:n_new - len(drawn[row])]
        for i in range(n_yielded, min(map(len, drawn))):
            yield torch.tensor([tokens[i] for tokens in drawn], device=new.device)
            n_yielded = i + 1


def with_counts(cache, n_read, device):
    """The cache, whose rows remember only their first n_read tokens, a list of one number a row."""
    if len(n_read) == 1:
        return [Cache(layer.tensors, n_read[0]) for layer in cache]
    n = torch.tensor(n_read, device=device)
    return [RaggedCache(layer.tensors, n) for layer in cache]


@dataclass
class Sampling:
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
        """The sampling of the rows for which the list chosen says True."""
        if self.generators is None:
            return self
        return replace(self, generators=[g for g, yes in zip(self.generators, chosen) if yes])

    def likeliest(self, logits):
        return logits[..., :self.n_vocab].argmax(dim=-1)

    def probabilities(self, logits):
        """The distributions (..., n_vocab) by logits (..., vocab_size), if not greedy."""
        logits = logits[..., :self.n_vocab].float() / self.temperature  # half could overflow
        if self.top_k is not None:
            kth = torch.topk(logits, min(self.top_k, logits.size(-1))).values[..., [-1]]
            logits = logits.masked_fill(logits < kth, -float('inf'))
        probs = F.softmax(logits, dim=-1)
        if self.top_p < 1:
            likeliest, ids = probs.sort(descending=True)
            likelier = likeliest.cumsum(-1) - likeliest  # the probability of all that come before
            kept = likelier < self.top_p
            kept[..., 0] = True
            probs = torch.zeros_like(probs).scatter(-1, ids, likeliest * kept)
            probs = probs / probs.sum(dim=-1, keepdim=True)
        return probs

    def draw(self, probs):
        """An id (B, n) from each of the distributions (B, n, n_vocab), of any sum. It is what
        torch.multinomial draws, which on a GPU waits for it to check the probabilities."""
        noise = torch.empty_like(probs)
        if self.generators is None:
            noise.exponential_()
        else:
            for row, generator in zip(noise, self.generators):
                row.exponential_(generator=generator)
        return (probs / noise).argmax(dim=-1)

    def uniform(self, like):
        """Random numbers between 0 and 1 of the shape (B, n) of like."""
        if self.generators is None:
            return torch.rand_like(like)
        return torch.stack([torch.rand(x.shape, generator=g, device=x.device)
                            for x, g in zip(like, self.generators)])

    def choose(self, logits):
        """One id (B,) from each row of the logits (B, vocab_size)."""
        if self.greedy:
            return self.likeliest(logits)
        return self.draw(self.probabilities(logits).unsqueeze(1)).squeeze(1)

    def draft(self, logits):
        """Ids (B, n) by the logits (B, n, vocab_size), and the distributions (B, n, n_vocab) that
        they were drawn from, None if they were not drawn."""
        if self.greedy:
            return self.likeliest(logits), None
        probs = self.probabilities(logits)
        return self.draw(probs), probs

    def accept(self, drafts, draft_probs, logits):
        """How many of the drafts (B, k - 1) each row accepts, and the token (B,) after those, so
        that all are distributed as the logits (B, k, vocab_size) say.

        A draft x, drawn with probability q(x), is accepted with probability min(1, p(x) / q(x)).
        The first that is rejected is replaced by a token drawn from max(0, p - q) (Leviathan et al.
        2023, algorithm 1).
        """
        at = torch.arange(len(drafts), device=drafts.device)
        if self.greedy:
            wanted = self.likeliest(logits)  # (B, k)
            n_accepted = (drafts == wanted[:, :-1]).cumprod(dim=1).sum(dim=1)
            return n_accepted, wanted[at, n_accepted]
        p = self.probabilities(logits)  # (B, k, n_vocab)
        q = F.pad(draft_probs, (0, 0, 0, 1))  # nothing was drafted after the last draft: 0
        p_of_draft = p[:, :-1].gather(-1, drafts.unsqueeze(-1)).squeeze(-1)  # (B, k - 1)
        q_of_draft = draft_probs.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
        accepted = self.uniform(q_of_draft) * q_of_draft < p_of_draft
        n_accepted = accepted.cumprod(dim=1).sum(dim=1)
        p = p[at, n_accepted]  # (B, n_vocab)
        rest = (p - q[at, n_accepted]).clamp(min=0)
        # where p and q differ by rounding alone, nothing is left of p - q
        rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
        return n_accepted, self.draw(rest.unsqueeze(1)).squeeze(1)
