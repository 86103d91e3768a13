"""LDA: one mean a class and one covariance for all, exact from running sums."""

from __future__ import annotations

from clkit.callbacks.head import GraftWhen, HeadCallback
from clkit.features.batch import BatchReader
from clkit.features.observer import FeaturesFrom
from clkit.methods import LDAHead

__all__ = ["LDA"]


class LDA(HeadCallback):
    r"""Linear discriminant analysis on a stream: the nearest mean in the metric of the pooled covariance.

    Choose it between the two others: it sees the shape of the classes, which :class:`~clkit.callbacks.NMC` does not,
    and needs no ridge strength. It is the exact, order-free form of what Deep SLDA approximates sample by sample.

    .. math:: \hat y(x) = \arg\min_c (x - \mu_c)^\top \Lambda (x - \mu_c), \qquad
              \Lambda = [(1 - \varepsilon) \Sigma + \varepsilon I]^{-1}

    Args:
        shrinkage: ε in [0, 1].
        max_classes: Ids at or above are refused before anything is allocated.
        name: Prefix of what is logged, and part of the key in checkpoints.
        layer: Where features are read; see :class:`~clkit.FeatureTap`.
        forward: ``"auto"``, ``"shared"`` or ``"eval"``: which pass the features come from.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.
        graft: ``"never"``, ``"experience_end"`` or ``"fit_end"``: when the head replaces the user's classifier.
        reset_each_task: Whether to start anew with each experience.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> from clkit.callbacks import LDA
        >>> LDA().state_key
        'LDA(lda)'

    Reference:
        T. Hayes and C. Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR
        Workshops 2020, for the rule and ε.
    """

    def __init__(
        self,
        shrinkage: float = 1e-4,
        *,
        max_classes: int = 65_536,
        name: str = "lda",
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
        self.shrinkage = shrinkage
        self.max_classes = max_classes
        self.make_head(1)  # a wrong argument is an error now, not after the first batch

    def make_head(self, in_features: int) -> LDAHead:
        """Return an LDA head of these settings."""
        return LDAHead(in_features, shrinkage=self.shrinkage, max_classes=self.max_classes)
