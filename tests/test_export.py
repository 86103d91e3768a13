"""Exported files: they predict as the head does, and need no clkit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch import Tensor, nn

from clkit import FeatureTap, export, load_head
from clkit.callbacks import NMC
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError, NotFittedError
from clkit.methods import KLDA, AnaCP, AnalyticHead, LDAHead, NearestMeanHead
from clkit.methods.heads.readout import readout_module
from clkit.models import TimmClassifier
from clkit.surgery.classifier import Graft
from clkit.surgery.splice import SplicedCopy

LEARNED = (0, 2, 3)  # of five outputs
COLUMNS = 5

# the kinds of classifier that timm has, each in the smallest network of that kind
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "linear": ("test_resnet", {}, 32),
    "mobilenet": ("mobilenetv3_small_050", {}, 32),  # its classifier reads another width than num_features
    "convolution": ("dla46_c", {}, 32),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}, 32),
    "normed pair": (
        "levit_128s",
        {"img_size": 64, "embed_dim": (16, 16, 16), "depth": (1, 1, 1), "num_heads": (1, 1, 1), "key_dim": 8},
        64,
    ),
    "side by side": (
        "crossvit_tiny_240",
        {
            "img_size": 48,
            "img_scale": (1.0, 1.0),
            "embed_dim": (16, 32),
            "num_heads": (2, 2),
            "depth": ((1, 1, 0),),
            "mlp_ratio": (2, 2, 1),
        },
        48,
    ),
}

HEADS: dict[str, Callable[[int], Any]] = {
    "ridge": AnalyticHead,
    "bias": lambda width: AnalyticHead(width, bias=True),
    "pfg": lambda width: AnalyticHead(width, balance="pfg"),
    "reweight": lambda width: AnalyticHead(width, balance="reweight"),
    "lifted": lambda width: AnalyticHead(width, expansion_dim=48, gamma=0.1),
    "janson": NearestMeanHead,
    "euclidean": lambda width: NearestMeanHead(width, metric="euclidean"),
    "icarl": lambda width: NearestMeanHead(width, metric="icarl"),
    "cosine": lambda width: NearestMeanHead(width, metric="cosine"),
    "lda": lambda width: LDAHead(width, shrinkage=0.1),
    "unit lda": lambda width: LDAHead(width, shrinkage=0.1, unit=True),
    "klda": lambda width: KLDA(width, expansion_dim=48, bandwidth=0.5),
    "anacp": lambda width: AnaCP(width, expansion_dim=48, draws=20),
    "anacp, nearest": lambda width: AnaCP(width, expansion_dim=48, readout="nearest"),
}
SCALED = ("icarl", "cosine")  # in a .pt, scores are times the length of the features
NOT_LINEAR = {"lifted": "expansion_dim=48 lifts the features", "janson": "metric='janson' divides the features"}
NOT_LINEAR |= {"unit lda": "unit=True divides the features", **dict.fromkeys(("klda", "anacp"), NOT_LINEAR["lifted"])}
NOT_LINEAR |= {"anacp, nearest": NOT_LINEAR["lifted"]}


def pairs(*usual: tuple[str, str]) -> list[Any]:
    """Every network with every head; what is not usual is slow."""
    every = [(kind, head) for kind in NETWORKS for head in HEADS]
    return [pytest.param(*pair, marks=() if pair in usual else pytest.mark.slow) for pair in every]


# each head on one network, and the head with a weight and a bias of its own on each
EACH = [*[("linear", head) for head in HEADS], *[(kind, "bias") for kind in NETWORKS]]


def images(size: int, number: int = 24) -> Tensor:
    """Classes that differ in brightness and contrast, so that random networks tell them apart."""
    noise = torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))
    label = torch.arange(number) % len(LEARNED)
    return noise * (1 + label)[:, None, None, None] + label[:, None, None, None]


@pytest.fixture(scope="module")
def networks() -> dict[str, tuple[TimmClassifier, Tensor, Tensor]]:
    """Module, images and features of each network."""
    made = {}
    for kind, (name, kwargs, size) in NETWORKS.items():
        torch.manual_seed(0)
        module = TimmClassifier(name, num_classes=COLUMNS, model_kwargs=kwargs).eval()
        inputs = images(size)
        with torch.no_grad():
            for part in module.modules():  # not at their start, where some let nothing through
                if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                    part.weight.uniform_(0.5, 1.5)
                    part.momentum = None  # one pass is enough
            module.train()(inputs)
            module.eval()
        made[kind] = module, inputs, FeatureTap(module).extract(inputs)
    return made


def learned(head: str, features: Tensor) -> Any:
    made = HEADS[head](features.shape[1])
    made.update(features, torch.tensor(LEARNED).repeat(len(features))[: len(features)])
    return made


def centred(scores: Tensor) -> Tensor:
    """Without the number a row by which logits and scores may differ."""
    return scores - scores.mean(dim=1, keepdim=True)


def check_logits(logits: Tensor, head: Any, features: Tensor, scaled: bool = False) -> None:
    assert logits.shape == (len(features), COLUMNS)
    assert bool(logits.isfinite().all())
    seen, wanted = logits.double()[:, LEARNED], head.scores_seen(features)
    if scaled:  # (f/|f| - m)² = 1 + 1 - 2 f/|f| m
        wanted = wanted * features.double().norm(dim=1, keepdim=True) * (0.5 if head.metric == "icarl" else 1.0)
    scale = float(wanted.abs().max())
    assert torch.allclose(centred(seen), centred(wanted), atol=1e-4 * max(1.0, scale), rtol=0)
    top = wanted.topk(2, dim=1).values
    clear = top[:, 0] - top[:, 1] > 1e-4 * scale  # float32 may decide a tie otherwise
    assert clear.float().mean() > 0.7
    assert torch.equal(logits.argmax(dim=1)[clear], head.predict(features)[clear])
    assert set(logits.argmax(dim=1).tolist()) <= set(LEARNED)


# ---- .pt


@pytest.mark.parametrize(("kind", "head"), pairs(*EACH, ("side by side", "cosine")))
def test_torch_and_timm_read_the_weights(networks: Any, kind: str, head: str, tmp_path: Path) -> None:
    module, inputs, features = networks[kind]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    made, path = learned(head, features), tmp_path / "model.pt"
    if head in NOT_LINEAR:
        with pytest.raises(ConfigurationError, match=rf"{NOT_LINEAR[head]}.*export to a \.pt2 file"):
            export(module, made, path, example=inputs)
        assert not list(tmp_path.iterdir())
        return
    exported = export(module, made, path, example=inputs, class_names={2: "two"}, preprocessing={"mean": (0.5,)})
    assert (exported.classes, exported.columns) == (3, 5)
    file = torch.load(path, weights_only=True)
    network = timm.create_model(
        file["timm"]["model_name"], num_classes=file["timm"]["num_classes"], **file["timm"]["kwargs"]
    ).eval()
    network.load_state_dict(file["state_dict"], strict=True)
    assert file["state_dict"].keys() == module.network.state_dict().keys()
    with torch.no_grad():
        check_logits(network(inputs), made, features, scaled=head in SCALED)
    assert file["classes"] == file["class_ids"] == list(LEARNED)
    assert file["class_names"] == {2: "two"}
    assert file["preprocessing"] == {"mean": [0.5]}
    assert all(torch.equal(module.state_dict()[key], before[key]) for key in before)
    read = load_head(path, "head")
    assert torch.equal(read.classes, made.classes)
    assert torch.equal(read.predict(features), made.predict(features))


# ---- .pt2


@pytest.mark.parametrize(("kind", "head"), [(kind, "lifted") for kind in NETWORKS])
def test_layers_of_any_head_take_the_place_of_any_classifier(networks: Any, kind: str, head: str) -> None:
    module, inputs, features = networks[kind]
    made = learned(head, features)
    spliced = SplicedCopy(module, made, "auto", inputs)
    with torch.no_grad():
        check_logits(spliced.put(readout_module(made, COLUMNS, torch.float32)).eval()(inputs), made, features)


@pytest.mark.parametrize(("kind", "head"), pairs(("distilled", "janson")))
def test_a_program_runs_with_any_head_and_batch(networks: Any, kind: str, head: str, tmp_path: Path) -> None:
    module, inputs, features = networks[kind]
    made, path = learned(head, features), tmp_path / "model.pt2"
    export(module, made, path, example=inputs[:2])
    extra = {"clkit.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    for rows in (1, 2, 7, len(inputs)):
        with torch.no_grad():
            check_logits(program(inputs[-rows:]), made, features[-rows:]) if rows > 7 else program(inputs[-rows:])
    assert json.loads(extra["clkit.json"])["classes"] == list(LEARNED)


# ---- graft, on the same networks

REFUSED_GRAFT = {
    "distilled": r"the mean of 2 distilled classifiers, 'head\|head_dist'",
    "normed pair": r"the mean of 2 distilled classifiers, 'head\|head_dist'",
}


@pytest.mark.parametrize(("kind", "head"), pairs(*EACH, ("side by side", "lifted"), ("convolution", "janson")))
def test_a_graft_on_the_same_networks(networks: Any, kind: str, head: str) -> None:
    module, inputs, features = networks[kind]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    made, graft = learned(head, features), Graft("the head")
    reason = REFUSED_GRAFT.get(kind)
    if kind == "side by side" and made.normalizes | (not made.feature_map.is_identity):
        reason = "only a head of one linear layer can be split"
    if head.startswith("anacp") and kind not in REFUSED_GRAFT:
        reason = "more than the last layer of this AnaCP depends on what it has learned"
    if reason is not None:
        with pytest.raises(ConfigurationError, match=rf"the head cannot be grafted: .*{reason}"):
            graft.check(module, "auto", HEADS[head])
        with pytest.raises(ConfigurationError, match=rf"the head cannot be grafted: .*{reason}"):
            graft.apply(module, "auto", made)
    else:
        graft.check(module, "auto", HEADS[head])
        graft.apply(module, "auto", made)
        with torch.no_grad():
            check_logits(module(inputs), made, features)
        graft.undo(module)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_class_beyond_the_outputs_is_refused_where_classifiers_stand_side_by_side(networks: Any) -> None:
    module, _, features = networks["side by side"]
    head = AnalyticHead(features.shape[1])
    head.update(features[:1], torch.tensor([7]))
    with pytest.raises(ConfigurationError, match=r"class 7 is beyond the 5 outputs"):
        Graft("the head").apply(module, "auto", head)


# ---- without clkit

ALONE = """
import sys
sys.modules["clkit"] = None  # any import of it fails
import timm, torch
inputs = torch.load("inputs.pt", weights_only=True)
saved = torch.load("ridge.pt", weights_only=True)
entry = saved["timm"]
network = timm.create_model(entry["model_name"], num_classes=entry["num_classes"], **entry["kwargs"]).eval()
network.load_state_dict(saved["state_dict"])
program = torch.export.load("lifted.pt2").module()
with torch.no_grad():
    torch.save([network(inputs), program(inputs)], "logits.pt")
