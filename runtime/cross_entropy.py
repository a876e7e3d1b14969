"""
The loss of the unembedding in chunks: logits of 50,000 tokens fill more memory than the model, so
they are not all there at a time, and none is computed twice.
"""

import torch
from torch.nn import functional as F


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of the logits x W^T, of which n_rows are there at a time. The
    forward pass computes the gradients of x and W too, since the logits are gone after it."""

    @staticmethod
    def forward(ctx, x, W, targets, n_rows, learns):
        total = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        dx, dW = (torch.zeros_like(t, dtype=total.dtype) if learns else None for t in (x, W))
        for start in range(0, len(x), n_rows):
            rows = slice(start, start + n_rows)
            logits, known = F.linear(x[rows], W), targets[rows, None] != -1
            log_p = F.log_softmax(logits, dim=-1, dtype=total.dtype)  # (n_rows, vocab_size)
            wanted = targets[rows, None].clamp(min=0)
            total -= (log_p.gather(1, wanted) * known).sum()
            if learns:
                # the gradient of the logits: p - 1 at the target, p elsewhere
                minus_1 = torch.full_like(wanted, -1, dtype=total.dtype)
                d = log_p.exp_().scatter_add_(1, wanted, minus_1).mul_(known).to(logits.dtype)
                dx[rows] = d @ W
                dW += d.T @ x[rows]
        ctx.save_for_backward(dx, dW)
        ctx.dtypes = x.dtype, W.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dW = (grad * d for d in ctx.saved_tensors)
        return dx.to(ctx.dtypes[0]), dW.to(ctx.dtypes[1]), None, None, None


def linear_cross_entropy(x, W, targets, max_logits):
    """The mean of the cross-entropies in nats of the logits x W^T for x (N, n_embd), W (vocab_size,
    n_embd) and targets (N,), -1 where there is none; 0 if all are. Not compiled, it has no more
    than max_logits of them in memory at a time."""
    # compiled by torch 2.13 for a CPU, the gradient of W lacked what embedding adds to it
    if len(x) * len(W) > max_logits and not torch.compiler.is_compiling():
        n_rows = max(1, max_logits // len(W))
        total = ChunkedCrossEntropy.apply(x, W, targets, n_rows, torch.is_grad_enabled())
    else:
        logits = F.linear(x, W)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')
    return total / (targets != -1).sum().clamp(min=1)
