"""Single answers of a saved run corrected in its checkpoint, and taken back there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clkit.callbacks import MEND, HeadCallback, LoggedEdit, RunEdit
from clkit.callbacks._exact_edits import features_of
from clkit.callbacks._run_edits import read_logged
from clkit.data import StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError, did_you_mean
from clkit.files import check_output, read_checkpoint, write_checkpoint
from clkit.methods._edited_network import ran
from clkit.methods._editor_saved import holds_editor
from clkit.runs.run_images import names_of_labels, stored_image
from clkit.runs.saved_run import SavedRun
from clkit.schema import Whole, read_entries, saved_entry

__all__ = ["EditedRun", "edit_checkpoint", "logged_edits", "revert_in_checkpoint"]


@dataclass(frozen=True)
class EditedRun:
    """What became of an edit of a checkpoint.

    Attributes:
        result: What was done.
        image: (C, H, W), the first of the images as they are stored, or a vector.
        names: Of classes, by label as batches have them; may be empty.
        before: (C,) probabilities of the classes for the first image before the edit; the softmax of its scores
            where a head was edited.
        after: Likewise after it.
    """

    result: RunEdit
    image: Tensor
    names: dict[int, str]
    before: Tensor
    after: Tensor


def edit_checkpoint(
    path: str | Path,
    images: Sequence[str | Path],
    labels: Sequence[str],
    *,
    editor: str | Path | None = None,
    layers: Sequence[str] | None = None,
    route: Literal["auto", "exact", "editor"] | None = None,
    head: str | None = None,
    task: int | None = None,
    guard: bool = True,
    allow_stale: bool = False,
    drawn: bool = False,
    output: str | Path | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> EditedRun:
    """Edit the network, or a head, of a checkpoint so that images get labels, and write it.

    Args:
        path: The checkpoint file of a run of ``clkit fit``.
        images: Image files, or rows of a source such as ``"digits/test/17"``; several are one edit.
        labels: One for each: a class id, or the name of a class.
        editor: A file with a trained editor; by default that of the run, also one that the run has trained, or a new
            one.
        layers: What a new editor edits, see :class:`~clkit.methods.GradientEditor`.
        route: Another one than that of the run, see :class:`~clkit.callbacks.MEND`.
        head: Likewise.
        task: Whose network, in a run with a network for each task.
        guard: Whether the run's validation samples bound what the edit may do elsewhere.
        allow_stale: Whether features may move that heads of the run have learned.
        drawn: Whether the image is to be drawn, so that vectors are refused.
        output: The file to write; by default the checkpoint itself, whole or not at all.
        config: The run's ``config.yaml``; looked for beside the checkpoint by default.
        overwrite: Whether an ``output`` that is there is replaced.

    Raises:
        ArgumentError: If a file is not there, a label is of no class, or ``images`` and ``labels`` do not fit.
        ConfigurationError: If the run's data do not say how stored images become inputs, or MEND refuses the edit.
        StateError: If the file is damaged.
        WriteError: If it cannot be written.
    """
    if len(images) != len(labels):
        raise ArgumentError(f"--label must be one for each --image: {len(images)} images, {len(labels)} labels")
    if output is not None:
        check_output(output, [Path(path)], overwrite)
    checkpoint = read_checkpoint(path)
    run = _Run(path, config, checkpoint, editor, layers, head, allow_stale=allow_stale)
    ids = torch.tensor([run.label(each) for each in labels])
    stored = [stored_image(run.data, each, only_images=drawn) for each in images]
    run.open()
    inputs = [run.data.input_preprocessing()(each[None]) for each in stored]
    if len(shapes := {tuple(each.shape[1:]) for each in inputs}) > 1:
        raise ArgumentError(
            f"--image: the images become inputs of several shapes, {sorted(shapes)}; edit one at a time"
        )
    x = torch.cat(inputs)
    if not guard:
        run.mend.guard = None  # what moves elsewhere is still said, and a new editor takes its statistics there
    before = run.probabilities(x[:1])
    result = run.mend.edit(x, ids, route=route, task=task)
    if result.id is not None:
        run.write(output or path)
    after = run.probabilities(x[:1])
    return EditedRun(result, stored[0], run.names, before[result.head], after[result.head])


def logged_edits(path: str | Path) -> list[LoggedEdit]:
    """Return the edits that a checkpoint's network and heads have, oldest first; the network is not built.

    Raises:
        ArgumentError: If there is no such file.
        StateError: If it is damaged.
    """
    found = []
    for key, state in _states(read_checkpoint(path)).items():
        edits = saved_entry(state, "edits", list, key)
        found += read_logged(edits, saved_entry(state, "next_id", Whole(), key), key)
    return found


def revert_in_checkpoint(
    path: str | Path,
    ids: Sequence[int],
    *,
    inexact: bool = False,
    output: str | Path | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> list[LoggedEdit]:
    """Take edits of a checkpoint back, and write it; return those that are left.

    Args:
        path: The checkpoint file.
        ids: Numbers of edits in its log.
        inexact: See :meth:`clkit.callbacks.MEND.revert`.
        output: The file to write; by default the checkpoint itself.
        config: The run's ``config.yaml``.
        overwrite: Whether an ``output`` that is there is replaced.

    Raises:
        ArgumentError: If there is no such edit, or it cannot be taken back. Otherwise as :func:`edit_checkpoint`.
        EditConflictError: If weights are not what the log says.
    """
    if output is not None:
        check_output(output, [Path(path)], overwrite)
    checkpoint = read_checkpoint(path)
    if not _states(checkpoint):
        raise ArgumentError(f"{path} has no edits")
    run = _Run(path, config, checkpoint, None, None, None, allow_stale=True)
    run.mend.checks_weights = not inexact
    run.open()
    run.mend.revert(*ids, inexact=inexact)
    run.write(output or path)
    return run.mend.records


# what a run's own callback says of edits, and goes on to say where its log or a command names another editor
_KEPT = (
    "route",
    "head_name",
    "weight",
    "scale",
    "guard",
    "reference",
    "equivalence",
    "max_feature_shift",
    "allow_stale",
)


class _Run:
    """The run of a checkpoint with its edits."""

    def __init__(
        self,
        path: str | Path,
        config: str | Path | None,
        checkpoint: dict[str, Any],
        editor: str | Path | None,
        layers: Sequence[str] | None,
        head: str | None,
        *,
        allow_stale: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self._run = SavedRun(path, config)
        if not isinstance(self._run.data, StreamDataModule):
            raise ConfigurationError(
                f"the data of {self._run.config} are a {type(self._run.data).__name__}, which does not say how stored "
                "images become inputs; use clkit.callbacks.MEND in Python"
            )
        self.data: StreamDataModule = self._run.data
        own = [each for each in self._run.learning if isinstance(each, MEND)]
        before = own[0] if own else None
        mend = before
        if mend is None or editor is not None or layers is not None or _states(checkpoint):
            settings: Any = editor if layers is None else {"layers": list(layers)}
            if settings is None and not _states(checkpoint) and holds_editor(checkpoint):
                settings = path  # that of a run which trained one
            others = [each for each in self._run.learning if each is not before]
            mend = MEND(settings, when="manual", name="mend" if before is None else before.name)
            for name in _KEPT if before is not None else ():
                setattr(mend, name, getattr(before, name))
            self._run.learning = [*others, mend]
        mend.edits = None
        mend.head_name = head or mend.head_name
        mend.allow_stale = mend.allow_stale or allow_stale
        self.mend = mend

    def open(self) -> None:
        """Build the network and take the checkpoint up."""
        self.module, self._trainer = self._run.opened()

    @property
    def names(self) -> dict[int, str]:
        """Names of the classes by label as batches have them."""
        return names_of_labels(self.data)

    def label(self, given: str) -> int:
        """Return the label that is meant by an id or a name."""
        self.data.setup("validate")
        ids, names = self.data.original_ids, self.data.class_names
        if given.isdecimal():
            found = int(given)
        else:
            meant = [each for each, name in names.items() if name == given]
            if not meant:
                near = did_you_mean(given, names.values()) or "; give the id of a class"
                raise ArgumentError(f"--label {given!r} is the name of no class of this run{near}")
            found = meant[0]
        if found not in self.data.classes:
            raise ArgumentError(f"--label {given} is no class of this run, which has {list(self.data.classes)[:20]}")
        return found if ids is None else ids.index(found)

    def probabilities(self, x: Tensor) -> dict[str | None, Tensor]:
        """Return the probabilities (C,) of the classes for one image (1, …) now, by head, and of the module itself."""
        with torch.no_grad():
            logits: Tensor = ran(self.module.eval(), x.to(self.module.device))
        found: dict[str | None, Tensor] = {None: logits[0].float().softmax(dim=0).cpu()}
        for each in self._run.learning:
            if isinstance(each, HeadCallback):
                scores = each.scores(features_of(self.module, each.layer, x))
                found[each.name] = scores[0].softmax(dim=0).cpu()
        return found

    def write(self, path: str | Path) -> None:
        """Write the checkpoint with what the edit has changed."""
        saved = self.checkpoint
        weights = dict(self.module.state_dict())
        for callback in self._run.learning:
            if getattr(callback, "_graft", None) is not None:
                callback._graft.restore_keys(weights)
        if weights.keys() != saved["state_dict"].keys():
            raise ConfigurationError(
                f"the network of {self._run.config} has other tensors than the checkpoint; give the config.yaml that "
                "belongs to it"
            )
        saved["state_dict"] = {name: value.detach().cpu() for name, value in weights.items()}
        states = saved.setdefault("callbacks", {})
        for callback in self._run.learning:
            if callback is self.mend or callback.state_key in states:
                states[callback.state_key] = callback.state_dict()
        trained = (
            saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] if "loops" in saved else 0
        )
        own = states[self.mend.state_key]
        own["batches"] = max(own["batches"], trained)  # so that a run with this callback can go on from the file
        write_checkpoint(saved, path)


def _states(checkpoint: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the states of callbacks that have edits."""
    entries = read_entries(checkpoint.get("callbacks", {}), "'callbacks' of the checkpoint")
    return {key: state for key, state in entries.items() if str(key).split("(")[0] == MEND.__name__ and state}
