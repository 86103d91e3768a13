"""Segmented BatchNorm: against separate calls of an untouched copy of the network, bit for bit, and against NumPy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from clkit.errors import ArgumentError, BatchError, ConfigurationError
from clkit.methods import BatchNormSegments


class Net(nn.Module):
    """BatchNorm over maps, over maps of one pixel and over rows."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, **options), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), BatchNormAct2d(6, **options))
        self.pooled = nn.BatchNorm2d(6, **options)
        self.hidden = nn.Linear(6, 5)
        self.rows = nn.BatchNorm1d(5, **options)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(self.first(images)).mean((2, 3), keepdim=True)
        return self.rows(self.hidden(self.pooled(maps).flatten(1)))


class Patches(nn.Module):
    """Folds the patches of an image into the batch before BatchNorm sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, patches: Tensor) -> Tensor:
        return self.norm(self.embed(patches).flatten(0, 1)).view(len(patches), -1, 6)


def images(rows: int, seed: int = 0, side: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 3, side, side)
    # rows far apart, so that joint statistics would be plainly different ones
    return torch.randn(shape, generator=generator, dtype=dtype) * torch.arange(1.0, rows + 1).view(-1, 1, 1, 1).to(
        dtype
    )


def pair(make: Callable[[], nn.Module], seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Twice the same network in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make().double()
    return network, copy.deepcopy(network)


def separate(network: nn.Module, batch: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.cat([network(part) for part in batch.split(list(sizes)) if len(part)])


def same(one: Tensor, other: Tensor) -> bool:
    """Equal within rounding: a convolution may add in another order for another number of images."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def assert_same_buffers(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, buffer in ours.items():
        assert same(buffer, theirs[name]), name


def assert_like_separate_calls(
    network: nn.Module, plain: nn.Module, batches: Sequence[tuple[Tensor, Sequence[int]]]
) -> None:
    """Outputs and buffers within rounding; gradients of parameters and input to 1e-12 of their largest entry."""
    segments = BatchNormSegments(network)
    for batch, sizes in batches:
        ours, theirs = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        with segments.step(sizes):
            output = network(ours)
        expected = separate(plain, theirs, sizes)
        assert same(output, expected)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        for module, result in ((network, output), (plain, expected)):
            module.zero_grad()
            (weights * result + result**2).sum().backward()
        assert_same_buffers(network, plain)
        grads = [(ours.grad, theirs.grad)]
        grads += [(p.grad, q.grad) for p, q in zip(network.parameters(), plain.parameters(), strict=True)]
        scale = max(float(q.abs().max()) for _, q in grads if q is not None)
        for p, q in grads:
            assert p is not None
            assert q is not None
            assert float((p - q).abs().max()) <= 1e-12 * scale
    segments.close()


# -- equal to separate calls


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.7, "eps": 0.1}, {"track_running_stats": False}, {"affine": False}],
    ids=str,
)
def test_a_network_does_what_separate_calls_do(options: dict[str, Any]) -> None:
    network, plain = pair(lambda: Net(**options))
    sizes = [(5, 3, 2), (2, 8), (4, 0, 3), (6,)]
    assert_like_separate_calls(network, plain, [(images(sum(s), seed), s) for seed, s in enumerate(sizes)])


