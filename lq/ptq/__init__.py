"""Post-training quantization in one call, configured as in Sony's Model Compression Toolkit."""

from lq.ptq.config import MIN_THRESHOLD, QuantizationConfig, QuantizationMethod, ThresholdSelectionMethod
from lq.ptq.pipeline import post_training_quantization
from lq.ptq.report import PtqReport

__all__ = [
    "MIN_THRESHOLD",
    "PtqReport",
    "QuantizationConfig",
    "QuantizationMethod",
    "ThresholdSelectionMethod",
    "post_training_quantization",
]
