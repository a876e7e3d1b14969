"""
The maths of convert_mla.py: the weights of a GPT_MLA from those of a GPT.

In each layer [k; v] = W x + b. D E takes the place of W (2 n_embd, n_embd): E (n_latent, n_embd)
becomes the latent encoder, and the halves of D (2 n_embd, n_latent) become key and value. C is the
covariance of x over a calibration text. E|W x - D E x|^2 is least where D holds the leading left
singular vectors of W C^(1/2) and E = D^T W (Eckart and Young 1936).
"""

from dataclasses import asdict, dataclass, replace

from configurator import UserError

import torch

from model_mla import GPT_MLA, MLAConfig


@dataclass
class Moments:
    """The moments of x (n_embd), the input of a layer's attention, in float64."""
    mean: torch.Tensor  # (n_embd,)
    second: torch.Tensor  # (n_embd, n_embd), the mean of x x^T


@torch.no_grad()
def activation_moments(model, windows):
    """Moments of the input of each layer's attention over windows of tokens, tensors (B, T)."""
    totals = [Moments(0.0, 0.0) for _ in model.transformer.h]

    def add_to(total):
        def hook(attention, args):
            x = args[0].flatten(0, 1).double()  # (B * T, n_embd)
            total.mean = total.mean + x.sum(0)
            total.second = total.second + x.T @ x
        return hook
    handles = [block.attn.register_forward_pre_hook(add_to(total))
               for block, total in zip(model.transformer.h, totals)]
    n = 0
    for idx in windows:
        model(idx)
        n += idx.numel()
    for handle in handles:
        handle.remove()
    return [Moments(total.mean / n, total.second / n) for total in totals]


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


def decouple(maps, n_head, n_rotary, covariance):
    """The Maps of rotary='decoupled' for those of rotary='all'. covariance (n_embd, n_embd) is that
    of x. A pair of numbers that turns is one complex number here. In a group of n frequencies and
    all heads, keys k (heads * n) become u s, with u the leading eigenvector of their covariance and
    s = u^H k, which turns. A query q meets s as u^H q. A bias of s is lost: a shared rotary key has
    none."""
    head_dim, n_groups = len(maps.query) // n_head, n_rotary // 2
    queries = maps.query if maps.query_bias is None else torch.cat(
        (maps.query, maps.query_bias[:, None]), dim=1)
    keys, values = maps.kv.chunk(2)

    def grouped(W):  # (n_head * head_dim, n) -> complex (groups, n_head, frequencies, n)
        real, imaginary = W.unflatten(0, (n_head, 2, head_dim // 2)).unbind(1)
        return torch.complex(real, imaginary).unflatten(1, (n_groups, -1)).transpose(0, 1)

    def ungrouped(W):
        W = W.transpose(0, 1).flatten(1, 2)  # (n_head, head_dim / 2, n)
        return torch.stack((W.real, W.imag), dim=1)  # (n_head, 2, head_dim / 2, n)

    K = grouped(keys)
    flat = K.flatten(1, 2)  # (groups, n_head * frequencies, n_embd)
    u = torch.linalg.eigh(flat @ covariance.to(flat.dtype) @ flat.mH).eigenvectors[..., -1:]
    s = u.mH @ flat  # (groups, 1, n_embd)
    rest = ungrouped((flat - u @ s).view_as(K)).flatten(0, 2)
    met = (u.conj().view(*K.shape[:3], 1) * grouped(queries)).sum(2, keepdim=True)
    turned = ungrouped(met).flatten(1, 2)  # (n_head, n_rotary, n)
    scale = ((head_dim + n_rotary) / head_dim) ** 0.5  # the scores are divided by more
    queries = torch.cat((queries.unflatten(0, (n_head, -1)), turned), dim=1).flatten(0, 1) * scale
    query, query_bias = queries, None
    if maps.query_bias is not None:
        query, query_bias = queries[:, :-1], queries[:, -1]
    rotary_key = torch.cat((s.real, s.imag)).squeeze(1)
    return replace(maps, query=query, query_bias=query_bias, rotary_key=rotary_key,
                   kv=torch.cat((rest, values)))


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
    MHA's cache. layers are Maps. The next direction goes where it is the largest part, in squares,
    of what its layer's keys and values are over the text."""
    parts = []
    for layer, maps in enumerate(layers):
        _, root, _ = spread_of(moments and moments[layer], maps.kv_bias is not None, maps.kv)
        squares = torch.linalg.svdvals(maps.kv @ root).square()
        parts.append((squares / squares.sum().clamp_min(1e-300)).tolist())
    n_embd, n_rotary = layers[0].kv.size(1), len(layers[0].rotary_key)
    total = round(share * 2 * n_embd * len(layers)) - n_rotary * len(layers)
    if total < len(layers):
        least = (n_rotary + 1) / (2 * n_embd)
        raise UserError(f'cache_share={share} leaves no latent in some layer: give at least '
                        f'{least:.4f}')
    widths = [1] * len(layers)
    order = sorted(((part, layer) for layer, squares in enumerate(parts) for part in squares[1:]),
                   reverse=True)
    for _, layer in order[:total - len(layers)]:
        widths[layer] += 1
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
        eye = torch.eye(c.n_embd, dtype=torch.float64, device=layers[0].kv.device)
        layers = [decouple(maps, c.n_head, n_rotary, moments[i].second if moments else eye)
                  for i, maps in enumerate(layers)]
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
        settings |= {'rotary': 'decoupled', 'n_rotary': n_rotary}
    return GPT_MLA.from_state_dict(MLAConfig(**settings), state).eval(), errors