def test_a_joint_call_is_something_else() -> None:
    network, plain = pair(Net)
    batch = images(8)
    assert not torch.allclose(network(batch), separate(plain, batch, (5, 3)), atol=0.1)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (3,)),
        (nn.BatchNorm1d(3), (3, 4)),
        (nn.BatchNorm2d(3), (3, 4, 2)),
        (nn.BatchNorm3d(3), (3, 2, 2, 2)),
        (BatchNormAct2d(3, act_layer=nn.SiLU), (3, 4, 2)),
        (BatchNormAct2d(3, apply_act=False), (3, 1, 2)),
    ],
    ids=["rows", "sequences", "maps", "volumes", "with activation", "without activation"],
)
def test_each_kind_of_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    network, plain = pair(lambda: nn.Sequential(layer))
    batches = [(torch.randn(9, *shape, dtype=torch.float64) * 3 + 1, s) for s in ((4, 2, 3), (7, 2))]
    assert_like_separate_calls(network, plain, batches)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        pytest.param("resnet18", 32, marks=pytest.mark.slow),
        ("mobilenetv3_small_050", 64),
        pytest.param("efficientnet_b0", 64, marks=pytest.mark.slow),
    ],
)
def test_networks_of_timm(name: str, side: int) -> None:
    """Bitwise layer by layer; the whole only nearly: SiLU and some convolutions round by a row's place in the batch."""
    network, plain = pair(lambda: timm.create_model(name, num_classes=5, drop_rate=0.0))
    layers = {n: m for n, m in plain.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    untouched, sizes, batch = copy.deepcopy(layers), (3, 2, 2), images(7, side=side)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for layer_name in layers:
        network.get_submodule(layer_name).register_forward_hook(
            lambda module, args, output, n=layer_name: seen.update({n: (args[0].detach(), output.detach().clone())})
        )
    segments = BatchNormSegments(network)
    assert segments.count == len(layers) > 10
    with segments.step(sizes):
        output = network(batch)
    for layer_name, (given_rows, made) in seen.items():
        assert same(made, separate(untouched[layer_name], given_rows, sizes)), layer_name
        assert_same_buffers(network.get_submodule(layer_name), untouched[layer_name])
    assert seen.keys() == layers.keys()
    expected = separate(plain, batch, sizes)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-11)
    assert not torch.allclose(expected, copy.deepcopy(plain)(batch), atol=0.01)
    for result in (output, expected):
        result.square().sum().backward()
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)
    for (n, p), (_, q) in zip(network.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11, msg=n)


def test_patches_folded_into_the_batch() -> None:
    network, plain = pair(Patches)
    batch = torch.randn(6, 5, 4, dtype=torch.float64) * torch.arange(1.0, 7).view(-1, 1, 1)
    assert_like_separate_calls(network, plain, [(batch, (1, 3, 2))])


def grouped(sizes: Sequence[int], values: int) -> list[int]:
    """Naive rule: no empty ones; while a part is one value, it goes to the part before it or to the one after."""
    parts = [size for size in sizes if size]
    while len(parts) > 1 and any(part * values == 1 for part in parts):
        at = next(i for i, part in enumerate(parts) if part * values == 1)
        before = max(at - 1, 0)
        parts[before : before + 2] = [parts[before] + parts[before + 1]]
    return parts


def normalised(
    batch: np.ndarray, parts: Sequence[int], momentum: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """From the definition: each part by its own mean and variance, averages updated part by part."""
    mean, variance, counted, out = np.zeros(batch.shape[1]), np.ones(batch.shape[1]), 0, []
    for part in np.split(batch, np.cumsum(parts)[:-1]):
        columns = np.moveaxis(part, 1, 0).reshape(batch.shape[1], -1)
        counted += 1
        share = 1 / counted if momentum is None else momentum
        mean = (1 - share) * mean + share * columns.mean(1)
        variance = (1 - share) * variance + share * columns.var(1, ddof=1)
        centred = np.moveaxis(part, 1, -1) - columns.mean(1)
        out.append(np.moveaxis(centred / np.sqrt(columns.var(1) + 1e-5), -1, 1))
    return np.concatenate(out), mean, variance, counted


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    fold=st.integers(1, 3),
    pixels=st.integers(1, 2),
    momentum=st.sampled_from([None, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_split_is_what_the_definition_says(
    sizes: list[int], fold: int, pixels: int, momentum: float | None, seed: int
) -> None:
    batch = np.random.default_rng(seed).normal(2, 3, (fold * sum(sizes), 2, pixels))
    layer = nn.BatchNorm1d(2, momentum=momentum).double()
    segments = BatchNormSegments(layer)
    with segments.step(sizes):
        output = layer(torch.from_numpy(batch))
    parts = grouped([fold * size for size in sizes], pixels)
    expected, mean, variance, counted = normalised(batch, parts, momentum)
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=0, atol=1e-10)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.running_var.numpy(), variance, rtol=1e-10, atol=1e-12)
    assert layer.num_batches_tracked == counted


# -- a single value has no variance


@pytest.mark.parametrize(
    ("sizes", "joined"),
    [((4, 1, 2), (5, 2)), ((1, 4, 2), (5, 2)), ((1, 1, 4), (2, 4)), ((1, 3, 1), (5,)), ((3, 0, 1), (4,))],
)
def test_a_single_value_is_joined_where_it_is_one(sizes: tuple[int, ...], joined: tuple[int, ...]) -> None:
    for shape, expected in (((2,), joined), ((2, 1, 1), joined), ((2, 2, 1), sizes)):
        layer = nn.BatchNorm1d(2) if len(shape) == 1 else nn.BatchNorm2d(2)
        network, plain = pair(lambda layer=layer: layer)
        batch = torch.randn(sum(sizes), *shape, dtype=torch.float64)
        segments = BatchNormSegments(network)
        with segments.step(sizes):
            assert same(network(batch), separate(plain, batch, expected))
        assert_same_buffers(network, plain)


def test_alone_a_single_value_is_refused_as_ever() -> None:
    network = nn.BatchNorm1d(3)
    segments = BatchNormSegments(network)
    with segments.step([0, 1]), pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.randn(1, 3))


