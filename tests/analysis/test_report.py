"""The report: its numbers, its files, and what it does when something is missing or goes wrong."""

import io
import math
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.analysis import LayerRow, figures
from lq.analysis.report import (
    Deployed,
    Histogram,
    Report,
    Stage,
    compare_runs,
    histograms,
    print_report,
    read_history,
    write_report,
)
from lq.analysis.tables import stage_table

FIGURES = ["accuracy.png", "amax.png", "histograms.png", "sqnr.png"]


def histogram(amax=2.5):
    counts = torch.tensor([1000, 100, 10, 5, 5, 0, 0, 0])
    return Histogram(counts, width=1.0, amax=amax, peak=4.5)


@pytest.fixture
def report():
    return Report(
        title="digits <int8>",
        stages=[
            Stage("float", {"val_acc": 0.9956, "val_loss": 0.02}),
            Stage("calibrated", {"val_acc": 0.97, "val_loss": 0.0912}),
            Stage("qat", {"val_acc": 0.9978}),
        ],
        deployed=[Deployed("float", Path("a/float.onnx"), 4096, 0.5), Deployed("int8", Path("a/int8.onnx"), 1024, math.nan)],
        layers=[
            LayerRow("conv.input", 8, 2.5, 4.5, 0.00893, 31.26, True),
            LayerRow("conv.weight", 4, 0.123456, None, 0.0, math.inf, False),
        ],
        notes={"method": "percentile", "rules": "*.conv|*"},
        histograms={"conv.input": histogram()},
        history=[
            {"step": 0.0, "amax/conv.input": 2.5},
            {"step": 5.0, "amax/conv.input": 2.0, "train_loss": 0.1},
            {"step": 4.0, "val_acc": 0.98},
            {"step": 9.0, "val_acc": 0.9978},
        ],
    )


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def cells(text, name):
    """The cells of the table row that starts with ``name``."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[2:-1]]


def test_numbers_in_markdown(report, tmp_path):
    write_report(report, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| Stage | val_acc (%) | to float (points) | val_loss |" in text
    assert cells(text, "calibrated") == ["97.00", "-2.56", "0.09120"]
    assert cells(text, "qat") == ["99.78", "+0.22", "-"]
    # the first row of that name is that of the stages
    deployed = text[text.index("## Deployed") :]
    assert cells(deployed, "float") == ["float.onnx", "4.0", "1.00", "0.500", "1.00"]
    assert cells(deployed, "int8") == ["int8.onnx", "1.0", "0.25", "-", "-"]
    assert cells(text, "conv.input") == ["8", "2.500", "4.500", "0.893", "31.3", "yes"]
    assert cells(text, "conv.weight") == ["4", "0.1235", "-", "0.000", "∞", ""]


def test_of_perplexities_less_is_better(tmp_path):
    stages = [
        Stage("float", {"val_loss": 1.4, "val_perplexity": 4.0}),
        Stage("calibrated", {"val_loss": 1.41, "val_perplexity": 4.06}),
        Stage("qat", {"val_loss": 1.39, "val_perplexity": 3.99}),
        Stage("onnxruntime", {"val_loss": 1.39}),
    ]
    found = Report("lm", stages=stages)
    write_report(found, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| Stage | val_loss | val_perplexity | to float (%) |" in text
    assert cells(text, "float") == ["1.400", "4.000", ""]
    assert cells(text, "calibrated") == ["1.410", "4.060", "+1.50"]
    assert cells(text, "qat") == ["1.390", "3.990", "-0.25"]
    assert cells(text, "onnxruntime") == ["1.390", "-", "-"]
    (axes,) = figures.accuracy(found).axes
    assert axes.get_title(loc="left") == "val_perplexity"
    assert [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in axes.patches] == [
        figures.BLUE,
        figures.ORANGE,
        figures.BLUE,
    ]


def test_a_metric_of_zero_has_no_percentages():
    assert stage_table([Stage("float", {"val_loss": 0.0}), Stage("qat", {"val_loss": 0.1})]).rows[1] == ["qat", "0.1000", "-"]


def test_files(report, tmp_path):
    page = write_report(report, tmp_path / "new" / "folder")
    assert page == tmp_path / "new" / "folder" / "report.html"
    assert sorted(p.name for p in page.parent.iterdir()) == ["figures", "report.html", "report.md"]
    pictures = sorted((page.parent / "figures").iterdir())
    assert [p.name for p in pictures] == FIGURES
    for picture in pictures:
        width, height = png_size(picture)
        assert width == 1410
        assert 150 <= height <= 1000
        assert len(np.unique(figures_pixels(picture))) > 10


def figures_pixels(path):
    from matplotlib.image import imread

    return imread(path)


def test_page_stands_alone(report, tmp_path):
    page = write_report(report, tmp_path).read_text()
    assert re.findall(r'src="(.{22})', page) == ["data:image/png;base64,"] * 4
    assert not re.findall(r"https?:|href=|<link|<script|@import|url\(", page)
    assert "<title>digits &lt;int8&gt;</title>" in page
    assert "<h1>digits &lt;int8&gt;</h1>" in page
    assert "<td>*.conv|*</td>" in page
    assert page.count("<table>") == 4


def test_what_is_missing_is_left_out(report, tmp_path):
    write_report(report, tmp_path)
    page = write_report(Report("empty"), tmp_path)
    assert (tmp_path / "report.md").read_text() == "# empty\n"
    assert list((tmp_path / "figures").iterdir()) == [], "figures of the earlier report"
    assert "<img" not in page.read_text()
    only_history = replace(Report("x"), history=report.history)
    write_report(only_history, tmp_path)
    assert [p.name for p in (tmp_path / "figures").iterdir()] == ["amax.png"]
    assert "figures/amax.png" in (tmp_path / "report.md").read_text()


def test_other_files_of_the_folder_stay(report, tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("metrics.csv", "figures/mine.png"):
        (tmp_path / name).write_text("mine")
    write_report(report, tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == (tmp_path / "figures" / "mine.png").read_text() == "mine"


def test_a_failure_leaves_the_earlier_report(report, tmp_path, monkeypatch):
    write_report(report, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(figures, "amax", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(replace(report, title="other"), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not list(tmp_path.glob(".report-*"))


def test_without_a_stage_named_float_the_first_is_compared_with(report, tmp_path):
    write_report(replace(report, stages=report.stages[1:]), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "to calibrated (points)" in text
    assert cells(text, "qat")[:2] == ["99.78", "+2.78"]


def test_strange_values_are_drawn(tmp_path):
    """NaN from a fit that diverged, nothing but zeros, one point, two equal stages."""
    nothing = Histogram(torch.tensor([0, 0]), 1.0, 1.0, 0.0)
    zeros = Histogram(torch.tensor([7, 0]), 1e-30, 0.0, 0.0)
    report = Report(
        "strange",
        [Stage("float", {"rmse": 1.0}), Stage("a", {"rmse": 1.0}), Stage("b", {"rmse": math.nan}), Stage("c", {})],
        layers=[LayerRow("x.input", 8, 0.0, 0.0, math.nan, math.nan, False), LayerRow("add", (4, 3), 1.0, 1.0, 0.0, 20.0, False)],
        histograms={"nothing": nothing, "zeros": zeros},
        history=[{"step": 0.0, "amax/x.input": 0.0}, {"step": 1.0, "amax/x.input": math.nan}, {"amax/y.input": 1.0}],
    )
    write_report(report, tmp_path)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == FIGURES
    assert cells((tmp_path / "report.md").read_text(), "add")[0] == "E4M3"
    assert cells((tmp_path / "report.md").read_text(), "x.input")[3:] == ["-", "-"]


def test_of_many_quantizers_the_noisiest_are_drawn():
    names = [f"layers.{i}.input" for i in range(50)]
    rows = [LayerRow(name, 8, 1.0, 1.0, 0.0, float(i % 25), False) for i, name in enumerate(names)]
    report = Report("many", layers=rows, histograms=dict.fromkeys(names, histogram()))
    figure = figures.histograms(report)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == [name for i, name in enumerate(names) if i % 25 < 20]
    assert figure.get_suptitle() == "The 40 of 50 quantizers with the lowest SQNR"


@pytest.mark.parametrize("amax", [2.5, 3.0, 4.5, 9.0])
def test_histogram_drawn_keeps_every_count_on_its_side_of_amax(amax):
    counts = torch.zeros(4096, dtype=torch.int64)
    counts[:4000] = torch.randint(0, 9, (4000,), generator=torch.Generator().manual_seed(0))
    data = Histogram(counts, 5 / 4096, amax, peak=4000 * 5 / 4096 - 1e-4)
    edges, drawn = figures._coarser(data)
    assert drawn.sum() == counts.sum()
    assert len(drawn) <= figures.BINS_DRAWN + 1
    assert len(edges) == len(drawn) + 1
    starts = np.arange(4096) * data.width
    assert drawn[edges[:-1] >= data.first_beyond * data.width].sum() == counts.numpy()[starts > amax].sum()
    assert data.beyond == counts.numpy()[starts > amax].sum() / counts.sum().item()


def test_labels_do_not_touch():
    placed = figures._apart({"a": 0.5, "b": 0.51, "c": 0.99, "d": 1.0, "e": 0.1}, 0.1)
    heights = sorted(placed.values())
    assert min(np.diff(heights)) >= 0.1 - 1e-9
    assert heights[0] >= 0
    assert heights[-1] <= 1
    assert placed["e"] == 0.1


def test_histograms_of_a_model():
    torch.manual_seed(0)
    model = lq.quantize_(nn.Sequential(nn.Linear(4, 3)), [lq.QuantRule("*", lq.QuantDescriptor(), lq.QuantDescriptor(axis=0))])
    x = torch.randn(100, 4)
    with lq.calibrating(model, method="percentile", percentile=90):
        model(x)
    found = histograms(model)
    assert list(found) == ["0.input"]
    data = found["0.input"]
    magnitudes = x.abs().numpy().ravel()
    expected, _ = np.histogram(magnitudes, bins=len(data.counts), range=(0, len(data.counts) * data.width))
    assert data.counts.tolist() == expected.tolist()
    assert data.peak == magnitudes.max()
    assert data.beyond == pytest.approx((magnitudes > data.amax).mean(), abs=0.005)
    assert data.beyond == pytest.approx(0.1, abs=0.01)


def test_histograms_of_channels_are_added_up():
    quantizer = lq.TensorQuantizer(lq.QuantDescriptor(axis=0, calib_method="histogram"))
    x = torch.tensor([[0.1, 0.2, 0.3], [5.0, 6.0, 7.5]])
    quantizer.calibrator.collect(x)
    quantizer.load_calib_amax("max")
    data = histograms(nn.Sequential(quantizer))["0"]
    assert int(data.counts.sum()) == 6
    starts = data.counts.nonzero().ravel() * data.width
    assert starts.tolist() == pytest.approx([0.1, 0.2, 0.3, 5.0, 6.0, 7.5], abs=data.width)
    assert (data.peak, data.amax) == (7.5, 7.5)
    assert data.beyond == 0.0, "7.5 starts a bin, but it is amax and kept"


def test_read_history(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("amax/a.input,epoch,step,val_acc,note\n1.5,0,0,,\n,0,4,0.75,x\n,,5,nan,\n")
    rows = read_history(path)
    assert rows[:2] == [{"amax/a.input": 1.5, "epoch": 0.0, "step": 0.0}, {"epoch": 0.0, "step": 4.0, "val_acc": 0.75}]
    assert math.isnan(rows[2]["val_acc"])


def test_print_report(report):
    from rich.console import Console

    out = io.StringIO()
    print_report(report, Console(file=out, width=80))
    text = out.getvalue()
    assert "digits <int8>" in text
    assert re.search(r"calibrated +97\.00 +-2\.56 +0\.09120", text)
    assert re.search(r"conv\.input +8 +2\.500 +4\.500 +0\.893 +31\.3 +yes", text)
    assert re.search(r"int8 +int8\.onnx +1\.0 +0\.25", text)


def test_compare_runs():
    jobs = [
        {"method": "max", "lr": 0.1, "val_acc": 0.991, "val_loss": 0.03},
        {"method": "mse", "lr": 0.05, "val_acc": 0.9955, "size": 12},
        {"method": "[kl]", "val_acc": math.nan},
    ]
    table = compare_runs(jobs, sort_by="val_acc")
    assert table.columns == ["method", "lr", "val_acc (%)", "val_loss", "size"]
    assert table.rows == [
        ["mse", "0.05", "99.55", "-", "12"],
        ["max", "0.1", "99.10", "0.03", "-"],
        ["[kl]", "-", "-", "-", "-"],
    ]
    assert [row[0] for row in compare_runs(jobs).rows] == ["max", "mse", "[kl]"]
    assert [row[0] for row in compare_runs(jobs, "val_acc", descending=False).rows] == ["max", "mse", "[kl]"]
    assert table.markdown().splitlines()[1] == "| --- | ---: | ---: | ---: | ---: |"
    with pytest.raises(ValueError, match="`sort_by` is 'acc', but the runs have method, lr"):
        compare_runs(jobs, sort_by="acc")

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=80).print(table)
    assert re.search(r"\[kl\] +-", out.getvalue()), "brackets are no style"


def test_reading_results_needs_no_optional_package():
    code = (
        "import sys, torch, torchmetrics, lightning\n"
        "for name in ('matplotlib', 'rich', 'markdown', 'sklearn'):\n"
        "    for loaded in [m for m in sys.modules if m.split('.')[0] == name]: del sys.modules[loaded]\n"
        "    sys.modules[name] = None\n"
        "import lq.analysis.report\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
