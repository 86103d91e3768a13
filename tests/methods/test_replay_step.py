"""Whole steps of the replay family against the equations, written as loops with separate calls of the network."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clkit.errors import ArgumentError
from clkit.methods import BatchNormSegments, MemoryRows, MixedBatch, OnProLosses, Projector
from clkit.methods.replay.step import Block, StepBatch, StepOutputs, StepViews, arrange, total_loss
from clkit.strategies import DERPPStrategy, ERACEStrategy, ERStrategy, ReplayStrategy, SCRStrategy

CLASSES, WIDTH, DIM = 7, 6, 4
OFFSET_SEED = 5
NO_ROWS = MemoryRows(*[torch.empty(0)] * 5, extras={})  # no method reads them here


class Net(nn.Module):
    """A convolution, a BatchNorm (so that separate calls matter), six features and a classifier; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.hidden = nn.Linear(48, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.calls = 0
        self.double()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        features = self.hidden(torch.tanh(self.norm(self.conv(images))).flatten(1)).tanh()
        return features, self.head(features)


def networks(seed: int = 0) -> tuple[Net, Projector]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(), Projector(WIDTH, DIM, seed=seed).double()


def drawn_images(n: int, seed: int) -> Tensor:
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def transform(images: Tensor, positions: Tensor, total: int) -> Tensor:
    """Changes each image by itself, always in the same way."""
    assert len(positions) == len(images)
    return (1.3 * images).sin() + 0.2 * images.flip(3)


@dataclass(frozen=True)
class Given:
    """What a step is given: incoming x, y; sample u, v; replay batch w with labels a, b and the share of b."""

    x: Tensor = field(default_factory=lambda: drawn_images(3, 1))
    y: list[int] = field(default_factory=lambda: [4, 1, 4])
    u: Tensor | None = field(default_factory=lambda: drawn_images(4, 2))
    v: list[int] = field(default_factory=lambda: [0, 1, 0, 2])
    w: Tensor | None = field(default_factory=lambda: drawn_images(7, 3))
    a: list[int] = field(default_factory=lambda: [0, 1, 2, 2, 0, 1, 2])
    b: list[int] = field(default_factory=lambda: [1, 1, 0, 0, 2, 1, 2])
    share: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.0, 0.55, 1.0, 0.0, 0.7])
    second: Tensor = field(default_factory=lambda: drawn_images(4, 4))
    second_labels: list[int] = field(default_factory=lambda: [2, 0, 0, 1])
    logits: Tensor = field(default_factory=lambda: drawn_images(1, 5).flatten()[: 4 * CLASSES].reshape(4, CLASSES))

    def segments(self, method: Any, *, first: bool) -> list[dict[str, Block]]:
        """The blocks of a method for this step."""
        new = Block.whole(self.x, torch.tensor(self.y, dtype=torch.int64))
        seen = None if self.u is None else Block.whole(self.u, torch.tensor(self.v))
        if isinstance(method, OnProLosses):
            mixed = None
            if self.w is not None and not first and method.replays:
                ids = torch.tensor(self.a), torch.tensor(self.b)
                batch = MixedBatch(self.w, *ids, torch.tensor(self.share, dtype=torch.float64))
                mixed = Block.whole(self.w, batch.labels)
            return method.views(new, seen, mixed, CLASSES, first=first)
        if seen is None:
            none = torch.empty(0, dtype=torch.int64)
            nothing = Block.whole(self.x[:0], none)
            method.drawn = lambda *_: (None, nothing)
            return list(method.views(StepBatch(new, nothing, 0, NO_ROWS, {"logits": torch.empty(0)})))
        method.drawn = lambda *_: (None, Block.whole(self.second, torch.tensor(self.second_labels)))
        return list(method.views(StepBatch(new, seen, len(seen.images), NO_ROWS, {"logits": self.logits})))


def pure(given: Given) -> Given:
    """The replay batch of the first batch of an experience: the sample itself."""
    return replace(given, w=given.u, a=given.v, b=given.v, share=[0.0] * len(given.v))


# -- the equations, as loops


def turned(image: np.ndarray, rotation: str) -> list[np.ndarray]:
    if rotation == "none":
        return [image]
    if rotation == "rot4":
        return [np.rot90(image, k, (1, 2)) for k in range(4)]
    half = image.shape[2] // 2
    left, right = image[:, :, :half], image[:, :, half:]
    left180, right180 = np.rot90(left, 2, (1, 2)), np.rot90(right, 2, (1, 2))
    halves = [(left, right), (left180, right), (left180, right180), (left, right180)]
    whole = [np.concatenate(pair, axis=2) for pair in halves]
    return [np.rot90(image, k, (1, 2)) for k in (0, 2, 1, 3) for image in whole]


