"""The graph that export writes: its numbers against NumPy and ONNX Runtime, its form against what TensorRT asks for."""

import dataclasses
import subprocess
import sys
from collections import Counter

import lightning
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import lq
import lq.export.onnx
from exported import calibrated, close, codes, export, set_statistics
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, PRESETS, QuantDescriptor, QuantRule
from lq.export import to_onnx
from lq.nn import TensorQuantizer


class Net(nn.Module):
    """Convolution, BatchNorm, residual add, and linear layers on two and on three axes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = set_statistics(nn.BatchNorm2d(width))
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.token = nn.Linear(width, 4)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.conv2(torch.relu(self.conv1(x)))
        return self.head(x.mean((2, 3))), self.token(x.flatten(2).transpose(1, 2))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    model = calibrated(Net(), x)
    return model, x, export(model, x, tmp_path_factory.mktemp("net"))


def test_weights_are_int8_codes_behind_dequantize_linear(net):
    model, _, graph = net
    for name in ("conv1", "conv2", "token", "head"):
        layer = model.get_submodule(name)
        amax = layer.weight_quantizer.amax
        dequantize = graph.node(f"{name}.weight/DequantizeLinear")
        stored, scale, zero_point = (graph.constants[i] for i in dequantize.input)
        # a MatMul has its inputs first
        transposed = name == "token"
        np.testing.assert_array_equal(stored.T if transposed else stored, codes(layer.weight, amax))
        np.testing.assert_array_equal(scale, (amax / 127).flatten().numpy())
        assert scale.dtype == np.float32
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
        assert zero_point.shape == scale.shape
        assert [a.i for a in dequantize.attribute if a.name == "axis"] == [int(transposed)]


def test_no_float_copy_of_a_quantized_weight_is_left(net):
    _, _, graph = net
    floats = {name for name, c in graph.constants.items() if c.dtype == np.float32 and c.ndim > 1}
    assert not floats
    assert sum(c.dtype == np.int8 and c.ndim > 1 for c in graph.constants.values()) == 5


def test_inputs_of_quantized_layers_come_from_dequantize_linear(net):
    _, _, graph = net
    layers = graph.of("Conv") + graph.of("Gemm") + graph.of("MatMul")
    assert len(layers) == 5
    for layer in layers:
        activation, weight = graph.feeding(layer, 0), graph.feeding(layer, 1)
        if weight.op_type == "Transpose":
            weight = graph.feeding(weight, 0)
        assert activation.op_type == weight.op_type == "DequantizeLinear", layer.name
        assert graph.feeding(activation, 0).op_type == "QuantizeLinear"
        assert activation.input[1:] == graph.feeding(activation, 0).input[1:]
        scale, zero_point = (graph.constants[i] for i in activation.input[1:])
        assert scale.shape == zero_point.shape == ()
        assert zero_point.dtype == np.int8
    assert not graph.of("Cast")
    assert not graph.of("BatchNormalization")
    assert {o.domain for o in graph.proto.opset_import} == {""}


def test_nodes_are_named_after_modules_and_carry_no_paths(net):
    _, _, graph = net
    names = [node.name for node in graph.nodes]
    assert {"stem/Conv", "head/Gemm", "conv1.input/QuantizeLinear", "conv1.input/DequantizeLinear"} <= set(names)
    assert len(set(names)) == len(names)
    assert b".py" not in graph.path.read_bytes()


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_outputs_agree_at_any_batch_size(net, batch):
    model, _, graph = net
    close(model, graph, torch.randn(batch, 3, 8, 8), share=0.98)


def test_file_is_about_a_quarter(tmp_path):
    x = torch.randn(2, 64)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    float_size = to_onnx(model, x, tmp_path / "float.onnx").stat().st_size
    size = to_onnx(calibrated(model, x), x, tmp_path / "int8.onnx").stat().st_size
    assert 0.25 <= size / float_size < 0.27


def test_float_model_exports_as_it_is(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = Net().eval()
    graph = export(model, x, tmp_path)
    assert not graph.of("QuantizeLinear")
    close(model, graph, x)


class Quantizers(nn.Module):
    """Quantizers alone, so that nothing but the grid decides."""

    def __init__(self, *descs: QuantDescriptor) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(TensorQuantizer(desc) for desc in descs)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [quantizer(x) for quantizer in self.quantizers]


def test_activations_are_bit_exact_on_every_grid(tmp_path):
    channels = ((1.0,), (0.3,), (0.01,))
    model = Quantizers(
        QuantDescriptor(amax=1.27, narrow_range=False),
        QuantDescriptor(amax=1.0, narrow_range=False),
        QuantDescriptor(amax=1.0),
        QuantDescriptor(amax=0.77, num_bits=4),
        QuantDescriptor(amax=0.3, num_bits=2, narrow_range=False),
        QuantDescriptor(amax=0.9, num_bits=7, unsigned=True),
        QuantDescriptor(amax=channels, axis=1, narrow_range=False),
        QuantDescriptor(amax=channels, axis=-2, num_bits=5),
    )
    # a fine grid that reaches beyond every range, and the borders between codes
    x = torch.cat([torch.linspace(-1.5, 1.5, 4001), (torch.arange(-140, 140) + 0.5) * (1 / 127)]).expand(2, 3, -1).contiguous()
    model(x.abs())  # the first batch of an unsigned quantizer must not be negative
    graph = export(model, x, tmp_path)
    for quantizer, expected, actual in zip(model.quantizers, model(x), graph.run(x), strict=True):
        np.testing.assert_array_equal(actual, expected.numpy(), err_msg=repr(quantizer))
    assert [len(graph.of(op)) for op in ("Clip", "Max", "Min")] == [4, 1, 1]


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, bias=False), (2, 4, 9, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 9, 9)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding_mode="reflect", padding=1), (2, 4, 9, 9)),
    "conv3d": (nn.Conv3d(2, 3, 3), (2, 2, 5, 5, 5)),
    "transpose1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "transpose2d": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "transpose2d_groups": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "linear": (nn.Linear(4, 6), (2, 4)),
    "linear3": (nn.Linear(4, 6), (2, 5, 4)),
}


class Side(nn.Module):
    """Layers side by side, each with an input and an output of its own."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers.values(), inputs, strict=True)]


