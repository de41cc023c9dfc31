"""What a correction did, and what it left."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Applied:
    """A change that a correction made.

    Attributes:
        name: the layer or module.
        detail: what was done, with numbers.
        factor: what a layer multiplies its input by from now on, where the correction has it do so.
    """

    name: str
    detail: str
    factor: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Corrections:
    """What a correction did to a model.

    Attributes:
        applied: the changes, in the order of the model's layers.
        left: places that it might have changed and did not, by name, and why.

    >>> Corrections([Applied("fc", "factor 2")], {"head": "it runs twice"})
    Corrections(applied=[Applied(name='fc', detail='factor 2')], left={'head': 'it runs twice'})
    """

    applied: list[Applied] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


# What changes a model, in place, given batches of its positional inputs.
Correction = Callable[[nn.Module, Iterable[Any]], Corrections]
