"""Quantized modules and the quantizer they are made of."""

from lq.nn.conv import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
)
from lq.nn.linear import QuantLinear
from lq.nn.quant_module import QUANT_MODULES, QuantInputMixin, QuantMixin, register
from lq.nn.tensor_quantizer import TensorQuantizer

__all__ = [
    "QUANT_MODULES",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantInputMixin",
    "QuantLinear",
    "QuantMixin",
    "TensorQuantizer",
    "register",
]
