"""What the quantizers do, in the log."""

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from lq.analysis.quantizer_stats import QuantizerStats, measuring
from lq.calib import HistogramCalibrator
from lq.surgery import named_quantizers


class QuantMonitor(Callback):
    """Logs ``amax/<layer>.<input|weight>`` and ``saturated/<layer>.<input|weight>`` to every logger.

    ``amax`` is the largest of a quantizer's channels, ``saturated`` the fraction of values beyond amax in the batch. With a
    ``WandbLogger``, the calibration histograms of inputs are logged as media when training starts.

    Args:
        every_n_steps: steps between logs; ``None`` takes the Trainer's ``log_every_n_steps``.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`every_n_steps` is {every_n_steps}: it must be at least 1, or None for the Trainer's own.")
        self.every_n_steps = every_n_steps
        self._stack = ExitStack()
        self._stats: dict[str, QuantizerStats] | None = None
        self._logged: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = None
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                log_histograms(logger, pl_module, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        # a step of several batches (gradient accumulation) is logged once
        if trainer.loggers and every and step % every == 0 and step != self._logged and trainer.is_global_zero:
            self._logged = step
            self._stats = self._stack.enter_context(measuring(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._stats is None:
            return
        stats, self._stats = self._stats, None
        self._stack.close()
        metrics = _metrics(pl_module, stats)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stats = None
        self._stack.close()


def _metrics(pl_module: LightningModule, stats: dict[str, QuantizerStats]) -> dict[str, float]:
    """What to log, fetched from the device at once."""
    values = {f"saturated/{n}": s.totals[0] / s.totals[1] for n, s in stats.items() if s.totals is not None}
    values |= {f"amax/{n}": q.amax.max().double() for n, q in named_quantizers(pl_module) if q.amax is not None}
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}


def log_histograms(logger: Logger, pl_module: LightningModule, step: int) -> None:
    """Histograms of the activations that amax was chosen from, as W&B media ``histogram/<layer>.input``."""
    import wandb

    media = {}
    for name, quantizer in named_quantizers(pl_module):
        calibrator = quantizer.calibrator
        if isinstance(calibrator, HistogramCalibrator) and calibrator.collected and calibrator.counts.shape[0] == 1:
            # 256 bins are what W&B draws well
            counts = calibrator.counts[0].reshape(256, -1).sum(dim=1).cpu().numpy()
            edges = calibrator.width.item() * calibrator.counts.shape[1] / 256 * torch.arange(257).numpy()
            media[f"histogram/{name}"] = wandb.Histogram(np_histogram=(counts, edges))
    if media:
        logger.experiment.log(media | {"trainer/global_step": step})  # type: ignore[attr-defined]
