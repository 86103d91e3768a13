"""Scenarios: which rows of a data set arrive in which experience.

All of them are in this one file, longer than others, because they share their rules and are read side by side.

A scenario reads labels (and domains), never inputs, and answers with row numbers, so a stream over a million images is
cut in milliseconds. All of them obey the same rules:

* Labels keep the user's ids; gaps, and ids that do not start at 0, are fine.
* Every training row belongs to exactly one experience, and so does every test row. (:class:`LongTailed` leaves
  training rows out on purpose.) Rows are listed in stored order.
* Training rows without a label (-1) never create a class. Where experiences are made of classes they are dealt out
  evenly, in stored order: the first tenth of them to the first of ten experiences, and so on. Where experiences are
  made of domains or of stored positions they stay where they are stored. Test rows without a label do the same.
* No experience is without training rows: that is an error. An experience may lack test rows.
* ``class_order`` is a list of ids, or the name of a published order, or ``None``: sorted ids, which a ``seed`` shuffles
  by ``numpy.random.default_rng(seed).permutation``. A given order is final; the seed does not touch it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from clkit.arguments import check_arguments
from clkit.data.class_orders import published_order
from clkit.data.sources.base import Int64, id_vector
from clkit.errors import ArgumentError, DataError
from clkit.methods._checks import check_count, check_probability

__all__ = [
    "Blurry",
    "ClassIncremental",
    "DomainIncremental",
    "Joint",
    "Labels",
    "LongTailed",
    "NaturalOrder",
    "Scenario",
    "Split",
    "TaskIncremental",
]

UNLABELLED = -1


@dataclass(frozen=True, eq=False)
class Labels:
    """What a scenario reads of one part (training or test) of a data set; ids are kept as int64.

    Attributes:
        targets: (N,) integer class ids as the user numbers them; -1 is a row without a label.
        domains: (N,) integer domain ids, or ``None`` where the data set has none.
        domain_names: Names of domain ids, for reading; may be empty or incomplete.

    Raises:
        DataError: Ids are not integers, not one-dimensional, below -1, or of unequal number.

    Example:
        >>> Labels(np.array([3, 3, -1, 7], dtype=np.int16)).targets
        array([ 3,  3, -1,  7])
    """

    targets: Int64
    domains: Int64 | None = None
    domain_names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        targets = id_vector("targets", self.targets)
        if targets.size and targets.min() < UNLABELLED:
            raise DataError(
                f"targets holds the class id {targets.min()}; ids are 0 or larger, and -1 marks a row without a label"
            )
        object.__setattr__(self, "targets", targets)
        if self.domains is not None:
            domains = id_vector("domains", self.domains)
            if len(domains) != len(targets):
                raise DataError(f"domains has {len(domains)} entries for {len(targets)} targets; give one for each")
            object.__setattr__(self, "domains", domains)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def classes(self) -> Int64:
        """Sorted class ids that occur; -1 is none of them."""
        return np.unique(self.targets[self.targets != UNLABELLED])

    def take(self, rows: Int64) -> Labels:
        """Return the labels of some rows, in that order."""
        domains = None if self.domains is None else self.domains[rows]
        return Labels(self.targets[rows], domains, self.domain_names)


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one experience.

    Attributes:
        name: What a person reads in tables: ``"classes 0-1"``, ``"classes 3, 7, 9"``, ``"classes 0-9 (10)"`` (ten ids,
            the lowest and the highest), or a domain's name.
        classes: The sorted class ids that occur in the training rows.
        train: (n,) int64 rows of the training part.
        test: (m,) int64 rows of the test part; may be empty.
        ordered: The rows are a sequence in time; whoever loads them must not shuffle.
    """

    name: str
    classes: tuple[int, ...]
    train: Int64
    test: Int64
    ordered: bool = False

    @classmethod
    def of(cls, name: str, labels: Labels, train: Int64, test: Int64, *, ordered: bool = False) -> Split:
        """Return the split with some training rows, whose labels say its classes."""
        return cls(name, _sorted_ids(labels.take(train).classes), train, test, ordered)


