"""Building and running engines: the calls against a stand-in, the real thing where there are TensorRT and a GPU."""

import importlib.util
import json
import sys
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

import fake_tensorrt
import lq
import lq.export.tensorrt.engine
import lq.export.tensorrt.inspection
from exported import calibrated
from lq.export import Engine, benchmark_engine, build_engine, engine_report, require_tensorrt, to_onnx, verify

HAS_TENSORRT = importlib.util.find_spec("tensorrt") is not None and torch.cuda.is_available()


class FakeStream:
    """Notes what is done in which order."""

    def __init__(self, device):
        self.handle, self.log = 7, []

    @contextmanager
    def between(self, inputs, outputs):
        self.log.append("wait for the caller")
        yield
        self.log += ["the caller waits", len(inputs), len(outputs)]


@pytest.fixture
def fake(monkeypatch):
    """``tensorrt`` is the stand-in, and memory addresses lead to tensors."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(lq.export.tensorrt.engine, "_OwnStream", FakeStream)
    data_ptr = torch.Tensor.data_ptr

    def seen(tensor):
        fake_tensorrt.MEMORY[data_ptr(tensor)] = tensor
        return data_ptr(tensor)

    monkeypatch.setattr(torch.Tensor, "data_ptr", seen)
    yield fake_tensorrt
    fake_tensorrt.MEMORY.clear()


def graph(folder, **inputs):
    path = folder / "model.onnx"
    layers = inputs.pop("layers", [])
    path.write_text(json.dumps({"inputs": inputs or {"x": [-1, 3]}, "layers": layers}))
    return path


def built(path, **options):
    return json.loads(build_engine(path, path.with_suffix(".plan"), **options).read_text())


# Without TensorRT


@pytest.mark.parametrize(
    "call",
    [
        lambda path: build_engine(path, path.with_suffix(".plan"), profiles=4),
        lambda path: Engine(path),
        lambda path: engine_report(path, path),
        lambda path: require_tensorrt(),
    ],
)
def test_one_error_says_what_is_missing(tmp_path, monkeypatch, call):
    path = graph(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ImportError, match=r"need an NVIDIA GPU and `pip install \"lightning-lq\[tensorrt\]\"`"):
        call(path)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="NVIDIA GPU, and torch sees none"):
        call(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_verify_with_a_plan_says_it_too(tmp_path, monkeypatch):
    x = torch.randn(2, 4)
    model = calibrated(nn.Sequential(nn.Linear(4, 3)), x)
    path = to_onnx(model, x, tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ImportError, match="TensorRT is missing"):
        verify(model, path, tmp_path / "model.plan", batches=[x])


# Building


def test_build_is_strongly_typed_and_detailed(tmp_path, fake):
    cache = tmp_path / "timing.cache"
    plan = built(graph(tmp_path), profiles=8, workspace=2**20, timing_cache=cache, optimization_level=5)
    assert plan["flags"] == 1 << fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert (plan["verbosity"], plan["level"], plan["pools"]) == ("DETAILED", 5, {"WORKSPACE": 2**20})
    assert plan["profiles"] == [{"x": [[1, 3], [8, 3], [8, 3]]}]
    assert cache.read_bytes() == b"+timings"
    built(graph(tmp_path), profiles=8, timing_cache=cache)
    assert cache.read_bytes() == b"+timings+timings"
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.plan", "timing.cache"}


def test_fixed_shapes_need_no_profile(tmp_path, fake):
    plan = built(graph(tmp_path, x=[2, 3]))
    assert (plan["profiles"], plan["pools"], plan["level"]) == ([], {}, 3)


def test_several_profiles(tmp_path, fake):
    small, large = ({"x": ((n, 3), (n, 3), (2 * n, 3))} for n in (1, 8))
    assert len(built(graph(tmp_path), profiles=[small, large])["profiles"]) == 2


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        (None, r"`profiles` is None, but `x` is \(-1, 3\): give the largest batch, as `profiles=32`"),
        (0, "the largest batch must be at least 1"),
        ({"y": ((1, 3),) * 3}, r"has \['y'\], but the inputs are x"),
        ({}, r"lacks \['x'\]"),
        ({"x": ((1, 3), (2, 3))}, "give three shapes"),
        ({"x": ((1, 4), (2, 4), (3, 4))}, "agree with it where it is fixed"),
        ({"x": ((2, 3), (1, 3), (3, 3))}, "smallest, usual, largest"),
        ({"x": ((1,), (2,), (3,))}, "smallest, usual, largest"),
    ],
)
def test_bad_profiles(tmp_path, fake, profiles, message):
    with pytest.raises(ValueError, match=message):
        build_engine(graph(tmp_path), tmp_path / "model.plan", profiles=profiles)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_batch_is_no_profile_for_other_free_axes(tmp_path, fake):
    with pytest.raises(ValueError, match=r"`x` is \(-1, -1\): give the shapes"):
        build_engine(graph(tmp_path, x=[-1, -1]), tmp_path / "model.plan", profiles=4)


def test_other_errors_leave_nothing_behind(tmp_path, fake):
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(ValueError, match=r"text.onnx', which TensorRT cannot read: conv1/Conv: no such operator"):
        build_engine(text, tmp_path / "model.plan")
    text.write_text(json.dumps({"inputs": {"x": [1]}, "build": False}))
    with pytest.raises(RuntimeError, match=r"built no engine of .*text.onnx: no kernel for node conv1/Conv"):
        build_engine(text, tmp_path / "model.plan")
    with pytest.raises(FileNotFoundError, match="no such file"):
        build_engine(tmp_path / "missing.onnx", tmp_path / "model.plan")
    with pytest.raises(FileNotFoundError, match="create it first"):
        build_engine(graph(tmp_path), tmp_path / "nowhere" / "model.plan", profiles=1)
    with pytest.raises(ValueError, match="`optimization_level` is 6"):
        build_engine(graph(tmp_path), tmp_path / "model.plan", profiles=1, optimization_level=6)
    cache = tmp_path / "other.cache"
    cache.write_bytes(b"other GPU")
    with pytest.raises(ValueError, match="another GPU or version"):
        build_engine(graph(tmp_path), tmp_path / "model.plan", profiles=1, timing_cache=cache)
    assert not (tmp_path / "model.plan").exists()
    assert cache.read_bytes() == b"other GPU"


# Running


def engine(folder, profiles=8, **inputs):
    path = graph(folder, **inputs)
    return Engine(build_engine(path, path.with_suffix(".plan"), profiles=profiles), device="cpu")


def test_tensors_in_and_out(tmp_path, fake):
    double = engine(tmp_path)
    assert (double.inputs, double.outputs) == (("x",), ("x_out",))
    x = torch.randn(4, 6)[:, ::2]  # neither contiguous nor in half precision
    (y,) = double(x)
    assert y.dtype == torch.float16
    assert torch.equal(y, x.half() * 2)
    assert double._context.streams == [7]
    assert double._stream.log == ["wait for the caller", "the caller waits", 1, 1]
    # another batch
    assert double(torch.ones(8, 3))[0].shape == (8, 3)


def test_the_profile_that_fits_is_chosen(tmp_path, fake):
    small, large = ({"x": ((n, 3), (n, 3), (2 * n, 3))} for n in (1, 8))
    double = engine(tmp_path, [small, large])
    chosen = []
    for rows in (2, 9, 10, 1):
        double(torch.ones(rows, 3))
        chosen.append(double._context.profile)
    assert chosen == [0, 1, 1, 0]
    with pytest.raises(ValueError, match=r"inputs of model.plan are {'x': \(5, 3\)}.*other `profiles`"):
        double(torch.ones(5, 3))


def test_fixed_shapes(tmp_path, fake):
    double = engine(tmp_path, None, x=[2, 3])
    assert double(torch.ones(2, 3))[0].shape == (2, 3)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        double(torch.ones(3, 3))


def test_wrong_inputs(tmp_path, fake):
    double = engine(tmp_path, None, ids=[2], x=[2])
    with pytest.raises(TypeError, match=r"takes 2 inputs \(ids, x\), but 1 are given"):
        double(torch.ones(2))
    with pytest.raises(TypeError, match=r"`ids` is torch.int64, but model.plan takes torch.int32"):
        double(torch.ones(2, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match="takes ids, x, but of what is given 'ids' is missing, 'y' is unknown"):
        double.run({"x": torch.ones(2), "y": torch.ones(2)})
    assert [tuple(y.tolist()) for y in double.run({"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.int32)})] == [(2, 2)] * 2


def test_plans_that_cannot_be_loaded(tmp_path, fake):
    with pytest.raises(FileNotFoundError, match="build it with `build_engine`"):
        Engine(tmp_path / "missing.plan", device="cpu")
    (tmp_path / "other.plan").write_text("binary")
    with pytest.raises(ValueError, match=r"TensorRT 10.99 cannot load on this GPU: build it here. built by another version"):
        Engine(tmp_path / "other.plan", device="cpu")


# Inspecting and timing


class Report:
    def __init__(self, *kernels):
        self.kernels = kernels

    def layers(self):
        return self.kernels


def kernel(name, inputs, kind="CaskConvolution", metadata=""):
    tensors = [{"Name": "x", "Format/Datatype": f} for f in inputs]
    return {"Name": name, "LayerType": kind, "Inputs": tensors, "Outputs": [], "Metadata": metadata}


def test_engine_report_joins_kernels_with_the_graph(tmp_path, monkeypatch):
    x = torch.randn(2, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    path = to_onnx(calibrated(net, x), x, tmp_path / "model.onnx")
    found = [
        kernel("0.input/QuantizeLinear", ["Float NCHW"], "Scale"),
        kernel(
            "0.weight/DequantizeLinear + 0/Conv + 1/Relu",
            ["Thirty-two wide channel vectorized row major Int8 format.", "Int8"],
            metadata="[ONNX Layer: 0/Conv]\x1e[ONNX Layer: 1/Relu]",
        ),
        kernel("fused", ["Half NCHW"], metadata="[ONNX Layer: 2.input/DequantizeLinear]\x1e[ONNX Layer: 2/Conv]"),
        kernel("Reformatting CopyNode for Input Tensor 0 to 2/Conv + 4/Gemm", ["Row major linear INT8 format"], "Reformat"),
    ]
    monkeypatch.setattr(lq.export.tensorrt.inspection, "Engine", Report)
    report = engine_report(Report(*found), path)
    assert [(r.placement.name, r.placement.precision, r.precision) for r in report.layers] == [
        ("0/Conv", "INT8", "INT8"),
        ("2/Conv", "INT8", "float"),
        ("4/Gemm", "INT8", None),
    ]
    assert [r.placement.name for r in report.differing] == ["2/Conv"]
    assert report.layers[1].kernels == ("fused",)
    assert report.reformats == (found[3]["Name"],)
    assert "3 layers, 1 not as expected; 1 reformats" in str(report)
    assert report.records()[0]["engine"] == "INT8"


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        ({"Inputs": [{"Format/Datatype": "Row major linear INT8 format"}]}, "INT8"),
        ({"Inputs": [{"Format": "Channel major", "DataType": "FP8"}]}, "FP8"),
        ({"Inputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}]}, "float"),
        ({"Inputs": [{"Format/Datatype": "Half"}], "Weights": {"Type": "Int4", "Count": 64}}, "INT4"),
        ({"Inputs": [{"Format/Datatype": "Half"}], "Weights": {"Type": "Half"}}, "float"),
        ({}, "float"),
    ],
)
def test_types_as_the_inspector_words_them(layer, precision):
    assert lq.export.tensorrt.inspection._precision([{"Name": "conv", **layer}]) == precision


def test_layers_of_an_engine_without_details(tmp_path, fake):
    path = graph(tmp_path, x=[2], layers=["conv + relu", {"Name": "fc"}])
    assert Engine(build_engine(path, tmp_path / "p"), device="cpu").layers() == [{"Name": "conv + relu"}, {"Name": "fc"}]


def test_benchmark_times_the_engine_alone_by_turns(fake, tmp_path, monkeypatch):
    order = []

    def engine(name, times):
        made = Engine(build_engine(graph(tmp_path), tmp_path / f"{name}.plan", profiles=8), device="cpu")

        def milliseconds(work):
            placed = len(made._stream.log)
            before = len(made._context.streams)
            work()
            order.append((name, len(made._context.streams) - before))
            assert len(made._stream.log) == placed, "inputs were put in place again"
            return next(times)

        made._stream.milliseconds = milliseconds
        return made

    int8 = engine("int8", iter([50, *([1.0] * 97), 2, 3, 4, 80]))
    half = engine("half", iter([50, *([4.0] * 100), 400]))
    found = benchmark_engine(int8, torch.ones(8, 3).half(), against=half, repeats=100, warmup=1)
    assert order == [("int8", 1), ("half", 1)] * 101 + [("int8", 100), ("half", 100)]
    assert (found.engine.median_ms, found.engine.p99_ms, found.ratio) == (1, 3, 0.25)
    assert (found.engine.throughput, found.against.throughput) == (1000 * 8 * 100 / 80, 1000 * 8 * 100 / 400)
    alone = benchmark_engine(engine("int8", iter([1.0] * 5)), torch.ones(8, 3).half(), repeats=3, warmup=1)
    assert alone.against is None
    assert alone.ratio != alone.ratio
    with pytest.raises(ValueError, match="`repeats` is 0"):
        benchmark_engine(int8, torch.ones(1), repeats=0)
    with pytest.raises(TypeError, match="takes 1 inputs"):
        benchmark_engine(int8, (torch.ones(1), torch.ones(1)))


# With TensorRT


@pytest.mark.skipif(not HAS_TENSORRT, reason="needs TensorRT and an NVIDIA GPU")
def test_engine_of_a_real_graph(tmp_path):
    x = torch.randn(4, 3, 16, 16)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(4608, 8)
    )
    lq.quantize_(net.eval(), target="tensorrt", args=x)
    with lq.calibrating(net):
        net(x)
    path = to_onnx(net, x, tmp_path / "model.onnx")
    plan = build_engine(path, tmp_path / "model.plan", profiles=8, timing_cache=tmp_path / "timings")
    runs = Engine(plan)
    result = verify(net, path, runs, batches=[x, torch.randn(8, 3, 16, 16)])
    assert result.tensorrt.outputs[0].max_steps < 10
    report = engine_report(runs, path)
    assert all(layer.precision in ("INT8", None) for layer in report.layers), str(report)
    assert benchmark_engine(runs, x, repeats=20).engine.median_ms > 0
