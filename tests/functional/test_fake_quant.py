"""`lq.functional.fake_quant`, bit for bit against the formula of its documentation written in NumPy."""

import itertools

import numpy as np
import pytest
import torch

from lq.functional.amax import compute_amax
from lq.functional.fake_quant import fake_quant, fake_tensor_quant, quantize

HALF = [torch.float16, torch.bfloat16]


def reference(x, amax, num_bits=8, unsigned=False, narrow=True):
    """``clamp(round(x / scale)) * scale`` with ``scale = amax / qmax``, all in the dtype of ``x``; and the codes."""
    high = 2**num_bits - 1 if unsigned else 2 ** (num_bits - 1) - 1
    low = 0 if unsigned else -high - (not narrow)
    tiny = np.finfo(np.float32).tiny.astype(x.dtype)
    scale = np.maximum(amax.astype(x.dtype) / x.dtype.type(high), tiny)
    codes = np.clip(np.rint(x / scale), low, high)
    return codes * scale, codes


def grads(x, amax, unsigned=False):
    x = x.clone().requires_grad_()
    weight = torch.arange(1, x.numel() + 1, dtype=x.dtype).reshape(x.shape)
    (fake_quant(x, amax, 8, unsigned, narrow_range=True) * weight).sum().backward()
    return x.grad


