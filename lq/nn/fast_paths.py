"""The fused attention and encoders of torch: in evaluation they read the weights of their layers and never call them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lq.nn.convert import to_float_, to_quantized_
from lq.nn.tensor_quantizer import TensorQuantizer

# Classes of torch with a fused path of their own in evaluation, the attribute that allows it, and the value that does not.
FAST_PATHS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def leave_fast_paths_(model: nn.Module) -> None:
    """Have layers called whose quantizers do anything, in place."""
    for module in list(model.modules()):
        if all(m._disabled and m.idle for m in module.modules() if isinstance(m, TensorQuantizer)):
            continue
        if type(module) is nn.MultiheadAttention:
            to_quantized_(module)
        _switch_off(module)


def take_fast_paths_(model: nn.Module) -> None:
    """Undo :func:`leave_fast_paths_`, but for the classes of attention, in place."""
    for module in model.modules():
        for _, switch, _ in FAST_PATHS:
            if f"_float_{switch}" in vars(module):
                setattr(module, switch, vars(module).pop(f"_float_{switch}"))


@contextmanager
def without_fast_paths(model: nn.Module) -> Iterator[None]:
    """Every layer is called inside the block, once something is hooked to it."""
    modules = list(model.modules())
    switched = [module for module in modules if _switch_off(module)]
    attentions = [to_quantized_(module) for module in modules if type(module) is nn.MultiheadAttention]
    try:
        yield
    finally:
        for attention in attentions:
            to_float_(attention)
        for module in switched:
            take_fast_paths_(module)


def _switch_off(module: nn.Module) -> bool:
    """Whether it was on."""
    found = [(switch, off) for kind, switch, off in FAST_PATHS if isinstance(module, kind)]
    found = [(switch, off) for switch, off in found if f"_float_{switch}" not in vars(module)]
    for switch, off in found:
        vars(module)[f"_float_{switch}"] = getattr(module, switch)
        setattr(module, switch, off)
    return bool(found)
