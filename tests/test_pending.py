from types import SimpleNamespace

import pytest
import torch

from runtime.run_log import PendingLosses


@pytest.mark.parametrize('size, steps, slowest, stride', [
    (2, 5, 1000, 10), (2, 5, 3000, 3), (2, 5, 30_000, 1), (2, 5, 0, 10_000), (2, 1, 1000, 1),
    (1, 5, 1000, 1)])
def test_several_processes_ask_for_signals_every_10_ms(size, steps, slowest, stride):
    """slowest is in microseconds, and all processes get the same from max."""
    processes = SimpleNamespace(size=size, mean=torch.Tensor.tolist, max=lambda number: slowest)
    pending = PendingLosses(processes, 1e-3)
    assert all(map(pending.asks_at, range(9)))
    for i in range(steps):
        pending.add(i, torch.ones(1))
    pending.settle()
    assert [i for i in range(3 * stride) if pending.asks_at(i)] == [0, stride, 2 * stride]