def naive_rotated(images: Tensor, rotation: str) -> list[np.ndarray]:
    """Variant after variant, each of all images."""
    each = [turned(image, rotation) for image in images.numpy()]
    return [variants[k] for k in range(len(each[0])) for variants in each]


def naive_augmented(images: Any) -> list[np.ndarray]:
    return [np.sin(1.3 * np.asarray(image)) + 0.2 * np.asarray(image)[:, :, ::-1] for image in images]


class Naive:
    """The naive run: a network that is called once for each group of images, and loops."""

    def __init__(self, net: Net, projector: Projector) -> None:
        self.net, self.projector = net, projector

    def call(self, *blocks: Any) -> list[tuple[Tensor, Tensor]]:
        """Features and logits of each block, from one call of the network on all of them."""
        images = [np.ascontiguousarray(image) for block in blocks for image in block]
        features, logits = self.net(torch.from_numpy(np.stack(images)))
        sizes = [len(block) for block in blocks]
        return list(zip(features.split(sizes), logits.split(sizes), strict=True))

    def embedded(self, features: Tensor) -> list[Tensor]:
        """Unit rows."""
        layer = self.projector.layers[0]
        rows = [layer.weight @ row + layer.bias for row in features]
        return [row / (row * row).sum().sqrt() for row in rows]


def naive_cross_entropy(logits: Tensor, label: int, outputs: list[int] | None = None) -> Tensor:
    among = range(len(logits)) if outputs is None else outputs
    return sum((logits[c].exp() for c in among), torch.zeros(())).log() - logits[label]


def naive_mean(values: list[Tensor]) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64)) / len(values)


def naive_prototypes(one: list[Tensor], two: list[Tensor], labels: list[int], tau: float) -> tuple[Tensor, Any]:
    classes = sorted(set(labels))
    means: list[Tensor] = []
    for view in (one, two):
        for c in classes:
            means.append(naive_mean([row for row, label in zip(view, labels, strict=True) if label == c]))
    units = [mean / (mean * mean).sum().sqrt() for mean in means]
    k = len(classes)
    losses = []
    for i in range(2 * k):
        others = sum(((units[i] @ units[j] / tau).exp() for j in range(2 * k) if j != i), torch.zeros(()))
        losses.append(others.log() - units[i] @ units[(i + k) % (2 * k)] / tau)
    return naive_mean(losses), {c: (means[i] + means[i + k]) / 2 for i, c in enumerate(classes)}


def naive_instances(
    z: list[Tensor], features: Tensor, labels: list[Any], *, new: bool, offset: int, tau: float, s: float
) -> Tensor:
    n, epsilon = len(labels), 1e-8
    labels = [*labels, *labels]
    rows = torch.stack(z)
    sliced = torch.stack([f / (f * f).sum().sqrt() for f in features])[:, offset : offset + DIM]
    partner, same = [], torch.zeros((), dtype=torch.float64)
    for i in range(2 * n):
        a = s * (sliced @ z[i] + rows @ z[i])
        e = ((a - a.max().detach()) / tau).exp()
        if new:
            e = torch.cat([e[:i], torch.zeros(1, dtype=torch.float64), e[i + 1 :]])
        cost = -(e / (e.sum() + epsilon) + epsilon).log()
        positives = [j for j in range(2 * n) if labels[j] == labels[i]]
        for j in positives:
            same = same + cost[j] / (len(positives) + epsilon) / (2 * n)
        partner.append(cost[(i + n) % (2 * n)])
    return naive_mean(partner) + 2 * same if new else same


def naive_mixed(logits: Tensor, given: Given) -> list[Tensor]:
    return [
        (1 - share) * naive_cross_entropy(row, a) + share * naive_cross_entropy(row, b)
        for row, a, b, share in zip(logits, given.a, given.b, given.share, strict=True)
    ]


Terms = dict[str, Tensor]


