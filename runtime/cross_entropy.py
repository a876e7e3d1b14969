"""
The loss of the unembedding in chunks: logits of 50,000 tokens fill more memory than the model, so
they are not all there at a time, and none is computed twice.
"""

import torch
from torch.nn import functional as F


class ChunkedCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy with n_rows rows of logits at a time. The forward pass computes the
    gradients of x and W too, since the logits are gone after it. All chunks use the same memory: to
    get it anew from the system takes a fifth of the time."""

    @staticmethod
    def forward(ctx, x, W, targets, weights, n_rows, learns):
        ctx.dtypes = x.dtype, W.dtype
        dtype, exact = compute_dtype(x), weights.dtype
        x, W = x.to(dtype), W.to(dtype)
        all_logits = x.new_empty(n_rows, len(W))
        all_log_p = all_logits if dtype == exact else torch.empty_like(all_logits, dtype=exact)
        losses = torch.zeros_like(weights)
        dx, dW = (torch.zeros_like(t, dtype=exact) if learns else None for t in (x, W))
        for start in range(0, len(x), n_rows):
            rows = slice(start, start + n_rows)
            wanted, known = targets[rows, None].clamp(min=0), targets[rows] != -1
            logits = torch.mm(x[rows], W.T, out=all_logits[:len(wanted)])  # (n_rows, vocab_size)
            log_p = torch.log_softmax(logits, -1, exact, out=all_log_p[:len(wanted)])
            losses[rows] = -log_p.gather(1, wanted)[:, 0] * known
            if learns:
                # the gradient of the logits: p - 1 at the target, p elsewhere
                minus_1 = torch.full_like(wanted, -1, dtype=exact)
                d = logits.copy_(log_p.exp_().scatter_add_(1, wanted, minus_1))
                weight = (weights[rows] * known)[:, None]
                dx[rows] = (d @ W) * weight
                weighted = (x[rows] * weight).to(dtype)
                dW = dW.addmm_(d.T, weighted) if dtype == exact else dW.add_(d.T @ weighted)
        ctx.gradients = dx, dW
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        (dx, dW), ctx.gradients = ctx.gradients, None  # they are scaled in place, so once
        dx, dW = (d.mul_(grad).to(dtype) for d, dtype in zip((dx, dW), ctx.dtypes))
        return dx, dW, None, None, None, None


def compute_dtype(x):
    """The dtype in which x is multiplied."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear_cross_entropy(x, W, targets, weights, max_logits):
    """The sum of weights (N,) times cross-entropies in nats, and those (N,), without a gradient:
    of the logits x W^T for x (N, n_embd) and W (vocab_size, n_embd), on targets (N,). It is 0 where
    the target is -1. Not compiled, it has no more than max_logits in memory at a time."""
    weights = weights.to(torch.promote_types(x.dtype, torch.float32))
    # compiled by torch 2.13 for a CPU, the gradient of W lacked what embedding adds to it
    if len(x) * len(W) > max_logits and not torch.compiler.is_compiling():
        n_rows = max(1, max_logits // len(W))
        return ChunkedCrossEntropy.apply(x, W, targets, weights, n_rows, torch.is_grad_enabled())
    logits = F.linear(x, W).to(weights.dtype)
    losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction='none')
    return (losses * weights).sum(), losses.detach()
