"""Verbs on a whole model: place quantizers, freeze them, take them out again."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import Tensor, nn

from lq.descriptor import QuantRule, Rules, resolve_rules
from lq.float_operations import FloatOperation as FloatOperation
from lq.float_operations import float_operations as float_operations
from lq.functional.blocks import split_blocks
from lq.nn.convert import float_class_of, is_quantizable, to_float_, to_quantized_
from lq.nn.elsewhere import register_known
from lq.nn.fast_paths import leave_fast_paths_, take_fast_paths_
from lq.nn.quant_module import ON_REQUEST, QUANT_MODULES, QuantModule
from lq.nn.tensor_quantizer import TensorQuantizer

M = TypeVar("M", bound=nn.Module)


def named_quantizers(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Every enabled quantizer with its short name: ``layer1.conv1.input``, ``layer1.conv1.weight``."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and not module._disabled:
            yield name.removesuffix("_quantizer"), module


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has any enabled quantizer."""
    return any(True for _ in named_quantizers(model))


def has_quantized_layers(model: nn.Module) -> bool:
    """Whether any layer has an enabled quantizer (one alone in a ``forward`` does not count, nor an operation made with one)."""
    modules = (m for m in model.modules() if isinstance(m, QuantModule) and is_quantized(m))
    # an operation may quantize from the start; then its quantizers are dynamic
    return any(type(m) not in QUANT_MODULES or not all(q.dynamic for q in m.quantizers().values()) for m in modules)


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """The model computes in float inside the block; quantizers still collect if they are told to."""
    switches = [(quantizer, quantizer._if_quant) for _, quantizer in named_quantizers(model)]
    for quantizer, _ in switches:
        quantizer.disable_quant()
    try:
        yield
    finally:
        for quantizer, if_quant in switches:
            quantizer._if_quant = if_quant


# Placing and removing


def quantize_(model: M, rules: Rules = "int8") -> M:
    """Put quantizers into ``model``, in place, as the rules say; the last rule that matches a module wins.

    Modules keep their identity, parameters and hooks. Until they are calibrated the new quantizers pass their input through,
    so the model still computes what it did.

    Args:
        model: any module.
        rules: a preset's name (``int8``, ``int8_per_tensor``, ``int8_weight_only``, ``w4a8``, ``w4a16``,
            ``fp8``) or a list of :class:`QuantRule`.

    Returns:
        ``model``.

    Raises:
        ValueError: a pattern that matches no quantizable module, an unknown preset, a ``block_size`` that does not divide a
            weight's last dimension, a model without quantizable modules, or one that has quantized layers already.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> quantizers = dict(named_quantizers(quantize_(model)))
    >>> list(quantizers)
    ['0.input', '0.weight', '2.input', '2.weight']
    """
    if has_quantized_layers(model):
        raise ValueError("The model has quantized layers already: call `lq.dequantize_` before placing others.")
    register_known(model)
    targets = {name: m for name, m in model.named_modules() if is_quantizable(m)}
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no quantizable layer: known are "
            f"{', '.join(c.__name__ for c in QUANT_MODULES)}; others need `lq.nn.register`. A model that is built in "
            "`setup` must exist before: build it in `__init__` or `configure_model`."
        )
    chosen = _choose(resolve_rules(rules), targets)
    for name, rule in chosen.items():
        _check_blocks(name, targets[name], rule)
    for name, rule in chosen.items():
        if rule.input is not None or rule.weight is not None:
            for quantizer in to_quantized_(targets[name], rule.input, rule.weight).quantizers().values():
                quantizer.dynamic = False
    if not is_quantized(model):
        raise ValueError("The rules leave every layer in float: give at least one an `input` or a `weight` descriptor.")
    leave_fast_paths_(model)
    return model


def _choose(rules: list[QuantRule], targets: dict[str, nn.Module]) -> dict[str, QuantRule]:
    chosen: dict[str, QuantRule] = {}
    for rule in rules:
        matches = [name for name, module in targets.items() if _matches(rule, name, float_class_of(module))]
        if not matches:
            close = difflib.get_close_matches(rule.pattern, targets, n=3, cutoff=0.0)
            of_types = "" if rule.types is None else f" of types {', '.join(rule.types)}"
            raise ValueError(
                f"The rule's pattern {rule.pattern!r} matches no quantizable layer{of_types}: the closest are {close}."
            )
        chosen.update(dict.fromkeys(matches, rule))
    return chosen


def _check_blocks(name: str, module: nn.Module, rule: QuantRule) -> None:
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and rule.weight is not None and rule.weight.block_size is not None:
        try:
            split_blocks(weight, rule.weight.block_size)
        except ValueError as error:
            raise ValueError(f"`{name}.weight`: {error}") from None


def _matches(rule: QuantRule, name: str, kind: type[nn.Module]) -> bool:
    if not fnmatchcase(name, rule.pattern):
        return False
    return rule.pattern == name or kind not in ON_REQUEST if rule.types is None else kind.__name__ in rule.types


def dequantize_(model: M) -> M:
    """Take all quantizers out again, in place. Weights are as trained; inserted SmoothQuant factors go back into them."""
    for module in list(model.modules()):
        if type(module) in QUANT_MODULES.values():
            to_float_(module)
    take_fast_paths_(model)
    return model


# Freezing


def freeze_(model: M) -> M:
    """Let no amax change any more, in place."""
    for _, quantizer in named_quantizers(model):
        quantizer.frozen = True
    return model


def unfreeze_(model: M) -> M:
    """Let amax change again, in place."""
    for _, quantizer in named_quantizers(model):
        quantizer.frozen = False
    return model
