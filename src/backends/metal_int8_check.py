"""Whether the integer kernels are right on this Apple GPU: found out once, and remembered."""

from __future__ import annotations

import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from . import metal_int8_kernels as kernels
from .cuda_int8_check import QUANTIZER_TEST, Case, first_wrong, random_input, random_product
from .device import M5, Device
from .fusing import InputGrid
from .remembering import Record, found_once, source_hash

OLDEST_MACOS = (26, 2)
# What is compiled and started, asked, and compared with.
DECIDING = ("metal_int8_kernels", "metal_int8_check", "cuda_int8_check", "fusing", "weight")

# Ragged rows and whole tiles, one step of depth and many, sums beyond 2^24.
SELF_TEST = (
    Case(1, 128, 32, 4),
    Case(77, 256, 1056, 8),
    Case(300, 128, 6144, 4),
    Case(128, 128, 6144, 8),
    Case(641, 384, 96, 4),
)


class Machine(NamedTuple):
    """What a self-test's result holds for."""

    device: Device
    architecture: str
    macos: str
    mlx: str

    @classmethod
    def here(cls) -> Machine:
        architecture = str(mx.device_info().get("architecture", ""))
        return cls(Device.here(), architecture, platform.mac_ver()[0], mx.__version__)


def macos_version(text: str) -> tuple[int, int]:
    """(major, minor) of what Python says, (0, 0) of nothing."""
    found = re.match(r"(\d+)(?:\.(\d+))?", text)
    major, minor = (int(found[1]), int(found[2] or 0)) if found else (0, 0)
    # There is no macOS 16: a Python that was built before macOS 26 is told so.
    return (26 if major == 16 else major), minor


def unsuited(machine: Machine) -> str:
    """Why the kernels are not even tried there; empty if they are."""
    if machine.device.kind != "metal":
        return "MLX does not compute on an Apple GPU"
    if machine.device.generation < M5:
        return f"{machine.architecture} is older than M5"
    if macos_version(machine.macos) < OLDEST_MACOS:
        return f"macOS {machine.macos} is older than {'.'.join(map(str, OLDEST_MACOS))}"
    return ""


def wrong_sums(case: Case, seed: int = 0) -> int:
    """How many outputs of a random product differ from NumPy's in any bit."""
    product = random_product(case, seed)
    codes = kernels.quantize(product.x, InputGrid.of_codes(127))
    codes = kernels.Codes(codes.values, codes.scales * product.factors)
    weight, scales = product.weight.codes(mx.int8), product.weight.scales[:, 0]
    got = kernels.multiply(codes, weight, scales, None, mx.float32)
    return int((np.array(got) != product.wanted).sum())


def wrong_codes(case: tuple[int, int, mx.Dtype, dict[str, Any]]) -> int:
    """How many codes and scales of random rows differ from NumPy's."""
    rows, columns, dtype, how = case
    wanted = random_input(rows, columns, dtype, **how)
    values, scales = map(np.array, kernels.quantize(wanted.x, wanted.grid))
    wrong = int((values[:rows] != wanted.codes).sum()) + int(values[rows:].any())
    return wrong + int((scales != wanted.scales).sum())


def record(machine: Machine) -> Record:
    """Where the self-test's result is kept, and what it holds for."""
    here = Path(__file__).parent
    source = source_hash((here / "metal").glob("*.metal"), here, DECIDING)
    return Record("metal_int8", (machine.architecture, machine.macos, machine.mlx, source))


def try_out() -> str:
    """Empty where all is exact, else what went wrong; by testing now."""
    return first_wrong(SELF_TEST, wrong_sums) or first_wrong(QUANTIZER_TEST, wrong_codes)


@lru_cache
def self_test(machine: Machine) -> str:
    """The same, tested once a machine."""
    return found_once(record(machine), try_out)
