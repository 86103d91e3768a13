"""MEND's mathematics: golden values, gradients as rows against autograd, the networks, statistics and the meta-loss."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.errors import ArgumentError, BatchError, ConfigurationError, NotFittedError, StateError
from clkit.methods import EditorNetworks, GradientEditor
from clkit.methods._decomposition import Capture, Rows, weight_rows
from clkit.methods._editor_network import RowStatistics, positive_part

# ---- golden values, of two layers of d_in 3 and d_out 2

U1, D1 = [[1, 2, 3], [0, -1, 4], [2, 2, 2]], [[0.1, -0.2], [0.3, 0.4], [-0.5, 0.6]]
U2 = [[3, 0, 1], [0, 0, 0], [1, 1, 1], [-1, 2, 0]]
D2 = [[0.2, 0.1], [0.9, 0.9], [0, 0], [0.4, -0.3]]


def golden_rows(u: Any, d: Any) -> Rows:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    return weight_rows(layer, torch.tensor(u, dtype=torch.float64), torch.tensor(d, dtype=torch.float64))


def golden_networks() -> EditorNetworks:
    return EditorNetworks({"one": (2, 3), "two": (2, 3)}, rank=5).double()


def product(factors: Rows) -> Tensor:
    return -factors.gradients.T @ factors.inputs  # without the sign, which belongs to the step


def test_golden_values_of_the_identity() -> None:
    networks, first, second = golden_networks(), golden_rows(U1, D1), golden_rows(U2, D2)
    networks.collect({"one": first})
    (statistics,) = networks.statistics
    np.testing.assert_allclose(statistics.mean, [1, 1, 3, -0.033333333, 0.266666667], atol=1e-9)
    np.testing.assert_allclose(statistics.sigma(), [1, 1.732050808, 1, 0.416333200, 0.416333200], atol=1e-9)
    wanted = [[-1.921537846, -1.386750491, 1.921537846], [0.480384461, -0.554700196, -0.480384461]]
    np.testing.assert_allclose(product(networks({"one": first, "two": first})["two"]).detach(), wanted, atol=1e-9)

    networks.collect({"two": second})
    assert int(statistics.counts.sum()) == 5  # rows 2 and 3 have a half of zeros
    np.testing.assert_allclose(statistics.mean, [1, 1, 2, 0.1, 0.12], atol=1e-9)
    sigma = [1.581138830, 1.414213562, 1.581138830, 0.353553391, 0.383405790]
    np.testing.assert_allclose(statistics.sigma(), sigma, atol=1e-9)
    wanted = [[-0.715541753, 0.4, -1.252198067], [1.319657758, -0.737711114, 1.418632090]]
    np.testing.assert_allclose(product(networks({"one": second, "two": second})["one"]).detach(), wanted, atol=1e-9)


def fill(networks: EditorNetworks) -> None:
    (network,) = (parts["joint"] for parts in networks.networks)  # type: ignore[index]  # a Module to mypy
    flat = torch.arange(25, dtype=torch.float64)
    with torch.no_grad():
        for block in range(2):
            network.U[block] = (0.5 * torch.sin(0.37 * flat)).view(5, 5)
            network.V[block] = (0.5 * torch.cos((0.53 + block) * flat)).view(5, 5)
            network.b[block] = torch.linspace(-0.2, 0.3, 5, dtype=torch.float64)
            for layer in range(2):
                steps = 5 * layer + torch.arange(5)
                network.s[block, layer] = 1 + 0.1 * steps
                network.o[block, layer] = 0.05 * steps - 0.2


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        ("one", [[-1.551860616, -1.719686860, 2.251261009], [0.201916274, -0.314021680, 2.416885700]]),
        ("two", [[-0.864599983, 0.442243597, 4.556399418], [0.864584687, 2.680632377, 7.097763319]]),
    ],
)
def test_golden_values_of_filled_networks(layer: str, wanted: Any) -> None:
    networks, first = golden_networks(), golden_rows(U1, D1)
    networks.collect({"one": first, "two": golden_rows(U2, D2)})
    fill(networks)
    np.testing.assert_allclose(product(networks({"one": first, "two": first})[layer]).detach(), wanted, atol=1e-9)


# ---- rows of gradients


def rows_and_gradients(model: nn.Module, layers: dict[str, nn.Module], loss: Any) -> list[tuple[Tensor, Tensor]]:
    """The gradient of each weight as a sum over rows, and by autograd."""
    with Capture(layers) as capture:
        found = capture.rows(loss())
    weights = [layer.weight for layer in layers.values()]
    exact = torch.autograd.grad(loss(), weights)
    return [((each.gradients.T @ each.inputs).view_as(g), g) for each, g in zip(found.values(), exact, strict=True)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of torch, which copies the input
@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    unbatched=st.booleans(),
)
def test_rows_of_a_convolution_are_its_gradient(
    kernel: Any, stride: Any, dilation: Any, padding: Any, channels: Any, unbatched: bool
) -> None:
    stride = 1 if padding == "same" else stride  # torch has no other
    layer = nn.Conv2d(*channels, kernel, stride, padding, dilation, dtype=torch.float64)
    x = torch.randn(2, channels[0], 11, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x[0] if unbatched else x
    for own, exact in rows_and_gradients(layer, {"": layer}, lambda: layer(x).pow(3).sum()):
        torch.testing.assert_close(own, exact, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (2, 3, 5, 4)])
def test_rows_of_a_linear_layer_are_its_gradient(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    ((own, exact),) = rows_and_gradients(layer, {"": layer}, lambda: layer(x).pow(2).sum())
    torch.testing.assert_close(own, exact, rtol=0, atol=1e-13)


class InPlace(nn.Module):
    """An activation in place behind a convolution, and a sum into a layer's own input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True)
        self.branch, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x)).flatten(2).mT.contiguous()
        x += self.branch(x)  # autograd forbids this beside a weight with a gradient
        return self.head(x.mean(1))


