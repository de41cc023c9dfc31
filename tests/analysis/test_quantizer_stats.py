"""Statistics of quantizers against a NumPy reference that shares no code with them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.analysis import QuantizerStats, measuring, table
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
