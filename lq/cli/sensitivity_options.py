"""What the options of ``lq sensitivity`` mean."""

import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lq.analysis import Allocation, Sensitivity
from lq.analysis.allocation import Allocator
from lq.analysis.parts import bits_text
from lq.descriptor import QuantRule
from lq.functional.grid import Bits

UNITS = {"share": "of the quantized model", "bits": "bits on average", "cost": "bytes or bit-operations"}


@dataclass(frozen=True)
class Budget:
    """A share of what a model costs, an amount, or bits on average.

    >>> Budget.read(0.5), Budget.read(20000), Budget.read("4.5 bits")
    (Budget(value=0.5, unit='share'), Budget(value=20000.0, unit='cost'), Budget(value=4.5, unit='bits'))
    """

    value: float
    unit: str

    @classmethod
    def read(cls, given: object) -> "Budget":
        """From a config.

        Raises:
            ValueError: it is none of these.
        """
        bits = re.fullmatch(r"([\d.]+) *bits?", given) if isinstance(given, str) else None
        try:
            value = float(bits[1] if bits else given)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = -1
        if not value > 0 or isinstance(given, bool):
            raise ValueError(
                f"`budget` is {given!r}: give a share up to 1, as 0.6; bytes or bit-operations, as 20000; or '4.5 bits'."
            )
        return cls(value, "bits" if bits else "share" if value <= 1 else "cost")

    def mean_bits(self, allocator: Allocator) -> float:
        """The same in bits on average.

        Raises:
            ValueError: no choice of widths costs as little, or as much.
        """
        cost = self.value * (allocator.cost(allocator.trial.present) if self.unit == "share" else 1)
        found = self.value if self.unit == "bits" else allocator.mean_bits(cost)
        least, most = allocator.range()
        if not least - 1e-9 <= found <= most + 1e-9:
            raise ValueError(
                f"`budget` is {self.value:g} ({UNITS[self.unit]}), {found:.3g} bits on average: `bits` leads from {least:.3g} to "
                f"{most:.3g}. Choose between them."
            )
        return found


def methods_of(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The calibration's method with its options, by patterns on quantizers."""
    method: Any = OmegaConf.to_container(cfg.calib)
    methods = method["method"] if isinstance(method["method"], dict) else {"*": method["method"]}
    return {pattern: method["options"] | (own if isinstance(own, dict) else {"method": own}) for pattern, own in methods.items()}


def widths_of(cfg: DictConfig) -> set[Bits]:
    """All widths that rules may get."""
    bits: Any = [] if cfg.budget is None else OmegaConf.to_container(cfg.bits)
    found = {b for choice in bits for b in (choice if isinstance(choice, list) else [choice])}
    spare = num_bits_of(cfg)
    return found if spare is None else found | {spare}


def num_bits_of(cfg: DictConfig) -> Bits | None:
    """The width of what is spared: a list, as [4, 3], is a float's."""
    found: Bits | None = cfg.num_bits if cfg.num_bits is None or isinstance(cfg.num_bits, int) else tuple(cfg.num_bits)
    return found


def spared(found: Sensitivity, cfg: DictConfig) -> list[QuantRule]:
    """Rules that spare what ``worst`` or ``below_db`` say."""
    worst = min(cfg.worst, len(found.rows)) if cfg.below_db is None else None
    return found.rules(worst, below_db=cfg.below_db, num_bits=num_bits_of(cfg))


def about_rules(found: Sensitivity, cfg: DictConfig, chosen: Allocation | None) -> str:
    """What the rules do."""
    if chosen is not None:
        return f"a width for each layer, {chosen.mean_bits:.2f} bits on average"
    bits = num_bits_of(cfg)
    width = "in float" if bits is None else f"with {bits_text(bits)} bits"
    worst = f"the {min(cfg.worst, len(found.rows))} most sensitive"
    which = worst if cfg.below_db is None else f"what alone leaves less than {cfg.below_db} dB"
    return f"{which} {width}, the others as they are"
