"""The loss of a model on a text, for the comparison of models."""

import sys

import numpy as np
import torch
from tqdm import tqdm

from device import autocast


@torch.no_grad()
def split_loss(model, tokens, dtype=torch.float32, batch_size=64):
    """Mean loss in nats of the next token over a whole split: every token but the first is predicted once, from windows of
    block_size that do not overlap."""
    device, block_size = next(model.parameters()).device, model.config.block_size
    total = 0.0
    starts = range(0, len(tokens) - 1, block_size)
    whole = [i for i in starts if i + block_size < len(tokens)]
    groups = [whole[i:i + batch_size] for i in range(0, len(whole), batch_size)]
    if len(whole) < len(starts):
        groups.append([starts[-1]])  # the shorter one at the end
    for group in tqdm(groups, desc='whole val split', leave=False, disable=not sys.stderr.isatty()):
        windows = np.stack([tokens[i:i + block_size + 1] for i in group]).astype(np.int64)  # (B, T + 1)
        windows = torch.from_numpy(windows).to(device)
        with autocast(device.type, dtype):
            total += model.losses(windows[:, :-1], windows[:, 1:])[0][0].item() * windows[:, 1:].numel()
    return total / (len(tokens) - 1)
