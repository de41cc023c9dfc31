"""The comparison of a sweep's jobs."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from lq.analysis.sweep import Sweep
from lq.analysis.sweep_figure import draw_sweep


def metrics(value, **more):
    stages = {"float/val_loss": 0.1, "float/val_acc": 0.99, "calibrated/val_acc": value, "onnxruntime/val_acc": value - 0.01}
    return stages | {"float/bytes": 100, "int8/bytes": 50} | more


def sweep(told, values):
    return Sweep.of([str(i) for i in range(len(told))], told, [metrics(v) if v else {} for v in values])


def points(figure: Figure):
    """What is drawn of each stage, by its label."""
    ax = figure.axes[0]
    lines = {line.get_label(): line.get_xydata() for line in ax.lines if not line.get_label().startswith("_")}
    return lines | {dots.get_label(): np.asarray(dots.get_offsets()) for dots in ax.collections if dots.get_label()[0] != "_"}


def test_one_number_gives_a_line_for_each_stage_in_its_order():
    found = sweep([{"alpha": "0.7", "seed": "1"}, {"alpha": "0.3", "seed": "1"}, {"alpha": "0.5", "seed": "1"}], [0.9, 0.8, None])
    assert found.keys == ("alpha",)
    figure = draw_sweep(found)
    assert points(figure)["calibrated"].tolist() == [[0.3, 80.0], [0.7, 90.0]]
    assert points(figure)["float"][:, 1].tolist() == [99, 99]
    assert [text.get_text() for text in figure.axes[0].texts] == ["failed"]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("alpha", "val_acc (%)")


def test_several_keys_give_rows_in_groups():
    told = [{"calib": c, "alpha": a} for c in ("max", "mse") for a in ("0.3", "0.5")]
    figure = draw_sweep(sweep(told, [0.9, 0.8, None, 0.7]))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["calib=max", "alpha=0.3", "alpha=0.5", "calib=mse", "alpha=0.3", "alpha=0.5"]
    assert points(figure)["calibrated"].tolist() == [[90, 1], [80, 2], [70, 5]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["89.00", "79.00", "failed", "69.00", "onnxruntime"]


def test_a_float_model_that_differs_is_a_stage_too():
    found = Sweep.of(
        ["0", "1"], [{"seed": "a"}, {}], [metrics(0.9), metrics(0.9, **{"float/val_acc": 0.98, "other/val_acc": 0.5})]
    )
    assert found.stages == ("float", "calibrated", "onnxruntime", "other")
    figure = draw_sweep(found)
    assert points(figure)["float"].tolist() == [[99, 0], [98, 1]]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["seed=a", "without seed"]


def test_table():
    lines = sweep([{"calib": "max"}, {"calib": "mse"}], [0.9, None]).table().markdown().splitlines()
    assert lines[0] == "| job | calib | float | calibrated | onnxruntime | failed |"
    assert lines[2:] == ["| 0 | max | 99.00 | 90.00 | 89.00 | - |", "| 1 | mse | - | - | - | yes |"]


@pytest.mark.parametrize("told", [[{"lr": "0.001"}, {"lr": "1"}], [{}, {}], [{"a": "x"}, {"a": "y"}]])
def test_it_is_drawn(tmp_path, told):
    assert sweep(told, [0.9, 0.8]).figure(tmp_path / "comparison.png").stat().st_size > 5_000


def test_runs_are_compared_by_a_metric_that_is_no_loss():
    figures = [
        {"float/val_loss": 1.4, "float/val_perplexity": 4.0, "kept/val_perplexity": value, "float/bytes": 9}
        for value in (4.25, 4.125)
    ]
    table = Sweep.of(["0", "1"], [{"calib": "max"}, {"calib": "mse"}], figures).table()
    assert table.title == "Runs: val_perplexity at each stage"
    assert table.columns == ["job", "calib", "float", "kept"]
    assert table.rows == [["0", "max", "4.000", "4.250"], ["1", "mse", "4.000", "4.125"]]
