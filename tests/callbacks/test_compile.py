"""Train batches in compiled code: the same fit, compiled once."""

import copy

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor

import lq
from lq.callbacks import Compile, Distill, OnnxExport, QuantizationAwareTraining, Quantize
from tiny import NoForward, Tiny, loader, trainer


class Losses(Callback):
    """What the fit went through."""

    def __init__(self) -> None:
        self.train: list[Tensor] = []
        self.copies: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append(outputs["loss"].detach())
        self.copies.append(copy.deepcopy(pl_module).eval()(batch[0]))


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    return []


def fitted(tmp_path, graphs, *callbacks, distill=False, **options):
    """A fit without random masks; where ``graphs`` is a list, compiled into it."""
    torch.manual_seed(0)
    model, seen = Tiny(), Losses()
    model.net[3].p = 0.0
    first = [] if graphs is None else [Compile(fullgraph=True, backend=lambda g, _: graphs.append(g) or g.forward)]
    run = trainer(tmp_path, *first, QuantizationAwareTraining(distill=distill), *callbacks, seen, **options)
    run.fit(model, loader(), loader())
    return model, seen


@pytest.mark.parametrize("distill", [False, True])
def test_the_same_fit(tmp_path, graphs, distill):
    plain, expected = fitted(tmp_path, None, distill=distill)
    model, found = fitted(tmp_path, graphs, distill=distill)
    # others where scales are observed before a refresh, where BatchNorm is frozen, and of the teacher
    assert len(graphs) == 3 + distill
    torch.testing.assert_close(found.train, expected.train)
    torch.testing.assert_close(found.copies, expected.copies)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_nothing_is_left_of_it(tmp_path, graphs):
    pytest.importorskip("onnxscript")
    model, _ = fitted(tmp_path, graphs, OnnxExport(tmp_path / "model.onnx"), max_epochs=1)
    assert "forward" not in vars(model)
    assert (tmp_path / "model.onnx").exists()
    before = len(graphs)
    copy.deepcopy(model)(torch.randn(2, 6)).sum().backward()
    assert len(graphs) == before


def test_nothing_is_left_of_a_fit_that_fails(tmp_path, graphs):
    class Failing(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("full disk")

    model, distill = Tiny(), Distill()
    with pytest.raises(RuntimeError, match="full disk"):
        trainer(tmp_path, Failing(), Compile(backend="eager"), distill, Quantize()).fit(model, loader())
    assert "forward" not in vars(model) | vars(distill.teacher)


def test_under_ddp(tmp_path, graphs):
    try:
        _, found = fitted(tmp_path, graphs, distill=True, max_epochs=1, strategy="ddp")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    _, expected = fitted(tmp_path, None, distill=True, max_epochs=1)
    assert len(graphs) == 3
    torch.testing.assert_close(found.train, expected.train)


def test_disabled(tmp_path):
    model = Tiny()
    trainer(tmp_path, Compile(disable=True, backend="nothing"), Quantize(), max_epochs=1).fit(model, loader())
    assert list(lq.named_quantizers(model))


@pytest.mark.parametrize(
    ("callbacks", "model", "message"),
    [
        ([Compile()], NoForward(), "NoForward has no `forward` to compile"),
        ([Distill(), Compile()], Tiny(), "stands behind Distill: put it first"),
        ([Compile(), Distill(layers=["net.0"])], Tiny(), "whose outputs compiled code does not show"),
        ([Compile()], torch.compile(Tiny()), "as `torch.compile\\(module\\)` makes it: give the Trainer the module itself"),
        ([Distill()], torch.compile(Tiny()), "and a `lq.callbacks.Compile` before Distill"),
    ],
)
def test_what_it_refuses(tmp_path, callbacks, model, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, *callbacks, Quantize()).fit(model, loader())
