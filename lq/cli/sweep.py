"""One table at the end of a multirun."""

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lq.analysis.tables import compare_runs


class CompareRuns(Callback):
    """Hydra callback: compares the jobs of a sweep by what they wrote, whichever launcher ran them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the comparison and write it as ``comparison.md`` into the sweep's folder."""
        folder = Path(config.hydra.sweep.dir)
        rows = [row for path in sorted(folder.glob("*/metrics.json"), key=_number) if (row := _row(path))]
        if not rows:
            return
        table = compare_runs(rows)
        (folder / "comparison.md").write_text(table.markdown() + "\n", encoding="utf-8")
        Console().print(table)


def _number(path: Path) -> tuple[int, str]:
    return (int(path.parent.name), "") if path.parent.name.isdigit() else (0, path.parent.name)


def _row(path: Path) -> dict[str, object]:
    """What the job was told, and what came out."""
    overrides = OmegaConf.to_object(OmegaConf.load(path.parent / ".hydra" / "overrides.yaml"))
    assert isinstance(overrides, list)
    metrics: dict[str, object] = json.loads(path.read_text())
    told = dict(str(override).split("=", 1) for override in overrides)
    shown = {k: v for k, v in metrics.items() if not k.endswith(("/bytes", "_loss", "_steps"))}
    return told | shown
