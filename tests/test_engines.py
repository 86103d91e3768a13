"""Engines of others, Dask and Ray: the pages on them run, and give what one process gives.

``make test-engines`` installs them and runs this file. Run as a program, it is what two ranks run without an engine.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from small_runs import LitSmall
from test_docs import ROOT, check_page
from two_ranks import drive, driven, enter_group

from clkit.callbacks import LDA
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, ClkitError, ConfigurationError
from clkit.models import TimmClassifier
from clkit.strategies import ERStrategy, GradientFreeStrategy, LearningStrategy, ray_strategy

HOW = "not installed here; `make test-engines` installs it and runs these tests"
PAGES = ROOT / "docs" / "guide"
WORKERS = 2


def fit(module: pl.LightningModule, path: str | None = None, **options: Any) -> None:
    """What each process of a run does."""
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**{**defaults, **quiet, **options})
    trainer.fit(module, datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=5)), ckpt_path=path)


def small() -> LitSmall:
    pl.seed_everything(0, verbose=False)
    return LitSmall()


def half_frozen() -> LitSmall:
    module = small()
    module.net.hidden.requires_grad_(False)
    return module


def frozen() -> TimmClassifier:
    return TimmClassifier("identity")


class MadeInSetup(LitSmall):
    """As Lightning's own tutorials do where a network depends on the data."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def setup(self, stage: str) -> None:
        self.net = half_frozen().net


# ---- without an engine: what two ranks run


def scenario(name: str, folder: Path) -> dict[str, Any]:
    try:
        match name:
            case "er":
                module = small()
                fit(module, strategy=ERStrategy(capacity=50, transform=torch.nn.Identity()), devices=2)
                return dict(module.state_dict())
            case "frozen":
                fit(frozen(), strategy=ERStrategy(), devices=2)
            case "frozen beside Lightning's own":
                fit(frozen(), strategy="ddp", callbacks=[LDA()], devices=2)
            case "frozen with a warm-up":
                fit(frozen(), strategy=GradientFreeStrategy(1), callbacks=[LDA()], devices=2)
            case "made in setup":
                fit(MadeInSetup(), strategy="ddp", callbacks=[head := LDA()], devices=2)
                return {"counts": head.head.counts}
            case "alone in a group":
                enter_group()
                fit(frozen(), strategy="gradient_free")
    except ClkitError as error:
        return {"refused": str(error)}
    raise AssertionError(name)


REFUSED = {
    "frozen": "ERStrategy trains by gradient, and no parameter of TimmClassifier requires one; use the strategy",
    "frozen beside Lightning's own": "DDPStrategy trains by gradient, and no parameter of TimmClassifier requires one.",
    "frozen with a warm-up": "GradientFreeStrategy trains by gradient, and no parameter of TimmClassifier requires one"
    "; let some train in the warm-up, or leave warmup_epochs out",
    "alone in a group": "the Trainer knows of one process, and torch.distributed of 2: each would learn everything",
}


def test_runs_that_several_processes_cannot_make_are_refused_by_name(tmp_path: Path) -> None:
    found = driven(__file__, tmp_path, [*REFUSED, "made in setup"])
    assert [int(rank["counts"].sum()) > 0 for rank in found["made in setup"]] == [True, True]
    for name, said in REFUSED.items():
        assert [rank["refused"].startswith(said) for rank in found[name]] == [True, True], found[name]


# ---- Dask


@pytest.fixture(scope="module")
def dask_cluster() -> Iterator[None]:
    distributed = pytest.importorskip("distributed", reason=HOW)
    pytest.importorskip("dask.array", reason=HOW)
    with distributed.Client(n_workers=WORKERS, threads_per_worker=1, dashboard_address=":0"):
        yield


@pytest.mark.usefixtures("dask_cluster")
def test_the_page_on_dask() -> None:
    page = check_page(PAGES / "dask.md")
    assert torch.equal(page["whole"].head.counts, page["alone"].counts)
    assert torch.allclose(page["whole"].head.weight, page["alone"].weight, rtol=0, atol=1e-12)


