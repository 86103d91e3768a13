r"""The d-Simplex head: a classifier that is fixed once and for all, so that features of all models are comparable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.arguments import check_arguments, in_short
from clkit.errors import ArgumentError, BatchError, CapacityError, SignatureError, StateError
from clkit.methods._checks import check_count, check_width
from clkit.methods._polytopes import Polytope, dimension, products, vertices
from clkit.methods.replay.contrast import wide
from clkit.schema import Numbers, OneOf, check_format, read_state

__all__ = ["ClassAllocator", "SimplexHead"]

_SHORTEST = 1e-12  # length up to which a feature has no direction
_PROBES = 4  # points at which two heads are compared


class SimplexHead(nn.Module):
    r"""A classifier whose prototypes are the vertices of a regular simplex, the same in every model, never trained.

    Models that learn with it gather the features of a class round the same vertex, so that queries of one can be
    searched in a gallery of another, without reading its images again. Choose K for all classes that will ever come:
    it cannot grow later, as a simplex of more vertices has other angles. With K vertices, d = K - 1 and a feature z:

    .. math::
        w_i = a e_i - b \mathbf{1}\ (i < d), \quad w_d = -c \mathbf{1}, \quad
        a = \sqrt{1 + 1/d}, \quad b = (\sqrt{d + 1} - 1) / d^{3/2}, \quad c = 1 / \sqrt{d}

    All :math:`w_i` have length 1 and cosine :math:`-1/d` with each other. The logits :math:`z \cdot w_i` come from z
    and the sum of its coordinates, in O(B d), so that no matrix is ever stored, cast or broadcast. They have neither
    bias nor scale, and z is not normalised before: its length does the scaling. All K logits belong in the
    cross-entropy, those of vertices without a class too: they keep room for classes to come.

    Where K is much larger than the number of classes, train with SGD or with weight decay. Adam without it leaves in z
    what the junction drew at random for vertices without a class. No other model shares that, so that a model finds its
    own rows and not theirs.

    Features are d wide, four times the bytes of a plain ResNet-18 feature at K = 2048; a
    :class:`~clkit.methods.FeatureBank` can keep them in half precision.

    Args:
        num_vertices: K, at least 2.
        in_features: D, the width of what goes in; ``None``: it is d wide already.
        junction: Whether a trainable linear layer without bias, ``junction``, maps D to d; ``"auto"``: where D is not
            d. Where D is below d, features lie in a subspace and reach the vertices only nearly.
        polytope: ``"simplex"``; or one of less dimensions, without the simplex's theory: ``"orthoplex"`` (vertices
            :math:`\pm e_i`, d = K/2) or ``"cube"`` (:math:`\pm 1/\sqrt{d}` in each coordinate, d = log2 K).

    Raises:
        ArgumentError: If an argument is not allowed, or the width does not fit without a junction.

    Example:
        >>> head = SimplexHead(num_vertices=4, in_features=8)
        >>> features, logits = head(torch.randn(2, 8))
        >>> features.shape, logits.shape, [name for name, _ in head.named_parameters()]
        (torch.Size([2, 3]), torch.Size([2, 4]), ['junction.weight'])
        >>> head.prototypes(dtype=torch.float32)[0]
        tensor([ 0.9623, -0.1925, -0.1925])

    Source: N. Biondi, F. Pernici, S. Ricci, A. Del Bimbo, CVPR 2024, arXiv 2405.02581, and its extension, TPAMI 2026,
    arXiv 2606.12488; polytopes: F. Pernici et al., TNNLS 2021, arXiv 2103.15632.
    """

    def __init__(
        self,
        num_vertices: int = 1024,
        in_features: int | None = None,
        *,
        junction: bool | Literal["auto"] = "auto",
        polytope: Polytope = "simplex",
    ) -> None:
        check_arguments(SimplexHead, locals())
        super().__init__()
        self.num_vertices = check_count("num_vertices", num_vertices, at_least=2)
        self.polytope: Polytope = polytope
        self.dim = dimension(polytope, num_vertices)
        self.in_features = self.dim if in_features is None else check_count("in_features", in_features)
        if junction == "auto":
            junction = self.in_features != self.dim
        if not junction and self.in_features != self.dim:
            raise ArgumentError(
                f"in_features={in_features} is not d={self.dim}, the dimension of {num_vertices} vertices, and "
                "junction=False leaves nothing to map it; use junction='auto'"
            )
        self.junction = nn.Linear(self.in_features, self.dim, bias=False) if junction else None

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, d), not normalised, and logits (B, K) for inputs (B, D).

        Both are float32, or float64 for float64 inputs; the junction alone computes under autocast.

        Raises:
            BatchError: If the inputs have another shape.
        """
        check_width("inputs", inputs, self.in_features)
        features = wide(inputs if self.junction is None else self.junction(inputs))
        return features, self.logits(features)

    def logits(self, features: Tensor) -> Tensor:
        """Return the products (B, K) of features (B, d) with all vertices, in float32 or float64."""
        check_width("features", features, self.dim)
        with torch.autocast(features.device.type, enabled=False):
            return products(self.polytope, self.num_vertices, wide(features))

    def embed(self, inputs: Tensor) -> Tensor:
        """Return what is searched: features (B, d) of length 1, for inputs (B, D); a zero feature stays zero."""
        return F.normalize(self(inputs)[0], dim=1, eps=_SHORTEST)

    def prototypes(self, rows: Iterable[int] | None = None, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the vertices (K, d), or those of some rows, on the CPU; built in float64.

        Raises:
            ArgumentError: If a row is not one of 0 … K - 1, or the dtype is narrower than float32: rounding in half
                precision is as large as the angles between vertices.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        numbers = torch.arange(self.num_vertices) if rows is None else torch.tensor(list(rows), dtype=torch.int64)
        if rows is not None:
            _check_vertices(numbers.tolist(), self.num_vertices)
        return vertices(self.polytope, self.num_vertices, numbers).to(dtype)

    def signature(self) -> str:
        """Return what says which vertices these are; features of models with the same one are comparable.

        Example:
            >>> SimplexHead(1024).signature()
            'axis-simplex-v1/1024'
        """
        return f"axis-{self.polytope}-v1/{self.num_vertices}"

    def check_compatible(self, other: SimplexHead) -> None:
        """Refuse another head whose features cannot be compared with this one's.

        Raises:
            SignatureError: If its signature differs, or its logits do at some fixed points, as those of a rotated
                simplex would.
        """
        if other.signature() != self.signature():
            raise SignatureError(
                f"a head with the vertices {other.signature()!r} cannot be compared with one of {self.signature()!r}; "
                "only models that were trained with the very same vertices are compatible"
            )
        drawn = torch.randn(_PROBES, self.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        own, others = self.logits(drawn), other.logits(drawn)
        if own.shape != others.shape or not torch.allclose(own, others, rtol=0, atol=1e-5):
            raise SignatureError(
                f"a {type(other).__name__} claims the vertices {self.signature()!r}, but its logits are others; "
                "it was trained with prototypes of its own, and its features are not comparable"
            )

    def extra_repr(self) -> str:
        """Return the settings, as ``print`` shows them."""
        return f"num_vertices={self.num_vertices}, dim={self.dim}, polytope={self.polytope!r}"


class ClassAllocator:
    """Which class has which vertex of a :class:`SimplexHead`: fixed once, only ever added to.

    New classes get the free vertices from the low or from the high end, in the order in which they are given. Models
    are compatible only if they give a class the same vertex: hand one allocation on (:meth:`state_dict`), or allocate
    all classes at once. Where two parties train, one takes the low side, the other the high one, and each reserves what
    the other uses.

    Args:
        num_vertices: K of the head.

    Raises:
        ArgumentError: If it is below 2.

    Example:
        >>> allocator = ClassAllocator(num_vertices=8)
        >>> allocator.allocate([30, 7]).tolist(), allocator.allocate([7, 4], side="high").tolist()
        ([0, 1], [1, 7])
        >>> allocator.rows(torch.tensor([4, 30, 30])).tolist()
        [7, 0, 0]
        >>> allocator.classes_of(torch.tensor([7, 3])).tolist()
        [4, -1]

    Source: N. Biondi et al., arXiv 2405.02581, section 5 (both sides of one simplex).
    """

    _format = 1

    def __init__(self, num_vertices: int) -> None:
        check_arguments(ClassAllocator, locals())
        self.num_vertices = check_count("num_vertices", num_vertices, at_least=2)
        self._row_of: dict[int, int] = {}
        self._reserved: set[int] = set()
        self._sorted: tuple[Tensor, Tensor] | None = None  # classes and their rows, made when they are asked for

    @property
    def classes(self) -> list[int]:
        """The class ids that have a vertex, sorted."""
        return sorted(self._row_of)

    @property
    def reserved(self) -> list[int]:
        """The vertices that are kept for classes of others, sorted."""
        return sorted(self._reserved)

    @property
    def free(self) -> int:
        """Number of vertices that are neither used nor reserved."""
        return self.num_vertices - len(self._row_of) - len(self._reserved)

    def allocate(self, classes: Iterable[int] | Tensor, side: Literal["low", "high"] = "low") -> Tensor:
        """Give vertices to classes that have none yet; return the row of each class given, int64 on the CPU.

        Raises:
            CapacityError: If there are too few; nothing is changed then.
            ArgumentError: If the classes are no ids from 0, or the side is neither.
        """
        if side not in ("low", "high"):
            raise ArgumentError(f"side must be 'low' or 'high', got {in_short(side)}")
        ids = _numbers("classes", classes)
        new = [each for each in dict.fromkeys(ids) if each not in self._row_of]
        if len(new) > self.free:
            raise CapacityError(
                f"{len(new)} new classes were asked for, but of {self.num_vertices} vertices {len(self._row_of)} are "
                f"used, {len(self._reserved)} reserved and {self.free} free. A simplex cannot grow without losing its "
                "galleries: build the head with more num_vertices from the start"
            )
        taken = self._reserved.union(self._row_of.values())
        every = range(self.num_vertices) if side == "low" else range(self.num_vertices - 1, -1, -1)
        free = (row for row in every if row not in taken)
        self._row_of.update(zip(new, free, strict=False))
        self._sorted = None
        return torch.tensor([self._row_of[each] for each in ids], dtype=torch.int64)

    def reserve(self, rows: Iterable[int] | Tensor) -> None:
        """Keep vertices that another model uses for classes of its own, whatever their ids are there.

        Raises:
            ArgumentError: If one is used by a class here, or is none of the vertices; nothing is changed then.
        """
        wanted = _numbers("rows", rows)
        _check_vertices(wanted, self.num_vertices)
        owners = {row: owner for owner, row in self._row_of.items()}
        if shared := sorted(owners.keys() & set(wanted)):
            raise ArgumentError(
                f"rows {shared[:10]} are already the vertices of classes {[owners[row] for row in shared[:10]]}; two "
                "classes with one vertex cannot be told apart: let one side allocate from 'low', the other from 'high'"
            )
        self._reserved.update(wanted)

    def join(self, other: ClassAllocator) -> None:
        """Take over another model's allocation, where equal ids mean the same classes.

        Raises:
            ArgumentError: If a class has another vertex there, a vertex another class, or K differs; nothing is
                changed then.
        """
        if other.num_vertices != self.num_vertices:
            raise ArgumentError(
                f"an allocation of {other.num_vertices} vertices cannot join one of {self.num_vertices}"
            )
        owners: dict[int, str] = {row: f"class {owner}" for owner, row in self._row_of.items()}
        owners |= dict.fromkeys(self._reserved, "others")
        for each, row in other._row_of.items():
            own = self._row_of.get(each)
            if own != row and (own is not None or row in owners):
                raise ArgumentError(
                    f"class {each} has vertex {row} in the other allocation; here it has {own}, and vertex {row} "
                    f"belongs to {owners.get(row, 'nobody')}: the two models are not compatible"
                )
        if clash := sorted(other._reserved & set(self._row_of.values())):
            raise ArgumentError(f"the other allocation has reserved rows {clash[:10]}, which classes here use")
        self._row_of.update(other._row_of)
        self._reserved |= other._reserved
        self._sorted = None

    def rows(self, labels: Tensor) -> Tensor:
        """Return the vertex of each label: int64 of the same shape, on the labels' device.

        A label without a vertex is refused on a CPU; elsewhere, where asking would wait for the device, it becomes -1,
        which the cross-entropy refuses.

        Raises:
            BatchError: If a label has no vertex, or the labels are no integers.
        """
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            raise BatchError(f"labels must be integer class ids, got {labels.dtype}; call .long() if they are whole")
        ids, rows = self._tables(labels.device)
        wanted = labels.detach().long()
        at = torch.searchsorted(ids, wanted.contiguous())
        found = torch.where(ids[at] == wanted, rows[at], -1)
        if found.device.type == "cpu" and bool((found < 0).any()):
            unknown = sorted(set(wanted[found < 0].tolist()))
            raise BatchError(f"labels {unknown[:10]} have no vertex; allocate their classes first")
        return found

    def classes_of(self, rows: Tensor) -> Tensor:
        """Return the class of each vertex, int64 of the same shape and device; -1 where it has none."""
        table = torch.full((self.num_vertices,), -1, dtype=torch.int64)
        ids, own = self._tables(torch.device("cpu"))
        table[own[:-1]] = ids[:-1]
        return table.to(rows.device)[rows]

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the classes and their rows, and at the end the largest number and -1, where a search ends in vain."""
        if self._sorted is None or self._sorted[0].device != device:
            ids = self.classes
            rows = [*(self._row_of[each] for each in ids), -1]
            self._sorted = torch.tensor([*ids, 2**63 - 1], device=device), torch.tensor(rows, device=device)
        return self._sorted

    def state_dict(self) -> dict[str, Any]:
        """Return the allocation as tensors and plain types."""
        ids = self.classes
        return {
            "format": self._format,
            "num_vertices": self.num_vertices,
            "classes": torch.tensor(ids, dtype=torch.int64),
            "rows": torch.tensor([self._row_of[each] for each in ids], dtype=torch.int64),
            "reserved": torch.tensor(self.reserved, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, in place of what is here.

        Raises:
            StateError: If it is damaged or of another number of vertices; nothing is changed then.
        """
        owner, last = type(self).__name__, self.num_vertices - 1
        distinct = "of distinct rows", lambda rows: len(set(rows.tolist())) == len(rows)
        table = {
            "format": OneOf((self._format,)),
            "num_vertices": OneOf((self.num_vertices,), "build it with the saved num_vertices, which cannot change"),
            "classes": Numbers(("C",), least=0, most=2**63 - 1, ids=True),
            "rows": Numbers(("C",), least=0, most=last, rule=distinct),
            "reserved": Numbers(("R",), least=0, most=last, ids=True),
        }
        saved = read_state(check_format(state, self._format, owner), table, owner)
        rows, reserved = saved["rows"].tolist(), set(saved["reserved"].tolist())
        if both := sorted(reserved.intersection(rows)):
            raise StateError(f"{owner}: rows {both[:10]} are used and reserved; the file is damaged")
        self._row_of = dict(zip(saved["classes"].tolist(), rows, strict=True))
        self._reserved, self._sorted = reserved, None


def _numbers(name: str, values: Iterable[int] | Tensor) -> list[int]:
    listed: list[Any] = values.flatten().tolist() if isinstance(values, Tensor) else list(values)
    for each in listed:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < 2**63:
            raise ArgumentError(f"{name} must be integers from 0, got {in_short(each)} among them")
    return listed


def _check_vertices(rows: list[int], number: int) -> None:
    for row in rows:
        if not 0 <= row < number:
            raise ArgumentError(f"rows must be from 0 to {number - 1}, as there are {number} vertices, got {row}")
