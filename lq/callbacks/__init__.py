"""Callbacks for any Trainer: they own *when*; what is done are functions that work without Lightning too."""

from lq.callbacks.batchnorm import ReestimateBatchNorm
from lq.callbacks.compile import Compile
from lq.callbacks.delay import QuantDelay
from lq.callbacks.distill import Distill
from lq.callbacks.export import OnnxExport
from lq.callbacks.freeze import ScaleFreeze
from lq.callbacks.monitor import QuantMonitor
from lq.callbacks.oscillation import SettleWeights
from lq.callbacks.progressive import ProgressiveBits
from lq.callbacks.qat import QuantizationAwareTraining
from lq.callbacks.quantize import Quantize
from lq.callbacks.resume import ExactResume
from lq.callbacks.schedule import QATSchedule

__all__ = [
    "Compile",
    "Distill",
    "ExactResume",
    "OnnxExport",
    "ProgressiveBits",
    "QATSchedule",
    "QuantDelay",
    "QuantMonitor",
    "QuantizationAwareTraining",
    "Quantize",
    "ReestimateBatchNorm",
    "ScaleFreeze",
    "SettleWeights",
]
