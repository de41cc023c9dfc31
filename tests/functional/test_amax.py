"""`lq.functional.amax` against NumPy."""

import itertools

import numpy as np
import pytest
import torch

from lq.functional.amax import (
    amax_shape,
    compute_amax,
    normalize_axis,
    reduce_amax,
    rows_amax,
    to_rows,
)

AXES = [None, 0, 1, -1, (0, 1), (0, 2), (-1, 0), (0, 1, 2)]


@pytest.mark.parametrize("axis", AXES)
def test_compute_amax_keeps_the_axes(axis):
    x = torch.randn(3, 4, 5)
    kept = () if axis is None else tuple(a % 3 for a in np.atleast_1d(axis))
    reduced = tuple(i for i in range(3) if i not in kept)
    expected = np.abs(x.numpy()).max(axis=reduced, keepdims=bool(kept))
    amax = compute_amax(x, axis)
    np.testing.assert_array_equal(amax.numpy(), expected)
    assert tuple(amax.shape) == amax_shape(x, axis) == expected.shape


@pytest.mark.parametrize(("axis", "keepdims"), itertools.product([None, 1, (0, -1)], [True, False]))
def test_reduce_amax_reduces_the_axes(axis, keepdims):
    x = torch.randn(3, 4, 5)
    expected = np.abs(x.numpy()).max(axis=axis, keepdims=keepdims)
    np.testing.assert_array_equal(reduce_amax(x, axis, keepdims).numpy(), expected)


@pytest.mark.parametrize("axis", AXES)
def test_a_row_holds_the_values_of_one_amax(axis):
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(to_rows(x, axis).abs().amax(dim=1).reshape(amax_shape(x, axis)), compute_amax(x, axis))


def test_the_order_of_the_axes_does_not_matter():
    x = torch.randn(3, 4, 5)
    assert torch.equal(to_rows(x, (2, 0)), to_rows(x, (0, -1)))


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_amax_is_float32_but_for_double(dtype, kept):
    amax = compute_amax(torch.tensor([-3.0, 1.0], dtype=dtype))
    assert amax.dtype == kept
    assert amax.item() == 3


@pytest.mark.parametrize("shape", [(1, 3), (2, 3)])
def test_nan_shows_in_amax(shape):
    x = torch.ones(shape)
    x[-1, 1] = torch.nan
    assert rows_amax(x)[-1].isnan()


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_amax_of_nothing_is_zero(shape, axis):
    amax = compute_amax(torch.zeros(shape), axis)
    assert not amax.any()
    assert tuple(amax.shape) == amax_shape(torch.zeros(shape), axis)


@pytest.mark.parametrize("axis", [3, -4, (0, 7)])
def test_an_axis_out_of_range_is_refused(axis):
    with pytest.raises(ValueError, match=r"`axis` has .*3 dimensions"):
        normalize_axis(axis, 3)


@pytest.mark.parametrize("axis", [(0, 0), (1, -2)])
def test_an_axis_named_twice_is_refused(axis):
    with pytest.raises(ValueError, match="twice"):
        normalize_axis(axis, 3)


@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
def test_nothing_has_a_magnitude_of_zero(axis, keepdims):
    found = reduce_amax(torch.zeros(0, 3), axis, keepdims)
    # what NumPy gives of a maximum that starts at 0
    expected = np.max(np.zeros((0, 3)), axis=axis, keepdims=keepdims, initial=0)
    assert found.shape == expected.shape
    assert not found.any()


def test_no_axis_reduces_nothing():
    x = torch.tensor([[-1.0, 2.0]])
    assert reduce_amax(x, ()).tolist() == [[1, 2]]
