"""DSimplex in real runs: what is trained, what it is aligned with, how a run goes on, and what it refuses."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from small_runs import LitSmall, SmallNet, hooks_of, quiet_trainer
from torch import Tensor, nn

from clkit.callbacks import (
    AEFOCL,
    DEUP,
    DST,
    NMC,
    DSimplex,
    Records,
    StreamEvaluation,
    attach_simplex_head,
    detach_simplex_head,
)
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import CapacityError, ConfigurationError, SignatureError, StateError
from clkit.methods import PruneSchedule, SimplexHead
from clkit.strategies import ERStrategy, GradientFreeStrategy
from clkit.surgery.fixed_classifier import simplex_classifier_of

K = 12


class Lit(LitSmall):
    """The same network every time."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        super().__init__(**options)


class Batches(pl.Callback):
    """Keeps the batches of a run, and the weights with which it starts; saves it after one of them."""

    def __init__(self, save_at: int = -1, path: Path | None = None) -> None:
        self.seen: list[tuple[int, Tensor, Tensor]] = []
        self.save_at, self.path = save_at, path

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = weights(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((trainer.current_epoch, batch[0].clone(), batch[1].clone()))
        if len(self.seen) == self.save_at:
            trainer.save_checkpoint(self.path)


def stream(**options: Any) -> StreamDataModule:
    settings = {"batch_size": 60, "stop_after": 3, **options}
    return StreamDataModule(
        "digits:flat", ClassIncremental(classes_per_experience=3, first_experience_classes=4), **settings
    )


def run(folder: Path, simplex: DSimplex, *callbacks: pl.Callback, module: Any = None, **options: Any) -> Any:
    """Runs a stream of three experiences; gives the module."""
    torch.manual_seed(1)
    module = Lit() if module is None else module
    path, data = options.pop("ckpt_path", None), options.pop("data", None) or stream()
    trainer = quiet_trainer(folder, callbacks=[simplex, *callbacks], max_epochs=-1, **options)
    trainer.fit(module, datamodule=data, ckpt_path=path)
    return module


def quiet_evaluation() -> StreamEvaluation:
    return StreamEvaluation(table=False, files=False, figures=False)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(each, two[name]) for name, each in one.items())


# ---- what is learned


def naive_contrast(new: Tensor, old: Tensor, labels: list[int], mu: float = 10.0) -> Tensor:
    """The higher-order term as its equation has it, pair by pair."""
    new = new / new.norm(dim=1, keepdim=True)
    old = old / old.norm(dim=1, keepdim=True)
    terms = []
    for n in range(len(labels)):
        total = sum(
            (mu * (old[n] @ new[m])).exp() if labels[n] != labels[m] else torch.ones((), dtype=new.dtype)
            for m in range(len(labels))
        )
        terms.append(-mu * (old[n] @ new[n]) + torch.as_tensor(total).log())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_weights_are_those_of_a_plain_loop_in_float64(tmp_path: Path, accumulate: int) -> None:
    batches = Batches()
    simplex = DSimplex(K, alignment="hoc", lam=0.3)
    module = run(tmp_path, simplex, batches, data=stream(stop_after=2), accumulate_grad_batches=accumulate)

    start = batches.start
    body, junction, vertices = (
        SmallNet().double(),
        nn.Linear(16, K - 1, bias=False).double(),
        SimplexHead(K).prototypes(),
    )
    body.hidden.load_state_dict({name: start[f"net.hidden.{name}"] for name in ("weight", "bias")})
    junction.load_state_dict({"weight": start["net.head.head.junction.weight"]})
    parameters = [*body.hidden.parameters(), junction.weight]
    optimizer, old = torch.optim.SGD(parameters, lr=0.05), None

    def features(b: Any, j: Any, x: Tensor) -> Tensor:
        return j(torch.relu(b.hidden(x.double())))

    for number, (epoch, x, y) in enumerate(batches.seen):
        if epoch == 1 and old is None:
            old = copy.deepcopy((body, junction))
        z = features(body, junction, x)
        loss = nn.functional.cross_entropy(z @ vertices.T, y)
        if old is not None:
            with torch.no_grad():
                before = features(*old, x)
            loss = 0.3 * loss + 0.7 * naive_contrast(z, before, y.tolist())
        (loss / accumulate).backward()
        in_epoch = sum(each[0] == epoch for each in batches.seen)
        place = number - sum(each[0] < epoch for each in batches.seen)
        if (place + 1) % accumulate == 0 or place + 1 == in_epoch:
            optimizer.step()
            optimizer.zero_grad()
    place = simplex_classifier_of(module)
    assert place is not None
    assert place.head.junction is not None
    torch.testing.assert_close(place.head.junction.weight.double(), junction.weight, rtol=0, atol=2e-5)
    torch.testing.assert_close(module.net.hidden.weight.double(), body.hidden.weight, rtol=0, atol=2e-5)


