"""Two processes on the CPU against one on the union of their batches."""

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import lq
from lq.callbacks import QuantizationAwareTraining, Quantize, ScaleFreeze
from processes import two_ranks
from tiny import Tiny, loader, trainer


class Keep(Callback):
    """Saves what each rank's amax is before the first step, and after the last."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, pl_module, when):
        amax = {name: q.amax.clone() for name, q in lq.named_quantizers(pl_module)}
        self.folder.mkdir(exist_ok=True)
        torch.save(amax, self.folder / f"{when}-{trainer.world_size}-{trainer.global_rank}.pt")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.save(trainer, pl_module, "first")

    def on_train_end(self, trainer, pl_module):
        self.save(trainer, pl_module, "last")


def fit(folder, ranks, batchnorm):
    seed_everything(0, verbose=False)
    quantize = Quantize(batches=8 // ranks, method="mse", alpha=0.5)
    freeze = ScaleFreeze(refresh_every=2, observe=1, freeze_after=None)
    callbacks = [QuantizationAwareTraining(quantize=quantize, freeze=freeze), Keep(folder)]
    strategy = two_ranks() if ranks > 1 else {}
    trainer(folder, *callbacks, max_epochs=1, **strategy).fit(Tiny(batchnorm), loader(), loader())


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", [True, False])
def test_two_ranks_have_the_amax_of_one_process_on_the_union_of_the_batches(tmp_path, batchnorm):
    for ranks in (1, 2):
        fit(tmp_path, ranks, batchnorm)
    one, *two = (torch.load(tmp_path / f"first-{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    torch.testing.assert_close(*two, rtol=0, atol=0)
    # on some processors a sample's convolution depends, in the last bit, on its place in the batch
    torch.testing.assert_close(two[0], one, rtol=1e-6, atol=0)
    # refreshes merge the statistics too: ranks saw different batches and still agree
    last = [torch.load(tmp_path / f"last-2-{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(*last, rtol=0, atol=0)
    assert any(not torch.equal(last[0][name], one[name]) for name in one)


def fit_again(folder, ckpt_path=None):
    """Refreshes every 4 steps, of which 3 are looked at; a checkpoint at each step."""
    seed_everything(0, verbose=False)
    freeze = ScaleFreeze(refresh_every=4, observe=3, freeze_after=None)
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    callbacks = [QuantizationAwareTraining(freeze=freeze), Keep(folder), keep]
    options = {"max_epochs": 2, "enable_checkpointing": True}
    trainer(folder, *callbacks, **two_ranks(), **options).fit(Tiny(), loader(shuffle=True, batch_size=2), ckpt_path=ckpt_path)
    return [torch.load(folder / f"last-2-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_resumed_within_an_observation_each_rank_has_its_own_statistics_and_numbers(tmp_path):
    whole = fit_again(tmp_path / "a")
    state = torch.load(tmp_path / "a" / "step=3.ckpt", weights_only=True)
    first, second = state["lq_statistics"]
    assert not torch.equal(first["net.0.input"]["peak"], second["net.0.input"]["peak"])
    for step in (3, 11):
        resumed = fit_again(tmp_path / f"b{step}", tmp_path / "a" / f"step={step}.ckpt")
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_learned_scales_freeze_under_ddp(tmp_path):
    desc = lq.QuantDescriptor(amax=1.0, learn_amax=True)
    quantize = Quantize([lq.QuantRule("*", desc, lq.QuantDescriptor(axis=0))], alpha=None)
    callbacks = [quantize, ScaleFreeze(None, freeze_after=2), Keep(tmp_path)]
    trainer(tmp_path, *callbacks, max_epochs=1, **two_ranks()).fit(Tiny(), loader())
    two = [torch.load(tmp_path / f"last-2-{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(*two, rtol=0, atol=0)
    assert two[0]["net.0.input"] != 1


class OnlyRank0(Quantize):
    """The calibration batches of the other rank never reach the model."""

    def calibration_step(self, pl_module, batch):
        if pl_module.global_rank == 0:
            super().calibration_step(pl_module, batch)


class Rank1Fails(Quantize):
    def calibration_step(self, pl_module, batch):
        if pl_module.global_rank == 1:
            raise KeyError("a bad sample")
        super().calibration_step(pl_module, batch)


def spawn(folder, quantize):
    callbacks = [QuantizationAwareTraining(quantize=quantize), Keep(folder)]
    trainer(folder, *callbacks, max_epochs=1, **two_ranks()).fit(Tiny(), loader())
    return [torch.load(folder / f"last-2-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_a_rank_without_a_calibration_batch_has_the_scales_of_the_other(tmp_path, alpha):
    torch.testing.assert_close(*spawn(tmp_path, OnlyRank0(alpha=alpha)), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_a_rank_that_fails_in_calibration_stops_both_with_its_message(tmp_path, alpha):
    with pytest.raises(Exception, match="a bad sample"):
        spawn(tmp_path, Rank1Fails(alpha=alpha))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_ranks_agree_in_low_precision_with_accumulation(tmp_path, precision):
    options = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    callbacks = [QuantizationAwareTraining(), Keep(tmp_path)]
    trainer(tmp_path, *callbacks, max_epochs=1, **two_ranks(), **options).fit(Tiny(), loader())
    two = [torch.load(tmp_path / f"last-2-{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(*two, rtol=0, atol=0)
    assert all(amax.dtype == torch.float32 and bool(amax.isfinite().all()) for amax in two[0].values())
