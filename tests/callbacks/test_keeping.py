"""Weights that are kept in a fit change nothing but the time."""

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler

import lq.callbacks.keeping
from lq.callbacks import Quantize
from tiny import Tiny, loader, trainer


class Fused(Tiny):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.05, fused=True)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("module", [Tiny, Fused])
def test_a_fit_ends_as_without(tmp_path, monkeypatch, module, accumulate):
    states, kept, original = [], [], lq.callbacks.keeping.keep_weights_
    for keep in (original, lambda model: None):
        monkeypatch.setattr(lq.callbacks.keeping, "keep_weights_", lambda model, keep=keep: kept.append(keep(model)))
        seed_everything(3, verbose=False)
        model = module()
        trainer(tmp_path, Quantize(), max_epochs=3, accumulate_grad_batches=accumulate).fit(model, loader(), loader())
        states.append(model.state_dict())
        assert all(q._kept is None for _, q in lq.named_quantizers(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    steps = 3 * -(-len(loader()) // accumulate) if accumulate > 1 else 0
    assert len(kept) // 2 >= steps + 3  # and each validation


def test_a_scheduler_that_comes_down_to_single_batches(tmp_path, monkeypatch):
    states = []
    for keeps in (True, False):
        with monkeypatch.context() as patched:
            if not keeps:
                patched.setattr(lq.callbacks.keeping, "keep_weights_", lambda model: None)
            seed_everything(3, verbose=False)
            model = Fused()
            # no validation, behind which all is forgotten
            trainer(tmp_path, Quantize(), GradientAccumulationScheduler({0: 2, 1: 1}), max_epochs=3).fit(model, loader())
            states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_evaluation(tmp_path, monkeypatch):
    found = []
    model = Tiny()
    fitted = trainer(tmp_path, Quantize(), max_epochs=1)
    fitted.fit(model, loader())
    monkeypatch.setattr(
        type(model), "test_step", lambda self, batch, i: found.append([q._kept for _, q in lq.named_quantizers(self)])
    )
    fitted.test(model, loader(), verbose=False)
    assert found
    assert all(sum(kept is not None for kept in row) == 2 for row in found)
    assert all(q._kept is None for _, q in lq.named_quantizers(model))