@pytest.fixture(scope="module")
def side(tmp_path_factory):
    torch.manual_seed(0)
    xs = [torch.randn(shape) for _, shape in LAYERS.values()]
    model = calibrated(Side(**{name: layer for name, (layer, _) in LAYERS.items()}), *xs)
    return model, export(model, tuple(xs), tmp_path_factory.mktemp("side"))


@pytest.mark.parametrize("rows", [2, 5])
def test_every_layer_agrees(side, rows):
    model, graph = side
    xs = [2 * torch.randn(rows, *shape[1:]) for _, shape in LAYERS.values()]
    with torch.no_grad():
        expected = model(*xs)
    for name, e, a in zip(LAYERS, expected, graph.run(*xs), strict=True):
        np.testing.assert_allclose(a, e.numpy(), atol=4e-6, err_msg=name)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_stores_its_codes(side, name):
    model, graph = side
    layer = model.layers[name]
    stored = graph.constants[f"layers.{name}.weight_quantized"]
    # a MatMul has its inputs first
    stored = stored.T if name == "linear3" else stored
    np.testing.assert_array_equal(stored, codes(layer.weight, layer.weight_quantizer.amax))


def test_presets(tmp_path):
    full_range = [QuantRule("*", INT8_INPUT, INT8_WEIGHT.replace(narrow_range=False))]
    exported = {name: rules for name, rules in PRESETS.items() if name not in ("fp8", "w4a16")}
    presets = {**exported, "full_range": full_range}
    rules = [dataclasses.replace(rules[0], pattern=f"layers.{name}") for name, rules in presets.items()]
    xs = [torch.randn(4, 6) for _ in presets]
    model = calibrated(Side(**{name: nn.Linear(6, 5) for name in presets}), *xs, rules=rules)
    clipping = model.layers["full_range"].weight_quantizer
    clipping.amax = 0.5 * clipping.amax  # else nothing would be at -128
    graph = export(model, tuple(xs), tmp_path)
    with torch.no_grad():
        expected = model(*xs)
    for name, e, a in zip(presets, expected, graph.run(*xs), strict=True):
        np.testing.assert_allclose(a, e.numpy(), atol=2e-6, err_msg=name)
        layer = model.layers[name]
        stored = graph.constants[f"layers.{name}.weight_quantized"]
        desc = layer.weight_quantizer.quant_desc
        reference = codes(layer.weight, layer.weight_quantizer.amax, desc.num_bits, desc.narrow_range)
        np.testing.assert_array_equal(stored, reference, err_msg=name)
        assert stored.dtype == np.int8
        quantized_input = f"layers.{name}.input/QuantizeLinear" in [node.name for node in graph.nodes]
        assert quantized_input == (name != "int8_weight_only")
    assert graph.constants["layers.full_range.weight_quantized"].min() == -128
    assert np.abs(graph.constants["layers.w4a8.weight_quantized"]).max() == 7
    assert graph.constants["layers.int8_per_tensor.weight_scale"].shape == ()


