"""`calibrating` and its parts: what becomes of amax, and all that stays as it was."""

import copy

import pytest
import torch
from torch import nn

from lq.calib import HistogramCalibrator, read_statistics, save_statistics
from lq.calibration import calibrating, load_calib_amax_, merge_statistics_, observe_
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, QuantDescriptor, QuantRule
from lq.functional.amax import compute_amax
from lq.nn import TensorQuantizer
from lq.surgery import freeze_, named_quantizers, quantize_, unfreeze_

HISTOGRAM_METHODS = [
    ("percentile", {"percentile": 99.0}),
    ("percentile", {}),
    ("mse", {}),
    ("mse", {"start_bin": 500, "stride": 7}),
    ("entropy", {}),
]
METHODS = [("max", {}), *HISTOGRAM_METHODS]


def network():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 2)]
    return nn.Sequential(*layers)


def batches(n=3, scale=1.0):
    return list(torch.randn(n, 5, 3, 6, 6) * scale)


def amaxs(model):
    return {name: None if q.amax is None else q.amax.clone() for name, q in named_quantizers(model)}


def same(a, b):
    assert a.keys() == b.keys()
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def calibrated(model, data, method="max", **options):
    with calibrating(model, method, **options):
        for batch in data:
            model(batch)
    return model


# What becomes of amax