def naive_onpro(run: Naive, given: Given, first: bool, options: dict[str, Any]) -> tuple[Terms, Any]:
    """One step: three calls of the network."""
    rotation, s = options.get("rotation", "rot16"), 1.0 if first else options.get("similarity_scale", 1.0)
    offsets = torch.Generator().manual_seed(OFFSET_SEED)  # one draw a pair of blocks, uniform below D - p
    offset = [int(torch.randint(WIDTH - DIM, (), generator=offsets)) for _ in range(2)]
    n1 = naive_rotated(given.x, rotation)
    variants, n = len(n1) // len(given.x), len(given.x)
    terms: Terms = {}
    blocks: list[Any] = [n1, naive_augmented(n1)]
    if not first:
        assert given.w is not None
        r1 = naive_rotated(given.w, rotation)
        blocks += [r1, naive_augmented(r1)]
    rotated = run.call(*blocks)
    seen = None if given.u is None else [given.u.numpy(), naive_augmented(given.u)]
    if first:  # in the order of the calls, in which BatchNorm follows them
        prototypes = run.call(*seen) if seen else None
        ((_, logits),) = run.call(naive_augmented(given.x))
        terms["ce_new"] = naive_mean([naive_cross_entropy(r, c) for r, c in zip(logits, given.y, strict=True)])
    else:
        ((_, logits),) = run.call(naive_augmented(given.w))
        assert seen is not None
        prototypes = run.call(*seen)
        terms["ce_mem"] = naive_mean(naive_mixed(logits, given))
    for i, name in enumerate(["new"] if first else ["new", "mem"]):
        (f1, _), (f2, _) = rotated[2 * i : 2 * i + 2]
        z = run.embedded(f1) + run.embedded(f2)
        if name == "new":
            labels: list[Any] = [(c, k) for k in range(variants) for c in given.y]
            terms["ope_new"], _ = naive_prototypes(z[:n], z[len(f1) : len(f1) + n], given.y, 0.5)
        else:  # a row of two classes is like no other row
            labels = [
                (f"row {j}" if a != b and share > 0 else a, k)
                for k in range(variants)
                for j, (a, b, share) in enumerate(zip(given.a, given.b, given.share, strict=True))
            ]
        f = torch.cat([f1, f2])
        terms[f"instance_{name}"] = naive_instances(z, f, labels, new=name == "new", offset=offset[i], tau=0.07, s=s)
    means = None
    if prototypes is not None:
        one, two = (run.embedded(f) for f, _ in prototypes)
        terms["ope_seen"], means = naive_prototypes(one, two, given.v, 0.5)
    return terms, means


def naive_er(run: Naive, given: Given, first: bool, options: dict[str, Any]) -> tuple[Terms, Any]:
    """One mean over the joint batch."""
    x = naive_augmented(given.x)
    if given.u is None:
        ((_, logits),) = run.call(x)
        return {"ce": naive_mean([naive_cross_entropy(r, c) for r, c in zip(logits, given.y, strict=True)])}, None
    (_, new), (_, old) = run.call(x, naive_augmented(given.u))
    rows = zip([*new, *old], [*given.y, *given.v], strict=True)
    return {"ce": naive_mean([naive_cross_entropy(row, c) for row, c in rows])}, None


def naive_er_ace(run: Naive, given: Given, first: bool, options: dict[str, Any]) -> tuple[Terms, Any]:
    """The incoming loss knows only the classes of the batch; a sum of two means."""
    x, present = naive_augmented(given.x), sorted(set(given.y))
    outputs = run.call(x) if given.u is None else run.call(x, naive_augmented(given.u))
    terms = {
        "ce_new": naive_mean(
            [naive_cross_entropy(r, c, present) for r, c in zip(outputs[0][1], given.y, strict=True)],
        )
    }
    if given.u is not None:
        old = outputs[1][1]
        terms["ce_mem"] = naive_mean([naive_cross_entropy(r, c) for r, c in zip(old, given.v, strict=True)])
    return terms, None


def naive_der(run: Naive, given: Given, first: bool, options: dict[str, Any]) -> tuple[Terms, Any]:
    """Cross-entropy, the squared distance to stored logits, and cross-entropy on a second sample."""
    ((_, new),) = run.call(naive_augmented(given.x))
    terms = {"ce_new": naive_mean([naive_cross_entropy(r, c) for r, c in zip(new, given.y, strict=True)])}
    if given.u is not None:
        ((_, now),) = run.call(naive_augmented(given.u))
        squares = [(now[i, c] - given.logits[i, c]) ** 2 for i in range(len(now)) for c in range(CLASSES)]
        terms["logit"] = naive_mean(squares)
        ((_, more),) = run.call(naive_augmented(given.second))
        labels = given.second_labels
        terms["logit_ce"] = naive_mean([naive_cross_entropy(r, c) for r, c in zip(more, labels, strict=True)])
    return terms, None


def naive_scr(run: Naive, given: Given, first: bool, options: dict[str, Any]) -> tuple[Terms, Any]:
    """Supervised contrast of all images with one augmented view of each."""
    images, labels = list(given.x), list(given.y)
    if given.u is not None:
        images, labels = images + list(given.u), labels + given.v
    ((one, _),) = run.call([image.numpy() for image in images])
    ((two, _),) = run.call(naive_augmented(images))
    z, labels = run.embedded(one) + run.embedded(two), labels + labels
    costs = []
    for i in range(len(z)):
        total = sum(((z[i] @ z[j] / 0.07).exp() for j in range(len(z)) if j != i), torch.zeros(()))
        positives = [j for j in range(len(z)) if j != i and labels[j] == labels[i]]
        costs.append(naive_mean([total.log() - z[i] @ z[j] / 0.07 for j in positives]))
    return {"contrast": naive_mean(costs)}, None


