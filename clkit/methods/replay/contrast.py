"""The embedding that contrastive losses compare, and contrasts of class means, of views, and of images of a class."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm
from torch.nn import functional as F

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import check_choice, check_count, check_number
from clkit.methods.replay.rows import check_labels

__all__ = [
    "Projector",
    "PrototypeContrast",
    "check_rows",
    "draw_offset",
    "instance_contrast",
    "prototype_contrast",
    "supervised_contrast",
    "wide",
]

_EPSILON = 1e-8  # keeps the logarithm of the instance contrast finite
_SHORTEST = 1e-12  # vectors up to this length have no direction


class Projector(nn.Module):
    r"""Maps features to rows of length 1: :math:`z = g(f) / \lVert g(f) \rVert`.

    Args:
        in_features: D.
        out_features: p, at most D.
        kind: ``"linear"``: g is one linear layer; ``"mlp"``: two, with D hidden units and a ReLU between.
        seed: Of the first weights; the global random states are left alone.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> lengths = Projector(8, 4)(torch.randn(3, 8)).norm(dim=1)
        >>> torch.allclose(lengths, torch.ones(3))
        True
    """

    def __init__(
        self, in_features: int, out_features: int, kind: Literal["linear", "mlp"] = "linear", *, seed: int = 0
    ) -> None:
        check_arguments(Projector, locals())
        super().__init__()
        if check_count("out_features", out_features) > check_count("in_features", in_features):
            raise ArgumentError(
                f"out_features={out_features} is above in_features={in_features}; an embedding is at most as wide"
            )
        generator = torch.Generator().manual_seed(check_count("seed", seed, at_least=0))
        last = _linear(in_features, out_features, generator)
        hidden = [_linear(in_features, in_features, generator), nn.ReLU()] if kind == "mlp" else []
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, features: Tensor) -> Tensor:
        """Return unit rows (B, p), float32 (float64 for float64 features), for features (B, D)."""
        return F.normalize(wide(self.layers(features)), dim=1)


def _linear(in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    """Return a layer with torch's own first weights, drawn from the generator and not from the global random states."""
    layer = nn.Linear(in_features, out_features, device="meta").to_empty(device="cpu")
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(in_features)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


class PrototypeContrast(NamedTuple):
    """What :func:`prototype_contrast` gives.

    Attributes:
        loss: Scalar.
        ids: (K,) int64, the classes of the batch, ascending, where the labels are.
        means: (K, p) detached means of both views, not normalised.
    """

    loss: Tensor
    ids: Tensor
    means: Tensor


def prototype_contrast(first: Tensor, second: Tensor, labels: Tensor, temperature: float = 0.5) -> PrototypeContrast:
    r"""Online prototype equilibrium: class means attract their other view and repel all other classes.

    With :math:`r` the 2K class means of the two views scaled to length 1, it is the mean over i of
    :math:`-\log \mathrm{softmax}_{j \neq i}(r_i \cdot r_j / \tau)` at the row of the same class in the other view. One
    class, or no rows, give exactly 0. A mean of length zero counts as a vector of zeros. Gradients flow through both
    views. Computed in float32 with autocast off, or in float64.

    Args:
        first: (n, p) unit rows, the embeddings of n images.
        second: (n, p) unit rows, another view of the same images.
        labels: (n,) integer class ids, on the host best: else a GPU is waited for.
        temperature: :math:`\tau`.

    Raises:
        ArgumentError: If the temperature is not positive.
        BatchError: If shapes or dtypes do not fit.

    Example:
        >>> views = torch.eye(4)
        >>> loss, ids, means = prototype_contrast(views, views, torch.tensor([7, 7, 2, 2]))
        >>> ids.tolist(), means[0].tolist()
        ([2, 7], [0.0, 0.0, 0.5, 0.5])
        >>> round(float(loss), 4)  # -log(e^2 / (e^2 + 2))
        0.2395

    Source: Y. Wei, J. Ye, Z. Huang, J. Zhang, H. Shan, arXiv 2308.00301.
    """
    check_number("temperature", temperature, above=0)
    check_rows("first", first)
    check_rows("second", second, *first.shape)
    check_labels("labels", labels, len(first))
    with torch.autocast(first.device.type, enabled=False):
        rows = torch.cat([wide(first), wide(second)], dim=1)
        ids, inverse, counts = torch.unique(labels, sorted=True, return_inverse=True, return_counts=True)
        sums = rows.new_zeros(len(ids), rows.shape[1])
        sums = sums.index_add_(0, inverse.to(rows.device), rows)
        means = sums / counts.to(rows)[:, None]
        own, other = means.chunk(2, dim=1)
        kept = ((own + other) / 2).detach()
        if not len(ids):
            return PrototypeContrast(rows.sum(), ids, kept)
        units = _unit_rows(torch.cat([own, other]))
        itself = torch.eye(len(units), dtype=torch.bool, device=units.device)
        scores = (units @ units.T / temperature).masked_fill(itself, -torch.inf)
        partners = torch.arange(len(units), device=units.device).roll(-len(ids))
        return PrototypeContrast(F.cross_entropy(scores, partners), ids, kept)


