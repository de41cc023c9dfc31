"""Bad arguments of every quantization function: the argument, the value, the remedy."""

import re

import pytest
import torch

from lq.functional.fake_quant import fake_tensor_quant, scaled_e4m3
from lq.functional.legacy import legacy_fake_tensor_quant, tensor_quant

INTEGERS = [fake_tensor_quant, tensor_quant, legacy_fake_tensor_quant]


@pytest.mark.parametrize("quantize", [*INTEGERS, scaled_e4m3])
@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), [[1.0], [-0.5]]])
def test_amax_must_be_finite_and_not_negative(quantize, bad):
    with pytest.raises(ValueError, match=r"`amax` must be finite and not negative, found (-1|nan|inf|-0.5)"):
        quantize(torch.zeros(2, 3), torch.tensor(bad))


@pytest.mark.parametrize("quantize", [*INTEGERS, scaled_e4m3])
@pytest.mark.parametrize("shape", [(2,), (4, 1), (1, 1, 1), (3, 2)])
def test_amax_must_broadcast_to_the_inputs(quantize, shape):
    with pytest.raises(ValueError, match=r"`amax` has shape .* does not broadcast to inputs of shape \(2, 3\)"):
        quantize(torch.zeros(2, 3), torch.ones(shape))


@pytest.mark.parametrize("quantize", INTEGERS)
def test_unsigned_refuses_negative_values(quantize):
    with pytest.raises(TypeError, match=r"`unsigned` is True, but inputs go down to -0.25"):
        quantize(torch.tensor([1.0, -0.25]), torch.tensor(1.0), 8, True)
    quantize(torch.tensor([1.0, 0.0]), torch.tensor(1.0), 8, True)


@pytest.mark.parametrize("quantize", INTEGERS)
@pytest.mark.parametrize("num_bits", [0, 1, 33, -8, (4, 3)])
def test_num_bits_must_be_those_of_an_integer(quantize, num_bits):
    with pytest.raises(ValueError, match=re.escape(f"`num_bits` is {num_bits}: choose 2 to 32 for an integer.")):
        quantize(torch.zeros(2), torch.tensor(1.0), num_bits)


@pytest.mark.parametrize("quantize", [*INTEGERS, scaled_e4m3])
def test_integers_are_not_quantized(quantize):
    with pytest.raises(TypeError, match=r"`inputs` are torch.int64"):
        quantize(torch.tensor([1, 2]), torch.tensor(1.0))


@pytest.mark.parametrize("quantize", INTEGERS)
@pytest.mark.parametrize("inputs", [torch.zeros(2, 3), torch.zeros(0, 3), torch.zeros(0)])
def test_zeros_and_empty_tensors_are_fine(quantize, inputs):
    outputs = quantize(inputs, 1.0, 8, True)
    assert torch.equal(outputs[0] if isinstance(outputs, tuple) else outputs, inputs)


@pytest.mark.parametrize("quantize", INTEGERS)
def test_denormals_are_fine(quantize):
    tiny = torch.tensor([1e-45, -1e-40, 1e-38])
    for amax in (torch.tensor(1e-45), torch.tensor(1e-40), torch.tensor(1.0)):
        outputs = quantize(tiny, amax)
        assert all(v.isfinite().all() for v in (outputs if isinstance(outputs, tuple) else [outputs]))


def test_a_number_is_an_amax_too():
    x = torch.randn(5)
    assert torch.equal(fake_tensor_quant(x, 1.5), fake_tensor_quant(x, torch.tensor(1.5)))


def test_a_number_keeps_its_digits_for_float64():
    x = torch.tensor([5.0], dtype=torch.float64)
    assert fake_tensor_quant(x, 0.1).item() == fake_tensor_quant(x, torch.tensor(0.1, dtype=torch.float64)).item() == 0.1


def test_another_type_is_named():
    with pytest.raises(TypeError, match="`inputs` is a list: it must be a floating tensor"):
        fake_tensor_quant([1.0], 1.0)
    with pytest.raises(TypeError, match="`amax` is None: it must be a tensor or a number"):
        fake_tensor_quant(torch.ones(2), None)


def test_the_place_of_a_former_argument_is_not_taken_for_another():
    with pytest.raises(TypeError, match=r"`unsigned` is torch.float32: it must be True or False .*`output_dtype`"):
        tensor_quant(torch.ones(2), torch.tensor(1.0), 8, torch.float)


def test_codes_fit_their_dtype():
    assert tensor_quant(torch.ones(2, dtype=torch.bfloat16), 1.0, 9)[0].tolist() == [255, 255]
    with pytest.raises(ValueError, match=r"`num_bits` is 10, and torch\.bfloat16 has no room for the code 511"):
        tensor_quant(torch.ones(2, dtype=torch.bfloat16), 1.0, 10)
