"""Weights in units of their own spread, so that a step size holds for every layer, channel and moment of a training."""

import torch
from torch import Tensor

from lq.functional.amax import Axis, normalize_axis

# Below this a weight is as good as zero, and is not blown up.
LEAST = 1e-8


@torch.no_grad()
def spread_of(x: Tensor, axis: Axis = None, center: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and root mean square of ``x``, with ``axis`` *kept*; where ``center`` the latter is about the mean (a standard
    deviation), else about zero, and the mean is 0.

    Weight normalization (APoT: Li et al., 2020, arXiv:1909.13144, section 2.4) divides weights by it before they are
    quantized, after it has taken the mean away.

    Args:
        x: any shape, floating.
        axis: dimensions with a spread of their own; ``None`` is per tensor.
        center: take it about the mean.

    Returns:
        float32, both of the shape of amax: ``()`` per tensor, else broadcastable to ``x``. The spread is at least 1e-8.

    >>> x = torch.tensor([[3.0, 5.0], [0.0, 2.0]])
    >>> spread_of(x, 0, center=True)
    (tensor([[4.],
            [1.]]), tensor([[1.],
            [1.]]))
    >>> spread_of(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    (tensor(0.), tensor(2.5000))
    """
    kept = normalize_axis(axis, x.dim())
    reduced = [d for d in range(x.dim()) if d not in kept]
    wide = x.float()
    mean = wide.mean(reduced, keepdim=bool(kept)) if reduced else wide
    mean = mean if center else torch.zeros_like(mean)
    squares = (wide - mean if center else wide).square()
    spread = (squares.mean(reduced, keepdim=bool(kept)) if reduced else squares).sqrt().clamp_min(LEAST)
    return mean, spread


def following(amax: Tensor, spread: Tensor) -> Tensor:
    """``amax * spread``, with a gradient for ``amax`` that has it go the way that ``amax * spread`` would go by itself.

    A step of SGD against ``g / spread`` changes amax by ``1 / spread`` of what one against ``g`` changes the product: LSQ's
    balance of step sizes and weights (Esser et al., 2020, arXiv:1902.08153, section 2.2) stays what it is.

    >>> amax = torch.tensor(2.0, requires_grad=True)
    >>> product = following(amax, torch.tensor(0.1))
    >>> product.item() == 2.0 * torch.tensor(0.1), torch.autograd.grad(product, amax)[0]
    (tensor(True), tensor(10.))
    """
    slope = amax / spread
    return (amax * spread).detach() + (slope - slope.detach())
