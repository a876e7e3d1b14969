"""parallel='fsdp': what two processes hold of a model, and that it computes what one does."""

import os
import pickle
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from test_faults import FORK
from test_parallel import two_ranks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT
from model_k_ahead import GPT_KAhead
from model_mla import GPT_MLA
from runtime.checkpoint import save_checkpoint
from runtime.device import autocast
from runtime.parallel import Processes, recompute_blocks, whole
from runtime.start import begin
from runtime.tokenizer import make_tokenizer
from train import TrainConfig

WIDE = dict(n_layer=4, n_embd=64, n_head=2, block_size=8, vocab_size=14, bias=False)
MODELS = pytest.mark.parametrize('model_class', [GPT, GPT_MLA, GPT_KAhead])


def in_two_processes(function):
    """What function(processes) returns in the first of two processes of parallel='fsdp', on a CPU.
    What it raises in either fails the test."""
    def child(environment):
        os.environ.update(environment)
        torch.set_num_threads(1)
        dist.init_process_group('gloo')
        result = function(Processes(dist.get_rank(), 2, torch.device('cpu'), sharded=True))
        dist.barrier()
        if dist.get_rank() == 0:
            sender.send_bytes(pickle.dumps(result))  # by value: the child ends
        dist.destroy_process_group()
    receiver, sender = FORK.Pipe(duplex=False)
    children = [FORK.Process(target=child, args=(rank,)) for rank in two_ranks()]
    for process in children:
        process.start()
    result = receiver.recv_bytes() if receiver.poll(60) else None
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0, 0]
    return pickle.loads(result)


class Alive(TorchDispatchMode):
    """Counts the numbers in all tensors that have been made and are still there."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = StorageWeakRef(x.untyped_storage())
                self.storages[storage.cdata] = storage, x.dtype.itemsize
        return out

    def count(self):
        """The least within a moment: on a busy machine the threads that gather let go late."""
        counts = []
        for _ in range(20):
            alive = [(torch.UntypedStorage._new_with_weak_ptr(storage.cdata), size)
                     for storage, size in self.storages.values() if not storage.expired()]
            counts.append(sum(storage.nbytes() // size for storage, size in alive))
            del alive
            time.sleep(0.02)
        return min(counts)


def n_numbers(parameters):
    return sum(p.numel() for p in parameters)


@MODELS
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_process_holds_its_half_and_one_block(model_class, dtype):
    """After a forward pass no block's weights are gathered, in no precision, and after a
    micro-step the gradient is its own half. One token has hardly any activations."""
    def alive(processes):
        model = tiny_model(model_class, **WIDE)
        of_block = n_numbers(model.transformer.h[0].parameters())
        in_all = n_numbers(model.parameters())
        model = processes.place(model, dtype).train()
        kept = sum(p.to_local().untyped_storage().nbytes() // 4 for p in model.parameters())
        x, found = torch.zeros(1, 5, dtype=torch.long), []
        for _ in range(2):
            with Alive() as mode:
                with processes.autocast(dtype):
                    loss = model(x, x)[1]
                found.append(mode.count())
                loss.backward()
                del loss
                found.append(mode.count())
        return of_block, in_all, kept, found

    of_block, in_all, kept, found = in_two_processes(alive)
    assert kept <= 0.51 * in_all
    for after_forward, after_micro_step in (found[:2], found[2:]):
        assert after_forward < of_block and after_micro_step < 0.51 * in_all


@pytest.mark.parametrize('model_class, options', [
    (GPT, ''), (GPT_MLA, 'checkpointing'), (GPT_MLA, 'compiled'), (GPT_KAhead, 'both')])
def test_the_gradients_of_two_micro_steps_are_those_of_one_process(model_class, options,
                                                                   monkeypatch):
    def gradients(processes, model, batches):
        if options in ('checkpointing', 'both'):
            recompute_blocks(model)
        # the compiler's own code takes a minute to build and is not what is tested
        monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager',
                                                      fullgraph=True))
        model = processes.place(model, torch.float32).train()
        net = processes.wrap(model, compiled=options in ('compiled', 'both'))
        for step, (x, y) in enumerate(batches[processes.rank::processes.size]):
            processes.gradient_sync(net, now=step == 1)
            (net(x, y)[1] * processes.size / len(batches)).backward()
        return {name: whole(p.grad).numpy() for name, p in model.named_parameters()}

    torch.manual_seed(3)
    batches = [(torch.randint(14, (2, 8)), torch.randint(14, (2, 8))) for _ in range(4)]
    model = tiny_model(model_class, **WIDE)
    sum(model(x, y)[1] / len(batches) for x, y in batches).backward()
    found = in_two_processes(
        lambda processes: gradients(processes, tiny_model(model_class, **WIDE), batches))
    for name, p in model.named_parameters():
        torch.testing.assert_close(torch.from_numpy(found[name]), p.grad, atol=1e-6, rtol=1e-4)


def test_bfloat16_is_near_what_autocast_computes_and_its_loss_is_float32():
    def loss_of(processes):
        model = processes.place(tiny_model(GPT, **WIDE), torch.bfloat16)
        with processes.autocast(torch.bfloat16):
            loss = model(*batch)[1]
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        return loss.dtype, loss.item()

    torch.manual_seed(3)
    batch = torch.randint(14, (2, 8)), torch.randint(14, (2, 8))
    with autocast('cpu', torch.bfloat16):
        wanted = tiny_model(GPT, **WIDE)(*batch)[1].item()
    assert in_two_processes(loss_of) == (torch.float32, pytest.approx(wanted, abs=0.02))


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='it is how Linux says it')
def test_a_checkpoint_that_is_going_to_be_sharded_stays_in_its_file(tmp_path, data_dir):
    """Else each process would have the whole of it in memory."""
    model = tiny_model(GPT)
    save_checkpoint(tmp_path / 'ckpt.pt', model, make_tokenizer(list('\n abcdefghijkl')), {}, 3)
    processes = Processes(0, 2, torch.device('cpu'), sharded=True)
    for init_from in ('resume', str(tmp_path)):
        config = TrainConfig(out_dir=str(tmp_path), dataset=str(data_dir), init_from=init_from)
        start = begin(GPT, config, {}, processes)
        assert all(mapped_from(p) == str(tmp_path / 'ckpt.pt') for p in start.model.parameters())


def mapped_from(tensor):
    """The file that the memory of a tensor is mapped from."""
    for line in Path('/proc/self/maps').read_text().splitlines():
        region, *_, name = line.split()
        first, last = (int(end, 16) for end in region.split('-'))
        if first <= tensor.data_ptr() < last:
            return name