def test_rows_where_a_network_writes_in_place_and_is_frozen() -> None:
    torch.manual_seed(0)
    model, x = InPlace().double().requires_grad_(False), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    layers = {name: model.get_submodule(name) for name in ("conv", "branch", "head")}
    with Capture(layers) as capture:
        logits = model(x)
        found = capture.rows(F.cross_entropy(logits, torch.tensor([1, 2])))
    assert torch.equal(logits, model(x))
    weights = [layer.weight.clone().requires_grad_() for layer in layers.values()]  # type: ignore[operator]  # a Module to mypy

    def by_hand() -> Tensor:
        h = F.relu(F.conv2d(x, weights[0], model.conv.bias, padding=1)).flatten(2).mT
        h = h + F.linear(h, weights[1], model.branch.bias)
        return F.cross_entropy(F.linear(h.mean(1), weights[2], model.head.bias), torch.tensor([1, 2]))

    for rows, exact in zip(found.values(), torch.autograd.grad(by_hand(), weights), strict=True):
        torch.testing.assert_close((rows.gradients.T @ rows.inputs).view_as(exact), exact, rtol=1e-12, atol=1e-14)
    assert all(parameter.grad is None for parameter in model.parameters())


TIMM = ["resnet18", "vit_tiny_patch16_224", "mobilenetv2_050"]
MORE = [
    "convnext_atto",
    *("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "eva02_tiny_patch14_224", "dla34"),
    *("vgg11", "densenet121", "regnetx_002", "mobilenetv3_small_050", "ghostnet_050", "resmlp_12_224", "pit_ti_224"),
    *("poolformer_s12", "cait_xxs24_224", "coat_lite_tiny", "levit_128s", "edgenext_xx_small", "mobilevitv2_050"),
]


def small(name: str) -> tuple[nn.Module, Tensor]:
    """A network of timm in float64 without zero-initialised branches, and images for it."""
    torch.manual_seed(0)
    quick = name in TIMM
    model = timm.create_model(name, num_classes=5, **({"img_size": 64} if quick and "vit" in name else {})).eval()
    for part in model.modules():
        for parameter in part.parameters(recurse=False):
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
            elif parameter.ndim < 2 and float(parameter.detach().abs().max()) < 1e-3:
                nn.init.constant_(parameter, 0.5)
    size = (3, 64, 64) if quick else model.pretrained_cfg["input_size"]
    return model.double(), torch.randn(2, *size, dtype=torch.float64)


@pytest.mark.parametrize("name", [*TIMM, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)])
def test_rows_of_timm_networks_are_the_gradients(name: str) -> None:
    model, x = small(name)
    editor = GradientEditor(model, "auto", example=x)
    layers = {each: model.get_submodule(each) for each in editor.layers}
    labels = torch.tensor([1, 3])
    plain = model(x)
    with Capture(layers) as capture:
        logits = model(x)
        found = capture.rows(F.cross_entropy(logits, labels, reduction="sum"))
    assert torch.equal(logits, plain)
    exact = torch.autograd.grad(
        F.cross_entropy(model(x), labels, reduction="sum"), [each.weight for each in layers.values()]
    )
    for each, gradient in zip(editor.layers, exact, strict=True):
        own = (found[each].gradients.T @ found[each].inputs).view_as(gradient)
        assert gradient.abs().max() > 0, each
        torch.testing.assert_close(own, gradient, rtol=0, atol=1e-11 * float(gradient.abs().max()))


