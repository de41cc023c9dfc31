"""How weights are averaged, for Lightning's ``WeightAveraging``."""

import torch
from torch import Tensor


@torch.no_grad()
def polynomial_average_(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int, eta: float = 8.0) -> None:
    """Move averages towards what is current, in place, so that step t of a fit counts in proportion to about :math:`t^\\eta`.

    .. math:: \\bar w_t = \\Bigl(1 - \\frac{1 + \\eta}{t + \\eta}\\Bigr) \\bar w_{t-1} + \\frac{1 + \\eta}{t + \\eta} w_t

    (Shamir and Zhang, 2013, arXiv:1212.1824, section 4.) The average is over the last part of a fit, a ninth of it with an eta
    of 8, however long it is, where a decay of 0.999 forgets in a thousand steps. Use it as
    ``WeightAveraging(multi_avg_fn=polynomial_average_)``; other eta by ``functools.partial``.

    Args:
        averaged: tensors of one dtype and device; integers become the current ones.
        current: likewise, of the same shapes.
        updates: how many values the averages are of so far, t - 1.
        eta: not negative; 0 is the mean of all.

    >>> average = torch.tensor([1.0])
    >>> for updates, value in enumerate([3.0, 5.0], start=1):
    ...     polynomial_average_([average], [torch.tensor([value])], updates, eta=0.0)
    >>> average
    tensor([3.])
    """
    if averaged[0].is_floating_point():
        torch._foreach_lerp_(averaged, current, (1 + eta) / (float(updates) + 1 + eta))
    else:
        torch._foreach_copy_(averaged, current)
