"""What replay learning keeps in a checkpoint: enough to go on bit for bit, and nothing of it among the user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from onpro_runs import (
    BATCHES,
    SAMPLES,
    Lit,
    batch,
    dataset,
    equal,
    er,
    lit,
    loader,
    onpro,
    stream,
    values,
)
from small_runs import quiet_trainer
from torch import Tensor

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.errors import BatchError, StateError
from clkit.schema import STRATEGY
from clkit.strategies import DERPPStrategy, GradientFreeStrategy, LearningStrategy, OnProStrategy
from clkit.testing._compare import changed

Make = Callable[..., Any]

# of heads beside a network that trains; a resume from the last batch has nothing to learn
pytestmark = pytest.mark.filterwarnings("ignore:.*(the backbone still trains|this fit learned no batch):UserWarning")

STEPS = 12
RUNS: dict[str, dict[str, Any]] = {
    "half": {"trainer": {"precision": "bf16-true"}},
    "double": {"trainer": {"precision": "64-true"}},
    "alone": {},
    "heads": {"callbacks": True},
    "turned": {"strategy": {"rotation": "rot4", "first_experience": "replay", "dim": 3}},
    "der": {"strategy": {"kind": DERPPStrategy, "policy": "class_balanced"}},
    "accumulation": {"trainer": {"accumulate_grad_batches": 2, "val_check_interval": 0.5}},
}


class Run:
    """A run of a network with batch statistics and dropout; ``save`` keeps a checkpoint of every step."""

    def __init__(
        self, make_trainer: Make, kind: str, *, save: Path | None = None, resume: Path | None = None, **options: Any
    ) -> None:
        settings = RUNS[kind]
        self.module = lit(dropout=0.3)
        self.strategy = onpro(**settings.get("strategy", {}))
        callbacks: list[Any] = []
        if settings.get("callbacks"):
            callbacks = [NMC(), AEFOCL(balance="none"), StreamEvaluation(table=False, files=False, figures=False)]
        if save is not None:
            callbacks.append(Save(save))
        self.trainer = make_trainer(
            strategy=self.strategy, callbacks=callbacks, **{**settings.get("trainer", {}), **options}
        )
        torch.manual_seed(1 if resume is None else 99)  # whoever resumes has drawn other numbers
        path = None if resume is None else str(resume)
        self.trainer.fit(self.module, datamodule=stream(), ckpt_path=path, weights_only=None if path is None else True)

    def end(self) -> dict[str, Any]:
        """All that the run has learned."""
        assert self.strategy.projector is not None or self.strategy.projection is None
        projector = {} if self.strategy.projector is None else values(self.strategy.projector)
        memory = copy.deepcopy(self.strategy.memory)
        assert memory is not None
        ends: dict[str, Any] = {
            "weights": values(self.module),
            "projector": projector,
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "strategy": self.strategy.stream_state(),
            "random": torch.get_rng_state(),
        }
        if "logits" not in memory.sample(1).extras:
            images, labels = batch(*range(6), *range(6))
            memory.add(images.to(memory.sample(1).data.dtype), labels, 3)  # what it will draw next
            ends["next"] = memory.state_dict()
        return ends


class Save(ModelCheckpoint):
    """Saves each step's file once, as a user would."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture(scope="module", params=RUNS)
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run that saved after every step."""
    folder = tmp_path_factory.mktemp("straight")
    run = Run(partial(quiet_trainer, folder), request.param, save=folder)
    return request.param, folder, run, run.end()


# ---- resume


def test_a_run_resumed_at_any_batch_ends_with_the_same_bits(make_trainer: Make, straight: Any) -> None:
    kind, folder, _, end = straight
    files = sorted(folder.glob("*.ckpt"))
    assert len(files) == (STEPS if kind != "accumulation" else 6)
    for path in files if kind == "alone" else files[::4]:
        resumed = Run(make_trainer, kind, resume=path)
        assert changed(resumed.end(), end) == [], path.name


@pytest.mark.parametrize("straight", ["alone", "heads"], indirect=True)
def test_saving_changes_nothing(make_trainer: Make, straight: Any) -> None:
    kind, _, _, end = straight
    assert changed(Run(make_trainer, kind).end(), end) == []


@pytest.mark.parametrize("straight", ["alone", "accumulation"], indirect=True)
def test_a_run_cut_by_max_steps_goes_on(make_trainer: Make, straight: Any, tmp_path: Path) -> None:
    kind, _, _, end = straight
    first = Run(make_trainer, kind, max_steps=5)
    first.trainer.save_checkpoint(tmp_path / "cut.ckpt")
    assert changed(Run(make_trainer, kind, resume=tmp_path / "cut.ckpt").end(), end) == []


# ---- the file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that stopped in its second experience."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(partial(quiet_trainer, folder), "alone", max_steps=7)
    run.trainer.save_checkpoint(folder / "whole.ckpt")
    run.trainer.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    return folder / "whole.ckpt"


def images_in(path: Path) -> int:
    """How many of the training images lie somewhere in a file's tensors."""
    saved = [leaf for leaf in leaves(torch.load(path, weights_only=True)).values() if isinstance(leaf, Tensor)]
    contents = [each.contiguous().numpy().tobytes() for each in saved]
    images = [image.numpy().tobytes() for image in dataset().tensors[0]]
    return sum(any(image in content for content in contents) for image in images)


