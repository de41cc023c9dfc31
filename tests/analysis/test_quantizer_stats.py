"""Statistics of quantizers against a NumPy reference that shares no code with them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.analysis import QuantizerStats, measuring, table
from lq.analysis.quantizer_stats import evenly
from lq.descriptor import QuantDescriptor
from lq.nn import TensorQuantizer


def reference(x, amax, qmin, qmax):
    """Saturated share and SQNR of quantizing ``x`` to the codes ``qmin..qmax``, in float64."""
    scale = np.maximum(amax / (qmax if qmax > 0 else 1), np.finfo(np.float32).tiny)
    quantized = np.clip(np.rint(x / scale), qmin, qmax) * scale
    outside = (x > amax) | (x < (-amax if qmin < 0 else 0))
    noise = np.square(x - quantized).sum()
    return outside.mean(), 10 * np.log10(np.square(x).sum() / noise)


def measure(quantizer, *batches):
    model = nn.Sequential(quantizer)
    with measuring(model) as stats:
        for x in batches:
            model(x)
    return stats["0"]


@pytest.mark.parametrize(
    ("desc", "qmin", "qmax"),
    [
        ({"num_bits": 8}, -127, 127),
        ({"num_bits": 8, "narrow_range": False}, -128, 127),
        ({"num_bits": 4}, -7, 7),
        ({"num_bits": 8, "unsigned": True}, 0, 255),
        ({"num_bits": 8, "fake_quant": False}, -127, 127),
    ],
)
def test_matches_numpy(desc, qmin, qmax):
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.5, **desc))
    quantizer(x.abs())  # the first batch of an unsigned quantizer must not be negative
    stats = measure(quantizer, *x)
    saturated, sqnr = reference(x.double().numpy(), 1.5, qmin, qmax)
    assert stats.values == 1500
    assert stats.saturated == saturated
    assert stats.sqnr_db == pytest.approx(sqnr, abs=1e-4)


def test_amax_per_channel_and_pre_quant_scale():
    x = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(2))
    quantizer = TensorQuantizer(QuantDescriptor(axis=1))
    quantizer.amax = torch.tensor([0.5, 1.0, 2.0]).reshape(1, 3, 1)
    quantizer.pre_quant_scale = torch.tensor([1.0, 0.5, 3.0]).reshape(1, 3, 1)
    stats = measure(quantizer, x)
    scaled = x.double().numpy() * np.array([1.0, 0.5, 3.0]).reshape(1, 3, 1)
    saturated, sqnr = reference(scaled, np.array([0.5, 1.0, 2.0]).reshape(1, 3, 1), -127, 127)
    assert stats.saturated == saturated
    assert stats.sqnr_db == pytest.approx(sqnr, abs=1e-3)


@pytest.mark.parametrize("fields", [{"block_size": 4, "num_bits": 4}, {"scale_amax": 0.5}, {"num_bits": (4, 3), "axis": 0}])
def test_blocks_factors_and_floats(fields):
    quantizer = TensorQuantizer(QuantDescriptor(**fields))
    x = torch.randn(2, 8)
    quantizer.collect(x)
    quantizer.load_calib_amax()
    with torch.no_grad():
        noise = (quantizer(x) - x).double().square().sum()
    stats = measure(quantizer, x)
    amax = {"block_size": x.reshape(2, 2, 4).abs().amax((0, 2), keepdim=True).expand(2, 2, 4).reshape(2, 8)}.get(
        next(iter(fields)), x.abs().max() * 0.5 if "scale_amax" in fields else x.abs().amax(1, keepdim=True)
    )
    assert stats.saturated == (x.abs() > amax).double().mean()
    assert stats.sqnr_db == pytest.approx(10 * math.log10(x.double().square().sum() / noise), abs=1e-3)


def test_amax_itself_is_not_saturated():
    assert measure(TensorQuantizer(QuantDescriptor(amax=2.0)), torch.tensor([2.0, -2.0, 2.001, -3.0])).saturated == 0.5


def test_no_noise_is_infinite_and_no_data_is_nan():
    on_grid = torch.arange(-127, 128).float()
    assert measure(TensorQuantizer(QuantDescriptor(amax=127.0)), on_grid).sqnr_db == math.inf
    empty = QuantizerStats()
    assert empty.values == 0
    assert math.isnan(empty.saturated)
    assert math.isnan(empty.sqnr_db)


def test_dynamic_quantizers_have_no_amax_to_exceed():
    assert measure(TensorQuantizer(), torch.randn(5)).values == 0


def test_half_precision_is_measured_in_float32():
    # the square of this overflows float16
    x = torch.full((1000,), 300.0, dtype=torch.float16)
    stats = measure(TensorQuantizer(QuantDescriptor(amax=270.0)), x)
    assert stats.saturated == 1.0
    assert stats.sqnr_db == pytest.approx(20, abs=1e-3)


def test_a_learned_range_saturates_where_it_clips():
    quantizer = TensorQuantizer(QuantDescriptor(amax=2.0, learn_amax=True))
    quantizer.clip.clip_value_min.data.fill_(-1.0)
    stats = measure(quantizer, torch.tensor([-1.5, -0.5, 0.0, 1.5]))
    assert stats.saturated == 0.25


# Codes


def codes(desc, x, **options):
    quantizer = TensorQuantizer(QuantDescriptor(**desc))
    model = nn.Sequential(quantizer)
    with measuring(model, codes=True, **options) as stats:
        model(x)
    return quantizer, stats["0"].codes


@pytest.mark.parametrize(
    ("desc", "values", "grid", "used"),
    [
        ({"num_bits": 4, "amax": 7.0}, [-9, -7, 0.2, 0.4, 1, 1.4, 3], 15, {-7, 0, 1, 3}),
        ({"num_bits": 4, "amax": 7.0, "narrow_range": False}, [-9, -7, 7], 16, {-8, -7, 7}),
        ({"num_bits": 4, "amax": 15.0, "unsigned": True}, [0, 14.6, 30], 16, {0, 15}),
        ({"num_bits": 4, "amax": 7.0, "fake_quant": False}, [2.2, -2.2], 15, {2, -2}),
        ({"num_bits": 4, "amax": 7.0, "learn_amax": True}, [-9, 0], 15, {-7, 0}),
    ],
)
def test_codes_that_occur(desc, values, grid, used):
    _, seen = codes(desc, torch.tensor(values, dtype=torch.float32))
    lowest = {15: -7, 16: 0 if desc.get("unsigned") else -8}[grid]
    assert len(seen) == grid
    assert {int(i) + lowest for i in seen.nonzero()} == used


def test_codes_of_channels_and_blocks_are_those_of_their_own_amax():
    x = torch.tensor([[7.0, 7.0, 2.0, 2.0], [56.0, 56.0, 16.0, 16.0]])
    for desc in ({"axis": 0}, {"axis": 0, "block_size": 2}):
        quantizer = TensorQuantizer(QuantDescriptor(num_bits=4, **desc))
        quantizer.collect(x)
        quantizer.load_calib_amax()
        model = nn.Sequential(quantizer)
        with measuring(model, codes=True) as stats:
            model(x)
        expected = {7, 2} if "block_size" not in desc else {7}
        assert {int(i) - 7 for i in stats["0"].codes.nonzero()} == expected


def test_codes_in_a_learned_range_stop_where_it_clips():
    quantizer = TensorQuantizer(QuantDescriptor(num_bits=4, amax=7.0, learn_amax=True))
    quantizer.clip.clip_value_min.data.fill_(-2.0)
    model = nn.Sequential(quantizer)
    with measuring(model, codes=True) as stats:
        model(torch.tensor([-6.0, 3.0]))
    assert {int(i) - 7 for i in stats["0"].codes.nonzero()} == {-2, 3}


def test_codes_in_half_precision_are_all_told_apart():
    # 8 bits of mantissa are too few for the values of 256 codes
    _, seen = codes({"amax": 200.0, "unsigned": True}, torch.linspace(0, 200, 5000).to(torch.bfloat16))
    exact = torch.linspace(0, 200, 5000).to(torch.bfloat16).double().div(200 / 255).round().unique()
    assert seen.sum() == len(exact)


@pytest.mark.parametrize("num_bits", [13, (4, 3)])
def test_floats_and_wide_integers_have_no_codes(num_bits):
    assert codes({"num_bits": num_bits, "amax": 1.0}, torch.randn(10))[1] is None


def test_codes_of_what_is_not_a_number():
    _, seen = codes({"num_bits": 4, "amax": 7.0}, torch.tensor([math.nan, math.inf, 3.0]))
    assert {int(i) - 7 for i in seen.nonzero()} == {0, 3, 7}


# Samples


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 2, 0)], ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2)])
def test_a_sample_is_bounded_and_each_value_meets_the_amax_of_its_channel(order, axis):
    quantizer = TensorQuantizer(QuantDescriptor(axis=axis))
    shape = [n if d in np.atleast_1d(axis) else 1 for d, n in enumerate((6, 8, 10, 12))] if axis is not None else []
    quantizer.amax = torch.rand(shape) + 0.5
    # dimensions from slow to fast in memory: channels_last is the second order
    at_amax = quantizer.amax.expand(6, 8, 10, 12).permute(order).contiguous().permute(np.argsort(order).tolist())
    model = nn.Sequential(quantizer)
    for x, saturated in ((at_amax, 0.0), (at_amax * 1.0001, 1.0)):
        with measuring(model, sample=1000) as stats:
            model(x)
        assert stats["0"].saturated == saturated
        assert 500 < stats["0"].values <= 1000


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 2, 0)], ids=str)
def test_a_sample_is_no_copy(order):
    x = torch.randn(6, 8, 10, 12).permute(order).contiguous().permute(np.argsort(order).tolist())
    (sampled,), _ = evenly(100, [x], [torch.ones(())])
    assert sampled.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_a_sample_of_blocks_meets_their_amax():
    quantizer = TensorQuantizer(QuantDescriptor(num_bits=4, axis=0, block_size=8))
    quantizer.amax = torch.rand(50, 4, 1) + 0.5
    model = nn.Sequential(quantizer)
    with measuring(model, sample=300, codes=True) as stats:
        model(quantizer.amax.expand(50, 4, 8).reshape(50, 32))
    assert stats["0"].saturated == 0
    assert stats["0"].values <= 300
    assert {int(i) - 7 for i in stats["0"].codes.nonzero()} == {7}


def test_a_sample_looks_at_every_channel_alike():
    # an outlier in one of many channels, in a tensor whose size is a power of 2
    x = torch.zeros(8, 64, 256)
    x[..., 77] = 5.0
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
    model = nn.Sequential(quantizer)
    with measuring(model, sample=2**14) as stats:
        model(x)
    assert stats["0"].saturated == pytest.approx(1 / 256, rel=0.05)


def test_a_sample_estimates_all():
    x = torch.randn(40, 3, 25, 25)
    quantizer = TensorQuantizer(QuantDescriptor(num_bits=4, amax=1.5))
    model = nn.Sequential(quantizer)
    with measuring(model) as whole, measuring(model, sample=8000) as part:
        model(x)
    assert whole["0"].values == x.numel()
    assert part["0"].saturated == pytest.approx(whole["0"].saturated, rel=0.1)
    assert part["0"].sqnr_db == pytest.approx(whole["0"].sqnr_db, abs=0.3)


@pytest.mark.parametrize("axis", [None, 0])
def test_nothing_is_asked_of_the_device(axis):
    # tensors without data raise where anybody looks at them
    with torch.device("meta"):
        quantizer = TensorQuantizer(QuantDescriptor(axis=axis))
        quantizer._amax = torch.ones([40, 1] if axis == 0 else [])
        stats, x = QuantizerStats(sample=100, codes=True), torch.ones(40, 30)
        stats.update(quantizer, x, x)
    assert stats.totals.shape == (4,)
    assert stats.codes.shape == (255,)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = lq.quantize_(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)))
    with lq.calibrating(model):
        model(torch.randn(16, 8))
    return model


def hooks(model):
    return sum(len(q._forward_hooks) for _, q in lq.named_quantizers(model))


def test_hooks_leave_with_the_block_even_if_it_raises(model):
    with measuring(model):
        assert hooks(model) == 4
    with pytest.raises(KeyError), measuring(model):
        raise KeyError
    assert hooks(model) == 0


def test_measuring_changes_neither_output_nor_gradient(model):
    x = torch.randn(4, 8)

    def run():
        model.zero_grad()
        y = model(x)
        y.sum().backward()
        return y, model[0].weight.grad

    expected = run()
    with measuring(model) as stats:
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not stats["0.input"].totals.requires_grad


def test_only_quantized_forwards_count(model):
    quantizers = dict(lq.named_quantizers(model))
    quantizers["0.input"].disable_quant()
    quantizers["0.weight"]._amax = None
    with measuring(model) as stats:
        model(torch.randn(4, 8))
    assert {name: s.values for name, s in stats.items()} == {"0.input": 0, "0.weight": 0, "2.input": 24, "2.weight": 12}
    assert [row.name for row in table(model, stats)] == ["2.input", "2.weight"]


def test_names_select_and_unknown_ones_are_refused(model):
    with measuring(model, ["*.input", "2.weight"]) as stats:
        pass
    assert list(stats) == ["0.input", "2.input", "2.weight"]
    with (
        pytest.raises(ValueError, match=r"'1\.input', which matches no quantizer: known are 0\.input"),
        measuring(model, ["1.input"]),
    ):
        pass


def test_table(model):
    quantizers = dict(lq.named_quantizers(model))
    quantizers["2.input"].pre_quant_scale = torch.ones(6)
    quantizers["2.weight"].calibrator.reset()
    with measuring(model) as stats:
        model(torch.randn(4, 8))
    rows = {row.name: row for row in table(model, stats)}
    assert list(rows) == ["0.input", "0.weight", "2.input", "2.weight"]
    assert rows["0.input"].peak == rows["0.input"].amax == quantizers["0.input"].amax.item()
    assert rows["0.weight"].amax == model[0].weight.abs().max().item()
    assert rows["0.weight"].saturated == 0.0
    assert rows["0.weight"].num_bits == 8
    assert rows["2.weight"].peak is None
    assert [row.rescaled for row in rows.values()] == [False, False, True, False]
    assert all(20 < row.sqnr_db < 60 for row in rows.values())
