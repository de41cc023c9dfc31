"""LSQ, LSQ+ and PACT against their formulas, written out with autograd or in NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lq.functional.affine import fake_affine_tensor_quant
from lq.functional.fake_quant import fake_tensor_quant
from lq.functional.grid import integer_bounds
from lq.functional.learned import fake_quant_affine_learned, fake_quant_learned, gradient_scale


def reference(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    """Esser et al., eq. 1 to 3: rounding hands its gradient on, clipping does not."""
    low, high = integer_bounds(num_bits, unsigned, narrow_range)
    scale = amax / high
    code = torch.where(x / scale <= low, float(low), torch.where(x / scale >= high, float(high), x / scale))
    return (code + (code.round() - code).detach()) * scale


GRIDS = [(8, False, True), (8, False, False), (4, True, True), (2, False, False), (3, False, True)]


@pytest.mark.parametrize(("num_bits", "unsigned", "narrow_range"), GRIDS)
@pytest.mark.parametrize("shape", [(), (1, 5, 1), (3, 1, 1)])
def test_gradients_are_those_of_the_formula(num_bits, unsigned, narrow_range, shape):
    generator = torch.Generator().manual_seed(num_bits)
    x = torch.randn(3, 5, 64, generator=generator).requires_grad_()
    amax = (0.5 + torch.rand(shape, generator=generator)).requires_grad_()
    weights = torch.randn(3, 5, 64, generator=generator)
    found = fake_quant_learned(x, amax, num_bits, unsigned, narrow_range)
    assert torch.equal(found, fake_tensor_quant(x.clamp_min(0) if unsigned else x, amax, num_bits, unsigned, narrow_range))
    got = torch.autograd.grad((found * weights).sum(), (x, amax))
    expected = torch.autograd.grad((reference(x, amax, num_bits, unsigned, narrow_range) * weights).sum(), (x, amax))
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)


def test_values_at_the_ends_of_the_range_count_as_inside():
    x, amax = torch.tensor([-2.0, -2.0001, 1.0, 1.0001], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    fake_quant_learned(x, amax, num_bits=2, narrow_range=False).sum().backward()
    assert x.grad.tolist() == [1, 0, 1, 0]
    assert amax.grad.item() == pytest.approx(-2 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (4, 1)])
@pytest.mark.parametrize(("rounding", "size"), [(True, 0.9), (True, 1.01), (False, 0.9)])
def test_sums_over_many_values_do_not_cancel(dtype, shape, rounding, size):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 250_000, generator=generator).to(dtype)
    amax = torch.full(shape, size).requires_grad_()
    grad = (0.2 + torch.randn(4, 250_000, generator=generator)).to(dtype)
    found = torch.autograd.grad(fake_quant_learned(x, amax, 8, unsigned=True, rounding=rounding), amax, grad)[0]
    exact = amax.detach().double().requires_grad_()
    wide = x.double()
    y = reference(wide, exact, 8, True, True) if rounding else wide.minimum(exact)
    expected = torch.autograd.grad((y * grad.double()).sum(), exact)[0]
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-2)


def test_a_dead_range_has_a_finite_gradient():
    amax = torch.tensor([0.0, 1.0], requires_grad=True)
    fake_quant_learned(torch.zeros(3, 2), amax, 8).sum().backward()
    assert amax.grad.isfinite().all()


def test_half_precision_keeps_the_gradient_of_amax_in_its_own_dtype():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    amax = torch.tensor(1.5, requires_grad=True)
    full = torch.autograd.grad(fake_quant_learned(x.bfloat16().float(), amax, 4).sum(), amax)[0]
    half = torch.autograd.grad(fake_quant_learned(x.bfloat16(), amax, 4).sum(), amax)[0]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(full.item(), rel=0.02)


def test_strides_do_not_matter():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    amax = torch.tensor(1.0, requires_grad=True)
    weights = torch.randn(2, 3, 4, 5)
    one = torch.autograd.grad((fake_quant_learned(x, amax, 4) * weights).sum(), amax)[0]
    other = torch.autograd.grad((fake_quant_learned(x.contiguous(), amax, 4) * weights).sum(), amax)[0]
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", [(), (1, 5, 1)])
@pytest.mark.parametrize("unsigned", [False, True])
def test_clipping_is_learned_from_what_is_clipped(shape, unsigned):
    """PACT, eq. 3: the gradient is 1 above amax (-1 below -amax), and 0 elsewhere."""
    x, weights = torch.randn(3, 5, 64), torch.randn(3, 5, 64)
    amax = (0.5 + torch.rand(shape)).requires_grad_()
    y = fake_quant_learned(x, amax, 4, unsigned, rounding=False)
    assert torch.equal(y, fake_quant_learned(x, amax, 4, unsigned))
    found = torch.autograd.grad((y * weights).sum(), amax)[0]
    values, bound = x.numpy(), amax.detach().numpy()
    signs = (values > bound) * 1.0 - (values < -bound) * (not unsigned)
    axes = (0, 2) if shape else (0, 1, 2)
    expected = (signs * weights.numpy()).sum(axes, keepdims=bool(shape))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("low", "high"), [(-1.3, 0.9), (0.0, 2.0), (-0.5, 0.0)])
def test_both_ends_of_an_affine_range_learn(low, high):
    """LSQ+, eq. 7 and 8, with the offset where zero is on the grid."""
    x, weights, levels = torch.randn(512), torch.randn(512), 15
    ends = torch.tensor([low, high], requires_grad=True)
    y = fake_quant_affine_learned(x, *ends.unbind(), num_bits=4)
    torch.testing.assert_close(y, fake_affine_tensor_quant(x, low, high, 4), rtol=0, atol=1e-6)
    found = torch.autograd.grad((y * weights).sum(), ends)[0].numpy()
    values, g = x.double().numpy(), weights.double().numpy()
    step = (high - low) / levels
    first = np.round(low / step)
    codes = np.round(values / step) - first
    inside = (values / step >= first) & (values / step <= levels + first)
    # what the code alone says of the step, beside the part of the offset
    by_step = np.where(inside, codes + first - values / step, np.clip(codes, 0, levels) + first - low / step)
    by_offset = np.where(inside, 0, 1)
    expected = [(g * (by_offset - by_step / levels)).sum(), (g * by_step / levels).sum()]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(), (4, 1)])
@pytest.mark.parametrize("rounding", [True, False])
def test_compiled_it_has_the_same_gradients(shape, rounding):
    x, amax = torch.randn(4, 64).requires_grad_(), torch.full(shape, 1.3).requires_grad_()
    weights = torch.randn(4, 64)

    def run(function):
        return torch.autograd.grad((function(x, amax, 4, False, True, 0.5, rounding) * weights).sum(), (x, amax))

    compiled = torch.compile(fake_quant_learned, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(compiled), run(fake_quant_learned), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 0.37])
@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize("grid", [(2, False, False), (3, False, True), (4, False, False), (8, True, False)])
def test_values_at_the_ends_are_within_in_pieces_too(grid, rounding, factor):
    """amax mostly is the largest value: what is fused must see it where the operator does."""
    lowest, highest = integer_bounds(*grid)
    amax = 0.5 + torch.rand(256, 1)
    x = torch.cat([amax, lowest / highest * amax, torch.randn(256, 6)], dim=1)
    weights = torch.randn(256, 8)

    def loss(x, amax):
        return (fake_quant_learned(x, amax, *grid, factor, rounding) * weights).sum()

    leaves = x.clone().requires_grad_(), amax.clone().requires_grad_()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for found, right in zip(torch.func.grad(loss, (0, 1))(x, amax), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert torch.equal(expected[0][:, :2], weights[:, :2])


def test_the_step_takes_the_way_that_lsq_gives_it():
    """SGD on amax with our factor and SGD on the step with LSQ's own: the same steps."""
    x, target = torch.randn(256, generator=torch.Generator().manual_seed(0)), 0.3
    high = 7
    amax, step = torch.tensor(2.1, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    for _ in range(5):
        loss = (fake_quant_learned(x, amax, 4, gradient_scale=gradient_scale(256, 4)) - target).square().sum()
        amax.data -= 1e-3 * torch.autograd.grad(loss, amax)[0]
        loss = (reference(x, step * high, 4, False, True) - target).square().sum()
        step.data -= 1e-3 * torch.autograd.grad(loss, step)[0] / math.sqrt(256 * high)
        assert amax.item() / high == pytest.approx(step.item(), rel=1e-4)
    assert step.item() != pytest.approx(0.3, rel=1e-3)
