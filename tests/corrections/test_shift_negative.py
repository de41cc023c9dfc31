"""Inputs with a small negative lobe without a sign: exact in models of every build, and worth a bit."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.corrections import input_scaling_, shift_negative_activation_correction_

B, L, E = 4, 5, 8


class Functional(nn.Module):
    """Swish three ways, pooled, flattened, joined."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.mix = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=2, dilation=2)
        self.fc = nn.Linear(32, 2, bias=False)

    def forward(self, x):
        x = F.silu(self.bn(self.conv(x)))
        x = self.mix(x)
        pooled = F.adaptive_avg_pool2d(torch.cat([x * x.sigmoid(), F.hardswish(x)], 1), 2)
        return self.fc(pooled.flatten(1))


class Residual(nn.Module):
    """What the activation gives goes past the layer too."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.head = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, 2)

    def forward(self, x):
        x = F.gelu(self.stem(x))
        return self.head(F.mish(x + self.a(x)))


class Conv1D(nn.Module):
    """transformers' linear layer, known by its name."""

    __module__, __qualname__ = "transformers.pytorch_utils", "Conv1D"

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Twice(nn.Module):
    """A layer that runs twice, on different inputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x):
        return self.fc(F.elu(self.fc(F.gelu(self.stem(x))), alpha=0.1))


def tokens():
    return 3 * torch.randn(B, L, E)


def images():
    return 3 * torch.randn(B, 3, 8, 8)


def mobile():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)),
        *(nn.BatchNorm2d(6), nn.PReLU(init=0.05), nn.ZeroPad2d(1), nn.Conv2d(6, 4, 3, padding="same", groups=2)),
        *(nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 2, padding=1, padding_mode="circular")),
    )


# A model, its input, the layers whose input is shifted, and the reasons for others.
MORE = "more than 0.5 of amax"
CASES = {
    "mobile": (mobile, images, {"3", "7", "10"}, {"0": MORE}),
    "functional": (Functional, images, {"mix", "fc"}, {"conv": MORE}),
    "residual": (Residual, tokens, {"a", "head"}, {"stem": MORE}),
    "twice": (Twice, tokens, {"fc"}, {"stem": MORE}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(E, 2, 16, activation="gelu", batch_first=True),
        tokens,
        {"linear2"},
        {"self_attn": "MultiheadAttention is no linear layer or convolution", "self_attn.out_proj": MORE, "linear1": MORE},
    ),
    "transposed": (lambda: nn.Sequential(Conv1D(E, 6), nn.SiLU(), Conv1D(6, 2)), tokens, {"2"}, {"0": MORE}),
    "sequence": (
        lambda: nn.Sequential(nn.Conv1d(L, 4, 3), nn.LeakyReLU(0.02), nn.Conv1d(4, 4, 3, padding=1, stride=2)),
        tokens,
        {"2"},
        {"0": MORE},
    ),
    "volume": (
        lambda: nn.Sequential(nn.SiLU(), nn.Conv3d(1, 2, 3, padding=(1, 0, 2))),
        lambda: 5 * torch.randn(2, 1, 4, 4, 4),
        {"1"},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recalculation", [False, True])
def test_the_output_stays_and_no_sign_is_left(name, recalculation):
    make, data, layers, reasons = CASES[name]
    model, x = make().eval(), data()
    before, original = model(x), copy.deepcopy(model)
    done = shift_negative_activation_correction_(model, [x[:2], x[2:]], ratio=0.5, threshold_recalculation=recalculation)
    tolerance = 1e-5 * before.abs().max().item()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=tolerance)
    torch.testing.assert_close(copy.deepcopy(model)(x), before, rtol=1e-5, atol=tolerance)
    assert {applied.name for applied in done.applied} == layers
    assert {n: MORE if MORE in r else r for n, r in done.left.items()} == reasons
    assert shift_negative_activation_correction_(model, [x]).left.keys() == layers | reasons.keys()  # done once
    lq.quantize_(model)
    with lq.calibrating(model):
        model(x)
    lows = lowest(original, layers, x)
    for layer in layers:
        quantizer = model.get_submodule(layer).input_quantizer
        shift = quantizer.pre_quant_shift.item()
        assert quantizer.unsigned
        assert lows[layer] <= shift
        if not recalculation:
            assert quantizer.fixed
            steps = shift / quantizer.scale.item()
            assert steps == pytest.approx(round(steps), abs=1e-3)  # zero is one of the values
            assert shift - lows[layer] < 1.5 * quantizer.scale.item()
    for stray in reasons:
        assert not any(q.unsigned for q in model.get_submodule(stray).quantizers().values())
    fresh = lq.quantize_(make().eval())
    if name not in ("mobile", "functional"):  # which have layers that got a bias
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), model(x))
    torch.testing.assert_close(lq.dequantize_(model)(x), before, rtol=1e-5, atol=tolerance)


def lowest(model, layers, x):
    """Magnitude of the smallest value that each layer takes."""
    found = {}
    for name in layers:

        def note(module, args, name=name):
            found[name] = max(found.get(name, 0), -args[0].min().item())

        model.get_submodule(name).register_forward_pre_hook(note)
    with lq.nn.fast_paths.without_fast_paths(model):
        model(x)
    return found


def decibels(output, expected):
    return 10 * torch.log10(expected.square().sum() / (output - expected).square().sum()).item()


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Mish(), nn.ELU(0.3), nn.LeakyReLU(0.02)])
@pytest.mark.parametrize("recalculation", [False, True])
def test_the_error_of_four_bits_goes_down_by_4_db(activation, recalculation):
    """A step is 15/7 as fine, less the shift: 6.6 dB at most."""
    model = nn.Sequential(activation, nn.Conv2d(8, 16, 3, padding=1))
    x = 4 * torch.randn(16, 8, 12, 12)
    expected, corrected, gains = model(x), copy.deepcopy(model), []
    assert shift_negative_activation_correction_(
        corrected, [x], threshold_recalculation=recalculation, desc=lq.QuantDescriptor(4)
    ).applied
    for m in (model, corrected):
        lq.quantize_(m, [lq.QuantRule("*", lq.QuantDescriptor(4), lq.QuantDescriptor(8, axis=0))])
        with lq.calibrating(m):
            m(x)
        gains.append(decibels(m(x), expected))
    print(gains)
    assert gains[1] > gains[0] + 4


@pytest.mark.parametrize(("method", "gain"), [("max", 5), ("mse", 3)])
def test_the_error_of_a_whole_model_goes_down(method, gain):
    """Inputs of 4 bits and weights of 8 in four layers of a GELU network, and the sign is half of what there is."""
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.GELU())), nn.Linear(64, 10))
    for linear in model[:-1:2]:
        nn.init.normal_(linear.weight, std=0.3)
    x = torch.randn(256, 64)
    expected, corrected, gains = model(x), copy.deepcopy(model), []
    desc = lq.QuantDescriptor(4)
    assert len(shift_negative_activation_correction_(corrected, [x], desc=desc, method=method).applied) == 4
    rules = [lq.QuantRule("*", desc, lq.QuantDescriptor(8, axis=0)), lq.QuantRule("0", None, lq.QuantDescriptor(8, axis=0))]
    for m in (model, corrected):
        lq.quantize_(m, rules)
        with lq.calibrating(m, method):
            m(x)
        gains.append(decibels(m(x), expected))
    print(gains)
    assert gains[1] > gains[0] + gain


@pytest.mark.parametrize(("bits", "shift"), [(2, 2.0), (3, 4 / 6), (8, 17 * 4 / 238)])
def test_the_shift_is_a_whole_number_of_steps(bits, shift):
    """Of (4 + shift) / (2**bits - 1): the fewest that make -0.278 positive."""
    model, x = nn.Sequential(nn.Linear(1, 1)), torch.tensor([[4.0], [-0.278]])
    shift_negative_activation_correction_(model, [x], desc=lq.QuantDescriptor(bits))
    quantizer = model[0].input_quantizer
    assert quantizer.pre_quant_shift.item() == pytest.approx(shift, rel=1e-4)
    assert quantizer.amax.item() == pytest.approx(4 + shift, rel=1e-4)


def test_a_power_of_two_stays_one():
    model, x = nn.Sequential(nn.Hardswish(), nn.Linear(1, 1)), torch.tensor([[-1.5], [5.5]])
    options = {"method": "percentile", "percentile": 100.0, "power_of_two": True}
    done = shift_negative_activation_correction_(copy.deepcopy(model), [1.4 * x], **options)
    assert done.left["1"] == "its input goes up to 7.7, and with the shift 0.3451 beyond amax 8"
    shift_negative_activation_correction_(model, [x], **options)
    quantizer = model[1].input_quantizer
    assert quantizer.amax == 8
    assert quantizer.pre_quant_shift.item() == pytest.approx(math.ceil(0.375 * 255 / 8) * 8 / 255)


def test_a_power_of_two_is_chosen_on_the_grid_that_it_makes():
    """0.95 is nearer to 1.0, the third code of 2, than to 0.75, the last one of 1."""
    model, x = nn.Sequential(nn.Identity(), nn.Linear(1, 1)), torch.tensor([[0.95]] * 50 + [[-0.05]])
    desc = lq.QuantDescriptor(3, scale_amax=3 / 4)
    assert shift_negative_activation_correction_(model, [x], method="mse", power_of_two=True, desc=desc).applied
    assert model[1].input_quantizer.amax == 2


def test_the_ratio_decides():
    model, x = nn.Sequential(nn.Identity(), nn.Linear(1, 1)), torch.tensor([[-1.0], [5.0]])
    assert not shift_negative_activation_correction_(copy.deepcopy(model), [x], ratio=0.19).applied
    assert shift_negative_activation_correction_(copy.deepcopy(model), [x], ratio=0.2).applied
    clipped = shift_negative_activation_correction_(model, [x], ratio=0.3, method="percentile", percentile=50.0)
    assert clipped.left["1"] == "its input goes down to -1, more than 0.3 of amax 1.002"


def test_it_goes_behind_a_factor():
    model, x = nn.Sequential(nn.Linear(4, 2)), F.gelu(4 * torch.randn(64, 4))
    before = model(x)
    (scaled,) = input_scaling_(model, [x]).applied
    assert shift_negative_activation_correction_(model, [x]).applied
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    quantizer = model[0].input_quantizer
    assert 0 <= (x * scaled.factor).min() + quantizer.pre_quant_shift < quantizer.amax / 255


@pytest.mark.parametrize(
    ("model", "x", "left"),
    [
        (nn.Sequential(nn.ReLU(), nn.Linear(E, 2)), tokens(), {"1": "its input has no negative values"}),
        (nn.Sequential(nn.ReLU(), nn.Linear(E, 2)), -tokens().abs(), {"1": "its input has no negative values"}),
        (
            nn.Sequential(nn.GELU(), nn.ConvTranspose2d(3, 2, 2)),
            images(),
            {"1": "parts of its output meet other parts of the kernel, so no bias makes up for a shift"},
        ),
        (
            nn.Sequential(nn.GELU(), nn.utils.parametrizations.weight_norm(nn.Linear(E, 2))),
            tokens(),
            {"1": "its weight is computed, or its class unknown"},
        ),
    ],
)
def test_a_model_without_a_place_stays_as_it_is_and_says_why(model, x, left):
    before = copy.deepcopy(model.state_dict())
    done = shift_negative_activation_correction_(model, [x])
    assert not done.applied
    assert done.left == left
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_bias_of_two_layers_stays():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.never = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, E)
            self.a.bias = self.b.bias

        def forward(self, x):
            return self.a(F.gelu(x)) + self.b(x)

    done = shift_negative_activation_correction_(Model(), [tokens()])
    assert done.left == {
        "a": "another module holds its bias too",
        "b": "another module holds its bias too",
        "never": "no batch reached it",
    }


def test_bad_input():
    model, x = nn.Sequential(nn.Linear(E, E), nn.GELU(), nn.Linear(E, 2)), tokens()
    before = copy.deepcopy(model.state_dict())
    for ratio in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"`ratio` is {ratio}"):
            shift_negative_activation_correction_(model, [x], ratio=ratio)
    with pytest.raises(ValueError, match="`batches` is empty"):
        shift_negative_activation_correction_(model, [])
    with pytest.raises(ValueError, match=r"`desc` has `num_bits=\(4, 3\)`"):
        shift_negative_activation_correction_(model, [x], desc=lq.QuantDescriptor((4, 3)))
    with pytest.raises(ValueError, match="NaN or Inf"):
        shift_negative_activation_correction_(model, [x, x * math.nan])
    with pytest.raises(ValueError, match="median"):
        shift_negative_activation_correction_(model, [x], method="median")
    with pytest.raises(ValueError, match="percentil"):
        shift_negative_activation_correction_(model, [x], method="percentile", percentile=120)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="quantized layers"):
        shift_negative_activation_correction_(lq.quantize_(model), [x])
