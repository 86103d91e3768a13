"""KLDA: LDA on random Fourier features, exact from running sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from clkit.arguments import check_arguments
from clkit.callbacks.head import HeadCallback
from clkit.methods import KLDA as KLDAHead  # noqa: N811  the callback and its head share the method's name

__all__ = ["KLDA"]


class KLDA(HeadCallback):
    r"""Kernel LDA on a stream: the nearest mean of random Fourier features, in the metric of their scatter.

    Choose it beside :class:`~clkit.callbacks.LDA` where classes are not told apart by straight borders. On strong
    pretrained features it rarely wins, and its state and solves are larger; run both and compare.

    .. math:: \hat y(x) = \arg\min_c (z(x) - \mu_c)^\top [S + \gamma I]^{-1} (z(x) - \mu_c), \qquad
              z(x) = \sqrt{2/L} \, \cos(P x + b)

    Args:
        bandwidth: g of the kernel :math:`\exp(-g \lVert x - x' \rVert^2)` of rows of unit length, above 0; of several,
            each with sums of its own, each solve takes the one of least cross-validated error, and cannot be grafted.
        expansion_dim: L, width of the map; ``None``: twice the features, at least 1000 and at most 5000.
        shrinkage: As for :class:`~clkit.callbacks.LDA`.
        unit: Whether features are scaled to unit length first.
        seed: Of the map, which is made again from it and never stored.
        max_classes: Ids at or above are refused before anything is allocated.
        name: Prefix of what is logged, and part of the key in checkpoints.
        options: Further arguments of :class:`HeadCallback`: ``layer``, ``forward``, ``batch_reader``, ``graft``,
            ``reset_each_task`` and ``epochs``.

    Raises:
        ArgumentError: If an argument is out of its range.

    Example:
        >>> from clkit.callbacks import KLDA
        >>> KLDA(bandwidth=[0.05, 0.5]).state_key
        'KLDA(klda)'

    Reference:
        S. Momeni, S. Mazumder and B. Liu, "Continual Learning Using a Kernel-Based Method Over Foundation Models",
        AAAI 2025, arXiv 2412.15571.
    """

    def __init__(
        self,
        bandwidth: float | Sequence[float] = 0.02,
        *,
        expansion_dim: int | None = None,
        shrinkage: float | Literal["auto"] = "auto",
        unit: bool = True,
        seed: int = 0,
        max_classes: int = 65_536,
        name: str = "klda",
        **options: Any,
    ) -> None:
        check_arguments(KLDA, locals())
        super().__init__(name=name, **options)
        self._head_options: dict[str, Any] = {
            "bandwidth": bandwidth,
            "expansion_dim": expansion_dim,
            "shrinkage": shrinkage,
            "unit": unit,
            "seed": seed,
            "max_classes": max_classes,
        }
        self.make_head(1)  # a wrong argument is an error now, not after the first batch

    def make_head(self, in_features: int) -> KLDAHead:
        """Return a head of these settings."""
        return KLDAHead(in_features, **self._head_options)
