"""Calibrators: statistics of a tensor over batches and ranks, and the ``amax`` they give."""

from lq.calib.calibrator import Calibrator
from lq.calib.histogram import HistogramCalibrator, compute_amaxs
from lq.calib.max import MaxCalibrator
from lq.calib.statistics import load_statistics, save_statistics
from lq.calib.sync import failing_together, gather, sync_calibrators
from lq.calib.weights import calibrate_weights

__all__ = [
    "Calibrator",
    "HistogramCalibrator",
    "MaxCalibrator",
    "calibrate_weights",
    "compute_amaxs",
    "failing_together",
    "gather",
    "load_statistics",
    "save_statistics",
    "sync_calibrators",
]
