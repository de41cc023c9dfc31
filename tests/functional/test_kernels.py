"""Triton's kernels against torch's operators, in Triton's interpreter where there is no GPU."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from lq.functional import fused, kernels
from lq.functional.affine import _fake_quant_affine
from lq.functional.fake_quant import _fake_quant, _fake_quant_float, fake_quant
from lq.functional.gradient import _within_amax, _within_range
from lq.functional.grid import integer_bounds, largest_code
from lq.functional.learned import fake_quant_learned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bfloat16 off in place of rounding
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * (DEVICE == "cuda")]
# shape of the tensor, and of its bounds: one value; rows of fewer and of more values than a tile; bounds within, and at the end
SHAPES = {
    "tensor": ((3, 5, 7), ()),
    "large": ((1, 3001), ()),
    "rows": ((4, 33), (4, 1)),
    "long rows": ((3, 4500), (3, 1)),
    "within": ((2, 3, 50), (1, 3, 1)),
    "last": ((2, 3, 5), (5,)),
}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def tensors(request, dtype):
    """Values, gradients, lower and upper bounds, and how many values share a bound side by side."""
    shape, of_bounds = request.param
    x, grad, high = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), 0.3 + torch.rand(of_bounds)
    x.view(-1)[:4] = torch.tensor([torch.inf, -torch.inf, 0.0, 1e-7], dtype=dtype)
    x.view(-1)[4:8] = high.flatten()[0] / 127 * torch.tensor([0.5, 1.5, -2.5, 126.5])  # ties, and next to them
    return x, grad, -0.7 * high, high, fused.inner_size(x, high)


def on_device(*tensors):
    return [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in tensors]


def equal(found, expected):
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("grid", [(8, False, True), (8, False, False), (4, True, True), (2, False, False), (16, False, True)])
def test_integers(tensors, grid):
    x, _, _, high, inner = tensors
    x.view(-1)[8] = torch.nan
    x_, high_ = on_device(x, high)
    found = kernels.round_(x_, high_, high_, *integer_bounds(*grid), inner, kernels.GRIDS["integers"])
    equal(found, _fake_quant(x, high, *grid))


@pytest.mark.parametrize("bits", [(4, 3), (5, 2)])
def test_floats(tensors, bits):
    x, _, _, high, inner = tensors
    x_, high_ = on_device(x, high)
    found = kernels.round_(x_, high_, high_, -largest_code(bits), largest_code(bits), inner, kernels.GRIDS[bits])
    equal(found, _fake_quant_float(x, high, *bits))


def test_affine(tensors):
    x, _, low, high, inner = tensors
    found = kernels.round_(*on_device(x, low, high), 0, 255, inner, kernels.GRIDS["affine"])
    equal(found, _fake_quant_affine(x, low, high, 8))


@pytest.mark.parametrize("unsigned", [False, True])
def test_gradient_within_amax(tensors, unsigned):
    x, grad, _, high, inner = tensors
    x_, grad_, high_ = on_device(x, grad, high)
    equal(kernels.mask(grad_, x_, None, high_, -1.0 * (not unsigned), inner), _within_amax(grad, x, high, unsigned))


def test_gradient_within_a_range(tensors):
    x, grad, low, high, inner = tensors
    x_, grad_, low_, high_ = on_device(x, grad, low, high)
    equal(kernels.mask(grad_, x_, low_, high_, 0.0, inner), _within_range(grad, x, low, high))


@pytest.mark.parametrize("rounding", [True, False], ids=["lsq", "pact"])
def test_gradient_of_amax(tensors, rounding):
    x, grad, _, high, inner = tensors
    x = x.clamp(-3, 3)
    inputs, amax = x.float().clone().requires_grad_(), high.clone().requires_grad_()
    fake_quant_learned(inputs, amax, 4, False, False, 0.3, rounding).backward(grad.float())
    x_, grad_, high_ = on_device(x, grad, high)
    inside, found = kernels.learn(grad_, x_, high_, -8, 7, 0.3, rounding, inner)
    equal(inside, _within_range(grad, x, -8 / 7 * high, high))
    if x.dtype == torch.float32:
        torch.testing.assert_close(found.cpu(), amax.grad, rtol=1e-5, atol=1e-5)


def test_no_value_is_written_beside_the_tensor(dtype):
    x = torch.ones(2, 37, device=DEVICE, dtype=dtype)
    memory = torch.full((3, 37), 7.0, device=DEVICE, dtype=dtype)
    with mock.patch.object(torch, "empty_like", return_value=memory[:2]):
        high = torch.ones(2, 1, device=DEVICE)
        kernels.round_(x, high, high, -127, 127, 37, kernels.GRIDS["integers"])
    assert memory[:2].eq(1).all()
    assert memory[2].eq(7).all()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_operators_take_the_kernels_on_a_gpu(monkeypatch):
    x = torch.randn(4, 6, device="cuda", requires_grad=True)
    calls = []
    for name in ("round_", "mask"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, kernel=kernel, name=name: (calls.append(name), kernel(*args))[1])
    y = fake_quant(x, torch.tensor(1.0, device="cuda"), 8, False, True)
    torch.autograd.grad(y, x, torch.ones_like(y))
    assert calls == ["round_", "mask"]


def test_layouts():
    channels_last = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert fused.inner_size(channels_last, torch.ones(())) == channels_last.numel()
    assert fused.inner_size(channels_last, torch.ones(2, 1, 1, 1)) == 48
    assert fused.inner_size(channels_last, torch.ones(1, 3, 1, 1)) is None
    assert fused.inner_size(torch.ones(4, 6)[:, ::2], torch.ones(())) is None
    assert fused.inner_size(torch.ones(2, 3, 4), torch.ones(2, 3, 1)) == 4
    assert fused.inner_size(torch.ones(0, 3), torch.ones(())) is None


def test_what_fails_is_left_to_torch_with_a_warning(monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernels, "mask", broken)
    monkeypatch.setattr(fused, "_failed", set())
    monkeypatch.setattr(fused, "_kernels", lambda: kernels)
    monkeypatch.setattr(fused, "_usable", lambda x, high, low=None: fused.inner_size(x, high))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    x = torch.randn(5)
    with pytest.warns(UserWarning, match="no compiler"):
        assert fused.masked(x, x, None, torch.tensor(1.0)) is None
    assert fused.masked(x, x, None, torch.tensor(1.0)) is None  # and is not tried again
    torch.testing.assert_close(_within_amax(x, x, torch.tensor(1.0), False), torch.where(x.abs() <= 1, x, 0.0))


@pytest.mark.parametrize(("low", "high"), [((), (4, 1)), ((4, 1), ()), ("expanded", (4, 1))])
def test_bounds_that_lie_otherwise_are_left_to_torch(monkeypatch, low, high):
    monkeypatch.setattr(fused, "_kernels", lambda: kernels)
    x, high = torch.randn(4, 6, device=DEVICE), torch.ones(high, device=DEVICE)
    low = (-torch.ones((), device=DEVICE)).expand(4, 1) if low == "expanded" else -torch.ones(low, device=DEVICE)
    with mock.patch.object(torch.Tensor, "is_cuda", True):
        assert fused.rounded(x, low, high, 0, 255, None) is None
        assert fused.masked(x, x, low, high) is None
        assert fused._usable(x, high) is not None
