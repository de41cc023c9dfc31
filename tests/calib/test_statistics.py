"""Statistics in a file: exact there and back, and refused where they do not belong."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.calib import HistogramCalibrator, load_statistics, save_statistics
from lq.calibration import load_calib_amax_

pytest.importorskip("safetensors")


def network():
    torch.manual_seed(0)
    return lq.quantize_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)))


@pytest.fixture
def calibrated():
    model = network()
    with lq.calibrating(model, method="mse"):
        for x in torch.randn(3, 5, 3, 4, 4):
            model(x)
    return model


def amaxs(model):
    return {name: q.amax for name, q in lq.named_quantizers(model)}


def test_another_model_computes_the_same_amax_from_the_file(tmp_path, calibrated):
    file = save_statistics(calibrated, tmp_path / "stats.safetensors")
    fresh = network()
    load_statistics(fresh, file)
    assert type(fresh[0].input_quantizer.calibrator) is HistogramCalibrator
    assert torch.equal(fresh[0].input_quantizer.calibrator.counts, calibrated[0].input_quantizer.calibrator.counts)
    assert all(amax is None for amax in amaxs(fresh).values())
    for method in ("mse", "entropy", "percentile", "max"):
        load_calib_amax_(fresh, method)
        load_calib_amax_(calibrated, method)
        assert all(torch.equal(a, b) for a, b in zip(amaxs(fresh).values(), amaxs(calibrated).values(), strict=True))


def test_collecting_goes_on_from_the_file(tmp_path, calibrated):
    file = save_statistics(calibrated, tmp_path / "stats.safetensors")
    fresh, more = network(), torch.randn(5, 3, 4, 4) * 10
    load_statistics(fresh, file)
    for model in (fresh, calibrated):
        model[0].input_quantizer.collect(more)
    a, b = (m[0].input_quantizer.calibrator for m in (fresh, calibrated))
    assert torch.equal(a.counts, b.counts)
    assert torch.equal(a.peak, b.peak)


def test_it_replaces_a_file_whole_or_not_at_all(tmp_path, calibrated, monkeypatch):
    file = save_statistics(calibrated, tmp_path / "stats.safetensors")
    before = file.read_bytes()

    def fail(*args, **kwargs):
        args[1].write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_statistics(calibrated, file)
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_without_data_there_is_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="No calibrator of Sequential saw data"):
        save_statistics(network(), tmp_path / "stats.safetensors")


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, calibrated):
    file = save_statistics(calibrated, tmp_path / "stats.safetensors")
    other = lq.quantize_(nn.Sequential(nn.Conv2d(3, 4, 3)))
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=r"has statistics of 3.input, 3.weight \(2 in all\), which the model has not"):
        load_statistics(other, file)
    assert repr(other) == repr(before)
    with pytest.raises(FileNotFoundError, match="no file of statistics"):
        load_statistics(other, tmp_path / "nothing")
    (tmp_path / "cut").write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="no file of statistics, or cut short"):
        load_statistics(other, tmp_path / "cut")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="none that `save_statistics` wrote"):
        load_statistics(other, tmp_path / "weights")


def test_a_calibrator_of_another_class_is_named_and_nothing_written(tmp_path):
    class Mine(HistogramCalibrator):
        pass

    model = lq.quantize_(nn.Sequential(nn.Linear(4, 4)))
    model[0].input_quantizer.calibrator = Mine()
    model[0].input_quantizer.collect(torch.ones(4))
    with pytest.raises(TypeError, match=r"`0\.input` has a Mine, and statistics are kept of AffineCalibrator, MaxCalibrator"):
        save_statistics(model, tmp_path / "statistics.safetensors")
    assert not list(tmp_path.iterdir())
