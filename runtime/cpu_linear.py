"""
Faster linear maps for decoding on a CPU, swapped into a model by the programs that decode.

Decoding multiplies large weights by a few rows. Without gradients on a CPU, torch is slow at it in
three cases. It leaves a few float32 rows to one core. For a single bfloat16 row, oneDNN reorders
the whole weight first. And some CPUs have no fast product of half-precision matrices.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F


class CpuLinear(nn.Linear):
    """nn.Linear with ways round what torch does slowly on a CPU without gradients."""

    def forward(self, x):
        if x.device.type != 'cpu' or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        n_rows = x.numel() // self.in_features
        if x.dtype == torch.float32 and n_rows <= 8 and self.weight.numel() > 100_000:
            return self.in_groups(x, n_rows)
        if x.dtype == self.weight.dtype == torch.bfloat16 and n_rows == 1:
            return self.without_onednn(x)
        if x.dtype.itemsize == 2 and n_rows > 8 and not multiplies_halves_fast():
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)
        return super().forward(x)

    def in_groups(self, x, n_rows):
        """The weight times a few rows in groups of outputs, side by side, so that each core has
        some. Up to four rows are fastest as columns to the right of the weight."""
        threads = torch.get_num_threads()
        divisors = (n for n in range(threads, 16 * threads) if self.out_features % n == 0)
        groups = next(divisors, 1)
        columns = x.reshape(1, n_rows, -1).mT.expand(groups, -1, -1)  # (groups, n_in, n_rows)
        weight = self.weight.view(groups, -1, self.in_features)  # (groups, n_out / groups, n_in)
        if n_rows <= 4:
            y = torch.bmm(weight, columns)
        else:
            y = torch.bmm(columns.mT, weight.mT).mT
        y = y.reshape(self.out_features, n_rows).T.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def without_onednn(self, x):
        """nn.Linear.forward with oneDNN off, whose reordering of the weight takes longer than the
        product. The switch is the process's: other threads see it off for the length of this call,
        and compute the same with torch's own kernels."""
        if not torch.backends.mkldnn.enabled:
            return super().forward(x)
        torch.backends.mkldnn.enabled = False
        try:
            return super().forward(x)
        finally:
            torch.backends.mkldnn.enabled = True


def multiplies_halves_fast():
    """Whether this CPU has a fast product of half-precision matrices."""
    return torch.backends.cpu.get_cpu_capability() not in ('DEFAULT', 'AVX2')


def use_cpu_linear(model):
    """Make every plain nn.Linear of the model a CpuLinear, in place, and return the model.

    Parameters, their names and checkpoints stay what they are, since only the class is changed.
    On other devices, with gradients and when compiled, a CpuLinear is a plain nn.Linear.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = CpuLinear
    return model
