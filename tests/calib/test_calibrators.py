"""One harness for every calibrator: what they promise whatever they collect."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.calib import AffineCalibrator, HistogramCalibrator, MaxCalibrator
from lq.functional.threshold import METHODS, Search, threshold

MAKERS = {
    "max": lambda: MaxCalibrator(),
    "max, axis": lambda: MaxCalibrator(axis=1),
    "max, two axes": lambda: MaxCalibrator(axis=(1, -1)),
    "histogram": lambda: HistogramCalibrator(num_bins=32),
    "histogram, axis": lambda: HistogramCalibrator(num_bins=32, axis=1),
    "histogram, unsigned 4 bit": lambda: HistogramCalibrator(4, None, True, num_bins=32),
    "histogram, no zeros": lambda: HistogramCalibrator(num_bins=32, skip_zeros=True),
    "affine": lambda: AffineCalibrator(num_bins=32),
    "affine, axis": lambda: AffineCalibrator(num_bins=32, axis=1),
    "affine, no zeros": lambda: AffineCalibrator(num_bins=32, axis=(1, -1), skip_zeros=True),
}
HISTOGRAMS = [name for name in MAKERS if "histogram" in name]


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def data(seed=0):
    """Six batches whose magnitudes grow from 1e-3 to 1e3, with zeros, and with a channel that is dead in the first of them."""
    x = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(seed)).relu()
    x *= torch.logspace(-3, 3, 6).reshape(6, 1, 1, 1)
    x[:2, :, 1] = 0
    return x


def statistics(calibrator):
    return calibrator.shape, {name: value.tolist() for name, value in calibrator.metric_state.items()}


def collected(calibrator, batches):
    for batch in batches:
        calibrator.collect(batch)
    return calibrator


# Data


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 5, 0, 3, 1, 4]])
@pytest.mark.parametrize("sizes", [[6], [1] * 6, [2, 4], [5, 0, 1]])
def test_any_split_in_any_order_gives_the_same_statistics(make, sizes, order):
    whole = collected(make(), [data().flatten(0, 1)])
    parts = collected(make(), [part.flatten(0, 1) for part in torch.split(data()[order], sizes)])
    assert statistics(parts) == statistics(whole)
    assert torch.equal(parts.compute_amax(), whole.compute_amax())


@pytest.mark.parametrize("axis", [None, 1, (0, 2)])
@pytest.mark.parametrize("kind", [MaxCalibrator, HistogramCalibrator])
def test_the_largest_magnitude_is_exact(kind, axis):
    batches = [torch.randn(3, 4, 5) for _ in range(3)]
    calibrator = collected(kind(axis=axis), batches)
    kept = () if axis is None else tuple(np.atleast_1d(axis))
    reduced = tuple(i for i in range(3) if i not in kept)
    expected = np.max([np.abs(b.numpy()).max(axis=reduced, keepdims=bool(kept)) for b in batches], axis=0)
    amax = calibrator.compute_amax() if kind is MaxCalibrator else calibrator.compute_amax("max")
    assert amax.dtype == torch.float32
    np.testing.assert_array_equal(amax.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_count_as_the_numbers_they_are(make, dtype):
    x = data().flatten(0, 1).clamp_max(1000).to(dtype)
    ours, theirs = collected(make(), [x]), collected(make(), [x.float()])
    assert statistics(ours) == statistics(theirs)
    assert ours.compute_amax().dtype == torch.float32


def test_an_empty_batch_adds_nothing(make):
    x = data().flatten(0, 1)
    empty = x[:0]
    assert statistics(collected(make(), [empty, x, empty])) == statistics(collected(make(), [x]))


def test_without_data_there_is_no_amax(make):
    calibrator = make()
    assert calibrator.compute_amax() is None
    assert not calibrator.collected
    assert calibrator.finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_data_that_is_not_finite_is_remembered(make, bad):
    x = data()[0].clone()
    x[1, 1, 1] = bad
    calibrator = collected(make(), [data()[0], x, data()[1]])
    assert not calibrator.finite
    calibrator.reset()
    assert calibrator.finite


def test_collecting_leaves_the_data_and_its_graph_alone(make):
    x = data()[0].clone().requires_grad_()
    y = x * 1
    calibrator = collected(make(), [y])
    assert torch.equal(y, data()[0])
    assert not calibrator.compute_amax().requires_grad
    assert not calibrator(y).requires_grad
    assert not any(state.requires_grad for state in calibrator.metric_state.values())


@pytest.mark.parametrize("name", ["max, axis", "histogram, axis", "affine, axis"])
def test_another_shape_of_amax_raises_and_changes_nothing(name):
    calibrator = collected(MAKERS[name](), [torch.ones(2, 3)])
    before = statistics(calibrator)
    with pytest.raises(RuntimeError, match=r"shape from \(1, 3\) to \(1, 4\).*`reset\(\)`"):
        calibrator.collect(torch.ones(2, 4))
    assert statistics(calibrator) == before


# Life


def test_reset_forgets_everything(make):
    calibrator = collected(make(), data() * 1e6)
    calibrator.reset()
    assert statistics(calibrator) == statistics(make())
    assert calibrator.compute_amax() is None
    other = [torch.rand(2, 7, 5) * 1e-3]
    assert statistics(collected(calibrator, other)) == statistics(collected(make(), other))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(make, copied):
    first, second = data()[:3], data()[3:]
    original = collected(make(), first)
    before = statistics(original)
    twin = collected(copied(original), second)
    assert statistics(original) == before
    assert statistics(twin) == statistics(collected(make(), data()))
    twin.reset()
    assert statistics(twin) == statistics(make())


def test_the_forward_of_a_metric_collects_too(make):
    calibrator = make()
    for batch in data():
        amax = calibrator(batch)
        assert torch.equal(amax, make()(batch))
    assert statistics(calibrator) == statistics(collected(make(), data()))


def test_states_are_not_merged_by_torchmetrics(make):
    # it would add counts of histograms with different ranges
    with pytest.raises(RuntimeError, match="merge_state"):
        make().merge_state(make())


def test_compute_is_compute_amax(make):
    calibrator = collected(make(), data())
    assert torch.equal(calibrator.compute(), calibrator.compute_amax())
    calibrator.collect(1e4 * data()[0])
    assert torch.equal(calibrator.compute(), calibrator.compute_amax())


# MaxCalibrator


def test_track_amax_keeps_one_array_a_batch_for_plots():
    calibrator = collected(MaxCalibrator(axis=1, track_amax=True), [torch.eye(2), torch.tensor([[3.0, -5.0]])])
    assert [type(a) for a in calibrator.amaxs] == [np.ndarray, np.ndarray]
    assert [a.tolist() for a in calibrator.amaxs] == [[[1, 1]], [[3, 5]]]
    calibrator.reset()
    assert calibrator.amaxs == []


def test_without_track_amax_nothing_piles_up():
    assert collected(MaxCalibrator(), data()).amaxs == []


# HistogramCalibrator


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", HISTOGRAMS)
def test_amax_is_the_threshold_of_the_histogram(name, method):
    calibrator = collected(MAKERS[name](), data())
    search = Search(calibrator.num_bits, calibrator.unsigned, 97.0, 5, 3)
    expected = threshold(calibrator.counts, calibrator.width, calibrator.peak, method, search).float()
    amax = calibrator.compute_amax(method, percentile=97.0, start_bin=5, stride=3)
    assert torch.equal(amax, expected.reshape(calibrator.shape))


def test_methods_may_be_asked_in_any_order_and_often():
    calibrator = collected(HistogramCalibrator(), data())
    before = statistics(calibrator)
    first = [calibrator.compute_amax(method) for method in METHODS]
    again = [calibrator.compute_amax(method) for method in reversed(METHODS)]
    assert first == again[::-1]
    assert statistics(calibrator) == before


def test_percentile_is_that_of_the_data_to_the_width_of_a_bin():
    x = torch.randn(100_000).abs()
    calibrator = collected(HistogramCalibrator(num_bins=2048), x.split(999))
    for percentile in (50, 99, 99.9):
        exact = x.sort().values[math.ceil(Fraction(str(percentile)) * 1000) - 1]
        assert 0 <= calibrator.compute_amax("percentile", percentile=percentile).item() - exact <= calibrator.width.item()
    assert calibrator.compute_amax("percentile", percentile=100) == x.max()


def test_the_resolution_holds_for_any_range():
    for peak in (1e-3, 1.0, 1.001, 1.999, 1e5):
        calibrator = collected(HistogramCalibrator(num_bins=1000), [torch.tensor([peak])])
        assert calibrator.width.item() <= peak / 1000


def test_skip_zeros_changes_the_percentile_only_by_the_zeros():
    x = torch.cat([torch.zeros(900), torch.arange(1, 101) / 100])
    skipping, not_skipping = (collected(HistogramCalibrator(skip_zeros=s), [x]) for s in (True, False))
    assert skipping.compute_amax("percentile", percentile=50).item() == pytest.approx(0.5, abs=1e-3)
    assert not_skipping.compute_amax("percentile", percentile=90).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "percentile", "percentile": 100.5}, "`percentile` is 100.5"),
        ({"method": "mse", "start_bin": 0}, "`start_bin` is 0"),
        ({"method": "entropy", "stride": -1}, "`stride` -1"),
    ],
)
def test_options_out_of_range_are_refused(arguments, message, with_data):
    calibrator = collected(HistogramCalibrator(), data() if with_data else [])
    with pytest.raises(ValueError, match=message):
        calibrator.compute_amax(**arguments)


@pytest.mark.parametrize("with_data", [True, False])
def test_an_unknown_method_is_refused(with_data):
    calibrator = collected(HistogramCalibrator(), data() if with_data else [])
    with pytest.raises(ValueError, match="'median'"):
        calibrator.compute_amax("median")


class Experts(nn.Module):
    """A mixture that calls each expert with the tokens it is chosen for, which may be none."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        chosen = x[:, 0] > 0
        y = torch.empty_like(x)
        y[chosen], y[~chosen] = self.up(x[chosen]), self.down(x[~chosen])
        return y


