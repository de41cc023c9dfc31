"""What cannot be exported, found before the work, with the names of the quantizers."""

import torch
from torch import nn

from lq.functional.amax import integer_bounds
from lq.nn import QuantMixin, TensorQuantizer
from lq.surgery import named_quantizers

INT8 = integer_bounds(8, narrow_range=False)


def fits_int8(num_bits: int, unsigned: bool) -> bool:
    """Whether every code is one of int8, the only integer that both ONNX and TensorRT have in Q/DQ of activations.

    >>> fits_int8(4, unsigned=False), fits_int8(7, unsigned=True), fits_int8(8, unsigned=True)
    (True, True, False)
    """
    low, high = integer_bounds(num_bits, unsigned, narrow_range=False)
    return INT8[0] <= low and high <= INT8[1]


def check_exportable(model: nn.Module) -> None:
    """Raise ``ValueError`` for quantizers that Q/DQ in int8 cannot express.

    >>> from lq.nn import QuantLinear
    >>> check_exportable(nn.Sequential(QuantLinear(2, 2)))
    Traceback (most recent call last):
      ...
    ValueError: `0.input`, `0.weight` (2 of 2 quantizers) have no amax: calibrate first, with `lq.calibrating(model)`.
    """
    quantizers = dict(named_quantizers(model))
    problems: dict[str, list[str]] = {}
    for name, quantizer in quantizers.items():
        if problem := _problem(quantizer):
            problems.setdefault(problem, []).append(name)
    for problem, names in problems.items():
        shown = ", ".join(f"`{name}`" for name in names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"{shown} ({len(names)} of {len(quantizers)} quantizers) {problem}")
    for name, module in model.named_modules():
        if isinstance(module, QuantMixin) and module.weight_quantizer.active and _dtype(module) != torch.float32:
            raise ValueError(
                f"`{name}.weight` is {_dtype(module)}: scales are exported in float32, so call `model.float()` first."
            )


def _problem(quantizer: TensorQuantizer) -> str | None:
    desc = quantizer.quant_desc
    if quantizer._if_calib:
        return "collect statistics: leave `lq.calibrating`, or call `disable_calib()`."
    if not quantizer._if_quant:
        return None
    if quantizer.amax is None:
        return "have no amax: calibrate first, with `lq.calibrating(model)`."
    if not desc.fake_quant:
        return "return integer codes (`fake_quant=False`): export needs `fake_quant=True`."
    if not fits_int8(desc.num_bits, desc.unsigned):
        kind, most = ("unsigned", 7) if desc.unsigned else ("signed", 8)
        return f"have `num_bits={desc.num_bits}`, {kind}: codes must fit into int8, so use at most {most} bits."
    if (axes := sum(n > 1 for n in quantizer.amax.shape)) > 1:
        return f"have an amax along {axes} axes: ONNX takes one at most, so choose one `axis`, or None."
    return None


def _dtype(module: nn.Module) -> object:
    return getattr(module.weight, "dtype", None)