assert not [name for name in sys.modules if name.startswith(("clkit.", "lightning"))]
"""


def test_a_process_without_clkit_reads_the_files(networks: Any, tmp_path: Path) -> None:
    module, inputs, features = networks["linear"]
    heads = [learned(head, features) for head in ("ridge", "lifted")]
    export(module, heads[0], tmp_path / "ridge.pt", example=inputs)
    export(module, heads[1], tmp_path / "lifted.pt2", example=inputs)
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", ALONE], check=True, cwd=tmp_path, capture_output=True)
    for logits, head in zip(torch.load(tmp_path / "logits.pt", weights_only=True), heads, strict=True):
        check_logits(logits, head, features)


# ---- networks that are not timm's, and what is known of a stream


def test_a_network_of_ones_own_after_a_fit(make_trainer: Any, lit_small: Any, tmp_path: Path) -> None:
    """Everything comes from the callback and the stream; the keys are the user's."""
    module, callback = lit_small(), NMC("euclidean")
    stream = StreamDataModule("digits:flat", ClassIncremental(experiences=2))
    trainer = make_trainer(strategy="gradient_free", callbacks=[callback])
    trainer.fit(module, datamodule=stream)
    assert export(module, callback, tmp_path / "own.pt") == (
        "LitSmall",
        "nmc",
        10,
        10,
        'torch.load("own.pt", weights_only=True)["state_dict"]',
    )
    assert module.trainer is not None
    file = torch.load(tmp_path / "own.pt", weights_only=True)
    assert file["timm"] is None
    assert file["class_names"] == {c: str(c) for c in range(10)}
    assert file["preprocessing"]["size"] is None
    fresh = lit_small().eval()
    fresh.load_state_dict(file["state_dict"], strict=True)
    inputs = torch.rand(50, 64)
    features = torch.relu(module.net.hidden(inputs)).detach()
    assert (fresh(inputs).argmax(1) == callback.head.predict(features)).float().mean() > 0.97
    assert torch.equal(load_head(tmp_path / "own.pt", "nmc").predict(features), callback.head.predict(features))
    with pytest.raises(ArgumentError, match=r"no head named 'lda'; it has \['nmc'\]"):
        load_head(tmp_path / "own.pt", "lda")
    export(module, callback, tmp_path / "own.pt2")
    program = torch.export.load(tmp_path / "own.pt2").module()
    assert (program(inputs).argmax(1) == callback.head.predict(features)).float().mean() > 0.97


