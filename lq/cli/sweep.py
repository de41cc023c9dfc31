"""One table at the end of a multirun."""

import json
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lq.analysis.tables import Table, compare_runs, is_share, main_metric

STAGES = ("float", "calibrated", "rescaled", "corrected", "qat", "kept", "ptq", "onnxruntime")


class CompareRuns(Callback):
    """Hydra callback: compares the jobs of a sweep by what they wrote, whichever launcher ran them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the comparison and write it as ``comparison.md`` into the sweep's folder; exit with 1 if a job failed."""
        folder = Path(config.hydra.sweep.dir)
        jobs = [path.parent for path in sorted(folder.glob("*/.hydra"), key=_number)]
        if not jobs:
            return
        table = comparison(jobs)
        (folder / "comparison.md").write_text(f"{table.title}\n\n{table.markdown()}\n", encoding="utf-8")
        Console().print(table)
        if failed := [job.name for job in jobs if not (job / "metrics.json").exists()]:
            raise SystemExit(f"lq: {len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)} in {folder}")


def comparison(jobs: list[Path]) -> Table:
    """What the jobs were told differently, and the main metric of each stage."""
    told = [_overrides(job) for job in jobs]
    varied = [key for key in dict.fromkeys(k for t in told for k in t) if len({t.get(key) for t in told}) > 1]
    found = [json.loads((job / "metrics.json").read_text()) if (job / "metrics.json").exists() else {} for job in jobs]
    floats = {key.removeprefix("float/"): value for f in found for key, value in f.items() if key.startswith("float/")}
    main = main_metric({name: value for name, value in floats.items() if name not in ("bytes", "latency_ms")})
    percent = 100 if is_share(main, [f.get(f"float/{main}") for f in found]) else 1
    rows = []
    for job, mine, values in zip(jobs, told, found, strict=True):
        row: dict[str, object] = {"job": job.name} | {key: mine.get(key) for key in varied}
        row |= {stage: percent * values[f"{stage}/{main}"] for stage in STAGES if f"{stage}/{main}" in values}
        rows.append(row if values else row | {"failed": "yes"})
    table = compare_runs(rows)
    return Table(f"Runs: {main}{' (%)' if percent == 100 else ''} at each stage", table.columns, table.rows)


def _number(path: Path) -> tuple[int, str]:
    return (int(path.parent.name), "") if path.parent.name.isdigit() else (0, path.parent.name)


def _overrides(job: Path) -> dict[str, str]:
    overrides = OmegaConf.to_object(OmegaConf.load(job / ".hydra" / "overrides.yaml"))
    assert isinstance(overrides, list)
    return dict(str(override).split("=", 1) for override in overrides)
