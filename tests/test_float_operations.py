"""Which products run in float: by function, by module, and what counts as quantized."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from lq.calibration import calibrating
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, PRESETS, QuantRule
from lq.nn import (
    QuantConv2d,
    QuantLinear,
    QuantLSTM,
    QuantLSTMCell,
    QuantMatmul,
    QuantMultiheadAttention,
    QuantScaledDotProductAttention,
    TensorQuantizer,
)
from lq.surgery import FloatOperation, float_operations, named_quantizers, quantize_

# of torch: slow paths, old functions
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

X = torch.randn(2, 3, 4)
IMAGE = torch.randn(2, 3, 8, 8)


class Call(nn.Module):
    """A forward that is a function, and what it needs as attributes."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape))


def uncalibrated():
    """A quantizer as :func:`quantize_` places it: it returns the very tensor that it takes."""
    quantizer = TensorQuantizer()
    quantizer.dynamic = False
    return quantizer


def listed(model, *args, **kwargs):
    return [str(operation) for operation in float_operations(model, args, kwargs)]


def hooks(model):
    return [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]


# What multiplies

PRODUCTS = {
    "linear": (lambda m, x: F.linear(x, m.w), {"w": weight(5, 4)}, X),
    "conv2d": (lambda m, x: F.conv2d(x, m.w, padding=1), {"w": weight(5, 3, 3, 3)}, IMAGE),
    "conv1d": (lambda m, x: torch.conv1d(x, weight=m.w, bias=m.b), {"w": weight(5, 3, 3), "b": weight(5)}, X),
    "conv3d": (lambda m, x: F.conv3d(x[None], m.w), {"w": weight(5, 2, 1, 1, 1)}, IMAGE),
    "conv_transpose2d": (lambda m, x: F.conv_transpose2d(x, m.w), {"w": weight(3, 5, 3, 3)}, IMAGE),
    "matmul": (lambda m, x: x @ x.transpose(-2, -1), {}, X),
    "mm": (lambda m, x: torch.mm(x[0], x[1].t()), {}, X),
    "bmm": (lambda m, x: torch.bmm(x, x.mT), {}, X),
    "addmm": (lambda m, x: torch.addmm(m.b, x[0], m.w), {"b": weight(5), "w": weight(4, 5)}, X),
    "baddbmm": (lambda m, x: torch.zeros(2, 3, 3).baddbmm_(x, x.mT), {}, X),
    "addbmm": (lambda m, x: torch.addbmm(m.b, x, x.mT), {"b": weight(3, 3)}, X),
    "einsum": (lambda m, x: torch.einsum("bij,bkj->bik", x, x), {}, X),
    "conv_transpose1d": (lambda m, x: F.conv_transpose1d(x, m.w), {"w": weight(3, 5, 3)}, X),
    "conv_transpose3d": (lambda m, x: F.conv_transpose3d(x[None], m.w), {"w": weight(2, 5, 1, 1, 1)}, IMAGE),
    "mv": (lambda m, x: x[0].mv(x[1, 0]), {}, X),
    "addmv": (lambda m, x: torch.addmv(m.b, x[0], x[1, 0]), {"b": weight(3)}, X),
    "inner": (lambda m, x: torch.inner(x, x), {}, X),
    "linalg_matmul": (lambda m, x: torch.linalg.matmul(x, x.mT), {}, X),
    "linalg_multi_dot": (lambda m, x: torch.linalg.multi_dot([x[0], m.w, m.w]), {"w": weight(4, 4)}, X),
    "chain_matmul": (lambda m, x: torch.chain_matmul(x[0], m.w), {"w": weight(4, 4)}, X),
    "rmatmul": (lambda m, x: x[0].__rmatmul__(x[1].t()), {}, X),
    "grouped_mm": (lambda m, x: torch._grouped_mm(x, x.mT), {}, torch.randn(2, 8, 8, dtype=torch.bfloat16)),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, 1), {"w": weight(4, 5)}, X),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.w), {"w": weight(5, 4, 4)}, X),
    "scaled_dot_product_attention": (lambda m, x: F.scaled_dot_product_attention(x, x, x), {}, X),
    "lstm": (lambda m, x: m.rnn(x)[0], {"rnn": nn.LSTM(4, 5, num_layers=2)}, X),
    "gru": (lambda m, x: m.rnn(x)[0], {"rnn": nn.GRU(4, 5)}, X),
    "rnn_tanh": (lambda m, x: m.rnn(x)[0], {"rnn": nn.RNN(4, 5)}, X),
    "rnn_relu": (lambda m, x: m.rnn(x)[0], {"rnn": nn.RNN(4, 5, nonlinearity="relu")}, X),
    "gru_cell": (lambda m, x: m.rnn(x[0]), {"rnn": nn.GRUCell(4, 5)}, X),
    "rnn_tanh_cell": (lambda m, x: m.rnn(x[0]), {"rnn": nn.RNNCell(4, 5)}, X),
    "rnn_relu_cell": (lambda m, x: m.rnn(x[0]), {"rnn": nn.RNNCell(4, 5, nonlinearity="relu")}, X),
    "lstm_cell": (lambda m, x: m.rnn(x[0])[0], {"rnn": nn.LSTMCell(4, 5)}, X),
    "multi_head_attention_forward": (lambda m, x: m.attn(x, x, x)[0], {"attn": nn.MultiheadAttention(4, 2)}, X),
    "flex_attention": (lambda m, x: flex_attention(x, x, x), {}, torch.randn(1, 2, 128, 16)),
    "convolution.default": (
        lambda m, x: torch.ops.aten.convolution.default(x, m.w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        {"w": weight(5, 3, 3, 3)},
        IMAGE,
    ),
    "mm.default": (lambda m, x: torch.ops.aten.mm.default(x[0], x[1].t()), {}, X),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_in_float_is_listed_once(name):
    function, attributes, x = PRODUCTS[name]
    model = Call(function, **attributes)
    (child,) = [n for n, _ in model.named_children()] or ["Call"]
    (operation,) = float_operations(model, x)
    assert str(operation) == f"{child}: 1 x {name.removesuffix('.default')}"
    assert operation.operands[0] == "float"


def test_functions_without_products_are_not_listed():
    assert listed(Call(lambda m, x: torch.einsum("bij->bi", F.softmax(F.layer_norm(x, (4,)) * x + x, -1))), X) == []


def test_fields():
    model = nn.Sequential(Call(lambda m, x: F.linear(x, m.w), w=weight(5, 4)))
    assert float_operations(model, X) == [FloatOperation("0", "linear", ("float", "weight"), 1)]


# Quantized layers, and those that are not


def test_quantized_layers_show_nothing_before_and_after_calibration():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 9 * 9, 5),
    )
    assert listed(model, IMAGE) == ["0: 1 x conv2d", "3: 1 x conv_transpose2d", "5: 1 x linear"]
    quantize_(model)
    assert listed(model, IMAGE) == []
    with calibrating(model):
        model(IMAGE)
    assert listed(model, IMAGE) == []


