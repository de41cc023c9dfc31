"""The range of the model's input becomes what the quantizer can have, with the float output unchanged."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lq.corrections.places import Places, find_places
from lq.corrections.ranges import Target, check_method, input_ranges, peeked, power_of_two, ratio_to, why_none
from lq.corrections.record import Applied, Corrections
from lq.descriptor import QuantDescriptor
from lq.groups import uses_of
from lq.nn.fast_paths import leave_fast_paths_
from lq.nn.input_channels import has_input_channels, input_channels, input_weight, is_layer, scale_input_channels_
from lq.rescale import insert_


@torch.no_grad()
def input_scaling_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target: Target = power_of_two,
    method: str = "max",
    desc: QuantDescriptor | None = None,
    **options: Any,
) -> Corrections:
    """Multiply the input of the model's first layers by a factor that brings its range to a power of two, in place.

    The weights of these layers are divided by it, so the model takes the data that it took before, and gives what it gave. The
    factor is the quantizer's ``pre_quant_scale``: it is applied before quantization, saved with the model, and a multiply in the
    exported graph. Who has the data's normalization multiply by it (it is ``Applied.factor``) can set ``pre_quant_scale`` to
    ``None``, and saves the multiply.

    It is one factor for all channels, which leaves the weights as hard to quantize as they were. Factors for each channel are
    :class:`lq.RescalingCalibrator`'s. Ranges end up 0.1 % below the target, so that rounding puts none above it.

    Args:
        model: float, before quantization.
        batches: the model's positional inputs, each a tuple, list or tensor.
        target: the range to have, as a number, or computed from the range that there is.
        method: by which amax is found, as in :func:`lq.calibrating`.
        desc: of the quantizer that the range is for; the method may look at it.
        options: of the method.

    Returns:
        What was done, by the first layers; what else takes the model's input is left.

    Raises:
        ValueError: the model is quantized, there are no batches, NaN or Inf in them, a bad method, option or target.

    >>> model = nn.Sequential(nn.Linear(1, 1)).requires_grad_(False)
    >>> before = model[0].weight.clone()
    >>> input_scaling_(model, [torch.tensor([[4.5]])]).applied[0].detail
    'range 4.5, then 3.996: its input is multiplied by 0.888'
    >>> model[0].input_quantizer.pre_quant_scale, model[0].weight / before
    (tensor([0.8880]), tensor([[1.1261]]))
    """
    check_method(method, options)
    first, batches = peeked(batches)
    places = find_places(model, first)
    layers, left = _first_layers(places)
    ranges = input_ranges(model, layers, batches, method, desc, options)
    ratios = {layer: ratio_to(target, amax) for layer, amax in ranges.items()}
    applied = []
    for layer, amax in ranges.items():
        name, ratio = places.names[layer], ratios[layer]
        if ratio == 1:
            left[name] = why_none(amax)
            continue
        factor = _multiply_(layer, ratio)
        detail = f"range {amax:.4g}, then {amax / ratio:.4g}: its input is multiplied by {factor.item():.4g}"
        applied.append(Applied(name, detail, factor))
    leave_fast_paths_(model)
    return Corrections(applied, left)


def _first_layers(places: Places) -> tuple[list[nn.Module], dict[str, str]]:
    """Layers that take the model's input, and what else does, with the reason why it stays as it is."""
    free = [m for m in places.names if is_layer(m) and id(input_weight(m)) not in places.tied]
    layer_of: dict[int, nn.Module] = {id(call): m for m in free for call in uses_of(places.flow, m)}
    found: dict[nn.Module, None] = {}
    left: dict[str, str] = {}
    for call in places.takers():
        module = call.target if isinstance(call.target, nn.Module) else call.owner
        if (layer := layer_of.get(id(call))) is not None:
            found[layer] = None
        elif module is not None and has_input_channels(module):
            left[places.names[module]] = places.why_not(module)
        elif module in places.names:
            left[places.names[module]] = f"{places.label(call)} takes the model's input, and is no layer with weights to divide"
    return [*found], left


def _multiply_(layer: nn.Module, ratio: float) -> Tensor:
    """Divide a layer's input by ``ratio``, and have the weights make up for it; returns the factor on the input."""
    scale = input_weight(layer).new_full((input_channels(layer),), ratio, dtype=torch.float32)
    scale_input_channels_(layer, insert_(layer, scale))
    return 1 / scale[0]
