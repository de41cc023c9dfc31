"""Calibrators: statistics of a tensor over batches and ranks, and the ``amax`` they give."""

from lq.calib.affine import AffineCalibrator
from lq.calib.calibrator import Calibrator
from lq.calib.held_out import HeldOutCalibrator
from lq.calib.histogram import HistogramCalibrator
from lq.calib.max import MaxCalibrator
from lq.calib.statistics import load_statistics, read_statistics, save_statistics
from lq.calib.sync import failing_together, gather, sync_calibrators
from lq.calib.together import compute_amaxs
from lq.calib.weights import calibrate_weights, histogram_amax

__all__ = [
    "AffineCalibrator",
    "Calibrator",
    "HeldOutCalibrator",
    "HistogramCalibrator",
    "MaxCalibrator",
    "calibrate_weights",
    "compute_amaxs",
    "failing_together",
    "gather",
    "histogram_amax",
    "load_statistics",
    "read_statistics",
    "save_statistics",
    "sync_calibrators",
]
