"""A learned head in the place of the user's classifier: handed over, kept over a resume, and handed back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from clkit.callbacks import AEFOCL, KLDA, LDA, NMC, AnaCP, Lift, StreamEvaluation, ungraft
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.errors import ConfigurationError
from clkit.models import TimmClassifier
from clkit.surgery.classifier import Graft

Make = Callable[..., Any]


class ConvEnd(nn.Module):
    """A network whose classifier is a 1x1 convolution, with the surface of timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 16)
        self.fc = nn.Conv2d(16, 10, 1)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.relu(self.body(inputs))[:, :, None, None])
        return logits.flatten(1)


def network(kind: str, lit_small: Make) -> Any:
    if kind == "plain":
        return lit_small()
    if kind == "small classifier":  # a head of ten classes outgrows it in the middle of the stream
        return lit_small(classes=5)
    torch.manual_seed(0)
    if kind == "timm surface":
        return TimmClassifier("identity", num_classes=10, model_kwargs={"in_features": 64})
    module = lit_small()
    module.net = ConvEnd()
    return module


HEADS: dict[str, Callable[..., Any]] = {
    "ridge": lambda **o: AEFOCL(balance="none", name="head", **o),
    "lift": lambda **o: AEFOCL(0.1, Lift(80), balance="none", name="head", **o),
    "janson": lambda **o: NMC(name="head", **o),
    "euclidean": lambda **o: NMC("euclidean", name="head", **o),
    "lda": lambda **o: LDA(name="head", **o),
    "unit lda": lambda **o: LDA(unit=True, name="head", **o),
    "klda": lambda **o: KLDA(bandwidth=1.0, expansion_dim=80, name="head", **o),
}
NETWORKS = ["plain", "timm surface", "convolution", "small classifier"]


def pairs(heads: Iterable[str], *usual: tuple[str, str]) -> list[Any]:
    """Every network with each of these heads; what is not usual is slow."""
    every = [(kind, head) for kind in NETWORKS for head in heads]
    return [pytest.param(*pair, marks=() if pair in usual else pytest.mark.slow) for pair in every]


def stream(**options: Any) -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=3), **options)


def digits_to_test() -> tuple[Tensor, Tensor]:
    images, targets = load_digits(return_X_y=True)
    return torch.from_numpy(images[1::2] / 16).float(), torch.from_numpy(targets[1::2])


def features_of(module: Any, images: Tensor) -> Tensor:
    """By hand, for each of the networks above."""
    net = module.net if hasattr(module, "net") else module.network
    with torch.no_grad():
        if isinstance(net, ConvEnd):
            return torch.relu(net.body(images))
        return torch.relu(net.hidden(images)) if hasattr(net, "hidden") else images


def predictions(module: Any) -> Tensor:
    module.eval()
    with torch.no_grad():
        logits = module(digits_to_test()[0])
    module.train()
    best: Tensor = logits.argmax(1)
    return best


def agreement(module: Any, callback: Any) -> float:
    own = callback.head.predict(features_of(module, digits_to_test()[0]))
    return float((predictions(module) == own).float().mean())


