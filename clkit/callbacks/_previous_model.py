"""The frozen model from which a task started: what a new one is kept comparable with."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from clkit.distributed import gather_objects
from clkit.errors import StateError
from clkit.features.observer import forward
from clkit.features.tap import FeatureTap
from clkit.files import read_checkpoint, write_checkpoint
from clkit.surgery.copies import bare_copy

__all__ = ["PreviousModel", "digest_of"]


class PreviousModel:
    """A copy of the user's module as it is now, in evaluation mode and outside of every module's tree.

    So it is in no checkpoint, in no optimizer, and goes when the run lets go of it; a run that is resumed reads it
    from a file of its own.

    Args:
        module: The user's module.
        layer: Where its features are read.
    """

    def __init__(self, module: pl.LightningModule, layer: str) -> None:
        self._module = bare_copy(module)
        self._tap = FeatureTap(self._module, layer)

    def features(self, trainer: pl.Trainer, inputs: Any) -> Tensor:
        """Return the features (B, d) of inputs as the network gets them, without gradients."""
        with trainer.precision_plugin.forward_context():
            return self._tap.extract(inputs, partial(forward, self._module, self._tap.network))

    def save(self, path: Path, trainer: pl.Trainer) -> str:
        """Write its weights, by the first process; return what tells the file from others. A call on all."""
        if trainer.is_global_zero:
            write_checkpoint({"state_dict": {k: each.cpu() for k, each in self._module.state_dict().items()}}, path)
        told = gather_objects(digest_of(path) if trainer.is_global_zero else None, "the model before a task")
        return str(next(filter(None, told)))

    def load(self, places: Sequence[Path], digest: str) -> Path:
        """Take the weights that :meth:`save` wrote from the first of some files that has them, and return it.

        Raises:
            StateError: If none is there, or all are others.
        """
        there = [path for path in dict.fromkeys(places) if path.is_file()]
        found = {path: digest_of(path) for path in there}
        for path in there:
            if found[path] == digest:
                self._module.load_state_dict(read_checkpoint(path)["state_dict"])
                return path
        if there:
            raise StateError(
                f"{there[0]} is not the model from which the task of this checkpoint started ({found[there[0]]} is not "
                f"{digest}): another run has written it; give each run a folder of its own"
            )
        raise StateError(
            f"the run goes on inside a task, and the model from which that task started is not at {places[0]}, nor "
            f"where it was ({places[-1]}); put the file back, or go on from a checkpoint of the end of a task"
        )


def digest_of(path: Path) -> str:
    """Return the first half of the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
