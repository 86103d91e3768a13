"""The public names, the direction of imports, and what importing costs."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
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
        "AnaCP",
        "AnalyticHead",
        "BatchNormSegments",
        "ClassAllocator",
        "ErrorPredictor",
        "ErrorRecords",
        "FEATURE_SIGNS",
        "EditRecord",
        "EditReference",
        "EditResult",
        "EditorNetworks",
        "FeatureBank",
        "FeatureMap",
        "FeatureMemory",
        "FeatureStatistics",
        "GradientEditor",
        "Growth",
        "Guard",
        "HOCLoss",
        "HeadPart",
        "Holdings",
        "Initial",
        "KLDA",
        "LDAHead",
        "LocalityReport",
        "MemoryRows",
        "MetaExample",
        "MetaExamples",
        "MixedBatch",
        "Mixing",
        "NearestMeanHead",
        "Neighbours",
        "Novelty",
        "OnProLosses",
        "OnlinePrototypes",
        "OutOfSample",
        "PredictionSets",
        "Projector",
        "Proposal",
        "Prune",
        "PruneSchedule",
        "RandomViews",
        "ReservoirBuffer",
        "SimplexHead",
        "Snapshot",
        "SparseTopology",
        "TaskReport",
        "Uncertainty",
        "WeightedRecords",
        "abstention_threshold",
        "align",
        "cross_fit",
        "distillation_weight",
        "feature_distillation",
        "gaussian_rows",
        "hoc_total",
        "instance_contrast",
        "left_out_features",
        "mixed_cross_entropy",
        "neighbour_noise",
        "nonconformity",
        "novel_features",
        "prototype_contrast",
        "query",
        "replicate_noise",
        "risk_threshold",
        "rotate_views",
        "sample_keys",
        "sample_loss",
        "shard_bounds",
        "stationarising_features",
        "supervised_contrast",
        "variant_labels",
    },
    "clkit.callbacks": {
        "AEFOCL",
        "AnaCP",
        "DEUP",
        "DST",
        "DSimplex",
        "KLDA",
        "LDA",
        "FeatureShift",
        "LoggedEdit",
        "MEND",
        "NMC",
        "RunEdit",
        "FeatureCallback",
        "HeadCallback",
        "Lift",
        "Predictor",
        "PseudoFeatures",
        "Records",
        "StreamCallback",
        "StreamEvaluation",
        "StreamProgressBar",
        "attach_simplex_head",
        "detach_simplex_head",
        "ungraft",
    },
    "clkit.strategies": {
        "DERPPStrategy",
        "ERACEStrategy",
        "ERStrategy",
        "EditorSettings",
        "EditorTrainingStrategy",
        "GradientFreeStrategy",
        "LearningStrategy",
        "MemorySettings",
        "OnProStrategy",
        "Projection",
        "ReplayStrategy",
        "SCRStrategy",
        "ray_strategy",
    },
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
        "SourcePart",
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
        "AUGRC",
        "AUPR",
        "AURC",
        "AUROC",
        "AccuracyMatrix",
        "AccuracySeen",
        "AdaptiveCalibrationError",
        "AverageAccuracy",
        "AverageCompatibility",
        "AverageIncrementalAccuracy",
        "AverageMultiModelAccuracy",
        "BackwardCompatibility",
        "BackwardTransfer",
        "BrierScore",
        "CalibrationError",
        "CompatibilityMatrix",
        "ExcessAURC",
        "FPR95",
        "Drawdown",
        "EditSuccess",
        "FinalAccuracy",
        "Forgetting",
        "ForwardCompatibility",
        "ForwardTransfer",
        "KendallCorrelation",
        "MaxCalibrationError",
        "Generality",
        "Locality",
        "LocalityKL",
        "MultiModelAccuracyCurve",
        "NegativeFlipRate",
        "NegativeLogLikelihood",
        "PerClassAccuracy",
        "RiskCoverageCurve",
        "SpearmanCorrelation",
        "Reliability",
        "Retention",
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
        "CapacityError",
        "ClkitError",
        "ConfigurationError",
        "ContractError",
        "DataError",
        "EditConflictError",
        "NotFittedError",
        "ProcessLostError",
        "SignatureError",
        "StateError",
        "TapError",
        "WriteError",
    },
}

# The floors of the house, from the ground up. A room imports from floors below its own, never from its own or above.
FLOORS: list[set[str]] = [
    {"errors", "_version"},
    {"arguments", "schema", "distributed", "files", "_registry"},
    {"metrics", "features", "stream"},
    {"methods"},
    {"surgery", "data", "models", "report"},
    {"callbacks", "strategies"},
    {"runs"},
    {"testing", "cli"},
    {"__init__", "__main__"},
]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    loaded = importlib.import_module(module)
    assert set(loaded.__all__) == PUBLIC[module]
    for name in PUBLIC[module]:
        assert getattr(loaded, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        clkit.nonsense  # noqa: B018


def _room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_modules(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            assert node.module is not None
            names = [f"clkit.{alias.name}" for alias in node.names] if node.module == "clkit" else [node.module]
            modules.update(names)
        elif isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
    return modules


def _imported_rooms(path: Path) -> set[str]:
    parts = [module.split(".") for module in _imported_modules(path)]
    return {([*names, "__init__"])[1] for names in parts if names[0] == "clkit"}


def test_every_room_is_on_one_floor() -> None:
    rooms = [room for floor in FLOORS for room in floor]
    assert sorted(rooms) == sorted({_room_of(path) for path in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_go_down(floor: int) -> None:
    below = set().union(*FLOORS[:floor])
    for path in PACKAGE.rglob("*.py"):
        if _room_of(path) in FLOORS[floor]:
            upward = _imported_rooms(path) - below - {_room_of(path)}
            assert not upward, f"{path.relative_to(PACKAGE)} imports {upward}"


def test_files_are_small_and_told_apart_by_their_names() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    lines = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in files}
    assert {name for name, number in lines.items() if number > 400} == {"data/scenarios.py", "features/tap.py"}
    methods = {file.name for file in (PACKAGE / "methods").glob("*.py")}  # its callback or strategy has its name too
    names = Counter(file.name for file in files if file.name not in methods | {"__init__.py", "base.py"})
    assert [name for name, number in names.items() if number > 1] == []


def test_no_constructor_has_more_than_sixteen_arguments() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                assert len(node.args.args) + len(node.args.kwonlyargs) - 1 <= 16, f"{file}, line {node.lineno}"


@pytest.mark.parametrize("room", ["methods", "metrics", "arguments", "schema", "distributed", "files"])
def test_mathematics_and_ground_know_nothing_of_lightning(room: str) -> None:
    for path in PACKAGE.rglob("*.py"):
        if _room_of(path) == room:
            assert not any(module.split(".")[0] == "lightning" for module in _imported_modules(path)), path


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


def test_heads_and_their_files_need_neither_lightning_nor_timm() -> None:
    loaded = _loaded_by("import clkit.methods, clkit.runs.merging, clkit.runs.forgetting")
    assert not loaded & {"lightning", "timm", "matplotlib", "torchvision"}


def test_strategy_names_are_known_once_lightning_is_there() -> None:
    code = (
        "import lightning.pytorch as pl, clkit; "
        "trainer = pl.Trainer(strategy='gradient_free', accelerator='cpu', devices=1, logger=False); "
        "print(type(trainer.strategy).__name__)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[-1] == "GradientFreeStrategy"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    given = [*project["dependencies"], *project["optional-dependencies"]["report"]]
    bounds = dict(re.findall(r"^([\w-]+).*?>=([\d.]+)", "\n".join(given), re.M))
    assert len(bounds) == len(given)
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+\d)", (root / "constraints-oldest.txt").read_text("utf-8"), re.M))
    for name, bound in bounds.items():
        assert f"{oldest[name]}.0".startswith(f"{bound}."), name
