"""Functions that quantized modules are made of."""

import torch
from torch import Tensor


def clip(input: Tensor, clip_value_min: Tensor | float, clip_value_max: Tensor | float) -> Tensor:
    """``max(min(input, clip_value_max), clip_value_min)`` with gradients for bounds that are tensors.

    The gradient goes to ``input`` where it lies within the bounds, these included, and else to the bound that it crosses, summed
    over what shares the bound: PACT (Choi et al., 2018, arXiv:1805.06085, eq. 2 and 3), for both sides.

    Args:
        input: any shape, floating; the output has its dtype.
        clip_value_min: number, or tensor that broadcasts to ``input``.
        clip_value_max: likewise.

    >>> alpha = torch.tensor(1.0, requires_grad=True)
    >>> y = clip(torch.tensor([-2.0, 0.5, 3.0, 4.0]), -1.0, alpha)
    >>> y.sum().backward()
    >>> y.tolist(), alpha.grad
    ([-1.0, 0.5, 1.0, 1.0], tensor(2.))
    """
    low, high = (torch.as_tensor(v, device=input.device, dtype=input.dtype) for v in (clip_value_min, clip_value_max))
    return torch.clamp(input, low, high)
