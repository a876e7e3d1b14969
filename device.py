"""What 'auto' means for device and dtype on this machine, and a clear line where one is asked for that it lacks."""

from contextlib import nullcontext

import torch

from configurator import UserError


def pick_device(name, local_rank=None):
    """'auto', 'cpu', 'cuda', 'cuda:1', 'mps' -> the torch.device and its type. Under torchrun a CUDA device is the one
    of this process, local_rank. Raises UserError if the machine has no such device."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name!r} is not known: use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'") from None
    if device.type == 'cuda':
        count = torch.cuda.device_count()
        index = local_rank if local_rank is not None else device.index or 0
        if index >= count:
            raise UserError(f'device={name!r}: this process wants GPU {index}, torch finds {count} here; '
                            + ('start fewer processes' if count else "use --device=cpu or 'auto'"))
        device = torch.device('cuda', index)
        torch.cuda.set_device(device)
    elif device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError("device='mps' is not available here: use --device=cpu or 'auto'")
    elif device.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f"device={name!r} is not supported: use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
    return device, device.type


def pick_dtype(name, device_type):
    """'auto', 'float32', 'bfloat16' or 'float16' -> torch.dtype; 'auto' is float32 except on a GPU."""
    if name == 'auto':
        if device_type != 'cuda':
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return getattr(torch, name)


def autocast(device_type, dtype):
    """The context in which a model computes in dtype; float32 needs none."""
    return nullcontext() if dtype == torch.float32 else torch.amp.autocast(device_type, dtype)
