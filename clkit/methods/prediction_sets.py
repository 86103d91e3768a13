r"""Sets of classes that hold the true one with a chosen probability, at each stage of a growing stream."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError, NotFittedError, StateError
from clkit.methods._checks import check_choice, check_number
from clkit.methods._state import exact
from clkit.methods.decisions import conformal_rank
from clkit.methods.replay.rows import check_labels
from clkit.schema import Numbers, OneOf, Real, Settings, Table, check_format, read_state

__all__ = ["PredictionSets", "nonconformity"]

SetScore: TypeAlias = Literal["margin", "lac", "aps"]
_SCORES = get_args(SetScore)
_ALL = 1e100  # stands for a value that no known class reaches: infinity has no place in a state


def nonconformity(scores: Tensor, score: SetScore = "margin") -> Tensor:
    r"""Return how badly each class fits the scores.

    ========== =========================================================================================
    ``margin`` :math:`\max_j z_j - z_c`, which needs no probabilities
    ``lac``    :math:`1 - p_c`
    ``aps``    :math:`\sum_{j: p_j \ge p_c} p_j`, the probability of all classes that are at least as likely
    ========== =========================================================================================

    With ``margin`` a set is never empty: where the predictor is right more often than was asked for, it is the best
    class alone, and covers more. With the others it may be empty.

    Args:
        scores: (B, C) floating-point scores z, logits where p is their softmax; ``-inf`` for classes not known yet.
        score: Which of the three.

    Returns:
        (B, C) float64, infinite for classes not known yet.

    Raises:
        ArgumentError: If there is no such score.
        BatchError: If scores have another shape or dtype, or are NaN or plus infinity.

    Example:
        >>> scores = torch.tensor([[0.7, 0.2, 0.1]]).log()
        >>> [[round(each, 4) for each in nonconformity(scores, name)[0].tolist()] for name in ("lac", "aps")]
        [[0.3, 0.8, 0.9], [0.7, 0.9, 1.0]]

    Source: M. Sadinle, J. Lei, L. Wasserman, arXiv 1609.00451 (lac); Y. Romano, M. Sesia, E. Candès, arXiv 2006.02544
    (aps, without its random part, so that sets are never too small).
    """
    check_choice("score", score, _SCORES)
    if not isinstance(scores, Tensor) or scores.ndim != 2 or not scores.dtype.is_floating_point:
        seen = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise BatchError(f"scores must be floating-point numbers of shape (B, C), got {seen}")
    with exact():
        values = scores.detach().cpu().double()
        if not bool((values < torch.inf).all()):  # NaN is not
            raise BatchError("scores must be finite, or -inf for classes not known yet, got NaN or infinity")
        known = values > -torch.inf
        safe = torch.where(known.any(dim=1, keepdim=True), values, 0.0)
        if score == "margin":
            found = (safe.amax(dim=1, keepdim=True) if safe.shape[1] else safe) - safe
        elif score == "lac":
            found = 1 - safe.softmax(dim=1)
        else:
            p, order = safe.softmax(dim=1).sort(dim=1, descending=True, stable=True)
            # classes of equal probability have the sum that includes them all
            least = p.cumsum(dim=1)
            same = p[:, 1:] == p[:, :-1]
            for column in range(p.shape[1] - 2, -1, -1):
                least[:, column] = torch.where(same[:, column], least[:, column + 1], least[:, column])
            found = torch.empty_like(p).scatter_(1, order, least)
        return found.masked_fill(~known, torch.inf)


class PredictionSets:
    r"""Gives for each input a set of classes that holds the true one with probability ``coverage``.

    A class is in the set if its :func:`nonconformity` is at most that of the ``ceil((n+1) coverage)``-th best of n
    calibration samples; the guarantee is for inputs exchangeable with them. These must not have been learned:
    leave-one-out scores of learned rows will do, their ordinary scores will not. Calibrate again whenever the predictor
    has changed. Rows of a class-balanced memory stand for inputs of equally frequent classes; where some are rarer,
    ``class_conditional`` covers each class, and with it any mix of them.

    Args:
        coverage: Between 0 and 1.
        score: Nonconformity of a class: ``"margin"`` for any scores, ``"lac"`` or ``"aps"`` for logits.
        class_conditional: Whether each class has a threshold of its own, so that rare classes are covered too. Classes
            with fewer than ``ceil(1/(1 - coverage)) - 1`` samples use the common one, which is said.
        adaptive: Step of the online rule of :meth:`observe`, at least 0; 0.01 is usual.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> sets = PredictionSets(coverage=0.75)
        >>> scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.5]])
        >>> sets.calibrate(scores, torch.tensor([0, 1, 0]))
        >>> sets.predict(torch.tensor([[1.0, 0.8], [3.0, 0.0]])).tolist()
        [[True, True], [True, False]]

    Source: V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World", 2005 (sets, and their
    class-conditional form); I. Gibbs, E. Candès, "Adaptive conformal inference under distribution shift", arXiv
    2106.00170, equation 2.
    """

    _format = 1

    def __init__(
        self,
        coverage: float = 0.9,
        score: SetScore = "margin",
        class_conditional: bool = False,
        adaptive: float = 0.0,
    ) -> None:
        check_arguments(PredictionSets, locals())
        if not 0 < coverage < 1:
            raise ArgumentError(f"coverage must be between 0 and 1, got {coverage}")
        self.coverage = float(coverage)
        self.score = score
        self.class_conditional = class_conditional
        self.adaptive = check_number("adaptive", adaptive, at_least=0)
        self._alpha = self._nominal = round(1 - self.coverage, 12)  # 1 - 0.9 is 0.09999999999999998
        self._values: Tensor | None = None  # of the calibration samples, ascending
        self._labels = torch.empty(0, dtype=torch.int64)
        self._of_class: dict[int, Tensor] = {}  # those of classes that have a threshold of their own

    @property
    def alpha(self) -> float:
        """The miss rate that thresholds are for, ``1 - coverage`` unless the online rule has moved it."""
        return self._alpha

    @property
    def samples(self) -> int:
        """Calibration samples."""
        return 0 if self._values is None else len(self._values)

    def calibrate(self, scores: Tensor, labels: Tensor) -> None:
        """Take thresholds from samples that were not learned, in place of those from before.

        Args:
            scores: (n, C) scores, ``-inf`` for classes not known yet.
            labels: (n,) class ids; a sample whose class is not known, or has no column, was missed by every set.

        Raises:
            BatchError: If shapes or dtypes do not fit; nothing is changed then.

        Warns of classes whose thresholds are the common one.
        """
        with exact():
            values, of = self._of_true(scores, labels)
            values, order = values.clamp(max=_ALL).sort(stable=True)
        if few := self._take(values, of[order]):
            more = f" and {len(few) - 10} more" if len(few) > 10 else ""
            warnings.warn(
                f"classes {few[:10]}{more} have fewer than {self._fewest} calibration samples, which a threshold of "
                f"their own needs for coverage={self.coverage}: they use the common one",
                stacklevel=2,
            )

    def thresholds(self, classes: int) -> Tensor:
        """Return the largest nonconformity of a member for each of the classes 0, 1, ..., (C,) float64.

        Raises:
            NotFittedError: If there was no calibration.
        """
        found = torch.full((classes,), self._threshold(self._calibrated()), dtype=torch.float64)
        for each, values in self._of_class.items():
            if each < classes:
                found[each] = self._threshold(values)
        return found

    def predict(self, scores: Tensor) -> Tensor:
        """Return the members of each set, (B, C) bool on the device of the scores; classes not known are in none.

        Raises:
            NotFittedError: If there was no calibration.
            BatchError: If scores have another shape or dtype, or are NaN or plus infinity.
        """
        found = nonconformity(scores, self.score)
        with exact():
            members = (found <= self.thresholds(found.shape[1])) & (found < torch.inf)
        return members.to(scores.device)

    def observe(self, scores: Tensor, labels: Tensor) -> Tensor:
        r"""Return which samples their sets missed, and follow the drift that this shows, one after the other.

        After each sample :math:`\alpha \leftarrow \alpha + \gamma (\alpha_{nominal} - miss)` with the step
        ``adaptive``: the share of misses tends to ``1 - coverage`` whatever the stream does.

        Args:
            scores: (B, C) scores of samples before they were learned.
            labels: (B,) class ids; a class that is not known is missed. -1 for samples to leave out.

        Returns:
            (B,) bool; ``False`` where there is no label.

        Raises:
            NotFittedError: If there was no calibration.
            BatchError: If shapes or dtypes do not fit; nothing is changed then.
        """
        with exact():
            values, of = self._of_true(scores, labels, unlabelled=True)
            missed = torch.zeros(len(values), dtype=torch.bool)
            common = self._calibrated()
            for row, (value, label) in enumerate(zip(values.tolist(), of.tolist(), strict=True)):
                if label >= 0:
                    miss = value == math.inf or value > self._threshold(self._of_class.get(label, common))
                    missed[row] = miss
                    self._alpha += self.adaptive * (self._nominal - miss)
        return missed.to(scores.device)

    def state_dict(self) -> dict[str, Any]:
        """Return settings, calibration values and the present miss rate, as tensors and plain values."""
        values = torch.empty(0, dtype=torch.float64) if self._values is None else self._values
        return {
            "format": self._format,
            "settings": self._described(),
            "calibrated": self._values is not None,
            "alpha": self._alpha,
            "values": values.clone(),
            "labels": self._labels.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave.

        Raises:
            StateError: If it is of other settings or damaged; nothing is changed then.
        """
        owner = type(self).__name__
        table: Table = {
            "format": OneOf((self._format,)),
            "settings": Settings(self._described(), advice="build the sets with the saved settings"),
            "calibrated": OneOf((False, True)),
            "alpha": Real(),
            "values": Numbers(("N",), torch.float64, least=0, most=_ALL),
            "labels": Numbers(("N",), least=0),
        }
        saved = read_state(check_format(state, self._format, owner), table, owner)
        values, labels = (saved[name].cpu().clone() for name in ("values", "labels"))
        if bool((values.diff() < 0).any()) or (len(values) and not saved["calibrated"]):
            raise StateError(f"{owner}: {len(values)} saved calibration values are not in order; the file is damaged")
        if saved["calibrated"]:
            self._take(values, labels)
        else:
            self._values, self._labels, self._of_class = None, labels, {}
        self._alpha = saved["alpha"]

    def _described(self) -> dict[str, Any]:
        return {
            "coverage": self.coverage,
            "score": self.score,
            "class_conditional": self.class_conditional,
            "adaptive": self.adaptive,
        }

    @property
    def _fewest(self) -> int:
        """Calibration samples from which on a threshold is not the infinite one, at the nominal coverage."""
        return math.ceil(1 / self._nominal - 1e-9) - 1

    def _take(self, values: Tensor, labels: Tensor) -> list[int]:
        """Take up ascending values, and return the classes that have too few for a threshold of their own."""
        self._values, self._labels, self._of_class = values, labels, {}
        if not self.class_conditional:
            return []
        classes, counts = torch.unique(labels, return_counts=True)
        enough = counts >= self._fewest
        self._of_class = {each: values[labels == each] for each in classes[enough].tolist()}
        few: list[int] = classes[~enough].tolist()
        return few

    def _calibrated(self) -> Tensor:
        if self._values is None:
            raise NotFittedError("these prediction sets have no thresholds yet: call calibrate first")
        return self._values

    def _threshold(self, values: Tensor) -> float:
        """Return the one that holds for ascending values of calibration samples."""
        if not 0 < self._alpha < 1:  # the online rule may ask for everything or for nothing
            return _ALL if self._alpha <= 0 else -math.inf
        k = conformal_rank(len(values), self._alpha)
        return _ALL if k > len(values) else float(values[k - 1])

    def _of_true(self, scores: Tensor, labels: Tensor, *, unlabelled: bool = False) -> tuple[Tensor, Tensor]:
        """Return the nonconformity of the true class of each sample, infinite where it has none, and the labels."""
        found = nonconformity(scores, self.score)
        if not isinstance(labels, Tensor):
            raise BatchError(f"labels must be a tensor of {len(found)} class ids, got {type(labels).__name__}")
        check_labels("labels", labels, len(found))
        of = labels.detach().to("cpu", torch.int64)
        if len(of) and int(of.min()) < (-1 if unlabelled else 0):
            raise BatchError(f"labels must be class ids from 0, got {int(of.min())}")
        here = (of >= 0) & (of < found.shape[1])
        values = torch.full((len(of),), torch.inf, dtype=torch.float64)
        values[here] = found[here].gather(1, of[here][:, None])[:, 0]
        return values, of
