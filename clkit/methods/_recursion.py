r"""The recursive form of ridge regression: the inverse and the weights themselves, updated with each batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import Batch, Ids
from clkit.methods._state import PlainState, exact
from clkit.schema import Numbers, Table

__all__ = ["RecursiveLeastSquares", "not_positive_definite", "woodbury_update"]

_INVERSE_LIMIT = 1e240  # the inverse begins as I/γ


class RecursiveLeastSquares(PlainState):
    """The pair (R, W) of the recursive form: R = (HᵀH + γI)⁻¹ and one column of W for each class seen."""

    def __init__(self, width: int, gamma: float) -> None:
        super().__init__()
        self.width = width
        self.gamma = gamma
        self.reset()

    def reset(self) -> None:
        """Go back to R = I/γ and no class."""
        self.ids: Ids = np.empty(0, dtype=np.int64)
        with exact():
            self.inverse = torch.eye(self.width, dtype=torch.float64, device=self._device) / self.gamma
            self.weight = torch.zeros(self.width, 0, dtype=torch.float64, device=self._device)

    def keep(self, ids: Ids) -> None:
        """Drop the columns of all other classes."""
        kept = np.isin(self.ids, ids)
        self.ids = self.ids[kept]
        with exact():
            self.weight = self.weight[:, torch.from_numpy(kept).to(self._device)]

    def _add(self, rows: Tensor, batch: Batch) -> None:
        """Absorb mapped rows (n, D) of a checked batch; all or nothing."""
        if not batch.ids.size:
            return
        union = np.union1d(self.ids, batch.ids)
        old = torch.from_numpy(np.searchsorted(union, self.ids)).to(rows.device)
        weight = self.weight.new_zeros(self.width, union.size).index_copy_(1, old, self.weight)
        columns = torch.from_numpy(np.searchsorted(union, batch.ids)).to(rows.device)[batch.inverse]
        targets = rows.new_zeros(rows.shape[0], union.size).scatter_(1, columns[:, None], 1.0)
        if batch.finite is not None:  # rows of zeros change nothing, whatever their targets
            rows = torch.where(batch.finite, rows, 0.0)
        self.inverse, self.weight = woodbury_update(self.inverse, weight, rows, targets, self.gamma)
        self.ids = union

    def _move(self, device: torch.device) -> None:
        self.inverse, self.weight = self.inverse.to(device), self.weight.to(device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "classes"] = torch.from_numpy(self.ids.copy())
        destination[prefix + "inverse"] = self.inverse.clone()
        destination[prefix + "weight"] = self.weight.clone()

    def _saved_table(self) -> Table:
        positive = ("positive on its diagonal", _has_positive_diagonal)
        return {
            "classes": Numbers(("C",), least=0, ids=True),
            "inverse": Numbers((self.width, self.width), torch.float64, most=_INVERSE_LIMIT, rule=positive),
            "weight": Numbers((self.width, "C"), torch.float64),
        }

    def _take(self, saved: dict[str, Any]) -> None:
        self.ids = saved["classes"].cpu().numpy().copy()
        self.inverse = saved["inverse"].to(self._device, copy=True)
        self.weight = saved["weight"].to(self._device, copy=True)


def _has_positive_diagonal(inverse: Tensor) -> bool:
    return bool((inverse.diagonal() > 0).all())


def woodbury_update(
    inverse: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    r"""Return (R, W) after rows H with targets Y, by the gain form.

    .. math::
        U = R H^\top, \quad S = I + H U = L L^\top, \quad W \leftarrow W + U S^{-1} (Y - H W), \quad
        R \leftarrow R - (L^{-1} U^\top)^\top (L^{-1} U^\top)

    No difference of large, nearly equal matrices enters W, and R stays symmetric. Rows are taken in chunks of at most
    D/4, which keeps the factorised matrix small.
    """
    for chunk in range(0, rows.shape[0], size := max(1, inverse.shape[0] // 4)):
        H, Y = rows[chunk : chunk + size], targets[chunk : chunk + size]
        U = inverse @ H.T
        S = H @ U
        S = (S + S.T) / 2
        S.diagonal().add_(1.0)
        L, failed = torch.linalg.cholesky_ex(S)
        if int(failed):
            raise not_positive_definite(gamma, float(S.diagonal().min()))
        weight = weight + U @ torch.cholesky_solve(Y - H @ weight, L)
        V = torch.linalg.solve_triangular(L, U.T, upper=False)
        inverse = torch.addmm(inverse, V.T, V, alpha=-1)
    if not _has_positive_diagonal(inverse):
        raise BatchError(
            f"the recursion has lost all digits with gamma={gamma}: the inverse is no longer positive; nothing was "
            f'changed; raise gamma, scale the features down or use solver="gram"'
        )
    return inverse, weight


def not_positive_definite(gamma: float, smallest: float) -> ArgumentError:
    """Return the error of a system that is not positive definite."""
    return ArgumentError(
        f"the ridge system has no Cholesky factor with gamma={gamma}: its smallest diagonal is {smallest:.3g}; "
        f"raise gamma (it has the scale of squared features) or scale the features"
    )
