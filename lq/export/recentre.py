"""Unsigned codes of 8 bits as int8's: the layer's input is shifted by half of them, and its bias makes up for it."""

import torch
from torch import nn

from lq.corrections import TAKE_SHIFTS
from lq.export.fold import untie_
from lq.functional.grid import integer_bounds
from lq.nn import QuantMixin, TensorQuantizer
from lq.nn.input_channels import add_to_bias_, is_transposed_linear, summed_weight
from lq.sharing import holders_of

# How far codes are moved down.
MOVE = 128


def movable(model: nn.Module) -> dict[TensorQuantizer, list[QuantMixin]]:
    """Quantizers whose unsigned codes of 8 bits can become int8's, with the layers whose input they quantize.

    >>> from lq import QuantDescriptor
    >>> from lq.nn import QuantLinear
    >>> layer = QuantLinear(2, 2, quant_desc_input=QuantDescriptor(unsigned=True, amax=1.0))
    >>> [type(holder).__name__ for holders in movable(layer).values() for holder in holders]
    ['QuantLinear']
    """
    return {
        quantizer: [layer for layer, _ in found if isinstance(layer, QuantMixin)]
        for quantizer, found in holders_of(model).items()
        if _is_uint8(quantizer) and all(isinstance(layer, TAKE_SHIFTS) and role == "input" for layer, role in found)
    }


def _is_uint8(quantizer: TensorQuantizer) -> bool:
    amax = quantizer.amax
    return quantizer.active and amax is not None and amax.numel() == 1 and quantizer.unsigned and quantizer.num_bits == 8


@torch.no_grad()
def recentre_(model: nn.Module) -> None:
    """Shift inputs with unsigned codes of 8 bits so far that these are int8's, in place.

    TensorRT's integers have a sign, and a zero point of 0. With a step :math:`s` the input is shifted by :math:`128 s` less, and
    the bias takes in :math:`128 s\\,Q(W)`, summed over input channels and kernel: the same output, and the same codes less 128.

    Args:
        model: with ranges that are fixed.
    """
    for quantizer, layers in movable(model).items():
        scale = quantizer.scale
        assert scale is not None
        down = MOVE * scale.double()
        for layer in layers:
            (weight,) = layer.weights().values()
            rounded = layer.weight_quantizer(weight)
            untie_(layer, "bias")
            add_to_bias_(layer, down * summed_weight(layer, rounded.mT if is_transposed_linear(layer) else rounded))
        shift = torch.zeros(()) if quantizer.pre_quant_shift is None else quantizer.pre_quant_shift
        quantizer._pre_quant_shift = (shift.double() - down.to(shift.device)).float().reshape(())
        quantizer.quant_desc = quantizer.quant_desc.replace(unsigned=False, narrow_range=False, scale_amax=None)
        quantizer._amax = scale * integer_bounds(8)[1]
