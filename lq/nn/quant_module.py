"""How a module gets quantizers: mixins, and the registry of which quantized class stands for which float class.

A float module becomes a quantized one by taking on the quantized class: the object stays the same, and with it its parameters,
hooks, tied weights, and every reference to it.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lq.descriptor import INT8_WEIGHT, QuantDescriptor
from lq.nn.tensor_quantizer import TensorQuantizer

QUANT_MODULES: dict[type[nn.Module], type["QuantInputMixin"]] = {}

M = TypeVar("M", bound=type["QuantInputMixin"])


def register(float_class: type[nn.Module]) -> Callable[[M], M]:
    """Class decorator: :func:`lq.quantize_` turns modules of exactly ``float_class`` into the decorated class."""

    def decorate(quant_class: M) -> M:
        if not issubclass(quant_class, float_class):
            raise TypeError(f"{quant_class.__name__} must subclass {float_class.__name__}, whose modules it takes over.")
        QUANT_MODULES[float_class] = quant_class
        return quant_class

    return decorate


class QuantInputMixin(nn.Module):
    """A module whose input is quantized. Subclass it before the float class, and quantize in ``forward``.

    Descriptors come as the keyword ``quant_desc_input`` after the float class's own arguments, or from the class's default.
    """

    default_quant_desc_input: ClassVar[QuantDescriptor] = QuantDescriptor()
    quant_desc_keywords: ClassVar[tuple[str, ...]] = ("quant_desc_input",)
    input_quantizer: TensorQuantizer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        descs = {key: kwargs.pop(key, getattr(self, f"default_{key}")) for key in self.quant_desc_keywords}
        super().__init__(*args, **kwargs)
        self.init_quantizers(*descs.values())

    def init_quantizers(self, input: QuantDescriptor | None) -> None:
        """Create the quantizers; ``None`` makes one that is disabled."""
        self.input_quantizer = _quantizer(input)

    def quantizers(self) -> dict[str, TensorQuantizer]:
        """Quantizers by role: ``input``, ``weight``."""
        roles = [key.removeprefix("quant_desc_") for key in self.quant_desc_keywords]
        return {role: getattr(self, f"{role}_quantizer") for role in roles}

    @classmethod
    def set_default_quant_desc_input(cls, value: QuantDescriptor) -> None:
        """Set the descriptor of inputs for modules of this class that are made from now on."""
        cls.default_quant_desc_input = _checked(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # pytorch-quantization names its quantizers with a leading underscore
        for role in self.quantizers():
            old = f"{prefix}_{role}_quantizer."
            for key in [k for k in state_dict if k.startswith(old)]:
                state_dict[f"{prefix}{role}_quantizer.{key.removeprefix(old)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantMixin(QuantInputMixin):
    """A module whose input and ``weight`` are quantized."""

    default_quant_desc_weight: ClassVar[QuantDescriptor] = INT8_WEIGHT
    quant_desc_keywords: ClassVar[tuple[str, ...]] = ("quant_desc_input", "quant_desc_weight")
    weight_quantizer: TensorQuantizer

    def init_quantizers(self, input: QuantDescriptor | None, weight: QuantDescriptor | None = None) -> None:
        super().init_quantizers(input)
        self.weight_quantizer = _quantizer(weight)

    @classmethod
    def set_default_quant_desc_weight(cls, value: QuantDescriptor) -> None:
        """Set the descriptor of weights for modules of this class that are made from now on."""
        cls.default_quant_desc_weight = _checked(value)


def _checked(value: Any) -> QuantDescriptor:
    if not isinstance(value, QuantDescriptor):
        raise TypeError(f"{value!r} is no QuantDescriptor.")
    return value


def _quantizer(desc: QuantDescriptor | None) -> TensorQuantizer:
    return TensorQuantizer(disabled=True) if desc is None else TensorQuantizer(_checked(desc))


# From float to quantized and back


def is_quantizable(module: nn.Module) -> bool:
    """Whether :func:`to_quantized_` takes a module: a registered float class, or a quantized one that computes in float."""
    if isinstance(module, QuantInputMixin):
        return type(module) in QUANT_MODULES.values() and all(q._disabled for q in module.quantizers().values())
    return type(module) in QUANT_MODULES


def to_quantized_(
    module: nn.Module, input: QuantDescriptor | None = None, weight: QuantDescriptor | None = None
) -> QuantInputMixin:
    """Make a float module a quantized one, in place; a SmoothQuant factor on its input stays."""
    factor = module.input_quantizer.pre_quant_scale if isinstance(module, QuantInputMixin) else None
    if not isinstance(module, QuantInputMixin):
        module.__class__ = QUANT_MODULES[type(module)]
    assert isinstance(module, QuantInputMixin)
    module.init_quantizers(*([input, weight] if isinstance(module, QuantMixin) else [input]))
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for quantizer in module.quantizers().values():
        quantizer.to(device)
    module.input_quantizer.pre_quant_scale = factor
    return module


def to_float_(module: nn.Module) -> nn.Module:
    """Make a quantized module a float one again, in place; a factor on its input moves into the weight."""
    assert isinstance(module, QuantInputMixin)
    if (factor := module.input_quantizer.pre_quant_scale) is not None:
        scale_input_channels_(module, factor.flatten())
    for role in module.quantizers():
        delattr(module, f"{role}_quantizer")
    module.__class__ = next(f for f, q in QUANT_MODULES.items() if q is type(module))  # type: ignore[assignment]
    return module


def input_channel_view(module: nn.Module) -> Tensor:
    """Weight of a linear or (transposed) convolution as a view ``(groups, outputs, input channels of a group, kernel)``."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    groups = getattr(module, "groups", 1)
    assert isinstance(groups, int)
    if getattr(module, "transposed", False):
        return weight.detach().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return weight.detach().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


@torch.no_grad()
def scale_input_channels_(module: nn.Module, factors: Tensor) -> None:
    """Multiply the weights that meet each input channel by its factor, ``(channels,)``, in place."""
    view = input_channel_view(module)
    view *= factors.to(view.dtype).reshape(view.shape[0], 1, -1, 1)