@pytest.mark.parametrize(
    ("kind", "head"),
    pairs(
        HEADS,
        *[("plain", head) for head in HEADS],
        ("timm surface", "ridge"),
        ("convolution", "janson"),
        ("small classifier", "ridge"),
        ("small classifier", "lift"),
    ),
)
def test_a_graft_at_the_end_serves_validation_and_prediction_until_it_is_undone(
    make_trainer: Make, lit_small: Make, kind: str, head: str
) -> None:
    module = network(kind, lit_small)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback, evaluation = HEADS[head](graft="fit_end"), StreamEvaluation(table=False, files=False)
    trainer = make_trainer(strategy="gradient_free", callbacks=[callback, evaluation])
    trainer.fit(module, datamodule=stream())
    assert callback.grafted
    assert agreement(module, callback) >= 0.998  # float32 layers may decide a tie otherwise
    wanted = evaluation.results["head"]["final_accuracy"]
    (metrics,) = trainer.validate(module, datamodule=stream(), verbose=False)
    assert metrics["head/accuracy"] == pytest.approx(wanted, abs=1e-6)
    assert metrics["module/accuracy_seen"] == pytest.approx(wanted, abs=0.002)
    if hasattr(module, "net"):  # the user's own metric, which knows nothing of heads
        assert metrics["val_acc"] == pytest.approx(wanted, abs=0.002)
        batches = trainer.predict(module, datamodule=stream())
        order = [rows for _, rows in trainer.datamodule.test_dataloader().batches]
        targets = torch.cat([digits_to_test()[1][torch.from_numpy(rows)] for rows in order])
        assert float((torch.cat(batches) == targets).float().mean()) == pytest.approx(wanted, abs=0.002)
    callback.ungraft(module)
    assert not callback.grafted
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "head"),
    pairs(
        ("ridge", "janson"),
        ("plain", "ridge"),
        ("timm surface", "janson"),
        ("convolution", "ridge"),
        ("small classifier", "ridge"),
        ("small classifier", "janson"),
    ),
)
def test_a_graft_at_each_boundary_is_what_validation_sees(
    make_trainer: Make, lit_small: Make, kind: str, head: str
) -> None:
    module = network(kind, lit_small)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback, evaluation = HEADS[head](graft="experience_end"), StreamEvaluation(table=False, files=False)
    trainer = make_trainer(strategy="gradient_free", callbacks=[evaluation, callback])
    trainer.fit(module, datamodule=stream())
    results = evaluation.results
    for own, theirs in zip(results["module"]["accuracy_seen"], results["head"]["accuracy_seen"], strict=True):
        assert own == pytest.approx(theirs, abs=0.002)
    assert results["head"]["final_accuracy"] > 0.6
    callback.ungraft(module)
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.warns("the backbone still trains")
def test_a_linear_of_the_same_shape_is_overwritten_in_place(make_trainer: Make, lit_small: Make) -> None:
    module = lit_small()
    classifier, weight = module.net.head, module.net.head.weight
    callback = NMC("euclidean", graft="experience_end")
    trainer = make_trainer(callbacks=[callback])
    trainer.fit(module, datamodule=stream())
    assert module.net.head is classifier
    assert module.net.head.weight is weight
    assert any(parameter is weight for group in trainer.optimizers[0].param_groups for parameter in group["params"])
    assert weight.requires_grad


@pytest.mark.warns("the backbone still trains")
def test_the_backbone_goes_on_training_behind_a_graft(make_trainer: Make, lit_small: Make) -> None:
    module = lit_small()
    start = module.net.hidden.weight.clone()
    weights: list[Tensor] = []

    class Look(pl.Callback):
        def on_experience_end(self, trainer: pl.Trainer, pl_module: Any, experience: Any) -> None:
            weights.append(pl_module.net.hidden.weight.clone())

    callback = NMC(graft="experience_end")
    make_trainer(callbacks=[callback, Look()]).fit(module, datamodule=stream())
    assert not torch.equal(weights[0], start)
    assert not torch.equal(weights[2], weights[1])
    assert isinstance(module.net.head, nn.Sequential)


@pytest.mark.parametrize(
    ("kind", "head"),
    pairs(
        ("ridge", "janson"),
        ("plain", "ridge"),
        ("timm surface", "janson"),
        ("convolution", "janson"),
        ("small classifier", "ridge"),
    ),
)
@pytest.mark.warns("no state for StreamEvaluation")
def test_a_checkpoint_of_a_grafted_run(make_trainer: Make, lit_small: Make, kind: str, head: str) -> None:
    """Loads strictly into the bare module; validated or resumed it predicts as the head."""
    module = network(kind, lit_small)
    first = HEADS[head](graft="experience_end")
    trainer = make_trainer(strategy="gradient_free", callbacks=[first])
    trainer.fit(module, datamodule=stream(stop_after=2))
    path = f"{trainer.default_root_dir}/grafted.ckpt"
    trainer.save_checkpoint(path)
    bare = network(kind, lit_small)
    bare.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=True)

    fresh, callback = network(kind, lit_small), HEADS[head](graft="experience_end")
    evaluation = StreamEvaluation(table=False, files=False)
    (metrics,) = make_trainer(strategy="gradient_free", callbacks=[callback, evaluation]).validate(
        fresh, datamodule=stream(stop_after=2), ckpt_path=path, verbose=False
    )
    assert metrics["head/accuracy"] > 0.7
    assert metrics["module/accuracy_seen"] == pytest.approx(metrics["head/accuracy"], abs=0.002)
    assert agreement(fresh, callback) >= 0.998

    resumed, callback = network(kind, lit_small), HEADS[head](graft="experience_end")
    make_trainer(strategy="gradient_free", callbacks=[callback]).fit(resumed, datamodule=stream(), ckpt_path=path)
    straight, reference = network(kind, lit_small), HEADS[head](graft="experience_end")
    make_trainer(strategy="gradient_free", callbacks=[reference]).fit(straight, datamodule=stream())
    assert agreement(resumed, callback) >= 0.998
    assert torch.equal(predictions(resumed), predictions(straight))


