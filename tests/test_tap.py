from __future__ import annotations

import copy
import gc
import pickle
import random
import re
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from small_runs import hooks_of
from torch import Tensor, nn

from clkit.errors import TapError
from clkit.features.tap import FeatureTap, Tapped
from clkit.surgery.classifier import Graft

timm = pytest.importorskip("timm")

# From smaller to larger, as timm names sizes; without one of them a name sorts last.
SIZES = [
    "test_",
    "atto|zepto|femto|pico|nano",
    "xxs|xxt|xx_",
    r"(_|\d)xs|tiny",
    r"(_|\d)(t|ti)\d?(_|$)",
    r"small|mini",
    r"(_|\d)(s|m|b)\d*(_|$)",
]


def small_name(module: str) -> str:
    """A small model of one of timm's architecture files, by its name alone: building all would take minutes."""

    def size(name: str) -> tuple[int, list[int], str]:
        rank = next((rank for rank, hint in enumerate(SIZES) if re.search(hint, name)), len(SIZES))
        return rank, [int(number) for number in re.findall(r"\d+", name)], name

    return min(timm.list_models(module=module), key=size)


OLD_TIMM = Version(timm.__version__) < Version("1.0.31")  # builds some networks with weights only, and lacks others


def known(name: str) -> str:
    if OLD_TIMM and not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    return name


def on_meta(name: str, **options: Any) -> nn.Module:
    try:
        with torch.device("meta"):
            return timm.create_model(known(name), **options).eval()
    except (RuntimeError, NotImplementedError):
        if OLD_TIMM:
            pytest.skip(f"timm {timm.__version__} cannot build {name} without weights")
        raise


def hear_one(network: nn.Module, images: Tensor, layer: str = "auto") -> tuple[Tapped, FeatureTap, Any]:
    heard: list[Tapped] = []
    with FeatureTap(network, layer) as tap, torch.no_grad():
        tap.listen(heard.append)
        output = network(images)
    assert len(heard) == 1
    return heard[0], tap, output


def mlp(width: int = 5, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.ReLU(), nn.Linear(width, classes))


class Wrapper(nn.Module):
    """What a user writes around a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(2 * images)


@pytest.fixture
def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=7).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# ---- all of timm


def check_architecture(name: str) -> None:
    network = on_meta(name, num_classes=10)
    images = torch.empty(2, *network.pretrained_cfg["input_size"], device="meta")
    tapped, tap, _ = hear_one(network, images)
    assert tapped.features.shape == (2, tap.width)
    assert tapped.logits is not None
    assert tapped.logits.shape == (2, 10)
    assert tap.point.endswith(":in")

    bare = on_meta(name, num_classes=0)
    tapped, tap, _ = hear_one(bare, images)
    assert tapped.features.shape == (2, tap.width)
    assert tapped.logits is None
    assert tap.classifier is None
    assert tap.point == "output"


# classifiers of other forms than a linear layer behind a pooling, beside those whose features are compared below
FORMS = {"dpn", "efficientvit_msra", "metaformer", "naflexvit", "pit", "shvit", "swiftformer", "vision_transformer_sam"}


@pytest.mark.parametrize(
    "module", [name if name in FORMS else pytest.param(name, marks=pytest.mark.slow) for name in timm.list_modules()]
)
def test_every_architecture_of_timm_gives_rows_of_features(module: str) -> None:
    check_architecture(small_name(module))


# CLIP's pooling by attention projects every token and takes the pooled one afterwards: no rows go into `proj`.
TOKENS = {"resnet50_clip", "resnet101_clip", "resnet50x4_clip", "resnet50x16_clip", "resnet50x64_clip"}


@pytest.mark.slow
def test_three_hundred_names_of_timm_give_rows_of_features_or_a_named_error() -> None:
    failed: dict[str, str] = {}
    for name in sorted({*random.Random(0).sample(timm.list_models(), 300), *TOKENS}):
        try:
            network = on_meta(name, num_classes=10)
            if not hasattr(network, "get_classifier"):
                with pytest.raises(TapError, match="timm encoder"):
                    FeatureTap(network)
            elif name in TOKENS:
                with pytest.raises(TapError, match=r"read at 'head.proj:in' was shape \(2, \d+, \d+\)"):
                    hear_one(network, torch.empty(2, *network.pretrained_cfg["input_size"], device="meta"))
            else:
                check_architecture(name)
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError, pytest.fail.Exception) as error:
            failed[name] = repr(error)
    assert not failed


def perturbed(name: str, **options: Any) -> nn.Module:
    """A network whose norms do something: fresh running statistics would hide where features are read."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=6, **options).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
        for head in FeatureTap(network).branches:
            for layer in head:
                for parameter in layer.parameters():
                    parameter.normal_(0, 0.1)
    return network


