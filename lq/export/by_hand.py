"""Q/DQ out of a ``torch.onnx.export`` that the user calls by hand."""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq.export._require import require
from lq.export.check import AXIS_OPSET, E4M3, HALF_OPSET, INT8, check_quantizers
from lq.functional.fake_quant import fake_quant
from lq.functional.grid import FLOAT_FORMATS, integer_bounds
from lq.nn import QuantModule, TensorQuantizer
from lq.surgery import named_quantizers


@contextmanager
def enable_onnx_export() -> Iterator[None]:
    """Within the block, ``torch.onnx.export`` writes QuantizeLinear and DequantizeLinear for every fake quantization.

    For those who export as with pytorch-quantization; :func:`lq.export.to_onnx` does more: int8 weights, BatchNorm folded, nodes
    named after modules. Both exporters of torch serve, ``dynamo=True`` and ``dynamo=False``, and the graph computes what the
    model does: zero points are 0, scales ``amax / qmax`` (Jacob et al., 2018, arXiv:1712.05877, eq. 1), and what has fewer codes
    than int8 (by ``num_bits``, ``unsigned``, ``narrow_range``) is clipped first, unless it is a weight that keeps to its codes
    anyway. Weights stay float in front of QuantizeLinear. ``num_bits=(4, 3)`` becomes FLOAT8E4M3FN, in opset 19 by default.

    In the block ``torch.onnx.export`` is another function, so call it by this name: a program captured before, or an ``export``
    imported from ``torch.onnx`` before, fails at the quantizers. Eager calls are as ever, and blocks may be nested. With
    ``dynamo=True`` a model must not need Dynamo to be captured (``torch.cond``), and ``verify=True`` compares with zeros.

    Raises:
        ImportError: the extra ``export`` is not installed.
        ValueError: on the export, for quantizers that Q/DQ cannot express, named: no amax, collecting statistics,
            ``fake_quant=False``, ``normalize``, codes beyond int8 (unsigned 8 bits), float formats but E4M3, several axes, or
            blocks; for an ``opset_version`` below 13, or 19 with FP8; and for inputs that are not float32 (torch makes a
            ``TorchExportError`` of this one with ``dynamo=True``).

    >>> with enable_onnx_export():
    ...     torch.onnx.export(nn.Sequential(TensorQuantizer()), torch.ones(2))
    Traceback (most recent call last):
      ...
    ValueError: `0` (1 of 1 quantizers) have no amax: calibrate first, with `lq.calibrating(model)`.
    """
    require("onnx", "onnxscript", "onnx_ir")
    export = torch.onnx.export

    @functools.wraps(export)
    def with_qdq(model: Any, *args: Any, opset_version: int | None = None, **kwargs: Any) -> Any:
        quantizers = dict(named_quantizers(model)) if isinstance(model, nn.Module) else {}
        if quantizers:
            check_quantizers(model, formats=[E4M3])
            if normalized := [name for name, quantizer in quantizers.items() if quantizer.quant_desc.normalize]:
                raise ValueError(f"`{normalized[0]}` has `normalize`: call `lq.nn.normalized.fold_normalized_(model)` first.")
        opset_version = _checked_opset(quantizers, opset_version)
        try:
            for quantizer in quantizers.values():
                quantizer._on_export = _writer(quantizer, model)
            with warnings.catch_warnings():
                # the first look of a quantizer at the shape of its inputs: the trace may take that for constant
                tracer = torch.jit.TracerWarning  # type: ignore[attr-defined]
                warnings.filterwarnings("ignore", category=tracer, module=r"lq\.")
                return export(model, *args, opset_version=opset_version, **kwargs)
        finally:
            for quantizer in quantizers.values():
                quantizer._on_export = None

    torch.onnx.export = with_qdq
    try:
        yield
    finally:
        torch.onnx.export = export


def _checked_opset(quantizers: dict[str, TensorQuantizer], asked: int | None) -> int | None:
    """The opset to ask torch for, once it is clear that quantizers can be written in it."""
    fp8 = any(quantizer.num_bits == E4M3 for quantizer in quantizers.values())
    least = HALF_OPSET if fp8 else AXIS_OPSET
    if asked is None:
        return least if fp8 else None
    if quantizers and asked < least:
        raise ValueError(f"`opset_version` is {asked}: QuantizeLinear has {'FP8' if fp8 else 'an axis'} from opset {least} on.")
    return asked


# What is written


