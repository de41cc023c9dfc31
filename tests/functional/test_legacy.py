"""pytorch-quantization's `tensor_quant` and `legacy_fake_tensor_quant`: its documented example, its formula in NumPy."""

import numpy as np
import pytest
import torch

from lq.functional.amax import compute_amax
from lq.functional.fake_quant import fake_tensor_quant
from lq.functional.legacy import legacy_fake_tensor_quant, tensor_quant

QUANTIZE = [tensor_quant, legacy_fake_tensor_quant]


def reference(x, amax, num_bits=8, unsigned=False, narrow=True):
    """Codes and ``scale = qmax / amax``, in the dtype of ``x``."""
    high = 2**num_bits - 1 if unsigned else 2 ** (num_bits - 1) - 1
    low = 0 if unsigned else -high - (not narrow)
    scale = x.dtype.type(high) / amax.astype(x.dtype)
    return np.clip(np.rint(x * scale), low, high), scale


@pytest.fixture
def documented():
    torch.manual_seed(12345)
    return torch.rand(10)


def test_the_documented_integers_and_scale(documented):
    codes, scale = tensor_quant(documented, documented.abs().max())
    assert codes.tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]
    assert scale.item() == pytest.approx(128.0057, abs=5e-5)


@pytest.mark.parametrize("quantize", [fake_tensor_quant, legacy_fake_tensor_quant])
def test_the_documented_fake_quantization(quantize, documented):
    real = [0.9843, 0.8828, 0.9921, 0.4609, 0.0859, 0.1797, 0.3672, 0.5703, 0.3359, 0.2109]
    torch.testing.assert_close(quantize(documented, documented.abs().max()), torch.tensor(real), rtol=0, atol=5e-5)


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (0, 1, 2)])
@pytest.mark.parametrize(("unsigned", "narrow"), [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("num_bits", [2, 4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_formula_bit_for_bit(dtype, num_bits, unsigned, narrow, axis):
    x = torch.randn(4, 5, 600, dtype=dtype)
    x = x.abs() if unsigned else x
    amax = compute_amax(x, axis) * 0.8
    codes, scale = reference(x.numpy(), amax.numpy(), num_bits, unsigned, narrow)
    ours, our_scale = tensor_quant(x, amax, num_bits, unsigned, narrow)
    np.testing.assert_array_equal(ours.numpy(), codes)
    np.testing.assert_array_equal(our_scale.numpy(), scale)
    np.testing.assert_array_equal(legacy_fake_tensor_quant(x, amax, num_bits, unsigned, narrow).numpy(), codes / scale)


def test_the_scale_is_a_true_quotient():
    # 127.0 / tensor is reciprocal times 127 in torch, one ulp off for a good part of all numbers
    amax = torch.rand(1000) + 0.5
    _, scale = tensor_quant(torch.zeros(1000), amax)
    np.testing.assert_array_equal(scale.numpy(), np.float32(127) / amax.numpy())
    assert (scale != amax.reciprocal() * 127).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_returned_in_its_dtype(dtype):
    x, amax = torch.randn(1000).to(dtype), torch.tensor(1.234567)
    codes, scale = tensor_quant(x, amax)
    wide, wide_scale = tensor_quant(x.float(), amax)
    assert codes.dtype == scale.dtype == dtype
    assert torch.equal(codes, wide.to(dtype))
    assert torch.equal(scale, wide_scale.to(dtype))
    assert torch.equal(legacy_fake_tensor_quant(x, amax), (wide / wide_scale).to(dtype))


def test_a_scale_too_large_for_float16_is_refused():
    x = torch.zeros(3, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"scale 127000 of `amax` 0.001 is too large for torch.float16: quantize `inputs.float\(\)`"
    ):
        tensor_quant(x, torch.tensor(0.001))
    tensor_quant(x, torch.tensor(0.002))
    tensor_quant(x.float(), torch.tensor(0.001))
    assert legacy_fake_tensor_quant(x, torch.tensor(0.001)).tolist() == [0, 0, 0]


def test_an_amax_of_zero_gives_zeros_with_scale_one():
    x = torch.tensor([[0.0, 1.0, -1e30], [1.0, 2.0, 3.0]])
    amax = torch.tensor([[2**-24], [3.0]])
    codes, scale = tensor_quant(x, amax)
    assert codes.tolist() == [[0, 0, 0], [42, 85, 127]]
    assert scale[0] == 1
    assert legacy_fake_tensor_quant(x, amax)[0].tolist() == [0, 0, 0]


def test_codes_over_scale_dequantizes():
    x, amax = torch.randn(3, 100), torch.rand(3, 1) + 1
    codes, scale = tensor_quant(x, amax)
    torch.testing.assert_close(codes / scale, fake_tensor_quant(x, amax), rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantize", [lambda *a: tensor_quant(*a)[0], legacy_fake_tensor_quant], ids=["codes", "fake"])
def test_gradients_pass_within_amax_and_stop_outside(quantize):
    x = torch.tensor([-1.5, -1.0, -0.3, 0.0, 0.7, 1.0, 1.00001, 9.0], requires_grad=True)
    quantize(x, torch.tensor(1.0)).backward(torch.arange(1.0, 9.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0, 0]
    x.grad = None
    positive = x.detach().abs().requires_grad_()
    quantize(positive, torch.tensor(1.0), 8, True).backward(torch.arange(1.0, 9.0))
    assert positive.grad.tolist() == [0, 2, 3, 4, 5, 6, 0, 0]
