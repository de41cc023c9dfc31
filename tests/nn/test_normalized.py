"""Weights whose amax is in units of their spread."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import lq
from lq.analysis import calibration_table
from lq.analysis.quantizer_stats import measuring
from lq.export import to_onnx
from lq.export.by_hand import enable_onnx_export
from lq.functional.fake_quant import fake_quant
from lq.functional.learned import fake_quant_learned, gradient_scale
from lq.nn import TensorQuantizer
from lq.nn.normalized import fold_normalized_
from lq.nn.reuse import keeping_weights

W3 = lq.QuantDescriptor(3, axis=0, calib_method="histogram", narrow_range=False)


def net(normalize=True, learn_amax="lsq", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    model[0].weight.data.mul_(torch.logspace(-2, 2, 8).view(-1, 1, 1, 1)).add_(0.05)
    desc = W3.replace(normalize=normalize, learn_amax=learn_amax)
    return lq.quantize_(model, [lq.QuantRule("*", lq.QuantDescriptor(narrow_range=False, learn_amax=learn_amax), desc)])


def calibrated(*args, method="mse", **kwargs):
    model = net(*args, **kwargs)
    with lq.calibrating(model, method):
        model(batch())
    return model


def batch(seed=1):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def by_hand(weight, amax, bits, center):
    """NumPy, from the formula: standardise, round, and give the spread back."""
    w = weight.astype(np.float64)
    axes = tuple(range(1, w.ndim))
    if center:
        w = w - w.mean(axes, keepdims=True)
    spread = np.sqrt((w**2).mean(axes, keepdims=True))
    step = amax / (2 ** (bits - 1) - 1)
    return spread * step * np.clip(np.rint(w / spread / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@pytest.mark.parametrize("normalize", [True, "center"])
@pytest.mark.parametrize("learn_amax", [False, "lsq", "pact"])
def test_it_computes_what_the_paper_says(normalize, learn_amax):
    quantizer = TensorQuantizer(W3.replace(normalize=normalize, learn_amax=learn_amax))
    quantizer.amax = torch.tensor([[2.0], [1.0], [0.5]])
    weight = nn.Parameter(torch.randn(3, 50) * 0.02 + 0.01)
    expected = by_hand(weight.detach().numpy(), quantizer.amax.numpy(), 3, normalize == "center")
    np.testing.assert_allclose(quantizer(weight).detach().numpy(), expected, rtol=1e-6)
    with torch.no_grad():  # another way through the code
        np.testing.assert_allclose(quantizer(weight).numpy(), expected, rtol=1e-6)


def test_at_first_it_is_the_quantizer_without():
    plain, model = (calibrated(normalize, method="max").eval() for normalize in (False, True))
    for (name, before), (_, after) in zip(lq.named_quantizers(plain), lq.named_quantizers(model), strict=True):
        if name.endswith("weight"):
            weight = plain.get_submodule(name.removesuffix(".weight")).weight
            spread = weight.square().mean(tuple(range(1, weight.dim())), keepdim=True).sqrt()
            torch.testing.assert_close(after.amax * spread, before.amax)
    torch.testing.assert_close(model(batch()), plain(batch()))


def test_the_step_follows_the_weight():
    quantizer = calibrated()[0].weight_quantizer
    weight = nn.Parameter(torch.randn(8, 3, 3, 3))
    assert torch.equal(quantizer(4 * weight), 4 * quantizer(weight))


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_the_learned_amax_goes_the_way_of_one_in_real_units(method):
    quantizer = TensorQuantizer(lq.QuantDescriptor(3, axis=0, normalize=True, learn_amax=method))
    quantizer.amax = torch.full((4, 1), 1.5)
    weight = nn.Parameter(torch.randn(4, 6) * torch.tensor([[0.01], [0.1], [1.0], [10.0]]))
    spread = weight.detach().square().mean(1, keepdim=True).sqrt()
    real = (1.5 * spread).requires_grad_()
    factor = gradient_scale(6, 3) if method == "lsq" else 1.0
    (gradient,) = torch.autograd.grad(
        fake_quant_learned(weight, real, 3, gradient_scale=factor, rounding=method == "lsq").sum(), real
    )
    quantizer(weight).sum().backward()
    after = (quantizer._amax - 0.1 * quantizer._amax.grad).detach() * spread
    torch.testing.assert_close(after, real.detach() - 0.1 * gradient)
    inside = (weight.abs() <= 1.5 * spread).float()
    assert torch.equal(weight.grad, inside)


@pytest.mark.parametrize("normalize", [True, "center"])
def test_fold_state_dict_copy_and_keeping(normalize):
    model = calibrated(normalize)
    expected = model.eval()(batch())
    assert torch.equal(copy.deepcopy(model)(batch()), expected)
    fresh = net(normalize, seed=3)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(batch()), expected)
    with keeping_weights(model), torch.no_grad():
        assert torch.equal(model(batch()), expected)
        assert torch.equal(model(batch()), expected)
        model[4].weight.mul_(2)
        changed = model(batch())
    assert torch.equal(model(batch()), changed)
    model[4].weight.data.div_(2)
    folded = fold_normalized_(copy.deepcopy(model))
    assert torch.equal(folded(batch()), expected)
    assert not any(q.quant_desc.normalize for _, q in lq.named_quantizers(folded))
    assert (folded[0].weight.mean((1, 2, 3)).abs().max() < 1e-6) == (normalize == "center")


@pytest.mark.parametrize("normalize", [True, "center"])
def test_the_graph_has_integers_and_computes_the_same(tmp_path, normalize):
    model = calibrated(normalize).eval()
    before = copy.deepcopy(model.state_dict())
    session = onnxruntime.InferenceSession(to_onnx(model, batch(), tmp_path / "model.onnx"))
    (output,) = session.run(None, {session.get_inputs()[0].name: batch(5).numpy()})
    np.testing.assert_allclose(output, model(batch(5)).detach().numpy(), atol=1e-5)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    import onnx

    weights = [i for i in onnx.load(tmp_path / "model.onnx").graph.initializer if i.name.endswith("_quantized")]
    assert len(weights) == 2
    for initializer in weights:
        codes = onnx.numpy_helper.to_array(initializer)
        assert codes.dtype == np.int8
        assert -4 <= codes.min() <= codes.max() <= 4  # a BatchNorm may turn the sign
    with enable_onnx_export(), pytest.raises(ValueError, match=r"`0.weight` has `normalize`: call"):
        torch.onnx.export(model, (batch(),), tmp_path / "other.onnx")


def test_a_checkpoint_loads(tmp_path):
    model = calibrated("center").eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    desc = W3.replace(normalize="center", learn_amax="lsq")
    rules = [lq.QuantRule("*", lq.QuantDescriptor(narrow_range=False, learn_amax="lsq"), desc)]
    fresh = lq.dequantize_(net(seed=4))
    assert torch.equal(lq.load_quantized(fresh, tmp_path / "model.pt", rules)(batch()), model(batch()))


def test_compiled_it_is_the_same():
    quantizer = calibrated()[0].weight_quantizer
    weight = nn.Parameter(torch.randn(8, 3, 3, 3))
    expected = quantizer(weight)
    expected.square().sum().backward()
    gradients, weight.grad, quantizer._amax.grad = (weight.grad, quantizer._amax.grad), None, None
    compiled = torch.compile(quantizer, backend="aot_eager", fullgraph=True)(weight)
    compiled.square().sum().backward()
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close((weight.grad, quantizer._amax.grad), gradients)


@pytest.mark.parametrize("normalize", [True, "center"])
def test_what_is_measured_is_in_units_of_amax(normalize):
    model = calibrated(normalize).eval()
    with measuring(model, ["0.weight"], codes=True) as stats:
        model(batch())
    quantizer, weight = model[0].weight_quantizer, model[0].weight.detach()
    x = quantizer.normalized(weight)
    q = fake_quant(x, quantizer.amax, 3, False, False)
    sqnr = 10 * torch.log10(x.square().sum() / (x - q).square().sum()).item()
    assert stats["0.weight"].sqnr_db == pytest.approx(sqnr, rel=1e-4)
    assert stats["0.weight"].saturated == ((x < -quantizer.amax) | (x > quantizer.amax)).double().mean().item()
    row = next(line for line in str(calibration_table(model)).splitlines() if "0.weight" in line)
    assert f"{sqnr:.1f}" in row


def test_in_half_precision_and_of_nothing():
    quantizer = TensorQuantizer(lq.QuantDescriptor(4, axis=0, normalize=True))
    weight = torch.zeros(2, 8)
    weight[1] = torch.randn(8)
    quantizer.collect(weight.half())
    quantizer.load_calib_amax()
    output = quantizer(weight.bfloat16())
    assert output.dtype == torch.bfloat16
    assert output[0].count_nonzero() == 0
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"normalize": "mean"}, "`normalize` is 'mean': it must be true, false or 'center'"),
        ({"normalize": True, "unsigned": True}, "does not go with `unsigned=True`"),
        ({"normalize": True, "learn_amax": True}, "does not go with `learn_amax=True`"),
        ({"normalize": True, "affine": True}, "does not go with `normalize=True`"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        lq.QuantDescriptor(**fields)


def test_it_is_for_weights():
    with pytest.raises(ValueError, match=r"`input` of rule '\*' has `normalize`"):
        lq.QuantRule("*", lq.QuantDescriptor(normalize=True))
    quantizer = TensorQuantizer(lq.QuantDescriptor(amax=1.0))
    with pytest.raises(RuntimeError, match="`normalize` decides what the range is"):
        quantizer.quant_desc = lq.QuantDescriptor(normalize=True)
