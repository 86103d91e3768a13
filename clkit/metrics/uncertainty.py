r"""Metrics of uncertainty, as ``torchmetrics.Metric`` objects: ranking, selective prediction, calibration.

================================= ================ ===========================================================
metric                            update takes     value
================================= ================ ===========================================================
:class:`SpearmanCorrelation`      u, loss          rank correlation of uncertainty and loss
:class:`KendallCorrelation`       u, loss          τ-b
:class:`AUROC`                    u, positive      how often what is wrong, or new, has the higher uncertainty
:class:`AUPR`                     u, positive      average precision of finding it
:class:`FPR95`                    u, positive      false alarms where 95 % of it is found
:class:`RiskCoverageCurve`        u, loss          risk of the k samples that are surest, k = 1 … N
:class:`AURC`                     u, loss          its mean
:class:`ExcessAURC`               u, loss          its mean less that of an oracle
:class:`AUGRC`                    u, loss          mean of risk times coverage
:class:`CalibrationError`         p, outcome       ECE, groups of equal width
:class:`MaxCalibrationError`      p, outcome       MCE, the largest error of a group
:class:`AdaptiveCalibrationError` p, outcome       ECE, groups of equal size
:class:`BrierScore`               probabilities, y squared error of the probabilities, 0 … 2
:class:`NegativeLogLikelihood`    probabilities, y natural logarithm
================================= ================ ===========================================================

The definitions, rules for ties and sources stand in :mod:`clkit.metrics.ranking` and :mod:`clkit.metrics.calibration`,
of which these are the accumulating form. u (B,) is any number that is higher where the predictor is less sure; nothing
is squeezed by a sigmoid, as ``torchmetrics`` does to scores outside [0, 1], so log-densities and distances keep their
ranks. p (B,) is a probability: of the predicted class and whether it was right
(:func:`~clkit.metrics.calibration.top_label`), or a predicted error and whether the answer was wrong.

Values are float64, whatever the dtype of what was given, and ``NaN`` where not defined. They depend neither on the
order nor on the batches nor on the processes in which samples came; two numbers a sample are kept. Constructors take
the keyword arguments of ``torchmetrics.Metric``, and ``update`` raises a :class:`~clkit.errors.BatchError`, before
anything is kept, for what is not as it should be, NaN included.

Example:
    >>> u, wrong = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.8, 0.05, 0.6, 0.4]), torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])
    >>> for metric in SpearmanCorrelation(), AUROC(), AUPR(), FPR95(), AURC(), ExcessAURC(), AUGRC():
    ...     metric.update(u, wrong)
    ...     print(type(metric).__name__, round(float(metric.compute()), 4))
    SpearmanCorrelation 0.3313
    AUROC 0.6875
    AUPR 0.6083
    FPR95 0.5
    AURC 0.326
    ExcessAURC 0.1433
    AUGRC 0.2344
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from clkit.arguments import check_arguments
from clkit.metrics import calibration, ranking, uncertainty_figures
from clkit.metrics._exact_metric import ExactMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AUGRC",
    "AUPR",
    "AURC",
    "AUROC",
    "FPR95",
    "AdaptiveCalibrationError",
    "BrierScore",
    "CalibrationError",
    "ExcessAURC",
    "KendallCorrelation",
    "MaxCalibrationError",
    "NegativeLogLikelihood",
    "RiskCoverageCurve",
    "SpearmanCorrelation",
]


class _SampleMetric(ExactMetric):
    """A metric that keeps numbers of each sample, float64."""

    full_state_update: bool | None = False

    kept: list[Tensor]  # (B, n) for each batch
    _dimensions = 0
    _numbers = 2  # of a sample

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("kept", [], dist_reduce_fx="cat")

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the samples of all processes, as ``torchmetrics.Metric.sync`` does; arguments as there."""
        if isinstance(self.kept, list) and not self.kept:
            self.kept.append(self._rows())  # of the dtype that the others send
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Return the value for everything seen so far, float64, ``NaN`` where not defined."""
        return self._value(self._of(*self._columns()))

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the metric on given axes, or on those of a new figure that pyplot does not know; return both."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            return self._draw(*self._columns(), ax)

    def _keep(self, *columns: Any) -> None:
        self.kept.append(self._rows(*columns))

    def _rows(self, *columns: Any) -> Tensor:
        rows = np.stack(columns, axis=1) if columns else np.zeros((0, self._numbers))
        return self._value(torch.from_numpy(rows))

    def _columns(self) -> list[Tensor]:
        rows = dim_zero_cat(self.kept) if len(self.kept) else self._rows()
        return list(rows.cpu().double().unbind(dim=1))

    @abstractmethod
    def _of(self, *columns: Any, **_: Any) -> Tensor | float: ...

    @abstractmethod
    def _draw(self, *columns_and_axes: Any, **_: Any) -> tuple[Figure, Axes]: ...


class _LossRanking(_SampleMetric):
    """A metric of how an uncertainty ranks losses."""

    higher_is_better: bool | None = True

    def update(self, uncertainty: Tensor, loss: Tensor) -> None:
        """Take up a batch.

        Args:
            uncertainty: (B,) floats, higher where less sure; may be infinite.
            loss: (B,) finite numbers or booleans, what was lost on each sample.

        Raises:
            BatchError: If an argument is not as above. Nothing was kept then.
        """
        self._keep(*ranking.in_order(uncertainty, loss))

    def _draw(self, uncertainty: Tensor, loss: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return uncertainty_figures.plot_loss_by_uncertainty(uncertainty, loss, ax)


class SpearmanCorrelation(_LossRanking):
    """Rank correlation of uncertainty and loss; ties share their ranks. See :func:`clkit.metrics.ranking.spearman`."""

    plot_lower_bound: float | None = -1.0
    plot_upper_bound: float | None = 1.0

    def _of(self, uncertainty: Tensor, loss: Tensor) -> float:
        return ranking.spearman(uncertainty, loss)


class KendallCorrelation(_LossRanking):
    """Kendall's τ-b of uncertainty and loss. See :func:`clkit.metrics.ranking.kendall`."""

    plot_lower_bound: float | None = -1.0
    plot_upper_bound: float | None = 1.0

    def _of(self, uncertainty: Tensor, loss: Tensor) -> float:
        return ranking.kendall(uncertainty, loss)


