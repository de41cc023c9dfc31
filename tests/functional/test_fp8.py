"""FP8 fake quantization equals torch's casts."""

import pytest
import torch

from lq.functional.fake_quant import fake_quant, scaled_e4m3
from lq.functional.grid import FLOAT_FORMATS

FORMATS = list(FLOAT_FORMATS.items())


@pytest.mark.parametrize(("bits", "dtype"), FORMATS)
def test_without_amax_it_is_a_cast_that_saturates(bits, dtype):
    x = torch.cat([torch.randn(5000) * 10.0 ** torch.randint(-6, 4, (5000,)), torch.zeros(1)])
    largest = torch.finfo(dtype).max
    expected = x.clamp(-largest, largest).to(dtype).float()
    assert torch.equal(scaled_e4m3(x, None, *bits), expected)


@pytest.mark.parametrize(("bits", "dtype"), FORMATS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_amax_is_the_largest_number_of_the_format(per_channel, bits, dtype):
    x = torch.randn(4, 1000)
    amax = x.abs().amax(1, keepdim=True) * 0.7 if per_channel else torch.tensor(2.0)
    largest = torch.finfo(dtype).max
    scale = amax / torch.tensor(largest)
    expected = (x / scale).clamp(-largest, largest).to(dtype).float() * scale
    assert torch.equal(scaled_e4m3(x, amax, *bits), expected)
    assert torch.equal(fake_quant(x, amax, bits, unsigned=False, narrow_range=True), expected)


@pytest.mark.parametrize(("bits", "dtype"), FORMATS)
def test_every_number_of_the_format_is_a_fixed_point(bits, dtype):
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite()]
    assert len(numbers) > 240
    assert torch.equal(scaled_e4m3(numbers, None, *bits), numbers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.randn(1000).to(dtype)
    y = scaled_e4m3(x, 1.7)
    assert y.dtype == dtype
    assert torch.equal(y, scaled_e4m3(x.float(), 1.7).to(dtype))


def test_gradients_pass_within_amax():
    x = torch.tensor([-3.0, -2.0, 0.1, 2.0, 2.5], requires_grad=True)
    scaled_e4m3(x, 2.0).backward(torch.arange(1.0, 6.0))
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


def test_another_format_is_refused():
    with pytest.raises(ValueError, match=r"`num_bits` is \(3, 4\)"):
        scaled_e4m3(torch.zeros(2), None, 3, 4)


def test_opcheck():
    x = torch.randn(3, 4, requires_grad=True)
    for amax in (torch.tensor(1.0), torch.rand(3, 1) + 0.5):
        torch.library.opcheck(torch.ops.lq.fake_quant_float.default, (x, amax, 4, 3))


def test_compiles_as_one_graph():
    x = torch.randn(6, 8)
    assert torch.equal(torch.compile(scaled_e4m3, fullgraph=True, backend="aot_eager")(x, 2.0), scaled_e4m3(x, 2.0))