def test_pre_quant_scale(tmp_path):
    x = torch.randn(4, 96)
    model = nn.Sequential(nn.Linear(96, 128))
    lq.quantize_(model)
    # 96 * 128 is more than the exporter folds by itself
    model[0].input_quantizer.pre_quant_scale = torch.rand(96) + 0.5
    model[0].weight_quantizer.pre_quant_scale = torch.rand(96) + 0.5
    with lq.calibrating(model.eval()):
        model(x)
    graph = export(model, x, tmp_path)
    close(model, graph, x)
    assert len(graph.of("Mul")) == 1
    weight, quantizer = model[0].weight, model[0].weight_quantizer
    np.testing.assert_array_equal(
        graph.constants["0.weight_quantized"], codes(weight * quantizer.pre_quant_scale, quantizer.amax)
    )
    assert not [c for c in graph.constants.values() if c.dtype == np.float32 and c.ndim > 1]


class TwoByTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.other = nn.Linear(6, 4)

    def forward(self, a: Tensor, b: Tensor, *, gain: Tensor) -> dict[str, Tensor]:
        twice = self.shared(torch.tanh(self.shared(a)))
        return {"sum": twice + self.other(b) * gain, "twice": twice}


def test_two_inputs_two_outputs_a_keyword_and_a_layer_called_twice(tmp_path):
    a, b, gain = torch.randn(3, 4), torch.randn(3, 6), torch.randn(4)
    model = calibrated(TwoByTwo(), a, b, gain=gain)
    graph = export(model, (a, b), tmp_path, kwargs={"gain": gain})
    assert [i.name for i in graph.proto.graph.input] == ["a", "b", "gain"]
    a, b = torch.randn(5, 4), torch.randn(5, 6)
    for expected, actual in zip(model(a, b, gain=gain).values(), graph.run(a, b, gain), strict=True):
        np.testing.assert_allclose(actual, expected.detach().numpy(), atol=1e-6)
    # one copy of the weight and of each scale
    assert sorted(n for n in graph.constants if n.startswith("shared")) == [
        "shared.bias",
        "shared.input_scale",
        "shared.input_zero_point",
        "shared.weight_quantized",
        "shared.weight_scale",
        "shared.weight_zero_point",
    ]


def test_weight_that_is_also_used_in_float_keeps_both(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    tokens = torch.randint(9, (2, 5))
    model = calibrated(Tied(), tokens)
    graph = export(model, tokens, tmp_path)
    close(model, graph, tokens)
    assert {(c.dtype.name, c.shape) for c in graph.constants.values() if c.size == 54} == {("float32", (9, 6)), ("int8", (6, 9))}


class Clash(nn.Module):
    """A quantizer without a prefix, and inputs that are named as its constants would be."""

    def __init__(self) -> None:
        super().__init__()
        self.input_quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))

    def forward(self, batch: dict[str, Tensor], input_scale: dict[str, Tensor]) -> Tensor:
        return self.input_quantizer(batch["input_scale"]) + input_scale["low"]


def test_dicts_for_inputs_and_names_that_clash(tmp_path):
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    graph = export(Clash(), ({"input_scale": x}, {"low": y}), tmp_path)
    assert [i.name for i in graph.proto.graph.input] == ["batch_input_scale", "input_scale_low"]
    inputs = [i.name for i in export(Renamed(), (x, y), tmp_path).proto.graph.input]
    assert inputs == ["input_scale", "input_low"]


class Renamed(Clash):
    def forward(self, input_scale: Tensor, input_low: Tensor) -> Tensor:
        return super().forward({"input_scale": input_scale}, {"low": input_low})


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.left, lambda x: self.right(x) + self.left(-x), (x,))


def test_quantizers_inside_a_branch(tmp_path):
    x = torch.rand(3, 4)
    model = lq.quantize_(Branching())
    for layer in (model.left, model.right):
        layer.input_quantizer.amax = 1.0
        layer.weight_quantizer.amax = layer.weight.detach().abs().amax(1, keepdim=True)
    graph = export(model.eval(), x, tmp_path)
    # one copy of a weight that both branches use
    assert [c.dtype for c in graph.constants.values() if c.ndim > 1] == [np.int8, np.int8]
    close(model, graph, x)
    close(model, graph, -x)