# Where the tap reads what timm calls pre-logits; the number is its width.
PRE_LOGITS = {
    "crossvit_9_240": 384,
    "deit_tiny_patch16_224": 192,
    "dla46x_c": 256,
    "efficientformer_l1": 448,
    "efficientvim_m1": 960,
    "levit_128s": 384,
    "mobilenetv3_small_050": 1024,
    "repvit_m1": 384,
    "resnetv2_18": 512,
    "sequencer2d_s": 384,
    "swin_tiny_patch4_window7_224": 768,
    "test_convnext": 64,
    "test_resnet": 96,
    "test_vit": 64,
}


@pytest.mark.parametrize("name", PRE_LOGITS)
def test_features_are_what_timm_calls_pre_logits(name: str) -> None:
    network = perturbed(known(name))
    images = torch.randn(2, *network.pretrained_cfg["input_size"])
    tapped, tap, output = hear_one(network, images)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
    assert tapped.features.shape == (2, PRE_LOGITS[name])
    torch.testing.assert_close(tapped.features, expected.flatten(1), rtol=0, atol=0)
    torch.testing.assert_close(tapped.logits, output, rtol=0, atol=0)

    if tap.classifier is not None and not isinstance(tap.classifier, nn.ModuleList):
        assert network.get_submodule(tap.classifier_path) is tap.classifier
        convolutional = isinstance(tap.classifier, nn.Conv2d)
        rows = tapped.features[:, :, None, None] if convolutional else tapped.features
        torch.testing.assert_close(tap.classifier(rows).flatten(1), tapped.logits, rtol=0, atol=0)


def test_a_classifier_with_a_hidden_layer_is_read_at_its_last_layer() -> None:
    network = perturbed("caformer_s18")
    tapped, tap, output = hear_one(network, torch.randn(2, 3, 224, 224))
    assert (tap.point, tap.width) == ("head.fc.fc2:in", 2048)
    last = network.head.fc.fc2
    torch.testing.assert_close(tapped.features @ last.weight.T + last.bias, output)

    network.reset_classifier(0)
    with FeatureTap(network) as bare:
        assert bare.extract(torch.randn(2, 3, 224, 224)).shape == (2, 512)


def test_a_pooling_head_is_read_behind_its_pooling() -> None:
    network = perturbed("samvit_base_patch16_224", depth=1, global_attn_indexes=(0,))
    images = torch.randn(2, 3, 224, 224)
    tapped, tap, output = hear_one(network, images)
    with torch.no_grad():
        pooled = network.forward_features(images).mean(dim=(2, 3))
    assert tap.point == "head.fc:in"
    torch.testing.assert_close(tapped.features, pooled)
    torch.testing.assert_close(tapped.features @ network.head.fc.weight.T + network.head.fc.bias, output)


def test_side_by_side_classifiers_give_their_inputs_side_by_side() -> None:
    network = perturbed("crossvit_9_240")
    tapped, tap, output = hear_one(network, torch.randn(2, 3, 240, 240))
    assert (tap.point, tap.classifier_path) == ("head.0+head.1:in", "head")
    small, large = tapped.features[:, :128], tapped.features[:, 128:]
    torch.testing.assert_close((network.head[0](small) + network.head[1](large)) / 2, output)


