r"""Direct epistemic uncertainty prediction: a second regressor learns where the first one will be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError, ConfigurationError, StateError
from clkit.methods._checks import check_count, check_finite
from clkit.methods._error_models import (
    ERROR_LIMIT,
    Boosting,
    ErrorModel,
    FitSettings,
    GaussianProcess,
    Network,
    Ridge,
)
from clkit.methods._forest import Forest
from clkit.methods._state import exact
from clkit.schema import Nested, OneOf, Real, Settings, Table, Whole, check_format, read_state, saved_entry

__all__ = ["ErrorPredictor", "Uncertainty"]

ErrorModelName: TypeAlias = Literal["forest", "ridge", "gbt", "mlp", "gp"]
_MODELS: dict[str, type[ErrorModel]] = {
    "forest": Forest,
    "ridge": Ridge,
    "gbt": Boosting,
    "mlp": Network,
    "gp": GaussianProcess,
}
_FLOOR = 1e-5  # of errors of which the logarithm is taken
_LARGEST = 1e99  # of a feature, in magnitude
_UNKNOWN = 1.0  # the error to expect where nothing was ever recorded
_SEEDS = 2**32  # as many as scikit-learn takes


class Uncertainty(NamedTuple):
    """What is said of each input, (B,) float64 in the unit of the loss.

    Attributes:
        total: The error to expect.
        aleatoric: The part of it that no predictor could avoid.
        epistemic: What more data would remove, ``max(0, total - aleatoric)``.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


