"""AEF-OCL: a ridge classifier learned from a stream without gradients and without stored samples."""

from __future__ import annotations

from typing import Literal

from clkit.callbacks.head import GraftWhen, HeadCallback
from clkit.features.batch import BatchReader
from clkit.features.observer import FeaturesFrom
from clkit.methods import AnalyticHead

__all__ = ["AEFOCL"]


class AEFOCL(HeadCallback):
    r"""Learns an analytic (ridge) head beside any training, one pass, no gradient, no exemplars.

    Choose it as the first classifier on a frozen pretrained backbone: after any amount of data it equals the ridge
    regression fitted to all data at once, whatever the order. Class imbalance is corrected before each prediction by
    pseudo-features (``balance="pfg"``). Not for a backbone that keeps changing: its sums cannot be recomputed from
    what is stored (see ``reset_each_task``).

    .. math:: W = (H^\top H + \gamma I)^{-1} H^\top Y

    with the lifted features :math:`H` (N, D) and one-hot labels :math:`Y` of everything seen.

    Args:
        gamma: Ridge strength, > 0; an absolute amount, so its effect shrinks as data arrive.
        expansion_dim: Width D of the random lift; ``None`` for no lift. Memory grows with D².
        activation: Of the lift.
        projection_init: ``"uniform"`` as in the authors' code, ``"normal"`` as in RanPAC.
        balance: ``"pfg"`` adds Gaussian pseudo-features for the minority classes, ``"expected"`` their expectation
            (without a lift only), ``"reweight"`` weighs classes by 1/n (a Gram matrix per class), ``"none"`` nothing.
        solver: ``"gram"`` accumulates and solves when asked; ``"recursive"`` keeps the solution up to date.
        noise: Scale (≥ 0) of the pseudo-features' standard deviation.
        pfg_seed: Seed of the pseudo-features.
        pfg_max_per_class: At most so many pseudo-features a class, weighted up; ``None`` for no limit.
        clamp_min: Lower bound of pseudo-features, 0 for backbones that end in a ReLU; ``None`` for none.
        bias: Whether a constant feature is appended (and regularised).
        projection_seed: Seed of the random lift.
        max_classes: Ids at or above are refused before anything is allocated.
        name: Prefix of what is logged, and part of the key in checkpoints.
        layer: Where features are read; see :class:`~clkit.FeatureTap`.
        forward: ``"auto"``, ``"shared"`` or ``"eval"``: which pass the features come from.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.
        graft: ``"never"``, ``"experience_end"`` or ``"fit_end"``: when the head replaces the user's classifier.
        reset_each_task: Whether to start anew with each experience.

    Raises:
        ArgumentError: If an argument is out of its range; the head's own checks run here, before any training.

    Example:
        >>> from clkit.callbacks import AEFOCL
        >>> AEFOCL(gamma=0.1).state_key
        'AEFOCL(aef_ocl)'

    Reference:
        H. Zhuang et al., "Online Analytic Exemplar-Free Continual Learning with Large Models for Imbalanced Autonomous
        Driving Task", IEEE Transactions on Vehicular Technology 2024, arXiv 2405.17779.
    """

    counts_epochs = True

    def __init__(
        self,
        gamma: float = 1.0,
        expansion_dim: int | None = None,
        *,
        activation: Literal["relu", "tanh", "sigmoid"] = "relu",
        projection_init: Literal["uniform", "normal"] = "uniform",
        balance: Literal["none", "pfg", "reweight", "expected"] = "pfg",
        solver: Literal["gram", "recursive"] = "gram",
        noise: float = 1.0,
        pfg_seed: int = 0,
        pfg_max_per_class: int | None = None,
        clamp_min: float | None = None,
        bias: bool = False,
        projection_seed: int = 0,
        max_classes: int = 65_536,
        name: str = "aef_ocl",
        layer: str = "auto",
        forward: FeaturesFrom = "auto",
        batch_reader: BatchReader | None = None,
        graft: GraftWhen = "never",
        reset_each_task: bool = False,
    ) -> None:
        super().__init__(
            name=name,
            layer=layer,
            forward=forward,
            batch_reader=batch_reader,
            graft=graft,
            reset_each_task=reset_each_task,
        )
        self.gamma = gamma
        self.expansion_dim = expansion_dim
        self.activation = activation
        self.projection_init = projection_init
        self.balance = balance
        self.solver = solver
        self.noise = noise
        self.pfg_seed = pfg_seed
        self.pfg_max_per_class = pfg_max_per_class
        self.clamp_min = clamp_min
        self.bias = bias
        self.projection_seed = projection_seed
        self.max_classes = max_classes
        self.make_head(1)  # a wrong argument is an error now, not after the first batch

    def make_head(self, in_features: int) -> AnalyticHead:
        """Return a ridge head of these settings."""
        return AnalyticHead(
            in_features,
            gamma=self.gamma,
            expansion_dim=self.expansion_dim,
            activation=self.activation,
            projection_init=self.projection_init,
            balance=self.balance,
            solver=self.solver,
            noise=self.noise,
            pfg_seed=self.pfg_seed,
            pfg_max_per_class=self.pfg_max_per_class,
            clamp_min=self.clamp_min,
            bias=self.bias,
            projection_seed=self.projection_seed,
            max_classes=self.max_classes,
        )
