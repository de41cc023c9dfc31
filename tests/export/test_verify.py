"""Verification finds what differs, says by how many steps, and leaves the model alone."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import lq
from exported import calibrated
from lq.descriptor import INT8_WEIGHT, PRESETS, QuantRule
from lq.export import OnnxModel, Verification, compare_latency, latency, to_onnx, verify


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    batches = [(torch.randn(n, 6),) for n in (32, 32, 5)]
    model = calibrated(mlp(), *batches[0])
    return model, to_onnx(model, batches[0], tmp_path_factory.mktemp("verify") / "model.onnx"), batches


def test_agreement(exported):
    model, path, batches = exported
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    try:
        result = verify(model, path, batches=iter(batches))
        assert all(m.training for m in model.modules())
    finally:
        model.eval()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert isinstance(result, Verification)
    assert result.samples == 69
    assert result.onnxruntime.agreement == 1
    assert (result.onnxruntime.disagreements, result.onnxruntime.worst_disagreement_steps) == (0, 0)
    (output,) = result.onnxruntime.outputs
    assert 0 <= output.mean_abs <= output.max_abs
    assert result.onnxruntime.outputs[0].max_steps < 0.01
    with torch.no_grad():
        predictions = torch.cat([model(x) for (x,) in batches]).argmax(1)
    assert torch.equal(result.predictions, predictions)
    assert torch.equal(result.onnxruntime.predictions, predictions)
    assert result.onnxruntime.predictions.dtype == torch.int64


def test_step_is_one_code_of_the_last_layers_input(exported):
    model, path, batches = exported
    last = model[4]
    weight = last.weight_quantizer(last.weight.detach()).abs().max()
    expected = float(last.input_quantizer.amax / 127 * weight)
    assert verify(model, path, batches=batches).onnxruntime.outputs[0].step == pytest.approx(expected, rel=1e-6)


def test_differences_are_counted(exported):
    model, path, batches = exported
    step = verify(model, path, batches=batches).onnxruntime.outputs[0].step
    x = torch.cat([x for (x,) in batches])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        # half of everything changes no prediction, however large the difference; a bit of one class changes those that were close
        changed[4].weight *= 0.5
        changed[4].bias *= 0.5
        changed[4].bias[0] += 0.1 * before.std()
        after = changed(x)
    result = verify(changed, path, batches=batches)
    unequal = before.argmax(1) != after.argmax(1)
    difference = (before - after).abs()
    assert 0 < result.onnxruntime.disagreements == int(unequal.sum()) < 69
    assert result.onnxruntime.agreement == pytest.approx(1 - result.onnxruntime.disagreements / 69)
    assert result.onnxruntime.outputs[0].mean_abs == pytest.approx(float(difference.mean()), rel=1e-3)
    assert result.onnxruntime.outputs[0].max_abs == pytest.approx(float(difference.max()), rel=1e-3)
    # the step is that of the model which is given
    step = verify(changed, path, batches=batches).onnxruntime.outputs[0].step
    assert result.onnxruntime.outputs[0].max_steps == pytest.approx(float(difference.max()) / step, rel=1e-3)
    worst = float(difference.amax(1)[unequal].max())
    assert worst < 0.99 * float(difference.max())
    assert result.onnxruntime.worst_disagreement_steps == pytest.approx(worst / step, rel=1e-3)


class TwoHeads(nn.Module):
    """The first output is of the layer that is called first; the second one is of the last, and dense."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Linear(3, 1)
        self.large = nn.Conv1d(1, 4, 3)

    def forward(self, x: Tensor, *, shift: Tensor) -> dict[str, Tensor]:
        return {"logit": self.small(x), "dense": self.large(x.unsqueeze(1)) + shift}


def test_keyword_batches_single_logit_and_two_outputs(tmp_path):
    x, shift = torch.randn(8, 3), torch.randn(4, 1)
    model = calibrated(TwoHeads(), x, shift=shift)
    path = to_onnx(model, x, tmp_path / "model.onnx", kwargs={"shift": shift})
    result = verify(model, path, batches=[{"x": torch.randn(8, 3), "shift": shift} for _ in range(2)])
    assert result.samples == 16
    assert result.predictions.shape == (16,)
    assert 0 < result.predictions.sum() < 16
    assert result.onnxruntime.agreement == 1
    assert [output.name for output in result.onnxruntime.outputs] == list(OnnxModel(path).outputs)
    assert max(output.max_abs for output in result.onnxruntime.outputs) < 1e-5
    small = model.small
    largest = small.weight_quantizer(small.weight.detach()).abs().max()
    assert result.onnxruntime.outputs[0].step == pytest.approx(float(small.input_quantizer.amax / 127 * largest), rel=1e-6)


def test_batches_that_are_none(exported):
    model, path, *_ = exported
    with pytest.raises(ValueError, match=r"`batches` is one tensor.*batches=\[images\]"):
        lq.export.verify(model, path, batches=torch.randn(4, 8))
    with pytest.raises(TypeError, match=r"A batch of 2 does not fit the forward of .*: leave labels out"):
        lq.export.verify(model, path, batches=[(torch.randn(4, 8), torch.zeros(4))])


