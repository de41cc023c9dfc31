"""The bias takes up the mean error of rounded weights: against its formula, with batches and with BatchNorm alone."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.corrections import input_scaling_, shift_negative_activation_correction_, weights_bias_correction_

WEIGHTS = [lq.QuantRule("*", None, lq.QuantDescriptor(3))]
BOTH = [lq.QuantRule("*", lq.QuantDescriptor(8), lq.QuantDescriptor(3))]


def quantized(model, *batches, rules=BOTH):
    lq.quantize_(model.eval(), rules)
    with lq.calibrating(model):
        for x in batches:
            model(x)
    return model


def lost(layer):
    return (layer.weight - layer.weight_quantizer(layer.weight)).detach()


# A layer, its input, and the operation that it is.
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6), lambda m, x, w: F.linear(x, w).flatten(0, -2)),
    "vector": (lambda: nn.Linear(6, 4, bias=False), (6,), lambda m, x, w: F.linear(x, w)[None]),
    "conv": (
        lambda: nn.Conv2d(6, 4, 3, padding=2, stride=2, dilation=2, bias=False),
        (3, 6, 9, 8),
        lambda m, x, w: F.conv2d(x, w, None, 2, 2, 2).movedim(1, -1).flatten(0, -2),
    ),
    "grouped": (
        lambda: nn.Conv1d(6, 4, 3, padding=1, groups=2),
        (3, 6, 9),
        lambda m, x, w: F.conv1d(x, w, None, 1, 1, 1, 2).movedim(1, -1).flatten(0, -2),
    ),
    "circular": (
        lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
        (3, 6, 5, 5),
        lambda m, x, w: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w).movedim(1, -1).flatten(0, -2),
    ),
    "depthwise": (
        lambda: nn.Conv3d(6, 6, 3, padding=1, groups=6),
        (2, 6, 4, 4, 4),
        lambda m, x, w: F.conv3d(x, w, None, 1, 1, 1, 6).movedim(1, -1).flatten(0, -2),
    ),
    "transposed": (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=2),
        (3, 6, 5, 5),
        lambda m, x, w: F.conv_transpose2d(x, w, None, 2, 1, 0, 2).movedim(1, -1).flatten(0, -2),
    ),
}


@pytest.mark.parametrize("rules", [WEIGHTS, BOTH])
@pytest.mark.parametrize("name", LAYERS)
def test_the_bias_takes_up_the_mean_of_the_formula(name, rules):
    """Over batches of several sizes, every place of which counts the same."""
    make, shape, operation = LAYERS[name]
    big, small = 1 + torch.randn(shape), 3 + torch.randn(shape)[..., :6]
    layer = quantized(make(), big, rules=rules)
    before = 0 if layer.bias is None else layer.bias.detach().clone()
    errors = torch.cat([operation(layer, x.double(), lost(layer).double()) for x in (big, small)])
    expected = errors.mean(dim=0)
    assert expected.abs().max() > 0.01
    (applied,) = weights_bias_correction_(layer, [big, (small,)]).applied
    torch.testing.assert_close(layer.bias - before, expected.float(), rtol=1e-4, atol=1e-5)
    assert applied.name == type(layer).__name__
    assert f"up to {expected.abs().max():.3g}, by the mean of {len(errors)} places in the batches" in applied.detail
    assert layer.bias.requires_grad


def test_padding_counts_as_each_tap_of_the_kernel_sees_it():
    """NumPy: the mean of every tap over all places, zeros of the padding included."""
    x = 1 + torch.rand(2, 3, 6, 5)
    layer = quantized(nn.Conv2d(3, 4, 3, padding=1), x)
    before = layer.bias.detach().clone()
    weights_bias_correction_(layer, [x])
    padded = np.pad(x.numpy().astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    taps = np.array([[[padded[:, c, i : i + 6, j : j + 5].mean() for j in range(3)] for i in range(3)] for c in range(3)])
    expected = np.einsum("ocij,cij->o", lost(layer).numpy().astype(np.float64), taps)
    np.testing.assert_allclose((layer.bias - before).detach().numpy(), expected, atol=1e-5)
    inside = lost(layer).double().sum((2, 3)) @ x.double().mean((0, 2, 3))
    assert np.abs(inside.numpy() - expected).max() > 0.01  # which is what taking no heed of the borders would give


def test_factors_and_shifts_come_before_the_weight():
    x = F.silu(3 * torch.randn(64, 4, 5, 5))
    model = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1)).eval()
    before = model(x)
    input_scaling_(model, [x])
    shift_negative_activation_correction_(model, [x])
    quantized(model, x, rules=WEIGHTS)
    model[0].weight_quantizer.disable()
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    model[0].weight_quantizer.enable()
    error = (model(x) - before).mean((0, 2, 3))
    assert error.abs().max() > 0.01
    weights_bias_correction_(model, [x])
    torch.testing.assert_close((model(x) - before).mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)


def test_with_weights_alone_in_one_layer_the_mean_error_is_gone():
    x = 2 + torch.randn(64, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5))
    expected = model(x)
    quantized(model, x, rules=[lq.QuantRule("3", None, lq.QuantDescriptor(3))])
    assert (model(x) - expected).mean(0).abs().max() > 1e-2
    weights_bias_correction_(model, [x])
    torch.testing.assert_close((model(x) - expected).mean(0), torch.zeros(5), rtol=0, atol=1e-5)


def test_ranges_weights_and_modes_stay():
    x = torch.randn(4, 3, 8, 8)
    model = quantized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 3)), x)
    model.train()
    before = copy.deepcopy(model.state_dict())
    done = weights_bias_correction_(model, iter([x, x]))
    assert [applied.name for applied in done.applied] == ["0", "3"]
    assert all(module.training for module in model.modules() if not isinstance(module, lq.nn.TensorQuantizer))
    assert all(q.active and not q._if_calib for _, q in lq.named_quantizers(model))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"0.bias", "3.bias"}


def test_a_bias_that_was_made_loads(tmp_path):
    x = torch.rand(4, 6)
    model = quantized(nn.Sequential(nn.Linear(6, 4, bias=False)), x)
    weights_bias_correction_(model, [x])
    same = quantized(nn.Sequential(nn.Linear(6, 4, bias=False)), x)
    weights_bias_correction_(same, [x])
    same.load_state_dict(model.state_dict())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = lq.load_quantized(nn.Sequential(nn.Linear(6, 4, bias=False)), tmp_path / "model.pt", rules=BOTH)
    assert torch.equal(same(x), model(x))
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


# By BatchNorm alone


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(24, 4)

    def forward(self, x):
        x = self.b(F.relu(self.bn(self.a(x))))
        return self.fc(F.adaptive_avg_pool2d(F.relu6(self.norm(x)), 2).flatten(1))


def net():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU()),
        *(nn.AvgPool2d(2), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12, affine=False), nn.ConvTranspose2d(12, 6, 2)),
        *(nn.Flatten(), nn.Linear(6 * 8 * 8, 4)),
    )


def with_statistics(model, x):
    """BatchNorm that has seen the data, with weights of its own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -2, 2)
            nn.init.uniform_(module.bias, -1, 2)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(x)
    return model.eval()


