"""Placing quantizers into a model and taking them out again: what changes, and all that must not."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from lq.calibration import calibrating
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, QuantDescriptor, QuantRule
from lq.functional.fake_quant import fake_tensor_quant
from lq.nn import QuantConv2d, QuantLinear, TensorQuantizer
from lq.surgery import dequantize_, freeze_, is_quantized, named_quantizers, quantize_, unfreeze_

FOUR, SIX = QuantDescriptor(num_bits=4), QuantDescriptor(num_bits=6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2), "drop": nn.Dropout(0.5)})
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body["drop"](self.body["conv"](self.stem(x))).mean((2, 3)))


def image():
    return torch.randn(2, 3, 6, 6)


def names(model):
    return [name for name, _ in named_quantizers(model)]


def calibrated(model, x):
    with calibrating(model):
        model(x)
    return model


# Which modules


def test_every_layer_that_it_knows_gets_quantizers():
    model = quantize_(Net())
    layers = ["stem.0", "body.conv", "head"]
    assert names(model) == [f"{layer}.{role}" for layer in layers for role in ("input", "weight")]
    assert (type(model.stem[0]), type(model.body["conv"]), type(model.head)) == (QuantConv2d, QuantConv2d, QuantLinear)
    assert all(q.amax is None and not q.dynamic and not q.frozen for _, q in named_quantizers(model))


def test_it_returns_the_model_itself():
    model = Net()
    assert quantize_(model) is model
    assert dequantize_(model) is model


@pytest.mark.parametrize(
    ("rules", "bits"),
    [
        ([QuantRule("*", FOUR)], {"stem.0": 4, "body.conv": 4, "head": 4}),
        ([QuantRule("*", FOUR), QuantRule("body.*", SIX)], {"stem.0": 4, "body.conv": 6, "head": 4}),
        ([QuantRule("body.*", SIX), QuantRule("*", FOUR)], {"stem.0": 4, "body.conv": 4, "head": 4}),
        ([QuantRule("*", FOUR), QuantRule("head")], {"stem.0": 4, "body.conv": 4}),
        ([QuantRule("*"), QuantRule("s*0", FOUR)], {"stem.0": 4}),
        ([QuantRule("*.conv", FOUR), QuantRule("stem.[0-9]", SIX)], {"stem.0": 6, "body.conv": 4}),
        ([{"pattern": "head", "input": {"num_bits": 4}}], {"head": 4}),
    ],
)
def test_the_last_rule_that_matches_wins(rules, bits):
    model = quantize_(Net(), rules)
    assert {name.removesuffix(".input"): q.num_bits for name, q in named_quantizers(model)} == bits


def test_what_the_rules_leave_out_is_not_touched():
    model = quantize_(Net(), [QuantRule("*", INT8_INPUT, INT8_WEIGHT), QuantRule("head")])
    assert type(model.head) is nn.Linear
    assert not model.head._modules


@pytest.mark.parametrize(
    ("preset", "roles", "bits"),
    [("int8", 6, {8}), ("int8_per_tensor", 6, {8}), ("int8_weight_only", 3, {8}), ("w4a8", 6, {4, 8}), ("fp8", 6, {(4, 3)})],
)
def test_presets_by_name(preset, roles, bits):
    quantizers = dict(named_quantizers(quantize_(Net(), preset)))
    assert len(quantizers) == roles
    assert {q.num_bits for q in quantizers.values()} == bits
    assert preset == "fp8" or all(q.num_bits == 8 for name, q in quantizers.items() if name.endswith("input"))


def test_w4a16_gives_linear_layers_weights_in_blocks():
    model = quantize_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 6)), "w4a16")
    assert names(model) == ["2.weight"]
    x = torch.randn(2, 3, 8, 8)
    calibrated(model, x)
    weight, amax = model[2].weight.detach(), model[2].weight_quantizer.amax
    blocks = weight.reshape(6, 2, 128)
    assert torch.equal(amax, blocks.abs().amax(2, keepdim=True))
    expected = nn.functional.linear(model[:2](x), fake_tensor_quant(blocks, amax, 4).reshape(6, 256), model[2].bias)
    assert torch.equal(model(x), expected)


def test_blocks_that_do_not_fit_a_weight_are_refused_with_its_name():
    model = nn.Sequential(nn.Linear(256, 200), nn.Linear(200, 6))
    with pytest.raises(ValueError, match=r"`1.weight`: `block_size` is 128, which does not divide"):
        quantize_(model, "w4a16")
    assert not is_quantized(model)


POOLED = [QuantRule("*", FOUR, SIX), QuantRule("*", FOUR, types="MaxPool2d")]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([QuantRule("*", FOUR, SIX)], ["0.input", "0.weight"]),
        ([QuantRule("1", FOUR)], ["1.input"]),
        (POOLED, ["0.input", "0.weight", "1.input"]),
        ([*POOLED, QuantRule("*", types=["Conv2d"])], ["1.input"]),
        ([QuantRule("*", FOUR, types=("MaxPool2d", "AvgPool2d"))], ["1.input", "2.input"]),
    ],
)
def test_pooling_is_quantized_where_a_rule_names_it(rules, expected):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.AvgPool2d(2))
    assert names(quantize_(model, rules)) == expected
    assert [type(m).__name__ for m in dequantize_(model)] == ["Conv2d", "MaxPool2d", "AvgPool2d"]


def test_types_that_match_nothing_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'\*' matches no quantizable layer of types Conv3d, Konv"):
        quantize_(Net(), [QuantRule("*", FOUR, types=["Conv3d", "Konv"])])


def test_descriptors_arrive_by_role():
    model = quantize_(Net(), [QuantRule("*", FOUR, SIX)])
    assert {(n.rpartition(".")[2], q.quant_desc) for n, q in named_quantizers(model)} == {("input", FOUR), ("weight", SIX)}


def test_a_layer_alone_is_a_model_too():
    assert names(quantize_(nn.Linear(2, 2))) == ["input", "weight"]


# Refusals, which leave the model as it was


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([QuantRule("*", FOUR), QuantRule("body.konv", FOUR)], r"'body\.konv' matches no quantizable layer.*body\.conv"),
        ([QuantRule("stem.1", FOUR)], "matches no quantizable layer"),
        ("int3", "'int3': choose a preset among int8"),
        ([QuantRule("*")], "leave every layer in float"),
        ([], "leave every layer in float"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, message):
    model = Net()
    with pytest.raises(ValueError, match=message):
        quantize_(model, rules)
    assert not is_quantized(model)
    assert {type(m).__module__.partition(".")[0] for m in model.modules()} == {"torch", Net.__module__}


def test_a_model_without_quantizable_layers_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no quantizable layer: known are .*Linear.*`lq.nn.register`"):
        quantize_(nn.Sequential(nn.ReLU()))


def test_quantizing_twice_is_refused():
    model = quantize_(Net(), [QuantRule("head", FOUR)])
    with pytest.raises(ValueError, match=r"quantized layers already: call `lq\.dequantize_`"):
        quantize_(model)
    assert names(model) == ["head.input"]


# What must not change


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", ["int8", "int8_weight_only"])
def test_until_it_is_calibrated_the_model_computes_what_it_did(preset, training):
    model = Net().train(training)
    twin = quantize_(copy.deepcopy(model), preset)
    x = image()
    results = []
    for each in (model, twin):
        torch.manual_seed(1)
        y = each(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), each.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_modules_and_parameters_keep_their_identity_and_order():
    model = Net()
    modules, parameters = [id(m) for m in model.modules()], list(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quantize_(model)
    assert [id(m) for m in model.modules() if id(m) in modules] == modules
    for (name, parameter), (other_name, other) in zip(model.named_parameters(), parameters, strict=True):
        assert name == other_name
        assert parameter is other
    assert optimizer.param_groups[0]["params"][0] is model.stem[0].weight


def test_hooks_survive():
    model, calls = Net(), []
    model.head.register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.head.weight.register_hook(lambda g: calls.append("gradient"))
    for each in (quantize_(model), dequantize_(model)):
        calls.clear()
        each(image()).sum().backward()
        assert calls == ["before", "forward", "gradient"]


def test_a_module_at_two_places_is_one_module_with_one_pair_of_quantizers():
    shared = nn.Linear(3, 3)
    model = quantize_(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] is shared
    assert names(model) == ["0.input", "0.weight"]
    calibrated(model, torch.randn(4, 3))
    assert type(dequantize_(model)[2]) is nn.Linear


def test_tied_weights_stay_tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "a": nn.Linear(3, 5), "b": nn.Linear(3, 5)})
    model["a"].weight = model["b"].weight = model["embedding"].weight
    for each in (quantize_(model), dequantize_(model)):
        assert each["a"].weight is each["b"].weight is each["embedding"].weight


def test_modes_and_buffers_stay():
    model = Net()
    model.body.eval()
    before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    quantize_(model)
    dequantize_(model)
    assert [m.training for m in model.modules()] == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_any_dtype_is_quantized_in_its_dtype(dtype):
    model, x = Net().to(dtype).eval(), image().to(dtype)
    calibrated(quantize_(model), x)
    assert model(x).dtype == dtype
    assert {q.amax.dtype for _, q in named_quantizers(model)} == {torch.float32}


def test_quantizers_are_made_on_the_device_of_the_layer():
    model = quantize_(Net().to("meta"))
    assert {q.calibrator.peak.device.type for _, q in named_quantizers(model)} == {"meta"}


# There and back


def test_dequantize_gives_back_classes_state_and_output():
    model, x = Net().eval(), image()
    classes, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    keys, y = list(model.state_dict()), model(x)
    calibrated(quantize_(model), x)
    assert not torch.equal(model(x), y)
    dequantize_(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), y)
    assert names(quantize_(model, [QuantRule("head", FOUR)])) == ["head.input"]


def test_dequantizing_a_float_model_does_nothing():
    model = Net()
    assert [type(m) for m in dequantize_(model).modules()] == [type(m) for m in Net().modules()]


def test_a_quantizer_placed_by_hand_stays():
    model = nn.Sequential(TensorQuantizer(), nn.Linear(2, 2))
    dequantize_(model)
    assert type(model[0]) is TensorQuantizer


# How it travels


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_quantized_model_computes_the_same(copied):
    x = image()
    model = calibrated(quantize_(Net().eval()), x)
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    assert names(twin) == names(model)
    dequantize_(twin)
    assert is_quantized(model)


def test_a_state_dict_brings_a_fresh_model_to_the_same_output():
    x = image()
    model = calibrated(quantize_(Net().eval()), x)
    twin = quantize_(Net().eval())
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin(x), model(x))


# Torch's fused transformer


def encoder(layers):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return (nn.TransformerEncoder(layer, layers) if layers else layer).eval()


def padded():
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    return torch.randn(2, 5, 8), mask


@pytest.mark.parametrize("layers", [0, 2])
def test_a_transformer_in_evaluation_really_calls_its_quantizers(layers, monkeypatch):
    model = quantize_(encoder(layers))
    x, mask = padded()
    calls = []
    # no hooks: with them torch leaves its fused path by itself
    monkeypatch.setattr(TensorQuantizer, "forward", lambda _, inputs: calls.append(1) or inputs)
    with torch.no_grad():
        model(x, src_key_padding_mask=mask)
    assert len(calls) == 4 * max(layers, 1)


@pytest.mark.parametrize("layers", [0, 2])
def test_a_transformer_is_calibrated_and_comes_back_with_its_fused_path(layers):
    model, (x, mask) = encoder(layers), padded()
    before = {id(m): dict(vars(m)) for m in model.modules()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, says torch
        y = model(x, src_key_padding_mask=mask)
        quantize_(model)
        with calibrating(model):
            model(x, src_key_padding_mask=mask)
        assert not torch.equal(model(x, src_key_padding_mask=mask), y)
        dequantize_(model)
        assert torch.equal(model(x, src_key_padding_mask=mask), y)
    for module in model.modules():
        assert vars(module).keys() == before[id(module)].keys()
        for switch in ("activation_relu_or_gelu", "use_nested_tensor"):
            assert getattr(module, switch, None) == before[id(module)].get(switch)


def test_float_transformers_keep_their_fused_path():
    model = nn.ModuleDict({"encoder": encoder(2), "head": nn.Linear(8, 2)})
    quantize_(model, [QuantRule("head", FOUR)])
    assert model["encoder"].use_nested_tensor
    assert model["encoder"].layers[0].activation_relu_or_gelu == 1


# Freezing


def test_freeze_and_unfreeze_reach_every_quantizer():
    model = calibrated(quantize_(Net()), image())
    assert freeze_(model) is model
    assert all(q.frozen for _, q in named_quantizers(model))
    with pytest.raises(RuntimeError, match="frozen"):
        model.head.input_quantizer.amax = 1.0
    assert unfreeze_(model) is model
    assert not any(q.frozen for _, q in named_quantizers(model))
    model.head.input_quantizer.amax = 1.0


def test_the_calibrated_model_quantizes_input_and_weight():
    x = image()[:, :, 0, 0]
    model = calibrated(quantize_(nn.Sequential(nn.Linear(3, 2, bias=False))), x)
    weight = model[0].weight
    rows = weight.abs().amax(1, keepdim=True)
    expected = fake_tensor_quant(x, x.abs().max(), narrow_range=False) @ fake_tensor_quant(weight, rows).T
    torch.testing.assert_close(model(x), expected)


class Scaled(nn.Linear):
    """A subclass with a forward of its own, which no quantized class knows."""

    def forward(self, x):
        return super().forward(2 * x)


def with_unknown():
    return nn.ModuleDict({"gru": nn.GRU(4, 4), "scaled": Scaled(4, 4), "fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})


def test_layers_without_a_quantized_class_are_named():
    with pytest.warns(UserWarning, match=r"having no quantized class: `gru` \(GRU\), `scaled` \(Scaled\)\.") as caught:
        model = quantize_(with_unknown())
    assert [name for name, _ in named_quantizers(model)] == ["fc.input", "fc.weight"]
    assert caught[0].filename == __file__
    parametrized = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"`0` \(ParametrizedLinear\)\."):
        quantize_(parametrized)


ALL = QuantRule("*", INT8_INPUT, INT8_WEIGHT)


@pytest.mark.parametrize(
    "rules",
    [
        [ALL, QuantRule("gru"), QuantRule("scaled")],
        [ALL, QuantRule("[gs]*")],
        [ALL, QuantRule("*", types=("GRU", "Scaled"))],
        [QuantRule("fc", INT8_INPUT, INT8_WEIGHT)],
    ],
    ids=["names", "pattern", "types", "another layer"],
)
def test_layers_that_the_rules_leave_out_are_not_named(rules):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = quantize_(with_unknown(), rules)
    assert [name for name, _ in named_quantizers(model)] == ["fc.input", "fc.weight"]


def test_a_rule_for_a_layer_without_a_quantized_class_is_refused():
    with pytest.raises(ValueError, match="'gru' matches no quantizable layer"):
        quantize_(with_unknown(), [ALL, QuantRule("gru", INT8_INPUT, INT8_WEIGHT)])


def test_freezing_reaches_what_is_disabled():
    model = quantize_(nn.Sequential(nn.Linear(4, 4)))
    model[0].input_quantizer.disable()
    freeze_(model)
    model[0].input_quantizer.enable()
    assert model[0].input_quantizer.frozen
    model[0].input_quantizer.disable()
    unfreeze_(model)
    assert not model[0].input_quantizer.frozen


def test_blocks_that_do_not_fit_a_recurrent_weight_are_refused_with_its_name():
    model = nn.ModuleDict({"fc": nn.Linear(32, 32), "rnn": nn.LSTM(40, 8)})
    with pytest.raises(ValueError, match=r"`rnn\.weight_ih_l0`: `block_size` is 32"):
        quantize_(model, [QuantRule("*", None, QuantDescriptor(4, axis=0, block_size=32))])
    assert [type(m) for m in model.values()] == [nn.Linear, nn.LSTM]
