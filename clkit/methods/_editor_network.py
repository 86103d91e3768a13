"""The networks of an editor, which map the rows of a gradient to those of an edit, and the statistics of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clkit.arguments import check_arguments, in_short
from clkit.errors import ArgumentError, NotFittedError
from clkit.methods._checks import check_count, generator
from clkit.methods._decomposition import Rows
from clkit.methods._state import PlainState, exact
from clkit.schema import Numbers, Table

__all__ = ["EditorNetwork", "EditorNetworks", "RowStatistics", "positive_part"]

Transforms = Literal["joint", "separate", "inputs", "gradients", "smaller"]

_FORMAT = 1
_FLOOR = 1e-3  # of the mean deviation in the same half: what never moved must not be divided by next to nothing
_MOST = 1e100


def positive_part(values: Tensor) -> Tensor:
    """Return max(0, x) with a derivative of 1 at 0, where an editor starts; that of ``relu`` is 0, and it would stay.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> positive_part(x).sum().backward()
        >>> x.grad
        tensor([0., 1., 1.])
    """
    return torch.where(values < 0, 0.0, values)


class EditorNetwork(nn.Module):
    r"""Residual blocks of low rank that start as the identity: :math:`h + \sigma(s_l (U V h + b) + o_l)`.

    Args:
        width: d_z, of a row.
        rank: r, at most the width.
        blocks: How many.
        layers: How many layers share the network; each has a scale ``s`` and an offset ``o`` of its own.
        seed: Numbers that the values of V are a function of.

    Source: E. Mitchell et al., arXiv 2110.11309, section 3.2.
    """

    def __init__(self, width: int, rank: int, blocks: int, layers: int, seed: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        self.width = width
        rank = min(rank, width)
        self.U = nn.Parameter(torch.zeros(blocks, width, rank))
        self.V = nn.Parameter(torch.empty(blocks, rank, width))
        self.b = nn.Parameter(torch.zeros(blocks, width))
        self.s = nn.Parameter(torch.ones(blocks, layers, width))
        self.o = nn.Parameter(torch.zeros(blocks, layers, width))
        for block, values in enumerate(self.V.detach()):
            nn.init.xavier_uniform_(values, generator=generator(*seed, block))

    def forward(self, rows: Tensor, layer: int) -> Tensor:
        """Return rows (N, width) of the layer of this number, transformed."""
        for U, V, b, s, o in zip(self.U, self.V, self.b, self.s, self.o, strict=True):
            rows = rows + positive_part(s[layer] * (rows @ V.T @ U.T + b) + o[layer])
        return rows


class RowStatistics(PlainState):
    r"""Mean and deviation of each dimension of the rows of one layer, or of all layers of one shape.

    Rows are merged by Chan's rule in float64, so that any split and order gives the same. The deviation is never below
    a thousandth of its mean over the half of a row that it belongs to.

    Args:
        inputs: d_in.
        gradients: d_out.
        layers: Names of the layers whose rows are counted here.

    Attributes:
        mean: (d_in + d_out,) float64.
        M2: Likewise, squared deviations from it, summed.
        counts: (layers,) int64, rows seen of each.
    """

    def __init__(self, inputs: int, gradients: int, layers: list[str]) -> None:
        super().__init__()
        self.inputs, self.gradients, self.layers = inputs, gradients, list(layers)
        self.mean = torch.zeros(inputs + gradients, dtype=torch.float64)
        self.M2 = torch.zeros_like(self.mean)
        self.counts = torch.zeros(len(layers), dtype=torch.int64)

    def update(self, layer: str, rows: Rows) -> None:
        """Add the rows of a layer."""
        with exact():
            values = torch.cat(rows, dim=1).to(self.mean.device).to(torch.float64)  # MPS has no float64
            if len(values):
                mean = values.mean(dim=0)
                self._merge(len(values), mean, (values - mean).square().sum(dim=0))
                self.counts[self.layers.index(layer)] += len(values)

    def merge(self, other: RowStatistics) -> None:
        """Add all that another object of the same layers has seen."""
        with exact():
            self._merge(int(other.counts.sum()), other.mean.to(self.mean.device), other.M2.to(self.mean.device))
            self.counts += other.counts.to(self.counts.device)

    def check(self) -> None:
        """Raise a NotFittedError that names the layers that too few rows were seen of, or rows that never moved."""
        if few := [name for name, n in zip(self.layers, self.counts.tolist(), strict=True) if n < 2]:
            raise NotFittedError(
                f"the editor has seen less than 2 rows with a gradient of {few[:5]}: give fit_statistics() more edits, "
                "and leave out layers that no gradient reaches, as where a norm behind them has weights of 0 (layers=…)"
            )
        halves = torch.split(self.M2, [self.inputs, self.gradients])
        if still := [name for name, half in zip(("inputs", "gradients"), halves, strict=True) if not half.any()]:
            raise NotFittedError(f"the {still[0]} of {self.layers[:5]} are the same in each edit; give other edits")

    def sigma(self) -> Tensor:
        """Return the deviations, (d_in + d_out,) float64, not below their floor."""
        deviations = (self.M2 / (self.counts.sum() - 1)).sqrt()
        halves = torch.split(deviations, [self.inputs, self.gradients])
        return torch.cat([half.clamp(min=_FLOOR * float(half.mean())) for half in halves])

    def normalised(self, rows: Rows) -> Rows:
        """Return rows less the mean, divided by the deviations, in their own dtype."""
        sizes = [self.inputs, self.gradients]
        both = zip(rows, torch.split(self.mean, sizes), torch.split(self.sigma(), sizes), strict=True)
        return Rows(*((half - mean.to(half)) / sigma.to(half) for half, mean, sigma in both))

    def _merge(self, added: int, mean: Tensor, M2: Tensor) -> None:
        before = int(self.counts.sum())
        together = max(before + added, 1)
        delta = mean - self.mean
        self.mean = self.mean + delta * (added / together)
        self.M2 = self.M2 + M2 + delta.square() * (before * added / together)

    def _move(self, device: torch.device) -> None:
        self.mean, self.M2, self.counts = (each.to(device) for each in (self.mean, self.M2, self.counts))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "format"] = torch.tensor(_FORMAT)
        for name in ("mean", "M2", "counts"):
            destination[prefix + name] = getattr(self, name).clone()

    def _saved_table(self) -> Table:
        width = self.inputs + self.gradients
        return {
            "format": Numbers(least=_FORMAT, most=_FORMAT),
            "mean": Numbers((width,), torch.float64, most=_MOST),
            "M2": Numbers((width,), torch.float64, least=0, most=_MOST),
            "counts": Numbers((len(self.layers),), least=0, most=2**53),
        }

    def _take(self, saved: dict[str, Any]) -> None:
        self.mean, self.M2, self.counts = (saved[name].to(self._device, copy=True) for name in ("mean", "M2", "counts"))


class EditorNetworks(nn.Module):
    r"""What an editor learns: networks, a step size for each layer, and the statistics of the rows that go in.

    Of the rows of a layer it makes factors :math:`P = -\alpha_l \tilde\delta`, :math:`Q = \tilde u`, whose product
    :math:`P^\top Q` is to be added to the weight. Layers of one shape share a network and are told apart by its scales
    and offsets. It is all that has to be trained, and knows nothing of the network that is edited.

    Args:
        shapes: (d_out, d_in) of each layer by name, in the order in which a forward runs through them.
        rank: Of the blocks.
        n_hidden: Blocks after the first.
        norm_scope: Whether statistics are those of a ``"shape"``, of a ``"layer"``, or not used (``"none"``).
        share: Whether layers of one ``"shape"`` share a network, or ``"none"`` do.
        transforms: Which halves of a row go through a network: both in one (``"joint"``) or in two (``"separate"``),
            one of them, or the ``"smaller"`` one of each shape.
        seed: Of the first values.

    Raises:
        ArgumentError: If an argument is not allowed.

    Attributes:
        names: The layers.
        alpha_start: (L,) step sizes before any training.
        steps: (L,) what is learned of them: ``alpha`` as a multiple of its start.

    Source: E. Mitchell et al., arXiv 2110.11309, section 3.2 and table 6 (its variants).
    """

    alpha_start: Tensor

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        rank: int = 64,
        n_hidden: int = 1,
        norm_scope: Literal["shape", "layer", "none"] = "shape",
        share: Literal["shape", "none"] = "shape",
        transforms: Transforms = "joint",
        seed: int = 0,
    ) -> None:
        check_arguments(EditorNetworks, locals())
        super().__init__()
        if not shapes or not all(size > 0 for shape in shapes.values() for size in shape):
            raise ArgumentError(f"shapes must name at least one layer, each of sizes above 0, got {in_short(shapes)}")
        check_count("rank", rank)
        check_count("n_hidden", n_hidden, at_least=0)
        check_count("seed", seed, at_least=0)
        self.names, self.shapes = list(shapes), dict(shapes)
        self.norm_scope = norm_scope
        groups: dict[Any, list[str]] = {}
        for name, shape in shapes.items():
            groups.setdefault(shape if share == "shape" else name, []).append(name)
        self._network_of = {name: (at, own.index(name)) for at, own in enumerate(groups.values()) for name in own}
        self.networks = nn.ModuleList()
        for at, own in enumerate(groups.values()):
            parts = _parts(*shapes[own[0]], transforms)
            self.networks.append(
                nn.ModuleDict(
                    {
                        part: EditorNetwork(width, rank, n_hidden + 1, len(own), (seed, at, place))
                        for place, (part, width) in enumerate(parts.items())
                    }
                )
            )
        shared: dict[Any, list[str]] = {}
        for name, shape in shapes.items():
            shared.setdefault(shape if norm_scope == "shape" else name, []).append(name)
        self.statistics = nn.ModuleList(
            RowStatistics(shapes[own[0]][1], shapes[own[0]][0], own) for own in shared.values() if norm_scope != "none"
        )
        self._statistics_of = {name: at for at, own in enumerate(shared.values()) for name in own}
        self.steps = nn.Parameter(torch.ones(len(shapes)))
        self.register_buffer("alpha_start", torch.ones(len(shapes)))

    @property
    def alpha(self) -> Tensor:
        """The step sizes, (L,)."""
        return self.alpha_start * self.steps

    @property
    def is_identity(self) -> bool:
        """Whether the networks give rows back as they are, as before any training."""
        return not any(bool(parameter.any()) for name, parameter in self.named_parameters() if name[-1:] in "Ubo")

    def collect(self, rows: Mapping[str, Rows]) -> None:
        """Add rows to the statistics."""
        for name, each in rows.items():
            if self.norm_scope != "none":
                self._own_statistics(name).update(name, each)

    def check(self) -> None:
        """Raise a NotFittedError where statistics are missing."""
        for statistics in self.statistics:
            statistics.check()  # type: ignore[operator]  # a ModuleList says Module

    def fixed(self) -> list[Tensor]:
        """Return what is never trained, statistics and first step sizes, to be overwritten in place."""
        tensors = [self.alpha_start]
        for statistics in self.statistics:
            tensors += [getattr(statistics, name) for name in ("mean", "M2", "counts")]
        return tensors

    def forward(self, rows: Mapping[str, Rows]) -> dict[str, Rows]:
        """Return the factors Q (``inputs``) and P (``gradients``) of each layer, differentiable in all parameters."""
        factors = {}
        for at, name in enumerate(self.names):
            inputs, gradients = self._transformed(name, rows[name])
            factors[name] = Rows(inputs, -self.alpha[at] * gradients)
        return factors

    def _transformed(self, name: str, rows: Rows) -> Rows:
        given = rows if self.norm_scope == "none" else self._own_statistics(name).normalised(rows)
        at, layer = self._network_of[name]
        networks: Any = self.networks[at]
        if "joint" in networks:
            sizes = [half.shape[1] for half in given]
            return Rows(*networks["joint"](torch.cat(given, dim=1), layer).split(sizes, dim=1))
        return Rows(
            *(
                networks[part](half, layer) if part in networks else half
                for part, half in zip(("inputs", "gradients"), given, strict=True)
            )
        )

    def _own_statistics(self, name: str) -> Any:
        return self.statistics[self._statistics_of[name]]


def _parts(outputs: int, inputs: int, transforms: Transforms) -> dict[str, int]:
    """Return the networks of a shape with their widths."""
    widths = {"inputs": inputs, "gradients": outputs}
    if transforms == "joint":
        return {"joint": inputs + outputs}
    if transforms == "smaller":
        transforms = "inputs" if inputs < outputs else "gradients"
    return widths if transforms == "separate" else {transforms: widths[transforms]}
