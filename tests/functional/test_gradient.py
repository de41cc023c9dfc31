"""Gradients of fake quantization where torch transforms, compiles or watches it, and against masks written in NumPy."""

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lq.functional.affine import fake_affine_tensor_quant
from lq.functional.fake_quant import fake_quant, scaled_e4m3
from lq.functional.gradient import _numbers, within_amax, within_range

AMAX = torch.tensor(1.0)
FORMS = {
    "integers": lambda x: fake_quant(x, AMAX, 8, False, True),
    "channels": lambda x: fake_quant(x, torch.tensor([[0.5], [1.0], [1.5]]).expand(*x.shape[:-1], 1), 8, False, True),
    "unsigned": lambda x: fake_quant(x, AMAX, 8, True, True),
    "floats": lambda x: fake_quant(x, AMAX, (4, 3), False, True),
    "affine": lambda x: fake_affine_tensor_quant(x, -0.5, 1.0),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture
def flushing():
    torch.set_flush_denormal(True)  # where a processor cannot, nothing differs
    yield
    torch.set_flush_denormal(False)


@forms
def test_where_subnormal_numbers_count_as_zero(form, flushing):
    x = torch.tensor([[0.0, 0.25, 0.5], [0.0, 0.25, 0.75], [0.0, 1e-3, 0.5]], requires_grad=True)
    assert torch.autograd.grad(form(x).sum(), x)[0].tolist() == [[1.0] * 3] * 3


@pytest.mark.parametrize("shape", [(), (2, 1)])
@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_a_range_where_subnormal_numbers_count_as_zero(low, shape, flushing):
    x, high = torch.tensor([[-1.5, 0.0, 0.5, 1.0, 1.5]] * 2), torch.ones(shape)
    expected = [[0.0, 1.0, 1.0, 1.0, 0.0]] * 2
    assert within_range(torch.ones_like(x), x, low * high, high).tolist() == expected
    assert within_amax(torch.ones_like(x), x, high, low == 0).tolist() == expected


def plain(form, x, grads):
    x = x.clone().requires_grad_()
    y = form(x)
    return y.detach(), torch.autograd.grad(y, x, grads)[0]


@pytest.fixture
def x():
    return torch.randn(3, 50)


@pytest.fixture
def grads():
    return torch.randn(3, 50)


# The mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bounds", [(-0.7, 1.3), (0.0, 2.0), (0.25, 0.5), (-4.0, -1.0), (0.0, 0.0), (-1e-45, 1e-45)])
@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_bounds_and_their_neighbours(bounds, shape, dtype):
    low, high = (torch.tensor(b).to(dtype) for b in bounds)
    infinity = torch.tensor(float("inf"), dtype=dtype)
    around = [torch.nextafter(b, way) for b in (low, high) for way in (infinity, -infinity)]
    x = torch.stack([low, high, *around, infinity, -infinity, 0 * low]).expand(2, -1).contiguous()
    passed = within_range(torch.ones_like(x), x, low.expand(shape), high.expand(shape))
    values, (below, above) = x.double().numpy(), (b.double().numpy() for b in (low, high))
    np.testing.assert_array_equal(passed.double().numpy(), (below <= values) & (values <= above))


@pytest.mark.parametrize("unsigned", [False, True])
def test_gradients_of_any_size_are_masked_and_not_multiplied(unsigned):
    x, grads = torch.tensor([[2.0, 0.5, -2.0]] * 2), torch.tensor([[float("inf"), float("nan"), float("nan")]] * 2)
    for amax in (AMAX, AMAX.expand(2, 1)):
        masked = within_amax(grads, x, amax, unsigned)
        assert masked[:, [0, 2]].eq(0).all()
        assert masked[:, 1].isnan().all()


def test_gradients_keep_their_layout():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = fake_quant(x, x.detach().abs().amax((0, 2, 3), keepdim=True), 8, False, True)
    gradient = torch.autograd.grad(y, x, torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))[0]
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("shape", [(), (1, 3, 1, 1)])
def test_operators_say_how_gradients_are_laid_out(shape, unsigned):
    amax, images = torch.rand(shape) + 0.5, torch.randn(2, 3, 4, 5)
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for outer, x in ((images, last), (last, images), (last, last)):
        outer = outer.clone().requires_grad_()
        torch.library.opcheck(torch.ops.lq.fake_quant_backward.default, (outer, x, amax, unsigned))
        torch.library.opcheck(torch.ops.lq.fake_quant_affine_backward.default, (outer, x, -amax, amax))


@pytest.mark.parametrize("form", [FORMS["integers"], FORMS["channels"]], ids=["integers", "channels"])
def test_batched_gradients(form):
    x, grads = torch.randn(3, 5, requires_grad=True), torch.randn(4, 3, 5)
    (found,) = torch.autograd.grad(form(x), x, grads, is_grads_batched=True)
    assert torch.equal(found, torch.stack([torch.autograd.grad(form(x), x, grad)[0] for grad in grads]))


