"""What the command line gives a model has been through the hooks that move batches, as what its own steps get."""

import pytest
import torch
from composed import config
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage

from lq.callbacks import Quantize
from lq.cli.deploy import attach_, inputs
from lq.cli.run import run
from lq.cli.sensitivity import calibrate_
from lq.cli.verify import verify_run
from lq.recipes.digits import MEAN, STD, DigitsClassifier, DigitsDataModule

# of a pixel behind the hooks: white is (16 - MEAN) / STD
WHITE = 0.1 * (16 - MEAN) / STD
QUIET = ["trainer.enable_progress_bar=false", "model.width=8", "calib.batches=2"]


@pytest.fixture
def stages(monkeypatch):
    """Digits that hooks make ten times smaller; the stages that the Trainer was in when they did."""
    seen = []

    def before(self, batch, dataloader_idx):
        return batch[0] / 2, batch[1]

    def after(self, batch, dataloader_idx):
        seen.append(self.trainer.state.stage)
        return batch[0] / 5, batch[1]

    monkeypatch.setattr(DigitsDataModule, "on_before_batch_transfer", before)
    monkeypatch.setattr(DigitsDataModule, "on_after_batch_transfer", after)
    return seen


@pytest.fixture
def float_weights(tmp_path):
    torch.manual_seed(0)
    torch.save(DigitsClassifier(width=8).state_dict(), tmp_path / "digits.pt")
    return f"ckpt_path={tmp_path / 'digits.pt'}"


def test_validation_batches(stages):
    model, data = DigitsClassifier(width=8), DigitsDataModule()
    data.setup("fit")
    raw, _ = next(iter(data.val_dataloader()))
    attach_(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), model, data)
    (images,) = next(inputs(model, data))
    torch.testing.assert_close(images, raw / 10)
    assert stages == [RunningStage.VALIDATING]


def test_train_batches_for_sensitivity(tmp_path, stages, float_weights):
    cfg = config("sensitivity", tmp_path, *QUIET, float_weights, "batches=3")
    _, batches = calibrate_(cfg, instantiate(cfg.model), instantiate(cfg.data))
    assert len(batches) == 3
    assert max(images.max().item() for (images,) in batches) == pytest.approx(WHITE)
    assert set(stages) == {RunningStage.TRAINING}


@pytest.mark.slow
def test_a_run_and_its_verification(tmp_path, stages, float_weights):
    run(config("run", tmp_path / "out", *QUIET, float_weights, "ptq=mct", "logger=none", "export.batches=1"))
    state = torch.load(tmp_path / "out" / "checkpoints" / "ptq.ckpt", weights_only=True)["state_dict"]
    assert state["stem.0.input_quantizer._amax"] == pytest.approx(WHITE, rel=0.1)
    # what was quantized on, and what was validated, exported and measured on
    assert stages.count(RunningStage.TRAINING) == 2
    assert set(stages) == {RunningStage.TRAINING, RunningStage.VALIDATING}
    del stages[:]
    verify_run(config("verify", tmp_path / "verified", f"run={tmp_path / 'out'}", "batches=1"))
    assert set(stages) == {RunningStage.VALIDATING}


def test_the_first_batch_that_a_target_needs(stages):
    seen = []

    class Watching(Quantize):
        def calibration_step(self, pl_module, batch):
            seen.append(batch[0].max().item())
            super().calibration_step(pl_module, batch)

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    quantize = Watching(target="tensorrt", batches=2, stages=False, alpha=None, fine_tune=False)
    Trainer(callbacks=quantize, accelerator="cpu", **options).fit(DigitsClassifier(width=8), DigitsDataModule())
    # one run that places quantizers, and calibration
    assert seen == pytest.approx([WHITE] * 3)
