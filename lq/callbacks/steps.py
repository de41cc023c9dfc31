"""How long a fit is."""

import math

from lightning.pytorch import Trainer


def total_steps(trainer: Trainer) -> float:
    """Optimizer steps of the fit; infinite if it has no end, or its train loader no length and ``max_steps`` is not set."""
    steps = float(trainer.estimated_stepping_batches)
    # Lightning hands on `max_steps=-1` where the loader has no length
    return steps if steps >= 0 else math.inf


def steps_per_epoch(trainer: Trainer) -> float:
    """Optimizer steps of an epoch; infinite if the train loader has no length."""
    batches = trainer.num_training_batches
    return batches if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
