"""
The maths of convert_mla.py: the weights of a GPT_MLA from those of a GPT.

In each layer [k; v] = W x + b. D E takes the place of W (2 n_embd, n_embd): E (n_latent, n_embd)
becomes the latent encoder, and the halves of D (2 n_embd, n_latent) become key and value. C is the
covariance of x over a calibration text. E|W x - D E x|^2 is least where D holds the leading left
singular vectors of W C^(1/2) and E = D^T W (Eckart and Young 1936).
"""

from dataclasses import asdict, dataclass

from configurator import UserError

import torch

from model_mla import GPT_MLA, MLAConfig


@dataclass
class Moments:
    """The moments of x (n_embd), the input of a layer's attention, in float64, and how far back its
    heads look."""
    mean: torch.Tensor  # (n_embd,)
    second: torch.Tensor  # (n_embd, n_embd), the mean of x x^T
    attended: torch.Tensor | None = None  # (n_head, T) share of each head's attention at each
                                          # distance, of rotary positions


@torch.no_grad()
def activation_moments(model, windows):
    """Moments of the input of each layer's attention over windows of tokens, tensors (B, T)."""
    totals = [Moments(0.0, 0.0, 0.0) for _ in model.transformer.h]

    def add_to(total):
        def hook(attention, args):
            x = args[0].flatten(0, 1).double()  # (B * T, n_embd)
            total.mean = total.mean + x.sum(0)
            total.second = total.second + x.T @ x
            if model.config.rotary == 'all':
                total.attended = total.attended + attention_by_distance(attention, args[0])
        return hook
    handles = [block.attn.register_forward_pre_hook(add_to(total))
               for block, total in zip(model.transformer.h, totals)]
    n = 0
    for idx in windows:
        model(idx)
        n += idx.numel()
    for handle in handles:
        handle.remove()
    return [Moments(total.mean / n, total.second / n,
                    total.attended / n if model.config.rotary == 'all' else None)
            for total in totals]


def attention_by_distance(attention, x):
    """The attention of each head to what is so many tokens back, summed over all tokens of
    x (B, T, n_embd): (n_head, T)"""
    q, k, _ = attention.heads(x)
    T, width = q.shape[-2:]
    position = torch.arange(T, device=x.device)
    distance = position[:, None] - position  # (T, T)
    scores = (q @ k.mT * width ** -0.5).masked_fill(distance < 0, -torch.inf)
    pattern = scores.softmax(-1).sum(0).double().flatten(1)  # (n_head, T * T)
    return pattern.new_zeros(len(pattern), T).index_add(1, distance.clamp(min=0).flatten(), pattern)


@dataclass
class Maps:
    """The linear maps of one layer's attention, in float64: weights (n_out, n_embd), biases (n_out)
    or None."""
    query: torch.Tensor  # (n_head (head_dim + n_rotary), n_embd)
    query_bias: torch.Tensor | None
    kv: torch.Tensor  # (2 n_embd, n_embd) keys and values
    kv_bias: torch.Tensor | None
    rotary_key: torch.Tensor  # (n_rotary, n_embd), of all heads


