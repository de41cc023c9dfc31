"""From float to quantized and back."""

from torch import nn

from lq.descriptor import QuantDescriptor
from lq.nn.input_channels import factor_of, scale_input_channels_, shift_of, take_shift_back_
from lq.nn.quant_module import ON_REQUEST, QUANT_MODULES, QuantInputMixin, QuantModule


def is_quantizable(module: nn.Module) -> bool:
    """Whether :func:`to_quantized_` takes a module: a registered float class, or a quantized one that computes in float."""
    if isinstance(module, QuantModule) and type(module) not in QUANT_MODULES:
        return type(module) in QUANT_MODULES.values() and all(q._disabled for q in module.quantizers().values())
    return type(module) in QUANT_MODULES


def is_unknown(module: nn.Module) -> bool:
    """Whether a layer with weights has no quantized class: ``nn.GRU``; a subclass of a registered one, whose forward may differ.

    >>> is_unknown(nn.GRU(2, 2)), is_unknown(nn.Linear(2, 2)), is_unknown(nn.ReLU())
    (True, False, False)
    """
    kinds = (*(QUANT_MODULES.keys() - ON_REQUEST), nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
    return isinstance(module, kinds) and not isinstance(module, QuantModule) and not is_quantizable(module)


def float_class_of(module: nn.Module) -> type[nn.Module]:
    """The registered class that a module has, or had before it was quantized."""
    return next((f for f, q in QUANT_MODULES.items() if q is type(module)), type(module))


def to_quantized_(module: nn.Module, input: QuantDescriptor | None = None, weight: QuantDescriptor | None = None) -> QuantModule:
    """Make a float module a quantized one, in place; a SmoothQuant factor on its input stays.

    So does a shift, behind which the input is unsigned and has the amax that was found with the shift. A float format has its
    sign anyway: there the bias takes the shift back.
    """
    if input is not None and isinstance(input.num_bits, tuple):
        take_shift_back_(module)
    factor, shift = factor_of(module), shift_of(module)
    if input is not None and shift is not None:
        assert isinstance(module, QuantInputMixin)
        amax = module.input_quantizer.amax
        input = input.replace(unsigned=True, amax=input.amax if amax is None else amax.item())
    if not isinstance(module, QuantModule):
        module.__class__ = QUANT_MODULES[type(module)]
    assert isinstance(module, QuantModule)
    module.init_quantizer(input, weight)
    if isinstance(module, QuantInputMixin):
        module.input_quantizer.pre_quant_scale, module.input_quantizer.pre_quant_shift = factor, shift
    return module


def to_float_(module: nn.Module) -> nn.Module:
    """Make a quantized module a float one again, in place; a factor on its input moves into the weight, a shift into the bias."""
    assert isinstance(module, QuantModule)
    take_shift_back_(module)
    if (factor := factor_of(module)) is not None:
        scale_input_channels_(module, factor.flatten())
    if type(module) in QUANT_MODULES:  # an operation has no float class
        module.init_quantizer()
        return module
    float_class = float_class_of(module)
    for role in module.quantizers():
        delattr(module, f"{role}_quantizer")
    module.__dict__.pop("recompute", None)
    module.__class__ = float_class  # type: ignore[assignment]
    return module
