"""The benchmark over ranks: what its rate counts, what it refuses, and a whole run on two ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools import bench_common
from tools.bench_ranks import Bench, Job, batch_ends, goal, running_rate, table

from .helpers import assert_one_error_line, run_here

TOOL = "tools.bench_ranks"
SMALL = ["--model", "tiny", "--num-samples", "8", "--timesteps", "2", "--batch-size", "2"]
STEPS = st.lists(st.floats(0.01, 10), min_size=1, max_size=8)  # seconds from batch to batch


def ends_of(steps: list[float], start: float = 0.0) -> list[float]:
    return [start + sum(steps[:i]) for i in range(len(steps) + 1)]


@given(STEPS, st.lists(st.floats(0, 1000), min_size=1, max_size=4))
def test_ranks_alike_are_as_many_times_as_fast_whenever_each_of_them_began(steps, starts):
    one = running_rate([ends_of(steps)], 16)
    several = running_rate([ends_of(steps, start) for start in starts], 16)
    assert one == pytest.approx(16 * len(steps) / sum(steps))
    assert several == pytest.approx(len(starts) * one, rel=1e-6)


@given(STEPS, st.floats(1, 100))
def test_the_slowest_rank_sets_the_time(steps, times):
    slow = [times * step for step in steps]
    found = running_rate([ends_of(steps), ends_of(slow)], 1)
    assert found == pytest.approx(2 * running_rate([ends_of(slow)], 1), rel=1e-6)


def test_batches_are_told_to_their_ranks_in_the_order_of_numbers(tmp_path):
    """That of a picture from 100000 on comes last, although its name sorts before."""
    units = {}
    for moment, name in enumerate(["00000", "50000", "99999", "100000"]):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (10**9 + moment, 10**9 + moment))
        units[name] = {"files": {name: {}}}
    units["statistics"] = {"files": {"absent": {}}}
    first, second = batch_ends(tmp_path, units, 2)
    assert [end % 1000 for end in first + second] == [0, 2, 1, 3]


def test_only_a_gpu_for_each_rank_measures_the_goal():
    rows = [{"ranks": 1, "times_running": 1.0}, {"ranks": 4, "times_running": 3.9}]
    assert goal(rows, 4).endswith(": 3.90, met.")
    assert goal(rows, 2).endswith("not measured (2 GPUs here).")
    assert goal(rows, 0).endswith("not measured (no GPU here).")
    assert goal(rows[:1], 8).endswith("not measured (8 GPUs here).")
    rows[1]["times_running"] = 3.69
    assert goal(rows, 4).endswith(": 3.69, missed.")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--num-samples", "10", "--ranks", "1", "--ranks", "2"], "--num-samples 10"),
        (["--ranks", "1", "--ranks", "4"], "--num-samples 8"),  # nothing after the first batch
        (["--ranks", "2"], "--ranks [2]"),
        (["--quant-config", "config.json"], "--adaround-output"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, word):
    assert_one_error_line(run_here(TOOL, *SMALL, "--dry-run", *arguments), word)


def test_a_dry_run_tells_the_commands():
    result = run_here(TOOL, *SMALL, "--ranks", "2", "--ranks", "1", "--dry-run")
    one, two = result.stdout.splitlines()
    stage = "python -m src.sample --model tiny --weight-bit 16 --num-samples 8 "
    assert one.startswith(stage) and two.startswith("mlx.launch -n 2 ")
    assert two.split(" -- ")[1].replace("ranks_2", "ranks_1") == one


def test_artifacts_take_the_place_of_the_weights_of_16_bits():
    job = Job("nano", 8, 2, 2, "features", "rounded", "config.json")
    words = job.words("out", 2, "nccl", 8)
    assert words[:6] == ["mlx.launch", "-n", "2", "--backend", "nccl", "--"]
    assert "--weight-bit" not in words
    assert words[words.index("--adaround-output") + 1] == "rounded"


def test_a_run_out_of_time_is_left_out_of_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_common, "FOLDER", tmp_path / "docs")
    result = run_here(TOOL, *SMALL, "--ranks", "1", "--seconds", "0")
    assert result.returncode == 0, result.stderr
    assert "not measured: out of --seconds" in (tmp_path / "docs/ranks.md").read_text()


def test_files_that_differ_are_told():
    def manifest(last: str) -> dict:
        files = {"a": {"sha256": "1"}, "b": {"sha256": last}}
        return {
            "units": {"0": {"files": files}},
            "settings": {"weight_bit": 16, "dtype": "float32"},
        }

    bench = Bench(Job("nano", 8, 2, 2, "features"), Path(), None, gpus=0, cuda=False)
    for ranks, last in ((1, "2"), (2, "2"), (3, "3")):
        row = {"ranks": ranks, "seconds": 1.0, "pictures_per_second": 1.0}
        bench.rows.append(row | {"first_batch_seconds": [0.5]})
        bench.compare(bench.rows[-1], manifest(last))
    ends = [line.split("|")[-2].strip() for line in table(bench.rows)[2:]]
    assert ends == ["yes, 2 files", "yes, 2 files", "no: 1 of 2 files"]


@pytest.mark.slow
@pytest.mark.skipif(
    mx.cuda.is_available() and mx.device_count(mx.gpu) < 2, reason="a GPU for each rank"
)
def test_two_ranks_are_measured_and_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_common, "FOLDER", tmp_path / "docs")
    options = ["--ranks", "1", "--ranks", "2", "--work", str(tmp_path)]
    result = run_here(TOOL, *SMALL, *options)
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "docs/ranks.json").read_text())
    one, two = data["rows"]
    for row in (one, two):
        assert row["files"] == 5 and row["files_that_differ"] == 0
        assert 0 < row["running_seconds"] < row["seconds"]
        first = row["first_batch_seconds"]
        assert all(0 < own < row["seconds"] for own in first)
    assert str(tmp_path) not in json.dumps(data["rows"])
    assert (tmp_path / "docs/ranks.png").read_bytes().startswith(b"\x89PNG")
    assert "| 2 | " in (tmp_path / "docs/ranks.md").read_text()
