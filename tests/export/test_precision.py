"""Graphs in half precision, FP8, 4-bit blocks and learned ranges: codes and scales against NumPy, outputs against torch."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lq
from exported import Graph, calibrated, codes, export, set_statistics
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, QuantDescriptor, QuantRule
from lq.export import OnnxModel, verify

HALF = {"fp16": (np.float16, torch.float16), "bf16": (ml_dtypes.bfloat16, torch.bfloat16)}


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        set_statistics(nn.BatchNorm2d(8)),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.Flatten(2),
        nn.Linear(64, 5),
    )


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def element_types(graph: Graph) -> set[int]:
    values = [*graph.proto.graph.input, *graph.proto.graph.output]
    return {value.type.tensor_type.elem_type for value in values}


# Half precision


@pytest.mark.parametrize("rules", ["int8", "fp8"])
@pytest.mark.parametrize("precision", HALF)
def test_everything_is_in_the_precision_but_codes(tmp_path, precision, rules):
    model = calibrated(convolutions(), X, rules=rules)
    full = export(model, X, tmp_path)
    weights = {name: c for name, c in full.constants.items() if name.endswith("weight_quantized")}
    graph = export(model, X, tmp_path, precision=precision)
    numpy_type, torch_type = HALF[precision]
    onnx_type = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[torch_type]
    assert element_types(graph) == {onnx_type}
    assert not any(c.dtype == np.float32 for c in graph.constants.values())
    assert not graph.of("Cast")
    # the codes of weights are those of float32
    assert len(weights) == 3
    for name, expected in weights.items():
        np.testing.assert_array_equal(graph.constants[name].astype(np.float32), expected.astype(np.float32), err_msg=name)
    for node in graph.of("DequantizeLinear"):
        scale, exact = graph.constants[node.input[1]], full.constants[node.input[1]]
        assert scale.dtype == numpy_type
        np.testing.assert_array_equal(scale, exact.astype(numpy_type))
    # the model stays as it is
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_fp16_runs_and_takes_what_torch_takes(tmp_path):
    model = calibrated(convolutions(), X)
    path = export(model, X, tmp_path, precision="fp16").path
    (output,) = OnnxModel(path)(X)
    assert output.dtype == torch.float16
    result = verify(model, path, batches=[X, X[:1]])
    assert result.onnxruntime.outputs[0].max_abs < 0.02 * float(model(X).detach().abs().max())
    assert result.onnxruntime.agreement > 0.9


def test_scales_that_underflow_half_precision_stay_positive(tmp_path):
    model = calibrated(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    with torch.no_grad():
        model[0].weight[1] = 0
    model[0].weight_quantizer.amax = model[0].weight.detach().abs().amax(1, keepdim=True)
    graph = export(model, torch.randn(2, 4), tmp_path, precision="fp16")
    scale = graph.constants["0.weight_scale"]
    assert scale.dtype == np.float16
    assert (scale > 0).all()


def test_scales_beyond_half_precision_are_named(tmp_path):
    model = calibrated(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    model[0].input_quantizer.amax = 1e8
    with pytest.raises(ValueError, match=r"`0.input` has a scale of .*torch.float16 cannot hold: export with precision 'bf16'"):
        export(model, torch.randn(2, 4), tmp_path, precision="fp16")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", HALF)
def test_float_model_in_half_precision(tmp_path, precision):
    # the checker, which runs here, looks at types
    graph = export(convolutions().eval(), X, tmp_path, precision=precision)
    assert len(element_types(graph)) == 1
    assert not any(c.dtype == np.float32 for c in graph.constants.values())
    assert not graph.of("BatchNormalization")


# FP8


def test_fp8_weights_and_activations(tmp_path):
    model = calibrated(convolutions(), X, rules="fp8")
    graph = export(model, X, tmp_path)
    layer = model[5]
    scale = (layer.weight_quantizer.amax / 448).numpy()
    stored = graph.constants["5.weight_quantized"].astype(np.float32)
    # E4M3 rounds to nearest, ties to even: ml_dtypes is its own implementation
    expected = (layer.weight.detach().numpy() / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(stored if stored.shape == expected.shape else stored.T, expected)
    kinds = {t.data_type for t in graph.proto.graph.initializer if t.name.endswith(("zero_point", "_quantized"))}
    assert kinds == {onnx.TensorProto.FLOAT8E4M3FN}
    assert graph.proto.opset_import[0].version >= 19
    assert not graph.of("BatchNormalization")
    assert verify(model, graph.path, batches=[X]).first_difference is None


# Blocks


@pytest.mark.parametrize("shape", [(4, 64), (2, 5, 64)])
def test_int4_blocks(tmp_path, shape):
    x = torch.randn(shape)
    model = nn.Sequential(nn.Linear(64, 24), nn.GELU(), nn.Linear(24, 8)).eval()
    desc = QuantDescriptor(num_bits=4, axis=0, block_size=8)
    lq.quantize_(model, [QuantRule("*", None, desc)])
    with lq.calibrating(model):
        model(x)
    graph = export(model, x, tmp_path)
    layer = model[0]
    weight = layer.weight.detach().unflatten(1, (8, 8))
    amax = weight.abs().amax(2, keepdim=True)
    dequantize = graph.node("0.weight/DequantizeLinear")
    attributes = {a.name: a.i for a in dequantize.attribute}
    # as the product takes it: (outputs, inputs) for Gemm, (inputs, outputs) for MatMul
    transposed = len(shape) > 2
    assert attributes == {"axis": 0 if transposed else 1, "block_size": 8}
    stored, scale = (graph.constants[name].astype(np.float32) for name in dequantize.input[:2])
    expected = codes(weight, amax, num_bits=4).reshape(24, 64), (amax / 7).squeeze(2).numpy()
    for found, wanted in zip((stored, scale), expected, strict=True):
        np.testing.assert_array_equal(found, wanted.T if transposed else wanted)
    kind = next(t.data_type for t in graph.proto.graph.initializer if t.name == dequantize.input[0])
    assert kind == onnx.TensorProto.INT4
    assert graph.proto.opset_import[0].version >= 21
    assert {node.op_type for node in graph.nodes} <= {"DequantizeLinear", "Gemm", "MatMul", "Add", "Gelu"}
    with torch.no_grad():
        np.testing.assert_allclose(graph.run(x)[0], model(x).numpy(), atol=1e-6)


def test_int4_file_is_an_eighth(tmp_path):
    x = torch.randn(2, 512)
    model = nn.Sequential(nn.Linear(512, 512)).eval()
    size = export(model, x, tmp_path).path.stat().st_size
    lq.quantize_(model, "w4a16")
    with lq.calibrating(model):
        model(x)
    # 4 bits, and one float32 for each 128 of them: 4.25 of 32 bits
    assert export(model, x, tmp_path).path.stat().st_size / size == pytest.approx(4.25 / 32, rel=0.05)


# Learned ranges


@pytest.mark.parametrize("unsigned", [False, True])
def test_learned_ranges_become_constants(tmp_path, unsigned):
    x = torch.rand(16, 6)
    desc = INT8_INPUT.replace(amax=1.0, learn_amax=True, unsigned=unsigned, num_bits=7 if unsigned else 8)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    lq.quantize_(model, [QuantRule("*", desc, INT8_WEIGHT)])
    with lq.calibrating(model):
        model(x)
    with torch.no_grad():
        for layer, value in ((model[0], 0.7), (model[2], 0.3)):
            layer.input_quantizer.clip.clip_value_max.fill_(value)
            if not unsigned:
                layer.input_quantizer.clip.clip_value_min.fill_(-value)
    graph = export(model, x, tmp_path)
    assert graph.constants["0.input_scale"] == np.float32(0.7) / np.float32(127)
    with torch.no_grad():
        np.testing.assert_allclose(graph.run(x)[0], model(x).numpy(), atol=1e-6)
    assert model[0].input_quantizer.clip is not None


def test_a_learned_range_with_other_ends_keeps_them(tmp_path):
    x = torch.randn(64, 6)
    desc = INT8_INPUT.replace(amax=1.0, learn_amax=True)
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    lq.quantize_(model, [QuantRule("*", desc, INT8_WEIGHT)])
    with lq.calibrating(model):
        model(x)
    with torch.no_grad():
        model[0].input_quantizer.clip.clip_value_min.fill_(-0.2)
        model[0].input_quantizer.clip.clip_value_max.fill_(0.9)
    graph = export(model, x, tmp_path)
    with torch.no_grad():
        np.testing.assert_allclose(graph.run(x)[0], model(x).numpy(), atol=1e-6)


def test_few_bits_are_what_was_trained_in_an_optimized_session(tmp_path):
    descriptors = lq.QuantDescriptor(2, narrow_range=False), lq.QuantDescriptor(2, axis=0, narrow_range=False)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    x = torch.randn(8, 1, 8, 8)
    lq.quantize_(model, [lq.QuantRule("*", *descriptors)])
    with lq.calibrating(model, method="mse"):
        model(x)
    lq.export.to_onnx(model, (x,), tmp_path / "model.onnx")
    torch.testing.assert_close(lq.export.OnnxModel(tmp_path / "model.onnx")(x)[0], model(x).detach(), rtol=1e-5, atol=1e-5)
