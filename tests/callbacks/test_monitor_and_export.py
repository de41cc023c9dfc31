import csv

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils.data import DataLoader

import lq
from lq.callbacks import OnnxExport, QuantizationAwareTraining, Quantize, QuantMonitor
from lq.export import OnnxModel
from tiny import DictBatches, Tiny, dataset, loader, trainer
from wandb_run import history

NAMES = ["net.0.input", "net.0.weight", "net.4.input", "net.4.weight"]


def rows(path):
    with (path / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_amax_and_saturation_are_logged_every_n_steps(tmp_path):
    logger, model = CSVLogger(tmp_path, name="", version=""), Tiny()
    trainer(tmp_path, Quantize(stages=False), QuantMonitor(every_n_steps=4), logger=logger).fit(model, loader())
    logged = [row for row in rows(tmp_path) if row["amax/net.0.input"]]
    assert [int(row["step"]) for row in logged] == [1, 5, 9, 13]
    for name in NAMES:
        amax = dict(lq.named_quantizers(model))[name].amax.max().item()
        assert float(logged[-1][f"amax/{name}"]) == pytest.approx(amax)
        assert 0 <= float(logged[-1][f"saturated/{name}"]) < 0.2
    assert not any(q._forward_hooks for _, q in lq.named_quantizers(model))


def test_saturation_is_the_fraction_of_the_batch_beyond_amax(tmp_path):
    class Half(Quantize):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            dict(lq.named_quantizers(pl_module))["net.0.input"].amax = torch.tensor(0.5)

    logger, model = CSVLogger(tmp_path, name="", version=""), Tiny()
    callbacks = [Half(stages=False, alpha=None), QuantMonitor(every_n_steps=1)]
    trainer(tmp_path, *callbacks, logger=logger, max_epochs=1).fit(model, loader())
    x = dataset().tensors[0][:4]
    first = next(row for row in rows(tmp_path) if row["saturated/net.0.input"])
    assert float(first["saturated/net.0.input"]) == pytest.approx((x.abs() > 0.5).float().mean().item())


def test_an_offline_wandb_run_has_amax_saturation_stages_and_histograms(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    t = trainer(tmp_path, QuantizationAwareTraining(), logger=logger, log_every_n_steps=4)
    t.fit(Tiny(), loader(), loader())
    wandb.teardown()  # waits until all is written
    found = history(tmp_path)
    assert {f"amax/{n}" for n in NAMES} | {f"saturated/{n}" for n in NAMES} <= found.keys()
    assert {f"{stage}/val_acc" for stage in ("float", "calibrated", "rescaled", "qat")} <= found.keys()
    histogram = found["histogram/net.0.input"][0]
    assert histogram["_type"] == "histogram"
    # each of 8 batches of 4 rows with 6 features is counted once
    assert sum(histogram["values"]) == 8 * 4 * 6
    assert len(histogram["bins"]) == len(histogram["values"]) + 1


def test_hooks_go_when_a_batch_fails(tmp_path):
    class Failing(Tiny):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise KeyError("boom")

    model, logger = Failing(), CSVLogger(tmp_path, name="", version="")
    with pytest.raises(KeyError, match="boom"):
        trainer(tmp_path, Quantize(stages=False), QuantMonitor(1), logger=logger).fit(model, loader())
    assert not any(q._forward_hooks for _, q in lq.named_quantizers(model))


@pytest.mark.parametrize("module", [Tiny, DictBatches])
def test_the_graph_is_written_when_the_fit_ends(tmp_path, module):
    model = module()
    rows = [{"x": x, "mask": torch.ones(6), "y": y} for x, y in dataset()]
    data = loader() if module is Tiny else DataLoader(rows, batch_size=4)
    trainer(tmp_path, QuantizationAwareTraining(export=tmp_path / "model.onnx"), max_epochs=1).fit(model, data)
    x = dataset().tensors[0][:2]
    (output,) = OnnxModel(tmp_path / "model.onnx")(x, *([] if module is Tiny else [torch.ones(2, 6)]))
    np.testing.assert_allclose(output.numpy(), model.eval()(x).detach().numpy(), atol=1e-5)


def test_a_missing_folder_is_refused_before_training(tmp_path):
    model = Tiny()
    with pytest.raises(MisconfigurationException, match="nowhere"):
        trainer(tmp_path, OnnxExport(tmp_path / "nowhere" / "model.onnx")).fit(model, loader())
    assert model.trained_on == []
