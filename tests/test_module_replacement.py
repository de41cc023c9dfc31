"""`lq.quant_modules`: patching torch, and how it is undone."""

import pytest
import torch
from torch import nn

import lq.nn as quant_nn
from lq import quant_modules
from lq.nn import QUANT_MODULES, QuantInputMixin, QuantLinear
from lq.quant_modules import DEFAULT_NAMES

FLOAT = {name: getattr(nn, name) for name in (*DEFAULT_NAMES, "ReLU")}


class QuantReLU(nn.ReLU, QuantInputMixin):
    def forward(self, input):
        return super().forward(self.input_quantizer(input))


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    now = {name: getattr(nn, name) for name in FLOAT}
    quant_modules.deactivate()
    for name, float_class in FLOAT.items():
        setattr(nn, name, float_class)
    assert now == FLOAT, "the test left torch patched"


def test_models_made_afterwards_are_quantized_and_deactivate_undoes_it():
    quant_modules.initialize()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.LSTM(4, 4), nn.Linear(4, 2), nn.MaxPool2d(2))
    quant_modules.deactivate()
    assert [type(m) for m in model] == [
        *(quant_nn.QuantConv2d, quant_nn.QuantAvgPool2d, quant_nn.QuantLSTM, quant_nn.QuantLinear, nn.MaxPool2d)
    ]
    assert type(nn.Linear(2, 2)) is FLOAT["Linear"]
    x = torch.randn(1, 3, 8, 8)
    assert not torch.equal(model[0](x), nn.functional.conv2d(x, model[0].weight, model[0].bias))


@pytest.mark.parametrize("name", DEFAULT_NAMES)
def test_every_documented_class_is_replaced(name):
    with quant_modules.initialize():
        assert getattr(nn, name) is QUANT_MODULES[FLOAT[name]] is getattr(quant_nn, f"Quant{name}")


def test_named_classes_stay_float():
    with quant_modules.initialize(["Linear", "LSTM"]):
        assert (nn.Linear, nn.LSTM) == (FLOAT["Linear"], FLOAT["LSTM"])
        assert nn.Conv2d is quant_nn.QuantConv2d


def test_custom_replacements_come_on_top_and_go_before_the_list():
    with quant_modules.initialize(["Linear"], [(nn, "Linear", QuantLinear), (nn, "ReLU", QuantReLU)]):
        assert (nn.Linear, nn.ReLU) == (QuantLinear, QuantReLU)
        assert isinstance(nn.ReLU().input_quantizer, quant_nn.TensorQuantizer)


def test_a_with_block_undoes_it_also_after_an_exception():
    with pytest.raises(KeyError), quant_modules.initialize():
        raise KeyError


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        ((["Linaer"],), ValueError, "`float_module_list` has 'Linaer'"),
        ((None, [(nn, "Linaer", QuantLinear)]), ValueError, "'Linaer', which is no module class of torch.nn"),
        ((None, [(nn, "Linear", "QuantLinear")]), TypeError, "'QuantLinear', which is no module class"),
    ],
)
def test_bad_input_replaces_nothing(args, kind, message):
    with pytest.raises(kind, match=message):
        quant_modules.initialize(*args)
    assert nn.Conv2d is FLOAT["Conv2d"]


def test_twice_is_refused_and_leaves_the_first():
    with quant_modules.initialize(["Linear"]):
        with pytest.raises(RuntimeError, match=r"deactivate\(\)"):
            quant_modules.initialize()
        assert nn.Linear is FLOAT["Linear"]


def test_float_models_are_still_recognized_while_it_is_active():
    model = nn.Sequential(nn.Linear(3, 2))
    with quant_modules.initialize():
        from lq.surgery import quantize_

        assert type(quantize_(model)[0]) is QuantLinear
