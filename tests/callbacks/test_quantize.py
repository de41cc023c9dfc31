import copy
import random

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torchmetrics import MeanMetric

import lq
from lq.callbacks import OnnxExport, QuantizationAwareTraining, Quantize, ScaleFreeze
from lq.callbacks.feeding import forward_arguments
from tiny import DictBatches, NoForward, TensorBatches, Tiny, dataset, loader, trainer


def amaxes(model: nn.Module) -> dict[str, Tensor]:
    return {name: q.amax.clone() for name, q in lq.named_quantizers(model)}


def dict_loader() -> DataLoader:
    rows = [{"x": x, "mask": torch.ones(6), "y": y} for x, y in dataset()]
    return DataLoader(rows, batch_size=4)


@pytest.mark.parametrize(
    ("module", "data"),
    [
        (Tiny, loader),
        (TensorBatches, lambda: DataLoader(dataset().tensors[0], batch_size=4)),
        (DictBatches, dict_loader),
        (NoForward, loader),
    ],
)
def test_one_line_is_enough_for_tuples_tensors_dicts_and_modules_without_forward(tmp_path, module, data):
    model = module()
    trainer(tmp_path, QuantizationAwareTraining(), max_epochs=1).fit(model, data())
    assert len(amaxes(model)) == 4
    assert all(a.max() > 0 for a in amaxes(model).values())


