"""Fake quantization in one pass over a tensor on a GPU, where Triton is there and the tensor is laid out for it; else ``None``.

Triton comes with torch's builds for GPUs. What it cannot do, for want of a compiler, say, is left to torch's operators, with a
warning.
"""

import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lq.functional.grid import Bits

# Numbers below this are rounded by an addition in float32.
LARGEST_CODE = 2**22

_failed: set[tuple[str, torch.device]] = set()


@cache
def _kernels() -> ModuleType | None:
    try:
        from lq.functional import kernels
    except ImportError:
        return None
    return kernels


def inner_size(x: Tensor, bound: Tensor) -> int | None:
    """How many values of ``x`` lie side by side in memory for each element of ``bound``, in the order of its elements.

    >>> inner_size(torch.ones(4, 3, 5), torch.ones(1, 3, 1)), inner_size(torch.ones(4, 3, 5), torch.ones(4, 1, 5))
    (5, None)
    """
    if x.numel() == 0 or not torch.ops.aten.is_non_overlapping_and_dense(x):
        return None
    if bound.numel() == 1:
        return x.numel()
    if not bound.is_contiguous():
        return None
    shape = (1,) * (x.dim() - bound.dim()) + tuple(bound.shape)
    kept = [i for i, n in enumerate(shape) if n > 1]
    if shape[kept[0] : kept[-1] + 1] != x.shape[kept[0] : kept[-1] + 1]:
        return None
    if x.is_contiguous():
        return x.shape[kept[-1] + 1 :].numel()
    # other layouts keep the first dimension outermost, or are none of torch's
    outermost = kept == [0] and x.stride(0) * x.shape[0] == x.numel()
    return x.numel() // x.shape[0] if outermost else None


def _usable(x: Tensor, high: Tensor, low: Tensor | None = None) -> int | None:
    """:func:`inner_size` of the bounds, if there are kernels for ``x``; both bounds lie in memory alike."""
    if not x.is_cuda or x.dtype == torch.float64 or high.device != x.device or _kernels() is None:
        return None
    if low is not None and (low.shape != high.shape or low.device != x.device or not low.is_contiguous()):
        return None
    return inner_size(x, high)


def _launch(name: str, x: Tensor, *args: Any) -> Any:
    """What the kernel returns, or ``None``, now and ever after on this device, where it cannot be had."""
    if (name, x.device) in _failed:
        return None
    launch: Callable[..., Any] = getattr(_kernels(), name)
    try:
        with torch.cuda.device(x.device):
            return launch(*args)
    except (torch.OutOfMemoryError, TypeError, AttributeError):
        raise  # a mistake, which is no reason to go another way
    except Exception as error:
        _failed.add((name, x.device))
        warnings.warn(
            f"Triton cannot run `{name}` on {torch.cuda.get_device_name(x.device)} ({type(error).__name__}: {error}): "
            "torch's own operators take over, in several passes.",
            stacklevel=2,
        )
        return None


def rounded(x: Tensor, low: Tensor, high: Tensor, lowest: float, highest: float, bits: Bits | None) -> Tensor | None:
    """``x`` on integers from ``lowest`` to ``highest``, a float format, or (no ``bits``) an affine grid of ``highest`` steps."""
    inner = _usable(x, high, low)
    if inner is None or (highest > LARGEST_CODE and not isinstance(bits, tuple)):
        return None
    kernels: Any = _kernels()
    grid = kernels.GRIDS[bits if isinstance(bits, tuple) else "affine" if bits is None else "integers"]
    result: Tensor | None = _launch("round_", x, x, low, high, lowest, highest, inner, grid)
    return result


def masked(grad: Tensor, x: Tensor, low: Tensor | None, high: Tensor, ratio: float = 0.0) -> Tensor | None:
    """``grad`` where ``low <= x <= high``, else 0; without ``low`` it is ``ratio * high``."""
    inner = _usable(x, high, low)
    if inner is None or grad.stride() != x.stride():
        return None
    result: Tensor | None = _launch("mask", x, grad, x, low, high, ratio, inner)
    return result


def learned(
    grad: Tensor, x: Tensor, amax: Tensor, bounds: tuple[int, int], factor: float, rounding: bool
) -> tuple[Tensor, Tensor] | None:
    """Gradients of ``x`` and, times ``factor``, of ``amax``."""
    inner = _usable(x, amax)
    if inner is None or grad.stride() != x.stride() or bounds[1] > LARGEST_CODE:
        return None
    result: tuple[Tensor, Tensor] | None = _launch("learn", x, grad, x, amax, *bounds, factor, rounding, inner)
    return result
