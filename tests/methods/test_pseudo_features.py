"""The pseudo-features generator: what is drawn depends on nothing but seed, class and row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from clkit.methods._checks import generator as generator_of
from clkit.methods.ridge import pseudo_features

MEAN = torch.tensor([1.0, -2.0, 3.0, 0.5, 8.0, 0.0, 1.0], dtype=torch.float64)
DEVIATION = torch.tensor([0.1, 1.0, 2.0, 0.0, 3.0, 1.0, 1.0], dtype=torch.float64)


def drawn(count: int, **options: float) -> Tensor:
    return torch.cat(list(pseudo_features(MEAN, DEVIATION, count, class_id=3, **options)))


def test_rows_follow_the_definition() -> None:
    seed = int(np.random.SeedSequence((5, 3)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.cat([torch.randn(256, 7, generator=generator, dtype=torch.float64) for _ in range(2)])[:300]
    assert torch.equal(drawn(300, seed=5, noise=0.5), MEAN + 0.5 * DEVIATION * noise)


@pytest.mark.parametrize("count", [1, 7, 255, 256, 257, 600])
def test_fewer_rows_are_a_prefix(count: int) -> None:
    assert torch.equal(drawn(count), drawn(700)[:count])


def test_moments_converge() -> None:
    rows = drawn(20000)
    assert torch.allclose(rows.mean(0), MEAN, atol=0.1)
    assert torch.allclose(rows.std(0), DEVIATION, atol=0.1)


def test_no_noise_repeats_the_mean() -> None:
    assert torch.equal(drawn(5, noise=0.0), MEAN.expand(5, 7))


def test_values_are_clamped() -> None:
    rows = drawn(500, clamp_min=0.0)
    assert float(rows.min()) == 0.0
    assert torch.equal(rows, drawn(500).clamp(min=0))


def test_classes_and_seeds_differ_and_the_global_state_stays() -> None:
    before = torch.get_rng_state()
    seeds = {generator_of(seed, c).initial_seed() for seed in range(5) for c in range(5)}
    drawn(300)
    assert len(seeds) == 25
    assert torch.equal(torch.get_rng_state(), before)
