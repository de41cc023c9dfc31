"""Which axes of example inputs are the batch."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lq.nn.example import Example, as_args


def checked_inputs(model: nn.Module, args: Any, kwargs: Mapping[str, Any] | None) -> Example:
    """Positional and keyword inputs, of which it is clear that ``forward`` takes them.

    Raises:
        TypeError: it does not.
    """
    if args is None:
        raise TypeError("`args` is None: give the positional inputs of one forward, a tensor or a tuple; `()` for none.")
    given, named = as_args(args), dict(kwargs or {})
    try:
        inspect.signature(model.forward).bind(*given, **named)
    except TypeError as mismatch:
        raise TypeError(f"`args` and `kwargs` do not fit the `forward` of {type(model).__name__}: {mismatch}.") from None
    return given, named


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

    signature = inspect.signature(model.forward)
    shapes: dict[str, Any] = tree_map(
        lambda x: {0: "batch"} if has_batch(x) else None, dict(signature.bind(*args, **kwargs).arguments)
    )
    # by their own names, as `name_caught_` has them
    caught: dict[str, Any] = shapes.pop(_catching(signature), {})
    return shapes | caught


def name_caught_(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Have keyword inputs that ``forward`` catches with ``**`` in its signature, in place: torch.export needs their names."""
    forward = model.forward
    signature = inspect.signature(forward)
    if not (catching := _catching(signature)):
        return

    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = [p for p in signature.parameters.values() if p.name != catching]
    caught = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs if name not in signature.parameters]
    named.__signature__ = signature.replace(parameters=own + caught)  # type: ignore[attr-defined]
    model.forward = named


def _catching(signature: inspect.Signature) -> str:
    return next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
