"""The regressors behind an error predictor: fitted once, then numbers only, which a state can hold."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from clkit.errors import StateError
from clkit.methods._checks import generator
from clkit.schema import Numbers, Real, Table

__all__ = ["ERROR_LIMIT", "Boosting", "ErrorModel", "FitSettings", "GaussianProcess", "Network", "Ridge"]

ERROR_LIMIT = 1e30  # boosting sums gradients in float32
_FAR = 1e3  # standard deviations from the mean beyond which a feature counts as so far away
_RIDGE = 1.0  # penalty on the squared weights of standardised features, beside records of mean weight 1
_SHOWN = 16  # records whose predictions tell whether another release of scikit-learn fits the same
_SAME = 1e-9  # by how much these may differ, in units of the largest error
_WIDTH, _EPOCHS, _BATCH, _RATE, _DECAY = 64, 40, 128, 3e-3, 1e-2  # of the network
_PROCESS_RECORDS = 1000  # each Cholesky factor of so many takes 20 ms, and there are 42
_LENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # length scales tried, in units of the root of the number of features
_NOISES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # variances of the noise tried, in units of the signal's


class FitSettings(NamedTuple):
    """What a regressor is fitted with; each takes what it needs."""

    signs: list[int] | None
    trees: int
    max_depth: int
    min_leaf: int
    seed: int


class ErrorModel(ABC):
    """A fitted regressor of errors on features; everything is float64 on the CPU."""

    monotone: ClassVar[bool] = False
    """Whether it holds the signs of its features."""

    @classmethod
    @abstractmethod
    def fit(cls, phi: Tensor, target: Tensor, weight: Tensor, settings: FitSettings) -> Self:
        """Return the model of some records: phi (N, K), target (N,) and weight (N,), which is positive."""

    @abstractmethod
    def predict(self, phi: Tensor) -> Tensor:
        """Return (B,) targets of features (B, K)."""

    @staticmethod
    @abstractmethod
    def table(features: int) -> Table:
        """Return what the saved numbers of a model of K features must look like."""

    @classmethod
    @abstractmethod
    def restored(cls, saved: dict[str, Any], settings: FitSettings) -> Self:
        """Return the model of numbers that fit the table, or raise a StateError."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the numbers."""


class _Plain(ErrorModel):
    """A model that is its numbers."""

    @classmethod
    def restored(cls, saved: dict[str, Any], settings: FitSettings) -> Self:
        return cls(**saved)

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