# -- the same by the library


@dataclass(frozen=True)
class Losses:
    """What a step gave."""

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    prototypes: Any


def losses_of(method: Any, outputs: StepOutputs, generator: torch.Generator, *, first: bool) -> Losses:
    prototypes = None
    if isinstance(method, OnProLosses):
        terms, prototypes = method.losses(outputs, generator, first=first)
    else:
        terms = dict(method.terms(outputs))
    total = total_loss(terms, outputs)
    kept = {name: term.detach() for name, (_, term) in terms.items()}
    return Losses(total, kept, {name: weight for name, (weight, _) in terms.items()}, prototypes)


def run_step(
    method: Any, given: Given, net: Net, projector: Projector, *, first: bool = False, number: int = OFFSET_SEED
) -> tuple[StepViews, StepOutputs, Losses]:
    """One forward call, segment by segment in BatchNorm."""
    views = arrange(given.segments(method, first=first), transform, given.x)
    segments = BatchNormSegments(net)
    with segments.step(views.segments):
        features, logits = net(views.images)
    segments.close()
    embeds = method.embeds if isinstance(method, OnProLosses) else method.projection is not None
    outputs = StepOutputs(views, logits, features, projector(features) if embeds else None)
    return views, outputs, losses_of(method, outputs, torch.Generator().manual_seed(number), first=first)


def der() -> ReplayStrategy:
    return DERPPStrategy(alpha=0.3, beta=0.8)


EMPTY = Given(u=None, w=None)
OWN: dict[str, tuple[Any, dict[str, Any], Given, bool]] = {  # of OnPro: options, step, whether the first experience
    "first batch": ({}, EMPTY, True),
    "first": ({"similarity_scale": 0.5}, Given(), True),
    "later": ({"similarity_scale": 0.5}, Given(), False),
    "later pure": ({"rotation": "rot4"}, pure(Given()), False),
    "rot4 first": ({"rotation": "rot4", "similarity_scale": 0.5}, Given(), True),
    "none later": ({"rotation": "none", "similarity_scale": 2}, Given(), False),
    "one image": ({"rotation": "rot4"}, Given(x=drawn_images(1, 9), y=[6]), False),
    "one class": ({"rotation": "rot4"}, Given(y=[3, 3, 3], v=[5, 5, 5, 5]), False),
    "gaps": ({"rotation": "rot4"}, Given(y=[6, 0, 6], v=[6, 2, 6, 0]), False),
}
STEPS: dict[str, tuple[Any, Callable[[], Any], Given]] = {
    "er first batch": (naive_er, ERStrategy, EMPTY),
    "er": (naive_er, ERStrategy, pure(Given())),
    "er-ace first batch": (naive_er_ace, ERACEStrategy, EMPTY),
    "er-ace": (naive_er_ace, ERACEStrategy, pure(Given())),
    "er-ace one class": (naive_er_ace, ERACEStrategy, replace(pure(Given()), y=[3, 3, 3])),
    "der++ first batch": (naive_der, der, EMPTY),
    "der++": (naive_der, der, Given()),
    "scr first batch": (naive_scr, SCRStrategy, EMPTY),
    "scr": (naive_scr, SCRStrategy, Given()),
}


@pytest.mark.parametrize("name", OWN)
def test_a_step_of_onpro_is_its_equations_with_separate_calls_of_the_network(name: str) -> None:
    options, given, first = OWN[name]
    check_step(naive_onpro, OnProLosses(**options), given, first, options)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_its_equations_with_separate_calls_of_the_network(name: str) -> None:
    equations, make, given = STEPS[name]
    check_step(equations, make(), given, given.u is None, {})


def check_step(equations: Any, method: Any, given: Given, first: bool, options: dict[str, Any]) -> None:
    net, projector = networks()
    views, _, losses = run_step(method, given, net, projector, first=first)
    losses.total.backward()

    naive = Naive(*networks())
    terms, means = equations(naive, given, first, options)
    expected_weights = {"logit": 0.3, "logit_ce": 0.8}
    total = sum(expected_weights.get(term, 1.0) * value for term, value in terms.items())
    total.backward()

    for term, value in terms.items():
        assert losses.terms[term].item() == pytest.approx(value.item(), rel=1e-10, abs=1e-12), term
    for term in losses.terms.keys() - terms.keys():  # of the replay, where there is none yet
        assert given.u is None
        assert losses.terms[term].item() == 0.0
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-10)
    own = {**dict(net.named_parameters()), **dict(projector.named_parameters())}
    other = {**dict(naive.net.named_parameters()), **dict(naive.projector.named_parameters())}
    for key, parameter in other.items():
        zero = torch.zeros_like(parameter)
        expected = zero if parameter.grad is None else parameter.grad
        found = own[key].grad
        assert torch.allclose(zero if found is None else found, expected, rtol=1e-8, atol=1e-11), key
    # one call, which BatchNorm has seen as several
    assert net.calls == 1
    assert naive.net.calls == len(views.segments)
    for key, buffer in naive.net.norm.named_buffers():
        assert torch.allclose(net.norm.get_buffer(key).double(), buffer.double(), rtol=1e-12), key
    assert (losses.prototypes is None) == (means is None)
    if means is not None:
        assert losses.prototypes.ids.tolist() == sorted(means)
        expected = torch.stack([means[c] for c in sorted(means)])
        assert torch.allclose(losses.prototypes.means, expected, rtol=1e-10)
        assert not losses.prototypes.means.requires_grad


