"""One weight tensor under a mask that moves: what a task draws, trains, drops and grows in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clkit.arguments import in_short
from clkit.errors import ArgumentError, first_line
from clkit.methods._checks import check_choice
from clkit.methods._connections import (
    Growth,
    Prune,
    PruneSchedule,
    drawn_scores,
    fitting,
    highest,
    lowest_active,
    pack,
    unpack,
)
from clkit.methods._densities import Initial
from clkit.schema import Kind, Many, Numbers

__all__ = ["AT_REST", "ELEMENTWISE", "Components", "SparseLayer", "described", "in_few_words"]

# optimizers that leave a weight of 0 with a gradient of 0 and nothing remembered as it is; by name, so that those of
# other packages and releases are known too; a class derived from one counts as one
AT_REST = {"SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adadelta", "Lion"}
ELEMENTWISE = AT_REST | {"Adagrad", "Adamax"}  # which begin with a number of each weight, or keep one

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Components(NamedTuple):
    """What a task's topology is made and moved by; :class:`SparseTopology` says what each means."""

    density: float
    initial: Initial
    prune: Prune
    growth: Growth
    schedule: PruneSchedule
    reuse: str
    grow_from: str
    fresh_init: str
    on_capacity: str
    pattern: str | None

    @classmethod
    def of_task(cls, given: Mapping[str, Any], task: int) -> Components:
        """Return what a task has, given settings or functions of the task; else raise an ArgumentError."""
        own = {name: _of_task(name, given[name], task) for name in cls._fields}
        for name, kind in _KINDS.items():
            own[name] = _made(name, own[name], kind)
        for name, allowed in _CHOICES.items():
            check_choice(name, own[name], allowed)
        chosen = cls(**own)
        if chosen.pattern not in (None, "2:4"):
            raise ArgumentError(f"pattern must be '2:4' or None, got {chosen.pattern!r}")
        if chosen.pattern and isinstance(chosen.density, int | float) and chosen.density > 0.5:
            raise ArgumentError(
                f"density={chosen.density} does not go with pattern='2:4', which has two of four connections; use a "
                "density of at most 0.5"
            )
        if chosen.pattern and chosen.prune.scope == "all" and chosen.grow_from == "free":
            raise ArgumentError(
                "pattern='2:4' needs prune=Prune(scope='free') or grow_from='any': a dropped connection of an earlier "
                "task could find no room to return to"
            )
        if chosen.pattern and chosen.reuse == "all":
            raise ArgumentError(
                "pattern='2:4' does not go with reuse='all': the connections of several tasks together are more than "
                "two of four; use reuse='prefer_free' or 'random'"
            )
        return chosen


_KINDS: dict[str, Any] = {"initial": Initial, "prune": Prune, "growth": Growth, "schedule": PruneSchedule}
_CHOICES = {
    "reuse": ("random", "prefer_free", "none", "all"),
    "grow_from": ("free", "any"),
    "fresh_init": ("original", "zeros", "rescaled"),
    "on_capacity": ("raise", "reuse", "shrink"),
}


