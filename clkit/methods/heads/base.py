r"""What the heads share: one linear read-out of sums, with a column for each class id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clkit.errors import ArgumentError, BatchError, ConfigurationError, NotFittedError, StateError
from clkit.methods._checks import Batch, check_batch, check_count, check_features, check_finite
from clkit.methods._leave_one_out import class_positions
from clkit.methods._state import LOADED, exact
from clkit.methods._sums import masked_batch_error
from clkit.methods.heads.feature_map import FeatureMap
from clkit.methods.heads.frozen import FrozenHead
from clkit.methods.heads.portable import FORMAT, FREE_OPTIONS, PortableHead, check_alike
from clkit.methods.heads.readout import Readout
from clkit.methods.heads.unit_length import unit_batch, unit_rows
from clkit.methods.statistics import FeatureStatistics
from clkit.schema import Kind, Settings, read_state

__all__ = ["Head"]


class Head(PortableHead):
    """Base of the heads: learns sums, solves when asked, scores by one product.

    A subclass keeps its sums in ``self.statistics``, says in :meth:`_readout_of_sums` how they become weights, and in
    :meth:`_design` what the weights are multiplied with. Class ids stay the user's: column c of the scores is class c.
    """

    normalizes: bool = False
    """Whether features are L2-normalised before anything else; a row of zeros stays zero and counts as a sample."""

    resets: int = 0
    """How often :meth:`reset` was called on this object."""

    statistics: FeatureStatistics
    feature_map: FeatureMap
    _frozen_table: Mapping[str, Kind] = {}  # the kinds of what a frozen head needs, but for a Cholesky factor
    _own_options: tuple[str, ...] = ()  # arguments of a subclass's constructor, which are attributes too
    _added_options: Mapping[str, Any] = {}  # those that older files lack, and what they stand for there

    def __init__(self, in_features: int, *, num_classes: int | None, max_classes: int) -> None:
        super().__init__()
        self.in_features = check_count("in_features", in_features)
        self.num_classes = None if num_classes is None else check_count("num_classes", num_classes)
        self.max_classes = check_count("max_classes", max_classes)
        self._shares = self._said_zeros = False
        self._limit = (max_classes, "max_classes")  # no class id reaches it
        if num_classes is not None and num_classes < max_classes:
            self._limit = (num_classes, "num_classes")
        self._readout: tuple[int, Readout] | None = None

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Learn a batch. Rows with target -1 are skipped; an empty batch changes nothing.

        Args:
            features: (B, in_features) of any floating dtype; detached, upcast, not modified.
            targets: (B,) class ids of any integer dtype.

        Raises:
            BatchError: If the batch is malformed; nothing is changed then. Where features are on an accelerator and
                not finite, the batch is left out and the next call that reads values raises this.
            ConfigurationError: If the statistics are shared: update those.
        """
        self.learn(self.checked(features, targets))

    def checked(self, features: Tensor, targets: Tensor) -> Batch:
        """Check a batch for :meth:`learn`, once for all heads of one width and device; change nothing.

        Takes and raises what :meth:`update` does.
        """
        below, name = self._limit
        device = self.statistics._device
        with exact():
            return check_batch(features, targets, self.in_features, below=below, limit_name=name, device=device)

    def learn(self, batch: Batch) -> None:
        """Learn a batch that :meth:`checked` of this head, or of another of the same width and device, has given.

        Raises:
            BatchError: If it has a class id that this head does not allow; nothing is changed then.
            ConfigurationError: If the statistics are shared: update those.
        """
        self._check_allowed("update")
        limit, name = self._limit
        if batch.ids.size and batch.ids[-1] >= limit:
            raise BatchError(f"target {batch.ids[-1]} is not below {name}={limit}; raise {name} or relabel the classes")
        with exact():
            for learner, rows in self._rows(batch):
                learner._add(rows, batch)

    def merge(self, other: Head) -> None:
        """Add all that another head has learned, as if its batches had come here (two machines, federated learning).

        Raises:
            ArgumentError: If the other is of another kind or differs in an option; it is not modified.
        """
        self._check_allowed("merge")
        check_alike(self, other)
        other._check_sums()
        self._check_sums()
        for mine, theirs in zip(self._all_statistics(), other._all_statistics(), strict=True):
            mine.merge(theirs)

    def subtract(self, features: Tensor, targets: Tensor) -> None:
        """Unlearn samples exactly: the head becomes the one of a stream that never held them.

        Takes the same numbers that :meth:`update` took.

        Raises:
            BatchError: If the batch is malformed or takes more samples of a class than it has; nothing is changed.
        """
        self._check_allowed("subtract")
        self._check_sums()
        batch = self.checked(features, targets)
        with exact():
            for statistics in self._all_statistics():
                statistics._check_removal(batch)
            for statistics, rows in self._rows(batch):
                statistics._remove(rows, batch)

    def reset(self) -> None:
        """Forget everything learned; options and projection stay."""
        self._check_allowed("reset")
        self.resets += 1
        for statistics in self._all_statistics():
            statistics.reset()

    def synchronize(self, group: Any = None) -> None:
        """Exchange what each process has learned; see :meth:`FeatureStatistics.synchronize`."""
        self._check_allowed("synchronize")
        everything = self._all_statistics()
        # A masked batch is in all sums: let one of them tell the other ranks, before anything is exchanged.
        if number := self._take_bad():
            everything[0]._bad = torch.tensor(number, device=everything[0].device)
        for statistics in everything:
            statistics.synchronize(group)

    def forward(self, features: Tensor) -> Tensor:
        """Return scores with column c for class id c.

        Args:
            features: (B, in_features) of any floating dtype.

        Returns:
            (B, C), C = largest id seen + 1, or ``num_classes``; columns of classes not seen are ``-inf``. Float64 for
            float64 features, else float32 (computed in float64). Differentiable in the features.

        Raises:
            BatchError: If the features have the wrong shape or, on a CPU, are not finite.
        """
        readout = self._solved()
        return self._in_columns(self._score(features, readout), readout, features)

    def leave_one_out(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the scores of learned rows by the head that had learned everything else, each row left out alone.

        Exact, in closed form, at the price of a prediction: what :meth:`forward` of a head that is learned again
        without the row would give. So errors on the rows learned are errors on rows not learned, and nothing need be
        held out. Each row must be in the sums **exactly once**, with these very numbers and this class: of a row that
        was learned twice one copy stays, and the scores of a row that was never learned mean nothing.

        Args:
            features: (B, in_features), the numbers that :meth:`update` took.
            targets: (B,) class ids that they were learned as.

        Returns:
            (B, C), dtype and columns of :meth:`forward`; the column of a class whose only row is left out is ``-inf``.

        Raises:
            NotFittedError: If nothing was learned.
            BatchError: If the batch is malformed, a class was not learned, or a row cannot have been (see above).
            ConfigurationError: If these options have no exact form.

        Example:
            >>> from clkit.methods import NearestMeanHead
            >>> head = NearestMeanHead(1, metric="euclidean")
            >>> rows, targets = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
            >>> head.update(rows, targets)
            >>> head.leave_one_out(rows, targets)  # without the first row the mean of class 0 is 2
            tensor([[ -4., -25.],
                    [ -4.,  -9.],
                    [-16., -inf]])
        """
        readout = self._check_fitted()
        with exact():
            rows = self._check_features(features)
            at = class_positions(readout.classes, targets, rows.shape[0])
            scores = self._left_out(rows, at, readout)
            last = self.counts[at] == 1
            scores[last, at[last]] = -torch.inf
            return self._in_columns(scores, readout, features)

    def frozen(self, *, leverage: bool = False) -> FrozenHead:
        """Return what the head says now, as a function of features that no later learning changes.

        Args:
            leverage: Whether the :meth:`~FrozenHead.leverage` of features is asked for too, where the head has one.

        Example:
            >>> from clkit.methods import NearestMeanHead
            >>> head, row = NearestMeanHead(1, metric="euclidean"), torch.tensor([[3.0]])
            >>> head.update(torch.tensor([[1.0]]), torch.tensor([0]))
            >>> then = head.frozen()
            >>> head.update(torch.tensor([[5.0]]), torch.tensor([0]))
            >>> then(row), head(row)
            (tensor([[-4.]]), tensor([[0.]]))
        """
        readout = self._solved()
        return FrozenHead(self, readout, self._frozen_parts(leverage) if readout.size else {})

    def _frozen_parts(self, leverage: bool) -> dict[str, Tensor]:
        """Return what a frozen head needs beside the read-out, such as a Cholesky factor."""
        return {}

    def _freeze(self, parts: dict[str, Tensor]) -> None:
        """Score by these parts from now on."""

    def scores_seen(self, features: Tensor) -> Tensor:
        """Return (B, k) float64 scores of the seen classes only, in the order of :attr:`classes`, on their device."""
        return self._score(features, self._solved())

    def predict(self, features: Tensor) -> Tensor:
        """Return the (B,) int64 ids of the highest scores; decided in float64, ties go to the lowest id.

        Raises:
            NotFittedError: If nothing was learned.
            BatchError: If the features have the wrong shape or, on a CPU, are not finite.
        """
        readout = self._check_fitted()
        scores = readout.scores(readout.centred(self._design(self._check_features(features))))
        return readout.classes[scores.argmax(dim=1)].to(features.device)

    def refresh(self) -> None:
        """Solve now rather than at the next prediction. Changes nothing that is saved."""
        self._solved()

    def linear_readout(self) -> tuple[Tensor, Tensor]:
        """Return weight (k, D) and bias (k,) in float64 of a plain linear layer over the seen classes.

        Its input are the features, of unit length if :attr:`normalizes` and behind the lift if there is one. It ranks
        the classes as :meth:`predict` does; scores may differ from :meth:`forward` by a number per row.
        """
        readout = self._solved()
        bias = readout.bias if readout.offset is None else readout.bias - readout.weight @ readout.offset
        return readout.weight.clone(), bias.clone()

    @property
    def classes(self) -> Tensor:
        """(k,) int64, ids of the classes seen, sorted."""
        return self.statistics.classes

    @property
    def counts(self) -> Tensor:
        """(k,) int64, samples learned of each class."""
        return self.statistics.counts

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments as plain values: ``type(head)(**head.options)`` builds the same head, empty."""
        names = ("in_features", "num_classes", "max_classes", *self._own_options)
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Return the options, for ``print(head)``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _readout_of_sums(self) -> Readout:
        raise NotImplementedError

    def _design(self, features: Tensor) -> Tensor:
        """Return what the weights are multiplied with, from checked float64 features."""
        design: Tensor = self.feature_map(unit_rows(features) if self.normalizes else features)
        return design

    def _design_layers(self, dtype: torch.dtype) -> list[nn.Module]:
        """Return plain layers that do what :meth:`_design` does after rows have unit length where they have."""
        return self.feature_map.layers(dtype)

    def _final_scores(self, scores: Tensor, centred: Tensor) -> Tensor:
        """Turn linear scores into those that :meth:`forward` promises; may change a row by a constant."""
        return scores

    def _left_out(self, rows: Tensor, at: Tensor, readout: Readout) -> Tensor:
        """Return (B, k) scores of checked rows, each without itself, whose classes are at these positions."""
        raise ConfigurationError(f"{type(self).__name__} has no exact leave-one-out form")

    def _rows(self, batch: Batch) -> list[tuple[Any, Tensor]]:
        """Return each statistics object, or other learner, with the rows that it learns of a batch."""
        return [(self.statistics, self.feature_map(self._prepared(batch)))]

    def _prepared(self, batch: Batch) -> Tensor:
        """Return the rows of a batch before they are mapped: of unit length where the head normalises."""
        if not self.normalizes:
            return batch.features
        return unit_batch(batch, self, stacklevel=6)

    def _all_statistics(self) -> list[FeatureStatistics]:
        return [self.statistics]

    def _adopt(self, statistics: FeatureStatistics | None, width: int, needed: tuple[str, ...]) -> FeatureStatistics:
        """Return the given statistics, if they have what is needed, or new ones."""
        if statistics is None:
            parts: Any = {name: name in needed for name in ("sums", "gram", "squares", "class_grams", "scatter")}
            return FeatureStatistics(width, max_classes=self._limit[0], **parts)
        kept = {*statistics.kept, *(["gram"] if "scatter" in statistics.kept else [])}  # the one gives the other
        if statistics.width != width or not set(needed) <= kept:
            raise ArgumentError(
                f"statistics must have width {width} and keep {needed}, "
                f"got width {statistics.width} with {statistics.kept}"
            )
        self._shares = True
        return statistics

    def _score(self, features: Tensor, readout: Readout) -> Tensor:
        centred = readout.centred(self._design(self._check_features(features)))
        return self._final_scores(readout.scores(centred), centred)

    def _in_columns(self, scores: Tensor, readout: Readout, like: Tensor) -> Tensor:
        """Return (B, k) scores of the seen classes in the column of each id, in dtype and place as for ``like``."""
        width = readout.size if self.num_classes is None else self.num_classes
        if width != readout.classes.numel():
            scores = scores.new_full((scores.shape[0], width), -torch.inf).index_copy(1, readout.classes, scores)
        return (scores if like.dtype == torch.float64 else scores.to(torch.float32)).to(like.device)

    def _check_features(self, features: Tensor) -> Tensor:
        rows = check_features(features, self.in_features, self.statistics._device)
        if rows.device.type == "cpu":
            check_finite(rows)
        return rows

    def _check_fitted(self) -> Readout:
        readout = self._solved()
        if not readout.size:
            raise NotFittedError(f"this {type(self).__name__} has learned nothing yet: call update first")
        return readout

    def _check_allowed(self, verb: str) -> None:
        if self._shares and verb != "synchronize":
            raise ConfigurationError(
                f"this head reads statistics that it shares with others: call {verb} on those, once, not on the head"
            )

    def _check_sums(self) -> None:
        """Raise the error of a masked batch once, however many sums it was masked in."""
        if number := self._take_bad():
            raise masked_batch_error(number)

    def _take_bad(self) -> int:
        return max(statistics._take_bad() for statistics in self._all_statistics())

    def _solved(self) -> Readout:
        self._check_sums()
        version = self.statistics.version
        if self._readout is None or self._readout[0] != version:
            with exact():
                readout = self._readout_of_sums()
            limit, name = self._limit
            if readout.size > limit:  # shared statistics may allow more
                raise StateError(f"class {readout.size - 1} of the statistics is not below {name}={limit}")
            self._readout = (version, readout)
        return self._readout[1]

    def get_extra_state(self) -> dict[str, Any]:
        """Return format and options, as plain values."""
        return {"format": FORMAT, "head": type(self).__name__, **self.options}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._check_sums()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load the whole state, or refuse it before anything is changed."""
        advice = "build the head with the saved options, or reset it and learn again"
        options = Settings(self.get_extra_state(), FREE_OPTIONS, advice, self._added_options)
        table: dict[str, Kind] = {"_extra_state": options}
        parts: dict[str, Any] = dict(self.named_children())
        table |= {
            f"{part}.{name}": kind for part, child in parts.items() for name, kind in child._saved_table().items()
        }
        owner = type(self).__name__
        saved = read_state(state_dict, table, owner, prefix)
        taken: dict[str, dict[str, Any]] = {part: {} for part in parts}
        for name, value in saved.items():
            part, _, entry = name.partition(".")
            if entry:
                taken[part][entry] = value
            if entry in ("classes", "counts") and not torch.equal(value, saved[f"statistics.{entry}"]):
                raise StateError(f"{owner}: {name} is not that of statistics.{entry}; the file is damaged")
        with exact():
            for part, entries in taken.items():
                if entries:
                    parts[part]._take(entries)
                state_dict[f"{prefix}{part}."] = LOADED
