"""
Several processes as one run. Those that torchrun started join, average and agree here. Without
torchrun there is one.

    parallel='ddp'     each process holds the whole model and optimizer; gradients are averaged
    parallel='fsdp'    each holds a part of every weight and of the optimizer, and the whole of one
                       block at a time
"""

import math
import os
import socket
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from configurator import UserError

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

from runtime.device import autocast, pick_device


@dataclass
class Processes:
    """The processes of a run, seen from one of them."""
    rank: int
    size: int
    device: torch.device
    sharded: bool  # parallel='fsdp', and more than one process
    control: object = None  # a group that talks without waiting for a GPU

    @property
    def is_first(self):
        return self.rank == 0

    def mean(self, values):
        """The mean over the processes of a tensor that each of them has, as a list."""
        if self.size > 1:
            dist.all_reduce(values)
        return (values / self.size).tolist()

    def max(self, number):
        """The highest of a whole number that each process has."""
        if self.size == 1:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.control)
        return number.item()

    def any(self, flag):
        """Whether flag is true in any process."""
        return bool(self.max(int(flag)))

    def barrier(self):
        """Wait until all processes have come here."""
        self.any(False)

    def max_abs(self, parameters):
        """The largest absolute value in parameters, nan if one of them is."""
        parts = [p.to_local() if hasattr(p, 'to_local') else p for p in parameters]
        largest = torch.stack([p.detach().abs().max() for p in parts if p.numel()]).max()
        return math.nan if self.any(not math.isfinite(largest)) else largest.item()

    def place(self, model, dtype):
        """Put a model, or this process's part of it, on the device. It is going to compute in
        dtype."""
        if not self.sharded:
            return model.to(self.device)
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.size,))
        # weights are gathered in dtype and forgotten after use, gradients are added up in float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        # one block after the other, so that the device never holds them all
        for part in (*blocks_of(model), model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, 'losses')
        return model

    def autocast(self, dtype):
        """The context in which a model computes in dtype. Sharded weights are gathered in it
        already: autocast would keep a copy of them all for the backward pass."""
        return nullcontext() if self.sharded else autocast(self.device.type, dtype)

    def wrap(self, model, compiled):
        """The module whose backward pass averages gradients."""
        if self.sharded:
            if compiled:  # what lies between the gatherings of weights
                for block in blocks_of(model):
                    block.forward = torch.compile(block.forward)
                if model.n_predictions == 1:  # compiled, all logits are there at a time
                    model.mean_loss = torch.compile(model.mean_loss)
            return model
        net = torch.compile(model) if compiled else model
        if compiled:
            model.losses = torch.compile(model.losses)  # of evaluations
        if self.size == 1:
            return net
        devices = [self.device.index] if self.device.type == 'cuda' else None
        return DDP(net, device_ids=devices, gradient_as_bucket_view=True)

    def gradient_sync(self, net, now):
        """Say whether the next backward pass averages gradients over the processes, or only adds
        them up in each. To be said before the forward pass. Sharded ones are averaged in each pass:
        a process has room for its own part alone."""
        if self.size > 1 and not self.sharded:
            net.require_backward_grad_sync = now  # what DDP's no_sync() sets, without a context

    def gather(self, value):
        """A state dictionary whose sharded tensors are put together, on the CPU of the first
        process. All processes have to call it."""
        if isinstance(value, dict):
            return {key: self.gather(item) for key, item in value.items()}
        if not hasattr(value, 'full_tensor'):
            return value
        value = whole(value)
        return value.cpu() if self.is_first else None

    def full_state(self, model, optimizer):
        """The state dictionaries of model and optimizer as one process would have them, for a
        checkpoint of the first process. All processes have to call it."""
        weights, state = model.state_dict(), optimizer.state_dict()
        if self.sharded:
            weights, state = self.gather(weights), self.gather(state)
            weights['transformer.wte.weight'] = weights['lm_head.weight']  # tied: written once
        return weights, state

    def load_optimizer(self, optimizer, state):
        """Give an optimizer the state that gather() put together, or that an optimizer of one
        process has."""
        if self.sharded:
            params = [p for group in optimizer.param_groups for p in group['params']]
            shards = {i: {key: shard_like(params[i], value) for key, value in of_one.items()}
                      for i, of_one in state['state'].items()}
            state = state | {'state': shards}
        optimizer.load_state_dict(state)


def whole(tensor):
    """A tensor, put together if it is sharded. All processes have to call it."""
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def shard_like(p, value):
    """This process's part of a value that each process has, if it has the shape of the parameter p
    and p is sharded."""
    is_whole = torch.is_tensor(value) and value.shape == p.shape and value.dim()
    if not is_whole or not hasattr(p, 'full_tensor'):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def blocks_of(model):
    return [*model.transformer.h, *getattr(model, 'ahead', [])]


def recompute_blocks(model):
    """Have each block forget its activations and compute them again in the backward pass: less
    memory, about a third more time (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
    Cost")."""
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def name_gloo_interface(size):
    """Tell gloo its network interface where it would not find it: on a node among others that
    resolves its own name to itself, as Debian's do. Raises UserError where there are several."""
    own_name = socket.gethostname()
    if int(os.environ.get('LOCAL_WORLD_SIZE', size)) == size or 'GLOO_SOCKET_IFNAME' in os.environ:
        return
    try:
        address = socket.gethostbyname(own_name)
    except OSError:  # gloo says so
        return
    if not address.startswith('127.'):
        return
    names = [name for _, name in socket.if_nameindex() if name != 'lo']
    if len(names) != 1:
        raise UserError(f'{own_name} resolves its own name to {address}, where other nodes do not '
                        f'reach it, and has the interfaces {", ".join(names) or "lo alone"}: put '
                        'GLOO_SOCKET_IFNAME=NAME in front of torchrun, with the one that leads to '
                        'the other nodes')
    os.environ['GLOO_SOCKET_IFNAME'] = names[0]


@contextmanager
def join_processes(config):
    """Join the processes that torchrun started and yield the Processes. Raises UserError where
    they cannot work together."""
    under_torchrun = {'RANK', 'LOCAL_RANK', 'WORLD_SIZE'} <= os.environ.keys()
    size = int(os.environ['WORLD_SIZE']) if under_torchrun else 1
    local_rank = int(os.environ['LOCAL_RANK']) if under_torchrun else None
    device, device_type = pick_device(config.device, local_rank)
    if config.gradient_accumulation_steps % size:
        raise UserError(f'gradient_accumulation_steps={config.gradient_accumulation_steps} counts '
                        'all processes together and is not divisible by their number, '
                        f'{size}: use a multiple of {size}')
    if not under_torchrun:
        yield Processes(0, 1, device, sharded=False)
        return
    backend = config.backend
    if backend == 'auto':
        backend = 'nccl' if device_type == 'cuda' else 'gloo'
    if backend == 'nccl' and device_type != 'cuda':
        raise UserError(f"backend='nccl' needs GPUs, device is {device_type}: use backend='gloo' "
                        "or 'auto'")
    if not dist.is_backend_available(backend):
        raise UserError(f"backend={backend!r} is not available in this torch: use 'nccl', 'gloo' "
                        "or 'auto'")
    name_gloo_interface(size)
    dist.init_process_group(backend)
    control = dist.new_group(backend='gloo') if backend != 'gloo' else None
    sharded = config.parallel == 'fsdp' and size > 1
    yield Processes(dist.get_rank(), size, device, sharded, control)
    dist.destroy_process_group()  # not after an error in one process: it would wait for the others
