"""The callbacks in the Trainer of a team that uses everything else as well."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

import lq
from lq.callbacks import QATSchedule, QuantizationAwareTraining, Quantize, QuantMonitor, ScaleFreeze
from lq.callbacks.building import check_strategy
from tiny import Tiny, dataset, loader, trainer


def check(model, before=None):
    """Quantized, calibrated, in float32 scales, trained."""
    quantizers = dict(lq.named_quantizers(model))
    assert quantizers
    for quantizer in quantizers.values():
        assert quantizer.active
        assert quantizer.amax.dtype == torch.float32
        assert bool(quantizer.amax.isfinite().all())
    if before is not None:
        assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def fit(tmp_path, model=None, *callbacks, data=None, qat=None, val=True, **options):
    model = model or Tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()} or None
    run = trainer(tmp_path, qat or QuantizationAwareTraining(), *callbacks, **{"max_epochs": 1, **options})
    run.fit(model, loader() if data is None else data, loader() if val else None)
    check(model, before)
    return model, run


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [{}, {"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}])
def test_precision_accumulation_and_clipping(tmp_path, precision, accumulate, clip):
    model, run = fit(tmp_path, precision=precision, accumulate_grad_batches=accumulate, **clip)
    assert run.global_step == 8 // accumulate
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert model.net[0].weight.dtype == dtype


@pytest.mark.parametrize(
    "options",
    [
        {"overfit_batches": 2},
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.5, "limit_val_batches": 0.25},
        {"limit_val_batches": 0},
        {"num_sanity_val_steps": 0},
        {"barebones": True, "default_root_dir": None, "enable_progress_bar": False, "logger": False},
        {"max_epochs": -1, "max_steps": 5},
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": 2, "max_epochs": 2},
    ],
)
def test_the_trainers_options(tmp_path, options):
    fit(tmp_path, **options)


def test_fast_dev_run(tmp_path):
    fit(tmp_path, fast_dev_run=True, enable_checkpointing=True)


@pytest.mark.parametrize("averaging", [WeightAveraging, lambda: EMAWeightAveraging(update_every_n_steps=1)])
@pytest.mark.parametrize("first", [True, False])
def test_averages_begin_with_the_calibrated_model(tmp_path, averaging, first):
    average, qat = averaging(), QuantizationAwareTraining(lr_factor=None)
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                state = average._average_model.module.state_dict()
                seen.extend(torch.equal(state[name], value) for name, value in pl_module.state_dict().items())

    callbacks = [average, qat] if first else [qat, average]
    model = Tiny()
    trainer(tmp_path, *callbacks, Look()).fit(model, loader(), loader())
    assert seen
    assert all(seen)
    check(model)
    with pytest.raises(MisconfigurationException, match="`keep_best` is True, and WeightAveraging"):
        trainer(tmp_path, Quantize(keep_best=True, monitor="val_loss", mode="min"), average).fit(Tiny(), loader(), loader())


def test_an_average_resumes(tmp_path):
    def run(folder, ckpt_path=None):
        torch.manual_seed(0)
        model = Tiny()
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        t = trainer(
            folder, QuantizationAwareTraining(lr_factor=None), EMAWeightAveraging(), keep, enable_checkpointing=True, max_epochs=3
        )
        t.fit(model, loader(), loader(), ckpt_path=ckpt_path)
        return model.state_dict()

    whole = run(tmp_path / "a")
    torch.testing.assert_close(run(tmp_path / "b", tmp_path / "a" / "epoch=1.ckpt"), whole, rtol=0, atol=0)


@pytest.mark.parametrize("callback", [QATSchedule(), ScaleFreeze()])
def test_stochastic_weight_averaging_is_refused_by_name(tmp_path, callback):
    with pytest.raises(MisconfigurationException, match=r"StochasticWeightAveraging .*Use WeightAveraging"):
        trainer(tmp_path, Quantize(), callback, StochasticWeightAveraging(0.1)).fit(Tiny(), loader())
    trainer(tmp_path, Quantize(), StochasticWeightAveraging(0.1)).fit(Tiny(), loader(), loader())  # nothing in its way


def test_strategies_that_split_weights_are_refused_by_name(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"`strategy` is FSDPStrategy.*use 'ddp'"):
        Quantize().setup(SimpleNamespace(strategy=FSDPStrategy()), Tiny(), "fit")


def test_processes_that_leave_the_module_in_float_are_warned_about():
    strategy = SimpleNamespace(launcher=_MultiProcessingLauncher(DDPStrategy(start_method="spawn")))
    with pytest.warns(UserWarning, match="the module in this one stays in float.*`lq.load_quantized`, or use 'ddp'"):
        check_strategy(SimpleNamespace(strategy=strategy))


def test_early_stopping_counts_no_stage(tmp_path):
    stop = EarlyStopping("val_loss", patience=0, min_delta=10.0)
    _, run = fit(tmp_path, None, stop, max_epochs=5)
    assert run.current_epoch == 2


class Built(Tiny):
    """Made in ``configure_model``."""

    def __init__(self):
        LightningModule.__init__(self)
        self.net, self.lr, self.trained_on = None, 0.1, []

    def configure_model(self):
        if self.net is None:
            self.net = Tiny().net


def test_a_model_that_configure_model_builds(tmp_path):
    model, run = fit(tmp_path, Built())
    run.save_checkpoint(tmp_path / "fit.ckpt")
    run = trainer(tmp_path, Quantize())
    run.test(fresh := Built(), loader(), ckpt_path=tmp_path / "fit.ckpt", verbose=False)
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_model_that_setup_builds_is_refused_with_the_remedy(tmp_path):
    class Late(Built):
        configure_model = LightningModule.configure_model

        def setup(self, stage):
            self.net = Tiny().net

    with pytest.raises(ValueError, match="built in `setup` must exist before: build it in `__init__` or `configure_model`"):
        fit(tmp_path, Late())


@pytest.mark.parametrize("where", ["whole", "inside", "after"])
@pytest.mark.slow
def test_torch_compile(tmp_path, where):
    torch.compiler.reset()
    model = Tiny()
    model.log = lambda *args: None  # dynamo does not compile Lightning's, quantized or not
    if where == "inside":
        model.net = torch.compile(model.net, backend="eager")
    given = torch.compile(model, backend="eager") if where == "whole" else model
    run = trainer(tmp_path, QuantizationAwareTraining(), max_epochs=1)
    run.fit(given, loader(), loader())
    check(model)
    x = torch.randn(4, 6)
    if where == "after":
        model.eval()
        torch.testing.assert_close(torch.compile(model.net, backend="eager", fullgraph=True)(x), model(x))


class Adversarial(Tiny):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 4)]

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


def test_several_optimizers_by_hand(tmp_path):
    fit(tmp_path, Adversarial())


def test_by_hand_without_forward_calibration_is_the_users(tmp_path):
    class Bare(Adversarial):
        forward = LightningModule.forward

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.net(batch[0]).square().mean())
                optimizer.step()

        validation_step = None

    with pytest.raises(MisconfigurationException, match=r"Override `Quantize\.calibration_step"):
        fit(tmp_path, Bare(), qat=QuantizationAwareTraining(lr_factor=None), val=False)

    class Mine(Quantize):
        def calibration_step(self, pl_module, batch):
            pl_module.net(batch[0])

    fit(tmp_path, Bare(), qat=QuantizationAwareTraining(lr_factor=None, quantize=Mine()), val=False)


class Stream(IterableDataset):
    def __iter__(self):
        yield from dataset()


def test_a_stream_without_length(tmp_path):
    qat = QuantizationAwareTraining(lr_factor=None, freeze=ScaleFreeze(2, observe=1, freeze_after=6))
    fit(tmp_path, data=DataLoader(Stream(), 4), qat=qat)
    fit(tmp_path, data=DataLoader(Stream(), 4), max_steps=6, max_epochs=-1)


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size"])
def test_several_train_loaders(tmp_path, mode):
    class Several(Tiny):
        def forward(self, x):
            return super().forward(x)

        def training_step(self, batch, batch_idx):
            return sum(super(Several, self).training_step(part, batch_idx) for part in batch.values())

    class Feeding(Quantize):
        def calibration_step(self, pl_module, batch):
            for x, _ in batch.values():
                pl_module(x)

    class Data(LightningDataModule):
        def train_dataloader(self):
            return CombinedLoader({"a": loader(), "b": loader(batch_size=8)}, mode)

        def val_dataloader(self):
            return loader()

    model = Several()
    trainer(tmp_path, QuantizationAwareTraining(quantize=Feeding()), max_epochs=1).fit(model, datamodule=Data())
    check(model)


class Checkpointed(Tiny):
    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


def test_gradient_checkpointing(tmp_path):
    fit(tmp_path, Checkpointed())


class Adapter(Tiny):
    """Frozen but for a small adapter."""

    def __init__(self):
        super().__init__()
        self.net.requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 3))

    def forward(self, x):
        return self.net(x) + self.adapter(x)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def test_frozen_layers_stay_as_rescaling_left_them(tmp_path):
    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                self.before = pl_module.net[0].weight.clone()

    model, _ = fit(tmp_path, Adapter(), look := Look())
    assert torch.equal(model.net[0].weight, look.before)


class Shared(Tiny):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a

    def forward(self, x):
        return self.net(self.b(F.relu(self.a(x))))


def test_a_module_at_two_places(tmp_path):
    model, run = fit(tmp_path, Shared())
    assert model.a is model.b
    run.save_checkpoint(tmp_path / "fit.ckpt")
    x = torch.randn(3, 6)
    assert torch.equal(lq.load_quantized(Shared(), tmp_path / "fit.ckpt")(x), model.eval()(x))


class WithBackbone(Tiny):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(6, 6)

    def forward(self, x):
        return self.net(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def test_a_callback_that_unfreezes_layers(tmp_path):
    fit(tmp_path, WithBackbone(), BackboneFinetuning(unfreeze_backbone_at_epoch=1), max_epochs=3)


class Digits(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()


def test_lightning_cli(tmp_path):
    arguments = ["fit", "--trainer.callbacks+=lq.callbacks.QuantizationAwareTraining", "--trainer.callbacks.lr_factor=0.1"]
    options = ["accelerator=cpu", "max_epochs=1", "logger=false", "enable_progress_bar=false", f"default_root_dir={tmp_path}"]
    cli = LightningCLI(Tiny, Digits, args=[*arguments, *(f"--trainer.{option}" for option in options)], save_config_callback=None)
    check(cli.model)


# Faults


def test_a_loss_that_is_nan_leaves_the_scales(tmp_path):
    class Broken(Tiny):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if self.trainer.global_step == 4 else 1)

    model = Broken()
    freeze = ScaleFreeze(refresh_every=2, observe=1, freeze_after=None)
    with pytest.raises(ValueError, match=r"NaN or Inf in calibration data, first at `net\.0\.weight`|NaN or Inf"):
        trainer(tmp_path, QuantizationAwareTraining(lr_factor=None, freeze=freeze), max_epochs=1).fit(model, loader())
    assert all(bool(q.amax.isfinite().all()) for _, q in lq.named_quantizers(model))


def test_a_keyboard_interrupt_leaves_a_checkpoint_that_resumes(tmp_path):
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                raise KeyboardInterrupt

    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_last=True)
    with pytest.raises(SystemExit):
        trainer(tmp_path, QuantizationAwareTraining(), Interrupt(), keep, enable_checkpointing=True).fit(Tiny(), loader())
    model = Tiny()
    run = trainer(tmp_path, QuantizationAwareTraining(), enable_checkpointing=True)
    run.fit(model, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert run.global_step == 16
    check(model)


def test_a_full_disk_stops_the_fit_and_the_next_one_calibrates_again(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = Tiny()
    monkeypatch.setattr("lq.callbacks.quantize.save_statistics", full)
    with pytest.raises(OSError, match="No space left"):
        trainer(tmp_path, Quantize(dirpath=tmp_path / "out")).fit(model, loader())
    assert all(quantizer.amax is None for _, quantizer in lq.named_quantizers(model))
    monkeypatch.undo()
    trainer(tmp_path, Quantize(dirpath=tmp_path / "out")).fit(model, loader())
    check(model)


def test_no_warning_of_ours_in_an_ordinary_fit(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, max_epochs=1)
    assert not [str(w.message) for w in caught if "lq" in w.filename]


@pytest.mark.parametrize(
    ("part", "name"),
    [(QATSchedule(0.1), "schedule"), (ScaleFreeze(), "freeze"), (QuantMonitor(), "monitor"), (Quantize(), "quantize")],
)
def test_a_part_beside_the_whole_is_refused(tmp_path, part, name):
    with pytest.raises(MisconfigurationException, match=rf"{type(part).__name__} is among .* give it as `{name}`"):
        trainer(tmp_path, QuantizationAwareTraining(), part).fit(Tiny(), loader())
