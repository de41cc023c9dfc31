"""The table of a calibration against what quantizing the data itself shows."""

import math

import pytest
import torch
from torch import nn

import lq
from lq.analysis import calibration_rows, calibration_table, measuring


@pytest.fixture
def data():
    return torch.randn(4, 512, 6) * torch.tensor([1.0, 2, 1, 0.2, 1, 1])


def model_of(rules="int8"):
    torch.manual_seed(0)
    return lq.quantize_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), rules)


@pytest.mark.parametrize(("method", "options"), [("mse", {}), ("percentile", {"percentile": 90.0}), ("max", {})])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_says_what_a_measurement_on_the_same_data_says(data, method, options, bits):
    desc = lq.QuantDescriptor(num_bits=bits, calib_method="histogram")
    model = model_of([lq.QuantRule("*", desc, lq.QuantDescriptor(num_bits=bits, axis=0))])
    with lq.calibrating(model, method, **options):
        for x in data:
            model(x)
    rows = {row.name: row for row in calibration_rows(model)}
    with measuring(model) as stats:
        # the second layer sees other data once the first one quantizes
        for x in data:
            model[0].input_quantizer(x)
            model[0].weight_quantizer(model[0].weight)
    for name in ("0.input", "0.weight"):
        row = rows[name]
        assert row.saturated == pytest.approx(stats[name].saturated, abs=2e-4)
        assert row.sqnr_db == pytest.approx(stats[name].sqnr_db, abs=0.1)
    assert rows["0.input"].method == method
    assert rows["0.input"].peak == data.abs().max()
    if method == "max":
        assert rows["0.input"].saturated == 0


def test_without_a_histogram_there_is_no_noise_to_tell(data):
    model = model_of()
    with lq.calibrating(model, "max"):
        model(data[0])
    row = calibration_rows(model)[0]
    assert (row.name, row.saturated) == ("0.input", 0)
    assert math.isnan(row.sqnr_db)
    assert calibration_table(model).rows[0][-2:] == ["0.000", "-"]


def test_steps_narrower_than_bins_are_not_judged(data):
    model = model_of([lq.QuantRule("*", lq.QuantDescriptor(num_bits=16), lq.QuantDescriptor(axis=0))])
    with lq.calibrating(model, "percentile"):
        model(data[0])
    assert math.isnan(calibration_rows(model)[0].sqnr_db)


def test_a_quantizer_without_amax_is_left_out():
    assert calibration_rows(model_of()) == []
