"""Weights that settle before a fit ends."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lq.callbacks.steps import in_steps, step_of, total_steps
from lq.oscillation import Oscillations, damp_
from lq.schedule import Length, cosine_ramp, to_steps


class SettleWeights(Callback):
    """Damps weights that oscillate between two codes, and freezes those that go on (Nagel et al., 2022, arXiv:2203.08114).

    With few bits, and step sizes that are learned, weights near the border of two bins cross it again and again to the end. The
    damping loss pulls weights to the centres of their bins, stronger along half a cosine (section 4.2); a weight whose code turns
    round more often than a threshold, which falls along the same cosine, is held at the code it had most (section 4.3). The
    strength and the threshold are functions of the step; a checkpoint has the frequencies and what is frozen.

    Loggers get the shares ``oscillation/frozen`` and ``oscillation/frequent``, of those above the paper's 0.5 %.

    Args:
        damping: strength of the loss at the last step, for a sum over all weights; 0 does not damp. The paper has 1e-4 to 1e-2.
        freeze: frequency above which weights are frozen, at the start and at the end, or one for both; ``None`` freezes none. The
            paper goes from 0.04 to 0.01.
        momentum: share of a step in the running frequency.
        after: length until both begin: steps, as a float a share of all steps, or ``"1 epoch"``.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: a fit without an end.
    """

    def __init__(
        self, damping: float = 0.0, freeze: float | Sequence[float] | None = None, *, momentum: float = 0.01, after: Length = 0
    ) -> None:
        if damping < 0:
            raise ValueError(f"`damping` is {damping}: it must not be negative.")
        thresholds = tuple(freeze) if isinstance(freeze, Sequence) else (freeze, freeze)
        if freeze is not None and not (len(thresholds) == 2 and all(0 < t < 1 for t in thresholds if t is not None)):
            raise ValueError(f"`freeze` is {freeze}: give a frequency in (0, 1), or two, at the start and at the end.")
        if not 0 < momentum <= 1:
            raise ValueError(f"`momentum` is {momentum}: it must lie in (0, 1].")
        to_steps(after, 1, "after", 1)
        self.damping, self.freeze, self.momentum, self.after = damping, freeze, momentum, after
        self._thresholds = thresholds
        self._start, self._total = 0, 1.0
        self._oscillations: Oscillations | None = None
        self._restored: dict[str, Any] = {}
        self._step = self._logged = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = {}  # what a test of a checkpoint left

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._oscillations = None
        restored, self._restored = self._restored, {}
        if not self.damping and self.freeze is None:
            return
        self._total = total_steps(trainer)
        if math.isinf(self._total):
            raise MisconfigurationException("SettleWeights needs an end, and the fit has none: set `max_epochs` or `max_steps`.")
        self._start = in_steps(trainer, self.after, "after") or 0
        self._step = step_of(trainer)
        if restored:
            self._oscillations = Oscillations(pl_module, self.momentum)
            self._oscillations.load_state_dict(restored)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.damping and (strength := self.damping * self._ramp(step_of(trainer))):
            damp_(pl_module, strength, (p for group in optimizer.param_groups for p in group["params"]))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = step_of(trainer)
        if self.freeze is None or step == self._step or step < self._start:
            return
        self._step = step
        if self._oscillations is None:
            self._oscillations = Oscillations(pl_module, self.momentum)
        first, last = self._thresholds
        assert first is not None
        assert last is not None
        self._oscillations.update_(first + (last - first) * self._ramp(step))
        self._log(trainer, self._oscillations)

    def _ramp(self, step: int) -> float:
        return cosine_ramp(step, self._start, self._total)

    def _log(self, trainer: Trainer, oscillations: Oscillations) -> None:
        every, step = trainer.log_every_n_steps, trainer.global_step  # type: ignore[attr-defined]
        if trainer.loggers and every and step % every == 0 and step != self._logged and trainer.is_global_zero:
            self._logged = step
            shares = {"oscillation/frozen": oscillations.frozen, "oscillation/frequent": oscillations.frequent()}
            for logger in trainer.loggers:
                logger.log_metrics(shares, step=step)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._oscillations is None else self._oscillations.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
