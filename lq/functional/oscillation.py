"""Weights that oscillate between two codes: how often they do, and what damps them.

Nagel et al., 2022, "Overcoming Oscillations in Quantization-Aware Training", arXiv:2203.08114.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lq.functional.fake_quant import fake_quant


def damping_loss(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool = False, narrow_range: bool = True) -> Tensor:
    """Squared distance of weights from the centres of their bins, summed: those that are clipped add nothing (eq. 5).

    The centres have no gradient, so that weights are pulled to where they are rounded to.

    Args:
        x: weights, any shape, floating.
        amax: float32, ``()`` or broadcastable to ``x``.
        num_bits: width of the integer.
        unsigned: use ``[0, 2**num_bits - 1]``.
        narrow_range: leave out the most negative code.

    Returns:
        ``()``.

    >>> x = torch.tensor([0.9, -1.2, 8.0], requires_grad=True)
    >>> loss = damping_loss(x, torch.tensor(3.0), num_bits=3)
    >>> loss, torch.autograd.grad(loss, x)[0]
    (tensor(0.0500, grad_fn=<SumBackward0>), tensor([-0.2000, -0.4000,  0.0000]))
    """
    centers = fake_quant(x.detach(), amax, num_bits, unsigned, narrow_range)
    lowest = fake_quant(torch.full_like(amax, -torch.inf), amax, num_bits, unsigned, narrow_range)
    return (centers - torch.maximum(torch.minimum(x, amax), lowest)).square().sum()


@dataclass
class Oscillation:
    """What there is to know of the codes of a weight, all of its shape.

    Attributes:
        codes: int8: those that were seen last.
        direction: int8: sign of their last change; 0 before the first.
        frequency: float32: running mean of whether they turned round.
        mean: float32: running mean of the codes.
        frozen: bool: whether they are held.
    """

    codes: Tensor
    direction: Tensor
    frequency: Tensor
    mean: Tensor
    frozen: Tensor

    @classmethod
    def of(cls, codes: Tensor) -> "Oscillation":
        """Nothing has happened yet."""
        codes = codes.to(torch.int8)
        zeros = torch.zeros_like(codes)
        return cls(codes, zeros, zeros.float(), codes.float(), zeros.bool())


@torch.no_grad()
def follow_(state: Oscillation, codes: Tensor, momentum: float = 0.01, threshold: float | None = None) -> Tensor:
    """Take the codes of another step into account, in place; those that are frozen stay.

    A code oscillates when it changes in the direction opposite to that of its last change, however long ago (section 4.1), and
    ``f = momentum * oscillates + (1 - momentum) * f``. Where that exceeds the threshold it is frozen to its running mean,
    rounded: the code it was at most (algorithm 1).

    Args:
        state: is changed.
        codes: whole numbers, of the shape of the weight.
        momentum: share of this step in the running means.
        threshold: frequency above which codes are frozen; ``None`` freezes none.

    Returns:
        The codes, int8, with those that are frozen as they are held.

    >>> state = Oscillation.of(torch.tensor([0, 1]))
    >>> for code in (1, 0, 1):
    ...     held = follow_(state, torch.tensor([code, 1]), momentum=0.5, threshold=0.7)
    >>> state.frequency, state.frozen, held
    (tensor([0.7500, 0.0000]), tensor([ True, False]), tensor([1, 1], dtype=torch.int8))
    """
    codes = torch.where(state.frozen, state.codes, codes.to(torch.int8))
    change = (codes.short() - state.codes.short()).sign().to(torch.int8)
    state.frequency.lerp_((change * state.direction < 0).float(), momentum)
    state.mean.lerp_(codes.float(), momentum)
    if threshold is not None:
        found = (state.frequency > threshold) & ~state.frozen
        codes = torch.where(found, state.mean.round().to(torch.int8), codes)
        state.frozen |= found
    state.direction.copy_(torch.where(change != 0, change, state.direction))
    state.codes.copy_(codes)
    return codes
