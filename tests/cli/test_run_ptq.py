"""``lq ptq=mct``: from a float model to a verified graph without fine-tuning."""

import json

import pytest

from processes import command

TOLD = [
    "ptq=mct",
    "ptq.activation_n_bits=6",
    "ptq.weights_n_bits=5",
    "ptq.activation_channel_equalization=true",
    "float_epochs=3",
]


def ptq(folder, *args):
    return command(folder, *args, "logger=csv", "trainer.enable_progress_bar=false", "calib.batches=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ptq")
    result = ptq(folder, *TOLD, "hydra.run.dir=out")
    assert result.returncode == 0, result.stderr
    return folder / "out", result.stdout


@pytest.mark.slow
def test_run(finished):
    folder, printed = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["float/val_acc"] - 0.05 < metrics["ptq/val_acc"] <= 1
    assert metrics["onnxruntime/val_acc"] == pytest.approx(metrics["ptq/val_acc"], abs=0.01)
    assert metrics["agreement"] > 0.99
    assert metrics["ptq/bytes"] == (folder / "ptq.onnx").stat().st_size < 0.45 * metrics["float/bytes"]
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {"accuracy", "outputs", "sqnr"}
    report = (folder / "report.md").read_text()
    for text in (report, printed):
        assert "channels evened out" in text
        assert "activation_n_bits 6, weights_n_bits 5" in " ".join(text.replace("\\_", "_").split())
    assert "outputs.png" in report


@pytest.mark.slow
def test_verify(finished, tmp_path):
    folder, _ = finished
    result = command(tmp_path, "verify", f"run={folder}", "hydra.run.dir=out")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert found["onnxruntime"]["agreement"] == json.loads((folder / "metrics.json").read_text())["agreement"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["ptq=mct", "ptq.weights_n_bits=1"], "`weights_n_bits` is 1"),
        (
            ["ptq=mct", "ptq.weights_n_bits=12"],
            "`ptq.weights_n_bits` 12: graphs have at most 8 bits. Choose fewer, or export=none",
        ),
        (["ptq=mct", "ptq.activation_quantization_method=UNIFORM"], "UNIFORM has a zero point, which graphs have not"),
        (["ptq=mct", "ptq.activation_threshold_method=MEDIAN"], "`activation_threshold_method` is 'MEDIAN'"),
        (["ptq=mct", "quant=w4a4"], "`quant=w4a4` has no effect beside ptq=mct"),
        (["ptq=mct", "quant.overrides=[{pattern: head}]"], "`quant.overrides=[{pattern: head}]` has no effect"),
        (["ptq=mct", "calib=percentile"], "`calib=percentile` has no effect"),
        (["ptq=mct", "rescale.alpha=0.7"], "`rescale.alpha=0.7` has no effect"),
        (["ptq=mct", "trainer=ddp_cpu"], "`trainer` has 2 processes, and ptq runs in one: use trainer=default"),
    ],
)
def test_what_cannot_be_is_said_before_training(tmp_path, told, message):
    result = ptq(tmp_path, *told)
    assert result.returncode == 1
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("float.ckpt"))
