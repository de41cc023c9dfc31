"""What is quantized once gives what it gives when it is quantized each time: values, gradients, and nothing stale."""

import copy
import pickle
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lq
from lq.nn import QuantLinear, recompute_
from lq.nn.reuse import forget_weights_, keep_weights_, keeping_weights


class Attention(nn.Module):
    """Three layers that take one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return (self.q(x) * self.k(x)).softmax(-1) * self.v(x)


@pytest.fixture
def shared() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    model = lq.quantize_(Attention(), target="tensorrt", args=x)
    with lq.calibrating(model):
        model(x)
    return model, x


def separate(model: nn.Module) -> nn.Module:
    """The same with a quantizer for each layer."""
    other = copy.deepcopy(model)
    for layer in (other.q, other.k, other.v):
        layer.input_quantizer = copy.deepcopy(layer.input_quantizer)
        layer.input_quantizer._last = None
    return other


def calls(monkeypatch) -> list[Tensor]:
    """Tensors that are really quantized from now on."""
    import lq.nn.tensor_quantizer as module

    found, original = [], module.fake_quant
    monkeypatch.setattr(module, "fake_quant", lambda x, *args: found.append(x) or original(x, *args))
    return found


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_one_input_of_three_layers_is_quantized_once(shared, monkeypatch):
    model, x = shared
    expected, found = separate(model), calls(monkeypatch)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)
        torch.testing.assert_close(gradients(model, x), gradients(expected, x))
    del found[:]
    y = model(x)
    assert len(found) == 4  # and three weights
    del y
    # other values in the same memory, another mode, another amax
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)
        x.mul_(0.1)
        torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)
        for one in (model, expected):
            for layer in (one.q, one.k, one.v):
                layer.input_quantizer.amax = torch.tensor(0.5)
        torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


@contextmanager
def frozen(model: nn.Module):
    model.requires_grad_(False)
    yield
    model.requires_grad_(True)


MODES = {
    "without gradients": lambda model: torch.no_grad(),
    "autocast": lambda model: torch.autocast("cpu", torch.bfloat16),
    "frozen": frozen,
    "recompute": lambda model: nullcontext(recompute_(model)),
}


@pytest.mark.parametrize("mode", MODES)
def test_one_input_of_three_layers_is_quantized_once_in(shared, monkeypatch, mode):
    model, x = shared
    expected, found = separate(model), calls(monkeypatch)
    with MODES[mode](model):
        y = model(x)
        assert sum(not isinstance(t, nn.Parameter) for t in found) == 1
        if mode == "recompute":
            recompute_(expected)
        torch.testing.assert_close(y, expected(x), rtol=0, atol=0)
        if mode != "without gradients" and mode != "frozen":
            torch.testing.assert_close(gradients(model, x), gradients(expected, x))


def test_what_is_shared_is_not_held_when_all_have_it(shared, monkeypatch):
    import lq.nn.tensor_quantizer as module

    model, x = shared
    results, original = [], module.fake_quant

    def watched(x, *args):
        y = original(x, *args)
        results.append((isinstance(x, nn.Parameter), weakref.ref(y)))
        return y

    monkeypatch.setattr(module, "fake_quant", watched)
    with torch.no_grad():
        normed = model.norm(x)
        for layer in (model.q, model.k):
            layer(normed)
        (held,) = [y for is_weight, y in results if not is_weight]
        assert held() is not None
        model.v(normed)
        assert held() is None  # though its input is still there
        model.q(normed)
        held = [y for is_weight, y in results if not is_weight][-1]
        assert held() is not None
        del normed
        assert held() is None


def quantizer_of(model: nn.Module, kind: str) -> lq.TensorQuantizer:
    return model.q.input_quantizer if kind == "input" else model.q.weight_quantizer


def changed_amax(q: lq.TensorQuantizer) -> None:
    new = 0.3 * q.amax
    q.amax = None
    q.amax = new


CHANGES = {
    "scale of amax": lambda q: setattr(q, "quant_desc", q.quant_desc.replace(scale_amax=0.5)),
    "another amax": changed_amax,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["input", "weight"])
def test_nothing_stale(shared, change, kind):
    model, x = shared
    quantizer = quantizer_of(model, kind)
    value = x.clone() if kind == "input" else model.q.weight
    keep_weights_(model)
    with torch.no_grad():
        first = quantizer(value)
        CHANGES[change](quantizer)
        fresh = copy.deepcopy(quantizer)
        fresh._kept = fresh._last = None
        assert torch.equal(quantizer(value), fresh(value))
        assert not torch.equal(quantizer(value), first)


def test_a_gradient_that_is_asked_for_later(shared):
    model, x = shared
    x = x.clone()
    clean = model.k(x)
    y = model.q(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None
    assert not clean.isnan().any()
    expected = x.grad.clone()
    x.grad = None
    separate(model).q(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_layers_that_are_computed_again_one_by_one(shared):
    model, x = shared

    def run(model, through):
        x_ = x.clone().requires_grad_()
        h = model.norm(x_)
        q, k, v = (through(layer, h) for layer in (model.q, model.k, model.v))
        ((q * k).softmax(-1) * v).square().sum().backward()
        return x_.grad

    again = run(model, lambda layer, h: checkpoint(layer, h, use_reentrant=False))
    assert torch.equal(again, run(separate(model), lambda layer, h: layer(h)))


@pytest.mark.parametrize("kind", ["input", "weight"])
def test_a_result_that_somebody_changed_is_not_used_again(shared, kind):
    model, x = shared
    value = x.clone() if kind == "input" else model.q.weight
    keep_weights_(model)
    with torch.no_grad():
        first = quantizer_of(model, kind)(value)
        expected = first.clone()
        first.mul_(100)
        assert torch.equal(quantizer_of(model, kind)(value), expected)


def test_shared_result_goes_with_its_input(shared):
    model, x = shared
    quantizer = model.q.input_quantizer
    with torch.no_grad():
        first = quantizer(x)
        assert quantizer(x) is first
        x.add_(1)
        assert quantizer(x) is not first
    leaf = torch.randn(3, 8, requires_grad=True)
    kept = quantizer(leaf)
    kept.sum().backward()
    again = quantizer(leaf)  # the graph of the first one is gone
    assert again is not kept
    again.sum().backward()


def test_weights_are_quantized_once_in_evaluation(shared, monkeypatch):
    model, x = shared
    expected, found = model(x), calls(monkeypatch)
    with torch.no_grad(), keeping_weights(model):
        for _ in range(3):
            assert torch.equal(model(x), expected)
        assert sum(isinstance(t, nn.Parameter) for t in found) == 3
    with torch.no_grad():
        model(x)
    assert sum(isinstance(t, nn.Parameter) for t in found) == 6
    assert all(m._kept is None for m in model.modules() if isinstance(m, lq.TensorQuantizer))


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("unsigned", [False, True])
def test_gradients_that_are_added_up(axis, unsigned):
    torch.manual_seed(0)
    desc = lq.QuantDescriptor(4, axis=axis, unsigned=unsigned, amax=[[0.1]] if axis is None else [[0.1], [0.2], [0.3]])
    plain = QuantLinear(5, 3, quant_desc_weight=desc, quant_desc_input=lq.QuantDescriptor(amax=2.0))
    with torch.no_grad():
        plain.weight.abs_() if unsigned else None
    kept = copy.deepcopy(plain)
    keep_weights_(kept)
    for model in (plain, kept):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(4):
                model(torch.randn(7, 5)).square().mean().backward()
            optimizer.step()
            if unsigned:
                with torch.no_grad():
                    model.weight.abs_()
    assert torch.equal(plain.weight, kept.weight)
    assert torch.equal(plain.weight.grad, kept.weight.grad)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "foreach": lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_changes_a_weight_is_noticed(shared, name):
    model, x = shared
    keep_weights_(model)
    other = separate(model)
    forget_weights_(other)
    changes = {
        "optimizer": lambda m: (gradients(m, x), OPTIMIZERS[name](m.parameters()).step()),
        "in place": lambda m: m.q.weight.detach().mul_(0.5),
        "state": lambda m: m.load_state_dict({k: 0.9 * v if k == "k.weight" else v for k, v in m.state_dict().items()}),
        "another": lambda m: setattr(m.v, "weight", nn.Parameter(0.3 * m.v.weight.detach())),
        "amax": lambda m: setattr(m.v.weight_quantizer, "amax", 0.5 * m.v.weight_quantizer.amax),
        "bits": lambda m: setattr(m.q.weight_quantizer, "num_bits", 4),
        "type": lambda m: m.double(),
    }
    for what, change in changes.items():
        change(model)
        change(other)
        dtype = model.q.weight.dtype
        with torch.no_grad():
            assert torch.equal(model(x.to(dtype)), other(x.to(dtype))), what


def test_inference_mode(shared):
    model, x = shared
    expected = separate(model)
    with keeping_weights(model):
        with torch.inference_mode():
            assert torch.equal(model(x.clone()), expected(x.clone()))
        torch.testing.assert_close(gradients(model, x), gradients(expected, x))


def test_copies_begin_with_nothing(shared):
    model, x = shared
    keep_weights_(model)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.q.weight_quantizer._kept._values is None
        assert other.q.input_quantizer is other.k.input_quantizer
        with torch.no_grad():
            other.q.weight.mul_(2)
        assert not torch.equal(other(x), expected)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_one_input_of_three_layers_is_collected_once(shared, mode):
    model, x = shared
    batches = [torch.randn(4, 5, 8) for _ in range(4)]
    with mode(), lq.calibrating(model, method="auto"):
        for batch in batches:
            model(batch)
        # once more the same, as data that is gone over twice
        model(batches[-1])
        model(batches[-1])
    calibrator = model.q.input_quantizer.calibrator
    assert calibrator.update_count == 6
    assert int(calibrator.counts.sum()) == 6 * x.numel()
    # the second of every four is apart, and so is no copy of another
    assert int(calibrator.split()[1].sum()) == 2 * x.numel()
    alone = lq.calib.HeldOutCalibrator()
    with torch.no_grad():
        for batch in [*batches, batches[-1], batches[-1]]:
            alone.collect(model.norm(batch))
    assert torch.equal(model.q.input_quantizer.amax, alone.compute_amax("auto"))


def test_what_is_fed_again_itself_is_collected_again():
    """An input of the model, and no value in it: the same object in every run."""
    model, x = Attention(), torch.randn(4, 8)
    model.norm = nn.Identity()
    lq.quantize_(model, target="tensorrt", args=x)
    with lq.calibrating(model, method="mse"):
        for _ in range(3):
            model(x)
        x.mul_(2)
        model(x)
    assert model.q.input_quantizer is model.k.input_quantizer
    assert model.q.input_quantizer.calibrator.update_count == 4