class Scenario(ABC):
    """The way in which the rows of a data set are cut into the experiences of a stream.

    To write a new one, implement :meth:`split`; everything else that reads a stream works with the result.

    Attributes:
        name: The scenario's name in files and tables, in snake case.
        gives_task_id: At test, a predictor is told which experience a sample belongs to, and so chooses among that
            experience's classes only.
    """

    name: ClassVar[str]
    gives_task_id: ClassVar[bool] = False

    @abstractmethod
    def split(self, train: Labels, test: Labels) -> list[Split]:
        """Say which rows of the training and the test part belong to which experience, the first to arrive first.

        Raises:
            DataError: These labels cannot be cut as the arguments ask.
        """

    def ordered_classes(self, train: Labels) -> Int64:
        """Return the class ids of the training part in the order in which the scenario counts them; sorted by default.

        :class:`LongTailed` ranks the classes by it.
        """
        return train.classes


class _ClassScenario(Scenario):
    """A scenario whose experiences are made of classes, which a ``class_order`` or a ``seed`` puts in order."""

    class_order: list[int] | str | None
    seed: int | None

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        if isinstance(self.class_order, str):
            published_order(self.class_order)  # what can be checked before the data is known
        _check_count("seed", self.seed, at_least=0)

    def ordered_classes(self, train: Labels) -> Int64:
        """Return the class ids in the order of ``class_order`` and ``seed``."""
        if self.class_order is None:
            return _shuffled(train.classes, self.seed)
        order = published_order(self.class_order) if isinstance(self.class_order, str) else self.class_order
        return _check_permutation("class_order", "class", order, train.classes)

    def _checked_order(self, train: Labels, test: Labels) -> Int64:
        if not len(train.classes):
            raise DataError("the training part has no labelled rows to cut into classes")
        extra = np.setdiff1d(test.classes, train.classes)
        if len(extra):
            raise DataError(
                f"the test part has classes that the training part lacks: {_listed(extra)}; nothing could ever learn "
                "them. Leave these rows out, or use a scenario that is not made of classes"
            )
        return self.ordered_classes(train)


@dataclass(frozen=True)
class ClassIncremental(_ClassScenario):
    """Every experience brings classes of its own, and a predictor must tell all of them apart.

    The protocol of most papers (split CIFAR-100, ten stages of ten classes). The test rows of a class belong to the
    experience that brings the class.

    Give either ``experiences`` or ``classes_per_experience``. C classes in E experiences are cut as evenly as
    possible: the first ``C % E`` experiences get one class more. With ``classes_per_experience`` the last experience
    holds what is left and may be smaller.

    Args:
        experiences: Number of experiences.
        classes_per_experience: Number of classes in each.
        first_experience_classes: Number of classes of the first experience, e.g. 50 for "half the classes first". The
            rest is cut by the other argument; with ``experiences=E`` the first counts as one of the E.
        class_order: ``None``, a list with each id of the training part once, or the name of a published order.
        seed: Shuffles the sorted ids when ``class_order`` is ``None``.

    Raises:
        ArgumentError: At construction, both or neither of the two numbers, or a number below 1. When splitting, a
            ``class_order`` that is not an order of the classes present; the message lists missing and unknown ids.
        DataError: More experiences than classes; or the test part has classes that the training part lacks.

    Example:
        >>> labels = Labels(np.arange(10))
        >>> stream = ClassIncremental(classes_per_experience=2, first_experience_classes=4).split(labels, labels)
        >>> [part.name for part in stream]
        ['classes 0-3', 'classes 4-5', 'classes 6-7', 'classes 8-9']
    """

    name: ClassVar[str] = "class_incremental"

    experiences: int | None = None
    classes_per_experience: int | None = None
    first_experience_classes: int | None = None
    class_order: list[int] | str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for argument in ("experiences", "classes_per_experience", "first_experience_classes"):
            _check_count(argument, getattr(self, argument))
        if (self.experiences is None) == (self.classes_per_experience is None):
            given = "both" if self.experiences is not None else "neither"
            raise ArgumentError(
                f"experiences={self.experiences} and classes_per_experience={self.classes_per_experience}: {given} "
                "given; give exactly one of the two"
            )

    def split(self, train: Labels, test: Labels) -> list[Split]:
        """Return one split for each group of classes; see the class and :meth:`Scenario.split`."""
        groups = self._groups(self._checked_order(train, test))
        return [
            Split.of(_classes_name(group), train, *rows)
            for group, *rows in zip(groups, _rows_by_group(train, groups), _rows_by_group(test, groups), strict=True)
        ]

    def _groups(self, order: Int64) -> list[Int64]:
        """Cut the order of classes into the classes of each experience."""
        count, step = self.first_experience_classes or 0, self.classes_per_experience
        if count > len(order):
            raise DataError(f"first_experience_classes={count}, but the training part has only {len(order)} classes")
        first, rest = ([order[:count]] if count else []), order[count:]
        if step is not None:
            return first + [rest[start : start + step] for start in range(0, len(rest), step)]
        assert self.experiences is not None  # the constructor took exactly one of the two
        remaining = self.experiences - len(first)
        if not first:
            return _cut_evenly(rest, remaining)
        if len(rest) == remaining == 0:
            return first
        if not 1 <= remaining <= len(rest):
            raise DataError(
                f"after first_experience_classes={count}, {len(rest)} classes are left for {remaining} more of "
                f"experiences={self.experiences}; each needs at least one"
            )
        return first + _cut_evenly(rest, remaining)


