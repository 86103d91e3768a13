"""Learned heads as plain layers: the same decisions, with nothing but torch.nn inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clkit.errors import ArgumentError, NotFittedError
from clkit.methods import KLDA, AnaCP, AnalyticHead, LDAHead, NearestMeanHead
from clkit.methods.heads.readout import L2Normalize, readout_module, readout_tensors

HEADS: dict[str, Callable[[int], Any]] = {
    "ridge": lambda d: AnalyticHead(d, gamma=1.0),
    "ridge with a bias": lambda d: AnalyticHead(d, gamma=1.0, bias=True),
    "ridge with pseudo-features": lambda d: AnalyticHead(d, gamma=1.0, balance="pfg"),
    "recursive ridge": lambda d: AnalyticHead(d, gamma=1.0, solver="recursive"),
    "relu lift": lambda d: AnalyticHead(d, gamma=0.1, expansion_dim=96),
    "tanh lift": lambda d: AnalyticHead(d, gamma=0.1, expansion_dim=96, activation="tanh"),
    "sigmoid lift with a bias": lambda d: AnalyticHead(d, expansion_dim=96, activation="sigmoid", bias=True),
    "normal lift": lambda d: AnalyticHead(d, expansion_dim=96, projection_init="normal"),
    "janson": lambda d: NearestMeanHead(d),
    "euclidean": lambda d: NearestMeanHead(d, metric="euclidean"),
    "icarl": lambda d: NearestMeanHead(d, metric="icarl"),
    "cosine": lambda d: NearestMeanHead(d, metric="cosine"),
    "lda": lambda d: LDAHead(d),
    "unit lda": lambda d: LDAHead(d, unit=True),
    "klda": lambda d: KLDA(d, expansion_dim=96, bandwidth=[0.1, 1.0]),
    "anacp": lambda d: AnaCP(d, expansion_dim=96, draws=20),
    "anacp, nearest": lambda d: AnaCP(d, expansion_dim=96, readout="nearest"),
}


def learned(name: str, digits: Any) -> Any:
    head = HEADS[name](64)
    head.update(digits.train, digits.train_targets)
    return head


@pytest.mark.parametrize("name", HEADS)
def test_the_layers_decide_as_the_head_does(digits: Any, name: str) -> None:
    head = learned(name, digits)
    with torch.no_grad():
        scores = readout_module(head, 10, torch.float64)(digits.test)
        in_float32 = readout_module(head, 10, torch.float32)(digits.test.float())
    assert torch.equal(scores.argmax(1), head.predict(digits.test))
    assert (in_float32.argmax(1) == head.predict(digits.test)).float().mean() >= 0.998
    assert in_float32.dtype == torch.float32


@pytest.mark.parametrize("name", ["ridge", "ridge with a bias", "relu lift", "cosine"])
def test_linear_scores_are_the_heads_own(digits: Any, name: str) -> None:
    head = learned(name, digits)
    with torch.no_grad():
        scores = readout_module(head, 10, torch.float64)(digits.test)
    assert torch.allclose(scores, head(digits.test), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["janson", "euclidean", "icarl", "lda"])
def test_distances_differ_from_the_layers_by_one_number_a_row(digits: Any, name: str) -> None:
    head = learned(name, digits)
    with torch.no_grad():
        difference = readout_module(head, 10, torch.float64)(digits.test) - head(digits.test)
    assert float((difference - difference[:, :1]).abs().max()) < 1e-6 * (1 + float(difference.abs().max()))


@pytest.mark.parametrize("name", HEADS)
def test_only_plain_layers_and_a_linear_at_the_end(digits: Any, name: str) -> None:
    module = readout_module(learned(name, digits), 10, torch.float32)
    assert type(module[-1]) is nn.Linear
    allowed = {nn.Flatten, L2Normalize, nn.Linear, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU}
    leaves = [layer for layer in module.modules() if not list(layer.children())]
    cosines = [layer for layer in leaves if type(layer) not in allowed]
    assert [type(layer).__name__ for layer in cosines] == ["_Cosine"] * (name == "klda")


def test_a_feature_map_of_one_pixel_is_flattened(digits: Any) -> None:
    module = readout_module(learned("janson", digits), 10, torch.float64)
    with torch.no_grad():
        assert torch.equal(module(digits.test[:, :, None, None]), module(digits.test))


def gaps() -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([3, 11, 40]).repeat(20)
    features = torch.randn(60, 4, generator=generator, dtype=torch.float64) + targets[:, None] / 10
    return NearestMeanHead(4, metric="euclidean"), features, targets


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_classes_never_seen_never_win_and_a_loss_on_them_is_finite(dtype: torch.dtype) -> None:
    head, features, targets = gaps()
    head.update(features, targets)
    module = readout_module(head, 50, dtype)
    far = torch.cat([features, 1e3 * features, -1e3 * features]).to(dtype)
    with torch.no_grad():
        scores = module(features.to(dtype))
        assert set(scores.argmax(1).tolist()) <= {3, 11, 40}
        if dtype in (torch.float32, torch.float64):
            assert set(module(far).argmax(1).tolist()) <= {3, 11, 40}
        assert bool(scores.isfinite().all())
        unseen = torch.full((60,), 7)
        for reduction in ("mean", "sum"):
            loss = nn.functional.cross_entropy(scores.float(), unseen, reduction=reduction)
            assert bool(loss.isfinite()), reduction


def test_the_loss_stays_finite_for_a_large_batch_of_classes_never_seen() -> None:
    head, features, targets = gaps()
    head.update(features, targets)
    with torch.no_grad():
        scores = readout_module(head, 50, torch.float32)(features.float()).repeat(100, 1)
    assert bool(nn.functional.cross_entropy(scores, torch.zeros(6000, dtype=torch.int64)).isfinite())


def test_too_few_outputs_are_refused_by_name() -> None:
    head, features, targets = gaps()
    head.update(features, targets)
    with pytest.raises(ArgumentError, match=r"outputs=40 is too small for class id 40"):
        readout_tensors(head, 40, torch.float32)


def test_a_head_that_learned_nothing_is_refused() -> None:
    with pytest.raises(NotFittedError, match="NearestMeanHead"):
        readout_module(NearestMeanHead(3), 2, torch.float32)


def test_later_learning_does_not_reach_the_layers() -> None:
    head, features, targets = gaps()
    head.update(features, targets)
    weight, bias = readout_tensors(head, 50, torch.float64)
    kept = weight.clone(), bias.clone()
    head.update(features + 5, targets)
    assert torch.equal(weight, kept[0])
    assert torch.equal(bias, kept[1])


def test_export_and_trace(digits: Any) -> None:
    module = readout_module(learned("relu lift", digits), 10, torch.float32).eval()
    example = digits.test[:8].float()
    with torch.no_grad():
        exported = torch.export.export(module, (example,)).module()
        assert torch.allclose(exported(example), module(example), atol=1e-6)


def test_unit_rows() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0]], dtype=torch.float64)
    assert torch.allclose(L2Normalize()(rows)[0], torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert L2Normalize()(rows)[1].tolist() == [0.0, 0.0]
