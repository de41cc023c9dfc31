"""Whatever cut a fit off, resuming it ends in the numbers of the uninterrupted one."""

import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lq.callbacks import ProgressiveBits, QuantizationAwareTraining, Quantize, ScaleFreeze, SettleWeights
from lq.callbacks.resume import ExactResume, random_numbers, set_random_numbers
from lq.descriptor import INT8_INPUT, INT8_WEIGHT, QuantRule
from processes import SERVER
from tiny import Tiny, loader, trainer


class Noisy(Dataset):
    """Augments with random numbers of torch."""

    def __init__(self, samples=32):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(samples, 6, generator=generator)
        self.y = torch.randint(3, (samples,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(6), self.y[i]


class Curves(Callback):
    """Appends what is logged, and the learning rate, to a file; kills the process where it is told."""

    def __init__(self, path, kill_at=None):
        self.path, self.kill_at = Path(path), kill_at
        self.path.parent.mkdir(exist_ok=True)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        amax = pl_module.net[0].input_quantizer.amax.item()
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        with self.path.open("a") as file:
            print(trainer.global_step, outputs["loss"].item(), lr, amax, file=file)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledInCalibration(Quantize):
    def calibration_step(self, pl_module, batch):
        super().calibration_step(pl_module, batch)
        os.kill(os.getpid(), signal.SIGKILL)


def fit(folder, kill_at=None, ckpt_path=None, workers=0, epochs=3, quantize=None, module=Tiny, **options):
    """Three epochs of eight batches, shuffled and augmented, with dropout and a checkpoint at each step."""
    seed_everything(3, verbose=False)
    model = module()
    data = DataLoader(Noisy(), 4, shuffle=True, num_workers=workers)
    qat = QuantizationAwareTraining(quantize=quantize, freeze=ScaleFreeze(5, observe=3, freeze_after=0.75))
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_last=True)
    run = trainer(
        folder, qat, Curves(folder / "curves.txt", kill_at), keep, max_epochs=epochs, enable_checkpointing=True, **options
    )
    run.fit(model, data, loader(), ckpt_path=ckpt_path)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return fit(folder), folder


@pytest.mark.parametrize("step", [1, 3, 4, 8, 9, 16, 21])
def test_resume_at_any_batch_is_bit_identical(tmp_path, whole, step):
    model, folder = whole
    resumed = fit(tmp_path, ckpt_path=folder / f"step={step}.ckpt")
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert (tmp_path / "curves.txt").read_text().splitlines() == (folder / "curves.txt").read_text().splitlines()[step:]


class Twin(Tiny):
    """Two layers take one tensor: TensorRT has them share a quantizer, until SmoothQuant gives each a factor."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(6, 3)

    def forward(self, x):
        return self.net(x) + self.other(x)


def test_resume_within_an_observation_of_quantizers_that_were_taken_apart(tmp_path):
    model = fit(tmp_path / "a", module=Twin)
    assert model.other.input_quantizer is not model.net[0].input_quantizer
    for step in (3, 8):
        resumed = fit(tmp_path / f"b{step}", module=Twin, ckpt_path=tmp_path / "a" / f"step={step}.ckpt")
        torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("validation", [True, False])
def test_resume_at_the_end_of_an_epoch_is_bit_identical(tmp_path, validation):
    def run(folder, ckpt_path=None):
        seed_everything(1, verbose=False)
        model = Tiny()
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        fit = trainer(folder, QuantizationAwareTraining(lr_factor=1.0), keep, max_epochs=3, enable_checkpointing=True)
        fit.fit(model, DataLoader(Noisy(), 4, shuffle=True), loader() if validation else None, ckpt_path=ckpt_path)
        return model.state_dict()

    whole = run(tmp_path / "a")
    for epoch in (0, 1):
        resumed = run(tmp_path / f"b{epoch}", tmp_path / "a" / f"epoch={epoch}.ckpt")
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.slow
def test_workers_that_augment_draw_what_they_would_have(tmp_path):
    model = fit(tmp_path / "a", workers=1, epochs=2)
    for step in (3, 12):
        resumed = fit(tmp_path / f"b{step}", ckpt_path=tmp_path / "a" / f"step={step}.ckpt", workers=1, epochs=2)
        torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [None, 2, 11])
def test_after_sigkill_the_fit_goes_on_as_if_nothing_had_been(tmp_path, whole, kill_at):
    """In calibration (there is no checkpoint yet, so it starts again), within the first and within the second epoch."""
    quantize = KilledInCalibration() if kill_at is None else None
    killed = SERVER.Process(target=fit, args=(tmp_path, kill_at), kwargs={"quantize": quantize})
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    resumed = fit(tmp_path, ckpt_path="last")
    model, folder = whole
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert (tmp_path / "curves.txt").read_text() == (folder / "curves.txt").read_text()


def test_a_loader_that_keeps_its_place_is_not_skipped_twice(tmp_path):
    class Placed(DataLoader):
        """Goes on where its state says, in order."""

        done, start = 0, 0

        def __iter__(self):
            batches = list(super().__iter__())[self.start :]
            self.done, self.start = self.start, 0
            for batch in batches:
                self.done += 1
                yield batch

        def state_dict(self):
            return {"done": self.done}

        def load_state_dict(self, state):
            self.start = state["done"] % 8

    def run(folder, ckpt_path=None):
        seed_everything(3, verbose=False)
        model = Tiny()
        keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        fit = trainer(folder, QuantizationAwareTraining(), keep, max_epochs=2, enable_checkpointing=True)
        fit.fit(model, Placed(loader(batch_size=4).dataset, 4), loader(), ckpt_path=ckpt_path)
        return model

    model = run(tmp_path / "a")
    resumed = run(tmp_path / "b", tmp_path / "a" / "step=3.ckpt")
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_cut_short_is_refused_by_name_and_the_one_before_loads(tmp_path, whole):
    _, folder = whole
    short = tmp_path / "short.ckpt"
    content = (folder / "step=9.ckpt").read_bytes()
    short.write_bytes(content[: len(content) // 2])
    with pytest.raises(Exception, match=r"short\.ckpt is no whole checkpoint"):
        fit(tmp_path, ckpt_path=short)
    assert fit(tmp_path, ckpt_path=folder / "step=8.ckpt").net[0].input_quantizer.amax is not None


def test_another_number_of_processes_is_warned_about(tmp_path, whole):
    _, folder = whole
    checkpoint = torch.load(folder / "step=3.ckpt", weights_only=True)
    checkpoint["lq_random_numbers"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="checkpoint is of 2 processes, and there are 1"):
        fit(tmp_path, ckpt_path=tmp_path / "two.ckpt")


def test_random_numbers_of_python_and_numpy_too():
    import random

    import numpy as np

    before = random_numbers()
    drawn = [random.random(), np.random.rand(), torch.rand(1).item()]
    set_random_numbers(before)
    assert drawn == [random.random(), np.random.rand(), torch.rand(1).item()]


def test_alone_it_works_for_any_fit(tmp_path):
    def run(folder, ckpt_path=None):
        seed_everything(1, verbose=False)
        model = Tiny()
        keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        fit = trainer(folder, ExactResume(), keep, max_epochs=2, enable_checkpointing=True)
        fit.fit(model, DataLoader(Noisy(), 4, shuffle=True), ckpt_path=ckpt_path)
        return model

    model = run(tmp_path / "a")
    resumed = run(tmp_path / "b", tmp_path / "a" / "step=5.ckpt")
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("every", "steps", "options"),
    [
        (0.5, (4, 5, 8), {"every_n_train_steps": 1}),
        (0.5, (4, 8, 16), {"monitor": "val_loss"}),
        (3, (3, 6, 8), {"every_n_train_steps": 1}),
    ],
)
def test_validations_within_an_epoch(tmp_path, every, steps, options):
    def run(folder, ckpt_path=None):
        seed_everything(1, verbose=False)
        model, keep = Tiny(), ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)
        fit = trainer(folder, ExactResume(), keep, max_epochs=3, enable_checkpointing=True, val_check_interval=every)
        fit.fit(model, DataLoader(Noisy(), 4, shuffle=True), loader(), ckpt_path=ckpt_path)
        return model.state_dict()

    whole = run(tmp_path / "a")
    for step in steps:
        resumed = run(tmp_path / f"b{step}", tmp_path / "a" / f"step={step}.ckpt")
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_a_checkpoint_that_was_tested_is_not_where_the_next_fit_begins(tmp_path):
    def second_fit(test):
        seed_everything(0)
        callbacks = [
            ExactResume(),
            ProgressiveBits({0: 8, 3: 4}),
            Quantize([QuantRule("*", INT8_INPUT.replace(num_bits=4), INT8_WEIGHT.replace(num_bits=4))], alpha=None),
            ScaleFreeze(4, observe=3, freeze_after=None),
            SettleWeights(damping=0, freeze=[0.02, 0.01], momentum=0.5, after=3),
        ]
        folder = tmp_path / str(test)
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        first = trainer(folder, *callbacks, keep, max_epochs=1, enable_checkpointing=True)
        first.fit(Tiny(), loader())
        if test:
            first.test(Tiny(), loader(), ckpt_path=folder / "step=6.ckpt")
        seed_everything(1)
        module = Tiny()
        trainer(folder, *callbacks, max_epochs=1).fit(module, loader())
        return module

    tested, untested = second_fit(True), second_fit(False)
    assert all(torch.equal(a, b) for a, b in zip(tested.trained_on, untested.trained_on, strict=True))
    expected = untested.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tested.state_dict().items())
