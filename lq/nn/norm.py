"""Quantized instance norms: arguments as in ``torch.nn``, and ``quant_desc_input``.

They divide by the statistics of their own input, so they cannot be folded into the layer before. A rule quantizes them only if it
names their class or the module.
"""

from torch import Tensor, nn

from lq.nn.quant_module import QuantInputMixin, register


class _QuantNorm(QuantInputMixin):
    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = super().forward(self.input_quantizer(input))
        return y


@register(nn.InstanceNorm1d, by_default=False)
class QuantInstanceNorm1d(_QuantNorm, nn.InstanceNorm1d):
    """Quantized ``nn.InstanceNorm1d``."""


@register(nn.InstanceNorm2d, by_default=False)
class QuantInstanceNorm2d(_QuantNorm, nn.InstanceNorm2d):
    """Quantized ``nn.InstanceNorm2d``."""


@register(nn.InstanceNorm3d, by_default=False)
class QuantInstanceNorm3d(_QuantNorm, nn.InstanceNorm3d):
    """Quantized ``nn.InstanceNorm3d``."""