# ---- Ray


def of_ray(test: Callable[..., None]) -> Callable[..., None]:
    """A test on the workers of Ray, whose warnings are its own: it sets its deprecated settings itself."""
    marked: Callable[..., None] = pytest.mark.usefixtures("ray_cluster")(pytest.mark.filterwarnings("ignore")(test))
    return marked


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else whatever the machine does besides comes before the test
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # where workers find this file
        ray = pytest.importorskip("ray", reason=HOW)
        ray.init(num_cpus=WORKERS, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
        try:
            yield ray
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # Ray lets go of its processes while they end
                ray.shutdown()
                gc.collect()


@of_ray
@pytest.mark.parametrize("name", ["ray_data", "ray_train"])
def test_the_page_on_ray(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = check_page(PAGES / f"{name}.md")
    if name == "ray_data":
        assert torch.equal(page["whole"].head.counts, page["alone"].counts)
        assert torch.allclose(page["whole"].head.weight, page["alone"].weight, rtol=0, atol=1e-12)
    else:
        alone = LDA()
        fit(frozen(), strategy="gradient_free", callbacks=[alone])
        assert torch.equal(page["head"].counts, alone.head.counts)
        assert torch.allclose(page["head"].statistics.means, alone.head.statistics.means, rtol=1e-12, atol=1e-12)


def ray_run(folder: Path, learn: Callable[[dict[str, Any]], None], failures: int = 0) -> Any:
    """Two workers of Ray Train that run a function of this file."""
    from ray import train
    from ray.train.torch import TorchTrainer

    return TorchTrainer(
        learn,
        train_loop_config={"folder": str(folder)},
        scaling_config=train.ScalingConfig(num_workers=WORKERS),
        run_config=train.RunConfig(storage_path=str(folder), failure_config=train.FailureConfig(max_failures=failures)),
    ).fit()


class Dies(pl.Callback):
    """Ends the process of one rank in the middle of an experience, once."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if trainer.current_epoch == 2 and index == 1 and trainer.global_rank == 1 and not self.mark.exists():
            self.mark.touch()
            os._exit(1)


def replay_and_die(config: dict[str, Any]) -> None:
    import ray.train
    from ray.train.lightning import RayLightningEnvironment, RayTrainReportCallback

    begun = ray.train.get_checkpoint()
    fit(
        small(),
        None if begun is None else f"{begun.to_directory()}/checkpoint.ckpt",
        strategy=ray_strategy("er", capacity=50, transform=torch.nn.Identity()),
        plugins=[RayLightningEnvironment()],
        devices="auto",
        callbacks=[RayTrainReportCallback(), Dies(Path(config["folder"], "died"))],
    )


@of_ray
def test_replay_of_which_a_worker_dies_learns_what_two_ranks_learn(tmp_path: Path) -> None:
    result = ray_run(tmp_path, replay_and_die, failures=1)
    assert (tmp_path / "died").exists()
    with result.checkpoint.as_directory() as folder:
        checkpoint = torch.load(Path(folder, "checkpoint.ckpt"), weights_only=True)
    assert checkpoint["clkit_strategy"]["strategy"] == "er"  # a run without Ray goes on from it
    (wanted, _) = driven(__file__, tmp_path, ["er"])["er"]
    for name, value in wanted.items():
        assert torch.equal(checkpoint["state_dict"][name], value), name


def work(config: dict[str, Any]) -> None:
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer

    plugins = {"plugins": [RayLightningEnvironment()], "devices": "auto"}
    runs: dict[str, Callable[[], object]] = {
        "no plugin": lambda: pl.Trainer(accelerator="cpu", strategy=ray_strategy("gradient_free"), logger=False),
        "its plain name": lambda: fit(frozen(), strategy="gradient_free"),
        "nothing to train": lambda: fit(frozen(), strategy=ray_strategy("er"), **plugins),
        "Ray's own": lambda: fit(frozen(), strategy=RayDDPStrategy(), callbacks=[LDA()], **plugins),
    }
    said: dict[str, Any] = {}
    for name, run in runs.items():
        try:
            run()
        except ClkitError as error:
            said[name] = str(error)
    trainer = prepare_trainer(pl.Trainer(strategy=ray_strategy(Mine), accelerator="cpu", logger=False, **plugins))
    said["keys"] = [trainer.strategy.state_key, Mine().state_key]
    fit(half_frozen(), strategy=RayDDPStrategy(), callbacks=[head := LDA()], **plugins)
    said["counts"], said["means"] = head.head.counts, head.head.statistics.means
    if trainer.global_rank == 0:
        torch.save(said, Path(config["folder"], "said.pt"))


class Mine(GradientFreeStrategy):
    """A strategy of the user's own."""


@of_ray
def test_callbacks_learn_beside_training_in_workers_and_misuse_is_refused_by_name(tmp_path: Path) -> None:
    ray_run(tmp_path, work)
    said = torch.load(tmp_path / "said.pt", weights_only=True)
    assert said["keys"] == ["Mine", "Mine"]  # of a state that goes on without Ray
    fit(half_frozen(), callbacks=[alone := LDA()])
    assert torch.equal(said["counts"], alone.head.counts)
    # the classifier's input in float32, in batches of other sizes
    assert torch.allclose(said["means"], alone.head.statistics.means, rtol=1e-5, atol=1e-6)
    wanted = {
        "no plugin": "under Ray the Trainer needs plugins=[RayLightningEnvironment()] of ray.train.lightning; it has ",
        "its plain name": "the Trainer knows of one process, and torch.distributed of 2: each would learn everything",
        "nothing to train": "RayERStrategy trains by gradient, and no parameter of TimmClassifier requires one; use",
        "Ray's own": "RayDDPStrategy trains by gradient, and no parameter of TimmClassifier requires one. For LDA",
    }
    assert {name: said[name][: len(start)] for name, start in wanted.items()} == wanted


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_heads_are_refused_where_the_network_is_split(kind: type) -> None:
    """Ray's own are heirs of these."""
    with pytest.raises(ConfigurationError, match=f"LDA.* cannot read features under {kind.__name__}, which splits"):
        LDA().setup(SimpleNamespace(strategy=kind.__new__(kind), state=SimpleNamespace(fn="fit")), small(), "fit")


@pytest.mark.parametrize(
    ("strategy", "options", "said"),
    [
        ("er-ace", {}, r"no strategy of clkit is called 'er-ace', did you mean 'er_ace'\?"),
        ("ddp", {}, "no strategy of clkit is called 'ddp', .*'gradient_free', 'er'"),
        (3, {}, "strategy must be the name of a strategy of clkit, or a class that .*, got 3"),
        (pl.strategies.DDPStrategy, {}, "a class that derives from LearningStrategy, got <class"),
        ("er", {"start_method": "popen"}, "Ray starts the processes; leave it out"),
        ("er", {"timeout": 3}, r"timeout is a setting of Ray, .*TorchConfig\(timeout_s=…\)"),
    ],
)
def test_what_is_no_strategy_for_ray_is_refused(strategy: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        ray_strategy(strategy, **options)


def test_ray_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.train", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigurationError, match=r'needs Ray Train, which is not installed: pip install "ray\[train\]"'
    ):
        ray_strategy(LearningStrategy)


def test_a_process_that_is_no_worker_is_refused() -> None:
    pytest.importorskip("ray", reason=HOW)
    with pytest.raises(ConfigurationError, match=r"outside of Ray Train's workers; .*strategy='gradient_free'"):
        ray_strategy("gradient_free")


if __name__ == "__main__":
    sys.exit(drive(scenario))
