"""Where a run stands, saved once a checkpoint, so that a run that goes on from it loses and repeats nothing.

Position in the stream, global random states and gradients that wait for further batches stand under one key of the
checkpoint, whichever part of clkit comes first to save; the fit loop's progress is corrected when it is loaded.
"""

from __future__ import annotations

import random
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter

from clkit.distributed import gather_objects
from clkit.errors import StateError
from clkit.schema import (
    STREAM,
    Instance,
    Many,
    Named,
    Nested,
    Numbers,
    OneOf,
    Real,
    Row,
    Table,
    Whole,
    read_state,
    saved_entry,
)
from clkit.stream._lightning import accumulates, datamodule_of, in_step, stream_position
from clkit.stream.boundaries import Boundaries

__all__ = ["begin", "capture_random_state", "check_random_state", "load", "restore_random_state", "save"]

FORMAT = 1

_OWNER = "the saved place in the stream"
_WORD = 2**32 - 1
_RANDOM: Table = {
    "torch": Numbers(("B",), torch.uint8),
    "cuda": Many(Numbers((...,), torch.uint8)),
    "python": Row(
        {"version": Whole(3, 3), "words": Numbers((625,), least=0, most=_WORD), "gauss": Real(optional=True)}
    ),
    "numpy": Row(  # which writes and reads outside its words where the position says so
        {
            "name": OneOf(("MT19937",)),
            "words": Numbers((624,), least=0, most=_WORD),
            "position": Whole(0, 624),
            "has_gauss": Whole(0, 1),
            "gauss": Real(),
        }
    ),
}
_TABLE: Table = {
    "format": OneOf((FORMAT,)),
    "experience": Instance(object),
    "running": Instance(bool),
    "over": Instance(bool),
    "random": Many(Nested(_RANDOM)),
    "gradients": Instance(list | None),
}
_GRADIENTS = Many(Named(Numbers((...,), None, any_value=True)))
_LOOPS = "the checkpoint's loops, which are not those of a Lightning release that clkit knows"


# what a loaded checkpoint holds for the moment at which training begins
_waiting: WeakKeyDictionary[pl.Trainer, dict[str, Any]] = WeakKeyDictionary()


