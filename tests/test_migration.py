"""What the documents of pytorch-quantization show, with its import paths under our name."""

import importlib

import pytest
import torch
from torch import nn
from torch.nn.modules import pooling

from lq.nn.modules import _utils

# module, names
DOCUMENTED = [
    ("tensor_quant", "QuantDescriptor ScaledQuantDescriptor tensor_quant fake_tensor_quant legacy_fake_tensor_quant"),
    ("tensor_quant", "fake_affine_tensor_quant scaled_e4m3 QUANT_DESC_8BIT_PER_TENSOR QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW"),
    ("tensor_quant", " ".join(f"QUANT_DESC_8BIT_CONV{n}D_WEIGHT_PER_CHANNEL" for n in (1, 2, 3))),
    ("tensor_quant", " ".join(f"QUANT_DESC_8BIT_CONVTRANSPOSE{n}D_WEIGHT_PER_CHANNEL" for n in (1, 2, 3))),
    ("calib", "MaxCalibrator HistogramCalibrator calibrate_weights"),
    ("nn", "TensorQuantizer Clip QuantLinear Linear QuantLSTM QuantLSTMCell LSTM LSTMCell"),
    ("nn", " ".join(f"{p}{k}{n}d" for p in ("Quant", "") for k in ("Conv", "ConvTranspose") for n in (1, 2, 3))),
    ("nn", " ".join(f"{p}{k}{n}d" for p in ("Quant", "") for k in ("MaxPool", "AvgPool", "AdaptiveAvgPool") for n in (1, 2, 3))),
    ("nn", " ".join(f"{p}InstanceNorm{n}d" for p in ("Quant", "") for n in (1, 2, 3))),
    ("nn.functional", "clip"),
    ("nn.modules.tensor_quantizer", "TensorQuantizer"),
    ("nn.modules._utils", "QuantInputMixin QuantMixin pop_quant_desc_in_kwargs"),
    ("quant_modules", "initialize deactivate QuantModuleReplacementHelper"),
    ("optim.helper", "freeze_parameters group_parameters match_parameters quant_weight_inplace"),
    ("utils.reduce_amax", "reduce_amax"),
    ("utils", "reduce_amax"),
]


@pytest.mark.parametrize(("path", "name"), [(p, n) for p, names in DOCUMENTED for n in names.split()])
def test_documented_names_are_importable(path, name):
    assert callable(getattr(importlib.import_module(f"lq.{path}"), name)) or name.startswith("QUANT_DESC")


@pytest.mark.parametrize("name", ["tensor_quant", "calib", "nn", "quant_modules", "optim", "utils"])
def test_old_submodules_come_with_the_package(name):
    import lq

    assert getattr(lq, name) is importlib.import_module(f"lq.{name}")


# The tutorial "Creating Custom Quantized Modules", with its own spelling


class TutorialMaxPool2d(pooling.MaxPool2d, _utils.QuantInputMixin):
    def __init__(self, kernel_size, stride=None, padding=0, dilation=1, return_indices=False, ceil_mode=False, **kwargs):
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        quant_desc_input = _utils.pop_quant_desc_in_kwargs(self.__class__, input_only=True, **kwargs)
        self.init_quantizer(quant_desc_input)

    def forward(self, input):
        return super().forward(self._input_quantizer(input))

    @property
    def input_quantizer(self):
        return self._input_quantizer


class TutorialLinear(nn.Linear, _utils.QuantMixin):
    def __init__(self, in_features, out_features, bias=True, **kwargs):
        super().__init__(in_features, out_features, bias)
        quant_desc_input, quant_desc_weight = _utils.pop_quant_desc_in_kwargs(self.__class__, **kwargs)
        self.init_quantizer(quant_desc_input, quant_desc_weight)

    def forward(self, input):
        return nn.functional.linear(self._input_quantizer(input), self._weight_quantizer(self.weight), bias=self.bias)

    @property
    def input_quantizer(self):
        return self._input_quantizer

    @property
    def weight_quantizer(self):
        return self._weight_quantizer


