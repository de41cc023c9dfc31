"""What is in a Lightning checkpoint, without Lightning."""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


def read_checkpoint(path: str | Path, name: str = "ckpt_path") -> dict[str, Any]:
    """A Lightning checkpoint or a state dict, on the CPU.

    Args:
        path: the file.
        name: of the argument that has the path, for errors.

    Raises:
        ValueError: the file is missing, cut short, or holds something else.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint.get("state_dict", checkpoint)
    except (OSError, EOFError, RuntimeError, UnpicklingError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"`{name}` {path} cannot be read ({reason}): give a Lightning checkpoint or a state dict.") from None
    return checkpoint


@dataclass(frozen=True)
class Original:
    """How a float model was trained, as far as quantization-aware training follows it.

    Attributes:
        epochs: how many were trained, the one that was under way included.
        lrs: the highest learning rate that is on record for each parameter group of each optimizer: what schedulers keep as
            ``max_lr`` or ``initial_lr``, or else the rate itself.
    """

    epochs: int
    lrs: list[list[float]]

    def share(self, share: float = 0.1) -> int:
        """NVIDIA's length of the fine-tuning: a tenth of the original epochs, at least one.

        >>> Original(epochs=90, lrs=[]).share(), Original(epochs=3, lrs=[]).share()
        (9, 1)
        """
        return max(1, round(share * self.epochs))


def original(path: str | Path) -> Original:
    """The epochs and learning rates that the Lightning checkpoint of a float model has.

    ``Trainer(max_epochs=lq.checkpoint.original("float.ckpt").share())`` is as long as NVIDIA's guide has it.

    Raises:
        ValueError: the file cannot be read, or is no training checkpoint.
    """
    checkpoint = read_checkpoint(path, "original")
    if "optimizer_states" not in checkpoint or "epoch" not in checkpoint:
        raise ValueError(
            f"`original` {path} has no epochs and no optimizers: give a Lightning checkpoint that is not weights only."
        )
    groups = [state["param_groups"] for state in checkpoint["optimizer_states"]]
    lrs = [[float(g.get("max_lr", g.get("initial_lr", g["lr"]))) for g in of_one] for of_one in groups]
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("total", {})
    return Original(epochs=progress.get("ready", checkpoint["epoch"] + 1), lrs=lrs)
