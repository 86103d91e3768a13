"""Checkpoints that Lightning writes when a step fails or is interrupted: the batch comes again, and is learned once."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from onpro_runs import BATCHES, SAMPLES, Lit, batch, lit, onpro, stream, values
from small_runs import quiet_trainer
from torch import Tensor

from clkit.callbacks import AEFOCL, NMC
from clkit.errors import StateError
from clkit.schema import STRATEGY
from clkit.strategies import OnProStrategy
from clkit.testing._compare import changed

IN_STEP = ["forward", "on_before_zero_grad", "on_after_backward", "on_before_optimizer_step"]
AT = [0, 3, 4, 11]  # the first of all, the last and the first of an experience, the last of all
SLOW = pytest.mark.slow
CUT = "in the middle of a step"
LOST = "without those batches"


def some_at(*ordinary: int) -> Any:
    """Parametrises a test over batches, of which some are enough for the ordinary suite."""
    return pytest.mark.parametrize("at", [at if at in ordinary else pytest.param(at, marks=SLOW) for at in AT])


class PlannedError(Exception):
    pass


class Fail(pl.Callback):
    """Fails once, in one hook of one batch, counted over the run."""

    def __init__(self, where: str, at: int, error: type[BaseException] = PlannedError) -> None:
        self.where, self.at, self.error = where, at, error
        self.batch = -1

    def arrive(self, where: str) -> None:
        if where == self.where and self.batch == self.at:
            raise self.error(where)

    def on_train_batch_start(self, *args: Any) -> None:
        self.batch += 1
        self.arrive("on_train_batch_start")

    def on_before_zero_grad(self, *args: Any) -> None:
        self.arrive("on_before_zero_grad")

    def on_after_backward(self, *args: Any) -> None:
        self.arrive("on_after_backward")

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.arrive("on_before_optimizer_step")

    def on_train_batch_end(self, *args: Any) -> None:
        self.arrive("on_train_batch_end")


class Failing(Lit):
    """Fails where no callback can: in its own forward, and after the step of its optimizer."""

    fail: Fail | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.training and self.fail is not None:
            self.fail.arrive("forward")
        return super().forward(images)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.fail is not None:
            self.fail.arrive("optimizer_step")


class Gradients(pl.Callback):
    """The gradient of one weight after each backward pass, and before each step."""

    def __init__(self) -> None:
        self.summed: list[Tensor] = []
        self.stepped: list[Tensor] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.summed.append(pl_module.net.conv.weight.grad.clone())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.stepped.append(pl_module.net.conv.weight.grad.clone())


class Run:
    """A run with replay and two heads; ``said`` are its warnings."""

    def __init__(
        self,
        folder: Path,
        fail: Fail | None = None,
        *,
        behind: bool = False,
        heads: bool = True,
        resume: bool = False,
        accumulate: int = 1,
        data: Any = None,
        strategy: OnProStrategy | None = None,
        **network: Any,
    ) -> None:
        self.module = lit(Failing, **{"norm": False, **network})
        self.module.fail = fail
        self.strategy = onpro() if strategy is None else strategy
        self.heads: list[Any] = [NMC(), AEFOCL(balance="none")] if heads else []
        self.gradients = Gradients()
        failing = [] if fail is None else [fail]
        listed = [*self.heads, *failing] if behind else [*failing, *self.heads]
        self.trainer = quiet_trainer(
            folder,
            strategy=self.strategy,
            callbacks=[self.gradients, *listed, OnExceptionCheckpoint(folder)],
            accumulate_grad_batches=accumulate,
            enable_checkpointing=True,
        )
        torch.manual_seed(1 if not resume else 99)  # whoever resumes has drawn other numbers
        path = str(folder / "on_exception.ckpt") if resume else None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.trainer.fit(
                self.module,
                datamodule=stream() if data is None else data,
                ckpt_path=path,
                weights_only=True if resume else None,
            )
        self.said = [str(each.message) for each in caught if CUT in str(each.message)]

    def end(self) -> dict[str, Any]:
        """All that the run has learned."""
        assert self.strategy.projector is not None
        return {
            "weights": values(self.module),
            "projector": values(self.strategy.projector),
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "strategy": self.strategy.stream_state(),
            "heads": {head.name: dict(head.head.state_dict()) for head in self.heads},
            "steps": self.trainer.global_step,
            "random": torch.get_rng_state(),
        }


def failed_and_resumed(folder: Path, fail: Fail, *, behind: bool = False, **options: Any) -> Run:
    with pytest.raises(PlannedError):
        Run(folder, fail, behind=behind, **options)
    return Run(folder, resume=True, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupted."""
    return Run(tmp_path_factory.mktemp("whole"))


# ---- before the optimizer steps


