"""What cannot be exported, found before the work, with the names of the quantizers."""

from collections.abc import Container
from itertools import chain

import torch
from torch import nn

from lq.export.recentre import movable
from lq.functional.grid import Bits, integer_bounds
from lq.nn import QuantModule, TensorQuantizer
from lq.surgery import named_quantizers

INT8 = integer_bounds(8, narrow_range=False)


def fits_int8(num_bits: Bits, unsigned: bool) -> bool:
    """Whether every code is one of int8, the only integer that both ONNX and TensorRT have in Q/DQ of activations.

    >>> fits_int8(4, unsigned=False), fits_int8(7, unsigned=True), fits_int8(8, unsigned=True)
    (True, True, False)
    """
    if isinstance(num_bits, tuple):
        return False
    low, high = integer_bounds(num_bits, unsigned, narrow_range=False)
    return INT8[0] <= low and high <= INT8[1]


E4M3 = (4, 3)
# The first versions of QuantizeLinear and DequantizeLinear that have an axis; FP8, and scales in half precision; blocks; and that
# of convolutions in bfloat16.
AXIS_OPSET, HALF_OPSET, BLOCKS_OPSET, BFLOAT_OPSET = 13, 19, 21, 22


def check_exportable(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Raise ``ValueError`` for quantizers that Q/DQ cannot express, and weights that are neither float32 nor ``dtype``.

    >>> from lq.nn import QuantLinear
    >>> check_exportable(nn.Sequential(QuantLinear(2, 2)))
    Traceback (most recent call last):
      ...
    ValueError: `0.input`, `0.weight` (2 of 2 quantizers) have no amax: calibrate first, with `lq.calibrating(model)`.
    """
    if meta := [name for name, x in chain(model.named_parameters(), model.named_buffers()) if x.is_meta]:
        raise ValueError(f"`{meta[0]}` ({len(meta)} in all) is on `meta` and has no values: load the weights first.")
    modules = [m for m in model.modules() if isinstance(m, QuantModule)]
    weights = [m.quantizers()[role] for m in modules for role in m.weights()]
    check_quantizers(model, formats=[E4M3], blocks=weights, moved=movable(model))
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype not in (torch.float32, dtype):
            raise ValueError(
                f"`{name}` is {weight.dtype}, and the graph {dtype}: call `model.float()` first, or give `precision`."
            )


def checked_opset(model: nn.Module, dtype: torch.dtype, asked: int | None) -> int | None:
    """The opset to ask torch for, once it is clear that all can be written in it; ``None`` for torch's own choice, 18 or later.

    Raises:
        ValueError: ``asked`` is too low.

    >>> checked_opset(nn.Linear(2, 2), torch.float16, None), checked_opset(nn.Linear(2, 2), torch.float32, 17)
    (None, 17)
    """
    quantizers = [quantizer for _, quantizer in named_quantizers(model) if quantizer.active]
    needs = {AXIS_OPSET: "QuantizeLinear has an axis"} if quantizers else {}
    if any(isinstance(q.num_bits, tuple) for q in quantizers):
        needs[HALF_OPSET] = "QuantizeLinear has FP8"
    elif quantizers and dtype != torch.float32:
        needs[HALF_OPSET] = "QuantizeLinear has scales in half precision"
    if any(q.quant_desc.block_size is not None for q in quantizers):
        needs[BLOCKS_OPSET] = "DequantizeLinear has blocks"
    if dtype == torch.bfloat16:
        needs[BFLOAT_OPSET] = "a convolution may be in bfloat16"
    least = max(needs, default=0)
    if asked is None:
        return least if least > AXIS_OPSET else None
    if asked < least:
        raise ValueError(f"`opset` is {asked}: {needs[least]} from opset {least} on.")
    return asked


def check_quantizers(
    model: nn.Module,
    formats: Container[Bits] = (),
    blocks: Container[TensorQuantizer] = (),
    moved: Container[TensorQuantizer] = (),
) -> None:
    """Raise ``ValueError`` for quantizers that Q/DQ in int8, or in one of the float ``formats``, cannot express.

    Only quantizers in ``blocks`` may have a ``block_size``. Codes of those in ``moved`` will be int8's.
    """
    quantizers = dict(named_quantizers(model))
    problems: dict[str, list[str]] = {}
    for name, quantizer in quantizers.items():
        if problem := _problem(quantizer, formats, quantizer in blocks, quantizer in moved):
            problems.setdefault(problem, []).append(name)
    for problem, names in problems.items():
        shown = ", ".join(f"`{name}`" for name in names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"{shown} ({len(names)} of {len(quantizers)} quantizers) have {problem}")


def _problem(quantizer: TensorQuantizer, formats: Container[Bits], in_blocks: bool, moved: bool) -> str | None:
    desc = quantizer.quant_desc
    if quantizer._if_calib:
        return "calibration enabled: leave `lq.calibrating`, or call `disable_calib()`."
    if not quantizer._if_quant:
        return None
    if quantizer.amax is None:
        return "no amax: calibrate first, with `lq.calibrating(model)`."
    if not desc.fake_quant:
        return "`fake_quant=False`: they return integer codes, and export needs `fake_quant=True`."
    if desc.affine:
        return "`affine=True`, so a zero point, and TensorRT's are all 0: choose symmetric quantizers to export."
    if isinstance(desc.num_bits, tuple) and desc.num_bits not in formats:
        return f"`num_bits={desc.num_bits}`, a float format that is not exported here."
    if isinstance(desc.num_bits, int) and not moved and not fits_int8(desc.num_bits, desc.unsigned):
        kind, most = ("unsigned", 7) if desc.unsigned else ("signed", 8)
        return f"`num_bits={desc.num_bits}`, {kind}: codes must fit into int8, so use at most {most} bits."
    if desc.block_size is not None:
        return None if in_blocks else f"`block_size={desc.block_size}`: export needs one amax, or one `axis`."
    if (axes := sum(n > 1 for n in quantizer.amax.shape)) > 1:
        return f"an amax along {axes} axes: ONNX takes one at most, so choose one `axis`, or None."
    return None
