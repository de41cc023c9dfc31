"""The clock of a fit: optimizer steps, or train batches where the module steps its optimizers by hand.

Lightning counts every ``step()`` of every optimizer then: as many in a batch as there are optimizers.
"""

import math
from typing import Any

from lightning.pytorch import Trainer


def by_hand(trainer: Trainer) -> bool:
    """Whether the module steps its optimizers itself."""
    return not trainer.lightning_module.automatic_optimization


def step_of(trainer: Trainer) -> int:
    """Steps that are done: at the start of a train batch without it, at its end with it."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(batches.processed) if by_hand(trainer) else trainer.global_step


def total_steps(trainer: Trainer) -> float:
    """Steps of the fit; infinite if it has no end, or its train loader no length and ``max_steps`` is not set."""
    steps = float(trainer.estimated_stepping_batches)
    if by_hand(trainer):
        epochs = trainer.max_epochs
        return math.inf if epochs in (None, -1) else float(epochs) * trainer.num_training_batches
    # Lightning hands on `max_steps=-1` where the loader has no length
    return steps if steps >= 0 else math.inf


def steps_per_epoch(trainer: Trainer) -> float:
    """Steps of an epoch; infinite if the train loader has no length."""
    batches = trainer.num_training_batches
    return batches if math.isinf(batches) or by_hand(trainer) else math.ceil(batches / trainer.accumulate_grad_batches)
