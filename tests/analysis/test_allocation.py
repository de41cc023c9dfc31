"""Allocation of bits against brute force, NumPy, and models that are built from its rules."""

import copy
import io
import itertools
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import lq
from lq.analysis import allocate_bits, front
from lq.analysis.allocation import Allocator, choose
from lq.analysis.widths import Trial, Widths


def brute_force(options, budget):
    fits = [
        (sum(group[i][1] for group, i in zip(options, places, strict=True)), places)
        for places in itertools.product(*(range(len(group)) for group in options))
        if sum(group[i][0] for group, i in zip(options, places, strict=True)) <= budget
    ]
    return min(fits)[0]


@pytest.mark.parametrize("seed", range(40))
def test_the_program_finds_what_brute_force_finds(seed):
    random = np.random.default_rng(seed)
    # errors of few bits and of many lie powers of ten apart
    options = [
        [(float(bits * size), float(10.0 ** random.uniform(-9, 4))) for bits in (2, 4, 8)] for size in random.integers(1, 999, 4)
    ]
    least, most = (sum(end(cost for cost, _ in group) for group in options) for end in (min, max))
    budget = random.uniform(least, most)
    places = choose(options, budget)
    found = [group[i] for group, i in zip(options, places, strict=True)]
    assert sum(cost for cost, _ in found) <= budget
    assert sum(error for _, error in found) == pytest.approx(brute_force(options, budget), rel=1e-6)


def network():
    sizes = ((6, 16), (16, 24), (24, 12), (12, 3))
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).requires_grad_(False)


@pytest.fixture
def batches():
    return [torch.randn(16, 6), torch.randn(9, 6)]


def calibrated(model, batches, rules="int8", method="max", **target):
    lq.quantize_(model, rules, **target)
    with lq.calibrating(model, method):
        for batch in batches:
            model(batch)
    return model


@pytest.fixture
def model(batches):
    return calibrated(network(), batches)


def rounded(x, amax, low, high):
    scale = np.asarray(amax, np.float32).astype(float) / high
    return np.clip(np.rint(x / scale), low, high) * scale


def outputs(model, batches, layer=None, weight=8, activation=8):
    """In float64, from the formula, with the largest magnitude for amax and one layer quantized."""
    x = torch.cat(batches).double().numpy()
    for name, module in model.named_children():
        if isinstance(module, nn.ReLU):
            x = np.maximum(x, 0)
            continue
        w, b = module.weight.double().numpy(), module.bias.double().numpy()
        if name == layer:
            x = rounded(x, np.abs(x).max(), -(2 ** (activation - 1)), 2 ** (activation - 1) - 1)
            top = 2 ** (weight - 1) - 1
            w = rounded(w, np.abs(w).max(1, keepdims=True), -top, top)
        x = x @ w.T + b
    return x


@pytest.mark.parametrize("by", ["size", "bit_operations"])
def test_errors_and_costs_as_in_numpy(model, batches, by):
    allocator = Allocator(model, batches, (2, 4, 8), by, "max")
    assert len(allocator.errors) == 12
    for (name, widths), error in allocator.errors.items():
        assert widths.input == (8 if by == "size" else widths.weight)
        noise = outputs(model, batches, name, *widths) - outputs(model, batches)
        assert error == pytest.approx(np.square(noise).mean(), rel=2e-3)
    widths = dict(zip(["0", "2", "4", "6"], [Widths(4, 8), Widths(2, 2), Widths(8, 4), Widths(8, 8)], strict=True))
    sizes = [6 * 16, 16 * 24, 24 * 12, 12 * 3]
    assert allocator.trial.size(widths) == sum(n * w.weight for n, w in zip(sizes, widths.values(), strict=True)) / 8
    operations = sum(16 * n * w.weight * w.input for n, w in zip(sizes, widths.values(), strict=True))
    assert allocator.trial.bit_operations(widths) == operations