def test_weights_multiply_their_terms_and_nothing_else() -> None:
    given = Given()
    base = run_step(OnProLosses(rotation="none"), given, *networks())[2]
    for name in ("ce_mem", "instance_new", "instance_mem", "ope_new", "ope_seen"):
        losses = run_step(OnProLosses(rotation="none", **{name: 3.0}), given, *networks())[2]
        assert losses.terms == base.terms
        assert losses.total.item() == pytest.approx(base.total.item() + 2 * base.terms[name].item(), rel=1e-12)


def test_incoming_cross_entropy_can_be_added_to_onpro() -> None:
    given = pure(Given())
    views, outputs, losses = run_step(OnProLosses(rotation="none", ce_new=0.7), given, *networks())
    assert views.segments == [2 * 3 + 2 * 4, 3 + 4, 2 * 4]  # T(x) and the replay batch are normalised together
    assert torch.allclose(views.images[views.rows["ce_new"]], transform(given.x, torch.arange(3), 3))
    rows = zip(outputs.logits("ce_new"), given.y, strict=True)
    expected = naive_mean([naive_cross_entropy(row, c) for row, c in rows])
    assert losses.terms["ce_new"].item() == pytest.approx(expected.item(), rel=1e-12)
    others = sum(value for name, value in losses.terms.items() if name != "ce_new")
    assert losses.total.item() == pytest.approx((others + 0.7 * expected).item(), rel=1e-12)


def test_the_masked_loss_has_no_gradient_at_absent_classes() -> None:
    net, projector = networks()
    run_step(ERACEStrategy(), EMPTY, net, projector, first=True)[2].total.backward()
    assert net.head.bias.grad is not None
    assert net.head.bias.grad.nonzero().flatten().tolist() == [1, 4]


def test_similarity_is_scaled_after_the_first_experience_only() -> None:
    for first in (True, False):
        terms = [
            run_step(OnProLosses(rotation="none", similarity_scale=scale), Given(), *networks(), first=first)[2].terms
            for scale in (1.0, 0.5)
        ]
        assert (terms[0]["instance_new"] == terms[1]["instance_new"]) == first
        assert terms[0]["ope_seen"] == terms[1]["ope_seen"]


# -- blocks


def counted(method: Any, *, first: bool, new: int = 10, replayed: int = 64, stored: bool = True) -> StepViews:
    """The views of a step of the published size."""
    images = torch.zeros(max(new, replayed), 1, 4, 4)
    labels = [0] * replayed
    given = Given(
        x=images[:new],
        y=[0] * new,
        u=images[:replayed] if stored else None,
        v=labels,
        w=images[:replayed],
        a=labels,
        b=labels,
        share=[0.0] * replayed,
        second=images[:replayed],
        second_labels=labels,
        logits=torch.zeros(replayed, CLASSES),
    )
    return arrange(given.segments(method, first=first), transform)


def test_images_of_a_later_step() -> None:
    for rotation, images in (("rot16", 2560), ("rot4", 784), ("none", 340)):
        rule = OnProLosses(rotation=rotation)
        assert rule.images(new=10, replayed=64) == len(counted(rule, first=False).images) == images
    for method, images in ((ERStrategy(), 74), (ERACEStrategy(), 74), (der(), 138), (SCRStrategy(), 148)):
        assert len(counted(method, first=False).images) == images


def test_images_of_first_steps_and_without_a_memory() -> None:
    assert counted(OnProLosses(), first=True).segments == [320, 128, 10]
    assert counted(OnProLosses(), first=True, stored=False).segments == [320, 10]
    assert counted(ERStrategy(), first=True, stored=False).segments == [10]


