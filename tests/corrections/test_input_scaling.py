"""The input's range at a power of two: exact in models of every build, and worth it where thresholds are powers of two."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.corrections import input_scaling_

B, L, E = 4, 5, 8


class Skip(nn.Module):
    """The input goes to two layers and past them, rescaled by the model itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x):
        x = x / 2
        return x + self.a(x) + self.b(x)


class Siamese(nn.Module):
    """Two inputs to one layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(E, 6), nn.Linear(6, 2)

    def forward(self, pair, weight=1.0):
        return self.head(self.stem(pair["left"]) * self.stem(pair["right"])) * weight


def tokens():
    return 3 * torch.randn(B, L, E)


def images():
    return 3 * torch.randn(B, 3, 8, 8)


def pair():
    return {"left": tokens(), "right": tokens()}


CASES = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), images, {"0"}, {}),
    "padded": (lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(3, 6, 3, groups=3)), images, {"1"}, {}),
    "flat": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), images, {"1"}, {}),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU()), images, {"0"}, {}),
    "skip": (Skip, tokens, {"a", "b"}, {"Skip": "`add` takes the model's input, and is no layer with weights to divide"}),
    "siamese": (Siamese, pair, {"stem"}, {}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(E, 2, 16, batch_first=True),
        tokens,
        {"self_attn"},
        {"TransformerEncoderLayer": "`add` takes the model's input, and is no layer with weights to divide"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_output_stays_for_the_data_as_it_was(name):
    make, data, layers, reasons = CASES[name]
    model, x = make().eval(), data()
    before = model(x)
    done = input_scaling_(model, [x])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
    assert {applied.name for applied in done.applied} == layers
    assert done.left == reasons
    again = input_scaling_(model, [x])
    assert not again.applied
    lq.quantize_(model)  # the factors stay
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
    with lq.calibrating(model, "percentile", percentile=100, power_of_two=True):
        model(x)
    for applied in done.applied:
        quantizer = model.get_submodule(applied.name).input_quantizer
        largest = max(x[side].abs().max() for side in x) if isinstance(x, dict) else x.abs().max() / (2 if name == "skip" else 1)
        assert quantizer.amax.item() == pytest.approx((largest * applied.factor).item(), rel=2e-3)
        assert quantizer.amax.log2().frac() == 0


def test_the_factor_can_move_into_the_data():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images()
    before = model(x)
    (applied,) = input_scaling_(model, [x]).applied
    model[0].input_quantizer.pre_quant_scale = None
    torch.testing.assert_close(model(x * applied.factor), before, rtol=1e-5, atol=1e-5)


def test_a_factor_that_is_there_stays():
    model, x = nn.Sequential(nn.Linear(E, 4), nn.GELU(), nn.Linear(4, 2)), tokens() * torch.logspace(-1, 1, E)
    before = model(x)
    lq.RescalingCalibrator(model, args=(x,), inplace=True).rescale(0.5)
    assert input_scaling_(model, [x]).applied[0].name == "0"
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lq.dequantize_(model)(x), before, rtol=1e-5, atol=1e-5)


def test_the_error_with_powers_of_two_goes_down_by_5_db():
    """Four bits for an input that reaches just above a power of two."""
    model, x, errors = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)), torch.rand(256, 32) * 8.4 - 4.2, []
    expected = model(x)
    corrected = copy.deepcopy(model)
    input_scaling_(corrected, [x])
    rules = [
        lq.QuantRule("*", lq.QuantDescriptor(8), lq.QuantDescriptor(8, axis=0)),
        lq.QuantRule("0", lq.QuantDescriptor(4), lq.QuantDescriptor(8, axis=0)),
    ]
    for m in (model, corrected):
        lq.quantize_(m, rules)
        with lq.calibrating(m, "percentile", percentile=100, power_of_two=True):
            m(x)
        errors.append(10 * torch.log10((m(x) - expected).square().sum() / expected.square().sum()).item())
    print(errors)
    assert errors[1] < errors[0] - 5


@pytest.mark.parametrize(
    ("model", "x", "left"),
    [
        (
            nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 2)),
            tokens(),
            {"0": "LayerNorm `0` takes the model's input, and is no layer with weights to divide"},
        ),
        (
            nn.Sequential(nn.Embedding(7, E), nn.Linear(E, 2)),
            torch.tensor([[1, 2]]),
            {"0": "Embedding `0` takes the model's input, and is no layer with weights to divide"},
        ),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(E, 2))),
            tokens(),
            {"0": "its weight is computed, or its class unknown"},
        ),
        (nn.Sequential(nn.Linear(E, 2)), torch.full((1, E), 3.999), {"0": "its range is 3.999 already"}),
        (nn.Sequential(nn.Linear(E, 2)), torch.zeros(1, E), {"0": "it saw nothing but zeros"}),
    ],
)
def test_a_model_without_a_place_stays_as_it_is_and_says_why(model, x, left):
    before = copy.deepcopy(model.state_dict())
    done = input_scaling_(model, [x])
    assert not done.applied
    assert done.left == left
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_bad_input():
    model = nn.Sequential(nn.Linear(E, 2))
    with pytest.raises(ValueError, match="`batches` is empty"):
        input_scaling_(model, [])
    with pytest.raises(ValueError, match="`target` is -1"):
        input_scaling_(model, [tokens()], target=-1.0)
    with pytest.raises(ValueError, match="quantized layers"):
        input_scaling_(lq.quantize_(model), [tokens()])
