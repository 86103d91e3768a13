"""LDA: one mean a class and one covariance for all, exact from running sums."""

from __future__ import annotations

from typing import Any, Literal

from clkit.arguments import check_arguments
from clkit.callbacks.head import HeadCallback
from clkit.methods import LDAHead

__all__ = ["LDA"]


class LDA(HeadCallback):
    r"""Linear discriminant analysis on a stream: the nearest mean in the metric of the pooled covariance.

    Choose it as the first classifier on a frozen pretrained backbone: it sees the shape of the classes, which
    :class:`~clkit.callbacks.NMC` does not, and has nothing to tune. It is the exact, order-free form of what Deep SLDA
    approximates sample by sample.

    .. math:: \hat y(x) = \arg\min_c (x - \mu_c)^\top \Lambda (x - \mu_c), \qquad
              \Lambda = [\Sigma + \tfrac{\gamma}{N} I]^{-1}

    Args:
        shrinkage: ``"auto"``: γ is what generalised cross-validation chooses from the sums at each solve; a number ε in
            [0, 1] makes it Λ = [(1 - ε) Σ + ε I]⁻¹, as in Deep SLDA, which takes 1e-4.
        unit: Whether features are scaled to unit length first.
        max_classes: Ids at or above are refused before anything is allocated.
        name: Prefix of what is logged, and part of the key in checkpoints.
        options: Further arguments of :class:`HeadCallback`: ``layer``, ``forward``, ``batch_reader``, ``graft``,
            ``reset_each_task`` and ``epochs``.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> from clkit.callbacks import LDA
        >>> LDA().state_key
        'LDA(lda)'

    Reference:
        T. Hayes and C. Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR
        Workshops 2020, for the rule and ε. Generalised cross-validation: G. Golub, M. Heath,
        G. Wahba, Technometrics 21, 1979.
    """

    def __init__(
        self,
        shrinkage: float | Literal["auto"] = "auto",
        *,
        unit: bool = False,
        max_classes: int = 65_536,
        name: str = "lda",
        **options: Any,
    ) -> None:
        check_arguments(LDA, locals())
        super().__init__(name=name, **options)
        self.shrinkage = shrinkage
        self.unit = unit
        self.max_classes = max_classes
        self.make_head(1)  # a wrong argument is an error now, not after the first batch

    def make_head(self, in_features: int) -> LDAHead:
        """Return an LDA head of these settings."""
        return LDAHead(in_features, shrinkage=self.shrinkage, unit=self.unit, max_classes=self.max_classes)
