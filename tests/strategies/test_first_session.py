"""What a warm-up may train: these weights move and no others, and nothing of the way they did it is left."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn

from clkit.callbacks import MEND, NMC
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError, StateError
from clkit.methods import EditReference
from clkit.strategies import GradientFreeStrategy
from clkit.strategies._first_session import FirstSession
from clkit.surgery.change import changes_of
from clkit.surgery.parts import last_block

Make = Callable[..., Any]
PARTS = ("norms", "last_block", "lora")
INPUTS = torch.linspace(0, 1, 8 * 64).view(8, 1, 8, 8)


class Net(pl.LightningModule):
    """A timm network of convolutions with batch norms, dropout, and a tensor of the loss outside of the network."""

    def __init__(self, rate: float = 3e-3, frozen: str = "network.blocks.4.0.bn1.weight", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"num_classes": 10, "in_chans": 1, "drop_rate": 0.2, "pad_type": "same", **options}
        self.network: Any = timm.create_model("test_efficientnet", **options)
        self.scale = nn.Parameter(torch.ones(()))
        self.get_parameter(frozen).requires_grad_(False)
        self.rate = rate

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.rate == 0:
            self.train()
        return nn.functional.cross_entropy(self.scale * self(batch[0]), batch[1])

    def on_train_epoch_start(self) -> None:
        self.train()  # as some do, and which would let every running statistic move

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


def stream(**options: Any) -> StreamDataModule:
    """Two experiences of 4 batches, and 4 + 4 of a warm-up before them."""
    options = {"batch_size": 24, "stop_after": 2, **options}
    return StreamDataModule("digits", ClassIncremental(experiences=10), **options)


def allowed(module: nn.Module, part: str) -> set[str]:
    """What of the state may move, said by names and shapes."""
    names, norms = set(module.state_dict()), (".bn1.", ".bn2.", ".bn3.")
    own = {"scale", "network.classifier.weight", "network.classifier.bias"}
    if part == "norms":
        own |= {name for name in names if any(norm in f".{name}" for norm in norms)}
    elif part == "last_block":
        own |= {name for name in names if name.startswith(("network.blocks.4.", "network.conv_head", "network.bn2"))}
    else:
        weights = {name: tuple(value.shape) for name, value in module.state_dict().items() if value.ndim == 4}
        own |= {name for name, (m, *rest) in weights.items() if 8 * (m + math.prod(rest)) < m * math.prod(rest)}
        assert set(weights) - own  # a pair of rank 8 is larger than some
    return own - {"network.blocks.4.0.bn1.weight"}


class Look(pl.Callback):
    """What trains in the warm-up, what the network says at its end, and a file of weights from within it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 8:
            self.trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
            self.optimized = [p for p in trainer.optimizers[0].param_groups[0]["params"] if p.grad is not None]
            self.said = answer(module)
            self.layers = {
                name: (layer.original, layer[0].up, layer[0].down)
                for name, layer in module.named_modules()
                if isinstance(layer, nn.utils.parametrize.ParametrizationList)
            }
            trainer.save_checkpoint(self.folder / "weights.ckpt", weights_only=True)


def answer(module: nn.Module) -> Tensor:
    one = copy.deepcopy(module).eval()
    with torch.no_grad():
        logits: Tensor = one.network(INPUTS)
    return logits


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(one: dict[str, Tensor], two: dict[str, Tensor]) -> set[str]:
    assert list(one) == list(two)
    return {name for name in one if not torch.equal(one[name], two[name])}


