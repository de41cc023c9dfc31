"""`calibrate_weights`: histograms of all weights at once."""

import pytest
import torch
from torch import nn

from lq.calib import HistogramCalibrator, calibrate_weights
from lq.descriptor import QuantDescriptor
from lq.nn import QuantConv2d, QuantConvTranspose2d, QuantLinear


@pytest.fixture
def model():
    return nn.Sequential(QuantConv2d(3, 4, 3), QuantConvTranspose2d(4, 6, 2), nn.ReLU(), QuantLinear(5, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("perchannel", [True, False])
@pytest.mark.parametrize(("method", "options"), [("percentile", {"percentile": 90}), ("mse", {}), ("max", {})])
def test_every_weight_gets_the_amax_of_its_histogram(model, method, options, perchannel):
    calibrate_weights(model, method, perchannel, num_bins=512, **options)
    for layer in (model[0], model[1], model[3]):
        calibrator = HistogramCalibrator(axis=0 if perchannel else None, num_bins=512)
        calibrator.collect(layer.weight)
        quantizer = layer.weight_quantizer
        assert torch.equal(quantizer.amax, calibrator.compute_amax(method, **options))
        assert quantizer.axis == (0 if perchannel else None)
        assert (quantizer.amax.dim() == 0) != perchannel
        assert layer.input_quantizer.amax is None
        layer.weight_quantizer(layer.weight)


def test_it_may_be_called_again_with_another_granularity(model):
    for perchannel in (True, False, True):
        calibrate_weights(model, perchannel=perchannel)
    assert model[0].weight_quantizer.amax.shape == (4, 1, 1, 1)


def test_disabled_quantizers_are_left_alone(model):
    model[0].weight_quantizer.disable()
    calibrate_weights(model)
    assert model[0].weight_quantizer.amax is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(model, bad):
    model[3].weight.data[0, 0] = bad
    with pytest.raises(ValueError, match=r"NaN or Inf in `3.weight`"):
        calibrate_weights(model)


def test_a_model_without_weight_quantizers_is_refused():
    with pytest.raises(ValueError, match="Sequential has no enabled weight quantizer"):
        calibrate_weights(nn.Sequential(nn.Linear(2, 2), QuantLinear(2, 2, quant_desc_weight=None)))


def test_an_unknown_method_is_refused(model):
    with pytest.raises(ValueError, match="`method` is 'best'"):
        calibrate_weights(model, "best")


def test_bits_that_a_search_does_not_know_are_refused():
    layer = QuantLinear(2, 2, quant_desc_weight=QuantDescriptor(num_bits=(4, 3)))
    with pytest.raises(ValueError, match=r"`method` is 'kl', which counts the levels of integers, but `num_bits` is \(4, 3\)"):
        calibrate_weights(layer, "kl")
    calibrate_weights(layer, "mse")


def test_what_it_refuses_it_has_not_touched(model):
    model[3].weight_quantizer.quant_desc = model[3].weight_quantizer.quant_desc.replace(axis=None)
    before = [model[i].weight_quantizer.quant_desc for i in (0, 1, 3)]
    with pytest.raises(ValueError, match="'median'"):
        calibrate_weights(model, "median", perchannel=False)
    model[3].weight_quantizer.amax = 1.0
    model[3].weight_quantizer.frozen = True
    with pytest.raises(ValueError, match=r"The amax of `3.weight` is frozen, learned, affine, normalized or of blocks"):
        calibrate_weights(model, perchannel=False)
    assert [model[i].weight_quantizer.quant_desc for i in (0, 1, 3)] == before
    assert model[0].weight_quantizer.amax is None


def test_blocks_and_learned_ranges_are_left_to_calibration():
    blocks = nn.Sequential(QuantLinear(8, 2, quant_desc_weight=QuantDescriptor(num_bits=4, axis=0, block_size=4)))
    learned = nn.Sequential(QuantLinear(8, 2, quant_desc_weight=QuantDescriptor(amax=1.0, learn_amax=True)))
    for model in (blocks, learned):
        with pytest.raises(ValueError, match=r"The amax of `0.weight` is frozen, learned, affine, normalized or of blocks"):
            calibrate_weights(model)


def test_a_parameter_of_that_name_is_no_obstacle(model):
    model.weights = nn.Parameter(torch.ones(3))
    calibrate_weights(model)
    assert model[0].weight_quantizer.amax is not None


def test_many_channels_are_looked_at_in_parts(model, monkeypatch):
    calibrate_weights(model, "mse")
    whole = [model[i].weight_quantizer.amax.clone() for i in (0, 1, 3)]
    monkeypatch.setattr("lq.calib.weights.ROWS", 3)
    calibrate_weights(model, "mse")
    assert all(torch.equal(model[i].weight_quantizer.amax, amax) for i, amax in zip((0, 1, 3), whole, strict=True))


@pytest.mark.parametrize("kind", [{"affine": True}, {"normalize": True, "num_bits": 4, "axis": 0}])
def test_ranges_of_another_kind_are_refused_before_anything_changes(kind):
    model = nn.Sequential(QuantLinear(4, 4), QuantLinear(4, 4, quant_desc_weight=QuantDescriptor(**kind)))
    before = [q.quant_desc for q in (model[0].weight_quantizer, model[1].weight_quantizer)]
    with pytest.raises(ValueError, match=r"The amax of `1\.weight` is frozen, learned, affine, normalized or of blocks"):
        calibrate_weights(model, perchannel=False)
    assert [q.quant_desc for q in (model[0].weight_quantizer, model[1].weight_quantizer)] == before
    assert model[0].weight_quantizer.amax is None
