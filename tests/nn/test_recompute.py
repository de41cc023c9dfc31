"""Layers that round again in the backward pass: the same gradients, and less kept for them."""

import copy
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

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
    results, forward = [], lq.TensorQuantizer.forward

    def watched(self, inputs):
        y = forward(self, inputs)
        results.append(weakref.ref(y))
        return y

    with mock.patch.object(lq.TensorQuantizer, "forward", watched):
        y = model(x)
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


@pytest.mark.parametrize("way", ["autocast", "compiled", "checkpointed", "after inference"])
def test_goes_with(case, way):
    model, less, x = case
    found = []
    for network in (model, less):
        given = x
        if way == "after inference":
            with torch.inference_mode():
                given = x.clone()
        run = torch.compile(network, fullgraph=True, backend="eager") if way == "compiled" else network
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            y = checkpoint(run, given, use_reentrant=False) if way == "checkpointed" else run(given)
        y.float().square().sum().backward()
        found.append([parameter.grad for parameter in network.parameters()])
    assert all(map(torch.equal, *found))


def test_checkpointing_keeps_what_it_keeps():
    x = torch.randn(4, 8, requires_grad=True)
    model = recompute_(quantized(nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))), x))
    inputs = []
    for layer in model:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    y = checkpoint(model, x, use_reentrant=False)
    assert [given() is not None for given in inputs] == [True, False, False]
    y.sum().backward()


@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
def test_hooks_of_a_quantizer_are_not_gone_round(kind):
    x = torch.randn(3, 4)
    model = quantized(nn.Linear(4, 4), x)
    if kind == "hook":
        model.input_quantizer.register_forward_hook(lambda _, args, y: 2 * y)
    else:
        model.input_quantizer.register_forward_pre_hook(lambda _, args: (0.5 * args[0],))
    less = recompute_(copy.deepcopy(model))
    for network in (model, less):
        network(x).square().sum().backward()
    assert torch.equal(model.weight.grad, less.weight.grad)


class Dropped(nn.Module):
    """A weight that is another one at each look."""

    def forward(self, weight):
        return nn.functional.dropout(weight)


def test_a_computed_weight_is_looked_at_once():
    x, found = torch.randn(3, 4, requires_grad=True), []
    model = quantized(nn.Linear(4, 4), x)
    parametrize.register_parametrization(model, "weight", Dropped())
    for less in (False, True):
        recompute_(model, less)
        torch.manual_seed(1)
        found.append(torch.autograd.grad(model(x).square().sum(), x)[0])
    assert torch.equal(*found)


def test_a_float_weight_that_changes_is_an_error_as_ever():
    x = torch.randn(3, 4)
    model = recompute_(quantized(nn.Linear(4, 4), x, [lq.QuantRule("*", lq.QuantDescriptor(), None)]))
    x = x.requires_grad_()
    y = model(x)
    with torch.no_grad():
        model.weight.mul_(3)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_a_float_model_again_knows_nothing_of_it():
    model = lq.dequantize_(recompute_(lq.quantize_(nn.Sequential(nn.Linear(2, 2)))))
    assert not hasattr(model[0], "recompute")


RULES = {
    "fixed": "int8",
    "affine": [lq.QuantRule("*", lq.QuantDescriptor(affine=True), lq.QuantDescriptor(axis=0))],
    "learned": [lq.QuantRule("*", lq.QuantDescriptor(4, learn_amax="lsq"), lq.QuantDescriptor(4, axis=0, learn_amax="lsq"))],
}


@pytest.mark.parametrize("kind", RULES)
def test_compiled(kind):
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    make = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model = quantized(make, x, RULES[kind])
    kept, gradients = [], []
    for network in (model, recompute_(copy.deepcopy(model))):
        torch._dynamo.reset()
        compiled, saved = torch.compile(network, fullgraph=True, backend="aot_eager_decomp_partition"), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.update({t.data_ptr(): t}) or t, lambda t: t):
            y = compiled(x)
        y.square().sum().backward()
        kept.append(sum(t.numel() for t in saved.values()))
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])
    # of the inputs of three layers, 64 times 8 each, at least two are no longer kept twice
    assert kept[1] <= kept[0] - 2 * x.numel()


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict):
    x = torch.randn(3, 4)
    model = recompute_(quantized(nn.Linear(4, 4), x)).eval()
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))


def test_hooks_run_once_in_compiled_code():
    torch._dynamo.reset()
    x, seen = torch.randn(3, 4), []
    model = recompute_(quantized(nn.Linear(4, 4), x))
    model.input_quantizer.register_forward_hook(lambda *args: seen.append(1))
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert seen == [1]
