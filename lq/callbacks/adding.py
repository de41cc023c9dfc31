"""What a callback adds to the loss of a training step."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor


def add_to_loss_(trainer: Trainer, loss: Tensor, value: Tensor) -> None:
    """Add ``value`` to what ``on_before_backward`` is given, in place, scaled as Lightning scaled the loss.

    Raises:
        MisconfigurationException: a loss that its own gradient needs as it is.
    """
    if hasattr(loss.grad_fn, "_saved_result"):
        raise MisconfigurationException("`manual_backward` was given a loss that cannot be added to: give it `1 * loss`.")
    value = value / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    loss.add_(value if scaler is None else scaler.scale(value))