def draw_offset(in_features: int, projection_dim: int, generator: torch.Generator) -> int:
    """Draw the offset of :func:`instance_contrast`, uniform in [0, D - p); 0, and nothing drawn, where D is p."""
    if in_features <= projection_dim:
        return 0
    return int(torch.randint(in_features - projection_dim, (), generator=generator, device=generator.device))


def instance_contrast(
    embeddings: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    form: Literal["new", "memory"],
    offset: int = 0,
    temperature: float = 0.07,
    scale: float = 1.0,
) -> Tensor:
    r"""Supervised contrast of 2n rows, two views of n images, with an embedding and a slice of the features; a scalar.

    With unit embeddings z, :math:`h = f / \lVert f \rVert` and o the offset:

    .. math::
        A = s (z\, h_{:, o:o+p}^\top + z z^\top), \quad
        E = \exp\bigl((A - \operatorname{rowmax} A) / \tau\bigr), \quad
        \ell = -\log\Bigl(\frac{E}{\sum_j E_{ij} + \epsilon} + \epsilon\Bigr), \quad \epsilon = 10^{-8}

    ``form="memory"`` is the mean over rows of the mean :math:`\ell_{ij}` over all rows j of the same label, also j = i.
    ``form="new"`` sets :math:`E_{ii} = 0` and is twice that plus the mean of :math:`\ell` at the other view of
    the same image. The row maximum is not differentiated. Computed in float32 with autocast off, or in float64.

    Args:
        embeddings: (2n, p) unit rows; row i + n is the other view of row i.
        features: (2n, D), D at least p, as they are: they are scaled to length 1 here.
        labels: (n,) integer ids of the first n rows, on the host best; the other view has the same.
        form: See above.
        offset: First column of the slice.
        temperature: :math:`\tau`.
        scale: s.

    Raises:
        ArgumentError: If an option is not allowed.
        BatchError: If shapes or dtypes do not fit, or the slice ends beyond the features.

    Example:
        >>> rows = torch.nn.functional.normalize(torch.randn(8, 3), dim=1)
        >>> loss = instance_contrast(rows, torch.randn(8, 5), torch.tensor([0, 1, 0, 2]), form="memory", offset=1)

    Source: Y. Wei et al., arXiv 2308.00301; Y. Guo, B. Liu, D. Zhao, ICML 2022.
    """
    check_choice("form", form, ("new", "memory"))
    check_number("temperature", temperature, above=0)
    check_number("scale", scale, above=0)
    check_rows("embeddings", embeddings)
    check_rows("features", features, len(embeddings))
    check_labels("labels", labels, len(embeddings) // 2)
    width = embeddings.shape[1]
    if len(embeddings) % 2 or not 0 <= offset <= features.shape[1] - width:
        raise BatchError(
            f"embeddings must have two views of each row and features at least offset + p columns, got embeddings of "
            f"shape {tuple(embeddings.shape)}, features of shape {tuple(features.shape)} and offset={offset}; "
            "project to at most as many dimensions as the features have"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        z, f = wide(embeddings), wide(features)
        if not len(z):
            return z.sum() + f.sum()
        h = _unit_rows(f)[:, offset : offset + width]
        row, column, positives = (part.to(z.device) for part in _same_label(torch.cat([labels, labels])))
        share = (1 / len(z)) / (positives.to(z)[row] + _EPSILON)
        if form == "new":
            rows = torch.arange(len(z), device=z.device)
            row, column = torch.cat([row, rows]), torch.cat([column, rows.roll(len(labels))])
            share = torch.cat([2 * share, share.new_full((len(z),), 1 / len(z))])
        # the small factor is scaled, not the product, which is (2n, 2n)
        loss: Tensor = _PairCosts.apply(scale / temperature * z, h + z, row, column, share, form == "memory")
        return loss


def _same_label(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row and column of each pair with one label, row after row, and in how many pairs a row is."""
    ordered, order = labels.sort(stable=True)
    begin = torch.searchsorted(ordered, labels)
    positives = torch.searchsorted(ordered, labels, right=True) - begin
    row = torch.arange(len(labels), device=labels.device).repeat_interleave(positives)
    number = torch.arange(len(row), device=labels.device)  # of the pair; those of the rows before are taken off
    return row, order[number + (begin - positives.cumsum(0) + positives)[row]], positives


class _PairCosts(torch.autograd.Function):
    """Sums the costs of some pairs of rows; the gradient is found with it, so that no (2n, 2n) matrix is kept."""

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, row: Tensor, column: Tensor, share: Tensor, diagonal: bool
    ) -> Tensor:
        # in place where that can be, for the matrix has a row for each view
        scores = left @ right.T
        scores = scores.sub_(scores.amax(dim=1, keepdim=True))
        if not diagonal:
            scores.fill_diagonal_(-torch.inf)
        weights = scores.exp_()
        totals = weights.sum(dim=1) + _EPSILON
        parts = weights[row, column] / totals[row]
        kept = parts + _EPSILON
        of_pairs = -share * parts / kept  # the slopes by the scores of the pairs, the totals held
        of_rows = torch.zeros_like(totals).index_put_((row,), of_pairs, accumulate=True)
        slopes = weights.mul_((-of_rows / totals)[:, None]).index_put_((row, column), of_pairs, accumulate=True)
        ctx.save_for_backward(slopes @ right, (left.T @ slopes).T)
        return -(share * kept.log()).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        of_left, of_right = ctx.saved_tensors
        return slope * of_left, slope * of_right, None, None, None, None


def supervised_contrast(first: Tensor, second: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    r"""Mean over all 2n rows of the mean cost of finding each row of the same class among all others; a scalar.

    With :math:`z` the rows of both views and :math:`P(i)` the other rows with the label of row i:

    .. math::
        L = \frac{1}{2n} \sum_i \frac{-1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{\exp(z_i \cdot z_p / \tau)}{\sum_{a \neq i} \exp(z_i \cdot z_a / \tau)}

    Computed as :func:`prototype_contrast`.

    Args:
        first: (n, p) unit rows, the embeddings of n images.
        second: (n, p) unit rows, another view of the same images.
        labels: (n,) integer class ids.
        temperature: :math:`\tau`.

    Raises:
        ArgumentError: If the temperature is not positive.
        BatchError: If shapes or dtypes do not fit.

    Example:
        >>> rows = torch.eye(2)
        >>> round(float(supervised_contrast(rows, rows, torch.tensor([0, 1]), temperature=1.0)), 4)
        0.5514

    Source: P. Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2; in replay learning: Z. Mai et
    al., "Supervised Contrastive Replay", CVPR Workshops 2021.
    """
    check_number("temperature", temperature, above=0)
    check_rows("first", first)
    check_rows("second", second, *first.shape)
    check_labels("labels", labels, len(first))
    with torch.autocast(first.device.type, enabled=False):
        rows = wide(torch.cat([first, second]))
        if not len(rows):
            return rows.sum()
        ids = labels.repeat(2)
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        same = (ids[:, None] == ids).to(rows.device) & ~itself
        costs = -F.log_softmax((rows @ rows.T / temperature).masked_fill(itself, -torch.inf), dim=1)
        # where, not a product: the cost of a row with itself is infinite
        return (torch.where(same, costs, 0).sum(dim=1) / same.sum(dim=1)).mean()


def wide(values: Tensor) -> Tensor:
    """Return the values in float32, or in float64 if they are."""
    return values if values.dtype == torch.float64 else values.float()


def _unit_rows(rows: Tensor) -> Tensor:
    """Return rows of length 1; a row without a direction stays as it is, with a gradient of ordinary size."""
    lengths = vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(lengths > _SHORTEST, lengths, 1.0)


def check_rows(name: str, rows: Tensor, *shape: int) -> None:
    """Refuse what is no matrix of floating-point numbers, of these numbers of rows and columns if they are given."""
    if rows.ndim != 2 or rows.shape[: len(shape)] != shape or not rows.dtype.is_floating_point:
        told = ", ".join([*map(str, shape), *"nD"[len(shape) :]])
        raise BatchError(
            f"{name} must be floating-point numbers of shape ({told}), got {rows.dtype} of shape {tuple(rows.shape)}"
        )
