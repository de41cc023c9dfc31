"""Cross-layer equalization: exact in models of every build, even afterwards, worth it where weights have one scale a layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.corrections import activation_channel_equalization_

B, L, E = 2, 5, 8


class Functional(nn.Module):
    """Activations, pooling and reshapes as functions."""

    def __init__(self):
        super().__init__()
        self.conv, self.slope, self.mix = nn.Conv2d(3, 6, 3), nn.Parameter(torch.rand(6)), nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(16, 2)

    def forward(self, x):
        x = F.max_pool2d(F.prelu(self.conv(x), self.slope), 2)
        return self.fc(F.leaky_relu(F.adaptive_avg_pool2d(self.mix(x), 2)).flatten(1))


class Residual(nn.Module):
    """Only what stays inside of the block can be rescaled."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
            nn.Conv2d(6, 2, 1),
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.b(self.a(x).relu()))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.up, self.down = nn.LayerNorm(E), nn.Linear(E, 6), nn.Linear(E, 6), nn.Linear(6, E)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class UNet(nn.Module):
    """Channels of one layer come from two, and those of one go to two."""

    def __init__(self):
        super().__init__()
        self.down, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.deep, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x):
        a = F.relu(self.bn1(self.down(x)))
        b = F.relu(self.bn2(self.deep(F.max_pool2d(a, 2))))
        return self.out(torch.cat([a, F.relu(self.up(b))], 1))


class TwoNorms(nn.Module):
    """A layer before two norms: neither folds."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.a(self.bn1(x).relu()) + self.b(self.bn2(x).relu())


def tokens():
    return torch.randn(B, L, E)


def images():
    return torch.randn(B, 3, 8, 8)


def chain():
    return nn.Sequential(nn.Linear(E, 6), nn.ReLU(), nn.Linear(6, 6), nn.PReLU(6 - 1), nn.Linear(6, 2))


# A model, its input, the layers that are rescaled, and the reason for another.
CASES = {
    "linear": (chain, tokens, {"2", "4"}, {"0": "its input is the model's"}),
    "functional": (Functional, images, {"mix", "fc"}, {}),
    "residual": (Residual, images, {"b"}, {"a": "not all that Conv2d `stem` before it gives goes to layers"}),
    "batch norm": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)),
            *(nn.LeakyReLU(), nn.Dropout(), nn.Conv2d(6, 2, 1)),
        ),
        images,
        {"3", "7"},
        {},
    ),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ZeroPad2d(1), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)
        ),
        images,
        {"3", "5"},
        {},
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 1)
        ),
        images,
        {"2"},
        {"4": "ConvTranspose2d `2` before it takes in no factor"},
    ),
    "transposed, grouped, batch norm": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 2, groups=3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)),
        images,
        {"3"},
        {},
    ),
    "1-D": (
        lambda: nn.Sequential(nn.Conv1d(L, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(12, 2)),
        tokens,
        {"5"},
        {},
    ),
    "batch norm over time": (lambda: nn.Sequential(nn.Linear(E, E), nn.BatchNorm1d(L), nn.Linear(E, 2)), tokens, set(), {}),
    "gated": (Gated, tokens, {"down"}, {"up": "LayerNorm `norm` before it has no layer's weights"}),
    "unet": (UNet, images, {"deep", "up", "out"}, {}),
    "two norms": (TwoNorms, images, {"a", "b"}, {}),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(E, 2, 16, batch_first=True),
        tokens,
        {"linear2", "self_attn.out_proj"},
        {"linear1": "not all that LayerNorm `norm1` before it gives goes to layers"},
    ),
}


def uneven(model):
    """Channels with ranges from 1/30 to 30, and statistics that are not the identity."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.1, 4)
                nn.init.normal_(module.weight, 0, 1)
                nn.init.normal_(module.bias)
            elif (weight := getattr(module, "weight", None)) is not None and weight.dim() > 1:
                weight *= torch.logspace(-1.5, 1.5, weight.shape[0])[torch.randperm(weight.shape[0])].view(
                    -1, *[1] * (weight.dim() - 1)
                )
    return model.eval()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_channels_get_even_where_they_can_and_the_output_stays(name, fold):
    make, data, layers, reasons = CASES[name]
    model, x = uneven(make()), data()
    before = model(x)
    done = activation_channel_equalization_(model, [x], fold=fold, bound=1e5)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
    assert {applied.name for applied in done.applied if "divided" in applied.detail} == layers
    assert reasons.items() <= done.left.items()
    assert not layers & done.left.keys()
    again = activation_channel_equalization_(model, [x], fold=fold, bound=1e5, tolerance=1e-2)
    assert not again.applied
    assert all(again.left[layer] == "its channels are even already" for layer in layers)


