"""The best model is kept, and loads without a Trainer."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

import lq
from lq.callbacks import QATSchedule, QuantDelay, QuantizationAwareTraining, Quantize, ScaleFreeze
from lq.callbacks.best import Best
from lq.checkpoint import Original, original
from tiny import EndsEpochs, Tiny, loader, trainer


class Spoil(Callback):
    """Ruins the weights from a step on, as a bad learning rate would."""

    def __init__(self, step=0):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self.step:
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.add_(torch.randn_like(p))


def fit(tmp_path, *callbacks, quantize=None, model=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    model = model or Tiny()
    qat = QuantizationAwareTraining(quantize=quantize or Quantize(keep_best=True, monitor="val_loss", mode="min"))
    run = trainer(tmp_path, qat, *callbacks, **options)
    run.fit(model, loader(), loader(), ckpt_path=ckpt_path)
    return model, qat.quantize, run


def val_loss(run, model):
    return run.validate(model, loader(), verbose=False)[0]["val_loss"]


def test_a_fit_that_went_wrong_gives_the_calibrated_model_back(tmp_path):
    model, quantize, run = fit(tmp_path, Spoil())
    assert quantize.kept in ("calibrated", "rescaled")
    best = min(quantize.stages[stage]["val_loss"] for stage in ("calibrated", "rescaled"))
    assert quantize.stages["kept"]["val_loss"] == pytest.approx(best)
    assert quantize.stages["qat"]["val_loss"] > best
    assert val_loss(run, model) == pytest.approx(best)


def test_the_best_epoch_is_kept_if_it_beats_the_end(tmp_path):
    _, quantize, _ = fit(tmp_path, Spoil(step=12), model=Tiny(lr=10.0), max_epochs=3)
    assert quantize.kept == "step 8"


def test_a_good_end_stays(tmp_path):
    model, quantize, run = fit(tmp_path, model=Tiny(lr=10.0), max_epochs=6)
    assert quantize.kept == ""
    assert "kept" not in quantize.stages
    assert val_loss(run, model) == pytest.approx(quantize.stages["qat"]["val_loss"])


def test_without_keep_best_the_end_is_what_the_fit_gave(tmp_path):
    model, quantize, run = fit(tmp_path, Spoil(), quantize=Quantize())
    assert val_loss(run, model) == pytest.approx(quantize.stages["qat"]["val_loss"])


def test_the_metric_may_be_that_of_one_of_several_loaders(tmp_path):
    class Several(Tiny):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    monitor = "val_loss/dataloader_idx_1"
    quantize, model = Quantize(keep_best=True, monitor=monitor, mode="min"), Several()
    trainer(tmp_path, quantize, Spoil()).fit(model, loader(), [loader(batch_size=16), loader()])
    assert quantize.kept in ("calibrated", "rescaled")
    assert quantize.stages["kept"][monitor] == quantize.stages[quantize.kept][monitor] < quantize.stages["qat"][monitor]


def test_a_validation_that_logs_nothing_is_refused_before_training(tmp_path):
    class Silent(Tiny):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

    model = Silent()
    with pytest.raises(MisconfigurationException, match="`monitor` is 'val_loss', but the validation logs nothing"):
        fit(tmp_path, model=model)
    assert not model.trained_on


@pytest.mark.parametrize("callback", [ModelCheckpoint(monitor="val_acc", mode="max"), EarlyStopping("val_acc", mode="max")])
def test_the_metric_is_that_of_the_fits_own_callbacks(tmp_path, callback):
    _, quantize, _ = fit(tmp_path, callback, Spoil(), quantize=Quantize(keep_best=True), enable_checkpointing=None)
    assert quantize.kept


def test_the_best_model_so_far_survives_a_resume(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, Spoil(), keep, enable_checkpointing=True, max_epochs=1)
    model, quantize, run = fit(tmp_path, Spoil(), ckpt_path=tmp_path / "epoch=0.ckpt", enable_checkpointing=True, max_epochs=2)
    assert quantize.kept in ("calibrated", "rescaled")
    assert val_loss(run, model) == pytest.approx(quantize.stages[quantize.kept]["val_loss"])


def test_without_fine_tuning_nothing_is_trained(tmp_path):
    model = Tiny()
    before = copy.deepcopy(model.state_dict())
    quantize = Quantize(fine_tune=False, alpha=None)
    fit(tmp_path, model=model, quantize=quantize)
    assert list(quantize.stages) == ["float", "calibrated"]
    assert not model.trained_on
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(quantizer.amax is not None for _, quantizer in lq.named_quantizers(model))


def test_without_fine_tuning_the_best_stage_is_kept(tmp_path):
    kept = {}
    for mode in ("min", "max"):
        model, quantize, run = fit(tmp_path, quantize=Quantize(fine_tune=False, keep_best=True, monitor="val_loss", mode=mode))
        kept[mode] = quantize.kept or "rescaled"
        assert val_loss(run, model) == pytest.approx(quantize.stages[kept[mode]]["val_loss"])
    assert set(kept.values()) == {"calibrated", "rescaled"}


@pytest.mark.parametrize("least", [{"min_epochs": 1}, {"min_steps": 3}])
def test_no_fine_tuning_and_a_least_length_contradict_each_other(tmp_path, least):
    with pytest.raises(MisconfigurationException, match=f"`fine_tune` is False, and the Trainer has .*{next(iter(least))}="):
        fit(tmp_path, quantize=Quantize(fine_tune=False), **least)


def test_the_calibrated_model_comes_back_without_the_factors_that_came_later():
    model, x = Tiny(batchnorm=False).eval(), torch.randn(16, 6) * torch.tensor([1, 40, 1, 1, 1, 1.0])
    lq.quantize_(model)
    with lq.calibrating(model):
        model(x)
    expected = model(x)
    best = Best("loss", "min")
    run = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda value: value))
    best.offer(run, model, "calibrated", {"loss": 1.0})
    lq.RescalingCalibrator(model, args=(x,), inplace=True).rescale(0.5)
    with lq.calibrating(model):
        model(x)
    assert model.net[0].input_quantizer.pre_quant_scale is not None
    best.offer(run, model, "rescaled", {"loss": 2.0})
    best.restore(model)
    assert best.stage == "calibrated"
    assert torch.equal(model(x), expected)


def test_what_keep_best_needs_is_said(tmp_path):
    with pytest.raises(MisconfigurationException, match="say which metric"):
        fit(tmp_path, quantize=Quantize(keep_best=True))
    with pytest.raises(MisconfigurationException, match=r"`monitor` is 'nope', but the validation logs val_loss, val_acc"):
        fit(tmp_path, quantize=Quantize(keep_best=True, monitor="nope", mode="min"))
    with pytest.raises(MisconfigurationException, match="no validation"):
        trainer(tmp_path, Quantize(keep_best=True, monitor="a", mode="min")).fit(Tiny(), loader())
    with pytest.raises(ValueError, match="`mode` is 'up'"):
        Quantize(mode="up")
    with pytest.raises(ValueError, match="`stages` False"):
        Quantize(keep_best=True, stages=False)


# Loading


class Saved(Tiny):
    def __init__(self, batchnorm=True, lr=0.1):
        super().__init__(batchnorm, lr)
        self.save_hyperparameters()


@pytest.mark.parametrize("rules", ["int8", "w4a8", [lq.QuantRule("*", lq.QuantDescriptor(), None), lq.QuantRule("net.4")]])
@pytest.mark.parametrize("alpha", [None, 0.7])
def test_a_checkpoint_loads_without_a_trainer(tmp_path, rules, alpha):
    model = Saved(batchnorm=False)
    run = trainer(tmp_path, QuantizationAwareTraining(rules, alpha=alpha), max_epochs=1)
    run.fit(model, loader(), loader())
    run.save_checkpoint(tmp_path / "fit.ckpt")
    x = torch.randn(5, 6)
    expected = model.eval()(x)
    for source in (Saved, Saved(batchnorm=False)):
        loaded = lq.load_quantized(source, tmp_path / "fit.ckpt")
        assert not loaded.training
        assert torch.equal(loaded(x), expected)
    again = lq.load_quantized(loaded, tmp_path / "fit.ckpt")  # a quantized one takes it as it is
    assert torch.equal(again(x), expected)


def test_a_rescaled_float_layer_gets_its_factor(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2))
    x = torch.randn(8, 6)
    model = lq.RescalingCalibrator(model, args=(x,)).rescale(0.5)
    lq.quantize_(model, [lq.QuantRule("2", lq.QuantDescriptor(), lq.QuantDescriptor(axis=0))])
    with lq.calibrating(model):
        model(x)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2))
    loaded = lq.load_quantized(
        fresh, tmp_path / "model.pt", rules=[lq.QuantRule("2", lq.QuantDescriptor(), lq.QuantDescriptor(axis=0))]
    )
    assert torch.equal(loaded(x), model(x))


class Kept(Saved):
    def __init__(self, root=Path("images"), **options):
        super().__init__(**options)
        self.save_hyperparameters()


def test_hyperparameters_that_are_not_plain_data_are_named_with_the_remedy(tmp_path):
    run = trainer(tmp_path, Quantize(), max_epochs=1)
    run.fit(Kept(), loader())
    run.save_checkpoint(path := tmp_path / "fit.ckpt")
    with pytest.raises(ValueError, match=r"`path` .*fit\.ckpt has pathlib\.\S*Path in it.*add_safe_globals.*ignore=") as refused:
        lq.load_quantized(Kept, path)
    assert "\x1b" not in str(refused.value)
    with pytest.raises(ValueError, match=r"`original` .*fit\.ckpt has pathlib\.\S*Path in it"):
        QATSchedule(original=path)
    with torch.serialization.safe_globals([type(Path("images"))]):
        assert QATSchedule(original=path).original.epochs == 1
        assert lq.load_quantized(Kept, path).hparams.root == Path("images")


def test_what_does_not_load_is_refused_by_name(tmp_path):
    torch.save(Tiny().state_dict(), tmp_path / "float.pt")
    with pytest.raises(ValueError, match=r"float\.pt has no amax: it is of a float model"):
        lq.load_quantized(Tiny, tmp_path / "float.pt")
    model = lq.quantize_(Tiny())
    with lq.calibrating(model):
        model(torch.randn(4, 6))
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"bare\.pt does not say which rules"):
        lq.load_quantized(Tiny(), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"bare\.pt has an amax for `net\.0\.input_quantizer` \(2 in all\), which these rules"):
        lq.load_quantized(Tiny(), tmp_path / "bare.pt", rules="int8_weight_only")
    with pytest.raises(ValueError, match=r"bare\.pt does not fit Tiny with these rules: .*net\.1\.weight"):
        lq.load_quantized(Tiny(batchnorm=False), tmp_path / "bare.pt", rules="int8")
    (tmp_path / "short.pt").write_bytes((tmp_path / "bare.pt").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"short\.pt cannot be read"):
        lq.load_quantized(Tiny(), tmp_path / "short.pt", rules="int8")
    with pytest.raises(RuntimeError, match=r"net\.0\.input_quantizer\._amax"):  # torch's own words name what is in the way
        Tiny().load_state_dict(model.state_dict())


# The recipe from the float checkpoint


class Scheduled(Tiny):
    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters(), "lr": 0.5}, {"params": self.net[4].parameters()}]
        optimizer = torch.optim.SGD(groups, 0.2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)]


def test_epochs_and_rates_come_from_the_float_checkpoint(tmp_path):
    run = trainer(tmp_path, max_epochs=20, limit_train_batches=1)
    run.fit(Scheduled(), loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    found = original(tmp_path / "float.ckpt")
    assert found == Original(epochs=20, lrs=[[0.5, 0.2]])
    assert found.share() == 2

    class Slow(Scheduled):
        def configure_optimizers(self):
            groups = [{"params": self.net[0].parameters()}, {"params": self.net[4].parameters()}]
            return torch.optim.SGD(groups, 1e-5)

    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append([g["lr"] for g in trainer.optimizers[0].param_groups])

    trainer(tmp_path, QATSchedule(original=tmp_path / "float.ckpt"), Look(), max_epochs=found.share()).fit(Slow(), loader())
    assert seen[0] == pytest.approx([0.005, 0.002])
    assert seen[-1] == pytest.approx([0.00005, 0.00002])


def test_a_float_checkpoint_of_other_groups_or_of_weights_only_is_refused(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Scheduled(), loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(MisconfigurationException, match=r"`original` has \[2\] parameter groups, and this fit \[1\]"):
        trainer(tmp_path, QATSchedule(original=tmp_path / "float.ckpt")).fit(Tiny(), loader())
    with pytest.raises(ValueError, match=r"weights\.ckpt has no epochs"):
        QATSchedule(original=tmp_path / "weights.ckpt")


# Clocks in epochs, and what begins later


def test_lengths_in_epochs(tmp_path):
    freeze = ScaleFreeze("1 epoch", observe=1, freeze_after="2 epochs")
    run = trainer(tmp_path, Quantize(), freeze, max_epochs=3, accumulate_grad_batches=2)
    run.fit(Tiny(), loader())
    assert (freeze._every, freeze._freeze) == (4, 8)
    with pytest.raises(ValueError, match="give steps"):
        ScaleFreeze("two epochs")


class Watch(Callback):
    def __init__(self):
        self.train, self.validation = [], []

    def _active(self, pl_module):
        return [quantizer.active for _, quantizer in lq.named_quantizers(pl_module)]

    def on_before_backward(self, trainer, pl_module, loss):
        self.train.append(self._active(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.validation.append(self._active(pl_module))


def test_fake_quantization_begins_later_but_validation_sees_it(tmp_path):
    watch = Watch()
    delay = QuantDelay(inputs=3, weights="1 epoch")
    trainer(tmp_path, Quantize(), delay, watch, max_epochs=2).fit(Tiny(), loader(), loader())
    inputs, weights = ([step[i] for step in watch.train] for i in (0, 1))
    assert inputs == [False] * 3 + [True] * 13
    assert weights == [False] * 8 + [True] * 8
    assert all(all(active) for active in watch.validation)


def test_a_delay_is_let_go_after_an_exception(tmp_path):
    class Fails(Tiny):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("stop")

    model = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, Quantize(), QuantDelay(inputs=5)).fit(model, loader())
    assert all(quantizer._if_quant for _, quantizer in lq.named_quantizers(model))


def test_a_delay_is_let_go_where_the_module_ends_its_epoch(tmp_path):
    model = EndsEpochs()
    trainer(tmp_path, Quantize(stages=False), QuantDelay(inputs=1.0, weights=1.0)).fit(model, loader())
    assert len(model.trained_on) == 8
    assert all(quantizer._if_quant for _, quantizer in lq.named_quantizers(model))


def learned_rules():
    desc = lq.QuantDescriptor(amax=1.0, learn_amax=True)
    return [lq.QuantRule("*", desc, lq.QuantDescriptor(axis=0))]


def test_learned_scales_are_frozen_too_and_an_optimizer_with_decay_leaves_them(tmp_path):
    class Decaying(Tiny):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=0.1)

    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(pl_module.net[0].input_quantizer.amax.item())

    quantize = Quantize(learned_rules(), alpha=None)
    model = Decaying()
    trainer(tmp_path, quantize, ScaleFreeze(None, freeze_after=8), Look(), max_epochs=2).fit(model, loader())
    assert len(set(seen[:8])) == 8
    assert len(set(seen[8:])) == 1
    assert model.net[0].input_quantizer.clip.clip_value_max.requires_grad
    assert copy.deepcopy(model).net[0].input_quantizer.amax == seen[-1]
