"""How checkpoints of a run get to the disk and back: whole or not at all, and executing nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from clkit.errors import StateError
from clkit.files import read_checkpoint, write_checkpoint

__all__ = ["WholeCheckpointIO", "protect_checkpoints", "read_run"]


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's way of saving checkpoints, with the same files, made safe against bad files and full disks.

    A checkpoint is written in its own folder and moved in one step, so that a full disk or a kill leaves the old one.
    Loading gives tensors and plain values only, unless ``weights_only=False`` is asked for, and compares the checksums
    of the file. Paths that are no local files are left to Lightning, with ``weights_only=True`` as the default.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint beside the file of that name, and move it there in one step.

        Raises:
            WriteError: If it cannot be written; the file of that name from before is unchanged.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, as :func:`read_run` does; a file that does not exist is a ``FileNotFoundError``."""
        whole = weights_only is not False
        if "://" in str(path) or not Path(path).exists():
            found: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=whole)
            return found
        return read_run(path, map_location=map_location, weights_only=whole)


def read_run(path: str | Path, *, map_location: Any = "cpu", weights_only: bool = True) -> dict[str, Any]:
    """Return a checkpoint that a trainer saved, with its main parts in their place.

    Args:
        path: The file.
        map_location: Where tensors go, as :func:`torch.load` takes it.
        weights_only: ``False`` trusts the file, whose objects may then execute anything.

    Raises:
        ArgumentError: If there is no such file.
        StateError: If it is damaged, is no checkpoint of a Lightning run, or holds objects other than tensors and
            plain values.
    """
    checkpoint = read_checkpoint(path, map_location=map_location, weights_only=weights_only)
    for name, kind in (("pytorch-lightning_version", str), ("state_dict", dict)):
        if not isinstance(checkpoint.get(name), kind):
            seen = ", ".join(repr(str(key)) for key in list(checkpoint)[:5]) + ", …" * (len(checkpoint) > 5)
            raise StateError(
                f"{path} is no checkpoint of a Lightning run: it has no {name!r}, but {seen}; "
                "ckpt_path takes what a trainer saved, not weights alone"
            )
    for name in ("callbacks", "loops", "hyper_parameters"):
        if not isinstance(checkpoint.get(name, {}), dict):
            raise StateError(f"{path}: {name!r} is a {type(checkpoint[name]).__name__}, not a dictionary")
    return checkpoint


def protect_checkpoints(strategy: Strategy) -> None:
    """Have a strategy use :class:`WholeCheckpointIO`, unless the user gave it another way of saving."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpointIO()