@pytest.mark.parametrize("part", PARTS)
def test_the_part_moves_and_all_else_stays_to_the_bit(make_trainer: Make, part: str, tmp_path: Path) -> None:
    module, look, head = Net(), Look(tmp_path), NMC()
    before, classes = state(module), {name: type(layer) for name, layer in module.named_modules()}
    parameters = [(name, id(parameter)) for name, parameter in module.named_parameters()]
    make_trainer(strategy=GradientFreeStrategy(2, part), callbacks=[head, look]).fit(module, datamodule=stream())
    # moments of AdamW and decay would show a tensor too many, also one whose gradient is 0
    assert moved(before, state(module)) == allowed(module, part)
    assert len(look.trained) == len(look.optimized)
    assert torch.equal(answer(module), look.said)
    # nothing is left
    assert {name: type(layer) for name, layer in module.named_modules()} == classes
    assert [(name, id(parameter)) for name, parameter in module.named_parameters()] == parameters
    assert changes_of(module) == []
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    assert frozen == ["network.blocks.4.0.bn1.weight"]
    assert all(layer.training for layer in module.modules())
    # what is added is B A, in another order of sums and twice the precision
    for name, (original, up, down) in look.layers.items():
        weight = module.get_parameter(name.replace(".parametrizations", ""))
        wanted = before[name.replace(".parametrizations", "")].double() + torch.einsum(
            "or,ri->oi", up.double(), down.double()
        ).reshape(weight.shape)
        assert original is weight
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-6, atol=1e-7)
    assert bool(look.layers) is (part == "lora")
    # a file of weights alone is the network as it was, and loads into a plain one
    saved = torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]
    fresh = Net()
    fresh.load_state_dict(saved)
    assert list(saved) == list(before)
    assert torch.equal(answer(fresh), look.said)
    # heads learned from the network as it ended
    again = NMC()
    make_trainer(strategy="gradient_free", callbacks=[again]).fit(module, datamodule=stream())
    torch.testing.assert_close(again.head.means, head.head.means, rtol=1e-6, atol=1e-7)  # in another order


class Saves(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.warns("this fit learned no batch")  # which ends within the warm-up
@pytest.mark.parametrize(
    ("part", "precision"),
    [*((part, "32-true") for part in PARTS), ("lora", "bf16-mixed"), ("lora", "bf16-true")],
)
def test_a_resume_ends_with_the_bits_of_a_run_that_went_on(
    make_trainer: Make, part: str, precision: str, tmp_path: Path
) -> None:
    """From within the warm-up, its last batch and behind it; and from a fit that ended within it and was saved then."""

    def run(path: str | None = None, **options: Any) -> tuple[Any, ...]:
        module, head = Net(), NMC()
        torch.manual_seed(0 if path is None else 1)
        callbacks = [head, ModelCheckpoint(str(tmp_path), "{step}", every_n_train_steps=1, save_top_k=-1)]
        trainer = make_trainer(
            strategy=GradientFreeStrategy(2, part, lora_rank=2),
            callbacks=callbacks,
            enable_checkpointing=True,
            precision=precision,
            **options,
        )
        trainer.fit(module, datamodule=stream(), ckpt_path=path)
        return trainer, module, head

    _, straight, head = run()
    short, module, _ = run(max_steps=5)
    short.save_checkpoint(tmp_path / "after.ckpt")
    kept = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert moved(kept, state(module)) == set()  # what was learned stays in a module whose fit ended
    for name in ("step=3", "after", "step=8", "step=13"):
        _, resumed, again = run(str(tmp_path / f"{name}.ckpt"))
        assert moved(state(resumed), state(straight)) == set(), name
        assert torch.equal(again.head.means, head.head.means), name
        assert changes_of(resumed) == []


@pytest.mark.warns("this fit learned no batch")
def test_what_a_cut_fit_learned_is_left_out_once_the_weights_are_others(make_trainer: Make, tmp_path: Path) -> None:
    module = Net()
    trainer = make_trainer(strategy=GradientFreeStrategy(2, "lora"), callbacks=[NMC()], max_steps=3)
    trainer.fit(module, datamodule=stream())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01)
    with pytest.warns(UserWarning, match="weights were changed since the fit ended in its warm-up"):
        trainer.save_checkpoint(tmp_path / "changed.ckpt")
    files = {name: torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("whole", "changed")}
    values = {name: file["clkit_strategy"]["first_session"]["values"] for name, file in files.items()}
    assert values["whole"]
    assert values["changed"] is None
    look = Look(tmp_path)
    resumed = make_trainer(strategy=GradientFreeStrategy(2, "lora"), callbacks=[NMC(), look], max_steps=8)
    resumed.fit(Net(), datamodule=stream(), ckpt_path=str(tmp_path / "changed.ckpt"))
    for name, (original, _, _) in look.layers.items():  # new pairs beside the weights of the file
        weight = files["changed"]["state_dict"][name.replace(".parametrizations", "")]
        assert name.endswith(".weight")
        assert original.shape == weight.shape
    assert any(name.endswith(".down") or "parametrizations" in name for name in look.trained)


