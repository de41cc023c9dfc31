"""Example inputs: where they are, and which of their axes is the batch."""

import inspect
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def as_args(inputs: Any) -> tuple[Any, ...]:
    """Positional inputs of a forward: a tuple as it is, a list as one, anything else alone."""
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def on_device_of(model: nn.Module, inputs: Any) -> Any:
    """Tensors in ``inputs``, nested as they may be, on the device of the model's first parameter or buffer."""
    device = next((t.device for t in chain(model.parameters(), model.buffers())), None)
    return inputs if device is None else tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, inputs)


def batch_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """``dynamic_shapes`` for :func:`torch.onnx.export`: axis 0 free in all tensors that agree there with the first one.

    >>> from torch import ones
    >>> batch_shapes(nn.ReLU(), (ones(3, 2),), {})
    {'input': {0: 'batch'}}
    """
    sizes = [leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes:
        return None

    def has_batch(x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == sizes[0]

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    shapes: dict[str, Any] = tree_map(lambda x: {0: "batch"} if has_batch(x) else None, dict(bound))
    return shapes
