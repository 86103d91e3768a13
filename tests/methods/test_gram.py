"""The in-place symmetric product against a plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clkit.methods import _gram
from clkit.methods._gram import add_gram_, mirrored, new_gram


def _case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, 37, generator=generator, dtype=torch.float64)
    start = torch.randn(37, 37, generator=generator, dtype=torch.float64)
    start = (start + start.T).to(dtype)
    expected = start.double().numpy() + 0.75 * np.einsum("bi,bj->ij", rows.numpy(), rows.numpy())
    return start, rows, expected


def test_blas_product_is_in_place_and_equals_a_plain_one() -> None:
    lower, rows, expected = _case()
    address = lower.data_ptr()
    assert add_gram_(lower, rows, 0.75) is lower
    assert lower.data_ptr() == address
    np.testing.assert_allclose(mirrored(lower).numpy(), expected, rtol=1e-13, atol=1e-13)


def test_blas_product_takes_rows_that_are_not_contiguous() -> None:
    lower, rows, expected = _case()
    spread = torch.zeros(11, 74, dtype=torch.float64)
    spread[:, ::2] = rows
    add_gram_(lower, spread[:, ::2], 0.75)
    np.testing.assert_allclose(mirrored(lower).numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_blocks_equal_a_plain_product(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    lower, rows, expected = _case(dtype)
    monkeypatch.setattr(_gram, "_CPU_BLOCK", 10)
    # A transposed view is not contiguous, so that float64 takes the way of the other devices as well.
    lower = lower.T
    add_gram_(lower, rows, 0.75)
    assert lower.dtype == dtype
    np.testing.assert_allclose(mirrored(lower).double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [1, 127, 128, 300])
def test_several_threads_give_the_same_product(width: int) -> None:
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = np.einsum("bi,bj->ij", rows.numpy(), rows.numpy())
    torch.set_num_threads(2)  # torch's own product then, in blocks
    try:
        lower = add_gram_(torch.zeros(width, width, dtype=torch.float64), rows)
    finally:
        torch.set_num_threads(1)
    np.testing.assert_allclose(mirrored(lower).numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [511, 512, 1024])
def test_a_new_matrix_of_any_width_is_zero_and_takes_products_in_place(width: int, threads: int) -> None:
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 0.5 * np.einsum("bi,bj->ij", rows.numpy(), rows.numpy())
    lower = new_gram(width, torch.float64, torch.device("cpu"))
    assert lower.shape == (width, width)
    assert not lower.any()
    assert lower.stride(0) % 512 != 0  # rows whole pages apart would compete for the same places of the cache
    torch.set_num_threads(threads)
    try:
        assert add_gram_(add_gram_(lower, rows), rows, -0.5) is lower
    finally:
        torch.set_num_threads(1)
    np.testing.assert_allclose(mirrored(lower).numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(45, 60), (40, 45), (50, 45)])
def test_a_corner_of_another_matrix_is_changed_alone(shape: tuple[int, int]) -> None:
    start, rows, expected = _case()
    whole = torch.full(shape, 7.0, dtype=torch.float64)
    whole[:37, :37] = start
    add_gram_(whole[:37, :37], rows, 0.75)
    np.testing.assert_allclose(mirrored(whole[:37, :37]).numpy(), expected, rtol=1e-13, atol=1e-13)
    assert bool((whole[37:] == 7).all())
    assert bool((whole[:, 37:] == 7).all())


def test_no_rows_change_nothing() -> None:
    lower, rows, _ = _case()
    before = lower.clone()
    add_gram_(lower, rows[:0])
    assert torch.equal(lower, before)


def test_mirrored_reads_the_lower_triangle_only() -> None:
    stack = torch.tensor([[[1.0, 99.0], [2.0, 3.0]], [[4.0, torch.nan], [5.0, 6.0]]])
    assert mirrored(stack).tolist() == [[[1.0, 2.0], [2.0, 3.0]], [[4.0, 5.0], [5.0, 6.0]]]