def test_a_distilled_pair_that_reads_two_tokens_gives_their_mean() -> None:
    network = perturbed("deit_tiny_distilled_patch16_224", depth=2)
    images = torch.randn(2, 3, 224, 224)
    tapped, tap, output = hear_one(network, images)
    tokens = network.forward_features(images)
    torch.testing.assert_close(tapped.features, (tokens[:, 0] + tokens[:, 1]) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(tapped.logits, output, rtol=0, atol=0)
    assert (tap.point, tap.classifier, tap.classifier_path) == ("head|head_dist:in", None, None)


def test_a_distilled_pair_that_reads_one_tensor_gives_it_uncopied() -> None:
    network = timm.create_model("levit_128s").eval()
    read: list[Tensor] = []
    network.head_dist.register_forward_hook(lambda module, args, output: read.append(args[0]))
    tapped, tap, _ = hear_one(network, torch.randn(2, 3, 224, 224))
    assert tap.point == "head|head_dist:in"
    assert tapped.features is read[0]


def test_a_distilled_pair_in_distillation_has_features_but_no_single_logits() -> None:
    network = perturbed("deit_tiny_distilled_patch16_224", depth=1).train()
    network.set_distilled_training(True)
    tapped, _, output = hear_one(network, torch.randn(2, 3, 224, 224))
    assert isinstance(output, tuple)
    assert tapped.features.shape == (2, 192)
    assert tapped.logits is None


# ---- where auto looks


def test_the_network_is_found_inside_the_users_modules(resnet: nn.Module, images: Tensor) -> None:
    module = Wrapper(Wrapper(resnet))
    tapped, tap, output = hear_one(module, images)
    expected = resnet.forward_head(resnet.forward_features(4 * images), pre_logits=True)
    torch.testing.assert_close(tapped.features, expected, rtol=0, atol=0)
    assert tapped.logits is output
    assert (tap.network, tap.point, tap.classifier_path) == (resnet, "fc:in", "net.net.fc")
    assert (tap.classifier, tap.width) == (resnet.fc, 96)


def test_a_backbone_inside_the_network_is_not_a_second_one() -> None:
    tap = FeatureTap(on_meta("vit_tiny_r_s16_p8_224"))
    assert tap.point == "head:in"


def test_several_networks_are_refused_and_can_be_named(resnet: nn.Module, images: Tensor) -> None:
    module = nn.ModuleDict({"teacher": copy.deepcopy(resnet), "student": resnet})
    for layer in ("auto", "output"):
        with pytest.raises(TapError, match=r"2 networks with a classifier, teacher, student; .* layer='teacher'"):
            FeatureTap(module, layer)
    tap = FeatureTap(module, "student")
    assert (tap.network, tap.point) == (resnet, "fc:in")
    assert FeatureTap(module, "student.fc").point == "fc:in"
    assert FeatureTap(module, "student:out").extract(images).shape == (2, 7)


def test_a_network_used_under_two_names_is_one(resnet: nn.Module) -> None:
    assert FeatureTap(nn.ModuleDict({"a": resnet, "b": resnet})).classifier_path == "a.fc"


def test_without_a_timm_network_the_last_linear_is_read() -> None:
    module = Wrapper(mlp())
    tapped, tap, output = hear_one(module, torch.ones(2, 4))
    hidden = torch.relu(module.net[1](2 * torch.ones(2, 4)))
    torch.testing.assert_close(tapped.features, hidden, rtol=0, atol=0)
    assert tapped.logits is output
    assert (tap.network, tap.point, tap.classifier_path, tap.width) == (module, "net.3:in", "net.3", 5)


def test_a_module_without_a_forward_of_its_own_is_run_by_the_part_that_has_one() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"net": mlp()})

    module = Bare()
    with FeatureTap(module) as tap:
        assert tap.network is module.parts["net"]
        assert tap.extract(torch.ones(2, 4)).shape == (2, 5)


def test_the_unused_projection_of_attention_is_no_classifier() -> None:
    module = nn.ModuleList([nn.Linear(4, 2), nn.MultiheadAttention(4, 2)])
    assert FeatureTap(module).classifier_path == "0"


def test_modules_of_this_library_are_no_classifiers_but_its_heads_are() -> None:
    def of_clkit(name: str, **children: nn.Module) -> nn.Module:
        module = type(name, (nn.Module,), {"__module__": "clkit.somewhere"})()
        for key, child in children.items():
            module.add_module(key, child)
        return module

    module = Wrapper(mlp())
    module.projector = of_clkit("Projector", linear=nn.Linear(5, 2))
    assert FeatureTap(module).point == "net.3:in"

    tap = FeatureTap(module)
    module.net[3] = nn.Sequential(nn.ReLU(), nn.Linear(5, 3))
    Graft("a callback").mark(module.net[3])
    tap.resolve()
    assert (tap.point, tap.classifier) == ("net.3:in", module.net[3])
    assert FeatureTap(module).point == "net.3:in"
    module.net[3] = of_clkit("SimplexHead")
    assert FeatureTap(module).point == "net.3:in"


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        ("net.9", r"no layer 'net\.9', did you mean 'net\.\d'"),
        ("net.3:inside", "stands 'in' or 'out', not 'inside'"),
    ],
)
def test_a_wrong_path_is_named(layer: str, match: str) -> None:
    with pytest.raises(TapError, match=match):
        FeatureTap(Wrapper(mlp()), layer)


