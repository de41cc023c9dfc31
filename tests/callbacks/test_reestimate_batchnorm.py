"""A fit whose BatchNorm statistics are estimated anew."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging

import lq
from lq.callbacks import ExactResume, QuantizationAwareTraining, Quantize, ReestimateBatchNorm, ScaleFreeze
from lq.corrections import reestimate_batchnorm_
from processes import two_ranks
from tiny import Tiny, loader, trainer

W2 = [lq.QuantRule("*", lq.QuantDescriptor(4), lq.QuantDescriptor(2, axis=0, learn_amax="lsq"))]


class Look(Callback):
    """Statistics of the BatchNorm at each validation in which something was trained, and those that there should be."""

    def __init__(self):
        self.seen, self.expected = [], []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0 and trainer.global_step:
            norm = pl_module.net[1]
            self.seen.append(norm.running_mean.clone())
            reestimate_batchnorm_(pl_module, [batch[:1] for batch in loader()])
            self.expected.append(norm.running_mean.clone())


def fit(folder, *callbacks, epochs=2, shuffle=False, average=None, **options):
    seed_everything(0, verbose=False)
    model, quantize = Tiny(), Quantize(W2, alpha=None)
    given = [ReestimateBatchNorm(8), quantize, ExactResume(), *callbacks]
    fitting = trainer(folder, *[average] * bool(average), *given, max_epochs=epochs, **options)
    return model, quantize, fitting, loader(shuffle)


def test_each_validation_and_the_last_stage_have_them(tmp_path):
    look = Look()
    model, quantize, fitting, train = fit(tmp_path, look)
    fitting.fit(model, train, loader())
    assert len(look.seen) == 3  # two epochs, and `qat`
    for seen, expected in zip(look.seen, look.expected, strict=True):
        torch.testing.assert_close(seen, expected)
    assert quantize.stages["qat"] == pytest.approx(fitting.validate(model, loader(), verbose=False)[0])
    # a second fit starts from what the first one left
    look.seen.clear()
    trainer(tmp_path, ReestimateBatchNorm(8), look, max_epochs=1).fit(model, loader(), loader())
    assert len(look.seen) == 1


def test_without_a_validation_they_are_there_at_the_end(tmp_path):
    model, _, fitting, train = fit(tmp_path)
    fitting.fit(model, train)
    left = model.net[1].running_mean.clone()
    reestimate_batchnorm_(model, [batch[:1] for batch in loader()])
    torch.testing.assert_close(left, model.net[1].running_mean)


def test_the_best_model_keeps_its_statistics(tmp_path):
    quantize = Quantize(W2, alpha=None, keep_best=True, monitor="val_loss", mode="max")  # the worst, which comes first
    seed_everything(0, verbose=False)
    model = Tiny()
    fitting = trainer(tmp_path, quantize, ReestimateBatchNorm(3), max_epochs=2)
    fitting.fit(model, loader(), loader())
    assert quantize.kept
    assert quantize.stages["kept"] == pytest.approx(fitting.validate(model, loader(), verbose=False)[0])
    assert quantize.stages["kept"] == pytest.approx(quantize.stages[quantize.kept])


@pytest.mark.parametrize("validation", [True, False])
def test_averages_have_statistics_of_their_own(tmp_path, validation):
    look, average = Look(), EMAWeightAveraging(decay=0.9)
    model, quantize, fitting, train = fit(tmp_path, look, average=average)
    fitting.fit(model, train, loader() if validation else None)
    assert len(look.seen) == (3 if validation else 0)
    for seen, expected in zip(look.seen, look.expected, strict=True):
        torch.testing.assert_close(seen, expected)
    left = model.net[1].running_mean.clone()
    reestimate_batchnorm_(model, [batch[:1] for batch in loader()])
    torch.testing.assert_close(left, model.net[1].running_mean)
    # the average is what is left behind
    assert torch.equal(average._average_model.module.net[0].weight, model.net[0].weight)
    if validation:
        assert quantize.stages["qat"] == pytest.approx(fitting.validate(model, loader(), verbose=False)[0])


def test_training_is_what_it_is_without(tmp_path):
    def trained(*callbacks):
        seed_everything(0, verbose=False)
        model = Tiny()
        trainer(tmp_path, Quantize(W2, alpha=None), *callbacks).fit(model, loader(shuffle=True), loader())
        return model

    plain, model = trained(), trained(ReestimateBatchNorm(3))
    for (name, expected), value in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, expected), name
    assert all(torch.equal(*pair) for pair in zip(plain.trained_on, model.trained_on, strict=True))
    assert not torch.equal(plain.net[1].running_mean, model.net[1].running_mean)


@pytest.mark.parametrize("average", [None, EMAWeightAveraging])
def test_a_fit_that_was_cut_off_ends_the_same(tmp_path, average):
    def state(folder, stop=None, ckpt_path=None):
        keep = ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        stopping = {} if stop is None else {"max_steps": stop}
        options = {"shuffle": True, "enable_checkpointing": True, "average": average and average(decay=0.9), **stopping}
        model, _, fitting, train = fit(tmp_path, keep, **options)
        fitting.fit(model, train, loader(), ckpt_path=ckpt_path)
        return model.state_dict()

    whole = state("whole")
    state("half", stop=11)
    resumed = state("rest", ckpt_path=tmp_path / "half" / "step=11.ckpt")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


def test_what_it_does_not_go_with_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`batches` is -1"):
        ReestimateBatchNorm(-1)
    with pytest.raises(MisconfigurationException, match="Tiny has no BatchNorm to estimate"):
        trainer(tmp_path, ReestimateBatchNorm(2)).fit(Tiny(batchnorm=False), loader(), loader())
    for whole in (False, True):
        quantize = Quantize(W2, alpha=None)
        callbacks = [QuantizationAwareTraining(quantize=quantize)] if whole else [quantize, ScaleFreeze()]
        with pytest.raises(MisconfigurationException, match=r"`schedule\.freeze_batchnorm=false`"):
            trainer(tmp_path, *callbacks, ReestimateBatchNorm(2)).fit(Tiny(), loader(), loader())
        assert not quantize.stages  # before anything is calibrated
    with pytest.raises(MisconfigurationException, match=r"WeightAveraging stands behind ReestimateBatchNorm.*put it before"):
        trainer(tmp_path, ReestimateBatchNorm(2), WeightAveraging()).fit(Tiny(), loader(), loader())
    trainer(tmp_path, ReestimateBatchNorm(0), max_epochs=1).fit(Tiny(batchnorm=False), loader(), loader())


class Save(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        norm = pl_module.net[1]
        torch.save([norm.running_mean, norm.running_var], self.folder / f"{trainer.global_rank}.pt")
        # the mean over ranks of what each of them sees
        with torch.no_grad():
            own = [pl_module.net[0](batch[0]) for batch in trainer.train_dataloader]
        torch.save(torch.stack([y.mean(0) for y in own]).mean(0), self.folder / f"own-{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_have_the_average_of_both(tmp_path):
    model, _, fitting, train = fit(tmp_path, Save(tmp_path), epochs=1, **two_ranks())
    fitting.fit(model, train)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    own = [torch.load(tmp_path / f"own-{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(first[0], (own[0] + own[1]) / 2)
    assert not torch.allclose(own[0], own[1])
