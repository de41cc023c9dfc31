"""Run a model for its outputs only."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lq.nn.branches import branching


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block, and hooks in every branch; each module's own mode again after it.

    >>> model = nn.Dropout()
    >>> with evaluating(model):
    ...     print(model.training)
    False
    >>> model.training
    True
    """
    training = [module for module in model.modules() if module.training]
    try:
        if training:
            model.eval()
        with torch.no_grad(), branching():
            yield
    finally:
        for module in training:
            module.training = True
