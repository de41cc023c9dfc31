"""`lq.optim`: parameters by name, weights rounded in place."""

import pytest
import torch
from torch import nn

import lq.optim
from lq.descriptor import QuantDescriptor
from lq.functional.amax import compute_amax
from lq.functional.fake_quant import fake_tensor_quant
from lq.nn import QuantConv2d, QuantEmbedding, QuantLinear
from lq.optim.helper import freeze_parameters, group_parameters, match_parameters, quant_weight_inplace


@pytest.fixture
def model():
    return nn.ModuleDict({"conv1": QuantConv2d(2, 3, 1), "conv2": QuantConv2d(3, 3, 1), "fc": QuantLinear(3, 2)})


def test_the_package_has_the_helpers_too():
    assert lq.optim.freeze_parameters is freeze_parameters
    assert set(lq.optim.__all__) == {"freeze_parameters", "group_parameters", "match_parameters", "quant_weight_inplace"}


def test_parameters_are_matched_by_part_of_their_name(model):
    assert list(match_parameters(model, ["conv", "fc.b"])) == [
        *(model["conv1"].weight, model["conv1"].bias, model["conv2"].weight, model["conv2"].bias, model["fc"].bias)
    ]
    assert not list(match_parameters(model, ["nothing"]))


def test_matched_parameters_are_frozen(model):
    freeze_parameters(model, ["weight"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"conv1.bias", "conv2.bias", "fc.bias"}


def test_groups_carry_their_options_into_the_optimizer(model):
    groups = group_parameters(model, [["conv1", "conv2"], ["fc"]], [0.1, None], [None, 0.9], [1e-4, 0.0])
    assert [sorted(g) for g in groups] == [["lr", "params", "weight_decay"], ["momentum", "params", "weight_decay"]]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    assert [(len(g["params"]), g["lr"], g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [
        *((4, 0.1, 0, 1e-4), (2, 0.5, 0.9, 0.0))
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([["conv"], ["conv1"]],), "into two groups"),
        (([["conv"], ["head"]],), r"\['head'\], which no parameter's name contains"),
        (([["conv"], ["fc"]], [0.1]), "`lrs` has 1 values for 2 groups"),
        (([["conv"], ["fc"]], None, None, [0.1, 0.1, 0.1]), "`weight_decays` has 3 values for 2 groups"),
    ],
)
def test_bad_groups_are_named(model, args, message):
    with pytest.raises(ValueError, match=message):
        group_parameters(model, *args)


def test_weights_are_rounded_in_place():
    model = nn.Sequential(QuantLinear(3, 2), QuantConv2d(3, 4, 1), QuantEmbedding(3, 2), nn.Linear(2, 2))
    before = [m.weight.detach().clone() for m in model]
    quant_weight_inplace(model)
    for module, weight in zip(model[:3], before, strict=False):
        assert torch.equal(module.weight, fake_tensor_quant(weight, compute_amax(weight, 0)))
        assert module.weight.requires_grad
    assert torch.equal(model[3].weight, before[3])


def test_codes_are_no_weights():
    with pytest.raises(ValueError, match=r"`0.weight` has `fake_quant=False`"):
        quant_weight_inplace(nn.Sequential(QuantLinear(3, 2, quant_desc_weight=QuantDescriptor(fake_quant=False))))


def test_a_string_is_no_list_of_patterns(model):
    with pytest.raises(TypeError, match="`patterns` is 'weight': give a list"):
        freeze_parameters(model, "weight")
    with pytest.raises(TypeError, match=r"`patterns` is '0\.weight': give a list"):
        group_parameters(model, ["0.weight"])
    with pytest.raises(TypeError, match="`patterns_list` is 'weight'"):
        group_parameters(model, "weight")