class At(Callback):
    """Remembers what the model was when training started."""

    def on_train_start(self, trainer, pl_module):
        self.amax = amaxes(pl_module) if any(True for _ in lq.named_quantizers(pl_module)) else {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.buffers = {n: b.clone() for n, b in pl_module.named_buffers() if "running" in n}
            self.random = torch.rand(1)


@pytest.mark.parametrize("generator", [False, True])
def test_calibration_leaves_rng_data_order_and_batchnorm_as_they_were(tmp_path, generator):
    seen = {}
    for name, callbacks in {"plain": [], "quantized": [Quantize(alpha=0.5)]}.items():
        seed_everything(1, verbose=False)
        model, at = Tiny(), At()
        data = loader(shuffle=True, generator=torch.Generator().manual_seed(5) if generator else None)
        trainer(tmp_path, *callbacks, at, max_epochs=1).fit(model, data, loader())
        seen[name] = (torch.cat(model.trained_on), at.random, at.buffers)
    torch.testing.assert_close(seen["plain"], seen["quantized"], rtol=0, atol=0)


def test_calibration_looks_at_as_many_train_batches_as_it_was_told(tmp_path):
    seed_everything(1, verbose=False)
    model, at, seen = Tiny(), At(), []

    class Watching(Quantize):
        def calibration_step(self, pl_module, batch):
            assert not pl_module.training
            assert not torch.is_grad_enabled()
            seen.append(batch[0])
            super().calibration_step(pl_module, batch)

    trainer(tmp_path, Watching(alpha=None, method="max", batches=3, stages=False), at, max_epochs=1).fit(
        model, loader(shuffle=True)
    )
    assert len(seen) == 3
    rows = {tuple(row) for row in dataset().tensors[0].tolist()}
    assert {tuple(row) for row in torch.cat(seen).tolist()} <= rows
    assert at.amax["net.0.input"] == torch.cat(seen).abs().max()


def test_a_module_without_forward_logs_nothing_in_calibration_and_keeps_its_metrics(tmp_path):
    class Metered(NoForward):
        def __init__(self):
            super().__init__()
            self.metric = MeanMetric()

        def training_step(self, batch, batch_idx):
            self.metric.update(batch[0].mean())
            return super().training_step(batch, batch_idx)

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                assert pl_module.metric.weight == 0
                assert "train_loss" not in trainer.callback_metrics

    trainer(tmp_path, Quantize(), Look(), max_epochs=1).fit(Metered(), loader())


@pytest.mark.parametrize(
    ("batch_size", "epochs", "last"), [(32, 16, 2), (32, 16, 3), (32, 16, 6), (32, 16, 12), (4, 2, 0), (4, 10, 0)]
)
def test_resume_is_bit_identical(tmp_path, batch_size, epochs, last):
    """After epochs inside of an observation (a refresh every 4 steps), at its end, and after the freeze."""

    def fit(folder, ckpt_path=None):
        seed_everything(3, verbose=False)
        model = Tiny()
        model.net[3].p = 0.0  # dropout would draw other numbers
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        qat = QuantizationAwareTraining(lr_factor=None, freeze=ScaleFreeze(4, observe=3, freeze_after=0.75))
        fit = trainer(folder, qat, keep, max_epochs=epochs, enable_checkpointing=True)
        fit.fit(model, loader(batch_size=batch_size), loader(), ckpt_path=ckpt_path)
        return model

    whole = fit(tmp_path / "a")
    resumed = fit(tmp_path / "b", tmp_path / "a" / f"epoch={last}.ckpt")
    torch.testing.assert_close(whole.state_dict(), resumed.state_dict(), rtol=0, atol=0)


def test_test_and_predict_work_from_the_checkpoint(tmp_path):
    model = Tiny()
    fit = trainer(tmp_path, Quantize())
    fit.fit(model, loader(), loader())
    fit.save_checkpoint(tmp_path / "qat.ckpt")
    fresh = Tiny()
    other = trainer(tmp_path, Quantize())
    other.test(fresh, loader(), ckpt_path=tmp_path / "qat.ckpt", verbose=False, weights_only=True)
    torch.testing.assert_close(amaxes(fresh), amaxes(model), rtol=0, atol=0)
    (first, *_) = other.predict(Tiny(), loader(), ckpt_path=tmp_path / "qat.ckpt", weights_only=True)
    torch.testing.assert_close(first, model.eval()(dataset().tensors[0][:4]), rtol=0, atol=0)


def test_a_checkpoint_that_is_tested_after_its_fit_does_not_take_stages_away(tmp_path):
    quantize, keep = Quantize(), ModelCheckpoint(tmp_path, monitor="val_loss")
    fit = trainer(tmp_path, quantize, keep, enable_checkpointing=True)
    fit.fit(Tiny(), loader(), loader())
    stages = copy.deepcopy(quantize.stages)
    fit.test(Tiny(), loader(), ckpt_path="best", verbose=False)
    assert "qat" in stages
    assert quantize.stages == stages
    # where none are known, those of the checkpoint are
    other = Quantize()
    trainer(tmp_path, other).test(Tiny(), loader(), ckpt_path=keep.best_model_path, verbose=False)
    assert other.stages["rescaled"] == stages["rescaled"]


def test_the_best_model_of_a_checkpoint_that_is_tested_is_none_of_the_next_fit(tmp_path):
    quantize = Quantize(keep_best=True, monitor="val_loss", mode="min")
    fit = trainer(tmp_path, quantize, ModelCheckpoint(tmp_path), enable_checkpointing=True, max_epochs=1)
    fit.fit(Tiny(), loader(), loader())
    fit.test(ckpt_path="best", dataloaders=loader(), verbose=False)
    assert quantize._restored == {}


def test_the_checkpoint_of_a_float_fit_is_not_resumed(tmp_path):
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(Tiny(), loader())
    fit.save_checkpoint(path := tmp_path / "float.ckpt")
    with pytest.raises(MisconfigurationException, match=r"float\.ckpt is of a float fit, whose clock stands at step 8: load its"):
        trainer(tmp_path, Quantize(), max_epochs=2).fit(Tiny(), loader(), ckpt_path=path)
    # its weights are good for a look
    with pytest.warns(UserWarning, match="4 quantizers have no amax"):
        trainer(tmp_path, Quantize()).validate(Tiny(), loader(), ckpt_path=path, verbose=False)


def test_a_second_fit_keeps_the_scales(tmp_path):
    model = Tiny()
    trainer(tmp_path, Quantize()).fit(model, loader())
    before = amaxes(model)
    trainer(tmp_path, Quantize(), max_epochs=1).fit(model, loader())
    torch.testing.assert_close(amaxes(model), before, rtol=0, atol=0)


def test_stages_are_the_users_own_validation_and_no_callback_takes_them_for_one(tmp_path):
    model = Tiny()
    plain = trainer(tmp_path).validate(copy.deepcopy(model), loader(), verbose=False)[0]
    quantize, stop = Quantize(), EarlyStopping("val_loss", patience=1)
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
    logger = CSVLogger(tmp_path, name="", version="")
    t = trainer(tmp_path, quantize, stop, checkpoint, enable_checkpointing=True, logger=logger, log_every_n_steps=1)
    t.fit(model, loader(), loader())
    assert list(quantize.stages) == ["float", "calibrated", "rescaled", "qat"]
    assert quantize.stages["float"] == pytest.approx(plain)
    assert stop.wait_count <= 1
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    text = (tmp_path / "metrics.csv").read_text()
    assert all(f"{stage}/val_acc" in text for stage in quantize.stages)


def test_stages_have_the_metrics_of_several_validation_loaders(tmp_path):
    class Several(Tiny):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            self.log("of_all", 1.0)

    model, quantize = Several(), Quantize()
    plain = trainer(tmp_path).validate(copy.deepcopy(model), [loader(), loader(batch_size=8)], verbose=False)
    fit = trainer(tmp_path, quantize)
    fit.fit(model, loader(), [loader(), loader(batch_size=8)])
    assert list(quantize.stages) == ["float", "calibrated", "rescaled", "qat"]
    assert quantize.stages["float"] == pytest.approx(plain[0] | plain[1])
    assert fit.callback_metrics.keys() == {"train_loss", *plain[0], *plain[1]}


def test_without_validation_there_are_no_stages(tmp_path):
    quantize = Quantize()
    trainer(tmp_path, quantize).fit(Tiny(), loader())
    assert quantize.stages == {}


# How batches are taken apart


def test_a_tuple_gives_as_many_arguments_as_forward_requires():
    assert forward_arguments(lambda a, b, c=None: a, (1, 2, 3, 4)) == ((1, 2), {})


def test_a_dict_goes_whole_to_a_forward_that_knows_none_of_its_keys():
    assert forward_arguments(lambda batch: batch, {"image": 1}) == (({"image": 1},), {})


@pytest.mark.parametrize(
    ("forward", "batch"), [(lambda a, b: a, (1,)), (lambda a, b: a, {"c": 1}), (lambda a: a, 3.5), (lambda a: a, [])]
)
def test_a_batch_that_does_not_fit_is_refused_with_the_remedy(forward, batch):
    with pytest.raises(MisconfigurationException, match="calibration_step"):
        forward_arguments(forward, batch)


@pytest.mark.parametrize("names", ["x, y", "x, y, z"])
def test_a_forward_that_takes_a_whole_batch_is_told_the_remedy(tmp_path, names):
    class Whole(Tiny):
        def forward(self, batch):
            exec(f"{names} = batch", {}, {"batch": batch})
            return self.net(batch[0])

    with pytest.raises(
        MisconfigurationException, match=r"failed in `forward`: ValueError: .*to unpack.*Override `Quantize\.calib"
    ):
        trainer(tmp_path, Quantize()).fit(Whole(), loader(batch_size=4))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "magic"),
        ({"alpha": 1.5}, "1.5"),
        ({"alpha": float("nan")}, "nan"),
        ({"batches": 0}, "batches"),
        ({"method_options": {"bins": 3}}, "bins"),
        ({"method_options": {"percentile": 101}}, "101"),
    ],
)
def test_bad_arguments_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Quantize(**options)


