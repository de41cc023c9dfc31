"""How a module gets quantizers: mixins, and the registry of which quantized class stands for which float class.

A float module becomes a quantized one by taking on the quantized class: the object stays the same, and with it its parameters,
hooks, tied weights, and every reference to it.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import nn

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
        return {key.removeprefix("quant_desc_"): self._quantizer(key) for key in self.quant_desc_keywords}

    def _quantizer(self, key: str) -> TensorQuantizer:
        quantizer: TensorQuantizer = getattr(self, key.replace("quant_desc_", "") + "_quantizer")
        return quantizer

    def drop_quantizers(self) -> None:
        """Remove what :meth:`init_quantizers` created."""
        for role in self.quantizers():
            delattr(self, f"{role}_quantizer")

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
