"""BatchNorm in evaluation: a factor and a shift on each channel, which the layer before it can take in."""

from typing import Any

import torch
from torch import Tensor, nn

from lq.nn.input_channels import input_channel_view

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def has_fixed_statistics(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that does not look at the batch in evaluation."""
    return type(module) in BATCH_NORMS and module.running_mean is not None and module.running_var is not None


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """What a BatchNorm in evaluation does, as ``factor * x + shift``, in float64 (one rounding when it is done).

    >>> factor, shift = affine_of(nn.BatchNorm1d(1, eps=0.25, affine=False))
    >>> round(factor.item(), 4), shift.item()
    (0.8944, -0.0)
    """
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    return factor, shift if norm.bias is None else shift + norm.bias.double()


@torch.no_grad()
def fold_into_(layer: nn.Module, norm: nn.Module) -> None:
    """Have a float linear layer or convolution, transposed and grouped too, compute the BatchNorm behind it as well.

    With ``f`` and ``c`` of :func:`affine_of`, ``W`` becomes ``f W`` and ``b`` becomes ``f b + c``.

    >>> layer, norm = nn.Linear(2, 2), nn.BatchNorm1d(2, eps=0.0).eval()
    >>> x, norm.running_var = torch.ones(1, 2), torch.tensor([4.0, 0.25])
    >>> before = norm(layer(x))
    >>> fold_into_(layer, norm)
    >>> torch.allclose(layer(x), before)
    True
    """
    factor, shift = affine_of(norm)
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    view = input_channel_view(layer)
    view.copy_(view.double() * factor.view(*view.shape[:2], 1, 1))
    if bias is None:
        layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        bias.copy_(bias.double() * factor + shift)


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever the model has it."""
    for parent in model.modules():
        # not named_children, which gives a module that has two names in one parent only once
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
