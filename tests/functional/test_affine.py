"""Affine fake quantization against its formula in NumPy and against torch's own operator."""

import numpy as np
import pytest
import torch

from lq.functional.affine import fake_affine_tensor_quant


def reference(x, low, high, num_bits):
    low, high = low.astype(x.dtype), high.astype(x.dtype)
    scale = (high - low) / x.dtype.type(2**num_bits - 1)
    zero = np.rint(low / scale)
    return (np.clip(np.rint(x / scale) - zero, 0, 2**num_bits - 1) + zero) * scale


@pytest.mark.parametrize("num_bits", [2, 4, 8, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_channel", [False, True])
def test_equals_the_formula_bit_for_bit(per_channel, dtype, num_bits):
    x = torch.randn(3, 500, dtype=dtype)
    shape = (3, 1) if per_channel else ()
    low, high = -torch.rand(shape, dtype=dtype) - 0.1, torch.rand(shape, dtype=dtype) + 0.5
    expected = reference(x.numpy(), low.numpy(), high.numpy(), num_bits)
    np.testing.assert_array_equal(fake_affine_tensor_quant(x, low, high, num_bits).numpy(), expected)


def test_equals_torchs_own_operator_but_for_ties():
    x, low, high = torch.randn(20_000), -0.7, 2.1
    scale = (high - low) / 255
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)
    ours = fake_affine_tensor_quant(x, low, high)
    assert ((ours - theirs).abs() > scale / 2).float().mean() < 1e-3


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 1.0), (-5.0, -0.0)])
def test_zero_is_on_the_grid(low, high):
    assert fake_affine_tensor_quant(torch.zeros(2), low, high).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.randn(1000).to(dtype)
    y = fake_affine_tensor_quant(x, -1.234, 0.777)
    assert torch.equal(y, fake_affine_tensor_quant(x.float(), -1.234, 0.777).to(dtype))


def test_a_range_of_nothing_gives_that_value_at_most():
    assert fake_affine_tensor_quant(torch.tensor([-1.0, 0.0, 5.0]), 0.0, 0.0).abs().max() < 1e-30


def test_gradients_pass_within_the_range():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 0.6], requires_grad=True)
    fake_affine_tensor_quant(x, -1.0, 0.5).backward(torch.arange(1.0, 6.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((1.0, -1.0), "`min_range` is 1.0 and `max_range` -1.0"),
        ((float("nan"), 1.0), "must be finite"),
        ((0.0, float("inf")), "must be finite"),
        ((0.0, 1.0, 33), "`num_bits` is 33"),
        ((0.0, 1.0, (4, 3)), "`num_bits`"),
        ((torch.zeros(4), 1.0), r"shape \(4,\), which does not broadcast"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        fake_affine_tensor_quant(torch.zeros(2, 3), *args)


def test_opcheck():
    args = (torch.randn(3, 4, requires_grad=True), torch.tensor(-1.0), torch.rand(3, 1) + 0.5, 8)
    torch.library.opcheck(torch.ops.lq.fake_quant_affine.default, args)
