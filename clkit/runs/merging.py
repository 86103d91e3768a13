"""Several checkpoints made one: what their heads have learned, added up."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clkit.errors import ArgumentError, ConfigurationError, StateError, few_names
from clkit.files import check_output, read_checkpoint, write_checkpoint
from clkit.methods.heads.base import Head
from clkit.methods.heads.holdings import check_complete
from clkit.methods.heads.portable import MergeTree, head_of_state
from clkit.methods.heads.readout import layer_values
from clkit.runs.contents import join_contents, read_contents
from clkit.runs.heads import HEADS, head_entries
from clkit.schema import LEARNED, MERGED, STRATEGY, STREAM, Named, Numbers, saved_entry

__all__ = ["HeadSummary", "hand_over", "merge_checkpoints", "save_checkpoint"]

_OF_ONE_RUN = ("callbacks", "loops", "lr_schedulers", "optimizer_states", STRATEGY)  # what no merged file can have


class HeadSummary(NamedTuple):
    """How many samples and classes a head in a written checkpoint has learned; ``head`` is its callback's key there."""

    head: str
    samples: int
    classes: int


def merge_checkpoints(
    paths: Sequence[str | Path], output: str | Path, *, partial: bool = False, overwrite: bool = False
) -> list[HeadSummary]:
    """Write a checkpoint whose heads have learned what those of all given ones have together.

    For heads that learned on several machines with one frozen network (federated learning, shards of a data set): each
    head equals the one of a single run over the union of the samples, up to the rounding of float64. A sample that two
    of the runs have learned counts twice. Heads are added in pairs, pairs of pairs and so on, and files are read one
    after the other, so that many parts take little memory and their order changes no more than the last digits.

    Files of ``clkit learn`` say which samples their heads hold: none is added twice there and none may be missing, and
    what could not be read is named in a warning. So are files with edits of :class:`~clkit.callbacks.MEND` that could
    be taken back: their log is left out. More can be learned into the file, as into each of them.

    The file is for ``validate``, ``test``, ``predict``, :func:`clkit.load_head`, further merging and export. No fit can
    go on from it: its runs were at different places of their streams. Weights, and whatever else is in the file, are
    those of the first; accuracies that were measured are left out.

    Args:
        paths: Two checkpoint files or more.
        output: The file to write; its folder must exist.
        partial: Whether shards of a list may be missing, in files of ``clkit learn``.
        overwrite: Whether an existing file may be replaced.

    Returns:
        What each head of the new file has learned.

    Raises:
        ArgumentError: If there are fewer than two files, one is given twice, or ``output`` exists; if two hold a sample
            or a shard is missing, as far as files say so.
        StateError: If a file is damaged, holds no heads, or its heads cannot be added: other names, options, width or
            place of the features, or a network with other weights.
        ConfigurationError: If a head keeps a solution and no sums (``solver="recursive"``).
        WriteError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> from clkit.methods import NearestMeanHead
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, label in (("a", 0), ("b", 1)):
        ...         head = NearestMeanHead(2)
        ...         head.update(torch.eye(2), torch.full((2,), label))
        ...         entry = {"head": dict(head.state_dict()), "in_features": 2, "tap": "fc:in"}
        ...         torch.save({"state_dict": {}, "callbacks": {"NMC(nmc)": entry}}, f"{folder}/{name}.ckpt")
        ...     merge_checkpoints([f"{folder}/a.ckpt", f"{folder}/b.ckpt"], f"{folder}/both.ckpt")
        [HeadSummary(head='NMC(nmc)', samples=4, classes=2)]
    """
    files = [Path(path) for path in paths]
    if len(files) < 2:
        raise ArgumentError(f"paths={[str(file) for file in files]}: at least two checkpoints are needed to merge")
    check_output(output, files, overwrite)
    merged = read_checkpoint(files[0])
    for file in files:
        if [other.resolve() for other in files].count(file.resolve()) > 1:
            raise ArgumentError(f"{file} is given twice: its samples would count twice")
    heads = _heads_of(merged, files[0])
    entries = head_entries(merged)
    trees = {key: MergeTree() for key in heads}
    for key, head in heads.items():
        trees[key].add(head, owned=True)
    contents = read_contents(merged, files[0]) if LEARNED in merged else None
    edited = [str(files[0])] if _has_edits(merged) else []
    for file in files[1:]:
        other = read_checkpoint(file)
        if (LEARNED in other) != (contents is not None):
            says, silent = (files[0], file) if contents is not None else (file, files[0])
            raise StateError(f"{says} says which samples its head holds and {silent} does not; merge files of one kind")
        if contents is not None:
            try:
                join_contents(contents, read_contents(other, file), files[0], file)
            except ArgumentError as error:
                raise ArgumentError(f"{file}: {error} (the files before it hold it)") from error
        _add(trees, entries, other, files[0], file)
        edited += [str(file)] if _has_edits(other) else []
        _refuse_other_network(merged, other, entries, files[0], file)
        _widen_position(merged, entries, other)
    if contents is not None:
        check_complete(contents.holds, partial, "--partial (partial=True)")
        merged[LEARNED] = contents.state()
        if lacks := contents.holds.left_out:
            warnings.warn(
                f"clkit: when the parts were learned these images could not be read: {few_names(lacks)}; "
                f"repair them, and what is missing of their folder can be learned into {output}",
                stacklevel=2,
            )
    if edited:
        warnings.warn(
            f"clkit: {few_names(edited)}: edits in their logs are part of the merged heads or weights for good; take "
            "back (clkit revert), and merge again, what shall not be",
            stacklevel=2,
        )
    heads = {key: tree.total() for key, tree in trees.items()}
    nothing = {"rows": {}, "columns": {}, "pending": None, "seconds": {"fit": 0.0, "evaluate": 0.0}}
    evaluations = {
        key: {**entry, **nothing}
        for key, entry in merged["callbacks"].items()
        if isinstance(entry, dict) and "rows" in entry
    }
    for name in _OF_ONE_RUN:
        merged.pop(name, None)
    merged["callbacks"] = evaluations | entries
    merged[MERGED] = [str(file) for file in files]
    for key, head in heads.items():
        hand_over(merged, key, head)
    return save_checkpoint(merged, output, heads)


