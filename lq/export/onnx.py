"""A model with quantizers as an ONNX file with QuantizeLinear and DequantizeLinear."""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lq.export._require import require
from lq.export.check import check_exportable, checked_opset
from lq.export.fold import fold_batchnorm_
from lq.export.inputs import batch_shapes, checked_inputs, name_caught_
from lq.export.recentre import recentre_
from lq.export.scales import fix_learned_scales_, raise_dead_scales_, round_weights_
from lq.nn.example import on_device_of
from lq.nn.normalized import fold_normalized_
from lq.staged import staged

if TYPE_CHECKING:
    import onnx_ir as ir

TARGETS = ("tensorrt", "onnxruntime")

# What the graph computes in.
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

BATCH_HINT = (
    "if the model fixes its batch size, export with `dynamic_shapes=None`; if a tensor has that size by chance, give the shapes."
)

# A protobuf message ends at 2 GiB; what is left is for the graph itself.
MAX_IN_ONE_FILE = 2**31 - 2**27


def to_onnx(
    model: nn.Module,
    args: Any,
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = "batch",
    opset: int | None = None,
    precision: str = "fp32",
    target: str = "tensorrt",
) -> Path:
    """Write ``model`` as ONNX: inputs pass QuantizeLinear and DequantizeLinear, weights are codes behind a DequantizeLinear.

    The file computes what the fake-quantized model does. Zero points are 0 and scales are ``amax / qmax``, per tensor or along
    one axis (Jacob et al., 2018, arXiv:1712.05877, eq. 1; ONNX operators QuantizeLinear, DequantizeLinear). Integers are int8,
    as TensorRT wants them: inputs with fewer bits, with ``narrow_range``, or unsigned (up to 7 bits) are clipped to their range
    first. Unsigned codes of 8 bits are int8's in the graph, where a shift of the input costs one add (:mod:`lq.export.recentre`).
    Weights in blocks of 4 bits are int4, with a scale for each block. ``num_bits=(4, 3)`` is FLOAT8E4M3FN. Scales that
    are learned become constants. A BatchNorm that alone consumes a quantized convolution or linear layer is folded into it and
    changes no code; one behind a transposed convolution stays. Channels whose weights are dead beside their bias get a larger
    scale (:func:`lq.export.scales.raise_dead_scales_`). What a disabled quantizer meets stays float, as does a model without
    any. The model is exported as in evaluation, and is itself not changed.

    Args:
        model: float32; calibrated, if it has quantizers.
        args: positional inputs of one forward, a tensor or a tuple; they are moved to the model's device.
        path: the file to write. Beside it stands ``<path>.data`` where one file cannot hold the weights (2 GiB).
        kwargs: keyword inputs of the forward.
        dynamic_shapes: ``"batch"``: axis 0 is free in every tensor that has the size of the first one there; ``None``: all
            shapes as given; else as :func:`torch.export.export` takes it.
        opset: version of the ONNX operators; ``None`` is what ``torch.onnx`` prefers, or the first that has what the model
            needs: 19 for FP8 and for half precision, 21 for blocks.
        precision: what the graph computes in where it does not in codes, of its inputs, outputs and scales too: ``"fp32"``,
            ``"fp16"`` or ``"bf16"``. Codes of weights stay as they are; values that half precision rounds may come to lie on
            another code at the next quantizer.
        target: ``"tensorrt"``; or ``"onnxruntime"``, laid out so that ONNX Runtime uses its 8-bit kernels on the CPU, with uint8
            activations around 128 (:mod:`lq.export.cpu`). Both graphs compute the same, anywhere.

    Returns:
        ``path``. It is written whole or, on any error, not at all.

    Raises:
        ImportError: the extra ``export`` is not installed.
        TypeError: ``model`` is no module; ``args`` is ``None``, or does not fit ``forward``.
        FileNotFoundError, IsADirectoryError, PermissionError: ``path`` cannot be written, found out before the export.
        ValueError: quantizers that ONNX int8 cannot express, each named: not calibrated, collecting statistics, affine,
            ``fake_quant=False``, more than 8 bits (7 if unsigned, unless a linear layer or convolution takes them), E5M2, several
            axes, not float32; or an unknown ``dynamic_shapes``, ``precision`` or ``target``, or an ``opset`` that lacks what the
            model needs.
    """
    require("onnx", "onnxscript", "onnx_ir")
    from lq.export.lower import lower_fake_quant_

    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is {model!r}: it must be a torch.nn.Module.")
    for name, value, known in (("target", target, TARGETS), ("precision", precision, PRECISIONS)):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"`{name}` is {value!r}: choose one of {', '.join(known)}.")
    if opset is not None and type(opset) is not int:
        raise TypeError(f"`opset` is {opset!r}: it must be an integer.")
    path, dtype, asked = Path(path), PRECISIONS[precision], opset
    check_exportable(model, dtype)
    opset = checked_opset(model, dtype, opset)
    args, keywords = _in_precision(dtype, on_device_of(model, checked_inputs(model, args, kwargs)))
    hint = ""
    if isinstance(dynamic_shapes, str):
        if dynamic_shapes != "batch":
            raise ValueError(
                f"`dynamic_shapes` is {dynamic_shapes!r}: give 'batch', None, or the shapes that torch.export takes."
            )
        dynamic_shapes = batch_shapes(model, args, keywords)
        hint = f"`dynamic_shapes='batch'` stands for {dynamic_shapes}: " + BATCH_HINT
    # a link is written through, and not replaced
    place = path.resolve()
    with staged(place) as file:
        try:
            program = _export(model, args, keywords, dynamic_shapes, opset, dtype)
        except Exception as error:
            if hint:
                error.add_note(hint)
            raise
        # torch writes a later one where a model has operators that cannot be brought down to an earlier one
        written = program.model.opset_imports.get("")
        if asked is not None and written != asked:
            raise ValueError(f"`opset` is {asked}, but this model can be written in {written} only: leave `opset` out.")
        lower_fake_quant_(program.model, target)
        external = _save(program.model, file)
    if not external:
        # an earlier and larger file at this path had one
        place.with_name(f"{place.name}.data").unlink(missing_ok=True)
    return path


def _in_precision(dtype: torch.dtype, inputs: Any) -> Any:
    """Floating tensors in ``inputs``, nested as they may be, in the precision of the graph."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    opset: int | None,
    dtype: torch.dtype,
) -> Any:
    """The program with a FakeQuant node for each quantizer; the work is done on a copy."""
    from lq.export.translate import translation_table

    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), _quiet():
        model = copy.deepcopy(model).eval()
        if dtype != torch.float32:
            # scales and codes are found in float32
            model.float()
        fold_normalized_(model)
        fix_learned_scales_(model)
        fold_batchnorm_(model, *_in_precision(torch.float32, (args, kwargs)))
        recentre_(model)
        raise_dead_scales_(model)
        if dtype != torch.float32:
            round_weights_(model)
            model.to(dtype)
        name_caught_(model, kwargs)
        # torch.onnx takes a dict at the end of args for kwargs, unless there are any
        args = (*args, {}) if not kwargs and args and isinstance(args[-1], dict) else args
        return torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
            custom_translation_table=translation_table(),
            verbose=False,
        )


def _save(model: "ir.Model", file: Path) -> bool:
    """Write the file, and say whether its weights needed another one."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = size > MAX_IN_ONE_FILE
    ir.save(model, file, format="protobuf", external_data=f"{file.name}.data" if external else None)
    return external


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks on itself (skipped registrations, deprecations inside torch) from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
