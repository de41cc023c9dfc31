"""Which method suits which layer: the one whose amax best rounds data that it was not computed from."""

import torch
from torch import Tensor

from lq.functional.grid import Bits
from lq.functional.rounding import energies
from lq.functional.threshold import DIVERGENCES, METHODS, Search, check_method, threshold

# The method that picks a method.
AUTO = "auto"


def contenders(num_bits: Bits) -> list[str]:
    """Methods that are compared: all that go with ``num_bits`` and have no parameter of their own.

    >>> contenders((4, 3))
    ['max', 'percentile', 'mse', 'mae']
    """
    integer = isinstance(num_bits, int)
    return [name for name in METHODS if name not in ("noclipping", "lp") and (integer or name not in DIVERGENCES)]


def check_choice(method: str, num_bits: Bits = 8) -> None:
    """Raise ``ValueError`` for what is neither ``auto`` nor a method that goes with ``num_bits``."""
    if method not in METHODS and method != AUTO:
        raise ValueError(f"`method` is {method!r}: choose one of {', '.join([*METHODS, AUTO])}.")
    if method != AUTO:
        check_method(method, num_bits)


@torch.no_grad()
def least_error(fit: Tensor, held_out: Tensor, width: Tensor, peak: Tensor, layer: Tensor, search: Search) -> list[str]:
    """For each layer, the method with the least squared rounding error on data that was held out.

    Every method computes amax from ``fit``; the error is :math:`\\sum_b c_b (x_b - Q(x_b))^2` over the bins of ``held_out``,
    added up over a layer's channels. (Choosing by the error on the same data would be ``mse`` in any case.)

    Args:
        fit: counts to compute amax from, int64 ``(rows, bins)``.
        held_out: counts to measure the error on, likewise.
        width: width of a bin, float64 ``(rows,)``.
        peak: largest magnitude, ``(rows,)``.
        layer: index of the layer that a row belongs to, int64 ``(rows,)``, rising from 0.
        search: candidates, bit width, options.

    >>> fit, held_out = torch.tensor([[0, 90, 9, 1]]), torch.tensor([[0, 80, 20, 0]])
    >>> width, peak = torch.tensor([1.0]), torch.tensor([4.0])
    >>> least_error(fit, held_out, width, peak, torch.tensor([0]), Search(num_bits=4, start_bin=1))
    ['mse']
    """
    names, errors = contenders(search.num_bits), []
    for name in names:
        amax = threshold(fit, width, peak, name, search)
        _, noise = energies(held_out, width, amax * search.scale_amax, search.num_bits, search.unsigned)
        errors.append(noise.new_zeros(int(layer[-1]) + 1).index_add_(0, layer, noise))
    # of equals the first, which is the simplest
    return [names[i] for i in torch.stack(errors).argmin(dim=0).tolist()]
