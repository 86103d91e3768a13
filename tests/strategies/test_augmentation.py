"""Foreign transforms: draws for each image, by its place in the step, and nothing global is changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clkit.errors import ArgumentError, BatchError
from clkit.methods import RandomViews
from clkit.strategies import ERStrategy
from clkit.strategies._augmentation import Augmentation


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 6, 6, generator=seeded(seed))


def everywhere(n: int) -> tuple[Tensor, int]:
    return torch.arange(n), n


class Shift:
    """As those of torchvision: one set of parameters a call, here from all three global generators."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def __call__(self, image: Tensor) -> Tensor:
        self.shapes.append(image.shape)
        drawn = torch.rand(()) + 10 * random.random() + 100 * np.random.rand()  # noqa: NPY002  as old transforms do
        return image + drawn


class ShiftEach(Shift):
    """One for each image of a batch."""

    per_sample = True

    def __call__(self, batch: Tensor) -> Tensor:
        self.shapes.append(batch.shape)
        return batch + torch.rand(len(batch), 1, 1, 1)


def global_states() -> list[Any]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  the global generator is what must stay
    return [torch.get_rng_state().tolist(), random.getstate(), name, keys.tolist(), rest]


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "identity": nn.Identity,
    "foreign": Shift,
    "per sample": ShiftEach,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_global_random_states_stay_and_do_not_matter(name: str) -> None:
    views = []
    for start in (1, 2):
        torch.manual_seed(start)
        random.seed(start)
        np.random.seed(start)  # noqa: NPY002  the same
        random.gauss(0, 1)  # half of a pair is kept for the next call: part of the state
        np.random.randn()  # noqa: NPY002  the same
        before = global_states()
        views.append(Augmentation(TRANSFORMS[name]())(images(4), *everywhere(4), seeded()))
        assert global_states() == before
    assert torch.equal(views[0], views[1])


def test_global_random_states_stay_when_the_transform_fails() -> None:
    def failing(image: Tensor) -> Tensor:
        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002  what is drawn before the error
        raise KeyError("colour")

    before = global_states()
    with pytest.raises(KeyError, match="colour"):
        Augmentation(failing)(images(2), *everywhere(2), seeded())
    assert global_states() == before


def test_no_other_accelerator_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", called.append)
    Augmentation(Shift())(images(2), *everywhere(2), seeded())
    assert called == []


def test_each_image_gets_its_own_draw_from_every_generator() -> None:
    transform = Shift()
    same = images(1).expand(50, -1, -1, -1)
    views = Augmentation(transform)(same, *everywhere(50), seeded())
    assert transform.shapes == [torch.Size([3, 6, 6])] * 50
    shifts = (views - same).double()[:, 0, 0, 0]
    for digits in (shifts % 1, shifts % 10, shifts):  # torch, Python, NumPy
        assert len(digits.mul(1e3).round().unique()) > 40
    assert torch.allclose(views - same, shifts.float()[:, None, None, None].expand_as(same), atol=1e-4)  # one an image


def test_torchvision_flips_each_image_for_itself() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    batch = images(40)
    flipped = v2.RandomHorizontalFlip(0.5)(batch)
    assert torch.equal(flipped, batch) or torch.equal(flipped, batch.flip(3))  # all alike, called on a batch
    views = Augmentation(v2.RandomHorizontalFlip(0.5))(batch, *everywhere(40), seeded())
    turned = [torch.equal(view, image.flip(2)) for view, image in zip(views, batch, strict=True)]
    for view, image, was_turned in zip(views, batch, turned, strict=True):
        assert was_turned or torch.equal(view, image)
    assert 8 < sum(turned) < 32


def test_a_batch_goes_whole_to_a_transform_that_says_it_may() -> None:
    transform = ShiftEach()
    same = images(1).expand(6, -1, -1, -1)
    views = Augmentation(transform)(same, *everywhere(6), seeded())
    assert transform.shapes == [torch.Size([6, 3, 6, 6])]
    assert len((views - same)[:, 0, 0, 0].unique()) == 6
    assert torch.equal(views, Augmentation(ShiftEach())(same, *everywhere(6), seeded()))
    assert not torch.equal(views, Augmentation(ShiftEach())(same, *everywhere(6), seeded(1)))
    elsewhere = Augmentation(ShiftEach())(same, torch.arange(6) + 6, 12, seeded())
    assert not torch.equal(views, elsewhere)  # two processes draw differently


