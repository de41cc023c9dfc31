"""Alpha by patterns and by the error at the outputs, against a search that quantizes in NumPy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.alpha import GRID, sample
from lq.callbacks import Quantize


def model_of(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*(layers or (nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)))).eval()


def outliers(n=64):
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
    return x * torch.tensor([1.0, 1, 40, 1, 1, 1, 1, 1])


def calibrator_of(model, x, **options):
    return lq.RescalingCalibrator(model, args=(x,), **options)


def quantized(x, amax, bits):
    qmax = 2 ** (bits - 1) - 1
    scale = amax / qmax
    return np.clip(np.rint(x / scale), -qmax, qmax) * scale


def error(x, weight, alpha, bits, peaks=None):
    """Squared error of a linear layer without bias, quantized per tensor and per row, SmoothQuant's eq. 4 for the factors."""
    peaks = np.abs(x).max(0) if peaks is None else peaks
    s = peaks**alpha / np.abs(weight).max(0) ** (1 - alpha)
    xs, ws = x / s, weight * s
    y = quantized(xs, (peaks / s).max(), bits) @ quantized(ws, np.abs(ws).max(1, keepdims=True), bits).T
    return ((y - x @ weight.T) ** 2).sum()


@pytest.mark.parametrize("bits", [4, 8])
def test_auto_takes_the_alpha_with_the_least_error_at_the_output(bits):
    model, x = model_of(nn.Identity(), nn.Linear(8, 6, bias=False)), outliers()
    desc = lq.QuantDescriptor(num_bits=bits)
    lq.quantize_(model, [lq.QuantRule("*", desc, desc.replace(axis=0))])
    errors = [error(x.double().numpy(), model[1].weight.detach().double().numpy(), alpha, bits) for alpha in GRID]
    calibrator = calibrator_of(model, x)
    calibrator.rescale("auto")
    (group,) = calibrator.groups
    assert errors[GRID.index(group.alpha)] <= min(errors) * 1.001
    assert errors[10] > min(errors)


def test_the_range_is_that_of_all_batches_though_the_samples_are_few():
    model, batches = model_of(nn.Identity(), nn.Linear(8, 6, bias=False)), [outliers() for _ in range(4)]
    loud = outliers() * torch.tensor([1, 1, 1, 1, 3000.0, 1, 1, 1])  # no sample is taken from the fifth batch
    calibrator = lq.RescalingCalibrator(model)
    for x in (*batches, loud):
        calibrator(x)
    calibrator.rescale("auto")
    peaks = torch.stack([loud, *batches]).abs().amax((0, 1)).double().numpy()
    weight = model[1].weight.detach().double().numpy()
    errors = [error(torch.cat(batches).double().numpy(), weight, alpha, 8, peaks) for alpha in GRID]
    assert errors[GRID.index(calibrator.groups[0].alpha)] <= min(errors) * 1.001
    of_samples = [error(torch.cat(batches).double().numpy(), weight, alpha, 8) for alpha in GRID]
    assert errors[of_samples.index(min(of_samples))] > min(errors) * 1.001


def test_alpha_is_found_on_batches_that_its_ranges_do_not_know():
    model, first, second = model_of(nn.Identity(), nn.Linear(8, 6, bias=False)), outliers(), outliers().flip(0)
    second[::8] *= 2  # beyond what the channels had in the first batch
    calibrator = lq.RescalingCalibrator(model)
    for x in (first, second):
        calibrator(x)
    calibrator.rescale("auto")
    (group,) = calibrator.groups
    weight, x = model[1].weight.detach().double().numpy(), second.double().numpy()
    errors, blind = ([error(x, weight, a, 8, peaks) for a in GRID] for peaks in (np.abs(first.double().numpy()).max(0), None))
    assert errors[GRID.index(group.alpha)] <= min(errors) * 1.001
    assert errors[blind.index(min(blind))] > min(errors) * 1.001
    # the factors themselves know all batches
    factors = lq.functional.smooth.smooth_factors(second.abs().amax(0), model[1].weight.detach().abs().amax(0), group.alpha)
    assert group.input_amax[1] == pytest.approx((second.abs().amax(0) / factors).max().item())


