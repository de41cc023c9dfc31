"""Calibrators: statistics of a tensor over batches and ranks, and the ``amax`` they give."""

from lq.calib.calibrator import Calibrator
from lq.calib.histogram import HistogramCalibrator
from lq.calib.max import MaxCalibrator
from lq.calib.sync import failing_together, gather, sync_calibrators
from lq.calib.weights import calibrate_weights

__all__ = [
    "Calibrator",
    "HistogramCalibrator",
    "MaxCalibrator",
    "calibrate_weights",
    "failing_together",
    "gather",
    "sync_calibrators",
]
