"""BatchNorm statistics that belong to the quantized weights."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.modules.batchnorm import _BatchNorm

from lq.callbacks.building import all_callbacks, averages
from lq.callbacks.feeding import feed, train_batches, untouched_data
from lq.callbacks.freeze import ScaleFreeze
from lq.corrections import batchnorms, reestimating_batchnorm


class ReestimateBatchNorm(Callback):
    """Estimates BatchNorm statistics anew on train batches, before each validation of a fit and at its end (Nagel et al., 2022,
    arXiv:2203.08114, section 2.3.1).

    What is validated, kept as the best, called ``qat``, and left behind, has statistics of the weights as they are, or as
    Lightning's ``WeightAveraging`` averages them, behind which it has to stand; training itself uses those of its batches. Random
    numbers and the order of the data are left alone. BatchNorms that the module holds in evaluation keep theirs.

    Args:
        batches: train batches, on each rank, whose statistics are averaged, with those of the other ranks; 0 does nothing.

    Raises:
        ValueError: a negative number of batches.
        MisconfigurationException: the module has no BatchNorm, or the fit has a ScaleFreeze that freezes them, or a
            WeightAveraging stands behind this callback.
    """

    def __init__(self, batches: int = 50) -> None:
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
            raise ValueError(f"`batches` is {batches!r}: give a number of train batches, or 0 to leave BatchNorm alone.")
        self.batches = batches
        # those that the last train batch changed, and the step of which they are
        self._live: list[_BatchNorm] = []
        self._norms: list[_BatchNorm] = []
        self._step = -1

    def reestimation_step(self, pl_module: LightningModule, batch: Any) -> None:
        """Run the model on a batch, as :meth:`Quantize.calibration_step` does. Override it for batches that need more."""
        feed(pl_module, batch)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or not self.batches:
            return
        for callback in all_callbacks(trainer):
            if isinstance(callback, ScaleFreeze) and callback.batchnorm and callback.freeze_after is not None:
                raise MisconfigurationException(
                    "ScaleFreeze freezes BatchNorm statistics, and ReestimateBatchNorm estimates them anew: give it "
                    "`batchnorm=False` (`schedule.freeze_batchnorm=false`), or leave one out."
                )
        callbacks = list(all_callbacks(trainer))
        if any(callback in callbacks[callbacks.index(self) :] for callback in averages(trainer)):
            raise MisconfigurationException(
                "WeightAveraging stands behind ReestimateBatchNorm, which would not see the averages: put it before."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._norms, self._live, self._step = [], [], -1
        if not self.batches:
            return
        self._norms = batchnorms(pl_module)
        if not self._norms:
            raise MisconfigurationException(f"{type(pl_module).__name__} has no BatchNorm to estimate: set `batches` to 0.")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._live = [norm for norm in self._norms if norm.training]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # here, because what changes scales at the end of a train batch has done so, and averages are in their place
        self._estimate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._estimate(trainer, pl_module)
        self._norms, self._live = [], []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._norms, self._live = [], []

    def _estimate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._live or self._step == trainer.global_step:
            return
        self._step = trainer.global_step
        with untouched_data(trainer.train_dataloader) as loaders, reestimating_batchnorm(pl_module, self._live):
            for batch in train_batches(trainer, pl_module, loaders, self.batches):
                with trainer.precision_plugin.forward_context():
                    self.reestimation_step(pl_module, batch)
