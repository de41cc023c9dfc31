"""Models that Lightning builds late, and copies that it builds early."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.call import _call_configure_model
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from lq.surgery import is_quantized


def build(trainer: Trainer, pl_module: LightningModule) -> None:
    """Have the model exist already in a callback's ``setup``, also if ``configure_model`` builds it.

    Lightning calls that hook after ``setup``, and a second time then: it asks for a hook that can be called again.
    """
    if is_overridden("configure_model", pl_module):
        _call_configure_model(trainer)


def is_compiled(pl_module: LightningModule) -> bool:
    """Whether ``torch.compile`` made the module, of which a copy would run the module instead of itself."""
    own = vars(pl_module).get("forward")
    # strategies that wrap the module leave the method of its class behind, bound as always
    return own is not None and own != type(pl_module).forward.__get__(pl_module)


def check_strategy(trainer: Trainer) -> None:
    """Raise ``MisconfigurationException`` for strategies that split parameters: amax of a weight is that of all of it.

    Warn about those that train in processes of their own: what comes back from them is a state dict.
    """
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
        raise MisconfigurationException(
            f"`strategy` is {type(trainer.strategy).__name__}, which splits weights over devices, but the amax of a weight is "
            "that of the whole: use 'ddp'."
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        rank_zero_warn(
            "The strategy trains in processes of its own, and the module in this one stays in float: read the quantized one from "
            "a checkpoint of the fit, with `lq.load_quantized`, or use 'ddp'."
        )


def all_callbacks(trainer: Trainer) -> Iterator[Callback]:
    """The trainer's callbacks, those that are made of parts taken apart."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield from getattr(callback, "parts", [callback])


def warn_if_unquantized(callback: Callback, pl_module: LightningModule) -> None:
    """Say that a callback that is about quantizers will find none."""
    if not is_quantized(pl_module):
        rank_zero_warn(
            f"{type(callback).__name__} finds no quantizers in {type(pl_module).__name__}, which is in float: put `Quantize` "
            "among the callbacks, or call `lq.quantize_` before the fit."
        )


def averages(trainer: Trainer) -> list[WeightAveraging]:
    """Callbacks that average the weights of the fit."""
    return [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]


def refuse_swa(trainer: Trainer, why: str) -> None:
    """Raise ``MisconfigurationException`` if the fit has a ``StochasticWeightAveraging``."""
    if any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise MisconfigurationException(f"StochasticWeightAveraging {why}. Use WeightAveraging, which leaves both alone.")


def begin_averages_(trainer: Trainer, pl_module: LightningModule) -> None:
    """Averages that there are begin with the module as it is now: Lightning swaps tensors by their order."""
    for callback in averages(trainer):
        if callback._average_model is not None:
            callback.setup(trainer, pl_module, "fit")


@contextmanager
def averaging_later(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """There is no average in the block; afterwards it begins with the module as it is then, with all its scales.

    Lightning copies the module in ``setup``, and puts the copy in its place for each validation.
    """
    for callback in averages(trainer):
        callback._average_model = None
    try:
        yield
    finally:
        for callback in averages(trainer):
            callback.setup(trainer, pl_module, "fit")
