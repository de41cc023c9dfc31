"""The input channels of linear layers, convolutions and attention, and the weights that meet them."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lq.nn.elsewhere import QuantTransposedLinear
from lq.nn.quant_module import QUANT_MODULES, QuantInputMixin, QuantModule

LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.MultiheadAttention, QuantTransposedLinear),
)


def _kind(module: nn.Module) -> Any:
    """The quantized class that a module has, or would have."""
    return QUANT_MODULES.get(type(module), type(module))


def has_input_channels(module: nn.Module) -> bool:
    """Whether a module is of a class whose input channels meet weights, quantized or not."""
    return issubclass(_kind(module), LAYERS)


def is_layer(module: nn.Module) -> bool:
    """Whether a module has input channels, and holds the weights that meet them.

    Not with a weight that is computed (pruning, weight_norm): a factor on it would be gone with the next forward. Nor attention
    whose keys and values have another width than its queries: it has a weight for each. Nor with an input that is shifted: where
    a channel is multiplied, the shift would have to be too.
    """
    known = issubclass(_kind(module), QuantInputMixin) and has_input_channels(module)
    return known and shift_of(module) is None and module._parameters.get(_kind(module).input_weight) is not None


def why_no_layer(module: nn.Module) -> str:
    """Why a module with input channels is not what :func:`is_layer` means."""
    return "its weight is computed, or its class unknown" if shift_of(module) is None else "its input is shifted"


def input_weight_name(module: nn.Module) -> str:
    """Name of the weight that meets a layer's input, and role of its quantizer."""
    name: str = _kind(module).input_weight
    return name


def input_weight(module: nn.Module) -> nn.Parameter:
    """The weight that meets a layer's input."""
    weight = module._parameters[input_weight_name(module)]
    assert weight is not None
    return weight


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer with its weight as ``(inputs, outputs)``."""
    return issubclass(_kind(module), QuantTransposedLinear)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer's weight has its inputs before its outputs."""
    return is_transposed_linear(module) or bool(getattr(module, "transposed", False))


def channel_dim(module: nn.Module, ndim: int) -> int:
    """Dimension of a layer's channels, in and out: the last one of linear layers, the one before the kernel's of convolutions."""
    return ndim - 1 - len(getattr(module, "kernel_size", ()))


def inputs_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The distinct tensors with input channels among the arguments of a layer: one, or those of attention."""
    count = 3 if isinstance(module, nn.MultiheadAttention) else 1
    if len(args) < count:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        args = tuple(bound.arguments.values())
    return list({id(x): x for x in args[:count]}.values())


def input_channel_view(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """A layer's weight, or another in its place, as a view ``(groups, outputs, input channels of a group, kernel)``."""
    weight = input_weight(module).detach() if weight is None else weight
    groups = getattr(module, "groups", 1)
    assert isinstance(groups, int)
    view = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return view.transpose(1, 2) if is_transposed(module) else view


def input_channels(module: nn.Module) -> int:
    """How many input channels a layer has."""
    groups, _, channels, _ = input_channel_view(module).shape
    return groups * channels


def input_channel_amax(module: nn.Module) -> Tensor:
    """Largest magnitude of the weights that meet each input channel, ``(channels,)``."""
    return input_channel_view(module).abs().amax(dim=(1, 3)).flatten()


@torch.no_grad()
def scale_input_channels_(module: nn.Module, factors: Tensor, weight: Tensor | None = None) -> None:
    """Multiply what meets each input channel by its factor, ``(channels,)``, in a layer's weight or ``weight``, in place."""
    view = input_channel_view(module, weight)
    view *= factors.to(view.dtype).reshape(view.shape[0], 1, -1, 1)


def factor_of(module: nn.Module) -> Tensor | None:
    """What a layer multiplies its input by, broadcastable to it; ``None`` for nothing."""
    return module.input_quantizer.pre_quant_scale if isinstance(module, QuantInputMixin) else None


def shift_of(module: nn.Module) -> Tensor | None:
    """What a layer adds to its input, after the factor; ``None`` for nothing."""
    return module.input_quantizer.pre_quant_shift if isinstance(module, QuantInputMixin) else None


@torch.no_grad()
def add_to_bias_(module: nn.Module, values: Tensor) -> None:
    """Add to the bias of a linear layer or convolution, ``(outputs,)``, in place; a layer without one gets one.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> add_to_bias_(layer, torch.tensor([0.5]))
    >>> layer.bias.data
    tensor([0.5000])
    """
    weight, bias = getattr(module, input_weight_name(module)), module._parameters["bias"]
    if bias is None:
        module.bias = nn.Parameter(values.to(weight), requires_grad=weight.requires_grad)
    else:
        bias.copy_(bias.double() + values.to(bias.device))


def add_bias_(module: nn.Module) -> None:
    """Give a layer that has no bias one of zeros, in place."""
    groups, outputs, _, _ = input_channel_view(module).shape
    add_to_bias_(module, input_weight(module).new_zeros(groups * outputs))


def take_shift_back_(module: nn.Module) -> None:
    """Have a layer's bias do what the shift of its input does, in place: ``b + W s``, summed over input channels and kernel."""
    shift = shift_of(module)
    if shift is not None:
        add_to_bias_(module, shift.double() * summed_weight(module))
        assert isinstance(module, QuantInputMixin)
        module.input_quantizer.pre_quant_shift = None


def summed_weight(module: nn.Module, weight: Tensor | None = None) -> Tensor:
    """What meets the input of each output of a layer, summed: float64 ``(outputs,)``; of its weight, or another in its place.

    >>> summed_weight(nn.Conv2d(2, 1, 3, bias=False), torch.ones(1, 2, 3, 3))
    tensor([18.], dtype=torch.float64)
    """
    weight = None if weight is None else weight.contiguous()
    return input_channel_view(module, weight).double().sum(dim=(2, 3)).flatten()


@contextmanager
def without_factors(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Layers do not multiply their inputs inside the block."""
    factors = {
        m.input_quantizer: factor for m in modules if isinstance(m, QuantInputMixin) and (factor := factor_of(m)) is not None
    }
    for quantizer in factors:
        quantizer.pre_quant_scale = None
    try:
        yield
    finally:
        for quantizer, factor in factors.items():
            quantizer.pre_quant_scale = factor


def forget_amax_(module: nn.Module) -> None:
    """Drop the amax of a module's quantizers: what they see has changed."""
    if isinstance(module, QuantModule):
        for quantizer in module.quantizers().values():
            quantizer.amax = None