@dataclass(frozen=True)
class TaskIncremental(ClassIncremental):
    """The cuts of :class:`ClassIncremental`, but the task is known at test: only its own classes compete.

    An easier protocol that older papers report. Same arguments, same rows.

    Example:
        >>> labels = Labels(np.array([0, 1, 2, 3]))
        >>> scenario = TaskIncremental(experiences=2)
        >>> scenario.gives_task_id, [part.classes for part in scenario.split(labels, labels)]
        (True, [(0, 1), (2, 3)])
    """

    name: ClassVar[str] = "task_incremental"
    gives_task_id: ClassVar[bool] = True


@dataclass(frozen=True)
class DomainIncremental(Scenario):
    """Every experience is one domain (a session, a season, a style); the classes may all recur in each.

    The test rows of a domain belong to the experience of that domain. Domains that occur in the test part only belong
    to the first experience, so they are evaluated after every stage: CoRe50 trains on sessions 1, 2, 4, 5, 6, 8, 9, 11
    and tests after each on sessions 3, 7, 10.

    Args:
        by: What makes an experience; ``"domain"`` is the only one.
        domain_order: Domain ids or domain names of the training part, each once; ``None`` is sorted ids.
        seed: Shuffles the sorted ids when ``domain_order`` is ``None``.
        ordered: The rows of a domain are a sequence in time (driving records, SODA10M's six periods): experiences
            keep the stored order and are not shuffled.

    Raises:
        ArgumentError: ``by`` is something else, or ``domain_order`` is not an order of the domains present.
        DataError: The data set has no domains.

    Example:
        >>> train = Labels(np.array([0, 1, 0, 1]), np.array([5, 5, 2, 2]), {2: "sketch", 5: "photo"})
        >>> [(part.name, part.train.tolist()) for part in DomainIncremental().split(train, train)]
        [('sketch', [2, 3]), ('photo', [0, 1])]
    """

    name: ClassVar[str] = "domain_incremental"

    by: str = "domain"
    domain_order: list[int | str] | None = None
    seed: int | None = None
    ordered: bool = False

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        if self.by != "domain":
            raise ArgumentError(f"by={self.by!r} is not known; the only value is 'domain'")
        _check_count("seed", self.seed, at_least=0)

    def split(self, train: Labels, test: Labels) -> list[Split]:
        """Return one split for each domain of the training part; see the class and :meth:`Scenario.split`."""
        if not len(train):
            raise DataError("the training part has no rows to cut into domains")
        train_domains = self._domains(train, "training")
        test_domains = self._domains(test, "test")
        splits: list[Split] = []
        for domain in self._order(train_domains, train.domain_names):
            tested = test_domains == domain
            if not splits:
                tested |= ~np.isin(test_domains, train_domains)
            name = train.domain_names.get(int(domain), f"domain {domain}")
            rows = np.flatnonzero(train_domains == domain)
            splits.append(Split.of(name, train, rows, np.flatnonzero(tested), ordered=self.ordered))
        return splits

    def _domains(self, labels: Labels, part: str) -> Int64:
        if not len(labels):
            return labels.targets
        if labels.domains is None:
            raise DataError(
                f"DomainIncremental needs a domain for each row, and the {part} part has none; use another "
                "scenario, or a source with domains: domain_* arrays in an .npz, ImageFolder(domains=True), or a "
                ".domains attribute"
            )
        return labels.domains

    def _order(self, train_domains: Int64, names: dict[int, str]) -> Int64:
        present = np.unique(train_domains)
        if self.domain_order is None:
            return _shuffled(present, self.seed)
        ids = {name: domain for domain, name in names.items()}
        unknown = [entry for entry in self.domain_order if isinstance(entry, str) and entry not in ids]
        if unknown:
            raise ArgumentError(f"domain_order names {unknown}, which are not domains here; known: {sorted(ids)}")
        order = [ids[entry] if isinstance(entry, str) else entry for entry in self.domain_order]
        return _check_permutation("domain_order", "domain", order, present)