def test_blocks_are_in_the_order_of_the_method() -> None:
    given, rule = Given(), OnProLosses(rotation="rot4")  # 3 incoming, 4 sampled, 7 replayed
    later = arrange(given.segments(rule, first=False), transform, given.x)
    assert later.segments == [2 * 12 + 2 * 28, 7, 8]
    assert {name: (at.start, at.stop) for name, at in later.rows.items()} == {
        "upright1": (0, 3),
        "turned1": (3, 12),
        "upright2": (12, 15),
        "turned2": (15, 24),
        "mem1": (24, 52),
        "mem2": (52, 80),
        "ce_mem": (80, 87),
        "seen1": (87, 91),
        "seen2": (91, 95),
    }
    assert later.stream == slice(0, 3)
    first = arrange(given.segments(rule, first=True), transform, given.x)
    assert first.segments == [24, 8, 3]
    assert [*first.rows][4:] == ["seen1", "seen2", "ce_new"]
    assert given.w is not None
    assert given.u is not None
    at = later.rows
    assert torch.equal(later.images[at["upright1"]], given.x)  # as they came
    assert torch.equal(later.images[at["seen1"]], given.u)  # as they are stored, not mixed
    assert torch.equal(later.images[at["seen2"]], transform(given.u, torch.arange(4), 4))
    assert torch.equal(later.images[at["ce_mem"]], transform(given.w, torch.arange(7), 7))
    rotated = torch.from_numpy(np.stack(naive_rotated(given.w, "rot4")))
    assert torch.equal(later.images[at["mem1"]], rotated)
    assert torch.equal(later.images[at["mem2"]], transform(rotated, torch.arange(28), 28))  # turned, then augmented


SWITCHES = ["ce_new", "ce_mem", "instance_new", "instance_mem", "ope_new", "ope_seen"]


@settings(max_examples=30, deadline=None)
@example(on={"ce_new", "ce_mem"}, rotation="rot16")  # one segment
@given(on=st.sets(st.sampled_from(SWITCHES), min_size=1), rotation=st.sampled_from(["rot16", "rot4", "none"]))
def test_what_the_losses_say_of_themselves_holds_for_any_weights(on: set[str], rotation: str) -> None:
    if not on & {"ce_new", "ce_mem", "instance_new", "ope_new"}:
        on.add("ce_new")  # as they ask for
    rule = OnProLosses(rotation=rotation, **{name: float(name in on) for name in SWITCHES})
    assert OnProLosses(**rule.settings()) == rule
    later, first = counted(rule, first=False, new=2, replayed=3), counted(rule, first=True, new=2, replayed=3)
    for views in (later, first):
        assert sum(views.segments) == len(views.images)
        ends = [(at.start, at.stop) for at in views.rows.values()]
        assert [start for start, _ in ends] == [0, *[stop for _, stop in ends[:-1]]]  # no gap, no overlap
    assert len(later.images) == rule.images(2, 3)
    assert rule.segmented == (max(len(later.segments), len(first.segments)) > 1)
    names = {name.rstrip("12") for name in later.rows}
    assert rule.embeds == bool(names & {"upright", "mem", "seen"})
    assert rule.replays == bool(names & {"mem", "ce_mem"})


# -- variants and mixed images


# -- invariants

ids_st = st.integers(0, CLASSES - 1)


@st.composite
def drawn_steps(draw: Callable[[Any], Any]) -> tuple[Given, int]:
    n, m, replayed = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def labels(size: int) -> Any:
        return draw(st.lists(ids_st, min_size=size, max_size=size))

    seed = draw(st.integers(0, 100))
    shares = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=replayed, max_size=replayed))
    given = Given(
        x=drawn_images(n, 10 * seed),
        y=labels(n),
        u=drawn_images(m, 10 * seed + 1),
        v=labels(m),
        w=drawn_images(replayed, 10 * seed + 2),
        a=labels(replayed),
        b=labels(replayed),
        share=shares,
        second=drawn_images(2, 10 * seed + 3),
        second_labels=labels(2),
        logits=torch.zeros(m, CLASSES, dtype=torch.float64),
    )
    return given, seed


EVERYTHING = {"rotation": "rot4", "ce_new": 1}


@settings(max_examples=25, deadline=None)
@given(step=drawn_steps(), first=st.booleans(), names=st.permutations(range(CLASSES)), data=st.data())
def test_neither_the_order_of_images_nor_the_names_of_classes_change_a_loss(
    step: tuple[Given, int], first: bool, names: list[int], data: Any
) -> None:
    given, _ = step
    assert given.u is not None
    assert given.w is not None
    one, two, three = (data.draw(st.permutations(range(len(rows)))) for rows in (given.x, given.u, given.w))
    other = replace(
        given,
        x=given.x[one],
        y=[names[given.y[i]] for i in one],
        u=given.u[two],
        v=[names[given.v[i]] for i in two],
        w=given.w[three],
        a=[names[given.a[i]] for i in three],
        b=[names[given.b[i]] for i in three],
        share=[given.share[i] for i in three],
    )
    rule = OnProLosses(**EVERYTHING)
    net, projector = networks()
    renamed = copy.deepcopy(net)
    with torch.no_grad():  # the classifier knows them by their new names; contrasts do not look at it
        renamed.head.weight[list(names)] = net.head.weight
        renamed.head.bias[list(names)] = net.head.bias
    terms = run_step(rule, given, net, projector, first=first)[2].terms
    changed = run_step(rule, other, renamed, projector, first=first)[2].terms
    for name, value in terms.items():
        assert value.item() == pytest.approx(changed[name].item(), rel=1e-9, abs=1e-10), name