def test_model_in_training_is_exported_as_in_evaluation(tmp_path):
    x = torch.randn(8, 4)
    model = calibrated(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), x)
    graph = export(model.train(), x, tmp_path)
    assert model[1].training
    close(model.eval(), graph, x)


def test_transformer_layer(tmp_path):
    x = torch.randn(2, 5, 16)
    model = calibrated(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), x)
    graph = export(model, x, tmp_path)
    close(model, graph, torch.randn(3, 5, 16), share=0.98)
    assert len([c for c in graph.constants.values() if c.dtype == np.int8 and c.ndim == 2]) == 4


def test_lightning_module(tmp_path):
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor) -> Tensor:
            return self(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    x = torch.randn(8, 4)
    model = lq.quantize_(Module())
    with lq.calibrating(model):
        model(x)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(x, batch_size=4))
    graph = export(model, x, tmp_path)
    close(model.eval(), graph, x)


@pytest.mark.parametrize(("options", "axis0"), [({}, "batch"), ({"dynamic_shapes": None}, 1)])
def test_batch_axis(options, axis0, tmp_path):
    x = torch.randn(1, 4)
    model = calibrated(nn.Sequential(nn.Linear(4, 2)), x)
    dim = export(model, x, tmp_path, **options).proto.graph.input[0].type.tensor_type.shape.dim[0]
    assert (dim.dim_param or dim.dim_value) == axis0


@pytest.mark.parametrize("opset", [18, 21])
def test_opset(opset, tmp_path):
    x = torch.randn(3, 5, 4)
    model = calibrated(nn.Sequential(nn.Linear(4, 2)), x)
    graph = export(model, x, tmp_path, opset=opset, dynamic_shapes={"input": {0: "batch", 1: "time"}})
    assert [o.version for o in graph.proto.opset_import] == [opset]
    assert graph.proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param == "time"
    close(model, graph, torch.randn(2, 7, 4))


class Noisy(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x + 0.01 * torch.rand_like(x))


def test_model_is_left_as_it_is(tmp_path):
    model = Noisy()
    x = torch.randn(4, 3, 8, 8)
    calibrated(model, x)
    lq.freeze_(model)
    model.train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: (id(m), type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()}
    x_before, random = x.clone(), torch.get_rng_state()
    export(model, x, tmp_path)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, x_before)
    assert {name: (id(m), type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()} == state
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.requires_grad for p in model.parameters())


def test_weights_beyond_one_file_go_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lq.export.onnx, "MAX_IN_ONE_FILE", 100)
    x = torch.randn(2, 32)
    model = calibrated(nn.Sequential(nn.Linear(32, 32)), x)
    graph = export(model, x, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx.data").stat().st_size >= 32 * 32
    close(model, graph, x)
    # a smaller one at the same place leaves nothing of it behind
    monkeypatch.undo()
    close(model, export(model, x, tmp_path), x)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


class Named(nn.Sequential):
    def forward(self, x: Tensor, **scales: Tensor) -> Tensor:
        return super().forward(x) * scales["scale"] + scales["shift"]


def test_keywords_that_forward_catches(tmp_path):
    x, scales = torch.randn(2, 3), {"scale": torch.rand(2, 1), "shift": torch.randn(4)}
    model = calibrated(Named(nn.Linear(3, 4)), x, **scales)
    graph = export(model, x, tmp_path, kwargs=scales)
    y, more = torch.randn(5, 3), {"scale": torch.rand(5, 1), "shift": torch.randn(4)}
    with torch.no_grad():
        np.testing.assert_allclose(graph.run(y, *more.values())[0], model(y, **more).numpy(), atol=1e-5)


def test_bias_of_a_dead_channel_survives_onnx_runtime(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3))
    dead = {3: 0.0, 4: 1e-9, 5: 1e-5}
    with torch.no_grad():
        for channel, factor in dead.items():
            model[0].weight[channel] *= factor
            model[0].bias[channel] = 0.7
    x = torch.randn(4, 4, 9, 9)
    model = calibrated(model, x)
    graph = export(model, x, tmp_path)
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(graph.run(x)[0], expected, atol=1e-5)
    # ONNX Runtime fuses the first layer into QLinearConv with an int32 bias, and may flip a few codes
    assert np.abs(graph.run(x, optimize=True)[0] - expected).max() < 0.02
    others = [i for i in range(8) if i not in dead]
    reference = codes(model[0].weight, model[0].weight_quantizer.amax)
    np.testing.assert_array_equal(graph.constants["0.weight_quantized"][others], reference[others])


