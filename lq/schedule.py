"""The recipe of quantization-aware training as pure functions of the step."""

import math
import re


def cosine_factor(step: int, total: int, *, final: float = 0.01, warmup: int = 0) -> float:
    """Learning rate at ``step``, as a share of the one the fine-tuning starts with.

    Linear from 0 over ``warmup`` steps, then half a cosine from 1 down to ``final`` at the last step, ``total - 1`` (NVIDIA
    pytorch-quantization's guide, "Quantization Aware Training"; the shape is SGDR's, Loshchilov and Hutter, 2016,
    arXiv:1608.03983, eq. 5).

    >>> [round(cosine_factor(step, 5), 3) for step in range(5)]
    [1.0, 0.855, 0.505, 0.155, 0.01]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def cosine_ramp(step: int, start: int, total: float) -> float:
    """What rises from 0 at ``start`` to 1 at the last step, ``total - 1``, half a cosine; 0 before.

    >>> [round(cosine_ramp(step, 1, 6), 3) for step in range(6)]
    [0.0, 0.0, 0.146, 0.5, 0.854, 1.0]
    """
    progress = (step - start) / max(1, total - 1 - start)
    return (1 - math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2


# Optimizer steps as a whole number, a share of all of them as a float, or epochs, as "2 epochs".
Length = int | float | str
EPOCHS = re.compile(r"(\d+(?:\.\d+)?) epochs?")


def to_steps(value: Length | None, total: float, name: str, per_epoch: float = math.inf) -> int | None:
    """Steps from a whole number of them, a share of ``total`` given as a float in [0, 1], or epochs of ``per_epoch`` steps.

    Raises:
        ValueError: a float outside [0, 1], a negative number, another text, or a share or epochs of unknown length.

    >>> to_steps(50, 1000, "refresh_every"), to_steps(0.5, 1000, "freeze_after"), to_steps(None, 1000, "freeze_after")
    (50, 500, None)
    >>> to_steps("2 epochs", 1000, "freeze_after", per_epoch=100), to_steps("0.5 epochs", 1000, "refresh_every", per_epoch=100)
    (200, 50)
    """
    if value is None:
        return None
    if isinstance(value, str):
        found = EPOCHS.fullmatch(value)
        if not found:
            raise ValueError(f"`{name}` is {value!r}: give steps (50), a share of all steps (0.1), or epochs ('2 epochs').")
        if math.isinf(per_epoch):
            raise ValueError(f"`{name}` is {value!r}, and epochs have no known length here, or not all the same: give steps.")
        return round(float(found[1]) * per_epoch)
    if isinstance(value, float):
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` is {value}: a share of the steps must lie in [0, 1]; give a whole number for steps.")
        if math.isinf(total):
            raise ValueError(f"`{name}` is {value}, a share of an unknown number of steps: set `max_steps`, or give steps.")
        return round(value * total)
    if value < 0:
        raise ValueError(f"`{name}` is {value}: it must not be negative.")
    return value


def is_refresh(step: int, every: int | None) -> bool:
    """Whether scales are refreshed before ``step``."""
    return bool(every) and step > 0 and step % (every or 1) == 0


def is_observing(step: int, every: int | None, observe: int, freeze: int | None) -> bool:
    """Whether ``step`` is one of the ``observe`` steps before a refresh that still takes place.

    >>> [step for step in range(12) if is_observing(step, every=5, observe=2, freeze=8)]
    [3, 4]
    """
    if not every:
        return False
    refresh = (step // every + 1) * every
    return refresh - step <= observe and (freeze is None or refresh <= freeze)
