"""The embedding beside the classifier: unit rows, weights that depend on the seed alone, gradients."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clkit.errors import ArgumentError
from clkit.methods import Projector


def naive(projector: Projector, features: Tensor) -> list[list[float]]:
    rows = []
    for feature in features.tolist():
        for layer in projector.layers:
            if isinstance(layer, nn.Linear):
                weights, biases = layer.weight.tolist(), layer.bias.tolist()
                pairs = zip(weights, biases, strict=True)
                feature = [sum(w * f for w, f in zip(row, feature, strict=True)) + b for row, b in pairs]
            else:
                feature = [max(0.0, value) for value in feature]
        length = sum(value * value for value in feature) ** 0.5
        rows.append([value / length for value in feature])
    return rows


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("out_features", [1, 3, 5])
def test_rows_are_the_layers_scaled_to_length_one(kind: Any, out_features: int) -> None:
    projector = Projector(5, out_features, kind).double()
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    embeddings = projector(features)
    assert embeddings.dtype == torch.float64
    assert torch.allclose(embeddings, torch.tensor(naive(projector, features), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(7, dtype=torch.float64), atol=1e-14)


def test_kinds_differ_in_the_hidden_layer_only() -> None:
    sizes = {
        kind: [(m.in_features, m.out_features) for m in Projector(6, 2, kind).layers if isinstance(m, nn.Linear)]
        for kind in ("linear", "mlp")
    }
    assert sizes == {"linear": [(6, 2)], "mlp": [(6, 6), (6, 2)]}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_gradients_are_finite_differences(kind: Any) -> None:
    projector = Projector(4, 3, kind).double()
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    parameters = dict(projector.named_parameters())

    def embedded(features: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(projector, dict(zip(parameters, values, strict=True)), (features,))

    assert torch.autograd.gradcheck(embedded, (features, *parameters.values()))


def test_first_weights_depend_on_the_seed_alone_and_nothing_global_is_drawn() -> None:
    made = []
    for start in (0, 1):
        torch.manual_seed(start)
        np.random.seed(start)  # noqa: NPY002  the global states are what must not matter
        random.seed(start)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        made.append(Projector(5, 3, "mlp", seed=7))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
        assert random.getstate() == before[2]
    one, two = (dict(projector.state_dict()) for projector in made)
    assert all(torch.equal(one[key], two[key]) for key in one)
    other = Projector(5, 3, "mlp", seed=8).state_dict()
    assert not any(torch.equal(one[key], other[key]) for key in one)


def test_first_weights_are_torchs_own() -> None:
    projector = Projector(64, 32, seed=3)
    torch.manual_seed(3)
    layer = nn.Linear(64, 32)
    assert torch.equal(projector.layers[0].weight, layer.weight)
    assert torch.equal(projector.layers[0].bias, layer.bias)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in projector.parameters())


def test_no_accelerator_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    Projector(5, 3)
    assert seeded == []
    torch.manual_seed(0)
    assert seeded == [0]  # as this would do


def test_parameters_are_real_where_another_device_is_the_default() -> None:
    with torch.device("meta"):
        projector = Projector(4, 2)
    assert {parameter.device.type for parameter in projector.parameters()} == {"cpu"}
    assert torch.equal(projector.layers[0].weight, Projector(4, 2).layers[0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_have_length_one_in_float32_whatever_the_precision(dtype: torch.dtype) -> None:
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    embeddings = Projector(8, 4).to(dtype)(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = Projector(8, 4)(features.float())
    for rows in (embeddings, cast):
        assert rows.dtype == torch.float32
        assert torch.allclose(rows.norm(dim=1), torch.ones(6), atol=1e-6)


def test_no_rows_and_one_row() -> None:
    projector = Projector(4, 2)
    assert projector(torch.zeros(0, 4)).shape == (0, 2)
    alone = projector(torch.ones(1, 4))
    assert torch.allclose(alone[0], projector(torch.ones(3, 4))[1], atol=1e-7)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ((4, 5), "out_features=5 is above in_features=4"),
        ((4, 0), "out_features must be an integer of at least 1"),
        ((0, 1), "in_features must be an integer of at least 1"),
        ((4, 2, "deep"), "kind must be one of 'linear', 'mlp'"),
    ],
)
def test_arguments_are_checked(options: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        Projector(*options)


def test_the_seed_is_checked() -> None:
    with pytest.raises(ArgumentError, match="seed must be an integer of at least 0, got -1"):
        Projector(4, 2, seed=-1)
