"""BatchNorm folding: the same outputs, the same codes, and only where it is right."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from exported import calibrated, close, codes, export, set_statistics
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, QuantRule
from lq.export.fold import fold_batchnorm_
from lq.functional.fake_quant import quantize

CHANNELS = 6


def weight_codes(layer: nn.Module) -> Tensor:
    quantizer = layer.weight_quantizer
    desc = quantizer.quant_desc
    return quantize(layer.weight.detach(), quantizer.amax, desc.num_bits, desc.unsigned, desc.narrow_range)


FOLDED = {
    "conv1d": (nn.Conv1d(4, CHANNELS, 3), nn.BatchNorm1d(CHANNELS), (8, 4, 9)),
    "conv2d": (nn.Conv2d(4, CHANNELS, 3, bias=False), nn.BatchNorm2d(CHANNELS), (8, 4, 7, 7)),
    "conv2d groups": (nn.Conv2d(4, CHANNELS, 3, groups=2), nn.BatchNorm2d(CHANNELS), (8, 4, 7, 7)),
    "conv2d depthwise": (nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS), nn.BatchNorm2d(CHANNELS), (8, CHANNELS, 7, 7)),
    "conv3d": (nn.Conv3d(2, CHANNELS, 3), nn.BatchNorm3d(CHANNELS), (4, 2, 5, 5, 5)),
    "linear": (nn.Linear(4, CHANNELS), nn.BatchNorm1d(CHANNELS), (8, 4)),
    "sync": (nn.Linear(4, CHANNELS), nn.SyncBatchNorm(CHANNELS), (8, 4)),
}


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("case", FOLDED)
def test_folding_keeps_outputs_and_codes(case, axis):
    layer, norm, shape = copy.deepcopy(FOLDED[case])
    x = torch.randn(shape)
    rules = [QuantRule("*", INT8_INPUT, INT8_WEIGHT.replace(axis=axis))]
    model = calibrated(nn.Sequential(layer, set_statistics(norm)), x, rules=rules)
    with torch.no_grad():
        norm.weight[0] = 0.0
        before, expected = weight_codes(layer), model(x)
        assert (norm.weight < 0).any()
        factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).reshape(-1, *[1] * (layer.weight.dim() - 1))
        old_amax = layer.weight_quantizer.amax.expand_as(factor)
        assert fold_batchnorm_(model, (x,)) == ["0"]
        assert isinstance(model[1], nn.Identity)
        torch.testing.assert_close(model(x), expected, atol=3e-6, rtol=1e-5)
    assert torch.equal(weight_codes(layer), before * factor.sign())
    torch.testing.assert_close(layer.weight_quantizer.amax[1:], (old_amax * factor.abs())[1:])
    # a channel that gamma silences: a scale as good as any, not the smallest number there is
    assert torch.equal(layer.weight_quantizer.amax[0], old_amax[0])


def test_norm_without_affine_part():
    x = torch.randn(8, 4)
    norm = nn.BatchNorm1d(3, affine=False)
    norm.running_mean.fill_(0.3)
    norm.running_var.fill_(2.0)
    model = calibrated(nn.Sequential(nn.Linear(4, 3), norm), x)
    expected = model(x)
    assert fold_batchnorm_(model, (x,)) == ["0"]
    torch.testing.assert_close(model(x), expected)


def test_pre_quant_scale_of_the_weight_is_folded_once():
    x = torch.randn(8, 4)
    layer = nn.Linear(4, 3)
    model = calibrated(nn.Sequential(layer, set_statistics(nn.BatchNorm1d(3))), x)
    layer.weight_quantizer.pre_quant_scale = torch.tensor([0.5, 1.0, 0.25, 1.0])
    expected = model(x)
    assert fold_batchnorm_(model, (x,)) == ["0"]
    torch.testing.assert_close(model(x), expected, atol=2e-6, rtol=1e-5)


class Branches(nn.Module):
    """The convolution's output goes to BatchNorm and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)
        self.norm = set_statistics(nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + x


class Returned(Branches):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x)
        return self.norm(x), x


class Twice(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.conv(-x))


class Between(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.conv(x)))


class NormAct(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


def pair(layer: nn.Module, norm: nn.Module) -> nn.Module:
    return nn.Sequential(layer, norm)


UNFOLDED = {
    "used twice": (Branches, (4, 4, 9)),
    "returned": (Returned, (4, 4, 9)),
    "called twice": (Twice, (4, 4, 9)),
    "something between": (Between, (4, 4, 9)),
    "transposed": (lambda: pair(nn.ConvTranspose1d(4, 4, 3), nn.BatchNorm1d(4)), (4, 4, 9)),
    "no running statistics": (lambda: pair(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)), (4, 4)),
    "another norm": (lambda: pair(nn.Conv1d(4, 4, 3), nn.Sequential(NormAct(4), nn.BatchNorm1d(4))), (4, 4, 9)),
    # as many steps as features, so that sizes alone would not tell: BatchNorm works on the steps
    "linear on three axes": (lambda: pair(nn.Linear(4, 5), nn.BatchNorm1d(5)), (4, 5, 4)),
}


