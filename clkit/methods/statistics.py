r"""Running sums of features per class, from which nearest-mean, LDA and ridge classifiers are read off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from clkit.distributed import gather_rows, report_lost_process, world_size
from clkit.errors import ArgumentError, BatchError, ConfigurationError, StateError
from clkit.methods._checks import Array, Batch, check_batch, check_count
from clkit.methods._gram import add_gram_, mirrored, new_gram
from clkit.methods._state import PlainState, exact
from clkit.schema import check_keys, check_saved, check_saved_ids

__all__ = ["FeatureStatistics"]

_FORMAT = 1
_CENTRE_LIMIT = 1e30  # centres are kept in float32, which ends at 3e38
_COUNT_LIMIT = 2**53  # larger numbers of samples are not whole in float64
_Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


class FeatureStatistics(PlainState):
    r"""Exact sums over everything seen so far: per-class counts and moments, and the Gram matrix.

    Use it where a classifier on fixed features must equal the one that is fitted to all data at once, whatever the
    order and the batch sizes in which they came. One row per class *seen*, sorted by class id; the size depends on
    the width and the number of classes only, never on the number of samples. With :math:`F_c` the rows of class c:

    .. math::
        n_c = |F_c|, \quad s_c = \sum_{f \in F_c} f, \quad M2_c = \sum_{f \in F_c} (f - s_c/n_c)^2, \quad
        G = \sum_f f f^\top

    ``M2`` is merged by Chan's rule, :math:`M2 \leftarrow M2_a + M2_b + \delta^2 n_a n_b / (n_a + n_b)`, in
    coordinates centred at the first row of each class, so that a common offset of the features costs no digits.
    Products are formed in float64, out of reach of autocast and TF32; only one triangle of ``G`` is computed.

    The tensors are no buffers: casts (``.half()``, ``precision="bf16-true"``) leave them alone, device moves do not,
    and ``DistributedDataParallel`` does not overwrite them. On devices without float64 (MPS) they stay on the CPU.

    On a CPU a batch is checked before anything changes. On other devices the labels are brought to the host (one small
    copy per batch, none if they are there already), but whether all features are finite is not asked: a flag on the
    device turns the update of a bad batch into a no-op, and the error with the number of the batch is raised by the
    next call that reads values (:meth:`check`, any property, ``state_dict``).

    In several processes each rank collects what it learns in a part of its own until :meth:`synchronize`; properties
    show the shared part and the own part together.

    Args:
        width: D, features per row.
        sums: Keep per-class sums (k, D).
        gram: Keep the Gram matrix (D, D).
        squares: Keep per-class centred squares (k, D); needs ``sums``.
        class_grams: Keep a Gram matrix per class (k, D, D); D² · 8 bytes a class.
        dtype: Of the stored sums, ``torch.float64``, or ``torch.float32`` for half the memory and about 7 digits.
        max_classes: Class ids must be below this; an id as large as 10⁹ is more often a mistake than a class.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> statistics = FeatureStatistics(2, squares=True)
        >>> statistics.update(torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]]), torch.tensor([7, 7, 3]))
        >>> statistics.classes, statistics.counts
        (tensor([3, 7]), tensor([1, 2]))
        >>> statistics.means
        tensor([[5., 5.],
                [2., 2.]], dtype=torch.float64)
        >>> statistics.squares
        tensor([[0., 0.],
                [2., 0.]], dtype=torch.float64)

    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.
    """

    def __init__(
        self,
        width: int,
        *,
        sums: bool = True,
        gram: bool = False,
        squares: bool = False,
        class_grams: bool = False,
        dtype: torch.dtype = torch.float64,
        max_classes: int = 65536,
    ) -> None:
        super().__init__()
        self.width = check_count("width", width)
        self.max_classes = check_count("max_classes", max_classes)
        if dtype not in (torch.float64, torch.float32):
            raise ArgumentError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
        if squares and not sums:
            raise ArgumentError("squares=True needs sums=True: centred squares are centred at the means")
        self.dtype = dtype
        self.parts = tuple(
            name
            for name, wanted in {"sums": sums, "gram": gram, "squares": squares, "class_grams": class_grams}.items()
            if wanted
        )
        self._steps = _Steps()
        self._bad: Tensor | None = None  # number of the first batch that was not finite, 0 for none
        self._shared = self._new_part()
        self._own: _Part | None = None
        self._both: tuple[int, _Part] | None = None  # version and sum of the two, while somebody reads

    # Learning ---------------------------------------------------------------------------------------------------

    def update(self, features: Tensor, targets: Tensor) -> None:
        """Add a batch. Rows with target -1 are unlabelled and skipped; an empty batch changes nothing.

        Args:
            features: (B, width) of any floating dtype; detached, upcast, not modified.
            targets: (B,) class ids of any integer dtype.

        Raises:
            BatchError: If the batch is malformed; nothing is changed then.
        """
        with exact():
            batch = self._check(features, targets)
            self._add(batch.features, batch)

    def merge(self, other: FeatureStatistics) -> None:
        """Add all that another object has learned, as if its batches had come here.

        In several processes what is merged counts as this rank's own: merge a thing on one rank, not on all.

        Args:
            other: Statistics of the same width and parts; not modified.

        Raises:
            ArgumentError: If it differs in width or parts, or has seen ids not below ``max_classes``.
        """
        if not isinstance(other, FeatureStatistics):
            raise ArgumentError(f"only another FeatureStatistics can be merged, got {type(other).__name__}")
        if (other.width, other.parts) != (self.width, self.parts):
            raise ArgumentError(
                f"cannot merge statistics of width {other.width} with {other.parts} into ones of width {self.width} "
                f"with {self.parts}; build both with the same arguments"
            )
        with exact():
            addition = other._read()
            if addition.ids.size and addition.ids[-1] >= self.max_classes:
                raise ArgumentError(
                    f"the other object has seen class {addition.ids[-1]}, not below max_classes={self.max_classes}"
                )
            self.check()
            self._learning_part().merge(addition.to(self._device, copy=other is self))
            self._steps.version += 1

    def subtract(self, features: Tensor, targets: Tensor) -> None:
        """Take samples out again, exactly: the sums become those of a stream that never held them.

        A class without rows left is removed. In several processes: :meth:`synchronize` first, then call this on all
        ranks with the same samples.

        Args:
            features: (B, width), the same numbers that were learned.
            targets: (B,) their class ids.

        Raises:
            BatchError: If the batch is malformed or takes more samples of a class than it has; nothing is changed.
            ConfigurationError: In several processes, if this rank holds increments that are not yet shared.
        """
        with exact():
            batch = self._check(features, targets)
            self._refuse_subtraction(batch)
            self._remove(batch.features, batch)

    def reset(self) -> None:
        """Forget everything."""
        self._shared, self._own, self._both, self._bad = self._new_part(), None, None, None
        self._steps.batches = 0
        self._steps.version += 1

    def synchronize(self, group: Any = None) -> None:
        """Exchange what each rank has learned since the last time, so that all ranks hold the same bits.

        A collective call: every rank of ``group`` makes it. Increments are folded in the order of the ranks and added
        to the shared part; a second call changes nothing. In one process there is nothing to exchange.

        Args:
            group: The process group, the default one if ``None``.

        Raises:
            BatchError: On all ranks, if any rank was given features that are not finite.
            ProcessLostError: If another process died meanwhile.
        """
        if world_size(group) == 1:
            self.check()
            return
        with exact():
            own = self._own if self._own is not None else self._new_part()
            with report_lost_process("what they learned"):
                total = _exchange(own, self._take_bad(), group, _communication_device(group, self._device))
            if total is not None:
                self._shared.merge(total.to(self._device))
                self._own = self._both = None
                self._steps.version += 1

    # Reading ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what a batch deserved that could not be refused at once (see the class), else do nothing.

        Raises:
            BatchError: With the number of the batch, counted from 1; said once. The batch was not learned.
        """
        raise_for_batch(self._take_bad())

    @property
    def classes(self) -> Tensor:
        """(k,) int64, ids of the classes seen, sorted."""
        return torch.from_numpy(self._read().ids.copy()).to(self._device)

    @property
    def counts(self) -> Tensor:
        """(k,) int64, samples seen of each class."""
        return self._read().tables["counts"].clone()

    @property
    def sums(self) -> Tensor:
        """(k, D), sum of the features of each class."""
        part = self._read("sums")
        if "squares" not in self.parts:
            return part.tables["sums"].clone()
        counts = part.tables["counts"].to(torch.float64)[:, None]
        centres = part.tables["centres"].to(torch.float64)
        return torch.addcmul(part.tables["sums"].to(torch.float64), counts, centres).to(self.dtype)

    @property
    def means(self) -> Tensor:
        """(k, D) float64, mean feature of each class."""
        part = self._read("sums")
        relative = part.tables["sums"].to(torch.float64) / part.tables["counts"][:, None]
        return relative + part.tables["centres"].to(torch.float64) if "squares" in self.parts else relative

    @property
    def squares(self) -> Tensor:
        """(k, D), squared deviations from the class mean, summed."""
        return self._read("squares").tables["squares"].clone()

    @property
    def deviations(self) -> Tensor:
        """(k, D) float64, standard deviation of each class (Bessel-corrected), 0 for a class of one sample."""
        part = self._read("squares")
        degrees = (part.tables["counts"] - 1).clamp(min=1)[:, None]
        return (part.tables["squares"].to(torch.float64) / degrees).sqrt()

    @property
    def gram(self) -> Tensor:
        """(D, D), sum of the outer products of all features with themselves; not centred."""
        return mirrored(self.lower_gram())

    @property
    def class_grams(self) -> Tensor:
        """(k, D, D), the same per class."""
        return mirrored(self.lower_class_grams())

    def lower_gram(self) -> Tensor:
        """The state's own (D, D), only the lower triangle of which means anything: for solvers, to copy from."""
        gram = self._read("gram").gram
        assert gram is not None
        return gram

    def lower_class_grams(self) -> Tensor:
        """The same per class, (k, D, D)."""
        return self._read("class_grams").tables["class_grams"]

    @property
    def samples(self) -> int:
        """Samples seen of all classes."""
        return int(self._read().tables["counts"].sum())

    def extra_repr(self) -> str:
        """Sizes, for ``print(statistics)``."""
        return f"width={self.width}, parts={self.parts}, classes={self._shared.ids.size}"

    @property
    def version(self) -> int:
        """Goes up with every change: tells a read-out whether its solution is still current."""
        return self._steps.version

    # Used by the heads ------------------------------------------------------------------------------------------

    def _check(self, features: Tensor, targets: Tensor) -> Batch:
        return check_batch(
            features, targets, self.width, below=self.max_classes, limit_name="max_classes", device=self._device
        )

    def _add(self, rows: Tensor, batch: Batch) -> None:
        """Add rows (n, width) that were computed from a checked batch."""
        self._steps.batches += 1
        if batch.ids.size == 0:
            return
        if batch.finite is not None:
            bad = torch.zeros((), dtype=torch.int64, device=self._device) if self._bad is None else self._bad
            self._bad = torch.where(batch.finite | (bad > 0), bad, self._steps.batches)
        self._learning_part().add(rows, batch)
        self._steps.version += 1

    def _refuse_subtraction(self, batch: Batch) -> None:
        if batch.finite is not None and not bool(batch.finite):
            raise BatchError("features to subtract are not finite; nothing was changed")
        if self._own is not None:
            raise ConfigurationError("call synchronize() on all ranks before subtract()")
        part = self._read()
        held = dict(zip(part.ids.tolist(), part.tables["counts"].tolist(), strict=True))
        for class_id, count in zip(batch.ids.tolist(), batch.counts.tolist(), strict=True):
            if count > held.get(class_id, 0):
                raise BatchError(
                    f"cannot subtract {count} samples of class {class_id}: only {held.get(class_id, 0)} were learned; "
                    f"nothing was changed"
                )

    def _remove(self, rows: Tensor, batch: Batch) -> None:
        if batch.ids.size:
            self._shared.remove(rows, batch)
            self._steps.version += 1

    def _take_bad(self) -> int:
        """Number of the first batch that was masked since the last call, else 0; drops the rows it has opened."""
        bad, self._bad = self._bad, None
        number = 0 if bad is None else int(bad)
        if number:
            self._shared.drop_empty()
            if self._own is not None:
                self._own.drop_empty()
        return number

    def _read(self, part: str | None = None) -> _Part:
        """Everything learned, shared and own; not to be changed."""
        if part is not None and part not in self.parts:
            raise ConfigurationError(f"these statistics keep {self.parts}, not {part!r}; build them with {part}=True")
        self.check()
        if self._own is None or self._own.ids.size == 0:
            return self._shared
        if self._both is None or self._both[0] != self.version:
            with exact():
                both = self._shared.to(self._device, copy=True)
                both.merge(self._own)
            self._both = (self.version, both)
        return self._both[1]

    def _learning_part(self) -> _Part:
        if world_size() == 1 and self._own is None:
            return self._shared
        self._both = None
        if self._own is None:
            self._own = self._new_part()
        return self._own

    def _new_part(self) -> _Part:
        with exact():
            return _Part(self.width, self.parts, self.dtype, self._device)

    # State ------------------------------------------------------------------------------------------------------

    def _move(self, device: torch.device) -> None:
        self._shared = self._shared.to(device)
        self._own = None if self._own is None else self._own.to(device)
        self._both = None
        self._bad = None if self._bad is None else self._bad.to(device)
        self._steps.version += 1

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        part = self._read()
        with exact():
            values = {
                "format": torch.tensor(_FORMAT),
                "width": torch.tensor(self.width),
                "classes": torch.from_numpy(part.ids.copy()),
                **{name: table.clone() for name, table in part.tables.items()},
            }
            if part.gram is not None:
                values["gram"] = mirrored(part.gram)
        destination.update({prefix + name: value for name, value in values.items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        part = self._parse(state_dict, prefix)
        with exact():
            self._shared, self._own, self._both, self._bad = part.to(self._device, copy=True), None, None, None
        self._steps.version += 1

    def _parse(self, state_dict: Mapping[str, Any], prefix: str) -> _Part:
        """The saved part, checked to fit this object and to make sense, without touching this object.

        Raises:
            StateError: If it does not, naming what differs.
        """
        expected = ["format", "width", "classes", *self._shared.tables]
        expected += ["gram"] if "gram" in self.parts else []
        check_keys(state_dict, prefix, expected)
        missing = [prefix + name for name in expected if prefix + name not in state_dict]
        if missing:
            raise StateError(f"the saved state does not fit statistics with {self.parts}: it has no {missing}")
        found = {name: state_dict[prefix + name] for name in expected}
        for name, own in (("format", _FORMAT), ("width", self.width)):
            saved = int(check_saved(prefix + name, found[name], (), torch.int64))
            if saved != own:
                raise StateError(f"{prefix + name} is {saved} in the saved state, {own} here")
        ids = check_saved_ids(prefix + "classes", found["classes"])
        if ids.size and ids[-1] >= self.max_classes:
            raise StateError(f"{prefix}classes has id {ids[-1]}, not below max_classes={self.max_classes}")
        part = _Part(self.width, self.parts, self.dtype, torch.device("cpu"))
        part.ids = ids
        part.tables = {
            name: check_saved(prefix + name, found[name], (ids.size, *table.shape[1:]), table.dtype)
            for name, table in part.tables.items()
        }
        if part.gram is not None:
            part.gram = check_saved(prefix + "gram", found["gram"], tuple(part.gram.shape), part.gram.dtype)
            if not torch.equal(part.gram, part.gram.mT):
                raise StateError(f"{prefix}gram is not symmetric: the file is damaged")
        counts = part.tables["counts"]
        if bool(((counts <= 0) | (counts > _COUNT_LIMIT)).any()):
            raise StateError(f"{prefix}counts must be positive, and at most {_COUNT_LIMIT}, got {counts}")
        if "squares" in part.tables and bool((part.tables["squares"] < 0).any()):
            raise StateError(f"{prefix}squares has negative values: the file is damaged")
        return part


class _Steps:
    """What is counted with every batch, outside the module, where setting an attribute costs as much as a product."""

    __slots__ = ("batches", "version")

    def __init__(self) -> None:
        self.batches = 0
        self.version = 0


class _Part:
    """The tensors of one share of the data: tables with a row per class, and the Gram.

    With squares, ``sums`` holds the sum of ``feature - centre``, where the centre of a class is its first row rounded
    to float32: means and squares then keep their digits whatever the offset of the features.
    """

    def __init__(self, width: int, parts: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.ids: _Ids = np.empty(0, dtype=np.int64)
        self.tables = {"counts": torch.zeros(0, dtype=torch.int64, device=device)}
        if "squares" in parts:
            self.tables["centres"] = torch.zeros(0, width, dtype=torch.float32, device=device)
        for name, shape in {"sums": (width,), "squares": (width,), "class_grams": (width, width)}.items():
            if name in parts:
                self.tables[name] = torch.zeros(0, *shape, dtype=dtype, device=device)
        self.gram = new_gram(width, dtype, device) if "gram" in parts else None

    def to(self, device: torch.device, copy: bool = False) -> _Part:
        """The same on ``device``, sharing memory where nothing moves unless ``copy``."""
        moved = object.__new__(_Part)
        moved.ids = self.ids
        moved.tables = {name: table.to(device, copy=copy) for name, table in self.tables.items()}
        moved.gram = self.gram
        if self.gram is not None and (copy or self.gram.device != device):
            moved.gram = new_gram(self.gram.shape[0], self.gram.dtype, device).copy_(self.gram)
        return moved

    def add(self, rows: Tensor, batch: Batch) -> None:
        at = self._include(batch.ids)
        own = self._rows(at, batch.on_host)
        rows = batch.masked(rows)
        if "squares" in self.tables:
            _add_centred(own, batch.array(rows), batch)
        elif "sums" in self.tables:
            own.increase("sums", batch.summed(batch.array(rows)))
        own.increase("counts", batch.masked(batch.counts))
        if self.gram is not None:
            add_gram_(self.gram, rows)
        for position, lower in self._grams_of(at):
            add_gram_(lower, rows[batch.inverse == position])

    def remove(self, rows: Tensor, batch: Batch) -> None:
        """Take rows out; the caller has made sure that they are there."""
        at = np.searchsorted(self.ids, batch.ids)
        own = self._rows(at, batch.on_host)
        if "squares" in self.tables:
            _remove_centred(own, batch.array(rows), batch)
        elif "sums" in self.tables:
            own.put("sums", own["sums"] - batch.summed(batch.array(rows)))
        own.put("counts", own["counts"] - batch.counts)
        for position, lower in self._grams_of(at):
            add_gram_(lower, rows[batch.inverse == position], -1.0)
        if self.gram is not None:
            add_gram_(self.gram, rows, -1.0)
        self.drop_empty()
        if self.gram is not None and self.ids.size == 0:
            self.gram.zero_()  # nothing is left, not even rounding

    def merge(self, other: _Part) -> None:
        own = self._rows(self._include(other.ids))
        before, added = own.double("counts")[:, None], other.tables["counts"][:, None]
        if "sums" in self.tables:
            total = other.tables["sums"].to(torch.float64)
            if "squares" in self.tables:
                origins = other.tables["centres"].to(torch.float64)
                _open_centres(own, before == 0, origins)
                total = total + (origins - own["centres"]) * added
                _merge_squares(own, before, added, total / added, other.tables["squares"].to(torch.float64))
            own.increase("sums", total)
        if "class_grams" in self.tables:
            own.increase("class_grams", other.tables["class_grams"])
        own.increase("counts", other.tables["counts"])
        if self.gram is not None and other.gram is not None:
            self.gram.add_(other.gram)

    def drop_empty(self) -> None:
        """Remove classes without samples."""
        kept = self.tables["counts"] > 0
        if not bool(kept.all()):
            self.tables = {name: table[kept] for name, table in self.tables.items()}
            self.ids = self.ids[kept.cpu().numpy()]

    def _include(self, ids: _Ids) -> _Ids:
        """Positions of ``ids``, after opening a row of zeros for each new one."""
        at = np.searchsorted(self.ids, ids)
        # none is new: the usual case by far
        if ids.size == 0 or (at[-1] < self.ids.size and (self.ids[at] == ids).all()):
            return at
        union = np.union1d(self.ids, ids)
        device = self.tables["counts"].device
        old = torch.from_numpy(np.searchsorted(union, self.ids)).to(device)
        for name, table in self.tables.items():
            grown = table.new_zeros((union.size, *table.shape[1:]))
            self.tables[name] = grown.index_copy_(0, old, table)
        self.ids = union
        return np.searchsorted(union, ids)

    def _rows(self, at: _Ids, on_host: bool = False) -> _Rows:
        if on_host:
            return _Rows({name: table.numpy() for name, table in self.tables.items()}, at)
        return _Rows(self.tables, torch.from_numpy(at).to(self.tables["counts"].device))

    def _grams_of(self, at: _Ids) -> list[tuple[int, Tensor]]:
        if "class_grams" not in self.tables:
            return []
        return [(position, self.tables["class_grams"][row]) for position, row in enumerate(at.tolist())]


class _Rows:
    """The rows of some classes in the tables of a part: of its tensors, or of numpy's view of their memory."""

    __slots__ = ("at", "tables")

    def __init__(self, tables: Mapping[str, Array], at: Array) -> None:
        self.tables = tables
        self.at = at

    def __getitem__(self, name: str) -> Array:
        """A copy of the rows."""
        return self.tables[name][self.at]

    def double(self, name: str) -> Array:
        """The same in float64."""
        rows = self[name]
        return rows.astype(np.float64, copy=False) if isinstance(rows, np.ndarray) else rows.to(torch.float64)

    def increase(self, name: str, values: Array) -> None:
        """Add to the rows: in the wider of the two dtypes, rounded once."""
        self.put(name, self[name] + values)

    def put(self, name: str, values: Array) -> None:
        """Replace the rows."""
        table = self.tables[name]
        table[self.at] = values if isinstance(table, np.ndarray) else values.to(table.dtype)


def _add_centred(own: _Rows, rows: Array, batch: Batch) -> None:
    """Sums and squares in coordinates centred at the first row of each class; counts are still those before."""
    before = own.double("counts")[:, None]
    if batch.finite is not None or not before.all():
        _open_centres(own, before == 0, rows[batch.first])
    relative = batch.masked(rows - own.double("centres")[batch.inverse])
    total = batch.summed(relative)
    means = total / batch.weights
    deviations = batch.masked(relative - means[batch.inverse])
    deviations *= deviations
    spread = batch.summed(deviations)
    _merge_squares(own, before, batch.masked(batch.weights), means, spread)
    own.increase("sums", total)


def _remove_centred(own: _Rows, rows: Array, batch: Batch) -> None:
    """The opposite of :func:`_add_centred`; counts are still those before."""
    before = own.double("counts")[:, None]
    after = before - batch.weights
    relative = rows - own["centres"][batch.inverse]
    total = batch.summed(relative)
    means = total / batch.weights
    deviations = relative - means[batch.inverse]
    rest = own.double("sums") - total
    delta = means - rest / _at_least_one(after)
    squares = own["squares"] - batch.summed(deviations * deviations) - delta * delta * (after * batch.weights / before)
    own.put("squares", squares.clip(0) * (after > 1))
    own.put("sums", rest)


def _open_centres(own: _Rows, fresh: Array, rows: Array) -> None:
    """A class without samples yet takes its row of ``rows`` for its centre."""
    new = rows.clip(-_CENTRE_LIMIT, _CENTRE_LIMIT)
    own.put("centres", new * fresh + own["centres"] * ~fresh)


def _merge_squares(own: _Rows, before: Array, added: Array, means: Array, spread: Array) -> None:
    """Chan's rule; ``sums`` and ``counts`` are still those from before."""
    delta = own.double("sums") / _at_least_one(before)
    delta -= means
    delta *= delta
    delta *= before * added / _at_least_one(before + added)
    delta += spread
    own.increase("squares", delta)


def _at_least_one(count: Array) -> Array:
    return count + (count == 0)


def raise_for_batch(number: int, rank: int | None = None) -> None:
    """Raise the error of a batch that was masked on its device; 0 is no batch."""
    if number:
        where = "" if rank is None else f" of rank {rank}"
        raise BatchError(
            f"features of batch number {number}{where} were not finite (or above 1e+100 in magnitude); "
            f"that batch was not learned, everything else is unchanged"
        )


def _communication_device(group: Any, own: torch.device) -> torch.device:
    backend = dist.get_backend(group)
    if backend == "gloo":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else own


def _exchange(own: _Part, bad: int, group: Any, device: torch.device) -> _Part | None:
    """The sum of all ranks' parts with the same bits on every rank, or ``None`` if nobody has anything."""
    headers = gather_rows(torch.tensor([own.ids.size, bad], device=device), [2] * world_size(group), group=group)
    sizes = [int(header[0]) for header in headers]
    for rank, header in enumerate(headers):
        raise_for_batch(int(header[1]), rank)
    if max(sizes) == 0:
        return None
    part = own.to(device)
    names = [name for name in part.tables if name != "class_grams"]
    rows = {"ids": torch.from_numpy(part.ids).to(device), **{name: part.tables[name] for name in names}}
    gathered = {name: gather_rows(table, sizes, group=group) for name, table in rows.items()}
    total = _empty_part(part, names)
    for rank in range(len(sizes)):
        share = _empty_part(part, names)
        share.ids = gathered["ids"][rank].cpu().numpy()
        share.tables = {name: gathered[name][rank] for name in names}
        total.merge(share)
    if part.gram is not None:
        total.gram = part.gram.clone()
        dist.all_reduce(total.gram, group=group)
    if "class_grams" in part.tables:
        total.tables["class_grams"] = _reduce_class_grams(part, total.ids, group)
    return total


def _reduce_class_grams(part: _Part, ids: _Ids, group: Any) -> Tensor:
    table = part.tables["class_grams"]
    total = table.new_zeros((ids.size, *table.shape[1:]))
    total[torch.from_numpy(np.searchsorted(ids, part.ids)).to(table.device)] = table
    for one in total:  # class by class: the whole is too large for one message
        dist.all_reduce(one, group=group)
    return total


def _empty_part(part: _Part, names: list[str]) -> _Part:
    """A part without classes that has the given tables of ``part`` and no Gram."""
    empty = object.__new__(_Part)
    empty.ids = part.ids[:0]
    empty.tables = {name: part.tables[name][:0].clone() for name in names}
    empty.gram = None
    return empty