def test_max_is_that_of_all_inputs_and_of_the_weights():
    model, data, inputs = quantize_(network()), batches(), []
    model[5].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    calibrated(model, data)
    expected = {
        "0.input": torch.stack(data).abs().max(),
        "0.weight": compute_amax(model[0].weight, 0),
        "5.input": torch.stack(inputs).abs().max(),
        "5.weight": compute_amax(model[5].weight, 0),
    }
    assert same(amaxs(model), expected)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_the_split_of_the_data_does_not_matter(method, options):
    model = quantize_(network())
    data = batches(4)
    whole = amaxs(calibrated(copy.deepcopy(model), [torch.cat(data)], method, **options))
    parts = amaxs(calibrated(copy.deepcopy(model), torch.cat(data)[torch.randperm(20)].split([1, 12, 7]), method, **options))
    # what a convolution computes may differ in the last bit from one batch size to another
    assert torch.equal(whole["0.input"], parts["0.input"])
    torch.testing.assert_close(whole["5.input"], parts["5.input"], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_another_method_from_the_same_statistics_is_a_calibration_afresh(method, options):
    model, data = quantize_(network()), batches()
    afresh = calibrated(copy.deepcopy(model), data, method, **options)
    assert load_calib_amax_(calibrated(model, data, "percentile", percentile=50.0), method, **options) is model
    assert same(amaxs(model), amaxs(afresh))


def test_calibrating_again_forgets_the_first_time():
    model = quantize_(network())
    large, small = batches(scale=100.0), batches()
    twice = calibrated(calibrated(copy.deepcopy(model), large, "entropy"), small, "mse")
    assert same(amaxs(twice), amaxs(calibrated(model, small, "mse")))


def test_weights_follow_the_calibrator_of_their_descriptor():
    rules = [QuantRule("0", INT8_INPUT, INT8_WEIGHT), QuantRule("5", INT8_INPUT, INT8_WEIGHT.replace(calib_method="histogram"))]
    model = calibrated(quantize_(network(), rules), batches(), "percentile", percentile=50.0)
    assert torch.equal(model[0].weight_quantizer.amax, compute_amax(model[0].weight, 0))
    assert (model[5].weight_quantizer.amax < 0.7 * compute_amax(model[5].weight, 0)).all()


@pytest.mark.parametrize("method", ["mse", "auto"])
def test_a_step_that_is_learned_starts_where_the_method_says(tmp_path, method):
    learned = INT8_WEIGHT.replace(num_bits=2, learn_amax="lsq")
    rules = [QuantRule("0", INT8_INPUT, learned), QuantRule("1", INT8_INPUT, learned.replace(block_size=32))]
    torch.manual_seed(0)
    model = quantize_(nn.Sequential(nn.Linear(2048, 64), nn.Linear(64, 3)), rules)
    calibrated(model, torch.randn(4, 8, 2048), method)
    # three levels for numbers that are uniform lie 2/3 of the largest apart, within what 2048 samples allow
    amax, largest = model[0].weight_quantizer.amax, compute_amax(model[0].weight, 0)
    torch.testing.assert_close(amax, largest * 2 / 3, rtol=0.05, atol=0)
    blocks = compute_amax(model[1].weight.view(3, 2, 32), (0, 1))
    torch.testing.assert_close(model[1].weight_quantizer.amax, blocks * 2 / 3, rtol=0.35, atol=0)
    assert {q.calibrator.method for q in (model[0].weight_quantizer, model[1].weight_quantizer)} == {"mse"}
    # with statistics that are the largest values alone, another method would put the steps there
    assert read_statistics(save_statistics(model, tmp_path / "statistics.safetensors")).keys() == {"0.input", "1.input"}
    alone = quantize_(nn.Sequential(nn.Linear(8, 2)), [QuantRule("*", None, learned)])
    calibrated(alone, torch.randn(1, 4, 8), method)
    assert read_statistics(save_statistics(alone, tmp_path / "none.safetensors")) == {}


def test_weight_only_needs_no_histogram_and_one_forward():
    model = calibrated(quantize_(network(), "int8_weight_only"), batches(1), "mse")
    assert torch.equal(model[0].weight_quantizer.amax, compute_amax(model[0].weight, 0))


def test_a_quantizer_placed_by_hand_is_calibrated_too():
    model = nn.Sequential(TensorQuantizer(), nn.ReLU())
    calibrated(model, [torch.tensor([1.0, -3.0])])
    assert model[0].amax == 3


@pytest.mark.parametrize("momentum", [0.0, 0.25])
def test_momentum_is_the_share_of_the_present_amax_that_stays(momentum):
    model = nn.Sequential(TensorQuantizer())
    model[0].amax = 8.0
    observe_(model)
    model(torch.tensor([4.0]))
    load_calib_amax_(merge_statistics_(model), momentum=momentum)
    assert model[0].amax == 4 + momentum * 4


def test_momentum_outside_its_range():
    with pytest.raises(ValueError, match=r"momentum.*1\.5"):
        load_calib_amax_(calibrated(quantize_(network()), batches()), momentum=1.5)


def test_the_amax_of_a_descriptor_stays():
    rules = [QuantRule("*", QuantDescriptor(amax=6.0), QuantDescriptor(axis=0))]
    model = calibrated(quantize_(network(), rules), batches())
    assert model[0].input_quantizer.amax == 6
    assert torch.equal(model[0].weight_quantizer.amax, compute_amax(model[0].weight, 0))


# Inside the block


@pytest.mark.parametrize("method", ["max", "mse"])
def test_the_model_computes_in_float_in_evaluation_without_gradients(method):
    floating = network()
    model = calibrated(quantize_(copy.deepcopy(floating)), batches(scale=0.1))
    x = batches(1)[0]
    with calibrating(model, method):
        y = model(x)
        assert not any(m.training for m in model.modules())
    assert not y.requires_grad
    assert torch.equal(y, floating.eval()(x))


def test_between_the_two_halves_quantizers_go_on_quantizing():
    model = calibrated(quantize_(network()).eval(), batches(scale=0.1))
    x = batches(1)[0]
    before = model(x)
    observe_(model)
    assert torch.equal(model(x), before)
    load_calib_amax_(merge_statistics_(model))
    assert model[0].input_quantizer.amax == x.abs().max()
    model(10 * x)
    load_calib_amax_(model)
    assert model[0].input_quantizer.amax == x.abs().max()


def test_the_weight_counts_as_it_is_at_the_end():
    model = observe_(quantize_(nn.Sequential(nn.Linear(2, 2))))
    model(torch.ones(1, 2))
    for factor in (3, 0.1):
        model[0].weight.data.mul_(factor)
        load_calib_amax_(merge_statistics_(model))
        assert torch.equal(model[0].weight_quantizer.amax, compute_amax(model[0].weight, 0))


# What stays as it was


class InterruptionError(Exception):
    pass


@pytest.mark.parametrize("raises", [False, True])
def test_modes_buffers_random_numbers_and_switches_stay(raises):
    model = calibrated(quantize_(network()), batches())
    model.train()
    model[1].eval()
    assert all(q._if_quant for _, q in named_quantizers(model))
    model[0].input_quantizer.disable_quant()
    model[5].weight_quantizer.disable()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [m.training for m in model.modules()]
    switches = [(q._disabled, q._if_quant, q._if_calib) for q in model.modules() if isinstance(q, TensorQuantizer)]
    try:
        with calibrating(model, "mse"):
            model(10 * torch.ones(5, 3, 6, 6))
            if raises:
                raise InterruptionError
    except InterruptionError:
        pass
    else:
        assert not raises
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert [(q._disabled, q._if_quant, q._if_calib) for q in model.modules() if isinstance(q, TensorQuantizer)] == switches
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
    assert changed == ([] if raises else ["0.input_quantizer._amax", "5.input_quantizer._amax"])


def test_an_exception_goes_through_as_it_is():
    model = quantize_(network())
    with pytest.raises(InterruptionError), calibrating(model):
        raise InterruptionError
    assert not any(amax is not None for amax in amaxs(model).values())


def test_frozen_quantizers_take_no_part():
    model = calibrated(quantize_(network()), batches())
    model[0].input_quantizer.frozen = True
    before = amaxs(model)
    calibrated(model, batches(scale=9.0))
    after = amaxs(model)
    assert torch.equal(after["0.input"], before["0.input"])
    assert not torch.equal(after["5.input"], before["5.input"])
    with pytest.raises(ValueError, match=r"`lq\.unfreeze_`"):
        calibrated(freeze_(model), batches())
    assert same(amaxs(model), after)
    calibrated(unfreeze_(model), batches(scale=99.0))
    assert not torch.equal(amaxs(model)["0.input"], after["0.input"])


def test_training_goes_on_after_calibration_in_inference_mode():
    model = quantize_(network())
    with torch.inference_mode():
        calibrated(model, batches(), "percentile")
    model(batches(1)[0]).sum().backward()
    assert model[0].weight.grad.isfinite().all()
    calibrated(model, batches(), "mse")


# Refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_data_that_is_not_finite_names_the_first_quantizer_that_saw_it(value, method):
    model = calibrated(quantize_(network()), batches())
    before, (x,) = amaxs(model), batches(1)
    model[4].register_forward_hook(lambda _, __, out: out + value)
    with pytest.raises(ValueError, match=r"NaN or Inf in calibration data, first at `5.input` \(1 of 4 quantizers\)"):
        calibrated(model, [x], method)
    assert same(amaxs(model), before)


def test_a_weight_that_is_not_finite_is_named():
    model = quantize_(network())
    model[0].weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"first at `0\.weight`"):
        calibrated(model, batches())