def test_a_module_with_nothing_to_read_is_refused() -> None:
    with pytest.raises(TapError, match=r"no network with get_classifier\(\) and no nn.Linear; pass layer='output'"):
        FeatureTap(nn.Conv2d(3, 4, 3))


def test_an_encoder_of_timm_without_a_classifier_is_refused() -> None:
    network = timm.create_model("test_resnet", features_only=True)
    with pytest.raises(TapError, match=r"timm encoder without get_classifier\(\).*layer='output'"):
        FeatureTap(Wrapper(network))


def test_a_failing_get_classifier_is_named() -> None:
    class Odd(nn.Linear):
        def get_classifier(self) -> nn.Module:
            return self.missing

    with pytest.raises(TapError, match=r"Odd.get_classifier\(\) failed .*missing"):
        FeatureTap(Odd(2, 2))

    class Empty(nn.Linear):
        def get_classifier(self) -> nn.Module:
            return next(self.children())

    with pytest.raises(TapError, match=r"Empty.get_classifier\(\) failed \(StopIteration\)"):
        FeatureTap(Empty(2, 2))


# ---- paths


@pytest.mark.parametrize(
    ("layer", "point", "shape"),
    [
        ("3", "3:in", (2, 5)),
        ("1", "1:in", (2, 4)),
        ("2", "2:out", (2, 5)),
        ("3:out", "3:out", (2, 3)),
        ("2:in", "2:in", (2, 5)),
        ("output", "output", (2, 3)),
    ],
)
def test_a_path_means_the_input_of_a_linear_layer_and_the_output_of_others(
    layer: str, point: str, shape: tuple[int, int]
) -> None:
    tapped, tap, output = hear_one(mlp(), torch.ones(2, 4), layer)
    assert (tap.point, tapped.features.shape) == (point, shape)
    assert (tapped.logits is None) == (not point.endswith(":in"))
    if layer == "3":
        assert tapped.logits is output
    if layer in ("output", "3:out"):
        assert tapped.features is output


def test_a_path_to_a_head_of_timm_reads_what_auto_reads() -> None:
    network = on_meta("test_convnext")
    assert FeatureTap(network, "head").point == FeatureTap(network).point == "head.fc:in"
    assert FeatureTap(network, "head.fc").point == "head.fc:in"
    assert FeatureTap(network, "stages.1").point == "stages.1:out"
    crossvit = on_meta("crossvit_9_240")
    assert FeatureTap(crossvit, "head").point == FeatureTap(crossvit).point


def test_a_users_own_head_behind_a_backbone_without_classifier(images: Tensor) -> None:
    class Model(Wrapper):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.head = nn.Linear(96, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.net(images))

    model = Model(timm.create_model("test_resnet", num_classes=0)).eval()
    tapped, tap, output = hear_one(model, images, "head")
    assert (tap.point, tap.network, tap.classifier) == ("head:in", model, model.head)
    assert tapped.logits is output
    bare, tap, _ = hear_one(model, images)
    assert (tap.point, tap.network, bare.logits) == ("output", model.net, None)
    torch.testing.assert_close(bare.features, tapped.features, rtol=0, atol=0)


# ---- hearing


def test_features_arrive_where_the_networks_own_forward_is_bypassed(resnet: nn.Module, images: Tensor) -> None:
    heard: list[Tapped] = []
    with FeatureTap(resnet) as tap:
        tap.listen(heard.append)
        logits = resnet.forward_head(resnet.forward_features(images))
    assert len(heard) == 1
    assert heard[0].logits is logits