@pytest.mark.parametrize(
    ("where", "at"),
    [pytest.param(where, at, marks=SLOW if at != 4 and where != "forward" else []) for where in IN_STEP for at in AT],
)
def test_a_batch_whose_step_failed_is_learned_once(tmp_path: Path, whole: Run, where: str, at: int) -> None:
    """Nothing of the batch is in the file, and that it might be, where a network has other parts, is said once."""
    resumed = failed_and_resumed(tmp_path, Fail(where, at))
    assert changed(resumed.end(), whole.end()) == []
    assert len(resumed.said) == 1


def test_a_failed_step_and_its_file_have_seen_the_batches_before_it(tmp_path: Path) -> None:
    failed, strategy = onpro(), onpro()
    with pytest.raises(PlannedError):
        Run(tmp_path, Fail("on_after_backward", 6), strategy=failed)
    strategy.load_stream_state(torch.load(tmp_path / "on_exception.ckpt", weights_only=True)[STRATEGY])
    assert strategy.memory is not None
    seen = 5 + 4 + 4 + 4 + 5 + 5
    assert failed.memory.n_seen == strategy.memory.n_seen == seen
    assert sum(strategy.memory.class_seen.values()) == seen
    assert sorted(set(strategy.memory.arrival.tolist()))[-1] < seen


@some_at(4, 11)
def test_a_step_that_had_not_begun_leaves_nothing_to_say(tmp_path: Path, whole: Run, at: int) -> None:
    resumed = failed_and_resumed(tmp_path, Fail("on_train_batch_start", at))
    assert changed(resumed.end(), whole.end()) == []
    assert resumed.said == []


@some_at(4, 11)
def test_a_batch_that_could_not_be_fetched_comes_again(tmp_path: Path, whole: Run, at: int) -> None:
    samples = sum(size for part in BATCHES for size in part[: max(0, at - done(part))])

    class Broken:
        """The images as they are, until one cannot be read."""

        left = samples

        def __call__(self, image: Tensor) -> Tensor:
            if self.left == 0:
                raise PlannedError("no such file")
            self.left -= 1
            return image

    with pytest.raises(PlannedError):
        Run(tmp_path, data=stream(train_transform=Broken()))
    resumed = Run(tmp_path, resume=True)
    assert changed(resumed.end(), whole.end()) == []
    assert resumed.said == []


def done(part: tuple[int, ...]) -> int:
    """Batches of the experiences before this one."""
    return sum(len(each) for each in BATCHES[: BATCHES.index(part)])


def test_running_statistics_are_what_moves_twice(tmp_path: Path) -> None:
    """As in plain Lightning; the warning says so. All that was trained is as if nothing had happened."""
    straight = Run(tmp_path, norm=True).end()
    resumed = failed_and_resumed(tmp_path, Fail("on_after_backward", 6), norm=True)
    end = resumed.end()
    for each in (straight, end):
        del each["heads"]  # read in eval mode, by the running statistics
    names = {"running_mean", "running_var", "num_batches_tracked"}
    assert {path.rsplit(".", 1)[-1] for path in changed(end, straight)} == names
    key = "net.norm.num_batches_tracked"
    assert int(end["weights"][key]) > int(straight["weights"][key])
    assert len(resumed.said) == 1
    assert "running statistics" in resumed.said[0]


def test_an_interrupt_in_a_step(tmp_path: Path, whole: Run) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            Run(tmp_path, Fail("on_before_optimizer_step", 6, KeyboardInterrupt))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    resumed = Run(tmp_path, resume=True)
    assert changed(resumed.end(), whole.end()) == []
    assert len(resumed.said) == 1


@pytest.mark.parametrize("where", ["on_train_batch_start", "on_after_backward"])
def test_a_resumed_run_counts_its_batches_as_if_nothing_had_failed(tmp_path: Path, whole: Run, where: str) -> None:
    """What its own checkpoints say, from which it may be resumed again."""
    resumed = failed_and_resumed(tmp_path, Fail(where, 6))
    counts = [run.trainer.fit_loop.epoch_loop.state_dict()["batch_progress"] for run in (resumed, whole)]
    assert counts[0] == counts[1]


