"""Which layers an editor takes by itself, which it refuses, and that each refusal says why."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from clkit.errors import ArgumentError, ConfigurationError
from clkit.methods import GradientEditor


def editor_of(name: str, layers: Any = "auto", **options: Any) -> GradientEditor:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options)
    return GradientEditor(model, layers, rank=2)


def fcs(*blocks: str, names: tuple[str, ...] = ("fc1", "fc2")) -> list[str]:
    return [f"{block}.{name}" for block in blocks for name in names]


EXPECTED: list[Any] = [
    ("resnet50", ["layer4.2.conv1", "layer4.2.conv2", "layer4.2.conv3"]),
    ("mobilenetv2_100", ["blocks.6.0.conv_pw", "blocks.6.0.conv_pwl", "conv_head"]),
    ("vit_tiny_patch16_224", fcs("blocks.9.mlp", "blocks.10.mlp", "blocks.11.mlp")),
]
SLOW: list[Any] = [
    ("deit_tiny_distilled_patch16_224", fcs("blocks.9.mlp", "blocks.10.mlp", "blocks.11.mlp")),
    ("eva02_tiny_patch14_224", fcs("blocks.9.mlp", "blocks.10.mlp", "blocks.11.mlp")),
    ("swin_tiny_patch4_window7_224", fcs("layers.2.blocks.5.mlp", "layers.3.blocks.0.mlp", "layers.3.blocks.1.mlp")),
    ("convnext_atto", fcs("stages.3.blocks.0.mlp", "stages.3.blocks.1.mlp", "stages.2.blocks.5.mlp")),
    ("mixer_s32_224", fcs("blocks.6.mlp_channels", "blocks.7.mlp_tokens", "blocks.7.mlp_channels")),
    ("resnet18", ["layer4.0.downsample.0", "layer4.1.conv1", "layer4.1.conv2"]),
]


@pytest.mark.parametrize(
    ("name", "layers"), [*EXPECTED, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_automatic_layers_of_timm(name: str, layers: list[str]) -> None:
    assert sorted(editor_of(name).layers) == sorted(layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maxvit_rmlp_pico_rw_256", "coatnet_nano_rw_224", "beit_base_patch16_224"])
def test_transformers_have_their_last_mlps(name: str) -> None:
    layers = editor_of(name).layers
    assert len(layers) == 6
    assert all(".mlp." in layer for layer in layers)


def test_the_widths_of_a_resnet_and_the_size_of_its_editor() -> None:
    editor = editor_of("resnet50")
    assert [shape[1] for shape in editor.networks.shapes.values()] == [2048, 4608, 512]
    full = GradientEditor(editor._network.model, rank=64)
    assert sum(each.numel() for each in full.networks.networks.parameters()) == pytest.approx(2.68e6, rel=0.01)


def test_words_and_names_may_be_mixed_and_come_in_the_order_of_execution() -> None:
    name = "vit_tiny_patch16_224"
    projections = [f"blocks.{block}.attn.proj" for block in (9, 10, 11)]
    assert editor_of(name, "attention").layers == projections
    assert editor_of(name, "head").layers == ["head"]
    both = editor_of(name, ["head", "attention", "blocks.0.mlp.fc1"]).layers
    assert both == ["blocks.0.mlp.fc1", *projections, "head"]


def test_a_gated_mlp_of_three_layers() -> None:
    torch.manual_seed(0)
    gated = timm.models.eva.Eva(
        img_size=32, num_classes=3, embed_dim=24, depth=2, num_heads=2, swiglu_mlp=True, scale_mlp=True
    )
    editor = GradientEditor(gated, example=torch.zeros(1, 3, 32, 32))
    assert editor.layers == fcs("blocks.0.mlp", "blocks.1.mlp", names=("fc1_g", "fc1_x", "fc2"))


def test_a_convolution_as_the_classifier() -> None:
    editor = editor_of("dla34", "head")
    assert editor.layers == ["fc"]
    assert editor.networks.shapes == {"fc": (5, 512)}


class Odd(nn.Module):
    """A layer of each kind that cannot be edited, and one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Conv2d(4, 4, 1)
        self.computed = parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.standard = timm.layers.StdConv2d(4, 4, 1)
        self.tied, self.too = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.too.weight = self.tied.weight
        self.unused = nn.Linear(4, 4)
        self.norm = nn.BatchNorm2d(4)
        self.plain, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mirrored(self.grouped(x))
        x = self.computed(self.twice(self.twice(x)))
        x = self.too(self.tied(self.standard(x)))
        return self.fc(self.plain(self.norm(x)).mean((2, 3)))


