"""AnaCP: features moved towards class means that are spread apart, by ridge solves of running sums."""

from __future__ import annotations

from typing import Any, Literal

from clkit.arguments import check_arguments
from clkit.callbacks.head import HeadCallback
from clkit.methods import AnaCP as AnaCPHead

__all__ = ["AnaCP"]


class AnaCP(HeadCallback):
    r"""Analytic contrastive projection on a stream: no gradient, no stored samples, exact from sums.

    Choose it on a frozen pretrained backbone where classes are many and the last point counts; it takes a few times
    the memory and the solve of :class:`~clkit.callbacks.LDA`, which is the head to start with.

    .. math:: f(x) = \mathrm{mean}_r \, \mathrm{unit}(\theta_r^\top \mathrm{gelu}(P_r x)), \qquad
              \theta_r = (Z_r^\top Z_r + \gamma I)^{-1} Z_r^\top T

    with targets T that spread the class means apart. After any amount of data it equals the same formula on all data.

    Args:
        gamma: Strength of the ridge regressions, > 0; ``"auto"``: by generalised cross-validation from the sums.
        expansion_dim: L, width of the maps; ``None``: twice the features, at least 1000 and at most 5000.
        maps: How many random maps are averaged.
        targets: ``"published"``, as in the public code, or ``"unwhitened"``; see :class:`clkit.methods.AnaCP`.
        readout: ``"draws"``: ridge regression on rows drawn from a Gaussian of each class; ``"nearest"``: the nearest
            target, which draws nothing.
        draws: Rows that are drawn of each class at a solve.
        seed: Of maps and draws; maps are made again from it and never stored.
        max_classes: Ids at or above are refused before anything is allocated.
        name: Prefix of what is logged, and part of the key in checkpoints.
        options: Further arguments of :class:`HeadCallback`: ``layer``, ``forward``, ``batch_reader``,
            ``reset_each_task`` and ``epochs``. It cannot be grafted: more than one linear layer of it is learned.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> from clkit.callbacks import AnaCP
        >>> AnaCP(readout="nearest").state_key
        'AnaCP(anacp)'

    Reference:
        S. Momeni, C. Xiao and B. Liu, "AnaCP: Toward Upper-Bound Continual Learning via Analytic Contrastive
        Projection", NeurIPS 2025, arXiv 2511.13880.
    """

    def __init__(
        self,
        gamma: float | Literal["auto"] = "auto",
        *,
        expansion_dim: int | None = None,
        maps: int = 3,
        targets: Literal["published", "unwhitened"] = "published",
        readout: Literal["draws", "nearest"] = "draws",
        draws: int = 100,
        seed: int = 0,
        max_classes: int = 65_536,
        name: str = "anacp",
        **options: Any,
    ) -> None:
        check_arguments(AnaCP, locals())
        super().__init__(name=name, **options)
        self._head_options: dict[str, Any] = {
            "gamma": gamma,
            "expansion_dim": expansion_dim,
            "maps": maps,
            "targets": targets,
            "readout": readout,
            "draws": draws,
            "seed": seed,
            "max_classes": max_classes,
        }
        self.make_head(1)  # a wrong argument is an error now, not after the first batch

    def make_head(self, in_features: int) -> AnaCPHead:
        """Return a head of these settings."""
        return AnaCPHead(in_features, **self._head_options)
