"""Quantizers on a residual add, without another ``forward``: ``out += Q(identity)``.

The add is a function in somebody's code. A layer whose output it takes knows that it comes next: the layer's hook says so, and
from there to the add every function that the block calls passes a ``TorchFunctionMode``. Hooks and modes are Python that
``torch.compile`` and ``torch.export`` follow.
"""

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lq.descriptor import QuantDescriptor
from lq.nn.quant_module import QuantModule
from lq.nn.tensor_quantizer import TensorQuantizer

ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})


class _Adding(TorchFunctionMode):
    """While a block runs: quantizes operands of the add that its last layer waits for."""

    def __init__(self) -> None:
        super().__init__()
        # what to do with which operand
        self.waiting: dict[int, TensorQuantizer] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.waiting and func.__name__ in ADDITIONS and _are_two_tensors(args):
            quantizers, self.waiting = self.waiting, {}
            args = tuple(quantizers[place](arg) if place in quantizers else arg for place, arg in enumerate(args))
        return func(*args, **(kwargs or {}))


def _are_two_tensors(args: tuple[Any, ...]) -> bool:
    return len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], Tensor)


class ShortcutHooks:
    """Hooks of a block and of its layers that end in a residual add."""

    def __init__(self) -> None:
        # one for each call of the block that is under way
        self.modes: list[_Adding] = []

    def enter(self, block: nn.Module, args: Any) -> None:
        """Before the block's ``forward``."""
        mode = _Adding()
        self.modes.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        """After it, and after an error in it."""
        self.modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def wait(self, layer: Any, args: Any, output: Any) -> None:
        """After the layer's ``forward``: the next add of two tensors takes its output."""
        if self.modes:
            places = {"residual": layer.shortcut_operand, "branch": 1 - layer.shortcut_operand}
            quantizers = layer.quantizers()
            self.modes[-1].waiting = {place: quantizers[role] for role, place in places.items() if role in quantizers}


def quantize_shortcut_(block: nn.Module, layer: QuantModule, operand: int, desc: QuantDescriptor, *, both: bool = False) -> None:
    """Quantize what is added to the output of ``layer``, in place.

    Args:
        block: calls ``layer`` and then the add in its ``forward``, or has them called there.
        layer: gets a ``residual_quantizer``; the first add of two tensors after it is the one.
        operand: place of the shortcut among the operands of the add, 0 or 1.
        desc: what to do with it.
        both: quantize the other operand too, that which comes from the layer, with a ``branch_quantizer``.
    """
    hooks = next((h for h in map(_hooks_of, block._forward_pre_hooks.values()) if h is not None), None)
    if hooks is None:
        hooks = ShortcutHooks()
        block.register_forward_pre_hook(hooks.enter)
        block.register_forward_hook(hooks.leave, always_call=True)
    roles = ("residual", "branch") if both else ("residual",)
    layer.make_quantizers(desc, *roles)
    for role in roles:
        layer.quantizers()[role].dynamic = False
    vars(layer)["shortcut_operand"] = operand
    layer.register_forward_hook(hooks.wait)


def leave_shortcuts_(model: nn.Module) -> None:
    """Take the quantizers of all shortcuts out again, in place."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _hooks_of(hook) is not None]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        if "shortcut_operand" in vars(module):
            del vars(module)["shortcut_operand"]


def _hooks_of(hook: Any) -> ShortcutHooks | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, ShortcutHooks) else None
