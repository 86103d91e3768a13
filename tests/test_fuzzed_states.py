"""Saved states with anything in the place of anything: each is an error of clkit's own, or makes an object that works.

A file may come from anywhere, and what is loaded goes on into C libraries that trust their callers. Every entry of the
table of methods is under attack here, so that a new method is from the day on which it joins the table. The same seeds
give the same mutations.
"""

from __future__ import annotations

import copy
import random
import resource
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clkit.callbacks import Predictor
from clkit.errors import ClkitError
from clkit.methods import ErrorPredictor, ErrorRecords, FeatureMemory, Holdings, PredictionSets
from clkit.methods.heads.holdings import keys_of_names
from clkit.methods.heads.portable import head_of_state
from clkit.runs.heads import HEADS
from clkit.schema import STRATEGY, STREAM
from clkit.stream import resume
from clkit.stream.boundaries import Boundaries
from clkit.testing import Entry, clkit_entries
from clkit.testing._compare import changed
from clkit.testing._runs import FEATURES, Setting, isolated, small_module, stream, trainer

# torch says once in a process that it checks a sparse tensor of a file, which a mutation may put there
pytestmark = pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")

ENTRIES = {entry.name: entry for entry in clkit_entries()}
MANY = pytest.mark.parametrize("mutations", [100, pytest.param(2000, marks=pytest.mark.slow)])
SPARE = 2**31  # bytes that a mutation may ask for

Outcome = tuple[Callable[[], object], Callable[[], object]]  # what is held, and what must work


# ---- what is done to a state


def _deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


DEEP = [_deep(10**5), _deep(10**5 + 1)]


def _odd(rng: random.Random) -> Any:
    """A value that a file can hold and that is rarely wanted."""
    wide = [2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 10**30, 10**300, 10**3000]
    makers: list[Callable[[], Any]] = [
        lambda: rng.choice([None, True, False, (), [], {}, "", "odd", "a" * 10**6, b"bytes", 3 + 4j, torch.float16]),
        lambda: rng.choice([1, -1]) * rng.choice([0, 1, 2, 3, 7, 100, *wide]),
        lambda: rng.choice([1, -1]) * rng.choice([0.0, 0.5, 1.0, 1e-320, 1e119, 1e300, np.inf, np.nan]),
        lambda: rng.choice([_deep(rng.choice([1, 2, 3])), *DEEP, [[0] * 3] * 10**4]),
        lambda: _odd_tensor(torch.zeros(rng.choice([(), (0,), (1,), (2,), (3, 3), (1, 2, 3, 4)])), rng),
    ]
    return rng.choice(makers)()


def _odd_tensor(tensor: Tensor, rng: random.Random) -> Any:
    """Something much like a tensor."""
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.numel() > 10**6:
        return tensor
    flat = tensor.detach().reshape(-1)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
    makers: list[Callable[[], Any]] = [
        lambda: _with_one(tensor, rng),
        lambda: _with_one(_with_one(tensor, rng), rng),
        lambda: tensor.to(rng.choice([*dtypes, torch.bool, torch.complex128])),
        lambda: tensor.to("meta"),
        lambda: torch.empty(rng.choice([(2**40,), (2**31, 2**20)]), device="meta", dtype=tensor.dtype),
        lambda: torch.zeros(1, dtype=tensor.dtype).expand(rng.choice([2, 2**33, 2**62])),
        lambda: torch.zeros((1,) * max(tensor.ndim, 1), dtype=tensor.dtype).expand((2**12,) * max(tensor.ndim, 1)),
        lambda: torch.empty(0, rng.choice([0, 2**31, 2**50]), dtype=tensor.dtype),
        lambda: tensor.clone().as_strided(tensor.shape, [0] * tensor.ndim),
        lambda: tensor[None],
        lambda: flat,
        lambda: tensor.mT if tensor.ndim > 1 else tensor.flip(0) if tensor.ndim else tensor.neg(),
        lambda: torch.cat([tensor, tensor[:1]]) if tensor.ndim else tensor,
        lambda: tensor[: rng.randrange(len(tensor) + 1)] if tensor.ndim else tensor,
        lambda: tensor[torch.randperm(len(tensor))] if tensor.ndim else tensor,
        lambda: tensor.to_sparse() if tensor.ndim else tensor,
        lambda: tensor * rng.choice([-1, 0, 2, 3]),
        lambda: (tensor.double() * rng.choice([1e-300, 1e50, 1e300])).to(tensor.dtype),
        lambda: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
        lambda: tensor.tolist() if tensor.numel() < 10**4 else None,
    ]
    return rng.choice(makers)()


