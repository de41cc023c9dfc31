"""What the quantizers do, in the log."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lq.analysis.quantizer_stats import QuantizerStats, decibels, measuring
from lq.calib import HistogramCalibrator
from lq.callbacks.building import warn_if_unquantized
from lq.callbacks.quantize import Quantize
from lq.surgery import named_quantizers

METRICS = ("amax", "saturated", "sqnr", "codes", "drift")
SAMPLE = 2**15  # values of a tensor that are looked at


class QuantMonitor(Callback):
    """Logs ``<metric>/<layer>.<input|weight>`` for every quantizer to every logger. The metrics:

    - ``amax``: the largest of its channels, in units of the tensor.
    - ``saturated``: share of the batch's values beyond amax (or the range that is learned), 0 to 1.
    - ``sqnr``: power of the batch's values over the power of what rounding and clipping changed, in dB.
    - ``codes``: share of the integer grid's codes that occur in the batch, 0 to 1; not for floats and for more than 12 bits.
    - ``drift``: relative change of amax since the step logged before, the largest of its channels; 0 while amax stands still, so
      that a plot shows refreshes as spikes.

    All values of a step come from the device in one transfer. Of large tensors 32768 values at most are looked at, spread evenly.
    A step of several batches (gradient accumulation) is logged once, with its first. Compiled models run eagerly while they are
    measured. An infinite SQNR (no noise) and the first drift are left out. Under DDP, rank 0 logs what it sees. W&B also gets
    the calibration histograms of inputs, and when training ends the table ``stages`` of what :class:`Quantize` validated.

    Args:
        every_n_steps: steps between logs; ``None`` takes the Trainer's ``log_every_n_steps``.
        metrics: which of the metrics to log.
        warn_saturated: a quantizer that saturates a larger share is named in a warning, once a fit; ``None`` does not warn.
    """

    def __init__(
        self, every_n_steps: int | None = None, metrics: Sequence[str] = METRICS, warn_saturated: float | None = 0.1
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"`every_n_steps` is {every_n_steps}: it must be at least 1, or None for the Trainer's own.")
        metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        if unknown := [metric for metric in metrics if metric not in METRICS]:
            raise ValueError(f"`metrics` has {unknown[0]!r}, which is not known: choose from {', '.join(METRICS)}.")
        if warn_saturated is not None and not 0 <= warn_saturated < 1:
            raise ValueError(f"`warn_saturated` is {warn_saturated}: it must be a share in [0, 1), or None for no warning.")
        self.every_n_steps, self.metrics, self.warn_saturated = every_n_steps, metrics, warn_saturated
        self._stack, self._warned = ExitStack(), set[str]()
        self._stats: dict[str, QuantizerStats] | None = None
        self._logged: int | None = None
        self._amax: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged, self._amax, self._warned = None, {}, set()
        warn_if_unquantized(self, pl_module)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                log_histograms(logger, pl_module, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step, every = trainer.global_step, self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.loggers and every and step % every == 0 and step != self._logged and trainer.is_global_zero:
            self._logged = step
            # compiled code would not see the hooks, or, where it is made now, keep them for good
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._stats = self._stack.enter_context(measuring(pl_module, sample=SAMPLE, codes="codes" in self.metrics))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._stats is None:
            return
        stats, self._stats = self._stats, None
        self._stack.close()
        found = self._fetch(pl_module, stats)
        self._warn(found["saturated"], trainer.global_step)
        values = {f"{metric}/{name}": value for metric in self.metrics for name, value in found[metric].items()}
        for logger in trainer.loggers:
            logger.log_metrics({key: v for key, v in values.items() if math.isfinite(v)}, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a module that ends its epoch in `on_train_batch_start` leaves out the end of the batch
        self._let_go()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                log_stages(logger, trainer.callbacks, trainer.global_step)  # type: ignore[attr-defined]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._stats = None
        self._stack.close()

    def _fetch(self, pl_module: LightningModule, stats: dict[str, QuantizerStats]) -> dict[str, dict[str, float]]:
        """Metric, quantizer, value: in one transfer from the device."""
        ranges = {name: q.amax for name, q in named_quantizers(pl_module) if q.amax is not None}
        parts = {("totals", n): s.totals for n, s in stats.items() if s.totals is not None}
        parts |= {("codes", n): s.codes.double().mean()[None] for n, s in stats.items() if s.codes is not None}
        parts |= {("amax", n): amax.max().double()[None] for n, amax in ranges.items()}
        if "drift" in self.metrics:
            last = {n: amax for n, amax in self._amax.items() if n in ranges and ranges[n].shape == amax.shape}
            parts |= {("drift", n): _drift(ranges[n], amax) for n, amax in last.items()}
            self._amax = {n: amax.clone() for n, amax in ranges.items()}  # a refresh writes into the tensor itself
        values = iter(torch.cat(list(parts.values())).tolist() if parts else ())
        return _metrics({key: list(islice(values, len(part))) for key, part in parts.items()})

    def _warn(self, saturated: dict[str, float], step: int) -> None:
        limit = 1.0 if self.warn_saturated is None else self.warn_saturated
        shares = {name: share for name, share in saturated.items() if share > limit and name not in self._warned}
        self._warned |= shares.keys()
        if shares:
            rank_zero_warn(
                f"More than {limit:.0%} of the values lie beyond amax at step {step}: "
                + ", ".join(f"{share:.0%} of `{name}`" for name, share in shares.items())
                + ". Choose another `method` for them (`max` cuts least off), or let `ScaleFreeze` refresh amax more often."
            )


def _drift(amax: Tensor, before: Tensor) -> Tensor:
    """Lowest and highest relative change of a channel, float64 ``(2,)``; a channel that was 0 does not count.

    >>> _drift(torch.tensor([1.5, 1.5, 0.5]), torch.tensor([1.0, 2.0, 0.0])).tolist()
    [-0.25, 0.5]
    """
    return torch.stack(torch.aminmax((amax.double() / before - 1).nan_to_num(0.0, 0.0, 0.0)))


def _metrics(fetched: dict[tuple[str, str], list[float]]) -> dict[str, dict[str, float]]:
    """From the numbers of each kind and quantizer to each metric's.

    >>> _metrics({("totals", "fc.input"): [1.0, 4.0, 50.0, 0.5], ("drift", "fc.input"): [-0.5, 0.25]})
    {'amax': {}, 'saturated': {'fc.input': 0.25}, 'sqnr': {'fc.input': 20.0}, 'codes': {}, 'drift': {'fc.input': -0.5}}
    """
    found: dict[str, dict[str, float]] = {metric: {} for metric in METRICS}
    for (kind, name), numbers in fetched.items():
        if kind == "totals":
            saturated, values, signal, noise = numbers
            found["saturated"][name] = saturated / values if values else math.nan
            found["sqnr"][name] = decibels(signal, noise)
        else:
            found[kind][name] = max(numbers, key=abs)
    return found


def log_stages(logger: WandbLogger, callbacks: list[Callback], step: int) -> None:
    """The metrics of each stage of :class:`Quantize`, alone or inside another callback, as a W&B table ``stages``."""
    for callback in callbacks:
        quantize = getattr(callback, "quantize", callback)
        if isinstance(quantize, Quantize) and quantize.stages:
            names = list(dict.fromkeys(name for metrics in quantize.stages.values() for name in metrics))
            rows = [[stage, *map(metrics.get, names)] for stage, metrics in quantize.stages.items()]
            logger.log_table("stages", ["stage", *names], rows, step=step)


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