def maps_of(model, layer):
    """The Maps of a layer of a GPT. Keys and values of a group of heads (GQA) stand once for each
    of them, which adds no dimension to what a latent has to keep."""
    c, attn = model.config, model.transformer.h[layer].attn
    parts = {}
    for end, p in attn.c_attn.named_parameters():
        heads = p.detach().double().unflatten(0, (-1, c.head_dim))
        q, k, v = heads.split((attn.n_head, attn.n_kv_head, attn.n_kv_head))
        k, v = (part.repeat_interleave(attn.n_head // attn.n_kv_head, 0) for part in (k, v))
        parts[end] = q.flatten(0, 1), torch.cat((k, v)).flatten(0, 1)
    query, kv = parts['weight']
    query_bias, kv_bias = parts.get('bias', (None, None))
    return Maps(query, query_bias, kv, kv_bias, kv.new_zeros(0, c.n_embd))


def as_complex(W, n_head):
    """The pairs that turn of the weight W (n_head * head_dim, n) as complex numbers:
    (n_head, head_dim / 2, n)"""
    real, imaginary = W.unflatten(0, (n_head, 2, -1)).unbind(1)
    return torch.complex(real, imaginary)


def as_real(W):
    """(n_head, pairs, n) of complex numbers -> (n_head, 2 * pairs, n)"""
    return torch.cat((W.real, W.imag), dim=1)


def mean_turn(attended, head_dim, base):
    """What a key that turns is worth on average, as a factor (n_head, head_dim / 2) of one that
    does not: the mean of e^(-j angle) over the distances, where attended (n_head, T) says how
    often a head looks at each. It is the factor of the least squared error."""
    i = torch.arange(0, head_dim, 2, dtype=torch.float64, device=attended.device)
    distance = torch.arange(attended.size(1), dtype=torch.float64, device=attended.device)
    angle = distance[:, None] / base ** (i / head_dim)  # (T, head_dim / 2)
    return attended.to(torch.complex128) @ torch.polar(torch.ones_like(angle), -angle)


def decouple(maps, n_head, n_rotary, covariance, worth):
    """The Maps of rotary='decoupled' for those of rotary='all'. covariance (n_embd, n_embd) is that
    of x. worth (n_head, head_dim / 2) are the factors of mean_turn.

    Of each of the n_rotary / 2 fastest frequencies, the keys k (n_head) of all heads become u s,
    with u the leading eigenvector of their covariance and s = u^H k, which turns. A query q meets
    it with u^H q. The rest of the keys no longer turns. A bias of s is lost: the shared rotary key
    has none."""
    head_dim, n = len(maps.query) // n_head, n_rotary // 2
    queries = maps.query if maps.query_bias is None else torch.cat(
        (maps.query, maps.query_bias[:, None]), dim=1)
    keys, values = maps.kv.chunk(2)
    K = as_complex(keys, n_head)
    fast = K[:, :n].transpose(0, 1)  # (n, n_head, n_embd)
    u = torch.linalg.eigh(fast @ covariance.to(fast.dtype) @ fast.mH).eigenvectors[..., -1:]
    s = u.mH @ fast  # (n, 1, n_embd)
    rest = K - torch.cat(((u @ s).transpose(0, 1), torch.zeros_like(K[:, n:])), dim=1)
    rest = as_real(rest * worth.unsqueeze(-1)).flatten(0, 1)
    turned = as_real(u.conj().transpose(0, 1) * as_complex(queries, n_head)[:, :n])
    scale = ((head_dim + n_rotary) / head_dim) ** 0.5  # the scores are divided by more
    queries = torch.cat((queries.unflatten(0, (n_head, -1)), turned), dim=1).flatten(0, 1) * scale
    query, query_bias = queries, None
    if maps.query_bias is not None:
        query, query_bias = queries[:, :-1], queries[:, -1]
    return Maps(query, query_bias, torch.cat((rest, values)), maps.kv_bias,
                as_real(s.transpose(0, 1))[0])


def low_rank(W, root, rank):
    """D (n_out, rank) and E (rank, n_in) that minimise |(W - D E) root|, where root root^T = C.
    They are the best approximation of W for inputs of covariance C. All in float64."""
    D = torch.linalg.svd(W @ root, full_matrices=False).U[:, :rank]
    return D, D.T @ W


def spread_of(moments, has_bias, W):
    """The mean of x (n_embd) that a bias takes over, and a root of the covariance that the factors
    have to keep, with and without a little for directions that the text never took, so that full
    rank loses nothing anywhere."""
    mean = torch.zeros(W.size(1), dtype=W.dtype, device=W.device)
    covariance = torch.eye(W.size(1), dtype=W.dtype, device=W.device)
    if moments:
        mean, covariance = moments.mean, moments.second
        if has_bias:  # the factors have the spread around the mean alone
            covariance = covariance - mean.outer(mean)
    spread, directions = torch.linalg.eigh(covariance)
    if spread.max() <= 0:  # a text that never varies says nothing
        spread = torch.ones_like(spread)
    root = directions * spread.clamp_min(0).sqrt()
    return mean, directions * spread.clamp_min(1e-10 * spread.max()).sqrt(), root


def factor(W, b, moments, rank):
    """D, E, b that take the place of W (2 n_embd, n_embd) and b (2 n_embd) or None, of keys and
    values, and the relative errors of keys, values and both. An error is the root mean square of
    what is lost over that of what was there."""
    n_embd = W.size(1)
    mean, everywhere, root = spread_of(moments, b is not None, W)
    D, E = low_rank(W, everywhere, rank)
    lost = W - D @ E
    if b is not None:
        b = b + lost @ mean
    errors = []
    for part in (slice(0, n_embd), slice(n_embd, None), slice(None)):
        errors.append(((lost[part] @ root).norm() / (W[part] @ root).norm()).item())
    return D, E, b, errors


def widths_for(share, layers, moments):
    """The width of each layer's latent, so that with its rotary key all together have that share of
    MHA's cache. layers are Maps. One direction after the other goes to the layer that has lost the
    largest part, in squares over the text, of its keys and values."""
    lost = []  # for each layer: the part that a latent of so many numbers loses
    for layer, maps in enumerate(layers):
        _, root, _ = spread_of(moments and moments[layer], maps.kv_bias is not None, maps.kv)
        squares = torch.linalg.svdvals(maps.kv @ root).square()
        tails = squares.flip(0).cumsum(0).flip(0) / squares.sum().clamp_min(1e-300)
        lost.append([*tails.tolist(), 0.0])
    n_embd, n_rotary = layers[0].kv.size(1), len(layers[0].rotary_key)
    total = round(share * 2 * n_embd * len(layers)) - n_rotary * len(layers)
    widths = [1] * len(layers)
    if total < sum(widths):
        least = (n_rotary + 1) / (2 * n_embd)
        raise UserError(f'cache_share={share} leaves no latent in some layer: give at least '
                        f'{least:.4f}')
    while sum(widths) < min(total, n_embd * len(layers)):
        most = max(range(len(layers)), key=lambda layer: lost[layer][widths[layer]])
        if widths[most] == n_embd:  # nothing is lost any more
            most = min(range(len(layers)), key=widths.__getitem__)
        widths[most] += 1
    return tuple(widths)


@torch.no_grad()
def convert(model, n_latent, moments=None, n_rotary=0, share=None):
    """A GPT_MLA that does nearly what the GPT model does, and the relative errors of its layers'
    keys, values and both. moments are those of activation_moments. Without them all directions of
    x count alike. At n_latent = n_embd, the most there can be, it does exactly the same. share, if
    given, decides in place of n_latent, and n_rotary makes rotary='all' 'decoupled'."""
    c = model.config
    layers = [maps_of(model, layer) for layer in range(c.n_layer)]
    if n_rotary:
        one = torch.ones(c.n_head, c.head_dim // 2, device=layers[0].kv.device)
        eye = torch.eye(c.n_embd, dtype=torch.float64, device=one.device)
        for i, maps in enumerate(layers):
            worth = mean_turn(moments[i].attended, c.head_dim, c.rotary_base) if moments else one
            layers[i] = decouple(maps, c.n_head, n_rotary, moments[i].second if moments else eye,
                                 worth)
    widths = widths_for(share, layers, moments) if share else (n_latent,) * c.n_layer
    state, errors = dict(model.state_dict()), []
    for i, maps in enumerate(layers):
        prefix = f'transformer.h.{i}.attn.'
        dtype = state.pop(prefix + 'c_attn.weight').dtype
        state.pop(prefix + 'c_attn.bias', None)
        D, E, b, error = factor(maps.kv, maps.kv_bias, moments and moments[i], widths[i])
        errors.append(error)
        new = {'query.weight': maps.query, 'latent_enc.weight': torch.cat((E, maps.rotary_key)),
               'key.weight': D[:c.n_embd], 'value.weight': D[c.n_embd:]}
        if b is not None:
            new |= {'query.bias': maps.query_bias, 'key.bias': b[:c.n_embd],
                    'value.bias': b[c.n_embd:]}
        for name, tensor in new.items():
            state[prefix + name] = tensor.to(dtype, copy=True)
    settings = asdict(c) | {'n_kv_head': None,
                            'n_latent': widths if len(set(widths)) > 1 else widths[0]}
    if n_rotary:
        # so that its frequencies are the fastest ones of before
        settings |= {'rotary': 'decoupled', 'n_rotary': n_rotary,
                     'rotary_base': c.rotary_base ** (n_rotary / c.head_dim)}
    return GPT_MLA.from_state_dict(MLAConfig(**settings), state).eval(), errors