@pytest.mark.parametrize("head", ["euclidean", "janson"])
def test_the_users_classifier_comes_back_after_a_resume(make_trainer: Make, lit_small: Make, head: str) -> None:
    first = HEADS[head](graft="experience_end")
    trainer = make_trainer(strategy="gradient_free", callbacks=[first])
    trainer.fit(lit_small(), datamodule=stream(stop_after=2))
    path = f"{trainer.default_root_dir}/grafted.ckpt"
    trainer.save_checkpoint(path)
    module, callback = lit_small(), HEADS[head](graft="experience_end")
    make_trainer(strategy="gradient_free", callbacks=[callback]).fit(module, datamodule=stream(), ckpt_path=path)
    callback.ungraft(module)
    for name, value in lit_small().state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_two_callbacks_that_would_graft_are_refused_before_any_training(make_trainer: Make, lit_small: Make) -> None:
    one, two = NMC("euclidean", name="one", graft="fit_end"), NMC(name="two", graft="experience_end")
    trainer = make_trainer(strategy="gradient_free", callbacks=[one, two])
    with pytest.raises(ConfigurationError, match=r"NMC\(one\) and NMC\(two\) would both replace .* graft=\"never\""):
        trainer.fit(lit_small(), datamodule=stream())


def test_a_slot_is_free_again_after_an_ungraft(make_trainer: Make, lit_small: Make) -> None:
    module = lit_small()
    one, two = NMC("euclidean", name="one"), NMC(name="two")
    make_trainer(strategy="gradient_free", callbacks=[one, two]).fit(module, datamodule=stream())
    one.graft(module)
    one.ungraft(module)
    two.graft(module)
    assert agreement(module, two) >= 0.998
    one.ungraft(module)  # not grafted: does nothing
    assert two.grafted


def test_a_network_without_a_classifier_is_refused_by_name(make_trainer: Make) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(graft="experience_end")])
    with pytest.raises(ConfigurationError, match=r"NMC\(nmc\) cannot be grafted.*no single classifier"):
        trainer.fit(TimmClassifier("identity"), datamodule=stream())


@pytest.mark.parametrize("make", [AnaCP, lambda **options: KLDA([0.1, 1.0], **options)])
def test_a_head_whose_map_depends_on_the_sums_is_refused_by_name(
    make_trainer: Make, lit_small: Make, make: Callable[..., Any]
) -> None:
    """A checkpoint keeps the last layer of a graft alone, and the head may have learned more since."""
    callback, module = make(graft="fit_end", expansion_dim=20), lit_small()
    with pytest.raises(ConfigurationError, match="cannot be grafted: more than the last layer of this"):
        make_trainer(callbacks=[callback]).fit(module, datamodule=stream())
    callback = make(expansion_dim=20)
    make_trainer(callbacks=[callback], max_epochs=1).fit(module, datamodule=stream(stop_after=1))
    with pytest.raises(ConfigurationError, match=r"clkit export to \.pt2"):
        callback.graft(module)


def test_a_network_of_two_classifiers_is_refused_by_name(make_trainer: Make, lit_small: Make) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 10)])

        def get_classifier(self) -> nn.Module:
            return self.heads

        def forward(self, inputs: Tensor) -> Tensor:
            logits: Tensor = self.heads[0](inputs) + self.heads[1](2 * inputs)
            return logits

    module = lit_small()
    module.net = Two()
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(graft="fit_end")])
    with pytest.raises(ConfigurationError, match=r"NMC\(nmc\) cannot be grafted"):
        trainer.fit(module, datamodule=stream())


def gapped(relabel: bool) -> StreamDataModule:
    images, targets = load_digits(return_X_y=True)
    kept = targets < 3
    ids = torch.tensor([11, 3, 40])[torch.from_numpy(targets[kept])]
    data = TensorDataset(torch.from_numpy(images[kept] / 16).float(), ids)
    scenario = ClassIncremental(experiences=3, class_order=[11, 3, 40])
    return StreamDataModule(Custom(data, data), scenario, relabel=relabel)