def _with_one(tensor: Tensor, rng: random.Random) -> Tensor:
    """A tensor with one value, or the bits of one, replaced."""
    found = tensor.detach().contiguous().clone()
    if not found.numel():
        return found
    place = rng.randrange(found.numel())
    values: list[Any] = [0, 1, rng.randrange(100)]
    if found.dtype.is_floating_point:
        values += [np.nan, np.inf, -np.inf, 0.5]
    if found.dtype == torch.float64:
        values += [1e-310, 1e60, -1e119, 1e121, 1e300]
    if found.dtype == torch.int64:
        values += [2**15, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63), -2, -1]
    if rng.random() < 0.3:
        found.view(-1).view(torch.uint8)[rng.randrange(found.numel() * found.element_size())] ^= 1 << rng.randrange(8)
    else:
        found.view(-1)[place] = rng.choice(values)
    return found


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every dictionary or list in a nested state with each of its keys."""
    if depth > 9 or len(value) > 99 if isinstance(value, dict | list) else False:
        return
    parts = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if type(value) is list else []
    for key, part in parts:
        yield value, key
        yield from _places(part, depth + 1)


def _mutate(state: dict[str, Any], rng: random.Random) -> str:
    """Change a state in one place, in place; gives what was done in words."""
    places = list(_places(state))
    if not places:
        state["odd"] = _odd(rng)
        return "an entry added to nothing"
    owner, key = rng.choice(places)
    value = owner[key]
    kind = rng.choice(["odd", "odd", "near", "near", "near", "near", "gone", "more", "swapped", "renamed"])
    if kind == "gone":
        del owner[key]
    elif kind == "more":
        if type(owner) is list:
            owner.insert(rng.randrange(len(owner) + 1), copy.copy(value))
        else:
            owner[rng.choice(["odd", "format", key + key if type(key) is str else "odd"])] = copy.copy(value)
    elif kind == "swapped":
        other, place = rng.choice(places)
        owner[key], other[place] = other[place], value
        if other is value:  # a list within itself is no file's content
            owner[key] = None
    elif kind == "renamed" and isinstance(owner, dict):
        owner[rng.choice([3, "odd", f"{key}.odd", None, b"odd"])] = owner.pop(key)
    elif kind == "near" and isinstance(value, Tensor):
        owner[key] = _odd_tensor(value, rng)
    elif kind == "near" and type(value) in (int, float):
        owner[key] = rng.choice([value + 1, value - 1, -value, value * 2, value * 10**6, 0.5, str(value)[:99]])
    else:
        owner[key] = _odd(rng)
    return f"{kind} at {key!r}"


@contextmanager
def _little_memory() -> Iterator[None]:
    """Let nothing take more memory than there is to spare, as a small machine would."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attack(
    what: str,
    state: dict[str, Any],
    load: Callable[[dict[str, Any]], object],
    held: Callable[[], Any],
    works: Callable[[], object],
    mutations: int,
) -> Counter[str]:
    """Load mutated states one after the other, and the whole one again after each that was taken."""
    rng = random.Random(what)
    load(copy.deepcopy(state))
    before, counts, wrong = copy.deepcopy(held()), Counter[str](), list[str]()
    with warnings.catch_warnings(), isolated(), _little_memory():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        for number in range(mutations):
            odd = copy.deepcopy(state)
            done = [_mutate(odd, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
            try:
                end = _end_of(lambda: load(odd), works)  # noqa: B023  called at once
                if end == "refused":
                    assert not changed(before, held()), "it was refused, but changed something"
            except Exception as error:  # whatever it is, it is none of clkit's
                wrong.append(f"{number}, {', '.join(done)}: {type(error).__name__}: {str(error)[:200]}")
                end = "wrong"
            counts[end] += 1
            if end != "refused":
                load(copy.deepcopy(state))
        assert not changed(before, held())
    print(f"{what}: {dict(counts)}")  # for who wants to know: pytest -s
    assert not wrong, "\n".join([f"{what}: {len(wrong)} of {mutations} mutations", *wrong[:20]])
    return counts


def _end_of(load: Callable[[], object], works: Callable[[], object]) -> str:
    """What became of a mutated state; any other error than those of clkit goes on."""
    try:
        load()
    except ClkitError as error:
        if len(str(error)) > 2000:
            raise ValueError(f"a message of {len(str(error))} letters") from error
        return "refused"
    try:
        works()
    except ClkitError:
        return "taken, refused in use"
    return "taken"


# ---- the methods


@MANY
@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.kind == "head"])
def test_a_mutated_head_is_refused_or_works(name: str, mutations: int) -> None:
    make, rows = ENTRIES[name].make, torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3 * 4
    target, other = make(3), make(3)
    for head in (target, other):
        head.update(rows, labels)
    state = dict(target.state_dict())

    def load(odd: dict[str, Any]) -> None:
        with suppress(ClkitError):  # options are the file's own here, and those of the constructor below
            head_of_state(odd, "it", HEADS).predict(rows)
        target.load_state_dict(odd)

    def works() -> None:
        make(3).load_state_dict(dict(target.state_dict()))
        assert not target.scores_seen(rows).isnan().any()
        target.predict(rows)
        target.update(rows, labels)
        target.predict(rows)
        if ENTRIES[name].merges:
            target.merge(other)
        if ENTRIES[name].subtracts:
            target.subtract(rows, labels)

    counts = attack(name, state, load, lambda: dict(target.state_dict()), works, mutations)
    assert counts["refused"] > 0.5 * mutations