@pytest.mark.parametrize("by", ["size", "bit_operations"])
@pytest.mark.parametrize("budget", [2, 2.7, 4, 5.5, 8])
def test_an_allocation_is_the_best_of_all(model, batches, by, budget):
    allocator = Allocator(model, batches, (2, 4, 8), by)
    found = allocator.allocate(budget)
    names, everything = list(allocator.choices), list(itertools.product(*allocator.choices.values()))
    assert len(everything) == 81
    uniform = {name: Widths(8, 8) for name in names}
    limit = allocator.cost(uniform) * (budget / 8 if by == "size" else (budget / 8) ** 2)
    sums = [
        sum(allocator.errors[pair] for pair in zip(names, widths, strict=True))
        for widths in everything
        if allocator.cost(dict(zip(names, widths, strict=True))) <= limit * (1 + 1e-9)
    ]
    assert found.predicted_mse == pytest.approx(min(sums), rel=1e-6)
    assert found.mean_bits <= budget + 1e-9


def test_rules_build_the_model_that_was_measured(batches):
    float_model = network()
    found = allocate_bits(calibrated(copy.deepcopy(float_model), batches), batches, (2, 4, 8), budget=5)
    assert len({w.weight for w in found.widths.values()}) > 1
    built = calibrated(copy.deepcopy(float_model), batches, found.rules, "mse")
    widths = {name: Widths(built[int(name)].weight_quantizer.num_bits, 8) for name in found.widths}
    assert widths == found.widths
    noise = torch.cat([built(x) - float_model(x) for x in batches]).double().square().mean().item()
    assert found.effect.mse == pytest.approx(noise, rel=1e-6)