@dataclass(frozen=True)
class Blurry(_ClassScenario):
    """Classes recur: most samples of a class come in one experience, some are scattered over the others.

    Si-Blurry (Moon et al. 2023, arXiv 2308.09303) with exact counts in place of random ones, so that two runs compare:

    1. The C classes are ordered and cut into E homes exactly as ``ClassIncremental(experiences=E, class_order, seed)``
       does (``seed`` shuffles them unless a ``class_order`` is given).
    2. ``floor(disjoint * C + 0.5)`` classes, drawn at random, are disjoint: all their samples stay at home.
    3. Of every other class, with n samples, ``floor(blur * n + 0.5)`` random ones leave. They are dealt out to the
       E - 1 other experiences so that their shares differ by at most one; which experiences get one more is random.

    Test samples of a class belong to the experience with most of its training samples, the first of them in a tie.
    The draws are a function of the labels and ``seed`` alone.

    Args:
        experiences: Number of experiences E, at least 2.
        disjoint: Share of the classes that stay in one experience, in [0, 1].
        blur: Share of the samples of the other classes that move, in [0, 1].
        class_order: ``None``, a list with each id of the training part once, or the name of a published order.
        seed: Of the class order and of the draws.

    Raises:
        ArgumentError: A share outside [0, 1], fewer than 2 experiences, no seed, or a wrong ``class_order``.
        DataError: More experiences than classes, test classes that the training part lacks, or an experience that
            loses all its samples.

    Example:
        >>> labels = Labels(np.repeat([0, 1], 10))
        >>> stream = Blurry(experiences=2, disjoint=0.5, blur=0.3, seed=0).split(labels, labels)
        >>> sorted(len(part.train) for part in stream)
        [7, 13]
    """

    name: ClassVar[str] = "blurry"

    experiences: int
    disjoint: float = 0.5
    blur: float = 0.1
    class_order: list[int] | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("experiences", self.experiences, at_least=2)
        check_probability("disjoint", self.disjoint)
        check_probability("blur", self.blur)
        check_count("seed", self.seed, at_least=0)  # not None: which samples move is drawn

    def split(self, train: Labels, test: Labels) -> list[Split]:
        """Return one split for each home of classes; see the class and :meth:`Scenario.split`."""
        order = self._checked_order(train, test)
        homes = _cut_evenly(order, self.experiences)
        arrives = self._deal_out(train, order, homes)
        tested = _unlabelled_dealt_out(test, self.experiences)
        for c in order:
            tested[test.targets == c] = np.bincount(arrives[train.targets == c], minlength=self.experiences).argmax()
        splits = []
        for i, home in enumerate(homes):
            rows, name = np.flatnonzero(arrives == i), _classes_name(home)
            if not len(rows):
                raise DataError(
                    f"experience {i} keeps no training samples: blur={self.blur} moves all of {name} away; lower blur, "
                    "raise disjoint, or use fewer experiences"
                )
            splits.append(Split.of(f"mainly {name}", train, rows, np.flatnonzero(tested == i)))
        return splits

    def _deal_out(self, train: Labels, order: Int64, homes: list[Int64]) -> Int64:
        """Return the experience of every training row."""
        # A stream of its own beside the class order's, which stays the one of ClassIncremental(seed=seed).
        rng = np.random.default_rng([self.seed, 1])
        disjoint = rng.permutation(order)[: _round_half_up(self.disjoint * len(order))]
        experience = _unlabelled_dealt_out(train, self.experiences)
        for i, home in enumerate(homes):
            others = np.delete(np.arange(self.experiences), i)
            for c in home:
                rows = np.flatnonzero(train.targets == c)
                experience[rows] = i
                if c in disjoint:
                    continue
                moving = rng.permutation(rows)[: _round_half_up(self.blur * len(rows))]
                shares = np.array_split(moving, len(others))
                for target, share in zip(rng.permutation(others), shares, strict=True):
                    experience[share] = target
        return experience


