"""Quantizers on a residual add, without another ``forward``: ``out += Q(identity)``.

The add is a function in somebody's code. A layer whose output it takes knows that it comes next: the layer's hook says so, and
from there to the add every function that the block calls passes a ``TorchFunctionMode``. Hooks and modes are Python that
``torch.compile`` and ``torch.export`` follow.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lq.descriptor import QuantDescriptor
from lq.nn.modes import Modes
from lq.nn.quant_module import QuantModule
from lq.nn.tensor_quantizer import TensorQuantizer

ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})


class _Adding(TorchFunctionMode):
    """While a block runs: quantizes operands of the add that its last layer waits for."""

    def __init__(self) -> None:
        super().__init__()
        # what to do with which operand, and the shape that both of them have
        self.waiting: dict[int, TensorQuantizer] = {}
        self.shape: torch.Size | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.waiting and func.__name__ in ADDITIONS and self._are_awaited(args):
            quantizers, self.waiting = self.waiting, {}
            try:
                args = tuple(quantizers[place](arg) if place in quantizers else arg for place, arg in enumerate(args))
            except TypeError as error:
                # Python would ask the other operand to add, and then complain of unsupported ones
                raise ValueError(str(error)) from error
        return func(*args, **(kwargs or {}))

    def _are_awaited(self, args: tuple[Any, ...]) -> bool:
        return len(args) > 1 and all(isinstance(x, Tensor) and x.shape == self.shape for x in args[:2])


class ShortcutHooks:
    """Hooks of a block and of its layers that end in a residual add."""

    def __init__(self) -> None:
        self.modes: Modes[_Adding] = Modes()

    def enter(self, block: nn.Module, args: Any) -> None:
        """Before the block's ``forward``."""
        self.modes.enter(_Adding())

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        """After it, and after an error in it."""
        self.modes.leave()

    def wait(self, layer: Any, args: Any, output: Tensor) -> None:
        """After the layer's ``forward``: the next add of two tensors of its output's shape takes that."""
        mode = self.modes.current
        if mode is None:
            _refuse_recomputing(layer)
            return
        places = {"residual": layer.shortcut_operand, "branch": 1 - layer.shortcut_operand}
        quantizers = layer.quantizers()
        mode.waiting = {place: quantizers[role] for role, place in places.items() if role in quantizers}
        mode.shape = output.shape


def _refuse_recomputing(layer: nn.Module) -> None:
    """Raise ``RuntimeError`` where activation checkpointing runs a part of a block again: its add would stay in float."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{type(layer).__name__} ends in a residual add with a quantized shortcut, and runs again for its gradients without "
            "the block around it: checkpoint the whole block, as `checkpoint(block, x)`, not a part of its `forward`."
        )


def quantize_shortcut_(block: nn.Module, layer: QuantModule, operand: int, descriptors: dict[str, QuantDescriptor]) -> None:
    """Quantize what is added to the output of ``layer``, in place.

    Args:
        block: calls ``layer`` and then the add in its ``forward``, or has them called there.
        layer: gets the quantizers; the first add after it of two tensors of its output's shape is the one.
        operand: place of the shortcut among the operands of the add, 0 or 1.
        descriptors: what to do with the shortcut (``residual``), and with the other operand, what comes from the layer
            (``branch``); either, or both.
    """
    hooks = next((h for h in map(hooks_of, block._forward_pre_hooks.values()) if h is not None), None)
    if hooks is None:
        hooks = ShortcutHooks()
        block.register_forward_pre_hook(hooks.enter)
        block.register_forward_hook(hooks.leave, always_call=True)
    for role, desc in descriptors.items():
        layer.make_quantizers(desc, role)
        layer.quantizers()[role].dynamic = False
    vars(layer)["shortcut_operand"] = operand
    layer.register_forward_hook(hooks.wait)


def leave_shortcuts_(model: nn.Module) -> None:
    """Take the quantizers of all shortcuts out again, in place."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hooks_of(hook) is not None]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        if "shortcut_operand" in vars(module):
            del vars(module)["shortcut_operand"]


def hooks_of(hook: Any) -> ShortcutHooks | None:
    """What a hook of a module belongs to, if it is one of these."""
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, ShortcutHooks) else None