def test_layers_that_a_rule_leaves_in_float_are_listed():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Linear(192, 5))
    quantize_(model, [QuantRule("*", input=INT8_INPUT, weight=INT8_WEIGHT), QuantRule("1"), QuantRule("3")])
    assert listed(model, IMAGE) == ["1: 1 x conv2d", "3: 1 x linear"]


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_layer_whose_weight_alone_or_input_alone_is_quantized_was_chosen(calibrated):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantize_(model, [QuantRule("0", weight=INT8_WEIGHT), QuantRule("1", input=INT8_INPUT)])
    if calibrated:
        with calibrating(model):
            model(X)
    assert listed(model, X) == []


def test_attention_between_quantized_layers_is_listed():
    def attention(m, x):
        q, k, v = m.qkv(x).view(2, 3, 3, 4).permute(2, 0, 1, 3)
        return m.out((q @ k.transpose(-2, -1)).softmax(-1) @ v)

    model = nn.Sequential(nn.Linear(4, 4), Call(attention, qkv=nn.Linear(4, 12), out=nn.Linear(4, 4)))
    assert listed(quantize_(nn.ModuleDict({"layers": model}))["layers"], X) == ["1: 2 x matmul"]


def test_attention_that_a_rule_leaves_in_float_is_listed():
    def encoder():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)

    assert listed(quantize_(encoder()), X) == []
    model = quantize_(encoder(), [*PRESETS["int8"], QuantRule("*.self_attn*")])
    name = "multi_head_attention_forward"
    assert listed(model, X) == [f"layers.0.self_attn: 1 x {name}", f"layers.1.self_attn: 1 x {name}"]


