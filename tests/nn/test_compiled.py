"""A compiled model is compiled once, whatever happens to its scales in a fit."""

import pytest
import torch
from torch import nn

import lq

RULES = {
    "fixed": "int8",
    "learned": [lq.QuantRule("*", lq.QuantDescriptor(4, learn_amax="lsq"), lq.QuantDescriptor(4, axis=0, learn_amax="lsq"))],
}


@pytest.mark.parametrize("kind", RULES)
def test_refreshing_and_freezing_compile_nothing_and_collecting_once(kind):
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 8)
    lq.quantize_(model, RULES[kind])
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
    if kind == "fixed":
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
