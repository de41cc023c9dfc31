"""What a quantizer with ``normalize`` takes its input for: multiples of its spread."""

import torch
from torch import Tensor

from lq.descriptor import QuantDescriptor
from lq.functional.amax import Axis
from lq.functional.blocks import block_axis
from lq.functional.normalize import spread_of


def kept_axis(desc: QuantDescriptor) -> Axis:
    """Axis of what has an amax of its own: in the tensor, or its blocks."""
    return desc.axis if desc.block_size is None else block_axis(desc.axis)


class Spread:
    """Amax is in units of the spread of what is quantized: it follows where training takes that."""

    quant_desc: QuantDescriptor

    def centered(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """What is quantized of ``inputs`` (their :meth:`blocks`), and its spread, float32, of the shape of amax."""
        center = self.quant_desc.normalize == "center"
        mean, spread = spread_of(inputs, kept_axis(self.quant_desc), center)
        return inputs - mean.to(inputs.dtype) if center else inputs, spread

    @torch.no_grad()
    def normalized(self, inputs: Tensor) -> Tensor:
        """``inputs`` (their :meth:`blocks`) in the units of amax: as they are, without ``normalize``."""
        if not self.quant_desc.normalize:
            return inputs
        centered, spread = self.centered(inputs)
        return centered.float() / spread  # which half precision has no digits for
