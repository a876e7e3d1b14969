"""The batches of a run: which data and which dropout each of them meets."""

from dataclasses import dataclass

import numpy as np
import torch

from runtime import dataset

TRAINING, EVALUATION = 0, 1  # streams of batches


@dataclass
class Batches:
    """The batches of a run, on its device. (seed, stream, split, number) decides a batch and the
    dropout that it meets."""
    data: dataset.Data
    batch_size: int
    block_size: int
    vocab_size: int
    seed: int
    device: torch.device

    def draw(self, split, stream, number):
        """Inputs and targets (batch_size, block_size) of batch number of a stream, TRAINING or
        EVALUATION. Seeds torch for its dropout. Raises UserError for an id past vocab_size."""
        seed = (self.seed, stream, dataset.SPLITS.index(split))
        tokens = getattr(self.data, split)
        x, y = dataset.draw_batch(tokens, self.batch_size, self.block_size, seed, number,
                                  self.data.sequence)
        dataset.check_ids(max(x.max(), y.max()), self.vocab_size, self.data.folder / f'{split}.bin')
        seed_torch(int(np.random.default_rng((*seed, number)).integers(2 ** 63)), self.device)
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        if self.device.type == 'cuda':  # the copy from pinned memory does not wait
            return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in (x, y))
        return x.to(self.device), y.to(self.device)


def seed_torch(seed, device):
    """torch.manual_seed, which takes 260 microseconds, with a way round it on a CPU."""
    if device.type == 'cpu':
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