# ---- the networks


def test_derivative_at_zero_is_one() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0], requires_grad=True)
    positive_part(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1]
    assert positive_part(x).tolist() == [0, 0, 0, 2]
    assert positive_part(torch.tensor([float("nan")])).isnan().all()


def statistics_of(parts: list[tuple[str, Rows]]) -> RowStatistics:
    statistics = RowStatistics(4, 3, ["a", "b"])
    for name, rows in parts:
        statistics.update(name, rows)
    return statistics


def test_statistics_are_those_of_one_pass_whatever_the_split_merge_or_order() -> None:
    generator = torch.Generator().manual_seed(0)
    u = 1000 + torch.randn(50, 4, generator=generator, dtype=torch.float64)
    d = torch.randn(50, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 1e-6])
    both = np.concatenate([u.numpy(), d.numpy()], axis=1)
    pieces = [("ab"[i % 2], Rows(u[a:b], d[a:b])) for i, (a, b) in enumerate([(0, 1), (1, 1), (1, 20), (20, 50)])]
    left, right = statistics_of(pieces[:3]), statistics_of(pieces[3:])
    left.merge(right)
    for statistics in (statistics_of(pieces), statistics_of(pieces[::-1]), left):
        np.testing.assert_allclose(statistics.mean, both.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(statistics.M2, both.var(axis=0) * 50, rtol=1e-10)  # an offset of 1e3 squared
        assert statistics.counts.tolist() == [20, 30]


def test_a_dimension_that_never_moved_has_the_floor_of_its_half() -> None:
    u = torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    d = torch.tensor([[0.1, 0.2], [0.1, 0.6]], dtype=torch.float64)
    statistics = RowStatistics(2, 2, ["a"])
    statistics.update("a", Rows(u, d))
    deviations = np.array([2**0.5, 0, 0, 0.4 / 2**0.5])
    floors = np.repeat([1e-3 * deviations[:2].mean(), 1e-3 * deviations[2:].mean()], 2)
    np.testing.assert_allclose(statistics.sigma(), np.maximum(deviations, floors), rtol=1e-12)


def random_rows(shapes: dict[str, tuple[int, int]], n: int = 6, seed: int = 0) -> dict[str, Rows]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Rows(torch.randn(n, i, generator=generator), torch.randn(n, o, generator=generator))
        for name, (o, i) in shapes.items()
    }


SHAPES = {"a": (3, 4), "b": (5, 2), "c": (3, 4)}


def test_at_the_start_what_must_train_has_a_gradient() -> None:
    networks = EditorNetworks(SHAPES, rank=2)
    rows = random_rows(SHAPES)
    networks.collect(rows)
    assert networks.is_identity
    sum(each.square().sum() for pair in networks(rows).values() for each in pair).backward()
    for name, parameter in networks.named_parameters():
        moves = name[-1] in "Ubo" or name == "steps"
        assert bool(parameter.grad.any()) == moves, name
    assert networks.alpha_start.grad is None
    torch.optim.Adam(networks.parameters(), lr=0.01).step()
    assert not networks.is_identity
    for parts in networks.networks:
        assert parts["joint"].U.any()  # type: ignore[index]  # a Module to mypy


