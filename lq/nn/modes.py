"""Modes of a block's calls that are under way."""

import threading
from typing import Any, Generic, TypeVar

from torch.overrides import TorchFunctionMode

Mode = TypeVar("Mode", bound=TorchFunctionMode)


class Modes(threading.local, Generic[Mode]):
    """Function modes that hooks of a block entered, the innermost call's last, of the thread that asks.

    A model may run in several threads at once, as under ``DataParallel`` or behind a server: each has modes of its own.
    """

    def __init__(self) -> None:
        self.stack: list[Mode] = []

    def enter(self, mode: Mode) -> None:
        """A call begins."""
        self.stack.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(self) -> Mode:
        """The innermost call ends, or fails."""
        mode = self.stack.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return mode

    @property
    def current(self) -> Mode | None:
        """Of the innermost call; ``None`` outside of any."""
        return self.stack[-1] if self.stack else None

    def __reduce__(self) -> tuple[Any, ...]:
        # calls that are under way belong to the original
        return type(self), ()
