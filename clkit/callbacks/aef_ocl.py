"""AEF-OCL: a ridge classifier learned from a stream without gradients and without stored samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from clkit.arguments import check_arguments
from clkit.callbacks.head import HeadCallback
from clkit.methods import AnalyticHead

__all__ = ["AEFOCL", "Lift", "PseudoFeatures"]


@dataclass(frozen=True)
class Lift:
    """A fixed random layer that lifts features to more dimensions before the regression.

    Args:
        expansion_dim: Width D behind it, at least 1. Memory grows with D².
        activation: ``"relu"``, ``"tanh"``, ``"sigmoid"`` or ``"gelu"``.
        projection_init: ``"uniform"`` as in the authors' code, ``"normal"`` as in RanPAC.
        projection_seed: Seed of the layer.
    """

    expansion_dim: int
    activation: Literal["relu", "tanh", "sigmoid", "gelu"] = "relu"
    projection_init: Literal["uniform", "normal"] = "uniform"
    projection_seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(Lift, vars(self))


@dataclass(frozen=True)
class PseudoFeatures:
    """How the pseudo-features are drawn that balance classes.

    Args:
        noise: Scale (≥ 0) of their standard deviation.
        clamp_min: Their lower bound, 0 for backbones that end in a ReLU; ``None`` for none.
        pfg_max_per_class: At most so many are drawn a class, and weighted up; ``None`` for no limit.
        pfg_seed: Seed of the draws.
    """

    noise: float = 1.0
    clamp_min: float | None = None
    pfg_max_per_class: int | None = None
    pfg_seed: int = 0

    def __post_init__(self) -> None:
        check_arguments(PseudoFeatures, vars(self))


class AEFOCL(HeadCallback):
    r"""Learns an analytic (ridge) head beside any training, one pass, no gradient, no exemplars.

    Choose it on a frozen pretrained backbone where a lift or the balancing of classes is wanted: after any amount of
    data it equals the ridge regression fitted to all data at once, whatever the order. Class imbalance is corrected
    before each prediction by pseudo-features (``balance="pfg"``). Not for a backbone that keeps changing: its sums
    cannot be recomputed from what is stored (see ``reset_each_task``).

    .. math:: W = (H^\top H + \gamma I)^{-1} H^\top Y

    with the lifted features :math:`H` (N, D) and one-hot labels :math:`Y` of everything seen.

    Args:
        gamma: Ridge strength, > 0; an absolute amount, so its effect shrinks as data arrive. ``"auto"``: what
            generalised cross-validation chooses from the sums, anew at each solve (not with ``solver="recursive"``).
        lift: The :class:`Lift` of the features; ``None`` for none.
        balance: ``"pfg"`` adds Gaussian pseudo-features for the minority classes, ``"expected"`` their expectation
            (without a lift only), ``"reweight"`` weighs classes by 1/n (a Gram matrix per class), ``"none"`` nothing.
        pseudo_features: The :class:`PseudoFeatures` of ``"pfg"`` and ``"expected"``.
        solver: ``"gram"`` accumulates and solves when asked; ``"recursive"`` keeps the solution up to date.
        bias: Whether a constant feature is appended (and regularised).
        max_classes: Ids at or above are refused before anything is allocated.
        name: Prefix of what is logged, and part of the key in checkpoints.
        options: Further arguments of :class:`HeadCallback`: ``layer``, ``forward``, ``batch_reader``, ``graft``,
            ``reset_each_task`` and ``epochs``.

    Raises:
        ArgumentError: If an argument is out of its range; the head's own checks run here, before any training.

    Example:
        >>> from clkit.callbacks import AEFOCL, Lift
        >>> AEFOCL(gamma=0.1, lift=Lift(500)).state_key
        'AEFOCL(aef_ocl)'

    Reference:
        H. Zhuang et al., "Online Analytic Exemplar-Free Continual Learning with Large Models for Imbalanced Autonomous
        Driving Task", IEEE Transactions on Vehicular Technology 2024, arXiv 2405.17779.
    """

    counts_epochs = True

    def __init__(
        self,
        gamma: float | Literal["auto"] = 1.0,
        lift: Lift | None = None,
        *,
        balance: Literal["none", "pfg", "reweight", "expected"] = "pfg",
        pseudo_features: PseudoFeatures = PseudoFeatures(),
        solver: Literal["gram", "recursive"] = "gram",
        bias: bool = False,
        max_classes: int = 65_536,
        name: str = "aef_ocl",
        **options: Any,
    ) -> None:
        check_arguments(AEFOCL, locals())
        super().__init__(name=name, **options)
        self.max_classes = max_classes
        self._head_options: dict[str, Any] = {
            **({} if lift is None else asdict(lift)),
            **asdict(pseudo_features),
            "gamma": gamma,
            "balance": balance,
            "solver": solver,
            "bias": bias,
            "max_classes": max_classes,
        }
        self.make_head(1)  # a wrong argument is an error now, not after the first batch

    def make_head(self, in_features: int) -> AnalyticHead:
        """Return a ridge head of these settings."""
        return AnalyticHead(in_features, **self._head_options)
