"""Fake quantization that begins later in a fit."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lq.callbacks.adding import add_to_loss_
from lq.callbacks.steps import in_steps, step_of
from lq.nn import TensorQuantizer
from lq.nn.reuse import weight_quantizers
from lq.schedule import Length, to_steps
from lq.surgery import named_quantizers


class QuantDelay(Callback):
    """Trains in float first: weights are fake-quantized from one step on, activations from another (Krishnamoorthi, 2018,
    arXiv:1806.08342, section 3.3, delays activations).

    Train batches only: validation always sees the quantized model, so no checkpoint is chosen for an accuracy that it has in
    float. Statistics for a refresh of amax are taken as ever. A learned amax stands still while nothing is quantized with it. A
    pure function of the step.

    Args:
        inputs: length until activations are quantized: steps, as a float a share of all steps, or ``"1 epoch"``.
        weights: until weights are, likewise.

    Raises:
        ValueError: a length out of range, or a share of an unknown number of steps.
    """

    def __init__(self, inputs: Length = 0, weights: Length = 0) -> None:
        for name, value in (("inputs", inputs), ("weights", weights)):
            to_steps(value, 1, name, 1)
        self.inputs, self.weights = inputs, weights
        self._until = (0, 0)
        self._off: list[TensorQuantizer] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._until = (in_steps(trainer, self.inputs, "inputs") or 0, in_steps(trainer, self.weights, "weights") or 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        inputs, weights = (step_of(trainer) < until for until in self._until)
        if not inputs and not weights:
            return
        of_weights = set(weight_quantizers(pl_module))
        for _, quantizer in named_quantizers(pl_module):
            if quantizer._if_quant and (weights if quantizer in of_weights else inputs):
                quantizer.disable_quant()
                self._off.append(quantizer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.world_size > 1 and (waiting := self._unused()):
            # a DDP wrapper waits for the gradient of every parameter
            add_to_loss_(trainer, loss, 0 * torch.stack([parameter.sum() for parameter in waiting]).sum())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for parameter in self._unused():
            parameter.grad = None  # so that neither momentum nor decay moves it

    def _unused(self) -> list[nn.Parameter]:
        """What is learned by quantizers that are off."""
        learned = (q.parameters() for q in self._off if not q._if_clip)
        return [parameter for parameters in learned for parameter in parameters if parameter.requires_grad]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._let_go()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a module that ends its epoch in `on_train_batch_start` leaves out the end of the batch
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        while self._off:
            self._off.pop().enable_quant()