@pytest.mark.parametrize("head", ["euclidean", "janson"])
def test_a_grafted_module_is_exported_as_if_it_were_not(
    make_trainer: Any, lit_small: Any, head: str, tmp_path: Path
) -> None:
    module, callback = lit_small(), NMC(head, graft="fit_end")
    trainer = make_trainer(strategy="gradient_free", callbacks=[callback])
    trainer.fit(module, datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=2)))
    assert callback.grafted
    weights = {key: value.clone() for key, value in module.state_dict().items()}
    export(module, callback, tmp_path / "own.pt2")
    assert callback.grafted
    assert all(torch.equal(module.state_dict()[key], weights[key]) for key in weights)
    inputs = torch.rand(50, 64)
    module.eval()
    program = torch.export.load(tmp_path / "own.pt2").module()
    with torch.no_grad():
        assert torch.allclose(program(inputs), module(inputs), atol=1e-5)


def test_the_keys_are_the_users_beside_a_graft_of_other_layers(
    make_trainer: Any, lit_small: Any, tmp_path: Path
) -> None:
    module, callback, other = lit_small(), NMC(graft="fit_end"), NMC("euclidean", name="other")
    trainer = make_trainer(strategy="gradient_free", callbacks=[callback, other])
    trainer.fit(module, datamodule=StreamDataModule("digits:flat", ClassIncremental(experiences=2)))
    assert isinstance(module.net.head, nn.Sequential)
    export(module, other, tmp_path / "own.pt")
    fresh = lit_small().eval()
    fresh.load_state_dict(torch.load(tmp_path / "own.pt", weights_only=True)["state_dict"], strict=True)
    inputs = torch.rand(50, 64)
    features = torch.relu(module.net.hidden(inputs)).detach()
    assert (fresh(inputs).argmax(1) == other.head.predict(features)).float().mean() > 0.97


