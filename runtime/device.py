"""
What 'auto' means for device and dtype on this machine, and what its GPU can do at most. A clear
message where the machine lacks what is asked for.
"""

import re
import sys
import time
from contextlib import nullcontext

from configurator import UserError

import torch

WORTH_A_TRY = 1e10  # FLOPs of a micro-batch, about a quarter of a second on two cores


def pick_device(name, local_rank=None):
    """'auto', 'cpu', 'cuda', 'cuda:1', 'mps' -> the torch.device and its type. Under torchrun a
    CUDA device is the one of this process, local_rank. Raises UserError if the machine has no such
    device."""
    if name == 'auto':
        has_mps = torch.backends.mps.is_available()
        name = 'cuda' if torch.cuda.is_available() else 'mps' if has_mps else 'cpu'
    known = "use 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'device={name!r} is not known: {known}') from None
    if device.type == 'cuda':
        count = torch.cuda.device_count()
        index = local_rank if local_rank is not None else device.index or 0
        if index >= count:
            remedy = 'start fewer processes' if count else "use --device=cpu or 'auto'"
            raise UserError(f'device={name!r}: this process wants GPU {index}, torch finds '
                            f'{count} here; {remedy}')
        device = torch.device('cuda', index)
        torch.cuda.set_device(device)
    elif device.type == 'mps' and not torch.backends.mps.is_available():
        raise UserError("device='mps' is not available here: use --device=cpu or 'auto'")
    elif device.type not in ('cpu', 'cuda', 'mps'):
        raise UserError(f'device={name!r} is not supported: {known}')
    return device, device.type


def pick_float64_device(name):
    """pick_device's torch.device for a program that computes in float64: the CPU, and a line that
    says so, in place of a Mac's GPU, which has none."""
    device, device_type = pick_device(name)
    if device_type != 'mps':
        return device
    print('note: device=mps has no float64: this runs on the CPU', file=sys.stderr)
    return torch.device('cpu')


def pick_dtype(name, device_type):
    """'auto', 'float32', 'bfloat16' or 'float16' -> torch.dtype. 'auto' is float32 except on a
    GPU, where it is bfloat16, or float16 on an older one."""
    if name != 'auto':
        return getattr(torch, name)
    if device_type != 'cuda':
        return torch.float32
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def seconds_of(block, x, dtype):
    """How long a block takes forward and backward for x (B, T, n_embd), the shorter of two."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        with autocast('cpu', dtype):
            block(x).float().sum().backward()
        times.append(time.perf_counter() - began)
    block.zero_grad(set_to_none=True)
    return min(times[1:])


def bfloat16_ratio(model, batch_size):
    """The time of a block of the model in bfloat16 on this CPU, as a share of that in float32; None
    where it is not worth a try: on a CPU without instructions for it, and for a small model."""
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()  # torch 2.11 has none
    shape = min(512, model.config.block_size), model.config.n_embd
    flops = model.flops_per_token() * batch_size * model.config.block_size
    has_it = capabilities.get('avx512_bf16') or capabilities.get('amx_bf16')
    if not has_it or flops < WORTH_A_TRY:
        return None
    block, x = model.transformer.h[0], torch.randn(1, *shape)
    return seconds_of(block, x, torch.bfloat16) / seconds_of(block, x, torch.float32)


def pick_compile(choice, device):
    """(whether to compile, '' or a line on why not though it was asked for). 'auto' is True on a
    GPU. torch.compile needs a compiler of the machine, which shows only when it is used."""
    if choice is False or choice == 'auto' and device.type != 'cuda':
        return False, ''
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as e:  # torch and the compilers raise many kinds
        reason = ' '.join(str(e).split())[:150]
        return False, (f'torch.compile does not work here ({type(e).__name__}: {reason}): it goes '
                       'on uncompiled')
    return True, ''


def autocast(device_type, dtype):
    """The context in which a model computes in dtype. Float32 needs none."""
    return nullcontext() if dtype == torch.float32 else torch.amp.autocast(device_type, dtype)


# Dense peaks in FLOP/s of 16-bit products that are added up in float32, from data sheets. The first
# key that is in the device's name counts.
PEAK_FLOPS = {'GB200': 2500e12, 'B200': 2250e12, 'H200 NVL': 835e12, 'H200': 989e12,
              'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H800': 989e12,
              'A100': 312e12, 'A800': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12,
              'A40': 150e12, 'RTX A6000': 155e12, 'A10': 125e12, 'V100': 125e12, 'T4': 65e12,
              'RTX 4090': 165e12, 'RTX 3090': 71e12, 'MI300X': 1307e12}


def peak_flops(device, dtype):
    """The published peak in FLOP/s of a device that computes in dtype; None where it is unknown."""
    if device.type != 'cuda' or dtype.itemsize != 2:
        return None
    return peak_of_card(torch.cuda.get_device_name(device))


def peak_of_card(name):
    for key, flops in PEAK_FLOPS.items():
        if re.search(rf'\b{key}\b(?! (D|Ti|Laptop)\b)', name):
            return flops
    return None
