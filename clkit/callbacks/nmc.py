"""NMC: the nearest-class-mean baseline on the features of any network."""

from __future__ import annotations

from typing import Literal

from clkit.batch import BatchReader
from clkit.callbacks.head import GraftWhen, HeadCallback
from clkit.methods import NearestMeanHead
from clkit.observer import FeaturesFrom

__all__ = ["NMC"]


class NMC(HeadCallback):
    r"""Keeps one mean feature a class and predicts the class of the nearest mean: the floor to beat.

    Choose it as the baseline of every continual run on a pretrained backbone: it costs one product a batch, needs no
    setting, and is not disturbed by class imbalance. Extra epochs over the same data leave the means as they are. Not
    where features of a class are far from round; see :class:`~clkit.callbacks.LDA` and
    :class:`~clkit.callbacks.AEFOCL`.

    .. math:: \hat y(x) = \arg\min_c \lVert g(x) - M_c \rVert_2, \qquad M_c = \frac{1}{n_c} \sum_{y_i = c} g(x_i)

    with :math:`g` the L2-normalised feature and means that are not normalised again (``metric="janson"``).

    Args:
        metric: ``"janson"``; ``"euclidean"``: nothing is normalised; ``"icarl"``: the means are normalised too;
            ``"cosine"``: cosine to the mean of raw features (SimpleCIL).
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
        >>> from clkit.callbacks import NMC
        >>> NMC(metric="cosine", name="simple_cil").state_key
        'NMC(simple_cil)'

    Reference:
        P. Janson et al., "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning",
        NeurIPS 2022 Workshop on Distribution Shifts, arXiv 2210.04428.
    """

    def __init__(
        self,
        metric: Literal["janson", "euclidean", "icarl", "cosine"] = "janson",
        *,
        max_classes: int = 65_536,
        name: str = "nmc",
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
        self.metric = metric
        self.max_classes = max_classes
        self.make_head(1)  # a wrong argument is an error now, not after the first batch

    def make_head(self, in_features: int) -> NearestMeanHead:
        """A nearest-mean head of these settings."""
        return NearestMeanHead(in_features, metric=self.metric, max_classes=self.max_classes)