@pytest.mark.parametrize("calibrated_before", [False, True])
def test_quantizers_that_saw_no_data_are_named(calibrated_before):
    model = quantize_(nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)}))
    if calibrated_before:
        with calibrating(model):
            model["unused"](model["used"](torch.ones(1, 3)))
    before = amaxs(model)
    with pytest.raises(ValueError, match=r"^1 of 4 quantizers saw no calibration data: unused.input\. Run"), calibrating(model):
        model["used"](9 * torch.ones(1, 3))
    assert same(amaxs(model), before)


@pytest.mark.parametrize("call", [calibrating, load_calib_amax_])
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("median", {}, "'median': choose one of max"),
        ("mse", {"bins": 3, "alpha": 1}, "option 'alpha', 'bins': choose among percentile, start_bin, stride, p"),
        ("percentile", {"percentile": 101}, "`percentile` is 101"),
        ("entropy", {"stride": 0}, "`stride` 0"),
    ],
)
def test_mistakes_are_refused_before_the_first_batch(call, method, options, message):
    model = calibrated(quantize_(network()), batches(), "mse")
    before = amaxs(model)
    with pytest.raises(ValueError, match=message), call(model, method, **options):
        pytest.fail("the block was entered")
    assert same(amaxs(model), before)


def test_a_model_without_quantizers_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no quantizers to calibrate: call `lq.quantize_`"):
        calibrated(network(), batches())


def test_without_statistics_there_is_nothing_to_load():
    with pytest.raises(ValueError, match="4 of 4 quantizers saw no calibration data"):
        load_calib_amax_(quantize_(network()))


def test_a_method_that_needs_a_histogram_is_refused_without_one_and_changes_nothing():
    rules = [QuantRule("0", INT8_INPUT.replace(calib_method="histogram"), INT8_WEIGHT), QuantRule("5", INT8_INPUT)]
    model = calibrated(quantize_(network(), rules), batches())
    assert type(model[0].input_quantizer.calibrator) is HistogramCalibrator
    before = amaxs(model)
    with pytest.raises(ValueError, match=r"`5\.input` has no histogram for method 'percentile'"):
        load_calib_amax_(model, "percentile", percentile=50.0)
    assert same(amaxs(model), before)


