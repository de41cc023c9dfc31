"""`lq.nn.functional.clip` against PACT's table of gradients, and `Clip`."""

import pytest
import torch

from lq.nn import Clip
from lq.nn.functional import clip

X = [-2.0, -1.0, -0.5, 0.5, 1.5, 3.0]


def test_gradients_go_to_the_input_inside_and_to_the_bound_that_is_crossed():
    x = torch.tensor(X, requires_grad=True)
    low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    y = clip(x, low, high)
    assert y.tolist() == [-1, -1, -0.5, 0.5, 1.5, 1.5]
    y.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]))
    assert x.grad.tolist() == [0, 2, 4, 8, 16, 0]
    assert low.grad == 1
    assert high.grad == 32


def test_gradients_of_bounds_are_summed_over_what_shares_them():
    x = torch.tensor([[2.0, 3.0], [-5.0, 9.0]])
    high = torch.tensor([[1.0], [2.0]], requires_grad=True)
    clip(x, -1.0, high).backward(torch.tensor([[1.0, 2.0], [4.0, 8.0]]))
    assert high.grad.tolist() == [[3], [8]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_output_has_the_dtype_of_the_input(dtype):
    assert clip(torch.randn(3, 2).to(dtype), -1.0, torch.ones(3, 1)).dtype == dtype


def test_numbers_have_no_gradient_and_tensors_no_parameter_unless_learned():
    layer = Clip(-1.0, torch.tensor([1.0, 2.0]))
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert layer(torch.tensor([5.0, 5.0])).tolist() == [1, 2]


@pytest.mark.parametrize("learn", [("clip_value_min",), ("clip_value_max",), ("clip_value_min", "clip_value_max")])
def test_each_side_can_be_learned(learn):
    layer = Clip(-1.0, 1.0, learn_min="clip_value_min" in learn, learn_max="clip_value_max" in learn)
    assert [name for name, _ in layer.named_parameters()] == list(learn)
    layer(torch.tensor([-4.0, 0.0, 4.0])).sum().backward()
    assert all(p.grad == 1 for p in layer.parameters())
    assert Clip(-9.0, 9.0, "clip_value_min" in learn, "clip_value_max" in learn).load_state_dict(layer.state_dict())


def test_a_range_that_is_turned_around_is_refused():
    with pytest.raises(ValueError, match=r"`clip_value_min` is \[2.0, 0.0\], above `clip_value_max`, 1.0"):
        Clip(torch.tensor([2.0, 0.0]), 1.0)
