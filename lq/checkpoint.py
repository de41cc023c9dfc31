"""What is in a Lightning checkpoint, without Lightning."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint


def read_checkpoint(path: str | Path, name: str = "ckpt_path") -> dict[str, Any]:
    """A Lightning checkpoint or a state dict, on the CPU.

    Args:
        path: the file.
        name: of the argument that has the path, for errors.

    Raises:
        ValueError: the file is missing, cut short, or holds something else, or what torch does not load unasked.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint.get("state_dict", checkpoint)
    except (OSError, EOFError, RuntimeError, UnpicklingError, AttributeError) as error:
        if isinstance(error, UnpicklingError) and (unsafe := _unsafe_globals(path)):
            raise ValueError(
                f"`{name}` {path} has {', '.join(unsafe)} in it, as a rule by `save_hyperparameters()`, and plain data alone "
                "is loaded: allow it by `torch.serialization.add_safe_globals([...])`, or leave it out of the next checkpoint by "
                "`save_hyperparameters(ignore=[...])`."
            ) from None
        # what torch says of unpickling begins with advice, in bold
        reason = (str(error).rpartition("WeightsUnpickler error: ")[2] or type(error).__name__).splitlines()[0]
        raise ValueError(f"`{name}` {path} cannot be read ({reason}): give a Lightning checkpoint or a state dict.") from None
    return checkpoint


def _unsafe_globals(path: str | Path) -> list[str]:
    """Names of the classes and functions in a checkpoint that nobody has told torch to be safe."""
    # torch looks into zip files only
    return get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []


@dataclass(frozen=True)
class Original:
    """How a float model was trained, as far as quantization-aware training follows it.

    Attributes:
        epochs: how many were trained, the one that was under way included.
        lrs: the highest learning rate that is on record for each parameter group of each optimizer: what schedulers keep as
            ``max_lr`` or ``initial_lr``, or else the rate itself (:func:`highest_lr`).
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
    lrs = [[highest_lr(group) for group in of_one] for of_one in groups]
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("total", {})
    return Original(epochs=progress.get("ready", checkpoint["epoch"] + 1), lrs=lrs)


def highest_lr(group: Mapping[str, Any]) -> float:
    """The highest learning rate that a parameter group is known to have: where a scheduler warms up, not the one it begins with.

    >>> highest_lr({"lr": 0.004, "initial_lr": 0.004, "max_lr": 0.1}), highest_lr({"lr": 0.01, "initial_lr": 0.1})
    (0.1, 0.1)
    """
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))
