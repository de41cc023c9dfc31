"""Numbers as ONNX stores them: codes of weights, scales, zero points. Import this module late: it needs the extra ``export``."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from lq.functional.fake_quant import fake_quant, quantize
from lq.functional.grid import FLOAT_FORMATS, Bits, integer_bounds, largest_code, scale_from_amax

# The types that a graph computes in, and so the types of its scales.
FLOATS = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}
# Types of torch that NumPy has from elsewhere.
_EXTRA = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn}


@dataclass(frozen=True)
class Grid:
    """What a tensor is rounded to, but for its amax."""

    num_bits: Bits
    unsigned: bool = False
    narrow_range: bool = True

    @property
    def bounds(self) -> tuple[float, float]:
        """The outermost codes."""
        if isinstance(self.num_bits, tuple):
            return -largest_code(self.num_bits), largest_code(self.num_bits)
        return integer_bounds(self.num_bits, self.unsigned, self.narrow_range)

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds the codes."""
        return FLOAT_FORMATS[self.num_bits] if isinstance(self.num_bits, tuple) else torch.int8

    def scale(self, amax: Tensor, dtype: torch.dtype) -> Tensor:
        """Scales in the type of the graph, strictly positive.

        Raises:
            ValueError: a scale that ``dtype`` cannot hold.
        """
        scale = scale_from_amax(amax.float(), self.num_bits, self.unsigned)
        # half precision underflows: its smallest number is 6e-8
        smallest = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype))
        rounded = scale.to(dtype).clamp_min(smallest) if dtype != torch.float32 else scale
        if not bool(rounded.isfinite().all()):
            raise ValueError(f"a scale of {scale.max().item():g}, which {dtype} cannot hold: export with precision 'bf16'")
        return rounded

    def encode(self, x: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
        """The codes of ``x`` with ``amax``, to be read with ``scale``, which the graph's type may have rounded."""
        low, high = self.bounds
        if isinstance(self.num_bits, tuple):
            value = fake_quant(x, amax, self.num_bits, False, True)
            return (value / scale.float()).clamp(low, high).to(self.dtype)
        value = quantize(x, amax, self.num_bits, self.unsigned, self.narrow_range)
        # a factor of 1 in float32
        moved = scale_from_amax(amax, self.num_bits, self.unsigned) / scale.float()
        return (value * moved).round().clamp(low, high).to(self.dtype)


def to_torch(constant: ir.TensorProtocol) -> Tensor:
    """A constant of the graph as float32."""
    return torch.from_numpy(np.array(constant.numpy()).astype(np.float32))


def to_ir(value: Tensor, name: str, *, four_bits: bool = False) -> ir.TensorProtocol:
    """A tensor as a constant of the graph; integers of at most ``four_bits`` are stored two to a byte."""
    if value.dtype in _EXTRA:
        kind = _EXTRA[value.dtype]
        bits = torch.uint8 if value.element_size() == 1 else torch.uint16
        return ir.tensor(value.contiguous().view(bits).numpy().view(kind), name=name)
    array = value.contiguous().numpy()
    return ir.tensor(array.astype(ml_dtypes.int4) if four_bits else array, name=name)
