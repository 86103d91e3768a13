r"""The error of one sample, and the part of it that no predictor could avoid."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from clkit.errors import BatchError
from clkit.methods._checks import check_choice, check_count, check_number
from clkit.methods._state import exact
from clkit.methods.replay.rows import check_labels

__all__ = ["SampleLoss", "neighbour_noise", "replicate_noise", "sample_loss"]

SampleLoss: TypeAlias = Literal["error", "nll", "brier", "squared"]
_LOSSES = get_args(SampleLoss)
_COMPARED = 1024  # queries at a time


def sample_loss(loss: SampleLoss, scores: Tensor, targets: Tensor, *, nll_cap: float = 10.0) -> Tensor:
    r"""Return the loss of each sample, in float64.

    With scores z, p their softmax and y the target:

    ============= =====================================================
    ``"error"``   :math:`[\arg\max z \neq y]`, ties to the lowest column
    ``"nll"``     :math:`\min(-\log p_y, \text{nll\_cap})`
    ``"brier"``   :math:`\sum_c (p_c - [c = y])^2`, from 0 to 2
    ``"squared"`` :math:`\sum_k (y_k - z_k)^2` over outputs k
    ============= =====================================================

    A column of ``-inf`` is a class that is not known yet. A sample whose class has such a column, or none, is wrong:
    its p_y is 0, so its ``"nll"`` is the cap and its ``"brier"`` :math:`1 + \sum_c p_c^2`. Where nothing is known at
    all, no class has a probability.

    Args:
        loss: Which of the four.
        scores: (B, C) floating-point scores, logits for ``"nll"`` and ``"brier"``; for ``"squared"`` predictions, (B,)
            or (B, ...).
        targets: (B,) integer class ids, -1 for an unlabelled sample; for ``"squared"`` numbers, as many as predictions.
        nll_cap: Largest ``"nll"``, above 0.

    Returns:
        (B,) float64, at least 0, on the device of the scores, without a graph; NaN where there is no label, or a score
        is NaN or plus infinity. :class:`ErrorRecords` leaves those out.

    Raises:
        ArgumentError: If there is no such loss.
        BatchError: If shapes or dtypes do not fit; nothing is broadcast.

    Example:
        >>> scores = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]]).log()
        >>> for loss in ("error", "nll", "brier"):
        ...     print(loss, [round(each, 4) for each in sample_loss(loss, scores, torch.tensor([0, 1])).tolist()])
        error [0.0, 1.0]
        nll [0.3567, 1.6094]
        brier [0.14, 1.14]

    Source: Lahlou et al., arXiv 2102.08501, section 2 (the risk whose expectation it is).
    """
    check_choice("loss", loss, _LOSSES)
    cap = check_number("nll_cap", nll_cap, above=0)
    with exact():
        if loss == "squared":
            return _squared(scores, targets)
        _check_scores(scores)
        check_labels("targets", targets, len(scores))
        values = _double(scores)
        labels = targets.to(values.device, torch.int64)
        if len(labels) and int(labels.min()) < -1:
            raise BatchError(
                f"targets must be class ids from 0, or -1 for an unlabelled sample, got {int(labels.min())}"
            )
        known = values > -torch.inf
        has_column = (labels >= 0) & (labels < values.shape[1])
        at = torch.where(has_column, labels, 0)[:, None]
        if not values.shape[1]:  # nothing to look up
            values, known = values.new_full((len(values), 1), -torch.inf), known.new_zeros(len(values), 1)
        right = has_column & known.gather(1, at)[:, 0]
        odd = values.isnan() | (values == torch.inf)
        if loss == "error":
            found = 1.0 - (right & (values.argmax(dim=1) == labels)).double()
        else:
            safe = torch.where(known.any(dim=1, keepdim=True), values, 0.0)
            logs = safe.log_softmax(dim=1)
            if loss == "nll":
                found = torch.where(right, -logs.gather(1, at)[:, 0], torch.inf).clamp(max=cap)
            else:
                p = logs.exp() * known
                one_hot = torch.zeros_like(p).scatter_(1, at, right[:, None].double())
                found = ((p - one_hot) ** 2).sum(dim=1) + (~right).double()
        return found.masked_fill(odd.any(dim=1) | (labels < 0), torch.nan)


def replicate_noise(loss: SampleLoss, labels: Tensor) -> Tensor:
    r"""Estimate the aleatoric part of the loss from several labels of one input.

    With K labels, shares :math:`\hat p` of the classes among them and m classes that occur:

    ============= =========================================================================================
    ``"squared"`` :math:`\frac{K}{K-1} \mathrm{var}(y)` with the variance of K; unbiased
    ``"brier"``   :math:`\frac{K}{K-1} (1 - \sum_c \hat p_c^2)`; unbiased
    ``"nll"``     :math:`H(\hat p) + (m-1)/2K`, the entropy corrected to first order (Miller and Madow)
    ``"error"``   :math:`1 - \max \hat p`, which is too small on average
    ============= =========================================================================================

    Fit an :class:`ErrorPredictor` to it to have the noise where there is one label. The entropy of a predictor is no
    such estimate: it contains what the predictor does not know.

    Args:
        loss: Which loss.
        labels: (N, K) integer class ids, -1 where an input has fewer labels; numbers for ``"squared"``, NaN there.

    Returns:
        (N,) float64, NaN for an input with fewer than two labels.

    Raises:
        ArgumentError: If there is no such loss.
        BatchError: If the labels have another shape or dtype.

    Example:
        >>> replicate_noise("brier", torch.tensor([[0, 1, -1, -1], [0, 0, 0, 1]])).tolist()
        [1.0, 0.5]

    Source: G. A. Miller, "Note on the bias of information estimates", 1955 (the correction of the entropy).
    """
    check_choice("loss", loss, _LOSSES)
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        seen = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise BatchError(f"labels must be a tensor of shape (N, K), the labels of each input, got {seen}")
    with exact():
        if loss == "squared":
            return _variance(labels)
        if labels.dtype == torch.bool or labels.dtype.is_floating_point or labels.dtype.is_complex:
            raise BatchError(f"labels must be integer class ids for the loss {loss!r}, got {labels.dtype}")
        there = labels >= 0
        number = there.sum(dim=1).double()
        # of each label how many are like it, so that no table of classes is needed
        alike = ((labels[:, :, None] == labels[:, None, :]) & there[:, None, :]).sum(dim=2).double() * there
        share = alike / number.clamp(min=1)[:, None]
        weight = there / alike.clamp(min=1)  # adds up to 1 over the labels of a class
        if labels.shape[1] < 2:
            return number.fill_(torch.nan)
        if loss == "error":
            found = 1 - share.amax(dim=1)
        elif loss == "brier":
            found = number / (number - 1) * (1 - (weight * share**2).sum(dim=1))
        else:
            entropy = -(weight * torch.xlogy(share, share)).sum(dim=1)
            found = entropy + (weight.sum(dim=1) - 1) / (2 * number)
        return torch.where(number >= 2, found, torch.nan)


def neighbour_noise(
    loss: SampleLoss, features: Tensor, memory: Tensor, labels: Tensor, *, k: int = 5, skip_same: bool = False
) -> Tensor:
    """Estimate the aleatoric part of the loss from the labels of the nearest rows of a memory.

    The labels of the k nearest rows stand for k labels of the input itself, as in :func:`replicate_noise`: right as far
    as the classes' probabilities are the same there.

    Args:
        loss: Which loss.
        features: (B, D) inputs.
        memory: (M, D) features with known labels.
        labels: (M,) class ids, or numbers for ``"squared"``.
        k: Neighbours, at least 2; all rows where the memory has fewer.
        skip_same: Leave out rows at distance 0, for inputs that are in the memory themselves.

    Returns:
        (B,) float64, NaN where there are fewer than two neighbours.

    Raises:
        ArgumentError: If there is no such loss, or k is not allowed.
        BatchError: If shapes or dtypes do not fit.

    Example:
        >>> memory, labels = torch.tensor([[0.0], [1.0], [10.0], [11.0]]), torch.tensor([0, 1, 2, 2])
        >>> neighbour_noise("brier", torch.tensor([[0.5], [12.0]]), memory, labels, k=2).tolist()
        [1.0, 0.0]
    """
    check_count("k", k, at_least=2)
    for name, rows in (("features", features), ("memory", memory)):
        if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.dtype.is_floating_point:
            raise BatchError(f"{name} must be a floating-point tensor of shape (B, D)")
    if features.shape[1] != memory.shape[1] or labels.shape != (len(memory),):
        raise BatchError(
            f"features {tuple(features.shape)}, memory {tuple(memory.shape)} and labels {tuple(labels.shape)} must be "
            "of one width, with one label a row of the memory"
        )
    with exact():
        rows, points = _double(features), _double(memory)
        known = labels.to(rows.device)
        missing = torch.nan if loss == "squared" else -1
        if loss == "squared":
            known = known.double()
        found = []
        for part in torch.split(rows, _COMPARED):
            distances = torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
            if skip_same:
                distances = distances.masked_fill(distances == 0, torch.inf)
            near, at = distances.topk(min(k, len(points)), dim=1, largest=False)
            found.append(replicate_noise(loss, known[at].masked_fill(near == torch.inf, missing)))
        return torch.cat(found)


def _double(values: Tensor) -> Tensor:
    """Return the values in float64, on the CPU where their device has none."""
    return (values.cpu() if values.device.type == "mps" else values).detach().double()


def _check_scores(scores: Tensor) -> None:
    if not isinstance(scores, Tensor) or scores.ndim != 2 or not scores.dtype.is_floating_point:
        seen = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise BatchError(f"scores must be floating-point numbers of shape (B, C), got {seen}")


def _squared(scores: Tensor, targets: Tensor) -> Tensor:
    flat = []
    for name, values in (("scores", scores), ("targets", targets)):
        if not isinstance(values, Tensor) or values.ndim == 0 or values.dtype.is_complex:
            raise BatchError(f"{name} must be a tensor of real numbers, (B,) or (B, ...), for the loss 'squared'")
        flat.append(_double(values).flatten(1) if values.ndim > 1 else _double(values)[:, None])
    if flat[0].shape != flat[1].shape:
        raise BatchError(
            f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} must have as many numbers a sample"
        )
    found = ((flat[1].to(flat[0].device) - flat[0]) ** 2).sum(dim=1)
    return found.masked_fill(~found.isfinite(), torch.nan)


def _variance(labels: Tensor) -> Tensor:
    values = _double(labels)
    there = ~values.isnan()
    number = there.sum(dim=1).double()
    filled = torch.where(there, values, 0.0)
    means = filled.sum(dim=1) / number.clamp(min=1)
    squares = ((filled - means[:, None]) ** 2 * there).sum(dim=1)
    return torch.where(number >= 2, squares / (number - 1), torch.nan)