@dataclass(frozen=True)
class LongTailed(Scenario):
    """Any scenario on a training part whose classes get rarer and rarer; the test part stays as it is.

    Of the class with rank r in the inner scenario's class order (0 for the first) and n training samples, the first

        max(2, floor(n * factor ** r))

    in stored order are kept, or all where n < 2. Unlabelled rows are kept.

    Args:
        inner: The scenario that cuts what is kept.
        factor: How much rarer each class is than the one before, in (0, 1]. For an imbalance ratio q between the first
            and the last of C classes it is ``q ** (-1 / (C - 1))``.

    Raises:
        ArgumentError: ``factor`` outside (0, 1], or ``inner`` is not a scenario.

    Example:
        >>> labels = Labels(np.repeat([0, 1, 2], 90))
        >>> [len(part.train) for part in LongTailed(ClassIncremental(experiences=3), factor=0.6).split(labels, labels)]
        [90, 54, 32]
    """

    name: ClassVar[str] = "long_tailed"

    inner: Scenario
    factor: float

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        if not 0 < self.factor <= 1:
            raise ArgumentError(f"factor={self.factor} must lie in (0, 1]: each class is that much rarer than the last")

    @property
    def gives_task_id(self) -> bool:  # type: ignore[override]  # a plain attribute elsewhere
        """Whether the inner scenario gives task ids."""
        return self.inner.gives_task_id

    def ordered_classes(self, train: Labels) -> Int64:
        """Return the order of the inner scenario."""
        return self.inner.ordered_classes(train)

    def split(self, train: Labels, test: Labels) -> list[Split]:
        """Return the inner scenario's splits of the rows that are kept; see the class and :meth:`Scenario.split`."""
        kept = [np.flatnonzero(train.targets == UNLABELLED)]
        for rank, c in enumerate(self.ordered_classes(train)):
            rows = np.flatnonzero(train.targets == c)
            kept.append(rows[: max(2, math.floor(len(rows) * self.factor**rank))])
        rows = np.sort(np.concatenate(kept))
        return [replace(part, train=rows[part.train]) for part in self.inner.split(train.take(rows), test)]


@dataclass(frozen=True)
class NaturalOrder(Scenario):
    """The data as stored, cut evenly: for recordings whose order in time is the point. Never shuffled.

    Both parts are cut by ``numpy.array_split``: where rows do not divide, the first experiences get one more. A test
    part with fewer rows than experiences leaves the last ones without.

    Args:
        experiences: Number of experiences.

    Raises:
        ArgumentError: ``experiences`` is below 1.
        DataError: More experiences than training rows.

    Example:
        >>> labels = Labels(np.array([4, 4, 1, 1, 4]))
        >>> [(part.train.tolist(), part.classes) for part in NaturalOrder(2).split(labels, labels)]
        [([0, 1, 2], (1, 4)), ([3, 4], (1, 4))]
    """

    name: ClassVar[str] = "natural_order"

    experiences: int

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        _check_count("experiences", self.experiences)

    def split(self, train: Labels, test: Labels) -> list[Split]:
        """Return one split for each stretch of the stored rows; see the class and :meth:`Scenario.split`."""
        if self.experiences > len(train):
            raise DataError(
                f"experiences={self.experiences}, but the training part has {len(train)} rows; use at most that many"
            )
        stretches = [np.array_split(np.arange(len(labels)), self.experiences) for labels in (train, test)]
        return [
            Split.of(f"part {i + 1} of {self.experiences}", train, *rows, ordered=True)
            for i, rows in enumerate(zip(*stretches, strict=True))
        ]