# -- what stays as it was


def test_parameters_optimizer_hooks_and_keys_stay() -> None:
    network, plain = pair(Net)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    seen: list[tuple[int, ...]] = []
    network.get_submodule("first.1").register_forward_hook(lambda module, args, output: seen.append(output.shape))
    modules, kinds = dict(network.named_modules()), {n: type(m) for n, m in network.named_modules()}
    tensors = {name: id(tensor) for name, tensor in network.state_dict(keep_vars=True).items()}
    segments = BatchNormSegments(network)
    for seed in range(3):
        batch = images(7, seed)
        with segments.step((5, 2)):
            network(batch).square().sum().backward()
        separate(plain, batch, (5, 2)).square().sum().backward()
        for one in (optimizer, reference):
            one.step()
            one.zero_grad()
        assert {name: id(t) for name, t in network.state_dict(keep_vars=True).items()} == tensors
    assert seen == [(7, 4, 9, 9)] * 3  # a hook sees the whole batch, once
    assert all(module is modules[name] for name, module in network.named_modules())
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)
    network.load_state_dict(plain.state_dict())
    segments.close()
    segments.close()
    assert {n: type(m) for n, m in network.named_modules()} == kinds
    assert kinds["first.1"] is nn.BatchNorm2d
    assert {name: id(t) for name, t in network.state_dict(keep_vars=True).items()} == tensors


def test_closed_while_a_step_is_open() -> None:
    network, plain = pair(Net)
    segments = BatchNormSegments(network)
    with segments.step((3, 3)):
        segments.close()
        assert torch.equal(network(images(6)), plain(images(6)))
    with pytest.raises(ConfigurationError, match="after close"), segments.step((3, 3)):
        pass


def test_outside_a_step_everything_is_joint() -> None:
    network, plain = pair(Net)
    segments = BatchNormSegments(network)
    with pytest.raises(ZeroDivisionError), segments.step((4, 2)):
        _ = 1 // 0
    assert torch.equal(network(images(6)), plain(images(6)))
    assert_same_buffers(network, plain)


def test_steps_inside_one_another() -> None:
    network, plain = pair(Net)
    segments = BatchNormSegments(network)
    with segments.step((4, 2)):
        with segments.step((2, 3)):
            assert same(network(images(5)), separate(plain, images(5), (2, 3)))
        assert same(network(images(6)), separate(plain, images(6), (4, 2)))


def test_two_networks_at_once() -> None:
    (one, plain_one), (two, plain_two) = pair(Net, 1), pair(Net, 2)
    first, second = BatchNormSegments(one), BatchNormSegments(two)
    with first.step((4, 2)), second.step((2, 2, 2)):
        assert same(one(images(6)), separate(plain_one, images(6), (4, 2)))
        assert same(two(images(6)), separate(plain_two, images(6), (2, 2, 2)))
    with second.step((3, 3)):
        assert torch.equal(one(images(6)), plain_one(images(6)))
    first.close()
    with second.step((3, 3)):
        assert same(two(images(6)), separate(plain_two, images(6), (3, 3)))


@pytest.mark.parametrize("tracked", [True, False])
def test_eval_mode_is_untouched(tracked: bool) -> None:
    network, plain = pair(lambda: Net(track_running_stats=tracked))
    segments = BatchNormSegments(network)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with segments.step((4, 2)):
        assert torch.equal(network.eval()(images(6)), plain.eval()(images(6)))
        assert torch.equal(network(images(7)), plain(images(7)))  # whatever the sizes
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())