@pytest.mark.parametrize(("make", "told"), [(net, {"3", "8"}), (Functional, {"b", "fc"})])
def test_batchnorm_tells_nearly_what_batches_do(make, told):
    """Correlated over outputs, and as large: normal variables are only nearly what a convolution gives."""
    x = torch.randn(256, 3, 14, 14)
    model = with_statistics(make(), x)
    quantized(model, x)
    seen, known = copy.deepcopy(model), copy.deepcopy(model)
    weights_bias_correction_(seen, [x])
    done = weights_bias_correction_(known, args=x[:1])
    assert {applied.name for applied in done.applied} == told
    assert done.left.pop("10", None) == (None if make is Functional else "rounding its weights moves no mean")  # of 0
    assert set(done.left.values()) == {"no BatchNorm tells the mean of its input"}
    assert "by BatchNorm `" in done.applied[0].detail
    for name in told:
        old, one, other = (0 if m.get_submodule(name).bias is None else m.get_submodule(name).bias for m in (model, seen, known))
        by_batches, by_norm = (one - old).detach(), (other - old).detach()
        assert (by_batches - by_norm).norm() < 0.2 * by_batches.norm()


def test_batchnorm_tells_the_exact_mean_of_what_is_normal():
    """gamma and beta, and nothing else: a depthwise kernel, with its borders, by NumPy."""
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1, groups=2)).eval()
    model[0].bias.data, model[0].weight.data = torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])
    quantized(model, torch.randn(1, 2, 4, 4))
    before, error = model[1].bias.detach().clone(), lost(model[1])
    weights_bias_correction_(model, args=torch.zeros(1, 2, 4, 4))
    share = np.array([3, 4, 3]) / 4
    expected = np.array([3.0, -1.0]) * (error[:, 0].numpy() * np.outer(share, share)).sum((1, 2))
    np.testing.assert_allclose((model[1].bias - before).detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_what_is_no_normal_variable_any_more_is_left():
    model = nn.Sequential(
        *(nn.BatchNorm2d(2), nn.AvgPool2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)),
        *(nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.GELU(), nn.Conv2d(2, 2, 1)),
        *(nn.BatchNorm2d(2, track_running_stats=False), nn.Conv2d(2, 2, 1)),
    )
    quantized(model, torch.randn(2, 2, 8, 8))
    done = weights_bias_correction_(model, args=torch.zeros(1, 2, 8, 8))
    assert done.left == dict.fromkeys(["3", "6", "9", "11"], "no BatchNorm tells the mean of its input")


