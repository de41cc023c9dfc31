"""A linear layer of another library that keeps its weight as (inputs, outputs), as transformers' GPT-2 does."""

import pytest
import torch
from torch import nn

import lq
from lq.nn.elsewhere import QuantTransposedLinear


class Conv1D(nn.Module):
    """As in transformers: the name it has there is how it is known."""

    __module__ = "transformers.pytorch_utils"
    __qualname__ = "Conv1D"

    def __init__(self, outputs, inputs):
        super().__init__()
        self.nf, self.weight = outputs, nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], self.nf)


def pair():
    """A model, and the same one made of ``nn.Linear``."""
    theirs = nn.Sequential(nn.LayerNorm(6), Conv1D(8, 6), nn.ReLU(), Conv1D(3, 8)).eval()
    ours = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    for i in (1, 3):
        ours[i].weight.data, ours[i].bias.data = theirs[i].weight.data.mT.clone(), theirs[i].bias.data.clone()
    return theirs, ours


def data():
    return torch.randn(4, 5, 6) * torch.tensor([1, 1, 30.0, 1, 1, 1])


@pytest.mark.parametrize("rules", ["int8", "int8_per_tensor", "int8_weight_only", "fp8"])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_it_quantizes_as_a_linear_layer_of_the_transposed_weight(rules, method):
    x = data()
    outputs = []
    for model in pair():
        torch.manual_seed(0)
        lq.quantize_(model, rules)
        with lq.calibrating(model, method=method):
            model(x)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    assert isinstance(model[1].weight_quantizer.amax, torch.Tensor)


def test_it_rescales_as_a_linear_layer_does():
    x, done, after = data(), [], []
    for model, alpha in [(m, a) for m in pair() for a in (0.5, "auto")]:
        before = model(x)
        calibrator = lq.RescalingCalibrator(model, args=(x,))
        after.append(calibrator.rescale(alpha))
        torch.testing.assert_close(after[-1](x), before, rtol=1e-4, atol=1e-5)
        done.append([(g.producer, g.consumers, g.action, g.alpha) for g in calibrator.groups])
    assert done[:2] == done[2:]
    assert [g[:3] for g in done[0]] == [("0", ("1",), "folded"), ("1", ("3",), "folded")]
    torch.testing.assert_close(after[0][1].weight, after[2][1].weight.mT)


def test_back_to_float_an_inserted_factor_goes_into_the_right_side_of_the_weight():
    model, x = nn.Sequential(Conv1D(4, 6)), data()
    before = model(x)
    calibrator = lq.RescalingCalibrator(model, args=(x,), inplace=True)
    calibrator.rescale(0.5)
    assert calibrator.groups[0].action == "inserted"
    assert isinstance(model[0], QuantTransposedLinear)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert type(lq.dequantize_(model)[0]) is Conv1D
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_it_trains_and_its_weight_is_rounded_in_place():
    model, x = lq.quantize_(nn.Sequential(Conv1D(4, 6))), data()
    with lq.calibrating(model):
        model(x)
    model(x).square().sum().backward()
    assert model[0].weight.grad.count_nonzero() == 24
    lq.optim.quant_weight_inplace(model)
    codes = model[0].weight / model[0].weight_quantizer.scale.mT
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)


def test_it_is_exported_with_int8_weights(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    import onnx
    import onnxruntime

    model, x = lq.quantize_(nn.Sequential(Conv1D(4, 6)).eval()), data()
    with lq.calibrating(model):
        model(x)
    path = lq.export.to_onnx(model, (x,), tmp_path / "model.onnx")
    weights = [i for i in onnx.load(path).graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) == 2]
    assert [sorted(w.dims) for w in weights] == [[4, 6]]
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("outputs", "inputs", "fits"), [(40, 64, True), (64, 40, False)])
def test_blocks_lie_along_inputs(outputs, inputs, fits):
    model = nn.Sequential(nn.Linear(inputs, inputs), Conv1D(outputs, inputs))
    rules = [lq.QuantRule("1", None, lq.QuantDescriptor(4, axis=0, block_size=32))]
    if not fits:
        with pytest.raises(ValueError, match=r"`1\.weight`: `block_size` is 32, which does not divide .* \(64, 40\)"):
            lq.quantize_(model, rules)
        assert [type(m).__name__ for m in model] == ["Linear", "Conv1D"]
        return
    lq.quantize_(model, rules)
    with lq.calibrating(model):
        model(torch.randn(2, inputs))
    assert model[1].weight_quantizer.amax.shape == (40, 2, 1)
