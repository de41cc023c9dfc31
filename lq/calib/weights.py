"""Calibrate the weights of a model at once, from histograms."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lq.calib.calibrator import Calibrator
from lq.calib.histogram import HistogramCalibrator
from lq.calib.max import MaxCalibrator

# Histograms that there are at a time.
ROWS = 256


@torch.no_grad()
def calibrate_weights(
    model: nn.Module, method: str = "percentile", perchannel: bool = True, percentile: float = 99.99, num_bins: int = 2048
) -> None:
    """Set the amax of every enabled weight quantizer from a histogram of its weight, in place.

    Args:
        model: holds modules with a ``weight`` and a ``weight_quantizer``, as ``lq.nn`` has them, or more of the kind.
        method: ``"mse"``, ``"percentile"``, or another of :mod:`lq.functional.threshold`, whatever the quantizer's calibrator.
        perchannel: give each output channel, dimension 0, an amax of its own; else one per weight. The quantizer's ``axis``
            becomes that.
        percentile: percentage of values to keep, for ``"percentile"``.
        num_bins: resolution of the histograms.

    Raises:
        ValueError: no module has a weight quantizer, an unknown method, NaN or Inf in a weight, or an amax that is frozen,
            learned, affine, normalized or of blocks (named); then nothing has changed.

    >>> from lq.nn import QuantLinear
    >>> model = nn.Sequential(QuantLinear(2, 2))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -2.0], [0.5, 0.25]]))
    >>> calibrate_weights(model, method="percentile", percentile=100)
    >>> model[0].weight_quantizer.amax.tolist()
    [[2.0], [0.5]]
    """
    axis = 0 if perchannel else None
    amaxs = {}
    for name, module in model.named_modules():
        for role, weight in module.weights().items() if callable(getattr(module, "weights", None)) else ():
            quantizer = module.quantizers()[role]
            if quantizer._disabled:
                continue
            desc = quantizer.quant_desc
            if quantizer.frozen or quantizer.learned or desc.affine or desc.normalize or desc.block_size is not None:
                kinds = "frozen, learned, affine, normalized or of blocks"
                raise ValueError(f"The amax of `{name}.{role}` is {kinds}: `lq.calibrating` handles those.")
            if not bool(weight.isfinite().all()):
                raise ValueError(f"NaN or Inf in `{name}.{role}`: its amax cannot be computed.")
            like = MaxCalibrator(quantizer.num_bits, axis, quantizer.unsigned)
            amaxs[quantizer] = histogram_amax(weight, like, num_bins, method, percentile=percentile)
    if not amaxs:
        raise ValueError(f"{type(model).__name__} has no enabled weight quantizer: call `lq.quantize_` first.")
    for quantizer, amax in amaxs.items():
        quantizer.quant_desc = quantizer.quant_desc.replace(axis=axis)
        quantizer.amax = None  # its shape may have changed
        quantizer.amax = amax


@torch.no_grad()
def histogram_amax(x: Tensor, like: Calibrator, num_bins: int, method: str, **options: Any) -> Tensor:
    """Amax of what is all there by ``method``, without a histogram that stays.

    Args:
        x: values, finite.
        like: says width, axis and sign.
        num_bins: resolution of the histograms.
        method: a key of :data:`lq.functional.threshold.METHODS`.
        options: of :meth:`HistogramCalibrator.compute_amax`.

    >>> from lq.calib import MaxCalibrator
    >>> histogram_amax(torch.tensor([[1.0, 1.0, 4.0], [2.0, 2.0, 2.0]]), MaxCalibrator(8, 0), 2048, "percentile", percentile=50)
    tensor([[1.0020],
            [2.0000]])
    """
    axes = like.axis if isinstance(like.axis, tuple) else (like.axis,)
    # a histogram takes 32 KiB: not all channels of a large layer at once
    each = max(1, ROWS // math.prod(x.shape[i] for i in axes if i)) if 0 in axes else len(x)
    amaxs = []
    for rows in torch.split(x, each):
        calibrator = HistogramCalibrator(like.num_bits, like.axis, like.unsigned, num_bins).to(x.device)
        calibrator.collect(rows)
        amax = calibrator.compute_amax(method, **options)
        assert amax is not None
        amaxs.append(amax)
    return torch.cat(amaxs) if len(amaxs) > 1 else amaxs[0]
