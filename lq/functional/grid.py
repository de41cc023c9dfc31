"""The grids that ``amax`` spans: integers of ``num_bits``, or a float format of 8 bits."""

import torch
from torch import Tensor

# Bits of an integer, or of exponent and mantissa of a float.
Bits = int | tuple[int, int]

# Float formats that torch can cast to (Micikevicius et al., 2022, arXiv:2209.05433).
FLOAT_FORMATS = {(4, 3): torch.float8_e4m3fn, (5, 2): torch.float8_e5m2}


def check_num_bits(num_bits: Bits, unsigned: bool = False, *, floats: bool = True) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what is neither 2 to 32 bits nor (with ``floats``) a signed float format.

    >>> check_num_bits((3, 4))
    Traceback (most recent call last):
      ...
    ValueError: `num_bits` is (3, 4): choose 2 to 32 for an integer, (4, 3) or (5, 2) for a float.
    """
    parts = num_bits if isinstance(num_bits, tuple) else (num_bits,)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in parts):
        raise TypeError(f"`num_bits` is {num_bits!r}: it must be an integer, or a pair of integers for a float format.")
    known = floats and num_bits in FLOAT_FORMATS if isinstance(num_bits, tuple) else 2 <= num_bits <= 32
    if not known:
        formats = f", {' or '.join(map(str, FLOAT_FORMATS))} for a float" if floats else ""
        raise ValueError(f"`num_bits` is {num_bits}: choose 2 to 32 for an integer{formats}.")
    if unsigned and isinstance(num_bits, tuple):
        raise ValueError(f"`unsigned` is True with `num_bits={num_bits}`: float formats have a sign.")


def integer_bounds(num_bits: int, unsigned: bool = False, narrow_range: bool = True) -> tuple[int, int]:
    """Smallest and largest code of a ``num_bits`` integer.

    >>> integer_bounds(8), integer_bounds(8, narrow_range=False), integer_bounds(4, unsigned=True)
    ((-127, 127), (-128, 127), (0, 15))
    """
    if unsigned:
        return 0, 2**num_bits - 1
    high = int(2 ** (num_bits - 1)) - 1
    return (-high if narrow_range else -high - 1), high


def largest_code(num_bits: Bits, unsigned: bool = False) -> float:
    """What ``amax`` stands for on the grid: the largest integer, or the largest finite float.

    >>> largest_code(8), largest_code(8, unsigned=True), largest_code((4, 3))
    (127, 255, 448.0)
    """
    if isinstance(num_bits, tuple):
        return torch.finfo(FLOAT_FORMATS[num_bits]).max
    return integer_bounds(num_bits, unsigned)[1]


def scale_from_amax(amax: Tensor, num_bits: Bits, unsigned: bool = False) -> Tensor:
    """``amax / largest code``: real units per step, as ONNX and TensorRT mean ``scale``.

    Strictly positive: where ``amax`` is 0 (a dead channel) it is float32's smallest normal number.

    >>> round(scale_from_amax(torch.tensor(12.7), 8).item(), 6)
    0.1
    """
    # by a tensor: by a number, a GPU multiplies with the reciprocal, which is one ulp off
    return (amax / torch.full_like(amax, largest_code(num_bits, unsigned))).clamp_min_(torch.finfo(torch.float32).tiny)