def test_the_head_is_nothing_to_train_but_its_junction(tmp_path: Path) -> None:
    module = run(tmp_path, DSimplex(K))
    assert [name for name, _ in module.named_parameters()] == [
        "net.hidden.weight", "net.hidden.bias", "net.head.head.junction.weight"
    ]  # fmt: skip
    held = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert torch.equal(module.net.head.vertex_of, torch.arange(K))
    assert hooks_of(module) == 0
    x = torch.rand(3, 64)
    z = module.net.head.head(torch.relu(module.net.hidden(x)))[0]
    torch.testing.assert_close(module(x), z @ SimplexHead(K).prototypes(dtype=torch.float32).T, rtol=0, atol=1e-5)
    detach_simplex_head(module)
    assert type(module.net.head) is nn.Linear


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_leaves_the_vertices_as_they_are(tmp_path: Path, precision: str) -> None:
    module = run(tmp_path, DSimplex(K, alignment="hoc"), precision=precision)
    assert all(each.isfinite().all() for each in module.parameters())
    assert module.net.head.head.prototypes().dtype == torch.float64
    junction = module.net.head.head.junction
    assert junction.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_the_term_is_as_large_under_a_scaled_loss(device: str, tmp_path: Path) -> None:
    """``"16-mixed"``: the loss that the term is added to is 1024 times as large; nothing but rounding may differ."""

    def trained(alignment: Any, *, half: bool = False) -> dict[str, Tensor]:
        options: dict[str, Any] = {"accelerator": "gpu" if device == "cuda" else "cpu"}
        if half:
            scaler = torch.amp.GradScaler(device, init_scale=1024.0)
            options["plugins"] = [MixedPrecision("16-mixed", device, scaler)]
        simplex = DSimplex(K, alignment=alignment, lam=0.3)
        module = run(tmp_path, simplex, data=stream(stop_after=2), accumulate_grad_batches=2, **options)
        return {name: each.cpu() for name, each in weights(module).items()}

    exact, scaled, without = trained("hoc"), trained("hoc", half=True), trained(None)
    layer = "net.head.head.junction.weight"
    moved = float((exact[layer] - without[layer]).abs().max())
    assert float((exact[layer] - scaled[layer]).abs().max()) < 0.02 * moved


def test_replayed_rows_are_aligned_too(tmp_path: Path) -> None:
    """The term is that of all rows of the step, those of the memory among them, through both models."""
    terms: list[tuple[float, float, int]] = []

    class Look(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: Tensor) -> None:
            previous = simplex._previous
            if previous is None:
                return
            x, y = trainer.strategy.forwarded
            with torch.no_grad():
                new = module.net.head.head(torch.relu(module.net.hidden(x)))[0]
            wanted = naive_contrast(new.double(), previous.features(trainer, x).double(), y.tolist())
            terms.append((float(wanted.detach()), float(simplex._term(trainer, previous).detach()), len(y)))

    simplex = DSimplex(K, alignment="hoc")
    strategy = ERStrategy(50, replay_batch=20, transform=nn.Identity())
    run(tmp_path, simplex, Look(), strategy=strategy, data=stream(stop_after=2))
    assert len(terms) > 3
    assert {size for *_, size in terms[:-1]} == {75}
    for wanted, term, _ in terms:
        assert term == pytest.approx(wanted, abs=1e-4)


def test_distillation_looks_at_the_memory_alone_and_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'fd' distils the replayed rows, and .* replays none"):
        run(tmp_path, DSimplex(K, alignment="fd"))
    strategy = ERStrategy(50, replay_batch=20, transform=nn.Identity())
    simplex = DSimplex(K, alignment="fd")
    module = run(tmp_path, simplex, strategy=strategy)
    assert 0 < float(module.trainer.callback_metrics["d_simplex/fd"]) < 1
    assert simplex._weight == pytest.approx(5 * (3 / 7) ** 0.5)


def test_classes_have_the_same_vertices_whatever_their_order_and_a_side_of_their_own(tmp_path: Path) -> None:
    order = [9, 3, 5, 1, 0, 2, 4, 6, 7, 8]
    scenario = ClassIncremental(classes_per_experience=5, class_order=order)
    module = run(tmp_path, DSimplex(K, side="high"), data=StreamDataModule("digits:flat", scenario, batch_size=60))
    assert module.net.head.vertex_of.tolist() == list(reversed(range(K)))


# ---- how a run goes on