def test_two_halves_have_the_views_and_ids_of_the_whole() -> None:
    def placed(images: Tensor, positions: Tensor, total: int) -> Tensor:
        assert int(positions.max()) < total
        assert len(positions.unique()) == len(positions)
        return images + 10 * positions[:, None, None, None]

    def half(part: Block, rank: int) -> Block:
        return Block(part.images[rank::2], part.labels[rank::2], torch.arange(rank, part.total, 2), part.total)

    given, rule = Given(u=drawn_images(5, 2), v=[0, 1, 0, 2, 2]), OnProLosses(**EVERYTHING)
    whole = arrange(given.segments(rule, first=False), placed)
    assert given.u is not None
    assert given.w is not None
    share = torch.tensor(given.share, dtype=torch.float64)
    mixed = MixedBatch(given.w, torch.tensor(given.a), torch.tensor(given.b), share)
    parts = (given.x, torch.tensor(given.y)), (given.u, torch.tensor(given.v)), (given.w, mixed.labels)
    for rank in range(2):
        mine = [half(Block.whole(*part), rank) for part in parts]
        views = arrange(rule.views(*mine, CLASSES, first=False), placed)
        for name in whole.rows:
            variants = {"turned": 3, "mem": 4}.get(name.rstrip("12"), 1)
            block = whole.images[whole.rows[name]].unflatten(0, (variants, -1))[:, rank::2].flatten(0, 1)
            assert torch.equal(views.images[views.rows[name]], block), name
            labels = whole.labels[name].unflatten(0, (variants, -1))[:, rank::2].flatten(0, 1)
            assert torch.equal(views.labels[name], labels), name


def test_all_views_are_augmented_in_one_call() -> None:
    calls: list[tuple[int, list[int], int]] = []

    def counting(images: Tensor, positions: Tensor, total: int) -> Tensor:
        calls.append((len(images), positions.tolist(), total))
        return images

    arrange(Given().segments(OnProLosses(**EVERYTHING), first=False), counting)
    total = 4 * 3 + 4 * 7 + 3 + 7 + 4
    assert calls == [(total, list(range(total)), total)]


@pytest.mark.parametrize(
    "method", [OnProLosses(rotation="none"), ERStrategy(), SCRStrategy()], ids=["onpro", "er", "scr"]
)
def test_a_transform_in_place_changes_no_image_that_is_kept(method: Any) -> None:
    for step, first in ((EMPTY, True), (Given(), False)):
        views = arrange(step.segments(method, first=first), lambda images, *_: images.zero_())
        assert torch.equal(step.x, drawn_images(3, 1))
        assert step.u is None or torch.equal(step.u, drawn_images(4, 2))
        for name in {"upright1", "seen1", "new1", "memory1"} & set(views.rows):
            rows = views.images[views.rows[name]]
            assert not len(rows) or rows.any()


# -- edges


def test_one_image_has_no_prototype_loss_and_the_rest_trains() -> None:
    given = Given(x=drawn_images(1, 1), y=[6])
    for first in (True, False):
        net, projector = networks()
        losses = run_step(OnProLosses(rotation="rot4"), given, net, projector, first=first)[2]
        losses.total.backward()
        assert losses.terms["ope_new"].item() == 0.0
        for parameter in [*net.parameters(), *projector.parameters()]:
            assert parameter.grad is not None
            assert bool(parameter.grad.isfinite().all())
            assert bool(parameter.grad.any())


@pytest.mark.parametrize(
    "make",
    [lambda: OnProLosses(rotation="rot4"), ERStrategy, ERACEStrategy, der, SCRStrategy],
    ids=["onpro", "er", "er-ace", "der++", "scr"],
)
def test_no_incoming_rows_leave_the_replay(make: Callable[[], Any]) -> None:
    given = replace(pure(Given()), x=drawn_images(0, 1), y=[])
    net, projector = networks()
    _, _, losses = run_step(make(), given, net, projector)
    losses.total.backward()
    assert bool(torch.isfinite(losses.total))
    assert net.hidden.weight.grad is not None
    assert bool(net.hidden.weight.grad.isfinite().all())
    for name in ("instance_new", "ope_new", "ce_new"):
        assert losses.terms.get(name, torch.zeros(())).item() == 0.0


