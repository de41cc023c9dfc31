"""pytorch-quantization's ``nn.modules.quant_instancenorm``."""

from lq.nn.norm import QuantInstanceNorm1d, QuantInstanceNorm2d, QuantInstanceNorm3d

__all__ = [
    "QuantInstanceNorm1d",
    "QuantInstanceNorm2d",
    "QuantInstanceNorm3d",
]
