"""What quantization does to a model: measurements of its quantizers, and the report of a run (:mod:`lq.analysis.report`)."""

from lq.analysis.allocation import Allocation, allocate_bits
from lq.analysis.calibration import calibration_rows, calibration_table
from lq.analysis.front import Front, front
from lq.analysis.quantizer_stats import LayerRow, QuantizerStats, measuring, table
from lq.analysis.sensitivity import Sensitivity, SensitivityRow, sensitivity

__all__ = [
    "Allocation",
    "Front",
    "LayerRow",
    "QuantizerStats",
    "Sensitivity",
    "SensitivityRow",
    "allocate_bits",
    "calibration_rows",
    "calibration_table",
    "front",
    "measuring",
    "sensitivity",
    "table",
]
