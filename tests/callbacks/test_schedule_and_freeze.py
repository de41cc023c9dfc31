import copy
import csv
import itertools
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lq
from lq.callbacks import QATSchedule, Quantize, ScaleFreeze
from lq.schedule import cosine_factor, is_observing, is_refresh, to_steps
from tiny import EndsEpochs, Tiny, dataset, loader, trainer


class Record(Callback):
    """Learning rate, amax, and BatchNorm statistics that each optimizer step used."""

    def __init__(self):
        self.lr, self.amax, self.mean, self.frozen = {}, {}, {}, set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        self.mean[step] = pl_module.net[1].running_mean.clone()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        step = trainer.global_step
        if all(q.frozen for _, q in lq.named_quantizers(pl_module)):
            self.frozen.add(step)
        self.lr[step] = optimizer.param_groups[0]["lr"]
        self.amax[step] = {name: q.amax.clone() for name, q in lq.named_quantizers(pl_module)}

    def changes(self):
        steps = sorted(self.amax)
        pairs = itertools.pairwise(steps)
        return [b for a, b in pairs if any(not torch.equal(self.amax[a][n], self.amax[b][n]) for n in self.amax[a])]


# The schedule


def expected(step, total, base=0.1, lr=0.01, final=0.01):
    return base * lr * (final + (1 - final) * (1 + math.cos(math.pi * step / (total - 1))) / 2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_learning_rate_is_the_recipes_at_every_step(tmp_path, accumulate):
    record = Record()
    t = trainer(tmp_path, QATSchedule(), record, accumulate_grad_batches=accumulate)
    t.fit(Tiny(lr=0.1), loader())
    total = 16 // accumulate
    assert record.lr == pytest.approx({step: expected(step, total) for step in range(total)})
    assert record.lr[0] == pytest.approx(0.001)
    assert record.lr[total - 1] == pytest.approx(0.00001)


def test_each_parameter_group_has_its_own_rate(tmp_path):
    class Groups(Tiny):
        def configure_optimizers(self):
            return torch.optim.SGD(
                [{"params": self.net[0].parameters(), "lr": 1.0}, {"params": self.net[4].parameters(), "lr": 0.1}]
            )

    model = Groups()
    t = trainer(tmp_path, QATSchedule(lr_factor=0.5), max_steps=1, max_epochs=None)
    t.fit(model, loader())
    assert [g["lr"] for g in t.optimizers[0].param_groups] == pytest.approx([0.5, 0.05])


def test_a_scheduler_of_the_module_is_overruled_with_a_warning_or_kept(tmp_path):
    class Scheduled(Tiny):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    ours, own = Record(), Record()
    with pytest.warns(UserWarning, match="ExponentialLR"):
        trainer(tmp_path, QATSchedule(), ours).fit(Scheduled(), loader())
    assert ours.lr[8] == pytest.approx(expected(8, 16))
    trainer(tmp_path, QATSchedule(lr_factor=None), own).fit(Scheduled(), loader())
    assert own.lr[0] == 0.1
    assert own.lr[8] == 0.05


def test_the_monitor_behind_it_logs_the_rate_that_is_used(tmp_path):
    record = Record()
    logger = CSVLogger(tmp_path, name="", version="")
    t = trainer(tmp_path, QATSchedule(), LearningRateMonitor("step"), record, logger=logger, log_every_n_steps=1)
    t.fit(Tiny(), loader())
    logged = [float(row["lr-SGD"]) for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["lr-SGD"]]
    assert logged == pytest.approx(list(record.lr.values()))


class ByHand(Tiny):
    """Two optimizers with schedulers, all stepped in ``training_step``."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(self.net[i].parameters(), lr) for i, lr in ((0, 0.5), (4, 0.2))]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in optimizers]

    def training_step(self, batch, batch_idx):
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(self(batch[0]).square().mean())
            optimizer.step()
            scheduler.step()


def test_stepped_by_hand_each_optimizer_follows_from_its_own_rate_batch_by_batch(tmp_path):
    rates, amaxs = [], []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            amaxs.append(pl_module.net[0].input_quantizer.amax.item())

    freeze = ScaleFreeze(3, observe=1, freeze_after="1 epoch")
    with pytest.warns(UserWarning, match="QATSchedule overrules the learning rates of StepLR, StepLR"):
        trainer(tmp_path, Quantize(alpha=None), QATSchedule(), freeze, Look(), max_epochs=2).fit(ByHand(), loader())
    expected = [0.01 * cosine_factor(step, 16) for step in range(16)]
    assert rates == [pytest.approx([0.5 * factor, 0.2 * factor]) for factor in expected]
    assert [i + 1 for i in range(1, 16) if amaxs[i] != amaxs[i - 1]] == [3, 6]


class ByHandAlone(Tiny):
    """One optimizer, stepped in ``training_step``."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


@pytest.mark.parametrize("epochs", [10, None])
def test_max_steps_ends_the_cosine_by_hand_too(tmp_path, epochs):
    record = Record()
    callbacks = [Quantize(stages=False), QATSchedule(), ScaleFreeze(None, freeze_after=0.5), record]
    trainer(tmp_path, *callbacks, max_steps=10, max_epochs=epochs).fit(ByHandAlone(), loader())
    assert record.lr == pytest.approx({step: expected(step, 10) for step in range(10)})
    assert record.frozen == set(range(5, 10))


def test_max_steps_of_several_optimizers_by_hand_says_nothing_of_batches(tmp_path):
    message = r"`max_steps` is 10, and counts the steps of 2 optimizers .* set `max_epochs`, and `limit_train_batches`"
    for callback in (QATSchedule(), ScaleFreeze(freeze_after=0.5)):
        with pytest.raises(MisconfigurationException, match=message):
            trainer(tmp_path, Quantize(stages=False), callback, max_steps=10).fit(ByHand(), loader())
    # who asks for no share need not know
    fit = trainer(tmp_path, Quantize(stages=False), QATSchedule(None), ScaleFreeze(2, freeze_after=4), max_steps=10)
    fit.fit(ByHand(), loader())
    assert fit.global_step == 10


def accumulating(folder, scheduling, *callbacks, **options):
    record = Record()
    scheduler = GradientAccumulationScheduler(scheduling)
    trainer(folder, Quantize(stages=False), *callbacks, scheduler, record, **options).fit(Tiny(), loader())
    return record


@pytest.mark.parametrize(("options", "total"), [({}, 4 + 4 + 3), ({"max_steps": 9}, 9), ({"max_epochs": -1, "max_steps": 9}, 9)])
def test_a_scheduler_of_the_accumulation_keeps_the_clock(tmp_path, options, total):
    freeze = ScaleFreeze(None, freeze_after=0.5)
    record = accumulating(tmp_path, {0: 2, 2: 3}, QATSchedule(), freeze, **{"max_epochs": 3, **options})
    assert record.lr == pytest.approx({step: expected(step, total) for step in range(total)})
    assert record.frozen == set(range(round(total / 2), total))


def test_an_end_that_is_far_away_is_counted_at_once(tmp_path):
    fit = trainer(tmp_path, Quantize(stages=False), QATSchedule(), record := Record(), max_epochs=10**12, max_steps=4)
    fit.fit(Tiny(), loader())
    assert record.lr == pytest.approx({step: expected(step, 4) for step in range(4)})


def test_epochs_are_lengths_where_a_scheduler_gives_all_the_same(tmp_path):
    record = accumulating(tmp_path, {0: 4}, ScaleFreeze(None, freeze_after="1 epoch"))
    assert record.frozen == {2, 3}
    with pytest.raises(
        ValueError, match=r"`freeze_after` is '1 epoch', and epochs have no known length here, or not all the same"
    ):
        accumulating(tmp_path, {0: 2, 1: 4}, ScaleFreeze(None, freeze_after="1 epoch"))


def test_the_rate_is_the_highest_of_a_scheduler_that_warms_up(tmp_path):
    class WarmingUp(Tiny):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100)]

    record = Record()
    trainer(tmp_path, QATSchedule(), record).fit(WarmingUp(), loader())
    assert record.lr[0] == pytest.approx(0.001)