def test_a_layer_that_is_used_twice_in_a_forward_delivers_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, rows: Tensor) -> Tensor:
            return self.fc(self.fc(rows))

    net, heard = Twice(), []
    rows = torch.ones(2, 3)
    with FeatureTap(net) as tap:
        tap.listen(heard.append)
        net(rows)
    assert [tapped.features is rows for tapped in heard] == [True, False]


def test_an_input_by_keyword_is_heard() -> None:
    class ByKeyword(Wrapper):
        def forward(self, images: Tensor) -> Tensor:
            return self.net(input=images)

    tapped, _, _ = hear_one(ByKeyword(nn.Linear(3, 2)), torch.ones(2, 3))
    assert tapped.features.shape == (2, 3)


def test_listeners_come_and_go(resnet: nn.Module, images: Tensor) -> None:
    first: list[Tapped] = []
    second: list[Tapped] = []
    tap = FeatureTap(resnet)
    one, two = tap.listen(first.append), tap.listen(second.append)
    resnet(images)
    one.remove()
    one.remove()
    resnet(images)
    two.remove()
    resnet(images)
    assert (len(first), len(second)) == (1, 2)


def test_a_listener_may_leave_while_it_is_called() -> None:
    net, order = mlp(), []
    with FeatureTap(net) as tap:

        def once(tapped: Tapped) -> None:
            order.append("once")
            handle.remove()

        handle = tap.listen(once)
        tap.listen(lambda tapped: order.append("always"))
        net(torch.ones(2, 4))
        net(torch.ones(2, 4))
    assert order == ["once", "always", "always"]


def test_features_carry_the_graph_and_are_not_copied() -> None:
    net, heard = mlp(), []
    with FeatureTap(net, "3") as tap:
        tap.listen(heard.append)
        net(torch.ones(2, 4))
    assert heard[0].features.grad_fn is not None
    heard[0].features.sum().backward()
    assert net[1].weight.grad is not None


@pytest.mark.parametrize("name", ["test_resnet", "crossvit_9_240"])
def test_nothing_stays_alive_after_the_listeners_were_called(name: str) -> None:
    network = timm.create_model(name)
    alive: list[weakref.ref[Tensor]] = []
    with FeatureTap(network) as tap:
        tap.listen(lambda tapped: alive.extend(weakref.ref(tensor) for tensor in tapped if tensor is not None))
        network(torch.zeros(1, *network.pretrained_cfg["input_size"]))
        gc.collect()
        assert len(alive) == 2
        assert [reference() for reference in alive] == [None, None]


def test_several_classifiers_hold_nothing_after_a_failed_or_bypassed_forward() -> None:
    network = timm.create_model("crossvit_9_240").eval()
    kept: list[weakref.ref[Tensor]] = []
    network.head[0].register_forward_hook(lambda module, args, output: kept.append(weakref.ref(args[0])))
    heard: list[Tapped] = []

    def fail(module: nn.Module, args: Any) -> None:
        raise ValueError("broken on purpose")

    broken = network.head[1].register_forward_pre_hook(fail)
    with FeatureTap(network) as tap, torch.no_grad():
        tap.listen(heard.append)
        try:
            network(torch.zeros(1, 3, 240, 240))
        except ValueError as error:
            assert str(error) == "broken on purpose"  # noqa: PT017 - the traceback must be gone before collecting
        broken.remove()
        gc.collect()
        assert kept.pop()() is None
        network.forward_head(network.forward_features(torch.zeros(1, 3, 240, 240)))
        gc.collect()
        assert kept.pop()() is None
        assert heard == []
        network(torch.zeros(3, 3, 240, 240))
        assert [len(tapped.features) for tapped in heard] == [3]


