"""`lq.functional.grid`: integers and float formats."""

import numpy as np
import pytest
import torch

from lq.functional.grid import check_num_bits, integer_bounds, largest_code, scale_from_amax


@pytest.mark.parametrize("num_bits", [2, 4, 8, 16])
def test_integer_bounds_are_those_of_the_integer(num_bits):
    half = 2 ** (num_bits - 1)
    assert integer_bounds(num_bits) == (1 - half, half - 1)
    assert integer_bounds(num_bits, narrow_range=False) == (-half, half - 1)
    assert integer_bounds(num_bits, unsigned=True) == integer_bounds(num_bits, True, False) == (0, 2 * half - 1)


def test_scale_is_amax_over_qmax_and_positive():
    scale = scale_from_amax(torch.tensor([1.0, 0.0]), 8)
    assert scale.tolist() == [np.float32(1) / np.float32(127), torch.finfo(torch.float32).tiny]
    assert scale_from_amax(torch.tensor(255.0), 8, unsigned=True) == 1


def test_floats_have_their_largest_number():
    assert largest_code((4, 3)) == 448
    assert largest_code((5, 2)) == 57344
    assert scale_from_amax(torch.tensor(448.0), (4, 3)) == 1


@pytest.mark.parametrize("num_bits", [2, 8, 32, (4, 3), (5, 2)])
def test_known_formats_pass(num_bits):
    check_num_bits(num_bits)


@pytest.mark.parametrize("num_bits", [0, 1, 33, -1, (3, 4), (4,), (4, 3, 1), ()])
def test_unknown_formats_are_refused(num_bits):
    with pytest.raises(ValueError, match=r"`num_bits` is .*: choose 2 to 32"):
        check_num_bits(num_bits)


@pytest.mark.parametrize("num_bits", ["8", 8.0, True, (4.0, 3), None])
def test_other_types_are_refused(num_bits):
    with pytest.raises(TypeError, match="`num_bits` is"):
        check_num_bits(num_bits)


def test_floats_are_signed():
    with pytest.raises(ValueError, match=r"`unsigned` is True with `num_bits=\(4, 3\)`"):
        check_num_bits((4, 3), unsigned=True)
