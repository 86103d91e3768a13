"""The public names, the direction of imports, and what importing costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import clkit

PACKAGE = Path(clkit.__file__).parent

# Removing or renaming one of these is a decision, so it has to be made here too.
PUBLIC = {
    "clkit": {
        "Experience",
        "FeatureTap",
        "__version__",
        "export",
        "forget_samples",
        "load_head",
        "merge_checkpoints",
    },
    "clkit.methods": {
        "AnalyticHead",
        "BatchNormSegments",
        "FeatureMap",
        "FeatureStatistics",
        "LDAHead",
        "MemoryRows",
        "MixedBatch",
        "NearestMeanHead",
        "OnlinePrototypes",
        "Projector",
        "RandomViews",
        "ReplayRule",
        "ReservoirBuffer",
        "instance_contrast",
        "mixed_cross_entropy",
        "prototype_contrast",
        "rotate_views",
        "supervised_contrast",
        "variant_labels",
    },
    "clkit.callbacks": {
        "AEFOCL",
        "LDA",
        "NMC",
        "FeatureCallback",
        "HeadCallback",
        "Predictor",
        "StreamCallback",
        "StreamEvaluation",
        "StreamProgressBar",
        "ungraft",
    },
    "clkit.strategies": {"REPLAY_METHODS", "GradientFreeStrategy", "LearningStrategy", "OnProStrategy"},
    "clkit.models": {"IdentityBackbone", "TimmClassifier"},
    "clkit.data": {
        "PUBLISHED_ORDERS",
        "Blurry",
        "ClassIncremental",
        "Custom",
        "Digits",
        "DomainIncremental",
        "ImageFolder",
        "Joint",
        "Labels",
        "LongTailed",
        "NaturalOrder",
        "NpzFeatures",
        "NpzImages",
        "Part",
        "Preprocessing",
        "Scenario",
        "Source",
        "Split",
        "StreamDataModule",
        "TaskIncremental",
        "Torchvision",
        "data_root",
        "published_order",
        "resolve_source",
    },
    "clkit.metrics": {
        "AMCA",
        "AccuracyMatrix",
        "AccuracySeen",
        "AverageAccuracy",
        "AverageIncrementalAccuracy",
        "BackwardTransfer",
        "FinalAccuracy",
        "Forgetting",
        "ForwardTransfer",
        "PerClassAccuracy",
        "StreamConfusionMatrix",
    },
    "clkit.testing": {
        "Check",
        "ContractError",
        "Entry",
        "check_contract",
        "clkit_entries",
        "contract",
        "contract_together",
    },
    "clkit.errors": {
        "ArgumentError",
        "BatchError",
        "ClkitError",
        "ConfigurationError",
        "ContractError",
        "DataError",
        "NotFittedError",
        "ProcessLostError",
        "StateError",
        "TapError",
        "WriteError",
    },
}

# layer -> what it may import of clkit, beside itself
LEAVES = {
    "_lightning",
    "batch",
    "errors",
    "experience",
    "files",
    "processes",
    "random_state",
    "registry",
    "saved",
}
MAY_IMPORT = {
    "methods": {"errors", "processes"},
    "metrics": {"errors"},
    "tap": {"errors"},
    "data": {"errors", "experience", "_lightning", "registry", "saved"},
    "accumulation": LEAVES,
    "boundaries": LEAVES | {"accumulation"},
    "observer": LEAVES | {"tap"},
    "kept_features": LEAVES | {"tap"},
    "strategies": LEAVES
    | {"checkpoint_io", "methods", "metrics", "tap", "boundaries", "observer", "accumulation", "checkpoints"},
    "callbacks": LEAVES
    | {
        "accumulation",
        "checkpoint_io",
        "methods",
        "metrics",
        "tap",
        "boundaries",
        "observer",
        "kept_features",
        "report",
        "",
    },
    "report": {"errors", "files", "metrics"},
    "models": LEAVES | {"tap"},
    "checkpoints": {"errors", "files", "methods", "saved"},
    "checkpoint_io": LEAVES | {"checkpoints"},
    "outputs": {"errors"},
    "merging": {"checkpoints", "errors", "methods", "outputs"},
    "forgetting": {"checkpoints", "errors", "merging", "methods", "outputs", "saved_run"},
    "testing": LEAVES | {"callbacks", "checkpoints", "data", "methods", "strategies"},
    **dict.fromkeys(LEAVES, LEAVES),
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    loaded = importlib.import_module(module)
    assert set(loaded.__all__) == PUBLIC[module]
    for name in PUBLIC[module]:
        assert getattr(loaded, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        clkit.nonsense  # noqa: B018


def _layer_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """The layers of clkit that a file imports, anywhere in it; "" for the package itself."""
    layers = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name == "clkit" or name.startswith("clkit."):
                layers.add(name.split(".")[1] if "." in name else "")
    return layers


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_go_one_way(layer: str) -> None:
    files = [path for path in PACKAGE.rglob("*.py") if _layer_of(path) == layer]
    assert files
    for path in files:
        beyond = _imports(path) - {layer} - MAY_IMPORT[layer]
        assert not beyond, f"{path.name} imports {beyond}"


@pytest.mark.parametrize("layer", ["methods", "metrics", "tap"])
def test_methods_know_nothing_of_lightning(layer: str) -> None:
    for path in PACKAGE.rglob("*.py"):
        if _layer_of(path) == layer:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert not (node.module or "").startswith("lightning"), path
                elif isinstance(node, ast.Import):
                    assert not any(alias.name.startswith("lightning") for alias in node.names), path


def _loaded_by(code: str) -> set[str]:
    """Top-level packages that a new process has loaded after some code."""
    printed = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('|'.join(sys.modules))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {name.split(".")[0] for name in printed.splitlines()[-1].split("|")}


@pytest.mark.parametrize(
    "code",
    [
        "import clkit",
        "from clkit.cli.main import main; main([])",
        "from clkit.cli.main import main; main(['recipes'])",
    ],
)
def test_heavy_packages_wait_until_they_are_needed(code: str) -> None:
    assert not _loaded_by(code) & {"torch", "lightning", "timm", "sklearn", "matplotlib", "numpy"}


@pytest.mark.parametrize("module", ["clkit.methods", "clkit.runs.merging, clkit.runs.forgetting"])
def test_heads_and_their_files_need_neither_lightning_nor_timm(module: str) -> None:
    assert not _loaded_by(f"import {module}") & {"lightning", "timm", "matplotlib", "torchvision"}


def test_strategy_names_are_known_once_lightning_is_there() -> None:
    code = (
        "import lightning.pytorch as pl, clkit; "
        "trainer = pl.Trainer(strategy='gradient_free', accelerator='cpu', devices=1, logger=False); "
        "print(type(trainer.strategy).__name__)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "GradientFreeStrategy"
