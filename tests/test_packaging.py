"""The package as it is installed, and the files around it that must agree with each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from .helpers import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def environment() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_conda_environment_follows_pyproject():
    data = environment()
    assert data["name"] == "diffusionkit"
    (pip,) = [d["pip"] for d in data["dependencies"] if isinstance(d, dict)]
    (editable,) = [line for line in pip if line.startswith("--editable")]
    extras = re.fullmatch(r"--editable \.\[([\w,]+)\]", editable)[1].split(",")
    assert "sd3" in extras and set(extras) <= EXTRAS.keys()
    # Everything else comes from pyproject, so that there is one list of versions.
    assert pip == [editable]
    (python,) = [d for d in data["dependencies"] if str(d).startswith("python=")]
    minimum = re.fullmatch(r">=3\.(\d+)", PROJECT["project"]["requires-python"])[1]
    assert int(python.split(".")[1]) >= int(minimum)


def test_backends_exclude_each_other_and_are_not_in_the_base():
    base = [re.split(r"[<>=\[]", d)[0] for d in PROJECT["project"]["dependencies"]]
    assert set(base) == {
        *("mlx", "numpy", "click", "pillow", "tqdm", "safetensors", "matplotlib", "jinja2")
    }
    assert EXTRAS["cpu"] == ["mlx[cpu]"]
    assert EXTRAS["cuda"] == ["mlx[cuda13]", "nvidia-cuda-crt==13.*"]
    assert EXTRAS["sd3"] == ["diffusionkit==0.5.1"]
    for name, extra in EXTRAS.items():
        assert name in ("cpu", "cuda") or not any("mlx[" in d for d in extra)


def test_every_room_of_the_package_is_installed():
    found = {"ditq" + "".join(f".{p}" for p in folder(f)) for f in (ROOT / "src").rglob("*.py")}
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def folder(path: Path) -> tuple[str, ...]:
    return path.relative_to(ROOT / "src").parent.parts


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda p: p.name)
def test_arrows_point_one_way(path):
    """Only relative imports inside, and none against the design's direction."""
    text = path.read_text()
    assert not re.search(r"^\s*(from|import) (src|ditq)\b", text, re.MULTILINE), path
    rooms = folder(path)
    own = rooms[0] if rooms else None
    level = len(rooms) + 1
    used = set(re.findall(rf"^\s*from \.{{{level}}}(\w+)", text, re.MULTILINE))
    allowed = {
        "store": {"errors"},
        "sampling": {"errors", "store"},
        "models": {"errors", "store", "sampling"},
        "backends": {"errors", "store"},
        "quant": {"errors", "lanes", "store", "backends"},
        "calibration": {"errors", "lanes", "store", "sampling", "models"},
        "report": {"errors", "store"},
        "conversion": {"errors", "store", "models", "quant"},
        "metrics": {"errors", "store", "sampling", "models", "calibration"},
        "activation_track": {
            *("errors", "store", "sampling", "models", "calibration", "quant", "report"),
        },
        "weight_track": {
            *("cli", "distributed", "errors", "store", "sampling", "models"),
            *("calibration", "quant", "metrics"),
        },
        "evaluation": {
            *("errors", "store", "sampling", "models", "metrics", "report", "inference"),
        },
        "mass_sampling": {
            *("cli", "distributed", "errors", "store", "sampling", "models", "report"),
            *("quant", "inference", "evaluation"),
        },
        "benchmarking": {
            *("cli", "errors", "store", "sampling", "models", "quant", "backends", "report"),
            "inference",
        },
        "inference": {
            *("cli", "errors", "store", "sampling", "models", "calibration", "quant"),
            *("backends", "conversion", "metrics", "report"),
        },
    }
    if own:
        assert used <= allowed[own], f"{path} imports {used - allowed[own]}"
    if path.name != "sd3.py":
        assert not re.search(r"(from|import) diffusionkit", text), path
