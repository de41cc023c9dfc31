"""`lq recalibrate`: from the files of a run alone, what a calibration with the other method would have given."""

import pytest
import torch

import lq
from lq.callbacks import Quantize
from lq.recipes.digits import DigitsClassifier, DigitsDataModule
from processes import command


def fit(folder, method, target=None):
    from lightning.pytorch import Trainer

    torch.manual_seed(0)
    model = DigitsClassifier()
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    quantize = Quantize(target=target, method=method, batches=3, alpha=None if target else 0.5, dirpath=folder)
    trainer = Trainer(accelerator="cpu", max_steps=1, callbacks=[quantize], **options)
    trainer.fit(model, datamodule=DigitsDataModule())
    return model


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    fit(folder, "auto")
    return folder


def amaxs(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {key: value for key, value in state.items() if key.endswith("._amax")}


def test_it_gives_the_amax_that_a_calibration_with_the_method_gives(tmp_path, kept):
    result = command(tmp_path, "recalibrate", f"stats={kept}/statistics.safetensors", "calib=entropy", "hydra.run.dir=out")
    assert result.returncode == 0, result.stderr
    fit(tmp_path / "other", "entropy")
    found, expected = amaxs(tmp_path / "out" / "recalibrated.ckpt"), amaxs(tmp_path / "other" / "calibrated.ckpt")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert any(not torch.equal(found[key], value) for key, value in amaxs(kept / "calibrated.ckpt").items())
    assert "head.input" in result.stdout
    assert "entropy" in (tmp_path / "out" / "calibration.md").read_text()
    # and everything else is as it was
    before, after = (
        torch.load(p, weights_only=True)["state_dict"] for p in (kept / "calibrated.ckpt", tmp_path / "out" / "recalibrated.ckpt")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if not key.endswith("._amax"))


def test_the_checkpoint_loads_into_the_quantized_module(tmp_path, kept):
    assert (
        command(tmp_path, "recalibrate", f"stats={kept}/statistics.safetensors", "calib=auto", "hydra.run.dir=out").returncode
        == 0
    )
    model = lq.quantize_(DigitsClassifier())
    model.load_state_dict(torch.load(tmp_path / "out" / "recalibrated.ckpt", weights_only=True)["state_dict"])
    assert all(q.amax is not None for _, q in lq.named_quantizers(model))


def test_a_quantizer_of_several_layers_changes_under_all_of_its_names(tmp_path):
    fit(tmp_path / "fit", "auto", target="tensorrt")
    stats = tmp_path / "fit" / "statistics.safetensors"
    result = command(tmp_path, "recalibrate", f"stats={stats}", "calib=max", "hydra.run.dir=out")
    assert result.returncode == 0, result.stderr
    before, after = amaxs(tmp_path / "fit" / "calibrated.ckpt"), amaxs(tmp_path / "out" / "recalibrated.ckpt")
    shared = [(a, b) for a in before for b in before if a < b and before[a].is_set_to(before[b])]
    assert shared
    assert all(torch.equal(after[a], after[b]) and not torch.equal(after[a], before[a]) for a, b in shared)
    model = lq.load_quantized(DigitsClassifier(), tmp_path / "out" / "recalibrated.ckpt")
    assert all(dict(model.named_buffers(remove_duplicate=False))[a] is not None for a, _ in shared)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (["stats=nothing"], "FileNotFoundError: There is no file of statistics at nothing"),
        ([], "`stats` is missing: give stats=<value>"),
        (["stats={kept}/statistics.safetensors", "ckpt_path=nothing"], "`ckpt_path` nothing cannot be read"),
        (
            ["stats={kept}/statistics.safetensors", "calib.method={{nowhere*: mse}}"],
            "pattern 'nowhere\\*', which matches no quantizer",
        ),
        (["stats={kept}/statistics.safetensors", "ckpt_path=float.pt"], "float.pt has no amax for `stem.0.input`"),
        (["stats={kept}/statistics.safetensors", "calib.options.percentile=200"], "`percentile` is 200"),
        (["stats={kept}/statistics.safetensors", "+calib.methods=mse"], "nothing reads it: the closest is `calib.method`"),
    ],
)
def test_what_is_wrong_is_told_in_one_message_and_nothing_is_written(tmp_path, kept, told, words):
    torch.save(DigitsClassifier().state_dict(), tmp_path / "float.pt")
    result = command(tmp_path, "recalibrate", *(t.format(kept=kept) for t in told), "hydra.run.dir=out")
    assert result.returncode == 1
    assert words.replace("\\", "") in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("out/*.ckpt"))