def test_bounds_that_have_no_number_behind_them():
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([-largest, 0.0, largest], requires_grad=True)
    for y in (fake_quant(x, torch.tensor(largest), 8, False, True), fake_affine_tensor_quant(x, -largest / 2, largest)):
        assert torch.autograd.grad(y.sum(), x)[0][1:].tolist() == [1.0, 1.0]


def test_what_was_flushed_once_is_not_flushed_for_ever():
    _numbers.cache_clear()
    x = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    for flush in (True, False, True):
        torch.set_flush_denormal(flush)
        try:
            assert torch.autograd.grad(fake_quant(x, AMAX, 8, True, True).sum(), x)[0].tolist() == [1.0, 1.0]
        finally:
            torch.set_flush_denormal(False)
        gradient = torch.autograd.grad(fake_quant(x, AMAX * 0, 8, False, True).sum(), x)[0]
        assert gradient.tolist() == [1.0, 0.0]


# Transformed


@forms
def test_second_gradients(form, x, grads):
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(form(x), x, grads := grads.requires_grad_(), create_graph=True)
    (again,) = torch.autograd.grad(gradient, grads, torch.ones_like(x))
    torch.testing.assert_close(gradient, grads * again)
    assert 0 < again.mean() < 1


@forms
def test_torch_func(form, x, grads):
    y, gradient = plain(form, x, grads)
    assert torch.equal(grad(lambda x: (form(x) * grads).sum())(x), gradient)
    values, tangents = jvp(form, (x,), (grads,))
    assert torch.equal(values, y)
    assert torch.equal(tangents, gradient)


def test_torch_func_on_samples(x, grads):
    form = FORMS["integers"]
    y, gradient = plain(form, x, grads)
    assert torch.equal(vmap(form)(x), y)
    assert torch.equal(vmap(grad(lambda x, g: (form(x) * g).sum()))(x, grads), gradient)
    assert torch.equal(jacrev(form)(x[0]).diagonal() * grads[0], gradient[0])


def test_forward_mode(x, grads):
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(FORMS["integers"](forward_ad.make_dual(x, grads))).tangent
    assert torch.equal(tangent, plain(FORMS["integers"], x, grads)[1])


# Compiled and watched


@pytest.mark.slow
@forms
def test_compiled_code_is_fused_and_gives_the_same(form, x, grads):
    torch.compiler.reset()
    y, gradient = plain(form, x, grads)
    found, compiled = plain(torch.compile(form, fullgraph=True), x, grads)
    assert torch.equal(found, y)
    assert torch.equal(compiled, gradient)
    graphs = []
    torch.compile(form, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(x)
    assert "lq." not in graphs[0].code


@forms
def test_half_precision_compiled(form, x, grads):
    x, grads = x.bfloat16(), grads.bfloat16()
    y, gradient = plain(form, x, grads)
    found, compiled = plain(torch.compile(form, fullgraph=True, backend="aot_eager"), x, grads)
    assert torch.equal(found, y)
    assert torch.equal(compiled, gradient)


@forms
def test_who_watches_operators_sees_one(form, x, grads):
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    y, gradient = plain(form, x, grads)
    with Watching():
        watched = plain(form, x, grads)
    assert torch.equal(watched[0], y)
    assert torch.equal(watched[1], gradient)
    assert len([name for name in seen if name.startswith("lq.")]) == 2


def test_no_sum_for_modules_that_wait_for_one(x):
    seen = set()

    class Waiting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.add(func.__name__)
            return func(*args, **(kwargs or {}))

    for form in FORMS.values():
        with Waiting():
            form(x)
            grad(lambda x: form(x).sum())(x)  # noqa: B023
    assert "div" in seen
    assert not seen & {"add", "add_", "__add__", "__iadd__", "__radd__"}


def test_inference_mode_and_autocast(x):
    with torch.inference_mode():
        assert torch.equal(scaled_e4m3(x, 1.0), scaled_e4m3(x.clone(), 1.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert fake_quant(x, AMAX, 8, False, True).dtype == torch.float32


def test_nothing_is_kept_that_autograd_keeps_already(x):
    kept = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fake_quant(x, AMAX, 8, False, True)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), AMAX.data_ptr()}
    assert y.requires_grad


def test_compiled_code_for_cpus_writes_no_mask_and_the_least_step_outside_is_outside():
    saved = []

    def keep(graph, _):
        saved.extend(node.meta["val"].dtype for node in graph.graph.output_node().args[0] if node is not None)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    amax = torch.tensor(0.5)
    x = torch.tensor([0.5, 0.5000001, 0.0, -1e-45, -0.5, torch.inf], requires_grad=True)
    for unsigned, expected in ((False, [1, 0, 1, 1, 1, 0]), (True, [1, 0, 1, 0, 0, 0])):
        run = torch.compile(lambda x, u=unsigned: fake_quant(x, amax, 8, u, True), fullgraph=True, backend=backend)
        assert torch.autograd.grad(run(x).sum(), x)[0].tolist() == expected
    assert saved
    assert torch.bool not in saved
