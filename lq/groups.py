"""Which layers share SmoothQuant factors, and what takes in the inverse of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq.channels import NONE, follow
from lq.graph import Call, Flow
from lq.nn.input_channels import input_channel_amax, input_channels, input_weight
from lq.producers import producer_of


@dataclass
class Group:
    """Layers that share factors, and what takes in the inverse of them.

    Attributes:
        layers: with, for each input channel, the number of its factor, or -1 for none; int64 ``(channels,)``.
        factors: how many there are.
        producer: the module that takes them in, or whose code does; ``None`` where each layer multiplies its input.
        parameters: of the producer, each with the dimension of its channels.
    """

    layers: list[tuple[nn.Module, Tensor]]
    factors: int
    producer: nn.Module | None = None
    parameters: tuple[tuple[nn.Parameter, int], ...] = ()

    def ranges(self, input_amax: Mapping[nn.Module, Tensor]) -> tuple[Tensor, Tensor]:
        """Largest magnitudes of inputs and of weights for each factor, ``(factors,)``; 0 where there is none."""
        return self._gathered([input_amax[module] for module, _ in self.layers]), self.weight_ranges()

    def weight_ranges(self) -> Tensor:
        """Largest magnitudes of the weights that meet each factor, ``(factors,)``; 0 where there is none."""
        return self._gathered([input_channel_amax(module) for module, _ in self.layers])

    def _gathered(self, values: Sequence[Tensor]) -> Tensor:
        """The largest of the values that share a factor, ``(factors,)``, of those of each layer."""
        largest = values[0].new_zeros(self.factors)
        for (_, index), value in zip(self.layers, values, strict=True):
            index = index.to(value.device)
            largest.scatter_reduce_(0, index[index >= 0], value[index >= 0], "amax")
        return largest


def spread(factors: Tensor, index: Tensor, others: Tensor | float = 1.0) -> Tensor:
    """The factor of each input channel of a layer, or that in ``others`` where it has none.

    >>> spread(torch.tensor([2.0, 4.0]), torch.tensor([1, 1, 0, -1]))
    tensor([4., 4., 2., 1.])
    """
    index = index.to(factors.device)
    return torch.where(index >= 0, factors[index.clamp_min(0)], others)


def find_groups(flow: Flow, layers: Iterable[nn.Module], tied: set[int], excluded: set[nn.Module]) -> list[Group]:
    """The groups of layers in a recorded run; those whose weight something else takes too are in none.

    Args:
        flow: the run.
        layers: linear layers, convolutions and attention that may be rescaled.
        tied: identities of parameters that several modules hold.
        excluded: modules that must not take in factors.
    """
    # a weight that something else takes too cannot change for one layer alone
    uses = {module: uses_of(flow, module) for module in layers}
    left = {
        m: torch.ones(input_channels(m), dtype=torch.bool)
        for m, calls in uses.items()
        if calls and id(input_weight(m)) not in tied
    }
    layer_of: dict[int, nn.Module] = {id(calls[0]): m for m, calls in uses.items() if m in left and len(calls) == 1}
    groups: list[Group] = []
    for call in flow.calls:
        producer = producer_of(flow, call, tied)
        if producer is None or producer.module in excluded:
            continue
        use = follow(flow, call.outputs[0], producer.dim, lambda taker: layer_of.get(id(taker)))
        # a channel whose factor is known already has no other
        found = [(m, torch.where(left[m], index, NONE)) for m, index in use.layers]
        found = [(m, index) for m, index in found if bool((index >= 0).any())]
        if found:
            groups.append(Group(found, len(use.free), producer.module, producer.parameters))
            for m, index in found:
                left[m] &= index < 0
    return groups + _inserted(uses, [m for m, channels in left.items() if bool(channels.all())])


def uses_of(flow: Flow, layer: nn.Module) -> list[Call]:
    """Calls in which a layer's input meets its weight; none if other code takes the weight too."""
    weight = input_weight(layer)
    takers = [call for value, p in flow.parameters.items() if p is weight for call in flow.consumers(value)]
    # the code of attention takes its own weight; other layers are looked at from outside
    return [] if any(call.owner is not layer for call in takers) else takers or flow.calls_of(layer)


def _inserted(uses: dict[nn.Module, list[Call]], modules: list[nn.Module]) -> list[Group]:
    """Groups for a multiply: what takes the same value shares factors, so that q, k and v see one activation."""
    by_input: dict[object, list[nn.Module]] = {}
    for module in modules:
        calls = uses[module]
        by_input.setdefault(calls[0].inputs[0] if len(calls) == 1 else module, []).append(module)
    return [Group([(m, torch.arange(n)) for m in ms], n) for ms in by_input.values() for n in [input_channels(ms[0])]]


def shared_parameters(model: nn.Module) -> set[int]:
    """Identities of parameters that two modules hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


# For other ranks


def to_names(groups: Sequence[Group], model: nn.Module) -> list[tuple[Any, ...]]:
    """Groups with names for modules and parameters of ``model``."""
    modules, parameters = ({v: k for k, v in named} for named in (model.named_modules(), model.named_parameters()))
    return [
        (
            [(modules[m], index) for m, index in group.layers],
            group.factors,
            None if group.producer is None else modules[group.producer],
            [(parameters[p], dim) for p, dim in group.parameters],
        )
        for group in groups
    ]


def from_names(named: Sequence[tuple[Any, ...]], model: nn.Module) -> list[Group]:
    """What :func:`to_names` named, in the ``model`` of this rank."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    return [
        Group(
            [(modules[name], index) for name, index in layers],
            factors,
            None if producer is None else modules[producer],
            tuple((parameters[name], dim) for name, dim in divided),
        )
        for layers, factors, producer, divided in named
    ]