def test_relabelled_classes_keep_their_ids(make_trainer: Any, lit_small: Any, tmp_path: Path) -> None:
    scenario = ClassIncremental(experiences=2, class_order=[7, 3, 1, 0, 2, 4, 5, 6, 8, 9])
    stream = StreamDataModule("digits:flat", scenario, relabel=True)
    module, callback = lit_small(), NMC("euclidean")
    make_trainer(strategy="gradient_free", callbacks=[callback]).fit(module, datamodule=stream)
    export(module, callback, tmp_path / "m.pt")
    file = torch.load(tmp_path / "m.pt", weights_only=True)
    assert file["classes"] == list(range(10))
    assert file["class_ids"] == [0, 1, 2, 3, 7, 4, 5, 6, 8, 9]  # within an experience they are sorted
    assert file["class_names"][4] == "7"


def test_a_network_without_a_classifier_gets_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TimmClassifier("test_resnet", num_classes=0).eval()
    inputs = images(32)
    with torch.no_grad():
        features = module(inputs)
    made = learned("ridge", features)
    export(module, made, tmp_path / "m.pt", example=inputs)
    file = torch.load(tmp_path / "m.pt", weights_only=True)
    assert file["timm"]["num_classes"] == 4
    network = timm.create_model("test_resnet", num_classes=4).eval()
    network.load_state_dict(file["state_dict"])
    with torch.no_grad():
        assert torch.allclose(
            centred(network(inputs)[:, LEARNED].double()), centred(made.scores_seen(features)), atol=1e-4
        )
    export(module, learned("janson", features), tmp_path / "m.pt2", example=inputs)
    assert torch.export.load(tmp_path / "m.pt2").module()(inputs).shape == (24, 4)
    assert module.network.num_classes == 0


def test_more_classes_than_a_network_of_ones_own_has_outputs(lit_small: Any, tmp_path: Path) -> None:
    module = lit_small(classes=3)
    head = learned("ridge", torch.rand(24, 16))
    with pytest.raises(
        ConfigurationError, match=r"its classifier has 3 outputs, and the head needs 4; export to a .pt2"
    ):
        export(module, head, tmp_path / "m.pt", example=torch.rand(2, 64))
    assert export(module, head, tmp_path / "m.pt2", example=torch.rand(2, 64)).columns == 4


# ---- what is refused


class Scaled(pl.LightningModule):
    """Whose forward does more than its network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("test_resnet", num_classes=COLUMNS)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs * 3 + 1)


class Sum(pl.LightningModule):
    """Several classifiers, the sum of which counts."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, COLUMNS), nn.Linear(8, COLUMNS)])

    def get_classifier(self) -> nn.Module:
        return self.heads

    def forward(self, inputs: Tensor) -> Tensor:
        return self.heads[0](inputs[:, :8]) + self.heads[1](inputs[:, 8:])


