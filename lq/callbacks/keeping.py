"""Weights are quantized once where they do not change: in evaluation, and between steps of the optimizer."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lq.nn.reuse import forget_weights_, keep_weights_


class KeepsWeights(Callback):
    """:func:`lq.nn.keep_weights_` in evaluation, and in training for batches whose gradients are added up."""

    _step = -1

    def _evaluation_starts(self, trainer: Trainer, pl_module: LightningModule) -> None:
        keep_weights_(pl_module)

    def _evaluation_ends(self, trainer: Trainer, pl_module: LightningModule) -> None:
        forget_weights_(pl_module)
        self._step = -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # a step may have changed weights behind torch's version counters, as fused optimizers do
        if trainer.accumulate_grad_batches == 1:
            if self._step != -1:  # a scheduler came down to single batches
                self._evaluation_ends(trainer, pl_module)
        elif trainer.global_step != self._step:
            keep_weights_(pl_module)
            self._step = trainer.global_step

    on_validation_start = on_test_start = on_predict_start = _evaluation_starts
    on_validation_end = on_test_end = on_predict_end = on_train_end = _evaluation_ends

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        forget_weights_(pl_module)
