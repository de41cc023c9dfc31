"""A compiled model is compiled once, whatever happens to its scales in a fit."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lq
from lq.nn import recompute_
from lq.nn.reuse import keeping_weights

RULES = {
    "fixed": "int8",
    "fixed, histograms": [lq.QuantRule("*", *(lq.QuantDescriptor(axis=axis, calib_method="histogram") for axis in (None, 0)))],
    "learned": [lq.QuantRule("*", lq.QuantDescriptor(4, learn_amax="lsq"), lq.QuantDescriptor(4, axis=0, learn_amax="lsq"))],
}


@pytest.mark.parametrize(("kind", "recompute"), [*((kind, False) for kind in RULES), ("fixed", True)])
def test_refreshing_and_freezing_compile_nothing_and_collecting_once(kind, recompute):
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 8)
    recompute_(lq.quantize_(model, RULES[kind]), recompute)
    with lq.calibrating(model):
        model(x)
    model(x)  # what a new amax is looked at with: a model compiled before is compiled again after it
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    quantizers = [quantizer for _, quantizer in lq.named_quantizers(model)]

    def compiles():
        compiled(x).sum().backward()
        return len(graphs)

    assert compiles() == 1
    for quantizer in quantizers:
        quantizer.amax = 1.1 * quantizer.amax
    assert compiles() == 1
    torch.testing.assert_close(compiled(x), model(x))
    with keeping_weights(model):
        assert compiles() == 1
    if "fixed" in kind:
        lq.freeze_(model)
        assert compiles() == 1
        lq.unfreeze_(model)
    for _ in range(2):
        for quantizer in quantizers:
            quantizer.enable_calib()
        assert compiles() == 2
        for quantizer in quantizers:
            quantizer.disable_calib()
        assert compiles() == 2
    assert all(quantizer.calibrator.collected for quantizer in quantizers)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_under_ddp_and_autocast(one_process):
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)), torch.randn(2, 3, 8, 8)
    lq.quantize_(model)
    with lq.calibrating(model):
        model(x)
    model(x)
    plain, graphs = copy.deepcopy(model), []

    # the other way round dynamo stops at DDP itself, in float too
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    parallel = DistributedDataParallel(torch.compile(model, fullgraph=True, backend=backend))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            y = parallel(x)
            y.float().square().sum().backward()
            for _, quantizer in lq.named_quantizers(model):
                quantizer.amax = 1.0 * quantizer.amax
        assert len(graphs) == 1
        for _ in range(3):
            expected = plain(x)
            expected.float().square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0.05, atol=0.05)
