"""Sensitivity against a NumPy reference, and that it leaves the model as it was."""

import copy
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import lq
from lq.analysis import sensitivity
from lq.analysis.rules import quant_group
from lq.nn import TensorQuantizer

NAMES = ["0.input", "0.weight", "2.input", "2.weight"]


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False)


def calibrated(model, batches, rules="w4a8", **target):
    lq.quantize_(model, rules, **target)
    with lq.calibrating(model):
        for batch in batches:
            model(batch)
    return model


@pytest.fixture
def batches():
    return [torch.randn(16, 6), torch.randn(9, 6)]


@pytest.fixture
def model(batches):
    return calibrated(network(), batches)


def rounded(x, amax, low, high):
    scale = amax / high
    return np.clip(np.rint(x / scale), low, high) * scale


def reference(model, batches, on):
    """The output with some quantizers on, in float64, from the formula."""
    x = torch.cat(batches).double().numpy()
    w1, b1, w2, b2 = (p.double().numpy() for p in model.parameters())
    quantizers = dict(lq.named_quantizers(model))

    def q(name, values):
        amax = quantizers[name].amax.double().numpy()
        return rounded(values, amax, *((-7, 7) if "weight" in name else (-128, 127))) if name in on else values

    x = np.maximum(q("0.input", x) @ q("0.weight", w1).T + b1, 0)
    return q("2.input", x) @ q("2.weight", w2).T + b2


def error(model, batches, on):
    return np.square(reference(model, batches, on) - reference(model, batches, []))


@pytest.mark.parametrize(("by", "parts"), [("quantizer", {n: [n] for n in NAMES}), ("layer", {"0": NAMES[:2], "2": NAMES[2:]})])
def test_each_alone_and_all_but_it_as_in_numpy(model, batches, by, parts):
    found = sensitivity(model, batches, by=by)
    assert {row.name for row in found.rows} == set(parts)
    energy = np.square(reference(model, batches, [])).sum()
    for row in found.rows:
        others = [name for name in NAMES if name not in parts[row.name]]
        for effect, on in ((row.alone, parts[row.name]), (row.without, others)):
            expected = error(model, batches, on)
            assert effect.mse == pytest.approx(expected.mean(), rel=1e-3)
            assert effect.sqnr_db == pytest.approx(10 * np.log10(energy / expected.sum()), abs=0.01)
    assert found.quantized.mse == pytest.approx(error(model, batches, NAMES).mean(), rel=1e-3)
    assert [row.alone.mse for row in found.rows] == sorted((row.alone.mse for row in found.rows), reverse=True)


def test_metrics_of_torchmetrics_and_by_a_function(model, batches):
    targets = [reference(model, [x], []).argmax(1) for x in batches]
    targets = [torch.tensor(np.where(np.arange(len(t)) % 4 == 0, 0, t)) for t in targets]
    metric = MulticlassAccuracy(num_classes=3, average="micro")
    found = sensitivity(model, batches, metric=metric, targets=targets)
    every = torch.cat(targets).numpy()

    def accuracy(on):
        return (reference(model, batches, on).argmax(1) == every).mean()

    assert found.metric_name == "multiclass_accuracy"
    assert found.float_metric == pytest.approx(accuracy([]))
    assert found.quantized.metric == pytest.approx(accuracy(NAMES))
    for row in found.rows:
        assert row.alone.metric == pytest.approx(accuracy([row.name]))
        assert row.without.metric == pytest.approx(accuracy([n for n in NAMES if n != row.name]))
    assert not metric.update_called

    def switched_on(model):
        return sum(1 for _ in lq.named_quantizers(model))

    found = sensitivity(model, batches, metric=switched_on)
    assert (found.metric_name, found.float_metric, found.quantized.metric) == ("switched_on", 0, 4)
    assert {(row.alone.metric, row.without.metric) for row in found.rows} == {(1, 3)}


def switches(model):
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    return [(q._disabled, q._if_quant, q._if_calib, q._kept, q.amax) for q in quantizers]


class FailError(Exception):
    pass


