"""Augmenting the images of a step, each on its own, without touching the global random states."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from clkit.errors import BatchError
from clkit.methods.replay.views import RandomViews

__all__ = ["Augmentation"]


class Augmentation:
    """A transform of images, see :class:`ReplayStrategy`, as a function of the images and one generator.

    What becomes of an image depends on the generator and on the image's position among those of the step, and not on
    which other images the same process has.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor] | None) -> None:
        self.transform: Callable[[Tensor], Tensor] = RandomViews() if transform is None else transform
        self.is_identity = isinstance(self.transform, nn.Identity)

    def __call__(self, images: Tensor, positions: Tensor, total: int, generator: torch.Generator) -> Tensor:
        """Return new views of images at some positions among all ``total`` that the processes augment in a step."""
        if self.is_identity or not len(images):
            return images
        if isinstance(self.transform, RandomViews):
            return self.transform(images, numbers=self.transform.draw(total, generator)[positions])
        base = int(torch.randint(2**62, (), generator=generator))
        with _isolated(images.device) as seed:
            if getattr(self.transform, "per_sample", False):
                seed(base + int(positions[0]))
                return self._checked(images)
            views = []
            for image, at in zip(images, positions.tolist(), strict=True):
                seed(base + at)
                views.append(self._checked(image))
            return torch.stack(views)

    def _checked(self, images: Tensor) -> Tensor:
        views = self.transform(images)
        if not isinstance(views, Tensor) or views.shape != images.shape:
            raise BatchError(
                f"transform must give images of the shape that it gets, {tuple(images.shape)}, got "
                f"{tuple(views.shape) if isinstance(views, Tensor) else type(views).__name__}"
            )
        return views.to(images.dtype)


@contextmanager
def _isolated(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Yield what seeds all generators that a transform of images there may draw from; put them back afterwards."""
    # not `torch.manual_seed`, which would also seed every other accelerator
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])

    def seed(number: int) -> None:
        for generator in generators:
            generator.manual_seed(number)
        random.seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002  transforms draw from the legacy generator

    states = [generator.get_state() for generator in generators]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the same
    try:
        yield seed
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002  the same
