"""Collecting never asks the device for a value: on the meta device, which has none to give, every question is an error."""

import pytest
import torch

from lq.calib import AffineCalibrator, HeldOutCalibrator, HistogramCalibrator, MaxCalibrator

KINDS = [MaxCalibrator, HistogramCalibrator, HeldOutCalibrator, AffineCalibrator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_collecting_does_not_wait_for_the_device(kind, axis, dtype):
    calibrator = kind(axis=axis).to("meta")
    for _ in range(3):
        calibrator.collect(torch.empty(4, 3, 5, device="meta", dtype=dtype))
    assert calibrator.peak.device.type == "meta"


def test_the_meta_device_does_refuse_to_answer():
    with pytest.raises(RuntimeError):
        MaxCalibrator().to("meta").peak.item()
