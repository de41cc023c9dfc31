"""Modules for functional operations, against the functions on quantized tensors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.descriptor import QuantDescriptor
from lq.functional.fake_quant import fake_tensor_quant
from lq.nn import QuantAdd, QuantMatmul, QuantScaledDotProductAttention

DESC = QuantDescriptor(num_bits=4)


def q4(x):
    return fake_tensor_quant(x, x.abs().max(), 4)


def operands(n, shape=(2, 3, 5, 4)):
    return [torch.randn(shape) for _ in range(n)]


def test_add_quantizes_the_shortcut_alone():
    a, b = operands(2)
    assert torch.equal(QuantAdd(quant_desc_input=DESC)(a, b), a + q4(b))


def test_matmul_quantizes_both():
    a, b = operands(2)
    assert torch.equal(QuantMatmul(quant_desc_input=DESC)(a, b.mT), q4(a) @ q4(b.mT))


@pytest.mark.parametrize(
    "kwargs", [{}, {"is_causal": True}, {"attn_mask": torch.randn(5, 5)}, {"attn_mask": torch.eye(5) < 1}, {"scale": 0.3}]
)
def test_attention_quantizes_what_it_takes(kwargs):
    q, k, v = operands(3)
    operation = QuantScaledDotProductAttention(quant_desc_input=DESC)
    # the products of torch's own function, the probabilities read off with unit vectors for values
    probs = F.scaled_dot_product_attention(q4(q), q4(k), torch.eye(5).expand(2, 3, 5, 5), **kwargs)
    torch.testing.assert_close(operation(q, k, v, **kwargs), q4(probs) @ q4(v), atol=1e-6, rtol=1e-5)
    operation.probs_quantizer.disable()
    expected = F.scaled_dot_product_attention(q4(q), q4(k), q4(v), **kwargs)
    torch.testing.assert_close(operation(q, k, v, **kwargs), expected, atol=1e-6, rtol=1e-5)


def test_grouped_queries():
    q, k, v = torch.randn(2, 4, 5, 8), *operands(2, (2, 2, 5, 8))
    operation = QuantScaledDotProductAttention(quant_desc_input=None)
    assert torch.equal(operation(q, k, v, enable_gqa=True), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    operation = QuantScaledDotProductAttention(quant_desc_input=DESC)
    operation.probs_quantizer.disable()
    expected = F.scaled_dot_product_attention(q4(q), q4(k), q4(v), enable_gqa=True)
    torch.testing.assert_close(operation(q, k, v, enable_gqa=True), expected, atol=1e-6, rtol=1e-5)


class Block(nn.Module):
    def __init__(self, desc):
        super().__init__()
        self.fc, self.add, self.matmul = nn.Linear(4, 4), QuantAdd(quant_desc_input=desc), QuantMatmul(quant_desc_input=desc)

    def forward(self, x):
        return self.matmul(self.add(self.fc(x), x), x.mT)


@pytest.mark.parametrize("desc", [None, DESC])
def test_quantize_gives_them_the_rules_descriptor_and_dequantize_takes_it(desc):
    model, x = Block(desc), torch.randn(2, 3, 4)
    floating = (model.fc(x) + x) @ x.mT
    assert torch.equal(model(x), floating) == (desc is None)
    lq.quantize_(model)
    names = ["fc.input", "fc.weight", "add.residual", "matmul.input", "matmul.other"]
    assert [name for name, _ in lq.named_quantizers(model)] == names
    assert torch.equal(model(x), floating), "float until calibrated"
    with lq.calibrating(model):
        model(x)
    assert model.add.residual_quantizer.amax == x.abs().max()
    assert model.add.residual_quantizer.num_bits == 8
    assert not torch.equal(model(x), floating)
    with pytest.raises(ValueError, match="quantized layers already"):
        lq.quantize_(model)
    assert torch.equal(lq.dequantize_(model)(x), floating)
    assert [type(m) for m in model.children()] == [nn.Linear, QuantAdd, QuantMatmul]


def test_a_rule_can_leave_them_out():
    model = lq.quantize_(Block(None), [*lq.descriptor.PRESETS["int8"], lq.QuantRule("*", types=["QuantMatmul"])])
    assert [name for name, _ in lq.named_quantizers(model)] == ["fc.input", "fc.weight", "add.residual"]


def test_a_model_that_quantizes_operations_alone_is_quantized():
    model = lq.quantize_(Block(None), [lq.QuantRule("add", DESC)])
    assert lq.surgery.has_quantized_layers(model)
    assert not lq.surgery.has_quantized_layers(Block(DESC))
    twin = copy.deepcopy(model)
    assert repr(twin) == repr(model)


@pytest.mark.parametrize(
    "mask", [torch.tensor([[True, True, True], [False, True, True], [True, False, True]]), torch.randn(3, 3)]
)
def test_a_mask_beside_is_causal_counts_too(mask):
    q = torch.randn(1, 2, 3, 4)
    attention = QuantScaledDotProductAttention(quant_desc_input=QuantDescriptor(num_bits=16))
    found, causal = attention(q, q, q, mask, is_causal=True), torch.ones(3, 3, dtype=torch.bool).tril()
    both = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -torch.inf)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, q, q, both), rtol=0, atol=1e-3)
