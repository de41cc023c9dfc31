"""The formula of SmoothQuant."""

import torch
from torch import Tensor

# Factors stay in here, so that no product of them with a half-precision weight or activation overflows.
BOUND = 1e4


def smooth_factors(input_amax: Tensor, weight_amax: Tensor, alpha: float) -> Tensor:
    """Factor of each channel: inputs are divided by it, the weights that meet them are multiplied.

    :math:`s_j = \\max|X_j|^\\alpha / \\max|W_j|^{1-\\alpha}` (Xiao et al., 2022, arXiv:2211.10438, eq. 4). A channel that is dead
    in the inputs or the weights gets 1; factors are kept within [1e-4, 1e4].

    Args:
        input_amax: ``(channels,)``.
        weight_amax: ``(channels,)``.
        alpha: migration strength in [0, 1]: 0 moves all difficulty to the activations, 1 to the weights.

    Returns:
        float32 ``(channels,)``.

    >>> smooth_factors(torch.tensor([16.0, 1.0, 0.0]), torch.tensor([0.25, 1.0, 1.0]), alpha=0.5)
    tensor([8., 1., 1.])
    """
    factors = input_amax.float().pow(alpha) / weight_amax.float().pow(1 - alpha)
    alive = (input_amax > 0) & (weight_amax > 0)
    return torch.where(alive, factors, 1.0).clamp(1 / BOUND, BOUND)
