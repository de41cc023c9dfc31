"""The learning rate of quantization-aware training."""

import math
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lq import checkpoint
from lq.callbacks.building import refuse_swa
from lq.callbacks.steps import in_steps, step_of, total_steps
from lq.schedule import Length, cosine_factor, to_steps


class QATSchedule(Callback):
    """Half a cosine from a share of the original learning rate down to a share of that.

    NVIDIA's recipe: fine-tune for about 10 % of the original epochs, from 1 % of the original learning rate down to 1 % of it.
    The rate is a pure function of the step, written into every parameter group before each batch, so resuming needs no state. A
    scheduler of the module's own is overruled, with a warning. Of several optimizers, each starts from its own rates; where the
    module steps them by hand, steps are train batches.

    Put a ``LearningRateMonitor`` behind this callback, so that it sees the rate that is used.

    Args:
        lr_factor: the learning rate to start with, in units of the one that ``configure_optimizers`` set, or the highest that a
            scheduler of the module's would come to (:func:`lq.checkpoint.highest_lr`); ``None`` leaves rates alone.
        final: learning rate to end with, as a share of the first.
        warmup: length of a linear warm-up: steps, as a float a share of all steps, or ``"1 epoch"``.
        original: Lightning checkpoint of the float model: the original rates are those that it was trained with
            (:func:`lq.checkpoint.original`), not those that ``configure_optimizers`` sets.

    Raises:
        ValueError: a share outside its range, or a checkpoint without learning rates.
        MisconfigurationException: a fit without an end, or with StochasticWeightAveraging.
    """

    def __init__(
        self, lr_factor: float | None = 0.01, final: float = 0.01, warmup: Length = 0, original: str | Path | None = None
    ) -> None:
        if lr_factor is not None and not lr_factor > 0:
            raise ValueError(f"`lr_factor` is {lr_factor}: it must be a positive share of the original rate, or None.")
        if not 0 <= final <= 1:
            raise ValueError(f"`final` is {final}: it must lie in [0, 1].")
        to_steps(warmup, 1, "warmup", 1)
        self.lr_factor, self.final, self.warmup = lr_factor, final, warmup
        self.original = None if original is None else checkpoint.original(original)
        self._total = self._warmup = 0
        self._initial: list[list[float]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.lr_factor is None:
            return
        refuse_swa(trainer, "sets learning rates of its own, which QATSchedule would overrule")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.lr_factor is None:
            return
        # optimizer states are not restored yet, so these are the rates of `configure_optimizers` on resume too
        self._initial = [[checkpoint.highest_lr(g) for g in o.param_groups] for o in trainer.optimizers]
        if self.original is not None:
            self._initial = self._originals(self.original.lrs)
        if trainer.lr_scheduler_configs:
            names = ", ".join(type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs)
            rank_zero_warn(f"QATSchedule overrules the learning rates of {names}; `QATSchedule(lr_factor=None)` keeps them.")

    def _originals(self, found: list[list[float]]) -> list[list[float]]:
        """Rates of the float training, for the groups that there are now."""
        if [len(rates) for rates in found] != [len(rates) for rates in self._initial]:
            raise MisconfigurationException(
                f"`original` has {[len(r) for r in found]} parameter groups, and this fit {[len(r) for r in self._initial]}: "
                "leave it out, and set the original rates in `configure_optimizers`."
            )
        return [list(rates) for rates in found]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.lr_factor is None:
            return
        # not before: whoever asks earlier has Lightning start the loaders before a checkpoint has put them in their place
        total = total_steps(trainer)
        if math.isinf(total):
            raise MisconfigurationException(
                "A cosine needs an end, and the fit has none: set `max_epochs` (`max_steps`, if the train loader has no length), "
                "or `QATSchedule(lr_factor=None)`."
            )
        self._total, self._warmup = int(total), in_steps(trainer, self.warmup, "warmup") or 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.lr_factor is None:
            return
        factor = self.lr_factor * cosine_factor(step_of(trainer), self._total, final=self.final, warmup=self._warmup)
        for optimizer, rates in zip(trainer.optimizers, self._initial, strict=True):
            # groups that came later (layers that a fine-tuning callback unfroze) start from the rate they came with
            rates += [group["lr"] for group in optimizer.param_groups[len(rates) :]]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
