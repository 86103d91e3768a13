"""A forest of regression trees as plain tensors: grown by scikit-learn, read without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from clkit.errors import StateError
from clkit.methods._error_models import ErrorModel, FitSettings
from clkit.schema import Numbers, Table

__all__ = ["Forest"]

_LARGEST = 3e38  # trees compare in float32, which ends there
_ROWS = 8192  # read at a time: 50 trees then take some MiB
_TRIED = 0.5  # share of the features that are tried at each split


@dataclass
class Forest(ErrorModel):
    """A random forest whose predictions are averages of the targets that it was fitted to.

    The trees stand one behind the other. A leaf is its own child, so that each row can go down as many steps as the
    deepest tree has; any other node is before both of its children.

    Attributes:
        roots: (T,) int64, the first node of each tree.
        feature: (N,) int64, the feature that a node asks for.
        threshold: (N,) float64, up to which value the left child is next.
        children: (N, 2) int64, left and right.
        value: (N,) float64, the weighted mean target of a node's records.
        depth: Steps from a root to the deepest leaf.
    """

    monotone: ClassVar[bool] = True
    roots: Tensor
    feature: Tensor
    threshold: Tensor
    children: Tensor
    value: Tensor
    depth: int

    @classmethod
    def fit(cls, phi: Tensor, target: Tensor, weight: Tensor, settings: FitSettings) -> Self:
        """Grow the trees; the records' order counts, as bootstrap samples are drawn from their positions."""
        from sklearn.ensemble import RandomForestRegressor  # takes a second to import

        grown = RandomForestRegressor(
            n_estimators=settings.trees,
            max_depth=settings.max_depth,
            min_samples_leaf=settings.min_leaf,
            max_features=_TRIED,
            monotonic_cst=settings.signs,
            random_state=settings.seed,
            n_jobs=1,
        )
        grown.fit(_single(phi).numpy(), target.numpy(), sample_weight=weight.numpy())
        trees = [each.tree_ for each in grown.estimators_]
        behind = np.cumsum([0, *(tree.node_count for tree in trees)])
        children = []
        for tree, start in zip(trees, behind[:-1], strict=True):
            pair = np.stack([tree.children_left, tree.children_right], axis=1)
            children.append(np.where(pair < 0, np.arange(tree.node_count)[:, None], pair) + start)
        joined = torch.from_numpy(np.concatenate(children))
        leaf = joined[:, 0] == torch.arange(len(joined))
        feature, threshold, value = (
            torch.from_numpy(np.concatenate([getattr(tree, name).reshape(tree.node_count) for tree in trees]))
            for name in ("feature", "threshold", "value")
        )
        feature, threshold = feature.masked_fill(leaf, 0), threshold.masked_fill(leaf, 0.0)
        roots = torch.from_numpy(behind[:-1])
        return cls(roots, feature, threshold, joined, value, _depth(roots, joined, settings.max_depth))

    def predict(self, phi: Tensor) -> Tensor:
        """Return the mean of all trees, in float64."""
        return torch.cat([self._down(rows) for rows in torch.split(_single(phi).double(), _ROWS)])

    def _down(self, rows: Tensor) -> Tensor:
        at, steps = self.roots.expand(len(rows), -1), self.children.flatten()
        for _ in range(self.depth):
            beyond = rows.gather(1, self.feature[at]) > self.threshold[at]
            at = steps[2 * at + beyond]
        return self.value[at].mean(dim=1)

    @staticmethod
    def table(features: int) -> Table:
        """Return what the saved arrays must look like, one by one."""
        return {
            "roots": Numbers(("T",), torch.int32, least=0),
            "feature": Numbers(("N",), torch.int32, least=0, most=features - 1),
            "threshold": Numbers(("N",), torch.float64),
            "children": Numbers(("N", 2), torch.int32, least=0),
            "value": Numbers(("N",), torch.float64),
        }

    @classmethod
    def restored(cls, saved: dict[str, Any], settings: FitSettings) -> Self:
        """Return the forest of saved arrays that are one, in which nothing leads back."""
        roots, feature, children = (saved[name].long() for name in ("roots", "feature", "children"))
        number = len(children)
        own = torch.arange(number)[:, None]
        forward = bool(((children > own).all(dim=1) | (children == own).all(dim=1)).all())
        inside = number > 0 and int(children.max()) < number and len(roots) > 0 and int(roots.max()) < number
        if len(roots) != settings.trees or not (forward and inside):
            raise StateError(
                f"the saved forest has {len(roots)} trees of {number} nodes, which do not lead from {settings.trees} "
                "roots to leaves; the file is damaged"
            )
        depth = _depth(roots, children, settings.max_depth)
        return cls(roots, feature, saved["threshold"], children, saved["value"], depth)

    def state(self) -> dict[str, Any]:
        """Return the arrays, with integers in four bytes."""
        return {
            "roots": self.roots.int(),
            "feature": self.feature.int(),
            "threshold": self.threshold,
            "children": self.children.int(),
            "value": self.value,
        }


def _single(phi: Tensor) -> Tensor:
    """Return features as the trees compare them."""
    return phi.clamp(-_LARGEST, _LARGEST).float()


def _depth(roots: Tensor, children: Tensor, most: int) -> int:
    """Return the steps from the roots to the deepest leaf, which are at most ``most``."""
    leaf = children[:, 0] == torch.arange(len(children))
    at, depth = roots, 0
    while len(at := at[~leaf[at]]):
        depth += 1
        if depth > most:
            raise StateError(f"the saved forest has trees deeper than max_depth={most}; the file is damaged")
        at = torch.unique(children[at])
    return depth
