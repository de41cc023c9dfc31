"""How a module gets quantizers: mixins, and the registry of which quantized class stands for which float class.

A float module becomes a quantized one by taking on the quantized class: the object stays the same, and with it its parameters,
hooks, tied weights, and every reference to it.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lq.descriptor import INT8_WEIGHT, QuantDescriptor
from lq.functional.operators import is_fused
from lq.nn.recompute import computed_again, keeping_less
from lq.nn.tensor_quantizer import TensorQuantizer

QUANT_MODULES: dict[type[nn.Module], type["QuantModule"]] = {}
# Float classes that a rule quantizes only if it names the class or the module.
ON_REQUEST: set[type[nn.Module]] = set()

# What pytorch-quantization calls its quantizers inside of modules.
OLD_NAMES = {"_input_quantizer": "input_quantizer", "_weight_quantizer": "weight_quantizer"}

M = TypeVar("M", bound=type["QuantModule"])


def register(float_class: type[nn.Module], *, by_default: bool = True) -> Callable[[M], M]:
    """Class decorator: :func:`lq.quantize_` turns modules of exactly ``float_class`` into the decorated class.

    Args:
        float_class: a class that the decorated one subclasses.
        by_default: every rule applies to it; else only one that names the class in ``types``, or the module in full.

    Raises:
        TypeError: the decorated class does not subclass ``float_class`` and a mixin.
    """

    def decorate(quant_class: M) -> M:
        if not issubclass(quant_class, float_class) or not issubclass(quant_class, QuantModule):
            raise TypeError(
                f"{quant_class.__name__} must subclass {float_class.__name__}, whose modules it takes over, and QuantMixin or "
                "QuantInputMixin."
            )
        QUANT_MODULES[float_class] = quant_class
        (ON_REQUEST.discard if by_default else ON_REQUEST.add)(float_class)
        return quant_class

    return decorate


class QuantModule(nn.Module):
    """A module with quantizers of its own: children named ``<role>_quantizer``; one that quantizes a weight has its name as role.

    Descriptors come as keywords after the float class's own arguments, or from the class's defaults. The mixins below make the
    common quantizers; other classes make theirs in :meth:`init_quantizer`.
    """

    default_quant_desc_input: ClassVar[QuantDescriptor | None] = QuantDescriptor()
    default_quant_desc_weight: ClassVar[QuantDescriptor | None] = INT8_WEIGHT
    quant_desc_keywords: ClassVar[tuple[str, ...]] = ("quant_desc_input", "quant_desc_weight")
    # name of the weight that meets the input
    input_weight: ClassVar[str] = "weight"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        keywords = self.quant_desc_keywords
        descs = {key: kwargs.pop(key, getattr(self, f"default_{key}")) for key in keywords}
        super().__init__(*args, **kwargs)
        self.init_quantizer(**descs)

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        """Create the quantizers; ``None`` makes them disabled."""

    def make_quantizers(self, desc: QuantDescriptor | None, *roles: str) -> None:
        """Create a quantizer for each role, on the module's device; disabled ones if ``desc`` is ``None``."""
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        for role in roles:
            quantizer = TensorQuantizer(disabled=True) if desc is None else TensorQuantizer(_checked(desc))
            quantizer._of_weight = isinstance(getattr(self, role, None), Tensor)
            setattr(self, f"{role}_quantizer", quantizer.to(device))

    def quantizers(self) -> dict[str, TensorQuantizer]:
        """Quantizers by role: ``input``, ``weight``."""
        children = self._modules.items()
        return {name.removesuffix("_quantizer"): m for name, m in children if isinstance(m, TensorQuantizer)}

    def weights(self) -> dict[str, Tensor]:
        """Weights that are quantized, by role."""
        values = {role: getattr(self, role, None) for role in self.quantizers()}
        return {role: value for role, value in values.items() if isinstance(value, Tensor)}

    @property
    def idle(self) -> bool:
        """Whether no quantizer has anything to do, so that the float class may compute."""
        return all(q.idle for q in self.quantizers().values())

    @classmethod
    def set_default_quant_desc_input(cls, value: QuantDescriptor) -> None:
        """Set the descriptor of inputs for modules of this class that are made from now on."""
        cls.default_quant_desc_input = _checked(value)

    @classmethod
    def set_default_quant_desc_weight(cls, value: QuantDescriptor) -> None:
        """Set the descriptor of weights for modules of this class that are made from now on."""
        cls.default_quant_desc_weight = _checked(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # pytorch-quantization names its quantizers with a leading underscore
        for role in self.quantizers():
            old = f"{prefix}_{role}_quantizer."
            for key in [k for k in state_dict if k.startswith(old)]:
                state_dict[f"{prefix}{role}_quantizer.{key.removeprefix(old)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # pytorch-quantization's names, for a forward that was written with them

    @property
    def _input_quantizer(self) -> Any:
        # not as an attribute: the tutorial's modules have a property of that name, which reads this one
        return nn.Module.__getattr__(self, "input_quantizer")

    @property
    def _weight_quantizer(self) -> Any:
        return nn.Module.__getattr__(self, "weight_quantizer")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(OLD_NAMES.get(name, name), value)


class QuantInputMixin(QuantModule):
    """A module whose input is quantized: its ``forward`` passes the input through ``input_quantizer``.

    >>> class QuantTanh(QuantInputMixin, nn.Tanh):
    ...     def forward(self, input):
    ...         return super().forward(self.input_quantizer(input))
    >>> QuantTanh(quant_desc_input=QuantDescriptor(amax=1.27))(torch.tensor([0.0991]))
    tensor([0.0997])
    """

    quant_desc_keywords: ClassVar[tuple[str, ...]] = ("quant_desc_input",)
    input_quantizer: TensorQuantizer

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        self.make_quantizers(quant_desc_input, "input")


class QuantMixin(QuantInputMixin):
    """A module whose input and ``weight`` are quantized: its ``forward`` passes them through their quantizers."""

    quant_desc_keywords = ("quant_desc_input", "quant_desc_weight")
    weight: Tensor
    weight_quantizer: TensorQuantizer
    # set by lq.nn.recompute_
    recompute: bool = False

    def init_quantizer(
        self, quant_desc_input: QuantDescriptor | None = None, quant_desc_weight: QuantDescriptor | None = None
    ) -> None:
        super().init_quantizer(quant_desc_input)
        self.make_quantizers(quant_desc_weight, "weight")

    def on_quantized(self, operation: Callable[[Tensor, Tensor], Tensor], input: Tensor, weight: Tensor) -> Tensor:
        """``operation`` of the quantized input and the quantized weight."""
        if not self.recompute:
            return operation(self.input_quantizer(input), self.weight_quantizer(weight))
        if is_fused() and torch.is_grad_enabled():
            return operation(computed_again(self.input_quantizer, input), computed_again(self.weight_quantizer, weight))
        x, w = self.input_quantizer(input), self.weight_quantizer(weight)
        with keeping_less((self.input_quantizer, input, x), (self.weight_quantizer, weight, w)):
            return operation(x, w)


def pop_quant_desc_in_kwargs(quant_cls: type[QuantModule], input_only: bool = False, **kwargs: Any) -> Any:
    """Descriptors out of the keywords of a constructor, or the defaults of ``quant_cls``.

    So the tutorial of pytorch-quantization writes the ``__init__`` of a custom module; the mixins bring one.

    Returns:
        The descriptor of the input, and, unless ``input_only``, that of the weight.

    Raises:
        ValueError: keywords that are left over (named).

    >>> pop_quant_desc_in_kwargs(QuantInputMixin, input_only=True, quant_desc_input=QuantDescriptor(num_bits=4)).num_bits
    4
    """
    keywords = QuantInputMixin.quant_desc_keywords if input_only else QuantMixin.quant_desc_keywords
    descs = tuple(kwargs.pop(key, getattr(quant_cls, f"default_{key}")) for key in keywords)
    if kwargs:
        raise ValueError(f"Unused keys {', '.join(map(repr, kwargs))}: {quant_cls.__name__} takes {', '.join(keywords)}.")
    return descs[0] if input_only else descs


def _checked(value: Any) -> QuantDescriptor:
    if not isinstance(value, QuantDescriptor):
        raise TypeError(f"{value!r} is no QuantDescriptor.")
    return value
