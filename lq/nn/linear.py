"""Quantized ``nn.Linear``."""

import torch.nn.functional as F
from torch import Tensor, nn

from lq.nn.quant_module import QuantMixin, register


@register(nn.Linear)
class QuantLinear(QuantMixin, nn.Linear):
    """``y = Q(x) Q(W)^T + b``; arguments as ``nn.Linear``, and ``quant_desc_input``, ``quant_desc_weight``.

    >>> QuantLinear(3, 2).weight_quantizer.axis
    0
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.on_quantized(lambda x, weight: F.linear(x, weight, self.bias), input, self.weight)
