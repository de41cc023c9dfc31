"""Where a runtime wants quantizers beyond the inputs of layers, found by running the model once.

TensorRT: with a quantizer on its shortcut a residual add runs inside the INT8 kernel of the convolution before it, and with one
scale for all that takes a tensor that kernel writes INT8 once (TensorRT, "Working with Quantized Types", Q/DQ layer-placement
recommendations). Nothing is placed between a layer and its BatchNorm or activation, nor on pooling, which quantization passes.

ONNX Runtime fuses no add into a convolution, and runs a convolution in INT8 only if its output is quantized at once (its
QLinearConv gives codes): both operands of the add are quantized, and it is a QLinearAdd.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lq.descriptor import QuantDescriptor, QuantRule
from lq.functional.grid import integer_bounds
from lq.graph import Flow, trace
from lq.nn.operations import Operation
from lq.nn.products import add_products_
from lq.nn.quant_module import QuantInputMixin
from lq.nn.residual import quantize_shortcut_
from lq.placed import of_shortcut
from lq.products import find_products
from lq.sharing import Site, find_shared, share_
from lq.shortcuts import find_shortcuts

TARGETS = ("tensorrt", "onnxruntime")


def place_(
    target: str, model: nn.Module, rules: Sequence[QuantRule], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Quantize the shortcuts of residual adds, and share the quantizers of what takes one tensor, in place.

    Args:
        target: one of :data:`TARGETS`.
        model: with quantized layers that are not calibrated yet.
        rules: those that they were quantized by.
        args: positional inputs of one forward.
        kwargs: keyword inputs of it.

    Returns:
        Residual adds that stay in float: why, by the name of the block.
    """
    flow = trace(model, args, dict(kwargs))
    shortcuts, left = find_shortcuts(flow, model)
    sites = list(_sites(flow))
    names = {module: name for name, module in model.named_modules()}
    for shortcut in shortcuts:
        descriptors = of_shortcut(rules, names[shortcut.layer], shortcut.layer, both=target == "onnxruntime")
        if descriptors:
            quantize_shortcut_(shortcut.block, shortcut.layer, shortcut.operand, descriptors)
        if "residual" in descriptors:
            sites += [(value, shortcut.layer, "residual") for value in shortcut.values]
    share_(model, find_shared(flow, sites))
    return left


def place_products_(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], classes: set[str]) -> dict[str, str]:
    """Give products of two activations modules that rules can quantize, in place.

    Args:
        model: in float.
        args: positional inputs of one forward.
        kwargs: keyword inputs of it.
        classes: names of :class:`lq.nn.QuantMatmul`, :class:`lq.nn.QuantScaledDotProductAttention`, or both.

    Returns:
        Blocks that are left in float: why, by name.
    """
    found, left = find_products(trace(model, args, dict(kwargs)), classes)
    for block, functions in found.items():
        add_products_(block, functions)
    names = {module: name for name, module in model.named_modules()}
    return {names[block]: reason for block, reason in left.items()}


def _sites(flow: Flow) -> list[Site]:
    """The quantizers of what layers and operations take."""
    sites: list[Site] = []
    for call in flow.calls:
        if isinstance(call.target, Operation):
            sites += [(call.inputs[place], call.target, role) for role, place in call.target.operands.items()]
        elif isinstance(call.target, QuantInputMixin) and len(call.inputs) == 1:
            sites.append((call.inputs[0], call.target, "input"))
    return sites


def check_target(target: str | None, rules: list[QuantRule]) -> None:
    """Raise ``ValueError`` for a target that does not exist, or rules that it has no kernels or no place for.

    >>> check_target("trt", [])
    Traceback (most recent call last):
      ...
    ValueError: `target` is 'trt': choose 'tensorrt' or 'onnxruntime', or None.
    """
    if target not in (None, *TARGETS):
        raise ValueError(f"`target` is {target!r}: choose {' or '.join(map(repr, TARGETS))}, or None.")
    if target == "tensorrt":
        check_for_tensorrt(rules)


def check_for_tensorrt(rules: list[QuantRule]) -> None:
    """Raise ``ValueError`` for descriptors that TensorRT has no kernels for.

    >>> check_for_tensorrt([QuantRule("*", input=QuantDescriptor(num_bits=16))])
    Traceback (most recent call last):
      ...
    ValueError: The rule '*' has `input` with `num_bits=16`, but TensorRT takes at most 8 bits, or (4, 3).
    """
    for rule in rules:
        for name, desc in (("input", rule.input), ("weight", rule.weight)):
            if desc is not None and (problem := _problem(desc, name == "weight")) is not None:
                raise ValueError(f"The rule {rule.pattern!r} has `{name}` with {problem}.")


def _problem(desc: QuantDescriptor, weight: bool) -> str | None:
    bits = desc.num_bits
    if isinstance(bits, tuple):
        if bits != (4, 3):
            return f"`num_bits={bits}`, but TensorRT's FP8 is E4M3: (4, 3)"
    elif bits > 8:
        return f"`num_bits={bits}`, but TensorRT takes at most 8 bits, or (4, 3)"
    elif integer_bounds(bits, desc.unsigned)[1] > 127:
        return f"`unsigned=True` and `num_bits={bits}`, but TensorRT's codes are signed: use 7 bits at most"
    if desc.block_size is not None:
        fits = weight and bits == 4 and desc.axis == 0
        return None if fits else f"`block_size={desc.block_size}`, which TensorRT takes for 4-bit weights with `axis=0` only"
    if desc.axis is not None and (not weight or desc.axis not in (0, (0,))):
        remedy = "axis 0, that of the outputs" if weight else "one scale per tensor: `axis=None`"
        return f"`axis={desc.axis}`, but TensorRT takes {remedy}"
    return None
