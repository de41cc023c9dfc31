"""Ranges of ReLUs at powers of two: exact in models of every build, and worth it where thresholds are powers of two."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.corrections import power_of_two, relu_unbound_correction_

B, L, E = 4, 5, 8


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.mix, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.Linear(16, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        return self.fc(F.adaptive_avg_pool2d(self.mix(x).relu(), 2).flatten(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(E, E), nn.Linear(E, 6), nn.Linear(6, E), nn.Linear(E, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.b(self.a(x).relu())).relu())


class Two(nn.Module):
    """Two layers take a ReLU, one of them a smaller range of it."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.a(F.avg_pool2d(x, 2)).mean() + self.b(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(E, 6), nn.Linear(E, 6), nn.Linear(6, E)

    def forward(self, x):
        return self.down(F.relu(self.gate(x)) * self.up(x))


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(E, 4), nn.Linear(E, 4), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(torch.cat([self.a(x).relu(), self.b(x)], -1))


def tokens():
    return 3 * torch.randn(B, L, E)


def images():
    return 3 * torch.randn(B, 3, 8, 8)


# A model, its input, the layers whose input is rescaled, and the reasons for others.
CASES = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(E, 6), nn.ReLU(), nn.Linear(6, 6), nn.Dropout(), nn.ReLU(), nn.Linear(6, 2)),
        tokens,
        {"2", "5"},
        {"0": "its input is the model's"},
    ),
    "functional": (Functional, images, {"mix", "fc"}, {}),
    "residual": (Residual, tokens, {"b"}, {"head": "`add` before it takes in no factor"}),
    "depthwise": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()),
            *(nn.Conv2d(6, 2, 1), nn.LeakyReLU(), nn.Conv2d(2, 2, 1)),
        ),
        images,
        {"4", "6"},
        {"8": "no ReLU gives its input"},
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=2)),
        images,
        {"2"},
        {},
    ),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(E), nn.ReLU(), nn.Linear(E, 2)), tokens, {"2"}, {}),
    "two": (Two, images, {"a", "b"}, {}),
    "gated": (Gated, tokens, {"down"}, {}),  # a factor on one operand is one on the product
    "joined": (Joined, tokens, set(), {"out": "its input is not that of one ReLU alone"}),
    "encoder": (lambda: nn.TransformerEncoderLayer(E, 2, 16, batch_first=True), tokens, {"linear2"}, {}),
}


def ranges(model, x, method="percentile", **options):
    """Amax of each layer's input."""
    lq.quantize_(model)
    with lq.calibrating(model, method, **options):
        model(x)
    return {name.removesuffix(".input"): q.amax.item() for name, q in lq.named_quantizers(model) if name.endswith("input")}


@pytest.mark.parametrize("name", CASES)
def test_ranges_get_to_powers_of_two_and_the_output_stays(name):
    make, data, layers, reasons = CASES[name]
    model, x = make().eval(), data()
    before, state = model(x), copy.deepcopy(model.state_dict())
    plain = ranges(copy.deepcopy(model), x, percentile=100)
    done = relu_unbound_correction_(model, [x[:2], x[2:]])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
    assert {applied.name for applied in done.applied} == layers
    assert reasons.items() <= done.left.items()
    assert not layers & done.left.keys()
    if not layers:
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    again = relu_unbound_correction_(model, [x])
    assert not again.applied
    after = ranges(model, x, percentile=100, power_of_two=True)
    for layer in layers - {"a"}:  # which takes a mean of what `b` takes
        assert after[layer] == power_of_two(plain[layer])


@pytest.mark.parametrize(("target", "wanted"), [(6.0, 6.0), (lambda r: 3 * 2.0 ** math.ceil(math.log2(r / 3)), None)])
def test_a_target_of_ones_own(target, wanted):
    model, x = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, 2)), tokens()
    before = model[:2](x).max().item()
    relu_unbound_correction_(model, [x], target=target)
    assert model[:2](x).max().item() == pytest.approx((wanted or target(before)) * (1 - 2**-10), rel=1e-5)


def test_the_range_is_that_of_the_method():
    model, x = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, 2)), tokens()
    relu_unbound_correction_(model, [x], method="percentile", percentile=90)
    assert ranges(model, x, percentile=90, power_of_two=True)["2"] / ranges_of(model, x, 90) == pytest.approx(1, rel=0.01)


def ranges_of(model, x, percentile):
    lq.load_calib_amax_(model, "percentile", percentile=percentile)
    return model[2].input_quantizer.amax.item()


def test_the_error_with_powers_of_two_goes_down_by_4_db():
    """Four ReLUs with ranges of 1.05 times a power of two."""
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 10))
    x = torch.randn(256, 64)
    with torch.no_grad():
        y = x
        for linear in model[:-1:2]:
            factor = 1.05 * 4 / F.relu(linear(y)).max()
            linear.weight *= factor
            linear.bias *= factor
            y = F.relu(linear(y))
    expected, errors = model(x), []
    corrected = copy.deepcopy(model)
    assert len(relu_unbound_correction_(corrected, [x]).applied) == 4
    rules = [
        lq.QuantRule("*", lq.QuantDescriptor(6, unsigned=True), lq.QuantDescriptor(8, axis=0)),
        lq.QuantRule("0", lq.QuantDescriptor(8), lq.QuantDescriptor(8, axis=0)),
    ]
    for m in (model, corrected):
        lq.quantize_(m, rules)
        with lq.calibrating(m, "percentile", percentile=100, power_of_two=True):
            m(x)
        errors.append(10 * torch.log10((m(x) - expected).square().sum() / expected.square().sum()).item())
    print(errors)
    assert errors[1] < errors[0] - 4


@pytest.mark.parametrize(
    ("activation", "reason"), [(nn.ReLU6(), "ReLU6 `1` before it takes in no factor"), (nn.PReLU(), "no ReLU gives its input")]
)
def test_a_model_without_a_place_stays_as_it_is_and_says_why(activation, reason):
    model = nn.Sequential(nn.Linear(E, E), activation, nn.Linear(E, 2))
    before = copy.deepcopy(model.state_dict())
    done = relu_unbound_correction_(model, [tokens()])
    assert not done.applied
    assert done.left["2"] == reason
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_relu_that_lets_nothing_pass_stays():
    model = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, 2)).requires_grad_(False)
    model[0].bias.fill_(-1e3)
    assert relu_unbound_correction_(model, [tokens()]).left["2"] == "it saw nothing but zeros"


def test_batches_come_as_tuples_lists_and_iterators():
    model = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, 2))
    models = [copy.deepcopy(model) for _ in range(3)]
    x = tokens()
    for m, batches in zip(models, ([x], [(x,)], iter([[x]])), strict=True):
        relu_unbound_correction_(m, batches)
        assert torch.equal(m[0].weight, models[0][0].weight)


def test_bad_input():
    model, x = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, 2)), tokens()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="`batches` is empty"):
        relu_unbound_correction_(model, [])
    with pytest.raises(ValueError, match="`target` is 0"):
        relu_unbound_correction_(model, [x], target=0)
    with pytest.raises(ValueError, match="`target` is nan"):
        relu_unbound_correction_(model, [x], target=lambda _: math.nan)
    with pytest.raises(ValueError, match="NaN or Inf"):
        relu_unbound_correction_(model, [x, x * math.nan])
    with pytest.raises(ValueError, match="median"):
        relu_unbound_correction_(model, [x], method="median")
    with pytest.raises(ValueError, match="`power_of_two` is no option"):
        relu_unbound_correction_(model, [x], power_of_two=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="quantized layers"):
        relu_unbound_correction_(lq.quantize_(model), [x])
