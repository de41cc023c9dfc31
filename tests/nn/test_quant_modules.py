"""Quantized layers against the float layer of torch, bit for bit; and the registry."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lq.nn as quant_nn
from lq.descriptor import INT8_WEIGHT, QuantDescriptor
from lq.functional.amax import compute_amax
from lq.functional.fake_quant import fake_tensor_quant
from lq.nn import (
    QUANT_MODULES,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantInputMixin,
    QuantLinear,
    QuantMixin,
    TensorQuantizer,
    register,
)
from lq.nn.convert import is_quantizable, to_float_, to_quantized_
from lq.nn.input_channels import scale_input_channels_
from lq.surgery import named_quantizers, quantize_

# float class, its arguments, shape of its input, further arguments of forward
CASES = {
    "linear": (nn.Linear, (6, 4), {}, (5, 6), ()),
    "linear, no bias, sequence": (nn.Linear, (6, 4, False), {}, (2, 5, 6), ()),
    "conv1d": (nn.Conv1d, (4, 6, 3), {"stride": 2, "dilation": 2, "padding": 1}, (2, 4, 11), ()),
    "conv2d": (nn.Conv2d, (4, 6, 3), {}, (2, 4, 7, 8), ()),
    "conv2d, groups": (nn.Conv2d, (4, 6, (3, 2)), {"groups": 2, "bias": False}, (2, 4, 7, 8), ()),
    "conv2d, depthwise": (nn.Conv2d, (4, 4, 3), {"groups": 4, "padding": "same"}, (2, 4, 7, 8), ()),
    "conv2d, circular": (nn.Conv2d, (4, 6, 3), {"padding": 2, "padding_mode": "circular"}, (2, 4, 7, 8), ()),
    "conv2d, reflect": (nn.Conv2d, (4, 6, 3), {"padding": (1, 2), "padding_mode": "reflect"}, (2, 4, 7, 8), ()),
    "conv2d, replicate": (nn.Conv2d, (4, 6, 3), {"padding": 1, "padding_mode": "replicate"}, (2, 4, 7, 8), ()),
    "conv2d, one image": (nn.Conv2d, (4, 6, 3), {}, (4, 7, 8), ()),
    "conv3d": (nn.Conv3d, (2, 3, 2), {"stride": (1, 2, 1)}, (2, 2, 4, 5, 4), ()),
    "conv_transpose1d": (nn.ConvTranspose1d, (4, 6, 3), {"stride": 2}, (2, 4, 5), ()),
    "conv_transpose2d": (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2, "output_padding": 1, "padding": 1}, (2, 4, 5, 6), ()),
    "conv_transpose2d, groups": (nn.ConvTranspose2d, (4, 6, 3), {"groups": 2, "dilation": 2}, (2, 4, 5, 6), ()),
    "conv_transpose2d, output_size": (nn.ConvTranspose2d, (4, 6, 3), {"stride": 2}, (2, 4, 5, 6), ([12, 14],)),
    "conv_transpose3d": (nn.ConvTranspose3d, (2, 3, 2), {"stride": 2, "bias": False}, (2, 2, 3, 3, 3), ()),
}
INPUT_ONLY = {
    "max_pool1d": (nn.MaxPool1d, (3,), {"stride": 2}, (2, 4, 11), ()),
    "max_pool2d": (nn.MaxPool2d, (3,), {"padding": 1, "ceil_mode": True}, (2, 4, 8, 8), ()),
    "max_pool2d, indices": (nn.MaxPool2d, (2,), {"return_indices": True}, (2, 4, 8, 8), ()),
    "max_pool3d": (nn.MaxPool3d, (2,), {"dilation": 2}, (2, 4, 6, 6, 6), ()),
    "avg_pool1d": (nn.AvgPool1d, (3,), {"padding": 1, "count_include_pad": False}, (2, 4, 11), ()),
    "avg_pool2d": (nn.AvgPool2d, (3,), {"divisor_override": 5}, (2, 4, 8, 8), ()),
    "avg_pool3d": (nn.AvgPool3d, (2,), {}, (2, 4, 6, 6, 6), ()),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d, (3,), {}, (2, 4, 11), ()),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d, ((3, None),), {}, (2, 4, 8, 8), ()),
    "adaptive_avg_pool3d": (nn.AdaptiveAvgPool3d, (1,), {}, (2, 4, 6, 6, 6), ()),
    "instance_norm1d": (nn.InstanceNorm1d, (4,), {"affine": True}, (2, 4, 11), ()),
    "instance_norm2d": (nn.InstanceNorm2d, (4,), {}, (2, 4, 8, 8), ()),
    "instance_norm3d": (nn.InstanceNorm3d, (4,), {"track_running_stats": True}, (2, 4, 6, 6, 6), ()),
}
# classes with tests of their own
ELSEWHERE = {"Embedding", "LSTM", "LSTMCell", "MultiheadAttention", "NonDynamicallyQuantizableLinear"}


def made(float_class, args, kwargs, shape, more):
    """A quantized layer, a float layer with the same weights, an input, and further arguments of forward."""
    floating = float_class(*args, **kwargs)
    quantized = QUANT_MODULES[float_class](*args, **kwargs)
    quantized.load_state_dict(floating.state_dict(), strict=True)
    return quantized, floating, torch.randn(shape), more


@pytest.fixture(params=CASES)
def case(request):
    return made(*CASES[request.param])


@pytest.fixture(params=INPUT_ONLY)
def input_only(request):
    return made(*INPUT_ONLY[request.param])


def test_every_registered_layer_is_tested():
    tested = {c[0].__name__ for c in [*CASES.values(), *INPUT_ONLY.values()]} | ELSEWHERE
    assert {c.__name__ for c, q in QUANT_MODULES.items() if c is not q} == tested


def test_every_quantized_layer_has_its_plain_name():
    for float_class, quant_class in QUANT_MODULES.items():
        if float_class is not quant_class and not float_class.__name__.startswith("NonDynamically"):
            assert getattr(quant_nn, f"Quant{float_class.__name__}") is quant_class
            assert getattr(quant_nn, float_class.__name__) is quant_class
            assert {quant_class.__name__, float_class.__name__} <= set(quant_nn.__all__)


def test_disabled_it_is_the_float_layer(case):
    quantized, floating, x, more = case
    for quantizer in quantized.quantizers().values():
        quantizer.disable()
    ours, theirs = quantized(x, *more), floating(x, *more)
    assert torch.equal(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), quantized.parameters()),
        torch.autograd.grad(theirs.square().sum(), floating.parameters()),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_enabled_it_is_the_float_layer_of_the_quantized_input_and_weight(case):
    quantized, floating, x, more = case
    quantized.input_quantizer.amax = 0.8 * x.abs().max()
    quantized.weight_quantizer.amax = 0.9 * compute_amax(quantized.weight, 0)
    with torch.no_grad():
        floating.weight.copy_(fake_tensor_quant(floating.weight, quantized.weight_quantizer.amax))
    expected = floating(fake_tensor_quant(x, quantized.input_quantizer.amax), *more)
    assert torch.equal(quantized(x, *more), expected)
    assert not torch.equal(expected, floating(x, *more))


def test_a_layer_without_weight_is_the_float_layer_of_the_quantized_input(input_only):
    quantized, floating, x, _ = input_only
    assert list(quantized.quantizers()) == ["input"]
    assert not quantized.weights()
    quantized.input_quantizer.amax = 0.8 * x.abs().max()
    expected = floating(fake_tensor_quant(x, quantized.input_quantizer.amax))
    outputs = quantized(x)
    for ours, theirs in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (outputs, expected)), strict=True):
        assert torch.equal(ours, theirs)
    quantized.input_quantizer.disable()
    outputs, expected = quantized(x), floating(x)
    for ours, theirs in zip(*((v,) if isinstance(v, torch.Tensor) else v for v in (outputs, expected)), strict=True):
        assert torch.equal(ours, theirs)


def test_by_default_the_weight_is_per_channel_and_narrow_and_the_input_per_tensor(case):
    quantized, _, x, more = case
    assert quantized.weight_quantizer.quant_desc == INT8_WEIGHT == QuantDescriptor(axis=0)
    assert quantized.input_quantizer.quant_desc == QuantDescriptor()
    quantized.weight_quantizer.enable_calib()
    quantized(x, *more)
    quantized.weight_quantizer.load_calib_amax()
    amax = quantized.weight_quantizer.amax
    assert amax.shape == (quantized.weight.shape[0], *[1] * (quantized.weight.dim() - 1))


def test_the_gradient_stops_at_what_was_clipped():
    layer = QuantLinear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[0.5, 2.0]])
    layer.input_quantizer.amax, layer.weight_quantizer.amax = 4.0, [[1.0]]
    x = torch.tensor([[8.0, 1.0]], requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad.tolist() == [[4.0, 0.0]]
    assert x.grad.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("name", CASES)
def test_scaling_input_channels_of_the_weight_is_scaling_the_input(name):
    float_class, args, kwargs, shape, more = CASES[name]
    layer, x = float_class(*args, **kwargs).double(), torch.randn(shape).double()
    channel = x.dim() - 1 if float_class is nn.Linear else x.dim() - (layer.weight.dim() - 1)
    factors = torch.rand(x.shape[channel], dtype=torch.float64) + 0.5
    expected = layer(x * factors.reshape([-1 if i == channel else 1 for i in range(x.dim())]), *more)
    scale_input_channels_(layer, factors)
    torch.testing.assert_close(layer(x, *more), expected)


# Descriptors


def test_descriptors_come_by_keyword():
    wide, narrow = QuantDescriptor(num_bits=16), QuantDescriptor(num_bits=4, axis=None)
    layer = QuantConv2d(3, 4, 3, quant_desc_input=wide, quant_desc_weight=narrow)
    assert layer.input_quantizer.quant_desc == wide
    assert layer.weight_quantizer.quant_desc == narrow


def test_no_descriptor_leaves_that_side_in_float():
    layer = QuantLinear(3, 2, quant_desc_input=None)
    x = torch.randn(4, 3)
    weight = fake_tensor_quant(layer.weight, compute_amax(layer.weight, 0))
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))


@pytest.mark.parametrize("kwargs", [{"quant_desc_inputs": None}, {"quant_desc": QuantDescriptor()}, {"num_bits": 8}])
def test_an_unknown_keyword_is_a_type_error(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        QuantLinear(3, 2, **kwargs)


@pytest.mark.parametrize("bad", ["int8", 8, {"num_bits": 8}])
def test_what_is_no_descriptor_is_a_type_error(bad):
    with pytest.raises(TypeError, match="no QuantDescriptor"):
        QuantLinear(3, 2, quant_desc_weight=bad)
    for setter in (QuantLinear.set_default_quant_desc_input, QuantLinear.set_default_quant_desc_weight):
        with pytest.raises(TypeError, match="no QuantDescriptor"):
            setter(bad)


def test_defaults_belong_to_the_class_and_to_what_is_made_later(monkeypatch):
    for name in ("default_quant_desc_input", "default_quant_desc_weight"):
        monkeypatch.setattr(QuantLinear, name, getattr(QuantLinear, name))
    earlier = QuantLinear(2, 2)
    QuantLinear.set_default_quant_desc_input(QuantDescriptor(num_bits=4))
    QuantLinear.set_default_quant_desc_weight(QuantDescriptor(num_bits=5))
    later = QuantLinear(2, 2)
    assert (earlier.input_quantizer.num_bits, earlier.weight_quantizer.num_bits) == (8, 8)
    assert (later.input_quantizer.num_bits, later.weight_quantizer.num_bits) == (4, 5)
    assert QuantConv2d(2, 2, 1).input_quantizer.num_bits == 8


# State


def calibrated():
    model = nn.ModuleDict({"conv1": QuantConv2d(3, 4, 3), "up": QuantConvTranspose2d(4, 2, 2), "fc": QuantLinear(2, 2)})
    for layer in model.values():
        layer.input_quantizer.amax = torch.rand(())
        layer.weight_quantizer.amax = compute_amax(layer.weight, 0)
    return model


def empty():
    return nn.ModuleDict({"conv1": QuantConv2d(3, 4, 3), "up": QuantConvTranspose2d(4, 2, 2), "fc": QuantLinear(2, 2)})


def test_a_checkpoint_loads_strictly_with_weights_only():
    file = io.BytesIO()
    torch.save((original := calibrated()).state_dict(), file)
    file.seek(0)
    (target := empty()).load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert target.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), original.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_keys_of_pytorch_quantization_load(prefix):
    original = calibrated()
    old = {
        prefix + k.replace(".input_q", "._input_q").replace(".weight_q", "._weight_q"): v
        for k, v in original.state_dict().items()
    }
    assert f"{prefix}conv1._input_quantizer._amax" in old
    keys = list(old)
    target = empty()
    (nn.ModuleDict({"model": target}) if prefix else target).load_state_dict(old, strict=True)
    assert torch.equal(target["conv1"].input_quantizer.amax, original["conv1"].input_quantizer.amax)
    assert torch.equal(target["fc"].weight_quantizer.amax, original["fc"].weight_quantizer.amax)
    assert list(old) == keys


def test_a_lone_layer_loads_keys_of_pytorch_quantization():
    layer = QuantLinear(3, 2)
    layer.load_state_dict({**nn.Linear(3, 2).state_dict(), "_input_quantizer._amax": torch.tensor(2.0)}, strict=True)
    assert layer.input_quantizer.amax == 2


def test_a_key_that_belongs_nowhere_is_still_refused():
    with pytest.raises(RuntimeError, match="_output_quantizer"):
        QuantLinear(3, 2).load_state_dict({**nn.Linear(3, 2).state_dict(), "_output_quantizer._amax": torch.tensor(2.0)})


def test_a_layer_in_half_precision_keeps_its_amax():
    layer = calibrated()["conv1"]
    amax = layer.weight_quantizer.amax.clone()
    layer.to(torch.bfloat16)
    assert layer(torch.randn(1, 3, 5, 5).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer.weight_quantizer.amax, amax)


# Registry


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return x * self.weight


class QuantScale(QuantMixin, Scale):
    def forward(self, x):
        return self.input_quantizer(x) * self.weight_quantizer(self.weight)


class QuantReLU(QuantInputMixin, nn.ReLU):
    def forward(self, input):
        return super().forward(self.input_quantizer(input))


@pytest.fixture
def registered():
    before = dict(QUANT_MODULES)
    register(Scale)(QuantScale)
    register(nn.ReLU)(QuantReLU)
    yield
    QUANT_MODULES.clear()
    QUANT_MODULES.update(before)


@pytest.mark.usefixtures("registered")
def test_a_registered_class_is_placed_by_quantize():
    model = quantize_(nn.Sequential(Scale(3), nn.ReLU(), nn.Tanh()))
    assert [type(m) for m in model] == [QuantScale, QuantReLU, nn.Tanh]
    assert [name for name, _ in named_quantizers(model)] == ["0.input", "0.weight", "1.input"]


@pytest.mark.usefixtures("registered")
def test_a_registered_class_takes_descriptors_too():
    layer = QuantScale(3, quant_desc_input=QuantDescriptor(num_bits=4), quant_desc_weight=None)
    assert layer.input_quantizer.num_bits == 4
    x = torch.randn(2, 3)
    assert torch.equal(layer(x), fake_tensor_quant(x, x.abs().max(), 4) * layer.weight)


def test_a_class_that_does_not_take_over_the_float_class_is_refused():
    with pytest.raises(TypeError, match="QuantScale must subclass Linear"):
        register(nn.Linear)(QuantScale)
    assert QUANT_MODULES[nn.Linear] is QuantLinear


def test_a_subclass_is_not_taken_for_its_base():
    class Special(nn.Linear):
        pass

    assert is_quantizable(nn.Linear(2, 2))
    assert not is_quantizable(Special(2, 2))
    assert not is_quantizable(QuantLinear(2, 2))
    assert is_quantizable(QuantLinear(2, 2, quant_desc_input=None, quant_desc_weight=None))


# There and back


def test_to_quantized_and_back_keeps_the_object_and_what_it_computes(case):
    _, layer, x, more = case
    before, kind, keys = layer(x, *more), type(layer), set(vars(layer))
    assert to_quantized_(layer, QuantDescriptor(), INT8_WEIGHT) is layer
    assert type(layer) is QUANT_MODULES[kind]
    assert all(isinstance(q, TensorQuantizer) for q in layer.quantizers().values())
    assert to_float_(layer) is layer
    assert type(layer) is kind
    assert set(vars(layer)) == keys
    assert not layer._modules
    assert torch.equal(layer(x, *more), before)


def test_placing_quantizers_keeps_a_factor_on_the_input():
    layer = to_quantized_(nn.Linear(3, 2))
    layer.input_quantizer.pre_quant_scale = factor = torch.rand(3)
    x = torch.randn(4, 3)
    before = layer(x)
    quantize_(layer)
    assert torch.equal(layer.input_quantizer.pre_quant_scale, factor)
    assert torch.equal(layer(x), before)


def test_back_in_float_a_factor_on_the_input_is_in_the_weight():
    layer = to_quantized_(nn.Conv2d(3, 4, 3).double())
    layer.input_quantizer.pre_quant_scale = torch.rand(3, 1, 1) + 0.5
    x = torch.randn(2, 3, 5, 5).double()
    before = copy.deepcopy(layer)(x)
    torch.testing.assert_close(to_float_(layer)(x), before)
