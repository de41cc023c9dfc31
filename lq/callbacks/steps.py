"""The clock of a fit: optimizer steps, or train batches where the module steps its optimizers by hand.

Lightning counts every ``step()`` of every optimizer then: as many in a batch as there are optimizers.
"""

import math
from itertools import pairwise
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lq.schedule import Length, to_steps


def by_hand(trainer: Trainer) -> bool:
    """Whether the module steps its optimizers itself."""
    return not trainer.lightning_module.automatic_optimization


def step_of(trainer: Trainer) -> int:
    """Steps that are done: at the start of a train batch without it, at its end with it."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(batches.processed) if by_hand(trainer) else trainer.global_step


def in_steps(trainer: Trainer, length: Length | None, name: str) -> int | None:
    """A length as steps of this fit, for :func:`lq.schedule.to_steps`; ``name`` is that of the option, for errors."""
    # only a share asks how many there are
    total = total_steps(trainer) if isinstance(length, float) else math.inf
    return to_steps(length, total, name, steps_per_epoch(trainer))


def total_steps(trainer: Trainer) -> float:
    """Steps of the fit; infinite if it has no end, or its train loader no length and ``max_steps`` is not set.

    Raises:
        MisconfigurationException: ``max_steps`` where several optimizers are stepped by hand, which does not say how many batches
            there will be.
    """
    most = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if by_hand(trainer) and len(trainer.optimizers) > 1 and not math.isinf(most):
        raise MisconfigurationException(
            f"`max_steps` is {most}, and counts the steps of {len(trainer.optimizers)} optimizers that the module steps by hand, "
            "not batches: set `max_epochs`, and `limit_train_batches` if need be, and leave `max_steps` out."
        )
    if trainer.max_epochs in (None, -1):
        return most
    # Lightning's `estimated_stepping_batches` knows no scheduler of the accumulation, and no optimization by hand
    starts = [epoch for epoch in _accumulation(trainer).epochs if epoch < trainer.max_epochs]
    alike = pairwise([*starts, trainer.max_epochs])
    return min(most, sum((after - first) * _steps_of(trainer, first) for first, after in alike))


def steps_per_epoch(trainer: Trainer) -> float:
    """Steps of each epoch; infinite if the train loader has no length, or epochs differ in theirs."""
    lengths = {_steps_of(trainer, epoch) for epoch in _accumulation(trainer).epochs}
    return lengths.pop() if len(lengths) == 1 else math.inf


def _steps_of(trainer: Trainer, epoch: int) -> float:
    batches = trainer.num_training_batches
    return batches if math.isinf(batches) else math.ceil(batches / _accumulation(trainer).get_accumulate_grad_batches(epoch))


def _accumulation(trainer: Trainer) -> GradientAccumulationScheduler:
    """How many batches make a step, by epoch: the Trainer itself knows what a scheduler says only when the epoch has started."""
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    return schedulers[0] if schedulers else GradientAccumulationScheduler({0: trainer.accumulate_grad_batches})