def save(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Add where the run stands to a checkpoint, once; a call on all processes."""
    if STREAM in checkpoint:
        return
    boundaries = Boundaries.of(trainer)
    checkpoint[STREAM] = {
        "format": FORMAT,
        **boundaries.state_dict(),
        "over": boundaries.running and trainer.state.fn == "fit" and boundaries.is_over(trainer),
        "random": gather_objects(capture_random_state(), "their random states"),
        "gradients": _waiting_gradients(trainer),
    }


def load(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Take the place in the stream from a checkpoint and correct its loops in place; a second call changes nothing.

    Raises:
        StateError: If the saved state is damaged; nothing is changed then.
    """
    _make_loops_whole(trainer, checkpoint)
    _load_unrounded(trainer, checkpoint)
    state = checkpoint.get(STREAM)
    if state is None:
        return
    saved = read_state(state, _TABLE, _OWNER)
    for each in saved["random"]:
        check_random_state(each)
    saved["gradients"] = saved["gradients"] and saved_entry(saved, "gradients", _GRADIENTS, _OWNER)
    Boundaries.of(trainer).load_state_dict(state, over=saved["over"])
    if trainer.state.fn == "fit":
        _waiting[trainer] = saved


def begin(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Take up random states and gradients of a loaded checkpoint, and make up for lost hooks, in ``on_train_start``.

    Raises:
        StateError: If saved gradients do not belong to the module.
    """
    waiting = _waiting.pop(trainer, None)
    if waiting is not None:
        states, gradients = waiting["random"], waiting["gradients"]  # one entry a process
        if len(states) == trainer.world_size:
            restore_random_state(states[trainer.global_rank])
        if gradients and len(gradients) == trainer.world_size:
            _restore_gradients(_trained(trainer), gradients[trainer.global_rank])
        if gradients == []:  # they waited when it was saved, and are not in it
            rank_zero_warn(
                "the checkpoint was saved in the middle of a step, while gradients of earlier batches waited for it "
                f"(accumulate_grad_batches={trainer.accumulate_grad_batches}): the next step of the optimizer is "
                "without those batches"
            )
        _say_lost_steps(trainer)
        _say_lost_place(trainer)
    Boundaries.of(trainer).on_train_start(trainer, module)


def _say_lost_steps(trainer: pl.Trainer) -> None:
    """Warn where a schedule has a step between the writing of a checkpoint and the next batch, which none repeats."""
    _, batches = stream_position(trainer)
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and (config.interval == "step" or not batches):
            what = "batch" if config.interval == "step" else "epoch"
            rank_zero_warn(
                f"the checkpoint was written before ReduceLROnPlateau looked at {config.monitor!r} of its last {what}, "
                "and does not hold that value: the schedule goes on without it, so learning rates may come to differ "
                f"from those of a run that was not interrupted{'; within an epoch nothing is lost' * (what == 'epoch')}"
            )


def _say_lost_place(trainer: pl.Trainer) -> None:
    """Warn where an epoch goes on whose loader cannot tell which rows it has given, or tells it wrong."""
    _, batches = stream_position(trainer)
    loader: Any = trainer.train_dataloader
    if not batches or hasattr(datamodule_of(trainer), "evaluation_loader"):
        return
    if not hasattr(loader, "state_dict"):
        rank_zero_warn(
            f"the fit goes on after batch {batches} of an epoch, and its {type(loader).__name__} has no position: it "
            "begins at its first batch again, so some rows of this epoch are learned and counted twice, and others not "
            "at all. Go on from a checkpoint of an epoch's end, or use a StreamDataModule or a loader with a state_dict"
        )
    elif not _has_length(loader):
        rank_zero_warn(
            f"the fit goes on after batch {batches} of an epoch, and its {type(loader).__name__} has a state but no "
            "length: Lightning had fetched a batch ahead when the state was saved, and that batch does not come again. "
            "Give the data set a __len__, with which nothing is fetched ahead"
        )


def _has_length(loader: Any) -> bool:
    try:
        len(loader)
    except TypeError:  # a data set without __len__
        return False
    return True


# ---- random states


def capture_random_state() -> dict[str, Any]:
    """Return the states of torch, CUDA, Python and NumPy; nothing is drawn.

    Example:
        >>> state = capture_random_state()
        >>> first = torch.rand(1)
        >>> restore_random_state(state)
        >>> bool(torch.rand(1) == first)
        True
    """
    version, words, gauss = random.getstate()
    # the legacy global generator is what users' code draws from when it calls np.random.rand
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  users draw from it
    words_of_numpy = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [str(name), words_of_numpy, int(position), int(has_gauss), float(cached)],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Take up what :func:`capture_random_state` gave."""
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    _set_states(state, torch.default_generator, random, np.random)


def check_random_state(state: Any) -> None:
    """Refuse what :func:`capture_random_state` never gave: by its values, then by trying it on unused generators.

    Raises:
        StateError: If it cannot be taken up.
    """
    saved = read_state(state, _RANDOM, "the saved random state")
    try:
        for each in saved["cuda"] if torch.cuda.is_available() else []:
            torch.Generator("cuda").set_state(each)
        _set_states(saved, torch.Generator(), random.Random(), np.random.RandomState())
    except (RuntimeError, TypeError, ValueError) as error:
        raise StateError(f"the saved random state cannot be taken up ({error}): the file is damaged") from error


def _set_states(state: dict[str, Any], of_torch: torch.Generator, of_python: Any, of_numpy: Any) -> None:
    of_torch.set_state(state["torch"])
    version, words, gauss = state["python"]
    of_python.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    of_numpy.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


# ---- weights of 64 bits


def _load_unrounded(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Load weights once more, where Lightning has loaded double ones into a module that it makes double afterwards."""
    module, plugin = trainer.lightning_module, trainer.precision_plugin
    if not isinstance(plugin, DoublePrecision) or all(part.dtype != torch.float32 for part in module.parameters()):
        return
    if any(getattr(part, "dtype", None) == torch.float64 for part in checkpoint.get("state_dict", {}).values()):
        plugin.convert_module(module)
        trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)


# ---- gradients that wait for further batches


def _waiting_gradients(trainer: pl.Trainer) -> list[dict[str, Tensor]] | None:
    """Gather the gradients of each process; ``None`` where nothing waits, an empty list where they are lost."""
    if trainer.state.fn != "fit" or not accumulates(trainer):
        return None
    if in_step(trainer):  # they may have a part of the batch in work, which comes again
        return []
    own = {
        name: parameter.grad.detach().cpu()
        for name, parameter in _trained(trainer).items()
        if parameter.grad is not None
    }
    return gather_objects(own, "their gradients")


def _trained(trainer: pl.Trainer) -> dict[str, Parameter]:
    """Return what the run trains, which a strategy may say: not always something of the module."""
    strategy: Any = trainer.strategy
    if hasattr(strategy, "trained_parameters"):
        own: dict[str, Parameter] = strategy.trained_parameters()
        return own
    return dict(trainer.lightning_module.named_parameters())


def _restore_gradients(parameters: dict[str, Parameter], own: dict[str, Tensor]) -> None:
    for name, gradient in own.items():
        if name not in parameters or parameters[name].shape != gradient.shape:
            shape = tuple(gradient.shape)
            raise StateError(f"the gradients of an accumulation: the run trains no {name!r} of shape {shape}")
    for name, gradient in own.items():
        parameter = parameters[name]
        parameter.grad = gradient.to(parameter.device, parameter.dtype, copy=True)


# ---- the loops


def _make_loops_whole(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Rewrite the saved progress of the fit loop in place so that a resume loses and repeats nothing.

    Lightning saves a checkpoint while an epoch is neither running nor over: on its last batch, inside the validation
    after it, or where ``max_steps`` cut it. Resumed as it stands, such a checkpoint skips batches of the next epoch
    when that is longer, or counts a cut epoch as done. Here the progress is brought to the nearest state that Lightning
    resumes exactly: "the epoch is over" or "in the middle of the epoch". Applying it twice changes nothing.
    """
    loops = checkpoint.get("loops")
    if not loops:  # a weights-only file has no loops
        return
    parts = ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress", "epoch_progress")
    fit = saved_entry(loops, "fit_loop", dict, _LOOPS)
    batch, validations, both = (saved_entry(fit, name, dict, _LOOPS) for name in parts)
    validation = _saved_progress(validations, "current")
    epochs = [_saved_progress(both, "current"), _saved_progress(both, "total")]
    current, total = _saved_progress(batch, "current"), _saved_progress(batch, "total")
    inner, loader_states = (saved_entry(fit, name, dict, _LOOPS) for name in ("epoch_loop.state_dict", "state_dict"))
    saved_entry(batch, "is_last_batch", bool, _LOOPS)
    saved_entry(inner, "_batches_that_stepped", int, _LOOPS)
    epoch = epochs[0]
    if validation["processed"] < validation["ready"]:  # saved inside a validation: run the whole validation again
        validation["completed"] = validation["processed"] = 0
    if current["processed"] < current["ready"]:  # saved inside a step: the batch comes again, and counts once
        for progress in (current, total):
            progress["ready"] = progress["started"] = progress["processed"]
        batch["is_last_batch"] = False
        # the loaders of a stream have a state, too, but no position in it
        if loader_states.get("combined_loader") and not hasattr(datamodule_of(trainer), "experience_at"):
            rank_zero_warn(
                "the checkpoint was saved in the middle of a step, and the data loader keeps a position of its own, "
                "which counts the batch of that step as done: it does not come again"
            )
    if current["ready"] == 0:  # between two epochs: already whole
        return
    if epoch["processed"] == epoch["ready"] and not batch["is_last_batch"]:
        # `max_steps` cut the epoch, and Lightning counted it as done: it still runs
        for progress in epochs:
            progress["processed"] = progress["completed"] = progress["ready"] - 1
        return
    begins = epoch["started"] < epoch["ready"]  # in `on_train_epoch_start`: the batches are those of the epoch before
    on_last_batch = (
        batch["is_last_batch"] and epoch["processed"] < epoch["ready"] and current["completed"] < current["processed"]
    )
    if on_last_batch and epoch["ready"] == trainer.max_epochs:  # nothing comes after: Lightning's own path is right
        return
    if on_last_batch:
        inner["_batches_that_stepped"] += 1
        total["completed"] = total["processed"]
    over = on_last_batch or epoch["processed"] == epoch["ready"]
    if over:  # say so
        for progress in epochs:
            progress["started"] = progress["processed"] = progress["completed"] = progress["ready"]
    if over or begins:
        batch["is_last_batch"] = False
        current.update(dict.fromkeys(current, 0))
        loader_states.pop("combined_loader", None)


def _saved_progress(state: dict[str, Any], name: str) -> dict[str, int]:
    progress: dict[str, int] = saved_entry(state, name, dict, _LOOPS)
    for count in {"ready", "started", "processed", "completed", *progress}:
        saved_entry(progress, count, int, _LOOPS)
    return progress
