"""A run killed anywhere by SIGKILL and resumed from its newest checkpoint ends with the bits of an uninterrupted run.

The runs are processes of their own, forked by ``killed_run.py``, which knows the configurations and the places at which
a run can die. Compared are the module's weights and answers, optimizer and schedules, the whole state of every callback
(sums, rows, random states), the result files, and a diary of every trained batch (ids and content) and every boundary.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_run import CONFIGS

from clkit.files import read_checkpoint
from clkit.methods import ReservoirBuffer
from clkit.schema import STRATEGY
from clkit.testing._compare import changed

# every batch has these; the others exist where their name says
PLACES = (
    "experience_start",
    "batch_start",
    "step",
    "last_step",
    "before_save",
    "last_before_save",
    "save_collects",
    "save_writes",
    "save_moves",
    "save_removes_old",
    "results_move",
    "after_save",
    "last_after_save",
    "validation",
    "validation_end",
    "experience_end",
    "row_pending",
    "own_evaluation",
    "epoch_end_before_save",
    "epoch_end",
    "train_end",
)
OWN_EVALUATION = (
    "half_validation",
    "everything",
    "rare_validation",
    "graft_replaced",
    "validation_files",
    "reset_without_validation",
    "accumulation_inside",
    "epoch_files_unmeasured",
    "onpro_inside",
    "warm_up_last_block",
)


def there(config: str, place: str) -> bool:
    """Whether runs of a configuration pass a place."""
    if place == "own_evaluation":
        return config in OWN_EVALUATION
    return config != "no_validation" or not place.startswith(("validation", "results"))


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
QUICK = ("two_epochs", "half_validation", "graft_replaced", "accumulation_inside")
POINTS_OF_A_CONFIG = 9


class Point:
    """Where a run dies: the configuration, the place, and which of its occurrences, as a share of all."""

    def __init__(self, config: str, place: str, share: float) -> None:
        self.config = config
        self.place = place
        self.share = share

    def __str__(self) -> str:
        return f"{self.config}-{self.place}-{self.share:.2f}"

    def kill(self, counts: dict[str, int]) -> tuple[str, int]:
        return self.place, 1 + int(self.share * counts[self.place])


def drawn(seed: int) -> tuple[list[Point], list[Point]]:
    """Random points: one of each place, three of them for the ordinary suite, and several of each configuration."""
    draw = random.Random(seed)
    points = []
    for place in draw.sample(PLACES, len(PLACES)):
        config = draw.choice([config for config in QUICK if there(config, place)])
        points.append(Point(config, place, draw.random()))
    quick, many = points[:3], points[3:]
    for config in CONFIGS:
        places = draw.sample([place for place in PLACES if there(config, place)], POINTS_OF_A_CONFIG)
        many += [Point(config, place, draw.random()) for place in places]
    return quick, many


class Runs:
    """Speaks to the server of runs; keeps one uninterrupted run of each configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed_run.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._whole: dict[tuple[str, int], tuple[Path, dict[str, int], float]] = {}
        self._count = 0
        assert json.loads(self._line()) == {"ready": True}

    def _line(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the server of runs has died"
        return line

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def new_folder(self, name: str) -> Path:
        self._count += 1
        folder = self.folder / f"{self._count}-{name}"
        folder.mkdir()
        return folder

    def run(self, folder: Path, config: str, *, world: int = 1, checkpoint: str | None = None, **more: Any) -> Any:
        assert self._server.stdin is not None
        request = {
            "config": config,
            "folder": str(folder),
            "world": world,
            "checkpoint": checkpoint,
            "kill": None,
            "ranks": [0],
            **more,
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._line())
        assert not answer["hung"], log_of(folder)
        return answer

    def whole(self, config: str, world: int = 1) -> tuple[Path, dict[str, int], float]:
        """The uninterrupted run: its folder, how often it passed each place, and its seconds."""
        key = (config, world)
        if key not in self._whole:
            folder = self.new_folder(f"whole-{config}-{world}")
            answer = self.run(folder, config, world=world)
            assert answer["ended"] == [0] * world, log_of(folder)
            assert "save_in_place" not in json.loads((folder / "places.0").read_text())
            self._whole[key] = folder, json.loads((folder / "places.0").read_text()), answer["seconds"]
        return self._whole[key]

    def resume(self, folder: Path, config: str, *, world: int = 1, **more: Any) -> Any:
        """Goes on from the newest checkpoint that can be read."""
        found = newest(folder)
        if found is not None and CONFIGS[config].get("last"):
            found = "last"  # Lightning's own search
        return self.run(folder, config, world=world, checkpoint=found, **more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    server = Runs(tmp_path_factory.mktemp("runs"))
    yield server
    server.close()


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log.*")))


def newest(folder: Path) -> str | None:
    """The newest checkpoint; every one that is there must be whole."""
    files = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    for path in files:
        read_checkpoint(path)
    return str(files[-1]) if files else None


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves behind, but for times, memory and names of files."""
    end = torch.load(folder / "end.pt", weights_only=True)
    callbacks = {key: state for key, state in end["callbacks"].items() if not key.startswith("ModelCheckpoint")}
    callbacks["StreamEvaluation"].pop("seconds")
    left: dict[str, Any] = {
        key: end[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "StreamDataModule", "global_step")
    }
    left["callbacks"] = callbacks
    left["strategy"] = end.get(STRATEGY)
    for path in sorted(folder.glob("answers.*")):
        left[path.name] = torch.load(path, weights_only=True)
    for path in sorted([*folder.glob("diary.*"), *folder.glob("*.csv")]):
        left[path.name] = path.read_text().splitlines()
    if (folder / "results.json").exists():
        results = json.loads((folder / "results.json").read_text())
        left["results"] = {key: value for key, value in results.items() if key not in ("seconds", "peak_memory_bytes")}
    return left


def differences(one: Path, two: Path) -> list[str]:
    """Paths of all leaves that are not the same bits."""
    return changed(outcome(one), outcome(two))


def check(runs: Runs, point: Point, world: int = 1, ranks: tuple[int, ...] = (0,)) -> None:
    whole, counts, _ = runs.whole(point.config, world)
    kill = point.kill(counts)
    folder = runs.new_folder(str(point))
    died = runs.run(folder, point.config, world=world, kill=kill, ranks=list(ranks))
    death = signal.SIGXFSZ if point.place == "save_writes" else signal.SIGKILL
    for rank, code in enumerate(died["ended"]):
        assert code == (-death if rank in ranks else 1), log_of(folder)
    resumed = runs.resume(folder, point.config, world=world)
    assert resumed["ended"] == [0] * world, log_of(folder)
    assert differences(whole, folder) == [], kill


FEW, MANY = drawn(0)


@pytest.mark.parametrize("point", FEW, ids=str)
def test_a_killed_run_ends_as_if_it_had_lived(runs: Runs, point: Point) -> None:
    check(runs, point)


@pytest.mark.slow
@pytest.mark.parametrize("point", MANY, ids=str)
def test_a_killed_run_ends_as_if_it_had_lived_in_every_configuration(runs: Runs, point: Point) -> None:
    check(runs, point)


AGAIN = [
    # the first checkpoint after a resume may lie between two steps of an accumulation
    ("accumulation", "after_save", 5, "after_save", 2),
    ("accumulation_inside", "validation_end", 2, "step", 3),
    ("two_epochs", "last_after_save", 2, "last_before_save", 1),
    ("half_validation", "row_pending", 1, "own_evaluation", 1),
    ("warm_up", "epoch_end", 1, "before_save", 5),
    ("graft_replaced", "after_save", 9, "experience_end", 1),
    ("everything", "validation", 9, "save_collects", 2),
    ("last_file", "save_moves", 5, "save_moves", 1),
    ("warm_up_lora", "step", 4, "after_save", 5),
]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if i > 0 else []) for i, case in enumerate(AGAIN)]
)
def test_a_run_killed_twice(runs: Runs, case: tuple[str, str, int, str, int]) -> None:
    config, *kills = case
    folder = runs.new_folder(f"twice-{config}")
    assert runs.run(folder, config, kill=kills[:2])["ended"] == [-signal.SIGKILL], log_of(folder)
    assert runs.resume(folder, config, kill=kills[2:])["ended"] == [-signal.SIGKILL], log_of(folder)
    assert runs.resume(folder, config)["ended"] == [0], log_of(folder)
    assert differences(runs.whole(config)[0], folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("config", ["everything", "workers", "files_inside_validation", "graft"])
def test_a_run_killed_from_outside(runs: Runs, config: str, share: float) -> None:
    """At whatever place it is then."""
    whole, _, seconds = runs.whole(config)
    folder = runs.new_folder(f"outside-{config}-{share}")
    assert runs.run(folder, config, kill_after=share * seconds)["ended"] in ([-signal.SIGKILL], [0])
    assert runs.resume(folder, config)["ended"] == [0], log_of(folder)
    assert differences(whole, folder) == []


# ---- replay learning: the memory, the prototypes and what is drawn next are those of a run that lived

BATCHES = (7, 3, 6)  # of each experience


def batches(seed: int, count: int) -> list[tuple[str, int]]:
    """Random places of random batches; the first three are of one experience each."""
    draw = random.Random(seed)
    places = ("batch_start", "before_save", "after_save")
    first = [sum(BATCHES[:i]) + 1 + draw.randrange(BATCHES[i]) for i in range(len(BATCHES))]
    every = [(place, 1 + number) for place in places for number in range(sum(BATCHES))]
    chosen = list(zip(draw.sample(places, len(places)), first, strict=True))
    others = [point for point in every if point not in chosen]
    return chosen + draw.sample(others, count - len(chosen))


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(kill, marks=[pytest.mark.slow] if i > 2 else [], id=f"{kill[0]}-{kill[1]}")
        for i, kill in enumerate(batches(seed=0, count=20))
    ],
)
def test_replay_learning_killed_at_a_random_batch(runs: Runs, kill: tuple[str, int]) -> None:
    folder = runs.new_folder(f"replay-{kill[0]}-{kill[1]}")
    assert runs.run(folder, "onpro", kill=kill)["ended"] == [-signal.SIGKILL], log_of(folder)
    assert runs.resume(folder, "onpro")["ended"] == [0], log_of(folder)
    whole, counts, _ = runs.whole("onpro")
    assert counts["after_save"] == sum(BATCHES)
    memory = ReservoirBuffer(12)
    memory.load_state_dict(torch.load(whole / "end.pt", weights_only=True)[STRATEGY]["memory"][0])
    assert memory.n_seen == 57
    assert differences(whole, folder) == []


# ---- two processes; the one that lives ends by itself, and both go on from the last checkpoint

TWO = [
    ("two_epochs", "after_save", 0.37, (0,)),
    ("two_epochs", "step", 0.61, (1,)),
    ("one_epoch", "last_after_save", 0.5, (0, 1)),
    ("one_epoch", "validation", 0.4, (1,)),
    ("rare_validation", "own_evaluation", 0.5, (0,)),
    ("half_validation", "row_pending", 0.4, (1,)),
    ("gradient_free", "experience_end", 0.4, (0, 1)),
    ("warm_up", "epoch_end", 0.3, (1,)),
    ("graft_at_end", "last_after_save", 0.9, (0,)),
    ("reset_without_validation", "last_after_save", 0.5, (1,)),
    ("graft", "step", 0.7, (1,)),
    ("max_steps", "save_moves", 0.6, (0,)),
    ("everything", "save_collects", 0.5, (1,)),
    ("transform", "last_before_save", 0.6, (0, 1)),
    ("deup", "after_save", 0.6, (1,)),
    ("deup_kept_out", "row_pending", 0.5, (0,)),
    ("warm_up_lora", "after_save", 0.2, (1,)),
]


@pytest.mark.parametrize(
    ("point", "ranks"),
    [
        pytest.param(
            Point(*case[:3]), case[3], id=f"{Point(*case[:3])}-{case[3]}", marks=[pytest.mark.slow] if i else []
        )
        for i, case in enumerate(TWO)
    ],
)
def test_two_processes(runs: Runs, point: Point, ranks: tuple[int, ...]) -> None:
    check(runs, point, world=2, ranks=ranks)


# ---- the comparison can fail


@pytest.mark.parametrize(
    ("part", "config", "kill"),
    [
        ("loops", "one_epoch", ("last_after_save", 2)),  # the experience after that is longer
        ("random", "one_epoch", ("after_save", 4)),
        pytest.param("memory", "onpro", ("after_save", 9), marks=pytest.mark.slow),
        pytest.param("position", "one_epoch", ("after_save", 4), marks=pytest.mark.slow),
        pytest.param("row", "half_validation", ("row_pending", 1), marks=pytest.mark.slow),
        pytest.param("gradients", "accumulation_inside", ("validation_end", 3), marks=pytest.mark.slow),
        pytest.param("graft", "graft", ("after_save", 9), marks=pytest.mark.slow),
        pytest.param("end", "max_steps_at_end", ("last_after_save", 4), marks=pytest.mark.slow),
    ],
)
def test_a_part_taken_away_is_noticed(runs: Runs, part: str, config: str, kill: tuple[str, int]) -> None:
    whole, _, _ = runs.whole(config)
    folder = runs.new_folder(f"without-{part}")
    assert runs.run(folder, config, kill=kill)["ended"] == [-signal.SIGKILL], log_of(folder)
    lesser = folder.with_name(f"{folder.name}-lesser")
    shutil.copytree(folder, lesser)
    assert runs.resume(folder, config)["ended"] == [0], log_of(folder)
    assert differences(whole, folder) == []
    ended = runs.resume(lesser, config, without=part)["ended"]
    assert ended == [1] or differences(whole, lesser)
