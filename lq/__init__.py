"""Quantization for PyTorch Lightning: calibrate, rescale, fine-tune, and export ONNX Q/DQ for TensorRT."""

from lq import calib, callbacks, export, nn, optim, quant_modules, tensor_quant, utils
from lq.calibration import calibrating, load_calib_amax_
from lq.descriptor import QuantDescriptor, QuantRule
from lq.export import enable_onnx_export
from lq.load import load_quantized
from lq.nn import TensorQuantizer
from lq.ptq import QuantizationConfig, QuantizationMethod, ThresholdSelectionMethod, post_training_quantization
from lq.rescale import RescalingCalibrator
from lq.surgery import dequantize_, freeze_, named_quantizers, quantize_, rules_of, unfreeze_
from lq.version import __version__

__all__ = [
    "QuantDescriptor",
    "QuantRule",
    "QuantizationConfig",
    "QuantizationMethod",
    "RescalingCalibrator",
    "TensorQuantizer",
    "ThresholdSelectionMethod",
    "__version__",
    "calib",
    "calibrating",
    "callbacks",
    "dequantize_",
    "enable_onnx_export",
    "export",
    "freeze_",
    "load_calib_amax_",
    "load_quantized",
    "named_quantizers",
    "nn",
    "optim",
    "post_training_quantization",
    "quant_modules",
    "quantize_",
    "rules_of",
    "tensor_quant",
    "unfreeze_",
    "utils",
]
