"""Quantized pooling: arguments as in ``torch.nn``, and ``quant_desc_input``.

A rule quantizes them only if it names their class or the module: an integer pooling is quicker than a float one, but where its
input comes in float the quantization itself costs more.
"""

from typing import Any

from torch import Tensor, nn

from lq.nn.quant_module import QuantInputMixin, register


class _QuantPool(QuantInputMixin):
    def forward(self, input: Tensor) -> Any:
        return super().forward(self.input_quantizer(input))


@register(nn.MaxPool1d, by_default=False)
class QuantMaxPool1d(_QuantPool, nn.MaxPool1d):
    """Quantized ``nn.MaxPool1d``."""


@register(nn.MaxPool2d, by_default=False)
class QuantMaxPool2d(_QuantPool, nn.MaxPool2d):
    """Quantized ``nn.MaxPool2d``."""


@register(nn.MaxPool3d, by_default=False)
class QuantMaxPool3d(_QuantPool, nn.MaxPool3d):
    """Quantized ``nn.MaxPool3d``."""


@register(nn.AvgPool1d, by_default=False)
class QuantAvgPool1d(_QuantPool, nn.AvgPool1d):
    """Quantized ``nn.AvgPool1d``."""


@register(nn.AvgPool2d, by_default=False)
class QuantAvgPool2d(_QuantPool, nn.AvgPool2d):
    """Quantized ``nn.AvgPool2d``."""


@register(nn.AvgPool3d, by_default=False)
class QuantAvgPool3d(_QuantPool, nn.AvgPool3d):
    """Quantized ``nn.AvgPool3d``."""


@register(nn.AdaptiveAvgPool1d, by_default=False)
class QuantAdaptiveAvgPool1d(_QuantPool, nn.AdaptiveAvgPool1d):
    """Quantized ``nn.AdaptiveAvgPool1d``."""


@register(nn.AdaptiveAvgPool2d, by_default=False)
class QuantAdaptiveAvgPool2d(_QuantPool, nn.AdaptiveAvgPool2d):
    """Quantized ``nn.AdaptiveAvgPool2d``."""


@register(nn.AdaptiveAvgPool3d, by_default=False)
class QuantAdaptiveAvgPool3d(_QuantPool, nn.AdaptiveAvgPool3d):
    """Quantized ``nn.AdaptiveAvgPool3d``."""