def test_a_classifier_that_was_left_out_of_a_forward_is_an_error() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

        def get_classifier(self) -> nn.ModuleList:
            return self.heads

        def forward(self, rows: Tensor) -> Tensor:
            return self.heads[0](rows)

    with pytest.raises(TapError, match=r"read at 'heads.0\+heads.1:in' was nothing"):
        hear_one(Half(), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("module", "layer", "shape", "seen"),
    [
        (nn.Sequential(nn.Identity(), nn.Linear(4, 2)), "auto", (2, 50, 4), r"shape \(2, 50, 4\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), "0", (2, 3, 8, 8), r"shape \(2, 3, 8, 8\)"),
        (nn.Sequential(nn.LSTM(4, 4)), "output", (2, 4), "a tuple"),
        (nn.Sequential(nn.Flatten(0)), "output", (2, 4), r"shape \(8,\)"),
    ],
)
def test_features_of_another_shape_are_named(module: nn.Module, layer: str, shape: tuple[int, ...], seen: str) -> None:
    FeatureTap(module, layer)
    module(torch.ones(shape))  # nobody listens, nobody minds
    with pytest.raises(TapError, match=rf"layer='{layer}': read at .* was {seen}.*pass layer='output'"):
        hear_one(module, torch.ones(shape), layer)


def test_features_under_inference_mode_and_autocast(resnet: nn.Module, images: Tensor) -> None:
    with FeatureTap(resnet) as tap:
        heard: list[Tapped] = []
        tap.listen(heard.append)
        with torch.inference_mode():
            resnet(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            resnet(images)
        plain = tap.extract(images)
    assert heard[0].features.is_inference()
    torch.testing.assert_close(heard[0].features, plain, rtol=0, atol=0)
    assert heard[1].logits is not None
    assert heard[1].logits.dtype == torch.bfloat16
    torch.testing.assert_close(heard[1].features.float(), plain, rtol=0.1, atol=0.05)


# ---- looking again, leaving


def test_a_replaced_classifier_is_found_again(resnet: nn.Module, images: Tensor) -> None:
    heard: list[Tapped] = []
    module = Wrapper(resnet)
    with FeatureTap(module) as tap:
        tap.listen(heard.append)
        resnet.fc = nn.Linear(96, 4)
        module(images)
        assert heard == []
        tap.resolve()
        module(images)
        assert tap.classifier is resnet.fc
        assert [tuple(tapped.logits.shape) for tapped in heard] == [(2, 4)]
        resnet.reset_classifier(0)
        tap.resolve()
        module(images)
        assert (tap.point, tap.classifier, heard[-1].logits) == ("output", None, None)
    assert hooks_of(module) == 0


def test_a_head_of_ones_own_is_taken_whole(images: Tensor) -> None:
    network = timm.create_model("test_convnext", num_classes=3).eval()
    with FeatureTap(network) as tap:
        before = tap.extract(images)
        network.head.fc = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 5))
        tap.resolve()
        assert tap.classifier is network.head.fc
        assert tap.point == "head.fc:in"
        torch.testing.assert_close(tap.extract(images), before, rtol=0, atol=0)


