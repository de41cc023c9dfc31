import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lq.graph import trace
from lq.surgery import quantize_


def names(flow):
    return [call.target if isinstance(call.target, str) else type(call.target).__name__ for call in flow.calls]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.first(x))
        y = self.second(y)
        y += x
        return F.relu(y)


def test_modules_and_functions_are_seen_in_order():
    assert names(trace(Residual(), (torch.randn(2, 4),))) == ["Linear", "ReLU", "Linear", "add_", "relu"]


def test_an_operation_in_place_makes_another_value():
    model = Residual()
    flow = trace(model, (torch.randn(2, 4),))
    (first,), (relu,) = flow.calls_of(model.first), flow.calls_of(model.relu)
    assert relu.inputs == first.outputs
    assert relu.outputs != first.outputs
    assert flow.only_consumer(model.first) is model.relu
    assert flow.only_consumer(model.relu) is model.second


class Writing(nn.Module):
    """Writes into what a layer gives: by index, or through a view."""

    def __init__(self, through_a_view: bool):
        super().__init__()
        self.first, self.second, self.through_a_view = nn.Linear(4, 4), nn.Linear(4, 4), through_a_view

    def forward(self, x):
        y = self.first(x)
        if self.through_a_view:
            y.view(-1).mul_(2)
        else:
            y[0] = 0
        return self.second(y)


@pytest.mark.parametrize("through_a_view", [False, True])
def test_a_tensor_that_was_written_into_is_another_value(through_a_view):
    model = Writing(through_a_view)
    flow = trace(model, (torch.randn(2, 4),))
    (first,), (second,) = flow.calls_of(model.first), flow.calls_of(model.second)
    assert first.outputs != second.inputs
    if not through_a_view:
        (write,) = (call for call in flow.calls if call.target == "__setitem__")
        assert (write.inputs[0], write.outputs) == (first.outputs[0], second.inputs)
    # what shares no value shares no quantizer
    quantize_(model, target="tensorrt", args=torch.randn(2, 4))
    assert model.first.input_quantizer is not model.second.input_quantizer


def test_buffers_are_known_until_something_is_written_into_them():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("constant", torch.ones(2))
            self.register_buffer("cache", torch.ones(2))

        def forward(self, x):
            y = x * self.constant + self.cache
            self.cache.copy_(y)
            return y - self.cache

    flow = trace(Cache(), (torch.ones(2),))
    taken = {call.target: call.inputs[1] for call in flow.calls}
    assert {taken["mul"], taken["add"]} <= flow.buffers
    assert taken["sub"] not in flow.buffers


def test_a_function_that_takes_the_output_too_is_a_consumer():
    model = Residual()
    assert trace(model, (torch.randn(2, 4),)).only_consumer(model.second) is None


def test_an_output_of_the_model_has_a_consumer_outside():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            hidden = self.a(x)
            return {"out": self.b(hidden), "hidden": hidden}

    model = Both()
    assert trace(model, (torch.ones(1, 2),)).only_consumer(model.a) is None


def test_a_module_called_twice_has_no_only_consumer():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    flow = trace(model, (torch.ones(1, 2),))
    assert len(flow.calls_of(shared)) == 2
    assert flow.only_consumer(shared) is None
    assert flow.only_consumer(model[1]) is None


def test_looking_at_the_shape_is_no_use_of_the_values():
    class Shapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            y = self.a(x)
            assert y.shape[-1] == y.size(1) == 2
            assert y.dtype == torch.float32
            return self.b(y)

    model = Shapes()
    assert trace(model, (torch.ones(1, 2),)).only_consumer(model.a) is model.b


def test_control_flow_on_values_is_a_use_of_them():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) if y.sum() > 0 else self.b(y) * 2

    model = Branch()
    assert trace(model, (torch.ones(1, 2),)).only_consumer(model.a) is None


def test_quantized_layers_are_leaves_and_hooks_are_gone_afterwards():
    model = quantize_(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model.train()
    assert names(trace(model, (torch.ones(1, 2),))) == ["QuantLinear", "ReLU"]
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
