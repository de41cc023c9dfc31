"""`QuantMultiheadAttention` against torch's own in float, and against the textbook on quantized tensors."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import lq
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, QuantDescriptor, QuantRule
from lq.functional.amax import compute_amax
from lq.functional.fake_quant import fake_tensor_quant
from lq.nn import QuantMultiheadAttention
from lq.nn.attention import QuantOutProjection

KWARGS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 6, "vdim": 10},
    "extended": {"add_bias_kv": True, "add_zero_attn": True},
}
B, L, S, E, H = 3, 5, 4, 8, 2


def switch(attention, method):
    for quantizer in (m for m in attention.modules() if isinstance(m, lq.TensorQuantizer)):
        getattr(quantizer, method)()


@pytest.fixture(params=KWARGS)
def pair(request):
    floating = nn.MultiheadAttention(E, H, **KWARGS[request.param])
    for parameter in floating.parameters():  # biases start at zero
        parameter.data += 0.1 * torch.randn_like(parameter)
    quantized = QuantMultiheadAttention(E, H, **KWARGS[request.param])
    quantized.load_state_dict(floating.state_dict(), strict=True)
    return floating, quantized


def inputs(attention, batched=True):
    shapes = [(L, E), (S, attention.kdim), (S, attention.vdim)]
    if batched:
        shapes = [(B, *s) if attention.batch_first else (s[0], B, s[1]) for s in shapes]
    return [torch.randn(s) for s in shapes]


PADDING = torch.tensor([[False, False, False, True], [False] * 4, [False, True, False, True]])
MASKS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"key_padding_mask": PADDING},
    {"key_padding_mask": torch.where(PADDING, -1.5, 0.25)},
    {"attn_mask": torch.arange(L * S).reshape(L, S) % 3 == 0},  # no row is masked throughout
    {"attn_mask": torch.randn(L, S), "key_padding_mask": torch.where(PADDING, -1.5, 0.0)},
    {"attn_mask": torch.randn(B * H, L, S)},
    {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True},
]


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: ",".join(m) or "none")
def test_disabled_it_is_torchs_own_and_collecting_it_computes_in_float(pair, mask):
    floating, quantized = pair
    args = inputs(floating)
    switch(quantized, "disable")
    assert_same(quantized(*args, **mask), floating(*args, **mask), rtol=0, atol=0)
    switch(quantized, "enable")
    switch(quantized, "disable_quant")
    switch(quantized, "enable_calib")
    assert_same(quantized(*args, **mask), floating(*args, **mask), rtol=1e-5, atol=1e-6)
    assert all(q.calibrator.collected for q in quantized.modules() if isinstance(q, lq.TensorQuantizer))


def test_without_a_batch(pair):
    floating, quantized = pair
    switch(quantized, "disable_quant")
    switch(quantized, "enable_calib")
    args = inputs(floating, batched=False)
    for mask in ({}, {"key_padding_mask": PADDING[0]}, {"attn_mask": torch.randn(H, L, S), "average_attn_weights": False}):
        assert_same(quantized(*args, **mask), floating(*args, **mask), rtol=1e-5, atol=1e-6)


def q8(x):
    return fake_tensor_quant(x, x.abs().max())


def rows(weight):
    return fake_tensor_quant(weight, compute_amax(weight, 0))


@pytest.mark.parametrize("same", [True, False])
def test_quantized_it_is_the_textbooks_of_quantized_tensors(same):
    attention = QuantMultiheadAttention(E, H, batch_first=True)
    attention.in_proj_bias.data.normal_()
    query = torch.randn(B, L, E)
    key, value = (query, query) if same else (torch.randn(B, S, E), torch.randn(B, S, E))
    w, b = rows(attention.in_proj_weight).split(E), attention.in_proj_bias.split(E)
    q, k, v = (F.linear(q8(x), w[i], b[i]).reshape(B, -1, H, E // H).transpose(1, 2) for i, x in enumerate((query, key, value)))
    probs = q8((q8(q) @ q8(k).mT / (E // H) ** 0.5).softmax(-1))
    mixed = (probs @ q8(v)).transpose(1, 2).reshape(B, L, E)
    expected = F.linear(q8(mixed), rows(attention.out_proj.weight), attention.out_proj.bias)
    output, weights = attention(query, key, value)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, probs.mean(1), rtol=1e-5, atol=1e-6)


def test_each_quantizer_counts(pair):
    _, attention = pair
    args = inputs(attention)
    with torch.no_grad():
        before = attention(*args)[0]
        quantizers = dict(lq.named_quantizers(attention))
        assert len(quantizers) == (10 if attention.in_proj_weight is None else 8)
        for name, quantizer in quantizers.items():
            quantizer.disable()
            assert not torch.equal(attention(*args)[0], before), name
            quantizer.enable()


@pytest.mark.parametrize(("same", "calls"), [("all", 1), ("key and value", 2), ("none", 3)])
def test_an_input_that_comes_twice_is_quantized_once(same, calls):
    attention, seen = QuantMultiheadAttention(E, H), []
    attention.input_quantizer.register_forward_hook(lambda *args: seen.append(args))
    q, k, v = inputs(attention)
    attention(*{"all": (q, q, q), "key and value": (q, k, k), "none": (q, k, v)}[same])
    assert len(seen) == calls


def test_dropout_acts_while_training_and_gradients_reach_everything(pair):
    _, attention = pair
    attention.dropout = 0.5
    args = inputs(attention)
    assert not torch.equal(attention(*args)[0], attention(*args)[0])
    attention(*args)[0].sum().backward()
    assert all(p.grad is not None for p in attention.parameters())
    attention.eval()
    assert torch.equal(attention(*args)[0], attention(*args)[0])


def test_a_hint_without_its_mask_is_refused():
    attention = QuantMultiheadAttention(E, H)
    with pytest.raises(RuntimeError, match="`is_causal` is a hint about `attn_mask`"):
        attention(*inputs(attention), is_causal=True)


# In models


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.layers(x)


def calibrated(model, *args, rules="int8"):
    with lq.calibrating(lq.quantize_(model.eval(), rules)):
        model(*args)
    return model


def test_an_encoder_is_quantized_throughout_in_evaluation_too():
    model, x = Encoder().eval(), torch.randn(B, L, E)
    with torch.no_grad():
        floating = model(x)
        calibrated(model, x)
        assert all(q.amax is not None for _, q in lq.named_quantizers(model))
        assert len(list(lq.named_quantizers(model))) == 2 * (6 + 2 + 2 + 2)
        for name, quantizer in lq.named_quantizers(model):
            before = model(x)
            quantizer.disable()
            assert not torch.equal(model(x), before), name
        torch.testing.assert_close(lq.dequantize_(model)(x), floating, rtol=1e-5, atol=1e-6)
    assert type(model.layers.layers[0].self_attn) is nn.MultiheadAttention
    assert type(model.layers.layers[0].self_attn.out_proj) is NonDynamicallyQuantizableLinear


def test_a_decoder_with_cross_attention_is_calibrated():
    layer = nn.TransformerDecoderLayer(E, H, 16, batch_first=True)
    model = calibrated(layer, torch.randn(B, L, E), torch.randn(B, S, E))
    assert all(q.amax is not None for _, q in lq.named_quantizers(model))


def test_a_rule_for_the_output_projection_alone_takes_effect():
    attention = nn.Sequential(nn.MultiheadAttention(E, H))
    floating, x = attention[0].out_proj.weight.detach().clone(), torch.randn(L, B, E)
    expected = attention[0](x, x, x)[0]
    lq.quantize_(attention, [QuantRule("0.out_proj", INT8_INPUT, INT8_WEIGHT)])
    assert type(attention[0]) is QuantMultiheadAttention
    assert type(attention[0].out_proj) is QuantOutProjection
    assert [n for n, _ in lq.named_quantizers(attention)] == ["0.out_proj.input", "0.out_proj.weight"]
    with lq.calibrating(attention):
        attention[0](x, x, x)
    output = attention[0](x, x, x)[0]
    assert not torch.equal(output, expected)
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0)
    assert torch.equal(attention[0].out_proj.weight, floating)


def test_a_rule_can_leave_the_output_projection_in_float():
    attention = lq.quantize_(
        nn.Sequential(nn.MultiheadAttention(E, H)),
        [
            QuantRule("*", INT8_INPUT, INT8_WEIGHT),
            QuantRule("*.out_proj"),
        ],
    )
    assert type(attention[0].out_proj) is NonDynamicallyQuantizableLinear
    x = torch.randn(L, B, E)
    with lq.calibrating(attention):
        attention[0](x, x, x)
    assert attention[0](x, x, x)[0].isfinite().all()


def test_keywords_reach_the_output_projection_too():
    attention = QuantMultiheadAttention(E, H, quant_desc_input=QuantDescriptor(num_bits=4), quant_desc_weight=None)
    assert {q.num_bits for _, q in lq.named_quantizers(attention)} == {4}
    assert {n for n, _ in lq.named_quantizers(attention)} == {"input", "q", "k", "v", "probs", "out_proj.input"}


def test_rescaling_leaves_the_output_of_a_quantized_encoder():
    model, x = lq.quantize_(Encoder().eval()), torch.randn(B, L, E)
    with torch.no_grad():
        expected = model(x)
        rescaler = lq.RescalingCalibrator(model, inplace=True)
        rescaler(x)
        rescaler.rescale(0.5)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert any("out_proj" in name for group in rescaler.groups for name in group.consumers)


def test_compiles_as_one_graph():
    model, x = calibrated(Encoder(), torch.randn(B, L, E)), torch.randn(B, L, E)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.slow
def test_exports_for_any_batch(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    x = torch.randn(B, L, E)
    model = calibrated(Encoder(), x)
    lq.export.to_onnx(model, x, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(7, L, E)
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        difference = np.abs(output - model(x).numpy())
    assert difference.max() < 0.1
    assert np.median(difference) < 1e-5


def test_options_together():
    for bias, add_kv, zero, batch_first in itertools.product([True, False], repeat=4):
        kwargs = {"bias": bias, "add_bias_kv": add_kv, "add_zero_attn": zero, "batch_first": batch_first}
        floating = nn.MultiheadAttention(E, H, **kwargs)
        quantized = QuantMultiheadAttention(E, H, **kwargs)
        quantized.load_state_dict(floating.state_dict())
        switch(quantized, "disable_quant")
        switch(quantized, "enable_calib")
        args = inputs(floating)
        assert_same(quantized(*args, **MASKS[6]), floating(*args, **MASKS[6]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"attn_mask": torch.zeros(L, S - 1)}, r"`attn_mask` has shape \(5, 3\): it must be \(5, 4\) or \(6, 5, 4\)"),
        ({"attn_mask": torch.zeros(L, S + 1)}, r"`attn_mask` has shape \(5, 5\)"),
        ({"attn_mask": torch.zeros(1, S)}, r"`attn_mask` has shape \(1, 4\)"),
        ({"attn_mask": torch.zeros(B, L, S)}, r"`attn_mask` has shape \(3, 5, 4\)"),
        (
            {"key_padding_mask": torch.zeros(1, S, dtype=torch.bool)},
            r"`key_padding_mask` has shape \(1, 4\): it must be \(3, 4\)",
        ),
        ({"key_padding_mask": torch.zeros(B, S + 2)}, r"`key_padding_mask` has shape \(3, 6\)"),
    ],
)
@pytest.mark.parametrize("name", ["plain", "extended"])
def test_masks_that_torch_refuses_are_refused_and_not_broadcast(name, masks, message):
    attention = QuantMultiheadAttention(E, H, **KWARGS[name])
    with pytest.raises(ValueError, match=message):
        attention(*inputs(attention), **masks)


def test_a_mask_of_integers_is_refused():
    attention = QuantMultiheadAttention(E, H)
    with pytest.raises(TypeError, match=r"`attn_mask` is torch\.uint8: give True where"):
        attention(*inputs(attention), attn_mask=torch.zeros(L, S, dtype=torch.uint8))


def test_keys_and_values_of_other_lengths_are_refused():
    attention = QuantMultiheadAttention(E, H)
    query, key, value = inputs(attention)
    with pytest.raises(ValueError, match="`query` has batch 3, `key` batch 3 and length 4, `value` batch 3 and length 3"):
        attention(query, key, value[:3])
