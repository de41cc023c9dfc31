"""What ``lq sensitivity`` leaves behind: a page, figures, records, and rules."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from lq.analysis import Allocation, Front, Sensitivity
from lq.analysis.rules import quant_group
from lq.cli.outputs import write_json
from lq.descriptor import QuantRule

EXPLAINED = """Signal to quantization noise (SQNR) of the model's output, over train batches: with each alone quantized, and with
all but it. The most sensitive come first: a low value in the first column says that it hurts by itself, a high one in the second
that the others do much better without it."""
FRONT = """Each layer was quantized alone to each width; the widths of an allocation have the least sum of these errors within its
budget. *Expected* is that sum, *found* what they do together."""


@dataclass(frozen=True)
class Findings:
    """All that was found.

    Attributes:
        name: of the experiment.
        quant: what it was quantized to.
        measured: the metric, and on what.
        sensitivity: of quantizers or layers.
        front: with the allocation for the budget, if there was one.
    """

    name: str
    quant: str
    measured: str
    sensitivity: Sensitivity
    front: Front | None

    @property
    def chosen(self) -> Allocation | None:
        """The allocation for the budget."""
        return None if self.front is None else self.front.chosen

    @property
    def title(self) -> str:
        return f"{self.name}: sensitivity to {self.quant}"

    def print(self, console: Console) -> None:
        """Show the tables."""
        console.rule(self.title, align="left")
        console.print(self.sensitivity.table())
        if self.front is not None and self.chosen is not None:
            console.print(self.chosen.table())
            console.print(self.front.table())

    def write(self, folder: Path) -> None:
        """``sensitivity.md``, ``sensitivity.json``, ``sensitivity.png`` and, with a budget, ``front.png``."""
        self.sensitivity.figure(folder / "sensitivity.png")
        table = self.sensitivity.table()
        parts = [f"# {self.title}", f"## {table.title}", table.markdown(), f"{EXPLAINED} Metric: {self.measured}."]
        parts.append("![What each costs](sensitivity.png)")
        records: dict[str, Any] = self.sensitivity.records()
        if self.front is not None and self.chosen is not None:
            self.front.figure(folder / "front.png")
            for table in (self.chosen.table(), self.front.table()):
                parts += [f"## {table.title}", table.markdown()]
            parts += [FRONT, "![Quality against cost](front.png)"]
            records["front"] = self.front.records()
        (folder / "sensitivity.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        write_json(records, folder / "sensitivity.json")

    def write_rules(self, rules: Sequence[QuantRule], about: str, command: str, folder: Path, console: Console) -> None:
        """``quant/rules.yaml``, what is in it, and the command that uses it."""
        path = folder / "quant" / "rules.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {about}\n# {command}\n{quant_group(rules, 'mixed')}", encoding="utf-8")
        with (folder / "sensitivity.md").open("a", encoding="utf-8") as page:
            page.write(f"\n## Rules\n\n[quant/rules.yaml](quant/rules.yaml) has {about}:\n\n    {command}\n")
        console.print(f"Rules: {short(path)} has {about}:\n{command}", soft_wrap=True, markup=False, highlight=False)

    def metrics(self) -> dict[str, float]:
        """The metric of each model, as a run has them."""
        name, found = self.sensitivity.metric_name, self.sensitivity
        metrics = {f"float/{name}": found.float_metric, f"quantized/{name}": found.quantized.metric}
        return metrics if self.chosen is None else metrics | {f"allocated/{name}": self.chosen.effect.metric}


def short(path: Path) -> Path:
    """A path from the present folder on, if it lies in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def command_for(folder: Path, told: Sequence[str], cfg: DictConfig) -> str:
    """The ``lq`` that trains with the rules in a folder.

    Args:
        folder: has ``quant/rules.yaml``.
        told: what made the config; its choice of quantizers gives way.
        cfg: that config.
    """
    kept = [override for override in told if override.lstrip("+").split("=")[0].split(".")[0] != "quant"]
    # rules of an experiment would stand behind those of the file
    kept += ["quant=rules", *["quant.overrides=[]"] * bool(cfg.quant.overrides)]
    return shlex.join(["lq", *kept, "--config-dir", str(short(folder))])
