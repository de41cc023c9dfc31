"""Layers that round again in the backward pass: the same gradients, and less kept for them."""

import copy
import weakref

import pytest
import torch
from torch import nn

import lq
from lq.nn import recompute_


def quantized(model, x, rules="int8"):
    model = lq.quantize_(model, rules)
    with lq.calibrating(model):
        model(x)
    return model.train()


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), (5, 3, 6)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3)), (2, 3, 8, 8)),
    "transposed": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.ConvTranspose1d(6, 4, 3)), (2, 3, 9)),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    make, shape = request.param
    x = torch.randn(shape)
    model = quantized(make(), x)
    return model, recompute_(copy.deepcopy(model)), x


def test_gradients_are_the_same(case):
    model, less, x = case
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for network, given in zip((model, less), inputs, strict=True):
        network(given).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for (name, one), other in zip(model.named_parameters(), less.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def rounded_and_alive(model, x):
    """How many quantizers' results are there after the forward, and the output that holds them."""
    results = []
    hooks = [q.register_forward_hook(lambda _, args, y: results.append(weakref.ref(y))) for _, q in lq.named_quantizers(model)]
    y = model(x)
    for hook in hooks:
        hook.remove()
    return sum(result() is not None for result in results), y


def test_what_was_rounded_is_not_kept(case):
    model, less, x = case
    assert rounded_and_alive(model, x)[0] >= 3  # that of a first layer's input has no gradient behind it
    assert rounded_and_alive(less, x)[0] == 0
    assert rounded_and_alive(recompute_(less, enabled=False), x)[0] >= 3


def test_second_gradients(case):
    model, less, x = case
    found = []
    for network in (model, less):
        given = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(network(given).square().sum(), given, create_graph=True)
        grad.square().sum().backward()
        found.append(given.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("changed", ["input", "amax"])
def test_a_change_between_forward_and_backward_is_an_error(changed):
    x = torch.randn(3, 4)
    model = recompute_(quantized(nn.Linear(4, 4), x))
    y = model(x)
    with torch.no_grad():
        (x if changed == "input" else model.input_quantizer._amax).mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("weight", [lq.QuantDescriptor(4, axis=0, learn_amax="lsq"), lq.QuantDescriptor(4, block_size=2)])
def test_what_cannot_be_rounded_again_is_kept(weight):
    x = torch.randn(3, 4)
    model = quantized(nn.Linear(4, 4), x, [lq.QuantRule("*", lq.QuantDescriptor(), weight)])
    less = recompute_(copy.deepcopy(model))
    for network in (model, less):
        network(x).square().sum().backward()
    assert torch.equal(model.weight.grad, less.weight.grad)


def test_a_float_model_is_refused():
    with pytest.raises(ValueError, match="quantize_"):
        recompute_(nn.Linear(2, 2))


def test_autocast_and_compiled(case):
    model, less, x = case
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), less(x))
    compiled = torch.compile(less, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
