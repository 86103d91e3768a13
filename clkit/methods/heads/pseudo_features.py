"""Pseudo-features of a class: rows drawn from what is known of it, in place of samples that it lacks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clkit.methods._checks import generator

__all__ = ["correlated_rows", "pseudo_features"]

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


def correlated_rows(mean: Tensor, factor: Tensor, count: int, *, class_id: int, seed: int) -> Tensor:
    r"""Draw ``count`` rows of :math:`N(\mu, F F^\top)`, of the same noise as :func:`pseudo_features`.

    Args:
        mean: (d,) float64.
        factor: F (d, d) float64, such as a Cholesky factor of a covariance.
        count: Rows, at least 1.
        class_id: Part of the seed of the noise.
        seed: The other part.

    Example:
        >>> mean = torch.zeros(2, dtype=torch.float64)
        >>> rows = correlated_rows(mean, torch.eye(2).double(), 5, class_id=3, seed=0)
        >>> torch.equal(rows, next(pseudo_features(mean, mean + 1, 5, class_id=3)))
        True
    """
    zeros = torch.zeros_like(mean)
    noise = torch.cat(list(pseudo_features(zeros, zeros + 1, count, class_id=class_id, seed=seed)))
    return mean + noise @ factor.T
