"""The report of a run: tables on the terminal, and a folder with Markdown, figures, and an HTML page that stands alone."""

import base64
import html
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lq.analysis.outputs import correction_table, sqnr_table
from lq.analysis.quantizer_stats import LayerRow
from lq.analysis.records import Deployed, Histogram, Report, Stage, histograms, read_history
from lq.analysis.tables import Table, compare_runs, deployed_table, escape, layer_table, rescale_table, stage_table

if TYPE_CHECKING:
    import rich.console

__all__ = [
    "Deployed",
    "Histogram",
    "LayerRow",
    "Report",
    "Stage",
    "Table",
    "compare_runs",
    "histograms",
    "markdown_report",
    "print_report",
    "read_history",
    "write_report",
]

CAPTIONS = {
    "accuracy": "What each stage changes against the float model; orange is worse.",
    "outputs": "Signal to quantization noise of each layer's output, correction by correction.",
    "sqnr": "Signal to quantization noise of each layer's input and weight.",
    "histograms": "Magnitudes that the quantizers saw in calibration, and the amax that was chosen of them then.",
    "amax": "amax of each input over the steps of the fit.",
}
# what a table's words mean
EXPLAINED = {
    "Quantizers": "amax is what the graph has, peak the largest magnitude in calibration. Values beyond amax saturate: so do "
    "weights that moved after the scales were frozen. Saturation and SQNR (signal to quantization noise) are over the validation "
    "batches. Rescaled inputs are multiplied by SmoothQuant's factor, where no norm before them took it in.",
    "SQNR of outputs (dB)": "Signal to quantization noise, with all that has gathered up to a layer, over the calibration "
    "batches; each stage has the corrections before it, too.",
    "Notes": "A quantization step at the output is the largest change that one code of the last layer's input makes there.",
}
# the figures that stand below a table; the others follow it
BELOW = {"Stages": ["accuracy"], "SQNR of outputs (dB)": ["outputs"], "Quantizers": ["sqnr", "histograms", "amax"]}

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }}
h2 {{ font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee4; padding-bottom: 0.3rem; }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }}
th, td {{ padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid #e8ebee; }}
th {{ color: #57606a; font-weight: 600; white-space: nowrap; }}
th:not([style]), td:not([style]) {{ text-align: left; }}
img {{ max-width: 100%; height: auto; display: block; margin: 1.2rem 0 0.2rem; }}
em {{ color: #57606a; font-style: normal; font-size: 0.85rem; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def report_tables(report: Report) -> list[Table]:
    """All tables that a report has data for: stages, deployed graphs, notes, rescaling, corrections, quantizers."""
    tables = []
    if report.stages:
        tables.append(stage_table(report.stages))
    if report.deployed:
        tables.append(deployed_table(report.deployed))
    if report.notes:
        tables.append(Table("Notes", ["Note", "Value"], [[k, v] for k, v in report.notes.items()]))
    if report.rescaled or report.left:
        tables.append(rescale_table(report.rescaled, report.left))
    if report.output_sqnr:
        tables.append(sqnr_table(report.output_sqnr))
    if report.corrected:
        tables.append(correction_table(report.corrected))
    if report.layers:
        tables.append(layer_table(report.layers))
    return tables


def print_report(report: Report, console: "rich.console.Console | None" = None) -> None:
    """Show the tables of the report on the terminal, or on ``console``."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.rule(Text(report.title), align="left")
    for table in report_tables(report):
        console.print(table)


def write_report(report: Report, folder: str | Path) -> Path:
    """Write ``report.md``, ``report.html`` and ``figures/*.png``.

    Files appear whole or not at all, replace those of an earlier report, and leave others in ``folder`` alone.

    Args:
        report: what to show.
        folder: made if it does not exist.

    Returns:
        The path of ``report.html``, which needs no other file.
    """
    from lq.analysis.figures import draw

    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    # on the same file system, so that moving a file is one step
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as temporary:
        draft = Path(temporary)
        figures = draw(report, draft / "figures")
        text = markdown_report(report, [path.stem for path in figures])
        (draft / "report.md").write_text(text, encoding="utf-8")
        (draft / "report.html").write_text(_page(report.title, text, figures), encoding="utf-8")
        for name in CAPTIONS.keys() - {path.stem for path in figures}:
            (folder / "figures" / f"{name}.png").unlink(missing_ok=True)
        for new in [*figures, draft / "report.html", draft / "report.md"]:
            new.replace(folder / new.relative_to(draft))
    return folder / "report.html"


def markdown_report(report: Report, figures: list[str]) -> str:
    """The report as Markdown; ``figures`` names those that lie in ``figures/``."""
    parts = [f"# {escape(report.title)}"]
    left = list(figures)
    for table in report_tables(report):
        parts += [f"## {table.title}", table.markdown()]
        if table.title in EXPLAINED:
            parts.append(EXPLAINED[table.title])
        for name in [n for n in BELOW.get(table.title, []) if n in left]:
            left.remove(name)
            parts.append(_figure(name))
    if left:
        parts += ["## Figures", *map(_figure, left)]
    return "\n\n".join(parts) + "\n"


def _figure(name: str) -> str:
    return f"![{name}](figures/{name}.png)\n*{CAPTIONS[name]}*"


def _page(title: str, text: str, figures: list[Path]) -> str:
    import markdown

    body = markdown.markdown(text, extensions=["tables"])
    for path in figures:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        body = body.replace(f'src="figures/{path.name}"', f'src="data:image/png;base64,{data}"')
    return PAGE.format(title=html.escape(title), body=body)
