"""`TensorQuantizer`: what it computes, what it holds, and how it travels."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import lq
from lq.calib import HistogramCalibrator, MaxCalibrator
from lq.descriptor import QuantDescriptor
from lq.functional.amax import compute_amax
from lq.functional.fake_quant import fake_quant, fake_tensor_quant, quantize, scaled_e4m3
from lq.nn import QuantLinear, TensorQuantizer

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
    x = x.abs() if unsigned else x
    amax = compute_amax(x, axis) * 0.6
    args = (amax, num_bits, unsigned, narrow_range)
    fields = {"axis": axis, "num_bits": num_bits, "unsigned": unsigned, "narrow_range": narrow_range}
    assert torch.equal(quantizer_with(amax, **fields)(x), fake_tensor_quant(x, *args))
    assert torch.equal(quantizer_with(amax, fake_quant=False, **fields)(x), quantize(x, *args))


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


def test_the_documented_example_of_four_bits_unsigned_along_an_axis():
    quantizer = TensorQuantizer(QuantDescriptor(num_bits=4, fake_quant=False, axis=(0), unsigned=True))
    torch.manual_seed(12345)
    x = torch.rand(10, 9, 8, 7)
    codes = quantizer(x)
    scale = np.float32(15) / np.abs(x.numpy()).max(axis=(1, 2, 3), keepdims=True)
    np.testing.assert_array_equal(codes.numpy(), np.clip(np.rint(x.numpy() * scale), 0, 15))
    assert (codes.amax((1, 2, 3)) == 15).all()


def test_the_documented_quantizer_of_a_graphs_input():
    x = torch.randn(1, 5, 5, 5, dtype=torch.double)
    quantized = TensorQuantizer(QuantLinear.default_quant_desc_input)(x)
    assert torch.equal(quantized, fake_tensor_quant(x, x.abs().max()))
    assert torch.nn.functional.adaptive_avg_pool2d(quantized, 3).shape == (1, 5, 3, 3)


@pytest.mark.parametrize("axis", [None, 0])
def test_a_float_format_is_a_scaled_cast(axis):
    x = torch.randn(3, 50)
    assert torch.equal(TensorQuantizer(QuantDescriptor(num_bits=(4, 3), axis=axis))(x), scaled_e4m3(x, compute_amax(x, axis)))


def test_integer_codes_get_the_straight_through_gradient():
    x = torch.tensor([-2.0, -0.5, 0.3, 1.0], requires_grad=True)
    quantizer_with(1.0, fake_quant=False)(x).backward(torch.arange(1.0, 5.0))
    assert x.grad.tolist() == [0, 2, 3, 4]


@pytest.mark.parametrize("amax", [None, 1.0])
def test_scale_amax_multiplies(amax):
    quantizer = quantizer_with(amax, scale_amax=0.5)
    x = torch.randn(20)
    used = 0.5 * (x.abs().max() if amax is None else torch.tensor(amax))
    assert torch.equal(quantizer(x), fake_tensor_quant(x, used))
    assert (quantizer.amax, quantizer.scale) == ((None, None) if amax is None else (1.0, torch.tensor(0.5) / 127))


@pytest.mark.parametrize("axis", [None, 0, (0, 1)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_blocks_have_an_amax_of_their_own(dynamic, axis):
    desc = QuantDescriptor(num_bits=4, axis=axis, block_size=4)
    quantizer, x = TensorQuantizer(desc, if_calib=True), torch.randn(2, 3, 12)
    blocks = x.reshape(2, 3, 3, 4)
    kept = {None: (2,), 0: (0, 2), (0, 1): (0, 1, 2)}[axis]
    amax = blocks.abs().amax([d for d in range(4) if d not in kept], keepdim=True)
    expected = fake_tensor_quant(blocks, amax, 4).reshape(x.shape)
    y = quantizer(x)
    if not dynamic:
        quantizer.load_calib_amax()
        assert torch.equal(quantizer.amax, amax)
        y = quantizer(x)
    assert torch.equal(y, expected)


def test_blocks_must_divide_the_last_dimension():
    with pytest.raises(ValueError, match=r"`block_size` is 5, which does not divide the last dimension of \(2, 12\)"):
        TensorQuantizer(QuantDescriptor(block_size=5))(torch.zeros(2, 12))


@pytest.mark.parametrize("fields", [{"amax": 1.0}, {}])
def test_unsigned_refuses_negative_values_in_the_first_batch(fields):
    quantizer = TensorQuantizer(QuantDescriptor(unsigned=True, **fields))
    with pytest.raises(TypeError, match=r"`unsigned` is True, but inputs go down to -0.5"):
        quantizer(torch.tensor([1.0, -0.5]))


def test_later_negative_values_of_an_unsigned_quantizer_are_clipped():
    quantizer = quantizer_with(1.0, unsigned=True)
    quantizer(torch.tensor([0.5]))
    assert quantizer(torch.tensor([-0.5, 1.0])).tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(3,), (4, 1, 1), (2, 4)])
def test_an_amax_that_does_not_fit_the_input_is_named(shape):
    quantizer = quantizer_with(torch.ones(shape), axis=0)
    with pytest.raises(ValueError, match=r"`amax` has shape .* does not broadcast to inputs of shape \(2, 3, 4, 5\)"):
        quantizer(torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_list_of_numbers_goes_along_the_axis(axis):
    x = torch.randn(3, 3, 3)
    quantizer = TensorQuantizer(QuantDescriptor(amax=[1.0, 2.0, 3.0], axis=axis))
    shape = [1, 1, 1]
    shape[axis] = 3
    amax = torch.tensor([1.0, 2.0, 3.0]).reshape(shape)
    assert torch.equal(quantizer(x), fake_tensor_quant(x, amax))
    assert torch.equal(quantizer.amax, amax)


# What it learns


def learning(amax=1.0, **fields):
    return TensorQuantizer(QuantDescriptor(amax=amax, learn_amax=True, **fields))


def test_a_learned_amax_starts_at_that_of_the_descriptor_and_gets_pacts_gradients():
    quantizer = learning()
    x = torch.tensor([-3.0, -0.3, 0.7, 2.0, 5.0], requires_grad=True)
    y = quantizer(x)
    assert torch.equal(y, fake_tensor_quant(x, torch.tensor(1.0)))
    y.backward(torch.arange(1.0, 6.0))
    assert x.grad.tolist() == [0, 2, 3, 0, 0]
    assert {n: p.grad.item() for n, p in quantizer.named_parameters()} == {"clip.clip_value_min": 1, "clip.clip_value_max": 4 + 5}


def test_a_learned_amax_is_the_wider_side_of_the_range():
    quantizer = learning(axis=0, amax=[[1.0], [1.0]])
    with torch.no_grad():
        quantizer.clip.clip_value_max.copy_(torch.tensor([[3.0], [0.5]]))
    x = torch.randn(2, 100) * 3
    clipped = torch.maximum(torch.minimum(x, torch.tensor([[3.0], [0.5]])), torch.tensor([[-1.0], [-1.0]]))
    assert quantizer.amax.tolist() == [[3], [1]]
    assert torch.equal(quantizer(x), fake_tensor_quant(clipped, quantizer.amax))


def test_an_unsigned_range_starts_at_zero_and_learns_its_top_only():
    quantizer = learning(unsigned=True)
    assert [name for name, _ in quantizer.named_parameters()] == ["clip.clip_value_max"]
    assert quantizer(torch.tensor([0.0, 2.0])).tolist() == [0, 1]


def test_learning_starts_from_a_calibrated_amax():
    quantizer = TensorQuantizer(QuantDescriptor(learn_amax=True), if_calib=True)
    with pytest.raises(RuntimeError, match="no amax to start learning from"):
        quantizer.init_learn_amax()
    with pytest.raises(RuntimeError, match="no range to clip to yet"):
        quantizer.enable_clip()
    quantizer(torch.tensor([-2.5, 1.0]))
    quantizer.load_calib_amax()
    assert len(list(quantizer.parameters())) == 2
    quantizer.init_learn_amax()  # as pytorch-quantization's users do; it is learned already
    assert quantizer.amax == 2.5
    assert (quantizer.clip.clip_value_min, quantizer.clip.clip_value_max) == (-2.5, 2.5)
    quantizer.amax = 4.0  # what a calibration finds goes into the parameters
    assert (quantizer.clip.clip_value_min, quantizer.clip.clip_value_max) == (-4, 4)


@pytest.mark.parametrize("call", [TensorQuantizer.init_learn_amax, TensorQuantizer.enable_clip])
def test_without_learn_amax_there_is_nothing_to_learn(call):
    with pytest.raises(RuntimeError, match="`learn_amax` is False"):
        call(quantizer_with(1.0))


def test_the_clip_stage_learns_before_quantization():
    quantizer = learning()
    quantizer.disable_quant()
    x = torch.tensor([-3.0, 0.123, 2.0])
    assert quantizer(x) is x
    quantizer.enable_clip()
    y = quantizer(x)
    assert y.tolist() == [-1, x[1].item(), 1]
    y.sum().backward()
    assert quantizer.clip.clip_value_max.grad == 1
    quantizer.disable_clip()
    assert quantizer(x) is x


def test_frozen_a_range_is_not_learned():
    quantizer = learning()
    quantizer.frozen = True
    assert not any(p.requires_grad for p in quantizer.parameters())
    quantizer.frozen = False
    assert all(p.requires_grad for p in quantizer.parameters())


@pytest.mark.parametrize(("unsigned", "low"), [(False, -1.75), (True, 0)])
def test_learning_starts_from_an_amax_that_was_saved_before_it_was_learned(unsigned, low):
    target = learning(unsigned=unsigned)
    target.load_state_dict({"_amax": torch.tensor(1.75)}, strict=True)
    assert (target.clip.clip_value_min, target.clip.clip_value_max) == (low, 1.75)


def test_a_learned_range_travels_in_the_state_dict():
    source = learning()
    with torch.no_grad():
        source.clip.clip_value_max.fill_(1.75)
    for target in (learning(), TensorQuantizer(QuantDescriptor(learn_amax=True))):
        target.load_state_dict(source.state_dict(), strict=True)
        assert target.amax == 1.75
        assert [n for n, _ in target.named_parameters()] == ["clip.clip_value_min", "clip.clip_value_max"]
    with pytest.raises(RuntimeError, match=r"clip\.clip_value_max"):
        TensorQuantizer().load_state_dict(source.state_dict(), strict=True)


def test_a_fixed_amax_is_not_for_calibration_to_change():
    assert [
        q.fixed for q in (TensorQuantizer(), quantizer_with(1.0), learning(), TensorQuantizer(QuantDescriptor(amax=1.0)))
    ] == [*(False, False, True, True)]


# What it holds


def test_bits_and_sign_can_be_changed_and_statistics_stay():
    quantizer = quantizer_with(1.0, calib_method="histogram")
    quantizer.collect(torch.tensor([0.5, 3.0]))
    quantizer.num_bits = 4
    quantizer.unsigned = True
    assert (quantizer.num_bits, quantizer.unsigned, quantizer.quant_desc.num_bits) == (4, True, 4)
    assert (quantizer.calibrator.num_bits, quantizer.calibrator.unsigned) == (4, True)
    x = torch.rand(20)
    assert torch.equal(quantizer(x), fake_quant(x, torch.tensor(1.0), 4, True, True))
    quantizer.load_calib_amax("max")
    assert quantizer.amax == 3
    with pytest.raises(ValueError, match="`num_bits` is 33"):
        quantizer.num_bits = 33
    assert quantizer.num_bits == 4


def test_step_size_is_the_scale_and_the_calibrator_has_its_old_name():
    quantizer = quantizer_with(12.7)
    assert quantizer.step_size == quantizer.scale == torch.tensor(12.7) / torch.tensor(127.0)
    assert quantizer._calibrator is quantizer.calibrator


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
    assert repr(quantizer) == f"TensorQuantizer(unsigned 4bit int axis=(0, 1) amax=dynamic {calibrator} calib frozen)"
    quantizer.dynamic = False
    assert " amax=None " in repr(quantizer)
    learned = TensorQuantizer(QuantDescriptor(num_bits=(4, 3), amax=2.0, learn_amax=True, scale_amax=0.5), if_clip=True)
    assert repr(learned) == (
        "TensorQuantizer((4, 3)bit fake per-tensor amax=2.0000*0.5 learned calibrator=MaxCalibrator(track_amax=False) quant clip)"
    )
    assert "axis=(0) block_size=4 amax=dynamic" in repr(TensorQuantizer(QuantDescriptor(axis=0, block_size=4)))


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


@pytest.mark.parametrize("learn", [False, True])
def test_a_float_checkpoint_need_not_have_an_amax_that_the_descriptor_gives(learn):
    desc = QuantDescriptor(amax=2.0, learn_amax=learn)
    layer = QuantLinear(3, 2, quant_desc_input=desc)
    layer.load_state_dict(torch.nn.Linear(3, 2).state_dict(), strict=True)
    assert layer.input_quantizer.amax == 2
    layer.input_quantizer.amax = 3.0
    fresh = QuantLinear(3, 2, quant_desc_input=desc)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert fresh.input_quantizer.amax == 3


def test_a_learned_amax_of_channels_takes_the_place_of_the_channels():
    x = torch.full((2, 2), 5.0)
    learned, fixed = (TensorQuantizer(QuantDescriptor(axis=0, amax=[1.0, 2.0], learn_amax=learn)) for learn in (True, False))
    assert learned(x).tolist() == fixed(x).tolist() == [[1, 1], [2, 2]]
    assert learned.clip.clip_value_max.shape == (2, 1)
    learned(x).sum().backward()
    assert learned.clip.clip_value_max.grad.tolist() == [[2], [2]]


def test_a_learned_range_is_not_scaled_so_that_it_goes_on_learning():
    quantizer = learning(scale_amax=0.5)
    quantizer(torch.tensor([3.0, 0.2, -3.0])).sum().backward()
    assert quantizer.clipping == 1
    assert [p.grad.item() for p in quantizer.parameters()] == [1, 1]


def test_the_sides_of_a_learned_range_stay():
    with pytest.raises(RuntimeError, match="`unsigned` decides which sides"):
        learning().unsigned = True


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("amax", [None, 1.0])
def test_a_learned_range_of_pytorch_quantization_loads(amax, unsigned):
    # it has the fixed amax beside both sides of the learned range
    theirs = {"_amax": torch.tensor(2.0), "clip.clip_value_min": torch.tensor(-1.0), "clip.clip_value_max": torch.tensor(1.5)}
    quantizer = TensorQuantizer(QuantDescriptor(learn_amax=True, amax=amax, unsigned=unsigned))
    quantizer.load_state_dict(theirs, strict=True)
    assert quantizer.amax == 1.5
    assert quantizer(torch.tensor([9.0, 0.0])).tolist() == [1.5, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_bad_amax_in_a_state_dict_is_named(bad):
    model = torch.nn.ModuleDict({"conv": TensorQuantizer(), "set": TensorQuantizer()})
    model["set"].amax = 2.0
    with pytest.raises(RuntimeError, match=r"`set\._amax` is negative or not finite: calibrate this layer"):
        model.load_state_dict({"set._amax": torch.tensor(bad)})
    assert model["set"].amax == 2
    del model["set"]
    with pytest.raises(RuntimeError, match=r"`conv\._amax` is negative or not finite: calibrate this layer"):
        model.load_state_dict({"conv._amax": torch.tensor(bad)})


def test_narrow_range_can_be_set():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.27, fake_quant=False))
    assert quantizer(torch.tensor([-9.0])) == -127
    quantizer.narrow_range = False
    assert quantizer(torch.tensor([-9.0])) == -128
    assert not quantizer.narrow_range


def test_a_calibrator_of_ones_own_by_the_old_name_or_the_new():
    for name in ("_calibrator", "calibrator"):
        quantizer, mine = TensorQuantizer(), HistogramCalibrator()
        setattr(quantizer, name, mine)
        assert quantizer.calibrator is quantizer._calibrator is mine


def test_unsigned_data_below_zero_is_refused_when_amax_is_loaded():
    for calib_method in ("max", "histogram"):
        quantizer = TensorQuantizer(QuantDescriptor(unsigned=True, calib_method=calib_method), if_quant=False, if_calib=True)
        quantizer(torch.tensor([-3.0, 1.0]))
        with pytest.raises(ValueError, match="`unsigned` is True, but data went down to -3"):
            quantizer.load_calib_amax()


def test_arguments_of_another_type_are_refused():
    with pytest.raises(TypeError, match="`quant_desc` is 'int8': it must be a QuantDescriptor"):
        TensorQuantizer("int8")
    with pytest.raises(TypeError, match=r"`inputs` are torch.int64: only floating tensors"):
        TensorQuantizer(QuantDescriptor(amax=1.0))(torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_that_half_precision_cannot_hold_are_refused(dtype):
    quantizer = TensorQuantizer(QuantDescriptor(num_bits=13, fake_quant=False, amax=1.0))
    with pytest.raises(ValueError, match=r"`num_bits` is 13, and torch.*float16 has no room for the code 4095"):
        quantizer(torch.ones(2, dtype=dtype))


def test_a_state_dict_that_is_assigned():
    model = lq.quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    with lq.calibrating(model):
        model(torch.randn(8, 4))
    state = model.state_dict()
    with torch.device("meta"):
        built = torch.nn.Sequential(torch.nn.Linear(4, 4))
    lq.quantize_(built).load_state_dict(state, assign=True)
    x = torch.randn(2, 4)
    assert torch.equal(built(x), model(x))
    with lq.calibrating(built):
        built(x)
    assert built[0].input_quantizer.amax == x.abs().max()
    half = {name: value.half() for name, value in state.items()}
    built.load_state_dict(half, assign=True)
    assert built[0].weight.dtype == torch.float16
    assert built[0].input_quantizer.amax.dtype == torch.float32
    assert half["0.input_quantizer._amax"].dtype == torch.float16


def test_a_factor_on_the_input_is_its_own():
    factor = torch.full((4,), 2.0)
    quantizer = TensorQuantizer()
    quantizer.pre_quant_scale = factor
    factor.zero_()
    assert quantizer.pre_quant_scale.tolist() == [2] * 4
    with torch.inference_mode():
        quantizer.pre_quant_scale = torch.full((4,), 3.0)
    x = torch.ones(4, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [3] * 4
