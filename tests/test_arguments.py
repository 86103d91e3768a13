"""Every public constructor with values that its arguments cannot have: the error is one of clkit's and names it.

The constructors are those of the public packages, so that a new class is walked from the day on which it is exported.
What a value is, and what an annotation asks for, is said here once more and otherwise than in ``clkit.arguments``.
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

from clkit.arguments import check_arguments
from clkit.callbacks import NMC, FeatureCallback, HeadCallback, Lift, StreamEvaluation
from clkit.data import Blurry, ClassIncremental, DomainIncremental, ImageFolder, Preprocessing, StreamDataModule
from clkit.errors import ArgumentError, ClkitError
from clkit.methods import Holdings, NearestMeanHead, RandomViews, ReservoirBuffer
from clkit.models import TimmClassifier
from clkit.strategies import ERStrategy, MemorySettings, ReplayStrategy
from clkit.testing import Entry

PACKAGES = ("clkit", *(f"clkit.{name}" for name in ("callbacks", "data", "methods", "metrics", "models", "strategies")))
# clkit makes these, not the user
GIVEN = {
    *("Experience", "Labels", "Split", "SourcePart", "MixedBatch", "MemoryRows", "TaskReport", "Snapshot"),
    *("EditRecord", "EditResult", "LocalityReport", "MetaExample", "Proposal"),
    *("FeatureShift", "LoggedEdit", "RunEdit"),
}


class _Head(HeadCallback):
    def make_head(self, in_features: int) -> Any: ...


class _Features(FeatureCallback): ...


class _Replay(ReplayStrategy):
    def loss(self, *args: Any) -> Any: ...


STAND_INS = {HeadCallback: _Head, FeatureCallback: _Features, ReplayStrategy: _Replay}
DATA = torch.utils.data.TensorDataset(torch.zeros(2, 1, 2, 2), torch.arange(2))
REQUIRED: dict[str, dict[str, Any]] = {
    "FeatureTap": {"module": nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), "layer": "1"},
    "methods.AnaCP": {"in_features": 3, "expansion_dim": 4},  # a callback has its name
    "AnalyticHead": {"in_features": 3},
    "methods.KLDA": {"in_features": 3, "expansion_dim": 4},
    "LDAHead": {"in_features": 3},
    "Novelty": {"in_features": 3},
    "NearestMeanHead": {"in_features": 3},
    "HeadPart": {"head": NearestMeanHead(3), "holds": Holdings()},
    "FeatureMap": {"in_features": 3},
    "FeatureStatistics": {"width": 3},
    "BatchNormSegments": {"network": nn.BatchNorm1d(2)},
    "Projector": {"in_features": 3, "out_features": 2},
    "ReservoirBuffer": {"capacity": 3},
    "FeatureBank": {"width": 3, "signature": "axis-simplex-v1/4"},
    "ClassAllocator": {"num_vertices": 4},
    "EditReference": {"data": torch.zeros(2, 3)},
    "EditorNetworks": {"shapes": {"a": (2, 3)}},
    "GradientEditor": {"model": nn.Sequential(nn.Linear(4, 3)), "layers": "0", "example": torch.zeros(1, 4)},
    "CompatibilityMatrix": {"models": 2},
    "MultiModelAccuracyCurve": {"models": 2},
    "AverageCompatibility": {"models": 2},
    "AverageMultiModelAccuracy": {"models": 2},
    "BackwardCompatibility": {"models": 2},
    "ForwardCompatibility": {"models": 2},
    "SparseTopology": {"weights": {"weight": torch.ones(4, 4)}},
    "HeadCallback": {"name": "head"},
    "Lift": {"expansion_dim": 5},
    "IdentityBackbone": {"in_features": 3},
    "TimmClassifier": {"backbone": "identity", "model_kwargs": {"in_features": 4}, "num_classes": 2},
    "Blurry": {"experiences": 2},
    "ClassIncremental": {"experiences": 2},
    "TaskIncremental": {"experiences": 2},
    "LongTailed": {"inner": ClassIncremental(experiences=2), "factor": 0.5},
    "NaturalOrder": {"experiences": 2},
    "Joint": {"inner": ClassIncremental(experiences=2)},
    "Custom": {"train": DATA, "test": DATA},
    "ImageFolder": {"path": "pictures"},
    "NpzFeatures": {"name": "features"},
    "NpzImages": {"name": "images"},
    "Torchvision": {"name": "CIFAR10"},
}

# values, each with all that it can pass for
VALUES: list[tuple[Any, set[str]]] = [
    (None, {"None"}),
    (True, {"bool"}),
    (7, {"int", "float"}),
    (-3, {"int", "float"}),
    (10**30, {"int", "float"}),
    (0.5, {"float"}),
    (-0.25, {"float"}),
    (math.inf, {"float"}),
    (math.nan, set()),
    (1 + 2j, set()),
    ("odd one", {"str"}),
    ("", {"str"}),
    (b"bytes", set()),
    (["odd"], {"list of str"}),
    ([0.5], {"list of float"}),
    ([-1], {"list of int", "list of float"}),
    ([[None]], set()),
    ({"odd": 1}, {"dict of str", "dict of str to int"}),
    ({3: "c"}, {"dict of int"}),
    ({1.5: None}, set()),
    ({4}, set()),
    (torch.zeros(2), {"Tensor"}),
    (torch.tensor(float("nan")), {"Tensor"}),
    (np.zeros(2), set()),
    (object(), set()),
    (int, {"callable"}),
    (nn.Linear(2, 2), {"Module", "callable"}),
    (Lift(3), {"Lift"}),
    (torch.int8, {"dtype"}),
]


def asked(hint: Any) -> set[str] | None:
    """What values may pass for under an annotation; nothing where anything may."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return None
    if origin is Literal:
        return {"bool"} & {type(part).__name__ for part in parts}
    if hint is type(None):
        return {"None"}
    if isinstance(hint, type) and origin is None:
        return {hint.__name__}
    if str(origin) == "<class 'collections.abc.Callable'>":
        return {"callable"}
    if origin is tuple and ... not in parts:
        return set()  # of a length that none of the values has
    found = [asked(part) for part in parts]
    if "list" in str(origin) or "Sequence" in str(origin) or origin is tuple:
        return {f"list of {what}" for what in found[0] or ()}
    if "dict" in str(origin) or "Mapping" in str(origin):
        assert found[0] is not None
        return {f"dict of {key}" for key in found[0]} if found[1] is None or "str" in found[1] else set()
    return None if None in found else set().union(*(each for each in found if each is not None))


