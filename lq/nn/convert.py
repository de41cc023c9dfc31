"""From float to quantized and back."""

from torch import nn

from lq.descriptor import QuantDescriptor
from lq.nn.input_channels import scale_input_channels_
from lq.nn.quant_module import QUANT_MODULES, QuantInputMixin, QuantModule


def is_quantizable(module: nn.Module) -> bool:
    """Whether :func:`to_quantized_` takes a module: a registered float class, or a quantized one that computes in float."""
    if isinstance(module, QuantModule) and type(module) not in QUANT_MODULES:
        return type(module) in QUANT_MODULES.values() and all(q._disabled for q in module.quantizers().values())
    return type(module) in QUANT_MODULES


def float_class_of(module: nn.Module) -> type[nn.Module]:
    """The registered class that a module has, or had before it was quantized."""
    return next((f for f, q in QUANT_MODULES.items() if q is type(module)), type(module))


def to_quantized_(module: nn.Module, input: QuantDescriptor | None = None, weight: QuantDescriptor | None = None) -> QuantModule:
    """Make a float module a quantized one, in place; a SmoothQuant factor on its input stays."""
    factor = module.input_quantizer.pre_quant_scale if isinstance(module, QuantInputMixin) else None
    if not isinstance(module, QuantModule):
        module.__class__ = QUANT_MODULES[type(module)]
    assert isinstance(module, QuantModule)
    module.init_quantizer(input, weight)
    if isinstance(module, QuantInputMixin):
        module.input_quantizer.pre_quant_scale = factor
    return module


def to_float_(module: nn.Module) -> nn.Module:
    """Make a quantized module a float one again, in place; a factor on its input moves into the weight."""
    assert isinstance(module, QuantModule)
    if isinstance(module, QuantInputMixin) and (factor := module.input_quantizer.pre_quant_scale) is not None:
        scale_input_channels_(module, factor.flatten())
    if type(module) in QUANT_MODULES:  # an operation has no float class
        module.init_quantizer()
        return module
    float_class = float_class_of(module)
    for role in module.quantizers():
        delattr(module, f"{role}_quantizer")
    module.__class__ = float_class  # type: ignore[assignment]
    return module
