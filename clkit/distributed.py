"""Talking to the other processes of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clkit.errors import ClkitError, ProcessLostError

__all__ = ["gathered", "share_buffers", "together", "world_size"]


@contextmanager
def together(what: str) -> Iterator[None]:
    """Around a call that all processes make together: says it in words when one of them is gone.

    Args:
        what: What the call is for.

    Raises:
        ProcessLostError: If the backend fails, because another process died or did not answer in time.

    Example:
        >>> with together("the sums"):  # doctest: +ELLIPSIS
        ...     raise RuntimeError("Connection closed by peer")
        Traceback (most recent call last):
        clkit.errors.ProcessLostError: the processes could not exchange the sums: another one died, or answers no ...
    """
    try:
        yield
    except ClkitError:  # one of ours, which all processes raise alike
        raise
    except RuntimeError as error:  # what torch.distributed and all its backends raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise ProcessLostError(
            f"the processes could not exchange {what}: another one died, or answers no more ({reason}). Look at its "
            "output for the cause, then start all processes again from the last checkpoint (ckpt_path=…): it is whole"
        ) from error


def gathered(value: Any, what: str, *, at_first: bool = False) -> list[Any]:
    """The values of all processes in rank order; a call on all of them. Alone, the one value.

    Args:
        value: Anything that can be pickled.
        what: What it is, for the message.
        at_first: Only the first process gets them, the others an empty list; for values that are large together.

    Raises:
        ProcessLostError: If another process died or did not answer in time.

    Example:
        >>> gathered(3, "the numbers")
        [3]
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    receives = not at_first or dist.get_rank() == 0
    values: list[Any] = [None] * dist.get_world_size() if receives else []
    with together(what):
        if at_first:
            dist.gather_object(value, values if receives else None)
        else:
            dist.all_gather_object(values, value)
    return values


def share_buffers(model: Any) -> None:
    """Gives all processes the buffers of the first one (running means of a batch norm), a little before DDP would.

    DDP does it when the next training forward begins. What a network says in between, to heads and in an evaluation,
    would otherwise be said by another network in each process, of which a checkpoint holds only the first.

    Args:
        model: What the strategy runs; nothing happens if it is not wrapped for DDP, or DDP will not share buffers.
    """
    from torch.nn.parallel import DistributedDataParallel

    if not isinstance(model, DistributedDataParallel):
        return
    wrapped: Any = model  # torch gives the method no types
    if not wrapped.will_sync_module_buffers():
        return
    import torch.distributed as dist

    with together("the buffers of the network"):
        for buffer in model.module.buffers():
            dist.broadcast(buffer, src=0, group=model.process_group)


def world_size(group: Any = None) -> int:
    """Number of processes that learn together, 1 where none are set up."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return int(dist.get_world_size(group))
    return 1