@pytest.mark.filterwarnings("ignore:the editor is not trained", "ignore:the guard has no reference")
@pytest.mark.warns("the backbone changed")
def test_a_network_that_was_edited_after_its_warm_up_goes_on(make_trainer: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {"route": "editor", "allow_stale": True}

    def run(path: str | None = None, stop_after: int = 2) -> tuple[Any, Any, MEND]:
        module, mend = Net(), MEND({"layers": ["network.conv_head"]}, scale=50.0, guard=None, **options)
        mend.reference = EditReference((INPUTS, torch.arange(8)))
        trainer = make_trainer(strategy=GradientFreeStrategy(1, "lora", lora_rank=2), callbacks=[NMC(), mend])
        trainer.fit(module, datamodule=stream(stop_after=stop_after), ckpt_path=path)
        return trainer, module, mend

    trainer, module, mend = run()
    assert mend.edit(INPUTS[:1], answer(module)[:1].topk(2).indices[:, 1]).status == "applied"
    trainer.save_checkpoint(tmp_path / "edited.ckpt")
    _, resumed, again = run(str(tmp_path / "edited.ckpt"), stop_after=3)
    assert moved(state(resumed), state(module)) == set()
    assert len(again.records) == 1


@pytest.mark.warns("this fit learned no batch")
def test_other_settings_do_not_go_on(make_trainer: Make, tmp_path: Path) -> None:
    callbacks = [Saves(tmp_path), NMC()]
    make_trainer(strategy=GradientFreeStrategy(2, "lora"), callbacks=callbacks, max_steps=2).fit(
        Net(), datamodule=stream()
    )
    file = str(tmp_path / "2.ckpt")
    saved = torch.load(file, weights_only=True)["clkit_strategy"]["first_session"]
    assert {tuple(value.shape) for name, value in saved["values"].items() if name.endswith(".down")} >= {(8, 64)}
    for strategy, message in [
        (GradientFreeStrategy(2), "has warmup='lora', and this one warmup='all'"),
        (GradientFreeStrategy(2, "norms"), "has warmup='lora', and this one warmup='norms'"),
        (GradientFreeStrategy(2, "lora", lora_rank=4), "has lora_rank=8, and this one lora_rank=4"),
    ]:
        with pytest.raises(StateError, match=message):
            make_trainer(strategy=strategy, callbacks=[NMC()]).fit(Net(), datamodule=stream(), ckpt_path=file)


# ---- refused


class Bare(Net):
    """Two linear layers, or what a test wants."""

    def __init__(self, *layers: nn.Module, optimized: str = "") -> None:
        pl.LightningModule.__init__(self)
        self.network = nn.Sequential(nn.Flatten(), *(layers or [nn.Linear(64, 32), nn.ReLU()]), nn.Linear(32, 10))
        self.scale, self.rate, self.optimized = nn.Parameter(torch.ones(())), 0.1, optimized
        self.early = list(self.parameters())

    def configure_optimizers(self) -> Any:
        if self.optimized == "early":
            return torch.optim.SGD(self.early, 0.1)
        if self.optimized == "frozen":
            return torch.optim.SGD(self.network[1].parameters(), 0.1)
        return None if self.optimized == "none" else super().configure_optimizers()


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    ("part", "module", "message"),
    [
        (
            "norms",
            Bare(),
            "warmup='norms': Bare has no normalisation layer with a scale or a shift that trains; ",
        ),
        ("norms", Bare(nn.Linear(64, 32), frozen(nn.LayerNorm(32))), "has no normalisation layer"),
        ("last_block", Bare(), "warmup='last_block': Bare has no blocks of which one is the last and trains: "),
        ("lora", Bare(nn.Linear(64, 9), nn.Linear(9, 32)), r"no linear or convolutional layer .* a pair of rank 8; "),
        ("lora", Bare(frozen(nn.Linear(64, 32))), "no linear or convolutional layer that trains"),
        ("lora", Bare(optimized="early"), "leaves out all 2 tensors that warmup='lora' trains beside the classifier"),
        ("norms", Bare(nn.Linear(64, 32), nn.LayerNorm(32), optimized="frozen"), "every tensor of the optimizers of"),
        ("lora", Net(rate=0), "training_step.. has put them into training mode; call train.. before the step"),
        ("lora", Bare(nn.LazyLinear(32)), "the layer 'network.1' is a LazyLinear, whose weight is made with the first"),
        ("all", Bare(optimized="none"), "gives no optimizer of its parameters"),
    ],
)
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_what_cannot_train_is_refused_before_the_first_step(
    make_trainer: Make, part: Any, module: pl.LightningModule, message: str
) -> None:
    flags = [parameter.requires_grad for parameter in module.parameters()]
    with pytest.raises(ConfigurationError, match=message):
        make_trainer(strategy=GradientFreeStrategy(1, part), callbacks=[NMC()]).fit(module, datamodule=stream())
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert not any(nn.utils.parametrize.is_parametrized(layer) for layer in module.modules())


