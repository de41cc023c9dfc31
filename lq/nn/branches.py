"""``torch.cond`` in a run that is looked at: torch compiles its branches even in eager mode, and hooks cannot be compiled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def choose(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    """What ``torch.cond`` computes, as the ``if`` that it is."""
    return (true_fn if pred else false_fn)(*operands)


@contextmanager
def branching(cond: Callable[..., Any] = choose) -> Iterator[None]:
    """Within the block ``cond`` stands for ``torch.cond``.

    >>> with branching():
    ...     torch.cond(torch.tensor(True), lambda x: x + 1, lambda x: x - 1, (torch.tensor(1),))
    tensor(2)
    """
    original = torch.cond
    setattr(torch, "cond", cond)  # noqa: B010 (mypy knows that a function is no variable)
    try:
        yield
    finally:
        setattr(torch, "cond", original)  # noqa: B010
