"""The jobs of a sweep beside each other: one table and one figure, from what they wrote."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lq.analysis.tables import Table, compare_runs, is_share, main_metric, number

# Stages as they follow each other; those of other names stand behind.
STAGES = ("float", "calibrated", "rescaled", "corrected", "qat", "kept", "ptq", "quantized", "allocated", "onnxruntime")


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        name: of its folder.
        told: what it was told differently from others, as text; what it was not told has no entry.
        values: the main metric by stage, in the sweep's unit; nothing if it failed.
    """

    name: str
    told: Mapping[str, str]
    values: Mapping[str, float]

    @property
    def failed(self) -> bool:
        """Whether it left no figures behind."""
        return not self.values


@dataclass(frozen=True)
class Sweep:
    """The jobs of a sweep. ``rich.print(sweep.table())``, ``sweep.figure(path)``.

    Attributes:
        jobs: in the order in which they were started.
        keys: what they were told differently.
        stages: in the order of a run.
        metric: the main one, as :func:`lq.analysis.tables.main_metric` has it.
        unit: ``"%"`` of a share, else empty.
    """

    jobs: tuple[Job, ...]
    keys: tuple[str, ...]
    stages: tuple[str, ...]
    metric: str
    unit: str

    @classmethod
    def of(cls, names: Sequence[str], told: Sequence[Mapping[str, str]], metrics: Sequence[Mapping[str, float]]) -> "Sweep":
        """Out of the names, the overrides and the figures of jobs.

        Args:
            names: one for each job.
            told: what each was told, by key.
            metrics: as in ``metrics.json``: ``{"<stage>/<metric>": value}``; empty for a job that failed.

        >>> sweep = Sweep.of(["0", "1"], [{"seed": "1", "calib": "max"}, {"seed": "1", "calib": "mse"}],
        ...                  [{"float/acc": 0.99, "qat/acc": 0.98}, {}])
        >>> sweep.keys, sweep.stages, sweep.metric, sweep.jobs[0].values["qat"]
        (('calib',), ('float', 'qat'), 'acc', 98.0)
        """
        keys = tuple(key for key in dict.fromkeys(k for t in told for k in t) if len({t.get(key) for t in told}) > 1)
        metric = _main_metric(metrics)
        share = is_share(metric, [found.get(f"float/{metric}") for found in metrics])
        end, factor = f"/{metric}", 100.0 if share else 1.0
        found = [{key.removesuffix(end): factor * m[key] for key in m if key.endswith(end)} for m in metrics]
        stages = dict.fromkeys(stage for values in found for stage in values)
        order = [*(stage for stage in STAGES if stage in stages), *(stage for stage in stages if stage not in STAGES)]
        jobs = [
            Job(name, {k: t[k] for k in keys if k in t}, {s: values[s] for s in order if s in values})
            for name, t, values in zip(names, told, found, strict=True)
        ]
        return cls(tuple(jobs), keys, tuple(order), metric, "%" if share else "")

    def table(self) -> Table:
        """What each job was told, and the metric at each stage."""
        rows: list[dict[str, object]] = []
        for job in self.jobs:
            row: dict[str, object] = {"job": job.name} | {key: job.told.get(key) for key in self.keys}
            row |= {stage: self.text(value) for stage, value in job.values.items()}
            rows.append(row | {"failed": "yes"} if job.failed else row)
        table = compare_runs(rows)
        return Table(f"Runs: {self.label} at each stage", table.columns, table.rows)

    @property
    def label(self) -> str:
        """The metric with its unit."""
        return f"{self.metric} ({self.unit})" if self.unit else self.metric

    def text(self, value: float) -> str:
        """A value of the metric as text."""
        return f"{value:.2f}" if self.unit else number(value)

    def numbers(self, key: str) -> list[float] | None:
        """What the jobs were told for a key; ``None`` if any of it is no number."""
        try:
            found = [float(job.told[key]) for job in self.jobs]
        except (KeyError, ValueError):
            return None
        return found if all(map(math.isfinite, found)) else None

    def figure(self, path: str | Path) -> Path:
        """Draw it as PNG."""
        from lq.analysis.sweep_figure import save_sweep

        return save_sweep(self, Path(path))


def _main_metric(metrics: Sequence[Mapping[str, float]]) -> str:
    floats = {key.removeprefix("float/"): value for found in metrics for key, value in found.items() if key.startswith("float/")}
    # those are of the graph
    return main_metric({name: value for name, value in floats.items() if name not in ("bytes", "latency_ms")})