def test_no_rows_at_all_are_a_zero_with_a_graph() -> None:
    rule = OnProLosses(rotation="rot4")
    views = arrange(replace(EMPTY, x=drawn_images(0, 1), y=[]).segments(rule, first=True), transform)
    assert views.segments == []
    logits = torch.zeros(0, CLASSES, requires_grad=True)
    features = torch.zeros(0, WIDTH, requires_grad=True)
    outputs = StepOutputs(views, logits, features, features[:, :DIM])
    losses = losses_of(rule, outputs, torch.Generator(), first=True)
    losses.total.backward()
    assert losses.total.item() == 0.0
    assert logits.grad is not None


def test_the_classifier_takes_part_where_no_loss_needs_it() -> None:
    net, projector = networks()
    run_step(SCRStrategy(), Given(), net, projector)[2].total.backward()
    assert net.head.weight.grad is not None  # DDP waits for every parameter
    assert not net.head.weight.grad.any()


def test_where_the_blocks_lie_changes_no_loss() -> None:
    """Behind one another as a step makes them, and in the opposite order."""
    rule = OnProLosses(rotation="rot4", ce_new=0.5)
    views = arrange(Given().segments(rule, first=False), transform)
    each = torch.arange(len(views.images))
    opposite = torch.cat([each[rows] for rows in reversed(views.rows.values())])
    ends, start = {}, 0
    for name, rows in reversed(views.rows.items()):
        ends[name] = slice(start, start := start + rows.stop - rows.start)
    found = []
    for order, rows in ((each, views.rows), (opposite, {name: ends[name] for name in views.rows})):
        leaves = [drawn_images(len(each), w).flatten(1)[:, :w].requires_grad_() for w in (CLASSES, 9, DIM)]
        outputs = StepOutputs(replace(views, rows=rows), *(values[order] for values in leaves))
        losses = losses_of(rule, outputs, torch.Generator().manual_seed(1), first=False)
        found.append((losses.terms, torch.autograd.grad(losses.total, leaves)))
    (terms, gradients), (other_terms, other_gradients) = found
    for name, term in terms.items():
        assert float(other_terms[name]) == pytest.approx(float(term), rel=1e-12)
    for one, other in zip(gradients, other_gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-13)


def test_embeddings_as_wide_as_the_features_draw_no_offset() -> None:
    rule, (net, _) = OnProLosses(rotation="none"), networks()
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    views = arrange(Given().segments(rule, first=False), transform)
    features, logits = net(views.images)
    outputs = StepOutputs(views, logits, features, nn.functional.normalize(features, dim=1))
    assert bool(torch.isfinite(losses_of(rule, outputs, generator, first=False).total))
    assert torch.equal(generator.get_state(), before)


def test_gradients_of_all_losses_are_finite_differences() -> None:
    rule = OnProLosses(**{**EVERYTHING, "rotation": "none", "instance_temperature": 0.5})
    views, outputs, _ = run_step(rule, Given(), *networks())
    assert outputs.all_embeddings is not None

    def total(logits: Tensor, features: Tensor, embeddings: Tensor) -> Tensor:
        # the row maximum is not differentiated, and in exact arithmetic it cancels but for epsilon
        outputs = StepOutputs(views, logits, features, embeddings)
        return losses_of(rule, outputs, torch.Generator().manual_seed(OFFSET_SEED), first=False).total

    tensors = outputs.all_logits, outputs.all_features, outputs.all_embeddings
    inputs = tuple(each.detach().requires_grad_() for each in tensors)
    assert torch.autograd.gradcheck(total, inputs, fast_mode=True)


def test_nothing_of_a_step_depends_on_or_changes_the_global_random_state() -> None:
    totals = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the global generator is the one that must not matter
        before = torch.get_rng_state()
        totals.append(run_step(OnProLosses(rotation="rot4"), Given(), *networks())[2].total.item())
        assert torch.equal(torch.get_rng_state(), before)
    assert totals[0] == totals[1]


# -- options


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: OnProLosses(rotation="rot8"), "rotation must be one of"),
        (lambda: OnProLosses(ope_new=-1.0), "ope_new must be a finite number of at least 0"),
        (lambda: OnProLosses(ce_mem=math.nan), "ce_mem must be a finite number"),
        (lambda: OnProLosses(instance_new=True), "instance_new must be a finite number"),
        (lambda: OnProLosses(prototype_temperature=0), "prototype_temperature must be a finite number above 0"),
        (lambda: OnProLosses(ce_mem=0, instance_new=0, ope_new=0), "nothing would be learned from an incoming image"),
        (lambda: DERPPStrategy(alpha=-1), "alpha must be a finite number of at least 0"),
        (lambda: SCRStrategy(temperature=0), "temperature must be a finite number above 0"),
    ],
)
def test_options_are_checked(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        make()