def test_a_frozen_layer_is_untouched_beside_others() -> None:
    network, plain = pair(Net)
    for module in (network, plain):
        for name in ("first.1", "second.1"):
            module.get_submodule(name).eval().requires_grad_(False)
    segments = BatchNormSegments(network)
    with segments.step((4, 2)):
        assert same(network(images(6)), separate(plain, images(6), (4, 2)))
    assert_same_buffers(network, plain)
    assert network.get_submodule("first.1").num_batches_tracked == 0
    assert network.get_submodule("pooled").num_batches_tracked == 2


def test_without_batch_norm_nothing_happens() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.0))
    rows = torch.randn(5, 3)
    expected = network(rows)
    segments = BatchNormSegments(network)
    assert segments.count == 0
    with segments.step((2, 1)):
        assert torch.equal(network(rows), expected)
    segments.close()


def test_a_layer_used_twice_counts_once() -> None:
    layer = nn.BatchNorm1d(4)
    segments = BatchNormSegments(nn.Sequential(layer, nn.ReLU(), layer))
    assert segments.count == 1


# -- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_plain_and_its_original_is_not(how: str) -> None:
    network, plain = pair(Net)
    segments = BatchNormSegments(network)
    if how == "deepcopy":
        copied = copy.deepcopy(network)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(network))
    else:
        file = io.BytesIO()
        torch.save(network, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert [type(module) for module in copied.modules()] == [type(module) for module in plain.modules()]
    with segments.step((4, 2)):
        assert torch.equal(copied(images(6)), plain(images(6)))
        assert_same_buffers(copied, plain)
        assert same(network(images(6)), separate(pair(Net)[1], images(6), (4, 2)))
    segments.close()
    assert type(network.get_submodule("first.1")) is nn.BatchNorm2d


def test_a_class_put_on_top_is_not_lost() -> None:
    network, plain = pair(Net)
    segments = BatchNormSegments(network)
    for module in (network, plain):
        parametrize.register_parametrization(module.get_submodule("first.1"), "weight", nn.Softplus())
    with segments.step((4, 2)):
        assert same(network(images(6)), separate(plain, images(6), (4, 2)))
        segments.close()
        assert torch.equal(network(images(6)), plain(images(6)))
    assert parametrize.is_parametrized(network.get_submodule("first.1"))
    assert torch.equal(network(images(6)), plain(images(6)))


# -- refusals


class SyncBatchNorm(nn.BatchNorm2d):
    """Named as the layer of another library, which does not derive from torch's."""


class Grouped(nn.BatchNorm2d):
    process_group = None


@pytest.mark.parametrize("layer", [nn.SyncBatchNorm(3), SyncBatchNormAct(3), SyncBatchNorm(3), Grouped(3)], ids=repr)
def test_synchronised_layers_are_refused_by_name(layer: nn.Module) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(layer))
    with pytest.raises(ConfigurationError, match=rf"'1\.0' is a {type(layer).__name__}, .* all processes"):
        BatchNormSegments(network)
    assert type(network[0]) is nn.BatchNorm2d  # nothing was converted by half


def test_a_lazy_layer_is_refused_until_it_has_seen_a_batch() -> None:
    network = nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d())
    with pytest.raises(ConfigurationError, match="'1' is a LazyBatchNorm1d without parameters"):
        BatchNormSegments(network)
    network(torch.randn(4, 3))
    assert BatchNormSegments(network).count == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*deprecated")
def test_a_scripted_layer_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.BatchNorm2d(4)))
    with pytest.raises(ConfigurationError, match=r"'1' is a BatchNorm2d compiled by TorchScript"):
        BatchNormSegments(network)


def test_a_layer_has_one_owner() -> None:
    network = Net()
    segments = BatchNormSegments(network)
    with pytest.raises(ConfigurationError, match=r"'first\.1' belongs to another"):
        BatchNormSegments(network)
    segments.close()
    assert BatchNormSegments(network).count == 4


@pytest.mark.parametrize("sizes", [(4, 3), (2, 2)])
def test_sizes_that_do_not_add_up(sizes: tuple[int, ...]) -> None:
    network, plain = pair(Net)
    segments = BatchNormSegments(network)
    with segments.step(sizes), pytest.raises(BatchError, match=rf"add up to {sum(sizes)} rows.*6 at layer 'first\.1'"):
        network(images(6))
    assert_same_buffers(network, plain)


def test_a_batch_without_rows_does_not_add_up() -> None:
    network = nn.BatchNorm1d(3)
    segments = BatchNormSegments(network)
    with segments.step((2, 2)), pytest.raises(BatchError, match="4 rows, but the batch has 0"):
        network(torch.empty(0, 3))
    assert network.num_batches_tracked == 0