def test_a_run_goes_on_inside_an_experience_with_the_model_before_it(tmp_path: Path) -> None:
    whole = weights(run(tmp_path / "whole", DSimplex(K, alignment="hoc"), quiet_evaluation()))
    for at in (5, 11, 14):
        folder = tmp_path / str(at)
        path = folder / "cut.ckpt"
        run(folder, DSimplex(K, alignment="hoc", folder=folder), quiet_evaluation(), Batches(at, path))
        again = DSimplex(K, alignment="hoc", folder=folder)
        assert same(weights(run(folder, again, quiet_evaluation(), ckpt_path=path)), whole)
    saved = torch.load(path, weights_only=True)
    count = sum(p.numel() for p in Lit().net.hidden.parameters()) + 11 * 16
    assert sum(each.numel() for each in saved["state_dict"].values()) == count + K  # and nothing of the model before
    with pytest.raises(StateError, match=r"side must be 'high'.*use the settings of the saved run"):
        run(folder, DSimplex(K, side="high"), quiet_evaluation(), ckpt_path=path)
    (folder / "before_experience_2.pt").write_bytes((folder / "before_experience_1.pt").read_bytes())
    with pytest.raises(StateError, match="another run has written it; give each run a folder of its own"):
        run(folder, DSimplex(K, alignment="hoc", folder=folder), quiet_evaluation(), ckpt_path=path)
    (folder / "before_experience_2.pt").unlink()
    with pytest.raises(StateError, match=r"the model from which that task started is not at .*before_experience_2\.pt"):
        run(folder, DSimplex(K, alignment="hoc", folder=folder), quiet_evaluation(), ckpt_path=path)


def test_the_model_before_is_nobodys_child_and_goes_with_the_run(tmp_path: Path) -> None:
    held: list[Any] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if simplex._previous is not None and not held:
                old = simplex._previous._module
                held.append(weakref.ref(old))
                own = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
                own |= {id(p) for p in module.parameters()}
                assert not any(id(p) in own or p.requires_grad for p in old.parameters())
                assert not old.training

    simplex = DSimplex(K, alignment="hoc")
    run(tmp_path, simplex, Look())
    gc.collect()
    assert held
    assert held[0]() is None


class Wide(nn.Module):
    """Another architecture."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 24), nn.Tanh())
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


class Holder(Lit):
    """Its network has a surface by which it is found as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.net.get_classifier = lambda: self.net.head  # type: ignore[assignment]  # as timm's networks have it


def better() -> nn.Module:
    network = Wide()
    attach_simplex_head(network, K)
    network.get_classifier = lambda: network.fc  # type: ignore[assignment]  # as timm's networks have it
    return network


def test_another_architecture_takes_the_place_of_the_model_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    def simplex(folder: Path) -> DSimplex:
        return DSimplex(K, alignment="hoc", replacements={1: better}, folder=folder)

    path = tmp_path / "cut.ckpt"
    started = weights(better())
    module = run(tmp_path, simplex(tmp_path), quiet_evaluation(), Batches(14, path), module=Holder())
    assert type(module.net) is Wide
    held = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    first = torch.load(tmp_path / "before_experience_1.pt", weights_only=True)["state_dict"]
    assert same({name.removeprefix("net."): each for name, each in first.items()}, started)
    again = run(tmp_path, simplex(tmp_path), quiet_evaluation(), module=Holder(), ckpt_path=path)
    assert same(weights(again), weights(module))


@pytest.mark.filterwarnings("ignore:.*backbone (still trains|changed)")
def test_a_head_of_the_features_begins_anew_with_another_architecture_or_names_it(tmp_path: Path) -> None:
    """The features of the new network, 24 wide, are no features of the old one, 16 wide."""

    def learned(**options: Any) -> NMC:
        nmc = NMC(**options)
        run(tmp_path, DSimplex(K, replacements={1: better}), nmc, module=Holder())
        return nmc

    assert learned(reset_each_task=True).head.in_features == 24
    with pytest.raises(StateError, match="width 16 read at 'head:in'; this network gives width 24 at 'fc:in'"):
        learned()


def test_a_network_that_nothing_can_train_takes_no_place(tmp_path: Path) -> None:
    def frozen() -> nn.Module:
        return better().requires_grad_(False)

    with pytest.raises(ConfigurationError, match="no parameter of the Wide that shall take the network's place"):
        run(tmp_path, DSimplex(K, replacements={1: frozen}), quiet_evaluation(), module=Holder())