class Positioned:
    """Batches of a loader that saves how many it gave, as stateful data loaders do."""

    def __init__(self) -> None:
        self.at = 0
        self.batches = [batch(n % 2, (n + 1) % 2, seed=n) for n in range(8)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for number in range(self.at, len(self.batches)):
            self.at = number + 1
            yield self.batches[number]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.warns("its batch comes again")
@pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=:UserWarning")  # Lightning, of the checkpoint of the exception
def test_a_batch_that_the_loader_counts_as_done_is_said_to_be_lost(tmp_path: Path) -> None:
    fail = Fail("on_after_backward", 3)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    callbacks = [fail, OnExceptionCheckpoint(tmp_path)]
    with pytest.raises(PlannedError):
        pl.Trainer(accelerator="cpu", strategy=onpro(), callbacks=callbacks, default_root_dir=tmp_path, **options).fit(
            lit(norm=False), Positioned()
        )
    strategy = onpro()
    resumed = pl.Trainer(accelerator="cpu", strategy=strategy, default_root_dir=tmp_path, **options)
    with pytest.warns(UserWarning, match="counts the batch of that step as done: it does not come again"):
        resumed.fit(lit(norm=False), Positioned(), ckpt_path=tmp_path / "on_exception.ckpt", weights_only=True)
    assert strategy.memory is not None
    assert strategy.memory.n_seen == 2 * 7


# ---- after the optimizer stepped


def test_a_batch_that_was_learned_and_comes_again_is_said_to_count_twice(tmp_path: Path) -> None:
    """The weights have it, and nothing takes it back."""
    resumed = failed_and_resumed(tmp_path, Fail("optimizer_step", 6))
    assert resumed.strategy.memory is not None
    assert resumed.strategy.memory.n_seen == sum(SAMPLES) + 5
    assert len(resumed.said) == 1
    assert "counts twice" in resumed.said[0]


def test_an_interrupt_while_the_batch_is_learned_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = onpro()
    memory = strategy.memory
    assert memory is not None
    add = memory.add

    def interrupted(images: Tensor, labels: Tensor, *rest: Any, **extras: Tensor) -> None:
        if memory.n_seen >= 27:
            raise PlannedError
        add(images, labels, *rest, **extras)

    monkeypatch.setattr(memory, "add", interrupted)
    with pytest.raises(PlannedError):
        Run(tmp_path, strategy=strategy)
    resumed = Run(tmp_path, resume=True)
    assert len(resumed.said) == 1
    assert "counts twice" in resumed.said[0]


@some_at(3, 11)
def test_a_failure_behind_the_heads_loses_nothing(tmp_path: Path, whole: Run, at: int) -> None:
    resumed = failed_and_resumed(tmp_path, Fail("on_train_batch_end", at), behind=True)
    assert changed(resumed.end(), whole.end()) == []
    assert resumed.said == []


@some_at(0, 11)
def test_a_failure_before_the_heads_is_refused(tmp_path: Path, at: int) -> None:
    """The trainer counts the batch as done, the heads have not learned it."""
    with pytest.raises(StateError, match=f"had learned {at} of {at + 1} batches"):
        failed_and_resumed(tmp_path, Fail("on_train_batch_end", at))


@some_at(3)
def test_without_heads_the_strategy_has_learned_all_by_then(tmp_path: Path, at: int) -> None:
    straight = Run(tmp_path, heads=False)
    resumed = failed_and_resumed(tmp_path, Fail("on_train_batch_end", at), heads=False)
    assert changed(resumed.end(), straight.end()) == []
    assert resumed.said == []


# ---- accumulation: batches 4, 5, 6 and 7, 8, 9 of the second experience make a step


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("accumulated"), accumulate=3)


@pytest.mark.parametrize(
    ("where", "at"), [("on_before_zero_grad", 0), ("on_after_backward", 4), ("on_after_backward", 7)]
)
def test_the_first_batch_of_an_accumulation_is_learned_once(
    tmp_path: Path, accumulated: Run, where: str, at: int
) -> None:
    resumed = failed_and_resumed(tmp_path, Fail(where, at), accumulate=3)
    assert changed(resumed.end(), accumulated.end()) == []
    assert [LOST in each for each in resumed.said] == [False]


@pytest.mark.parametrize(("where", "at"), [("on_after_backward", 5), ("on_after_backward", 6), ("forward", 6)])
def test_gradients_that_wait_are_said_to_be_lost(tmp_path: Path, accumulated: Run, where: str, at: int) -> None:
    """Those of this batch among them cannot be told from the others, and would count twice."""
    resumed = failed_and_resumed(tmp_path, Fail(where, at), accumulate=3)
    assert [LOST in each for each in resumed.said].count(True) == 1
    # the step at the end of the accumulation is of the batches from the failed one on, each with its own gradient
    expected = accumulated.gradients.summed[6] - accumulated.gradients.summed[at - 1]
    torch.testing.assert_close(resumed.gradients.stepped[0], expected)
    assert resumed.strategy.memory is not None
    assert accumulated.strategy.memory is not None
    for name in ("arrival", "label"):
        one, two = (getattr(run.strategy.memory, name) for run in (resumed, accumulated))
        assert torch.equal(one, two)
    assert resumed.strategy.memory.class_seen == accumulated.strategy.memory.class_seen
    assert resumed.trainer.global_step == accumulated.trainer.global_step


def test_a_batch_that_waits_is_learned_with_its_gradient(tmp_path: Path, accumulated: Run) -> None:
    """A failure at its very end: the batch does not come again, and its gradient is there."""
    assert accumulated.strategy.memory is not None
    assert accumulated.strategy.memory.n_seen == sum(SAMPLES)
    resumed = failed_and_resumed(tmp_path, Fail("on_train_batch_end", 5), behind=True, accumulate=3)
    assert changed(resumed.end(), accumulated.end()) == []
    assert resumed.said == []
