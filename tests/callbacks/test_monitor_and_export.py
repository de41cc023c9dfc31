import csv
import json
import warnings
from contextlib import contextmanager

import numpy as np
import onnx
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.analysis import measuring
from lq.callbacks import OnnxExport, QuantizationAwareTraining, Quantize, QuantMonitor, ScaleFreeze, monitor
from lq.descriptor import QuantDescriptor
from lq.export import OnnxModel
from tiny import DictBatches, EndsEpochs, Tiny, dataset, loader, trainer
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


class Halved(Quantize):
    """Calibrates, and leaves every amax at half of what it found."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        for _, quantizer in lq.named_quantizers(pl_module):
            quantizer.amax = quantizer.amax / 2


def test_every_metric_is_that_of_the_batch(tmp_path):
    # a learning rate of 0 keeps the weights for the comparison
    logger, model = CSVLogger(tmp_path, name="", version=""), Tiny(lr=0.0)
    callbacks = [Halved(stages=False, alpha=None, method="max"), QuantMonitor(1, warn_saturated=None)]
    trainer(tmp_path, *callbacks, logger=logger, max_steps=1, log_every_n_steps=1).fit(model, loader())
    (row,) = [row for row in rows(tmp_path) if row["amax/net.0.input"]]
    tensors = {"net.0.input": dataset().tensors[0][:4], "net.0.weight": model.net[0].weight, "net.4.weight": model.net[4].weight}
    for name, tensor in tensors.items():
        quantizer, x = dict(lq.named_quantizers(model))[name], tensor.detach().double().numpy()
        amax, lowest = quantizer.amax.double().numpy(), -127 if quantizer.narrow_range else -128
        codes = np.clip(np.rint(x / (amax / 127)), lowest, 127)
        noise = np.square(x - codes * (amax / 127)).sum()
        expected = {
            "amax": amax.max(),
            "saturated": (np.abs(x) > amax).mean(),
            "sqnr": 10 * np.log10(np.square(x).sum() / noise),
            "codes": len(np.unique(codes)) / (128 - lowest),
        }
        assert 0 < expected["saturated"] < 1
        found = {metric: float(row[f"{metric}/{name}"]) for metric in expected}
        assert found == pytest.approx(expected, rel=1e-4)


class Refresh(Callback):
    """Changes amax of one layer behind the third step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            quantizers = dict(lq.named_quantizers(pl_module))
            quantizers["net.0.input"].amax *= 1.5
            # the largest change is that of the last channel; one that was 0 has none
            before = quantizers["net.4.weight"].amax.clone()
            quantizers["net.4.weight"].amax = before * torch.tensor([1.1, 1.0, 0.5]).reshape(3, 1)


def test_drift_is_the_change_of_amax_since_the_step_before(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [Quantize(stages=False, alpha=None), Refresh(), QuantMonitor(1, warn_saturated=None)]
    trainer(tmp_path, *callbacks, logger=logger, max_steps=5).fit(Tiny(), loader())
    logged = [row for row in rows(tmp_path) if row["amax/net.0.input"]]
    assert [row["drift/net.0.weight"] for row in logged] == ["", *["0.0"] * 4]
    assert [float(row["drift/net.0.input"]) for row in logged[1:]] == pytest.approx([0, 0.5, 0, 0], abs=1e-6)
    assert [float(row["drift/net.4.weight"]) for row in logged[1:]] == pytest.approx([0, -0.5, 0, 0], abs=1e-6)


def saturation_warnings(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "lie beyond amax" in str(w.message)]


def test_a_quantizer_that_saturates_is_named_once_a_fit(tmp_path):
    def fit(monitor, model):
        callbacks = [Halved(stages=False, alpha=None, method="max"), monitor]
        logger = CSVLogger(tmp_path, name="", version="")
        return saturation_warnings(lambda: trainer(tmp_path, *callbacks, logger=logger).fit(model, loader()))

    monitor = QuantMonitor(1)
    first, *later = fit(monitor, Tiny())
    assert "More than 10% of the values lie beyond amax at step 1" in first
    assert all(remedy in first for remedy in ("`method`", "`ScaleFreeze`"))
    named = [name for message in (first, *later) for name in NAMES if f"`{name}`" in message]
    assert {"net.0.weight", "net.4.weight"} <= set(named)
    assert len(named) == len(set(named))
    assert "`net.0.weight`" in fit(monitor, Tiny())[0]
    assert fit(QuantMonitor(1, warn_saturated=None), Tiny()) == []
    assert fit(QuantMonitor(1, warn_saturated=0.99), Tiny()) == []


def test_one_transfer_a_step(tmp_path, monkeypatch):
    transfers = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            # what makes the host wait for a number: .item(), float(), bool()
            if function is torch.ops.aten._local_scalar_dense.default:
                transfers.append("item")
            return function(*args, **(kwargs or {}))

    class Counted(QuantMonitor):
        def on_train_batch_end(self, *args):
            tolist = torch.Tensor.tolist
            with Counting(), monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "tolist", lambda self: [transfers.append("tolist"), tolist(self)][1])
                for name in ("item", "cpu", "numpy"):
                    patch.setattr(torch.Tensor, name, None)
                super().on_train_batch_end(*args)

    class Nowhere(CSVLogger):
        def log_metrics(self, metrics, step=None):
            assert all(isinstance(value, float) for value in metrics.values())

    callbacks = [Quantize(stages=False), Counted(1)]
    logger = Nowhere(tmp_path, name="", version="")
    trainer(tmp_path, *callbacks, logger=logger, max_steps=3, log_every_n_steps=100).fit(Tiny(), loader())
    assert transfers == ["tolist"] * 3