@pytest.mark.parametrize(
    ("relabel", "head"), [(False, "ridge"), (False, "euclidean"), (False, "janson"), (True, "janson")]
)
def test_gaps_between_labels(make_trainer: Make, lit_small: Make, relabel: bool, head: str) -> None:
    module = lit_small()
    callback, evaluation = HEADS[head](graft="experience_end"), StreamEvaluation(table=False, files=False)
    trainer = make_trainer(strategy="gradient_free", callbacks=[callback, evaluation])
    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            losses.append(float(trainer.callback_metrics["gradient_free/loss"]))

    trainer.callbacks.append(Losses())
    trainer.fit(module, datamodule=gapped(relabel))
    results = evaluation.results
    assert results["module"]["accuracy_matrix"] == results["head"]["accuracy_matrix"]
    assert results["head"]["final_accuracy"] > 0.85
    module.eval()
    with torch.no_grad():
        logits = module(torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 100)
    assert set(logits.argmax(1).tolist()) <= ({0, 1, 2} if relabel else {3, 11, 40})
    assert bool(logits.isfinite().all())
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses)
    unseen = nn.functional.cross_entropy(logits, torch.full((500,), 9))
    assert bool(unseen.isfinite())
    assert sorted(evaluation.class_counts("module")) == [3, 11, 40]


def test_a_real_network_that_ends_in_a_convolution(make_trainer: Make) -> None:
    torch.manual_seed(0)
    module = TimmClassifier("resnetv2_18", num_classes=10, model_kwargs={"in_chans": 1})
    assert isinstance(module.network.get_classifier(), nn.Conv2d)
    keys = list(module.state_dict())
    callback, evaluation = NMC(graft="experience_end"), StreamEvaluation(table=False, files=False)
    data = StreamDataModule("digits", ClassIncremental(experiences=2), preprocessing="unit", batch_size=256)
    trainer = make_trainer(strategy="gradient_free", callbacks=[callback, evaluation])
    trainer.fit(module, datamodule=data)
    results = evaluation.results
    assert results["module"]["accuracy_seen"] == pytest.approx(results["nmc"]["accuracy_seen"], abs=0.003)
    trainer.save_checkpoint(f"{trainer.default_root_dir}/conv.ckpt")
    saved = torch.load(f"{trainer.default_root_dir}/conv.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == keys or sorted(saved) == sorted(keys)
    callback.ungraft(module)
    assert isinstance(module.network.get_classifier(), nn.Conv2d)


def test_starting_anew_each_task_keeps_a_graft_valid(make_trainer: Make, lit_small: Make) -> None:
    module = lit_small(classes=5)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    scenario = ClassIncremental(experiences=2, class_order=[8, 9, 5, 6, 7, 0, 1, 2, 3, 4])
    callback = NMC("euclidean", graft="experience_end", reset_each_task=True)
    make_trainer(strategy="gradient_free", callbacks=[callback]).fit(
        module, datamodule=StreamDataModule("digits:flat", scenario)
    )
    assert callback.head.classes.tolist() == [0, 1, 2, 3, 4]
    assert agreement(module, callback) >= 0.998
    callback.ungraft(module)
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("head", ["euclidean", "janson"])
def test_a_second_graft_is_refused_and_ungraft_needs_no_callback(lit_small: Make, kind: str, head: str) -> None:
    """The graft of a copy is taken back by the copy's own mark."""
    module = network(kind, lit_small)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    images, targets = digits_to_test()
    features = features_of(module, images)
    made = {name: HEADS[name]().make_head(features.shape[1]) for name in ("euclidean", "janson")}
    for each in made.values():
        each.update(features, targets)
    graft = Graft("NMC(one)")
    graft.apply(module, "auto", made[head])
    grafted = predictions(module)
    for other in made.values():
        with pytest.raises(ConfigurationError, match=r"the graft of NMC\(two\) .* the graft of NMC\(one\); .*ungraft"):
            Graft("NMC(two)").apply(module, "auto", other)
    copied = copy.deepcopy(module)
    assert torch.equal(predictions(copied), grafted)
    for own in (copied, module):
        assert torch.equal(predictions(module), grafted)
        ungraft(own)
        after = own.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert not graft.applied


@pytest.mark.parametrize("head", ["euclidean", "janson"])
@pytest.mark.warns("the backbone still trains")
@pytest.mark.warns("it has learned before")
def test_a_second_fit_trains_the_users_own_classifier(make_trainer: Make, lit_small: Make, head: str) -> None:
    """A head that takes over at the end of a fit steps back while the next one trains."""
    torch.manual_seed(0)
    outcomes = []
    for graft in ("never", "fit_end"):
        module = lit_small()
        callback = HEADS[head](graft=graft)
        for _ in range(2):
            trainer = make_trainer(callbacks=[callback])
            trainer.fit(module, datamodule=stream())
        callback.ungraft(module)
        outcomes.append(module.state_dict())
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])
