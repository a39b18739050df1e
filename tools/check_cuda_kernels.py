"""Everything that can be checked about the integer kernels on an NVIDIA GPU, within eight minutes.

    python -m tools.check_cuda_kernels [--shapes 500] [--output FILE]

First random shapes against NumPy, and beside them compute-sanitizer's memcheck and racecheck over a
few products; then the tests of tests/test_cuda_int8.py. Prints what failed; exit status 1 if
anything did.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from src.backends import Device
from src.backends.cuda_int8 import status, suited
from src.backends.cuda_int8_check import (
    ENDING_TEST,
    NORM_TEST,
    SELF_TEST,
    Case,
    try_out,
    wrong_codes,
    wrong_endings,
    wrong_modulated,
    wrong_sums,
)
from src.backends.cuda_int8_source import MMA, NARROW, WGMMA, Variant

import click
import mlx.core as mx
import numpy as np

from tools.bench_common import machine

SANITIZED = (Case(77, 200, 256, 8), Case(130, 264, 640, 4), SELF_TEST[-1])
CHECKS = ("memcheck", "racecheck")
SECONDS = 480  # until what still runs is ended
TESTS = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda_int8.py", "-m", "not slow"]
TAIL = 4000  # characters of a program's output that are kept


def variants() -> list[Variant]:
    """The kernels that run here; Hopper runs all."""
    found = suited(Device.here())
    return [v for v in (WGMMA, NARROW, MMA) if found is WGMMA or v is found]


def few_products() -> int:
    """Every kind of kernel a few times; how many numbers were wrong."""
    wrong = wrong_codes(77, 200, mx.float16, per_token=True)
    wrong += wrong_codes(78, 200, mx.float16, shifted=True, smoothed=True)
    wrong += sum(wrong_modulated(*case[:4], **case[4]) for case in NORM_TEST)
    for variant in variants():
        wrong += sum(wrong_sums(variant, case) for case in SANITIZED)
        wrong += sum(wrong_endings(variant, case) for case in ENDING_TEST)
    return wrong


def started(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what a sanitizer has started ends with it
    )


@contextmanager
def running(commands: Mapping[str, list[str]]) -> Iterator[dict[str, subprocess.Popen]]:
    """The programs side by side; none outlives what is done with them, also when it is stopped."""
    processes: dict[str, subprocess.Popen] = {}
    try:
        for name, command in commands.items():
            processes[name] = started(command)
        yield processes
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def sanitizers() -> dict[str, list[str]]:
    """The commands of compute-sanitizer over `few_products`, one a check."""
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if found is None:
        return {}
    here = [sys.executable, "-m", "tools.check_cuda_kernels", "--few"]
    only = ["--kernel-name", "kernel_substring=ditq"]
    return {
        check: [found, "--tool", check, "--error-exitcode", "9", *only, *here] for check in CHECKS
    }


def finished(process: subprocess.Popen, seconds: float) -> dict[str, Any]:
    """Exit status and the end of the output; one that takes too long is ended."""
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return {"status": "timed out", "output": output[-TAIL:]}
    return {"status": process.returncode, "output": output[-TAIL:]}


def outcomes(processes: Mapping[str, subprocess.Popen], end: float) -> dict[str, Any]:
    """What became of each by then, as `time.perf_counter` counts; also printed."""
    found = {}
    for name, process in processes.items():
        found[name] = finished(process, end - time.perf_counter())
        click.echo(f"--- {name}: exit {found[name]['status']}\n{found[name]['output']}")
    return found


def fuzz(variant: Variant, shapes: int) -> dict[str, Any]:
    """Random shapes, of some all endings: which came out wrong, and how many there were."""
    rng, begun, wrong = np.random.default_rng(1), time.perf_counter(), []
    for seed in range(shapes):
        rows, outputs = (int(n) for n in rng.integers(1, 900, 2))
        case = Case(rows, outputs, 32 * int(rng.integers(1, 64)), int(rng.choice([4, 8])))
        ends = seed % 5 == 0 and wrong_endings(variant, case, seed)
        if ends or wrong_sums(variant, case, seed):
            wrong.append(case._asdict())
    return {"shapes": shapes, "wrong": wrong, "seconds": time.perf_counter() - begun}


@click.command()
@click.option("--shapes", default=500, help="Random shapes a kernel.")
@click.option("--output", type=click.Path(path_type=Path), help="Also write the results as JSON.")
@click.option("--few", is_flag=True, help="Only a few products: what the sanitizers watch.")
def main(shapes: int, output: Path | None, few: bool) -> None:
    """Check the integer kernels on this GPU."""
    if not variants():
        raise click.ClickException(f"no kernel for this machine: {status()}")
    if few:
        wrong = few_products()
        click.echo(f"wrong numbers: {wrong}")
        sys.exit(wrong > 0)
    begun, data = time.perf_counter(), {"machine": machine()}
    for variant in variants():
        start = time.perf_counter()
        data[f"self-test {variant.name}"] = result = try_out(variant) or "passed"
        seconds = time.perf_counter() - start
        click.echo(f"{variant.name}: self-test {result}, {seconds:.1f} s with compiling")
    watched = sanitizers()
    with running(watched) as processes:
        for variant in variants():
            data[f"fuzz {variant.name}"] = found = fuzz(variant, shapes)
            click.echo(
                f"{variant.name}: {len(found['wrong'])} of {shapes} random shapes wrong "
                f"{found['wrong'][:5]}, {found['seconds']:.0f} s"
            )
        with running({"pytest": TESTS}) as tests:
            data |= outcomes({**processes, **tests}, begun + SECONDS)
    if not watched:
        click.echo("compute-sanitizer is not installed: memory accesses and races are unchecked")
    if output is not None:
        output.write_text(json.dumps(data, indent=2) + "\n")
    good = all(data[f"self-test {v.name}"] == "passed" for v in variants())
    good &= all(not data[f"fuzz {v.name}"]["wrong"] for v in variants())
    good &= all(data[name]["status"] == 0 for name in ("pytest", *watched))
    click.echo(f"{'all passed' if good else 'FAILED'}, {time.perf_counter() - begun:.0f} s")
    sys.exit(not good)


if __name__ == "__main__":
    main()