@dataclass(frozen=True)
class Joint(Scenario):
    """Everything at once, in one experience: the upper reference that a stream is measured against.

    Args:
        inner: The scenario whose samples are meant, where it leaves some out (:class:`LongTailed`) or ``experiences``
            is given; all rows of the data by default.
        experiences: Only the first so many experiences of ``inner``, as ``StreamDataModule(stop_after=…)`` has it.

    Raises:
        ArgumentError: ``experiences`` is below 1 or given without ``inner``, or ``inner`` is not a scenario.
        DataError: The training part is empty.

    Example:
        >>> labels = Labels(np.array([1, 0, 2]))
        >>> [(part.name, part.train.tolist()) for part in Joint().split(labels, labels)]
        [('everything', [0, 1, 2])]
        >>> [part.train.tolist() for part in Joint(ClassIncremental(experiences=3), 2).split(labels, labels)]
        [[0, 1]]
    """

    name: ClassVar[str] = "joint"

    inner: Scenario | None = None
    experiences: int | None = None

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        _check_count("experiences", self.experiences)
        if self.inner is None and self.experiences is not None:
            raise ArgumentError(f"experiences={self.experiences} needs inner, the scenario that cuts them")

    def split(self, train: Labels, test: Labels) -> list[Split]:
        """Return a single split with all rows; see :meth:`Scenario.split`."""
        if not len(train):
            raise DataError("the training part has no rows")
        if self.inner is None:
            rows, test_rows = np.arange(len(train)), np.arange(len(test))
        else:
            parts = self.inner.split(train, test)[: self.experiences]
            rows = np.unique(np.concatenate([part.train for part in parts]))
            test_rows = np.unique(np.concatenate([part.test for part in parts]))
        return [Split.of("everything", train, rows, test_rows)]


def _sorted_ids(ids: Int64) -> tuple[int, ...]:
    return tuple(sorted(int(i) for i in ids))


def _shuffled(ids: Int64, seed: int | None) -> Int64:
    return ids if seed is None else np.random.default_rng(seed).permutation(ids)


def _rows_by_group(labels: Labels, groups: list[Int64]) -> list[Int64]:
    """Return the rows of each group of classes with its share of the unlabelled ones, in stored order."""
    unlabelled = _unlabelled_dealt_out(labels, len(groups))
    free = labels.targets == UNLABELLED
    return [
        np.flatnonzero(np.where(free, unlabelled == i, np.isin(labels.targets, group)))
        for i, group in enumerate(groups)
    ]


def _unlabelled_dealt_out(labels: Labels, experiences: int) -> Int64:
    """Return the experience of each unlabelled row; 0 for labelled ones."""
    experience = np.zeros(len(labels), dtype=np.int64)
    for i, rows in enumerate(np.array_split(np.flatnonzero(labels.targets == UNLABELLED), experiences)):
        experience[rows] = i
    return experience


def _cut_evenly(order: Int64, experiences: int) -> list[Int64]:
    if experiences > len(order):
        raise DataError(f"{len(order)} classes cannot fill {experiences} experiences; use at most {len(order)}")
    return np.array_split(order, experiences)


def _round_half_up(x: float) -> int:
    return math.floor(x + 0.5)


def _classes_name(classes: Int64) -> str:
    ids = _sorted_ids(classes)
    if len(ids) == 1:
        return f"class {ids[0]}"
    run = ids[-1] - ids[0] == len(ids) - 1
    if len(ids) > 4:
        return f"classes {ids[0]}-{ids[-1]} ({len(ids)})"
    return f"classes {ids[0]}-{ids[-1]}" if run else f"classes {', '.join(map(str, ids))}"


def _check_count(argument: str, value: int | None, at_least: int = 1) -> None:
    if value is not None:
        check_count(argument, value, at_least=at_least)


def _check_permutation(argument: str, kind: str, order: Sequence[int], present: Int64) -> Int64:
    ids = id_vector(argument, list(order))
    values, counts = np.unique(ids, return_counts=True)
    problems = [
        f"{what} {_listed(which)}"
        for what, which in (
            ("missing", np.setdiff1d(present, values)),
            ("unknown", np.setdiff1d(values, present)),
            ("repeated", values[counts > 1]),
        )
        if len(which)
    ]
    if problems:
        raise ArgumentError(
            f"{argument} must hold each {kind} id of the training part exactly once: {'; '.join(problems)}"
        )
    return ids


def _listed(ids: Int64) -> str:
    shown = ", ".join(str(i) for i in ids[:10])
    return shown if len(ids) <= 10 else f"{shown}, … ({len(ids)})"