class Joined(nn.Module):
    """Two layers that take one tensor, and a product of what they give."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return self.query(x) @ self.key(x).mT


def test_layers_that_share_a_quantizer_may_differ_and_products_count():
    rules = [lq.QuantRule("*", {}, {"axis": 0}), lq.QuantRule("*", {}, types=("QuantMatmul",))]
    batches = [torch.randn(2, 4, 6)]
    float_model = Joined().requires_grad_(False)
    model = calibrated(copy.deepcopy(float_model), batches, rules, target="tensorrt", args=batches[0])
    assert model.query.input_quantizer is model.key.input_quantizer
    trial = Trial(model, batches, (4, 8), "mse")
    assert trial.macs == {"query": 2 * 4 * 6 * 5, "key": 2 * 4 * 6 * 5, "matmul": 2 * 4 * 4 * 5}
    assert trial.weights == {"query": 30, "key": 30, "matmul": 0}
    widths = {"query": Widths(8, 8), "key": Widths(4, 4), "matmul": Widths(None, 4)}
    assert trial.bit_operations(widths) == 240 * 64 + 240 * 16 + 160 * 16
    effect = trial.measure(widths)
    built = calibrated(copy.deepcopy(float_model), batches, trial.rules(widths), "mse", target="tensorrt", args=batches[0])
    assert {name: q.num_bits for name, q in lq.named_quantizers(built)} == {
        **{"query.input": 8, "query.weight": 8, "key.input": 4, "key.weight": 4},
        **{"matmul.input": 4, "matmul.other": 4},
    }
    noise = (built(batches[0]) - float_model(batches[0])).double().square().mean().item()
    assert effect.mse == pytest.approx(noise, rel=1e-6)


def test_multiplications_of_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=3, stride=2), nn.Flatten(), nn.Linear(54, 2))
    batches = [torch.randn(5, 4, 8, 8)]
    trial = Trial(calibrated(model, batches), batches, (8,), "max")
    assert trial.macs == {"0": 5 * 6 * 64 * 4 * 9, "1": 5 * 6 * 9 * 2 * 9, "3": 5 * 54 * 2}


def test_pairs_and_what_is_in_float(batches):
    rules = [lq.QuantRule("*", {}, {"axis": 0}), lq.QuantRule("0", None, {"axis": 0}), lq.QuantRule("6", {}, None)]
    allocator = Allocator(calibrated(network(), batches, rules), batches, [(4, 8), (8, 4), (4, 4)], "bit_operations")
    assert allocator.choices["2"] == [Widths(4, 8), Widths(8, 4), Widths(4, 4)]
    assert allocator.choices["0"] == [Widths(4, None), Widths(8, None)]
    assert allocator.choices["6"] == [Widths(None, 8), Widths(None, 4)]
    assert Widths(4, None).product == 128
    assert Widths((4, 3), 8).product == 64
    found = allocator.allocate(allocator.range()[0])
    assert found.widths == {"0": Widths(4, None), "2": Widths(4, 4), "4": Widths(4, 4), "6": Widths(None, 4)} or (
        found.bit_operations == allocator.cost({"0": Widths(4, None), "2": Widths(4, 4), "4": Widths(4, 4), "6": Widths(None, 4)})
    )


@pytest.mark.parametrize(
    "rules",
    [
        [lq.QuantRule("*", {"affine": True}, {"axis": 0})],
        [lq.QuantRule("*", {"learn_amax": True}, {"axis": 0, "learn_amax": True})],
        [lq.QuantRule("*", {"learn_amax": "lsq"}, {"axis": 0, "learn_amax": "lsq"})],
        [lq.QuantRule("*", {"amax": 3.0, "narrow_range": False}, {"axis": 0})],
        [lq.QuantRule("*", {}, {"axis": 0, "num_bits": (4, 3)})],
    ],
)
def test_other_kinds_of_quantizers_and_nothing_of_the_model_changes(batches, rules):
    float_model = network()
    model = lq.freeze_(calibrated(copy.deepcopy(float_model), batches, rules)).train()
    before = copy.deepcopy(model.state_dict())
    descs = [q.quant_desc for _, q in lq.named_quantizers(model)]
    found = allocate_bits(model, batches, (3, 8), budget=5)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [q.quant_desc for _, q in lq.named_quantizers(model)] == descs
    assert {w.weight for w in found.widths.values()} == {3, 8}
    built = calibrated(copy.deepcopy(float_model), batches, found.rules, "mse")
    noise = torch.cat([built(x) - float_model(x) for x in batches]).double().square().mean().item()
    assert found.effect.mse == pytest.approx(noise, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 1.9}, r"`budget` is 1.9: the narrowest widths of `bits` everywhere are 2 bits .* 8 \(201 and 804 bytes\)"),
        ({"budget": 9}, "`budget` is 9: .* the widest 8"),
        ({"budget": 9, "by": "bit_operations"}, "`budget` is 9: .* bit-operations"),
        ({"budget": float("nan")}, "`budget` is nan"),
        ({"bits": ()}, "`bits` is empty"),
        ({"bits": ("4",)}, "`bits` has '4': give widths, as 4, or pairs"),
        ({"bits": (1, 4)}, "`num_bits` is 1"),
        ({"by": "time"}, "`by` is 'time': choose 'size' or 'bit_operations'"),
        ({"model": network()}, "has no quantizer at work"),
        ({"batches": []}, "`batches` is empty"),
    ],
)
def test_what_is_wrong_is_told(model, batches, options, words):
    with pytest.raises(ValueError, match=words):
        allocate_bits(**{"model": model, "batches": batches, "budget": 4, "bits": (2, 4, 8)} | options)


def test_nothing_to_weigh(batches):
    model = calibrated(network(), batches, [lq.QuantRule("*", {})])
    with pytest.raises(ValueError, match="`by` is 'size', and no quantized layer has weights"):
        allocate_bits(model, batches, budget=4)


def test_without_scipy(model, batches, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r'`scipy` is missing: allocating bits needs `pip install "lightning-lq\[recipes\]"`'):
        allocate_bits(model, batches, budget=4)


def test_a_front_has_the_uniform_widths_beside_it_and_is_shown(tmp_path, model, batches):
    def accuracy(model):
        x = torch.cat(batches)
        return (model(x).argmax(1) == torch.tensor(outputs(model, batches)).argmax(1)).double().mean()

    found = front(model, batches, (2, 4, 8), metric=accuracy)
    assert len(found.allocated) == 9
    assert [a.mean_bits for a in found.uniform] == [2, 4, 8]
    assert found.float_metric == 1
    assert found.allocated[0].widths == found.uniform[0].widths
    assert found.allocated[0].effect == found.uniform[0].effect
    for a in found.uniform:
        assert found.allocated[-1].predicted_mse <= a.predicted_mse * (1 + 1e-9)
    console = Console(width=80, file=io.StringIO())
    console.print(found.table(), found.allocated[4].table())
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "all W4A8" in text
    assert found.figure(tmp_path / "front.png").stat().st_size > 10_000
