"""Post-training quantization: each field against a reference of its own, the report, and what cannot be done."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lq
from lq import QuantizationConfig, post_training_quantization
from lq.calib import HistogramCalibrator
from lq.export import placement_report, to_onnx, verify
from lq.load import origin_of
from lq.ptq.sqnr import layer_sqnr

METHODS = {"NOCLIPPING": "max", "MSE": "mse", "MAE": "mae", "KL": "kl", "LP": "lp"}


class Net(nn.Module):
    """Signed and non-negative inputs, a negative lobe, BatchNorm, uneven channels, a layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.head = nn.Linear(8, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.deep(x).relu().mean((2, 3))
        return self.head(nn.functional.silu(self.wide(x)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.stem.weight *= torch.logspace(-1.5, 0.5, 8).view(-1, 1, 1, 1)
        net.deep.weight *= torch.logspace(1.5, -0.5, 8).view(-1, 1, 1, 1)
        net.wide.weight *= 6
    return net


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [2 * torch.randn(16, 3, 10, 10, generator=generator) for _ in range(2)]


def inputs_of(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """What a layer of the float model takes."""
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for x in batches:
            model(x)
    handle.remove()
    return torch.cat(found)


def plain(**fields) -> QuantizationConfig:
    return QuantizationConfig(**({"weights_bias_correction": False} | fields))


# Fields, one by one


@pytest.mark.parametrize("method", METHODS)
def test_thresholds_of_activations(model, batches, method):
    quantized, _ = post_training_quantization(model, batches, plain(activation_threshold_method=method, activation_n_bits=5))
    for name in ("stem", "deep", "head"):
        x = inputs_of(model, name, batches)
        alone = HistogramCalibrator(5, None, unsigned=bool((x >= 0).all()))
        alone.collect(x)
        quantizer = quantized.get_submodule(name).input_quantizer
        torch.testing.assert_close(quantizer.amax, alone.compute_amax(METHODS[method], min_threshold=2**-28, p=2))
        assert quantizer.unsigned == (name == "deep")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_thresholds_of_weights(model, batches, method, per_channel):
    config = plain(weights_threshold_method=method, weights_n_bits=4, weights_per_channel_threshold=per_channel, l_p_value=3)
    quantized, _ = post_training_quantization(model, batches, config)
    for name in ("stem", "wide"):
        alone = HistogramCalibrator(4, 0 if per_channel else None)
        alone.collect(model.get_submodule(name).weight)
        expected = alone.compute_amax(METHODS[method], min_threshold=2**-28, p=3, stride=8)
        torch.testing.assert_close(quantized.get_submodule(name).weight_quantizer.amax, expected)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_powers_of_two(model, batches, bits):
    config = plain(
        activation_quantization_method="POWER_OF_TWO",
        weights_quantization_method="POWER_OF_TWO",
        activation_n_bits=bits,
        weights_n_bits=bits,
        shift_negative_activation_correction=True,
        shift_negative_ratio=1.0,
    )
    quantized, _ = post_training_quantization(model, batches, config)
    quantizers = dict(lq.named_quantizers(quantized))
    for quantizer in quantizers.values():
        assert np.array_equal(np.log2(quantizer.scale.numpy()) % 1, np.zeros(quantizer.scale.shape))
    assert not quantizers["stem.input"].unsigned
    assert quantizers["deep.input"].unsigned
    # codes go from minus the threshold to one step below it
    scale = quantizers["stem.input"].scale.item()
    threshold = 2 ** (bits - 1) * scale
    assert quantizers["stem.input"](torch.tensor([-1e6, 1e6])).tolist() == pytest.approx([-threshold, threshold - scale])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("method", "p"), [("MSE", 2.0), ("MAE", 1.0), ("LP", 3.0)])
def test_powers_of_two_have_the_least_error(model, batches, method, p, bits):
    kinds = dict.fromkeys(("activation_quantization_method", "weights_quantization_method"), "POWER_OF_TWO")
    methods = dict.fromkeys(("activation_threshold_method", "weights_threshold_method"), method)
    widths = dict.fromkeys(("activation_n_bits", "weights_n_bits"), bits)
    quantized, _ = post_training_quantization(model, batches, plain(**kinds, **methods, **widths, l_p_value=p))
    # negative values are few and small in the head's input, and there are none in that of the convolution
    values = {f"{name}.input": inputs_of(model, name, batches).reshape(1, -1) for name in ("deep", "head")}
    values |= {
        f"{name}.weight": model.get_submodule(name).weight.detach().flatten(1) for name in ("stem", "deep", "wide", "head")
    }
    for name, quantizer in lq.named_quantizers(quantized):
        if name not in values:
            continue
        codes = 2 ** (bits - (not quantizer.unsigned))
        low = 0 if quantizer.unsigned else 1 - codes if quantizer.narrow_range else -codes
        for x, amax in zip(values[name].double().numpy(), quantizer.amax.flatten().tolist(), strict=True):
            steps = {t: t / codes for t in (amax / 4, amax / 2, amax, 2 * amax, 4 * amax)}
            errors = {t: np.sum(np.abs(x - np.clip(np.rint(x / s), low, codes - 1) * s) ** p) for t, s in steps.items()}
            # the search rounds the centres of bins
            assert errors[amax] <= 1.001 * min(errors.values()), name


def test_uniform_has_a_zero_point(model, batches):
    config = plain(activation_quantization_method="UNIFORM", weights_quantization_method="UNIFORM", activation_n_bits=4)
    quantized, _ = post_training_quantization(model, batches, config)
    x = inputs_of(model, "head", batches)
    low, high = quantized.head.input_quantizer.range
    assert x.min() <= low < -0.2
    assert 0 < high <= x.max()
    assert quantized.head.input_quantizer.zero_point > 0
    assert quantized.deep.input_quantizer.range[0] == 0
    symmetric, _ = post_training_quantization(model, batches, plain(activation_n_bits=4))
    noise = [(one.head.input_quantizer(x) - x).square().mean() for one in (quantized, symmetric)]
    assert noise[0] < 0.5 * noise[1]


def test_widths(model, batches):
    quantized, _ = post_training_quantization(model, batches, plain(activation_n_bits=4, weights_n_bits=7))
    x = inputs_of(model, "deep", batches)
    assert quantized.deep.input_quantizer(x).unique().numel() == 2**4
    assert quantized.wide.weight_quantizer.num_bits == 7
    sqnr = [post_training_quantization(model, batches, plain(activation_n_bits=n))[1].output_sqnr["quantized"] for n in (8, 6, 4)]
    assert sqnr == sorted(sqnr, reverse=True)
    assert sqnr[0] - sqnr[1] == pytest.approx(12, abs=4)  # 6 dB a bit


def test_outliers_are_left_out(model, batches):
    batches[0][0, 0, 0, 0] = 500.0
    method = {"activation_threshold_method": "NOCLIPPING"}
    amax = {
        z: post_training_quantization(model, batches, plain(z_threshold=z, **method))[0].stem.input_quantizer.amax
        for z in (math.inf, 8)
    }
    assert amax[math.inf] == 500
    assert amax[8] < 20


def test_least_threshold(model, batches):
    quantized, _ = post_training_quantization(model, [1e-4 * x for x in batches], plain(min_threshold=0.5))
    assert quantized.stem.input_quantizer.amax == 0.5
    assert quantized.stem.weight_quantizer.amax.min() == 0.5


def test_what_is_not_enabled_stays_in_float(model, batches):
    for field, role in (("enable_weights_quantization", "weight"), ("enable_activation_quantization", "input")):
        quantized, report = post_training_quantization(model, batches, QuantizationConfig(**{field: False}))
        roles = {name.rpartition(".")[2] for name, _ in lq.named_quantizers(quantized)}
        assert roles == {"weight", "input"} - {role}
        assert ("weights_bias_correction" in report.sqnr) == (role == "input")


def test_bias_correction_takes_the_mean_error_off(model, batches):
    config = {"weights_n_bits": 3, "enable_activation_quantization": False}
    means = []
    for correct in (False, True):
        quantized, _ = post_training_quantization(model, batches, QuantizationConfig(weights_bias_correction=correct, **config))
        with torch.no_grad():
            means.append(torch.cat([quantized(x) - model(x) for x in batches]).mean(0).abs().max())
    assert means[1] < 0.3 * means[0]


@pytest.mark.parametrize(
    ("field", "layer"),
    [
        ("activation_channel_equalization", "deep"),
        ("relu_unbound_correction", "deep"),
        ("input_scaling", "stem"),
        ("shift_negative_activation_correction", "head"),
    ],
)
def test_corrections_are_those_of_the_package(model, batches, field, layer):
    config = plain(**{field: True}, shift_negative_ratio=0.9, activation_n_bits=5, weights_n_bits=5)
    quantized, report = post_training_quantization(model, batches, config)
    alone = copy.deepcopy(model)
    done = config.corrections()[field](alone, [(x,) for x in batches])
    assert report.corrections[field] == done
    assert layer in {applied.name for applied in done.applied}
    assert list(report.sqnr) == ["quantized", field]
    with lq.surgery.unquantized(quantized), torch.no_grad():
        torch.testing.assert_close(quantized(batches[0]), model(batches[0]), rtol=1e-4, atol=1e-4)
    state = {n: v for n, v in alone.state_dict().items() if "quantizer" not in n}
    for name, value in state.items():
        torch.testing.assert_close(quantized.state_dict()[name], value, msg=name)


def test_each_stage_is_measured_against_float(model, batches):
    per_tensor = {"weights_per_channel_threshold": False, "weights_n_bits": 4}
    config = QuantizationConfig(activation_channel_equalization=True, **per_tensor)
    quantized, report = post_training_quantization(model, batches, config)
    assert list(report.sqnr) == ["quantized", "activation_channel_equalization", "weights_bias_correction"]
    with torch.no_grad():
        expected, actual = (torch.cat([one(x) for x in batches]).double() for one in (model, quantized))
    noise = (actual - expected).square().sum()
    ratio = 10 * torch.log10(expected.square().sum() / noise)
    assert report.output_sqnr["weights_bias_correction"] == pytest.approx(ratio.item(), abs=0.02)
    before = report.sqnr["quantized"]["stem"]
    with torch.no_grad():
        x = torch.cat(batches)
        y = model.stem(x).double()
        first = post_training_quantization(model, batches, plain(**per_tensor))[0]
        noise = (first.stem(x).double() - y).square().sum()
    assert before == pytest.approx(float(10 * torch.log10(y.square().sum() / noise)), abs=0.02)
    assert report.output_sqnr["activation_channel_equalization"] > report.output_sqnr["quantized"] + 3


def test_sqnr_counts_every_call_and_every_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False)

        def forward(self, x):
            return {"first": self.a(x), "second": self.a(2 * x)}

    reference = Twice()
    model = lq.quantize_(copy.deepcopy(reference))
    with torch.no_grad():
        model.a.weight += 0.1
        x = torch.ones(3, 2)
        noise = sum((model(x)[k] - reference(x)[k]).double().square().sum() for k in ("first", "second"))
        signal = sum(reference(x)[k].double().square().sum() for k in ("first", "second"))
    found = layer_sqnr(reference, model, [(x,)])
    assert found["a"] == found[""] == pytest.approx(float(10 * torch.log10(signal / noise)), abs=0.01)


# What comes out


def test_model_stays_and_the_quantized_one_can_be_kept(model, batches, tmp_path):
    before = copy.deepcopy(model.state_dict())
    shift = {"shift_negative_activation_correction": True, "shift_negative_ratio": 0.9}
    config = QuantizationConfig(activation_channel_equalization=True, **shift)
    quantized, report = post_training_quantization(model, iter(batches), config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.save(quantized.state_dict(), tmp_path / "model.pt")
    loaded = lq.load_quantized(Net(), tmp_path / "model.pt", report.rules)
    assert torch.equal(loaded(batches[0]), quantized(batches[0]))
    assert type(quantized.norm) is nn.Identity  # folded


@pytest.mark.parametrize("target", [None, "tensorrt", "onnxruntime"])
def test_graph_is_that_of_the_model(model, batches, tmp_path, target):
    quantized, _ = post_training_quantization(model, batches, target=target)
    assert quantized.deep.input_quantizer.unsigned == (target != "tensorrt")
    path = to_onnx(quantized, batches[0], tmp_path / "model.onnx", target=target or "tensorrt")
    result = verify(quantized, path, batches=batches)
    assert result.first_difference is None
    if target != "onnxruntime":
        assert not placement_report(path).float_layers


class Residual(nn.Module):
    """A residual block whose shortcut has a sign (``linear``), or comes from a ReLU."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3), nn.Identity() if linear else nn.ReLU()
        self.up, self.down = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("target", [None, "tensorrt", "onnxruntime"])
def test_residual_adds_are_exported_and_built_again(tmp_path, batches, target, bits, linear):
    torch.manual_seed(0)
    model = Residual(linear).eval()
    quantized, report = post_training_quantization(model, batches, QuantizationConfig(activation_n_bits=bits), target=target)
    found = dict(lq.named_quantizers(quantized))
    assert found["down.input"].unsigned == (target != "tensorrt" or bits < 8)
    # a shortcut from a ReLU has no sign, but with 8 bits an add cannot take codes that are shifted
    if target is not None:
        assert quantized.down.residual_quantizer.unsigned == (not linear and bits < 8)
    path = to_onnx(quantized, batches[0], tmp_path / "model.onnx", target=target or "tensorrt")
    assert verify(quantized, path, batches=batches).first_difference is None
    torch.save(quantized.state_dict(), tmp_path / "model.pt")
    example = () if target is None else batches[0]
    loaded = lq.load_quantized(Residual(linear), tmp_path / "model.pt", report.rules, target=target, args=example)
    assert {name: q.quant_desc for name, q in lq.named_quantizers(loaded)} == {name: q.quant_desc for name, q in found.items()}
    assert torch.equal(loaded(batches[0]), quantized(batches[0]))
    torch.save({"state_dict": quantized.state_dict(), **origin_of(quantized)}, tmp_path / "model.ckpt")
    loaded = lq.load_quantized(Residual(linear), tmp_path / "model.ckpt")
    assert torch.equal(loaded(batches[0]), quantized(batches[0]))


def test_report(model, batches, tmp_path):
    config = QuantizationConfig(activation_channel_equalization=True, relu_unbound_correction=True)
    _, report = post_training_quantization(model, batches, config)
    records = {record["layer"]: record for record in json.loads(json.dumps(report.records()))}
    assert list(records) == ["stem", "deep", "wide", "head", ""]
    assert [row["name"] for row in records["deep"]["quantizers"]] == ["deep.input", "deep.weight"]
    assert "16 channels" not in records["deep"]["corrections"]["activation_channel_equalization"][0]
    assert "8 channels of `stem` divided by" in records["deep"]["corrections"]["activation_channel_equalization"][0]
    assert records[""]["sqnr_db"] == report.output_sqnr
    text = str(report)
    assert "| Layer | quantized | + channels evened out | + ReLUs bound | + bias corrected |" in text
    assert "| channels evened out | head | left: " in text
    assert "| stem.weight | 8 | mse |" in text
    assert report.figure(tmp_path / "ptq.png").stat().st_size > 5000


# What cannot be done


class Hidden(nn.Module):
    """A part whose run cannot be recorded: it computes in NumPy."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        hidden = torch.from_numpy(np.maximum(self.a(x).detach().numpy(), 0))
        return self.b(hidden)


def test_a_model_that_cannot_be_followed_is_quantized_all_the_same():
    model, batches = Hidden(), [torch.randn(32, 3)]
    config = QuantizationConfig(activation_channel_equalization=True, relu_unbound_correction=True)
    quantized, report = post_training_quantization(model, batches, config)
    assert all(q.amax is not None for _, q in lq.named_quantizers(quantized))
    for name in ("activation_channel_equalization", "relu_unbound_correction"):
        assert not report.corrections[name].applied
        assert report.corrections[name].left.keys() >= {"b"}
    assert report.output_sqnr["weights_bias_correction"] > 30


class Refuses(nn.Module):
    """Runs outside of a recording only."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        if type(x) is not Tensor or torch.overrides._get_current_function_mode_stack():
            raise RuntimeError("not inside of a mode")
        return self.a(x)


def test_a_run_that_cannot_be_recorded_is_named():
    _, report = post_training_quantization(Refuses(), [torch.randn(8, 3)], QuantizationConfig(relu_unbound_correction=True))
    assert report.corrections["relu_unbound_correction"].left == {"": "the model's run cannot be recorded: not inside of a mode"}
    assert "| ReLUs bound | model | left: the model's run cannot be recorded: not inside of a mode |" in str(report)


@pytest.mark.parametrize(
    ("place", "error"), [("relu_bound.input_ranges", RuntimeError), ("places.trace", torch.OutOfMemoryError)]
)
def test_what_else_goes_wrong_in_a_correction_is_not_taken_for_a_recording(monkeypatch, place, error):
    def fails(*args, **kwargs):
        raise error("no")

    monkeypatch.setattr(f"lq.corrections.{place}", fails)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(error, match="no"):
        post_training_quantization(model, [torch.randn(8, 3)], QuantizationConfig(relu_unbound_correction=True))


def test_layers_that_no_batch_reached(batches):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    _, report = post_training_quantization(Spare(), [torch.randn(8, 3)])
    assert report.left == {"spare.input": "no batch reached it"}


def test_bad_input(model, batches):
    with pytest.raises(ValueError, match="`batches` is empty"):
        post_training_quantization(model, [])
    with pytest.raises(TypeError, match="`batches` is one tensor"):
        post_training_quantization(model, batches[0])
    with pytest.raises(ValueError, match="is quantized already"):
        post_training_quantization(lq.quantize_(copy.deepcopy(model)), batches)
    with pytest.raises(ValueError, match="NaN or Inf"):
        post_training_quantization(model, [batches[0] * math.nan])
    with pytest.raises(ValueError, match="has no quantizable layer"):
        post_training_quantization(nn.ReLU(), batches)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_shifts_are_whole_steps_of_powers_of_two(bits):
    """So that zero, which padding is made of, has a code."""
    model, x = nn.Sequential(nn.Hardswish(), nn.Linear(8, 4)).eval(), torch.linspace(-4, 5, 64).reshape(8, 8)
    shifted = {"shift_negative_activation_correction": True, "shift_negative_ratio": 0.9}
    config = QuantizationConfig(
        activation_n_bits=bits, activation_quantization_method="POWER_OF_TWO", activation_threshold_method="NOCLIPPING", **shifted
    )
    quantized, report = post_training_quantization(model, [x], config)
    assert [done.name for done in report.corrections["shift_negative_activation_correction"].applied] == ["1"]
    quantizer = quantized[1].input_quantizer
    assert math.frexp(quantizer.scale.item())[0] == 0.5
    steps = (quantizer.pre_quant_shift / quantizer.scale).item()
    assert steps == round(steps) >= 1
    zero = torch.zeros(1)
    assert torch.equal(quantizer(zero) - quantizer.pre_quant_shift, zero)
