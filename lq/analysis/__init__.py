"""What quantization does to a model: measurements of its quantizers, and the report of a run (:mod:`lq.analysis.report`)."""

from lq.analysis.calibration import calibration_rows, calibration_table
from lq.analysis.quantizer_stats import LayerRow, QuantizerStats, measuring, table
from lq.analysis.sensitivity import Sensitivity, SensitivityRow, sensitivity

__all__ = [
    "LayerRow",
    "QuantizerStats",
    "Sensitivity",
    "SensitivityRow",
    "calibration_rows",
    "calibration_table",
    "measuring",
    "sensitivity",
    "table",
]