def _standard(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of each column, and its standard deviation, or 1 where it is constant."""
    share = weight / weight.sum()
    centre = share @ rows
    scale = (share @ (rows - centre) ** 2).sqrt()
    return centre, torch.where(scale > 1e-12 * (1 + centre.abs()), scale, 1.0)


def _scaled(phi: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    return ((phi - centre) / scale).clamp(-_FAR, _FAR)


def _standard_table(features: int) -> dict[str, Numbers]:
    return {"centre": Numbers((features,), torch.float64), "scale": Numbers((features,), torch.float64, least=1e-120)}


@dataclass
class Ridge(_Plain):
    """Ridge regression on standardised features, in closed form."""

    centre: Tensor
    scale: Tensor
    slopes: Tensor
    offset: float

    @classmethod
    def fit(cls, phi: Tensor, target: Tensor, weight: Tensor, settings: FitSettings) -> Self:
        weight = weight / weight.mean()
        centre, scale = _standard(phi, weight)
        rows, offset = _scaled(phi, centre, scale), float(weight @ target / weight.sum())
        gram = rows.T @ (weight[:, None] * rows) + _RIDGE * torch.eye(phi.shape[1], dtype=torch.float64)
        return cls(centre, scale, torch.linalg.solve(gram, rows.T @ (weight * (target - offset))), offset)

    def predict(self, phi: Tensor) -> Tensor:
        return _scaled(phi, self.centre, self.scale) @ self.slopes + self.offset

    @staticmethod
    def table(features: int) -> Table:
        return {**_standard_table(features), "slopes": Numbers((features,), torch.float64), "offset": Real()}


@dataclass
class Boosting(ErrorModel):
    """Gradient-boosted trees of scikit-learn, kept as the records from which they are fitted again."""

    monotone: ClassVar[bool] = True
    phi: Tensor
    target: Tensor
    weight: Tensor
    fitted: Any

    @classmethod
    def fit(cls, phi: Tensor, target: Tensor, weight: Tensor, settings: FitSettings) -> Self:
        from sklearn.ensemble import HistGradientBoostingRegressor  # takes a second to import

        fitted = HistGradientBoostingRegressor(
            max_iter=settings.trees,
            max_depth=settings.max_depth,
            min_samples_leaf=settings.min_leaf,
            monotonic_cst=settings.signs,
            early_stopping=False,
            random_state=settings.seed,
        )
        # its penalties are for weights of about 1; binning takes half a second longer where they differ
        share = (weight / weight.mean()).numpy() if bool((weight != weight[0]).any()) else None
        fitted.fit(phi.numpy(), target.numpy(), sample_weight=share)
        return cls(phi, target, weight, fitted)

    def predict(self, phi: Tensor) -> Tensor:
        return torch.from_numpy(self.fitted.predict(phi.numpy())) if len(phi) else phi.new_empty(0)

    @staticmethod
    def table(features: int) -> Table:
        return {
            "phi": Numbers(("N", features), torch.float64),
            "target": Numbers(
                ("N",), torch.float64, most=ERROR_LIMIT, rule=("of one record at least", lambda each: len(each) > 0)
            ),
            "weight": Numbers(("N",), torch.float64, least=1e-120),
            "shown": Numbers(("M",), torch.float64),
        }

    @classmethod
    def restored(cls, saved: dict[str, Any], settings: FitSettings) -> Self:
        shown = saved.pop("shown")
        if len(shown) != min(_SHOWN, len(saved["phi"])):
            raise StateError(f"the saved boosting shows predictions of {len(shown)} records; the file is damaged")
        model = cls.fit(**saved, settings=settings)
        moved = float((model._shown() - shown).abs().max())
        if not moved <= _SAME * max(1.0, float(saved["target"].abs().max())):  # NaN is none
            warnings.warn(
                f"the boosting was fitted again from its saved records and predictions moved by up to {moved:.2g}: "
                "another release of scikit-learn grows other trees. Where bits must be the same, take model='forest'",
                stacklevel=4,
            )
        return model

    def state(self) -> dict[str, Any]:
        return {"phi": self.phi, "target": self.target, "weight": self.weight, "shown": self._shown()}

    def _shown(self) -> Tensor:
        return self.predict(self.phi[:_SHOWN])


@dataclass
class Network(_Plain):
    """A network of two hidden layers, ReLU, on standardised features and targets."""

    centre: Tensor
    scale: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    last: Tensor
    last_bias: Tensor

    @classmethod
    def fit(cls, phi: Tensor, target: Tensor, weight: Tensor, settings: FitSettings) -> Self:
        weight = weight / weight.mean()
        centre, scale = _standard(phi, weight)
        middle, spread = (each[0] for each in _standard(target[:, None], weight))
        rows, wanted = _scaled(phi, centre, scale), (target - middle) / spread
        draws = generator(settings.seed)
        layers: list[Tensor] = []
        for inputs, outputs in ((phi.shape[1], _WIDTH), (_WIDTH, _WIDTH), (_WIDTH, 1)):
            for shape in ((outputs, inputs), (outputs,)):
                uniform = torch.rand(shape, generator=draws, dtype=torch.float64)
                layers.append((2 * uniform - 1) / math.sqrt(inputs))
        with torch.inference_mode(False), torch.enable_grad():
            layers = [each.clone().requires_grad_() for each in layers]
            # a copy made here is no inference tensor, which autograd would refuse
            rows, wanted, weight = rows.clone(), wanted.clone(), weight.clone()
            optimizer = torch.optim.AdamW(layers, lr=_RATE, weight_decay=_DECAY)
            for epoch in range(_EPOCHS):
                for group in optimizer.param_groups:
                    group["lr"] = _RATE * (1 - epoch / _EPOCHS)
                for at in torch.split(torch.randperm(len(rows), generator=draws), _BATCH):
                    optimizer.zero_grad()
                    misses = _through(layers, rows[at]) - wanted[at]
                    loss = (weight[at] * misses**2).mean()
                    loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
                    optimizer.step()
        layers = [each.detach() for each in layers]
        layers[4], layers[5] = layers[4] * spread, layers[5] * spread + middle
        return cls(centre, scale, *layers)

    def predict(self, phi: Tensor) -> Tensor:
        layers = [self.first, self.first_bias, self.second, self.second_bias, self.last, self.last_bias]
        return _through(layers, _scaled(phi, self.centre, self.scale))

    @staticmethod
    def table(features: int) -> Table:
        shapes = {
            "first": (_WIDTH, features),
            "first_bias": (_WIDTH,),
            "second": (_WIDTH, _WIDTH),
            "second_bias": (_WIDTH,),
            "last": (1, _WIDTH),
            "last_bias": (1,),
        }
        layers = {name: Numbers(shape, torch.float64, most=1e40) for name, shape in shapes.items()}
        return {**_standard_table(features), **layers}


def _through(layers: list[Tensor], rows: Tensor) -> Tensor:
    for weights, biases in zip(layers[:4:2], layers[1:4:2], strict=True):
        rows = F.linear(rows, weights, biases).relu()
    return F.linear(rows, layers[4], layers[5])[:, 0]


@dataclass
class GaussianProcess(_Plain):
    r"""The mean of a Gaussian process with noise, :math:`k(x, x') = \exp(-\lVert x - x' \rVert^2 / 2 \ell^2)`.

    Length scale and noise are those of a grid with the largest marginal likelihood, in which the variance of the signal
    is the best one for each. Without the noise, records that cannot be told apart would be fitted one by one.
    """

    centre: Tensor
    scale: Tensor
    points: Tensor
    slopes: Tensor
    offset: float
    length: float

    @classmethod
    def fit(cls, phi: Tensor, target: Tensor, weight: Tensor, settings: FitSettings) -> Self:
        if len(phi) > _PROCESS_RECORDS:
            drawn = torch.randperm(len(phi), generator=generator(settings.seed))[:_PROCESS_RECORDS].sort().values
            phi, target, weight = phi[drawn], target[drawn], weight[drawn]
        weight = weight / weight.mean()
        centre, scale = _standard(phi, weight)
        points, offset = _scaled(phi, centre, scale), float(weight @ target / weight.sum())
        misses = target - offset
        best, slopes, length = -math.inf, torch.zeros_like(misses), 1.0
        for unit in _LENGTHS:
            tried = unit * math.sqrt(phi.shape[1])
            signal = _similarity(points, points, tried)
            for noise in _NOISES:
                factor = torch.linalg.cholesky(signal + torch.diag(noise / weight))
                solved = torch.cholesky_solve(misses[:, None], factor)[:, 0]
                variance = float(misses @ solved) / len(misses)
                if variance <= 0:  # all errors are equal
                    return cls(centre, scale, points, slopes, offset, length)
                likelihood = -len(misses) / 2 * math.log(variance) - float(factor.diagonal().log().sum())
                if likelihood > best:
                    best, slopes, length = likelihood, solved, tried
        return cls(centre, scale, points, slopes, offset, length)

    def predict(self, phi: Tensor) -> Tensor:
        rows = _scaled(phi, self.centre, self.scale)
        return _similarity(rows, self.points, self.length) @ self.slopes + self.offset

    @staticmethod
    def table(features: int) -> Table:
        return {
            **_standard_table(features),
            "points": Numbers(("N", features), torch.float64),
            "slopes": Numbers(("N",), torch.float64),
            "offset": Real(),
            "length": Real(least=1e-3),
        }


def _similarity(rows: Tensor, points: Tensor, length: float) -> Tensor:
    return torch.exp(-(torch.cdist(rows, points, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * length**2))