def _strategy_of(entry: Entry) -> str:
    """What a callback runs under."""
    return "auto" if entry.needs_gradients else "gradient_free"


def _learned(entry: Entry, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A method after a run, its trainer, and the checkpoint of that run."""
    with isolated():
        trial = Setting(entry, folder, None if entry.kind == "strategy" else _strategy_of(entry)).run()
        trial.trainer.save_checkpoint(folder / "whole.ckpt")
    return trial.callback, trial.trainer, torch.load(folder / "whole.ckpt", weights_only=True)


def _read_all(callback: Any) -> None:
    """Ask a callback for everything that it shows."""
    for name in dir(type(callback)):
        if isinstance(getattr(type(callback), name), property):
            with suppress(ClkitError):
                getattr(callback, name)
    if isinstance(callback, Predictor):
        features = torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        assert not callback.scores(features).isnan().any()


@MANY
@pytest.mark.parametrize(
    "name",
    [name for name, entry in ENTRIES.items() if entry.kind == "callback" and entry.make().state_dict()],
)
def test_a_mutated_callback_is_refused_or_works(name: str, mutations: int, tmp_path: Path) -> None:
    """One in twenty of those that are taken is used in a trainer as well."""
    entry = ENTRIES[name]
    learned, _, checkpoint = _learned(entry, tmp_path)
    state = learned.state_dict()
    target, uses = entry.make(), 0

    def works() -> None:
        nonlocal uses
        entry.make().load_state_dict(target.state_dict())
        _read_all(target)
        uses += 1
        if uses % 20 == 1:
            checkpoint["callbacks"][target.state_key] = target.state_dict()
            torch.save(checkpoint, tmp_path / "odd.ckpt")
            run = trainer(tmp_path, [entry.make()], strategy=_strategy_of(entry))
            run.validate(small_module(), datamodule=stream(), ckpt_path=str(tmp_path / "odd.ckpt"), verbose=False)

    attack(name, state, target.load_state_dict, target.state_dict, works, mutations)


@MANY
@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.kind == "strategy"])
def test_a_mutated_strategy_is_refused_or_works(name: str, mutations: int, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    _, run, checkpoint = _learned(entry, tmp_path)
    state = checkpoint[STRATEGY]
    run.state.fn = "fit"
    strategy = run.strategy

    def load(odd: dict[str, Any]) -> None:
        strategy.load_model_state_dict({**checkpoint, STRATEGY: odd})

    def works() -> None:
        load({**strategy.stream_state(), **{key: state[key] for key in state if key not in strategy.stream_state()}})

    attack(name, state, load, strategy.stream_state, works, mutations)


# ---- what stands beside the methods


@MANY
def test_a_mutated_place_in_a_stream_is_refused_or_works(mutations: int, tmp_path: Path) -> None:
    _, run, checkpoint = _learned(ENTRIES["NMC"], tmp_path)
    run.state.fn = "fit"
    place = checkpoint[STREAM]
    place["gradients"] = [{name: torch.ones_like(each) for name, each in run.lightning_module.named_parameters()}]

    def load(odd: dict[str, Any]) -> None:
        resume.load(run, {**checkpoint, STREAM: odd})

    def works() -> None:
        resume.begin(run, run.lightning_module)
        torch.randn(1000)
        random.gauss(0, 1)
        np.random.normal(size=1000)  # noqa: NPY002  users draw from it

    attack("place in the stream", place, load, Boundaries.of(run).state_dict, works, mutations)


@MANY
def test_a_mutated_position_of_data_is_refused_or_works(mutations: int, tmp_path: Path) -> None:
    _, run, checkpoint = _learned(ENTRIES["NMC"], tmp_path)
    data = stream()
    data.trainer = run
    run.state.fn = "fit"
    data.setup("fit")

    def load(odd: dict[str, Any]) -> None:
        data._position = data._reached = None
        data.load_state_dict(odd)

    def works() -> None:
        data._start_of(1)
        data.test_dataloader()

    attack("position in the data", checkpoint["StreamDataModule"], load, dict, works, mutations)


# ---- the engine of DEUP


@MANY
@pytest.mark.parametrize("model", ["forest", "ridge", "gbt", "mlp", "gp"])
def test_a_mutated_error_predictor_is_refused_or_works(model: Any, mutations: int) -> None:
    draws = torch.Generator().manual_seed(0)
    phi, error = torch.randn(60, 3, generator=draws), torch.rand(60, generator=draws)
    predictor = ErrorPredictor(model, trees=3)
    predictor.fit(phi, error)

    def works() -> None:
        assert predictor.predict(1e3 * phi).isfinite().all()
        ErrorPredictor(model, trees=3).load_state_dict(predictor.state_dict())

    attack(
        f"error predictor {model}",
        predictor.state_dict(),
        predictor.load_state_dict,
        predictor.state_dict,
        works,
        mutations,
    )


@MANY
@pytest.mark.parametrize("kind", ["memory", "records", "sets"])
def test_a_mutated_table_is_refused_or_works(kind: str, mutations: int) -> None:
    draws = torch.Generator().manual_seed(0)
    phi, labels, ids = torch.randn(60, 3, generator=draws), torch.arange(60) % 3, torch.arange(60)
    made: Any
    if kind == "memory":
        made = FeatureMemory(30)
        made.add(phi, labels, ids)
    elif kind == "records":
        made = ErrorRecords(30)
        made.add("loo", phi, phi[:, 0].abs(), ids, labels)
        made.add("novel", phi, phi[:, 0].abs(), ids)
    else:
        made = PredictionSets(0.9, class_conditional=True, adaptive=0.1)
        made.calibrate(phi, labels)

    def works() -> None:
        if kind == "memory":
            made.add(phi, labels, ids + 100)
            made.forget(ids)
        elif kind == "records":
            ErrorPredictor("ridge").fit(*made.training_set({0: 5, 1: 6, 2: 7}, holdout=0.2))
            made.add("novel", phi, phi[:, 0].abs(), ids)
        else:
            made.observe(phi, labels)
            made.predict(phi)
        made.load_state_dict(made.state_dict())

    counts = attack(kind, made.state_dict(), made.load_state_dict, made.state_dict, works, mutations)
    assert counts["refused"] > 0


@MANY
def test_mutated_holdings_are_refused_or_work(mutations: int) -> None:
    made = Holdings.shard("features", 100, 1, 4)
    made.add("images", 9, [(0, 3), (5, 9)], digest="a list", keys=keys_of_names("abcdefg"), left_out=["x.jpg"])
    box = [made]

    def load(state: dict[str, Any]) -> None:
        box[0] = Holdings.of_state(state, "the rows")

    def works() -> None:
        box[0].missing()
        box[0].merge(Holdings.shard("others", 100, 2, 4))
        box[0].merge(Holdings.shard("features", 100, 2, 4))
        load(box[0].state_dict())

    counts = attack("holdings", made.state_dict(), load, lambda: box[0].state_dict(), works, mutations)
    assert counts["refused"] > 0
