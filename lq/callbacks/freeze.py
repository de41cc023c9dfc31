"""Scales that stand still, are refreshed now and then, and are frozen for good."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lq.calibration import check_options, load_calib_amax_, merge_statistics_, observe_
from lq.schedule import is_observing, is_refresh, to_steps
from lq.surgery import freeze_, unfreeze_


class ScaleFreeze(Callback):
    """Keeps every amax bit-identical between refreshes, and from the freeze point to the end.

    A refresh takes the statistics of the steps before it, on all ranks, and blends the amax they give into the present one; amax
    of weights follows the weights at the same moments. All is a function of the optimizer step, so resuming keeps the clock.

    Args:
        refresh_every: steps between refreshes, or as a float a share of all steps; ``None`` or 0 never refreshes.
        observe: steps whose batches are looked at before each refresh.
        momentum: share of the present amax that a refresh keeps, in [0, 1).
        freeze_after: steps, or as a float a share of all steps, after which amax stays for good; ``None`` never freezes.
        batchnorm: let BatchNorm statistics stay too from the freeze point on.
        method: how a refresh chooses amax.
        method_options: ``percentile``, ``start_bin``, ``stride``.
    """

    def __init__(
        self,
        refresh_every: int | float | None = 0.1,
        *,
        observe: int = 4,
        momentum: float = 0.5,
        freeze_after: int | float | None = 0.5,
        batchnorm: bool = True,
        method: str = "mse",
        method_options: dict[str, Any] | None = None,
    ) -> None:
        check_options(method, method_options or {})
        to_steps(refresh_every, 1, "refresh_every")
        to_steps(freeze_after, 1, "freeze_after")
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` is {momentum}: it must lie in [0, 1).")
        if observe < 1:
            raise ValueError(f"`observe` is {observe}: a refresh needs at least 1 step.")
        self.refresh_every, self.observe, self.momentum = refresh_every, observe, momentum
        self.freeze_after, self.batchnorm = freeze_after, batchnorm
        self.method, self.method_options = method, method_options or {}
        self._every: int | None = None
        self._freeze: int | None = None
        self._observing = False
        self._batchnorms: set[nn.Module] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._every = to_steps(self.refresh_every, total, "refresh_every")
        self._freeze = to_steps(self.freeze_after, total, "freeze_after")
        self._observing = False
        unfreeze_(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self._observing and is_refresh(step, self._every):
            load_calib_amax_(merge_statistics_(pl_module), self.method, momentum=self.momentum, **self.method_options)
            self._observing = False
        if self._freeze is not None and step >= self._freeze:
            freeze_(pl_module)
            self._freeze_batchnorm(pl_module)
        elif not self._observing and is_observing(step, self._every, self.observe, self._freeze):
            observe_(pl_module, self.method)
            self._observing = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while self._batchnorms:
            self._batchnorms.pop().training = True

    def _freeze_batchnorm(self, pl_module: LightningModule) -> None:
        # every batch, because whoever puts the module into train mode takes its BatchNorms along
        for module in pl_module.modules() if self.batchnorm else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                module.training = False
                self._batchnorms.add(module)