class ErrorPredictor:
    r"""Predicts the error of another predictor from features that say how much that one has learned near an input.

    With records :math:`(\phi_i, l_i)` of errors on samples that had not been learned when they were made, it fits
    :math:`e(\phi) \approx E[l \mid \phi]`, the total uncertainty in the unit of the loss; with ``"error"`` as the loss
    the probability of being wrong. It is only as good as its records: errors on learned samples give nearly 0
    everywhere.

    Predictions stay within the errors that were recorded. Below ``min_records`` records they are their weighted mean,
    and 1 where there are none. The global random state is left alone. Everything is computed on the CPU in float64; a
    forest is read from tensors, so that the object that was fitted and one that was loaded give the same bits.

    Args:
        model: ``"forest"`` averages recorded errors; ``"gbt"``, boosted trees, is saved as its records and fitted again
            when it is loaded; ``"ridge"``, ``"mlp"`` (two layers of 64) and ``"gp"`` (of at most 1000 records, drawn)
            are for comparison.
        signs: For each feature +1 where a larger value can only mean more error, -1 less, 0 either; held exactly, and
            worth much far away from all records. Only for ``"forest"`` and ``"gbt"``.
        trees: Trees of ``"forest"``, rounds of ``"gbt"``.
        max_depth: Depth of their trees.
        min_leaf: Fewest records in a leaf.
        transform: ``"log"`` fits the logarithm of errors (at least 1e-5) and predicts the geometric mean, which ranks
            heavy-tailed losses better and is too small as a mean: no noise can be subtracted from it.
        min_records: Records from which on a model is fitted.
        seed: Of bootstrap samples and initial weights, from 0 to 2**32 - 1.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> phi = torch.linspace(0, 1, 400)[:, None]
        >>> error = (phi[:, 0] > 0.5).double()
        >>> predictor = ErrorPredictor(signs=[1])
        >>> predictor.fit(phi, error)
        >>> predictor.predict(torch.tensor([[0.1], [0.9], [7.0]])).tolist()
        [0.0, 1.0, 1.0]

    Source: S. Lahlou, M. Jain, H. Nekoei, V. Butoi, P. Bertin, J. Rector-Brooks, M. Korablyov, Y. Bengio, "DEUP: Direct
    Epistemic Uncertainty Prediction", TMLR 2023, arXiv 2102.08501, Algorithm 1. The forest, its signs and the clip at 0
    are this library's.
    """

    _format = 1

    def __init__(
        self,
        model: ErrorModelName = "forest",
        signs: Sequence[int] | None = None,
        trees: int = 50,
        max_depth: int = 8,
        min_leaf: int = 10,
        transform: Literal["log"] | None = None,
        min_records: int = 50,
        seed: int = 0,
    ) -> None:
        check_arguments(ErrorPredictor, locals())
        if signs is not None and not set(signs) <= {-1, 0, 1}:
            raise ArgumentError(f"signs must be -1, 0 or 1 for each feature, got {list(signs)}")
        if signs is not None and not _MODELS[model].monotone:
            holding = " or ".join(repr(name) for name, kind in _MODELS.items() if kind.monotone)
            raise ArgumentError(f"signs are held by model={holding} only, got model={model!r}; leave them out")
        for name, value in (("trees", trees), ("max_depth", max_depth), ("min_leaf", min_leaf)):
            check_count(name, value)
        self.model = model
        self.transform = transform
        self.min_records = check_count("min_records", min_records, at_least=2)
        if check_count("seed", seed, at_least=0) >= _SEEDS:
            raise ArgumentError(f"seed must be below 2**32, got {seed}")
        own_signs = None if signs is None else [int(sign) for sign in signs]
        self._settings = FitSettings(own_signs, trees, max_depth, min_leaf, seed)
        self._fitted: ErrorModel | None = None
        self._features: int | None = None
        self._records = 0
        self._mean = self._low = self._high = _UNKNOWN

    @property
    def is_fitted(self) -> bool:
        """Whether predictions depend on the features; otherwise they are one number."""
        return self._fitted is not None

    @property
    def records(self) -> int:
        """Records of the last fit that had a weight."""
        return self._records

    @property
    def mean_error(self) -> float:
        """Weighted mean of the errors recorded: what is to be said where features are not known; 1 without records."""
        return self._mean

    @property
    def features(self) -> int | None:
        """K, of the last fit; ``None`` before."""
        return self._features

    def fit(self, phi: Tensor, error: Tensor, weight: Tensor | None = None) -> None:
        """Fit to records, in place of those from before; their order counts, so give them in a fixed one.

        Args:
            phi: (N, K) floating-point features.
            error: (N,) losses, from 0 to 1e30.
            weight: (N,) weights, at least 0; all 1 if ``None``. Records without a weight do not count.

        Raises:
            BatchError: If shapes do not fit or values are not finite or not allowed; nothing is changed then.
        """
        with exact():
            rows = self._checked(phi, None)
            errors = _column("error", error, len(rows))
            weights = torch.ones_like(errors) if weight is None else _column("weight", weight, len(rows))
            used = weights > 0
            if len(rows) and not bool(used.any()):
                raise BatchError("weight must be above 0 for one record at least, got only zeros")
            rows, errors, weights = rows[used], errors[used], weights[used]
            mean = low = high = _UNKNOWN
            fitted = None
            if len(rows):
                low, high = (float(each) for each in errors.aminmax())
                mean = min(max(float(weights @ errors / weights.sum()), low), high)
            if len(rows) >= self.min_records:
                target = errors.clamp(min=_FLOOR).log() if self.transform == "log" else errors
                fitted = _MODELS[self.model].fit(rows, target, weights, self._settings)
        self._fitted, self._features, self._records = fitted, phi.shape[1], len(rows)
        self._mean, self._low, self._high = mean, low, high

    def predict(self, phi: Tensor) -> Tensor:
        """Return the error to expect, (B,) float64 on the device of ``phi`` (on the CPU where it has no float64).

        Args:
            phi: (B, K) floating-point features, as those of the records; an infinite one is as large as can be.

        Raises:
            BatchError: If the shape does not fit or features are NaN.
        """
        with exact():
            rows = self._checked(phi, self._features, infinite=True)
            if self._fitted is None or not len(rows):
                total = rows.new_full((len(rows),), self._mean)
            else:
                total = self._fitted.predict(rows)
                if self.transform == "log":
                    total = total.exp()
                total = total.clamp(self._low, self._high)  # no mean of recorded errors leaves their range
            return total if phi.device.type == "mps" else total.to(phi.device)

    def uncertainty(self, phi: Tensor, aleatoric: float | Tensor = 0.0) -> Uncertainty:
        """Return what is to expect of each input, the part that is noise, and the rest.

        Args:
            phi: (B, K) features.
            aleatoric: The noise in the unit of the loss, at least 0: one number or (B,). With 0 the rest is an upper
                bound.

        Raises:
            BatchError: As in :meth:`predict`, or if the noise has another shape, is negative or not finite.
            ConfigurationError: If there is noise to subtract from a geometric mean (``transform="log"``).

        Example:
            >>> predictor = ErrorPredictor()
            >>> predictor.fit(torch.zeros(4, 1), torch.tensor([0.0, 1.0, 1.0, 1.0]))
            >>> predictor.uncertainty(torch.zeros(1, 1), aleatoric=0.25)[2].tolist()
            [0.5]
        """
        total = self.predict(phi)
        with exact():
            given = torch.as_tensor(aleatoric, dtype=torch.float64, device=total.device)
            if given.shape not in ((), total.shape):
                raise BatchError(
                    f"aleatoric must be a number or have shape {tuple(total.shape)}, got {tuple(given.shape)}"
                )
            if not bool(((given >= 0) & given.isfinite()).all()):
                raise BatchError("aleatoric must be finite and at least 0")
            if self.transform == "log" and bool((given > 0).any()):
                raise ConfigurationError(
                    "transform='log' predicts geometric means, which are smaller than means, so that noise cannot be "
                    "subtracted from them; leave out one of the two"
                )
            noise = given.expand(total.shape).clone()
            return Uncertainty(total, noise, (total - noise).clamp(min=0))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was fitted, as tensors and plain values."""
        state: dict[str, Any] = {
            "format": self._format,
            "settings": self._described(),
            "features": self._features,
            "records": self._records,
            "mean": self._mean,
            "low": self._low,
            "high": self._high,
            "is_fitted": self.is_fitted,
        }
        if self._fitted is not None:
            state["model"] = {name: _own(value) for name, value in self._fitted.state().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave.

        Raises:
            StateError: If it is of other settings or damaged; nothing is changed then.

        Warns for ``model="gbt"`` if this release of scikit-learn fits other trees than the one that was saved.
        """
        owner = type(self).__name__
        check_format(state, self._format, owner)
        fitted = saved_entry(state, "is_fitted", OneOf((False, True)), owner)
        features = saved_entry(state, "features", Whole(least=1, most=2**20, optional=True), owner)
        kind = _MODELS[self.model]
        error = Real(least=0, most=ERROR_LIMIT)
        table: Table = {
            "format": OneOf((self._format,)),
            "settings": Settings(self._described(), advice="build the predictor with the saved settings"),
            "features": OneOf((features,)),
            "records": Whole(least=self.min_records if fitted else 0, most=2**53),
            "mean": error,
            "low": error,
            "high": error,
            "is_fitted": OneOf((fitted,)),
            **({"model": Nested(kind.table(features or 1))} if fitted else {}),
        }
        saved = read_state(state, table, owner)
        signs = self._settings.signs
        odd = not saved["records"] and not saved["low"] == saved["mean"] == saved["high"] == _UNKNOWN
        odd |= fitted and features != (len(signs) if signs is not None else features or 0)
        if odd or not saved["low"] <= saved["mean"] <= saved["high"]:
            raise StateError(
                f"{owner}: {saved['records']} records of {features} features have errors from {saved['low']} to "
                f"{saved['high']} with mean {saved['mean']}; the file is damaged"
            )
        with exact():
            model = None
            if fitted:
                own = {name: _own(value) for name, value in saved["model"].items()}
                model = kind.restored(own, self._settings)
        self._fitted, self._features, self._records = model, features, saved["records"]
        self._mean, self._low, self._high = saved["mean"], saved["low"], saved["high"]

    def _described(self) -> dict[str, Any]:
        return {
            "model": self.model,
            **self._settings._asdict(),
            "transform": self.transform,
            "min_records": self.min_records,
        }

    def _checked(self, phi: Tensor, width: int | None, *, infinite: bool = False) -> Tensor:
        """Return features as float64 on the CPU."""
        if not isinstance(phi, Tensor) or phi.ndim != 2 or not phi.dtype.is_floating_point or not phi.shape[1]:
            seen = f"{phi.dtype} of shape {tuple(phi.shape)}" if isinstance(phi, Tensor) else type(phi).__name__
            raise BatchError(f"phi must be floating-point features of shape (B, K), got {seen}")
        signs = self._settings.signs
        for wanted, what in (
            (width, "the records had"),
            (None if signs is None else len(signs), "there are signs for"),
        ):
            if wanted not in (None, phi.shape[1]):
                raise BatchError(f"phi has {phi.shape[1]} features, but {what} {wanted}")
        rows = phi.detach().cpu().double()
        rows = rows.clamp(-_LARGEST, _LARGEST) if infinite else rows
        check_finite(rows)
        return rows


def _own(value: Any) -> Any:
    """Return a number, or a tensor that nobody else writes to."""
    return value.cpu().clone() if isinstance(value, Tensor) else value


def _column(name: str, values: Tensor, rows: int) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (rows,) or values.dtype.is_complex:
        seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise BatchError(f"{name} must be a tensor of shape ({rows},), one number a record, got {seen}")
    column = values.detach().cpu().double()
    if not bool(((column >= 0) & (column <= ERROR_LIMIT)).all()):  # NaN is in no bounds
        row = int((~((column >= 0) & (column <= ERROR_LIMIT))).nonzero()[0])
        raise BatchError(f"{name} must be from 0 to {ERROR_LIMIT:g}, got {float(column[row])} in row {row}")
    return column