def test_feed_maps_a_batch_to_inputs(exported):
    model, path, batches = exported
    (name,) = OnnxModel(path).inputs
    assert verify(model, path, batches=batches, feed=lambda batch: {name: batch[0]}).onnxruntime.agreement == 1
    # what is fed is what is run
    assert verify(model, path, batches=batches, feed=lambda batch: {name: -batch[0]}).onnxruntime.agreement < 1


def test_step_is_of_the_last_layer_with_a_quantized_input(tmp_path):
    x = torch.randn(4, 6)
    weight_only = QuantRule("2", None, INT8_WEIGHT)
    model = calibrated(
        nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3), nn.Softmax(1)), x, rules=[*PRESETS["int8"], weight_only]
    )
    layer = model[1]
    largest = layer.weight_quantizer(layer.weight.detach()).abs().max()
    result = verify(model, to_onnx(model, x, tmp_path / "model.onnx"), batches=[x])
    assert result.onnxruntime.outputs[0].step == pytest.approx(float(layer.input_quantizer.amax / 127 * largest), rel=1e-6)


def test_step_is_nan_where_no_input_is_quantized(tmp_path):
    x = torch.randn(4, 6)
    model = calibrated(nn.Sequential(nn.Linear(6, 3)), x, rules="int8_weight_only")
    result = verify(model, to_onnx(model, x, tmp_path / "model.onnx"), batches=[x])
    assert math.isnan(result.onnxruntime.outputs[0].step)
    assert math.isnan(result.onnxruntime.outputs[0].max_steps)
    assert result.onnxruntime.outputs[0].max_abs < 1e-6
    assert "no input is quantized, so there are no steps" in str(result)
    assert "nan" not in str(result)


def test_dense_predictions(tmp_path):
    x = torch.randn(2, 3, 5, 5)
    model = calibrated(nn.Sequential(nn.Conv2d(3, 4, 3)), x)
    result = verify(model, to_onnx(model, x, tmp_path / "model.onnx"), batches=[x, x[:1]])
    assert result.samples == 3
    assert result.onnxruntime.predictions.shape == (3, 3, 3)
    assert result.onnxruntime.agreement == 1


# Layer by layer


def test_codes_of_every_activation(exported):
    model, path, batches = exported
    result = verify(model, path, batches=batches)
    # one batch of 32
    assert [(layer.name, layer.codes, layer.unequal) for layer in result.layers] == [("0.input", 192, 0), ("4.input", 512, 0)]
    assert result.first_difference is None
    assert "codes of 2 quantizers: 0 of 704 differ" in str(result)
    assert str(result).startswith("onnxruntime: 100.00 % of 69 predictions agree")


def test_first_layer_that_differs(exported):
    model, path, batches = exported
    changed = copy.deepcopy(model)
    with torch.no_grad():
        codes = (model[1](model[0](batches[0][0])).relu() / model[4].input_quantizer.scale).round()
        changed[1].bias += 3 * model[4].input_quantizer.scale
        moved = (changed[1](changed[0](batches[0][0])).relu() / model[4].input_quantizer.scale).round()
    difference = (codes.clamp(max=127) - moved.clamp(max=127)).abs()
    result = verify(changed, path, batches=batches)
    first = result.first_difference
    assert (first.name, first.codes, first.unequal) == ("4.input", 512, int((difference > 0).sum()))
    assert first.largest == pytest.approx(3, abs=1e-3)
    assert f"first other codes: 4.input, {first.unequal} of 512, by 3 steps at most" in str(result)