def test_the_tutorials_modules_quantize_as_ours_do():
    import lq
    import lq.nn as quant_nn

    x = torch.randn(2, 3, 8, 8)
    desc = lq.QuantDescriptor(num_bits=4)
    assert torch.equal(TutorialMaxPool2d(2)(x), quant_nn.QuantMaxPool2d(2)(x))
    assert torch.equal(TutorialMaxPool2d(2, quant_desc_input=desc)(x), quant_nn.QuantMaxPool2d(2, quant_desc_input=desc)(x))
    theirs, ours = TutorialLinear(8, 4, quant_desc_weight=desc), quant_nn.QuantLinear(8, 4, quant_desc_weight=desc)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(theirs(x), ours(x))
    theirs.weight_quantizer.disable()
    assert not torch.equal(theirs(x), ours(x))
    assert list(dict(lq.named_quantizers(nn.ModuleList([theirs])))) == ["0.input"]


def test_left_over_keywords_are_refused_by_name():
    with pytest.raises(ValueError, match="Unused keys 'descriptor'"):
        TutorialLinear(8, 4, descriptor=None)
    with pytest.raises(ValueError, match=r"Unused keys 'quant_desc_weight'.*TutorialMaxPool2d takes quant_desc_input"):
        TutorialMaxPool2d(2, quant_desc_weight=None)


def test_registered_the_tutorials_module_is_placed_by_quantize(monkeypatch):
    import lq
    from lq.nn.quant_module import ON_REQUEST, QUANT_MODULES

    monkeypatch.setitem(QUANT_MODULES, nn.MaxPool2d, QUANT_MODULES[nn.MaxPool2d])  # ours again after the test
    rare = set(ON_REQUEST)
    for module in ("lq.nn.quant_module", "lq.surgery"):
        monkeypatch.setattr(f"{module}.ON_REQUEST", rare)
    lq.nn.register(nn.MaxPool2d)(TutorialMaxPool2d)
    model = lq.quantize_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)))
    assert type(model[1]) is TutorialMaxPool2d
    assert [name for name, _ in lq.named_quantizers(model)] == ["0.input", "0.weight", "1.input"]
    x = torch.randn(2, 3, 8, 8)
    with lq.calibrating(model):
        model(x)
    assert model[1].input_quantizer.amax == model[0](x).abs().max() or model[1].input_quantizer.amax > 0
    assert type(lq.dequantize_(model)[1]) is nn.MaxPool2d


# The calibration loops of the documents


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(3)]


@pytest.fixture
def model():
    from lq import quant_modules

    with quant_modules.initialize():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def test_the_loop_over_names(model):
    for name, module in model.named_modules():
        if name.endswith("_quantizer"):
            module.enable_calib()
            module.disable_quant()
    for x in batches():
        model(x)
    for name, module in model.named_modules():
        if name.endswith("_quantizer"):
            module.load_calib_amax()
            module.disable_calib()
            module.enable_quant()
    assert model[0].input_quantizer.amax == max(x.abs().max() for x in batches())
    assert torch.equal(model[0].weight_quantizer.amax, model[0].weight.detach().abs().amax((1, 2, 3), keepdim=True))


def test_the_loop_over_quantizers_with_histograms(model):
    from lq import calib, quant_modules
    from lq import nn as quant_nn
    from lq.tensor_quant import QuantDescriptor

    quant_nn.QuantConv2d.set_default_quant_desc_input(QuantDescriptor(calib_method="histogram"))
    try:
        with quant_modules.initialize():
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    finally:
        del quant_nn.QuantConv2d.default_quant_desc_input
    quantizers = [m for m in model.modules() if isinstance(m, quant_nn.TensorQuantizer)]
    for module in quantizers:
        assert module._calibrator is not None
        module.disable_quant()
        module.enable_calib()
    for x in batches():
        model(x)
    for module in quantizers:
        module.enable_quant()
        module.disable_calib()
    amax = {}
    for kwargs in ({"method": "percentile", "percentile": 99}, {"method": "mse"}, {"method": "entropy"}):
        for module in quantizers:
            is_max = isinstance(module._calibrator, calib.MaxCalibrator)
            module.load_calib_amax(**({} if is_max else kwargs))
        amax[kwargs["method"]] = model[0].input_quantizer.amax.item()
    assert len(set(amax.values())) == 3
    assert type(model[3].input_quantizer.calibrator) is calib.MaxCalibrator
    values = torch.cat([x.abs().flatten() for x in batches()])
    assert amax["percentile"] == pytest.approx(torch.quantile(values, 0.99).item(), rel=0.01)
