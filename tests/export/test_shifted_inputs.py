"""Shifted inputs in a graph: an add behind the padding, and codes that are int8's."""

import numpy as np
import pytest
import torch
from torch import nn

import lq
from exported import Graph, calibrated, close
from lq.corrections import shift_negative_activation_correction_
from lq.export import to_onnx, verify

GRIDS = {
    "8 bits": lq.QuantDescriptor(narrow_range=False),
    "4 bits": lq.QuantDescriptor(4),
    "learned": lq.QuantDescriptor(learn_amax=True, scale_amax=0.9),
}


def corrected(desc, recalculation=True):
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 6, 3, padding="same", groups=2, bias=False)),
        *(nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 4, 3, padding=(0, 2), stride=2), nn.Flatten(1), nn.Hardswish()),
        nn.Linear(4 * 3 * 5, 5),
    ).eval()
    x = 6 * torch.randn(16, 3, 8, 8)
    options = {"ratio": 0.8, "threshold_recalculation": recalculation, "desc": lq.QuantDescriptor(desc.num_bits)}
    assert len(shift_negative_activation_correction_(model, [x], **options).applied) == 3
    return calibrated(model, x, rules=[lq.QuantRule("*", desc, lq.QuantDescriptor(axis=0))]), x


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_graph_computes_what_torch_does_and_has_int8_codes(tmp_path, target, grid):
    model, x = corrected(GRIDS[grid], recalculation=grid != "4 bits")
    graph = Graph(to_onnx(model, x, tmp_path / "model.onnx", target=target))
    close(model, graph, x, atol=1e-5, share=0.99)
    kinds = {graph.constants[node.input[2]].dtype.name for node in graph.of("QuantizeLinear")}
    assert kinds == ({"int8"} if target == "tensorrt" else {"uint8"})
    assert not any(any(a.name == "pads" and any(a.ints) for a in node.attribute) for node in graph.of("Conv")[1:])
    report = verify(model, tmp_path / "model.onnx", batches=[x])
    assert report.first_difference is None
    assert {layer.name for layer in report.layers} >= {"2.input", "5.input"}
    assert sum(layer.unequal for layer in report.layers) <= 0.01 * sum(layer.codes for layer in report.layers)
    assert all(q.unsigned == (name in ("2.input", "5.input", "8.input")) for name, q in lq.named_quantizers(model))


def test_all_codes_of_int8_are_used(tmp_path):
    model, x = corrected(GRIDS["8 bits"])
    graph = Graph(to_onnx(model, x, tmp_path / "model.onnx"))
    (node,) = [n for n in graph.nodes if n.name == "5.input/QuantizeLinear"]
    scale = graph.constants[node.input[1]]
    np.testing.assert_allclose(scale, model[5].input_quantizer.scale.numpy(), rtol=1e-6)
    assert not graph.of("Clip")
    add = graph.feeding(node, 0)
    shift = next(graph.constants[i] for i in add.input if i in graph.constants)
    expected = model[5].input_quantizer.pre_quant_shift - 128 * model[5].input_quantizer.scale
    np.testing.assert_allclose(shift, expected.numpy(), rtol=1e-5)


UNSIGNED = [lq.QuantRule("*", lq.QuantDescriptor(unsigned=True), lq.QuantDescriptor(axis=0))]


class Shared(nn.Module):
    """Non-negative inputs of a padded convolution without a bias, and of two linear layers that share a quantizer."""

    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        x = self.conv(x.abs()).relu().mean((2, 3))
        return self.a(x) * self.b(x)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_unsigned_codes_of_layers(tmp_path, target):
    x = torch.randn(8, 2, 6, 6)
    model = lq.quantize_(Shared().eval(), UNSIGNED)
    model.b.input_quantizer = model.a.input_quantizer
    with lq.calibrating(model):
        model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = Graph(to_onnx(model, x, tmp_path / "model.onnx", target=target))
    close(model, graph, x, atol=1e-5, share=0.99)
    report = verify(model, tmp_path / "model.onnx", batches=[x])
    assert sum(layer.unequal for layer in report.layers) <= 0.01 * sum(layer.codes for layer in report.layers)
    # the convolution's are padded in the graph before they are quantized, and not in torch: not compared
    assert {layer.name for layer in report.layers} == {"a.input"}
    assert model.state_dict().keys() == before.keys()


class Tied(nn.Module):
    """Two layers with one weight and one bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.b(self.a(x.relu()).relu())


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_a_bias_that_two_layers_share_makes_up_for_each_shift_once(tmp_path, target):
    x = torch.randn(32, 4)
    model = calibrated(Tied(), x, rules=UNSIGNED)
    graph = Graph(to_onnx(model, x, tmp_path / "model.onnx", target=target))
    close(model, graph, x, atol=1e-5, share=0.99)
    # nothing was done to the weight, which stays one
    assert [name for name in graph.constants if name.endswith("weight_quantized")] == ["a.weight_quantized"]
    assert model.a.bias is model.b.bias


def test_unsigned_codes_that_no_bias_makes_up_for_are_refused(tmp_path):
    x = torch.rand(1, 2, 4, 4)
    model = calibrated(nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), x, rules=UNSIGNED)
    with pytest.raises(ValueError, match="`num_bits=8`, unsigned"):
        to_onnx(model, x, tmp_path / "model.onnx")