class RiskCoverageCurve(_LossRanking):
    """Mean loss of the k samples of lowest uncertainty, (N,). See :func:`clkit.metrics.ranking.risk_coverage`."""

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    _dimensions = 1

    def _of(self, uncertainty: Tensor, loss: Tensor) -> Tensor | float:
        return ranking.risk_coverage(uncertainty, loss)

    def _draw(self, uncertainty: Tensor, loss: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return uncertainty_figures.plot_risk_coverage(uncertainty, loss, ax)


class AURC(RiskCoverageCurve):
    """Mean of the risk-coverage curve, ties drawn at random in expectation. See :func:`clkit.metrics.ranking.aurc`."""

    _dimensions = 0

    def _of(self, uncertainty: Tensor, loss: Tensor) -> float:
        return ranking.aurc(uncertainty, loss)


class ExcessAURC(AURC):
    """AURC less that of the best ranking there is (E-AURC). See :func:`clkit.metrics.ranking.excess_aurc`."""

    def _of(self, uncertainty: Tensor, loss: Tensor) -> float:
        return ranking.excess_aurc(uncertainty, loss)


class AUGRC(AURC):
    """Mean of risk times coverage: loss that goes undetected. See :func:`clkit.metrics.ranking.augrc`."""

    def _of(self, uncertainty: Tensor, loss: Tensor) -> float:
        return ranking.augrc(uncertainty, loss)


class AUROC(_SampleMetric):
    """That a positive sample has a higher uncertainty than another, ties ½. See :func:`clkit.metrics.ranking.auroc`.

    Positive is what should stand out: a sample answered wrongly, or one of a class that was never learned.

    Example:
        >>> metric = AUROC()
        >>> metric.update(torch.tensor([20.0, 25.0, 30.0, 40.0]), torch.tensor([False, False, True, True]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def update(self, uncertainty: Tensor, positive: Tensor) -> None:
        """Take up a batch.

        Args:
            uncertainty: (B,) floats, higher where less sure; may be infinite.
            positive: (B,) booleans, or 0 and 1.

        Raises:
            BatchError: If an argument is not as above. Nothing was kept then.
        """
        self._keep(*ranking.in_order(uncertainty, positive, kinds=True))

    def _of(self, uncertainty: Tensor, positive: Tensor) -> float:
        return ranking.auroc(uncertainty, positive)

    def _draw(self, uncertainty: Tensor, positive: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return uncertainty_figures.plot_roc(uncertainty, positive, ax)


class AUPR(AUROC):
    """Average precision of finding the positive samples. See :func:`clkit.metrics.ranking.average_precision`."""

    def _of(self, uncertainty: Tensor, positive: Tensor) -> float:
        return ranking.average_precision(uncertainty, positive)

    def _draw(self, uncertainty: Tensor, positive: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return uncertainty_figures.plot_precision_recall(uncertainty, positive, ax)


class FPR95(AUROC):
    """Least share of false alarms where 95 % of them are found. See :func:`clkit.metrics.ranking.fpr_at_tpr`."""

    higher_is_better: bool | None = False

    def _of(self, uncertainty: Tensor, positive: Tensor) -> float:
        return ranking.fpr_at_tpr(uncertainty, positive, 0.95)

    def _draw(self, uncertainty: Tensor, positive: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return uncertainty_figures.plot_roc(uncertainty, positive, ax, tpr=0.95)


class CalibrationError(_SampleMetric):
    """Expected calibration error, groups of equal width. See :func:`clkit.metrics.calibration.calibration_error`.

    Args:
        bins: Number of groups.
        kwargs: See ``torchmetrics.Metric``.

    Raises:
        ArgumentError: If ``bins`` is not an integer of at least 1.

    Example:
        >>> metric = CalibrationError(bins=2)
        >>> metric.update(*calibration.top_label(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 0])))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    _grouped = staticmethod(calibration.equal_width_bins)

    def __init__(self, bins: int = 15, **kwargs: Any) -> None:
        check_arguments(CalibrationError, locals())
        super().__init__(**kwargs)
        self.bins = calibration.check_bins(bins)

    def update(self, confidence: Tensor, outcome: Tensor) -> None:
        """Take up a batch.

        Args:
            confidence: (B,) probabilities in [0, 1].
            outcome: (B,) booleans or numbers in [0, 1], what came of each.

        Raises:
            BatchError: If an argument is not as above. Nothing was kept then.
        """
        self._keep(*calibration.in_order(confidence, outcome))

    def _of(self, confidence: Tensor, outcome: Tensor) -> float:
        return calibration.calibration_error(self._grouped(confidence, outcome, self.bins))

    def _draw(self, confidence: Tensor, outcome: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return uncertainty_figures.plot_reliability(self._grouped(confidence, outcome, self.bins), ax)


class MaxCalibrationError(CalibrationError):
    """Largest calibration error of a group. See :func:`clkit.metrics.calibration.max_calibration_error`."""

    def _of(self, confidence: Tensor, outcome: Tensor) -> float:
        return calibration.max_calibration_error(self._grouped(confidence, outcome, self.bins))


class AdaptiveCalibrationError(CalibrationError):
    """Expected calibration error, groups of equal size. See :func:`clkit.metrics.calibration.adaptive_bins`."""

    _grouped = staticmethod(calibration.adaptive_bins)


class BrierScore(_SampleMetric):
    """Mean squared error of the probabilities, 0 … 2. See :func:`clkit.metrics.calibration.brier_scores`."""

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = 0.0
    _numbers = 1
    _label = "Brier score of a sample"
    _scores = staticmethod(calibration.brier_scores)

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Take up a batch.

        Args:
            probabilities: (B, C) floats, at least 0, each row of sum 1.
            targets: (B,) class ids; rows of -1 are left out.

        Raises:
            BatchError: If an argument is not as above. Nothing was kept then.
        """
        self._keep(self._scores(probabilities, targets).cpu().numpy())

    def _of(self, scores: Tensor) -> Tensor:
        return scores.sort().values.mean()  # in any order the same bits

    def _draw(self, scores: Tensor, ax: Axes | None) -> tuple[Figure, Axes]:
        return uncertainty_figures.plot_histograms({"all samples": scores}, ax, xlabel=self._label)


class NegativeLogLikelihood(BrierScore):
    """Mean of -log of the true class's probability. See :func:`clkit.metrics.calibration.log_losses`."""

    _label = "-log p of the true class"
    _scores = staticmethod(calibration.log_losses)