@pytest.mark.parametrize("ending", ["pt", "pt2"])
def test_a_network_that_does_something_else_is_noticed(ending: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Scaled().eval()
    inputs = images(32)
    features = module.network.forward_head(module.network.forward_features(inputs * 3 + 1), pre_logits=True).detach()
    with pytest.raises(ConfigurationError, match=r"outputs differ from the head's scores by .* forward may do more"):
        export(module, learned("ridge", features), tmp_path / f"m.{ending}", example=inputs)
    with pytest.raises(ConfigurationError, match=r"outputs differ from the head's scores"):
        export(Sum(), learned("ridge", torch.randn(24, 16)), tmp_path / f"m.{ending}", example=torch.randn(4, 16))
    assert not list(tmp_path.iterdir())


def test_arguments_that_make_another_network_are_noticed(tmp_path: Path) -> None:
    class Own(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = timm.create_model("test_vit", num_classes=COLUMNS, img_size=32)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.network(inputs)

    module, inputs = Own().eval(), images(32)
    head = learned("ridge", FeatureTap(module).extract(inputs))
    with pytest.raises(ConfigurationError, match=r"makes another network .* as model_kwargs"):
        export(module, head, tmp_path / "m.pt", example=inputs)
    export(module, head, tmp_path / "m.pt", example=inputs, model_kwargs={"img_size": 32})
    assert torch.load(tmp_path / "m.pt", weights_only=True)["timm"]["kwargs"] == {"img_size": 32}


def test_features_inside_a_network_are_refused(lit_small: Any, tmp_path: Path) -> None:
    module, inputs = lit_small(), torch.rand(24, 64)
    head = learned("ridge", FeatureTap(module, "net.hidden:out").extract(inputs))
    for ending in ("pt", "pt2"):
        with pytest.raises(
            ConfigurationError, match=r"features are read at 'net.hidden:out', .* no classifier's input"
        ):
            export(module, head, tmp_path / f"m.{ending}", example=inputs, layer="net.hidden:out")


def test_arguments_are_checked(networks: Any, lit_small: Any, tmp_path: Path) -> None:
    module, inputs, features = networks["linear"]
    head = learned("ridge", features)
    for path, said in (
        ("m.onnx", r"must end in \.pt .* or \.pt2"),
        ("no/m.pt", "there is no folder"),
    ):
        with pytest.raises(ArgumentError, match=said):
            export(module, head, tmp_path / path, example=inputs)
    (tmp_path / "old.pt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"exists; give another name, or --force"):
        export(module, head, tmp_path / "old.pt", example=inputs)
    assert (tmp_path / "old.pt").read_text() == "mine"
    export(module, head, tmp_path / "old.pt", example=inputs, overwrite=True)
    assert torch.load(tmp_path / "old.pt", weights_only=True)["timm"]["model_name"] == "test_resnet.r160_in1k"
    with pytest.raises(ArgumentError, match=r"nothing says what inputs a LitSmall takes"):
        export(lit_small(), head, tmp_path / "m.pt")
    with pytest.raises(ArgumentError, match=r"example must be one tensor .* got dict"):
        export(module, head, tmp_path / "m.pt", example={"x": inputs})  # a wrong type on purpose
    with pytest.raises(ConfigurationError, match=r"width 96 .* learned from width 7"):
        export(module, learned("ridge", torch.rand(9, 7)), tmp_path / "m.pt", example=inputs)
    with pytest.raises(NotFittedError):
        export(module, AnalyticHead(96), tmp_path / "m.pt", example=inputs)
    with pytest.raises(ConfigurationError, match=r"more than tensors and plain values.*preprocessing"):
        export(
            module, head, tmp_path / "m.pt", example=inputs, class_names={0: "a"}, model_kwargs={"act_layer": nn.ReLU}
        )


def test_the_default_example_is_what_the_network_takes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TimmClassifier("test_resnet", num_classes=COLUMNS, model_kwargs={"in_chans": 1}).eval()
    head = learned("ridge", FeatureTap(module).extract(images(32)[:, :1]))
    export(module, head, tmp_path / "m.pt")
    file = torch.load(tmp_path / "m.pt", weights_only=True)
    assert file["preprocessing"]["input_size"] == [1, 160, 160]
    assert file["timm"]["kwargs"] == {"in_chans": 1}
