"""From a tensor to its ``amax``."""

from collections.abc import Sequence

import torch
from torch import Tensor

Axis = int | Sequence[int] | None


def normalize_axis(axis: Axis, ndim: int) -> tuple[int, ...]:
    """Turn ``axis`` into sorted non-negative dimensions of a tensor with ``ndim`` of them.

    Raises:
        ValueError: an axis is out of range, or named twice.

    >>> normalize_axis((-1, 0), ndim=4)
    (0, 3)
    """
    if axis is None:
        return ()
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"`axis` has {a}, but the tensor has {ndim} dimensions: use {-ndim} to {ndim - 1}.")
    positive = tuple(sorted(a % ndim for a in axes))
    if len(set(positive)) != len(positive):
        raise ValueError(f"`axis` names a dimension twice: {axes}.")
    return positive


def to_rows(x: Tensor, axis: Axis) -> Tensor:
    """View ``x`` as ``(rows, values)``, a row for each ``amax``: one row per tensor, or one per index along ``axis``."""
    kept = normalize_axis(axis, x.dim())
    if not kept:
        return x.reshape(1, -1)
    rows = 1
    for a in kept:
        rows *= x.shape[a]
    values = x.numel() // rows if rows else 0
    return x.movedim(kept, tuple(range(len(kept)))).reshape(rows, values)


def amax_shape(x: Tensor, axis: Axis) -> tuple[int, ...]:
    """Shape of the ``amax`` of ``x``: ``()`` per tensor, else the shape of ``x`` with 1 where ``axis`` does not keep."""
    kept = normalize_axis(axis, x.dim())
    return tuple(n if i in kept else 1 for i, n in enumerate(x.shape)) if kept else ()


def rows_amax(rows: Tensor) -> Tensor:
    """Largest magnitude of each row of ``(rows, values)``, float32 (float64 for double); 0 for an empty row.

    NaN propagates, so that one look at the result tells whether the data was finite.
    """
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0], dtype=dtype)
    # aminmax over a whole tensor is vectorised on CPU, over a dimension of length one it is not
    low, high = torch.aminmax(rows) if rows.shape[0] == 1 else torch.aminmax(rows, dim=1)
    return torch.maximum(low.abs(), high.abs()).reshape(-1).to(dtype)


@torch.no_grad()
def compute_amax(x: Tensor, axis: Axis = None) -> Tensor:
    """Largest magnitude of ``x``, with ``axis`` *kept* (the sense that descriptors use).

    Args:
        x: any shape, a floating dtype.
        axis: dimensions with an amax of their own; ``None`` is per tensor.

    Returns:
        float32 (float64 for double), shape ``()`` per tensor, else broadcastable to ``x``.

    >>> x = torch.tensor([[1.0, -4.0], [2.0, 0.5]])
    >>> compute_amax(x), compute_amax(x, axis=0).tolist()
    (tensor(4.), [[4.0], [2.0]])
    """
    return rows_amax(to_rows(x, axis)).reshape(amax_shape(x, axis))


@torch.no_grad()
def reduce_amax(input: Tensor, axis: Axis = None, keepdims: bool = True) -> Tensor:
    """Largest magnitude of ``input``, with ``axis`` *reduced* (NumPy's sense, as pytorch-quantization's ``reduce_amax``).

    >>> reduce_amax(torch.tensor([[1.0, -4.0], [2.0, 0.5]]), axis=1, keepdims=False)
    tensor([4., 2.])
    """
    reduced = tuple(range(input.dim())) if axis is None else normalize_axis(axis, input.dim())
    if input.numel() == 0:  # nothing has a magnitude of 0
        kept = [1 if i in reduced else n for i, n in enumerate(input.shape) if keepdims or i not in reduced]
        return input.new_zeros(kept)
    return input.abs().amax(dim=reduced, keepdim=keepdims) if reduced else input.abs()


def min_max(x: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of ``x``, and of zero, of the shape of amax; 0 for an empty row.

    >>> min_max(torch.tensor([[1.0, 3.0], [-2.0, 5.0]]), 0)
    (tensor([[ 0.],
            [-2.]]), tensor([[3.],
            [5.]]))
    """
    rows, shape = to_rows(x.detach(), axis), amax_shape(x, axis)
    if not rows.shape[1]:
        return rows.new_zeros(shape), rows.new_zeros(shape)
    low, high = rows.aminmax(dim=1)
    return low.clamp_max(0).reshape(shape), high.clamp_min(0).reshape(shape)