@pytest.mark.parametrize("case", UNFOLDED)
def test_left_unfolded(case):
    build, shape = UNFOLDED[case]
    x = torch.randn(shape)
    model = calibrated(build(), x)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            set_statistics(module)
    expected = model(x)
    assert fold_batchnorm_(model, (x,)) == []
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(model(x)), tree_leaves(expected), strict=True))


def test_left_unfolded_where_codes_could_not_stay():
    x = torch.randn(8, 4)
    rules = [QuantRule("*", INT8_INPUT, INT8_WEIGHT.replace(narrow_range=False))]
    layer, norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
    model = calibrated(nn.Sequential(layer, norm), x, rules=rules)
    with torch.no_grad():
        layer.weight[1, 2] = -2 * layer.weight_quantizer.amax[1, 0]  # -128, which has no opposite
        norm.weight[1] = -1.0
    assert fold_batchnorm_(model, (x,)) == []
    norm.weight.data[1] = 1.0
    assert fold_batchnorm_(model, (x,)) == ["0"]


@pytest.mark.parametrize("weight_norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_left_unfolded_where_the_weight_is_computed(weight_norm):
    x = torch.randn(8, 4)
    layer = nn.Linear(4, 3)
    model = calibrated(nn.Sequential(layer, nn.BatchNorm1d(3)), x)
    weight_norm(layer)
    assert fold_batchnorm_(model, (x,)) == []


def test_one_norm_that_has_two_names():
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.norm = set_statistics(nn.BatchNorm1d(3))
            self.alias = self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.layer(x))

    x = torch.randn(8, 4)
    model = calibrated(Aliased(), x)
    expected = model(x)
    assert fold_batchnorm_(model, (x,)) == ["layer"]
    torch.testing.assert_close(model(x), expected, atol=2e-6, rtol=1e-5)


class Head(nn.Module):
    """One convolution for both levels of a pyramid, and one more for the sum of them; a BatchNorm for each level."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.both = (nn.Conv1d(4, 4, 1) for _ in range(3))
        for conv in (self.high, self.both):
            conv.weight, conv.bias = self.low.weight, self.low.bias
        self.low_norm, self.high_norm = set_statistics(nn.BatchNorm1d(4), 1), set_statistics(nn.BatchNorm1d(4), 2)
        self.out = nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.low_norm(self.low(x)) + self.high_norm(self.high(2 * x)) + self.both(x))


# all layers in float, one of them quantized, or all
@pytest.mark.parametrize("rules", [[], [QuantRule("out", INT8_INPUT, INT8_WEIGHT)], "int8"], ids=["float", "mixed", "int8"])
def test_shared_weights_are_folded_for_each_layer_alone(rules, tmp_path):
    x = torch.randn(8, 4, 5)
    model = calibrated(Head(), x, rules=rules) if rules else Head().eval()
    graph = export(model, x, tmp_path)
    assert not graph.of("BatchNormalization")
    close(model, graph, x, atol=1e-5, share=0.95)
    assert model.low.weight is model.high.weight


def test_shared_weights_that_nothing_is_folded_into_stay_one(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    for rules, names in (([], {"2.weight", "2.bias"}), ("int8", {"0.weight_quantized", "2.bias"})):
        x = torch.randn(8, 4)
        graph = export(calibrated(model, x, rules=rules) if rules else model.eval(), x, tmp_path)
        assert {name for name, value in graph.constants.items() if value.size > 4 or name.endswith("bias")} == names


def test_exported_graph_has_no_batch_norm_but_the_one_that_must_stay(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        set_statistics(nn.BatchNorm2d(8), 1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2),
        set_statistics(nn.BatchNorm2d(4), 2),
    )
    x = torch.randn(4, 3, 8, 8)
    model = calibrated(model, x)
    graph = export(model, x, tmp_path)
    assert [node.name for node in graph.of("BatchNormalization")] == ["4/BatchNormalization"]
    sign = model[1].weight.sign().reshape(-1, 1, 1, 1).detach().numpy()
    reference = codes(model[0].weight, model[0].weight_quantizer.amax) * sign
    np.testing.assert_array_equal(graph.constants["0.weight_quantized"], reference)
    close(model, graph, x, share=0.97)
