"""Talking to the other processes of a run; every function here also works in a run of one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from clkit.errors import ClkitError, ProcessLostError, first_line

__all__ = [
    "broadcast",
    "exchange_device",
    "gather_objects",
    "gather_rows",
    "gather_with_graph",
    "rank",
    "report_lost_process",
    "share_buffers",
    "world_size",
]


def world_size(group: Any = None) -> int:
    """Return the number of processes that learn together, 1 where none are set up."""
    return int(dist.get_world_size(group)) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 where no others are set up."""
    return int(dist.get_rank()) if world_size() > 1 else 0


def exchange_device(device: torch.device, group: Any = None) -> torch.device:
    """Return where tensors of a device have to lie to be exchanged: a backend reaches one kind of device only."""
    backend = dist.get_backend(group)
    if backend == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else device


@contextmanager
def report_lost_process(what: str) -> Iterator[None]:
    """Turn a backend's failure inside the block into a ProcessLostError that says what was to be exchanged.

    Example:
        >>> with report_lost_process("the sums"):  # doctest: +ELLIPSIS
        ...     raise RuntimeError("Connection closed by peer")
        Traceback (most recent call last):
        clkit.errors.ProcessLostError: the processes could not exchange the sums: another one died, or answers no ...
    """
    try:
        yield
    except ClkitError:  # clkit's own errors are raised on all processes alike
        raise
    except RuntimeError as error:  # what torch.distributed and all its backends raise
        reason = first_line(error).split(". ")[0]
        raise ProcessLostError(
            f"the processes could not exchange {what}: another one died, or answers no more ({reason}). Look at its "
            "output for the cause, then start all processes again from the last checkpoint (ckpt_path=…): it is whole"
        ) from error


def gather_objects(value: Any, what: str, *, first_only: bool = False) -> list[Any]:
    """Return the values of all processes in the order of their ranks; all processes must call it.

    With ``first_only``, for large values, the others get an empty list.

    Raises:
        ProcessLostError: If another process died or did not answer in time; it names ``what`` was exchanged.

    Example:
        >>> gather_objects(3, "the numbers")
        [3]
    """
    if world_size() == 1:
        return [value]
    receives = not first_only or dist.get_rank() == 0
    values: list[Any] = [None] * world_size() if receives else []
    with report_lost_process(what):
        if first_only:
            dist.gather_object(value, values if receives else None)
        else:
            dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor, sizes: Sequence[int], what: str = "their rows", group: Any = None) -> list[Tensor]:
    """Return the rows of all processes in the order of their ranks; all processes must call it.

    Args:
        rows: The rows of this process, (N, ...), on a device that the backend reaches.
        sizes: The number N of rows of each process.
        what: A name of the rows for the error message, a ProcessLostError.
        group: The process group, the default one if ``None``.
    """
    if world_size(group) == 1:
        return [rows]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # all_gather takes equal shapes only
    padded[: len(rows)] = rows
    received = [torch.empty_like(padded) for _ in sizes]
    with report_lost_process(what):
        dist.all_gather(received, padded, group=group)
    return [part[:size] for part, size in zip(received, sizes, strict=True)]


def gather_with_graph(rows: Tensor, what: str, group: Any = None) -> Tensor:
    """Return the rows of all processes one under another, those of this process with their graph; all must call it.

    Each process may have another number of rows (N, ...). A ProcessLostError names ``what`` was exchanged.
    """
    processes = world_size(group)
    if processes == 1:
        return rows
    own = torch.tensor([len(rows)], device=rows.device)
    sizes = [int(each) for each in gather_rows(own, [1] * processes, what, group)]
    parts = gather_rows(rows.detach(), sizes, what, group)
    parts[dist.get_rank(group)] = rows
    return torch.cat(parts)


def broadcast(tensors: Iterable[Tensor], what: str, group: Any = None) -> None:
    """Overwrite tensors in place with those of the first process; all processes must call it.

    A ProcessLostError names ``what`` was exchanged.
    """
    if world_size(group) == 1:
        return
    with report_lost_process(what):
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0, group=group)


def share_buffers(model: Any) -> None:
    """Give all processes the buffers of the first one (running means of a batch norm), a little before DDP would.

    DDP shares them when the next training forward begins. Heads and evaluations that read the network before that
    would see another network in each process, and a checkpoint holds only the first. Does nothing for a ``model``
    that is not wrapped for DDP, or whose buffers DDP will not share.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    wrapped: Any = model  # torch gives the method no types
    if wrapped.will_sync_module_buffers():
        broadcast(model.module.buffers(), "the buffers of the network", group=model.process_group)
