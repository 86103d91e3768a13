r"""Running sums of features per class, from which nearest-mean, LDA and ridge classifiers are read off."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.distributed import report_lost_process, world_size
from clkit.errors import ArgumentError, BatchError, ConfigurationError
from clkit.methods._checks import Batch, check_batch, check_count
from clkit.methods._gram import mirrored
from clkit.methods._state import PlainState, exact
from clkit.methods._sums import Sums, exchange_sums, masked_batch_error
from clkit.schema import Numbers, Table

__all__ = ["FeatureStatistics"]

_FORMAT = 1
_COUNT_LIMIT = 2**53  # larger numbers of samples are not whole in float64
_SQUARE_LIMIT = 1e240  # sums of squares and products of features stay below it


class FeatureStatistics(PlainState):
    r"""Exact sums over everything seen so far: per-class counts and moments, and the Gram matrix.

    Use it where a classifier on fixed features must equal the one that is fitted to all data at once, whatever the
    order and the batch sizes in which they came. One row per class *seen*, sorted by class id; the size depends on
    the width and the number of classes only. With :math:`F_c` the rows of class c:

    .. math::
        n_c = |F_c|, \quad s_c = \sum_{f \in F_c} f, \quad M2_c = \sum_{f \in F_c} (f - s_c/n_c)^2, \quad
        G = \sum_f f f^\top

    ``M2`` is merged by Chan's rule, :math:`M2 \leftarrow M2_a + M2_b + \delta^2 n_a n_b / (n_a + n_b)`, in
    coordinates centred at the first row of each class, so that a common offset of the features costs no digits.
    Products are formed in float64, out of reach of autocast and TF32.

    The tensors are no buffers: casts (``.half()``, ``precision="bf16-true"``) leave them alone, device moves do not,
    and ``DistributedDataParallel`` does not overwrite them. On devices without float64 (MPS) they stay on the CPU.

    On a CPU a batch is checked before anything changes. Elsewhere a flag on the device turns the update of a batch that
    is not finite into a no-op, and the error with its number is raised by the next call that reads values
    (:meth:`check`, any property, ``state_dict``).

    In several processes each rank collects what it learns in a part of its own until :meth:`synchronize`; properties
    show the shared part and the own part together.

    Args:
        width: D, features per row.
        sums: Keep per-class sums (k, D).
        gram: Keep the Gram matrix (D, D).
        scatter: Keep the within-class scatter (D, D), to which an offset costs no digits; needs ``sums``.
        squares: Keep per-class centred squares (k, D); needs ``sums``.
        class_grams: Keep a Gram matrix per class (k, D, D); D² · 8 bytes a class.
        dtype: Of the stored sums, ``torch.float64``, or ``torch.float32`` for half the memory and about 7 digits.
        max_classes: Class ids must be below this; an id as large as 10⁹ is more often a mistake than a class.

    Attributes:
        kept: Which of the five are kept, by the names of the arguments.

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
        scatter: bool = False,
        dtype: torch.dtype = torch.float64,
        max_classes: int = 65536,
    ) -> None:
        check_arguments(FeatureStatistics, locals())
        super().__init__()
        self.width = check_count("width", width)
        self.max_classes = check_count("max_classes", max_classes)
        if dtype not in (torch.float64, torch.float32):
            raise ArgumentError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
        if (squares or scatter) and not sums:
            name = "squares" if squares else "scatter"
            raise ArgumentError(f"{name}=True needs sums=True: what is centred is centred at the means")
        self.dtype = dtype
        asked = {"sums": sums, "gram": gram, "squares": squares, "class_grams": class_grams, "scatter": scatter}
        self.kept = tuple([name for name in asked if asked[name]])
        # counted with every batch: setting an attribute of a module costs as much as a small product
        self._steps = SimpleNamespace(batches=0, version=0)
        self._bad: Tensor | None = None  # number of the first batch that was not finite, 0 for none
        self._shared = self._new_part()
        self._own: Sums | None = None
        self._both: tuple[int, Sums] | None = None  # version and sum of the two, while somebody reads

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

        Raises:
            ArgumentError: If the other differs in width or in what it keeps, or has seen ids not below
                ``max_classes``; it is not modified.
        """
        if not isinstance(other, FeatureStatistics):
            raise ArgumentError(f"only another FeatureStatistics can be merged, got {type(other).__name__}")
        if (other.width, other.kept) != (self.width, self.kept):
            raise ArgumentError(
                f"cannot merge statistics of width {other.width} with {other.kept} into ones of width {self.width} "
                f"with {self.kept}; build both with the same arguments"
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
        ranks with the same samples, and the same numbers that :meth:`update` took.

        Raises:
            BatchError: If the batch is malformed or takes more samples of a class than it has; nothing is changed.
            ConfigurationError: In several processes, if this rank holds increments that are not yet shared.
        """
        with exact():
            batch = self._check(features, targets)
            self._check_removal(batch)
            self._remove(batch.features, batch)

    def reset(self) -> None:
        """Forget everything."""
        self._shared, self._own, self._both, self._bad = self._new_part(), None, None, None
        self._steps.batches = 0
        self._steps.version += 1

    def synchronize(self, group: Any = None) -> None:
        """Exchange what each rank has learned since the last time, so that all ranks hold the same bits.

        A collective call: every rank of ``group`` (the default one if ``None``) makes it. Increments are folded in the
        order of the ranks and added to the shared part; a second call changes nothing.

        Raises:
            BatchError: On all ranks, if any rank was given features that are not finite.
            ProcessLostError: If another process died meanwhile.
        """
        if world_size(group) == 1:
            if self._bad is not None:
                self.check()
            return
        with exact():
            own = self._own if self._own is not None else self._new_part()
            with report_lost_process("what they learned"):
                total = exchange_sums(own, self._take_bad(), group)
            if total is not None:
                self._shared.merge(total.to(self._device))
                self._own = self._both = None
                self._steps.version += 1

    def check(self) -> None:
        """Raise the error of a batch that could not be refused at once (see the class), else do nothing.

        Raises:
            BatchError: With the number of the batch, counted from 1; said once. The batch was not learned.
        """
        if number := self._take_bad():
            raise masked_batch_error(number)

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
        tables = self._read("sums").tables
        if "centres" not in tables:
            return tables["sums"].clone()
        sums, centres, counts = (tables[name].to(torch.float64) for name in ("sums", "centres", "counts"))
        return torch.addcmul(sums, counts[:, None], centres).to(self.dtype)

    @property
    def means(self) -> Tensor:
        """(k, D) float64, mean feature of each class."""
        tables = self._read("sums").tables
        relative = tables["sums"].to(torch.float64) / tables["counts"][:, None]
        return relative + tables["centres"].to(torch.float64) if "centres" in tables else relative

    @property
    def squares(self) -> Tensor:
        """(k, D), squared deviations from the class mean, summed."""
        return self._read("squares").tables["squares"].clone()

    @property
    def deviations(self) -> Tensor:
        """(k, D) float64, standard deviation of each class (Bessel-corrected), 0 for a class of one sample."""
        tables = self._read("squares").tables
        degrees = (tables["counts"] - 1).clamp(min=1)[:, None]
        return (tables["squares"].to(torch.float64) / degrees).sqrt()

    @property
    def gram(self) -> Tensor:
        """(D, D), sum of the outer products of all features with themselves; not centred."""
        return mirrored(self.lower_gram())

    @property
    def class_grams(self) -> Tensor:
        """(k, D, D), the same per class."""
        return mirrored(self.lower_class_grams())

    def lower_gram(self) -> Tensor:
        """Return the state's own (D, D), only the lower triangle of which means anything: for solvers, to copy from."""
        part = self._read("gram" if "gram" in self.kept or "scatter" not in self.kept else "scatter")
        if part.gram is None:
            return part.scatter_around(part.tables["centres"].to(torch.float64))
        return part.gram

    @property
    def scatter(self) -> Tensor:
        """(D, D) float64, outer products of the features less the mean of their class, summed over all classes."""
        part = self._read("scatter")
        moves = -part.tables["sums"].to(torch.float64) / part.tables["counts"][:, None]
        return mirrored(part.scatter_around(moves).to(torch.float64))

    def lower_class_grams(self) -> Tensor:
        """Return the same per class, (k, D, D)."""
        return self._read("class_grams").tables["class_grams"]

    @property
    def samples(self) -> int:
        """Samples seen of all classes."""
        return int(self._read().tables["counts"].sum())

    def extra_repr(self) -> str:
        """Return the sizes, for ``print(statistics)``."""
        return f"width={self.width}, kept={self.kept}, classes={self._shared.ids.size}"

    @property
    def version(self) -> int:
        """Goes up with every change: tells a read-out whether its solution is still current."""
        return int(self._steps.version)

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

    def _check_removal(self, batch: Batch) -> None:
        """Refuse a batch that has samples of a class that are not there."""
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
        """Return the number of the first batch masked since the last call, else 0; drop the rows it has opened."""
        bad, self._bad = self._bad, None
        if number := 0 if bad is None else int(bad):
            self._shared.drop_empty()
            if self._own is not None:
                self._own.drop_empty()
        return number

    def _read(self, name: str | None = None) -> Sums:
        """Return everything learned, shared and own; not to be changed."""
        if name is not None and name not in self.kept:
            raise ConfigurationError(f"these statistics keep {self.kept}, not {name!r}; build them with {name}=True")
        if self._bad is not None:
            self.check()
        if self._own is None or self._own.ids.size == 0:
            return self._shared
        if self._both is None or self._both[0] != self.version:
            with exact():
                self._both = (self.version, self._shared.to(self._device, copy=True))
                self._both[1].merge(self._own)
        return self._both[1]

    def _learning_part(self) -> Sums:
        if world_size() == 1 and self._own is None:
            return self._shared
        self._both = None
        if self._own is None:
            self._own = self._new_part()
        return self._own

    def _new_part(self) -> Sums:
        with exact():
            return Sums.empty(self.width, self.kept, self.dtype, self._device)

    def _move(self, device: torch.device) -> None:
        self._shared = self._shared.to(device)
        self._own = None if self._own is None else self._own.to(device)
        self._both = None
        self._bad = None if self._bad is None else self._bad.to(device)
        self._steps.version += 1

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        part = self._read()
        with exact():
            destination[prefix + "format"] = torch.tensor(_FORMAT)
            destination[prefix + "classes"] = torch.from_numpy(part.ids.copy())
            for name, table in part.tables.items():
                destination[prefix + name] = table.clone()
            for name, gram in (("gram", part.gram), ("scatter", part.scatter)):
                if gram is not None:
                    destination[prefix + name] = mirrored(gram)

    def _saved_table(self) -> Table:
        width, dtype, most = self.width, self.dtype, _SQUARE_LIMIT
        symmetric = ("symmetric", lambda gram: torch.equal(gram, gram.mT))
        product = Numbers((width, width), dtype, most=most, rule=symmetric)
        kinds = {
            "counts": Numbers(("C",), least=1, most=_COUNT_LIMIT),
            "centres": Numbers(("C", width), torch.float32),
            "sums": Numbers(("C", width), dtype),
            "squares": Numbers(("C", width), dtype, least=0, most=most),
            "class_grams": Numbers(("C", width, width), dtype, most=most),
            "gram": product,
            "scatter": product,
        }
        return {
            "format": Numbers(least=_FORMAT, most=_FORMAT),
            "classes": Numbers(("C",), least=0, most=self.max_classes - 1, ids=True),
            **{name: kinds[name] for name in (*self._shared.tables, *self.kept)},
        }

    def _take(self, saved: dict[str, Any]) -> None:
        ids = saved["classes"].cpu().numpy().copy()
        part = Sums(ids, {name: saved[name] for name in self._shared.tables}, saved.get("gram"), saved.get("scatter"))
        self._shared, self._own, self._both, self._bad = part.to(self._device, copy=True), None, None, None
        self._steps.version += 1
