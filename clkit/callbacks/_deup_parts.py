"""What the parts of the DEUP callback hand to each other, and its settings that belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from clkit.arguments import check_arguments
from clkit.distributed import gather_objects
from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import check_count, check_number, check_probability
from clkit.methods.deup import ErrorModelName, Uncertainty
from clkit.methods.sample_loss import SampleLoss
from clkit.methods.stationarising import FEATURE_SIGNS

__all__ = [
    "Arrived",
    "Judgement",
    "Records",
    "Rows",
    "Settings",
    "as_endless",
    "as_finite",
    "checked_noise",
    "joined_rows",
]

_INFINITE = 1e100  # stands for infinity in a state


@dataclass(frozen=True)
class Records:
    """What :class:`~clkit.callbacks.DEUP` keeps to learn from.

    Args:
        capacity: Most records of errors of one predictor, about 100 bytes each.
        memory: ``"features"`` keeps features of some samples learned, 4 bytes a number, the same number of each class;
            ``"gaussian"`` keeps no sample and draws features from the means and the covariance of the classes;
            ``"none"`` has neither.
        memory_size: Most samples of ``"features"``.
        novelty: π, the share of inputs of classes never seen that is to be expected, in [0, 1). It lifts the total by
            about as much; with 0 no class is left out to show what a new one looks like.
        holdout: Share of the records that thresholds are taken from and that nothing is fitted to: 1/n. Only where a
            threshold is asked for.
        shrinkage: λ of the covariance of the features, in [0, 1]; above 0 with fewer samples than features.
        refresh: When what heads say of arriving batches is brought up to date, since that means to solve: after batches
            1, 2, 4, 8, … of an experience, every so many batches, or at its beginning.
        refit: When the error predictors are fitted: at the end of each experience, or also every so many batches.
        seed: Of what is kept, and of the error predictors.
    """

    capacity: int = 4096
    memory: Literal["features", "gaussian", "none"] = "features"
    memory_size: int = 1024
    novelty: float = 0.05
    holdout: float = 0.2
    shrinkage: float = 0.1
    refresh: Literal["doubling", "experience"] | int = "doubling"
    refit: Literal["experience"] | int = "experience"
    seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        for name in ("capacity", "memory_size"):
            check_count(name, getattr(self, name))
        for name in ("refresh", "refit"):
            if not isinstance(getattr(self, name), str):
                check_count(name, getattr(self, name))
        check_count("seed", self.seed, at_least=0)
        check_probability("shrinkage", self.shrinkage)
        if not check_number("novelty", self.novelty, at_least=0) < 1:
            raise ArgumentError(f"novelty must lie in [0, 1), got {self.novelty}")
        if self.holdout <= 0 or abs(round(1 / self.holdout) * self.holdout - 1) > 1e-9 or self.holdout > 0.5:
            raise ArgumentError(f"holdout must be 1/n for a whole number n of at least 2, got {self.holdout}")


@dataclass(frozen=True)
class Settings:
    """What all predictors under watch have in common; :class:`~clkit.callbacks.DEUP` describes it."""

    loss: SampleLoss
    features: Sequence[str] | Literal["auto"]
    sources: Sequence[str] | Literal["auto"]
    model: ErrorModelName
    aleatoric: Any
    records: Records
    abstain_rate: float | None
    risk: float | None
    delta: float
    coverage: float | None
    class_conditional: bool
    adaptive: float
    false_alarm_rate: float | None

    def __post_init__(self) -> None:
        for name in ("abstain_rate", "risk", "delta", "coverage", "false_alarm_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < check_number(name, value) < 1:
                raise ArgumentError(f"{name} must be between 0 and 1, got {value}")
        if self.loss == "squared":
            raise ArgumentError("loss='squared' is for regression, which a stream of classes is not; use 'brier'")
        if self.risk is not None and self.loss != "error":
            raise ArgumentError(f"risk={self.risk} bounds a rate of errors: it needs loss='error', got {self.loss!r}")
        if isinstance(self.aleatoric, int | float):
            check_number("aleatoric", self.aleatoric, at_least=0)
        check_number("adaptive", self.adaptive, at_least=0)
        for name in ("class_conditional", "adaptive"):
            if getattr(self, name) and self.coverage is None:
                raise ArgumentError(f"{name}={getattr(self, name)} is of sets of classes: give their coverage=0.9, say")
        if self.false_alarm_rate is not None and self.records.memory != "features":
            raise ArgumentError(
                f"false_alarm_rate={self.false_alarm_rate} is taken from rows that were learned: it needs "
                f"Records(memory='features'), got {self.records.memory!r}"
            )
        odd = [] if self.features == "auto" else [each for each in self.features if each not in FEATURE_SIGNS]
        if odd or not self.features:
            raise ArgumentError(f"features must be some of {', '.join(FEATURE_SIGNS)}, got {odd or self.features!r}")
        for source, memory in (("loo", "features"), ("gaussian", "gaussian")):
            if self.sources != "auto" and source in self.sources and self.records.memory != memory:
                raise ArgumentError(
                    f"sources: {source!r} needs Records(memory={memory!r}), got {self.records.memory!r}"
                )
        if self.records.memory != "features" and (self.aleatoric == "neighbours" or "log_knn" in self.features):
            raise ArgumentError(f"neighbours need Records(memory='features'), got {self.records.memory!r}")
        if self.sources != "auto" and not {*self.sources} - {"novel"}:
            raise ArgumentError(f"sources must name one beside 'novel', of which all are errors; got {self.sources}")

    @property
    def held_out(self) -> float:
        """Share of the records that is kept out of the fit: none where no threshold is asked for."""
        return self.records.holdout if self.abstain_rate is not None or self.risk is not None else 0.0


class Rows(NamedTuple):
    """Samples, and what the predictor says of them."""

    ids: Tensor  # (n,) int64
    features: Tensor  # (n, D)
    targets: Tensor  # (n,) int64
    scores: Tensor  # (n, C)

    def where(self, which: Tensor) -> Rows:
        """Return those that a mask (n,) names."""
        return Rows(*(each[which.to(each.device)] for each in self))

    def of_classes(self, known: set[int]) -> Tensor:
        """Return the targets (n,), -1 where the class is not known: no set could hold it, however large it is made."""
        inside = self.targets < self.scores.shape[1]
        column = torch.where(inside, self.targets, 0)[:, None]
        learned = inside & (self.scores.gather(1, column)[:, 0] > -torch.inf)
        came = torch.isin(self.targets, torch.tensor(sorted(known), dtype=torch.int64, device=self.targets.device))
        return torch.where(learned & came, self.targets, -1)

    def padded(self, classes: int) -> Rows:
        """Return the same with scores of so many classes, of which further ones are not known."""
        return self._replace(scores=pad(self.scores, (0, classes - self.scores.shape[1]), value=-torch.inf))


@dataclass
class Arrived:
    """Sums over the samples that arrived in an experience, before they were learned."""

    samples: float = 0.0
    wrong: float = 0.0
    loss: float = 0.0
    judged: float = 0.0
    abstained: float = 0.0
    accepted_wrong: float = 0.0

    def report(self) -> dict[str, float]:
        """Return their means, for the logs."""
        found = {"prequential_error": self.wrong / self.samples, "prequential_loss": self.loss / self.samples}
        if self.judged:
            found["abstention_rate"] = self.abstained / self.judged
        if self.judged > self.abstained:
            found["selective_risk"] = self.accepted_wrong / (self.judged - self.abstained)
        return found


class Judgement(NamedTuple):
    """What is said of the samples of a batch: each (B,), ``sets`` (B, C)."""

    uncertainty: Uncertainty
    abstain: Tensor | None
    sets: Tensor | None


def checked_noise(noise: Any, number: int) -> Tensor:
    """Return what a user's function said of the noise of so many samples, (n,) float64.

    Raises:
        BatchError: If it is something else.
    """
    if not isinstance(noise, Tensor) or noise.shape != (number,) or noise.is_complex():
        seen = tuple(noise.shape) if isinstance(noise, Tensor) else type(noise).__name__
        raise BatchError(f"aleatoric must return a tensor of {number} numbers, one a sample, got {seen}")
    if odd := noise[~(noise >= 0)].tolist():  # NaN is not
        raise BatchError(f"aleatoric must return numbers of at least 0, got {odd[0]}")
    return noise.detach().double().cpu()


def joined_rows(parts: Sequence[Rows]) -> Rows | None:
    """Return the rows of all processes, if there are any; a call on all of them."""
    own = [Rows(*(column.cpu() for column in each)) for each in parts]  # another process may not have this device
    every = [each for some in gather_objects(own, "the samples kept out of training") for each in some]
    if not every:
        return None
    widest = max(each.scores.shape[1] for each in every)
    every = [each.padded(widest) for each in every]
    ids, features, targets, scores = (torch.cat(column) for column in zip(*every, strict=True))
    return Rows(ids, features, targets, scores)


def as_finite(value: float) -> float:
    """Return a threshold as a state may hold it: infinity has no place there."""
    return math.copysign(_INFINITE, value) if math.isinf(value) else value


def as_endless(value: float) -> float:
    """Return the threshold that :func:`as_finite` was given."""
    return math.copysign(math.inf, value) if abs(value) >= _INFINITE else value
