"""``torch.onnx.export`` called by hand: what both exporters of torch write, refuse, and leave as it was."""

import functools
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import lq
from exported import Graph, calibrated, close
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, QuantDescriptor, QuantRule
from lq.export import enable_onnx_export, to_onnx
from lq.nn import TensorQuantizer
from lq.surgery import named_quantizers

both = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


class HandGraph(Graph):
    """Also knows the constants that are nodes, which the TorchScript exporter leaves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for node in self.of("Constant"):
            if node.attribute[0].name == "value":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def scales(self, op: str = "QuantizeLinear") -> list[bytes]:
        return sorted(self.constants[node.input[1]].tobytes() for node in self.of(op))


def torch_export(model: nn.Module, x: Tensor, path: Path, dynamo: bool, **options: Any) -> None:
    """As a user writes it, with a free batch axis."""
    shapes: dict[str, Any] = {"dynamic_shapes": ({0: "batch"},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"], verbose=False, **shapes, **options)


def by_hand(model: nn.Module, x: Tensor, folder: Path, dynamo: bool, **options: Any) -> HandGraph:
    with enable_onnx_export():
        torch_export(model, x, folder / "model.onnx", dynamo, **options)
    return HandGraph(folder / "model.onnx")


class Net(nn.Module):
    """A convolution, a residual add with its shortcut quantized, and a linear layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = TensorQuantizer(INT8_INPUT)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.conv(x) + self.shortcut(x)).mean((2, 3)))


@functools.cache
def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = calibrated(Net(), x)
    # another grid than that of conv's input, or the optimizer of torch makes one of both
    model.shortcut.amax = 0.9 * model.shortcut.amax
    return model, x


@pytest.fixture(scope="module", params=[True, False], ids=["dynamo", "torchscript"])
def graph(request, tmp_path_factory):
    return by_hand(*net(), tmp_path_factory.mktemp("net"), request.param)


@pytest.mark.parametrize("batch", [1, 7])
def test_graph_computes_what_the_model_does(graph, batch):
    # ONNX Runtime sums in another order, and no code flips with this seed
    close(net()[0], graph, torch.randn(batch, 3, 8, 8), atol=1e-6)


def test_every_quantizer_is_a_pair(graph):
    quantizers = dict(named_quantizers(net()[0]))
    assert len(graph.of("QuantizeLinear")) == len(graph.of("DequantizeLinear")) == len(quantizers) == 7
    expected = sorted((q.amax / 127).numpy().tobytes() for q in quantizers.values())
    assert graph.scales("QuantizeLinear") == graph.scales("DequantizeLinear") == expected
    for node in graph.of("DequantizeLinear"):
        quantize = graph.feeding(node, 0)
        assert quantize.op_type == "QuantizeLinear"
        assert node.input[1:] == quantize.input[1:]
        scale, zero_point = (graph.constants[i] for i in node.input[1:])
        assert zero_point.dtype == np.int8
        assert zero_point.shape == scale.shape
        assert not zero_point.any()
        axis = {a.name: a.i for a in node.attribute}
        assert axis == {a.name: a.i for a in quantize.attribute} == ({} if scale.ndim == 0 else {"axis": 0})


def test_nothing_but_pairs_was_added(graph):
    layers = graph.of("Conv") + graph.of("Gemm")
    assert len(layers) == 3
    for layer in layers:
        assert graph.feeding(layer, 0).op_type == graph.feeding(layer, 1).op_type == "DequantizeLinear"
        # weights as they are, which need no clipping
        assert graph.feeding(graph.feeding(layer, 1), 0).input[0] in graph.constants
    kinds = {node.op_type for node in graph.nodes}
    assert kinds <= {"QuantizeLinear", "DequantizeLinear", "Conv", "Relu", "Add", "ReduceMean", "Gemm", "Constant"}
    assert {o.domain for o in graph.proto.opset_import} == {""}


def test_constants_do_not_depend_on_the_optimizer(tmp_path):
    model, x = net()
    graph = by_hand(model, x, tmp_path, dynamo=True, optimize=False)
    assert graph.scales() == sorted((q.amax / 127).numpy().tobytes() for _, q in named_quantizers(model))


class Quantizers(nn.Module):
    """Quantizers alone, so that nothing but the grid decides."""

    def __init__(self, *descs: QuantDescriptor) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(TensorQuantizer(desc) for desc in descs)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [quantizer(x) for quantizer in self.quantizers]


CHANNELS = ((1.0,), (0.3,), (0.01,))
INTEGERS = (
    QuantDescriptor(amax=1.27, narrow_range=False),
    QuantDescriptor(amax=1.0),
    QuantDescriptor(amax=0.77, num_bits=4),
    QuantDescriptor(amax=0.3, num_bits=2, narrow_range=False),
    QuantDescriptor(amax=0.9, num_bits=7, unsigned=True),
    QuantDescriptor(amax=0.0),
    QuantDescriptor(amax=1.0, scale_amax=0.7, narrow_range=False),
    QuantDescriptor(amax=1.0, learn_amax=True),
    QuantDescriptor(amax=0.9, num_bits=4, learn_amax="lsq", narrow_range=False),
    QuantDescriptor(amax=CHANNELS, axis=1, narrow_range=False),
    QuantDescriptor(amax=CHANNELS, axis=-2),
    QuantDescriptor(amax=(1.0, 0.3, 0.01), axis=1, num_bits=5),
)
FP8 = (
    QuantDescriptor(amax=1.0, num_bits=(4, 3)),
    QuantDescriptor(amax=0.0, num_bits=(4, 3)),
    QuantDescriptor(amax=CHANNELS, axis=1, num_bits=(4, 3)),
)


