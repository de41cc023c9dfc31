"""One table and one figure at the end of a multirun."""

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from lightning.fabric.utilities.rank_zero import _get_rank
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lq.analysis.sweep import Sweep


class CompareRuns(Callback):
    """Hydra callback: compares the jobs of a sweep by what they wrote, whichever launcher ran them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the comparison, write ``comparison.md`` and ``.png`` into the sweep's folder; exit with 1 if a job failed.

        Under DDP every rank runs the whole sweep, and rank 0 compares.
        """
        if _get_rank():
            return
        folder = Path(config.hydra.sweep.dir)
        jobs = [path.parent for path in sorted(folder.glob("*/.hydra"), key=_number)]
        if not jobs:
            return
        sweep = Sweep.of([job.name for job in jobs], [_overrides(job) for job in jobs], [_metrics(job) for job in jobs])
        table, failed = sweep.table(), [job.name for job in sweep.jobs if job.failed]
        picture = "" if len(failed) == len(jobs) else "\n![The same as a figure](comparison.png)\n"
        (folder / "comparison.md").write_text(f"{table.title}\n\n{table.markdown()}\n{picture}", encoding="utf-8")
        Console().print(table)
        if picture:
            Console().print(f"Figure: {sweep.figure(folder / 'comparison.png')}", soft_wrap=True)
        if failed:
            raise SystemExit(f"lq: {len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)} in {folder}")


def _number(path: Path) -> tuple[int, str]:
    return (int(path.parent.name), "") if path.parent.name.isdigit() else (0, path.parent.name)


def _metrics(job: Path) -> dict[str, float]:
    """What a job found; nothing if it failed."""
    path = job / "metrics.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _overrides(job: Path) -> dict[str, str]:
    overrides = OmegaConf.to_object(OmegaConf.load(job / ".hydra" / "overrides.yaml"))
    assert isinstance(overrides, list)
    # without a value where it deletes: ~callbacks.monitor
    return {key: value for key, _, value in (str(override).partition("=") for override in overrides)}