def test_a_pattern_that_matches_nothing_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"nett.*closest"):
        trainer(tmp_path, Quantize([lq.QuantRule("nett.*", lq.QuantDescriptor())])).fit(Tiny(), loader())


def test_a_model_without_quantizable_layers_is_refused(tmp_path):
    model = Tiny()
    model.net = nn.Sequential(nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="no quantizable layer"):
        trainer(tmp_path, Quantize()).fit(model, loader())


def test_nan_in_calibration_data_names_the_layer(tmp_path):
    data = dataset()
    data.tensors[0][5] = float("nan")
    with pytest.raises(ValueError, match=r"net\.0\.input"):
        trainer(tmp_path, Quantize(stages=False, alpha=None)).fit(Tiny(), DataLoader(data, 4))


def test_layers_that_see_no_data_are_named(tmp_path):
    model = Tiny()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"unused\.input"):
        trainer(tmp_path, Quantize(stages=False, alpha=None)).fit(model, loader())


def test_no_batch_at_all_is_refused(tmp_path):
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(MisconfigurationException, match="no batch"):
        trainer(tmp_path, Quantize(stages=False, alpha=None), max_steps=2).fit(Tiny(), DataLoader(Nothing(), 4))


def test_batches_stop_at_the_trainers_limit(tmp_path):
    seen = []

    class Counting(Quantize):
        def calibration_step(self, pl_module, batch):
            seen.append(batch)
            super().calibration_step(pl_module, batch)

    trainer(tmp_path, Counting(batches=8, alpha=None), limit_train_batches=2).fit(Tiny(), loader())
    assert len(seen) == 2


# In a running team's Trainer


def test_what_the_fit_has_logged_is_still_there(tmp_path):
    plain, quantized = trainer(tmp_path), trainer(tmp_path, Quantize())
    plain.fit(Tiny(), loader(), loader())
    quantized.fit(Tiny(), loader(), loader())
    assert quantized.callback_metrics.keys() == plain.callback_metrics.keys() == {"train_loss", "val_loss", "val_acc"}


