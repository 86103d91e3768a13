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
from clkit.methods import BatchNormSegments, MixedBatch, Projector, ReplayRule
from clkit.methods.replay.rule import Part, StepBatch, StepLosses, StepOutputs, StepViews

CLASSES, WIDTH, DIM = 7, 6, 4
OFFSET_SEED = 5


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

    def batch(self, *, first: bool, rule: ReplayRule) -> StepBatch:
        """The same, for the library."""
        seen = None if self.u is None else Part.whole(self.u, torch.tensor(self.v))
        replayed = None
        if self.w is not None and not first and rule.replays:
            ids = torch.tensor(self.a), torch.tensor(self.b)
            replayed = MixedBatch(self.w, *ids, torch.tensor(self.share, dtype=torch.float64))
        return StepBatch(
            new=Part.whole(self.x, torch.tensor(self.y, dtype=torch.int64)),
            first=first,
            seen=seen,
            replayed=replayed,
            replayed_at=None if replayed is None else (torch.arange(len(replayed.images)), len(replayed.images)),
            second=Part.whole(self.second, torch.tensor(self.second_labels)) if self.u is not None else None,
            stored_logits=None if self.u is None else self.logits,
        )


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
        return {"ce_new": naive_mean([naive_cross_entropy(r, c) for r, c in zip(logits, given.y, strict=True)])}, None
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

PLAIN = {"instance_new": 0, "instance_mem": 0, "ope_new": 0, "ope_seen": 0, "ce_new_weight": 1}
ER = {**PLAIN, "ce_mean": "joint"}
ER_ACE = {**PLAIN, "ce_new_mask": "batch"}
DER = {**PLAIN, "ce_mem_weight": 0, "logit_weight": 0.3, "logit_ce_weight": 0.8}
SCR = {**PLAIN, "ce_new_weight": 0, "ce_mem_weight": 0, "contrast": 1}
WEIGHTS = {"ce": "ce_new_weight", "ce_new": "ce_new_weight", "ce_mem": "ce_mem_weight"}
WEIGHTS |= {"logit": "logit_weight", "logit_ce": "logit_ce_weight"}


def run_step(
    rule: ReplayRule, batch: StepBatch, net: Net, projector: Projector, number: int = OFFSET_SEED
) -> tuple[StepViews, StepOutputs, StepLosses]:
    """One forward call, segment by segment in BatchNorm."""
    views = rule.views(batch, transform, CLASSES)
    segments = BatchNormSegments(net)
    with segments.step(views.segments):
        features, logits = net(views.images)
    segments.close()
    outputs = StepOutputs(logits, features, projector(features) if rule.embeds else None)
    return views, outputs, rule.losses(views, outputs, torch.Generator().manual_seed(number))