QUANTIZED = {
    "attention": (QuantMultiheadAttention(4, 2), (X, X, X)),
    "cross attention": (QuantMultiheadAttention(4, 2, add_bias_kv=True, add_zero_attn=True), (X, X.clone(), X.clone())),
    "lstm": (QuantLSTM(4, 5, num_layers=2, bidirectional=True, proj_size=2), (X,)),
    "lstm cell": (QuantLSTMCell(4, 5), (X[0],)),
    "matmul": (QuantMatmul(), (X, X.mT)),
    "scaled_dot_product_attention": (QuantScaledDotProductAttention(), (X, X, X)),
    "padded convolution": (QuantConv2d(3, 4, 3, padding=1, padding_mode="reflect"), (IMAGE,)),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_modules_with_quantizers_inside_show_nothing(name):
    model, inputs = copy.deepcopy(QUANTIZED[name])
    assert listed(model, *inputs) == []
    for _, quantizer in named_quantizers(model):
        quantizer.dynamic = False
    assert listed(model, *inputs) == []
    for _, quantizer in named_quantizers(model):
        quantizer.disable()
    assert listed(model, *inputs)


def test_a_module_that_waits_for_calibration_may_be_called_twice():
    lstm = QuantLSTM(4, 4)
    for quantizer in lstm.quantizers().values():
        quantizer.dynamic = False
    assert listed(Call(lambda m, x: m.lstm(m.lstm(x)[0])[0], lstm=lstm), X) == []


def test_a_fused_kernel_is_listed_whatever_it_takes():
    model = Call(
        lambda m, x: m.rnn(m.quantizer(x), m.quantizer(torch.zeros(1, 3, 5))), rnn=nn.GRU(4, 5), quantizer=TensorQuantizer()
    )
    assert listed(model, X) == ["rnn: 1 x gru (quantized, quantized)"]


# Quantizers in a forward


def with_an_item(q):
    whole = q.clone()
    whole[0] = q[1]
    return whole


MOVED = {
    "as it is": lambda q: q,
    "view": lambda q: q.view(6, 4),
    "reshape": lambda q: q.reshape(-1, 4),
    "flatten": lambda q: q.flatten(0, 1),
    "unflatten": lambda q: q.unflatten(0, (2, 1)),
    "squeeze": lambda q: q[:1].squeeze(0),
    "unsqueeze": lambda q: q.unsqueeze(0),
    "contiguous": lambda q: q.contiguous(),
    "clone": lambda q: q.clone(),
    "detach": lambda q: q.detach(),
    "data": lambda q: q.data,
    "transpose": lambda q: q.transpose(0, 1),
    "permute": lambda q: q.permute(1, 0, 2),
    "T": lambda q: q[0].T.T,
    "t": lambda q: q[0].t().t(),
    "mT": lambda q: q.mT.mT,
    "movedim": lambda q: q.movedim(0, 1),
    "swapaxes": lambda q: q.swapaxes(0, 1),
    "pixel_shuffle": lambda q: F.pixel_shuffle(q.view(1, 4, 3, 2), 2),
    "pixel_unshuffle": lambda q: F.pixel_unshuffle(q.view(1, 1, 6, 4), 2).view(6, 4),
    "split": lambda q: q.split(1)[1],
    "chunk": lambda q: q.chunk(2)[1],
    "unbind": lambda q: q.unbind()[1],
    "unpacked": lambda q: next(iter(q)),
    "narrow": lambda q: q.narrow(0, 1, 1),
    "select": lambda q: q.select(0, 1),
    "index": lambda q: q[torch.tensor([1, 0]), 1:],
    "index_select": lambda q: q.index_select(0, torch.tensor([1])),
    "gather": lambda q: q.gather(0, torch.ones(1, 3, 4, dtype=torch.int64)),
    "unfold": lambda q: q.unfold(-1, 4, 1).squeeze(-2),
    "cat": lambda q: torch.cat([q, q]),
    "concat": lambda q: torch.concat([q, q]),
    "stack": lambda q: torch.stack([q, q]),
    "where": lambda q: torch.where(q > 0, q, q),
    "an item": with_an_item,
    "pad": lambda q: F.pad(q, (0, 0, 1, 1)),
    "dropout": lambda q: F.dropout(q, 0.5, training=False),
    "expand": lambda q: q[:, None].expand(2, 2, 3, 4),
    "repeat": lambda q: q.repeat(2, 1, 1),
    "repeat_interleave": lambda q: q.repeat_interleave(2, 0),
    "tile": lambda q: q.tile(2, 1, 1),
    "roll": lambda q: q.roll(1, 0),
    "flip": lambda q: q.flip(0),
    "to": lambda q: q.to(torch.float32),
    "float": lambda q: q.float(),
    "half": lambda q: q.half().float(),
    "bfloat16": lambda q: q.bfloat16().float(),
}


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("move", MOVED.values(), ids=MOVED)
def test_a_quantized_tensor_that_is_moved_is_quantized(move, calibrated):
    quantizer = uncalibrated()
    if calibrated:
        quantizer.amax = 3.0
    assert listed(Call(lambda m, x: F.linear(move(m.q(x)), m.w), q=quantizer, w=weight(5, 4)), X) == []
    assert listed(Call(lambda m, x: move(m.q(x)) @ m.q(x[0]).t(), q=quantizer), X) == []
    assert listed(Call(lambda m, x: F.linear(move(x), m.w), q=quantizer, w=weight(5, 4)), X) == ["Call: 1 x linear"]


CHANGED = {
    "another value": lambda q, x: q + 1,
    "in place": lambda q, x: q.mul_(0.3),
    "partly in float": lambda q, x: torch.cat([q, x]),
    "the tensor that was quantized": lambda q, x: x,
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_tensor_that_is_not_out_of_a_quantizer_is_float(change):
    model = Call(lambda m, x: F.linear(change(m.q(x), x), m.w), q=uncalibrated(), w=weight(5, 4))
    assert listed(model, X.clone()) == ["Call: 1 x linear"]


def test_an_item_in_float_makes_the_whole_float():
    def forward(m, x):
        quantized = m.q(x).clone()
        quantized[0] = x[0]
        return F.linear(quantized, m.w)

    assert listed(Call(forward, q=uncalibrated(), w=weight(5, 4)), X) == ["Call: 1 x linear"]


def test_a_disabled_quantizer_is_none():
    quantizer = TensorQuantizer()
    model = Call(lambda m, x: m.q(x) @ m.q(x).mT, q=quantizer)
    assert listed(model, X) == []
    quantizer.disable()
    assert listed(model, X) == ["Call: 1 x matmul"]


def test_half_a_product_of_data_is_float_and_says_which_half():
    assert listed(Call(lambda m, x: m.q(x) @ x.mT, q=TensorQuantizer()), X) == ["Call: 1 x matmul (quantized, float)"]


def test_a_bias_or_mask_is_no_factor():
    model = Call(
        lambda m, x: (
            torch.baddbmm(x @ m.w.mT, m.q(x), m.q(x).mT),
            F.scaled_dot_product_attention(m.q(x), m.q(x), m.q(x), attn_mask=x[..., :3]),
        ),
        q=TensorQuantizer(),
        w=weight(3, 4),
    )
    assert listed(model, X) == ["Call: 1 x matmul"]


def test_what_is_made_of_weights_alone_is_no_data():
    model = Call(lambda m, x: F.linear(m.q(x), m.basis @ m.b), q=TensorQuantizer(), b=weight(2, 4))
    model.register_buffer("basis", torch.randn(5, 2))
    assert listed(model, X) == []
    weight_only = Call(lambda m, x: F.linear(x, m.q(m.a * 2).view(5, 4)), q=uncalibrated(), a=weight(5, 4))
    assert listed(weight_only, X) == []


def test_rows_of_a_table_that_data_chooses_are_data():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5))
    assert listed(model, torch.tensor([1, 2])) == ["1: 1 x linear"]