def test_no_rows_give_no_edit_and_gradients_of_zero() -> None:
    networks = EditorNetworks(SHAPES, rank=2)
    networks.collect(random_rows(SHAPES))
    factors = networks(random_rows(SHAPES, n=0))
    deltas = [each.gradients.T @ each.inputs for each in factors.values()]
    assert [tuple(delta.shape) for delta in deltas] == [(3, 4), (5, 2), (3, 4)]
    assert not any(bool(delta.any()) for delta in deltas)
    sum(delta.sum() for delta in deltas).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in networks.parameters())


@pytest.mark.parametrize("transforms", ["joint", "separate", "inputs", "gradients", "smaller"])
@pytest.mark.parametrize("share", ["shape", "none"])
@pytest.mark.parametrize("scope", ["shape", "layer", "none"])
def test_variants_start_as_the_identity_and_move_what_they_should(transforms: Any, share: Any, scope: Any) -> None:
    networks = EditorNetworks(SHAPES, rank=8, transforms=transforms, share=share, norm_scope=scope)
    rows = random_rows(SHAPES)
    networks.collect(rows)
    assert len(networks.networks) == (2 if share == "shape" else 3)
    assert len(networks.statistics) == {"shape": 2, "layer": 3, "none": 0}[scope]
    halves = {"joint": "ud", "separate": "ud", "inputs": "u", "gradients": "d", "smaller": None}[transforms]
    groups = {"shape": [["a", "c"], ["b"]], "layer": [["a"], ["b"], ["c"]], "none": [["a"], ["b"], ["c"]]}[scope]
    normalised = {}
    for group in groups:
        for half in (0, 1):
            values = np.concatenate([rows[name][half].double().numpy() for name in group])
            mean, deviation = (0.0, 1.0) if scope == "none" else (values.mean(axis=0), values.std(axis=0, ddof=1))
            for name in group:
                normalised[name, half] = (rows[name][half].double().numpy() - mean) / deviation
    for name, factors in networks(rows).items():
        np.testing.assert_allclose(factors.inputs.detach(), normalised[name, 0], atol=1e-5)
        np.testing.assert_allclose(-factors.gradients.detach(), normalised[name, 1], atol=1e-5)
    with torch.no_grad():
        for name, parameter in networks.named_parameters():
            if name.endswith("U"):
                parameter.fill_(0.3)
    for name, factors in networks(rows).items():
        moved = "".join(
            letter
            for letter, half, was in zip("ud", factors, (0, 1), strict=True)
            if not np.allclose((1 - 2 * was) * half.detach().numpy(), normalised[name, was], atol=1e-4)
        )
        assert moved == (halves or {"a": "d", "b": "u", "c": "d"}[name])


