"""The best model of a fit, by the user's own validation."""

import math
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lq.nn.tensor_quantizer import BUFFERS, TensorQuantizer


@dataclass
class Best:
    """Remembers the model with the best value of a metric.

    Attributes:
        monitor: the metric.
        mode: ``max`` or ``min``: which values are good.
        stage: when it was seen; empty if nothing was.
        value: of the metric.
        weights: the state dict, on the CPU.
    """

    monitor: str
    mode: str
    stage: str = ""
    value: float = math.nan
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, trainer: Trainer, pl_module: LightningModule, stage: str, metrics: dict[str, float]) -> None:
        """Take the module as it is now, if it is better than what was seen, or as good and later; all ranks do as rank 0 does.

        Raises:
            MisconfigurationException: the metric is not among ``metrics``.
        """
        if self.monitor not in metrics:
            raise MisconfigurationException(
                f"`monitor` is {self.monitor!r}, but the validation logs {', '.join(metrics) or 'nothing'}: choose among those."
            )
        value = float(metrics[self.monitor])
        better = value >= self.value if self.mode == "max" else value <= self.value
        if trainer.strategy.broadcast(not math.isnan(value) and (not self.stage or better)):
            self.stage, self.value = stage, value
            self.weights = {name: v.detach().cpu().clone() for name, v in pl_module.state_dict().items()}

    def restore(self, pl_module: LightningModule) -> None:
        """Put the best model back, in place."""
        for name, module in pl_module.named_modules():
            for buffer in BUFFERS if isinstance(module, TensorQuantizer) else ():
                # a factor that came with a later stage
                if f"{name}.{buffer}" not in self.weights:
                    setattr(module, buffer, None)
        pl_module.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: as large as the model."""
        return {"stage": self.stage, "value": self.value, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.stage, self.value, self.weights = state_dict["stage"], state_dict["value"], state_dict["weights"]


def monitored(trainer: Trainer, monitor: str | None, mode: str | None) -> tuple[str, str]:
    """The metric that is given, or that of the fit's own ModelCheckpoint or EarlyStopping, and which of its values are good.

    Raises:
        MisconfigurationException: there is none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name, good = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if isinstance(name, str) and good in ("min", "max") and monitor in (None, name):
            return name, mode or good
    if monitor is None or mode is None:
        raise MisconfigurationException(
            f"`keep_best` is True, with monitor={monitor!r} and mode={mode!r}: say which metric, and whether 'min' or 'max' is "
            "good, or give the Trainer a ModelCheckpoint that monitors one."
        )
    return monitor, mode