def test_noise_and_integers_made_real_are_data():
    model = Call(lambda m, x: F.linear(torch.randn(3, 4), m.w) @ x.float(), w=weight(2, 4))
    assert listed(model, torch.ones(2, 5, dtype=torch.int64)) == ["Call: 1 x linear", "Call: 1 x matmul"]


# Names, calls, inputs


def test_names_of_nested_modules_and_of_the_model():
    def block():
        return Call(lambda m, x: m.inner(x @ x.mT), inner=nn.Linear(3, 4))

    model = Call(lambda m, x: m.second(m.blocks(x)) @ m.second.inner.weight, blocks=nn.Sequential(block()), second=block())
    assert listed(model, X) == [
        "blocks.0: 1 x matmul",
        "blocks.0.inner: 1 x linear",
        "second: 1 x matmul",
        "second.inner: 1 x linear",
        "Call: 1 x matmul",
    ]


def test_a_module_that_is_called_twice_counts_twice_under_its_first_name():
    shared = nn.Linear(4, 4)
    assert listed(nn.Sequential(shared, nn.ReLU(), shared), X) == ["0: 2 x linear"]


def test_a_call_that_fails_inside_the_forward_leaves_the_name_right():
    def forward(m, x):
        try:
            m.linear(x.mT)
        except RuntimeError:
            return x @ x.mT

    assert listed(Call(forward, linear=nn.Linear(4, 5)), X) == ["Call: 1 x matmul"]


