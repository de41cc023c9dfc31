"""What :mod:`lq.placement` found, by names: another model of the same class gets it without a run."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from lq.nn.products import ProductHooks, add_products_
from lq.nn.quant_module import QuantModule
from lq.nn.residual import ShortcutHooks, quantize_shortcut_
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
        """Give products of functions their modules, in place: before layers are quantized."""
        for block, functions in self.products.items():
            add_products_(model.get_submodule(block), functions)

    def place_(self, model: nn.Module) -> None:
        """Quantize the shortcuts and share quantizers, in place: after layers were quantized."""
        for block, name, operand, both in self.shortcuts:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantModule)
            desc = layer.quantizers()["input"].quant_desc
            quantize_shortcut_(model.get_submodule(block), layer, operand, desc, both=both)
        share_(model, [[_site(model, name) for name in group] for group in self.shared])


def placement_of(model: nn.Module) -> Placement:
    """What a model has of it.

    >>> placement_of(nn.ReLU())
    Placement(products={}, shortcuts=[], shared=[])
    """
    blocks: dict[Any, str] = {}
    products: dict[str, list[str | None]] = {}
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            hooks = getattr(hook, "__self__", None)
            if isinstance(hooks, ShortcutHooks):
                blocks[hooks] = name
            elif isinstance(hooks, ProductHooks) and hook == hooks.enter:
                products[name] = list(hooks.functions)
    shortcuts: list[tuple[str, str, int, bool]] = []
    shared: dict[TensorQuantizer, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if not isinstance(module, QuantModule):
            continue
        for role, quantizer in module.quantizers().items():
            shared[quantizer].append(f"{name}.{role}".strip("."))
        for hook in module._forward_hooks.values():
            if (hooks := getattr(hook, "__self__", None)) in blocks:
                shortcuts.append((blocks[hooks], name, vars(module)["shortcut_operand"], "branch" in module.quantizers()))
    return Placement(products, shortcuts, [names for names in shared.values() if len(names) > 1])


def _site(model: nn.Module, name: str) -> tuple[QuantModule, str]:
    owner, _, role = name.rpartition(".")
    module = model.get_submodule(owner)
    assert isinstance(module, QuantModule)
    return module, role
