"""Quantizers whose amax is a parameter."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.descriptor import QuantDescriptor
from lq.functional.learned import fake_quant_learned, gradient_scale
from lq.nn import TensorQuantizer
from lq.nn.reuse import keep_weights_

LSQ = QuantDescriptor(4, learn_amax="lsq")


def waiting(desc=LSQ, shape=()):
    quantizer = TensorQuantizer(desc)
    quantizer.dynamic = False
    quantizer.await_amax(shape)
    return quantizer


def test_before_it_has_a_value_it_is_a_quantizer_without_one():
    quantizer, x = waiting(), torch.randn(8)
    parameter = quantizer._amax
    assert quantizer.amax is None
    assert not quantizer.fixed
    assert not quantizer.state_dict()
    assert torch.equal(quantizer(x), x)
    quantizer.load_state_dict({})
    assert quantizer.amax is None
    quantizer.amax = 2.0
    assert quantizer._amax is parameter  # an optimizer may have it
    assert quantizer.amax == 2
    assert quantizer.fixed
    assert quantizer.learned
    quantizer.amax = None
    assert quantizer.amax is None
    assert quantizer._amax is parameter


def test_a_checkpoint_fills_the_parameter_that_is_there():
    quantizer = waiting(shape=(3, 1))
    parameter = quantizer._amax
    quantizer.load_state_dict({"_amax": torch.ones(3, 1)})
    assert quantizer._amax is parameter
    assert quantizer.amax.tolist() == [[1], [1], [1]]
    other = TensorQuantizer(LSQ)
    other.load_state_dict(quantizer.state_dict())
    assert isinstance(other._amax, nn.Parameter)
    fixed = TensorQuantizer(QuantDescriptor(4))
    fixed.load_state_dict(quantizer.state_dict())
    assert not list(fixed.parameters())


@pytest.mark.parametrize(("method", "factor"), [("lsq", gradient_scale(6, 4)), ("pact", 1.0)])
def test_gradients_of_an_activation_are_scaled_by_the_values_of_a_sample(method, factor):
    x = torch.randn(5, 2, 3)
    quantizer = TensorQuantizer(QuantDescriptor(4, amax=1.0, learn_amax=method))
    amax = torch.tensor(1.0, requires_grad=True)
    expected = fake_quant_learned(x, amax, 4, gradient_scale=factor, rounding=method == "lsq").sum()
    quantizer(x).sum().backward()
    assert quantizer._amax.grad == torch.autograd.grad(expected, amax)[0]


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_a_single_number_is_a_sample_of_one(method):
    quantizer = TensorQuantizer(QuantDescriptor(4, amax=0.7, learn_amax=method))
    assert quantizer(torch.tensor(0.32)).item() == pytest.approx(0.3)


def test_gradients_of_a_weight_are_scaled_by_the_values_of_a_channel():
    weight = nn.Parameter(torch.randn(4, 6))
    quantizer = TensorQuantizer(QuantDescriptor(3, axis=0, learn_amax="lsq"))
    quantizer.amax = torch.ones(4, 1)
    quantizer(weight).sum().backward()
    amax = torch.ones(4, 1, requires_grad=True)
    fake_quant_learned(weight, amax, 3, gradient_scale=gradient_scale(6, 3)).sum().backward()
    assert torch.equal(quantizer._amax.grad, amax.grad)


def test_an_activation_with_several_steps_counts_the_values_of_a_sample_that_share_one():
    x = torch.randn(5, 2, 3)
    quantizer = TensorQuantizer(QuantDescriptor(4, axis=1, learn_amax="lsq"))
    quantizer.amax = torch.ones(1, 2, 1)
    amax = torch.ones(1, 2, 1, requires_grad=True)
    fake_quant_learned(x, amax, 4, gradient_scale=gradient_scale(3, 4)).mean().backward()
    quantizer(x).mean().backward()
    assert torch.equal(quantizer._amax.grad, amax.grad)


@pytest.mark.parametrize("axis", [0, None])
def test_a_weight_that_is_computed_is_a_weight(axis):
    def gradient(computed):
        torch.manual_seed(0)
        rule = lq.QuantRule("*", None, QuantDescriptor(3, axis=axis, learn_amax="lsq"))
        model = lq.quantize_(nn.Linear(6, 4), [rule])
        with lq.calibrating(model):
            model(torch.ones(1, 6))
        if computed:
            torch.nn.utils.parametrize.register_parametrization(model, "weight", nn.LeakyReLU(1.0))
        model(torch.ones(2, 6)).sum().backward()
        return model.weight_quantizer._amax.grad

    assert torch.equal(gradient(computed=True), gradient(computed=False))


def test_an_optimizer_may_lead_it_below_zero():
    quantizer = TensorQuantizer(QuantDescriptor(4, amax=0.7, learn_amax="lsq", unsigned=True))
    x = torch.rand(16)
    expected = quantizer(x)
    quantizer._amax.data.neg_()
    assert torch.equal(quantizer(x), expected)
    assert quantizer.amax > 0
    again = TensorQuantizer(quantizer.quant_desc)
    again.load_state_dict(quantizer.state_dict())
    assert torch.equal(again(x), expected)
    with torch.no_grad():
        assert torch.equal(quantizer(x), expected)


def test_frozen_it_learns_nothing():
    quantizer = TensorQuantizer(QuantDescriptor(4, amax=1.0, learn_amax="lsq"))
    x = torch.randn(8, requires_grad=True)
    quantizer.frozen = True
    quantizer(x).sum().backward()
    assert quantizer._amax.grad is None
    quantizer.frozen = False
    assert quantizer._amax.requires_grad


def test_a_range_with_two_ends_learns_both_and_keeps_zero():
    quantizer = TensorQuantizer(QuantDescriptor(4, affine=True, learn_amax="lsq"))
    quantizer.range = (torch.tensor(-0.4), torch.tensor(1.0))
    x = torch.randn(64)
    quantizer(x).square().sum().backward()
    assert quantizer._amax.grad != 0
    assert quantizer._low.grad != 0
    quantizer._low.data.fill_(0.5)
    assert quantizer.range[0] == 0
    assert quantizer(torch.zeros(3)).tolist() == [0, 0, 0]
    assert set(quantizer.state_dict()) == {"_amax", "_low"}


def test_a_lower_end_that_an_optimizer_led_above_zero_comes_back():
    quantizer = TensorQuantizer(QuantDescriptor(4, affine=True, learn_amax="lsq"))
    quantizer.range = (torch.tensor(0.0), torch.tensor(1.0))
    with torch.no_grad():
        quantizer._low.fill_(0.05)
    x = torch.rand(256) - 0.3
    optimizer = torch.optim.SGD(quantizer.parameters(), 1e-2)
    errors = []
    for _ in range(200):
        optimizer.zero_grad()
        error = (quantizer(x) - x).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert quantizer.range[0] < -0.2
    assert errors[-1] < 0.1 * errors[0]


def test_a_lower_end_above_zero_goes_no_further():
    quantizer = TensorQuantizer(QuantDescriptor(4, affine=True, learn_amax="lsq"))
    quantizer.range = (torch.tensor(0.0), torch.tensor(1.0))
    with torch.no_grad():
        quantizer._low.fill_(0.05)
    quantizer(torch.full((8,), -1.0)).neg().sum().backward()  # wants it higher
    assert quantizer._low.grad == 0


def test_kept_weights_are_not_kept_from_learning():
    model = lq.quantize_(nn.Linear(4, 3), [lq.QuantRule("*", None, QuantDescriptor(4, axis=0, learn_amax="lsq"))])
    with lq.calibrating(model):
        model(torch.ones(1, 4))
    keep_weights_(model)
    model(torch.ones(1, 4)).sum().backward()
    assert model.weight_quantizer._amax.grad.any()
    with torch.no_grad():
        before = model(torch.ones(1, 4))
        assert model.weight_quantizer(model.weight) is model.weight_quantizer(model.weight)
        model.weight_quantizer._amax.mul_(0.5)
        assert not torch.equal(model(torch.ones(1, 4)), before)


def test_fixed_it_is_a_quantizer_that_never_learned():
    quantizer = TensorQuantizer(QuantDescriptor(4, amax=1.0, learn_amax="lsq"))
    copied, x = copy.deepcopy(quantizer), torch.randn(8)
    copied.fix_step()
    assert not list(copied.parameters())
    assert torch.equal(copied(x), quantizer(x))
    assert not copied.learned


@pytest.mark.parametrize("fields", [{"num_bits": (4, 3)}, {"fake_quant": False}])
def test_what_has_no_steps_to_learn_is_refused(fields):
    with pytest.raises(ValueError, match="`learn_amax` is 'lsq'"):
        QuantDescriptor(learn_amax="lsq", **fields)


def test_an_unknown_way_to_learn_is_refused():
    with pytest.raises(ValueError, match="choose one of lsq, pact"):
        QuantDescriptor(learn_amax="lqs")


@pytest.mark.parametrize("learn", ["lsq", "pact", True])
def test_a_step_that_starts_from_zeros_is_learned(learn):
    """Adapters and other layers that begin at zero, channels that were pruned: 0 would have no gradient, and stay."""
    quantizer = TensorQuantizer(QuantDescriptor(4, axis=0, learn_amax=learn))
    with torch.no_grad():
        quantizer.amax = torch.tensor([[0.0], [2.0], [4.0]])
    assert quantizer.amax.tolist() == [[3.0], [2.0], [4.0]]
    torch.manual_seed(0)
    desc = QuantDescriptor(4, learn_amax=learn)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    nn.init.zeros_(model[2].weight)
    lq.quantize_(model, [lq.QuantRule("*", desc, desc.replace(axis=0))])
    x = torch.randn(64, 4)
    wanted = x.sum(dim=1, keepdim=True).abs()
    with lq.calibrating(model):
        model(x)
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.02), []
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), wanted)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