def test_first_values_are_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, other, third = (EditorNetworks(SHAPES, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    V = [networks.networks[0]["joint"].V for networks in (one, other, third)]  # type: ignore[index]  # a Module to mypy
    assert torch.equal(V[0], V[1])
    assert not torch.equal(V[0], V[2])
    assert float(V[0].detach().abs().max()) <= (6 / (7 + 7)) ** 0.5  # Xavier's bound of rank 7, width 7


# ---- the editor of a network


class Small(nn.Module):
    """Convolutions with batch norm and dropout, a classifier of four classes."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Dropout(0.3)
        self.mix, self.fc = nn.Conv2d(3, 5, 1), nn.Linear(5, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.norm(self.conv(x))))
        return self.fc(F.gelu(self.mix(x)).mean((2, 3)))


LAYERS = ["conv", "mix", "fc"]


def small_editor(dtype: torch.dtype = torch.float32, outputs: int = 4, **options: Any) -> GradientEditor:
    torch.manual_seed(0)
    model = Small(outputs).to(dtype)
    model.norm.running_mean.uniform_(-0.1, 0.1)
    return GradientEditor(model, LAYERS, example=torch.zeros(2, 1, 8, 8), **options)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def labels(n: int, seed: int = 0, classes: int = 4) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def model_of(editor: GradientEditor) -> Any:
    return editor._network.model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def deltas(editor: GradientEditor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {name: each.delta() for name, each in editor.propose(x, y).factors.items()}


@pytest.mark.warns("the editor is not trained")
def test_the_identity_without_normalisation_is_a_gradient_step() -> None:
    editor = small_editor(torch.float64, norm_scope="none", alpha=0.3)
    model, x, y = model_of(editor).eval(), images(3).double(), labels(3)
    found = deltas(editor, x, y)
    exact = torch.autograd.grad(
        F.cross_entropy(model(x), y, reduction="sum"), [model.get_parameter(f"{name}.weight") for name in LAYERS]
    )
    for name, gradient in zip(LAYERS, exact, strict=True):
        torch.testing.assert_close(found[name].view_as(gradient), -0.3 * gradient, rtol=1e-12, atol=1e-14)


def by_loop(editor: GradientEditor, x: Tensor, y: Tensor, name: str) -> np.ndarray[Any, Any]:
    """The edit of a layer by a loop over images and positions, from the statistics alone."""
    model, layer = model_of(editor).eval(), model_of(editor).get_submodule(name)
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(
        lambda _, args, out: (kept.append(args[0]), out.retain_grad(), kept.append(out))[0] and None
    )
    F.cross_entropy(model(x), y, reduction="sum").backward()
    hook.remove()
    model.zero_grad(set_to_none=True)
    inputs, gradients = kept[0].detach(), kept[1].grad
    assert gradients is not None
    statistics = editor.networks._own_statistics(name)
    mean, sigma = statistics.mean.numpy(), statistics.sigma().numpy()
    total = 0.0
    for image in range(len(x)):
        places = (
            [()] if inputs.ndim == 2 else [(i, j) for i in range(gradients.shape[2]) for j in range(gradients.shape[3])]
        )
        for place in places:
            if inputs.ndim == 2:
                u, d = inputs[image], gradients[image]
            else:
                (i, j), (kh, kw), (sh, sw) = place, layer.kernel_size, layer.stride
                u = inputs[image, :, i * sh : i * sh + kh, j * sw : j * sw + kw].flatten()
                d = gradients[image, :, i, j]
            if u.any() and d.any():
                z = (np.concatenate([u.numpy(), d.numpy()]) - mean) / sigma
                total = total - editor.alpha[name] * np.outer(z[len(u) :], z[: len(u)])
    return np.asarray(total)


@pytest.mark.warns("the editor is not trained")
def test_the_identity_is_a_step_along_normalised_rows() -> None:
    editor = small_editor(torch.float64)
    editor.fit_statistics([(images(30, 1).double(), labels(30, 1))])
    x, y = images(2, 2).double(), labels(2, 2)
    found = deltas(editor, x, y)
    for name in LAYERS:
        np.testing.assert_allclose(found[name], by_loop(editor, x, y, name), rtol=1e-9, atol=1e-12)


@pytest.mark.warns("the editor is not trained")
def test_edits_of_a_batch_add_up_in_any_order() -> None:
    editor = small_editor()
    editor.fit_statistics([(images(30, 1), labels(30, 1))])
    x, y = images(5, 2), labels(5, 2)
    together, turned = deltas(editor, x, y), deltas(editor, x.flip(0), y.flip(0))
    singles = [deltas(editor, x[i : i + 1], y[i : i + 1]) for i in range(5)]
    for name, whole in together.items():
        scale = float(whole.abs().max())
        torch.testing.assert_close(sum(each[name] for each in singles), whole, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(turned[name], whole, rtol=0, atol=1e-5 * scale)


def test_first_steps_have_a_median_of_five_percent() -> None:
    editor = small_editor()
    data = [(images(7, seed), labels(7, seed)) for seed in range(6)]
    editor.fit_statistics(data)
    assert editor.networks.statistics[0].counts.tolist() == [42 * 9]  # type: ignore[union-attr]  # a Module to mypy
    x, y = torch.cat([each for each, _ in data])[:20], torch.cat([each for _, each in data])[:20]
    with pytest.warns(UserWarning, match="the editor is not trained"):
        found = [deltas(editor, x[i : i + 1], y[i : i + 1]) for i in range(20)]
    for name in LAYERS:
        norm = float(model_of(editor).get_parameter(f"{name}.weight").detach().norm())
        sizes = sorted(float(each[name].norm()) / norm for each in found)
        assert sizes[9] == pytest.approx(0.05, rel=1e-4)


def test_statistics_stop_at_the_number_asked_for_and_are_taken_once() -> None:
    editor = small_editor(alpha=0.1)
    editor.fit_statistics(((images(8, seed), labels(8, seed)) for seed in range(10)), edits=20)
    assert editor.networks.statistics[0].counts.tolist() == [20 * 9]  # type: ignore[union-attr]  # a Module to mypy
    other = small_editor(alpha=0.1)
    whole = torch.cat([images(8, seed) for seed in range(3)]), torch.cat([labels(8, seed) for seed in range(3)])
    other.fit_statistics([whole], edits=20)
    for one, two in zip(editor.networks.statistics, other.networks.statistics, strict=True):
        torch.testing.assert_close(one.M2, two.M2, rtol=1e-6, atol=0)  # float32 rows of batches of other sizes
    with pytest.raises(ConfigurationError, match="has its statistics already"):
        editor.fit_statistics([whole])


def test_layers_that_no_gradient_reaches_are_named() -> None:
    editor = small_editor()
    with torch.no_grad():
        model_of(editor).norm.weight.zero_()  # as in the residual branches of an untrained network
    with pytest.raises(NotFittedError, match=r"less than 2 rows with a gradient of \['conv'\]"):
        editor.fit_statistics([(images(8), labels(8))])
    with pytest.raises(NotFittedError, match=r"call fit_statistics\(\) first"):
        editor.propose(images(1), labels(1))
    with pytest.raises(NotFittedError, match="data has no edits"):
        editor.fit_statistics([])


def trained_like(editor: GradientEditor) -> GradientEditor:
    """An editor whose networks are those of no start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in editor.networks.networks.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return editor


def meta_batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    x = images(8, 5).to(dtype)
    return {"x_e": x[:1], "y_e": labels(1, 5), "x_eq": x[1:3], "y_eq": labels(1, 5).repeat(2), "x_loc": x[3:]}


def test_meta_loss_is_that_of_an_edited_copy_and_its_gradient_that_of_differences() -> None:
    editor = trained_like(small_editor(torch.float64, c_edit=0.4, c_loc=1.5))
    editor.fit_statistics([(images(30, 1).double(), labels(30, 1))])
    batch = meta_batch(torch.float64)

    def on_a_copy() -> float:
        model = copy.deepcopy(model_of(editor)).eval()
        before = model(batch["x_loc"]).softmax(dim=1)
        with torch.no_grad():
            for name, delta in deltas(editor, batch["x_e"], batch["y_e"]).items():
                weight = model.get_parameter(f"{name}.weight")
                weight += delta.view_as(weight)
        after = model(batch["x_loc"]).softmax(dim=1)
        logits = model(torch.cat([batch["x_e"], batch["x_eq"]]))
        divergence = (before * (before / after).log()).sum(dim=1).mean()
        wanted = batch["y_e"].repeat(3)
        return (0.4 * F.cross_entropy(logits, wanted) + 1.5 * divergence).item()

    found = editor.meta_loss(**batch)
    assert found["loss"].item() == pytest.approx(on_a_copy(), rel=1e-9)
    found["loss"].backward()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in editor.networks.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for side in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += side * direction
                values.append(on_a_copy())
                parameter -= side * direction
        slope = (values[0] - values[1]) / 2e-6
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_training_the_editor_leaves_the_network_as_it_was() -> None:
    editor = small_editor()
    model = model_of(editor).train()
    model.drop.eval()  # a mode of the user's own
    before, modes = bits(model), [part.training for part in model.modules()]
    random = torch.get_rng_state()
    editor.fit_statistics([(images(30, 1), labels(30, 1))])
    optimizer = torch.optim.Adam(editor.parameter_groups())
    first = editor.meta_loss(**meta_batch())["loss"]
    for _ in range(30):
        optimizer.zero_grad()
        loss = editor.meta_loss(**meta_batch())
        loss["loss"].backward()
        optimizer.step()
    assert float(loss["loss"].detach()) < float(first.detach())
    assert loss["size"].shape == (3,)
    assert same(bits(model), before)
    assert [part.training for part in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "how",
    [
        *("bf16", "frozen", "inference tensors"),
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("compiled network", "compiled editor")),
    ],
)
def test_a_step_moves_every_network_however_the_model_is_run(how: str) -> None:
    editor = small_editor()
    model = model_of(editor)
    if how == "frozen":
        model.requires_grad_(False)
    if how == "compiled network":
        model = torch.compile(model, backend="eager")
        model(images(2))
        editor = GradientEditor(model, LAYERS, example=images(2))
    batch = meta_batch()
    if how == "inference tensors":
        with torch.inference_mode():
            batch = {name: value.clone() for name, value in batch.items()}
    editor.fit_statistics([(images(30, 1), labels(30, 1))])
    if how == "compiled editor":
        editor.networks.compile(backend="eager")
    optimizer = torch.optim.Adam(editor.parameter_groups())
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "bf16"),
        torch.inference_mode(how.startswith("inf")),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        loss = editor.meta_loss(**batch)["loss"]
    loss.backward()
    optimizer.step()
    assert all(parts["joint"].U.abs().sum() > 0 for parts in editor.networks.networks)  # type: ignore[index]  # a Module to mypy