def test_none_is_random_views_with_the_numbers_of_the_generator() -> None:
    augmentation = Augmentation(None)
    assert isinstance(augmentation.transform, RandomViews)
    assert torch.equal(augmentation(images(5), *everywhere(5), seeded(3)), RandomViews()(images(5), seeded(3)))
    assert not augmentation.is_identity


def test_random_views_of_ones_own_are_used_as_they_are() -> None:
    views = Augmentation(RandomViews(flip=1.0, grey=0.0, area=(1.0, 1.0), aspect=(1.0, 1.0)))(
        images(5), *everywhere(5), seeded()
    )
    assert torch.allclose(views, images(5).flip(3), atol=1e-6)


def test_identity_gives_the_images_and_draws_nothing() -> None:
    generator = seeded()
    before = generator.get_state()
    augmentation = Augmentation(nn.Identity())
    assert augmentation.is_identity
    assert augmentation(images(4), *everywhere(4), generator).equal(images(4))
    assert torch.equal(generator.get_state(), before)


@settings(max_examples=30, deadline=None)
@given(ranks=st.lists(st.integers(0, 2), min_size=1, max_size=9), foreign=st.booleans(), seed=st.integers(0, 99))
def test_the_view_of_an_image_depends_on_its_place_alone(ranks: list[int], foreign: bool, seed: int) -> None:
    """Split over processes in any way, each image becomes what it does in one."""
    augmentation = Augmentation(Shift() if foreign else None)
    batch, n = images(len(ranks), seed), len(ranks)
    whole = augmentation(batch, *everywhere(n), seeded(seed))
    for rank in range(3):
        mine = torch.tensor([at for at in range(n) if ranks[at] == rank], dtype=torch.int64)
        assert torch.equal(augmentation(batch[mine], mine, n, seeded(seed)), whole[mine])


def test_what_the_other_images_are_does_not_matter() -> None:
    one, other = images(4), images(4, 9)
    other[2] = one[2]
    for transform in (Shift(), None):
        views = [Augmentation(transform)(batch, *everywhere(4), seeded()) for batch in (one, other)]
        assert torch.equal(views[0][2], views[1][2])
        assert not torch.equal(views[0][1], views[1][1])


def test_no_images_stay_none() -> None:
    for make in TRANSFORMS.values():
        empty = Augmentation(make())(images(0), torch.arange(0), 7, seeded())
        assert empty.shape == (0, 3, 6, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_dtype_of_the_images_is_kept(dtype: torch.dtype) -> None:
    batch = images(3).to(dtype)
    for transform in (lambda image: image.float() + 1, None, ShiftEach()):
        assert Augmentation(transform)(batch, *everywhere(3), seeded()).dtype == dtype


@pytest.mark.parametrize(
    ("transform", "match"),
    [
        (lambda image: image[:, :4, :4], r"\(3, 6, 6\), got \(3, 4, 4\)"),
        (lambda image: image[None], r"\(3, 6, 6\), got \(1, 3, 6, 6\)"),
        (lambda image: image.numpy(), "got ndarray"),
        (lambda image: (image, 1), "got tuple"),
    ],
)
def test_other_shapes_are_refused(transform: Callable[[Tensor], Tensor], match: str) -> None:
    with pytest.raises(BatchError, match=match):
        Augmentation(transform)(images(2), *everywhere(2), seeded())


def test_other_shapes_of_a_whole_batch_are_refused() -> None:
    class Dropping:
        per_sample = True

        def __call__(self, batch: Tensor) -> Tensor:
            return batch[1:]

    with pytest.raises(BatchError, match=r"\(2, 3, 6, 6\), got \(1, 3, 6, 6\)"):
        Augmentation(Dropping())(images(2), *everywhere(2), seeded())


def test_what_cannot_be_called_is_refused() -> None:
    name: Any = "flip"
    with pytest.raises(ArgumentError, match="transform must be a function"):
        ERStrategy(transform=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_generator_is_seeded_and_put_back() -> None:
    def shift(image: Tensor) -> Tensor:
        return image + torch.rand((), device=image.device)

    same = images(1).cuda().expand(8, -1, -1, -1)
    before = torch.cuda.get_rng_state()
    views = [Augmentation(shift)(same, *everywhere(8), seeded()) for _ in range(2)]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(views[0], views[1])
    assert len((views[0] - same)[:, 0, 0, 0].unique()) == 8
