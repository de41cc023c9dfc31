"""The module's own validation, as a function of the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig
from rich.console import Console
from rich.status import Status
from torch import nn

from lq.analysis.tables import is_share
from lq.cli.plain import instantiate


class Validation:
    """What :mod:`lq.analysis` takes for a metric: runs the validation and returns one of its metrics.

    Args:
        cfg: its ``trainer`` runs it, on ``val_batches`` batches, and ``metric`` is the one that counts.
        data: has the validation data.
        console: shows how far it is.
    """

    def __init__(self, cfg: DictConfig, data: LightningDataModule, console: Console) -> None:
        batches = 1.0 if cfg.val_batches is None else cfg.val_batches
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": batches}
        # tensors of inference mode would stay in what quantizers keep
        self._trainer: Trainer = instantiate(cfg.trainer, **options, inference_mode=False)
        self._data, self._console = data, console
        self._status: Status | None = None
        self._doing, self._runs, self._batches = "", 0, cfg.val_batches
        # functions have a name, by which tables call the metric
        self.__name__: str = cfg.metric or ""

    def __call__(self, model: nn.Module) -> float:
        assert isinstance(model, LightningModule)
        if self._status is not None:
            self._runs += 1
            self._status.update(f"{self._doing}: validation {self._runs}")
        device = next(model.parameters()).device
        found = self._trainer.validate(model, datamodule=self._data, verbose=False)
        # a Trainer leaves a model on the CPU
        model.to(device)
        metrics = {name: float(value) for of_loader in found for name, value in of_loader.items()}
        if not self.__name__:
            self.__name__ = main_metric(metrics)
        if self.__name__ not in metrics:
            raise ValueError(f"`metric` is {self.__name__!r}, and the validation has {', '.join(metrics) or 'none'}.")
        return metrics[self.__name__]

    def describe(self) -> str:
        """On what it was measured."""
        data = "all validation data" if self._batches is None else f"{self._batches} validation batches"
        return f"{self.__name__} on {data}"

    @contextmanager
    def showing(self, doing: str) -> Iterator[None]:
        """Show what is going on, and count the validations."""
        self._doing, self._runs = doing, 0
        with self._console.status(doing) as self._status:
            yield
        self._status = None


def main_metric(metrics: dict[str, float]) -> str:
    """The first metric that is a share, or the first one.

    >>> main_metric({"val_loss": 0.1, "val_acc": 0.9}), main_metric({"val_mse": 3.0})
    ('val_acc', 'val_mse')
    """
    if not metrics:
        raise ValueError("The validation logs no metric: log one in `validation_step`.")
    return next((name for name, value in metrics.items() if is_share(name, [value])), next(iter(metrics)))
