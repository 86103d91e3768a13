r"""Keeping features of a new model comparable with those of the one before: two losses, and a map without training."""

from __future__ import annotations

import math
import warnings
from typing import Literal

import numpy as np
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.arguments import check_arguments
from clkit.distributed import gather_with_graph, world_size
from clkit.errors import BatchError
from clkit.methods._checks import check_count, check_finite, check_number, check_probability
from clkit.methods.replay.contrast import check_rows, wide
from clkit.methods.replay.rows import check_labels

__all__ = ["HOCLoss", "align", "distillation_weight", "feature_distillation", "hoc_total"]

_SHORTEST = 1e-12  # length up to which a feature has no direction


class HOCLoss(nn.Module):
    r"""The higher-order contrastive term between the features of a new model and those of the old one.

    The cross-entropy on fixed prototypes aligns class means alone; this aligns what lies round them. With
    :math:`h = z / \lVert z \rVert` of the same B images through both models, and :math:`s_{nm} = \mu\,
    h^{old}_n \cdot h^{new}_m`:

    .. math::
        L = \frac1B \sum_n \Bigl[ -s_{nn} + \log \sum_m e_{nm} \Bigr], \quad
        e_{nm} = \exp(s_{nm}) \text{ if } y_n \neq y_m, \text{ else } 1 \text{ (or 0)}

    The positive pair is not in the sum, so that the loss can be negative; and old and new cannot change places. Nothing
    flows into the old features. Computed in float32 with autocast off, or in float64. Labels are hard: leave mixed rows
    out.

    Args:
        mu: :math:`\mu`, the scale of cosines, above 0.
        same_class: What pairs of one class add to the sum: ``"unit"`` 1, as in the authors' code; ``"exclude"``
            nothing, so that a batch of one class gives 0.
        gather: Whether several processes put their batches together, so that each row has the negatives of all; all of
            them must call the loss then. Its value is that of the joined batch in each process, and its gradient is
            right when averaged over processes, as DDP does. Otherwise the negatives are those of each process.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> new = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> old = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 1.0]])
        >>> round(float(HOCLoss()(new, old, torch.tensor([0, 0, 1, 2]))), 4)
        0.7333

    Source: N. Biondi, F. Pernici, S. Ricci, A. Del Bimbo, CVPR 2024, arXiv 2405.02581.
    """

    def __init__(
        self, mu: float = 10.0, same_class: Literal["unit", "exclude"] = "unit", *, gather: bool = False
    ) -> None:
        check_arguments(HOCLoss, locals())
        super().__init__()
        self.mu = check_number("mu", mu, above=0)
        self.same_class = same_class
        self.gather = gather
        self._warned = False

    def forward(self, new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
        """Return the loss, a scalar; 0 for no rows.

        Args:
            new: (B, d) features of the model that trains, of any length.
            old: (B, d) features of the same images by the previous model, which is in eval mode.
            labels: (B,) integer class ids.

        Raises:
            BatchError: If shapes or dtypes do not fit.

        Warns once (for labels on a CPU) of a batch of one class, which has no negatives.
        """
        rows, past = _both(new, old)
        check_labels("labels", labels, len(rows))
        processes = world_size() if self.gather else 1
        if processes == 1:
            return self._of(rows, past, labels)
        joined = [gather_with_graph(each, "features and labels") for each in (rows, past, labels.to(rows.device))]
        loss = self._of(*joined)
        return loss + (processes - 1) * (loss - loss.detach())  # each has the gradient of its own rows alone

    def _of(self, rows: Tensor, past: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            if not len(rows):
                return rows.sum()
            scores = self.mu * _unit(past) @ _unit(rows).T
            positives = scores.diagonal()
            same = (labels[:, None] == labels).to(scores.device)
            single = same.all()  # one class: then no row has a negative
            self._tell_of(labels)
            if self.same_class == "unit":
                return (scores.masked_fill(same, 0.0).logsumexp(dim=1) - positives).mean()
            # a row of nothing but -inf would have a gradient of NaN, also where it is not taken
            sums = scores.masked_fill(same & ~single, -torch.inf).logsumexp(dim=1)
            return torch.where(single, 0.0, (sums - positives).mean())

    def _tell_of(self, labels: Tensor) -> None:
        if not self._warned and labels.device.type == "cpu" and bool((labels == labels[0]).all()):
            self._warned = True
            warnings.warn(
                f"all {len(labels)} rows of a batch are of one class, so that the contrastive term has nothing to hold "
                "them apart from; use larger batches, or replay (said once)",
                stacklevel=6,
            )


def hoc_total(cross_entropy: Tensor, contrast: Tensor, lam: float = 0.1) -> Tensor:
    r"""Return the whole loss where there is a previous model: :math:`\lambda L_{SCE} + (1 - \lambda) L_{NCE}`.

    Raises:
        ArgumentError: If ``lam`` is not from 0 to 1.

    Example:
        >>> float(hoc_total(torch.tensor(2.0), torch.tensor(1.0)))
        1.100000023841858

    Source: N. Biondi et al., arXiv 2405.02581.
    """
    check_probability("lam", lam)
    return lam * cross_entropy + (1 - lam) * contrast


def feature_distillation(new: Tensor, old: Tensor) -> Tensor:
    r"""Return the mean of :math:`1 - \cos(h^{new}, h^{old})` over rows, the older way to align ("fd").

    Its rows are those of the replay memory alone, and its weight :func:`distillation_weight`. Computed in float32 with
    autocast off, or in float64; nothing flows into the old features, and no rows give 0.

    Args:
        new: (B, d) features of the model that trains.
        old: (B, d) features of the same images by the previous model.

    Raises:
        BatchError: If shapes or dtypes do not fit.

    Example:
        >>> float(feature_distillation(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])))
        0.5

    Source: N. Biondi, F. Pernici, M. Bruni, D. Mugnai, A. Del Bimbo, "CL2R", ACM TOMM 2023, arXiv 2211.09032.
    """
    rows, past = _both(new, old)
    with torch.autocast(rows.device.type, enabled=False):
        if not len(rows):
            return rows.sum()
        return (1 - (_unit(rows) * _unit(past)).sum(dim=1)).mean()


def distillation_weight(new_classes: int, old_classes: int, base: float = 5.0) -> float:
    r"""Return the weight of :func:`feature_distillation`: :math:`w_0 \sqrt{n_{new} / n_{old}}`, of class counts.

    Raises:
        ArgumentError: If a count is below 1 or the base is negative.

    Example:
        >>> distillation_weight(new_classes=10, old_classes=40)
        2.5

    Source: N. Biondi et al., arXiv 2211.09032.
    """
    counts = check_count("new_classes", new_classes), check_count("old_classes", old_classes)
    return check_number("base", base, at_least=0) * math.sqrt(counts[0] / counts[1])


def align(old: Tensor, new: Tensor) -> Tensor:
    r"""Return the rotation of new features that brings them nearest to old ones of the same images, without training.

    The orthogonal Procrustes map: of all R with orthonormal rows or columns the one with the smallest
    :math:`\lVert \bar H_{new} R - \bar H_{old} \rVert_F`, where rows have length 1 and the narrower side is padded
    with zeros. Queries ``normalize(new) @ R`` then go to the gallery of the old model. It is enough where two models
    differ by a rotation and little more, as two that learned the same classes nearly do; classes that the old model
    did not know stay where the new one has them, and distances within the new model do not change. The number
    of images should be above both widths.

    Args:
        old: (n, D_old) features by the old model, float.
        new: (n, D_new) features of the same images by the new model, in the same order.

    Returns:
        R (D_new, D_old) on the device of ``new``, float64 where both are, else float32; found in float64.

    Raises:
        BatchError: If there are no rows, their numbers differ, or values are not finite.

    Example:
        >>> old = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> turn = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]])
        >>> bool(torch.allclose(align(old, old @ turn), turn.T, atol=1e-6))
        True

    Source: P. H. Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966.
    """
    check_rows("old", old)
    check_rows("new", new, len(old))
    if not len(old):
        raise BatchError("old and new must have rows of the same images, got none; give those of the replay memory")
    sides = [each.detach().to("cpu", torch.float64) for each in (new, old)]
    for each in sides:
        check_finite(each)
    width = max(each.shape[1] for each in sides)
    queries, gallery = (F.pad(_unit(each), (0, width - each.shape[1])).numpy() for each in sides)
    rotation = np.asarray(orthogonal_procrustes(queries, gallery)[0])
    found = torch.from_numpy(rotation[: new.shape[1], : old.shape[1]].copy())
    both_wide = old.dtype == new.dtype == torch.float64
    return found.to(new.device, torch.float64 if both_wide else torch.float32)


def _both(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    check_rows("new", new)
    check_rows("old", old, *new.shape)
    rows = wide(new)
    return rows, old.detach().to(rows.dtype)


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1, eps=_SHORTEST)