# affine ranges have no `auto`
@pytest.mark.parametrize(("method", "affine"), [("max", False), ("mse", False), ("auto", False), ("max", True), ("mse", True)])
def test_a_batch_without_values_is_no_data(method, affine):
    desc = lq.QuantDescriptor(affine=affine)
    model = lq.quantize_(Experts(), [lq.QuantRule("*", desc, lq.QuantDescriptor(axis=0))])
    positive = torch.rand(16, 4) + 0.1

    def calibrate_on_positive_ones():
        with lq.calibrating(model, method=method):
            for _ in range(8):
                model(positive)

    with pytest.raises(ValueError, match=r"saw no calibration data: down\.input\."):
        calibrate_on_positive_ones()
    alone, mixed = (copy.deepcopy(model) for _ in range(2))
    with lq.calibrating(alone, method=method):
        for i in range(8):
            alone(positive + i)
            alone(-positive - i)
    with lq.calibrating(mixed, method=method):
        for i in range(8):
            mixed(torch.cat([positive + i, -positive - i]))
    # each expert saw the same, with batches of no tokens in between or without
    for name in ("up", "down"):
        found, expected = (getattr(m, name).input_quantizer for m in (alone, mixed))
        assert torch.equal(found.amax, expected.amax)
        assert found.calibrator.update_count == expected.calibrator.update_count


def test_without_values_a_dynamic_range_is_zero():
    for desc in (lq.QuantDescriptor(affine=True), lq.QuantDescriptor(affine=True, axis=1), lq.QuantDescriptor()):
        assert lq.TensorQuantizer(desc)(torch.zeros(0, 4)).shape == (0, 4)