@pytest.mark.warns("no state for the strategy 'onpro'")
def test_a_weights_only_file_holds_no_training_image(make_trainer: Make, whole: Path) -> None:
    assert images_in(whole) == 20  # the memory
    weights = whole.with_name("weights.ckpt")
    assert images_in(weights) == 0
    checkpoint = torch.load(weights, weights_only=True)
    assert STRATEGY not in checkpoint
    assert list(checkpoint["state_dict"]) == list(lit().state_dict())
    with pytest.raises(KeyError, match="contains only the model"):  # Lightning's word on it
        fresh(make_trainer, onpro(), weights)


def test_a_checkpoint_callback_that_saves_weights_only_saves_no_image(make_trainer: Make, tmp_path: Path) -> None:
    saver = ModelCheckpoint(str(tmp_path), filename="w", save_weights_only=True, every_n_train_steps=3)
    make_trainer(strategy=onpro(), callbacks=[saver], enable_checkpointing=True).fit(lit(), datamodule=stream())
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    assert all(images_in(path) == 0 for path in files)


def test_the_users_keys_are_theirs(whole: Path, make_trainer: Make) -> None:
    checkpoint = torch.load(whole, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(lit().state_dict())
    module = Lit.load_from_checkpoint(whole, weights_only=True)
    assert equal(values(module), checkpoint["state_dict"])
    make_trainer().validate(lit(), datamodule=stream(), ckpt_path=str(whole), weights_only=True, verbose=False)
    kinds = {type(leaf) for leaf in leaves(checkpoint[STRATEGY]).values()}
    assert kinds <= {Tensor, int, float, str, bool, type(None)}


def test_the_memory_of_a_file_is_that_of_the_run(whole: Path) -> None:
    """Loaded into a new buffer it has its rows and knows how many it saw, which decides what it keeps next."""
    run = torch.load(whole, weights_only=True)[STRATEGY]
    memory = onpro().memory
    assert memory is not None
    memory.load_state_dict(run["memory"][0])
    assert (memory.n_seen, memory.size) == (5 + 4 + 4 + 4 + 5 + 5 + 5, 20)


# ---- what does not fit is refused by name


def fresh(make_trainer: Make, strategy: Any, path: Path, module: Any = None) -> None:
    """Goes on from a file with a strategy that has learned nothing."""
    trainer = make_trainer(strategy=strategy)
    trainer.fit(
        lit(dropout=0.3) if module is None else module, datamodule=stream(), ckpt_path=str(path), weights_only=True
    )


def leaves(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    if isinstance(value, dict):
        return {at: leaf for key, part in value.items() for at, leaf in leaves(part, (*path, key)).items()}
    if isinstance(value, list | tuple):
        return {at: leaf for key, part in enumerate(value) for at, leaf in leaves(part, (*path, key)).items()}
    return {path: value}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every entry of nested dictionaries."""
    if not isinstance(value, dict):
        return [path]
    return [*([path] if path else []), *(at for key, part in value.items() for at in places(part, (*path, key)))]


def refused(make_trainer: Make, checkpoint: dict[str, Any], folder: Path) -> str | None:
    """The error of going on from a damaged file, after which the strategy must have learned nothing."""
    path = folder / "damaged.ckpt"
    torch.save(checkpoint, path)
    strategy, none = onpro(), onpro()
    try:
        fresh(make_trainer, strategy, path)
    except StateError as error:
        assert changed(strategy.stream_state(), none.stream_state()) == []
        assert strategy.memory is not None
        assert strategy.memory.size == 0
        return str(error)
    return None


# what makes no difference where it is missing or of another type: `random` may be of another number of processes,
# the settings only tell what changed
FREE = {("position", "random"), ("settings",)}


def impossible(name: str, leaf: Any) -> Any:
    """A value of the right type that cannot be, where there is one."""
    if name in ("step", "batch_in_experience", "experience") and isinstance(leaf, int):
        return -1
    if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
        return torch.full_like(leaf, torch.nan)
    return None


@pytest.mark.parametrize("damage", ["missing", "another type", "impossible"])
def test_a_damaged_entry_is_an_error_and_changes_nothing(
    make_trainer: Make, whole: Path, tmp_path: Path, damage: str
) -> None:
    checkpoint = torch.load(whole, weights_only=True)
    taken, tried = [], 0
    for place in places(checkpoint[STRATEGY]) if damage != "impossible" else leaves(checkpoint[STRATEGY]):
        if place == ("strategy",) or place[:2] in FREE or place[:1] in FREE:
            continue
        spoiled = copy.deepcopy(checkpoint)
        owner, name = spoiled[STRATEGY], place[-1]
        for key in place[:-1]:
            owner = owner[key]
        if damage == "missing":
            del owner[name]
        elif damage == "another type":
            owner[name] = "damaged" if name not in ("name", "phase", "policy") else 7
        elif (value := impossible(name, owner[name])) is not None:
            owner[name] = value
        else:
            continue
        tried += 1
        if refused(make_trainer, spoiled, tmp_path) is None:
            taken.append(place)
    assert tried > 5
    assert not taken, taken


@pytest.mark.parametrize(
    ("capacity", "match"),
    [(5, r"this one of 5; load it with capacity=20 and call shrink"), (33, r"cannot grow to 33.*capacity=20")],
)
def test_another_capacity_is_an_error(make_trainer: Make, whole: Path, capacity: int, match: str) -> None:
    strategy = onpro(capacity=capacity)
    with pytest.raises(StateError, match=match):
        fresh(make_trainer, strategy, whole)
    assert strategy.memory is not None
    assert strategy.memory.size == 0
    assert len(strategy.prototypes) == 0


def test_no_memory_is_an_error(make_trainer: Make, whole: Path) -> None:
    with pytest.raises(StateError, match=r"the saved run has a memory, this strategy has capacity=0"):
        fresh(make_trainer, onpro(capacity=0), whole)


def test_another_projector_is_an_error(make_trainer: Make, whole: Path) -> None:
    strategy = onpro(dim=3)
    with pytest.raises(
        StateError, match=r"replay_projector: layers.0.weight must be .*\(3, 8\).*\(8, 8\).*use the network"
    ):
        fresh(make_trainer, strategy, whole)
    assert strategy.memory is not None
    assert strategy.memory.size == 0


def test_rules_without_the_projector_say_so(make_trainer: Make, whole: Path) -> None:
    with pytest.raises(StateError, match=r"has a replay_projector, this strategy has none"):
        fresh(make_trainer, onpro(instance_new=0, instance_mem=0, ope_new=0, ope_seen=0, ce_new=1, mixing=None), whole)


def test_other_settings_are_a_warning(make_trainer: Make, whole: Path) -> None:
    with pytest.warns(UserWarning, match=r"other settings: rotation='rot4' \(was 'none'\), ope_new=0.5 \(was 1.0\)"):
        fresh(make_trainer, onpro(rotation="rot4", ope_new=0.5), whole)


def test_the_memory_of_another_method_is_not_taken(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(strategy=er(), max_steps=5)
    trainer.fit(lit(), datamodule=stream())
    trainer.save_checkpoint(tmp_path / "er.ckpt")
    strategy = onpro(DERPPStrategy)
    with pytest.warns(UserWarning, match="no state for the strategy 'der_pp', but for 'er': it starts with nothing"):
        fresh(make_trainer, strategy, tmp_path / "er.ckpt")
    assert strategy.memory.n_seen == sum(SAMPLES) - sum(BATCHES[0]) - 5


def test_a_batch_that_the_memory_cannot_hold_is_refused_before_it_trains(make_trainer: Make) -> None:
    module, strategy = lit(), onpro(storage="uint8")
    start = values(module)
    whole, uneven = torch.randint(0, 256, (3, 3, 4, 4)) / 255, torch.full((3, 3, 4, 4), 0.3)
    with pytest.raises(BatchError, match="would lose"):
        make_trainer(strategy=strategy, max_epochs=1).fit(module, loader((uneven, torch.arange(3))))
    assert equal(values(module), start)
    strategy = onpro(storage="uint8")
    fit = make_trainer(strategy=strategy, max_epochs=1)
    with pytest.raises(BatchError, match="would lose"):
        fit.fit(module, loader((whole, torch.arange(3)), (uneven, torch.arange(3))))
    assert strategy.memory is not None
    assert strategy.memory.n_seen == 3
    assert fit.global_step == 1


@pytest.mark.parametrize("other", ["auto", LearningStrategy, GradientFreeStrategy])
def test_the_checkpoint_of_another_strategy_is_a_warning(make_trainer: Make, tmp_path: Path, other: Any) -> None:
    class Plain(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    path = tmp_path / "other.ckpt"
    trainer = make_trainer(strategy=other if isinstance(other, str) else other(), max_steps=5)
    trainer.fit(lit(Plain), datamodule=stream())
    trainer.save_checkpoint(path)
    strategy = onpro()
    whose = "no strategy of clkit" if isinstance(other, str) else f"the strategy '{trainer.strategy.state_key}'"
    says = rf"is of {whose}, and its optimizer trains \[\[\d\]\].*'onpro', and trains \[\[8\]\], with its replay_proj"
    with (
        pytest.warns(UserWarning, match=r"no state for the strategy 'onpro'.*starts with nothing learned"),
        pytest.raises(StateError, match=says),
    ):
        fresh(make_trainer, strategy, path, lit(Plain))
    assert strategy.memory is not None
    assert strategy.memory.size == 0
    # without a projector all of it fits
    if other is not GradientFreeStrategy:
        plain = er()
        with pytest.warns(UserWarning, match="no state for the strategy 'er'"):
            fresh(make_trainer, plain, path, lit(Plain))
        assert plain.memory is not None
        assert plain.memory.n_seen == 52 - (5 + 4 + 4 + 4 + 5)


def test_a_strategy_that_learns_no_more_ignores_the_state(make_trainer: Make, whole: Path) -> None:
    """An evaluation takes the weights alone."""
    strategy: OnProStrategy = onpro()
    trainer = make_trainer(strategy=strategy)
    trainer.validate(lit(), datamodule=stream(), ckpt_path=str(whole), weights_only=True, verbose=False)
    assert strategy.memory is not None
    assert strategy.memory.size == 0
    assert strategy.projector is None


def test_plain_loaders_go_on_in_another_trainer(make_trainer: Make, tmp_path: Path) -> None:
    """One fit a task, the second one by a new trainer from the first one's file."""

    def batches(task: int) -> Any:
        return loader(*(batch(2 * task, 2 * task + 1, 2 * task, seed=10 * task + i) for i in range(4)))

    together = onpro()
    trainer = make_trainer(strategy=together, max_epochs=1)
    module = lit()
    trainer.fit(module, batches(0))
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    apart, other = onpro(), lit()
    make_trainer(strategy=apart, max_epochs=2).fit(
        other, batches(1), ckpt_path=str(tmp_path / "first.ckpt"), weights_only=True
    )
    assert apart.memory is not None
    assert apart.memory.n_seen == 24
    assert sorted(set(apart.memory.sample(20).experience.tolist())) == [0, 1]
