"""Products of two activations that a ``forward`` computes by functions, as quantized modules."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lq
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, QuantRule
from lq.placed import placement_of
from lq.surgery import quantize_as_


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))) + x


def placed(model: nn.Module, x: Tensor, rules: object = "int8_attention") -> nn.Module:
    """Quantized for TensorRT, and calibrated."""
    lq.quantize_(model, rules, target="tensorrt", args=x)
    with lq.calibrating(model):
        model(x)
    return model


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in lq.named_quantizers(model) if not name.endswith("weight")}


class Products(nn.Module):
    """Attention by functions, a product with a weight, and a child that multiplies too."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.inner = nn.Linear(8, 24), Attention()
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT
        x = torch.matmul(scores.softmax(-1), v) @ self.mix.T
        return self.inner(x) if not again else self.inner(x @ x.mT @ x)


def test_products_are_quantized_where_a_rule_names_them():
    x = torch.randn(2, 5, 8)
    model = Products().eval()
    expected = model(x)
    lq.quantize_(model, "int8_attention", target="tensorrt", args=x)
    assert torch.equal(model(x), expected)
    with lq.calibrating(model):
        model(x)
    attention = [f"inner.scaled_dot_product_attention.{role}" for role in ("q", "k", "v", "probs")]
    assert names(model) == {
        *("qkv.input", "matmul.input", "matmul.other", "matmul_1.input", "matmul_1.other"),
        *("inner.q.input", "inner.out.input", *attention),
    }
    # by hand
    q, k, v = model.qkv(x).chunk(3, -1)
    first, second, inner = model.matmul, model.matmul_1, model.inner
    scores = first.input_quantizer(q) @ first.other_quantizer(k.mT)
    y = second.input_quantizer(scores.softmax(-1)) @ second.other_quantizer(v) @ model.mix.T
    z = inner.scaled_dot_product_attention(inner.q(y), inner.k(y), inner.v(y))
    assert torch.equal(model(x), inner.out(z) + y)
    # each has seen its own operands
    float_q, float_k, _ = lq.dequantize_(copy.deepcopy(model)).qkv(x).chunk(3, -1)
    assert float(first.input_quantizer.amax) == pytest.approx(float(float_q.detach().abs().max()), rel=1e-6)
    assert float(first.other_quantizer.amax) == pytest.approx(float(float_k.detach().abs().max()), rel=1e-6)


def test_another_number_of_products_is_an_error():
    x = torch.randn(2, 5, 8)
    model = placed(Products().eval(), x, "int8_attention")
    with pytest.raises(RuntimeError, match="Products had 3 matrix products when they were quantized, and 5 now"):
        model(x, again=True)
    assert torch.equal(model(x), model(x))