@pytest.mark.parametrize("by", ["quantizer", "layer"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_afterwards_as_it_was(batches, by, fails):
    model = calibrated(nn.Sequential(Joined(), nn.BatchNorm1d(5)), batches, "int8", target="tensorrt", args=batches[0])
    model[0].key.weight_quantizer.disable()
    model[0].query.weight_quantizer.enable_calib()
    model.train()
    model[0].eval()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    flags, modes = switches(model), [m.training for m in modules]
    calls = []

    def metric(model):
        calls.append(1)
        if fails and len(calls) == 3:
            raise FailError
        return 0.0

    if fails:
        with pytest.raises(FailError):
            sensitivity(model, batches, by=by, metric=metric)
    else:
        sensitivity(model, batches, by=by, metric=metric)
    assert list(model.modules()) == modules
    assert [m.training for m in modules] == modes
    assert switches(model) == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[0].query.weight_quantizer.calibrator._update_count == 1


class Joined(nn.Module):
    """Two layers that take one tensor."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        return self.query(x) * self.key(x)


def test_a_shared_quantizer_is_one_and_a_layer_has_its_own_use_of_it(batches):
    model = calibrated(Joined().requires_grad_(False), batches, "int8", target="tensorrt", args=batches[0])
    assert model.query.input_quantizer is model.key.input_quantizer
    assert {row.name for row in sensitivity(model, batches).rows} == {"query.input", "query.weight", "key.weight"}
    x = torch.cat(batches)
    expected = (model.query(x) * nn.functional.linear(x, model.key.weight, model.key.bias)).double()
    with lq.surgery.unquantized(model):
        noise = (expected - model(x)).square().mean().item()
    row = next(row for row in sensitivity(model, batches, by="layer").rows if row.name == "query")
    assert row.alone.mse == pytest.approx(noise, rel=1e-5)


def test_rules_build_the_model_that_was_measured(batches):
    torch.manual_seed(3)
    float_model = network()
    found = sensitivity(calibrated(copy.deepcopy(float_model), batches), batches, by="layer")
    worst = found.rows[0]
    spared = calibrated(copy.deepcopy(float_model), batches, found.rules(worst=1))
    assert not any(name.startswith(f"{worst.name}.") for name, _ in lq.named_quantizers(spared))
    noise = (torch.cat([spared(x) - float_model(x) for x in batches])).double().square().mean().item()
    assert worst.without.mse == pytest.approx(noise, rel=1e-5)


def test_rules_spare_by_rank_or_by_decibels_one_tensor_or_all_of_a_layer(model, batches):
    found = sensitivity(model, batches)
    assert [row.name for row in found.rows[:2]] == ["2.weight", "0.weight"]
    bits = {name: q.num_bits for name, q in lq.named_quantizers(lq.quantize_(network(), found.rules(worst=1, num_bits=8)))}
    assert bits == {"0.input": 8, "0.weight": 4, "2.input": 8, "2.weight": 8}
    assert list(dict(lq.named_quantizers(lq.quantize_(network(), found.rules(worst=1))))) == ["0.input", "0.weight", "2.input"]
    between = (found.rows[1].alone.sqnr_db + found.rows[2].alone.sqnr_db) / 2
    assert found.rules(below_db=between) == found.rules(worst=2)
    assert found.rules(worst=0) == list(found.layers.values())
    assert found.rules(worst=4) == []


def test_names_with_wildcards_mean_themselves():
    model = nn.Sequential()
    model.add_module("a[1]", nn.Linear(6, 6))
    model.add_module("a1", nn.Linear(6, 3))
    found = sensitivity(calibrated(model, [torch.randn(4, 6)]), [torch.randn(4, 6)], by="layer")
    assert {row.name for row in found.rows} == {"a[1]", "a1"}
    for rule in found.rules(worst=1):
        again = nn.Sequential()
        again.add_module("a[1]", nn.Linear(6, 6))
        again.add_module("a1", nn.Linear(6, 3))
        names = {name.rpartition(".")[0] for name, _ in lq.named_quantizers(lq.quantize_(again, [rule]))}
        assert names == {found.rows[1].name}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_products_of_a_forward_have_rules_too():
    batches = [torch.randn(2, 5, 6)]
    model = calibrated(Attention(), batches, "int8_attention", target="tensorrt", args=batches[0])
    found = sensitivity(model, batches, by="layer")
    assert {row.name for row in found.rows} == {"qkv", "scaled_dot_product_attention"}
    again = lq.quantize_(Attention(), found.rules(worst=0), target="tensorrt", args=batches[0])
    assert list(dict(lq.named_quantizers(again))) == list(dict(lq.named_quantizers(model)))


class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.quantizer = TensorQuantizer(lq.QuantDescriptor(amax=1.0, num_bits=2))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.quantizer(self.fc(x))


@pytest.mark.parametrize("by", ["quantizer", "layer"])
def test_a_quantizer_in_somebodys_forward_is_measured_and_no_rule_reaches_it(batches, by):
    found = sensitivity(calibrated(Alone(), batches), batches, by=by)
    assert (found.rows[0].name, found.rows[0].bits) == ("quantizer", "A2")
    with pytest.raises(ValueError, match="`quantizer` stands alone in a `forward`"):
        found.rules(worst=1)
    assert [rule.pattern for rule in found.rules(worst=0)] == ["fc"]


def test_outputs_that_are_nested_and_not_all_floating(batches):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x, scale):
            y = self.fc(x) * scale
            return {"logits": y, "more": [y.argmax(-1), 2 * y]}

    pairs = [(x, torch.tensor(2.0)) for x in batches]
    model = lq.quantize_(Nested(), "int8")
    with lq.calibrating(model):
        for pair in pairs:
            model(*pair)
    x = torch.cat(batches)
    with torch.no_grad():
        noise = 2 * (model.fc(x) - nn.functional.linear(x, model.fc.weight, model.fc.bias)).double()
        expected = torch.cat([noise, 2 * noise]).square().mean().item()
    assert sensitivity(model, pairs).quantized.mse == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"batches": []}, ValueError, "`batches` is empty"),
        ({"batches": torch.ones(2, 6)}, TypeError, "`batches` is one tensor"),
        ({"batches": [torch.full((1, 6), torch.nan)]}, ValueError, "float output of batch 0 has NaN or Inf"),
        ({"by": "block"}, ValueError, "`by` is 'block': choose 'quantizer' or 'layer'"),
        ({"metric": MulticlassAccuracy(3)}, ValueError, "`metric` is a MulticlassAccuracy, which compares: give `targets`"),
        ({"metric": MulticlassAccuracy(3), "targets": [1]}, ValueError, "`targets` has 1, and there are 2 batches"),
        ({"targets": [1, 2]}, ValueError, "`targets` are for a `metric` of torchmetrics"),
        ({"model": network()}, ValueError, "Sequential has no quantizer at work"),
        ({"model": lq.quantize_(network())}, ValueError, "4 quantizers have no amax, first `0.input`"),
    ],
)
def test_what_is_wrong_is_told(model, batches, options, kind, words):
    with pytest.raises(kind, match=words):
        sensitivity(**{"model": model, "batches": batches} | options)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, "`worst` is None and `below_db` None: give one of them"),
        ({"worst": 1, "below_db": 3}, "`worst` is 1 and `below_db` 3: give one of them"),
        ({"worst": 5}, "`worst` is 5: there are 4 rows to spare"),
    ],
)
def test_what_is_wrong_with_the_choice_of_rules_is_told(model, batches, told, words):
    with pytest.raises(ValueError, match=words):
        sensitivity(model, batches).rules(**told)


def test_table_fits_a_terminal_and_records_are_json_and_the_figure_is_drawn(tmp_path, model, batches):
    targets = [x[:, 0].gt(0).long() for x in batches]
    found = sensitivity(model, batches, metric=MulticlassAccuracy(num_classes=3), targets=targets)
    console = Console(width=80, file=io.StringIO())
    console.print(found.table())
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(row.name in line for line in lines) for row in found.rows)
    assert json.loads(json.dumps(found.records()))["rows"][0]["alone"]["mse"] == found.rows[0].alone.mse
    assert found.figure(tmp_path / "sensitivity.png").stat().st_size > 10_000


def test_a_config_group_says_what_the_rules_say(model, batches):
    import yaml

    rules = sensitivity(model, batches).rules(worst=1)
    group = yaml.safe_load(quant_group(rules, "mixed"))
    assert group["name"] == "mixed"
    assert [lq.QuantRule.from_dict(rule) for rule in group["rules"]] == rules
