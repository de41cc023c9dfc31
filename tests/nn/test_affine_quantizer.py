"""Affine quantizers: a range with two ends, its codes, its calibration, and how it is kept."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lq
from lq.analysis.quantizer_stats import measuring
from lq.calib import AffineCalibrator
from lq.descriptor import QuantDescriptor, QuantRule
from lq.export import to_onnx
from lq.nn import TensorQuantizer

DESC = QuantDescriptor(4, affine=True)
RULES = [QuantRule("*", DESC, QuantDescriptor(5, affine=True, axis=0))]


def rounded(x: Tensor, low, high, bits: int) -> np.ndarray:
    """The formula, in NumPy: Jacob et al., 2018, eq. 1."""
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    scale = (high - low) / np.float32(2**bits - 1)
    zero_point = -np.rint(low / scale)
    codes = np.clip(np.rint(x.detach().numpy() / scale) + zero_point, 0, 2**bits - 1)
    return (codes - zero_point) * scale


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3))


def calibrated(method: str = "max", **options) -> tuple[nn.Module, Tensor]:
    model, x = lq.quantize_(network(), RULES), torch.randn(64, 6)
    with lq.calibrating(model, method, **options):
        model(x)
    return model, x


def test_values_and_codes():
    quantizer, x = TensorQuantizer(DESC), torch.linspace(-2, 3, 101)
    quantizer.range = -0.7, 2.0
    np.testing.assert_allclose(quantizer(x).numpy(), rounded(x, -0.7, 2.0, 4), atol=1e-6)
    assert quantizer.scale.item() == pytest.approx(2.7 / 15)
    assert quantizer.zero_point.item() == 4
    assert quantizer(torch.zeros(3)).eq(0).all()
    assert quantizer(x).unique().numel() == 16
    assert quantizer.amax.item() == 2
    assert str(quantizer).startswith("TensorQuantizer(affine 4bit fake per-tensor range=-0.7000..2.0000 calibrator=AffineCal")


def test_range_of_each_channel_and_of_each_input():
    weight = torch.randn(8, 6)
    quantizer = TensorQuantizer(QuantDescriptor(3, affine=True, axis=0))
    low, high = weight.amin(1, keepdim=True).clamp_max(0), weight.amax(1, keepdim=True).clamp_min(0)
    # without a range yet, that of what it is given
    np.testing.assert_allclose(quantizer(weight).numpy(), rounded(weight, low, high, 3), atol=1e-6)
    quantizer.range = low, high
    np.testing.assert_allclose(quantizer(weight).numpy(), rounded(weight, low, high, 3), atol=1e-6)
    assert quantizer.scale.shape == quantizer.zero_point.shape == (8, 1)


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "mae", "lp", "kl"])
def test_calibration_is_that_of_the_calibrator(method):
    model, x = calibrated(method, p=3, percentile=97.0, z_threshold=4.0)
    for tensor, axis, bits, quantizer in (
        (x, None, 4, model[0].input_quantizer),
        (model[0].weight, 0, 5, model[0].weight_quantizer),
        (nn.functional.silu(network()[0](x)), None, 4, model[2].input_quantizer),
    ):
        alone = AffineCalibrator(bits, axis)
        alone.collect(tensor)
        low, high = alone.compute_range(method, p=3, percentile=97.0, z_threshold=4.0)
        torch.testing.assert_close(quantizer.range[0], low)
        torch.testing.assert_close(quantizer.range[1], high)
    if method == "max":
        assert -0.28 < model[2].input_quantizer.range[0] < -0.25  # SiLU's least value is -0.2785


def test_momentum_moves_both_ends():
    model, x = calibrated()
    before = [end.clone() for end in model[0].input_quantizer.range]
    model[0].input_quantizer.calibrator.reset()
    model[0].input_quantizer.collect(3 * x)
    lq.load_calib_amax_(model, "max", momentum=0.75)
    for new, old in zip(model[0].input_quantizer.range, before, strict=True):
        torch.testing.assert_close(new, 1.5 * old)


def test_error_is_less_than_with_symmetric_codes():
    x, errors = nn.functional.gelu(2 * torch.randn(4096)), []
    for affine in (True, False):
        quantizer = TensorQuantizer(QuantDescriptor(4, affine=affine, calib_method="histogram"))
        quantizer.collect(x)
        quantizer.load_calib_amax("mse")
        errors.append((quantizer(x) - x).square().mean())
    assert errors[0] < 0.45 * errors[1]  # a quarter at best: steps half as wide, less the negative lobe


def test_state_copies_and_compile(tmp_path):
    model, x = calibrated()
    expected = model(x)
    assert "0.input_quantizer._low" in model.state_dict()
    fresh = lq.quantize_(network(), RULES)
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(m(x), expected) for m in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert torch.equal(lq.load_quantized(network(), tmp_path / "model.pt", RULES)(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected)
    model.half().float()
    assert torch.equal(model[0].input_quantizer.range[0], fresh[0].input_quantizer.range[0])
    lq.dequantize_(fresh)
    torch.testing.assert_close(fresh(x), network()(x))


def test_state_of_the_other_kind_is_refused():
    model, _ = calibrated()
    symmetric = lq.quantize_(network(), "int8")
    with pytest.raises(RuntimeError, match="is of a quantizer that is affine, and this one is symmetric"):
        symmetric.load_state_dict(model.state_dict())
    with lq.calibrating(symmetric):
        symmetric(torch.randn(4, 6))
    with pytest.raises(RuntimeError, match="is of a quantizer that is symmetric, and this one is affine"):
        lq.quantize_(network(), RULES).load_state_dict(symmetric.state_dict())


def test_statistics():
    model, x = calibrated()
    with measuring(model, codes=True) as stats:
        model(2 * x)
    low, high = model[0].input_quantizer.range
    assert stats["0.input"].saturated == pytest.approx(float(((2 * x < low) | (2 * x > high)).double().mean()))
    codes = np.unique(rounded(2 * x, low, high, 4))
    assert int(stats["0.input"].codes.sum()) == len(codes)
    rows = {row.name: row for row in lq.analysis.calibration_rows(model)}
    assert (rows["0.input"].low, rows["0.input"].amax) == (low.item(), high.item())
    assert lq.analysis.calibration_table(model).rows[0][3] == f"{low.item():#.4g} to {high.item():#.4g}"
    noise = (model[0].weight_quantizer(model[0].weight) - model[0].weight).square().sum()
    assert rows["0.weight"].sqnr_db == pytest.approx(float(10 * torch.log10(model[0].weight.square().sum() / noise)), abs=1e-3)


def test_gradients_pass_within_the_range():
    quantizer, x = TensorQuantizer(DESC), torch.tensor([-1.0, -0.5, 0.3, 2.5], requires_grad=True)
    quantizer.range = -0.7, 2.0
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_frozen():
    model, _ = calibrated()
    lq.freeze_(model)
    before = [end.clone() for end in model[0].input_quantizer.range]
    with pytest.raises(RuntimeError, match="frozen"):
        model[0].input_quantizer.range = -1, 1
    assert [end.tolist() for end in model[0].input_quantizer.range] == [end.tolist() for end in before]


@pytest.mark.parametrize("low_high", [(0.5, 1.0), (float("nan"), 1.0), (-1.0, -0.5), (-1.0, float("inf"))])
def test_ranges_that_are_none(low_high):
    with pytest.raises(ValueError, match=r"zero lies between them|finite and not negative|negative"):
        TensorQuantizer(DESC).range = low_high


def test_what_does_not_go_together():
    for fields in ({"unsigned": True}, {"fake_quant": False}, {"learn_amax": True}, {"block_size": 4}):
        with pytest.raises(ValueError, match="`affine` is True, which does not go with"):
            QuantDescriptor(8, affine=True, **fields)
    with pytest.raises(ValueError, match="floats have no zero point"):
        QuantDescriptor((4, 3), affine=True)
    with pytest.raises(ValueError, match="leave `amax` and `scale_amax` out"):
        QuantDescriptor(8, affine=True, amax=1.0)
    with pytest.raises(RuntimeError, match="its range has two ends: set `range`"):
        TensorQuantizer(DESC).amax = 1.0
    with pytest.raises(RuntimeError, match="The quantizer is symmetric: set `amax`"):
        TensorQuantizer().range = -1, 1
    with pytest.raises(RuntimeError, match="`affine` decides what the range is"):
        calibrated()[0][0].input_quantizer.quant_desc = QuantDescriptor(4)


@pytest.mark.parametrize(("method", "options"), [("entropy", {}), ("auto", {}), ("max", {"power_of_two": True})])
def test_methods_without_an_affine_form(method, options):
    with pytest.raises(ValueError, match=r"`0.input` is affine, and"):
        calibrated(method, **options)


def test_export_names_the_quantizers(tmp_path):
    model, x = calibrated()
    with pytest.raises(ValueError, match=r"`0.input`, .* have `affine=True`, so a zero point"):
        to_onnx(model, x, tmp_path / "model.onnx")
