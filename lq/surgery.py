"""Verbs on a whole model: place quantizers, freeze them, take them out again."""

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from lq.descriptor import QuantRule, Rules, resolve_rules
from lq.float_operations import FloatOperation as FloatOperation
from lq.float_operations import float_operations as float_operations
from lq.functional.blocks import split_blocks
from lq.nn.convert import float_class_of, is_quantizable, is_unknown, to_float_, to_quantized_
from lq.nn.elsewhere import register_known
from lq.nn.example import example_inputs
from lq.nn.fast_paths import leave_fast_paths_, take_fast_paths_
from lq.nn.products import remove_products_
from lq.nn.quant_module import ON_REQUEST, QUANT_MODULES, QuantModule
from lq.nn.residual import leave_shortcuts_
from lq.nn.tensor_quantizer import TensorQuantizer
from lq.placed import SHORTCUT_ROLES, Placement
from lq.placement import check_target, place_, place_products_
from lq.products import is_for_products, named_products
from lq.sharing import leave_sharing_

M = TypeVar("M", bound=nn.Module)

# Where a model has the rules that it was quantized by.
PLACED_BY = "_lq_rules"


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


def quantize_(
    model: M, rules: Rules = "int8", *, target: str | None = None, args: Any = (), kwargs: Mapping[str, Any] | None = None
) -> M:
    """Put quantizers into ``model``, in place, as the rules say; the last rule that matches a module wins.

    Modules keep their identity, parameters and hooks. Until they are calibrated the new quantizers pass their input through,
    so the model still computes what it did.

    With ``target="tensorrt"`` the model runs once, in evaluation, so that quantizers are where TensorRT's fused kernels want them
    (:mod:`lq.placement`): a residual add behind a quantized convolution gets one on its shortcut, ``<convolution>.residual``,
    and layers that take one tensor, as it is or concatenated with others, share one. Where a rule names
    ``QuantScaledDotProductAttention`` or ``QuantMatmul`` in its ``types``, as the preset ``int8_attention`` does, the products of
    two activations that a ``forward`` computes by functions are such modules, children of its own module.

    Args:
        model: any module.
        rules: a preset's name (``int8``, ``int8_attention``, ``int8_per_tensor``, ``int8_weight_only``, ``w4a8``, ``w4a16``,
            ``w4a4``, ``w3a3``, ``w2a2``, ``fp8``), a :class:`QuantRule`, or a list of them.
        target: ``"tensorrt"``; ``"onnxruntime"``, which differs in that both operands of a residual add are quantized,
            ``<convolution>.branch`` too; or ``None``: inputs and weights of layers only.
        args: positional inputs of one forward, a tuple or the only one, with a target; by default the model's
            ``example_input_array``, as a ``LightningModule`` has it.
        kwargs: keyword inputs of that forward.

    Returns:
        ``model``.

    Raises:
        ValueError: a pattern that matches no quantizable module, an unknown preset, a ``block_size`` that does not divide a
            weight's last dimension, a model without quantizable modules, or one that has quantized layers already; an unknown
            target, one without example inputs, or descriptors that it has no kernels for.

    Warns:
        UserWarning: layers that the rules are for but that have no quantized class (``nn.GRU``, a subclass of ``nn.Conv2d``), by
            name; residual adds that stay in float for TensorRT, by name, and why.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> quantizers = dict(named_quantizers(quantize_(model)))
    >>> list(quantizers)
    ['0.input', '0.weight', '2.input', '2.weight']
    """
    resolved = resolve_rules(rules)
    check_target(target, resolved)
    _check_quantizable(model)
    if target is None:
        with _undone_on_error(model):
            _quantize(model, resolved)
        return model
    example = example_inputs(model, args, kwargs, f"`target={target!r}` has the model run once")
    left = place_products_(model, *example, named_products(resolved))
    with _undone_on_error(model):
        _quantize(model, resolved, targeted=True)
        remove_products_(model, idle=True)
        left |= place_(target, model, resolved, *example)
    if left:
        reasons = "; ".join(f"`{name or type(model).__name__}`: {reason}" for name, reason in left.items())
        warnings.warn(f"Left in float for {target} ({reasons}). By hand: lq.nn.QuantAdd, lq.nn.QuantMatmul.", stacklevel=2)
    return model


def quantize_as_(model: M, rules: Rules, placement: Placement) -> M:
    """:func:`quantize_` for a target, as another model was: without example inputs."""
    _check_quantizable(model)
    placement.place_products_(model)
    with _undone_on_error(model):
        resolved = resolve_rules(rules)
        _quantize(model, resolved, targeted=True)
        remove_products_(model, idle=True)
        placement.place_(model, resolved)
    return model


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except BaseException:
        dequantize_(model)
        raise


def _check_quantizable(model: nn.Module) -> None:
    if has_quantized_layers(model):
        raise ValueError("The model has quantized layers already: call `lq.dequantize_` before placing others.")
    register_known(model)
    if not any(is_quantizable(m) for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no quantizable layer: known are "
            f"{', '.join(c.__name__ for c in QUANT_MODULES)}; others need `lq.nn.register`. A model that is built in "
            "`setup` must exist before: build it in `__init__` or `configure_model`."
        )