@pytest.mark.parametrize("sizes", [(3, -1), (2.0, 4), (True, 5), ("2",)])
def test_sizes_that_are_none(sizes: Any) -> None:
    segments = BatchNormSegments(nn.BatchNorm1d(3))
    with pytest.raises(ArgumentError, match="sizes must be whole numbers"), segments.step(sizes):
        pass


@pytest.mark.parametrize("sizes", [(), (0, 0)])
def test_no_rows_at_all(sizes: tuple[int, ...]) -> None:
    segments = BatchNormSegments(nn.BatchNorm1d(3))
    with pytest.raises(ArgumentError, match="at least one row"), segments.step(sizes):
        pass


# -- with other parts of torch


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Short(nn.Module):
    """Little to trace: one BatchNorm over maps and one over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.maps = nn.Conv2d(3, 4, 3), BatchNormAct2d(4)
        self.rows = nn.BatchNorm1d(4)

    def forward(self, batch: Tensor) -> Tensor:
        return self.rows(self.maps(self.conv(batch)).mean((2, 3)))

    def in_parts(self, batch: Tensor, sizes: Sequence[int], joined: Sequence[int]) -> Tensor:
        """What step(sizes) must do where a single row is joined to its neighbour in the second layer."""
        maps = [self.maps(self.conv(part)).mean((2, 3)) for part in batch.split(list(sizes))]
        return torch.cat([self.rows(part) for part in torch.cat(maps).split(list(joined))])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_it_is_one_graph_for_each_tuple_of_sizes(backend: str) -> None:
    network, plain = pair(Short)
    assert isinstance(plain, Short)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    assert torch.equal(compiled(images(6)), plain(images(6)))  # compiled before the layers are converted
    graphs_before = counter.frame_count
    segments = BatchNormSegments(network)
    # the first rule, the later rule, a ragged last batch whose second segment is a single row
    tuples = [((6, 2), (6, 2)), ((8, 3, 4), (8, 3, 4)), ((4, 1, 3), (5, 3))]
    for turn in range(2):
        for sizes, joined in tuples:
            batch = images(sum(sizes), turn)
            with segments.step(sizes):
                output = compiled(batch)
            expected = plain.in_parts(batch, sizes, joined)
            assert same(output, expected)
            output.square().sum().backward()
            expected.square().sum().backward()
            assert_same_buffers(network, plain)
    assert counter.frame_count - graphs_before == 3
    assert not torch._dynamo.utils.counters["graph_break"]
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    segments.close()
    assert torch.equal(compiled(images(6)), plain(images(6)))


def test_autocast() -> None:
    network, plain = (module.float() for module in pair(Net))
    batch = images(8, dtype=torch.float32)
    segments = BatchNormSegments(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with segments.step((5, 3)):
            output = network(batch)
        expected = separate(plain, batch, (5, 3))
    assert output.dtype == expected.dtype == torch.bfloat16
    assert same(output, expected)
    output.float().square().sum().backward()
    assert_same_buffers(network, plain)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_channels_last_is_kept() -> None:
    layer = nn.BatchNorm2d(3)
    segments = BatchNormSegments(layer)
    with segments.step((4, 2)):
        output = layer(images(6, dtype=torch.float32).to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_checkpointed_activations_with_the_step_open_until_backward() -> None:
    network, plain = pair(Net)
    segments = BatchNormSegments(network)
    with segments.step((4, 2)):
        checkpoint(network, images(6), use_reentrant=False).square().sum().backward()
    separate(plain, images(6), (4, 2)).square().sum().backward()
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("converted_first", [True, False])
def test_distributed_data_parallel(tmp_path: Path, converted_first: bool) -> None:
    network, plain = pair(Net)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        segments = BatchNormSegments(network) if converted_first else None
        wrapped = DistributedDataParallel(network)
        segments = segments or BatchNormSegments(wrapped)
        for seed in range(2):
            with segments.step((4, 2)):
                output = wrapped(images(6, seed))
            output.square().sum().backward()
            expected = separate(plain, images(6, seed), (4, 2))
            expected.square().sum().backward()
            assert same(output, expected)
            assert_same_buffers(network, plain)
    finally:
        dist.destroy_process_group()
    for p, q in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
