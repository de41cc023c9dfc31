"""The README's code runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = {
    name: re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    for name in (
        "README.md",
        "docs/calibration.md",
        "docs/callbacks.md",
        "docs/export.md",
        "docs/mct.md",
        "docs/migrating.md",
        "docs/sensitivity.md",
        "docs/smoothquant.md",
    )
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "index"), [(name, i) for name, blocks in BLOCKS.items() for i in range(len(blocks))])
def test_code_runs(tmp_path, monkeypatch, name, index):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[name][index], f"{name}[{index}]", "exec"), {})
    assert (tmp_path / "model.onnx").exists() == ("model.onnx" in BLOCKS[name][index])


def test_the_readme_names_every_option_of_every_group():
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "conf").glob("*/*.yaml"):
        if path.stem != "default" or path.parent.name in ("callbacks", "trainer"):
            row = next(line for line in readme.splitlines() if line.startswith("| ") and f"`{path.parent.name}`" in line)
            assert f"`{path.stem}`" in row, path
