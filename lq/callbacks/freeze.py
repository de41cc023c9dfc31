"""Scales that stand still, are refreshed now and then, and are frozen for good."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lq.calib import gather
from lq.calibration import load_calib_amax_, merge_statistics_, observe_, stop_observing_
from lq.callbacks.building import refuse_swa, warn_if_unquantized
from lq.callbacks.steps import in_steps, step_of
from lq.methods import Method, check_options
from lq.nn import TensorQuantizer
from lq.schedule import Length, is_observing, is_refresh, to_steps
from lq.surgery import freeze_, named_quantizers

# Where a checkpoint has the statistics of an observation that is not over.
STATISTICS = "lq_statistics"


class ScaleFreeze(Callback):
    """Keeps every amax bit-identical between refreshes, and from the freeze point to the end.

    A refresh takes the statistics of the steps before it, on all ranks, and blends the amax they give into the present one; amax
    of weights follows the weights at the same moments. All is a function of the optimizer step, and a checkpoint has the
    statistics of an observation that is not over, of each rank, so resuming keeps the clock. What is learned (PACT, LSQ) is not
    refreshed, and is frozen with the others.

    Lengths are whole numbers of optimizer steps (of train batches, where the module steps by hand), floats for a share of all of
    them, or texts for epochs: ``"2 epochs"``.

    Args:
        refresh_every: length between refreshes; ``None`` or 0 never refreshes.
        observe: steps whose batches are looked at before each refresh.
        momentum: share of the present amax that a refresh keeps, in [0, 1).
        freeze_after: length after which amax stays for good; ``None`` never freezes.
        batchnorm: let BatchNorm statistics stay too from the freeze point on.
        method: how a refresh chooses amax, as for :func:`lq.calibrating`.
        method_options: its options: ``percentile``, ``z_threshold``, ``power_of_two`` ...
    """

    def __init__(
        self,
        refresh_every: Length | None = 0.1,
        *,
        observe: int = 4,
        momentum: float = 0.5,
        freeze_after: Length | None = 0.5,
        batchnorm: bool = True,
        method: Method = "mse",
        method_options: dict[str, Any] | None = None,
    ) -> None:
        check_options(method, method_options or {}, observe)
        to_steps(refresh_every, 1, "refresh_every", 1)
        to_steps(freeze_after, 1, "freeze_after", 1)
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` is {momentum}: it must lie in [0, 1).")
        if observe < 1:
            raise ValueError(f"`observe` is {observe}: a refresh needs at least 1 step.")
        self.refresh_every, self.observe, self.momentum = refresh_every, observe, momentum
        self.freeze_after, self.batchnorm = freeze_after, batchnorm
        self.method, self.method_options = method, method_options or {}
        self._every: int | None = None
        self._freeze: int | None = None
        # whether statistics for the next refresh are at hand, and what a checkpoint had of them
        self._observed = False
        self._restored: list[dict[str, dict[str, Any]]] = []
        self._is_frozen = False
        self._frozen: set[TensorQuantizer] = set()
        self._learned: list[nn.Parameter] = []
        self._batchnorms: set[nn.Module] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = []  # what a test of a checkpoint left
        if stage == "fit" and self.freeze_after is not None and self.batchnorm:
            refuse_swa(trainer, "estimates BatchNorm statistics anew at the end, which ScaleFreeze has frozen by then")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        warn_if_unquantized(self, pl_module)
        self._every = in_steps(trainer, self.refresh_every, "refresh_every")
        self._freeze = in_steps(trainer, self.freeze_after, "freeze_after")
        restored, self._restored = self._restored, []
        self._observed = len(restored) == trainer.world_size
        if self._observed:
            stop_observing_(observe_(pl_module, self.method))
            for name, quantizer in named_quantizers(pl_module):
                quantizer.calibrator.load_statistics(restored[trainer.global_rank].get(name, {}))
        elif restored:
            rank_zero_warn(
                f"The checkpoint has an observation of {len(restored)} processes, and there are {trainer.world_size}: the next "
                "refresh looks at the steps from here on only."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = step_of(trainer)
        if self._freeze is not None and step >= self._freeze:
            self._freeze_all(pl_module)
        elif is_observing(step, self._every, self.observe, self._freeze):
            # only between the start and the end of a train batch, so that no validation data gets in
            observe_(pl_module, self.method, keep=self._observed)
            self._observed = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._observed:
            return
        stop_observing_(pl_module)
        # before a checkpoint of this step is written, because ModelCheckpoint comes last
        if is_refresh(step_of(trainer), self._every):
            merge_statistics_(pl_module)
            # a layer that the model did not call lately keeps its amax
            load_calib_amax_(pl_module, self.method, momentum=self.momentum, strict=False, **self.method_options)
            self._observed = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a module that ends its epoch in `on_train_batch_start` leaves out the end of the batch
        if self._observed:
            stop_observing_(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._let_go(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._observed:
            moving = {name: q for name, q in named_quantizers(pl_module) if not q.fixed}
            checkpoint[STATISTICS] = gather({name: q.calibrator.statistics() for name, q in moving.items()})

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(STATISTICS, [])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for parameter in self._learned:
            parameter.grad = None

    def _freeze_all(self, pl_module: LightningModule) -> None:
        if not self._is_frozen:
            self._is_frozen = True
            self._frozen = {quantizer for _, quantizer in named_quantizers(pl_module) if not quantizer.frozen}
            freeze_(pl_module)
            self._learned = [p for quantizer in self._frozen for p in quantizer.parameters()]
            for parameter in self._learned:
                # a DDP wrapper waits for the gradient of every parameter that it was made with: they lose it before the step
                parameter.requires_grad_(True)
            norms = [m for m in pl_module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            self._batchnorms = {m for m in norms if m.training} if self.batchnorm else set()
        # every batch, because whoever puts the module into train mode takes its BatchNorms along
        for module in self._batchnorms:
            module.training = False

    def _let_go(self, pl_module: LightningModule) -> None:
        """The fit is over: what this callback held still may move again."""
        if self._observed:
            stop_observing_(pl_module)
            self._observed = False
        self._is_frozen, self._learned = False, []
        while self._frozen:
            self._frozen.pop().frozen = False
        while self._batchnorms:
            self._batchnorms.pop().training = True
