"""Quantized matrix products where a block's ``forward`` calls functions: ``q @ k.mT`` without another ``forward``.

A block gets a module for each of its products, and a ``TorchFunctionMode``, active while it runs, that calls them in order. Only
calls of the block's own code are counted: while a module inside of it runs, the mode waits.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from lq.nn.modes import Modes
from lq.nn.operations import Operation, QuantMatmul, QuantScaledDotProductAttention

# What stands for which function.
PRODUCTS: dict[str, type[Operation]] = {
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), QuantMatmul),
    "scaled_dot_product_attention": QuantScaledDotProductAttention,
}
# Names of the operands, and what else torch calls them.
OPERANDS: dict[type[Operation], tuple[str, ...]] = {
    operation: tuple(inspect.signature(operation.forward).parameters)[1 : len(operation.operands) + 1]
    for operation in (QuantMatmul, QuantScaledDotProductAttention)
}
ALIASES = {"mat2": "other", "tensor2": "other"}


def operands_first(function: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a product with all of its operands by place.

    >>> operands_first("bmm", (1,), {"mat2": 2})
    ((1, 2), {})
    """
    named = {ALIASES.get(name, name): value for name, value in kwargs.items()}
    by_name = OPERANDS[PRODUCTS[function]][len(args) :]
    return (*args, *(named.pop(name) for name in by_name)), named


class _Multiplying(TorchFunctionMode):
    """While a block runs: calls its modules instead of functions."""

    def __init__(self, hooks: "ProductHooks", block: nn.Module) -> None:
        super().__init__()
        self.hooks, self.block = hooks, block
        # products so far, and modules of the block that are running
        self.count = self.inside = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside or func.__name__ not in PRODUCTS:
            return func(*args, **kwargs)
        name = self.hooks.names[self.count] if self.count < len(self.hooks.names) else None
        self.count += 1
        if name is None:
            return func(*args, **kwargs)
        args, kwargs = operands_first(func.__name__, args, kwargs)
        return getattr(self.block, name)(*args, **kwargs)


class ProductHooks:
    """Hooks of a block whose products are modules: ``names`` of these, in order; ``None`` for a product that stays.

    ``functions`` are what :func:`add_products_` was given.
    """

    def __init__(self, functions: Sequence[str | None]) -> None:
        self.functions = list(functions)
        self.names: list[str | None] = []
        self.modes: Modes[_Multiplying] = Modes()

    def enter(self, block: nn.Module, args: Any) -> None:
        """Before the block's ``forward``."""
        self.modes.enter(_Multiplying(self, block))

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        """After it, and after an error in it (then there is no output)."""
        mode = self.modes.leave()
        if output is not None and mode.count != len(self.names):
            raise RuntimeError(
                f"{type(block).__name__} had {len(self.names)} matrix products when they were quantized, and {mode.count} now: "
                "their quantizers would be mixed up. Leave this block out with a rule, or write its products as modules."
            )

    def wait(self, module: nn.Module, args: Any) -> None:
        """Before the ``forward`` of a module inside of the block."""
        if (mode := self.modes.current) is not None:
            mode.inside += 1

    def resume(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it."""
        if (mode := self.modes.current) is not None:
            mode.inside -= 1


def add_products_(block: nn.Module, functions: Sequence[str | None]) -> list[str]:
    """Give a block a module, in float so far, for each product, in place.

    Args:
        block: calls the products in its ``forward``.
        functions: names of the functions that it calls, of :data:`PRODUCTS`, in order; ``None`` for one that stays as it is.

    Returns:
        Names of the new children: ``matmul``, ``matmul_1``, ``scaled_dot_product_attention``.
    """
    hooks, inside = ProductHooks(functions), [m for m in block.modules() if m is not block]
    for function in functions:
        hooks.names.append(None if function is None else _add_(block, function))
    for module in inside:
        module.register_forward_pre_hook(hooks.wait)
        module.register_forward_hook(hooks.resume, always_call=True)
    block.register_forward_pre_hook(hooks.enter)
    block.register_forward_hook(hooks.leave, always_call=True)
    return [name for name in hooks.names if name is not None]


def _add_(block: nn.Module, function: str) -> str:
    first = function.strip("_").replace("bmm", "matmul")
    name, number = first, 0
    while hasattr(block, name):
        number += 1
        name = f"{first}_{number}"
    block.add_module(name, PRODUCTS[function](quant_desc_input=None))
    return name


def remove_products_(model: nn.Module, *, idle: bool = False) -> None:
    """Take all of them out again, in place; with ``idle`` only those that no rule has quantized."""
    for block, hooks in [*product_blocks(model)]:
        for place, name in enumerate(hooks.names):
            if name is not None and not (idle and _is_quantized(block.get_submodule(name))):
                delattr(block, name)
                hooks.names[place] = None
        if not any(hooks.names):
            _remove_hooks_(block, hooks)


def product_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, ProductHooks]]:
    """Blocks with products that are modules."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            hooks = getattr(hook, "__self__", None)
            if isinstance(hooks, ProductHooks) and hook == hooks.enter:
                yield module, hooks


def _is_quantized(operation: nn.Module) -> bool:
    return isinstance(operation, Operation) and not all(q._disabled for q in operation.quantizers().values())


def _remove_hooks_(block: nn.Module, hooks: ProductHooks) -> None:
    for module in block.modules():
        for kept in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in kept.items() if getattr(hook, "__self__", None) is hooks]:
                del kept[key]
                module._forward_hooks_always_called.pop(key, None)
