"""Train batches in compiled code."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lq.callbacks.building import all_callbacks, is_compiled
from lq.callbacks.distill import Distill
from lq.callbacks.feeding import has_forward

Forward = Callable[..., Any]

# Graphs of one forward, in all fits of a process; dynamo's own 8 are soon used up by a teacher, by stages of bits, and by steps
# that scales are observed in.
MOST_GRAPHS = 64


class Compile(Callback):
    """Runs the module's ``forward`` on train batches compiled by ``torch.compile``, and that of Distill's teacher too.

    Put it first. The quantized module is compiled at the first train batch, where quantizers are fused with what is around them,
    and again where the code changes: for steps that ScaleFreeze observes, after it froze BatchNorm, for a smaller last batch, for
    each stage of ProgressiveBits and QuantDelay. New values of scales compile nothing (docs/performance.md). Calibration,
    validation and export stay eager, and nothing of it is left after the fit. Unlike ``trainer.fit(torch.compile(module))`` it
    leaves ``training_step`` alone, whose ``self.log`` dynamo cannot trace.

    Args:
        disable: do nothing.
        options: of ``torch.compile``: ``mode``, ``fullgraph``, ``dynamic``, ``backend``, ``options``.

    Raises:
        TypeError, RuntimeError: options that ``torch.compile`` does not take.
        MisconfigurationException: the module has no ``forward``, was compiled already, or does not call itself in
            ``training_step``; a Distill compares ``layers``, which compiled code does not show, or stands before Compile.

    >>> from lightning.pytorch import Trainer
    >>> from lq.callbacks import Distill, Quantize
    >>> parts = [Compile(mode="max-autotune-no-cudagraphs"), Distill(), Quantize(recompute=True)]
    >>> [type(callback).__name__ for callback in Trainer(callbacks=parts, logger=False).callbacks][:3]
    ['Compile', 'Distill', 'Quantize']
    """

    def __init__(self, disable: bool = False, **options: Any) -> None:
        if not disable:
            torch.compile(lambda: None, **options)  # compiles nothing, but looks at the options
        self.disable, self.options = disable, options
        self._forward: Forward | None = None
        self._teachers: list[LightningModule] = []
        self._ran = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.disable:
            return
        kind = type(pl_module).__name__
        if not has_forward(pl_module):
            raise MisconfigurationException(f"{kind} has no `forward` to compile: write one that `training_step` calls.")
        if is_compiled(pl_module):
            raise MisconfigurationException(f"{kind} is compiled already: give the Trainer the module itself.")
        callbacks = list(all_callbacks(trainer))
        for distill in (callback for callback in callbacks if isinstance(callback, Distill)):
            if distill.layers is not None:
                raise MisconfigurationException(
                    "Distill compares `layers`, whose outputs compiled code does not show: compare those of `forward` "
                    "(`layers=None`), or leave Compile out."
                )
            if callbacks.index(distill) < callbacks.index(self):
                raise MisconfigurationException("Compile stands behind Distill: put it first.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.disable:
            return
        self._forward, self._ran = self._compiled(pl_module.forward), False
        self._teachers = [callback.teacher for callback in all_callbacks(trainer) if isinstance(callback, Distill)]
        for teacher in self._teachers:
            teacher.forward = self._compiled(teacher.forward)  # type: ignore[method-assign]

    def _compiled(self, forward: Forward) -> Forward:
        compiled = torch.compile(forward, **self.options)

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._ran = True
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):
                return compiled(*args, **kwargs)

        return run

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._forward is not None:
            pl_module.forward = self._forward  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        # a copy that is made of the module between batches would run the module instead of itself
        self._restore(pl_module)
        if self._forward is not None and not self._ran:
            raise MisconfigurationException(
                f"`training_step` of {type(pl_module).__name__} ran nothing that is compiled: let it call `self(...)`, or leave "
                "Compile out."
            )

    # a module that ends its epoch in `on_train_batch_start` leaves out the end of the batch

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(pl_module, *self._teachers)
        self._forward, self._teachers = None, []

    def _restore(self, *modules: LightningModule) -> None:
        """Let them run the ``forward`` of their class again."""
        for module in modules if self._forward is not None else ():
            vars(module).pop("forward", None)
