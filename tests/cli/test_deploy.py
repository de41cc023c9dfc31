"""What a run says about its graph, for classes and for embeddings."""

from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten

from lq.analysis.records import Deployed
from lq.cli.deploy import Deployment
from lq.export.difference import Totals
from lq.export.verify import Verification


def deployment(outputs, expected, actual):
    totals = Totals()
    totals.add("onnxruntime", [expected], (actual,))
    verification = Verification(len(expected), expected.argmax(1), totals.result("onnxruntime", ("y",), [0.1]), None, ())
    graph = Deployed("float", Path("float.onnx"), 1, 1.0)
    return Deployment(graph, graph, [], verification, outputs, tree_flatten(expected)[1], "")


EXPECTED, ACTUAL = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])


def test_classes_agree_by_their_argmax():
    found = deployment("classes", EXPECTED, ACTUAL)
    assert found.notes()["agreement with ONNX Runtime"] == "50.00 % of 2 predictions; 1 disagree, at most 10 steps apart"
    assert found.figures() == {"agreement": 0.5, "worst_disagreement_steps": pytest.approx(10)}


def test_embeddings_agree_by_their_cosine_and_their_length_does_not_count():
    found = deployment("embeddings", EXPECTED, 3 * ACTUAL)
    assert found.notes()["agreement with ONNX Runtime"] == "cosine at least 0.707107, of 2 embeddings"
    assert found.figures() == {"least_cosine": pytest.approx(0.5**0.5)}


def test_the_least_cosine_of_a_graph_that_gives_nan_is_none_to_be_content_with():
    totals = Totals()
    totals.add("onnxruntime", [torch.randn(4, 3)], (torch.full((4, 3), float("nan")),))
    assert totals.result("onnxruntime", ("y",), [0.1]).least_cosine == -1


def test_the_least_cosine_is_that_of_all_batches():
    totals = Totals()
    for actual in (ACTUAL, EXPECTED):
        totals.add("onnxruntime", [EXPECTED], (actual,))
    assert totals.result("onnxruntime", ("y",), [0.1]).least_cosine == pytest.approx(0.5**0.5)
