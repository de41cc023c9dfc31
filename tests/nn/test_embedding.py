"""`QuantEmbedding` against `nn.Embedding` with a quantized table."""

import pytest
import torch
from torch import nn

from lq.descriptor import QuantDescriptor, QuantRule
from lq.functional.fake_quant import fake_tensor_quant
from lq.nn import QuantEmbedding
from lq.surgery import dequantize_, named_quantizers, quantize_

IDS = torch.tensor([[0, 3, 3], [1, 2, 0]])


@pytest.mark.parametrize("kwargs", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("axis", [0, None])
def test_looks_up_the_quantized_table(axis, kwargs):
    layer = QuantEmbedding(5, 4, **kwargs, quant_desc_weight=QuantDescriptor(axis=axis))
    amax = layer.weight.detach().abs().amax(1, keepdim=True) if axis == 0 else layer.weight.detach().abs().max()
    reference = nn.Embedding(5, 4, **kwargs)
    reference.weight.data.copy_(fake_tensor_quant(layer.weight.data, amax))
    assert torch.equal(layer(IDS), reference(IDS))
    for module in (layer, reference):
        module(IDS).square().sum().backward()
    assert torch.equal(layer.weight.grad, reference.weight.grad)


def test_disabled_it_is_the_float_table():
    layer = QuantEmbedding(5, 4, quant_desc_weight=None)
    assert torch.equal(layer(IDS), layer.weight[IDS])


def test_max_norm_changes_the_table_itself():
    torch.manual_seed(1)
    layer, reference = QuantEmbedding(5, 4, max_norm=1.0, quant_desc_weight=None), nn.Embedding(5, 4, max_norm=1.0)
    reference.load_state_dict(layer.state_dict())
    assert torch.equal(layer(IDS), reference(IDS))
    assert torch.equal(layer.weight, reference.weight)


def test_a_sparse_table_is_refused():
    with pytest.raises(ValueError, match="`sparse` is True"):
        QuantEmbedding(5, 4, sparse=True)


def test_only_a_rule_that_names_it_quantizes_it():
    def model():
        return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))

    assert [n for n, _ in named_quantizers(quantize_(model()))] == ["1.input", "1.weight"]
    for rule in (
        QuantRule("*", None, QuantDescriptor(axis=0), types=["Embedding"]),
        QuantRule("0", None, QuantDescriptor(axis=0)),
    ):
        quantized = quantize_(model(), [rule])
        assert [n for n, _ in named_quantizers(quantized)] == ["0.weight"]
        assert type(dequantize_(quantized)[0]) is nn.Embedding
