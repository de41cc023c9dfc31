"""Which axes of example inputs are the batch."""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


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