def test_a_checkpoint_of_others_takes_the_place_with_their_classes_on_the_other_side(tmp_path: Path) -> None:
    path = tmp_path / "theirs.ckpt"
    theirs = run(tmp_path / "theirs", DSimplex(20, side="low"), Batches(12, path))
    simplex = DSimplex(20, side="high", replacements={0: path})
    batches = Batches()
    run(tmp_path / "ours", simplex, batches)
    assert simplex.allocator.reserved == list(range(10))
    assert simplex.allocator.rows(torch.arange(10)).tolist() == list(range(19, 9, -1))
    assert weights(theirs)["net.hidden.weight"].shape == (16, 64)
    with pytest.raises(CapacityError, match="reserved"):
        run(tmp_path / "full", DSimplex(K, side="high", reserved=[0, 1, 2, 3, 4]))


# ---- refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": GradientFreeStrategy()}, ConfigurationError, "GradientFreeStrategy trains nothing"),
        ({"callbacks": [AEFOCL(graft="fit_end")]}, ConfigurationError, "already holds the simplex head of DSimplex"),
        ({"vertices": 8}, CapacityError, "has a class with id 9, and DSimplex has num_vertices=8"),
        ({"module": lambda: _other_vertices()}, SignatureError, "asked for .*/12', and the network has .*/16'"),
        ({"module": lambda: _by_hand()}, ConfigurationError, "under manual optimization it cannot know which"),
    ],
    ids=["no training", "two owners", "too few vertices", "other vertices", "manual optimization"],
)
def test_what_cannot_be_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    given = {name: options[name] for name in ("strategy",) if name in options}
    module = options["module"]() if "module" in options else None
    simplex = DSimplex(options.get("vertices", K), alignment="hoc")
    with pytest.raises(error, match=message):
        run(tmp_path, simplex, *options.get("callbacks", ()), module=module, **given)


def _other_vertices() -> Lit:
    module = Lit()
    attach_simplex_head(module, 16)
    return module


def _by_hand() -> Lit:
    module = Lit()
    module.automatic_optimization = False
    return module


@pytest.mark.filterwarnings("ignore:.*backbone (still trains|changed)")
def test_a_sparse_network_for_each_task_stands_under_the_simplex(tmp_path: Path) -> None:
    """In any order of the list; with the vertices in place no output of an earlier task changes."""
    found = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]):
        evaluation = quiet_evaluation()
        dst = DST(0.3, schedule=PruneSchedule(update_every=1), on_capacity="reuse")
        parts = [dst, DSimplex(K, alignment="hoc", folder=tmp_path), NMC(), evaluation]
        trainer = quiet_trainer(tmp_path, callbacks=[parts[place] for place in order], max_epochs=-1)
        module = Lit()
        trainer.fit(module, datamodule=stream())
        assert simplex_classifier_of(module) is not None
        found.append({name: each["accuracy_matrix"] for name, each in evaluation.results.items()})
    assert found[0] == found[1] == found[2]
    assert found[0].keys() == {"module", "nmc"}
    rows = found[0]["module"]
    for stage, row in enumerate(rows):
        assert row[: stage + 1] == [rows[earlier][earlier] for earlier in range(stage + 1)]


@pytest.mark.filterwarnings(
    "ignore:.*(backbone (still trains|changed)|samples that val_fraction keeps|network trains, so that|prediction sets)"
)
def test_errors_are_predicted_beside_the_simplex_in_any_order(tmp_path: Path) -> None:
    """DEUP reads the simplex classifier and a head on the features before it, and changes the training of neither."""
    alone = weights(run(tmp_path, DSimplex(K, alignment="hoc"), quiet_evaluation(), data=stream(stop_after=2)))
    found = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        evaluation = quiet_evaluation()
        deup = DEUP(records=Records(refresh=1, novelty=0.0))
        parts = [deup, DSimplex(K, alignment="hoc", folder=tmp_path), NMC(reset_each_task=True), evaluation]
        module = run(tmp_path, *(parts[place] for place in order), data=stream(stop_after=2))  # type: ignore[arg-type]  # parts of all kinds
        assert same(weights(module), alone)
        found.append((evaluation.results, deup.reports))
    assert found[0][0].keys() == found[0][1].keys() == {"module", "nmc"}
    assert all(0 < report["mean_total"] <= 1 for report in found[0][1].values())
    assert repr(found[0]) == repr(found[1])  # NaN is NaN


@pytest.mark.warns("the step gives the network something else than the inputs of the batch")
def test_a_step_that_mixes_its_inputs_is_not_aligned_and_says_so(tmp_path: Path) -> None:
    class Mixing(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(0.5 * batch[0] + 0.5 * batch[0].flip(0)), batch[1])

    one, two = (run(tmp_path, DSimplex(K, alignment=each), module=Mixing()) for each in ("hoc", None))
    assert same(weights(one), weights(two))