def test_one_output_and_several_labels() -> None:
    one = trained_like(small_editor(torch.float64, outputs=1, norm_scope="none", alpha=0.1))
    x, y, x_loc = images(3).double(), torch.tensor([0, 1, 1]), images(6, 9).double()
    found = one.meta_loss(x, y, x_loc=x_loc)
    both = copy.deepcopy(model_of(one)).eval()
    with torch.no_grad():
        before = both(x_loc)[:, 0].sigmoid()
        for name, delta in deltas(one, x, y).items():
            both.get_parameter(f"{name}.weight").add_(delta.view_as(both.get_parameter(f"{name}.weight")))
        after, p = both(x_loc)[:, 0].sigmoid(), both(x)[:, 0].sigmoid()
    kl = (before * (before / after).log() + (1 - before) * ((1 - before) / (1 - after)).log()).mean()
    assert found["locality"].item() == pytest.approx(float(kl), rel=1e-9)
    assert found["edit"].item() == pytest.approx(float(-torch.where(y > 0, p, 1 - p).log().mean()), rel=1e-9)

    several = small_editor(
        norm_scope="none",
        loss=lambda logits, y: F.binary_cross_entropy_with_logits(logits, y.float(), reduction="none").sum(dim=1),
    )
    x = x.float()
    several.fit_statistics([(x, torch.eye(4)[:3])])
    with torch.no_grad():
        wanted = (model_of(several).eval()(x[:1]) > 0).long()
    wanted[0, 2] = 1 - wanted[0, 2]
    with pytest.warns(UserWarning, match="the editor is not trained"):
        result = several.edit(x[:1], wanted, guard=None)
    assert result.status == "applied"
    assert result.prediction_after == wanted.tolist()
    assert result.reliability == 1.0
    with pytest.raises(BatchError, match=r"y must be 0 or 1 for each output, of shape \(1, 4\)"):
        several.edit(x[:1], torch.tensor([2]), guard=None)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (images(2), torch.tensor([0, 4]), "y must be class ids from 0 to 3, got 4"),
        (images(2), torch.tensor([-1, 0]), "y must be class ids from 0 to 3, got -1"),
        (
            images(2),
            torch.tensor([0.0, 1.0]),
            r"y must be integer class ids, one an image, of shape \(2,\), got torch.float32",
        ),
        (images(2), F.one_hot(torch.tensor([0, 1]), 4), r"got torch.int64 of shape \(2, 4\)"),
        (images(2), [0, 1], r"got \[0, 1\]"),
        (images(2).fill_(float("nan")), torch.tensor([0, 1]), "x has values that are not finite"),
        (images(2)[0, 0, 0], torch.tensor([0]), "x must be a tensor of images"),
        (images(0), torch.tensor([], dtype=torch.int64), r"x must be a tensor of images \(B, …\), got shape \(0,"),
    ],
)
def test_malformed_edits_change_nothing(x: Any, y: Any, says: str) -> None:
    editor = small_editor()
    editor.fit_statistics([(images(30, 1), labels(30, 1))])
    before, random, own = bits(model_of(editor)), torch.get_rng_state(), bits(editor.networks)
    for call in (editor.propose, editor.edit):
        with pytest.raises(BatchError, match=says):
            call(x, y)
    assert same(bits(model_of(editor)), before)
    assert same(bits(editor.networks), own)
    assert torch.equal(torch.get_rng_state(), random)


