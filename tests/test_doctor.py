"""`ditq doctor`, the command group, and the BLAS under it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from src import blas
from src.cli import COMMANDS

import pytest

from .helpers import ROOT, assert_one_error_line, run, run_here

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has the slow BLAS")


@pytest.mark.slow
def test_doctor_reports_every_fact():
    result = run("src.doctor")
    assert result.returncode == 0, result.stderr
    facts = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line.strip())
    assert {"ditq", "mlx", "device", "memory", "backends", "sd3"} <= facts.keys()
    assert "GFLOP/s" in result.stdout and "cpu BLAS" in result.stdout
    assert "cpu" in facts["backends"]


@linux
def test_blas_off_is_said_and_loads_nothing():
    code = "import src, json, src.blas as b; print(json.dumps([b.loaded(), b.describe()]))"
    environment = {**os.environ, "DITQ_BLAS": "off"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    path, words = json.loads(out.stdout)
    assert path is None and "DITQ_BLAS=off" in words


@linux
def test_a_named_library_is_the_one_that_is_loaded(tmp_path):
    if blas.loaded() is None:
        pytest.skip("no OpenBLAS on this machine")
    copy = tmp_path / "libopenblas-own.so"
    copy.write_bytes(open(blas.loaded(), "rb").read())
    code = "import src, src.blas as b; print(b.loaded())"
    environment = {**os.environ, "DITQ_BLAS": str(copy)}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert out.stdout.strip() == str(copy), out.stderr


def test_a_missing_library_is_no_reason_to_stop():
    assert run("src.cli", "--version", DITQ_BLAS="/nowhere/libblas.so").returncode == 0


def test_group_lists_every_command_and_each_shows_purpose_example_and_defaults():
    listed = run_here("src.cli", "--help")
    assert listed.returncode == 0, listed.stderr
    for name, module in COMMANDS.items():
        assert name in listed.stdout
        page = run_here(f"src.{module}", "--help").stdout
        assert "Example:" in page
        # One entry an option, from its name to the next one's.
        entries = re.split(r"\n  (?=-)", page.split("Options:")[1])[1:]
        for entry in entries:
            assert "[" in entry or entry.startswith("--help"), f"{name}: no default in {entry}"


def test_unknown_command_is_one_error_line():
    assert_one_error_line(run("src.cli", "quantise"), "quantise")
