"""Changes of the user's network: each is seen by the others, refused beside another, taken back and restored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clkit.callbacks import ungraft
from clkit.errors import ConfigurationError, StateError
from clkit.features.tap import FeatureTap
from clkit.methods import NearestMeanHead
from clkit.surgery.change import Change, changes_of
from clkit.surgery.classifier import Graft


class Scaling(Change):
    """A stranger's change: scales the weight of one layer, as a mask or an edit would."""

    noun = "scaling"

    def __init__(self, owner: str, path: str, saved: dict[str, Any] | None = None) -> None:
        super().__init__(owner)
        self.path = path
        self.own: Tensor | None = None if saved is None else saved["own"]

    def apply(self, module: nn.Module) -> None:
        layer: Any = self.claim(module, self.path)
        self.own = layer.weight.detach().clone()
        layer.weight.data.mul_(1.1)
        self.mark(layer)

    def restore(self, module: nn.Module) -> None:
        self.mark(self.claim(module, self.path))

    def undo(self, module: nn.Module) -> None:
        if self.applied:
            layer: Any = module.get_submodule(self.path)
            layer.weight.data.copy_(self.own)
            self.unmark(layer)

    def state(self) -> dict[str, Any]:
        return {"own": self.own}


def head_for(metric: Any, classes: int = 10) -> NearestMeanHead:
    """A head for the small module; ``euclidean`` is copied into its classifier, ``janson`` replaces it."""
    head = NearestMeanHead(16, metric=metric)
    head.update(torch.rand(40, 16, generator=torch.Generator().manual_seed(0)), torch.arange(40) % classes)
    return head


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_a_change_is_seen_where_it_stands_and_undone_to_the_bit(lit_small: Any) -> None:
    module = lit_small()
    before = weights(module)
    change = Scaling("a stranger", "net.hidden")
    change.apply(module)
    assert change.applied
    assert not same(weights(module), before)
    assert module.state_dict().keys() == before.keys()
    seen = [path for path in ("", "net", "net.hidden", "net.head") if changes_of(module, path)]
    assert seen == ["", "net", "net.hidden"]
    assert changes_of(module) == [change]

    copied = copy.deepcopy(module)
    (its,) = changes_of(copied)
    its.undo(copied)
    assert same(weights(copied), before)
    assert changes_of(copied) == []
    assert change.applied
    assert changes_of(module) == [change]

    change.undo(module)
    change.undo(module)  # does nothing
    assert same(weights(module), before)
    assert not change.applied
    assert changes_of(module) == []


CHANGES: dict[str, Callable[..., Change]] = {
    "scaling": lambda saved: Scaling("A", "net.head", saved),
    "copied": lambda saved: Graft("A", saved),
    "replaced": lambda saved: Graft("A", saved),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_restored_from_its_state(lit_small: Any, kind: str, tmp_path: Path) -> None:
    """In another process, say: by a change of the same settings, on a module that loads the weights."""
    arguments = () if kind == "scaling" else ("auto", head_for("euclidean" if kind == "copied" else "janson"))
    module, change = lit_small(), CHANGES[kind](None)
    before, inputs = weights(module), torch.rand(5, 64)
    change.apply(module, *arguments)
    state_dict = module.state_dict()
    if isinstance(change, Graft):
        change.restore_keys(state_dict)
        assert [name for name, tensors in change.state().items() if tensors] == ["own" if kind == "copied" else "layer"]
    torch.save({"weights": state_dict, "change": change.state()}, tmp_path / "file.ckpt")

    saved = torch.load(tmp_path / "file.ckpt", weights_only=True)
    fresh, again = lit_small(), CHANGES[kind](saved["change"])
    fresh.load_state_dict(saved["weights"])
    if arguments:  # what the head learns after the file was written does not reach the restored graft
        arguments[1].update(torch.rand(40, 16), torch.arange(40) % 10)
    again.restore(fresh, *arguments)
    assert again.applied
    assert torch.equal(fresh(inputs), module(inputs))
    again.undo(fresh)
    assert same(weights(fresh), before)


@pytest.mark.parametrize("state", [{"own": {}}, {"own": {"weight": 1}, "layer": {}}, {"own": {}, "layer": {"a": 1}}])
def test_a_damaged_state_of_a_graft_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(StateError, match=r"A.*damaged"):
        Graft("A", state)
    flat = {"own": {}, "layer": {"weight": torch.zeros(2), "bias": torch.zeros(2)}}
    with pytest.raises(StateError, match=r"A: 'layer' of the saved graft: weight must be .* of shape \(C, D\)"):
        Graft("A", flat)


@pytest.mark.parametrize("metric", ["euclidean", "janson"])
def test_two_changes_of_one_layer_are_refused_by_the_names_of_both(lit_small: Any, metric: str) -> None:
    module, head = lit_small(), head_for(metric)
    stranger, graft, rival = Scaling("B", "net.head"), Graft("A"), Graft("C")
    stranger.apply(module)
    with pytest.raises(
        ConfigurationError, match=r"the graft of A would change 'net\.head', which already holds the scaling of B"
    ):
        graft.check(module, "auto")
    stranger.undo(module)
    graft.apply(module, "auto", head)
    held = weights(module)
    inside = "net.head" if metric == "euclidean" else "net.head.2"
    for path in ("net", "net.head", inside):
        with pytest.raises(
            ConfigurationError, match=r"the scaling of B .* holds the graft of A; call clkit\.callbacks\.ungraft"
        ):
            Scaling("B", path).apply(module)
    with pytest.raises(ConfigurationError, match=r"the graft of C .* holds the graft of A"):
        rival.apply(module, "auto", head_for("euclidean"))
    assert same(weights(module), held)
    graft.undo(module)
    rival.apply(module, "auto", head)  # the place is free again
    assert changes_of(module) == [rival]


@pytest.mark.parametrize("metric", ["euclidean", "janson"])
@pytest.mark.parametrize("first", ["graft", "scaling"])
def test_changes_of_different_layers_stand_together(lit_small: Any, metric: str, first: str) -> None:
    module = lit_small()
    before = weights(module)
    stranger, graft = Scaling("B", "net.hidden"), Graft("A")
    stranger.apply(module)
    graft.apply(module, "auto", head_for(metric))
    assert changes_of(module) == [stranger, graft]
    if first == "graft":
        ungraft(module)
        assert changes_of(module) == [stranger]
        stranger.undo(module)
    else:
        stranger.undo(module)
        assert changes_of(module) == [graft]
        ungraft(module)
    assert same(weights(module), before)


def test_a_classifier_that_a_head_has_outgrown_is_given_back(lit_small: Any) -> None:
    """First copied in place, then replaced, then undone."""
    module, graft = lit_small(), Graft("A")
    own, before = module.net.head, weights(module)
    graft.apply(module, "auto", head_for("euclidean"))
    assert module.net.head is own
    graft.apply(module, "auto", head_for("euclidean", classes=13))
    assert module.net.head is not own
    assert module(torch.rand(2, 64)).shape == (2, 13)
    assert same(dict(own.state_dict()), {"weight": before["net.head.weight"], "bias": before["net.head.bias"]})
    assert changes_of(module) == [graft]
    graft.undo(module)
    assert same(weights(module), before)
    assert changes_of(module) == []


def test_a_strangers_mark_does_not_move_the_classifier(lit_small: Any) -> None:
    """Only a graft is taken for the classifier itself."""
    module = lit_small()
    module.net = nn.Sequential(nn.Linear(64, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 10)))
    Scaling("B", "net.1").mark(module.net[1])
    assert FeatureTap(module).point == "net.1.1:in"