def test_layers_that_stay_in_float_are_not_rescaled_and_the_checkpoint_loads(tmp_path):
    rules = [lq.QuantRule("*", lq.QuantDescriptor(), lq.QuantDescriptor(axis=0)), lq.QuantRule("net.0")]
    model, quantize = Tiny(), Quantize(rules, stages=False)
    fit = trainer(tmp_path, quantize)
    fit.fit(model, loader())
    assert type(model.net[0]) is nn.Linear
    assert [group.consumers for group in quantize.rescaled] == [("net.4",)]
    fit.save_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path, Quantize(rules)).test(Tiny(), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_looking_at_the_stages_changes_nothing(tmp_path):
    found = []
    for stages in (False, True):
        seed_everything(0, verbose=False)
        model = Tiny()
        options = {"method": "percentile", "method_options": {"percentile": 95.0}}
        trainer(tmp_path, Quantize("w4a8", stages=stages, **options), max_epochs=1).fit(model, loader(), loader())
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_checkpoint_loads_with_other_parts(tmp_path):
    fit = trainer(tmp_path, QuantizationAwareTraining())
    fit.fit(Tiny(), loader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    other = QuantizationAwareTraining(export=tmp_path / "model.onnx")
    trainer(tmp_path, other).test(Tiny(), loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert any(isinstance(part, OnnxExport) for part in other.parts)


def test_a_sampler_with_random_numbers_of_its_own_keeps_its_order(tmp_path):
    class Own(Sampler):
        def __init__(self):
            self.random = random.Random(4)

        def __len__(self):
            return 32

        def __iter__(self):
            return iter(self.random.sample(range(32), 32))

    seen = []
    for callbacks in ([], [Quantize()]):
        model = Tiny()
        trainer(tmp_path, *callbacks, max_epochs=1).fit(model, DataLoader(dataset(), 4, sampler=Own()))
        seen.append(torch.cat(model.trained_on))
    assert torch.equal(*seen)


def test_a_training_step_without_batch_index_and_several_loaders(tmp_path):
    class Plain(NoForward):
        def training_step(self, batch):
            return super().training_step(batch["a"], 0)

    trainer(tmp_path, Quantize(), max_epochs=1).fit(Plain(), {"a": loader(), "b": loader()})
    with pytest.raises(MisconfigurationException, match="calibration_step"):
        trainer(tmp_path, Quantize()).fit(Tiny(), [loader(), loader()])


def test_an_uncalibrated_model_is_not_taken_for_int8(tmp_path):
    with pytest.warns(UserWarning, match=r"4 quantizers have no amax.*net\.0\.input"):
        trainer(tmp_path, Quantize()).test(Tiny(), loader(), verbose=False)


def test_after_a_crash_in_calibration_the_next_fit_does_it_all(tmp_path):
    class Crashing(Quantize):
        def _validate(self, trainer, pl_module, stage):
            if stage == "calibrated":
                raise KeyboardInterrupt

    model, quantize = Tiny(), Quantize()
    with pytest.raises(SystemExit):
        trainer(tmp_path, Crashing()).fit(model, loader(), loader())
    assert all(q.amax is None for _, q in lq.named_quantizers(model))
    trainer(tmp_path, quantize).fit(model, loader(), loader())
    assert quantize.rescaled


@pytest.mark.parametrize(
    "options", [{"quantize": Quantize(), "method": "max"}, {"schedule": lq.callbacks.QATSchedule(), "lr_factor": 0.1}]
)
def test_an_argument_that_a_given_part_would_hide_is_refused(options):
    with pytest.raises(ValueError, match="is given"):
        QuantizationAwareTraining(**options)


def test_learning_an_amax_that_no_optimizer_would_know_is_refused(tmp_path):
    rules = [lq.QuantRule("*", lq.QuantDescriptor(learn_amax=True), lq.QuantDescriptor(axis=0))]
    with pytest.raises(MisconfigurationException, match=r"`.*\.input` has `learn_amax=True` and no `amax` to start from"):
        trainer(tmp_path, Quantize(rules), max_epochs=1).fit(Tiny(), loader(), loader())


def test_a_learned_amax_that_starts_from_its_descriptor_is_trained(tmp_path):
    rules = [lq.QuantRule("*", lq.QuantDescriptor(amax=1.0, learn_amax=True), lq.QuantDescriptor(axis=0))]
    model = Tiny()
    trainer(tmp_path, Quantize(rules, alpha=None), max_epochs=1).fit(model, loader(), loader())
    assert any(q.amax != 1 for name, q in lq.named_quantizers(model) if name.endswith("input"))


def test_recomputing_trains_to_the_same_weights(tmp_path):
    found = []
    for recompute in (False, True):
        seed_everything(0, verbose=False)
        model = Tiny()
        trainer(tmp_path, Quantize(alpha=None, recompute=recompute), max_epochs=1).fit(model, loader())
        layers = [module for module in model.modules() if isinstance(module, lq.nn.QuantMixin)]
        assert layers
        assert all(layer.recompute == recompute for layer in layers)
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
