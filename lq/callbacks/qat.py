"""The whole recipe in one callback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lq.alpha import Alpha
from lq.callbacks.distill import Distill
from lq.callbacks.export import OnnxExport
from lq.callbacks.freeze import ScaleFreeze
from lq.callbacks.monitor import QuantMonitor
from lq.callbacks.quantize import Quantize
from lq.callbacks.resume import ExactResume
from lq.callbacks.schedule import QATSchedule
from lq.descriptor import Rules
from lq.methods import Method

# Parts that may be given, and of which a fit has one.
GIVEN = {"quantize": Quantize, "schedule": QATSchedule, "freeze": ScaleFreeze, "monitor": QuantMonitor, "distill": Distill}


class QuantizationAwareTraining(Callback):
    """ExactResume, Distill (if asked for), Quantize, QATSchedule, ScaleFreeze, QuantMonitor, OnnxExport (with a path), in order.

    ``Trainer(max_epochs=2, callbacks=[QuantizationAwareTraining()]).fit(trained_module, datamodule)`` is enough: the defaults are
    TensorRT's INT8, calibration by mean squared error on 8 batches, SmoothQuant at 0.5, NVIDIA's learning-rate recipe, scales
    refreshed every tenth of the fit and frozen from half of it on. For more control, give the parts or use them one by one.

    Args:
        rules: preset or rules, as for :func:`lq.quantize_`.
        target: where quantizers are wanted beyond the inputs and weights of layers, as for :class:`Quantize`.
        method: how amax is chosen.
        alpha: SmoothQuant's migration strength; ``None`` does not rescale.
        lr_factor: the learning rate to start with, in units of the original one; ``None`` leaves rates alone.
        keep_best: never return a model worse than the calibrated one, by the metric of the fit's ModelCheckpoint.
        distill: learn from the float model too (:class:`Distill`).
        export: path of an ONNX file to write after the fit.
        quantize: in place of the one that ``rules``, ``method`` and ``alpha`` describe.
        schedule: in place of the one that ``lr_factor`` describes.
        freeze: in place of the default.
        monitor: in place of the default.

    Raises:
        MisconfigurationException: one of its parts is also among the Trainer's callbacks.
    """

    def __init__(
        self,
        rules: Rules = "int8",
        *,
        target: str | None = "tensorrt",
        method: Method = "mse",
        alpha: Alpha | None = 0.5,
        lr_factor: float | None = 0.01,
        keep_best: bool = False,
        distill: bool | Distill = False,
        export: str | Path | None = None,
        quantize: Quantize | None = None,
        schedule: QATSchedule | None = None,
        freeze: ScaleFreeze | None = None,
        monitor: QuantMonitor | None = None,
    ) -> None:
        if quantize is not None and (rules, target, method, alpha, keep_best) != ("int8", "tensorrt", "mse", 0.5, False):
            raise ValueError(
                "`quantize` is given, and `rules`, `target`, `method`, `alpha` or `keep_best` too: set them in `quantize`."
            )
        if schedule is not None and lr_factor != 0.01:
            raise ValueError("`schedule` is given, and `lr_factor` too: set it in `schedule`.")
        self.quantize = quantize or Quantize(rules, target=target, method=method, alpha=alpha, keep_best=keep_best)
        teacher = Distill() if distill is True else distill
        self.parts: list[Callback] = [
            ExactResume(),
            *([teacher] if teacher else []),
            self.quantize,
            schedule or QATSchedule(lr_factor),
            freeze or ScaleFreeze(method=self.quantize.method, method_options=self.quantize.method_options),
            monitor or QuantMonitor(),
        ]
        if export is not None:
            self.parts.append(OnnxExport(export))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        mine = {name: kind for name, kind in GIVEN.items() if any(isinstance(part, kind) for part in self.parts)}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if name := next((name for name, kind in mine.items() if isinstance(callback, kind)), None):
                raise MisconfigurationException(
                    f"{type(callback).__name__} is among the Trainer's callbacks, beside the one of QuantizationAwareTraining: "
                    f"give it as `{name}`."
                )
        for part in self.parts:
            part.setup(trainer, pl_module, stage)

    @property
    def stages(self) -> dict[str, dict[str, float]]:
        """Validation metrics of each stage."""
        return self.quantize.stages

    def state_dict(self) -> dict[str, Any]:
        return {part.state_key: part.state_dict() for part in self.parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part in self.parts:
            # parts may have changed since: what belongs to another is left
            if part.state_key in state_dict:
                part.load_state_dict(state_dict[part.state_key])


def _given_to_parts(name: str) -> Callable[..., None]:
    def hook(self: QuantizationAwareTraining, *args: Any, **kwargs: Any) -> None:
        for part in self.parts:
            getattr(part, name)(*args, **kwargs)

    hook.__name__ = name
    return hook


# every hook that Lightning has, also those that only a part of a user's own has use for
for _name in vars(Callback):
    if _name.startswith("on_") or _name == "teardown":
        setattr(QuantizationAwareTraining, _name, _given_to_parts(_name))
