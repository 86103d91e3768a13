"""What belongs to whom: features to the labels they are paired with, a layer and a reader to the part that has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, BatchError
from clkit.strategies import GradientFreeStrategy

Make = Callable[..., Any]

PIXELS, LABELS = load_digits(return_X_y=True)
X, FINE = torch.from_numpy(PIXELS / 16).float(), torch.from_numpy(LABELS).long()
COARSE = (FINE > 4).long()
STREAM = {"batch_size": 64, "eval_batch_size": 64}  # of each experience the first batch is compared, others are kept


def stream(**options: Any) -> StreamDataModule:
    return StreamDataModule("digits:flat", ClassIncremental(experiences=5), **(STREAM | options))


def loader(*columns: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*columns), batch_size=64)


def fine(batch: Any) -> tuple[Tensor, Tensor]:
    return batch[0], batch[2]


def scaled(batch: Any) -> tuple[Tensor, Tensor]:
    return batch[0] * 1.0, batch[2]  # a new tensor each time that it is asked


class Net(pl.LightningModule):
    """Two layers and a classifier, and a step that a test may choose."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor] | None = None, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU())
        self.hidden = nn.Sequential(nn.Linear(48, 32), nn.BatchNorm1d(32) if norm else nn.Identity(), nn.ReLU())
        self.head = nn.Linear(32, 10)
        self.step = step or (lambda net, x: net(x))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.hidden(self.encoder(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(self, batch[0]).float().mean() * 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step(self, batch[0])

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Around(Net):
    """The same around a network that says where its classifier is."""

    def __init__(self) -> None:
        super().__init__()
        head = self.head
        self.network = nn.Sequential(self.encoder, self.hidden, head)
        self.network.get_classifier = lambda: head
        del self.encoder, self.hidden, self.head

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x)


def features(net: Net, x: Tensor = X) -> Tensor:
    """The input of the classifier, by hand."""
    with torch.no_grad():
        return net.eval().hidden(net.encoder(x))


def nearest(rows: Tensor, targets: Tensor, queries: Tensor) -> np.ndarray[Any, Any]:
    """The class of the nearest mean, in NumPy."""
    known, asked, labels = rows.double().numpy(), queries.double().numpy(), targets.numpy()
    means = np.stack([known[labels == c].mean(0) for c in range(10)])
    found: np.ndarray[Any, Any] = ((asked[:, None] - means) ** 2).sum(2).argmin(1)
    return found


# ---- a layer belongs to its predictor


@pytest.mark.parametrize("keep", [0, 64])
@pytest.mark.parametrize("val_every", [1, 100], ids=["validation of Lightning", "own pass"])
def test_each_predictor_is_evaluated_on_the_layer_it_learned_from(
    make_trainer: Make, tmp_path: Path, keep: int, val_every: int
) -> None:
    net = Around()
    encoder, hidden, _ = net.network
    deep, shallow = NMC("euclidean", name="deep"), NMC("euclidean", name="shallow", layer="network.0")
    evaluation = StreamEvaluation(table=False, figures=False, keep_features=keep)
    trainer = make_trainer(
        strategy="gradient_free", callbacks=[evaluation, deep, shallow], check_val_every_n_epoch=val_every
    )
    trainer.fit(net, datamodule=stream())
    train, test = slice(0, None, 2), slice(1, None, 2)
    with torch.no_grad():
        codes = encoder(X)
        rows_of = {"deep": hidden(codes), "shallow": codes}
    for name, rows in rows_of.items():
        expected = float(np.mean(nearest(rows[train], FINE[train], rows[test]) == LABELS[test]))
        assert evaluation.results[name]["final_accuracy"] == pytest.approx(expected, abs=2e-3), name
        trainer_says = trainer.callback_metrics.get(f"{name}/accuracy")
        assert trainer_says is None or float(trainer_says) == pytest.approx(expected, abs=2e-3)
    assert bool(evaluation._kept.served) == bool(keep)
    layers = json.loads((tmp_path / "results.json").read_text())["layers"]
    assert layers == {
        "deep": {"layer": "2:in", "features": 32},
        "shallow": {"layer": "0:out", "features": 48},
    }
    trainer.predict(net, loader(X))  # heads do not look at batches of a prediction; the evaluation does for them
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    header = lines[0].split(",")
    said = [int(line.split(",")[header.index("shallow")]) for line in lines[1:]]
    assert np.mean(np.array(said) == nearest(codes[train], FINE[train], codes)) > 0.99


# ---- a reader belongs to its part


def test_each_part_reads_by_its_own_reader_in_any_order(make_trainer: Make) -> None:
    for order in (0, 1):
        parts = [AEFOCL(), NMC("euclidean", batch_reader=fine)][:: 1 if order else -1]
        ridge, nmc = sorted(parts, key=lambda part: part.name)
        evaluation = StreamEvaluation(table=False, files=False)
        net = Net()
        trainer = make_trainer(strategy="gradient_free", callbacks=[evaluation, *parts], max_epochs=1)
        trainer.fit(net, loader(X, COARSE, FINE))
        assert (len(ridge.head.classes), len(nmc.head.classes)) == (2, 10)
        trainer.test(net, loader(X, COARSE, FINE), verbose=False)
        rows = features(net)
        expected = {
            "nmc": np.mean(nearest(rows, FINE, rows) == LABELS),
            "aef_ocl": np.mean(ridge.head.predict(rows.double()).numpy() == COARSE.numpy()),
        }
        for name, value in expected.items():
            assert evaluation.results[name]["final_accuracy"] == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("owner", ["strategy", "module", "head"])
def test_a_reader_that_is_given_once_serves_all(make_trainer: Make, owner: str) -> None:
    """The module and the strategy say what the run trains on; a callback's serves where no other form is readable."""
    other, nmc = AEFOCL(), NMC(batch_reader=scaled if owner == "head" else None)
    net = Net()
    if owner == "module":
        net.batch_reader = scaled
    odd = [(X[:64], "no labels", FINE[:64])] if owner == "head" else [(X[:64], COARSE[:64], FINE[:64])]
    strategy = GradientFreeStrategy(batch_reader=scaled if owner == "strategy" else None)
    data = DataLoader(odd, batch_size=None)
    evaluation = StreamEvaluation(table=False, files=False)
    trainer = make_trainer(strategy=strategy, callbacks=[evaluation, other, nmc], max_epochs=1)
    trainer.fit(net, data)
    assert len(other.head.classes) == len(nmc.head.classes) == 10
    assert net.calls == 1  # what a reader makes anew is still the input that the strategy runs
    trainer.test(net, data, verbose=False)
    rows = nn.functional.normalize(features(net, X[:64]).double())
    right = nearest(rows, FINE[:64], rows) == LABELS[:64]
    assert evaluation.results["nmc"]["final_accuracy"] == pytest.approx(right.mean())


def test_the_part_that_lacks_a_reader_is_named(make_trainer: Make) -> None:
    batches = DataLoader([{"pixels": X[:8], "fine": FINE[:8]}], batch_size=None)
    readers: list[Callable[[Any], Any]] = [lambda b: (b["pixels"], b["fine"]), lambda b: (b["pixels"], b["fine"] // 2)]
    heads = [NMC(name=f"n{i}", batch_reader=reader) for i, reader in enumerate(readers)]
    trainer = make_trainer(callbacks=[*heads, AEFOCL()], max_epochs=1)
    with pytest.raises(BatchError, match=r"AEFOCL\(aef_ocl\): .* has no batch_reader, .* NMC\(n0\) and NMC\(n1\)"):
        trainer.fit(Net(), batches)
    trainer = make_trainer(callbacks=[NMC(batch_reader=lambda batch: batch["fine"])], max_epochs=1)
    with pytest.raises(BatchError, match=r"NMC\(nmc\): a batch_reader must return a pair \(inputs, targets\), got Ten"):
        trainer.fit(Net(), batches)


# ---- features belong to the labels that they are paired with


def noise_first(net: Any, x: Tensor) -> Tensor:
    return net(torch.rand_like(x)) + net(x)


def own_first(net: Any, x: Tensor) -> Tensor:
    return net(x) + net(torch.rand_like(x))


def mixed(net: Any, x: Tensor) -> Tensor:
    return net(0.5 * x + 0.5 * x.flip(0))


def adversarial(net: Any, x: Tensor) -> Tensor:
    given = x.clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(net(given).square().sum(), given)
    return net(x + 9.0 * grad.sign()) + net(x.view(-1, 64))


def parts_after_noise(net: Any, x: Tensor) -> Tensor:
    return net.head(net.hidden(net.encoder(torch.rand_like(x)))) + net.head(net.hidden(net.encoder(x)))


def interleaved(net: Any, x: Tensor) -> Tensor:
    own, noise = net.encoder(x), net.encoder(torch.rand_like(x))
    return net.head(net.hidden(noise)) + net.head(net.hidden(own))


@pytest.mark.parametrize(
    ("step", "extra", "strategy"),
    [
        (noise_first, 0, "auto"),
        (own_first, 0, "auto"),
        (adversarial, 0, "auto"),
        (parts_after_noise, 0, "auto"),
        (interleaved, 0, "auto"),
        (mixed, 29, "auto"),
        # these two show that the batch itself, which DDP gives the module's forward, is not taken for an input
        (noise_first, 0, "ddp"),
        (mixed, 29, "ddp"),
    ],
)
def test_only_a_forward_of_the_batchs_own_input_is_learned(
    make_trainer: Make, step: Any, extra: int, strategy: str
) -> None:
    """The sums of each class, against those of the features by hand; ``extra`` passes are paid where there is none."""
    net, nmc = Net(step), NMC("euclidean")
    options = {} if strategy == "auto" else {"strategy": pl.strategies.DDPStrategy(process_group_backend="gloo")}
    try:
        make_trainer(callbacks=[nmc], max_epochs=1, **options).fit(net, loader(X, FINE))
    finally:
        if strategy == "ddp":
            torch.distributed.destroy_process_group()
    calls = {noise_first: 58, own_first: 58, adversarial: 87, mixed: 29}.get(step, 0)
    assert net.calls == calls + extra
    rows = features(net).double()
    expected = torch.stack([rows[c == FINE].sum(0) for c in range(10)])
    torch.testing.assert_close(nmc.head.statistics.sums, expected, rtol=1e-6, atol=1e-5)


def test_shared_features_of_something_else_are_said_once(make_trainer: Make) -> None:
    nmc = NMC("euclidean", forward="shared")
    with pytest.warns(UserWarning, match="no forward of the step is given the batch's own inputs") as seen:
        make_trainer(callbacks=[nmc], max_epochs=1).fit(net := Net(mixed), loader(X, FINE))
    assert len([each for each in seen if "own inputs" in str(each.message)]) == 1
    assert net.calls == 29


def test_the_extra_pass_sees_the_network_before_its_step(make_trainer: Make) -> None:
    class Trained(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            before.append(features(self, batch[0]).double().sum(0))
            self.train()
            return nn.functional.cross_entropy(mixed(self, batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    before: list[Tensor] = []
    nmc = NMC("euclidean")
    make_trainer(callbacks=[nmc], max_epochs=1).fit(Trained(), loader(X, FINE))
    torch.testing.assert_close(nmc.head.statistics.sums.sum(0), torch.stack(before).sum(0), rtol=1e-6, atol=1e-5)


def test_a_pass_of_one_layer_is_no_forward_of_the_step_for_another(make_trainer: Make) -> None:
    """One head asks for eval-mode features of a network with batch statistics, the other for those of the step."""
    net = Net(norm=True)
    shared = NMC("euclidean", name="shared", forward="shared")
    heads = [shared, NMC("euclidean", name="eval", layer="encoder", forward="eval")]
    seen: list[Tensor] = []
    net.head.register_forward_hook(lambda head, args, output: seen.append(args[0].detach()) if net.training else None)
    make_trainer(callbacks=heads, max_epochs=1).fit(net, loader(X[:128], FINE[:128]))
    expected = torch.cat(seen).double().sum(0)
    torch.testing.assert_close(shared.head.statistics.sums.sum(0), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("step", [noise_first, mixed])
def test_an_evaluation_looks_at_the_batchs_own_input_too(make_trainer: Make, step: Any) -> None:
    net, nmc = Net(), NMC("euclidean")
    evaluation = StreamEvaluation(table=False, files=False)
    trainer = make_trainer(strategy="gradient_free", callbacks=[nmc, evaluation])
    net.step = step
    trainer.fit(net, datamodule=stream())
    rows, train, test = features(net), slice(0, None, 2), slice(1, None, 2)
    expected = float(np.mean(nearest(rows[train], FINE[train], rows[test]) == LABELS[test]))
    assert evaluation.results["nmc"]["final_accuracy"] == pytest.approx(expected, abs=2e-3)
    assert evaluation._kept.served == 0  # several answers, or that of another input, cannot be kept as one


# ---- what is read is said, and what cannot be class scores is no predictor


def test_the_layer_is_said_once(make_trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(strategy="gradient_free", callbacks=[NMC(layer="encoder"), AEFOCL()], max_epochs=1)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(net := Net(), data := loader(X, FINE))
        trainer.fit_loop.max_epochs = 2
        trainer.fit(net, data)
    said = [record.message for record in caplog.records if " reads " in record.message]
    assert said == ["clkit: NMC(nmc) reads 'encoder:out'", "clkit: AEFOCL(aef_ocl) reads 'head:in', 32 features"]


class Autoencoder(pl.LightningModule):
    """The one of Lightning's introduction: pixels come out, and ``forward`` gives the code."""

    def __init__(self, convolution: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
        end = [nn.Linear(16, 64)] + ([nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 1, 3, padding=1)] if convolution else [])
        self.decoder = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), *end)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        decoded = self.decoder(self.encoder(batch[0].view(len(batch[0]), -1)))
        return nn.functional.mse_loss(decoded.flatten(1), batch[0].flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, batch_idx)

    validation_step = test_step = step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class OneNumber(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 1)


class Embedding(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 3)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Autoencoder, r"'decoder.2:in', .* gives 64 numbers a sample, as many as the input has"),
        (lambda: Autoencoder(convolution=True), r"returns \(\d+, 1, 8, 8\), which are no scores .* at 'decoder.2:in'"),
        (OneNumber, r"'head:in', .* gives one number a sample"),
        (Embedding, r"'head:in', .* gives 3 numbers a sample, .* there are samples of class [3-9]"),
    ],
)
def test_what_cannot_be_class_scores_is_left_out_with_a_sentence(make_trainer: Make, module: Any, says: str) -> None:
    evaluation, nmc = StreamEvaluation(table=False, files=False), NMC(layer="encoder", reset_each_task=True)
    trainer = make_trainer(callbacks=[nmc, evaluation])
    net = module()
    with pytest.warns(UserWarning, match=rf"StreamEvaluation leaves the module out: .*{says}") as seen:
        trainer.fit(net, datamodule=stream())
    trainer.test(net, datamodule=stream(), verbose=False)  # where a warning would be an error
    assert len([each for each in seen if "leaves the module out" in str(each.message)]) == 1
    assert set(evaluation.results) == {"nmc"}


def test_a_network_without_logits_is_left_out_with_advice_that_helps(make_trainer: Make) -> None:
    class OwnClassifier(Net):
        def __init__(self) -> None:
            super().__init__()
            self.encoder.get_classifier = nn.Identity  # as a network that was made without a classifier

    evaluation = StreamEvaluation(table=False, files=False)
    with pytest.warns(UserWarning, match=r"at 'output' has no logits .*: StreamEvaluation\(layer='…'\)"):
        make_trainer(callbacks=[evaluation]).fit(OwnClassifier(), datamodule=stream())
    assert set(evaluation.results) == set()
    evaluation = StreamEvaluation(table=False, files=False, layer="head")
    make_trainer(callbacks=[evaluation]).fit(OwnClassifier(), datamodule=stream())
    assert set(evaluation.results) == {"module"}


def test_heads_are_evaluated_where_no_classifier_is_found(make_trainer: Make) -> None:
    class TwoNetworks(Net):
        def __init__(self) -> None:
            super().__init__()
            self.encoder.get_classifier = lambda: self.encoder[0]
            self.hidden.get_classifier = lambda: self.hidden[0]

    evaluation, nmc = StreamEvaluation(table=False, files=False), NMC("euclidean", layer="encoder:out")
    trainer = make_trainer(callbacks=[evaluation, nmc], max_epochs=1)
    trainer.fit(net := TwoNetworks(), loader(X, FINE))
    with pytest.warns(UserWarning, match="leaves the module out: it has no classifier .*2 networks"):
        trainer.test(net, loader(X, FINE), verbose=False)
    rows = net.encoder(X).detach()
    expected = float(np.mean(nearest(rows, FINE, rows) == LABELS))
    assert evaluation.results["nmc"]["final_accuracy"] == pytest.approx(expected, abs=1e-3)
    assert set(evaluation.results) == {"nmc"}


# ---- arguments


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AEFOCL(expansion_dim=500), r"AEFOCL has no argument 'expansion_dim'; it is a setting of lift"),
        (lambda: StreamEvaluation(tabel=False), r"StreamEvaluation has no argument 'tabel', did you mean 'table'\?"),
        (lambda: NMC(grafted="never"), r"NMC has no argument 'grafted', did you mean 'graft'\?"),
    ],
)
def test_an_unknown_argument_is_named_with_what_is_near(make: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        make()


def test_a_strangers_callback_may_take_any_argument() -> None:
    class Own(NMC):
        def __init__(self, **options: Any) -> None:
            self.shade = options.pop("shade")
            super().__init__(**options)

    assert Own(shade=3, name="own").shade == 3
