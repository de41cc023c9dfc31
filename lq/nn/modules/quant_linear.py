"""pytorch-quantization's ``nn.modules.quant_linear``."""

from lq.nn.linear import QuantLinear

__all__ = [
    "QuantLinear",
]
