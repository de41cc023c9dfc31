"""Fits whose weights settle."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lq
from lq.callbacks import ExactResume, Quantize, SettleWeights
from lq.functional.oscillation import damping_loss
from lq.schedule import cosine_ramp
from tiny import Tiny, loader, trainer

W2 = [lq.QuantRule("*", lq.QuantDescriptor(4), lq.QuantDescriptor(2, axis=0, narrow_range=False, learn_amax="lsq"))]


def fit(folder, *callbacks, ckpt_path=None, model=None, **options):
    seed_everything(0, verbose=False)
    model = model or Tiny(lr=0.6)
    fitting = trainer(folder, ExactResume(), Quantize(W2, alpha=None, stages=False), *callbacks, **options)
    fitting.fit(model, loader(shuffle=True), ckpt_path=ckpt_path)
    return model


class Codes(Callback):
    def __init__(self):
        self.codes, self.gradients = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        layer = pl_module.net[0]
        with torch.no_grad():
            self.codes.append((layer.weight_quantizer(layer.weight) / layer.weight_quantizer.scale).round())


def turns(codes):
    """How often a code changes in the direction opposite to its last change."""
    found, last = 0, torch.zeros_like(codes[0])
    for change in torch.stack(codes).diff(dim=0).sign():
        found += int((change * last < 0).sum())
        last = torch.where(change != 0, change, last)
    return found


def test_it_freezes_more_and_more(tmp_path):
    plain, seen, settle = Codes(), Codes(), SettleWeights(freeze=[0.2, 0.02], momentum=0.1)
    fit(tmp_path, plain, max_epochs=4)
    logger = CSVLogger(tmp_path)
    model = fit(tmp_path, settle, seen, max_epochs=4, logger=logger, log_every_n_steps=4)
    frozen = settle._oscillations.states["net.0.weight"].frozen
    assert 0 < frozen.sum() < frozen.numel()
    assert turns(seen.codes) < turns(plain.codes)
    logged = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "oscillation/frozen" in logged
    assert "oscillation/frequent" in logged
    # a second fit begins anew
    trainer(tmp_path, settle, max_epochs=1).fit(model, loader())
    assert settle._oscillations.states["net.0.weight"].frozen.sum() < frozen.sum()


class Gradient(Callback):
    """What the step's gradient is more than the batch's."""

    def __init__(self):
        self.before, self.added, self.expected = None, [], []

    def on_after_backward(self, trainer, pl_module):
        self.before = pl_module.net[0].weight.grad.clone()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        layer = pl_module.net[0]
        self.added.append(layer.weight.grad - self.before)
        weight = layer.weight.detach().requires_grad_()
        loss = damping_loss(weight, layer.weight_quantizer.amax, 2, narrow_range=False)
        factor = 0.1 * cosine_ramp(trainer.global_step, 4, 16)
        self.expected.append(factor * torch.autograd.grad(loss, weight)[0])


def test_damping_rises_along_a_cosine(tmp_path):
    look = Gradient()
    fit(tmp_path, SettleWeights(0.1, after="0.5 epochs"), look)
    assert look.added[4].count_nonzero() == 0
    assert look.added[-1].count_nonzero() > 0
    for added, expected in zip(look.added, look.expected, strict=True):
        torch.testing.assert_close(added, expected, atol=1e-6, rtol=1e-3)


def test_a_fit_that_was_cut_off_ends_the_same(tmp_path):
    def state(folder, stop=None, ckpt_path=None):
        settle = SettleWeights(0.01, [0.1, 0.02], momentum=0.1)
        keep = ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        halt = [] if stop is None else [Stop(stop)]
        return fit(tmp_path, settle, keep, *halt, enable_checkpointing=True, ckpt_path=ckpt_path).state_dict(), settle

    (whole, settle), _ = state("whole"), state("half", stop=11)
    resumed, again = state("rest", ckpt_path=tmp_path / "half" / "step=11.ckpt")
    assert settle._oscillations.frozen > 0
    assert settle._oscillations.frozen == again._oscillations.frozen
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


class Stop(Callback):
    """As a signal would, but in between batches."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.should_stop = True
            return -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1}, "`damping` is -1"),
        ({"freeze": 2.0}, "`freeze` is 2.0"),
        ({"freeze": [0.1]}, r"`freeze` is \[0.1\]"),
        ({"momentum": 0}, "`momentum` is 0"),
        ({"after": 1.5}, "`after` is 1.5"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SettleWeights(**arguments)


def test_it_needs_an_end(tmp_path):
    with pytest.raises(MisconfigurationException, match="SettleWeights needs an end"):
        fit(tmp_path, SettleWeights(0.1), max_epochs=-1, limit_train_batches=2)