def test_ranges_are_those_of_the_formula():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    first, second = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    r1, r2 = first.abs().amax(1), second.abs().amax(0)
    s = (r1 * r2).sqrt() / r2
    activation_channel_equalization_(model, [torch.ones(1, 3, dtype=torch.float64)])
    torch.testing.assert_close(model[0].weight, first / s[:, None], rtol=1e-6, atol=0)
    torch.testing.assert_close(model[2].weight, second * s, rtol=1e-6, atol=0)
    torch.testing.assert_close(model[0].weight.abs().amax(1), model[2].weight.abs().amax(0), rtol=1e-6, atol=0)


def test_batchnorm_is_folded_or_stays():
    make, data, *_ = CASES["batch norm"]
    folded, x = uneven(make()), data()
    divided = copy.deepcopy(folded)
    done = activation_channel_equalization_(folded, [x])
    activation_channel_equalization_(divided, [x], fold=False)
    assert [a.name for a in done.applied if "folded" in a.detail] == ["0", "3"]
    assert [type(folded[i]).__name__ for i in (1, 4)] == ["Identity"] * 2
    assert [type(divided[i]).__name__ for i in (1, 4)] == ["BatchNorm2d"] * 2


def test_a_dead_channel_is_left_and_a_factor_has_its_bound():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).requires_grad_(False)
    model[0].weight[0], model[2].weight[:, 1], model[0].weight[2] = 0, 0, 1e-12
    bias = model[0].bias.clone()
    activation_channel_equalization_(model, [torch.ones(1, 2)], bound=10)
    torch.testing.assert_close(model[0].bias, bias * torch.tensor([1.0, 1, 10]))


def test_many_turns_round_once():
    """A chain in half precision is the float64 one, rounded."""
    model = uneven(nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(E, E), nn.ReLU()))))
    half = copy.deepcopy(model).bfloat16()
    double = copy.deepcopy(half).double()
    activation_channel_equalization_(half, [tokens().bfloat16()])
    activation_channel_equalization_(double, [tokens().double()])
    for p, q in zip(half.parameters(), double.parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(p, q.bfloat16(), rtol=2**-8, atol=0)


def error_in_db(model, x, expected):
    lq.quantize_(model, "int8_per_tensor")
    with lq.calibrating(model):
        model(x)
    return 10 * torch.log10((model(x) - expected).square().sum() / expected.square().sum()).item()


def test_the_error_of_one_scale_a_layer_goes_down_by_15_db():
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    ).eval()
    x = torch.randn(16, 3, 12, 12)
    scales = torch.logspace(-2, 1, 32)[torch.randperm(32)]
    with torch.no_grad():  # as trained MobileNets have it: the next layer undoes what the channels' ranges are
        model[0].weight *= scales.view(-1, 1, 1, 1)
        model[0].bias *= scales
        model[3].weight /= scales.view(-1, 1, 1, 1)
    expected = model(x)
    plain = copy.deepcopy(model)
    activation_channel_equalization_(model, [x])
    before, after = error_in_db(plain, x, expected), error_in_db(model, x, expected)
    print(f"{before:.1f} dB, {after:.1f} dB")
    assert after < before - 15


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(E, E), nn.GELU(), nn.Linear(E, 2)), "GELU `1` before it takes in no factor"),
        (nn.Sequential(nn.Linear(E, E), nn.ReLU6(), nn.Linear(E, 2)), "ReLU6 `1` before it takes in no factor"),
        (nn.Sequential(nn.LayerNorm(E), nn.ReLU(), nn.Linear(E, 2)), "LayerNorm `0` before it has no layer's weights"),
        (
            nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(E, 2))),
            "its weight is computed, or its class unknown",
        ),
    ],
)
def test_a_model_without_a_place_stays_as_it_is_and_says_why(model, reason):
    before = copy.deepcopy(model.state_dict())
    done = activation_channel_equalization_(model, [tokens()])
    assert not done.applied
    assert done.left["2"] == reason
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_shared_and_repeated_layers_stay():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(E, E) for _ in range(3))
            self.c.weight = self.a.weight

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.b(self.a(x))))))

    done = activation_channel_equalization_(Twice(), [tokens()])
    assert not done.applied
    assert done.left == {
        "a": "another module holds its weight too",
        "b": "it runs 2 times",
        "c": "another module holds its weight too",
    }


def test_bad_input():
    model = nn.Sequential(nn.Linear(E, 2))
    with pytest.raises(ValueError, match=r"`bound` is 0\.5"):
        activation_channel_equalization_(model, [tokens()], bound=0.5)
    with pytest.raises(ValueError, match="`batches` is empty"):
        activation_channel_equalization_(model, [])
    with pytest.raises(ValueError, match="quantized layers"):
        activation_channel_equalization_(lq.quantize_(model), [tokens()])
