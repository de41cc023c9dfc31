"""What a quantizer does to its input before it looks at it; the weights and the bias behind it undo the same."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lq.calib import Calibrator
    from lq.descriptor import QuantDescriptor


class PreQuant:
    """A factor on the input and a shift of it, in this order; float32 buffers, ``None`` until set.

    They apply to a disabled quantizer too: without them, what is behind would compute something else.
    """

    _pre_quant_scale: Tensor | None
    _pre_quant_shift: Tensor | None
    _buffers: dict[str, Tensor | None]
    calibrator: "Calibrator"
    quant_desc: "QuantDescriptor"

    @property
    def pre_quant_scale(self) -> Tensor | None:
        """Factor on the input before quantization, broadcastable to it: SmoothQuant's, where it could not be folded."""
        return self._pre_quant_scale

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Tensor | None) -> None:
        self._pre_quant_scale = self._own(value)

    @property
    def pre_quant_shift(self) -> Tensor | None:
        """What is added to the input before quantization, ``()``, so that a small negative lobe needs no sign.

        With it the quantizer is unsigned, and clips what is negative still.
        """
        return self._pre_quant_shift

    @pre_quant_shift.setter
    def pre_quant_shift(self, value: Tensor | None) -> None:
        if value is not None and not self.quant_desc.unsigned:
            self.quant_desc = self.quant_desc.replace(unsigned=True)
        self._pre_quant_shift = self._own(value)

    def _own(self, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        with torch.inference_mode(False):  # nothing could be trained through a tensor made in inference mode
            return value.detach().to(self.calibrator.device, torch.float32, copy=True)

    def arriving(self, inputs: Tensor) -> Tensor:
        """What is quantized of ``inputs``: multiplied and shifted."""
        scale, shift = self._buffers["_pre_quant_scale"], self._buffers["_pre_quant_shift"]
        if scale is not None:
            inputs = inputs * scale.to(inputs.dtype)
        if shift is not None:
            inputs = inputs + shift.to(inputs.dtype)
        return inputs