def save_checkpoint(checkpoint: dict[str, Any], output: str | Path, heads: dict[str, Head]) -> list[HeadSummary]:
    """Write a checkpoint whole or not at all; return what its heads have learned."""
    write_checkpoint(checkpoint, output)
    return [HeadSummary(key, int(head.counts.sum()), len(head.classes)) for key, head in heads.items()]


def _heads_of(checkpoint: dict[str, Any], file: Path) -> dict[str, Head]:
    heads = {
        key: head_of_state(entry["head"], f"{file}: {key}", HEADS) for key, entry in head_entries(checkpoint).items()
    }
    if not heads:
        raise StateError(
            f"{file} holds no learned head to merge; it has the callbacks {sorted(checkpoint.get('callbacks', {}))} "
            "(a file saved with save_weights_only=True has none)"
        )
    for key, head in heads.items():
        if head.options.get("solver") == "recursive":
            raise ConfigurationError(
                f'{file}: {key} was learned with solver="recursive", which keeps a solution and no sums, so it cannot '
                'be merged; learn with solver="gram"'
            )
    return heads


def _has_edits(checkpoint: dict[str, Any]) -> bool:
    """Whether a log of the checkpoint has edits that could be taken back, which no merged file keeps."""
    logs = (entry.get("edits") for entry in checkpoint.get("callbacks", {}).values() if isinstance(entry, dict))
    return any(
        isinstance(log, list) and any(isinstance(each, dict) and each.get("committed") is False for each in log)
        for log in logs
    )


def _add(
    trees: dict[str, MergeTree], entries: dict[str, dict[str, Any]], other: dict[str, Any], first: Path, file: Path
) -> None:
    """Add what the heads of another checkpoint have learned."""
    theirs, their_entries = _heads_of(other, file), head_entries(other)
    for key in sorted(trees.keys() ^ theirs.keys()):
        has, lacks, there = (first, file, theirs) if key in trees else (file, first, trees)
        raise StateError(
            f"{key} is in {has} but not in {lacks}, which has {sorted(there)}; merge runs with the same heads under "
            "the same names"
        )
    for key, tree in trees.items():
        for name, what in (("in_features", "features of width"), ("tap", "features read at")):
            mine, their = entries[key].get(name), their_entries[key].get(name)
            if mine != their:
                raise StateError(
                    f"{key} has learned {what} {mine!r} in {first} and {their!r} in {file}; only heads that read the "
                    "same place of the same network can be merged"
                )
        try:
            tree.add(theirs[key], owned=True)
        except ArgumentError as error:
            raise StateError(f"{key} of {file} cannot be merged into that of {first}: {error}") from error


