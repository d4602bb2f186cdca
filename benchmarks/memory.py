"""Peak extra memory of one call, in a process that has done nothing else."""

from __future__ import annotations

import gc
import multiprocessing
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter

import torch
from torch import Tensor

# The catalog's imports let the fork server hold torch and the operators before any thread has started.
from benchmarks import catalog
from benchmarks.measure import resident_peak, synchronize
from benchmarks.registry import Call, Entry, Peer, Unavailable, torch_dtype

__all__ = ["Fresh", "fresh_call", "peak_bytes", "sample"]

_SAMPLE_SIZE = 4096


@dataclass(frozen=True)
class Fresh:
    """The first call of a peer in a new process."""

    seconds: float
    peak_bytes: int
    """Above what was in use when the call began; its results are counted, its inputs are not."""
    sample: list[Tensor]
    """Evenly spaced numbers of each result."""


def sample(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    flat = (out.detach().reshape(-1) for out in outputs)
    return [f[:: max(1, f.numel() // _SAMPLE_SIZE)].to("cpu", torch.float32) for f in flat]


def _call_on_accelerator(call: Call, device: torch.device) -> tuple[tuple[Tensor, ...], int]:
    module = torch.get_device_module(device)
    synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    outputs = call()
    synchronize(device)
    return outputs, module.max_memory_allocated(device) - before


def peak_bytes(call: Call, device: torch.device) -> int:
    """The same on an accelerator, whose allocator keeps accounts: no new process is needed."""
    return _call_on_accelerator(call, device)[1]


def _warm(device: torch.device) -> None:
    """Do what happens once per process and belongs to nobody's call.

    The thread pool starts, the BLAS allocates its buffers, and the first gradient imports 35 MB of Python.
    """
    x = torch.randn(512, 512, device=device, requires_grad=True)
    y = x @ x
    torch.autograd.grad(y, x, torch.ones_like(y))
    gc.collect()


def _child(pipe: Connection, entry_name: str, peer_name: str, dtype: str, device_name: str, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        device = torch.device(device_name)
        entry = catalog.find(entry_name)
        call = entry.peer(peer_name).prepare(entry.inputs(torch_dtype(dtype), device))
        _warm(device)
        start = perf_counter()
        outputs, peak = resident_peak(call) if device.type == "cpu" else _call_on_accelerator(call, device)
        seconds = perf_counter() - start
        numbers = [s.numpy() for s in sample(outputs)] if entry.once else []
        pipe.send((seconds, peak, numbers))
    except Unavailable as reason:
        pipe.send(reason)
    except BaseException:
        pipe.send(traceback.format_exc())
    finally:
        pipe.close()


def fresh_call(entry: Entry, peer: Peer, dtype: str, device: torch.device) -> Fresh:
    """Call ``peer`` once in a new process.

    The process is forked from a server that has imported everything and run nothing: it starts at once, and
    its threads, caches and heap are its own.

    Raises:
        Unavailable: if the peer cannot run here.
        RuntimeError: if the process fails, with its traceback, or its exit code if it was killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, entry.name, peer.name, dtype, str(device), torch.get_num_threads())
    process = context.Process(target=_child, args=arguments)
    process.start()
    theirs.close()
    try:
        message = ours.recv()
    except EOFError:
        message = None
    process.join()
    if isinstance(message, Unavailable):
        raise message
    if message is None or isinstance(message, str):
        raise RuntimeError(f"{entry.name}, {peer.name}: {message or f'exit code {process.exitcode}'}")
    seconds, peak, numbers = message
    return Fresh(seconds, peak, [torch.from_numpy(n) for n in numbers])
