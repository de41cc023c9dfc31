"""Blocks of values along the last dimension that have an amax of their own each."""

from torch import Tensor

from lq.functional.amax import Axis


def split_blocks(x: Tensor, block_size: int) -> Tensor:
    """View ``(..., n)`` as ``(..., n / block_size, block_size)``.

    Raises:
        ValueError: the last dimension is not a multiple of ``block_size``.

    >>> import torch
    >>> split_blocks(torch.zeros(3, 8), 4).shape
    torch.Size([3, 2, 4])
    """
    if not x.dim() or x.shape[-1] % block_size:
        raise ValueError(
            f"`block_size` is {block_size}, which does not divide the last dimension of {tuple(x.shape)}: choose one that does, "
            "or leave the layer out by a rule."
        )
    return x.reshape(*x.shape[:-1], x.shape[-1] // block_size, block_size)


def block_axis(axis: Axis) -> tuple[int, ...]:
    """``axis`` of a tensor, in terms of :func:`split_blocks` of it: with the dimension that counts the blocks.

    >>> block_axis(None), block_axis(0), block_axis(-2)
    ((-2,), (0, -2), (-3, -2))
    """
    axes = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    return (*(a - 1 if a < 0 else a for a in axes), -2)