EMPTY = Given(u=None, w=None)
STEPS: dict[str, tuple[Any, dict[str, Any], Given, bool]] = {
    "onpro first batch": (naive_onpro, {}, EMPTY, True),
    "onpro first": (naive_onpro, {"similarity_scale": 0.5}, Given(), True),
    "onpro later": (naive_onpro, {"similarity_scale": 0.5}, Given(), False),
    "onpro later pure": (naive_onpro, {"rotation": "rot4"}, pure(Given()), False),
    "onpro rot4 first": (naive_onpro, {"rotation": "rot4", "similarity_scale": 0.5}, Given(), True),
    "onpro rot4 later": (naive_onpro, {"rotation": "rot4", "similarity_scale": 0.5}, Given(), False),
    "onpro none first": (naive_onpro, {"rotation": "none"}, Given(), True),
    "onpro none later": (naive_onpro, {"rotation": "none", "similarity_scale": 2}, Given(), False),
    "onpro one image": (naive_onpro, {"rotation": "rot4"}, Given(x=drawn_images(1, 9), y=[6]), False),
    "onpro one class": (naive_onpro, {"rotation": "rot4"}, Given(y=[3, 3, 3], v=[5, 5, 5, 5]), False),
    "onpro gaps": (naive_onpro, {"rotation": "rot4"}, Given(y=[6, 0, 6], v=[6, 2, 6, 0]), False),
    "er first batch": (naive_er, ER, EMPTY, True),
    "er": (naive_er, ER, pure(Given()), False),
    "er-ace first batch": (naive_er_ace, ER_ACE, EMPTY, True),
    "er-ace": (naive_er_ace, ER_ACE, pure(Given()), False),
    "er-ace one class": (naive_er_ace, ER_ACE, replace(pure(Given()), y=[3, 3, 3]), False),
    "der++ first batch": (naive_der, DER, EMPTY, True),
    "der++": (naive_der, DER, Given(), False),
    "scr first batch": (naive_scr, SCR, EMPTY, True),
    "scr": (naive_scr, SCR, Given(), False),
    "fine-tuning": (naive_er, PLAIN, EMPTY, True),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_its_equations_with_separate_calls_of_the_network(name: str) -> None:
    equations, options, given, first = STEPS[name]
    net, projector = networks()
    rule = ReplayRule(**options)
    views, _, losses = run_step(rule, given.batch(first=first, rule=rule), net, projector)
    losses.total.backward()

    naive = Naive(*networks())
    terms, means = equations(naive, given, first, options)
    weights = {term: options.get(WEIGHTS.get(term, ""), 1) for term in terms}
    if not options.get("ce_new_weight"):
        weights["ce_new"] = 1  # the first experience has it instead of the replay batch
    total = sum(weights[term] * value for term, value in terms.items())
    total.backward()

    assert losses.terms.keys() == terms.keys()
    for term, value in terms.items():
        assert losses.terms[term].item() == pytest.approx(value.item(), rel=1e-10, abs=1e-12), term
        assert not losses.terms[term].requires_grad
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
    if means is not None and losses.prototypes is not None:
        assert losses.prototypes.ids.tolist() == sorted(means)
        expected = torch.stack([means[c] for c in sorted(means)])
        assert torch.allclose(losses.prototypes.means, expected, rtol=1e-10)
        assert not losses.prototypes.means.requires_grad


def test_weights_multiply_their_terms_and_nothing_else() -> None:
    names = ["ce_mem_weight", "instance_new", "instance_mem", "ope_new", "ope_seen"]
    term = dict(zip(names, ["ce_mem", "instance_new", "instance_mem", "ope_new", "ope_seen"], strict=True))
    given = Given()
    plain = ReplayRule(rotation="none")
    base = run_step(plain, given.batch(first=False, rule=plain), *networks())[2]
    for name in names:
        rule = ReplayRule(rotation="none", **{name: 3.0})
        losses = run_step(rule, given.batch(first=False, rule=rule), *networks())[2]
        assert losses.terms == base.terms
        expected = base.total.item() + 2 * base.terms[term[name]].item()
        assert losses.total.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mask", ["none", "batch"])
def test_incoming_cross_entropy_can_be_added_to_onpro(mask: str) -> None:
    given = pure(Given())
    rule = ReplayRule(rotation="none", ce_new_weight=0.7, ce_new_mask=mask)
    views, outputs, losses = run_step(rule, given.batch(first=False, rule=rule), *networks())
    assert views.segments == [2 * 3 + 2 * 4, 3 + 4, 2 * 4]  # T(x) and the replay batch are normalised together
    logits = outputs.logits[views.rows["ce_new"]]
    assert torch.allclose(views.images[views.rows["ce_new"]], transform(given.x, torch.arange(3), 3))
    among = sorted(set(given.y)) if mask == "batch" else None
    expected = naive_mean([naive_cross_entropy(r, c, among) for r, c in zip(logits, given.y, strict=True)])
    assert losses.terms["ce_new"].item() == pytest.approx(expected.item(), rel=1e-12)
    others = sum(value for name, value in losses.terms.items() if name != "ce_new")
    assert losses.total.item() == pytest.approx((others + 0.7 * expected).item(), rel=1e-12)


def test_the_joint_mean_is_over_rows_and_no_sum_of_means() -> None:
    given = replace(pure(Given()), x=drawn_images(1, 1), y=[4])  # 1 and 4 rows, so that the two differ
    joint, separate = ReplayRule(**ER), ReplayRule(**{**ER, "ce_mean": "separate"})
    one = run_step(joint, given.batch(first=False, rule=joint), *networks())[2]
    two = run_step(separate, given.batch(first=False, rule=separate), *networks())[2]
    assert one.total.item() == pytest.approx((two.terms["ce_new"] + 4 * two.terms["ce_mem"]).item() / 5, rel=1e-12)
    assert abs(one.total.item() - two.total.item()) > 0.1


def test_the_masked_loss_has_no_gradient_at_absent_classes() -> None:
    rule = ReplayRule(**ER_ACE)
    net, projector = networks()
    run_step(rule, EMPTY.batch(first=True, rule=rule), net, projector)[2].total.backward()
    assert net.head.bias.grad is not None
    assert net.head.bias.grad.nonzero().flatten().tolist() == [1, 4]


def test_similarity_is_scaled_after_the_first_experience_only() -> None:
    for first in (True, False):
        terms = []
        for scale in (1.0, 0.5):
            rule = ReplayRule(rotation="none", similarity_scale=scale)
            terms.append(run_step(rule, Given().batch(first=first, rule=rule), *networks())[2].terms)
        assert (terms[0]["instance_new"] == terms[1]["instance_new"]) == first
        assert terms[0]["ope_seen"] == terms[1]["ope_seen"]


# -- blocks


def layout(views: StepViews) -> dict[str, tuple[int, int]]:
    return {name: (at.start, at.stop) for name, at in views.rows.items()}


def counted(rule: ReplayRule, *, first: bool, new: int = 10, replayed: int = 64, stored: bool = True) -> StepViews:
    """The views of a step of the published size."""
    images = torch.zeros(replayed, 1, 4, 4)
    ids = torch.zeros(replayed, dtype=torch.int64)
    part = Part.whole(images, ids)
    return rule.views(
        StepBatch(
            new=Part.whole(torch.zeros(new, 1, 4, 4), torch.zeros(new, dtype=torch.int64)),
            first=first,
            seen=part if stored else None,
            replayed=None if first or not rule.replays else MixedBatch.pure(images, ids),
            replayed_at=None if first or not rule.replays else (torch.arange(replayed), replayed),
            second=part if stored else None,
            stored_logits=torch.zeros(replayed, CLASSES) if stored else None,
        ),
        transform,
        CLASSES,
    )


@pytest.mark.parametrize(
    ("options", "images"),
    [(ER, 74), ({}, 2560), ({"rotation": "rot4"}, 784), ({"rotation": "none"}, 340), (ER_ACE, 74), (SCR, 148)],
)
def test_images_of_a_later_step(options: dict[str, Any], images: int) -> None:
    rule = ReplayRule(**options)
    assert rule.images(new=10, replayed=64) == images
    assert len(counted(rule, first=False).images) == images


def test_images_of_first_steps_and_without_a_memory() -> None:
    assert len(counted(ReplayRule(), first=True).images) == 458
    assert counted(ReplayRule(), first=True).segments == [320, 128, 10]
    assert counted(ReplayRule(), first=True, stored=False).segments == [320, 10]
    assert counted(ReplayRule(**ER), first=True, stored=False).segments == [10]
    assert ReplayRule(**PLAIN).images(10, 0) == 10


def test_blocks_are_in_the_order_of_the_method() -> None:
    given, rule = Given(), ReplayRule(rotation="rot4")  # 3 incoming, 4 sampled, 7 replayed
    later = rule.views(given.batch(first=False, rule=rule), transform, CLASSES)
    assert later.segments == [2 * 12 + 2 * 28, 7, 8]
    assert layout(later) == {
        "new1": (0, 12),
        "new2": (12, 24),
        "mem1": (24, 52),
        "mem2": (52, 80),
        "ce_mem": (80, 87),
        "seen1": (87, 91),
        "seen2": (91, 95),
        "upright1": (0, 3),
        "upright2": (12, 15),
    }
    first = rule.views(given.batch(first=True, rule=rule), transform, CLASSES)
    assert first.segments == [24, 8, 3]
    assert [name for name in layout(first) if not name.startswith("upright")] == [
        "new1",
        "new2",
        "seen1",
        "seen2",
        "ce_new",
    ]
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


SWITCHES = ["ce_new_weight", "ce_mem_weight", "instance_new", "instance_mem", "ope_new", "ope_seen", "contrast"]
SWITCHES += ["logit_weight", "logit_ce_weight"]


@settings(max_examples=80, deadline=None)
@example(on={"contrast"}, rotation="none")  # two segments of one kind
@example(on={"ce_new_weight", "ce_mem_weight"}, rotation="rot16")  # one segment
@given(on=st.sets(st.sampled_from(SWITCHES), min_size=1), rotation=st.sampled_from(["rot16", "rot4", "none"]))
def test_what_a_rule_says_of_itself_holds_for_any_switches(on: set[str], rotation: str) -> None:
    if "logit_weight" in on or not on & {"ce_new_weight", "ce_mem_weight", "instance_new", "ope_new", "contrast"}:
        on.add("ce_new_weight")  # as a rule asks for
    rule = ReplayRule(rotation=rotation, **{name: float(name in on) for name in SWITCHES})
    assert ReplayRule(**rule.settings()) == rule
    later, first = counted(rule, first=False, new=2, replayed=3), counted(rule, first=True, new=2, replayed=3)
    for views in (later, first):
        assert sum(views.segments) == len(views.images)
        ends = [at for name, at in layout(views).items() if not name.startswith("upright")]
        assert [start for start, _ in ends] == [0, *[stop for _, stop in ends[:-1]]]  # no gap, no overlap
    assert len(later.images) == rule.images(2, 3)
    assert rule.segmented == (max(len(later.segments), len(first.segments)) > 1)
    names = {name.rstrip("12") for name in later.rows}
    assert rule.embeds == bool(names & {"new", "mem", "seen", "contrast"})
    assert rule.replays == bool(names & {"mem", "ce_mem"})


# -- variants and mixed images


def test_variant_labels_of_a_step() -> None:
    given, rule = Given(), ReplayRule(rotation="rot4")
    views = rule.views(given.batch(first=False, rule=rule), transform, CLASSES)
    assert views.labels["new_ids"].tolist() == [c + CLASSES * k for k in range(4) for c in given.y]


def test_mixed_rows_are_classes_of_their_own_in_each_variant() -> None:
    given, rule = Given(), ReplayRule(rotation="rot4")
    views = rule.views(given.batch(first=False, rule=rule), transform, CLASSES)
    ids = views.labels["mem_ids"].reshape(4, 7)
    own = ids[:, [0, 3, 4]].flatten().tolist()  # shares 0.3, 0.55, 1.0 of two classes
    assert own == [4 * CLASSES + 7 * k + j for k in range(4) for j in (0, 3, 4)]
    for j, c in ((1, 1), (2, 2), (5, 1), (6, 2)):  # mixes within a class, and shares of 0 of another
        assert ids[:, j].tolist() == [c + CLASSES * k for k in range(4)]


def test_mixes_within_a_class_keep_it_though_their_float_labels_would_differ() -> None:
    c = 5
    shares = np.float32(0.6) * torch.rand(5000, generator=torch.Generator().manual_seed(0)).numpy()
    unequal = [s for s in shares if (np.float32(1) - s) * np.float32(c) + s * np.float32(c) != np.float32(c)]
    assert unequal  # what equality of floats would have told apart
    n = 6
    given = replace(Given(), w=drawn_images(n, 3), a=[c] * n, b=[c] * n, share=[float(s) for s in unequal[:n]])
    same = replace(given, share=[0.0] * n)
    rule = ReplayRule(rotation="none")
    ids = [rule.views(g.batch(first=False, rule=rule), transform, CLASSES).labels["mem_ids"] for g in (given, same)]
    assert ids[0].tolist() == ids[1].tolist() == [c] * n


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


EVERYTHING = {"rotation": "rot4", "ce_new_weight": 1, "contrast": 1, "logit_weight": 1, "logit_ce_weight": 1}


def permuted(values: list[Any], order: list[int]) -> list[Any]:
    return [values[i] for i in order]


@settings(max_examples=20, deadline=None)
@given(step=drawn_steps(), first=st.booleans(), data=st.data())
def test_the_order_of_images_changes_no_loss(step: tuple[Given, int], first: bool, data: Any) -> None:
    given, _ = step
    assert given.u is not None
    assert given.w is not None
    one, two, three = (data.draw(st.permutations(range(len(rows)))) for rows in (given.x, given.u, given.w))
    other = replace(
        given,
        x=given.x[one],
        y=permuted(given.y, one),
        u=given.u[two],
        v=permuted(given.v, two),
        w=given.w[three],
        a=permuted(given.a, three),
        b=permuted(given.b, three),
        share=permuted(given.share, three),
    )
    rule = ReplayRule(**EVERYTHING)
    terms = [run_step(rule, g.batch(first=first, rule=rule), *networks())[2].terms for g in (given, other)]
    for name, value in terms[0].items():
        assert value.item() == pytest.approx(terms[1][name].item(), rel=1e-9, abs=1e-10), name


@settings(max_examples=20, deadline=None)
@given(step=drawn_steps(), first=st.booleans(), names=st.permutations(range(CLASSES)))
def test_the_names_of_classes_change_no_loss(step: tuple[Given, int], first: bool, names: list[int]) -> None:
    given, _ = step
    other = replace(
        given,
        y=[names[c] for c in given.y],
        v=[names[c] for c in given.v],
        a=[names[c] for c in given.a],
        b=[names[c] for c in given.b],
        second_labels=[names[c] for c in given.second_labels],
    )
    rule = ReplayRule(**EVERYTHING)
    net, projector = networks()
    renamed = copy.deepcopy(net)
    with torch.no_grad():  # the classifier knows them by their new names; contrasts do not look at it
        renamed.head.weight[list(names)] = net.head.weight
        renamed.head.bias[list(names)] = net.head.bias
    one = run_step(rule, given.batch(first=first, rule=rule), net, projector)[2].terms
    two = run_step(rule, other.batch(first=first, rule=rule), renamed, projector)[2].terms
    for name, value in one.items():
        assert value.item() == pytest.approx(two[name].item(), rel=1e-9, abs=1e-10), name


@settings(max_examples=20, deadline=None)
@given(step=drawn_steps(), scales=st.tuples(*[st.floats(0.1, 10)] * 2))
def test_prototypes_know_neither_scale_nor_side(step: tuple[Given, int], scales: tuple[float, float]) -> None:
    given, _ = step
    rule = ReplayRule(rotation="none", instance_new=0, instance_mem=0)
    views, outputs, losses = run_step(rule, given.batch(first=False, rule=rule), *networks())
    assert outputs.embeddings is not None

    def again(embeddings: Tensor) -> StepLosses:
        return rule.losses(views, outputs._replace(embeddings=embeddings), torch.Generator())

    scaled, swapped = outputs.embeddings.detach().clone(), outputs.embeddings.detach().clone()
    for name in ("upright", "seen"):
        one, two = views.rows[f"{name}1"], views.rows[f"{name}2"]
        scaled[one] *= scales[0]
        scaled[two] *= scales[1]
        swapped[one], swapped[two] = outputs.embeddings.detach()[two], outputs.embeddings.detach()[one]
    for other in (again(scaled), again(swapped)):
        for name in ("ope_new", "ope_seen"):
            assert other.terms[name].item() == pytest.approx(losses.terms[name].item(), rel=1e-9, abs=1e-11)


def test_two_halves_have_the_views_and_ids_of_the_whole() -> None:
    def placed(images: Tensor, positions: Tensor, total: int) -> Tensor:
        assert int(positions.max()) < total
        assert len(positions.unique()) == len(positions)
        return images + 10 * positions[:, None, None, None]

    given, rule = Given(u=drawn_images(5, 2), v=[0, 1, 0, 2, 2]), ReplayRule(**EVERYTHING)
    given = replace(given, logits=torch.arange(5 * CLASSES, dtype=torch.float64).reshape(5, CLASSES))
    whole = given.batch(first=False, rule=rule)
    assert whole.replayed is not None
    expected = rule.views(whole, placed, CLASSES)

    def half(part: Part | None, rank: int) -> Part:
        assert part is not None
        return Part(part.images[rank::2], part.labels[rank::2], torch.arange(rank, part.total, 2), part.total)

    for rank in range(2):
        mine = StepBatch(
            new=half(whole.new, rank),
            first=False,
            seen=half(whole.seen, rank),
            replayed=MixedBatch(*(each[rank::2] for each in whole.replayed)),
            replayed_at=(torch.arange(rank, 7, 2), 7),
            second=half(whole.second, rank),
            stored_logits=given.logits[rank::2],
        )
        views = rule.views(mine, placed, CLASSES)
        for name in ("new1", "new2", "mem1", "mem2"):
            blocks = expected.images[expected.rows[name]].reshape(4, -1, 2, 4, 4)[:, rank::2]
            assert torch.equal(views.images[views.rows[name]], blocks.flatten(0, 1)), name
        for name in ("seen1", "seen2", "ce_new", "ce_mem", "logits", "logit_ce"):
            block = expected.images[expected.rows[name]][rank::2]
            assert torch.equal(views.images[views.rows[name]], block), name
        for name in ("new_ids", "mem_ids"):
            assert torch.equal(views.labels[name], expected.labels[name].reshape(4, -1)[:, rank::2].flatten()), name
        joined = expected.images[expected.rows["contrast2"]]
        halves = torch.cat([joined[:3][rank::2], joined[3:][rank::2]])
        assert torch.equal(views.images[views.rows["contrast2"]], halves)


def test_all_views_are_augmented_in_one_call() -> None:
    calls: list[tuple[int, list[int], int]] = []

    def counting(images: Tensor, positions: Tensor, total: int) -> Tensor:
        calls.append((len(images), positions.tolist(), total))
        return images

    rule = ReplayRule(**EVERYTHING)
    rule.views(Given().batch(first=False, rule=rule), counting, CLASSES)
    total = 4 * 3 + 4 * 7 + 3 + 7 + 4 + (3 + 4) + 4 + 4
    assert calls == [(total, list(range(total)), total)]


@pytest.mark.parametrize("options", [{"rotation": "none"}, ER, SCR], ids=["onpro", "er", "scr"])
def test_a_transform_in_place_changes_no_image_that_is_kept(options: dict[str, Any]) -> None:
    rule = ReplayRule(**options)
    for step, first in ((EMPTY, True), (Given(), False)):
        batch = step.batch(first=first, rule=rule)
        views = rule.views(batch, lambda images, *_: images.zero_(), CLASSES)
        assert torch.equal(batch.new.images, drawn_images(3, 1))
        assert batch.seen is None or torch.equal(batch.seen.images, drawn_images(4, 2))
        for name in {"new1", "seen1", "contrast1"} & set(views.rows):
            assert views.images[views.rows[name]].any()


# -- edges


def test_one_image_has_no_prototype_loss_and_the_rest_trains() -> None:
    rule = ReplayRule(rotation="rot4")
    given = Given(x=drawn_images(1, 1), y=[6])
    for first in (True, False):
        net, projector = networks()
        losses = run_step(rule, given.batch(first=first, rule=rule), net, projector)[2]
        losses.total.backward()
        assert losses.terms["ope_new"].item() == 0.0
        for parameter in [*net.parameters(), *projector.parameters()]:
            assert parameter.grad is not None
            assert bool(parameter.grad.isfinite().all())
            assert bool(parameter.grad.any())


@pytest.mark.parametrize("options", [{}, ER, ER_ACE, DER, SCR], ids=["onpro", "er", "er-ace", "der++", "scr"])
def test_no_incoming_rows_leave_the_replay(options: dict[str, Any]) -> None:
    rule = ReplayRule(**{"rotation": "rot4", **options})
    given = replace(pure(Given()), x=drawn_images(0, 1), y=[])
    net, projector = networks()
    views, _, losses = run_step(rule, given.batch(first=False, rule=rule), net, projector)
    losses.total.backward()
    assert len(views.images) == rule.images(0, 4)
    assert bool(torch.isfinite(losses.total))
    assert net.hidden.weight.grad is not None
    assert bool(net.hidden.weight.grad.isfinite().all())
    for name in ("instance_new", "ope_new", "ce_new"):
        assert losses.terms.get(name, torch.zeros(())).item() == 0.0


def test_no_rows_at_all_are_a_zero_with_a_graph() -> None:
    rule = ReplayRule(rotation="rot4")
    empty = replace(EMPTY, x=drawn_images(0, 1), y=[])
    views = rule.views(empty.batch(first=True, rule=rule), transform, CLASSES)
    assert views.segments == []
    logits = torch.zeros(0, CLASSES, requires_grad=True)
    features = torch.zeros(0, WIDTH, requires_grad=True)
    losses = rule.losses(views, StepOutputs(logits, features, features[:, :DIM]), torch.Generator())
    losses.total.backward()
    assert losses.total.item() == 0.0
    assert logits.grad is not None


def test_the_classifier_takes_part_where_no_loss_needs_it() -> None:
    rule = ReplayRule(**SCR)
    net, projector = networks()
    run_step(rule, Given().batch(first=False, rule=rule), net, projector)[2].total.backward()
    assert net.head.weight.grad is not None  # DDP waits for every parameter
    assert not net.head.weight.grad.any()


def test_where_the_blocks_lie_changes_no_loss() -> None:
    """Behind one another as a step makes them, the blocks in the opposite order, and rows anywhere."""
    rule = ReplayRule(rotation="rot4", ce_new_weight=0.5)
    views = rule.views(Given().batch(first=False, rule=rule), transform, CLASSES)
    count = len(views.images)
    each = torch.arange(count)
    blocks = {name: each[rows] for name, rows in views.rows.items()}
    opposite = torch.cat([blocks[name] for name in reversed(blocks) if not name.startswith("upright")])
    moved = {name: int((opposite == rows[0]).nonzero()) for name, rows in blocks.items()}
    apart = {name: slice(start, start + len(blocks[name])) for name, start in moved.items()}
    anywhere = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    found = []
    for order, rows in (
        (each, views.rows),
        (opposite, apart),
        (anywhere, {name: anywhere.argsort()[rows] for name, rows in blocks.items()}),
    ):
        leaves = [drawn_images(count, width).flatten(1)[:, :width].requires_grad_() for width in (CLASSES, 9, DIM)]
        outputs = StepOutputs(*(values[order] for values in leaves))
        losses = rule.losses(replace(views, rows=rows), outputs, torch.Generator().manual_seed(1))
        found.append((losses.terms, torch.autograd.grad(losses.total, leaves)))
    (terms, gradients), *others = found
    for other_terms, other_gradients in others:
        for name, term in terms.items():
            assert float(other_terms[name]) == pytest.approx(float(term), rel=1e-12)
        for one, other in zip(gradients, other_gradients, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-13)


def test_embeddings_as_wide_as_the_features_draw_no_offset() -> None:
    rule, given = ReplayRule(rotation="none"), Given()
    net, _ = networks()
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    views = rule.views(given.batch(first=False, rule=rule), transform, CLASSES)
    features, logits = net(views.images)
    losses = rule.losses(views, StepOutputs(logits, features, nn.functional.normalize(features, dim=1)), generator)
    assert bool(torch.isfinite(losses.total))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_float32_or_float64_inside_autocast(dtype: torch.dtype) -> None:
    rule = ReplayRule(**{**EVERYTHING, "similarity_scale": 0.5})
    views, outputs, _ = run_step(rule, Given().batch(first=False, rule=rule), *networks())
    assert outputs.embeddings is not None
    low = StepOutputs(*(each.detach().to(dtype) for each in outputs))
    wide = StepOutputs(*(each.to(torch.float64 if dtype == torch.float64 else torch.float32) for each in low))
    expected = rule.losses(views, wide, torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = rule.losses(views, low, torch.Generator().manual_seed(1))
    assert losses.total.dtype == wide.logits.dtype
    assert losses.total.item() == expected.total.item()
    for name, value in expected.terms.items():
        assert losses.terms[name].dtype == wide.logits.dtype, name
        assert torch.equal(losses.terms[name], value), name


def test_gradients_of_all_losses_are_finite_differences() -> None:
    rule = ReplayRule(**{**EVERYTHING, "rotation": "none", "instance_temperature": 0.5})
    given = Given()
    views, outputs, _ = run_step(rule, given.batch(first=False, rule=rule), *networks())
    assert outputs.embeddings is not None

    def total(logits: Tensor, features: Tensor, embeddings: Tensor) -> Tensor:
        # the row maximum is not differentiated, and in exact arithmetic it cancels but for epsilon
        outputs = StepOutputs(logits, features, embeddings)
        return rule.losses(views, outputs, torch.Generator().manual_seed(OFFSET_SEED)).total

    inputs = tuple(each.detach().requires_grad_() for each in outputs)
    assert torch.autograd.gradcheck(total, inputs, fast_mode=True)


def test_nothing_of_a_step_depends_on_or_changes_the_global_random_state() -> None:
    rule, given = ReplayRule(rotation="rot4"), Given()
    totals = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the global generator is the one that must not matter
        before = torch.get_rng_state()
        totals.append(run_step(rule, given.batch(first=False, rule=rule), *networks())[2].total.item())
        assert torch.equal(torch.get_rng_state(), before)
    assert totals[0] == totals[1]


# -- options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rotation": "rot8"}, "rotation must be one of"),
        ({"ce_new_mask": "seen"}, "ce_new_mask must be one of"),
        ({"ce_mean": "both"}, "ce_mean must be one of"),
        ({"ope_new": -1.0}, "ope_new must be at least 0, got -1.0"),
        ({"ce_mem_weight": math.nan}, "ce_mem_weight must be a finite number"),
        ({"instance_new": True}, "instance_new must be a finite number"),
        ({"prototype_temperature": 0}, "prototype_temperature must be a finite number above 0"),
        ({"instance_temperature": -1}, "instance_temperature"),
        ({"similarity_scale": 0}, "similarity_scale"),
        ({**PLAIN, "ce_new_weight": 0, "ce_mem_weight": 0}, "nothing would be learned from an incoming image"),
        ({**SCR, "contrast": 0, "ope_seen": 1, "instance_mem": 1}, "nothing would be learned from an incoming image"),
        ({"ce_mean": "joint"}, "equal ce_new_weight and"),
        ({"ce_mean": "joint", "ce_new_weight": 0.5}, "got 0.5, 1.0 and 'none'"),
        ({**ER_ACE, "ce_mean": "joint"}, "no ce_new_mask, got 1, 1.0 and 'batch'"),
        ({"logit_weight": 1.0}, "logit_weight=1.0 needs ce_new_weight above 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        ReplayRule(**options)
