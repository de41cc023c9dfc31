"""The range of a ReLU's output becomes what the quantizer can have, with the float output unchanged."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lq.channels import passes
from lq.corrections.places import Places, find_places
from lq.corrections.ranges import Target, check_method, input_ranges, peeked, power_of_two, ratio_to, why_none
from lq.corrections.record import Applied, Corrections
from lq.descriptor import QuantDescriptor
from lq.groups import Group, spread, uses_of
from lq.nn.input_channels import scale_input_channels_
from lq.producers import divide_, producer_of

RELU = frozenset({"relu", "relu_"})


@torch.no_grad()
def relu_unbound_correction_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target: Target = power_of_two,
    method: str = "max",
    desc: QuantDescriptor | None = None,
    **options: Any,
) -> Corrections:
    """Bring the range of what an unbounded ReLU gives to layers to a power of two, in place.

    A quantizer whose thresholds are powers of two covers a range of 4.1 with 8, and leaves half of its codes without use. A ReLU
    has no bound of its own, and ReLU(x / s) = ReLU(x) / s (scaling equivariance: Nagel et al., 2019, arXiv:1906.04721, section
    4.1). So what comes before it, the rows of a layer or the affine of a norm, is divided by one factor, here 4.1 / 4, and the
    weights behind it are multiplied by the same.

    Ranges end up 0.1 % below the target, so that rounding puts none above it.

    Args:
        model: float, before quantization.
        batches: the model's positional inputs, each a tuple, list or tensor.
        target: the range to have, as a number, or computed from the range that there is.
        method: by which amax is found, as in :func:`lq.calibrating`.
        desc: of the quantizer that the range is for; the method may look at it.
        options: of the method.

    Returns:
        What was done, by the layers that take the ReLU's output.

    Raises:
        ValueError: the model is quantized, there are no batches, NaN or Inf in them, a bad method, option or target.

    >>> model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)).requires_grad_(False)
    >>> _ = model[0].weight.fill_(1), model[0].bias.fill_(0)
    >>> relu_unbound_correction_(model, [torch.tensor([[4.5]])]).applied[0].detail
    'range 4.5, then 3.996: what Linear `0` gives is divided by 1.126'
    >>> model[:2](torch.tensor([[4.5]]))
    tensor([[3.9961]])
    """
    check_method(method, options)
    first, batches = peeked(batches)
    places = find_places(model, first)
    groups = [group for group in places.groups if _fits(places, group)]
    ranges = input_ranges(model, [m for group in groups for m, _ in group.layers], batches, method, desc, options)
    measured = [max(ranges[layer] for layer, _ in group.layers) for group in groups]
    ratios = [ratio_to(target, amax) for amax in measured]
    left = {name: _why_not(places, layer) for name, layer in places.layers().items() if layer not in ranges}
    applied: dict[str, Applied] = {}
    for group, amax, ratio in zip(groups, measured, ratios, strict=True):
        assert group.producer is not None
        names = [places.names[layer] for layer, _ in group.layers]
        if ratio == 1:
            left |= dict.fromkeys(names, why_none(amax))
            continue
        _divide_(group, ratio)
        given = f"what {type(group.producer).__name__} `{places.names[group.producer]}` gives is divided by {ratio:.4g}"
        applied |= {name: Applied(name, f"range {amax:.4g}, then {amax / ratio:.4g}: {given}") for name in names}
    return Corrections([applied[name] for name in places.layers() if name in applied], left)


def _fits(places: Places, group: Group) -> bool:
    """Whether layers take nothing but what a ReLU behind the group's producer gives."""
    return group.producer is not None and all(
        bool((index >= 0).all()) and _relu_gives(places, layer, group.producer) for layer, index in group.layers
    )


def _relu_gives(places: Places, layer: nn.Module, producer: nn.Module) -> bool:
    way = _way(places, layer)
    found = producer_of(places.flow, way[-1], places.tied) if way else None
    return found is not None and found.module is producer and any(_is_relu(call.target) for call in way)


def _way(places: Places, layer: nn.Module) -> list[Any]:
    return [*places.way_to(uses_of(places.flow, layer)[0].inputs[0])]


def _is_relu(target: nn.Module | str) -> bool:
    return target in RELU if isinstance(target, str) else type(target) is nn.ReLU


def _divide_(group: Group, ratio: float) -> None:
    factors = torch.ones(group.factors, dtype=torch.float64, device=group.parameters[0][0].device)
    for _, index in group.layers:
        factors[index.to(factors.device)] = ratio
    divide_(group.parameters, factors)
    for layer, index in group.layers:
        scale_input_channels_(layer, spread(factors, index))


def _why_not(places: Places, layer: nn.Module) -> str:
    if not any(layer is m for group in places.groups if group.producer for m, _ in group.layers):
        return places.why_not(layer)
    relu = any(_is_relu(call.target) for call in _way(places, layer) if passes(call))
    return "its input is not that of one ReLU alone" if relu else "no ReLU gives its input"