def _refuse_other_network(
    mine: dict[str, Any], theirs: dict[str, Any], entries: dict[str, dict[str, Any]], first: Path, file: Path
) -> None:
    own, other = mine.get("state_dict", {}), theirs.get("state_dict", {})
    # no head's features depend on the classifier whose input all of them read
    points = [str(entry.get("tap")) for entry in entries.values()]
    beyond = [set.intersection(*(set(classifier_keys(weights, point)) for point in points)) for weights in (own, other)]
    for key in [*own, *(key for key in other if key not in own)]:
        if key in beyond[0] | beyond[1]:
            continue
        if key not in own or key not in other:
            has, lacks = (file, first) if key not in own else (first, file)
            raise StateError(f"{has} holds another network than {lacks}, which has no {key!r}: its features differ")
        one, two = own[key], other[key]  # a tensor, or what a module's own get_extra_state gave
        tensors = isinstance(one, Tensor) and isinstance(two, Tensor)
        if not (one.dtype == two.dtype and torch.equal(one, two) if tensors else one == two):
            raise StateError(
                f"the networks of {first} and {file} differ in {key!r}, so their features cannot be compared; merge "
                "runs that began with the same weights and left them frozen (the classifier alone may differ)"
            )


def classifier_keys(state_dict: dict[str, Any], point: str) -> list[str]:
    """Return the keys of the classifier whose input is read at a tap's point.

    A point names layers inside the network, and keys begin at the user's module: of several layers whose path ends
    that way (``network.fc``, ``network.blocks.0.se.fc``) it is the one that lies least deep. Of two equally deep none
    is named.
    """
    names, _, side = point.rpartition(":")
    keys: list[str] = []
    for name in names.replace("|", "+").split("+") if side == "in" else ():
        owners = {key: f".{key}"[:at] for key in state_dict if (at := f".{key}".find(f".{name}.")) >= 0}
        least = min((owner.count(".") for owner in owners.values()), default=0)
        near = {owner for owner in owners.values() if owner.count(".") == least}
        if len(near) == 1:
            keys += [key for key, owner in owners.items() if owner in near]
    return keys


def _widen_position(merged: dict[str, Any], entries: dict[str, dict[str, Any]], other: dict[str, Any]) -> None:
    """Note how far learning came, for an evaluation: the further of the two where both walked one stream."""
    for key in [key for key, value in merged.items() if isinstance(value, dict) and "reached" in value]:
        mine, theirs = merged[key], other.get(key)
        length = 0 if theirs is None else min(len(mine["experiences"]), len(theirs["experiences"]))
        if theirs is None or mine["experiences"][:length] != theirs["experiences"][:length]:
            del merged[key]  # of different streams: all of the stream in hand is evaluated
        elif theirs["reached"] > mine["reached"]:
            merged[key] = theirs
    # the experience that a run came to, -1 where its file does not say so
    places = [((file.get(STREAM) or {}).get("experience") or {"index": -1})["index"] for file in (other, merged)]
    if places[0] > places[1]:
        merged[STREAM] = other[STREAM]
    if STREAM in merged:  # random states and gradients are of one run
        merged[STREAM] = {**merged[STREAM], "running": False, "over": False, "random": [], "gradients": None}
    for key, entry in entries.items():
        if "batches" in entry:
            entry["batches"] += head_entries(other)[key]["batches"]


def hand_over(checkpoint: dict[str, Any], key: str, head: Head) -> None:
    """Put a changed head into a checkpoint and, where it was grafted into the module, its new read-out."""
    entry = checkpoint["callbacks"][key]
    entry["head"] = dict(head.state_dict())
    graft = entry.get("graft")
    if graft is None:
        return
    own = saved_entry(graft, "own", Named(Numbers((...,), None, any_value=True)), key)
    values = layer_values(head, own)
    # what does not fit any more, or stood in the classifier's place, is made anew of the head when it is loaded
    entry["graft"] = {"own": {} if values is None else own, "layer": {}} if head.classes.numel() else None
    if not own:
        return
    values = own if values is None else values
    weights = checkpoint["state_dict"]
    for weight_key in classifier_keys(weights, str(entry["tap"])):
        for name, value in values.items():
            if f".{weight_key}".endswith(f".{name}"):
                weights[weight_key] = value.to(weights[weight_key].dtype)