def test_a_last_linear_that_gives_way_to_another_head_keeps_its_place() -> None:
    class Cosine(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return nn.functional.normalize(rows, dim=1)

    net = mlp()
    with FeatureTap(net) as tap:
        net[3] = Cosine()
        tap.resolve()
        assert (tap.point, tap.classifier) == ("3:in", net[3])


def test_resolving_changes_nothing_while_nothing_changed(resnet: nn.Module) -> None:
    with FeatureTap(resnet) as tap:
        hooks = list(resnet.fc._forward_hooks)
        tap.resolve()
        assert list(resnet.fc._forward_hooks) == hooks


def test_a_resolve_that_fails_leaves_the_tap_as_it_was() -> None:
    net, heard = mlp(), []
    with FeatureTap(net, "3") as tap:
        tap.listen(heard.append)
        last = net[3]
        del net[3]
        with pytest.raises(TapError, match="no layer '3'"):
            tap.resolve()
        last(net(torch.ones(2, 4)))
    assert len(heard) == 1
    assert not last._forward_hooks


@pytest.mark.parametrize("name", ["test_resnet", "crossvit_9_240"])
@pytest.mark.parametrize("layer", ["auto", "output"])
def test_closing_leaves_the_module_as_it_was(name: str, layer: str) -> None:
    network = on_meta(name)
    keys = list(network.state_dict())
    tap = FeatureTap(network, layer)
    tap.listen(lambda tapped: None)
    assert hooks_of(network) > 0
    assert list(network.state_dict()) == keys
    tap.close()
    tap.close()
    assert hooks_of(network) == 0
    with pytest.raises(TapError, match="was closed"):
        tap.listen(lambda tapped: None)
    with pytest.raises(TapError, match="was closed"):
        tap.extract(torch.zeros(1))
    tap.resolve()
    assert hooks_of(network) > 0


@pytest.mark.parametrize("name", ["test_resnet", "crossvit_9_240"])
def test_a_copy_of_a_tapped_network_is_silent(name: str) -> None:
    network = timm.create_model(name).eval()
    images = torch.zeros(1, *network.pretrained_cfg["input_size"])
    heard: list[Tapped] = []
    with FeatureTap(network) as tap:
        tap.listen(heard.append)
        copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
        for other in copies:
            other(images)
        assert heard == []
        network(images)
        assert len(heard) == 1


# ---- extracting


def test_extract_gives_evaluation_features_and_restores_the_flags(images: Tensor) -> None:
    network = timm.create_model("test_resnet", drop_rate=0.5).train()
    network.bn1.eval()
    flags = [module.training for module in network.modules()]
    buffers = copy.deepcopy(dict(network.named_buffers()))
    heard: list[Tapped] = []
    with FeatureTap(network) as tap:
        tap.listen(heard.append)
        features = tap.extract(images)
        assert heard == []
        network(images)
        assert len(heard) == 1
    assert not features.requires_grad
    assert [module.training for module in network.modules()] == flags

    network.load_state_dict(buffers, strict=False)
    network.eval()
    expected = network.forward_head(network.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, expected.detach(), rtol=0, atol=0)


def test_extract_restores_flags_and_listeners_when_the_forward_fails() -> None:
    net, heard = mlp().train(), []
    with FeatureTap(net) as tap:
        tap.listen(heard.append)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            tap.extract(torch.ones(2, 9))
        assert net.training
        net(torch.ones(2, 4))
    assert len(heard) == 1


def test_extract_says_so_when_the_layer_is_never_run() -> None:
    module = Wrapper(nn.Identity())
    module.unused = nn.Linear(2, 2)
    with pytest.raises(TapError, match=r"never reached 'unused:in'"):
        FeatureTap(module).extract(torch.ones(1, 2))


# ---- compiled


@pytest.fixture
def dynamo() -> Iterator[Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("how", "backend"),
    [
        ("network", "eager"),
        pytest.param("wrapper", "aot_eager", marks=pytest.mark.slow),
        *(pytest.param(how, "eager", marks=pytest.mark.slow) for how in ("wrapper", "part", "in place")),
    ],
)
def test_compiled_networks_are_heard_without_a_graph_break(
    dynamo: Any, resnet: nn.Module, images: Tensor, how: str, backend: str
) -> None:
    expected = resnet.forward_head(resnet.forward_features(images), pre_logits=True)
    options: dict[str, Any] = {"backend": backend, "fullgraph": True}
    module: nn.Module = resnet
    if how == "network":
        module = torch.compile(resnet, **options)
    elif how == "wrapper":
        module = torch.compile(nn.Sequential(resnet), **options)
    elif how == "part":
        module = nn.Sequential(torch.compile(resnet, **options))
    else:
        resnet.compile(**options)
    heard: list[Tapped] = []
    with FeatureTap(module) as tap:
        assert tap.point == "fc:in"
        assert module.get_submodule(tap.classifier_path or "") is resnet.fc
        module(images)
        handle = tap.listen(lambda tapped: heard.append(tapped))
        output = module(images)
        handle.remove()
        module(images)
    assert len(heard) == 1
    torch.testing.assert_close(heard[0].features, expected)
    torch.testing.assert_close(heard[0].logits, output, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, pytest.param({"num_classes": 0}, marks=pytest.mark.slow)])
def test_several_classifiers_are_heard_compiled(dynamo: Any, options: dict[str, int]) -> None:
    network = timm.create_model("efficientformer_l1", depths=(1, 1, 1, 1), **options).eval()
    images = torch.randn(2, 3, 224, 224)
    with FeatureTap(network) as tap:
        expected = tap.extract(images)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with FeatureTap(compiled) as tap:
        assert tap.network is compiled
        torch.testing.assert_close(tap.extract(images), expected, rtol=0, atol=0)


def test_the_point_has_the_same_name_where_a_part_of_the_network_is_compiled(dynamo: Any, images: Tensor) -> None:
    network = timm.create_model("test_convnext").eval()
    with FeatureTap(network) as tap:
        expected, point = tap.extract(images), tap.point
    network.head = torch.compile(network.head, backend="eager")
    with FeatureTap(network) as tap:
        assert tap.point == point == "head.fc:in"
        torch.testing.assert_close(tap.extract(images), expected, rtol=0, atol=0)