def _quantize(model: nn.Module, rules: list[QuantRule], targeted: bool = False) -> None:
    layers = {name: m for name, m in model.named_modules() if is_quantizable(m)}
    unknown = {name: m for name, m in model.named_modules() if is_unknown(m)}
    chosen = _choose(rules, layers, unknown, targeted)
    if all(map(_is_float, chosen.values())):
        raise ValueError("The rules leave every layer in float: give at least one an `input` or a `weight` descriptor.")
    for name, rule in chosen.items():
        if not _is_float(rule):
            layer = to_quantized_(layers[name], rule.input, rule.weight)
            _check_blocks(name, layer, rule)
            for quantizer in layer.quantizers().values():
                quantizer.dynamic = False
    leave_fast_paths_(model)
    remember_rules_(model, rules)
    _warn_of(unknown, rules)


def _choose(
    rules: list[QuantRule], layers: dict[str, nn.Module], unknown: dict[str, nn.Module], targeted: bool
) -> dict[str, QuantRule]:
    chosen: dict[str, QuantRule] = {}
    for rule in rules:
        matches = _matching(rule, layers)
        if not (matches or (_is_float(rule) and _matching(rule, unknown)) or (targeted and _is_for_a_target(rule, layers))):
            raise ValueError(_unmatched(rule, layers))
        chosen.update(dict.fromkeys(matches, rule))
    return chosen


def _matching(rule: QuantRule, layers: dict[str, nn.Module]) -> list[str]:
    return [name for name, module in layers.items() if _matches(rule, name, float_class_of(module))]


def _is_for_a_target(rule: QuantRule, layers: dict[str, nn.Module]) -> bool:
    """Whether a rule is for what is found by a run: products, of which the model may have none, and residual adds, likewise."""
    return is_for_products(rule) or any(fnmatchcase(f"{name}.{role}", rule.pattern) for name in layers for role in SHORTCUT_ROLES)


def _is_float(rule: QuantRule) -> bool:
    return rule.input is None and rule.weight is None


def _warn_of(unknown: dict[str, nn.Module], rules: list[QuantRule]) -> None:
    last = {name: rule for rule in rules for name in _matching(rule, unknown)}
    left = [f"`{name}` ({type(unknown[name]).__name__})" for name, rule in last.items() if not _is_float(rule)]
    if left:
        warnings.warn(
            f"Left in float, having no quantized class: {', '.join(left)}. One of your own: `lq.nn.register`. If that is as it "
            "should be, say so with a rule: `QuantRule(name)`.",
            stacklevel=4,
        )


def _unmatched(rule: QuantRule, layers: dict[str, nn.Module]) -> str:
    if is_for_products(rule):
        known = "products that a `forward` computes by functions are found with a `target` only"
    elif named := [float_class_of(module) for name, module in layers.items() if fnmatchcase(name, rule.pattern)]:
        known = f"their classes are {', '.join(sorted({kind.__name__ for kind in named}))}"
    else:
        known = f"the closest are {difflib.get_close_matches(rule.pattern, layers, n=3, cutoff=0.0)}"
    of_types = "" if rule.types is None else f" of types {', '.join(rule.types)}"
    return f"The rule's pattern {rule.pattern!r} matches no quantizable layer{of_types}: {known}."


def _check_blocks(name: str, layer: QuantModule, rule: QuantRule) -> None:
    if rule.weight is None or rule.weight.block_size is None:
        return
    for role, weight in layer.weights().items():
        try:
            split_blocks(weight, rule.weight.block_size)
        except ValueError as error:
            raise ValueError(f"`{name}.{role}`: {error}") from None


def _matches(rule: QuantRule, name: str, kind: type[nn.Module]) -> bool:
    if not fnmatchcase(name, rule.pattern):
        return False
    return rule.pattern == name or kind not in ON_REQUEST if rule.types is None else kind.__name__ in rule.types


def dequantize_(model: M) -> M:
    """Take all quantizers out again, in place. Weights are as trained; inserted SmoothQuant factors go back into them."""
    for module in list(model.modules()):
        if type(module) in QUANT_MODULES.values():
            to_float_(module)
    leave_shortcuts_(model)
    leave_sharing_(model)
    remove_products_(model)
    take_fast_paths_(model)
    vars(model).pop(PLACED_BY, None)
    return model


def remember_rules_(model: nn.Module, rules: Sequence[QuantRule]) -> None:
    """Have a model know by which rules its quantizers were placed, in place; its copies know it too."""
    vars(model)[PLACED_BY] = tuple(rules)


def rules_of(model: nn.Module) -> list[QuantRule] | None:
    """The rules that a model was quantized by, or ``None``: it is in float, or was quantized layer by layer.

    >>> rules_of(quantize_(nn.Linear(2, 2), "w4a8"))[0].weight.num_bits
    4
    """
    rules = vars(model).get(PLACED_BY)
    return None if rules is None else list(rules)


# Freezing


def freeze_(model: M) -> M:
    """Let no amax change any more, in place, those of quantizers that are disabled at present too."""
    _set_frozen(model, True)
    return model


def unfreeze_(model: M) -> M:
    """Let amax change again, in place."""
    _set_frozen(model, False)
    return model


def _set_frozen(model: nn.Module, frozen: bool) -> None:
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.frozen = frozen
