"""Train batches in compiled code: the same fit, compiled once."""

import copy

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from torch import Tensor

import lq
from lq.callbacks import Compile, Distill, OnnxExport, ProgressiveBits, QuantizationAwareTraining, Quantize
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


def compiling(graphs):
    return Compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)


def fitted(tmp_path, graphs, *callbacks, qat=None, distill=False, batch_size=4, **options):
    """A fit without random masks; where ``graphs`` is a list, compiled into it."""
    torch.manual_seed(0)
    model, seen = Tiny(), Losses()
    model.net[3].p = 0.0
    first = [] if graphs is None else [compiling(graphs)]
    run = trainer(tmp_path, *first, *(qat or [QuantizationAwareTraining(distill=distill)]), *callbacks, seen, **options)
    run.fit(model, loader(batch_size=batch_size), loader())
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
        _, expected = fitted(tmp_path, None, distill=True, max_epochs=1, strategy="ddp")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert len(graphs) == 3
    torch.testing.assert_close(found.train, expected.train)


@pytest.mark.parametrize("recompute", [False, True])
def test_stages_of_bits_are_calibrated_in_eager_code(tmp_path, graphs, recompute):
    rules = [lq.QuantRule("*", lq.QuantDescriptor(2, learn_amax="lsq"), lq.QuantDescriptor(2, axis=0, learn_amax="lsq"))]
    # from elsewhere a weight comes to lie between two codes in the last step, where a difference of 4e-8 chooses one of them
    method = {"*": "mse", "*.weight": "max"}
    qat = lambda: [Quantize(rules, method=method, alpha=None, recompute=recompute), ProgressiveBits({0: 4, 4: 3, 8: 2})]  # noqa: E731
    plain, expected = fitted(tmp_path, None, qat=qat())
    model, found = fitted(tmp_path, graphs, qat=qat())
    assert len(graphs) == 3
    torch.testing.assert_close(found.train, expected.train)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_every_fit_of_a_process_is_compiled(tmp_path, graphs):
    counts = []
    for bits in (8, 7, 6, 5):
        before, rules = len(graphs), [lq.QuantRule("*", lq.QuantDescriptor(bits), lq.QuantDescriptor(bits, axis=0))]
        # the last batch is smaller
        fitted(tmp_path, graphs, qat=[Distill(), Quantize(rules)], batch_size=5, max_epochs=1)
        counts.append(len(graphs) - before)
    assert min(counts) > 0
    assert sum(counts) > 8  # dynamo's own limit


def test_a_module_that_a_strategy_wrapped_before(tmp_path, graphs):
    model = Tiny()
    model.forward = model.forward  # as DDP leaves it
    distill = Distill()
    trainer(tmp_path, compiling(graphs), distill, Quantize(), max_epochs=1).fit(model, loader())
    assert len(graphs) == 2
    assert not list(lq.named_quantizers(distill.teacher))


def test_an_epoch_that_the_module_ends(tmp_path, graphs):
    class Skipping(Tiny):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    class Looking(Callback):
        def on_train_end(self, trainer, pl_module):
            assert "forward" not in vars(pl_module)

    trainer(tmp_path, compiling(graphs), Looking(), Quantize(), max_epochs=1).fit(Skipping(), loader())
    assert len(graphs) == 1


def test_options_are_looked_at_at_once():
    with pytest.raises(TypeError, match="fullgraf"):
        Compile(fullgraf=True)
    with pytest.raises(RuntimeError, match="Unrecognized mode"):
        Compile(mode="fast")


class OwnPath(Tiny):
    """Runs what ``forward`` runs, and not itself."""

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()


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
        ([Compile()], torch.compile(Tiny()), "Tiny is compiled already: give the Trainer the module itself"),
        ([Compile(backend="eager")], OwnPath(), "ran nothing that is compiled: let it call `self"),
        ([Distill()], torch.compile(Tiny()), "and a `lq.callbacks.Compile` before Distill"),
    ],
)
def test_what_it_refuses(tmp_path, callbacks, model, message):
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, *callbacks, Quantize()).fit(model, loader())