def test_groups_that_share_a_layer_are_looked_at_together():
    """Either half of the channels alone gains nothing, because the other stays loud."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(16, 4)

        def forward(self, x):
            return self.out(torch.cat([self.a(x), self.b(-x)], -1))

    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(64, 8)
    with torch.no_grad():
        for norm in (model.a, model.b):
            norm.weight[3] = 200.0
    calibrator = calibrator_of(model, x)
    calibrator.rescale("auto")
    assert [(g.producer, g.action) for g in calibrator.groups] == [("a", "folded"), ("b", "folded")]
    assert all(g.input_amax[1] < g.input_amax[0] / 10 for g in calibrator.groups)


def test_auto_once_more_sees_the_inputs_as_they_meet_the_weight():
    """What an inserted factor has evened out already gains nothing."""
    model, x = nn.Sequential(nn.Linear(8, 6)).eval(), outliers()
    once = calibrator_of(model, x).rescale("auto")
    calibrator = calibrator_of(once, x)
    twice = calibrator.rescale("auto")
    assert not calibrator.groups
    assert calibrator.left == {"0": "no alpha takes enough of its error off"}
    assert torch.equal(twice(x), once(x))


def test_each_group_has_an_alpha_of_its_own_and_the_output_stays():
    model, x = model_of(), outliers()
    calibrator = calibrator_of(model, x)
    after = calibrator.rescale("auto")
    torch.testing.assert_close(after(x), model(x), rtol=1e-4, atol=1e-5)
    assert {g.consumers for g in calibrator.groups} == {("1",), ("3",)}
    assert all(g.alpha in GRID for g in calibrator.groups)


def test_looking_for_alpha_leaves_weights_and_amax_as_they_were():
    model, x = model_of(), outliers()
    calibrator = calibrator_of(model, x, inplace=True)
    before = copy.deepcopy(model.state_dict())
    calibrator._alphas(calibrator._agreed_groups(), "auto")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_alphas_come_from_one_pass_that_is_not_repeated():
    model, x, calls = model_of(), outliers(), []
    calibrator = calibrator_of(model, x, inplace=True)
    model.register_forward_hook(lambda *_: calls.append(1))
    calibrator.rescale("auto")
    assert not calls


def test_patterns_choose_for_groups_and_the_last_match_wins():
    calibrator = calibrator_of(model_of(), outliers())
    calibrator.rescale({"*": 0.3, "3": 0.9})
    assert {g.consumers: g.alpha for g in calibrator.groups} == {("1",): 0.3, ("3",): 0.9}


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ({"*": 0.5, "nowhere*": 0.1}, r"pattern 'nowhere\*', which matches no layer: known are 1, 3"),
        ({"3": 0.5}, "`alpha` says nothing about `1`: begin it with a pattern"),
        ({"*": 1.5}, "`alpha` is 1.5: it must lie in"),
        ("best", "`alpha` is 'best': give a number"),
        (float("nan"), "`alpha` is nan"),
    ],
)
def test_what_is_no_alpha_is_refused_and_changes_nothing(alpha, message):
    model, x = model_of(), outliers()
    calibrator = calibrator_of(model, x, inplace=True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        calibrator.rescale(alpha)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    calibrator.rescale(0.5)


def test_the_callback_takes_the_same():
    assert Quantize(alpha="auto").alpha == "auto"
    with pytest.raises(ValueError, match="`alpha` is 'best'"):
        Quantize(alpha="best")
    with pytest.raises(ValueError, match="`alpha` is 2"):
        Quantize(alpha={"*": 2})


def test_samples_are_few_and_from_all_over():
    x = torch.arange(2_000_000.0).reshape(20, 1000, 100)
    rows = sample(nn.Linear(100, 1), x)
    assert rows.shape[0] * 100 <= 2**15
    assert rows[-1, 0] > 1_900_000
    images = sample(nn.Conv2d(3, 4, 3), torch.randn(64, 3, 64, 64))
    assert images.shape == (2, 3, 64, 64)
    assert sample(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 500, 500)).shape[0] == 1


def test_layers_that_are_left_are_named_with_the_reason():
    shared = nn.Linear(8, 8)
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    model = model_of(shared, nn.Linear(8, 8), nn.Linear(8, 8), tied)
    calibrator = calibrator_of(model, outliers(), excluded_modules=["1"])
    calibrator.rescale(0.5)
    assert calibrator.left == {
        "0": "something else takes its weight too",
        "1": "excluded",
        "3": "something else takes its weight too",
    }


@pytest.mark.parametrize("alpha", [0.5, "auto", {"*": 0.7}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rescaled_within_its_precision(dtype, alpha):
    model, x = model_of().to(dtype), outliers().to(dtype)
    before = model(x).float()
    calibrator = calibrator_of(model, x)
    after = calibrator.rescale(alpha)
    assert {p.dtype for p in after.parameters()} == {dtype}
    assert after(x).dtype == dtype
    torch.testing.assert_close(after(x).float(), before, rtol=0.05, atol=0.05 * before.abs().max().item())
    assert all(torch.isfinite(p).all() for p in after.parameters())


def test_auto_with_ranges_of_two_ends():
    model, x = model_of(nn.Identity(), nn.Linear(8, 6, bias=False)), outliers()
    desc = lq.QuantDescriptor(num_bits=4)
    lq.quantize_(model, [lq.QuantRule("*", desc.replace(affine=True), desc.replace(axis=0))])
    before = model(x).detach()
    calibrator = calibrator_of(model, x)
    rescaled = calibrator.rescale("auto")
    (group,) = calibrator.groups
    # one channel is forty times as loud, so something gains
    assert 0 < group.alpha <= 1
    torch.testing.assert_close(rescaled(x), before)
