"""Example inputs of a model: where they come from, and where they are."""

import inspect
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

# Positional and keyword inputs of one forward.
Example = tuple[tuple[Any, ...], dict[str, Any]]


def as_args(inputs: Any) -> tuple[Any, ...]:
    """Positional inputs of a forward: a tuple as it is, a list as one, anything else alone."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def on_device_of(model: nn.Module, inputs: Any) -> Any:
    """Tensors in ``inputs``, nested as they may be, on the device of the model's first parameter or buffer."""
    device = next((t.device for t in chain(model.parameters(), model.buffers())), None)
    return inputs if device is None else tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)


def positional_inputs(model: nn.Module, batch: Any) -> tuple[Any, ...]:
    """A batch as the positional inputs of ``model``, on its device.

    Raises:
        TypeError: its ``forward`` takes more of them, or fewer.

    >>> positional_inputs(nn.ReLU(), [1, 2])
    Traceback (most recent call last):
      ...
    TypeError: A batch of 2 does not fit the forward of ReLU (too many positional arguments): leave labels out.
    """
    args = as_args(batch)
    try:
        inspect.signature(model.forward).bind(*args)
    except TypeError as mismatch:
        hint = "leave labels out" if "too many" in str(mismatch) else "give all that it takes, in a tuple"
        raise TypeError(
            f"A batch of {len(args)} does not fit the forward of {type(model).__name__} ({mismatch}): {hint}."
        ) from None
    moved: tuple[Any, ...] = on_device_of(model, args)
    return moved


def example_inputs(model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None, why: str = "") -> Example:
    """Inputs of one forward, on the model's device: those given, or its ``example_input_array``.

    Raises:
        ValueError: there are none; ``why`` they are needed begins the message.

    >>> example_inputs(nn.ReLU(), why="`target='tensorrt'` has the model run once")
    Traceback (most recent call last):
      ...
    ValueError: `target='tensorrt'` has the model run once: give `args`, or ReLU an `example_input_array`.
    """
    if not isinstance(args, tuple) or args or kwargs:
        example: Example = as_args(args), dict(kwargs or {})
    elif (own := getattr(model, "example_input_array", None)) is None:
        raise ValueError(f"{why}: give `args`, or {type(model).__name__} an `example_input_array`.")
    else:
        example = ((), dict(own)) if isinstance(own, Mapping) else (as_args(own), {})
    moved: Example = on_device_of(model, example)
    return moved