def constructors() -> Iterator[tuple[str, type, str, Any]]:
    """Each argument of each public constructor: class by name, class, argument and annotation."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            kind = getattr(module, name)
            if not isinstance(kind, type) or name in GIVEN or kind.__init__ is object.__init__:
                continue
            made = STAND_INS.get(kind, kind)
            if inspect.isabstract(made) or getattr(kind, "_is_protocol", False):
                continue
            for owner in kind.__mro__:
                if "__init__" not in vars(owner) or not owner.__module__.startswith("clkit"):
                    continue
                signature = inspect.signature(owner.__init__)
                for argument, hint in get_type_hints(owner.__init__).items():
                    if argument in signature.parameters and signature.parameters[argument].kind.name != "VAR_KEYWORD":
                        yield name, made, argument, hint
                if not any(each.kind.name == "VAR_KEYWORD" for each in signature.parameters.values()):
                    break


def test_no_wrong_argument_ends_in_an_error_without_a_name() -> None:
    """A value of another type is refused by name; one of the type that is out of range is, too, or makes an object."""
    wrong: list[str] = []
    counts = Counter[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, made, argument, hint in constructors():
            may = asked(hint)
            room = made.__module__.split(".")[1:2]
            required = REQUIRED.get(".".join([*room, name]), REQUIRED.get(name, {}))
            for value, passes in VALUES:
                case = f"{name}({argument}={value!r})"
                fits = may is None or bool(may & passes)
                try:
                    repr(made(**{**required, argument: value}))
                except ClkitError as error:
                    counts["refused by name"] += 1
                    if argument not in str(error) and not fits:
                        wrong.append(f"{case}: the message does not name it: {error}")
                except Exception as error:  # any that is not clkit's is what the test looks for
                    wrong.append(f"{case}: {type(error).__name__}: {str(error)[:80]}")
                else:
                    counts["made"] += 1
                    if not fits:
                        wrong.append(f"{case}: taken, though it is no {hint}")
    print(f"{counts.total()} calls of {len({name for name, *_ in constructors()})} constructors: {dict(counts)}")
    assert counts.total() > 3000
    assert not wrong, f"{len(wrong)} of {counts.total() + len(wrong)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NMC(name=["nmc"]), r"name must be a string, got \['nmc'\]"),
        (lambda: StreamEvaluation(keep_features=math.nan), "keep_features must be an integer, got nan"),
        (lambda: ERStrategy(0, memory=MemorySettings(policy="typo")), "policy must be one of 'uniform', .*'typo'"),
        (
            lambda: ERStrategy(0, memory=MemorySettings(device="typo")),
            "device must be one that torch has here, got 'typo'",
        ),
        (lambda: ReservoirBuffer(3, device=7), "device must be a device or a string, got 7"),
        (lambda: Blurry(2, disjoint="half"), "disjoint must be a finite number, got 'half'"),
        (
            lambda: ClassIncremental(2, class_order=-1),
            "class_order must be a list, each an integer, a string, or None, got -1",
        ),
        (
            lambda: DomainIncremental(domain_order=[None]),
            r"domain_order must be a list, each an integer or a string, or None, got \[None\]",
        ),
        (lambda: Preprocessing(size=math.nan), "size must be an integer or None, got nan"),
        (lambda: RandomViews(area=0.5), "area must be a list of 2: a finite number, a finite number, got 0.5"),
        (lambda: ImageFolder(Path("pictures")), "path must be a string"),
        (lambda: TimmClassifier("identity", model_kwargs={"odd": 1}), r"model_kwargs.*got \['odd'\]"),
        (lambda: TimmClassifier("test_vit", model_kwargs={"embed_dim": -3}), "model_kwargs.*test_vit"),
        (lambda: StreamDataModule(seed=10**5000), "seed must be an integer of at least 0 below 2.*got a int"),
        (lambda: Entry("nmc", "callback", NMC, tolerance="exact"), "tolerance must be a finite number, got 'exact'"),
    ],
)
def test_an_error_says_argument_wish_and_value(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said) as caught:
        make()
    assert len(str(caught.value)) < 300


def test_what_is_right_is_taken_as_it_was() -> None:
    """Whole numbers for fractions, tuples for lists, numbers of NumPy, and names that only a type checker knows."""
    assert Blurry(2, disjoint=1, class_order=(1, 0)).class_order == (1, 0)  # type: ignore[arg-type]  # on purpose
    assert StreamDataModule(root=Path()).root == Path()
    check_arguments(Preprocessing, {"size": np.int64(3), "mean": (np.float32(0.5), 1), "another": object()})

    class Own:
        def __init__(self, size: Unknown) -> None:  # type: ignore[name-defined]  # noqa: F821  what is tested
            check_arguments(Own, locals())

    assert isinstance(Own("any"), Own)
