"""What a trainer and the tasks of sparse training have to tell each other: steps, agreement, what a person reads."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from clkit.callbacks._showing import show
from clkit.distributed import gather_objects
from clkit.errors import ConfigurationError
from clkit.files import plain_values
from clkit.methods import SparseTopology, TaskReport
from clkit.stream._lightning import datamodule_of
from clkit.stream.experience import Experience
from clkit.surgery.task_networks import TaskNetworks

__all__ = [
    "about_task",
    "hold_norms",
    "planned_steps",
    "require_agreement",
    "require_known_steps",
    "say_given_tasks",
    "say_shared_head",
    "say_task_goes_on",
    "say_task_is_another",
    "say_what_begins",
    "set_classes",
    "show_tasks",
]

FEWEST_UPDATES = 5
LOW = 0.25  # share of a task's connections that it can train, below which it is told that capacity runs low


def require_known_steps(owner: str, trainer: pl.Trainer) -> None:
    """Refuse a fit of which it is known that its end is not."""
    follows = hasattr(datamodule_of(trainer), "is_last_epoch")
    if not follows and (trainer.max_epochs or 0) < 0 and trainer.max_steps < 0:
        raise ConfigurationError(
            f"{owner} needs to know how many optimizer steps a task has, and neither max_epochs nor max_steps of the "
            "trainer ends the fit; set one of them, or steps_per_task"
        )


def planned_steps(owner: str, trainer: pl.Trainer) -> int:
    """Return the optimizer steps from the present epoch to the end of its experience.

    Raises:
        ConfigurationError: If the loader does not say how many batches it has, and ``max_steps`` does not either.
    """
    data, epochs = datamodule_of(trainer), 1
    left = trainer.max_steps - trainer.global_step if trainer.max_steps >= 0 else math.inf
    if hasattr(data, "is_last_epoch"):
        while not data.is_last_epoch(trainer.current_epoch + epochs - 1):
            epochs += 1
        an_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        return max(1, int(min(epochs * an_epoch, left)))
    batches = trainer.num_training_batches
    known = (trainer.max_epochs or 0) >= 0 and batches != math.inf
    steps = math.inf
    if known:
        epochs = max(1, (trainer.max_epochs or 0) - trainer.current_epoch)
        steps = epochs * math.ceil(batches / trainer.accumulate_grad_batches)
    if min(steps, left) == math.inf:
        raise ConfigurationError(
            f"{owner} needs to know how many optimizer steps a task has, and the loader does not say how many batches "
            "it has; set steps_per_task, or max_steps of the trainer"
        )
    return max(1, int(min(steps, left)))


def require_agreement(owner: str, topology: SparseTopology) -> None:
    """Refuse processes whose masks are not the same; a call on all of them."""
    digest = hashlib.sha256()
    for mask in topology.mask(topology.task).values():
        digest.update(mask.cpu().numpy().tobytes())
    found = gather_objects(digest.hexdigest(), "their masks")
    if len(set(found)) > 1:
        raise ConfigurationError(
            f"{owner}: the processes have other masks of task {topology.task}, so their gradients were not the same; a "
            'strategy that reduces gradients over processes, such as "ddp", keeps them equal'
        )


def say_what_begins(owner: str, topology: SparseTopology, said: set[str]) -> None:
    """Tell a person once what hinders the task that begins: too little left to train, or hardly an update.

    Args:
        owner: Who says so.
        topology: Where a task begins.
        said: What was said before; it grows.
    """
    report, schedule = topology.reports[-1], topology.schedule
    task = f"task {report.task} (experience {report.task + 1})"
    own = report.active - report.reused
    advice = "Use reuse='prefer_free', a lower density, or a larger network"
    if report.free == 0:
        advice = "Tasks that shall learn more need a larger network, or a lower density from the first task on"
    left = f"{report.free:,} of {report.total:,} connections are in no task's mask"
    if own == 0 and "nothing" not in said:
        said.add("nothing")
        rank_zero_warn(
            f"{owner}: {task} can train no connection: all {report.active:,} of its mask belong to earlier "
            f"tasks, so only its head and other side state train; {left}. {advice}"
        )
    elif own < LOW * report.active and "low" not in said:
        said.add("low")
        rank_zero_warn(
            f"{owner}: capacity runs low: {task} can train {own:,} of its {report.active:,} connections "
            f"({100 * own / report.active:.0f} %), the others belong to earlier tasks; {left}. {advice}"
        )
    masks = topology.mask(report.task).items()
    thin = [name.removesuffix(".weight") for name, mask in masks if int(mask.sum()) == 1 < mask.numel()]
    if thin and "thin" not in said:
        said.add("thin")
        rank_zero_warn(
            f"{owner}: a density of {report.density} leaves a single connection to {', '.join(thin)}, so hardly "
            f"anything passes there. Use a higher density, Initial(min_per_layer=…), or exclude={thin!r}"
        )
    locked = [] if report.task == 0 or own == 0 else [name for name in topology.locked() if name not in said]
    said |= set(locked)
    if locked:  # as a stem that ERK makes dense is meant to be
        rank_zero_info(
            f"clkit: {owner}: earlier tasks have all connections that {task} uses in {', '.join(locked)}; "
            "they are shared and train no more. Initial(max_layer_density=…) keeps room in layers"
        )
    if schedule.stop and topology.steps < FEWEST_UPDATES * schedule.update_every and "updates" not in said:
        said.add("updates")
        moving = int(schedule.stop * topology.steps)  # steps in which connections may move
        advice = "train a task for more epochs"
        if topology.steps >= FEWEST_UPDATES:
            advice = f"use schedule=PruneSchedule(update_every={max(1, moving // FEWEST_UPDATES)}) or fewer"
        every, steps = _counted(schedule.update_every, "optimizer step"), _counted(topology.steps, "step")
        rank_zero_warn(
            f"{owner}: connections move every {every} (update_every), which is "
            f"{_counted(moving // schedule.update_every, 'time')} in the {steps} of {task}; {advice}, so that they "
            "find their place"
        )


def say_task_goes_on(owner: str, trainer: pl.Trainer, topology: SparseTopology) -> None:
    """Tell a person that a fit with plain loaders goes on inside of the task of one that ended with an error."""
    if not trainer.ckpt_path and not hasattr(datamodule_of(trainer), "is_last_epoch"):
        where = f"step {topology.step} of {topology.steps}"
        rank_zero_info(f"clkit: {owner} goes on with task {topology.task}, interrupted at {where}")


def say_task_is_another(owner: str, trainer: pl.Trainer, topology: SparseTopology) -> None:
    """Tell a person who may want to train a task for longer that its checkpoint begins another one."""
    if trainer.ckpt_path and topology.tasks and not hasattr(datamodule_of(trainer), "is_last_epoch"):
        rank_zero_warn(
            f"{owner}: the checkpoint was written when task {topology.tasks - 1} was over, so this fit is another, "
            f"task {topology.tasks}. To train one for longer, start from a checkpoint that was written before its last "
            "epoch ended, or fit anew for more epochs"
        )


def say_given_tasks(owner: str, trainer: pl.Trainer, said: set[str]) -> None:
    """Tell a person once that evaluations go by the task of a sample, where the stream does not give it away."""
    datamodule = datamodule_of(trainer)
    if hasattr(datamodule, "gives_task_id") and not datamodule.gives_task_id and "given" not in said:
        said.add("given")
        rank_zero_info(
            f"clkit: {owner} shows each batch of an evaluation the network of its own experience, whose index "
            f"{type(datamodule.scenario).__name__} does not give to a predictor: accuracies are those of known tasks, "
            "also those of heads beside it. TaskIncremental says so, and restricts answers to the classes of the task"
        )


def say_shared_head(owner: str, trainer: pl.Trainer, networks: TaskNetworks, said: set[str]) -> None:
    """Tell a person once that tasks share what gives the logits, as soon as it is known that there are several."""
    several = networks.known.task > 0 or len(getattr(datamodule_of(trainer), "experiences", ())) > 1
    if several and not networks.heads and "head" not in said:
        said.add("head")
        rank_zero_warn(
            f"{owner}: no layer is a head of its own for each task (head=[], or 'auto' found no classifier), so the "
            "last layer has a mask like all others, and a later task finds much of it frozen; name the layer that "
            "gives the logits: head='…'"
        )


def about_task(
    trainer: pl.Trainer, module: Any, experience: Experience, brought: Sequence[Sequence[int]], known: dict[str, Any]
) -> dict[str, Any]:
    """Return what somebody who gets the weights of a task has to know to use them, as plain values.

    Args:
        trainer: The trainer.
        module: The module, of which ``timm_arguments`` says how timm makes its network, if it does.
        experience: The task.
        brought: Classes that each task trained, where no stream says it.
        known: What was returned for an earlier task.
    """
    data, timm = datamodule_of(trainer), getattr(module, "timm_arguments", None)
    if timm is not None:
        plain = {name: value for name, value in timm["kwargs"].items() if _is_plain(value)}
        timm = {**timm, "kwargs": plain_values(plain), "objects": sorted(timm["kwargs"].keys() - plain)}
    index = experience.index
    ids = list(experience.classes) or list(brought[index] if index < len(brought) else ())
    names, preparing = getattr(data, "class_names", None) or {}, getattr(data, "input_preprocessing", None)
    preprocessing = known["preprocessing"] if known else plain_values(preparing and preparing())
    return {
        "network": f"{type(module).__module__}.{type(module).__qualname__}",
        "timm": timm,
        "classes": _columns(data, ids),
        "class_ids": ids,
        "class_names": [str(names.get(each, "")) for each in ids],
        "preprocessing": preprocessing,
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float)


def show_tasks(trainer: pl.Trainer, reports: list[TaskReport], *, table: bool) -> None:
    """Log the shares of the last task, and print a line for each if there shall be a ``table``."""
    last = reports[-1]
    shares = {name: getattr(last, name) / last.total for name in ("active", "nonzero", "reused", "free")}
    for logger in trainer.loggers:
        logged = {f"dst/{name}": share for name, share in {**shares, "explored": last.explored}.items()}
        logger.log_metrics(logged, step=trainer.global_step)
    if table:
        from clkit.report.tables import topology_table

        show(trainer, topology_table(reports))


def hold_norms(module: nn.Module) -> list[nn.Module]:
    """Put norms that train their statistics into evaluation mode, and return them."""
    norms = [each for each in module.modules() if each.training and getattr(each, "running_mean", None) is not None]
    for norm in norms:
        norm.training = False
    return norms


def set_classes(trainer: pl.Trainer, module: Any, classes: tuple[int, ...]) -> None:
    """Tell a module that chooses among the classes of a task which these are; all, where nothing is known of them."""
    own = getattr(module, "task_classes", None)
    if not isinstance(own, Tensor):
        return
    ids = _columns(datamodule_of(trainer), classes)
    own.fill_(not ids)
    own[ids] = True


def _columns(data: Any, classes: Sequence[int]) -> list[int]:
    """Return the outputs that stand for classes, as the user numbers these."""
    original = getattr(data, "original_ids", None)
    return list(classes) if original is None else [list(original).index(each) for each in classes]


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
