"""`kill -9` of real processes: files are the old or the new one, stages go on where they were."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
from pathlib import Path

from src.store import load_npz, load_tensors, read_json, remove_stale_temporaries

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
TEMPORARY = re.compile(r"\.(a\.npz|a\.json|a\.safetensors)\.tmp-\d+-[0-9a-f]{8}")

# Rewrites three files of 4 MB for ever; every version is recognisable by its one repeated digit.
WRITER = """
import itertools, sys
import numpy as np
from src.store import save_npz, save_tensors, write_json
folder = sys.argv[1]
for count in itertools.count():
    digit = count % 10
    save_npz(f"{folder}/a.npz", x=np.full(1_000_000, digit, np.float32))
    write_json(f"{folder}/a.json", {"format": "toy", "version": 1, "x": str(digit) * 4_000_000})
    save_tensors(f"{folder}/a.safetensors", {"x": np.full(1_000_000, digit, np.float32)})
    if count == 0:
        print("ready", flush=True)
"""

# A stage of 40 units, of which rank R of N does every N-th; pauses make it last long enough.
STAGE = """
import sys, time
import numpy as np
from src.store import Manifest, folder_lock, save_npz
folder, rank, ranks, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
units = [f"unit{i:02d}" for i in range(40)]
with folder_lock(folder, rank=rank):
    manifest = Manifest.open(
        folder, format="toy", version=1, settings={"seed": 5}, made_from={"model": "none"},
        rank=rank if ranks > 1 else None,
    )
    print("ready", flush=True)
    for index in range(rank, 40, ranks):
        if manifest.done(units[index]):
            continue
        rng = np.random.default_rng(index)
        files = [f"samples/{units[index]}_{part}.npz" for part in range(3)]
        for file in files:
            save_npz(f"{folder}/{file}", x=rng.standard_normal(20_000))
            time.sleep(pause)
        manifest.mark(units[index], files, info={"index": index})
    if ranks == 1:
        manifest.finish(units, summary={"units": len(units)})
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_after(process: subprocess.Popen[str], seconds: float) -> bool:
    """Kill -9 so long after the process said it is ready; whether it was still running."""
    assert process.stdout.readline() == "ready\n"
    time.sleep(seconds)
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name[:5] != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_a_file_is_the_old_or_the_new_one_at_50_random_points(tmp_path):
    rng = random.Random(8)
    cut_in_the_middle = 0
    for _ in range(50):
        assert kill_after(start(WRITER, tmp_path), rng.uniform(0, 0.1))
        array = load_npz(tmp_path / "a.npz", {"x": ("float32", (1_000_000,))})["x"]
        assert np.all(array == array[0])
        text = read_json(tmp_path / "a.json", "toy", 1)["x"]
        assert text == text[0] * 4_000_000
        tensors = load_tensors(tmp_path / "a.safetensors", {"x": ("float32", (1_000_000,))})
        assert np.all(np.array(tensors["x"]) == np.array(tensors["x"])[0])

        others = {path.name for path in tmp_path.iterdir()} - {"a.npz", "a.json", "a.safetensors"}
        assert len(others) <= 1 and all(map(TEMPORARY.fullmatch, others))
        assert {path.name for path in remove_stale_temporaries(tmp_path)} == others
        cut_in_the_middle += len(others)
    # Otherwise the kills would only ever have met a writer between two files.
    assert cut_in_the_middle >= 5


@pytest.mark.slow
def test_a_stage_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    whole = start(STAGE, tmp_path / "whole", 0, 1, 0)
    whole.communicate()
    assert whole.returncode == 0

    rng = random.Random(9)
    folder = tmp_path / "killed"
    for _ in range(12):
        assert kill_after(start(STAGE, folder, 0, 1, 0.005), rng.uniform(0, 0.08))
        assert not (folder / "manifest.json").exists()
    assert len(list(folder.glob("samples/*.npz"))) > 3
    last = start(STAGE, folder, 0, 1, 0)
    last.communicate()
    assert last.returncode == 0
    assert contents(folder) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_as_processes_and_a_killed_one_give_the_bytes_of_one_process(tmp_path):
    start(STAGE, tmp_path / "one", 0, 1, 0).communicate()
    folder = tmp_path / "ranks"
    ranks = [start(STAGE, folder, rank, 3, 0.005) for rank in range(3)]
    assert kill_after(ranks[1], 0.05)
    for rank in (0, 2):
        ranks[rank].communicate()
        assert ranks[rank].returncode == 0
    # A single process takes over what the killed rank left, and merges.
    start(STAGE, folder, 0, 1, 0).communicate()
    assert contents(folder) == contents(tmp_path / "one")
