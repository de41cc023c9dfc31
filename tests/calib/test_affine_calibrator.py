"""The signed twin of the histogram calibrator: exact counts of both signs, and one range from them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lq.calib import AffineCalibrator, HistogramCalibrator, load_statistics, save_statistics
from lq.functional.affine import fake_affine_tensor_quant
from lq.functional.histogram import MIN_EXPONENT, bins_for

NUM_BINS = 8
BINS = bins_for(NUM_BINS)


def collected(calibrator, batches):
    for batch in batches:
        calibrator.collect(batch)
    return calibrator


def reference(values):
    """Counts and exponents of the negative values and of the others, in plain Python."""
    counts, exponents = [], []
    for side in ([-v for v in values if v < 0], [v for v in values if v >= 0]):
        exponent = max([MIN_EXPONENT] + [math.frexp(v)[1] for v in side if v])
        index = [int(math.ldexp(v, -exponent) * BINS) for v in side]
        counts.append(np.bincount(index, minlength=BINS).tolist())
        exponents.append(exponent)
    return counts, exponents


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12), st.data())
def test_any_split_in_any_order_counts_each_sign_exactly(values, data):
    order = data.draw(st.permutations(values))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    calibrator = collected(AffineCalibrator(num_bins=NUM_BINS), torch.tensor_split(torch.tensor(order), cuts))
    counts, exponents = reference(values)
    assert calibrator.counts[:, 0].tolist() == counts
    assert calibrator.exponent[:, 0].tolist() == exponents
    low, high = calibrator.compute_range("max")
    assert (low.item(), high.item()) == (min(0.0, *values, 0.0), max(0.0, *values, 0.0))


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "mae", "lp", "kl", "entropy"])
@pytest.mark.parametrize("axis", [None, 0])
def test_symmetric_amax_is_that_of_a_histogram_of_magnitudes(method, axis):
    batches = [torch.nn.functional.gelu(torch.randn(3, 500)) * scale for scale in (1.0, 20.0, 0.01)]
    affine, magnitudes = (collected(kind(axis=axis), batches) for kind in (AffineCalibrator, HistogramCalibrator))
    assert torch.equal(affine.compute_amax(method), magnitudes.compute_amax(method))


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "mae", "lp", "kl"])
@pytest.mark.parametrize("axis", [None, 1])
def test_a_range_has_less_error_than_a_symmetric_amax_where_there_is_a_lobe(method, axis):
    x = torch.nn.functional.silu(3 * torch.randn(2000, 4)) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    calibrator = collected(AffineCalibrator(num_bits=6, axis=axis), x.split(500))
    low, high = calibrator.compute_range(method)
    assert low.shape == high.shape == (() if axis is None else (1, 4))
    assert low.dtype == torch.float32
    amax = calibrator.compute_amax(method)
    affine = (fake_affine_tensor_quant(x, low, high, 6) - x).abs().sum()
    symmetric = (fake_affine_tensor_quant(x, -amax, amax, 6) - x).abs().sum()
    assert affine < 0.8 * symmetric


@pytest.mark.parametrize("skip_zeros", [False, True])
def test_zeros_belong_to_the_right(skip_zeros):
    calibrator = collected(AffineCalibrator(num_bins=8, skip_zeros=skip_zeros), [torch.tensor([0.0, -0.0, -1.0, 2.0])])
    assert calibrator.counts[0].sum() == 1
    assert calibrator.counts[1].sum() == (1 if skip_zeros else 3)


def test_a_small_lobe_is_resolved_as_finely_as_a_long_tail():
    calibrator = collected(AffineCalibrator(), [torch.linspace(-0.17, 0, 1000), torch.linspace(0, 1e4, 1000)])
    assert (calibrator.counts > 0).sum(dim=2).min() > 900


def test_statistics_survive_a_file(tmp_path):
    pytest.importorskip("safetensors")

    class Owner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calibrator = AffineCalibrator(axis=1)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.act_quantizer = Owner()

    model, other = Model(), Model()
    collected(model.act_quantizer.calibrator, torch.randn(3, 10, 4))
    load_statistics(other, save_statistics(model, tmp_path / "stats.safetensors"))
    for mine, theirs in zip(
        model.act_quantizer.calibrator.compute_range(), other.act_quantizer.calibrator.compute_range(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_without_data_there_is_no_range():
    assert AffineCalibrator().compute_range() is None


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"`num_bits` is \(4, 3\)"):
        AffineCalibrator(num_bits=(4, 3))
    with pytest.raises(ValueError, match="`method` is 'entropy'"):
        collected(AffineCalibrator(), [torch.ones(3)]).compute_range("entropy")
    with pytest.raises(ValueError, match="`percentile` is 200"):
        AffineCalibrator().compute_range("percentile", percentile=200)