@both
@pytest.mark.parametrize("descs", [INTEGERS, FP8], ids=["integers", "fp8"])
def test_every_grid_is_bit_exact(descs, dynamo, tmp_path):
    model = Quantizers(*descs).eval()
    # a fine grid that reaches beyond every range, and the borders between codes
    x = torch.cat([torch.linspace(-1.5, 1.5, 4001), (torch.arange(-140, 140) + 0.5) / 127]).expand(2, 3, -1).contiguous()
    model(x.abs())  # the first look, on which the unsigned one would refuse x
    graph = by_hand(model, x, tmp_path, dynamo)
    x = torch.cat([x, x / 3])
    with torch.no_grad():
        expected = model(x)
    for quantizer, e, a in zip(model.quantizers, expected, graph.run(x), strict=True):
        np.testing.assert_array_equal(a, e.numpy(), err_msg=repr(quantizer))
    pair, clips = {"QuantizeLinear", "DequantizeLinear"}, {"Clip", "Max", "Min"}
    assert {node.op_type for node in graph.nodes} - {"Constant", "Identity"} == (pair | clips if descs is INTEGERS else pair)


@both
def test_fp8_layers(dynamo, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    model = calibrated(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), x, rules="fp8")
    graph = by_hand(model, x, tmp_path, dynamo)
    assert len(graph.of("QuantizeLinear")) == 4
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(graph.proto).graph.value_info}
    for node in graph.of("QuantizeLinear"):
        assert types[node.output[0]] == TensorProto.FLOAT8E4M3FN
    assert graph.scales() == sorted((q.amax / 448).numpy().tobytes() for _, q in named_quantizers(model))
    assert [o.version for o in graph.proto.opset_import] == [19]
    close(model, graph, torch.randn(7, 16), atol=1e-6)


@both
@pytest.mark.parametrize(("num_bits", "axis"), [(8, 0), (4, None)])
def test_weights_are_clipped_where_they_leave_their_codes(num_bits, axis, dynamo, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 96)
    weight = INT8_WEIGHT.replace(axis=axis, num_bits=num_bits)
    # 96 * 96 weights are more than the optimizer of torch folds
    model = calibrated(nn.Sequential(nn.Linear(96, 96)), x, rules=[QuantRule("*", INT8_INPUT, weight)])
    graph = by_hand(model, x, tmp_path, dynamo)
    assert not graph.of("Clip") + graph.of("Max") + graph.of("Min")
    close(model, graph, x, atol=1e-6)
    quantizer = model[0].weight_quantizer
    quantizer.amax = 0.5 * quantizer.amax
    graph = by_hand(model, x, tmp_path, dynamo)
    assert [len(graph.of(op)) for op in ("Clip", "Max", "Min")] == ([1, 0, 0] if axis is None else [0, 1, 1])
    close(model, graph, x, atol=1e-6)


@both
def test_pre_quant_scale(dynamo, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 96)
    model = lq.quantize_(nn.Sequential(nn.Linear(96, 128)).eval())
    model[0].input_quantizer.pre_quant_scale = torch.rand(96) + 0.5
    model[0].weight_quantizer.pre_quant_scale = torch.rand(96) + 0.5
    with lq.calibrating(model):
        model(x)
    graph = by_hand(model, x, tmp_path, dynamo)
    close(model, graph, torch.randn(7, 96), atol=1e-6)
    assert len(graph.of("QuantizeLinear")) == 2


def test_opset_is_kept(tmp_path):
    graph = by_hand(*net(), tmp_path, dynamo=False, opset_version=13)
    assert [o.version for o in graph.proto.opset_import] == [13]


# What is refused

X = torch.randn(4, 8)


def linear(input: QuantDescriptor = INT8_INPUT, **weight: Any) -> nn.Module:
    rules = [QuantRule("*", input, INT8_WEIGHT.replace(**weight))]
    return calibrated(nn.Sequential(nn.Linear(8, 4)), X, rules=rules)


def without_amax() -> nn.Module:
    return lq.quantize_(nn.Sequential(nn.Linear(8, 4)))


def collecting() -> nn.Module:
    model = linear()
    model[0].input_quantizer.enable_calib()
    return model


