"""What every benchmark writes down: machine, versions, date, command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from src.backends import device_name

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "benchmarks"


def environment() -> dict[str, str]:
    """This process's, with the package to be found from any folder."""
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def machine() -> dict[str, Any]:
    """Where and when a figure was measured, and by which command."""
    return {
        "device": device_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": importlib.metadata.version("mlx"),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", f"tools.{Path(sys.argv[0]).stem}", *arguments()]),
    }


def arguments() -> list[str]:
    """Of this command, without the folder of work, which changes no figure."""
    given = sys.argv[1:]
    places = [i for i, argument in enumerate(given) if argument == "--work"]
    return [a for i, a in enumerate(given) if i not in places and i - 1 not in places]


def meanwhile(data: dict[str, Any]) -> list[str]:
    """Lines that say what else the machine did; none where nothing is noted."""
    note = data.get("note")
    return ["", f"Meanwhile on the same machine: {note}."] if note else []


def write_report(name: str, title: str, data: dict[str, Any], lines: list[str]) -> None:
    """docs/benchmarks/NAME.json and NAME.md; `data` holds `machine`, and a `note` if any."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n")
    where = data["machine"]
    foot = (
        f"`{where['command']}` on {where['device']} ({where['cores']} cores, {where['system']}), "
        f"MLX {where['mlx']}, Python {where['python']}, {where['date']}."
    )
    lines = [f"# {title}", "", *lines, *meanwhile(data), "", foot, ""]
    (FOLDER / f"{name}.md").write_text("\n".join(lines))
