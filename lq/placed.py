"""What :mod:`lq.placement` found, by names: another model of the same class gets it without a run."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lq.descriptor import QuantDescriptor, QuantRule
from lq.nn.convert import float_class_of
from lq.nn.products import add_products_, product_blocks
from lq.nn.quant_module import QuantModule
from lq.nn.residual import hooks_of, quantize_shortcut_
from lq.nn.tensor_quantizer import TensorQuantizer
from lq.sharing import share_

# Quantizers of a residual add belong to the layer before it: one for the shortcut, one for what the layer gives.
SHORTCUT_ROLES = ("residual", "branch")


@dataclass(frozen=True)
class Placement:
    """Quantizers beyond the inputs and weights of layers, in plain types.

    Attributes:
        products: functions by the names of their blocks, as :func:`lq.nn.products.add_products_` takes them.
        shortcuts: block, layer, place of the shortcut among the operands, and whether both operands are quantized.
        shared: short names of quantizers that are one, by groups.
    """

    products: dict[str, list[str | None]]
    shortcuts: list[tuple[str, str, int, bool]]
    shared: list[list[str]]

    def place_products_(self, model: nn.Module) -> None:
        """Give products of functions their modules, in place: before layers are quantized.

        Raises:
            ValueError: a block that the model does not have.
        """
        for block, functions in self.products.items():
            add_products_(_child(model, block), functions)

    def place_(self, model: nn.Module, rules: Sequence[QuantRule]) -> None:
        """Quantize the shortcuts and share quantizers, in place: after layers were quantized, by the same rules.

        Raises:
            ValueError: a block or layer that the model does not have, or that has no quantizers.
        """
        for block, name, operand, both in self.shortcuts:
            layer = _layer(model, name)
            if descriptors := of_shortcut(rules, name, layer, both=both):
                quantize_shortcut_(_child(model, block), layer, operand, descriptors)
        share_(model, [[_site(model, name) for name in group] for group in self.shared])


def of_shortcut(rules: Sequence[QuantRule], name: str, layer: QuantModule, *, both: bool) -> dict[str, QuantDescriptor]:
    """Descriptors of a residual add by the roles of its quantizers: those of the layer's input, unless a rule names the role.

    Args:
        rules: those that the layer was quantized by.
        name: the layer's; a role's is ``<name>.residual`` or ``<name>.branch``.
        layer: the quantized layer before the add.
        both: ``branch`` too.
    """
    own: QuantDescriptor = layer.quantizers()["input"].quant_desc
    kind = float_class_of(layer).__name__
    of_kind = [rule for rule in rules if rule.types is None or kind in rule.types]
    found: dict[str, QuantDescriptor | None] = {}
    for role in SHORTCUT_ROLES if both else SHORTCUT_ROLES[:1]:
        for rule in of_kind:
            if fnmatchcase(name, rule.pattern):
                found[role] = own
            elif fnmatchcase(f"{name}.{role}", rule.pattern):
                found[role] = rule.input
    return {role: desc for role, desc in found.items() if desc is not None}


def placement_of(model: nn.Module) -> Placement:
    """What a model has of it.

    >>> placement_of(nn.ReLU())
    Placement(products={}, shortcuts=[], shared=[])
    """
    names = {module: name for name, module in model.named_modules()}
    products = {names[block]: list(hooks.functions) for block, hooks in product_blocks(model)}
    blocks = {hooks_of(hook): name for module, name in names.items() for hook in module._forward_pre_hooks.values()}
    shortcuts: list[tuple[str, str, int, bool]] = []
    shared: dict[TensorQuantizer, list[str]] = defaultdict(list)
    for module, name in names.items():
        if not isinstance(module, QuantModule):
            continue
        for role, quantizer in module.quantizers().items():
            shared[quantizer].append(f"{name}.{role}".strip("."))
        for hook in module._forward_hooks.values():
            if (hooks := hooks_of(hook)) is not None:
                shortcuts.append((blocks[hooks], name, vars(module)["shortcut_operand"], "branch" in module.quantizers()))
    return Placement(products, shortcuts, [names for names in shared.values() if len(names) > 1])


def _site(model: nn.Module, name: str) -> tuple[QuantModule, str]:
    owner, _, role = name.rpartition(".")
    return _layer(model, owner), role


def _child(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no module `{name}`, where a quantizer belongs: it is another model."
        ) from None


def _layer(model: nn.Module, name: str) -> QuantModule:
    layer = _child(model, name)
    if not isinstance(layer, QuantModule):
        raise ValueError(f"`{name}` is a {type(layer).__name__}, which has no quantizers: the model, or its rules, are others.")
    return layer
