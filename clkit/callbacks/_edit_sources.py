"""Where the editor of a run, its edits and its reference come from."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from clkit.arguments import in_short
from clkit.callbacks._run_edits import LoggedEdit
from clkit.distributed import gather_objects
from clkit.errors import ArgumentError, BatchError, ConfigurationError, NotFittedError, StateError
from clkit.features.batch import Readings
from clkit.features.tap import FeatureTap
from clkit.files import read_checkpoint
from clkit.methods import EditReference, GradientEditor
from clkit.methods._editor_saved import described, editor_settings
from clkit.schema import Numbers, saved_entry
from clkit.stream._lightning import datamodule_of, evaluated_loaders
from clkit.surgery.change import changes_of
from clkit.surgery.low_rank import LowRank

__all__ = [
    "WantedEdit",
    "chosen_editor",
    "edited_network",
    "make_editor",
    "read_edits",
    "take_statistics",
    "val_reference",
]

_STATISTICS = 200
_NOT_SAVED = ("alpha", "c_edit", "c_loc", "classifier", "example", "loss", "seed", "store_rank")


class WantedEdit(NamedTuple):
    """Images (B, …) that shall get labels (B,), and other views of them."""

    x: Tensor
    y: Tensor
    equivalents: Any = None


def edited_network(module: pl.LightningModule, layers: Iterable[str] = ()) -> nn.Module:
    """Return what is edited: the module, or the network inside it where it has no ``forward``, or not these layers.

    An editor may have been trained for the network alone, which knows its layers by shorter names.
    """
    wanted = set(layers)
    own = type(module).forward is not pl.LightningModule.forward
    if own and wanted <= dict(module.named_modules()).keys():
        return module
    with FeatureTap(module) as tap:
        network = tap.network
    known = [each for each in (network, *module.children()) if wanted <= dict(each.named_modules()).keys()]
    return known[0] if known else module if own else network


def make_editor(
    module: pl.LightningModule,
    settings: Mapping[str, Any],
    state: dict[str, Any] | None,
    example: Tensor | None,
) -> GradientEditor:
    """Return an editor of a module: that of a saved state, or a new one with settings."""
    with torch.inference_mode(False):
        model = edited_network(module, () if state is None else editor_settings(state)[0])
        _refuse_low_rank(model, settings.get("layers", "auto") if state is None else editor_settings(state)[0])
        if example is not None and example.is_inference():
            example = example.clone()
        if example is not None:
            example = example.to(next(module.parameters()).device)
        if state is None:
            return GradientEditor(model, **{"example": example, **settings})
        more = {name: value for name, value in settings.items() if name in _NOT_SAVED}
        return GradientEditor.from_saved(model, state, **{"example": example, **more})


def chosen_editor(
    owner: str, given: dict[str, Any], saved: dict[str, Any], edits: Mapping[int | None, Iterable[LoggedEdit]]
) -> dict[str, Any]:
    """Return the state of the editor that goes on: the one that was asked for, with the saved log of edits.

    Args:
        owner: Who asks, for messages.
        given: The state of the editor that was asked for.
        saved: That of a checkpoint.
        edits: Of the saved log, those that could be taken back, by task.

    Raises:
        ConfigurationError: If there are such edits, of other layers or settings.
    """
    (own, how), (their, their_how) = (editor_settings(each) for each in (given, saved))
    mine, theirs = (each["layers"] for each in (given, saved))
    alike = own == their and how == their_how
    if not alike and (ids := sorted(each.id for those in edits.values() for each in those)):
        raise ConfigurationError(
            f"{owner}: edits {ids} were made by an editor of {described(theirs, mine)} with {their_how}, and the one "
            f"that is asked for is of {described(mine, theirs)} with {how}; leave the editor out (editor=None, no "
            "--editor and --layers), or take these edits back, or commit them, first"
        )
    return {**(saved if alike and not given["fitted"] else given), "log": saved["log"]}


def _refuse_low_rank(model: nn.Module, layers: Any) -> None:
    """Refuse layers whose weights a low-rank change computes, also where a keyword would choose others without them."""
    paths = dict(model.named_modules())
    for name in [layers] if isinstance(layers, str) else layers:
        for change in changes_of(model, name if name in paths else ""):
            if isinstance(change, LowRank) and name != "head":
                raise ConfigurationError(
                    f"edits of layers={name!r} would change weights that hold the {change.noun} of {change.owner}; "
                    f"{change.remedy}"
                )


def take_statistics(owner: str, editor: GradientEditor, reference: EditReference | None) -> None:
    """Give an editor without statistics those of edits of the reference to other labels, drawn for it."""
    if editor.is_fitted:
        return
    if reference is None:
        raise NotFittedError(
            f"{owner}: the editor has no statistics of gradients, and there are no reference images to take them from; "
            "give a trained editor (editor=path), or a reference"
        )
    draws = torch.Generator().manual_seed(editor.seed)
    images = reference.images[torch.randperm(len(reference), generator=draws)[:_STATISTICS]]
    labels = torch.randint(editor.classes, (len(images),), generator=draws)
    editor.fit_statistics([(images, labels)])


def read_edits(edits: Any) -> list[WantedEdit]:
    """Return what shall be edited.

    Args:
        edits: Pairs of images and labels, with equivalents behind them or not; or the path of a file with ``images``
            (N, …) and ``labels`` (N,), each an edit.

    Raises:
        ArgumentError: If it is neither.
    """
    if isinstance(edits, str | Path):
        saved = read_checkpoint(edits)
        x = saved_entry(saved, "images", Numbers((...,), None), str(edits))
        y = saved_entry(saved, "labels", Numbers(("N",), torch.int64), str(edits))
        if x.ndim < 2 or len(x) != len(y):
            raise StateError(f"{edits}: images {tuple(x.shape)} and labels {tuple(y.shape)} do not belong together")
        return [WantedEdit(x[at : at + 1], y[at : at + 1]) for at in range(len(y))]
    if not isinstance(edits, Iterable) or (isinstance(edits, Tensor) and not edits.ndim):
        raise ArgumentError(f"edits must be a list of (images, labels), or the path of a file, got {in_short(edits)}")
    found = []
    for each in edits:
        pair = isinstance(each, Sequence) and 2 <= len(each) <= 3 and all(isinstance(part, Tensor) for part in each[:2])
        if not pair:
            raise ArgumentError(
                f"an edit must be tensors (images, labels) or (images, labels, equivalents), got {in_short(each)}"
            )
        found.append(WantedEdit(*each))
    return found


def val_reference(trainer: pl.Trainer, part: Any, most: int) -> EditReference | None:
    """Return images and labels of the validation loaders as the first process shall see them; a call on all.

    The global random state stays as it is.
    """
    images: list[Tensor] = []
    labels: list[Tensor | None] = []
    most = -(-most // trainer.world_size)
    with torch.random.fork_rng(devices=[]):  # from which a loader draws when it begins
        for x, y in _batches(trainer, part):
            images.append(x[: most - sum(map(len, images))].cpu())
            labels.append(None if y is None else y[: len(images[-1])].cpu())
            if sum(map(len, images)) >= most:
                break
    gathered = gather_objects((images, labels), "the reference of edits", first_only=True)
    images = [each for those, _ in gathered for each in those]
    known = [each for _, those in gathered for each in those]
    if not images:
        return None
    if any(each is None or bool((each < 0).any()) for each in known):
        return EditReference(images)
    return EditReference(zip(images, known, strict=True))


def _batches(trainer: pl.Trainer, part: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    data = datamodule_of(trainer)
    loaders: Any = evaluated_loaders(trainer) if trainer.state.fn in ("fit", "validate") else []
    if hasattr(data, "evaluation_loader") and not loaders:
        loaders = [data.val_dataloader()]
    for place, loader in enumerate(loaders):
        for batch in _apart(loader):
            moved = trainer.strategy.batch_to_device(batch, dataloader_idx=place)
            try:
                x, y = Readings.of(trainer).read(part, moved, needs_targets=False)
            except BatchError:  # one that no edit could be measured with: the user's own step knows more
                continue
            if isinstance(x, Tensor):
                yield x, y


def _apart(loader: Any) -> Iterator[Any]:
    """Yield the batches of a loader, whose workers and draws may be those of a pass that runs."""
    if hasattr(loader, "in_process"):
        yield from loader.in_process()
        return
    if not isinstance(loader, DataLoader):
        yield from loader
        return
    own = copy.copy(loader)
    vars(own).update(num_workers=0, persistent_workers=False, prefetch_factor=None, timeout=0, _iterator=None)
    draws = getattr(loader.sampler, "generator", None)
    before = None if draws is None else draws.get_state()
    try:
        yield from own
    finally:
        if draws is not None:
            draws.set_state(before)
