"""Step sizes that a fit learns, from where its calibration puts them."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint

import lq
from lq.callbacks import ExactResume, QuantDelay, Quantize, ScaleFreeze
from processes import two_ranks
from tiny import Tiny, loader, trainer


def rules(method="lsq", **fields):
    return [
        lq.QuantRule("*", lq.QuantDescriptor(4, learn_amax=method, **fields), lq.QuantDescriptor(4, axis=0, learn_amax=method))
    ]


class Start(Quantize):
    """Remembers what calibration found."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.start = {name: quantizer.amax.clone() for name, quantizer in lq.named_quantizers(pl_module)}


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_the_optimizer_has_what_calibration_fills(tmp_path, method):
    model, quantize = Tiny(), Start(rules(method), alpha=None, method="max" if method == "lsq" else "mse")
    fit = trainer(tmp_path, quantize, max_epochs=2)
    fit.fit(model, loader(), loader())
    known = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    for name, quantizer in lq.named_quantizers(model):
        assert id(quantizer._amax) in known
        if method == "lsq":
            assert not torch.equal(quantizer.amax, quantize.start[name]), name
    calibrated = lq.quantize_(Tiny(), rules(method))
    calibrated.load_state_dict(model.state_dict())
    assert set(quantize.start) == {name for name, _ in lq.named_quantizers(calibrated)}


def test_a_resumed_fit_goes_on_where_it_was(tmp_path):
    def fit(folder, epochs, ckpt_path=None):
        torch.manual_seed(0)
        model = Tiny()
        model.net[3].p = 0.0
        keep = ModelCheckpoint(tmp_path / folder, save_last=True)
        trainer(tmp_path, ExactResume(), Quantize(rules(), alpha=None), keep, max_epochs=epochs, enable_checkpointing=True).fit(
            model, loader(), loader(), ckpt_path=ckpt_path
        )
        return model.state_dict()

    whole = fit("whole", 2)
    fit("half", 1)
    resumed = fit("rest", 2, tmp_path / "half" / "last.ckpt")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


def test_frozen_they_stand_still(tmp_path):
    model, quantize = Tiny(), Start(rules(), alpha=None)
    trainer(tmp_path, quantize, ScaleFreeze(None, freeze_after=0), max_epochs=1).fit(model, loader(), loader())
    for name, quantizer in lq.named_quantizers(model):
        assert torch.equal(quantizer.amax, quantize.start[name])


def test_an_input_of_unknown_shape_cannot_wait(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"`net.0.input` has `learn_amax='lsq'` and an amax for parts"):
        trainer(tmp_path, Quantize(rules(axis=1), alpha=None), max_epochs=1).fit(Tiny(), loader(), loader())


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path):
    fit = trainer(tmp_path, _Saves(rules(), alpha=None, dirpath=tmp_path), max_epochs=1, **two_ranks())
    fit.fit(Tiny(), loader())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class _Steps(QuantDelay):
    """What learned scales are after each step."""

    def __init__(self, folder, **lengths):
        super().__init__(**lengths)
        self.folder, self.amax = folder, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        self.amax.append({name: q.amax.clone() for name, q in lq.named_quantizers(pl_module)})

    def on_train_end(self, trainer, pl_module):
        torch.save(self.amax, f"{self.folder}/{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_wait_for_no_scale_that_is_not_learned_yet(tmp_path):
    delay = _Steps(tmp_path, inputs=2, weights=1)
    trainer(tmp_path, Quantize(rules(), alpha=None), delay, max_epochs=1, **two_ranks()).fit(Tiny(), loader())
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    before, *after = first
    assert torch.equal(before["net.0.input"], after[0]["net.0.input"])
    assert not torch.equal(before["net.0.weight"], after[0]["net.0.weight"])
    assert not torch.equal(before["net.0.input"], after[1]["net.0.input"])


class _Saves(Quantize):
    def on_train_end(self, trainer, pl_module):
        torch.save({n: q.amax for n, q in lq.named_quantizers(pl_module)}, f"{self.dirpath}/{trainer.global_rank}.pt")
        super().on_train_end(trainer, pl_module)