@dataclass(frozen=True, eq=False)
class _Writer:
    """What a quantizer does during an export: it leaves nodes, with constants that were computed before."""

    quantizer: TensorQuantizer
    scale: Tensor
    zero_point: Tensor
    # the real values of the outermost codes, unless these are int8's
    bounds: tuple[Tensor, Tensor] | None
    # modules, and the names of their weights, that need no clipping
    within: list[tuple[nn.Module, str]]

    def __call__(self, x: Tensor, amax: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise ValueError(f"A quantizer meets {x.dtype}: scales are exported in float32, so call `model.float()` first.")
        clips = self.bounds is not None and not any(getattr(module, name) is x for module, name in self.within)
        outputs: Tensor
        if not torch.compiler.is_exporting():
            outputs = _TorchScript.apply(x, amax, self, clips)  # type: ignore[no-untyped-call]
            return outputs
        outputs = self.nodes(functools.partial(_symbolic, shape=x.shape), x, x.dim(), amax.shape, clips)
        # torch's stand-ins for ONNX operators are on the CPU, wherever their inputs are
        return outputs.to(x.device)

    def nodes(self, op: Callable[..., Any], x: Any, rank: int, amax_shape: torch.Size, clips: bool) -> Any:
        """Write nodes with ``op``; amax broadcasts against ``x``, of ``rank`` dimensions, from the right."""
        axes = [i + rank - len(amax_shape) for i, n in enumerate(amax_shape) if n > 1]
        axis = {"axis": axes[0]} if axes else {}
        if clips and self.bounds is not None:
            low, high = self.bounds
            if axes:  # Clip takes scalars only
                x = op("Max", x, low.reshape(amax_shape))
                x = op("Min", x, high.reshape(amax_shape))
            else:
                x = op("Clip", x, low, high)
        codes = op("QuantizeLinear", x, self.scale, self.zero_point, **axis)
        return op("DequantizeLinear", codes, self.scale, self.zero_point, **axis)


@torch.no_grad()
def _writer(quantizer: TensorQuantizer, model: nn.Module) -> _Writer | None:
    scale, desc = quantizer.scale, quantizer.quant_desc
    if scale is None:
        return None
    flat = scale.reshape(() if scale.numel() == 1 else -1)
    if isinstance(desc.num_bits, tuple):
        return _Writer(quantizer, flat, torch.zeros_like(flat).to(FLOAT_FORMATS[desc.num_bits]), None, [])
    low, high = integer_bounds(desc.num_bits, desc.unsigned, desc.narrow_range)
    within = [
        (module, role)
        for module in model.modules()
        for role, own in (module.quantizers() if isinstance(module, QuantModule) else {}).items()
        if own is quantizer and _within(getattr(module, role, None), scale, low, high)
    ]
    bounds = None if (low, high) == INT8 else (low * flat, high * flat)
    return _Writer(quantizer, flat, torch.zeros_like(flat).to(torch.int8), bounds, within)


def _within(weight: Any, scale: Tensor, low: int, high: int) -> bool:
    """Whether all codes of a weight lie within the bounds by themselves."""
    if not isinstance(weight, Tensor) or scale.dim() not in (0, weight.dim()):
        return False
    codes = (weight / scale).round()
    return bool(((low <= codes) & (codes <= high)).all())


def _symbolic(op: str, x: Tensor, *constants: Tensor, shape: torch.Size, **attributes: int) -> Tensor:
    """A node of ONNX in a program of ``torch.export``."""
    dtype = constants[1].dtype if op == "QuantizeLinear" else torch.float32
    return torch.onnx.ops.symbolic(op, (x, *constants), dict(attributes), dtype=dtype, shape=shape)


class _TorchScript(torch.autograd.Function):
    """Nodes of ONNX for the TorchScript exporter; the values that it traces are the real ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, writer: _Writer, clips: bool) -> Tensor:
        desc = writer.quantizer.quant_desc
        return fake_quant(x, amax, desc.num_bits, desc.unsigned, desc.narrow_range)

    @staticmethod
    def symbolic(g: Any, x: Any, amax: Any, writer: _Writer, clips: bool) -> Any:
        # one node for what Q and DQ share
        constant = functools.cache(lambda tensor: g.op("Constant", value_t=tensor.cpu()))

        def op(name: str, x: Any, *constants: Tensor, **attributes: int) -> Any:
            return g.op(name, x, *map(constant, constants), **{f"{key}_i": value for key, value in attributes.items()})

        return writer.nodes(op, x, x.type().dim(), amax.type().sizes(), clips)