def test_large_tensors_are_sampled(tmp_path, monkeypatch):
    seen = []

    @contextmanager
    def spied(*args, **kwargs):
        with measuring(*args, **kwargs) as stats:
            seen.append(stats)
            yield stats

    monkeypatch.setattr(monitor, "measuring", spied)
    monkeypatch.setattr(monitor, "SAMPLE", 10)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, Quantize(stages=False), QuantMonitor(1), logger=logger, max_steps=1).fit(Tiny(), loader())
    assert {name: 0 < stats.values <= 10 for name, stats in seen[0].items()} == dict.fromkeys(NAMES, True)


def test_what_is_infinite_is_left_out(tmp_path):
    # zeros are quantized without noise
    zeros = DataLoader(TensorDataset(torch.zeros(8, 6), torch.zeros(8, dtype=torch.long)), batch_size=4)
    logger = CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, Quantize(stages=False), QuantMonitor(1), logger=logger, max_steps=1).fit(Tiny(), zeros)
    (row,) = [row for row in rows(tmp_path) if row["amax/net.0.input"]]
    assert "sqnr/net.0.input" not in row
    assert float(row["sqnr/net.0.weight"]) > 20


def test_only_the_metrics_that_are_asked_for(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [Quantize(stages=False), QuantMonitor(4, metrics=["sqnr", "drift"])]
    trainer(tmp_path, *callbacks, logger=logger).fit(Tiny(), loader())
    logged = {key.split("/")[0] for row in rows(tmp_path) for key in row if "/" in key}
    assert logged == {"sqnr", "drift"}


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`metrics` has 'snr'.*choose from amax, saturated, sqnr, codes, drift"):
        QuantMonitor(metrics=["amax", "snr"])
    with pytest.raises(ValueError, match="`warn_saturated` is 10"):
        QuantMonitor(warn_saturated=10)
    assert QuantMonitor(metrics="codes").metrics == ("codes",)


def test_every_kind_of_quantizer(tmp_path):
    class Odd(Quantize):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            dict(lq.named_quantizers(pl_module))["last.input"].disable_quant()
            dict(lq.named_quantizers(pl_module))["last.weight"]._amax = None

    class Mixed(Tiny):
        def __init__(self):
            super().__init__()
            self.last = torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.last(super().forward(x))

    rules = [
        lq.QuantRule("net.0", QuantDescriptor(num_bits=(4, 3)), QuantDescriptor(num_bits=4, axis=0, block_size=3)),
        lq.QuantRule("net.4", QuantDescriptor(learn_amax=True, amax=1.0, unsigned=True), QuantDescriptor(num_bits=16)),
        lq.QuantRule("last", QuantDescriptor(), QuantDescriptor(axis=0)),
    ]
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = [Odd(rules, stages=False, alpha=None, method="max"), QuantMonitor(1, warn_saturated=None)]
    trainer(tmp_path, *callbacks, logger=logger, max_steps=3).fit(Mixed(), loader())
    last = [row for row in rows(tmp_path) if row["amax/net.0.input"]][-1]
    logged = {name: {metric for metric in monitor.METRICS if last.get(f"{metric}/{name}")} for name in [*NAMES, "last.input"]}
    every = set(monitor.METRICS)
    assert logged == {
        "net.0.input": every - {"codes"},
        "net.0.weight": every,
        "net.4.input": every,
        "net.4.weight": every - {"codes"},
        "last.input": {"amax", "drift"},
    }
    assert not any("last.weight" in key for key in last)
    assert 0 < float(last["codes/net.4.input"]) <= 1
    assert float(last["drift/net.4.input"]) != 0


def test_a_step_of_several_batches_is_logged_once(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    options = {"logger": logger, "accumulate_grad_batches": 4, "max_epochs": 1}
    logged = []
    logger.log_metrics = lambda metrics, step=None: logged.append(step) if "amax/net.0.input" in metrics else None
    trainer(tmp_path, Quantize(stages=False), QuantMonitor(1), **options).fit(Tiny(), loader())
    assert logged == [0, 1]


def test_a_compiled_model_is_measured_at_every_log(tmp_path):
    model, logger = Tiny(), CSVLogger(tmp_path, name="", version="")
    model.net = torch.compile(model.net, backend="eager")
    trainer(tmp_path, Quantize(stages=False, alpha=None), QuantMonitor(2), logger=logger).fit(model, loader())
    logged = [row for row in rows(tmp_path) if row["amax/net._orig_mod.0.input"]]
    assert len(logged) == 8
    assert all(row["saturated/net._orig_mod.0.input"] for row in logged)
    torch.compiler.reset()


def test_an_offline_wandb_run_has_amax_saturation_stages_and_histograms(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="test")
    t = trainer(tmp_path, QuantizationAwareTraining(), logger=logger, log_every_n_steps=4)
    t.fit(Tiny(), loader(), loader())
    wandb.teardown()  # waits until all is written
    found = history(tmp_path)
    assert {f"{metric}/{n}" for metric in monitor.METRICS for n in NAMES} <= found.keys()
    assert {f"{stage}/val_acc" for stage in ("float", "calibrated", "rescaled", "qat")} <= found.keys()
    (table,) = found["stages"]
    assert table["_type"] == "table-file"
    (path,) = tmp_path.rglob(f"files/{table['path']}")
    table = json.loads(path.read_text())
    assert table["columns"] == ["stage", "val_loss", "val_acc"]
    assert [row[0] for row in table["data"]] == ["float", "calibrated", "rescaled", "qat"]
    assert [row[2] for row in table["data"]] == [found[f"{row[0]}/val_acc"][0] for row in table["data"]]
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


def test_hooks_go_where_the_module_ends_its_epoch(tmp_path):
    model, logger = EndsEpochs(), CSVLogger(tmp_path, name="", version="")
    trainer(tmp_path, Quantize(), QuantMonitor(1), logger=logger).fit(model, loader())
    assert len(model.trained_on) == 8
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("module", [Tiny, DictBatches])
def test_the_graph_is_written_when_the_fit_ends(tmp_path, module):
    model = module()
    rows = [{"x": x, "mask": torch.ones(6), "y": y} for x, y in dataset()]
    data = loader() if module is Tiny else DataLoader(rows, batch_size=4)
    trainer(tmp_path, QuantizationAwareTraining(export=tmp_path / "model.onnx"), max_epochs=1).fit(model, data)
    x = dataset().tensors[0][:2]
    (output,) = OnnxModel(tmp_path / "model.onnx")(x, *([] if module is Tiny else [torch.ones(2, 6)]))
    np.testing.assert_allclose(output.numpy(), model.eval()(x).detach().numpy(), atol=1e-5)


class Nested(Tiny):
    """Batches that only a `calibration_step` of one's own can unpack."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["deep"]["x"], batch["y"]), batch_idx)

    validation_step = None


class QuantizeNested(Quantize):
    def calibration_step(self, pl_module, batch):
        pl_module(batch["deep"]["x"])


def nested():
    return DataLoader([{"deep": {"x": x}, "y": y} for x, y in dataset()], batch_size=4)


def test_the_graph_takes_what_calibration_gives(tmp_path):
    model, quantize = Nested(), QuantizeNested(target="onnxruntime")
    export = OnnxExport(tmp_path / "model.onnx")
    trainer(tmp_path, quantize, export, max_epochs=1).fit(model, nested())
    x = dataset().tensors[0][:2]
    graph = OnnxModel(tmp_path / "model.onnx")
    np.testing.assert_allclose(graph(x)[0].numpy(), model.eval()(x).detach().numpy(), atol=1e-5)
    kinds = {tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert onnx.TensorProto.UINT8 in kinds  # as `target` of Quantize wants it


def test_what_cannot_be_exported_shows_in_the_first_step(tmp_path):
    model = Nested()
    lq.quantize_(model)
    with lq.calibrating(model):
        model(dataset().tensors[0])
    with pytest.raises(MisconfigurationException, match=r"does not run through Nested.*Override `Quantize\.calibration_step"):
        trainer(tmp_path, OnnxExport(tmp_path / "model.onnx"), max_epochs=5).fit(model, nested())
    assert len(model.trained_on) == 1


def test_the_inputs_of_the_graph_are_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lq.callbacks.export.rank_zero_info", said.append)
    rows = [{"x": x, "mask": torch.ones(6), "y": y} for x, y in dataset()]
    callback = QuantizationAwareTraining(export=tmp_path / "model.onnx")
    trainer(tmp_path, callback, max_epochs=1).fit(DictBatches(), DataLoader(rows, batch_size=4))
    assert said == [f"Exported {tmp_path / 'model.onnx'}, with the inputs x, mask"]


@pytest.mark.parametrize("callback", [ScaleFreeze, QuantMonitor, OnnxExport])
def test_a_module_without_quantizers_is_told(tmp_path, callback):
    made = callback(tmp_path / "model.onnx") if callback is OnnxExport else callback()
    with pytest.warns(UserWarning, match=f"{callback.__name__} finds no quantizers in Tiny"):
        trainer(tmp_path, made, max_epochs=1).fit(Tiny(), loader())


def test_a_missing_folder_is_refused_before_training(tmp_path):
    model = Tiny()
    with pytest.raises(MisconfigurationException, match="nowhere"):
        trainer(tmp_path, OnnxExport(tmp_path / "nowhere" / "model.onnx")).fit(model, loader())
    assert model.trained_on == []