def test_products_can_be_left_out_and_taken_out():
    x = torch.randn(2, 5, 8)
    model = Products().eval()
    expected = model(x)
    products = ("QuantMatmul", "QuantScaledDotProductAttention")
    rules = [QuantRule("*", INT8_INPUT, INT8_WEIGHT), QuantRule("*", INT8_INPUT, types=products), QuantRule("matmul")]
    placed(model, x, rules)
    assert {"matmul_1.input", "matmul_1.other"} <= names(model)
    assert "matmul" not in dict(model.named_children())
    assert "inner.scaled_dot_product_attention.probs" in names(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), atol=1e-6, rtol=1e-5)
    loaded = Products().eval()
    lq.quantize_(loaded, rules, target="tensorrt", args=x)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x))
    alike = quantize_as_(Products().eval(), rules, placement_of(model))
    alike.load_state_dict(model.state_dict())
    assert torch.equal(alike(x), model(x))
    lq.dequantize_(model)
    assert torch.equal(model(x), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert {name for name, _ in model.named_children()} == {"qkv", "inner"}


def test_a_bad_rule_leaves_no_products_behind():
    model, x = Products().eval(), torch.randn(2, 5, 8)
    before = {name for name, _ in model.named_modules()}
    with pytest.raises(ValueError, match="matches no quantizable layer"):
        lq.quantize_(
            model, [QuantRule("*", INT8_INPUT, types="QuantMatmul"), QuantRule("nowhere", INT8_INPUT)], target="tensorrt", args=x
        )
    assert {name for name, _ in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Called(nn.Module):
    """Attention that calls its products in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.q, self.k = how, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        match self.how:
            case "bmm":
                return torch.bmm(q, mat2=k.mT) @ x
            case "matmul":
                return torch.matmul(other=k.mT, input=q) @ x
            case "method":
                return q.matmul(other=k.mT) @ x
            case "attention":
                return F.scaled_dot_product_attention(value=x, key=k, query=q)
            case _:
                return torch.matmul(q, k.mT, out=torch.empty(0)) @ x


@pytest.mark.parametrize("how", ["bmm", "matmul", "method", "attention"])
def test_operands_by_keyword_are_those_by_place(how):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    model = placed(Called(how).eval(), x)
    product = model.scaled_dot_product_attention if how == "attention" else model.matmul
    first, second, *_ = product.quantizers().values()
    plain = lq.dequantize_(copy.deepcopy(model))
    assert float(first.amax) == pytest.approx(float(plain.q(x).detach().abs().max()))
    assert float(second.amax) == pytest.approx(float(plain.k(x).detach().abs().max()))
    if how == "attention":
        assert product.v_quantizer is model.q.input_quantizer
    expected, error = plain(x), (model(x) - plain(x)).abs().max()
    assert 0 < error < 0.02 * expected.abs().max()


def test_a_product_into_out_is_named_and_left():
    with pytest.warns(UserWarning, match="`Called`: a product writes into `out`"), torch.no_grad():
        lq.quantize_(model := Called("out").eval(), "int8_attention", target="tensorrt", args=torch.randn(1, 3, 8))
    assert names(model) == {"q.input"}


class Rotary(nn.Module):
    """Products with a buffer that is a constant, and with one that is a cache."""

    frequencies: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.rand(1, 8, 8))
        self.register_buffer("cache", torch.zeros(2, 5, 8))
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x @ self.frequencies)
        self.cache[:] = q
        return q @ self.cache.mT


def test_a_buffer_is_a_constant_until_something_is_written_into_it():
    model, x = Rotary().eval(), torch.randn(2, 5, 8)
    lq.quantize_(model, "int8_attention", target="tensorrt", args=x)
    assert names(model) == {"q.input", "matmul.input", "matmul.other"}


def test_the_preset_is_int8_where_there_is_no_attention_and_needs_a_target_to_look_for_it():
    x = torch.ones(2, 3)
    model = lq.quantize_(nn.Sequential(nn.Linear(3, 3)), "int8_attention", target="tensorrt", args=x)
    assert names(model) == {"0.input"}
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q = torch.randn(1, 3, 8)
    lq.quantize_(attention, "int8_attention", target="tensorrt", args=(q, q, q))
    assert any("probs" in name for name, _ in lq.named_quantizers(attention))
    with pytest.raises(ValueError, match=r"QuantMatmul.*: products that a `forward` computes by functions are found with"):
        lq.quantize_(nn.Sequential(nn.Linear(3, 3)), "int8_attention")


def test_a_type_that_is_not_there_is_told_with_those_that_are():
    with pytest.raises(ValueError, match="of types Conv2d: their classes are Linear"):
        lq.quantize_(nn.Sequential(nn.Linear(3, 3)), [QuantRule("*", INT8_INPUT, types="Conv2d")])


def test_threads_have_products_of_their_own():
    inputs = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    model = placed(Products().eval(), inputs[0])
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [model(x) for x in inputs]
        assert all(map(torch.equal, pool.map(torch.no_grad()(model), inputs * 20), expected * 20))