def test_settings_that_exclude_each_other_are_named(make_trainer: Make) -> None:
    with pytest.raises(ArgumentError, match="warmup='lora' says what warmup_epochs train, and these are 0"):
        GradientFreeStrategy(warmup="lora")
    with pytest.raises(ArgumentError, match="warmup must be one of 'all', 'norms', 'last_block', 'lora'"):
        GradientFreeStrategy(1, "head")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ArgumentError, match="lora_rank must be an integer of at least 1, got 0"):
        GradientFreeStrategy(1, "lora", lora_rank=0)
    trainer = make_trainer(strategy=GradientFreeStrategy(1, "norms"), callbacks=[BackboneFinetuning(), NMC()])
    with pytest.raises(ConfigurationError, match=r"BackboneFinetuning makes no sense .* warmup= says what trains"):
        trainer.fit(Net(), datamodule=stream())


# ---- blocks


class Grouped(nn.Module):
    """Names its blocks as networks of timm do; what lies between the last one's tensors counts to the stem."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(2))
        self.position = nn.Linear(width, width)
        self.late = nn.ModuleList(nn.Sequential(nn.Linear(width, width)) for _ in range(2))

    def group_matcher(self) -> Any:
        return {"stem": "^position", "blocks": [(r"^(?:blocks|late)\.(\d+)", None)]}


def test_statistics_without_a_scale_move_in_the_last_block_and_behind_it(make_trainer: Make) -> None:
    def block(*norm: nn.Module) -> nn.Module:
        return nn.Sequential(*norm, nn.Linear(32, 32), nn.ReLU())

    def norm() -> nn.Module:
        return nn.BatchNorm1d(32, affine=False)

    module = Bare(nn.Linear(64, 32), norm(), nn.Sequential(block(norm()), block(norm())), norm())
    before = state(module)
    make_trainer(strategy=GradientFreeStrategy(1, "last_block"), callbacks=[NMC()]).fit(module, datamodule=stream())
    statistics = {name for name in moved(before, state(module)) if name.endswith("running_mean")}
    assert statistics == {"network.3.1.0.running_mean", "network.4.running_mean"}


def test_layers_that_a_wrapper_puts_in_the_place_of_others_are_held_still() -> None:
    """DDP does so with ``sync_batchnorm=True``, after the warm-up was confined."""
    module, session = Net(), FirstSession("lora", 2)
    session.begin(module)
    TorchSyncBatchNorm().apply(module)
    session.settle()
    module.train()
    session.hold_still()
    norms = [layer for layer in module.modules() if isinstance(layer, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    session.end()
    assert all(norm.training for norm in norms)


def test_the_last_block_of_networks_of_all_kinds() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def first(network: nn.Module) -> str | None:
        found = last_block(network)
        names = [name for name, _ in network.named_parameters()]
        assert found == names[len(names) - len(found) :]  # it, and all behind it
        return found[0] if found else None

    wanted = {
        "test_vit": "blocks.5.norm1.weight",
        "test_resnet": "layer4.0.conv1.weight",
        "test_convnext": "stages.3.blocks.1.gamma",
        "test_efficientnet": "blocks.4.0.conv_pw.weight",
    }
    assert {name: first(timm.create_model(name)) for name in wanted} == wanted
    stages = nn.Sequential(nn.Sequential(block(), block()), nn.Sequential(block(), block(), block()), nn.Linear(4, 2))
    assert first(stages) == "1.2.0.weight"
    holder = nn.TransformerDecoderLayer(4, 2)  # a block which is no row, though one is inside it
    holder.linear1 = nn.Sequential(block(), block())
    stages = nn.Sequential(nn.Sequential(holder, copy.deepcopy(holder)), nn.Sequential(copy.deepcopy(holder)))
    assert first(stages) == "1.0.self_attn.in_proj_weight"
    assert first(Grouped(4)) == "blocks.1.0.weight"
    inner = nn.ModuleList([nn.TransformerEncoderLayer(4, 2), nn.TransformerEncoderLayer(4, 2)])
    parts = nn.ModuleDict({"stem": block(), "body": nn.ModuleDict({"rows": inner, "norm": nn.LayerNorm(4)})})
    assert first(parts) == "body.rows.1.self_attn.in_proj_weight"
    assert first(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))) is None
