"""Taking samples out of what a run has learned."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError, ConfigurationError, DataError, StateError
from clkit.files import check_output, read_checkpoint
from clkit.methods.heads.base import Head
from clkit.methods.heads.portable import head_of_state
from clkit.runs.contents import read_contents
from clkit.runs.heads import HEADS, head_entries, name_of
from clkit.runs.merging import HeadSummary, hand_over, save_checkpoint
from clkit.schema import LEARNED, MERGED, STRATEGY

__all__ = ["forget_samples", "read_samples"]


def forget_samples(
    path: str | Path,
    output: str | Path,
    *,
    features: Tensor | None = None,
    targets: Tensor | None = None,
    ids: Sequence[int] | None = None,
    heads: Sequence[str] | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> list[HeadSummary]:
    """Write a checkpoint whose heads have never seen some samples.

    The samples are taken out of the sums, so each head equals the one of a run without them, up to the rounding of
    float64. Everything else of the checkpoint stays, accuracies that were measured included, and a fit can go on from
    it. A later epoch over the same experience gives its samples again, unless they are taken out of the data.

    Sums cannot tell whether a sample was ever in them: what is given here is believed, as long as each class has that
    many samples. Nothing is taken out of a network that was trained with the samples, nor out of older checkpoints.

    Args:
        path: The checkpoint file.
        output: The file to write; its folder must exist.
        features: (N, D), the very numbers that the heads have learned, in any floating dtype.
        targets: (N,) class ids, as the heads have them (those of the batches, where the data relabels).
        ids: Row numbers in the training part of the run's data, instead of ``features`` and ``targets``. Their batches
            are given to the network once more, so this needs the data, the run's settings, and the gradient-free
            strategy, under which the network was the same all the time.
        heads: Names of the heads that shall forget; all by default.
        config: The run's ``config.yaml``, for ``ids``; looked for beside the checkpoint by default.
        overwrite: Whether an existing file may be replaced.

    Returns:
        What each of these heads still knows.

    Raises:
        ArgumentError: If neither or both of ``features`` and ``ids`` are given, a head is not there, or ``output``
            exists.
        BatchError: If the samples are malformed, or more than a head has learned of a class. Nothing is written then.
        ConfigurationError: If a head keeps a solution and no sums (``solver="recursive"``), or heads read features at
            several places; or the samples of ``ids`` cannot be computed again; or the file holds a replay memory, from
            whose images the network itself has learned.
        DataError: If ``ids`` were not learned, or are no rows of the data.
        StateError: If the file is damaged or holds no heads.
        WriteError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> from clkit.methods import NearestMeanHead
        >>> features, targets = torch.eye(3), torch.tensor([0, 0, 1])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     head = NearestMeanHead(3)
        ...     head.update(features, targets)
        ...     entry = {"head": dict(head.state_dict()), "in_features": 3, "tap": "fc:in"}
        ...     torch.save({"state_dict": {}, "callbacks": {"NMC(nmc)": entry}}, f"{folder}/run.ckpt")
        ...     forget_samples(f"{folder}/run.ckpt", f"{folder}/less.ckpt", features=features[1:], targets=targets[1:])
        [HeadSummary(head='NMC(nmc)', samples=1, classes=1)]
    """
    if (ids is None) == (features is None) or (features is None) != (targets is None):
        raise ArgumentError("give either features and targets, or ids")
    check_output(output, [Path(path)], overwrite)
    checkpoint = read_checkpoint(path)
    strategy = checkpoint.get(STRATEGY)
    if isinstance(strategy, dict) and strategy.get("memory") is not None:
        raise ConfigurationError(
            f"{path} holds a replay memory of images ({strategy.get('strategy')}): the network was trained on the "
            "samples, and only sums on a frozen network can forget them; train again without them"
        )
    if LEARNED in checkpoint and read_contents(checkpoint, path).holds.keys.size:
        raise ConfigurationError(
            f"{path} says which images its head holds, and would go on to say so of these; give the images themselves: "
            "clkit forget --data folder:PATH"
        )
    chosen = _chosen(checkpoint, Path(path), heads)
    samples: dict[str, Any] = dict.fromkeys(chosen, (features, targets))
    if ids is not None:
        if MERGED in checkpoint:
            raise ConfigurationError(
                f"{path} was merged from several runs, so which samples it has learned is not known; give features and "
                "targets, or forget them in the run that learned them"
            )
        from clkit.runs.saved_run import SavedRun  # builds a whole run, which only this way of forgetting needs

        rows = _checked_ids(ids)
        samples = SavedRun(path, config).learned(checkpoint, list(chosen), rows)
    else:
        places = {key: str(checkpoint["callbacks"][key].get("tap")) for key in chosen}
        if len(set(places.values())) > 1:
            raise ConfigurationError(
                f"the heads read features at several places, {places}, and features are of one; name the heads that "
                "they belong to (--heads), once for each place"
            )
    for key, head in chosen.items():
        try:
            head.subtract(*samples[key])
        except (BatchError, ConfigurationError) as error:
            raise type(error)(f"{key}: {error}") from error
        hand_over(checkpoint, key, head)
    return save_checkpoint(checkpoint, output, chosen)


def read_samples(path: str | Path) -> dict[str, Any]:
    """Read the ``.npz`` file of samples to forget; nothing in it is executed.

    Args:
        path: A file with ``features`` (N, D) and ``targets`` (N,), or with ``ids`` (N,).

    Returns:
        What the file holds, as arguments of :func:`forget_samples`.

    Raises:
        DataError: If the file is not there or damaged, has other arrays, or arrays of Python objects.
    """
    try:
        with Path(path).open("rb") as file:  # numpy leaves a file that it opened itself, and cannot read, open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} cannot be read: it is no .npz file but a single array; save it with np.savez")
            with archive:
                names = sorted(archive.files)
                if names not in (["features", "targets"], ["ids"]):
                    raise DataError(f"{path} has the arrays {names}; it must have features and targets, or ids alone")
                arrays = {name: _array(archive, name, path) for name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"it is no .npz file ({error})"
        raise DataError(f"{path} cannot be read: {reason}") from error
    if "ids" in arrays:
        return {"ids": _checked_ids(arrays["ids"]).tolist()}
    if arrays["features"].dtype.kind != "f" or arrays["targets"].dtype.kind not in "iu":
        raise DataError(
            f"{path}: features must be floating-point numbers and targets integers, got {arrays['features'].dtype} "
            f"and {arrays['targets'].dtype}"
        )
    targets = torch.from_numpy(arrays["targets"].astype(np.int64))
    return {"features": torch.from_numpy(arrays["features"]), "targets": targets}


def _array(file: Any, name: str, path: str | Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = file[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DataError(
            f"{path}: {name} is an array of Python objects, which is not read, since that could execute anything; "
            "save numbers"
        ) from error
    return array


def _checked_ids(ids: Any) -> npt.NDArray[np.int64]:
    rows = np.asarray(ids)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or not rows.size:
        raise DataError(f"ids must be integers, one dimension and at least one, got {rows.dtype} of shape {rows.shape}")
    values, counts = np.unique(rows, return_counts=True)
    if len(values) < len(rows):
        raise DataError(f"ids has {values[counts > 1].tolist()[:10]} more than once")
    return rows.astype(np.int64)


def _chosen(checkpoint: dict[str, Any], path: Path, names: Sequence[str] | None) -> dict[str, Head]:
    entries = head_entries(checkpoint)
    if not entries:
        raise StateError(f"{path} holds no learned head (a file saved with save_weights_only=True has none)")
    there = {name_of(key): key for key in entries}
    wanted = list(there) if names is None else list(names)
    if not wanted or not there.keys() >= set(wanted):
        raise ArgumentError(f"heads={wanted}: {path} has the heads {sorted(there)}")
    return {
        there[name]: head_of_state(entries[there[name]]["head"], f"{path}: {there[name]}", HEADS) for name in wanted
    }