# What it is worth


def decibels(output, expected):
    return 10 * torch.log10(expected.square().sum() / (output - expected).square().sum()).item()


def separable(activation):
    parts = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), activation()]
    for i, o in ((16, 16), (16, 32), (32, 32)):
        parts += [nn.Conv2d(i, i, 3, padding=1, groups=i), nn.BatchNorm2d(i), activation(), nn.Conv2d(i, o, 1), nn.BatchNorm2d(o)]
        parts += [activation()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@pytest.mark.parametrize(("bits", "gain", "by_norms"), [(6, 4, 4), (4, 8, 8)])
def test_the_error_of_a_separable_network_goes_down(bits, gain, by_norms):
    x = 0.3 + torch.randn(192, 3, 12, 12)
    model = with_statistics(separable(nn.ReLU), x)
    expected = model(x)
    quantized(model, x[:128], rules=[lq.QuantRule("*", lq.QuantDescriptor(8), lq.QuantDescriptor(bits))])
    corrected, known = copy.deepcopy(model), copy.deepcopy(model)
    weights_bias_correction_(corrected, [x[:64], x[64:128]])
    weights_bias_correction_(known, args=x[:1])
    found = [decibels(m(x[128:]), expected[128:]) for m in (model, known, corrected)]
    print(found)
    assert found[1] > found[0] + by_norms
    assert found[2] > found[0] + gain


# Where it does not apply


def test_what_has_no_place_for_it_stays_as_it_is_and_says_why():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.word, self.rnn, self.attention = nn.Embedding(7, 4), nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)
            self.a, self.b, self.never, self.exact = (nn.Linear(4, 4) for _ in range(4))
            self.exact.weight.data = torch.eye(4)
            self.a.bias = self.b.bias

        def forward(self, x):
            y = self.rnn(self.word(x))[0]
            return self.exact(self.attention(y, y, y)[0] + self.a(y) + self.b(y))

    model, x = Model().eval(), torch.tensor([[1, 2, 3]])
    rules = [*BOTH, lq.QuantRule("*", None, lq.QuantDescriptor(3, axis=0), types=("Embedding",))]
    lq.quantize_(model, rules)
    with lq.calibrating(model):
        model(x), model.never(torch.ones(1, 4))
    before = copy.deepcopy(model.state_dict())
    done = weights_bias_correction_(model, [x])
    assert {applied.name for applied in done.applied} <= {"attention.out_proj"}
    assert done.left == {
        "word": "QuantEmbedding is no linear layer or convolution",
        "rnn": "QuantLSTM is no linear layer or convolution",
        "attention": "QuantMultiheadAttention is no linear layer or convolution",
        "a": "another module holds its bias too",
        "b": "another module holds its bias too",
        "never": "no batch reached it",
        "exact": "rounding its weights moves no mean",
    }
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert changed <= {"attention.out_proj.bias"}


def test_bad_input():
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(3, 4)
    with pytest.raises(ValueError, match="Sequential has no quantized weights"):
        weights_bias_correction_(model, [x])
    with pytest.raises(ValueError, match="no quantized weights"):
        weights_bias_correction_(lq.quantize_(copy.deepcopy(model)), [x])  # not calibrated
    quantized(model, x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="`batches` is empty"):
        weights_bias_correction_(model, [])
    with pytest.raises(ValueError, match="NaN or Inf in `0`"):
        weights_bias_correction_(model, [x, x * math.nan])
    with pytest.raises(ValueError, match="give `args`"):
        weights_bias_correction_(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(q.active for _, q in lq.named_quantizers(model))
