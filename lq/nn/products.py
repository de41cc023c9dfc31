"""Quantized matrix products where a block's ``forward`` calls functions: ``q @ k.mT`` without another ``forward``.

A block gets a module for each of its products, and a ``TorchFunctionMode``, active while it runs, that calls them in order. Only
calls of the block's own code are counted: while a module inside of it runs, the mode waits.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from lq.nn.operations import Operation, QuantMatmul, QuantScaledDotProductAttention

# What stands for which function, of those that are called with their operands first.
PRODUCTS: dict[str, type[Operation]] = {
    **dict.fromkeys(("matmul", "__matmul__", "bmm"), QuantMatmul),
    "scaled_dot_product_attention": QuantScaledDotProductAttention,
}


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
        return func(*args, **kwargs) if name is None else getattr(self.block, name)(*args, **kwargs)


class ProductHooks:
    """Hooks of a block whose products are modules: ``names`` of these, in order; ``None`` for a product that stays."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = list(names)
        # one for each call of the block that is under way
        self.modes: list[_Multiplying] = []

    def enter(self, block: nn.Module, args: Any) -> None:
        """Before the block's ``forward``."""
        mode = _Multiplying(self, block)
        self.modes.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        """After it, and after an error in it (then there is no output)."""
        mode = self.modes.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is not None and mode.count != len(self.names):
            raise RuntimeError(
                f"{type(block).__name__} had {len(self.names)} matrix products when they were quantized, and {mode.count} now: "
                "their quantizers would be mixed up. Leave this block out with a rule, or write its products as modules."
            )

    def wait(self, module: nn.Module, args: Any) -> None:
        """Before the ``forward`` of a module inside of the block."""
        if self.modes:
            self.modes[-1].inside += 1

    def resume(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it."""
        if self.modes:
            self.modes[-1].inside -= 1


def add_products_(block: nn.Module, functions: Sequence[str | None]) -> list[str]:
    """Give a block a module, in float so far, for each product, in place.

    Args:
        block: calls the products in its ``forward``.
        functions: names of the functions that it calls, of :data:`PRODUCTS`, in order; ``None`` for one that stays as it is.

    Returns:
        Names of the new children: ``matmul``, ``matmul_1``, ``scaled_dot_product_attention``.
    """
    hooks, inside = ProductHooks([]), [m for m in block.modules() if m is not block]
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


def remove_products_(model: nn.Module) -> None:
    """Take all of them out again, in place."""
    for module in list(model.modules()):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                owner = getattr(hook, "__self__", None)
                if isinstance(owner, ProductHooks):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)
                    if hook == owner.enter:
                        for name in filter(None, owner.names):
                            delattr(module, name)
