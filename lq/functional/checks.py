"""What is wrong with the arguments of a quantization function, said before anything is computed."""

import torch
from torch import Tensor

from lq.functional.grid import Bits, check_num_bits, integer_bounds


def checked_amax(inputs: Tensor, amax: Tensor | float, num_bits: Bits, unsigned: bool = False, *, floats: bool = False) -> Tensor:
    """``amax`` as a tensor on the device of ``inputs``, if it can quantize them.

    While ``torch.compile`` or ``torch.export`` trace, values are not known and only shapes are checked.

    Raises:
        ValueError: ``num_bits`` is out of range, or ``amax`` is negative, not finite, or does not broadcast to ``inputs``.
        TypeError: ``inputs`` are not floating, or negative with ``unsigned``.

    >>> checked_amax(torch.ones(2, 3), torch.ones(2), 8)
    Traceback (most recent call last):
      ...
    ValueError: `amax` has shape (2,), which does not broadcast to inputs of shape (2, 3): give each axis of its own its place.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(f"`inputs` is a {type(inputs).__name__}: it must be a floating tensor.")
    if not isinstance(unsigned, bool):
        raise TypeError(
            f"`unsigned` is {unsigned!r}: it must be True or False (older code has `output_dtype` in its place: drop it)."
        )
    check_num_bits(num_bits, unsigned, floats=floats)
    if not inputs.is_floating_point():
        raise TypeError(f"`inputs` are {inputs.dtype}: only floating tensors are quantized.")
    if not isinstance(amax, Tensor):
        try:  # a number keeps all of its digits for float64
            amax = torch.as_tensor(amax, device=inputs.device, dtype=torch.promote_types(inputs.dtype, torch.float32))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"`amax` is {amax!r}: it must be a tensor or a number.") from error
    amax = amax.to(inputs.device)
    check_broadcast(inputs, amax)
    if torch.compiler.is_compiling():
        return amax
    check_values(amax)
    if unsigned:
        check_not_negative(inputs)
    return amax


def check_broadcast(inputs: Tensor, amax: Tensor) -> None:
    """Raise ``ValueError`` unless ``amax`` broadcasts to the shape of ``inputs``."""
    matches = all(a in (1, n) for a, n in zip(amax.shape[::-1], inputs.shape[::-1], strict=False))
    if amax.dim() > inputs.dim() or not matches:
        raise ValueError(
            f"`amax` has shape {tuple(amax.shape)}, which does not broadcast to inputs of shape {tuple(inputs.shape)}: "
            "give each axis of its own its place."
        )


def check_values(amax: Tensor) -> None:
    """Raise ``ValueError`` unless ``amax`` is finite and not negative."""
    if not bool(((amax >= 0) & amax.isfinite()).all()):
        wrong = amax[~((amax >= 0) & amax.isfinite())].flatten()
        raise ValueError(
            f"`amax` must be finite and not negative, found {wrong[0].item():g} ({wrong.numel()} of {amax.numel()}): "
            "calibrate on finite data, or give another."
        )


def check_not_negative(inputs: Tensor) -> None:
    """Raise ``TypeError`` for negative ``inputs``."""
    if inputs.numel() and bool((lowest := inputs.detach().amin()) < 0):
        raise TypeError(f"`unsigned` is True, but inputs go down to {lowest.item():g}: negative values need `unsigned=False`.")


def check_codes(dtype: torch.dtype, num_bits: int, unsigned: bool) -> None:
    """Raise ``ValueError`` if the largest code of ``num_bits`` is no number of a half precision ``dtype``."""
    largest, numbers = integer_bounds(num_bits, unsigned)[1], torch.finfo(dtype)
    if numbers.bits < 32 and largest > 2 / numbers.eps:
        raise ValueError(f"`num_bits` is {num_bits}, and {dtype} has no room for the code {largest}: quantize `inputs.float()`.")