def test_an_unsigned_quantizer_that_saw_negative_values_is_named():
    model = quantize_(network(), [QuantRule("*", QuantDescriptor(unsigned=True), INT8_WEIGHT)])
    with pytest.raises(ValueError, match=r"`0.input` is unsigned, but saw values down to -.* \(1 of 4 quantizers\)"):
        calibrated(model, batches())
    assert all(q.amax is None for _, q in named_quantizers(model))


def test_an_unsigned_quantizer_behind_a_relu_is_fine():
    relu = nn.Sequential(nn.ReLU(), nn.Linear(4, 2))
    model = calibrated(quantize_(relu, [QuantRule("*", QuantDescriptor(unsigned=True), INT8_WEIGHT)]), [torch.randn(3, 4)])
    assert model[1].input_quantizer.amax > 0


def test_a_learned_amax_is_left_alone():
    model = quantize_(network(), [QuantRule("*", QuantDescriptor(amax=0.25, learn_amax=True), INT8_WEIGHT)])
    calibrated(model, batches())
    assert model[0].input_quantizer.amax == 0.25
    assert model[0].weight_quantizer.amax is not None


# Methods by pattern


def test_each_quantizer_may_have_its_own_method():
    methods = {"*": "mse", "5.*": "max", "*.input": "percentile", "5.input": "mae"}
    model = calibrated(quantize_(network()), data := batches(), methods, percentile=90.0)
    for name, method in (("0.input", "percentile"), ("5.input", "mae")):
        alone = calibrated(
            quantize_(copy.deepcopy(network_of(model))), data, method, **({"percentile": 90.0} if name == "0.input" else {})
        )
        assert torch.equal(amaxs(model)[name], amaxs(alone)[name])
    assert torch.equal(model[5].weight_quantizer.amax, compute_amax(model[5].weight, 0))


def test_a_method_may_have_options_of_its_own():
    data, methods = batches(), {"*": {"method": "percentile", "percentile": 60.0}, "5.input": "percentile"}
    model = calibrated(quantize_(network()), data, methods, percentile=90.0)
    for name, share in (("0.input", 60.0), ("5.input", 90.0)):
        alone = calibrated(quantize_(network_of(model)), data, "percentile", percentile=share)
        assert torch.equal(amaxs(model)[name], amaxs(alone)[name])


def network_of(model):
    layers = network()
    state = {k: v for k, v in model.state_dict().items() if "quantizer" not in k}
    layers.load_state_dict(state)
    return layers


def test_another_mapping_needs_no_data():
    model = calibrated(quantize_(network()), batches(), "mse")
    before = amaxs(model)
    load_calib_amax_(model, {"*": "mse", "0.input": "percentile"}, percentile=50.0)
    after = amaxs(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["0.input"]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"*": "mse", "head.*": "max"}, r"'head\.\*', which matches no quantizer: known are 0.input"),
        ({"0.*": "mse"}, r"says nothing about `5.input` \(2 quantizers\)"),
        ({"*": "median"}, "`method` is 'median'"),
        ({"*": {"method": "median"}}, "`method` is 'median'"),
        ({"*": {"p": 3}}, "`method` has {'p': 3}, without a method"),
        ({"*": {"method": "lp", "power": 3}}, "Unknown calibration option 'power'"),
        ({"*": {"method": "lp", "p": 0}}, "`p` is 0: it must be above 0"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(method, message):
    with pytest.raises(ValueError, match=message):
        calibrated(quantize_(network()), batches(), method)


def test_all_quantizers_together_give_what_each_gives_alone():
    rules = [
        QuantRule("*", INT8_INPUT, INT8_WEIGHT.replace(calib_method="histogram")),
        QuantRule("5", INT8_INPUT.replace(num_bits=4)),
    ]
    for method in ("mse", "entropy", "lp"):
        model = calibrated(quantize_(network(), rules), batches(), method)
        for name, quantizer in named_quantizers(model):
            assert torch.equal(quantizer.amax, quantizer.calibrator.compute_amax(method)), (name, method)