# Forward


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (0, 1, 2)])
@pytest.mark.parametrize(("unsigned", "narrow"), [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("num_bits", [2, 4, 7, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_formula_bit_for_bit(dtype, num_bits, unsigned, narrow, axis):
    x = torch.randn(4, 5, 600, dtype=dtype)
    amax = compute_amax(x, axis) * 0.8
    real, codes = reference(x.numpy(), amax.numpy(), num_bits, unsigned, narrow)
    args = (amax, num_bits, unsigned, narrow)
    np.testing.assert_array_equal(fake_quant(x, *args).numpy(), real)
    np.testing.assert_array_equal(quantize(x, *args).numpy(), codes)


def test_narrow_range_leaves_out_the_most_negative_code_only():
    x, amax = torch.tensor([-2.0, -128 / 127, 2.0]), torch.tensor(1.0)
    assert quantize(x, amax, 8, narrow_range=True).tolist() == [-127, -127, 127]
    assert quantize(x, amax, 8, narrow_range=False).tolist() == [-128, -128, 127]


def test_ties_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert fake_tensor_quant(x, torch.tensor(127.0)).tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.randn(1000).to(dtype)
    amax = torch.tensor(1.234567)
    y = fake_tensor_quant(x, amax)
    assert y.dtype == dtype
    assert torch.equal(y, fake_tensor_quant(x.float(), amax).to(dtype))
    assert quantize(x, amax, 8).dtype == dtype


@pytest.mark.parametrize("narrow", [True, False])
def test_equals_torchs_own_operator(narrow):
    # torch multiplies by the reciprocal of scale, so codes differ by one at ties, and nowhere else
    x, amax = torch.randn(20_000), torch.tensor(2.0)
    scale = amax / 127
    theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), 0, -127 if narrow else -128, 127) / scale
    ours = quantize(x, amax, 8, narrow_range=narrow)
    differ = (ours - theirs).abs() > 0.5
    tie = ((x / scale).frac().abs() - 0.5).abs() < 1e-4
    assert tie[differ].all()
    assert (ours - theirs).abs().max() < 1.5
    assert differ.float().mean() < 1e-3


@pytest.mark.parametrize("unsigned", [False, True])
def test_amax_zero_gives_almost_zero(unsigned):
    x = torch.tensor([[0.0, 1.0, -1e30], [1.0, 2.0, 3.0]])
    amax = torch.tensor([[0.0], [3.0]])
    y = fake_quant(x, amax, 8, unsigned, narrow_range=True)
    assert y.isfinite().all()
    assert y[0].abs().max() < 1e-35
    assert fake_quant(x[0], amax[0], 8, unsigned, narrow_range=True).abs().max() < 1e-35
    assert y[1].tolist() == pytest.approx([1, 2, 3], abs=3 / 127 / 2)


@pytest.mark.parametrize("x", [torch.zeros(2, 3), torch.zeros(0), torch.zeros(2, 0, 3)])
def test_zeros_stay_zeros_and_empty_stays_empty(x):
    assert torch.equal(fake_tensor_quant(x, torch.tensor(1.0)), x)
    assert torch.equal(grads(x, torch.tensor(1.0)).gt(0), torch.ones_like(x).bool())


def test_quantizing_twice_changes_nothing():
    x, amax = torch.randn(1000), torch.tensor(1.7)
    once = fake_tensor_quant(x, amax)
    assert torch.equal(fake_tensor_quant(once, amax), once)


def test_memory_format_and_inputs_are_kept():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    before = x.clone()
    y = fake_tensor_quant(x, compute_amax(x, 1), 8)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)


# Gradient

A = 1.27
ABOVE = np.nextafter(np.float32(A), np.float32(2)).item()


@pytest.mark.parametrize("general", [False, True], ids=["fast", "general"])
@pytest.mark.parametrize(
    ("x", "signed", "unsigned"),
    [
        (0.0, 1, 1),
        (-0.0, 1, 1),
        (0.5, 1, 1),
        (-0.5, 1, 0),
        (-1e-45, 1, 0),
        (A, 1, 1),
        (-A, 1, 0),
        (ABOVE, 0, 0),
        (-ABOVE, 0, 0),
        (100.0, 0, 0),
        (float("inf"), 0, 0),
        (float("-inf"), 0, 0),
    ],
)
def test_the_gradient_passes_inside_and_stops_outside(x, signed, unsigned, general):
    # two amax values take the general path, one takes the fast path of the CPU
    x, amax = (torch.full((2, 1), x), torch.full((2, 1), A)) if general else (torch.full((1,), x), torch.tensor(A))
    for flag, expected in ((False, signed), (True, unsigned)):
        grad = grads(x, amax, flag)
        assert grad.tolist() == (expected * torch.arange(1.0, len(x) + 1).reshape(x.shape)).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("amax", [0.0, 1e-45, 0.1, 1.0, 1.2345678, 3e38])
def test_the_fast_path_has_the_gradient_of_the_general_path(amax, unsigned, dtype):
    amax = torch.tensor(amax)
    edge = amax.to(dtype)
    x = torch.cat([torch.randn(50).to(dtype), torch.stack([edge, -edge, 2 * edge, -edge / 2])])
    x = x[x.isfinite()]
    fast = grads(x, amax, unsigned)
    general = grads(torch.stack([x, x]), amax.expand(2, 1), unsigned)
    assert fast.dtype == dtype
    assert torch.equal(fast > 0, general[0] > 0)
    assert torch.equal(fast, grads(x[None], amax.reshape(1, 1), unsigned)[0])


def test_amax_gets_no_gradient():
    x, amax = torch.randn(5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    fake_tensor_quant(x, amax).sum().backward()
    assert amax.grad is None


# As an operator of torch


@pytest.mark.parametrize(
    ("x", "amax"),
    [
        (torch.randn(3, 4), torch.tensor(1.0)),
        (torch.randn(3, 4), torch.rand(3, 1) + 0.5),
        (torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.rand(1, 3, 1, 1) + 0.5),
        (torch.randn(4, 6)[:, ::2], torch.tensor(1.0)),
        (torch.randn(4, 6).t(), torch.rand(6, 1) + 0.5),
        (torch.randn(8).bfloat16(), torch.tensor(1.0)),
    ],
    ids=["tensor", "channel", "channels_last", "strided", "transposed", "bfloat16"],
)
@pytest.mark.parametrize("unsigned", [False, True])
def test_opcheck(x, amax, unsigned):
    torch.library.opcheck(torch.ops.lq.fake_quant.default, (x.requires_grad_(), amax, 8, unsigned, True))


@pytest.mark.parametrize("axis", [None, 0])
def test_compiles_as_one_graph_and_gives_the_same(axis):
    x = torch.randn(6, 8)
    amax = compute_amax(x, axis) * 0.7

    def loss(x):
        return (fake_tensor_quant(x * 2, amax) * x).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 4) if axis is None else (6,):
        outputs, gradients = zip(
            *((y := f(part := x[:rows].clone().requires_grad_()), torch.autograd.grad(y, part)[0]) for f in (loss, compiled)),
            strict=True,
        )
        assert torch.equal(*outputs)
        assert torch.equal(*gradients)


def test_exports_as_one_operator():
    class Model(torch.nn.Module):
        def forward(self, x):
            return fake_tensor_quant(x, torch.tensor(1.0))

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Model(), (torch.randn(3, 4),), dynamic_shapes=({0: batch},))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert "lq.fake_quant.default" in targets
    x = torch.randn(7, 4)
    assert torch.equal(program.module()(x), Model()(x))


@pytest.mark.parametrize(("num_bits", "unsigned"), itertools.product([4, 8], [False, True]))
def test_every_code_is_a_fixed_point(num_bits, unsigned):
    high = 2 ** (num_bits - (not unsigned)) - 1
    codes = torch.arange(0 if unsigned else -high, high + 1, dtype=torch.float32)
    # a power of two as scale: the grid is exact
    assert torch.equal(fake_tensor_quant(codes / 8, torch.tensor(high / 8), num_bits, unsigned), codes / 8)