REFUSED = {
    "no amax": (without_amax, r"`0.input`, `0.weight` \(2 of 2 quantizers\) have no amax: calibrate first"),
    "collecting": (collecting, r"`0.input` \(1 of 2 quantizers\) have calibration enabled"),
    "integer codes": (lambda: linear(INT8_INPUT.replace(fake_quant=False)), "have `fake_quant=False`: they return integer codes"),
    "unsigned 8": (lambda: linear(unsigned_input()), "`0.input` .* have `num_bits=8`, unsigned: codes must fit into int8"),
    "16 bits": (lambda: linear(num_bits=16), "`0.weight` .* have `num_bits=16`, signed: .* at most 8 bits"),
    "E5M2": (lambda: linear(num_bits=(5, 2)), r"`0.weight` .* have `num_bits=\(5, 2\)`"),
    "two axes": (lambda: linear(axis=(0, 1)), "`0.weight` .* have an amax along 2 axes"),
    "blocks": (lambda: linear(num_bits=4, block_size=4), "`0.weight` .* have `block_size=4`"),
}


def unsigned_input() -> QuantDescriptor:
    return QuantDescriptor(amax=1.0, unsigned=True)


@both
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, dynamo, tmp_path):
    build, message = REFUSED[case]
    with enable_onnx_export(), pytest.raises(ValueError, match=message):
        torch_export(build(), X, tmp_path / "model.onnx", dynamo)
    assert not list(tmp_path.iterdir())


def test_disabled_quantizers_are_not_asked(tmp_path):
    model = without_amax()
    model[0].weight_quantizer.disable()
    model[0].input_quantizer.disable_quant()
    assert not by_hand(model, X, tmp_path, dynamo=False).of("QuantizeLinear")


@pytest.mark.parametrize(("rules", "opset", "message"), [("int8", 12, "an axis from opset 13"), ("fp8", 18, "FP8 from opset 19")])
def test_old_opsets(rules, opset, message, tmp_path):
    model = calibrated(nn.Sequential(nn.Linear(8, 4)), X, rules=rules)
    with pytest.raises(ValueError, match=f"`opset_version` is {opset}: QuantizeLinear has {message}"):
        by_hand(model, X, tmp_path, dynamo=False, opset_version=opset)


@both
def test_half_precision(dynamo, tmp_path):
    error = torch.onnx.errors.OnnxExporterError if dynamo else ValueError
    with pytest.raises(error, match=r"A quantizer meets torch.float16: .* call `model.float\(\)`"):
        by_hand(linear().half(), X.half(), tmp_path, dynamo)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_package(missing, tmp_path, monkeypatch):
    model = linear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError) as expected:
        to_onnx(model, X, tmp_path / "model.onnx")
    with pytest.raises(ImportError) as error, enable_onnx_export():
        pass
    assert str(error.value) == str(expected.value)


# What is left as it was


def stop(model: nn.Module, x: Tensor, path: Path, dynamo: bool) -> None:
    """An export that fails in the model, behind the first quantizer."""

    class Stop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("stop here")

    torch_export(nn.Sequential(model, Stop()).eval(), x, path, dynamo)


@both
@pytest.mark.parametrize("fails", [True, False])
def test_everything_is_undone(fails, dynamo, tmp_path):
    model, export = linear(), torch.onnx.export
    x = torch.linspace(-3, 3, 8 * 999).reshape(-1, 8)
    before = model(x)
    if fails:
        with pytest.raises(Exception, match="stop here"), enable_onnx_export():
            stop(model, X, tmp_path / "model.onnx", dynamo)
    else:
        with enable_onnx_export():
            assert torch.equal(model(x), before)
            torch_export(model, X, tmp_path / "model.onnx", dynamo)
            assert torch.equal(model(x), before)
            model(x).sum().backward()
            assert model[0].weight.grad.any()
    assert torch.onnx.export is export
    assert torch.equal(model(x), before)
    assert all(quantizer._on_export is None for _, quantizer in named_quantizers(model))
    # as ever: torch knows no ONNX operator for lq's
    with pytest.raises(Exception, match="fake_quant"):
        torch_export(model, X, tmp_path / "outside.onnx", dynamo)
    assert not (tmp_path / "outside.onnx").exists()
    close(model, Graph(to_onnx(model, X, tmp_path / "to_onnx.onnx")), X)


@both
def test_nested(dynamo, tmp_path):
    model, export = linear(), torch.onnx.export
    with enable_onnx_export():
        outer = torch.onnx.export
        with enable_onnx_export():
            torch_export(model, X, tmp_path / "inner.onnx", dynamo)
        assert torch.onnx.export is outer
        torch_export(model, X, tmp_path / "outer.onnx", dynamo)
    assert torch.onnx.export is export
    for name in ("inner", "outer"):
        graph = HandGraph(tmp_path / f"{name}.onnx")
        assert len(graph.of("QuantizeLinear")) == 2
        close(model, graph, X, atol=1e-6)


def test_float_models_and_programs_pass(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4))
    with enable_onnx_export():
        torch_export(model, X, tmp_path / "model.onnx", dynamo=False, opset_version=11)
        program = torch.onnx.export(torch.export.export(model, (X,)), dynamo=True, verbose=False)
    assert [o.version for o in Graph(tmp_path / "model.onnx").proto.opset_import] == [11]
    assert [node.op_type for node in program.model.graph] == ["Gemm"]
