"""Calibrate the weights of a model at once, from histograms."""

from typing import Any

import torch
from torch import Tensor, nn

from lq.calib.histogram import HistogramCalibrator

# Channels of a weight that are looked at in one go.
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
            learned or of blocks (named); then nothing has changed.

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
            if quantizer.frozen or quantizer.learned or quantizer.quant_desc.block_size is not None:
                raise ValueError(f"The amax of `{name}.{role}` is frozen, learned or of blocks: `lq.calibrating` handles those.")
            amaxs[quantizer] = _amax(weight, quantizer, axis, num_bins, method, percentile, f"{name}.{role}")
    if not amaxs:
        raise ValueError(f"{type(model).__name__} has no enabled weight quantizer: call `lq.quantize_` first.")
    for quantizer, amax in amaxs.items():
        quantizer.quant_desc = quantizer.quant_desc.replace(axis=axis)
        quantizer.amax = None  # its shape may have changed
        quantizer.amax = amax


def _amax(weight: Tensor, quantizer: Any, axis: int | None, num_bins: int, method: str, percentile: float, name: str) -> Tensor:
    parts = []
    # a histogram takes 32 KiB: not all channels of a large layer at once
    for rows in torch.split(weight, ROWS) if axis == 0 else [weight]:
        calibrator = HistogramCalibrator(quantizer.num_bits, axis, quantizer.unsigned, num_bins).to(weight.device)
        calibrator.collect(rows)
        if not calibrator.finite:
            raise ValueError(f"NaN or Inf in `{name}`: its amax cannot be computed.")
        amax = calibrator.compute_amax(method, percentile=percentile)
        assert amax is not None
        parts.append(amax)
    return torch.cat(parts) if axis == 0 else parts[0]