def test_endless_fits_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="max_epochs"):
        trainer(tmp_path, QATSchedule(), max_epochs=-1).fit(Tiny(), loader())


@pytest.mark.parametrize("options", [{"lr_factor": 0}, {"lr_factor": -1.0}, {"final": 1.5}])
def test_bad_shares_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        QATSchedule(**options)


def test_warmup_is_linear():
    assert [cosine_factor(s, 10, warmup=3) for s in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


# Freezing


def freeze_run(tmp_path, *, epochs=2, **options):
    record, model = Record(), Tiny()
    callbacks = [Quantize(method="max", alpha=None, stages=False), ScaleFreeze(method="max", **options), record]
    trainer(tmp_path, *callbacks, max_epochs=epochs).fit(model, loader(shuffle=True))
    return record, model


def test_amax_stands_still_between_refreshes_and_after_the_freeze(tmp_path):
    record, model = freeze_run(tmp_path, refresh_every=3, observe=2, freeze_after=8)
    assert record.changes() == [3, 6]
    assert record.frozen == set(range(8, 16))
    assert not any(q.frozen or q._if_calib for _, q in lq.named_quantizers(model))


def test_without_refreshes_amax_never_changes(tmp_path):
    record, _ = freeze_run(tmp_path, refresh_every=None, freeze_after=None)
    assert record.changes() == []


def test_batchnorm_statistics_stay_from_the_freeze_on(tmp_path):
    record, _ = freeze_run(tmp_path, refresh_every=None, freeze_after=5)
    assert not torch.equal(record.mean[4], record.mean[5])
    assert all(torch.equal(record.mean[5], record.mean[step]) for step in range(6, 17))
    record, _ = freeze_run(tmp_path, refresh_every=None, freeze_after=5, batchnorm=False)
    assert not torch.equal(record.mean[5], record.mean[16])


def test_a_refresh_blends_the_observed_amax_into_the_present_one(tmp_path):
    seen = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.setdefault(trainer.global_step, []).append(batch[0].abs().max())

    record, look, model = Record(), Look(), Tiny()
    callbacks = [
        Quantize(method="max", alpha=None, stages=False),
        ScaleFreeze(4, method="max", observe=2, momentum=0.75),
        record,
        look,
    ]
    trainer(tmp_path, *callbacks, max_epochs=1).fit(model, loader(shuffle=True))
    observed = max(seen[2][0], seen[3][0])
    old, new = record.amax[3]["net.0.input"], record.amax[4]["net.0.input"]
    torch.testing.assert_close(new, 0.75 * old + 0.25 * observed)


def test_amax_of_weights_follows_at_the_refresh(tmp_path):
    weights = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weights[trainer.global_step] = pl_module.net[0].weight.detach().abs().amax(1, keepdim=True)

    record = Record()
    callbacks = [Quantize(method="max", alpha=None, stages=False), ScaleFreeze(4, method="max", momentum=0.0), record, Look()]
    trainer(tmp_path, *callbacks, max_epochs=1).fit(Tiny(), loader())
    torch.testing.assert_close(record.amax[4]["net.0.weight"], weights[4], rtol=0, atol=0)
    assert not torch.equal(weights[3], weights[4])


def test_gradient_accumulation_keeps_the_clock(tmp_path):
    record = Record()
    callbacks = [
        Quantize(method="max", alpha=None, stages=False),
        ScaleFreeze(2, method="max", observe=1, freeze_after=None),
        record,
    ]
    trainer(tmp_path, *callbacks, accumulate_grad_batches=2, max_epochs=2).fit(Tiny(), loader(shuffle=True))
    assert record.changes() == [2, 4, 6]


def test_a_second_fit_starts_its_own_clock(tmp_path):
    model = Tiny()
    for _ in range(2):
        callbacks = [Quantize(method="max", alpha=None, stages=False), ScaleFreeze(3, method="max", freeze_after=4)]
        record = Record()
        trainer(tmp_path, *callbacks, record, max_epochs=1).fit(model, loader(shuffle=True))
        assert record.changes() == [3]
        model = copy.deepcopy(model)


@pytest.mark.parametrize(
    "options", [{"refresh_every": 1.5}, {"freeze_after": -1}, {"momentum": 1.0}, {"observe": 0}, {"method": "magic"}]
)
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        ScaleFreeze(**options)


def test_pure_functions_of_the_step():
    assert [s for s in range(13) if is_refresh(s, 4)] == [4, 8, 12]
    assert [s for s in range(13) if is_observing(s, 4, 1, freeze=8)] == [3, 7]
    assert not any(is_observing(s, None, 1, None) or is_refresh(s, None) for s in range(5))
    assert to_steps(0.25, 10, "x") == 2
    with pytest.raises(ValueError, match="unknown number"):
        to_steps(0.5, float("inf"), "x")


def test_validation_data_does_not_get_into_a_refresh(tmp_path):
    record, huge = Record(), dataset()
    huge.tensors[0].mul_(1000)
    callbacks = [
        Quantize(method="max", alpha=None, stages=False),
        ScaleFreeze(8, method="max", momentum=0.0, freeze_after=None),
        record,
    ]
    trainer(tmp_path, *callbacks, max_epochs=2).fit(Tiny(), loader(shuffle=True), DataLoader(huge, 4))
    assert record.changes() == [8]
    assert record.amax[8]["net.0.input"] <= dataset().tensors[0].abs().max()


def test_validation_is_not_observed_where_the_module_ends_its_epoch(tmp_path):
    class Watching(EndsEpochs):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            observing.append(any(q._if_calib for _, q in lq.named_quantizers(self)))

    observing = []
    fit = trainer(tmp_path, Quantize(), ScaleFreeze(5, observe=4, freeze_after=None), max_epochs=1)
    fit.fit(Watching(), loader(), loader())
    assert observing
    assert not any(observing)


def test_a_layer_that_is_not_called_lately_keeps_its_amax(tmp_path):
    class Dropping(Tiny):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(3, 3)

        def forward(self, x):
            y = self.net(x)
            return y if self.training else self.extra(y)

    record = Record()
    callbacks = [Quantize(method="max", alpha=None, stages=False), ScaleFreeze(3, method="max", freeze_after=None), record]
    trainer(tmp_path, *callbacks, max_epochs=1).fit(Dropping(), loader(shuffle=True))
    assert record.changes() == [3, 6]
    assert torch.equal(record.amax[0]["extra.input"], record.amax[7]["extra.input"])


@pytest.mark.parametrize("callback", [QATSchedule(), ScaleFreeze()])
def test_shares_of_a_fit_of_unknown_length_are_refused(tmp_path, callback):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(dataset())

    with pytest.raises((MisconfigurationException, ValueError), match="max_steps"):
        trainer(tmp_path, Quantize(stages=False), callback).fit(Tiny(), DataLoader(Endless(), 4))


def test_after_an_exception_nothing_is_held_still(tmp_path):
    class Failing(Tiny):
        def on_train_batch_end(self, *args):
            if self.trainer.global_step == 5:
                raise KeyError("boom")

    model = Failing()
    callbacks = [Quantize(method="max", stages=False), ScaleFreeze(None, freeze_after=2, method="max")]
    with pytest.raises(KeyError, match="boom"):
        trainer(tmp_path, *callbacks).fit(model, loader())
    assert model.net[1].training
    assert not any(q.frozen or q._if_calib for _, q in lq.named_quantizers(model))


def test_what_the_user_froze_stays_frozen(tmp_path):
    model = Tiny()
    trainer(tmp_path, Quantize(method="max"), max_epochs=1).fit(model, loader())
    lq.freeze_(model)
    record = Record()
    trainer(tmp_path, Quantize(), ScaleFreeze(3, method="max"), record, max_epochs=1).fit(model, loader())
    assert record.changes() == []
    assert all(q.frozen for _, q in lq.named_quantizers(model))
