"""Calibrate the weights of a model at once, from histograms."""

import torch
from torch import nn

from lq.calib.histogram import HistogramCalibrator


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
        ValueError: no module has a weight quantizer, an unknown method, or NaN or Inf in a weight (named).

    >>> from lq.nn import QuantLinear
    >>> model = nn.Sequential(QuantLinear(2, 2))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -2.0], [0.5, 0.25]]))
    >>> calibrate_weights(model, method="percentile", percentile=100)
    >>> model[0].weight_quantizer.amax.tolist()
    [[2.0], [0.5]]
    """
    found = False
    for name, module in model.named_modules():
        for role, weight in module.weights().items() if hasattr(module, "weights") else ():
            quantizer = module.quantizers()[role]
            if quantizer._disabled:
                continue
            found = True
            quantizer.quant_desc = quantizer.quant_desc.replace(axis=0 if perchannel else None, block_size=None)
            calibrator = HistogramCalibrator(quantizer.num_bits, quantizer.axis, quantizer.unsigned, num_bins).to(weight.device)
            calibrator.collect(weight)
            if not calibrator.finite:
                raise ValueError(f"NaN or Inf in `{name}.{role}`: its amax cannot be computed.")
            amax = calibrator.compute_amax(method, percentile=percentile)
            quantizer.amax = None  # its shape may have changed
            quantizer.amax = amax
    if not found:
        raise ValueError(f"{type(model).__name__} has no enabled weight quantizer: call `lq.quantize_` first.")