def test_settings_that_make_no_sense_are_refused() -> None:
    for options, says in [
        ({"rank": 0}, "rank must be an integer of at least 1"),
        ({"alpha": 0.0}, "alpha must be a finite number above 0"),
        ({"alpha": "large"}, "alpha must be"),
        ({"norm_scope": "image"}, "norm_scope must be one of 'shape', 'layer', 'none'"),
        ({"c_edit": 0.0}, "c_edit must be a finite number above 0"),
        ({"store_rank": 0}, "store_rank must be"),
    ]:
        with pytest.raises(ArgumentError, match=says):
            small_editor(**options)  # type: ignore[arg-type]  # what is refused


# ---- state


def test_a_saved_editor_goes_on_as_if_it_had_not_stopped(tmp_path: Any) -> None:
    def steps(editor: GradientEditor, optimizer: torch.optim.Optimizer, n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad()
            editor.meta_loss(**meta_batch())["loss"].backward()
            optimizer.step()

    whole, first, second = small_editor(), small_editor(), small_editor(seed=9)
    for editor in (whole, first):
        editor.fit_statistics([(images(30, 1), labels(30, 1))])
    optimizer = torch.optim.Adam(whole.parameter_groups())
    steps(whole, optimizer, 6)
    half = torch.optim.Adam(first.parameter_groups())
    steps(first, half, 3)
    torch.save([first.state_dict(), half.state_dict()], tmp_path / "half.pt")
    saved, of_optimizer = torch.load(tmp_path / "half.pt", weights_only=True)
    second.load_state_dict(saved)
    resumed = torch.optim.Adam(second.parameter_groups())
    resumed.load_state_dict(of_optimizer)
    steps(second, resumed, 3)
    assert same(bits(second.networks), bits(whole.networks))


def test_states_that_do_not_fit_change_nothing() -> None:
    editor = small_editor()
    editor.fit_statistics([(images(30, 1), labels(30, 1))])
    state = editor.state_dict()
    fresh = small_editor()
    before = bits(fresh.networks)
    damaged = {**state, "networks": {**state["networks"], "statistics.0.M2": -state["networks"]["statistics.0.M2"]}}
    short = {**state, "networks": {**state["networks"], "steps": torch.ones(2)}}
    for odd, says in [
        ({**state, "format": 2}, "use the clkit release that wrote it"),
        (damaged, "statistics.0.M2 must be"),
        (short, r"steps must be a floating-point tensor of shape \(3,\)"),
        ({**state, "fitted": 1}, "fitted must be False or True"),
        ({**state, "log": 3}, "log must be dict"),
    ]:
        with pytest.raises(StateError, match=says):
            fresh.load_state_dict(odd)
    other = GradientEditor(Small(), ["mix", "fc"], example=images(2))
    with pytest.raises(StateError, match=r"of the layers 'conv' \[3, 9\], 'mix'.*, and this one of 'mix'"):
        other.load_state_dict(state)
    with pytest.raises(StateError, match=r"settings: rank must be 64.*use the settings of the saved editor"):
        small_editor().load_state_dict(small_editor(rank=2).state_dict())
    assert same(bits(fresh.networks), before)
    fresh.load_state_dict(state)
    assert same(bits(fresh.networks), bits(editor.networks))
