"""`lq sensitivity`: what it writes is what the functions find, and its rules build the model that was measured."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from composed import config
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import OmegaConf

import lq
from lq.analysis import sensitivity
from lq.analysis.allocation import Allocator
from lq.cli.main import _job, register_resolvers
from lq.cli.sensitivity import calibrate_, checked, configured, find_sensitive
from lq.cli.sensitivity_options import Budget, methods_of, widths_of
from lq.recipes.digits import DigitsClassifier

QUIET = ["trainer.enable_progress_bar=false", "data.val_fraction=0.1", "calib=max", "calib.batches=2", "batches=2"]


@pytest.fixture(scope="module")
def float_weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "digits.pt"
    torch.save(DigitsClassifier(width=8).state_dict(), path)
    return ["model.width=8", f"ckpt_path={path}"]


@pytest.fixture(scope="module")
def found(tmp_path_factory, float_weights):
    """The folder of a search within a budget, and what it returned."""
    folder = tmp_path_factory.mktemp("found")
    told = [*float_weights, *QUIET, "by=layer", "quant=w4a8", "bits=[2,4,8]", "budget=0.8", "budgets=2", "seed=3"]
    return folder, find_sensitive(config("sensitivity", folder, *told)), told


@pytest.mark.slow
def test_everything_lies_in_one_folder(found):
    folder, metrics, _ = found
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    files = {"config.yaml", "metrics.json", "sensitivity.md", "sensitivity.json", "sensitivity.png", "front.png"}
    assert names == files | {"quant/rules.yaml"}
    records = json.loads((folder / "sensitivity.json").read_text())
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert metrics["float/val_acc"] == records["float_metric"]
    assert metrics["quantized/val_acc"] == records["quantized"]["metric"]
    assert metrics["allocated/val_acc"] == records["front"]["chosen"]["metric"]
    page = (folder / "sensitivity.md").read_text()
    assert all(row["name"] in page for row in records["rows"])
    assert "](front.png)" in page
    assert "quant=rules" in page


@pytest.mark.slow
def test_the_budget_is_a_share_of_what_the_quantized_model_has(found):
    chosen = json.loads((found[0] / "sensitivity.json").read_text())["front"]["chosen"]
    layers = [m for m in DigitsClassifier(width=8).modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    assert chosen["size"] <= 0.8 * weights * 4 / 8 < weights
    assert len({layer["weight"] for layer in chosen["layers"].values()}) > 1


@pytest.mark.slow
def test_the_command_that_it_prints_builds_the_model_that_was_measured(found, tmp_path):
    folder, _, _ = found
    command = next(line.split() for line in (folder / "sensitivity.md").read_text().splitlines() if line.startswith("    lq "))
    at = command.index("--config-dir")
    assert Path(command[at + 1]) == folder
    overrides = [*command[1:at], f"hydra.searchpath=[file://{folder}]", "export=none"]
    cfg = config("run", tmp_path, *overrides)
    model = lq.quantize_(DigitsClassifier(width=8), instantiate(cfg.callbacks)["quantize"].rules)
    layers = json.loads((folder / "sensitivity.json").read_text())["front"]["chosen"]["layers"]
    built = {name: q.num_bits for name, q in lq.named_quantizers(model)}
    expected = {f"{name}.{kind}": layer[kind] for name, layer in layers.items() for kind in ("input", "weight")}
    assert built == expected


@pytest.mark.slow
def test_what_is_written_is_what_the_function_finds(found):
    folder, _, told = found
    cfg = config("sensitivity", folder, *told)
    seed_everything(cfg.seed, verbose=False)
    data, model = instantiate(cfg.data), instantiate(cfg.model)
    checked(cfg, data, model)
    model.load_state_dict(torch.load(cfg.ckpt_path))
    _, batches = calibrate_(cfg, model, data)
    images, digits = next(iter(data.val_dataloader()))

    def accuracy(model):
        return (model(images).argmax(1) == digits).double().mean()

    ours = sensitivity(model, batches, by="layer", metric=accuracy)
    records = json.loads((folder / "sensitivity.json").read_text())
    assert ours.float_metric == pytest.approx(records["float_metric"])
    assert [(row.name, row.bits) for row in ours.rows] == [(row["name"], row["bits"]) for row in records["rows"]]
    for row, theirs in zip(ours.rows, records["rows"], strict=True):
        for effect, written in ((row.alone, theirs["alone"]), (row.without, theirs["without"])):
            assert (effect.mse, effect.metric) == pytest.approx((written["mse"], written["metric"]), rel=1e-5)


@pytest.mark.slow
def test_without_a_budget_the_worst_are_spared(tmp_path, float_weights):
    told = [*float_weights, *QUIET, "worst=2", "num_bits=7", "val_batches=1", "metric=val_loss", "rescale=none"]
    metrics = find_sensitive(config("sensitivity", tmp_path, *told))
    assert set(metrics) == {"float/val_loss", "quantized/val_loss"}
    rows = json.loads((tmp_path / "sensitivity.json").read_text())["rows"]
    rules = yaml.safe_load((tmp_path / "quant" / "rules.yaml").read_text())["rules"]
    model = lq.quantize_(DigitsClassifier(width=8), rules, target="tensorrt", args=torch.zeros(1, 1, 8, 8))
    wide = {name for name, q in lq.named_quantizers(model) if q.num_bits == 7}
    # a shortcut takes the width of its layer's input
    assert wide >= {row["name"] for row in rows[:2] if not row["name"].endswith("residual")} > set()
    assert not (tmp_path / "front.png").exists()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("budget=none", "`budget` is 'none': give a share up to 1"),
        ("budget=-1", "`budget` is -1"),
        ("budget=true", "`budget` is True"),
        ("by=block", "`by` is 'block': choose quantizer or layer"),
        ("batches=0", "`batches` is 0: give a whole number from 1 on"),
        ("worst=1.5", "`worst` is 1.5"),
        ("ptq=mct", "`ptq` is set"),
        ("num_bits=16", "num_bits=16.*TensorRT takes at most 8"),
        ("budget=0.5 bits=[4,16]", "num_bits=16.*TensorRT takes at most 8"),
        ("quant.weight.num_bits=33", "num_bits.*33"),
        ("ckpt_path=nowhere.pt", "ckpt_path.*nowhere"),
        ("trainer=ddp_cpu", "`trainer` has 2 processes, and sensitivity runs in one"),
        ("run=nowhere", r"`run` is 'nowhere', which has no \.hydra"),
    ],
)
def test_bad_values_are_refused_before_training(tmp_path, told, words):
    with pytest.raises(Exception, match=words):
        find_sensitive(config("sensitivity", tmp_path, *QUIET, *told.split()))
    assert {path.name for path in tmp_path.iterdir()} <= {"config.yaml"}


def test_a_metric_that_there_is_not_is_told_once_there_is_a_validation(tmp_path, float_weights):
    words = "`metric` is 'val_f1', and the validation has val_acc, val_loss|val_loss, val_acc"
    with pytest.raises(ValueError, match=words):
        find_sensitive(config("sensitivity", tmp_path, *float_weights, *QUIET, "metric=val_f1"))


@pytest.mark.parametrize("given", ["4.5 bits", "4.5bits", 0.5, 20000, 1])
def test_budgets(given):
    unit = "bits" if isinstance(given, str) else "share" if given <= 1 else "cost"
    assert Budget.read(given) == Budget(4.5 if isinstance(given, str) else given, unit)


def test_budgets_that_nothing_meets():
    model, batches = torch.nn.Sequential(torch.nn.Linear(4, 2)), [torch.randn(8, 4)]
    with lq.calibrating(lq.quantize_(model)):
        model(batches[0])
    allocator = Allocator(model, batches, (2, 4), method="max")
    assert {Budget.read(given).mean_bits(allocator) for given in (0.5, 4, "4 bits")} == {4}
    with pytest.raises(ValueError, match=r"`budget` is 0.1 \(of the quantized model\), 0.8 bits .*: `bits` leads from 2 to 4"):
        Budget.read(0.1).mean_bits(allocator)
    with pytest.raises(ValueError, match=r"`budget` is 9 \(bytes or bit-operations\), 9 bits"):
        Budget.read(9).mean_bits(allocator)


def test_methods_keep_their_options(tmp_path):
    told = ["calib=mse", "calib.options.p=3", "calib.method={*: mse, head.*: {method: lp, p: 4}}"]
    methods = methods_of(config("sensitivity", tmp_path, *told))
    assert (methods["*"]["method"], methods["*"]["p"], methods["head.*"]["method"], methods["head.*"]["p"]) == ("mse", 3, "lp", 4)


def test_a_run_gives_its_choices_and_its_float_weights(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[quant=w4a8, model.width=8, calib=max]")
    register_resolvers()
    with initialize_config_module("lq.conf", version_base="1.3"):
        cfg = compose("sensitivity", [f"run={tmp_path}", "quant=w4a4", "budget=0.5", f"output_dir={tmp_path}"])
        merged, told = configured(cfg, [f"run={tmp_path}", "quant=w4a4", "budget=0.5"])
    assert (merged.quant.name, merged.model.width, merged.calib.method, merged.budget) == ("w4a4", 8, "max", 0.5)
    assert merged.ckpt_path == str(tmp_path / "checkpoints" / "float.ckpt")
    assert told == ["model.width=8", "calib=max", "quant=w4a4", f"ckpt_path={merged.ckpt_path}"]


def test_a_run_whose_model_came_with_its_weights_has_no_float_checkpoint(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[float_epochs=0]")
    register_resolvers()
    with initialize_config_module("lq.conf", version_base="1.3"):
        merged, told = configured(compose("sensitivity", [f"run={tmp_path}"]), [f"run={tmp_path}"])
    assert merged.ckpt_path is None
    assert told == ["float_epochs=0"]


@pytest.mark.slow
def test_a_model_that_came_with_its_weights_is_not_trained(tmp_path):
    told = [*QUIET, "model.width=8", "float_epochs=0", "val_batches=1"]
    find_sensitive(config("sensitivity", tmp_path, *told))
    assert not (tmp_path / "checkpoints").exists()
    assert "ckpt_path" not in (tmp_path / "sensitivity.md").read_text()


def test_every_option_composes(tmp_path):
    every = ["by=layer", "batches=1", "metric=val_loss", "val_batches=2", "worst=1", "below_db=30", "num_bits=[4,3]"]
    every += ["budget=4.5 bits", "cost=bit_operations", "bits=[[4,8],[8,8]]", "budgets=3"]
    cfg = config("sensitivity", tmp_path, *every, "experiment=cifar10_low_bits", "data.path=pictures.zip")
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert cfg.export.format is None
    assert widths_of(cfg) == {4, 8, (4, 3)}


def test_a_job_in_a_process_of_a_launcher_knows_what_configs_use(tmp_path):
    cfg = config("run", tmp_path, "calib.method=magic")
    OmegaConf.clear_resolver("concat")
    with pytest.raises(SystemExit, match="magic"):
        _job(cfg)
