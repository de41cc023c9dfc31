"""Where corrections apply: the layers of a recorded run, what gives their inputs, and why a place is none."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lq.channels import passes
from lq.graph import Call, Flow, trace
from lq.groups import Group, find_groups, shared_parameters, uses_of
from lq.nn.elsewhere import register_known
from lq.nn.example import example_inputs
from lq.nn.fast_paths import without_fast_paths
from lq.nn.input_channels import has_input_channels, input_weight, is_layer, why_no_layer
from lq.producers import producer_of
from lq.surgery import has_quantized_layers


@dataclass(frozen=True)
class Places:
    """A recorded run of a float model.

    Attributes:
        flow: the run.
        names: of all modules.
        tied: identities of parameters that several modules hold.
        groups: layers that can be rescaled together with what gives their input.
        inputs: the values that the model was given.
    """

    flow: Flow
    names: dict[nn.Module, str]
    tied: set[int]
    groups: list[Group]
    inputs: set[int]

    def layers(self) -> dict[str, nn.Module]:
        """Linear layers, convolutions and attention, by name."""
        return {name: module for module, name in self.names.items() if has_input_channels(module)}

    def way_to(self, value: int) -> Iterator[Call]:
        """Calls that a value came through, from the last one: those that let a factor pass, then the one that lets none."""
        makers = {output: call for call in self.flow.calls for output in call.outputs}
        while (call := makers.get(value)) is not None:
            yield call
            if not passes(call):
                return
            value = call.inputs[0]

    def takers(self) -> list[Call]:
        """Calls that take the model's input, behind what lets a factor pass."""
        reached, found = set(self.inputs), []
        for call in self.flow.calls:
            if reached.isdisjoint(call.inputs) or not call.outputs:  # what gives no tensor only looks at the input
                continue
            if passes(call):
                reached.update(call.outputs)
            else:
                found.append(call)
        return found

    def why_not(self, layer: nn.Module) -> str:
        """Why a layer is rescaled together with nothing before it."""
        if not is_layer(layer):
            return why_no_layer(layer)
        if id(input_weight(layer)) in self.tied:
            return "another module holds its weight too"
        uses = uses_of(self.flow, layer)
        if len(uses) != 1:
            return f"it runs {len(uses)} times" if uses else "it does not run, or other code takes its weight too"
        source = next((call for call in self.way_to(uses[0].inputs[0]) if not passes(call)), None)
        if source is None:
            return "its input is the model's"
        if producer_of(self.flow, source, self.tied) is None:
            return f"{self.label(source)} before it takes in no factor"
        return f"not all that {self.label(source)} before it gives goes to layers"

    def label(self, call: Call) -> str:
        """A call in words."""
        if isinstance(call.target, str):
            return f"`{call.target}`"
        return f"{type(call.target).__name__} `{self.names.get(call.target, '')}`"


class RecordingError(RuntimeError):
    """A model that runs, but not while it is recorded who feeds whom."""


def find_places(model: nn.Module, args: Any) -> Places:
    """Run a float model once, in evaluation, and find its places.

    Args:
        model: stays as it is.
        args: positional inputs of one forward; with no inputs at all the model's ``example_input_array``.

    Raises:
        ValueError: the model has quantized layers, or there are no inputs.
        RecordingError: the model does not run while it is recorded.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
    >>> places = find_places(model, torch.ones(1, 2))
    >>> {name: places.why_not(layer) for name, layer in places.layers().items()}
    {'0': "its input is the model's", '2': 'GELU `1` before it takes in no factor'}
    """
    if has_quantized_layers(model):
        raise ValueError("The model has quantized layers: corrections come before `lq.quantize_` (`lq.dequantize_` undoes it).")
    register_known(model)
    example = example_inputs(model, args, why="A correction has the model run once")
    fed = _Fed(model)
    try:
        with without_fast_paths(model):
            flow = trace(fed, *example)
    except torch.OutOfMemoryError:
        raise  # of another run too
    except (TypeError, RuntimeError) as error:
        raise RecordingError(f"the model's run cannot be recorded: {error}") from error
    names = {module: name or type(module).__name__ for name, module in model.named_modules()}
    tied = shared_parameters(model)
    groups = find_groups(flow, [m for m in names if is_layer(m)], tied, set())
    return Places(flow, names, tied, groups, {value for call in flow.calls_of(fed.entry) for value in call.outputs})


class _Fed(nn.Module):
    """A model behind an identity on its inputs, so that a recorded run shows which values they are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.entry, self.model = nn.Identity(), model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda leaf: self.entry(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return self.model(*args, **kwargs)
