"""Quantized convolutions: arguments as in ``torch.nn``, and ``quant_desc_input``, ``quant_desc_weight``.

Per-channel weights of transposed convolutions keep axis 0, the only one TensorRT takes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lq.nn.quant_module import QuantMixin, register


class _QuantConv(QuantMixin):
    weight: Tensor
    bias: Tensor | None
    stride: Any
    dilation: Any
    kernel_size: Any
    groups: int
    padding_mode: Any
    _conv_forward: Any
    _reversed_padding_repeated_twice: Any

    def forward(self, input: Tensor) -> Tensor:
        if self.input_quantizer.pre_quant_shift is not None and self.padding_mode == "zeros":
            return self._forward_padded(F.pad(input, self._reversed_padding_repeated_twice))
        return self.on_quantized(lambda x, weight: self._conv_forward(x, weight, self.bias), input, self.weight)

    def _forward_padded(self, input: Tensor) -> Tensor:
        """Convolve what has its padding already: the zeros are shifted with the rest."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        weight = self.weight_quantizer(self.weight)
        return convolve(self.input_quantizer(input), weight, self.bias, self.stride, 0, self.dilation, self.groups)


@register(nn.Conv1d)
class QuantConv1d(_QuantConv, nn.Conv1d):
    """Quantized ``nn.Conv1d``."""


@register(nn.Conv2d)
class QuantConv2d(_QuantConv, nn.Conv2d):
    """Quantized ``nn.Conv2d``."""


@register(nn.Conv3d)
class QuantConv3d(_QuantConv, nn.Conv3d):
    """Quantized ``nn.Conv3d``."""


class _QuantConvTranspose(QuantMixin):
    weight: Tensor
    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    kernel_size: Any
    groups: int
    _output_padding: Any

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        dims = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        geometry = (self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation)
        return self.on_quantized(lambda x, weight: convolve(x, weight, *geometry), input, self.weight)


@register(nn.ConvTranspose1d)
class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """Quantized ``nn.ConvTranspose1d``."""


@register(nn.ConvTranspose2d)
class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """Quantized ``nn.ConvTranspose2d``."""


@register(nn.ConvTranspose3d)
class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """Quantized ``nn.ConvTranspose3d``."""
