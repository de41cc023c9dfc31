"""The metrics of a stage (float, calibrated, rescaled, qat), from the user's own validation loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.utilities import _reset_progress
from lightning.pytorch.utilities.seed import isolate_rng


def validate_stage(trainer: Trainer) -> dict[str, float]:
    """Run the whole validation loop in the middle of a fit and return what it logged.

    To every callback and logger this is Lightning's sanity check, over all validation batches: nothing is logged, no checkpoint
    is written, EarlyStopping does not count it. Empty if the fit has no validation.
    """
    if not trainer.enable_validation:
        return {}
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    stage, limit = trainer.state.stage, trainer.num_sanity_val_steps
    kept = {name: getattr(connector, name) for name in ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")}
    trainer.sanity_checking, trainer.num_sanity_val_steps = True, float("inf")
    try:
        connector.reset_results()
        connector.reset_metrics()
        with isolate_rng(), _of_every_loader(connector):
            loop.run()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        connector.reset_results()
        connector.reset_metrics()
        _reset_progress(loop)
    finally:
        trainer.state.stage, trainer.num_sanity_val_steps = stage, limit
        # what the fit has logged so far is still there for those who read `trainer.callback_metrics`
        vars(connector).update(kept)
    return metrics


@contextmanager
def _of_every_loader(connector: Any) -> Iterator[None]:
    """Metrics that belong to one of several loaders count in the block too: Lightning leaves them out of a sanity check."""

    def update() -> dict[str, Any]:
        connector._callback_metrics.update(connector.metrics["callback"])
        return {}

    connector.update_eval_epoch_metrics = update
    try:
        yield
    finally:
        del connector.update_eval_epoch_metrics