def test_classes_on_the_last_axis(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    model = calibrated(nn.Linear(6, 4), x)
    path = to_onnx(model, x, tmp_path / "last.onnx")
    result = verify(model, path, batches=[x, x], class_axis=-1)
    assert torch.equal(result.predictions, model(torch.cat([x, x])).argmax(-1))
    assert str(result).startswith("onnxruntime: 100.00 % of 20 predictions agree")
    # other inputs: the rows whose predictions differ are told apart along the same axis
    other = verify(model, path, batches=[x], feed=lambda batch: {"input": -batch}, class_axis=-1).onnxruntime
    ours, theirs = model(x).detach(), model(-x).detach()
    unequal = ours.argmax(-1) != theirs.argmax(-1)
    assert 0 < other.disagreements == int(unequal.sum())
    worst = (ours - theirs).abs().amax(-1)[unequal].max().item()
    assert other.worst_disagreement_steps * other.outputs[0].step == pytest.approx(worst, rel=1e-4)
    with pytest.raises(ValueError, match=r"`class_axis` is 3, and the first output has shape \(2, 5, 4\)"):
        verify(model, path, batches=[x], class_axis=3)


def test_nan_is_no_agreement(exported):
    model, path, batches = exported
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[4].bias[0] = math.nan
    output = verify(broken, path, batches=batches).onnxruntime.outputs[0]
    assert output.max_abs == output.mean_abs == math.inf


def test_a_graph_in_integers_can_be_verified_too(exported):
    model, path, batches = exported
    result = verify(model, OnnxModel(path), batches=batches)
    assert result.onnxruntime.agreement == 1
    assert all(layer.largest < 1.5 for layer in result.layers)


class Shared(nn.Module):
    """A layer that runs twice, and two layers with one input."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).relu()).relu()
        return self.left(x) * self.right(x)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_codes_of_shared_quantizers(tmp_path, target):
    x = torch.randn(8, 6)
    model = Shared().eval()
    lq.quantize_(model, "int8", target="tensorrt", args=(x,))
    with lq.calibrating(model):
        model(x)
    path = to_onnx(model, x, tmp_path / "model.onnx", target=target)
    result = verify(model, path, batches=[x])
    assert [(layer.name, layer.codes, layer.unequal) for layer in result.layers] == [
        ("twice.input", 96, 0),
        ("left.input", 48, 0),
    ]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("rules", ["fp8", "w4a16"])
def test_the_graph_is_run_as_it_is_written(tmp_path, rules, precision):
    # FP8: ONNX Runtime's optimizer drops the Relu in front of a QuantizeLinear; INT4: it rounds the inputs to int8
    x = torch.randn(8, 128)
    model = calibrated(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 16)), x, rules=rules)
    path = to_onnx(model, x, tmp_path / "model.onnx", precision=precision)
    result = verify(model, path, batches=[x])
    (output,) = result.onnxruntime.outputs
    with torch.no_grad():
        largest = float(model(x).abs().max())
    if precision == "fp32":
        assert output.max_abs < 1e-5 * largest
        assert result.first_difference is None
        # and so with the optimizers that are right
        with torch.no_grad():
            torch.testing.assert_close(OnnxModel(path)(x)[0], model(x), atol=1e-5 * largest, rtol=0)
    else:
        # half precision may move a value to the next code
        assert output.max_abs < 0.05 * largest
    assert len(result.layers) == (2 if rules == "fp8" else 0)


def test_model_that_is_not_calibrated(exported):
    model, path, batches = exported
    fresh = copy.deepcopy(model)
    fresh[4].input_quantizer.amax = None
    with pytest.raises(ValueError, match=r"`4.input` \(1 quantizers in all\) has no amax, so the model computes in float there"):
        verify(fresh, path, batches=batches)
    fresh[4].input_quantizer.disable()
    verify(fresh, path, batches=batches)


def test_bfloat16_is_not_run_on_the_cpu(exported, tmp_path):
    model, _, batches = exported
    path = to_onnx(model, batches[0], tmp_path / "bf16.onnx", precision="bf16")
    with pytest.raises(ValueError, match=r"\(bfloat16 is not for the CPU: export in fp32 or fp16"):
        verify(model, path, batches=batches)


def test_no_batches(exported):
    model, path, _ = exported
    with pytest.raises(ValueError, match="`batches` is empty"):
        verify(model, path, batches=[])


def test_labels_in_a_batch_are_refused(exported):
    model, path, _ = exported
    x = torch.randn(4, 6)
    with pytest.raises(TypeError, match=r"takes 1 inputs \(input\), but 2 are given.*without labels"):
        OnnxModel(path)(x, torch.zeros(4))
    with pytest.raises(TypeError):
        verify(model, path, batches=[(x, torch.zeros(4))])


def test_another_model(exported):
    _, path, batches = exported
    with pytest.raises(ValueError, match=r"returns tensors of shapes \[\(32, 3\)\], onnxruntime \[\(32, 4\)\]"):
        verify(nn.Linear(6, 3), path, batches=batches)


# Runtime


def test_onnx_model(exported):
    model, path, _ = exported
    x = torch.randn(3, 6)
    runtime = OnnxModel(path, threads=1)
    assert (runtime.inputs, len(runtime.outputs)) == (("input",), 1)
    (output,) = runtime(x.requires_grad_())
    assert isinstance(output, Tensor)
    with torch.no_grad():
        torch.testing.assert_close(output, model(x), atol=1e-5, rtol=1e-4)


def test_files_that_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        OnnxModel(tmp_path / "missing.onnx")
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(ValueError, match=r"text\.onnx.*cannot load"):
        OnnxModel(text)


def test_latency_takes_turns_and_medians(monkeypatch):
    clock = iter(range(10**6))
    order = []
    durations = {"a": iter([100, 1, 2, 9]), "b": iter([100, 5, 5, 5])}

    def model(name):
        def call(x):
            order.append(name)
            for _ in range(next(durations[name])):
                next(clock)

        return call

    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    # reading the clock takes a tick itself
    result = compare_latency({"a": model("a"), "b": model("b")}, torch.ones(1), repeats=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert result == {"a": 3000.0, "b": 6000.0}


def test_latency_of_a_file(exported):
    _, path, batches = exported
    assert 0 < latency(OnnxModel(path), batches[0], repeats=3) < 1000
    with pytest.raises(ValueError, match="`repeats` is 0"):
        latency(OnnxModel(path), batches[0], repeats=0)


def test_runtime_is_named_when_missing(exported, monkeypatch):
    import sys

    _, path, _ = exported
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-lq\[export\]"'):
        OnnxModel(path)
