"""Choosing a method on batches that were held out: which are, what is chosen, and that nothing else changes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.calib import HeldOutCalibrator, HistogramCalibrator, compute_amaxs
from lq.functional.choose import contenders


def collected(calibrator, batches):
    for x in batches:
        calibrator.collect(x)
    return calibrator


def error(x, amax, num_bits=8, unsigned=False):
    """Squared error of fake quantization, in NumPy."""
    qmax = 2 ** (num_bits - (not unsigned)) - 1
    low = 0 if unsigned else -qmax
    scale = amax / qmax
    return float(((x - np.clip(np.rint(x / scale), low, qmax) * scale) ** 2).sum())


def batches(n, seed=0, size=20_000):
    return list(torch.randn(n, size, generator=torch.Generator().manual_seed(seed)))


def test_every_fourth_batch_is_held_out_the_second_one_first():
    data = [torch.full((1,), float(2**i)) for i in range(9)]
    calibrator = collected(HeldOutCalibrator(), data)
    fit, held_out = calibrator.split()
    values = [torch.arange(fit.shape[1])[row > 0].double() * calibrator.width for row in (fit[0], held_out[0])]
    assert values[0].tolist() == [1, 4, 8, 16, 64, 128, 256]
    assert values[1].tolist() == [2, 32]


@pytest.mark.parametrize("axis", [None, 0, (0, 2)])
def test_all_counts_are_those_of_a_plain_histogram(axis):
    data = [torch.randn(3, 50, 2) * scale for scale in (1e-3, 5.0, 1.0, 0.0, 1e3, 1.0)]
    plain, held = (collected(kind(axis=axis), data) for kind in (HistogramCalibrator, HeldOutCalibrator))
    assert torch.equal(plain.counts, held.counts)
    assert torch.equal(plain.exponent, held.exponent)
    fit, apart = held.split()
    assert (fit >= 0).all()
    assert apart.sum() == 2 * 300
    alone = collected(HistogramCalibrator(axis=axis), [data[1], data[5]])
    assert torch.equal(apart, lq.functional.histogram.grow(alone.counts, alone.exponent, held.exponent))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_the_choice_has_the_least_error_on_the_data_held_out(num_bits, unsigned):
    data = [x.abs() if unsigned else x for x in batches(8)]
    calibrator = collected(HeldOutCalibrator(num_bits, None, unsigned), data)
    amax = calibrator.compute_amax("auto", start_bin=16)

    held = [1, 5]
    fit = collected(HistogramCalibrator(num_bits, None, unsigned), [x for i, x in enumerate(data) if i not in held])
    unseen = torch.cat([data[i] for i in held]).numpy()
    methods = contenders(num_bits)
    errors = {m: error(unseen, fit.compute_amax(m, start_bin=16).item(), num_bits, unsigned) for m in methods}
    # the histogram takes values for the centres of their bins
    assert errors[calibrator.method] <= min(errors.values()) * 1.001
    assert errors[calibrator.method] < max(errors.values()) / 1.01
    assert amax == calibrator.compute_amax(calibrator.method, start_bin=16)


def test_the_choice_has_the_least_error_on_a_grid_that_ends_below_amax():
    """Of codes -1, 0 and 1, half a power of two each, 1 is nearest to 0.95 with 2; the largest magnitude says 1."""
    calibrator = collected(HeldOutCalibrator(2), [torch.full((50,), 0.95)] * 4)
    assert calibrator.compute_amax("max", power_of_two=True, scale_amax=0.5) == 1
    assert calibrator.compute_amax("auto", power_of_two=True, scale_amax=0.5) == 2


def test_outliers_that_come_again_are_kept_and_others_are_not():
    data, spike = batches(8), torch.full((200,), 30.0)
    again = [torch.cat([x, spike]) for x in data]
    once = [torch.cat([data[0], spike]), *data[1:]]
    kept, cut = (collected(HeldOutCalibrator(num_bits=8), d) for d in (again, once))
    assert kept.compute_amax("auto") > 20
    assert cut.compute_amax("auto") < 10
    # the error on the same data would keep them, since they are few, but far away
    assert cut.compute_amax("mse") > 12


def test_many_at_once_are_those_one_by_one():
    kinds = [(8, None), (4, 0), (8, 0), ((4, 3), None), (8, None)]
    data = torch.randn(4, 3, 2000, generator=torch.Generator().manual_seed(1))
    together, alone = (
        [collected(HeldOutCalibrator(bits, axis), data * (i + 1)) for i, (bits, axis) in enumerate(kinds)] for _ in "ab"
    )
    amaxs = compute_amaxs(together, "auto")
    for calibrator, amax, other in zip(together, amaxs, alone, strict=True):
        assert torch.equal(amax, other.compute_amax("auto"))
        assert calibrator.method == other.method
        assert calibrator.method in contenders(calibrator.num_bits)


def test_one_batch_is_not_enough():
    with pytest.raises(ValueError, match="'auto' holds the second of every four batches out, and saw none"):
        collected(HeldOutCalibrator(), batches(1)).compute_amax("auto")


def test_statistics_go_on_where_they_were():
    data = batches(7, size=100)
    whole = collected(HeldOutCalibrator(), data)
    half = collected(HeldOutCalibrator(), data[:3])
    other = HeldOutCalibrator()
    other.load_statistics(half.statistics())
    collected(other, data[3:])
    assert torch.equal(other.held_out, whole.held_out)
    assert torch.equal(other.counts, whole.counts)


# A whole model


def network():
    torch.manual_seed(0)
    return lq.quantize_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))


def calibrated(method, n=4, **options):
    model = network()
    with lq.calibrating(model, method, **options):
        for x in torch.randn(n, 64, 6, generator=torch.Generator().manual_seed(3)):
            model(x)
    return model


def test_a_model_says_what_was_picked_and_has_the_amax_of_that():
    model = calibrated("auto")
    picked = {name: q.calibrator.method for name, q in lq.named_quantizers(model)}
    assert picked["0.weight"] == picked["2.weight"] == "max"
    assert set(picked.values()) <= set(contenders(8))
    other = calibrated({"*": "max", **{name: m for name, m in picked.items() if name.endswith("input")}})
    for (_, a), (_, b) in zip(lq.named_quantizers(model), lq.named_quantizers(other), strict=True):
        assert torch.equal(a.amax, b.amax)


def test_another_method_afterwards_needs_no_data_but_auto_needs_its_own():
    model = calibrated("auto")
    lq.load_calib_amax_(model, "entropy")
    pairs = zip(lq.named_quantizers(model), lq.named_quantizers(calibrated("entropy")), strict=True)
    assert all(torch.equal(a.amax, b.amax) for (_, a), (_, b) in pairs)
    with pytest.raises(ValueError, match=r"`0\.input` has no batches held out for method 'auto'"):
        lq.load_calib_amax_(calibrated("entropy"), "auto")


def test_weights_with_a_histogram_are_measured_on_themselves():
    torch.manual_seed(0)
    weights = lq.QuantDescriptor(num_bits=4, axis=0, calib_method="histogram")
    model = lq.quantize_(nn.Sequential(nn.Linear(2000, 3)), [lq.QuantRule("*", lq.QuantDescriptor(), weights)])
    nn.init.normal_(model[0].weight)
    weight = model[0].weight_quantizer
    before = copy.deepcopy(model)
    for m, method in ((model, "auto"), (before, "mse")):
        with lq.calibrating(m, method):
            for x in torch.randn(2, 64, 2000):
                m(x)
    assert weight.calibrator.method == "mse"
    assert torch.equal(weight.amax, before[0].weight_quantizer.amax)


def test_auto_with_too_few_batches_is_refused_before_any_work():
    from lq.callbacks import Quantize, ScaleFreeze

    with pytest.raises(ValueError, match="'auto' holds batches out to measure on: it needs at least 2, not 1"):
        Quantize(method="auto", batches=1)
    with pytest.raises(ValueError, match="'auto' holds batches out to measure on: it needs at least 2, not 1"):
        ScaleFreeze(method={"*": "auto"}, observe=1)
