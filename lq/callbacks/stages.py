"""The metrics of a stage (float, calibrated, rescaled, qat), from the user's own validation loop."""

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
    loop = trainer.fit_loop.epoch_loop.val_loop
    stage, limit = trainer.state.stage, trainer.num_sanity_val_steps
    trainer.sanity_checking, trainer.num_sanity_val_steps = True, float("inf")
    try:
        trainer._logger_connector.reset_results()
        trainer._logger_connector.reset_metrics()
        with isolate_rng():
            loop.run()
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        trainer._logger_connector.reset_results()
        trainer._logger_connector.reset_metrics()
        _reset_progress(loop)
    finally:
        trainer.state.stage, trainer.num_sanity_val_steps = stage, limit
    return metrics
