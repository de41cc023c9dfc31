import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_package():
    """The list is written out, because conf/ and recipes/ stand at the top and no discovery finds them there."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {".".join(file.parent.relative_to(ROOT).parts) for file in ROOT.glob("lq/**/__init__.py")}
    assert set(listed) == packages | {"lq.conf", "lq.recipes"}
