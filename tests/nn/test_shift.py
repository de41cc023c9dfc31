"""An input that is shifted before it is quantized: exact in float, unsigned in codes, and part of the model's state."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.corrections import input_scaling_
from lq.nn import TensorQuantizer
from lq.nn.convert import to_float_, to_quantized_
from lq.nn.input_channels import add_to_bias_, summed_weight

SHIFT = torch.tensor(0.3)

LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (2, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3, padding=2, dilation=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=(1, 2), stride=2, groups=2, bias=False), (2, 4, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 5, 5)),
    "same": (lambda: nn.Conv2d(4, 3, 4, padding="same"), (2, 4, 5, 6)),
    "one image": (lambda: nn.Conv2d(4, 3, 3, padding=1), (4, 5, 5)),
    "reflect": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(4, 2, 3, padding=1), (2, 4, 5, 5, 5)),
}


def shifted_(layer):
    """Shift the input, and take it from the bias."""
    add_to_bias_(layer, -SHIFT * summed_weight(layer))
    to_quantized_(layer).input_quantizer.pre_quant_shift = SHIFT
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_the_output_stays_and_so_it_does_back_in_float(name):
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    before = layer(x)
    shifted_(layer)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    lq.quantize_(layer)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    to_float_(layer)
    assert type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "conv2d", "same", "reflect"])
def test_codes_are_of_what_was_shifted_padding_too(name):
    """The reference pads, shifts, quantizes to unsigned codes, and convolves without padding."""
    make, shape = LAYERS[name]
    layer, x = shifted_(make()), F.silu(3 * torch.randn(shape))
    lq.quantize_(layer, [lq.QuantRule("*", lq.QuantDescriptor(4, narrow_range=False))])
    with lq.calibrating(layer):
        layer(x)
    quantizer = layer.input_quantizer
    assert quantizer.unsigned
    torch.testing.assert_close(quantizer.amax, x.max() + SHIFT)
    padded, plain = x, copy.deepcopy(layer)
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(x, layer._reversed_padding_repeated_twice, mode)
        plain.padding = (0, 0)
        plain.padding_mode = "zeros"
    scale = quantizer.amax / 15
    codes = ((padded + SHIFT) / scale).round().clamp(0, 15)
    assert (codes.min(), codes.max()) == (0, 15)
    expected = (F.linear if name == "linear" else plain._conv_forward)(codes * scale, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def calibrated():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1, bias=False))
    shifted_(model[2])
    lq.quantize_(model)
    with lq.calibrating(model):
        model(torch.ones(2, 3, 5, 5))
    return model


def test_it_travels_with_the_state():
    model, x = calibrated(), torch.randn(2, 3, 5, 5)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    again = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1))
    lq.quantize_(again)
    again.load_state_dict(model.state_dict())
    assert again[2].input_quantizer.unsigned
    assert torch.equal(again(x), model(x))
    assert again.half()[2].input_quantizer.pre_quant_shift.dtype == torch.float32


def test_a_checkpoint_loads_into_a_model_without_shift_or_bias(tmp_path):
    model, x = calibrated(), torch.randn(2, 3, 5, 5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1, bias=False))
    assert torch.equal(lq.load_quantized(copy.deepcopy(fresh), tmp_path / "model.pt", rules="int8")(x), model(x))
    rules = [lq.QuantRule("0", lq.QuantDescriptor(), lq.QuantDescriptor(axis=0))]
    lq.dequantize_(model)
    shifted_(model[2])
    lq.quantize_(model, rules)
    with lq.calibrating(model):
        model(x)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert torch.equal(lq.load_quantized(fresh, tmp_path / "model.pt", rules=rules)(x), model(x))


def test_it_compiles_and_exports_in_one_graph():
    model, x = calibrated().eval(), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_it_trains():
    model = calibrated()
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert model[2].weight.grad.abs().sum() > 0
    assert model[2].bias.grad.abs().sum() > 0


def test_what_is_negative_still_is_clipped():
    quantizer = TensorQuantizer(lq.QuantDescriptor(amax=1.275))
    quantizer.pre_quant_shift = torch.tensor(0.275)
    torch.testing.assert_close(
        quantizer(torch.tensor([-5.0, -0.275, 0.0, 0.5, 3.0])), torch.tensor([0.0, 0.0, 0.275, 0.775, 1.275])
    )
    layer = shifted_(nn.Linear(2, 1))
    lq.quantize_(layer)
    with lq.calibrating(layer, "mse"):
        layer(torch.tensor([[-7.0, 1.0]]))
    assert layer.input_quantizer.amax.item() == pytest.approx(1.3, rel=0.01)


def test_a_factor_comes_first():
    quantizer = TensorQuantizer(disabled=True)
    quantizer.pre_quant_scale, quantizer.pre_quant_shift = torch.tensor([2.0, 1.0]), torch.tensor(0.5)
    assert quantizer(torch.tensor([1.0, 1.0])).tolist() == [2.5, 1.5]
    assert not quantizer.idle
    layer, x = nn.Linear(2, 2), torch.randn(3, 2)
    before = layer(x)
    to_quantized_(layer).input_quantizer.pre_quant_scale = torch.tensor([2.0, 4.0])
    with torch.no_grad():
        layer.weight /= torch.tensor([2.0, 4.0])
    shifted_(layer)
    torch.testing.assert_close(layer(x), before)
    torch.testing.assert_close(to_float_(layer)(x), before)


def test_a_format_with_a_sign_gets_no_shift():
    layer, x = shifted_(nn.Linear(4, 3)), torch.randn(2, 4)
    before = layer(x)
    lq.quantize_(layer, "fp8")
    assert layer.input_quantizer.pre_quant_shift is None
    torch.testing.assert_close(layer(x), before)


def test_the_amax_that_came_with_the_shift_stays():
    layer = shifted_(nn.Linear(2, 1))
    layer.input_quantizer.amax = 2.0
    lq.quantize_(layer)
    with lq.calibrating(layer):
        layer(torch.tensor([[-0.1, 0.5]]))
    assert layer.input_quantizer.amax == 2
    assert layer.weight_quantizer.amax is not None


def test_no_factor_passes_a_shift():
    model, x = nn.Sequential(nn.LayerNorm(4), shifted_(nn.Linear(4, 4)), nn.Linear(4, 2)), torch.randn(8, 4)
    before = model(x)
    rescaler = lq.RescalingCalibrator(model, args=(x,))
    torch.testing.assert_close(rescaler.rescale()(x), before)
    assert rescaler.left == {"1": "its input is shifted"}
    done = input_scaling_(model[1:], [x])
    assert done.left == {"1": "its input is shifted"}
    torch.testing.assert_close(model(x), before)


def test_what_is_measured_is_what_is_rounded():
    model = calibrated()
    with lq.analysis.measuring(model, ["2.input"]) as stats:
        model(torch.ones(2, 3, 5, 5))
    assert stats["2.input"].sqnr_db > 40
    assert "pre_quant_shift" in repr(model[2].input_quantizer)