class Relus(nn.Module):
    """Where a Relu may move behind the codes (a, c), and where not: its values are used, or its layer takes floats."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.d, self.e, self.f = (nn.Linear(8, 8) for _ in range(4))
        self.plain = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(self.b(torch.relu(self.a(x))))
        before = self.d(torch.relu(self.c(x.amax((2, 3)) + x.mean((2, 3)))))
        after = torch.relu(self.e(torch.relu(before)))
        return self.f(torch.relu(self.plain(after))), before, after


def kernels(graph, x, folder):
    graph.run(x, optimize=True, rewritten=folder / "rewritten")
    return Counter(node.op_type for node in onnx.load(str(folder / "rewritten")).graph.node)


def test_layout_for_onnx_runtime_computes_the_same_in_int8(tmp_path):
    (tmp_path / "plain").mkdir()
    x = torch.randn(4, 3, 8, 8)
    model = calibrated(Relus(), x, rules=[*PRESETS["int8"], QuantRule("plain", None, INT8_WEIGHT)])
    plain = export(model, x, tmp_path / "plain")
    graph = export(model, x, tmp_path, target="onnxruntime")
    for e, a in zip(plain.run(x), graph.run(x), strict=True):
        np.testing.assert_array_equal(a, e)
    assert [len(plain.of(op)) for op in ("Relu", "LeakyRelu")] == [6, 0]
    assert [len(graph.of(op)) for op in ("Relu", "LeakyRelu")] == [4, 2]
    assert "QLinearConv" not in kernels(plain, x, tmp_path)
    assert {"QLinearConv", "QLinearLeakyRelu", "QGemm"} <= set(kernels(graph, x, tmp_path))


class Mobile(nn.Module):
    """A pool and ReLU6 between layer and codes, a residual add, and a tensor that three layers take."""

    def __init__(self, top: float = 6.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardtanh(0, top), nn.Conv2d(8, 8, 1))
        self.left, self.right, self.out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.first(x))
        return self.out(torch.cat([self.left(x), self.right(x)], 1))


def test_codes_for_onnx_runtime_are_uint8_and_everything_runs_in_integers(tmp_path):
    (tmp_path / "plain").mkdir()
    x = torch.randn(4, 3, 16, 16)
    model = Mobile().eval()
    lq.quantize_(model, target="onnxruntime", args=x)
    with lq.calibrating(model):
        model(x)
    plain, graph = export(model, x, tmp_path / "plain"), export(model, x, tmp_path, target="onnxruntime")
    np.testing.assert_array_equal(graph.run(x)[0], plain.run(x)[0])
    points = {graph.constants[node.input[2]].dtype for node in graph.of("QuantizeLinear")}
    assert points == {np.dtype(np.uint8)}
    assert all((graph.constants[node.input[2]] == 128).all() for node in graph.of("QuantizeLinear"))
    # weights are int8 around 0
    assert {c.dtype for name, c in graph.constants.items() if name.endswith("weight_quantized")} == {np.dtype(np.int8)}
    found = kernels(graph, x, tmp_path)
    assert found["QLinearConv"] == 5
    assert found["QLinearAdd"] == found["NhwcMaxPool"] == 1
    # the last one gives floats
    assert found["Conv"] + found["FusedConv"] == 1
    assert kernels(plain, x, tmp_path)["QLinearConv"] < 5


def test_a_clip_within_the_codes_stays(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    model = Mobile(top=0.1).eval()
    lq.quantize_(model, target="onnxruntime", args=x)
    with lq.calibrating(model):
        model(x)
    model.first[2].input_quantizer.amax = 0.2
    graph = export(model, x, tmp_path, target="onnxruntime")
    assert len(graph.of("Clip")) == 1
    with torch.no_grad():
        np.testing.assert_allclose(graph.run(x)[0], model(x).numpy(), atol=1e-5)
    model.first[2].input_quantizer.amax = 0.1
    graph = export(model, x, tmp_path, target="onnxruntime")
    assert not graph.of("Clip")
    with torch.no_grad():
        np.testing.assert_allclose(graph.run(x)[0], model(x).numpy(), atol=1e-5)


def test_importing_lq_imports_no_optional_package():
    optional = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    code = f"import sys, lq, lq.export; print([m for m in {optional} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
