"""Random models and inputs that several tests need."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from src.models.configs import MMDiTConfig
from src.models.mmdit import MMDiT
from src.models.synthetic import randomize

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent


def random_model(config: MMDiTConfig, seed: int = 0) -> MMDiT:
    """A transformer in which every parameter matters, all float32."""
    model = MMDiT(config)
    randomize(model, seed)
    return model


def random_inputs(
    config: MMDiTConfig, height: int, width: int, batch: int = 2, tokens: int = 5, seed: int = 1
) -> tuple[mx.array, mx.array, mx.array]:
    """A latent, text tokens and pooled text."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, height, width, config.latent_channels),
        (batch, tokens, config.text_dim),
        (batch, config.pooled_dim),
    )
    return tuple(mx.array(rng.standard_normal(s).astype(np.float32)) for s in shapes)


def relative_error(got: object, wanted: object) -> float:
    """Norm of the difference over the norm of what was wanted."""
    got, wanted = np.array(got, dtype=np.float64), np.array(wanted, dtype=np.float64)
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def missing(complaint: str) -> None:
    """Ends a test that needs what this machine lacks: skipped, but a failure where CI is set."""
    pytest.fail(complaint) if os.environ.get("CI") else pytest.skip(complaint)


def run_on_two_ranks(
    *command: object, options: Sequence[object] = (), cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """`python -m` a module with its arguments, under mlx.launch; `options` are the launcher's."""
    launcher = Path(sys.executable).parent / "mlx.launch"
    launched = [launcher, "-n", "2", *options, "--", sys.executable, "-m", *command]
    return subprocess.run(launched, cwd=cwd, capture_output=True, text=True, timeout=120)


def refuse_network(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No hub's cache but the test's own, and whoever opens a connection fails."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by name; a lock says nothing."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def start_quietly(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_at_random_moments(
    command: list[str],
    folder: Path,
    times: int,
    *,
    check: Callable[[Path], object],
    earliest: float = 0.3,
) -> int:
    """Runs the command once, then kills it again and again; how many runs that has cut short.

    Each goes on in the folder that the one before it has left; a finished one is checked and
    removed. Moments are shares of the whole run's time, since Python and MLX start first.
    """
    begun = time.monotonic()
    assert start_quietly(command).wait() == 0
    whole, rng, cut_short = time.monotonic() - begun, random.Random(0), 0
    check(folder)
    shutil.rmtree(folder)
    for _ in range(times):
        process, begun = start_quietly(command), time.monotonic()
        try:
            process.wait(timeout=whole * rng.uniform(earliest, 1.0))
            whole = time.monotonic() - begun  # the machine is less busy than at first
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            cut_short += process.wait() != 0
        if (folder / "manifest.json").exists():
            check(folder)
            shutil.rmtree(folder)
    return cut_short


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """`python -m …` as a user's process."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_here(module: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """The same command in this process: what it prints and its exit code, without a new Python."""
    command, before = importlib.import_module(module).main, os.getcwd()
    os.chdir(cwd)
    try:
        result = CliRunner().invoke(command, arguments, prog_name=f"python -m {module}")
    finally:
        os.chdir(before)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def assert_one_error_line(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 1, one line that starts with `error:` and names what it should, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 1, result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], lines[0]