REASONS = {
    "grouped": "it is a convolution of 2 groups",
    "mirrored": "it pads with 'reflect' instead of zeros",
    "twice": "a forward calls it 2 times",
    "computed": "it computes its weight from other tensors",
    "standard": "a StdConv2d computes something else than a linear layer or a convolution of torch",
    "tied": "its weight is shared with another layer",
    "too": "its weight is shared with another layer",
    "unused": "a forward calls it 0 times",
}


@pytest.mark.parametrize("name", REASONS)
def test_each_excluded_layer_is_named_with_the_reason(name: str) -> None:
    example = torch.zeros(2, 4, 5, 5)
    editor = GradientEditor(Odd(), example=example)
    assert editor.layers == ["plain"]
    assert editor.excluded.keys() == REASONS.keys()
    assert editor.excluded[name].startswith(REASONS[name])
    with pytest.raises(ArgumentError, match=f"layers names '{name}', which cannot be edited: {REASONS[name][:20]}"):
        GradientEditor(Odd(), [name], example=example)


def test_names_that_are_no_layers() -> None:
    example = torch.zeros(2, 4, 5, 5)
    for layers, says in [
        (["plane"], "the network has no such layer, did you mean 'plain'"),
        (["norm"], "it is a BatchNorm2d, and linear layers and 2-D convolutions alone can be edited"),
        ("mlp", "layers='mlp' finds nothing to edit in this network"),
        ([], "layers must name at least one layer"),
    ]:
        with pytest.raises(ArgumentError, match=says):
            GradientEditor(Odd(), layers, example=example)


def test_a_network_of_linear_layers_alone() -> None:
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)], nn.Linear(4, 2))
    assert GradientEditor(net, example=torch.zeros(2, 4)).layers == ["2", "3", "4"]


def test_squeeze_and_excitation_is_left_alone() -> None:
    layers = editor_of("mobilenetv3_small_050").layers
    assert layers
    assert not any(".se." in layer for layer in layers)


def test_networks_without_logits_are_refused() -> None:
    features = timm.create_model("resnet18", num_classes=0)
    with pytest.raises(ConfigurationError, match="the network has no classifier"):
        GradientEditor(features)
    with pytest.raises(ConfigurationError, match="the editor finds no classifier"):
        GradientEditor(nn.Sequential(nn.Conv2d(1, 2, 1)), example=torch.zeros(1, 1, 2, 2))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), x

    with pytest.raises(ConfigurationError, match=r"must return logits of shape \(2, C\), got a tuple"):
        GradientEditor(Pair(), "head", example=torch.zeros(2, 2))

    bounded = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    for net in (bounded, bounded.half()):
        with pytest.raises(ConfigurationError, match="the network returns probabilities"):
            GradientEditor(net, "0", example=torch.randn(4, 4), classifier="0")
    fitted = nn.Linear(4, 2)  # by least squares: no softmax, and scores that add up to 1 all the same
    with torch.no_grad():
        fitted.weight.zero_()
        fitted.bias.fill_(0.5)
    assert GradientEditor(nn.Sequential(nn.Linear(4, 4), fitted), "head", example=torch.randn(1, 4)).layers == ["1"]


def test_images_that_do_not_fit_are_told() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ArgumentError, match="example must be a batch of images"):
        GradientEditor(net, "head")
    with pytest.raises(ArgumentError, match=r"cannot run the example, of shape \(2, 5\)"):
        GradientEditor(net, "head", example=torch.zeros(2, 5))
    model = timm.create_model("resnet18", in_chans=1)
    with pytest.raises(ArgumentError, match="cannot run images of the size that the network names"):
        GradientEditor(model)
