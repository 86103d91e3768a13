"""Pseudo-features of a class: rows drawn from what is known of it, in place of samples that it lacks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clkit.methods._checks import generator

__all__ = ["pseudo_features"]

_BLOCK_ROWS = 256  # of pseudo-features at once; fixed for good: the numbers drawn depend on it


def pseudo_features(
    mean: Tensor,
    deviation: Tensor,
    count: int,
    *,
    class_id: int,
    seed: int = 0,
    noise: float = 1.0,
    clamp_min: float | None = None,
) -> Iterator[Tensor]:
    r"""Draw pseudo-features :math:`z = \mu_c + \text{noise} \cdot \sigma_c \odot \varepsilon`, block by block.

    Row r is a function of ``(seed, class_id, r)`` alone: independent of the device, of how many rows are drawn and of
    everything drawn before. Noise is always drawn on the CPU in float64 blocks of (256, d), and surplus rows are
    dropped, because how many numbers are asked for at once changes what a generator returns. The global random state
    is not touched.

    Yields:
        (at most 256, d) float64 on the device of ``mean``, which is (d,) float64 as ``deviation`` is; together
        ``count`` rows.

    Example:
        >>> mean, deviation = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        >>> [len(rows) for rows in pseudo_features(mean, deviation, 300, class_id=0)]
        [256, 44]

    Source: H. Zhuang et al., arXiv 2405.17779.
    """
    noise_of_class = generator(seed, class_id)
    for start in range(0, count, _BLOCK_ROWS):
        drawn = torch.randn(_BLOCK_ROWS, mean.numel(), generator=noise_of_class, dtype=torch.float64, device="cpu")
        rows = mean + noise * deviation * drawn[: count - start].to(mean.device)
        yield rows if clamp_min is None else rows.clamp(min=clamp_min)
