"""
Muon: steps of matrices in which every direction is as long (Jordan et al. 2024, "Muon: An optimizer
for hidden layers in neural networks"). A step takes longer than AdamW's, and fewer are needed.
"""

from collections import defaultdict

import torch

from runtime.parallel import blocks_of, shard_like, whole

# of the Newton-Schulz iteration, by Jordan et al.: singular values from 0.01 on come near 1
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95
AT_ONCE = 2 ** 24  # numbers of the matrices that are iterated together


class Muon(torch.optim.AdamW):
    """Muon for the first group of parameters, which are matrices, and AdamW for the others.

    A step of Muon is scaled to the size of AdamW's, so that learning rate and weight decay can be
    AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4). It computes what
    torch.optim.Muon does, which takes one matrix after the other, in bfloat16 also where that is
    slow.
    """

    def __init__(self, groups, **settings):
        super().__init__(groups, **settings)
        self._step_supports_amp_scaling = False  # a scaler is to unscale all gradients itself

    @torch.no_grad()
    def step(self):
        group, same_shape = self.param_groups[0], defaultdict(list)
        for p in group['params']:
            if p.grad is not None:
                same_shape[p.shape].append(p)
        for shape, matrices in same_shape.items():
            n = max(1, AT_ONCE // shape.numel())
            for i in range(0, len(matrices), n):
                step_together(matrices[i:i + n], [self.state[p] for p in matrices[i:i + n]],
                              group['lr'], group['weight_decay'])
        super().step()  # which passes over what has no gradient any more


def step_together(matrices, states, lr, weight_decay):
    """A step of matrices of one shape. Of sharded ones each process has the whole meanwhile."""
    directions = []
    for p, state in zip(matrices, states):
        if not state:
            state |= {'step': torch.zeros(()), 'momentum_buffer': torch.zeros_like(p)}
        state['step'] += 1  # AdamW's loading wants it
        mean = state['momentum_buffer'].lerp_(p.grad, 1 - MOMENTUM)
        directions.append(whole(p.grad.lerp(mean, MOMENTUM)))  # Nesterov's
    steps = orthogonal(torch.stack(directions))
    for p, step in zip(matrices, steps):
        p.mul_(1 - lr * weight_decay)
        p.add_(shard_like(p, step), alpha=-lr * 0.2 * max(p.shape) ** 0.5)
        p.grad = None


def orthogonal(G):
    """Matrices G (n, rows, cols) = U S V^T -> U S' V^T, where S' is near 1 (0.7 to 1.2), by a
    quintic iteration after Newton and Schulz. On a GPU it is in bfloat16, which is enough."""
    a, b, c = COEFFICIENTS
    X = G.bfloat16() if G.is_cuda else G
    is_tall = X.size(1) > X.size(2)
    X = X.mT if is_tall else X
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if is_tall else X).to(G.dtype)


def add_muon(model, adamw):
    """AdamW's successor that steps the matrices of the model's blocks by Muon."""
    matrices = [p for block in blocks_of(model) for p in block.parameters() if p.dim() == 2]
    own, decay = set(matrices), adamw.param_groups[0]['weight_decay']
    groups = [group | {'params': [p for p in group['params'] if p not in own]}
              for group in adamw.param_groups]
    settings = {key: adamw.defaults[key] for key in ('lr', 'betas', 'fused')}
    return Muon([{'params': matrices, 'weight_decay': decay}, *groups], **settings)