def described(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a saved state must share, as plain values; a function of the task cannot be compared."""
    plain = {name: "by task" if callable(value) else value for name, value in given.items()}
    for name, kind in _KINDS.items():
        if plain[name] != "by task":
            plain[name] = str(plain[name] if isinstance(plain[name], kind) else kind(plain[name]))
    return plain


def in_few_words(settings: Any) -> Any:
    """Return described settings, own or saved, without what is the default in them: a message shows only a beginning.

    Example:
        >>> in_few_words({"schedule": str(PruneSchedule("rigl", update_every=5))})
        {'schedule': "PruneSchedule(rule='rigl', update_every=5)"}
    """
    if type(settings) is not dict:
        return settings
    return {name: _own_fields(text, _KINDS.get(name)) for name, text in settings.items()}


def _own_fields(text: Any, kind: Any) -> Any:
    """Return the text of a setting without the fields that are the default; another value as it is."""
    if kind is None or type(text) is not str or not text.startswith(f"{kind.__name__}("):
        return text
    name, usual = kind.__name__, str(kind())
    parts = text.removeprefix(f"{name}(").removesuffix(")").split(", ")  # no value has a comma
    defaults = usual.removeprefix(f"{name}(").removesuffix(")").split(", ")
    return f"{name}({', '.join(part for part in parts if part not in defaults)})"


def _made(name: str, value: Any, kind: Any) -> Any:
    """Return a setting as it is, or made of its rule's name, with an error that says whose rule it is."""
    if isinstance(value, kind):
        return value
    try:
        return kind(value)
    except ArgumentError as error:
        raise ArgumentError(f"{name}={in_short(value)}: {error}") from error


def _of_task(name: str, setting: Any, task: int) -> Any:
    if not callable(setting):
        return setting
    try:
        return setting(task)
    except Exception as error:  # of the user's own function
        raise ArgumentError(f"{name} as a function of the task fails for task {task}: {first_line(error)}") from error


@dataclass
class SparseLayer:
    """One weight tensor and its masks, all of one shape; flat positions are those of the contiguous order."""

    name: str
    weight: Tensor  # during a task the active sub-network, exact zeros elsewhere
    bank: Tensor  # last known value of every position over all tasks
    mask: Tensor  # bool, the task's
    used: Tensor  # bool, in the mask of a finished task
    blocked: Tensor  # bool, not trained: outside the mask, or used
    fired: Tensor  # bool, active at some time of the task
    held_at: Tensor  # int64, flat positions of connections of earlier tasks in the mask
    bits: Tensor | None = None  # of the gradient's width: all bits where it is trained
    count: int = 0  # of active connections, the same all through the task
    gradient: Tensor | None = None  # dense, of the step in work
    memory: Tensor | None = None  # what growth accumulates: a sum of gradients, or their running mean

    @classmethod
    def of(cls, name: str, weight: Tensor) -> SparseLayer:
        """Return a layer in which no task was."""
        nothing = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        none = torch.empty(0, dtype=torch.int64, device=weight.device)
        return cls(name, weight, weight.detach().clone(), nothing, nothing.clone(), ~nothing, nothing.clone(), none)

    def drawn(self, chosen: Components, count: int, seed: tuple[int, ...]) -> Tensor:
        """Return a first mask of ``count`` connections, or raise an ArgumentError; nothing is changed."""
        free = ~self.used.flatten()
        left = int(free.sum())
        only_free = chosen.reuse in ("none", "all")
        if only_free and count > left:
            if chosen.on_capacity == "raise" or chosen.reuse == "all":
                instead = "reuse='prefer_free'" + ", or on_capacity='reuse' or 'shrink'" * (chosen.reuse == "none")
                raise ArgumentError(
                    f"density={chosen.density} with reuse={chosen.reuse!r} asks for {count:,} unused connections of "
                    f"{self.name!r}, and {left:,} of its {len(free):,} are left; use a lower density, {instead}"
                )
            only_free = chosen.on_capacity == "shrink"
        scores = drawn_scores(free if only_free else torch.ones_like(free), seed)
        if chosen.reuse != "random":
            scores += free  # unused ones first
        mask = torch.zeros_like(free)
        mask[self._best(chosen, scores, mask, count)] = True
        return (mask if chosen.reuse != "all" else mask | ~free).view(self.mask.shape)

    def begin(self, chosen: Components, mask: Tensor, *, first: bool) -> None:
        """Load the sub-network of a new task into the weights."""
        if first:
            self.bank.copy_(self.weight.detach())
        self.fired, self.memory, self.gradient = mask.clone(), None, None
        self.count = int(mask.sum())
        start = self.bank
        if chosen.fresh_init == "zeros" and not first:
            start = torch.where(self.used, start, 0)
        elif chosen.fresh_init == "rescaled":
            start = torch.where(self.used, start, start * (mask.numel() / max(1, self.count)) ** 0.5)
        self.train_in(mask)
        self.load(torch.where(mask, start, 0))

    def train_in(self, mask: Tensor) -> None:
        """Train the unused connections of a mask from now on."""
        self.mask, self.blocked = mask, ~mask | self.used
        self.held_at, self.bits = (mask & self.used).flatten().nonzero().squeeze(1), None

    def load(self, values: Tensor) -> None:
        """Write all weights, in place: optimizers and compiled graphs hold the tensor."""
        self.weight.detach().copy_(values)

    def sub_network(self, bits: Tensor) -> Tensor:
        """Return the weights of a finished task, given the bits of its mask."""
        return torch.where(unpack(bits, self.mask), self.bank, 0)

    # ---- one step

    def after_backward(self, keep: bool) -> None:
        """Keep the dense gradient if it is wanted, and leave only that of trained connections."""
        gradient, self.gradient = self.weight.grad, None
        if gradient is not None:
            if keep:
                self.gradient = gradient.detach().clone()
            gradient = gradient.detach()
            whole = _WHOLE[gradient.element_size()]
            if self.bits is None or self.bits.dtype != whole:
                self.bits = self.blocked.to(whole) - 1  # all bits where it is trained, none elsewhere
            # clears what is blocked, NaN too, in less than half the time of filling by a mask
            gradient.view(whole).bitwise_and_(self.bits)

    def hold(self, optimizers: Iterable[torch.optim.Optimizer], *, moved: bool = True) -> None:
        """Put weights that are not trained, and their optimizer's state, to what they have to be, to the bit.

        Where an optimizer of a known kind alone ``moved`` them, with gradients of 0, those outside the mask are 0 still
        and so is what it remembers; weight decay has moved connections of earlier tasks.
        """
        if not moved and self.weight.is_contiguous():
            if len(self.held_at):
                self.weight.detach().view(-1)[self.held_at] = self.bank.view(-1)[self.held_at]
                for value in self._states(optimizers):
                    value.view(-1)[self.held_at] = 0
            return
        weight = self.weight.detach()
        # never a product with the mask: NaN * 0 is NaN, and -1 * 0 is -0
        weight.copy_(torch.where(self.blocked, self.bank, weight))
        weight.masked_fill_(~self.mask, 0)
        self.forget(optimizers)

    def forget(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Have optimizers remember nothing of weights that are not trained."""
        for value in self._states(optimizers):
            value.masked_fill_(self.blocked, 0)

    def _states(self, optimizers: Iterable[torch.optim.Optimizer]) -> list[Tensor]:
        """Return what optimizers remember of each weight."""
        values = [value for optimizer in optimizers for value in optimizer.state.get(self.weight, {}).values()]
        return [each for each in values if isinstance(each, Tensor) and each.ndim and each.shape == self.weight.shape]

    def held(self) -> bool:
        """Whether weights that are not trained are what they have to be."""
        wanted = torch.where(self.mask, self.bank, 0)
        return torch.equal(self.weight.detach()[self.blocked], wanted[self.blocked])

    def remember(self, growth: Growth) -> None:
        """Take the gradient of a step into what growth accumulates."""
        if self.gradient is None:
            return
        gradient = self.gradient.float()
        if growth.rule == "gradient":
            self.memory = gradient if self.memory is None else self.memory.add_(gradient)
        else:
            past = torch.zeros_like(gradient) if self.memory is None else self.memory
            self.memory = past.mul_(growth.momentum).add_(gradient, alpha=1 - growth.momentum)

    def move(self, chosen: Components, fraction: float, seed: tuple[int, ...]) -> None:
        """Let the weakest connections leave and as many come."""
        mask, used = self.mask.flatten(), self.used.flatten()
        active = mask.nonzero().squeeze(1)
        own_only = chosen.prune.scope == "free" or chosen.reuse == "all"
        leaving = active[~used[active]] if own_only else active
        number = min(math.ceil(fraction * self.count), self.count, len(leaving))
        if number == 0 or self.count in (self.mask.numel(), len(self.held_at)):
            return  # nothing can move, or nothing here is trained
        weight = self.weight.detach().flatten()
        gradient = None if self.gradient is None else self.gradient.flatten()
        leaving = lowest_active(chosen.prune, weight, gradient, leaving, number)
        after = mask.clone()
        after[leaving] = False
        taken = after if chosen.grow_from == "any" else after | used
        coming = self._best(chosen, self._growth_scores(chosen.growth.rule, taken, seed), after, number)
        after[coming] = True
        if short := number - len(coming):  # too few candidates: the strongest of those that left are taken back
            back = leaving[~after[leaving]]
            after[back[highest(weight[back].float().abs(), short)]] = True
        new = after.view(self.mask.shape)
        if chosen.grow_from == "any":  # a used one comes with its learned value, never as a dead zero; others are 0
            came = new & ~self.mask & self.used
            self.weight.detach()[came] = self.bank[came]
        self.weight.detach().masked_fill_(~new, 0)
        self.train_in(new)
        self.fired = self.fired | new

    def _growth_scores(self, rule: str, taken: Tensor, seed: tuple[int, ...]) -> Tensor:
        """Return the (N,) scores of connections that may come, and -1 of those that are ``taken``."""
        if self.memory is not None and rule in ("gradient", "momentum"):
            return self.memory.flatten().abs().masked_fill_(taken, -1)
        # also where a layer has no gradient, as in a branch that is not used
        scores = drawn_scores(~taken, seed)
        if rule == "unfired":
            scores += ~(taken | self.fired.flatten())
        return scores

    def _best(self, chosen: Components, scores: Tensor, active: Tensor, number: int) -> Tensor:
        """Return the positions of the highest scores that are not negative, as far as a pattern has room for them."""
        if chosen.pattern and self.weight.ndim == 2 and self.weight.shape[1] % 4 == 0:
            candidates = (scores >= 0).nonzero().squeeze(1)
            candidates = candidates[fitting(scores[candidates], candidates, active)]
            return candidates[highest(scores[candidates], number)]
        best = highest(scores, number)
        return best[scores[best] >= 0]

    # ---- between tasks

    def end(self) -> Tensor:
        """Keep the task's values for ever; return the bits of its mask."""
        self.bank.copy_(torch.where(self.mask, self.weight.detach(), self.bank))
        self.used = self.used | self.mask
        self.blocked = torch.ones_like(self.mask)
        self.gradient = self.memory = self.bits = None
        return pack(self.mask)

    def follow(self, weight: Tensor) -> None:
        """Go on with another tensor of the same shape, wherever it lies."""
        self.weight = weight
        self.bits = None
        for field in ("bank", "mask", "used", "blocked", "fired", "held_at", "memory"):
            value = getattr(self, field)
            setattr(self, field, None if value is None else value.to(weight.device))

    def state(self) -> dict[str, Any]:
        """Return what of a layer is saved beside the masks of finished tasks."""
        return {"bank": self.bank, "mask": pack(self.mask), "fired": pack(self.fired), "memory": self.memory}

    def saved_table(self) -> dict[str, Kind]:
        """Return what a saved layer must look like, with the masks of finished tasks."""
        shape = tuple(self.weight.shape)
        bits = Numbers(((self.weight.numel() + 7) // 8,), torch.uint8, least=0, most=255)
        memory = Numbers(shape, torch.float32, optional=True)
        return {
            "bank": Numbers(shape, self.bank.dtype),
            "mask": bits,
            "fired": bits,
            "memory": memory,
            "masks": Many(bits),
        }

    def restore(self, saved: dict[str, Any], *, running: bool) -> None:
        """Take up a saved layer."""
        self.bank.copy_(saved["bank"])
        self.used = torch.zeros_like(self.mask)
        for bits in saved["masks"]:
            self.used |= unpack(bits, self.mask)
        self.train_in(unpack(saved["mask"], self.mask))
        if not running:
            self.blocked = torch.ones_like(self.mask)
        self.fired = unpack(saved["fired"], self.mask)
        self.count, self.gradient = int(self.mask.sum()), None
        self.memory = None if saved["memory"] is None else saved["memory"].to(self.bank.device, copy=True)
