"""Quantization for PyTorch Lightning: calibrate, rescale, fine-tune, and export ONNX Q/DQ for TensorRT."""

from lq import callbacks, export
from lq.calibration import calibrating, load_calib_amax_
from lq.descriptor import QuantDescriptor, QuantRule
from lq.nn import TensorQuantizer
from lq.rescale import RescalingCalibrator
from lq.surgery import dequantize_, freeze_, named_quantizers, quantize_, unfreeze_
from lq.version import __version__

__all__ = [
    "QuantDescriptor",
    "QuantRule",
    "RescalingCalibrator",
    "TensorQuantizer",
    "__version__",
    "calibrating",
    "callbacks",
    "dequantize_",
    "export",
    "freeze_",
    "load_calib_amax_",
    "named_quantizers",
    "quantize_",
    "unfreeze_",
]
