"""Unsigned codes of 8 bits as int8's, where the layer shifts its input anyway."""

import torch
from torch import nn

from lq.functional.grid import integer_bounds
from lq.nn import QuantMixin, TensorQuantizer
from lq.nn.input_channels import add_to_bias_, is_transposed_linear, summed_weight


def move_of(quantizer: TensorQuantizer) -> int:
    """How far the codes of a quantizer are moved down, so that they are int8's.

    >>> from lq import QuantDescriptor
    >>> quantizer = TensorQuantizer(QuantDescriptor(8, unsigned=True))
    >>> move_of(quantizer)
    0
    >>> quantizer.pre_quant_shift = torch.tensor(0.3)
    >>> move_of(quantizer)
    128
    """
    amax, shifted = quantizer.amax, quantizer.pre_quant_shift is not None
    per_tensor = amax is None or amax.numel() == 1
    return 128 if shifted and per_tensor and quantizer.unsigned and quantizer.num_bits == 8 else 0


@torch.no_grad()
def recentre_(model: nn.Module) -> None:
    """Shift inputs that are shifted already, and have unsigned codes of 8 bits, so far that these are int8's, in place.

    TensorRT's integers have a zero point of 0. With a step :math:`s` the input is shifted by :math:`128 s` less, and the bias
    takes in :math:`128 s\\,Q(W)`, summed over input channels and kernel: the same output, and the same codes less 128.

    Args:
        model: with ranges that are fixed.
    """
    for layer in model.modules():
        if not isinstance(layer, QuantMixin) or not layer.input_quantizer.active or not move_of(layer.input_quantizer):
            continue
        quantizer, (weight,) = layer.input_quantizer, layer.weights().values()
        shift, scale, rounded = quantizer.pre_quant_shift, quantizer.scale, layer.weight_quantizer(weight)
        assert shift is not None
        assert scale is not None
        down = move_of(quantizer) * scale.double()
        add_to_bias_(layer, down * summed_weight(layer, rounded.mT if is_transposed_linear(layer) else rounded))
        quantizer._pre_quant_shift = (shift.double() - down).float()
        quantizer.quant_desc = quantizer.quant_desc.replace(unsigned=False, narrow_range=False, scale_amax=None)
        quantizer._amax = scale * integer_bounds(8)[1]
