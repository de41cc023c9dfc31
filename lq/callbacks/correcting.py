"""Corrections inside of a fit: on what its train batches give the model."""

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn

from lq.callbacks.feeding import forward_arguments, has_forward
from lq.corrections import (
    Correction,
    Corrections,
    activation_channel_equalization_,
    batchnorms,
    reestimate_batchnorm_,
    shift_negative_activation_correction_,
    weights_bias_correction_,
)
from lq.descriptor import Rules
from lq.nn.input_channels import add_bias_, has_input_channels
from lq.placed import placement_of
from lq.surgery import dequantize_, quantize_as_

# Those that need a bias where they change a layer.
NEED_BIAS = (shift_negative_activation_correction_, weights_bias_correction_)
# Those that make up for what quantization did, and so run behind calibration; in this order, as statistics that are those of the
# quantized model take up the mean of the error too.
AFTERWARDS = (weights_bias_correction_, reestimate_batchnorm_)


def function_of(correction: Correction) -> Correction:
    """What a correction is, without its options."""
    return function_of(correction.func) if isinstance(correction, partial) else correction


def name_of(correction: Correction) -> str:
    """What it is called in reports.

    >>> name_of(partial(weights_bias_correction_))
    'weights_bias_correction'
    """
    function = function_of(correction)
    return getattr(function, "__name__", type(function).__name__).removesuffix("_")


def positional(pl_module: LightningModule, batch: Any) -> tuple[Any, ...]:
    """What ``forward`` takes of a batch, by position.

    Raises:
        MisconfigurationException: there is no ``forward``, or it takes something by keyword only.
    """
    if not has_forward(pl_module):
        raise MisconfigurationException(f"{type(pl_module).__name__} has no `forward` of its own, which corrections run.")
    args, kwargs = forward_arguments(pl_module.forward, batch)
    bound = signature(pl_module.forward).bind(*args, **kwargs)
    if bound.kwargs:
        raise MisconfigurationException(
            f"`forward` takes {', '.join(bound.kwargs)} by keyword only, and corrections run it by position: leave them out."
        )
    return bound.args


@torch.no_grad()
def add_biases_(model: nn.Module, corrections: Sequence[Correction]) -> None:
    """Give layers without a bias one of zeros, in place, before there is an optimizer, if a correction may need it."""
    if any(function_of(correction) in NEED_BIAS for correction in corrections):
        for module in model.modules():
            if has_input_channels(module) and module._parameters.get("bias", 0) is None:
                add_bias_(module)


def correct_float_(
    pl_module: LightningModule, rules: Rules, corrections: Sequence[Correction], batches: list[tuple[Any, ...]]
) -> dict[str, Corrections]:
    """Correct a module whose quantizers have no amax yet, in place: without them, and with the same ones afterwards."""
    placement = placement_of(pl_module)
    dequantize_(pl_module)
    found = {}
    try:
        for correction in corrections:
            # a BatchNorm stays: its parameters are the optimizer's
            options = {"fold": False} if function_of(correction) is activation_channel_equalization_ else {}
            found[name_of(correction)] = partial(correction, **options)(pl_module, batches)
    finally:
        quantize_as_(pl_module, rules, placement)
    return found


def correct_quantized_(
    pl_module: LightningModule, corrections: Sequence[Correction], batches: list[tuple[Any, ...]]
) -> dict[str, Corrections]:
    """Correct a calibrated module, in place; BatchNorms that it holds in evaluation stay."""
    found = {}
    for correction in sorted(corrections, key=lambda c: AFTERWARDS.index(function_of(c))):
        anew = function_of(correction) is reestimate_batchnorm_
        options = {"norms": [norm for norm in batchnorms(pl_module) if norm.training]} if anew else {}
        found[name_of(correction)] = partial(correction, **options)(pl_module, batches)
    return found
