"""`TensorQuantizer`: what it computes, what it holds, and how it travels."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from lq.calib import HistogramCalibrator, MaxCalibrator
from lq.descriptor import QuantDescriptor
from lq.functional.amax import compute_amax
from lq.functional.fake_quant import fake_tensor_quant, tensor_quant
from lq.nn import TensorQuantizer

PER_ROW = QuantDescriptor(axis=0)


def quantizer_with(amax, **fields):
    quantizer = TensorQuantizer(QuantDescriptor(**fields))
    quantizer.amax = amax
    return quantizer


# What it computes


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize(("unsigned", "narrow_range"), [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("axis", [None, 0, (0, 1)])
def test_quantizes_as_the_descriptor_says(axis, unsigned, narrow_range, num_bits):
    x = torch.randn(3, 4, 5) - 0.5
    amax = compute_amax(x, axis) * 0.6
    args = (amax, num_bits, unsigned, narrow_range)
    fields = {"axis": axis, "num_bits": num_bits, "unsigned": unsigned, "narrow_range": narrow_range}
    assert torch.equal(quantizer_with(amax, **fields)(x), fake_tensor_quant(x, *args))
    assert torch.equal(quantizer_with(amax, fake_quant=False, **fields)(x), tensor_quant(x, *args)[0])


@pytest.mark.parametrize("axis", [None, 1])
def test_without_amax_a_dynamic_one_takes_that_of_each_input(axis):
    quantizer = TensorQuantizer(QuantDescriptor(axis=axis))
    assert quantizer.dynamic
    for x in (torch.randn(4, 3), 100 * torch.randn(2, 5)):
        assert torch.equal(quantizer(x), fake_tensor_quant(x, compute_amax(x, axis)))
    assert quantizer.amax is None


def test_without_amax_one_that_is_not_dynamic_passes_its_input_through():
    quantizer = TensorQuantizer()
    quantizer.dynamic = False
    x = torch.randn(3)
    assert quantizer(x) is x
    assert not quantizer.active
    quantizer.amax = 1.0
    assert quantizer.active
    assert torch.equal(quantizer(x), fake_tensor_quant(x, torch.tensor(1.0)))


def test_disabled_neither_quantizes_nor_collects():
    quantizer = quantizer_with(1.0)
    quantizer.enable_calib()
    quantizer.disable()
    x = torch.randn(3)
    assert quantizer(x) is x
    assert not quantizer.calibrator.collected
    assert not quantizer.active
    quantizer.enable()
    assert quantizer(x) is not x
    assert quantizer.calibrator.collected


@pytest.mark.parametrize("quant", [True, False])
def test_collects_while_calibration_is_enabled(quant):
    quantizer = TensorQuantizer(QuantDescriptor(amax=0.5), if_quant=quant, if_calib=True)
    x = torch.tensor([0.2, -3.0])
    y = quantizer(x)
    assert torch.equal(y, fake_tensor_quant(x, torch.tensor(0.5)) if quant else x)
    quantizer.disable_calib()
    quantizer(9 * x)
    quantizer.load_calib_amax()
    assert quantizer.amax == 3


def test_calibrates_as_nvidia_documents_it():
    quantizer = TensorQuantizer(QuantDescriptor(calib_method="histogram"))
    quantizer.enable_calib()
    quantizer.disable_quant()
    for batch in torch.randn(4, 1000):
        assert quantizer(batch) is batch
    quantizer.load_calib_amax("percentile", percentile=99)
    quantizer.disable_calib()
    quantizer.enable_quant()
    assert 2 < quantizer.amax < 3
    assert quantizer(torch.tensor([100.0])) == quantizer.amax


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_output_has_the_dtype_of_the_input(dtype):
    x = torch.randn(8).to(dtype)
    assert quantizer_with(1.0)(x).dtype == TensorQuantizer()(x).dtype == dtype


@pytest.mark.parametrize("disabled", [False, True])
def test_a_factor_on_the_input_comes_first_even_when_disabled(disabled):
    quantizer = quantizer_with(1.0)
    quantizer.pre_quant_scale = torch.tensor([0.1, 1.0])
    if disabled:
        quantizer.disable()
    x = torch.tensor([[3.0, 3.0]]).half()
    y = quantizer(x)
    scaled = x * torch.tensor([0.1, 1.0]).half()
    assert y.dtype == torch.float16
    assert torch.equal(y, scaled if disabled else fake_tensor_quant(scaled, torch.tensor(1.0)))


def test_compiles_as_one_graph():
    quantizer = quantizer_with(1.0)
    x = torch.randn(4, 4)
    assert torch.equal(torch.compile(quantizer, fullgraph=True, backend="aot_eager")(x), quantizer(x))


# What it holds


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor(2), np.float64(2), torch.tensor(2.0, dtype=torch.float64)])
def test_amax_is_a_float32_buffer(value):
    quantizer = quantizer_with(value)
    assert quantizer.amax.dtype == torch.float32
    assert quantizer.amax == 2
    assert list(quantizer.state_dict()) == ["_amax"]


def test_amax_is_a_copy_without_a_graph():
    source = torch.ones(2, 1, requires_grad=True)
    quantizer = quantizer_with(source, axis=0)
    source.data.fill_(7)
    assert quantizer.amax.tolist() == [[1], [1]]
    assert not quantizer.amax.requires_grad


def test_a_new_amax_goes_into_the_buffer_that_is_there():
    quantizer = quantizer_with(1.0)
    buffer = quantizer.amax
    quantizer.amax = 2.0
    assert quantizer.amax is buffer
    assert buffer == 2


@pytest.mark.parametrize(("given", "amax"), [(2.5, 2.5), ([[1.0], [2.0]], [[1.0], [2.0]]), (np.array([3.0]), [3.0])])
def test_the_descriptor_may_fix_amax(given, amax):
    assert TensorQuantizer(QuantDescriptor(amax=given)).amax.tolist() == amax


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, [1.0, float("nan")], [1.0, -1e-9]])
def test_amax_must_be_finite_and_not_negative(bad):
    quantizer = quantizer_with(torch.ones(2)) if isinstance(bad, list) else quantizer_with(1.0)
    before = quantizer.amax
    with pytest.raises(ValueError, match="`amax` must be finite and not negative"):
        quantizer.amax = bad
    assert quantizer.amax is before


def test_the_shape_of_amax_changes_by_way_of_none_only():
    quantizer = quantizer_with(1.0)
    with pytest.raises(ValueError, match=r"shape \(2,\), but \(\) is set"):
        quantizer.amax = torch.ones(2)
    quantizer.amax = None
    assert quantizer.amax is None
    assert quantizer.scale is None
    quantizer.amax = torch.ones(2)


def test_a_frozen_amax_does_not_change():
    quantizer = quantizer_with(1.0)
    quantizer.calibrator.collect(torch.ones(3) * 5)
    quantizer.frozen = True
    for change in (lambda: setattr(quantizer, "amax", 2.0), lambda: setattr(quantizer, "amax", None), quantizer.load_calib_amax):
        with pytest.raises(RuntimeError, match=r"frozen.*`lq.unfreeze_`"):
            change()
    assert quantizer.amax == 1
    quantizer.frozen = False
    quantizer.load_calib_amax()
    assert quantizer.amax == 5


def test_without_statistics_there_is_no_amax_to_load():
    quantizer = quantizer_with(1.0)
    with pytest.raises(RuntimeError, match="saw no data"):
        quantizer.load_calib_amax()
    quantizer.load_calib_amax(strict=False)
    assert quantizer.amax == 1


@pytest.mark.parametrize(("num_bits", "unsigned", "steps"), [(8, False, 127), (8, True, 255), (4, False, 7), (4, True, 15)])
def test_scale_is_real_units_per_step(num_bits, unsigned, steps):
    assert quantizer_with(float(steps), num_bits=num_bits, unsigned=unsigned).scale == 1


@pytest.mark.parametrize(("calib_method", "kind"), [("max", MaxCalibrator), ("histogram", HistogramCalibrator)])
def test_the_descriptor_chooses_the_calibrator(calib_method, kind):
    desc = QuantDescriptor(num_bits=4, unsigned=True, axis=1, calib_method=calib_method, num_bins=64)
    calibrator = TensorQuantizer(desc).calibrator
    assert type(calibrator) is kind
    assert (calibrator.num_bits, calibrator.unsigned, calibrator.axis) == (4, True, 1)
    if kind is HistogramCalibrator:
        assert calibrator.counts.shape == (1, 128)


# How it prints


def test_prints_as_pytorch_quantization_does():
    line = "TensorQuantizer(8bit fake {} calibrator=MaxCalibrator(track_amax=False) quant)"
    assert repr(quantizer_with(2.64)) == line.format("per-tensor amax=2.6400")
    weight = quantizer_with(torch.linspace(0, 0.7817, 64).reshape(64, 1, 1, 1), axis=0)
    assert repr(weight) == line.format("axis=(0) amax=[0.0000, 0.7817](64)")


def test_prints_what_differs():
    assert repr(TensorQuantizer(disabled=True)) == "TensorQuantizer(disabled)"
    desc = QuantDescriptor(num_bits=4, unsigned=True, axis=(0, 1), fake_quant=False, calib_method="histogram", num_bins=64)
    quantizer = TensorQuantizer(desc, if_quant=False, if_calib=True)
    quantizer.frozen = True
    calibrator = "calibrator=HistogramCalibrator(num_bins=64)"
    assert repr(quantizer) == f"TensorQuantizer(4bit unsigned int axis=(0, 1) amax=None {calibrator} calib frozen)"


# How it travels


def full(amax=((1.5,), (2.5,))):
    quantizer = quantizer_with(torch.tensor(amax), axis=0)
    quantizer.pre_quant_scale = torch.tensor([0.5, 2.0, 1.0])
    return quantizer


@pytest.mark.parametrize("before", [None, 1.0, [[1.0]] * 2], ids=["none", "another shape", "same shape"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_creates_amax_with_its_own_shape(assign, before):
    target = TensorQuantizer(PER_ROW)
    target.amax = before
    file = io.BytesIO()
    torch.save(full().state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=assign)
    assert torch.equal(target.amax, full().amax)
    assert torch.equal(target.pre_quant_scale, full().pre_quant_scale)
    x = torch.randn(2, 3)
    assert torch.equal(target(x), full()(x))


def test_a_state_dict_in_half_precision_gives_a_float32_amax():
    target = TensorQuantizer()
    target.load_state_dict({"_amax": torch.tensor(1.5).half()})
    assert target.amax.dtype == torch.float32
    assert target.amax == 1.5


def test_statistics_and_the_absence_of_amax_are_not_in_the_state_dict():
    quantizer = TensorQuantizer(QuantDescriptor(calib_method="histogram"))
    quantizer.calibrator.collect(torch.ones(3))
    assert not quantizer.state_dict()
    TensorQuantizer().load_state_dict({}, strict=True)


def test_a_loaded_amax_is_its_own():
    state = full().state_dict()
    target = TensorQuantizer(PER_ROW)
    target.load_state_dict(state)
    state["_amax"].fill_(9)
    assert target.amax.tolist() == [[1.5], [2.5]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_a_copy_lives_by_itself(copied):
    original = full()
    original.frozen, original.dynamic = True, False
    original.calibrator.collect(torch.ones(2, 3))
    twin = copied(original)
    assert repr(twin) == repr(original)
    assert (twin.frozen, twin.dynamic, twin.quant_desc) == (True, False, original.quant_desc)
    twin.frozen = False
    twin.amax = [[7.0], [8.0]]
    twin.calibrator.collect(9 * torch.ones(2, 3))
    assert original.amax.tolist() == [[1.5], [2.5]]
    assert original.calibrator.compute_amax().tolist() == [[1], [1]]
    assert twin.calibrator.compute_amax().tolist() == [[9], [9]]


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, half)": lambda m: m.to("cpu", torch.float16),
    "type": lambda m: m.type(torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_scales_and_statistics_keep_their_dtype_under_a_cast(cast):
    quantizer = TensorQuantizer(QuantDescriptor(calib_method="histogram"))
    quantizer.amax = quantizer.pre_quant_scale = torch.tensor(1 + 2**-20)
    quantizer.calibrator.collect(torch.tensor([1 + 2**-20]))
    counts = quantizer.calibrator.counts
    CASTS[cast](torch.nn.Sequential(quantizer, torch.nn.Linear(2, 2)))
    for value in (quantizer.amax, quantizer.pre_quant_scale):
        assert value.dtype == torch.float32
        assert value == 1 + 2**-20
    assert torch.equal(quantizer.calibrator.counts, counts)
    assert quantizer.calibrator.compute_amax("max") == 1 + 2**-20
    quantizer.calibrator.reset()
    assert quantizer.calibrator.peak.dtype == torch.float64


def test_moves_to_another_device_with_all_it_has():
    quantizer = full().to("meta")
    devices = {quantizer.amax.device.type, quantizer.pre_quant_scale.device.type, quantizer.calibrator.peak.device.type}
    assert devices == {"meta"}
    assert quantizer.to_empty(device="cpu").amax.shape == (2, 1)