def test_the_users_own_hooks_run_inside_of_the_modules_name():
    model = nn.Sequential(nn.Identity())
    model[0].register_forward_pre_hook(lambda m, args: (args[0] @ args[0].mT,))
    model[0].register_forward_hook(lambda m, args, output: output @ output)
    assert listed(model, X) == ["0: 2 x matmul"]


def test_dict_inputs_and_keywords():
    model = Call(lambda m, batch, *, other: F.linear(batch["x"], m.w) @ other["y"], w=weight(3, 4))
    assert listed(model, {"x": X}, other={"y": X}) == ["Call: 1 x linear", "Call: 1 x matmul"]
    assert [str(o) for o in float_operations(Call(lambda m, x: x @ x.mT), X[:1])] == ["Call: 1 x matmul"]


def test_a_quantizer_may_be_called_by_keyword():
    assert listed(Call(lambda m, x: F.linear(m.q(inputs=x), m.w), q=TensorQuantizer(), w=weight(5, 4)), X) == []


def test_nothing_is_compiled():
    def backend(module, inputs):
        return module.forward

    model = torch.compile(nn.Sequential(nn.Linear(4, 5)), backend=backend)
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    assert listed(model, X) == ["_orig_mod.0: 1 x linear"]
    assert not frames
    model(X)
    assert frames


# What stays


def test_the_model_stays_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3), nn.Dropout(), Call(lambda m, x: x @ x.mT))
    quantize_(model)
    with calibrating(model):
        model(X)
    model.train()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    before, state = copy.deepcopy(model).eval()(X), copy.deepcopy(model.state_dict())
    assert listed(model, X) == ["3: 1 x matmul"]
    assert [m.training for m in model.modules()] == modes
    assert not hooks(model)
    assert torch.is_grad_enabled()
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    torch.testing.assert_close(model.eval()(X), before, rtol=0, atol=0)


def test_no_statistics_are_taken():
    model = quantize_(nn.Sequential(nn.Linear(4, 4)))
    with calibrating(model):
        model(X)
        switches = [q._if_calib for _, q in named_quantizers(model)]
        assert float_operations(model, 100 * X) == []
        assert [q._if_calib for _, q in named_quantizers(model)] == switches
    assert dict(named_quantizers(model))["0.input"].amax == X.abs().max()


def test_after_an_error_in_the_forward_nothing_is_left():
    def forward(m, x):
        raise RuntimeError("broken")

    model = nn.Sequential(QuantLinear(4, 4), Call(forward)).train()
    with pytest.raises(RuntimeError, match="broken"):
        float_operations(model, X)
    assert not hooks(model)
    assert all(m.training for m in model.modules())
    assert not model[0].input_quantizer._if_calib
    assert torch.overrides._get_current_function_mode() is None


def test_the_output_of_an_uncalibrated_quantizer_is_the_same_value():
    seen = []
    model = Call(lambda m, x: seen.append(m.q(x)), q=uncalibrated())
    float_operations(model, X)
    assert torch.equal(seen[0], X)
