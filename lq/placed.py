"""What :mod:`lq.placement` found, by names: another model of the same class gets it without a run."""

from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from lq.nn.products import add_products_, product_blocks
from lq.nn.quant_module import QuantModule
from lq.nn.residual import hooks_of, quantize_shortcut_
from lq.nn.tensor_quantizer import TensorQuantizer
from lq.sharing import share_


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

    def place_(self, model: nn.Module) -> None:
        """Quantize the shortcuts and share quantizers, in place: after layers were quantized.

        Raises:
            ValueError: a block or layer that the model does not have, or that has no quantizers.
        """
        for block, name, operand, both in self.shortcuts:
            layer = _layer(model, name)
            desc = layer.quantizers()["input"].quant_desc
            quantize_shortcut_(_child(model, block), layer, operand, desc, both=both)
        share_(model, [[_site(model, name) for name in group] for group in self.shared])


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
