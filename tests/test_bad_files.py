"""Files that are damaged, of another kind or meant to harm, full disks and dying processes.

Whatever comes in, the answer is an error of clkit's own (on the command line: one line and status 2), nothing in a file
is executed, and what was there before is still there.

Run as a program, ``test_bad_files.py FOLDER WAY``, this file is what two ranks run of which one dies.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import re
import resource
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from PIL import Image
from small_runs import quiet_trainer
from torch import Tensor, nn
from two_ranks import drive, driven

import clkit
from clkit.callbacks import NMC, StreamEvaluation
from clkit.cli.main import main
from clkit.data import ClassIncremental, NpzFeatures, NpzImages, StreamDataModule
from clkit.errors import ArgumentError, DataError, StateError, WriteError
from clkit.files import atomic_write, read_checkpoint
from clkit.methods import AnalyticHead, FeatureStatistics, LDAHead, NearestMeanHead
from clkit.methods.heads.portable import head_of_state
from clkit.models import TimmClassifier
from clkit.report.results import write_results
from clkit.report.run_figures import draw_figures
from clkit.runs.heads import HEADS
from clkit.runs.recipes import read_recipe
from clkit.schema import STREAM
from clkit.stream import resume
from clkit.stream.boundaries import Boundaries
from clkit.stream.checkpoint_io import WholeCheckpointIO

COMMANDS = ("fit", "validate", "test", "predict")
D = 3


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (open, (str(self.marker), "w"))


def module(classes: int = 10) -> TimmClassifier:
    torch.manual_seed(0)
    return TimmClassifier("identity", num_classes=classes, model_kwargs={"in_features": 64})


def stream() -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=5), batch_size=64)


def callbacks() -> list[Any]:
    return [NMC(), StreamEvaluation(table=False, files=False)]


def make(folder: Path, **options: Any) -> pl.Trainer:
    return quiet_trainer(folder, **{"callbacks": callbacks(), "strategy": "gradient_free", **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that stopped in the middle of its second experience, beside its settings."""
    folder = tmp_path_factory.mktemp("run")
    recipe = yaml.safe_load(read_recipe("nmc"))
    recipe["model"]["init_args"].update(num_classes=10, model_kwargs={"in_features": 64})
    recipe["data"]["init_args"]["batch_size"] = 64
    recipe["trainer"].update(
        callbacks=[
            {"class_path": "NMC"},
            {"class_path": "StreamEvaluation", "init_args": {"figures": False, "table": False}},
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=str(folder / "out"),
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    trainer = make(folder, max_steps=5)
    trainer.fit(module(), datamodule=stream())
    trainer.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


def changed(run: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    checkpoint = torch.load(run, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must be refused; gives its one line."""
    capsys.readouterr()
    try:
        status: Any = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("clkit: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("clkit: ")


EVERYWHERE = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
WAYS_IN = [(strategy, name) for strategy in ("gradient_free", "auto") for name in COMMANDS]


def refuse(path: Path, said: str, run: Path, capsys: pytest.CaptureFixture[str], *, number: int, every: bool) -> None:
    """Gives a file to the trainer and to the command line, which must refuse it; to all entries or to some."""
    for strategy, name in WAYS_IN if every else [WAYS_IN[3 * number % 8]]:
        trainer = make(path.parent, strategy=strategy)
        network = module()
        hooks = _hooks(network)
        with pytest.raises(StateError, match=said):
            getattr(trainer, name)(network, datamodule=stream(), ckpt_path=str(path))
        assert _hooks(network) == hooks  # it let go of the module
    for name in COMMANDS if every else [COMMANDS[number % 4]] if number % 2 == 0 else []:
        line = command(capsys, name, "--config", str(run.with_name("run.yaml")), "--ckpt_path", str(path))
        assert re.search(said, line), line


def _hooks(network: nn.Module) -> list[int]:
    return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in network.modules()]


def bits(state: Any) -> bytes:
    """A state with all its bits, so that NaN equals NaN."""
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(dict(state) if isinstance(state, Mapping) else state), buffer)
    with zipfile.ZipFile(buffer) as archive:  # without the file's own serial number
        return b"".join(archive.read(name) for name in archive.namelist() if "serialization_id" not in name)


# ---- files that are no checkpoints


def _flipped(whole: bytes) -> bytes:
    """One bit of a saved tensor turned over, which torch alone does not notice."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entry = max(archive.infolist(), key=lambda each: each.file_size)
    name_and_extra = whole[entry.header_offset + 26 : entry.header_offset + 30]
    start = 30 + int.from_bytes(name_and_extra[:2], "little") + int.from_bytes(name_and_extra[2:], "little")
    at = entry.header_offset + start + 4
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]


def _saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


BROKEN: dict[str, Callable[[bytes, Path], bytes]] = {
    "empty": lambda whole, marker: b"",
    "cut at 1": lambda whole, marker: whole[:1],
    "cut at 100": lambda whole, marker: whole[:100],
    "cut in half": lambda whole, marker: whole[: len(whole) // 2],
    "cut at the end": lambda whole, marker: whole[:-1],
    "bytes added": lambda whole, marker: whole + bytes(70000),
    "a hole": lambda whole, marker: whole[:5000] + bytes(5000) + whole[10000:],
    "a flipped bit": lambda whole, marker: _flipped(whole),
    "random bytes": lambda whole, marker: random.Random(0).randbytes(5000),
    "text": lambda whole, marker: b"these are my notes\n",
    "a tensor": lambda whole, marker: _saved(torch.zeros(3)),
    "a list": lambda whole, marker: _saved([{"state_dict": {}}]),
    "a module": lambda whole, marker: _saved(nn.Linear(2, 2)),
    "numpy": lambda whole, marker: _saved({"state_dict": {}, "x": np.float64(1)}),
    "a payload": lambda whole, marker: _saved({"state_dict": {}, "callbacks": {}, "x": Payload(marker)}),
    "a payload in place of all": lambda whole, marker: _saved(Payload(marker)),
    "a payload in the old form": lambda whole, marker: _saved(
        {"state_dict": Payload(marker)}, _use_new_zipfile_serialization=False
    ),
    "a plain pickle": lambda whole, marker: pickle.dumps({"state_dict": Payload(marker)}),
    "another archive": lambda whole, marker: _zip({"notes.txt": b"nothing"}),
}


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@EVERYWHERE
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_checkpoint_is_refused(
    kind: str, every: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ways in differ in who reads the file, not in how: by all for some kinds."""
    marker, path, number = tmp_path / "executed", tmp_path / "bad.ckpt", list(BROKEN).index(kind)
    path.write_bytes(BROKEN[kind](run.read_bytes(), marker))
    with pytest.raises(StateError, match=r"bad\.ckpt"):
        clkit.load_head(path, "nmc")
    if every or number % 3 == 0:
        refuse(path, r"bad\.ckpt", run, capsys, number=number // 3, every=every)
    assert not marker.exists()


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    path = tmp_path / "bad.ckpt"
    path.write_bytes(BROKEN["a payload"](b"", tmp_path / "executed"))
    torch.load(path, weights_only=False)["x"].close()
    assert (tmp_path / "executed").exists()


def test_a_trusted_file_may_hold_anything(run: Path, tmp_path: Path) -> None:
    """Lightning's own way of saying so still works: ``weights_only=False``."""
    path = changed(run, tmp_path / "own.ckpt", lambda checkpoint: checkpoint.update(own=np.float64(1)))
    make(tmp_path).validate(module(), datamodule=stream(), ckpt_path=str(path), weights_only=False, verbose=False)
    with pytest.raises(StateError, match="would call"):
        make(tmp_path).validate(module(), datamodule=stream(), ckpt_path=str(path), verbose=False)


@pytest.mark.parametrize(("asked", "used"), [(None, True), (True, True), (False, False)])
def test_a_file_from_the_net_is_not_trusted_either(
    asked: bool | None, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class There:
        def exists(self, path: Any) -> bool:
            return True

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.get_filesystem", lambda path: There())
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: seen.append(options) or {})
    WholeCheckpointIO().load_checkpoint("https://somewhere.org/run.ckpt", weights_only=asked)
    assert [options["weights_only"] for options in seen] == [used]


@pytest.mark.parametrize(("name", "said"), [("folder", "is a folder"), ("nowhere.ckpt", "is not a file")])
def test_places_without_a_file(
    name: str, said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArgumentError, match=said):
        clkit.load_head(path, "nmc")
    for strategy, entry in (("gradient_free", "fit"), ("auto", "test")):
        with pytest.raises((ArgumentError, FileNotFoundError), match=name):
            getattr(make(tmp_path, strategy=strategy), entry)(module(), datamodule=stream(), ckpt_path=str(path))
    assert said in command(capsys, "fit", "--config", str(run.with_name("run.yaml")), "--ckpt_path", str(path))


@EVERYWHERE
def test_weights_alone_are_no_checkpoint(
    every: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(module().state_dict(), path)
    with pytest.raises(ArgumentError, match="no head named 'nmc'; it has none"):
        clkit.load_head(path, "nmc")
    refuse(path, "no checkpoint of a Lightning run.*'network.fc.weight'", run, capsys, number=0, every=every)


def test_a_fit_cannot_go_on_from_weights_only(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make(tmp_path, max_steps=2)
    trainer.fit(module(), datamodule=stream())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    arguments = ("fit", "--config", str(run.with_name("run.yaml")), "--ckpt_path", str(tmp_path / "weights.ckpt"))
    assert "holds weights only" in command(capsys, *arguments)


@pytest.mark.parametrize("part", ["callbacks", "loops", "hyper_parameters", "state_dict"])
def test_a_part_of_another_kind_is_named(
    part: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(run, tmp_path / "bad.ckpt", lambda checkpoint: checkpoint.update({part: [1, 2]}))
    refuse(path, f"'{part}'", run, capsys, number=0, every=False)


# ---- checkpoints of another network


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            {"num_classes": 12, "model_kwargs": {"in_features": 64}},
            r"mismatch for network.fc.weight: shape \[10, 64\] from checkpoint, and here \[12, 64\] \(and 1 more\)",
        ),
        ({"backbone": "test_vit", "num_classes": 10, "model_kwargs": {}}, r"Missing key.*network.cls_token"),
        ({"num_classes": 0, "model_kwargs": {}}, r"Unexpected key.*network.fc.weight"),
    ],
)
@EVERYWHERE
def test_another_network_is_one_line(
    every: bool, model: dict[str, Any], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load(run.with_name("run.yaml").read_text())
    recipe["model"]["init_args"].update(model)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(recipe))
    for name in COMMANDS if every else COMMANDS[:1]:
        line = command(capsys, name, "--config", str(tmp_path / "other.yaml"), "--ckpt_path", str(run))
        assert line.startswith("the checkpoint has the weights of another network: ")
        assert line.endswith("config.yaml in the folder of its run")
        assert re.search(said, line), line


# ---- newer formats


def _entry(checkpoint: dict[str, Any], key: str = "NMC(nmc)") -> dict[str, Any]:
    entry: dict[str, Any] = checkpoint["callbacks"][key]
    return entry


NEWER: dict[str, Callable[[dict[str, Any]], object]] = {
    "head": lambda c: _entry(c)["head"]["_extra_state"].update(format=2, another_option=1),
    "statistics": lambda c: _entry(c)["head"].update({"statistics.format": torch.tensor(2)}),
    "callback": lambda c: _entry(c).update(format=2, another_entry=1),
    "evaluation": lambda c: _entry(c, "StreamEvaluation").update(format=2),
    "data": lambda c: c["StreamDataModule"].update(format=2),
    "no number": lambda c: _entry(c).update(format="1"),
    "no number of the data": lambda c: c["StreamDataModule"].update(format=torch.tensor([1, 2])),
    "no number of the head": lambda c: _entry(c)["head"]["_extra_state"].update(format=1.5),
}


@EVERYWHERE
@pytest.mark.parametrize("part", NEWER)
def test_a_newer_format_is_refused(
    part: str, every: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(run, tmp_path / "newer.ckpt", NEWER[part])
    refuse(path, "format", run, capsys, number=list(NEWER).index(part), every=every)
    if part in ("head", "statistics", "no number of the head"):
        with pytest.raises(StateError, match="format"):
            clkit.load_head(path, "nmc")


# ---- states with damaged values


def sample(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, D, generator=generator, dtype=torch.float64), torch.arange(12) % 3 * 4


MAKERS: dict[str, Callable[[], Any]] = {
    "statistics": lambda: FeatureStatistics(D, gram=True, squares=True, class_grams=True),
    "ridge": lambda: AnalyticHead(D),
    "lifted": lambda: AnalyticHead(D, expansion_dim=5, balance="pfg", bias=True),
    "recursive": lambda: AnalyticHead(D, solver="recursive", balance="pfg"),
    "reweight": lambda: AnalyticHead(D, balance="reweight"),
    "nmc": lambda: NearestMeanHead(D),
    "lda": lambda: LDAHead(D),
}


def learned(name: str, seed: int = 0) -> Any:
    made = MAKERS[name]()
    made.update(*sample(seed))
    return made


def _with(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


def _damages(tensor: Tensor) -> dict[str, Any]:
    """Everything that must not be taken in place of a saved tensor."""
    found: dict[str, Any] = {
        "a list": tensor.tolist(),
        "nothing": None,
        "a row more": torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]]),
        "a dimension more": tensor[None],
        "half precision": tensor.half(),
        "text": "text",
        "sparse": tensor.reshape(-1, 1).to_sparse(),
        "without values": tensor.to("meta"),
        "nested": torch.nested.nested_tensor([tensor.reshape(-1).double()]),
        "complex": tensor.to(torch.complex128),
    }
    if tensor.ndim:
        found["empty"] = tensor[:0]
        found["stride zero"] = tensor.as_strided(tensor.shape, [0] * tensor.ndim)
    if tensor.is_floating_point():
        found |= {"NaN": _with(tensor, torch.nan), "inf": _with(tensor, torch.inf), "-inf": _with(tensor, -torch.inf)}
        found["whole numbers"] = tensor.long()
        if tensor.dtype == torch.float64:
            found["squares that overflow"] = _with(tensor, 1e300)
    else:
        found |= {
            "negative": _with(tensor, -1),
            "fractional": tensor.double() + 0.5,
            "NaN": _with(tensor.double(), torch.nan),
        }
        found["truth"] = tensor.bool()
    return found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", MAKERS)
def test_no_damaged_tensor_of_a_state_is_taken(name: str) -> None:
    state = dict(learned(name).state_dict())
    target = learned(name, seed=1)
    before = bits(target.state_dict())
    tensors = [key for key in state if isinstance(state[key], Tensor)]
    assert len(tensors) >= 4
    for key in tensors:
        for damage, value in _damages(state[key]).items():
            with pytest.raises(StateError) as refused:
                target.load_state_dict({**state, key: value})
            assert damage == "empty" or key in str(refused.value), (key, damage, refused.value)
            assert bits(target.state_dict()) == before, (key, damage)
        with pytest.raises(StateError, match=key.rpartition(".")[2]):
            target.load_state_dict({other: state[other] for other in state if other != key})
    target.load_state_dict(state)
    assert bits(target.state_dict()) == bits(state)


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


SENSELESS: dict[str, tuple[str, dict[str, Any]]] = {
    "unsorted ids": ("nmc", {"statistics.classes": torch.tensor([4, 0, 8])}),
    "one id twice": ("nmc", {"statistics.classes": torch.tensor([0, 4, 4])}),
    "an id above the limit": ("nmc", {"statistics.classes": torch.tensor([0, 4, 65536])}),
    "no samples": ("nmc", {"statistics.counts": torch.tensor([4, 0, 4])}),
    "absurdly many samples": ("nmc", {"statistics.counts": torch.tensor([4, 2**60, 4])}),
    "an asymmetric Gram": ("ridge", {"statistics.gram": torch.arange(9.0).reshape(3, 3).double()}),
    "negative squares": ("lifted", {"raw_statistics.squares": torch.full((3, D), -1.0).double()}),
    "another projection's size": ("lifted", {"feature_map.projection": torch.zeros(4, D).double()}),
    "a falling inverse": ("recursive", {"recursion.inverse": -torch.eye(D).double()}),
    "ids that differ": ("recursive", {"recursion.classes": torch.tensor([0, 4, 9])}),
    "counts that differ": ("lifted", {"raw_statistics.counts": torch.tensor([4, 5, 4])}),
    "a surplus entry": ("nmc", {"surplus": torch.zeros(1)}),
    "a surplus entry of a part": ("nmc", {"feature_map.bias": torch.zeros(1)}),
    "a surplus entry of the recursion": ("recursive", {"recursion.bias": torch.zeros(1)}),
    "an entry without a name": ("nmc", {3: torch.zeros(1)}),
    "an option of no plain kind": ("nmc", {"_extra_state": {"format": 1, "head": torch.zeros(2)}}),
    "options of no kind": ("nmc", {"_extra_state": [1]}),
    "another head": ("nmc", {"_extra_state": {**LDAHead(D).get_extra_state()}}),
}


@pytest.mark.parametrize("case", SENSELESS)
def test_a_state_without_sense_changes_nothing(case: str, tmp_path: Path) -> None:
    name, changes = SENSELESS[case]
    state = {**learned(name).state_dict(), **changes}
    target = learned(name, seed=1)
    before = bits(target.state_dict())
    with pytest.raises(StateError):
        target.load_state_dict(state)
    assert bits(target.state_dict()) == before
    torch.save({"callbacks": {"X(x)": {"head": state}}}, tmp_path / "x.ckpt")
    with pytest.raises(StateError):
        clkit.load_head(tmp_path / "x.ckpt", "x")


@pytest.mark.parametrize(
    "options",
    [
        {"format": 1},
        {"format": 1, "head": ["NearestMeanHead"]},
        {"format": 1, "head": "Linear"},
        {"format": 1, "head": "AnalyticHead", "in_features": 10**9},
        {"format": 1, "head": "AnalyticHead", "in_features": 10**15},
        {"format": 1, "head": "AnalyticHead", "in_features": D, "gamma": -1.0},
        {"format": 1, "head": "AnalyticHead", "in_features": D, "gamma": "large"},
        {"format": 1, "head": "AnalyticHead", "in_features": D, "unknown": 1},
        {"format": 1, "head": "NearestMeanHead", "in_features": None},
        {"format": 1, "head": "AnalyticHead", "in_features": 40000, "solver": "recursive"},
        {"format": 1, "head": "AnalyticHead", "in_features": D, "expansion_dim": 10**10},
        {"format": 1, "head": "AnalyticHead", "in_features": D, "pfg_seed": 10**5000},
        {"format": 1, "head": "NearestMeanHead", "in_features": D, "metric": _nested(10**5)},
        {"format": 1, "head": "NearestMeanHead", "in_features": torch.zeros(2, device="meta")},
        {"format": 1, "head": "NearestMeanHead", "in_features": D, 3: 1},
    ],
)
def test_options_of_which_no_head_can_be_made(options: dict[str, Any]) -> None:
    state = {**learned("nmc").state_dict(), "_extra_state": options}
    with pytest.raises(StateError, match=r"^the head") as refused:
        head_of_state(state, "the head", HEADS)
    assert len(str(refused.value)) < 300


VALUES: dict[str, Callable[[dict[str, Any]], object]] = {
    "NaN": lambda c: _entry(c)["head"]["statistics.sums"].view(-1).fill_(torch.nan),
    "negative": lambda c: _entry(c)["head"]["statistics.counts"].neg_(),
    "width": lambda c: _entry(c)["head"].update({"statistics.sums": torch.zeros(4, 32).double()}),
    "rows": lambda c: _entry(c, "StreamEvaluation")["rows"]["nmc"]["counts"].neg_(),
}


@EVERYWHERE
@pytest.mark.parametrize("case", VALUES)
def test_damaged_values_in_a_checkpoint_are_refused(
    case: str, every: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(run, tmp_path / "bad.ckpt", VALUES[case])
    refuse(path, "NMC|StreamEvaluation", run, capsys, number=list(VALUES).index(case), every=every)
    if case != "rows":
        with pytest.raises(StateError):
            clkit.load_head(path, "nmc")


# ---- anything in the place of anything


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a nested state."""
    if path:
        yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from paths(part, (*path, name))


def replaced(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a nested state with another value in one place; ``MISSING`` takes the place away."""
    state = copy.deepcopy(state)
    owner = state
    for name in path[:-1]:
        owner = owner[name]
    if value is MISSING:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return state


MISSING = object()
ODD = [MISSING, None, True, -3, 10**30, 0.5, float("nan"), "odd", [], [None], {}, {"a": 1}, torch.zeros(2)]


@pytest.mark.parametrize("key", ["NMC(nmc)", "StreamEvaluation"])
def test_odd_values_in_a_callbacks_state_never_give_another_error(key: str, run: Path) -> None:
    state = torch.load(run, weights_only=True)["callbacks"][key]
    fresh = NMC if key == "NMC(nmc)" else (lambda: StreamEvaluation(table=False, files=False))
    target = fresh()
    target.load_state_dict(state)
    before = bits(target.stream_state())
    places = list(paths(state))
    assert len(places) > 8
    refused = 0
    for path in places:
        for value in ODD:
            try:
                target.load_state_dict(replaced(state, path, value))
            except StateError:
                refused += 1
                assert bits(target.stream_state()) == before, (path, value)
            else:  # what was taken can be saved and taken again
                fresh().load_state_dict(target.state_dict())
                target.load_state_dict(state)
    assert refused > 0.8 * len(places) * len(ODD)


def test_odd_values_in_the_place_of_a_run_never_give_another_error(run: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run, weights_only=True)
    trainer, untouched = make(tmp_path), bits(resume.capture_random_state())
    trainer.state.fn = "fit"
    resume.load(trainer, checkpoint)
    before = Boundaries.of(trainer).state_dict()
    assert before["running"] is True
    refused = 0
    places = list(paths(checkpoint[STREAM]))
    for path in places:
        for value in ODD:
            try:
                resume.load(trainer, {**checkpoint, STREAM: replaced(checkpoint[STREAM], path, value)})
            except StateError:
                refused += 1
                assert Boundaries.of(trainer).state_dict() == before, (path, value)
            else:
                resume.load(trainer, checkpoint)
    assert refused > 0.6 * len(places) * len(ODD)
    assert bits(resume.capture_random_state()) == untouched


def test_odd_values_in_the_position_never_give_another_error(run: Path, tmp_path: Path) -> None:
    state = torch.load(run, weights_only=True)["StreamDataModule"]
    data = stream()
    data.trainer = make(tmp_path)
    data.setup("fit")
    refused = 0
    for fn in ("fit", "validate"):
        data.trainer.state.fn = fn
        for path in paths(state):
            for value in ODD:
                try:
                    data.load_state_dict(replaced(state, path, value))
                    data._start_of(1)
                    data.test_dataloader()
                except StateError:
                    refused += 1
                finally:
                    data._position = data._reached = None
    assert refused > 100


LOOPS = ("epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress", "epoch_progress", "state_dict")


@pytest.mark.parametrize("strategy", ["gradient_free", "auto"])
def test_odd_loops_are_named(strategy: str, run: Path, tmp_path: Path) -> None:
    loops = torch.load(run, weights_only=True)["loops"]
    odd = [(("fit_loop",), MISSING), (("fit_loop",), 3), (("fit_loop", "epoch_loop.state_dict"), {})]
    odd += [(("fit_loop", name), value) for name in LOOPS for value in (MISSING, 3)]
    odd += [
        (("fit_loop", "epoch_loop.batch_progress", "current", "ready"), "many"),
        (("fit_loop", "epoch_progress", "total"), {}),
        (("fit_loop", "epoch_loop.batch_progress", "is_last_batch"), None),
    ]
    for path, value in odd:
        file = changed(run, tmp_path / "odd.ckpt", lambda c: c.update(loops=replaced(loops, path, value)))  # noqa: B023  used at once
        with pytest.raises(StateError, match="loops"):
            make(tmp_path, strategy=strategy).fit(module(), datamodule=stream(), ckpt_path=str(file))


# ---- flipped bytes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    head = learned("lifted")
    path = tmp_path_factory.mktemp("small") / "small.ckpt"
    torch.save({"callbacks": {"X(x)": {"head": dict(head.state_dict())}}}, path)
    return path, path.read_bytes(), bits(head.state_dict())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_gives_the_same_head_or_an_error(data: st.DataObject, small: tuple[Path, bytes, bytes]) -> None:
    path, whole, before = small
    at = data.draw(st.integers(0, len(whole) - 1))
    value = data.draw(st.integers(0, 255))
    keep = data.draw(st.sampled_from([len(whole), len(whole), at]))  # now and then cut it there
    path.write_bytes((whole[:at] + bytes([value]) + whole[at + 1 :])[:keep])
    try:
        head = clkit.load_head(path, "x")
    except StateError:
        assert value != whole[at] or keep == at
    else:
        assert keep > at
        assert bits(head.state_dict()) == before


def test_an_entry_marked_as_a_folder_is_refused(small: tuple[Path, bytes, bytes]) -> None:
    """torch gives whatever is in memory for it."""
    path, whole, _ = small
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        directory = archive.start_dir
    at = whole.index(b"PK\x01\x02", whole.index(b"data/3PK", directory))
    path.write_bytes(whole[: at + 38] + bytes([0x10]) + whole[at + 39 :])
    with pytest.raises(StateError, match="marked as a folder"):
        clkit.load_head(path, "x")


def test_files_without_checksums_are_read(small: tuple[Path, bytes, bytes]) -> None:
    path, _, before = small
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"callbacks": {"X(x)": {"head": dict(learned("lifted").state_dict())}}}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert bits(clkit.load_head(path, "x").state_dict()) == before


# ---- data in .npz files


def _npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def features(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "f_train": rng.random((6, 4)),
        "y_train": np.arange(6) % 2,
        "f_test": rng.random((4, 4)),
        "y_test": np.arange(4) % 2,
        **changes,
    }
    return {name: value for name, value in arrays.items() if value is not None}


def _spoilt(value: float, dtype: Any = np.float64) -> Any:
    rows = np.ones((6, 4), dtype)
    rows[4, 2] = value
    return rows


FEATURES: dict[str, tuple[dict[str, Any], str]] = {
    "objects": ({"f_train": np.array([{}, 1, 2, 3, 4, 5], dtype=object)}, "Python objects, which are never unpickled"),
    "object names": ({"class_names": np.array(["a", None])}, "Python objects"),
    "NaN": ({"f_train": _spoilt(np.nan)}, r"f_train has values that are not finite .*in 1 of 6 rows, .*row 4"),
    "inf": ({"f_test": np.full((4, 4), np.inf, np.float16)}, r"f_test has values that are not finite .*in 4 of 4"),
    "too large": ({"f_train": _spoilt(1e300)}, r"not finite \(or beyond float32\) in 1 of 6 rows"),
    "truth": ({"y_train": np.zeros(6, bool)}, "y_train is bool"),
    "too large a label": ({"y_train": np.full(6, 2**64 - 1, np.uint64)}, "y_train holds 18446744073709551615"),
    "one number": ({"f_train": np.float64(1)}, "f_train is a single value"),
}  # what has another form is in data/test_sources.py


@pytest.mark.parametrize("case", FEATURES)
def test_feature_files_that_do_not_fit(
    case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, said = FEATURES[case]
    path = _npz(tmp_path / "bad.npz", **features(**changes))
    with pytest.raises(DataError, match=said):
        NpzFeatures(str(path)).load(None)
    if case == "objects":
        config = str(run.with_name("run.yaml"))
        assert "bad.npz" in command(capsys, "fit", "--config", config, "--data.source", f"features:{path}")


def test_an_object_array_executes_nothing(tmp_path: Path) -> None:
    objects = np.empty(6, dtype=object)
    objects[:] = Payload(tmp_path / "executed")
    path = tmp_path / "bad.npz"
    np.savez(path, allow_pickle=True, **features(f_train=objects))
    with pytest.raises(DataError, match="never unpickled"):
        NpzFeatures(str(path)).load(None)
    assert not (tmp_path / "executed").exists()
    with np.load(path, allow_pickle=True) as archive:
        archive["f_train"][0].close()
    assert (tmp_path / "executed").exists()  # otherwise this test could not fail


HEADERS = [
    "{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999, 3), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999999999, 3), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 3), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (010, 3), }",
    "{'descr': '<f8', 'fortran_order': False, b'shape': (2, 3), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), ",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }",
    "__import__('os').system('true')",
]


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_lie(header: str, tmp_path: Path) -> None:
    line = header.ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line.encode() + bytes(96)
    path = tmp_path / "bad.npz"
    path.write_bytes(_zip({"f.npy": content, "y.npy": content}))
    with pytest.raises(DataError, match=r"bad\.npz"):
        NpzFeatures(str(path)).load(None)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("npz") / "some.npz"
    np.savez_compressed(path, **features(class_names=np.array(["a", "b"])))
    return path, path.read_bytes()


@pytest.mark.filterwarnings("ignore:unclosed file")  # which NumPy leaves open
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_byte_gives_the_same_data_or_an_error(data: st.DataObject, archive: tuple[Path, bytes]) -> None:
    path, whole = archive
    at, value = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 255))
    keep = data.draw(st.sampled_from([len(whole), len(whole), at]))  # now and then cut it there
    path.write_bytes((whole[:at] + bytes([value]) + whole[at + 1 :])[:keep])
    try:
        train, test = NpzFeatures(str(path)).load(None)
    except DataError:
        return
    for part, name in ((train, "train"), (test, "test")):
        wanted = features()
        assert torch.equal(part.get_many(np.arange(len(part))), torch.from_numpy(wanted[f"f_{name}"]).float())
        assert np.array_equal(part.targets, wanted[f"y_{name}"])


def _picture(kind: str, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _pictures(files: list[bytes], **changes: Any) -> dict[str, Any]:
    data = np.frombuffer(b"".join(files), dtype=np.uint8)
    offsets = np.cumsum([0, *map(len, files)])
    both = {
        f"{name}_{part}": value for part in ("train", "test") for name, value in (("jpeg", data), ("offsets", offsets))
    }
    targets = {f"y_{part}": np.arange(len(files)) % 2 for part in ("train", "test")}
    return {**both, **targets, **changes}


@pytest.mark.parametrize(
    "offsets",
    [
        np.array([0, 500, 10**9]),
        np.array([0.0, 500.0, 700.0]),
        np.array([0, 500, 2**64 - 1], dtype=np.uint64),
        np.array([], dtype=np.int64),
    ],
)
def test_offsets_that_point_elsewhere(offsets: Any, tmp_path: Path) -> None:
    files = _pictures([_picture("JPEG"), _picture("JPEG", 1)], offsets_train=offsets)
    path = _npz(tmp_path / "bad.npz", **files)
    with pytest.raises(DataError, match=r"bad\.npz: offsets_train"):
        NpzImages(str(path)).load(None)


def test_a_damaged_image_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = _picture("JPEG")
    path = _npz(tmp_path / "bad.npz", **_pictures([good, good[: len(good) // 2], good, good]))
    train, _ = NpzImages(str(path)).load(None)
    with pytest.raises(DataError, match="image 1 of the file's JPEG bytes cannot be decoded"):
        train.get_many(np.arange(4))
    recipe = yaml.safe_load(run.with_name("run.yaml").read_text())
    recipe["model"]["init_args"]["model_kwargs"] = {"in_features": 16 * 16 * 3}
    recipe["data"]["init_args"].update(source=f"npz:{path}")
    recipe["data"]["init_args"]["scenario"]["init_args"]["experiences"] = 2
    (tmp_path / "pictures.yaml").write_text(yaml.safe_dump(recipe))
    said = command(capsys, "fit", "--config", str(tmp_path / "pictures.yaml"))
    assert "image 1" in said


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "BMP", "GIF", "TIFF", "PPM"]),
    place=st.floats(0, 0.9999),
    value=st.integers(0, 255),
    cut=st.booleans(),
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_pictures_never_give_another_error(kind: str, place: float, value: int, cut: bool) -> None:
    from clkit.data.sources.npz import _JpegPart

    whole = _picture(kind)
    at = int(place * len(whole))
    damaged = whole[:at] + bytes([value]) + (b"" if cut else whole[at + 1 :])
    part = _JpegPart(np.frombuffer(damaged, np.uint8), np.array([0, len(damaged)]), np.zeros(1, np.int64), None)
    try:
        (image,) = part.get_many(np.zeros(1, np.int64))
    except DataError:
        return
    assert image.dtype == torch.uint8


def test_a_picture_of_absurd_size_is_refused(tmp_path: Path) -> None:
    from clkit.data.sources.npz import _JpegPart

    whole = bytearray(_picture("BMP"))
    whole[18:26] = (60000).to_bytes(4, "little") * 2
    part = _JpegPart(np.frombuffer(bytes(whole), np.uint8), np.array([0, len(whole)]), np.zeros(1, np.int64), None)
    with pytest.raises(DataError, match=r"image 0 .*decompression bomb"):
        part.get_many(np.zeros(1, np.int64))


# ---- settings


TAGS = [
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/new:os.system ['touch {marker}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:builtins.open ['{marker}', 'w']",
    "!!python/tuple [1, 2]",
]
PLACES = [
    "seed_everything: {tag}",
    "model: {tag}",
    "model:\n  class_path: {tag}",
    "model:\n  class_path: TimmClassifier\n  init_args:\n    backbone: {tag}",
    "data:\n  class_path: StreamDataModule\n  init_args:\n    source: {tag}",
    "trainer:\n  callbacks:\n  - {tag}",
    "trainer:\n  callbacks:\n  - class_path: {tag}",
    "{tag}",
]


@EVERYWHERE
@pytest.mark.parametrize("tag", TAGS)
def test_python_tags_in_settings_execute_nothing(
    tag: str, every: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, file = tmp_path / "executed", tmp_path / "bad.yaml"
    number = TAGS.index(tag)
    for place in PLACES if every else [PLACES[number]]:
        file.write_text(place.format(tag=tag.format(marker=marker)) + "\n")
        said = command(capsys, "fit", "--config", str(file))
        assert said.startswith(f"{file} is no file of settings: could not determine a constructor for the tag"), said
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:(?s).*Importing '.*' is not allowed")
def test_a_setting_that_is_no_class_of_the_kind_is_not_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, file = tmp_path / "executed", tmp_path / "bad.yaml"
    for place, arguments in (("trainer:\n  callbacks:\n  - ", "    "), ("model:\n  ", "  "), ("data:\n  ", "  ")):
        file.write_text(f"{place}class_path: os.system\n{arguments}init_args:\n{arguments}  command: touch {marker}\n")
        assert "os.system" in command(capsys, "fit", "--config", str(file))
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\xfa", b"model: [1, 2", b"- 1\n- 2\n"])
def test_settings_that_are_no_yaml(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    assert "bad.yaml" in command(capsys, "fit", "--config", str(tmp_path / "bad.yaml"))


# ---- full disks


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_finds_no_room_leaves_the_last_one(run: Path, tmp_path: Path) -> None:
    for strategy in ("gradient_free", "auto"):
        trainer = make(tmp_path, strategy=strategy, max_steps=3)
        trainer.fit(module(), datamodule=stream())
        path = tmp_path / f"{strategy}.ckpt"
        trainer.save_checkpoint(path)
        before = path.read_bytes()
        with room_for(2000), pytest.raises(WriteError, match=r"\.ckpt could not be written: .*large.*is unchanged"):
            trainer.save_checkpoint(path)
        assert path.read_bytes() == before
        read_checkpoint(path)
        with room_for(2000), pytest.raises(OSError, match="nothing was left there"):
            trainer.save_checkpoint(tmp_path / "new.ckpt")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["auto.ckpt", "gradient_free.ckpt"]


def test_a_run_that_finds_no_room_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    class Fill(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 9:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saves = ModelCheckpoint(str(tmp_path), filename="last", every_n_train_steps=2, enable_version_counter=False)
    trainer = make(tmp_path, callbacks=[*callbacks(), Fill(), saves], enable_checkpointing=True)
    try:
        with pytest.raises(WriteError, match=r"last\.ckpt could not be written"):
            trainer.fit(module(), datamodule=stream())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert trainer.global_step == 10
    assert not hasattr(trainer.callbacks[0], "observer")
    resumed, whole = make(tmp_path), make(tmp_path)
    resumed.fit(module(), datamodule=stream(), ckpt_path=str(tmp_path / "last.ckpt"))
    whole.fit(module(), datamodule=stream())
    assert bits(resumed.callbacks[0].head.state_dict()) == bits(whole.callbacks[0].head.state_dict())


def test_the_command_line_says_that_the_disk_is_full(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit", "--config", str(run.with_name("run.yaml")), "--trainer.default_root_dir", str(tmp_path / "out")]
    with room_for(100):
        assert main(arguments) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("clkit: ")]
    assert line.endswith("make room and resume")
    assert "Traceback" not in error


SUMMARY: dict[str, Any] = {
    "nmc": {
        "accuracy_matrix": [[1.0, None], [0.5, 0.5]],
        "accuracy_seen": [1.0, 0.5],
    }
}
DOCUMENT: dict[str, Any] = {"format": 1, "predictors": SUMMARY}
CLASSES: dict[str, Any] = {"nmc": ([[0, 1, 2], [1, 2, 3]], [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 2]])}
RESULT_FILES = ["results.json", "accuracy.csv", "per_class.csv", "confusion_nmc.csv"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", [*RESULT_FILES, "accuracy_matrix.png", "accuracy_over_time.png"])
def test_a_result_that_finds_no_room_leaves_the_last_one(name: str, tmp_path: Path) -> None:
    def write() -> None:
        if name.endswith(".png"):
            draw_figures(tmp_path, SUMMARY)
        else:
            write_results(tmp_path, DOCUMENT, CLASSES, {})

    write()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(files) == (2 if name.endswith(".png") else 4)
    with atomic_write(tmp_path / name) as draft:  # where it will write
        draft.write_bytes(files[name])
    draft.symlink_to("/dev/full")
    with pytest.raises(WriteError, match=f"{name} could not be written: No space left on device; .* is unchanged"):
        write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    write()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_predictions_that_find_no_room_leave_the_last_ones(run: Path, tmp_path: Path) -> None:
    def predict() -> None:
        parts = [NMC(), StreamEvaluation(table=False, figures=False)]
        make(tmp_path, callbacks=parts).predict(module(), datamodule=stream(), ckpt_path=str(run))

    predict()
    path = tmp_path / "predictions.csv"
    before = path.read_bytes()
    with atomic_write(path) as draft:
        draft.write_bytes(before)
    draft.symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"predictions\.csv"):
        predict()
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["predictions.csv"]


def _fail_while_writing(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as draft:
        draft.write_text("two")
        raise error


def test_a_whole_file_appears_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as draft:
        draft.write_text("one")
        assert not path.exists()
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            _fail_while_writing(path, error)
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(WriteError, match=r"file\.txt"), atomic_write(path / "below.txt") as draft:
        draft.write_text("three")
    with pytest.raises(WriteError, match="nothing was left there"), atomic_write(tmp_path / "none.txt"):
        pass  # nothing written
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(WriteError, match="folder"), atomic_write(folder) as draft:
        draft.write_text("four")
    assert folder.is_dir()


@pytest.mark.warns("it has learned nothing")
def test_only_lightnings_own_way_of_saving_is_replaced(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    for own in (Own(), AsyncCheckpointIO()):
        trainer = make(tmp_path, plugins=[own], max_steps=1)
        trainer.fit(module(), datamodule=stream())
        assert trainer.strategy.checkpoint_io is own
    for strategy in ("auto", "gradient_free", "ddp"):
        trainer = make(tmp_path, strategy=strategy, callbacks=[NMC()])
        NMC().setup(trainer, module(), "fit") if strategy == "ddp" else trainer.validate(
            module(), stream(), verbose=False
        )
        assert type(trainer.strategy.checkpoint_io) is WholeCheckpointIO


# ---- interruptions


class Interrupt(pl.Callback):
    """Ctrl-C at one step; stands before or behind the others."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 8:
            raise KeyboardInterrupt


def test_ctrl_c_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    whole, eight, resumed = make(tmp_path), make(tmp_path, max_steps=8), make(tmp_path)
    saves = ModelCheckpoint(str(tmp_path), filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make(tmp_path, callbacks=[*callbacks(), Interrupt(), saves], enable_checkpointing=True)
    network = module()
    hooks = _hooks(network)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(network, datamodule=stream())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from here on
    assert _hooks(network) == hooks
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.training
    whole.fit(module(), datamodule=stream())
    eight.fit(module(), datamodule=stream())
    assert bits(trainer.callbacks[0].head.state_dict()) == bits(eight.callbacks[0].head.state_dict())
    resumed.fit(module(), datamodule=stream(), ckpt_path=str(tmp_path / "step=7.ckpt"))
    assert bits(resumed.callbacks[0].head.state_dict()) == bits(whole.callbacks[0].head.state_dict())
    trainer.callbacks[0].head.update(torch.ones(1, 64), torch.tensor([3]))  # what was interrupted is still a head


# ---- a process that dies


WAYS = ["batch", "boundary", "validation", "collect", "write"]
ORDINARY = ["boundary", "write"]  # the others take longer than the ordinary suite allows


class Die(pl.Callback):
    """One rank dies at one place; the other notes how long it took until it heard."""

    boundary_phase = 1  # before anybody sums over ranks

    def __init__(self, way: str) -> None:
        self.way = way
        self.step = 0

    def _die(self, way: str, rank: int) -> None:
        if way == self.way and self.step >= 5 and int(os.environ["LOCAL_RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.step = trainer.global_step
        self._die("batch", 1)

    def on_experience_end(self, *args: Any) -> None:
        self._die("boundary", 1)

    def on_validation_epoch_end(self, *args: Any) -> None:
        self._die("validation", 1)

    def state_dict(self) -> dict[str, Any]:
        self._die("collect", 1)
        return {}


def lose(way: str, folder: Path) -> dict[str, Any]:
    """How the other rank hears of it."""
    die = Die(way)
    if way == "write":
        rename = Path.replace

        def replace(self: Path, target: Any) -> Any:
            die._die("write", 0)
            return rename(self, target)

        Path.replace = replace  # type: ignore[method-assign,assignment]
    saves = ModelCheckpoint(str(folder), filename="run", every_n_train_steps=2, enable_version_counter=False)
    trainer = make(folder, devices=2, callbacks=[die, *callbacks(), saves], enable_checkpointing=True)
    try:
        trainer.fit(module(), datamodule=stream())
    except BaseException as error:
        return {"error": [each.__name__ for each in type(error).__mro__], "message": str(error)}
    return {}


@pytest.mark.parametrize("way", [way if way in ORDINARY else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_a_rank_that_dies_ends_the_other(way: str, tmp_path: Path) -> None:
    ends = driven(__file__, tmp_path, [way], lost=True)[way]
    dead, alive = (0, 1) if way == "write" else (1, 0)
    assert ends[dead] == {}
    assert ends[alive]["error"][0] == "ProcessLostError"
    assert {"ClkitError", "RuntimeError"} <= set(ends[alive]["error"])
    assert "start all processes again from the last checkpoint" in ends[alive]["message"]
    # the checkpoint from before is whole
    checkpoint = read_checkpoint(tmp_path / "run.ckpt")
    assert checkpoint["global_step"] >= 2
    assert int(clkit.load_head(tmp_path / "run.ckpt", "nmc").counts.sum()) > 0
    make(tmp_path).validate(module(), datamodule=stream(), ckpt_path=str(tmp_path / "run.ckpt"), verbose=False)


if __name__ == "__main__":
    sys.exit(drive(lose))
