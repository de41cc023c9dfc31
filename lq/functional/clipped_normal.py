"""The mean of a normal variable behind a ReLU or another clip."""

import math

import torch
from torch import Tensor


def clipped_normal_mean(mean: Tensor, std: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """Mean of :math:`\\min(\\max(X, low), high)` for normal X (Nagel et al., 2019, arXiv:1906.04721, appendix C).

    That is :math:`low + e(low) - e(high)`, with :math:`e(c) = E[\\max(X - c, 0)] = \\sigma (t\\,\\Phi(t) + \\varphi(t))` and
    :math:`t = (\\mu - c) / \\sigma`.

    Args:
        mean: of X, floating, any shape.
        std: its standard deviation, broadcastable; 0 is a constant.
        low: lower end; 0 is ReLU's.
        high: upper end; 6 is ReLU6's.

    Returns:
        The mean, in the dtype of ``mean``.

    >>> clipped_normal_mean(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
    tensor([0.3989, 2.0000])
    """
    above = _excess(mean, std, low)
    return low + (above if math.isinf(high) else above - _excess(mean, std, high))


def _excess(mean: Tensor, std: Tensor, end: float) -> Tensor:
    """E[max(X - end, 0)]."""
    t = (mean - end) / std
    density = torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
    return torch.where(std > 0, std * (t * torch.special.ndtr(t) + density), (mean - end).clamp_min(0))
