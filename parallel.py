"""
Several processes as one run: those that torchrun started join, average and agree here. Without torchrun there is one.

    parallel='ddp'     each process holds the whole model and optimizer; gradients are averaged
    parallel='fsdp'    each holds a part of every weight and of the optimizer, and the whole of one block at a time
"""

import math
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import UserError
from device import pick_device


@dataclass
class Team:
    """The processes of a run, seen from one of them."""
    rank: int
    size: int
    device: torch.device
    device_type: str
    sharded: bool  # parallel='fsdp', and more than one process
    control: object = None  # a group that talks without waiting for a GPU

    def mean(self, values):
        """The mean over the processes of a tensor that each of them has, as a list."""
        if self.size > 1:
            dist.all_reduce(values)
        return (values / self.size).tolist()

    def any(self, flag):
        """Whether flag is true in any process."""
        if self.size == 1:
            return flag
        return bool(self.highest(int(flag)))

    def largest(self, parameters):
        """The largest absolute value in parameters, nan if one of them is."""
        parts = [p.to_local() if hasattr(p, 'to_local') else p for p in parameters]
        largest = torch.stack([p.detach().abs().max() for p in parts if p.numel()]).max()  # which keeps a nan
        return math.nan if self.any(not math.isfinite(largest)) else largest.item()

    def highest(self, number):
        """The highest of a whole number that each process has."""
        if self.size == 1:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        return number.item()

    def place(self, model):
        """Put a model, or this process's part of it, on the device."""
        if not self.sharded:
            return model.to(self.device)
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        mesh = dist.device_mesh.init_device_mesh(self.device_type, (self.size,))
        blocks = [*model.transformer.h, *getattr(model, 'ahead', [])]
        for block in blocks:  # one after the other, so that the device never holds them all
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, 'losses')
        return model

    def wrap(self, net):
        """The module whose backward pass averages gradients."""
        if self.size == 1 or self.sharded:
            return net
        return DDP(net, device_ids=[self.device.index] if self.device_type == 'cuda' else None)

    def averages(self, net, now):
        """The context of a backward pass after which gradients are averaged now, or only added up in each process."""
        if self.sharded:
            net.set_requires_gradient_sync(now)
        return nullcontext() if now or self.size == 1 or self.sharded else net.no_sync()

    def whole(self, value):
        """A state dictionary whose sharded tensors are put together, on the CPU of the first process; all have to ask."""
        if isinstance(value, dict):
            return {key: self.whole(item) for key, item in value.items()}
        if not hasattr(value, 'full_tensor'):
            return value
        value = value.full_tensor()
        return value.cpu() if self.rank == 0 else None

    def load_optimizer(self, optimizer, state):
        """Give an optimizer the state that whole() put together, or that an optimizer of one process has."""
        if self.sharded:
            from torch.distributed.tensor import distribute_tensor
            params = [p for group in optimizer.param_groups for p in group['params']]

            def part(p, value):
                if torch.is_tensor(value) and value.shape == p.shape and value.dim():
                    return distribute_tensor(value.to(self.device), p.device_mesh, p.placements)
                return value
            state = state | {'state': {i: {key: part(params[i], value) for key, value in of_one.items()}
                                       for i, of_one in state['state'].items()}}
        optimizer.load_state_dict(state)


@contextmanager
def team(config):
    """Join the processes that torchrun started and yield the Team. Raises UserError where they cannot work together."""
    parallel = {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} <= os.environ.keys()
    size = int(os.environ['WORLD_SIZE']) if parallel else 1
    device, device_type = pick_device(config.device, int(os.environ['LOCAL_RANK']) if parallel else None)
    if config.gradient_accumulation_steps % size:
        raise UserError(f'gradient_accumulation_steps={config.gradient_accumulation_steps} counts all processes '
                        f'together and is not divisible by their number, {size}: use a multiple of {size}')
    if not parallel:
        yield Team(0, 1, device, device_type, sharded=False)
        return
    backend = ('nccl' if device_type == 'cuda' else 'gloo') if config.backend == 'auto' else config.backend
    if backend == 'nccl' and device_type != 'cuda':
        raise UserError(f"backend='nccl' needs GPUs, device is {device_type}: use backend='gloo' or 'auto'")
    if not dist.is_backend_available(backend):
        raise UserError(f"backend={backend!r} is not available in this torch: use 'nccl', 'gloo' or 'auto'")
    dist.init_process_group(backend)
    control = dist.new_group(backend='gloo') if backend != 'gloo' else None
    yield Team(dist.get_rank(), size, device, device_type, config.parallel == 'fsdp' and size > 1, control)
    dist.destroy_process_group()  # not after an error in one process: it would wait for the others