def test_a_listener_that_stores_does_not_compile_anew_each_step(dynamo: Any, images: Tensor) -> None:
    class Store:
        features: Tensor | None = None

        def hear(self, tapped: Tapped) -> None:
            if self.features is None:
                self.features = tapped.features.detach()

    network = timm.create_model("test_resnet")
    compiled = torch.compile(network, backend="eager")
    store = Store()
    with FeatureTap(compiled) as tap:
        tap.listen(store.hear)
        for _ in range(6):
            store.features = None
            compiled(images)
            assert store.features is not None
    assert dynamo["stats"]["unique_graphs"] == 1
    assert not dynamo["graph_break"]


# ---- training and evaluation mode


class WordDropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p


class MyNoise(nn.Dropout):
    pass


class StochasticDepth(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p


class FrozenBatchNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))


@pytest.mark.parametrize(
    ("layer", "sensitive"),
    [
        (nn.BatchNorm2d(2), True),
        (nn.LazyBatchNorm1d(), True),
        (nn.SyncBatchNorm(2), True),
        (nn.BatchNorm2d(2, track_running_stats=False), False),
        (FrozenBatchNorm2d(), False),
        (nn.InstanceNorm2d(2), False),
        (nn.InstanceNorm2d(2, track_running_stats=True), True),
        (nn.LayerNorm(2), False),
        (nn.GroupNorm(1, 2), False),
        (nn.Dropout(0.0), False),
        (nn.Dropout(0.1), True),
        (nn.Dropout2d(0.1), True),
        (nn.AlphaDropout(0.1), True),
        (MyNoise(0.1), True),
        (WordDropout(0.2), True),
        (WordDropout(0.0), False),
        (StochasticDepth(0.2), True),
        (nn.RReLU(), True),
        (nn.FractionalMaxPool2d(2, output_ratio=0.5), True),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.1), True),
        (nn.LSTM(2, 2, num_layers=2), False),
        (nn.MultiheadAttention(2, 1, dropout=0.1), True),
        (timm.layers.DropPath(0.1), True),
        (timm.layers.DropPath(0.0), False),
        (timm.layers.DropBlock2d(0.1), True),
        (timm.layers.PatchDropout(0.25), True),
        (timm.layers.BatchNormAct2d(2), True),
        (timm.layers.FrozenBatchNormAct2d(2), False),
        (timm.layers.EvoNorm2dB0(2), True),
    ],
    ids=lambda value: str(value).replace("\n", " "),
)
def test_layers_whose_forward_depends_on_the_mode(layer: nn.Module, sensitive: bool) -> None:
    net = nn.Sequential(layer, nn.ReLU(), nn.Linear(2, 2))
    assert FeatureTap(net).mode_sensitive() == ([layer] if sensitive else [])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vit", {}),
        ("test_vit", {"attn_drop_rate": 0.3}),
        ("test_vit", {"drop_path_rate": 0.3}),
        ("test_vit", {"patch_drop_rate": 0.5}),
        ("test_vit", {"proj_drop_rate": 0.3}),
        ("test_convnext", {}),
        ("test_convnext", {"drop_path_rate": 0.3}),
        ("test_resnet", {}),
        ("starnet_s050", {"drop_rate": 0.4}),
        ("hiera_tiny_224", {"patch_drop_rate": 0.5}),
        ("efficientvit_m0", {}),
    ],
)
def test_mode_sensitive_layers_of_timm_explain_every_difference(name: str, options: dict[str, float]) -> None:
    torch.manual_seed(0)
    network = timm.create_model(known(name), **options)
    images = torch.randn(2, *network.pretrained_cfg["input_size"])
    with FeatureTap(network) as tap, torch.no_grad():
        heard: list[Tapped] = []
        tap.listen(heard.append)
        network.eval()(images)
        buffers = copy.deepcopy(dict(network.named_buffers()))
        network.train()(images)
        network.load_state_dict(buffers, strict=False)  # running statistics have moved
        differs = not torch.equal(heard[0].features, heard[1].features)
        assert bool(tap.mode_sensitive()) == differs
        for layer in tap.mode_sensitive():
            layer.eval()
        network(images)
    torch.testing.assert_close(heard[-1].features, heard[0].features, rtol=0, atol=0)
