"""Integer kernels for NVIDIA GPUs: what surrounds them anywhere, the kernels where there is one."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from src.backends import BACKENDS, Device, Weight, metal_int8_kernels, named, staying_packed
from src.backends import cuda_int8_check as check
from src.backends import cuda_int8_kernels as kernels
from src.backends import cuda_int8_source as sources
from src.backends.cuda_int8 import CudaInt8, refusal, status, suited, usable, variant_of
from src.backends.cuda_int8_check import (
    ENDING_SCALES,
    NORM_EPS,
    Case,
    codes_of,
    random_ending,
    random_input,
    random_modulated,
    random_weight,
    record,
    self_test,
    tiled,
    try_out,
    untiled,
    wrong_codes,
    wrong_endings,
    wrong_modulated,
    wrong_sums,
)
from src.backends.cuda_int8_source import MMA, NARROW, WGMMA
from src.backends.fusing import InputGrid, Modulation
from src.backends.remembering import COUNTED
from src.errors import UserError
from src.inference.kernels import join
from src.models import mmdit
from src.models.load import default_dtype
from src.models.pipeline import Conditioning
from src.quant.artifacts import LayerConfig
from src.quant.int8 import INT8Linear
from src.quant.linear import QuantizedLinear, Runtime
from src.quant.schedule import Schedule, Step

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.check_cuda_kernels import running

from .helpers import ROOT, relative_error
from .quantized_models import quantized_pipeline

VARIANT = suited(Device.here())
VARIANTS = [v for v in (WGMMA, NARROW, MMA) if VARIANT is WGMMA or v is VARIANT]  # Hopper has all
needs_cuda = pytest.mark.skipif(VARIANT is None, reason="no NVIDIA GPU from sm_80 on here")
without_cuda = pytest.mark.skipif(mx.cuda.is_available(), reason="here a self-test may pass")
HERE = VARIANTS or [MMA]


def text(name: str) -> str:
    return (sources.FOLDER / f"{name}.cu").read_text()


def name_of(value: object) -> str:
    return getattr(value, "name", str(value))


on_all = pytest.mark.parametrize("variant", HERE, ids=name_of)
on_all_with_outputs = pytest.mark.parametrize(
    "variant, outputs", [(v, n) for v in HERE for n in (384, 72, 133) if v.fits(n)], ids=name_of
)
LINEARS = {
    "sd3": [(1536, 1536), (6144, 1536), (1536, 6144), (4608, 1536), (9216, 1536)],
    "sd3.5-large": [(2432, 2432), (9728, 2432), (2432, 9728)],
    "flux": [(3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360)],
}
SHAPES = [(model, *shape) for model, shapes in LINEARS.items() for shape in shapes]
HOW = ("shifted", "smoothed", "per_token")
ALL_WAYS = [dict(zip(HOW, on, strict=True)) for on in itertools.product([False, True], repeat=3)]
QUANTIZERS = [(mx.float16, how) for how in ALL_WAYS]  # each is compiled
QUANTIZERS += [(dtype, how) for dtype in (mx.float32, mx.bfloat16) for how in ALL_WAYS[::7]]


# --- anywhere


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 300), columns=st.integers(1, 300))
def test_tiles_hold_every_code_once_and_zeros_around(seed, rows, columns):
    codes = np.random.default_rng(seed).integers(-128, 128, (rows, columns)).astype(np.int8)
    tiles = tiled(codes)
    assert tiles.shape == (-(-rows // 128), -(-columns // 128), 128, 128)
    np.testing.assert_array_equal(untiled(tiles, rows, columns), codes)
    assert np.abs(tiles.astype(int)).sum() == np.abs(codes.astype(int)).sum()


def test_eight_rows_of_a_column_lie_in_eight_banks_of_sixteen_bytes():
    rows = np.repeat(np.arange(128, dtype=np.int8)[:, None], 128, axis=1)
    chunks = np.repeat(np.arange(8, dtype=np.int8), 16)[None].repeat(128, axis=0)
    row_of, chunk_of = tiled(rows)[0, 0], tiled(chunks)[0, 0, :, ::16]
    np.testing.assert_array_equal(row_of, rows)
    for chunk in range(8):
        places = np.argmax(chunk_of == chunk, axis=1).reshape(16, 8)
        assert (np.sort(places, axis=1) == np.arange(8)).all()


@pytest.mark.parametrize("columns", [192, 256])
def test_the_hopper_instruction_names_each_of_its_operands_once(columns):
    source, sums = sources.wgmma_source(columns), columns // 2
    instruction = source[source.index("wgmma.mma_async") :]
    assert f"m64n{columns}k32.s32.s8.s8" in instruction
    named_in_it = re.findall(r"%\d+", instruction[: instruction.index(";")])
    assert named_in_it == [f"%{i}" for i in range(sums + 2)]
    assert re.findall(r'"\+r"\(sums\[(\d+)\]\)', source) == [str(i) for i in range(sums)]


@given(rows=st.integers(1, 20000), width=st.integers(1, 30000))
def test_narrow_tiles_are_taken_where_they_are_whole_and_sooner_done(rows, width):
    rows_of_tiles = -(-rows // 128)
    turns = [-(-rows_of_tiles * -(-width // c) // 132) * c for c in (192, 256)]
    assert kernels.narrow_is_faster(rows, width) == (width % 384 == 0 and turns[0] < turns[1])


def test_narrow_tiles_are_those_of_a_small_picture():
    """512 and 1024 pixels of SD3 with guidance, and its text."""
    found = {(r, n) for r in (2048, 8192) for n in (1536, 6144) if kernels.narrow_is_faster(r, n)}
    assert found == {(2048, 1536)}
    weights = {"kernel": WGMMA.name, "narrow": NARROW.name, "scales": mx.ones((1536,))}
    codes = kernels.Codes(mx.zeros((16, 1, 128, 128), dtype=mx.int8), mx.ones((2048,)), 128)
    assert variant_of(weights, codes) is NARROW
    assert variant_of({**weights, "kernel": MMA.name}, codes) is MMA
    assert variant_of({k: v for k, v in weights.items() if k != "narrow"}, codes) is WGMMA


@pytest.mark.parametrize("variant", [WGMMA, NARROW, MMA], ids=lambda v: v.name)
def test_sources_keep_to_what_mlx_compiles(variant):
    """No standard headers and no clusters; the constants are those that Python counts with."""
    names = "tiles", "finish", variant.file, "quantize", "normalize"
    generated = "" if variant is MMA else sources.wgmma_source(variant.columns)
    source = generated + "".join(map(text, names))
    assert "#include" not in source and "__cluster_dims__" not in source
    assert f"__launch_bounds__({variant.threads}" in source
    constants = dict(re.findall(r"constexpr int (\w+) = (\d+);", source))
    assert int(constants["PIECE"]) == sources.PIECE
    assert int(constants["CHUNK"]) == sources.CHUNK
    assert int(constants["ROWS_PER_BLOCK"]) * 32 == sources.QUANTIZE_THREADS
    stage = sources.PIECE * (sources.PIECE + variant.columns)
    assert variant.shared_memory == int(constants["STAGES"]) * stage + 1024
    assert variant.shared_memory <= (99 if variant is MMA else 227) * 1024
    assert variant is MMA or int(constants["WIDE"]) == variant.columns
    braces = [source.count(pair) for pair in "{}()"]
    assert braces[0] == braces[1] and braces[2] == braces[3]


@pytest.mark.parametrize("variant", [WGMMA, NARROW, MMA], ids=lambda v: v.name)
def test_a_header_names_files_and_changes_with_them(variant, monkeypatch, tmp_path):
    """MLX reads the source of a kernel at every call, and knows a kernel by it."""
    header = sources.multiply_header(variant)
    files = re.findall(r'#include "(.+)\.cu"', header)
    assert [Path(file).stem for file in files] == ["tiles", "finish", variant.file]
    assert all(Path(f"{file}.cu").is_file() for file in files) and len(header) < 5000
    copies = shutil.copytree(sources.FOLDER, tmp_path / "cuda")
    monkeypatch.setattr(sources, "FOLDER", copies)
    before = sources.multiply_header(variant)
    (copies / "finish.cu").write_text(text("finish") + "\n")
    assert sources.multiply_header(variant) != before


def test_sources_are_installed():
    assert '"ditq.backends" = ["cuda/*.cu"' in (ROOT / "pyproject.toml").read_text()
    files = {path.stem for path in (ROOT / "src" / "backends" / "cuda").iterdir()}
    assert files == {"tiles", "quantize", "normalize", "finish", WGMMA.file, MMA.file}


@given(rows=st.integers(1, 20000), width=st.integers(1, 30000))
def test_every_tile_has_a_block_that_comes_to_it(rows, width):
    for variant in (WGMMA, NARROW, MMA):
        start = kernels.launch(variant, rows, width)
        blocks, rest = divmod(start["grid"][0], start["threadgroup"][0])
        tiles = -(-rows // 128) * -(-width // variant.columns)
        assert rest == 0 and 1 <= blocks <= tiles
        assert variant.persistent or blocks == tiles


def test_column_table_holds_pairs_and_mixes_as_biases_do():
    scales, bias = mx.array([1.0, 2.0, 3.0]), mx.array([[4.0, 5.0, 6.0], [8.0, 9.0, 0.0]])
    table = np.array(kernels.column_table(scales, bias))
    assert table.shape == (2, 512)
    np.testing.assert_array_equal(table[0, :8], [1, 2, 4, 5, 3, 0, 6, 0])
    assert not table[:, 8:].any()
    between = np.array(kernels.column_table(scales, bias[:1] + 0.5 * (bias[1:] - bias[:1])))
    np.testing.assert_array_equal(table[0] + 0.5 * (table[1] - table[0]), between[0])
    np.testing.assert_array_equal(kernels.column_table(scales)[0, 2:4], [0, 0])


def test_the_next_inputs_grid_is_one_multiplication_and_one_addition():
    """(y − shift) / smoothing / scale, of one step and of a mixture of two."""
    rng = np.random.default_rng(0)
    shifts, smoothing = rng.standard_normal((2, 300)), rng.uniform(0.5, 2, 300)
    shifts, smoothing = (mx.array(v.astype(np.float32)) for v in (shifts, smoothing))
    table = CudaInt8.input_table(shifts, smoothing, 300)
    assert table.shape == (2, 1024)
    y, scale = rng.standard_normal(300), 0.03
    for row, shift in ((table[1], shifts[1]), (0.5 * (table[0] + table[1]), shifts.mean(axis=0))):
        following = CudaInt8.following(row, mx.array([scale]), mx.array([127.0]))
        pairs = np.array(following.table).reshape(-1, 2, 2)[:150]
        factor, term = (pairs[:, i].reshape(-1) for i in range(2))
        wanted = (y - np.array(shift)) / np.array(smoothing) / scale
        np.testing.assert_allclose((y * factor + term) / scale, wanted, rtol=1e-5, atol=1e-3)
    grid = InputGrid(mx.array([scale]), mx.array([127.0]), shifts[0], smoothing)
    got, wanted = (
        kernels.following(grid, 300),
        CudaInt8.following(table[0], grid.scales, grid.limits),
    )
    assert mx.array_equal(got.table, wanted.table) and mx.array_equal(got.scale, wanted.scale)
    plain = np.array(CudaInt8.input_table(None, None, 300)).reshape(-1, 2, 2)
    assert (plain[:150, 0] == 1).all() and not plain[:, 1].any() and not plain[150:].any()


def test_the_kernel_follows_the_device():
    wanted = {90: WGMMA, 80: MMA, 89: MMA, 100: MMA, 120: MMA, 75: None, 0: None}
    assert {found: suited(Device("cuda", found)) for found in wanted} == wanted
    assert suited(Device("cpu")) is None and suited(Device("metal", 90)) is None


def test_what_is_no_product_of_whole_numbers_is_refused():
    weight = Weight(mx.zeros((4, 8), dtype=mx.uint32), mx.ones((4, 1)), 4)
    assert refusal(weight, 127) == "" == refusal(weight, 7)
    assert refusal(weight, None) == "inputs are floats"
    assert refusal(weight, 240) == "codes up to 240"
    groups = Weight(weight.packed, mx.ones((4, 2)), 4)
    assert refusal(groups, 127) == "scales of groups"
    long = Weight(mx.zeros((1, 33056), dtype=mx.uint32), mx.ones((1, 1)), 8)
    assert "132224 columns do not fit in 32 bits" in refusal(long, 127)


@pytest.mark.skipif(VARIANT is not None, reason="there is such a GPU here")
def test_without_a_gpu_it_says_so_and_others_multiply():
    assert usable() is None
    assert status().startswith("not used: ")
    assert "CUDA" in try_out(WGMMA)


@pytest.fixture
def nvidia(monkeypatch, tmp_path):
    """This machine looks to MLX as if it had such a GPU; nothing of it can run a kernel."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)

    def pretend(name: str = "NVIDIA H200", major: int = 9, minor: int = 0) -> None:
        parts = {"compute_capability_major": major, "compute_capability_minor": minor}
        monkeypatch.setattr(mx, "device_info", lambda: {"device_name": name, **parts})
        self_test.cache_clear()

    yield pretend
    self_test.cache_clear()


@pytest.fixture
def started(nvidia, monkeypatch):
    """Such a GPU that passed its self-test before, whose kernels start and do nothing: the names of
    those that were started."""
    makers = [getattr(sources, name) for name in dir(sources) if name.endswith("_kernel")]
    names: list[str] = []

    def kernel(name: str, **_):
        def start(*, output_shapes, output_dtypes, **_):
            names.append(name.removeprefix("ditq_").removesuffix("_mma"))
            return [mx.zeros(*out) for out in zip(output_shapes, output_dtypes, strict=True)]

        return start

    for maker in makers:
        maker.cache_clear()
    monkeypatch.setattr(mx.fast, "cuda_kernel", kernel)
    nvidia("NVIDIA L40S", 8, 9)
    record(MMA).write("")
    yield names
    for maker in makers:
        maker.cache_clear()


@pytest.fixture
def fitting(started):
    """What fits together: 10 rows of 128 columns, and a weight of 256 outputs."""
    _, weight = random_weight(np.random.default_rng(0), Case(1, 256, 128, 4))
    x, grid, backend = mx.ones((2, 5, 128)), InputGrid.of_codes(127), CudaInt8()
    return SimpleNamespace(
        backend=backend,
        operand=backend.prepare(weight, mx.float16, 127),
        x=x,
        grid=grid,
        codes=backend.quantize(x, grid),
        residual=mx.ones((2, 5, 256)),
        gate=mx.ones((2, 256)),
    )


GRIDS = {
    "number of scales: 3; valid: a divisor of the number of rows, 10": {"scales": (3,)},
    "number of scales: 0": {"scales": (0,), "limits": (0,)},
    "number of limits: 1; valid: 2": {"scales": (2,), "limits": (1,)},
    "number of limits: 2; valid: 1": {"limits": (2,)},
    "shape of the shift: (256,); valid: (128,) or (1, 128)": {"shift": (256,)},
    "shape of the shift: (2, 64)": {"shift": (2, 64)},
    "shape of the shift: (2, 128)": {"shift": (2, 128)},
    "shape of the shift: ()": {"shift": ()},
    "shape of the smoothing: (32,); valid: (128,)": {"smoothing": (32,)},
    "shape of the smoothing: (1, 128)": {"smoothing": (1, 128)},
}


def assert_refused(words: str, call: Callable[[], object]) -> None:
    """In one line, which says what there must be, and how to come by it."""
    with pytest.raises(UserError) as found:
        call()
    message = str(found.value)
    assert message.startswith(words) and "\n" not in message
    assert re.search("; valid: .+; (give|multiply|take|make) ", message)


@pytest.mark.parametrize("words", GRIDS)
def test_a_grid_that_a_quantizer_would_read_beyond_its_end_is_refused(words, fitting, started):
    arrays = {"scales": (1,), "limits": (1,)} | GRIDS[words]
    grid = InputGrid(**{name: mx.ones(shape) for name, shape in arrays.items()})
    modulation = Modulation(mx.ones((2, 128)), mx.ones((1, 128)), NORM_EPS)
    before = len(started)
    for quantize in (
        lambda: fitting.backend.quantize(fitting.x, grid),
        lambda: fitting.backend.quantize_modulated(fitting.x, modulation, grid),
        lambda: fitting.backend.linear(fitting.x, grid, fitting.operand),
        lambda: metal_int8_kernels.quantize(fitting.x, grid),
    ):
        assert_refused(words, quantize)
    assert len(started) == before


def table_of(columns: int) -> kernels.Following:
    return kernels.following(InputGrid.of_codes(127), columns)


PRODUCTS = {
    "columns of the codes: 100; valid: 128": lambda g: g.backend.linear(
        mx.ones((4, 100)), g.grid, g.operand
    ),
    "columns of the codes: 6144": lambda g: g.backend.product(
        g.backend.quantize(mx.ones((4, 6144)), g.grid), g.operand, mx.float16
    ),
    "pieces of the weight's rows and depth: (2, 1); valid: (2, 48)": lambda g: kernels.multiply(
        kernels.quantize(mx.ones((4, 6144)), g.grid),
        g.operand["tiles"],
        g.operand["scales"],
        g.operand["columns"],
        mx.float16,
        MMA,
    ),
    "numbers in the row of biases: 256; valid: 512": lambda g: g.backend.product(
        g.codes, g.operand, mx.float16, mx.zeros((256,))
    ),
    "numbers in the row of biases: 1024": lambda g: g.backend.product_gelu(
        g.codes,
        g.operand,
        table_of(256),
        g.backend.bias_table(g.operand, mx.zeros((2, 256))),
    ),
    "number of factors: 3; valid: 1 or 10": lambda g: g.codes.times(mx.ones((3,))),
    "shape of the residual: (2, 5, 128)": lambda g: g.backend.product_added(
        g.codes, g.operand, g.residual[..., :128], g.gate[:, :128]
    ),
    "shape of the residual: (2, 4, 256)": lambda g: g.backend.product_added(
        g.codes, g.operand, g.residual[:, :4], g.gate
    ),
    "shape of the residual: (10, 256)": lambda g: g.backend.product_added(
        g.codes, g.operand, g.residual.reshape(10, 256), g.gate
    ),
    "gate: (2, 128) of mlx.core.float32; valid: (1, 256) or (2, 256)": lambda g: (
        g.backend.product_added(g.codes, g.operand, g.residual, g.gate[:, :128])
    ),
    "gate: (2, 256) of mlx.core.float16": lambda g: g.backend.product_added(
        g.codes, g.operand, g.residual, g.gate.astype(mx.float16)
    ),
    "input, scale and shift: (2, 5, 128) of mlx.core.float32, (3, 128)": lambda g: (
        g.backend.quantize_modulated(
            g.x, Modulation(mx.ones((3, 128)), mx.ones((1, 128)), NORM_EPS), g.grid
        )
    ),
    "numbers in table, scale and limit of the next grid: (1024, 1, 1); valid: (512, 1, 1)": (
        lambda g: g.backend.product_gelu(g.codes, g.operand, table_of(512))
    ),
    "numbers in table, scale and limit of the next grid: (512, 2, 1)": lambda g: (
        g.backend.product_gelu(
            g.codes,
            g.operand,
            g.backend.following(table_of(256).table, mx.ones((2,)), mx.ones((1,))),
        )
    ),
    "number of scales: 2; valid: a divisor of the number of rows, 1": lambda g: kernels.following(
        InputGrid(mx.ones((2,)), mx.ones((2,))), 256
    ),
}


@pytest.mark.parametrize("words", PRODUCTS)
def test_operands_that_a_product_would_read_beyond_their_end_are_refused(words, fitting, started):
    assert_refused(words, lambda: PRODUCTS[words](fitting))
    assert set(started) == {"unpack", "quantize"}


def test_operands_that_fit_are_taken(fitting, started):
    """Of one entry and of two; also what the layers of a whole model give, all of it joined."""
    backend, operand, codes = fitting.backend, fitting.operand, fitting.codes
    row = backend.bias_table(operand, mx.zeros((3, 256)))[1]
    grid = InputGrid(mx.ones((2,)), mx.ones((2,)), mx.ones((2, 1, 128)), mx.ones((128,)))
    modulation = Modulation(mx.ones((2, 128)), mx.ones((1, 128)), NORM_EPS)
    assert backend.linear(fitting.x, grid, operand, row).shape == (2, 5, 256)
    assert backend.product(backend.quantize(fitting.x[0, 1:], grid), operand, mx.float16).size
    assert backend.quantize_modulated(fitting.x, modulation, grid).rows == 10
    assert backend.product_added(codes, operand, fitting.residual, fitting.gate[:1]).shape == (
        2,
        5,
        256,
    )
    assert backend.product_gelu(codes, operand, table_of(256), row).columns == 256
    pipeline = quantized_pipeline("tiny", smoothing=True, modulation=False, kernel="cuda_int8")
    join(pipeline.transformer)
    found = pipeline.condition(["a large red star in the center on a night background"], 4.0)
    del started[:]
    latent = mx.random.normal((1, 8, 8, 16))
    for compiled in (False, True):
        pipeline.velocity(found, 4.0, compiled=compiled)(latent, mx.array(0.5))
    assert set(started) == {"quantize", "normalize", "multiply", "added", "gelu"}


@without_cuda
def test_low_memory_takes_integer_kernels_only_where_they_are_right(nvidia):
    nvidia("NVIDIA L40S", 8, 9)
    assert staying_packed() == "quantized_matmul"
    record(MMA).write("")
    nvidia("NVIDIA L40S", 8, 9)  # the next process
    assert staying_packed() == "cuda_int8_packed"


@without_cuda
def test_a_self_test_that_failed_is_told_with_its_reason_and_a_way_out(nvidia):
    """One that could not be run is no finding: the next process tries again."""
    nvidia()
    assert usable() is None
    failed, file = status(), record(WGMMA).file
    assert failed.startswith("not used: self-test of wgmma failed on sm_90: Case(rows=1")
    assert "CUDA" in failed and failed.endswith("; the next process tests again")
    assert "\n" not in failed
    record(WGMMA).write("another reason")
    nvidia()  # the next process
    assert usable() is None and "failed on sm_90: another reason;" in status()
    assert status().endswith(f"to test again delete {file}")
    file.unlink()
    nvidia()
    assert status() == failed


def test_a_narrow_kernel_that_failed_is_told_beside_the_one_that_is_used(nvidia):
    nvidia()
    for variant, wrong in ((WGMMA, ""), (NARROW, f"Case(rows=1): 12 {COUNTED}")):
        record(variant).write(wrong)
    passed = "wgmma on sm_90, self-test passed"
    assert usable() is WGMMA and status() == (
        f"{passed}; wgmma_192 not used: self-test of wgmma_192 failed on sm_90: Case(rows=1): "
        f"12 wrong numbers; to test again delete {record(NARROW).file}"
    )
    record(NARROW).write("")
    nvidia()  # the next process
    assert status() == passed


@without_cuda
@pytest.mark.parametrize(
    "change", ["", "name", "capability", "mlx", "driver", "compiler", "source", "variant"]
)
def test_a_self_test_that_passed_holds_for_this_gpu_software_and_source(
    nvidia, monkeypatch, tmp_path, change
):
    nvidia("NVIDIA L40S", 8, 9)
    record(WGMMA if change == "variant" else MMA).write("")
    if change == "name":
        nvidia("NVIDIA L4", 8, 9)
    elif change == "capability":
        nvidia("NVIDIA L40S", 12, 0)
    elif change == "mlx":
        monkeypatch.setattr(mx, "__version__", "0.99")
    elif change == "driver":
        (tmp_path / "version").write_text("NVRM version: 999.1\nGCC version: 1\n")
        monkeypatch.setattr(check, "DRIVER", tmp_path / "version")
    elif change == "compiler":
        monkeypatch.setattr(check, "COMPILERS", ("numpy",))
    elif change == "source":
        copies = shutil.copytree(sources.FOLDER, tmp_path / "cuda")
        (copies / "tiles.cu").write_text(text("tiles") + "\n")
        monkeypatch.setattr(sources, "FOLDER", copies)
    assert usable() is (None if change else MMA)
    assert change or status() == "mma on sm_89, self-test passed"


@pytest.mark.parametrize("variant", [WGMMA, NARROW, MMA], ids=name_of)
def test_every_file_that_decides_what_runs_decides_what_is_remembered(
    variant, monkeypatch, tmp_path
):
    files = shutil.copytree(Path(check.__file__).parent, tmp_path / "backends")
    monkeypatch.setattr(sources, "FOLDER", files / "cuda")
    monkeypatch.setattr(check, "__file__", str(files / "cuda_int8_check.py"))
    known = [record(variant).known]
    for name in ("cuda_int8_kernels.py", "cuda_int8_check.py", *os.listdir(files / "cuda")):
        file = next(path for path in (files / name, files / "cuda" / name) if path.exists())
        file.write_text(file.read_text() + "\n")
        known.append(record(variant).known)
    assert len(set(known)) == len(known) > 6


@pytest.mark.parametrize("name", ["cuda_int8", "cuda_int8_packed"])
@pytest.mark.parametrize("bits, groups", [(4, 1), (8, 1), (6, 1), (4, 2)])
@pytest.mark.parametrize("factor", [0.05, None])
def test_the_backend_gives_what_the_reference_gives(name, bits, groups, factor):
    """Anywhere: on a GPU by its kernels, elsewhere by others."""
    linear = nn.Linear(128, 72, bias=False)
    weight = QuantizedLinear.from_linear(linear, bits=bits, group_size=128 // groups * (groups > 1))
    weight = Weight(weight.weight, weight.scales, bits)
    x = mx.random.randint(-127, 128, (2, 5, 128), key=mx.random.key(1)).astype(mx.float32)
    x[1, 2, 3] = mx.nan
    given_factor = None if factor is None else mx.full((2, 1, 1), factor)
    largest = None if factor is None else 127
    backends = BACKENDS["reference"], BACKENDS[name]
    wanted, got = (
        np.array(b.multiply(x, given_factor, b.prepare(weight, mx.float32, largest)))
        for b in backends
    )
    assert np.isnan(got[1, 2]).all() and np.isnan(got).sum() == 72
    np.testing.assert_allclose(got, wanted, atol=2e-6 * np.nanmax(np.abs(wanted)))
    if factor is not None and groups == 1:
        np.testing.assert_array_equal(got, wanted)


@given(
    seed=st.integers(0, 2**16),
    per_token=st.booleans(),
    shifted=st.booleans(),
    smoothed=st.booleans(),
)
def test_numpys_codes_are_those_of_the_quantized_linear(seed, per_token, shifted, smoothed):
    """What the kernel is compared with is what the layers do."""
    rng = np.random.default_rng(seed)
    shift = rng.standard_normal(64).astype(np.float32) if shifted else None
    smoothing = rng.uniform(0.3, 3, 64).astype(np.float32) if smoothed else None
    grid = LayerConfig([6], [0.0431], shift, smoothing)
    runtime = Runtime(a_scale="token" if per_token else "static")
    layer = QuantizedLinear.from_linear(nn.Linear(64, 8), grid=grid, runtime=runtime)
    x = rng.standard_normal((9, 64)).astype(np.float32)
    codes, factor = layer.quantized(layer.centred(mx.array(x)))
    wanted, scales = codes_of(x, 0.0431, 31, shift, smoothing, per_token)
    np.testing.assert_array_equal(np.array(codes), wanted)
    np.testing.assert_array_equal(np.broadcast_to(np.array(factor).reshape(-1), (9,)), scales)


def test_numpys_endings_are_those_of_the_layers():
    """The float16 output with its bias, and the codes behind GELU, of what the kernel is told."""
    case = Case(9, 40, 64, 4)
    x, weight, bias, wanted, wanted_codes, *_ = random_ending(case)
    scale, following = ENDING_SCALES
    codes, _ = codes_of(np.array(x), scale, 127)
    reference = named("reference")
    operand = reference.prepare(weight, mx.float32, 127)
    y = reference.multiply(mx.array(codes.astype(np.float32)), mx.array(scale), operand) + bias
    np.testing.assert_allclose(wanted, np.array(y), rtol=2**-10, atol=1e-6)
    behind = mx.clip(mx.round(nn.gelu_approx(y) / following), -127, 127)
    assert np.abs(np.array(behind) - wanted_codes).max() <= 1
    assert len(np.unique(wanted_codes)) > 50 and np.abs(wanted_codes).max() < 128


@pytest.mark.parametrize("per_token", [False, True])
def test_numpys_modulated_codes_are_those_of_the_model(per_token):
    """Up to what lies as close to the next code as float32 errs."""
    how = {"shifted": True, "smoothed": True, "per_token": per_token}
    wanted = random_modulated(2, 33, 200, mx.float32, **how)
    assert wanted.modulation.eps == NORM_EPS == mmdit.NORM_EPS
    x = mmdit.modulate(wanted.x, wanted.modulation.shift, wanted.modulation.scale)
    codes, scales = codes_of(
        np.array(x).reshape(-1, 200),
        0.03,
        127,
        np.array(wanted.grid.shift),
        np.array(wanted.grid.smoothing),
        per_token,
    )
    assert np.abs(codes.astype(int) - wanted.codes).max() <= 1
    assert (codes != wanted.codes).mean() < 1e-3
    np.testing.assert_allclose(scales, wanted.scales, rtol=1e-5)
    assert len(np.unique(wanted.codes)) > 100


def test_numpys_gated_sum_is_that_of_the_model():
    ending = random_ending(Case(10, 40, 64, 4))
    assert len(ending.residual) == len(ending.gate) == 2
    y = mx.array(ending.wanted).reshape(ending.residual.shape)
    wanted = ending.residual + y * ending.gate[:, None]
    np.testing.assert_allclose(
        ending.added.reshape(wanted.shape), np.array(wanted), rtol=2**-9, atol=2**-9
    )


def test_vectors_fit_that_a_kernel_can_read():
    x, one, two, three = (mx.zeros(s) for s in ((2, 5, 8), (1, 8), (2, 8), (3, 8)))
    for scale, shift, fits in ((one, one, True), (two, one, True), (two, three, False)):
        assert Modulation(scale, shift, 1e-6).fits(x) is fits
    assert not Modulation(one, one[:, :4], 1e-6).fits(x)
    assert not Modulation(one, one.astype(mx.float16), 1e-6).fits(x)
    assert not Modulation(one, one, 1e-6).fits(x[0]) and not Modulation(one, one, 1e-6).fits(x[:0])


def test_programs_that_check_side_by_side_end_when_they_are_stopped():
    """They are in sessions of their own, so that Ctrl-C does not reach them."""
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt), running({"one": command, "other": command}) as found:
        raise KeyboardInterrupt
    assert all(process.returncode is not None for process in found.values())


# --- on a GPU


@needs_cuda
@on_all
def test_the_self_test_passes(variant, monkeypatch, tmp_path):
    assert try_out(variant) == ""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    self_test.cache_clear()
    assert self_test(variant) == "" == record(variant).read()
    assert usable() is VARIANT and "self-test passed" in status()


@needs_cuda
@pytest.mark.parametrize(
    "variant, model, outputs, columns",
    # The narrow tiles are the wide ones but for their width.
    [(v, *shape) for v in HERE for shape in SHAPES if v is not NARROW or shape[0] == "sd3"],
    ids=name_of,
)
def test_models_shapes_are_exact(variant, model, outputs, columns):
    for rows, bits in ((1, 4), (333, 8)):
        assert wrong_sums(variant, Case(rows, outputs, columns, bits)) == 0


@needs_cuda
@on_all
@pytest.mark.slow
def test_five_hundred_random_shapes_are_exact(variant):
    rng = np.random.default_rng(0)
    for seed in range(500):
        rows, outputs = rng.integers(1, 700, 2)
        case = Case(int(rows), int(outputs), 32 * int(rng.integers(1, 40)), int(rng.choice([4, 8])))
        assert wrong_sums(variant, case, seed) == 0, case


@needs_cuda
@pytest.mark.parametrize("dtype, how", QUANTIZERS)
def test_codes_are_exact(dtype, how):
    for seed, (rows, columns) in enumerate([(1, 32), (77, 1536), (130, 133), (300, 6144)]):
        assert wrong_codes(rows, columns, dtype, **how, seed=seed) == 0


@needs_cuda
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("columns", [160, 1536, 2064, 6144])
def test_codes_do_not_depend_on_where_rows_lie(columns, per_token):
    """Whole chunks, several at once, are read in words where all are aligned."""
    wanted = random_input(37, columns, mx.float16, per_token=per_token)
    inside = mx.pad(wanted.x.reshape(-1), (3, 5))[3:-5].reshape(37, columns)
    whole, moved = (kernels.quantize(x, wanted.grid) for x in (wanted.x, inside))
    np.testing.assert_array_equal(np.array(whole.tiles), tiled(wanted.codes))
    assert mx.array_equal(moved.tiles, whole.tiles) and mx.array_equal(moved.scales, whole.scales)


@needs_cuda
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("columns", [133, 160, 1536])
def test_a_split_along_the_tokens_has_the_codes_of_its_copy(columns, per_token):
    """So have turned tokens and vectors that lie apart; a grid an entry; NaN stays in its row."""
    how = {"shifted": True, "smoothed": True, "per_token": per_token}
    wanted = random_input(2 * 90, columns, mx.float16, **how)
    x = wanted.x.reshape(2, 90, columns)
    x[1, 5, 7] = mx.nan
    shift = mx.stack([wanted.grid.shift, 0.5 * wanted.grid.shift])
    spread = mx.repeat(wanted.grid.smoothing, 2)[::2]
    scales, limits = mx.array([0.03, 0.05]), mx.array([127.0, 31.0])
    grid, apart = (
        InputGrid(scales, limits, *vectors, per_token)
        for vectors in ((shift, wanted.grid.smoothing), (mx.contiguous(shift.T).T, spread))
    )
    parts = mx.split(x, [77], axis=1)
    turned = mx.contiguous(parts[0].transpose(2, 1, 0)).transpose(2, 1, 0)
    for part, read in ((parts[0], grid), (parts[1], grid), (turned, grid), (parts[0], apart)):
        whole, got = kernels.quantize(mx.contiguous(part), grid), kernels.quantize(part, read)
        assert mx.isnan(whole.scales).sum().item() == (part is not parts[1])
        assert mx.array_equal(got.tiles, whole.tiles)
        assert mx.array_equal(got.scales, whole.scales, equal_nan=True)


@needs_cuda
@on_all
@pytest.mark.parametrize("outputs", [256, 72, 384])
def test_random_endings_are_right(variant, outputs):
    assert wrong_endings(variant, Case(137, outputs, 256, 4), outputs) == 0


@needs_cuda
@pytest.mark.parametrize("dtype, how", QUANTIZERS)
def test_modulated_codes_are_right(dtype, how):
    for seed, shape in enumerate([(1, 3, 32), (2, 77, 192), (3, 50, 133), (2, 129, 512)]):
        assert wrong_modulated(*shape, dtype, **how, seed=seed) == 0, shape


@needs_cuda
@pytest.mark.parametrize("columns", [1536, 2432, 3072, 5000])
def test_wide_rows_are_modulated_right(columns):
    """As many numbers a thread as it takes."""
    for how in (ALL_WAYS[0], ALL_WAYS[-1]):
        assert wrong_modulated(2, 77, columns, mx.float16, **how) == 0


@needs_cuda
def test_modulated_codes_do_not_depend_on_where_things_lie():
    """Parts of larger arrays and turned ones; a grid an entry; NaN stays in its row."""
    wanted = random_modulated(4, 31, 272, mx.float16, shifted=True)
    scale, shift, x = wanted.modulation.scale, wanted.modulation.shift, wanted.x
    scales, limits = mx.array([0.03, 0.05]), mx.array([127.0, 31.0])
    grid = InputGrid(scales, limits, mx.stack([wanted.grid.shift, 0 * wanted.grid.shift])[:, None])
    x[1, 5, 7] = mx.nan
    whole = kernels.quantize_modulated(x, Modulation(scale, shift, NORM_EPS), grid)
    assert mx.isnan(whole.scales).sum().item() == 1 and mx.isnan(whole.scales[36]).item()
    turned = mx.contiguous(x.transpose(1, 2, 0)).transpose(2, 0, 1)
    vectors = (mx.contiguous(v.T).T for v in (scale, shift))
    for other, modulation in (
        (turned, Modulation(scale, shift, NORM_EPS)),
        (mx.pad(x, ((1, 0), (2, 1), (3, 5)))[1:, 2:-1, 3:-5], Modulation(*vectors, NORM_EPS)),
    ):
        got = kernels.quantize_modulated(other, modulation, grid)
        assert mx.array_equal(got.scales, whole.scales, equal_nan=True)
        apart = np.abs(np.array(got.tiles).astype(int) - np.array(whole.tiles).astype(int))
        assert apart.max() == 0
    for i in range(2):  # entries that share a grid, each pair as if it were alone
        rows, half = slice(2 * i, 2 * i + 2), slice(i, i + 1)
        one = InputGrid(scales[half], limits[half], grid.shift[i, 0])
        alone = kernels.quantize_modulated(x[rows], Modulation(scale[rows], shift[rows], 1e-6), one)
        got, single = (np.array(c.tiles) for c in (whole, alone))
        both = untiled(got, 124, 272)[62 * i : 62 * i + 62], untiled(single, 62, 272)
        np.testing.assert_array_equal(*both)


@needs_cuda
@on_all_with_outputs
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_gated_sums_are_rounded_once_wherever_things_lie(variant, outputs, dtype):
    rng = np.random.default_rng(0)
    _, weight = random_weight(rng, Case(1, outputs, 160, 4))
    scales, bias = weight.scales[:, 0], mx.array(rng.standard_normal(outputs).astype(np.float32))
    x = rng.standard_normal((2 * 69, 160)).astype(np.float32)
    x[100, 3] = np.nan
    codes = kernels.quantize(mx.array(x), InputGrid(mx.array([0.05]), mx.array([127.0])))
    product = codes, kernels.weight_tiles(weight), scales, kernels.column_table(scales, bias)[0]
    y = kernels.multiply(*product, mx.float32, variant).reshape(2, 69, outputs)
    residual = mx.array(rng.standard_normal((2, 69, outputs)).astype(np.float32)).astype(dtype)
    parts = mx.array(rng.standard_normal((2, 6 * outputs)).astype(np.float32)).astype(dtype)
    gate = mx.split(parts, 6, axis=1)[2]
    exact = residual.astype(mx.float32) + gate.astype(mx.float32)[:, None] * y
    turned = mx.contiguous(residual.transpose(1, 0, 2)).transpose(1, 0, 2)
    odd = mx.pad(residual, ((0, 0), (0, 0), (1, 2)))[:, :, 1:-2]
    column = mx.contiguous(residual.transpose(0, 2, 1)).transpose(0, 2, 1)
    first = kernels.multiply_added(*product, residual, gate, variant)
    assert first.dtype == dtype and first.shape == residual.shape
    assert mx.isnan(first).sum().item() == outputs and mx.isnan(first[1, 31]).all().item()
    digits = {mx.float16: 2**-10, mx.bfloat16: 2**-7, mx.float32: 2**-21}[dtype]
    assert mx.allclose(
        first.astype(mx.float32), exact, rtol=digits, atol=2**-20, equal_nan=True
    ).item()
    for lies in (turned, odd, column):
        for gates in (gate, mx.contiguous(gate.T).T):
            got = kernels.multiply_added(*product, lies, gates, variant)
            assert mx.array_equal(got, first, equal_nan=True)
    shared = kernels.multiply_added(*product, residual, gate[:1], variant)
    assert mx.array_equal(shared[0], first[0]) and not mx.array_equal(shared[1, 0], first[1, 0])


@needs_cuda
@on_all_with_outputs
def test_sixteen_bit_outputs_are_float32_ones_rounded(variant, outputs):
    rng = np.random.default_rng(0)
    _, weight = random_weight(rng, Case(1, outputs, 160, 4))
    scales, bias = weight.scales[:, 0], mx.array(rng.standard_normal(outputs).astype(np.float32))
    x = mx.array(rng.standard_normal((137, 160)).astype(np.float32))
    codes = kernels.quantize(x, InputGrid(mx.array([0.05]), mx.array([127.0])))
    tiles, table = kernels.weight_tiles(weight), kernels.column_table(scales, bias)[0]
    exact = kernels.multiply(codes, tiles, scales, table, mx.float32, variant)
    plain = kernels.multiply(
        codes, tiles, scales, kernels.column_table(scales)[0], mx.float32, variant
    )
    wanted = np.array(plain).astype(np.float64) + np.array(bias)
    np.testing.assert_allclose(np.array(exact), wanted, rtol=1e-6, atol=1e-6)
    for dtype in (mx.float16, mx.bfloat16):
        got = kernels.multiply(codes, tiles, scales, table, dtype, variant)
        assert mx.array_equal(got, exact.astype(dtype))


@needs_cuda
@on_all
def test_gelu_and_its_codes(variant):
    """Up to the approximation of tanh; NaN of a row goes through two products, and stays in it."""
    rng = np.random.default_rng(0)
    width, last_width = (6144, 384) if variant is NARROW else (6144 + 128, 72)
    _, first = random_weight(rng, Case(1, width, 256, 4))
    _, second = random_weight(rng, Case(1, last_width, width, 4))
    x = rng.standard_normal((137, 256)).astype(np.float32)
    x[5, 6] = np.nan
    codes = kernels.quantize(mx.array(x), InputGrid(mx.array([0.03]), mx.array([127.0])))
    scales = first.scales[:, 0]
    shift = mx.array(rng.standard_normal(width).astype(np.float32) * 0.1)
    smoothing = mx.array(rng.uniform(0.5, 2, width).astype(np.float32))
    grid = InputGrid(mx.array([0.02]), mx.array([127.0]), shift, smoothing)
    table, tiles = kernels.column_table(scales, shift)[0], kernels.weight_tiles(first)
    hidden = kernels.multiply(codes, tiles, scales, table, mx.float32, variant)
    wanted = kernels.quantize(nn.gelu_approx(hidden), grid)
    got = kernels.multiply_gelu(
        codes, tiles, scales, table, kernels.following(grid, width), variant
    )
    np.testing.assert_array_equal(np.array(got.scales), np.array(wanted.scales))
    assert np.isnan(got.scales[5].item()) and mx.isnan(got.scales).sum().item() == 1
    one, other = (untiled(np.array(c.tiles), 137, width).astype(int) for c in (got, wanted))
    apart = np.delete(np.abs(one - other), 5, axis=0)
    assert apart.max() <= 1 and apart.mean() < 0.02
    last = second.scales[:, 0]
    y = kernels.multiply(
        got, kernels.weight_tiles(second), last, kernels.column_table(last)[0], mx.float16, variant
    )
    assert mx.isnan(y).sum().item() == last_width and mx.isnan(y[5]).all().item()


@needs_cuda
@pytest.mark.parametrize("name", ["cuda_int8", "cuda_int8_packed"])
@pytest.mark.parametrize("per_token", [False, True])
def test_layers_are_the_references_to_a_rounding(name, per_token):
    linear = nn.Linear(192, 328)
    linear.set_dtype(mx.float16)
    grid = LayerConfig([8, 6], [0.05, 0.1], np.linspace(-1, 1, 192), np.linspace(0.5, 2, 192))
    outputs = []
    for backend in ("reference", name):
        step = Step(Schedule((1.0, 0.5)))
        runtime = Runtime(step, "token" if per_token else "static", named(backend))
        layer = QuantizedLinear.from_linear(linear, grid=grid, runtime=runtime)
        x = mx.random.normal((2, 77, 192), key=mx.random.key(3)).astype(mx.float16)
        compiled = mx.compile(layer, inputs=layer.state)
        moved = layer(x.transpose(1, 0, 2)).transpose(1, 0, 2)
        outputs.append((layer(x), moved, compiled(x)))
    others, (whole, moved, compiled) = outputs
    assert mx.array_equal(whole, moved) and mx.array_equal(whole, compiled)
    # The kernels add the bias and round once; the reference rounds before and after, unless it is
    # compiled, which makes one operation of two.
    for got, wanted in zip((whole, moved, compiled), others, strict=True):
        assert mx.allclose(got, wanted, rtol=2**-10, atol=2**-12)


@needs_cuda
def test_an_int8_layer_that_is_prepared_multiplies_as_one_that_is_not():
    linear = nn.Linear(192, 328)
    linear.set_dtype(mx.float16)
    x = mx.random.normal((2, 77, 192)).astype(mx.float16)
    alone = INT8Linear.from_linear(linear, "cuda_int8")
    ready = INT8Linear.from_linear(linear, "cuda_int8")
    ready.prepare_for(154, mx.float16)
    assert ready.fuses and not alone.fuses
    assert mx.array_equal(ready(x), alone(x))
    assert mx.array_equal(mx.compile(ready, inputs=ready.state)(x), alone(x))
    # Another weight is what is multiplied from then on.
    other = INT8Linear.from_linear(nn.Linear(192, 328))
    ready.weight = other.weight
    alone.weight = other.weight
    assert not ready.fuses and mx.array_equal(ready(x), alone(x))


@needs_cuda
def test_int8_layers_and_empty_inputs():
    linear = nn.Linear(192, 328)
    x = mx.random.normal((3, 192))
    wanted, got = (INT8Linear.from_linear(linear, name)(x) for name in ("reference", "cuda_int8"))
    assert mx.array_equal(wanted, got)
    backend = CudaInt8()
    _, weight = random_weight(np.random.default_rng(0), Case(1, 40, 64, 4))
    operand = backend.prepare(weight, mx.float16, 127)
    assert CudaInt8.fuses(operand)
    assert backend.multiply(mx.zeros((0, 64)), mx.array(1.0), operand).shape == (0, 40)
    assert backend.linear(mx.zeros((2, 0, 64)), InputGrid.of_codes(127), operand).shape == (
        2,
        0,
        40,
    )


@needs_cuda
def test_a_whole_linear_in_two_kernels_also_within_a_compiled_function():
    rng = np.random.default_rng(0)
    backend, (_, weight) = CudaInt8(), random_weight(rng, Case(1, 200, 96, 4))
    operand = backend.prepare(weight, mx.float16, 127)
    scales, limits = (
        mx.array([0.05, 0.2]),
        mx.array([127.0, 31.0]),
    )  # of a batch of two noise levels
    x = mx.array(rng.standard_normal((2, 33, 96)).astype(np.float32)).astype(mx.float16)
    got = backend.linear(x, InputGrid(scales, limits), operand)
    for i in range(2):
        alone = backend.linear(x[i], InputGrid(scales[i : i + 1], limits[i : i + 1]), operand)
        assert mx.array_equal(got[i], alone)
    compiled = mx.compile(lambda x, s, q: backend.linear(x, InputGrid(s, q), operand))
    assert mx.array_equal(compiled(x, scales, limits), got)


@needs_cuda
def test_several_products_at_once_are_what_each_is():
    """Also of biases, each weight's own part afterwards, and weights that cannot be merged."""
    rng, backend = np.random.default_rng(0), CudaInt8()
    weights = [random_weight(rng, Case(1, width, 200, 4))[1] for width in (256, 512, 256)]
    operands = [backend.prepare(weight, mx.float16, 127) for weight in weights]
    biases = [mx.random.normal((2, len(weight.scales))) for weight in weights]
    x = mx.random.normal((3, 77, 200)).astype(mx.float16)
    codes = backend.quantize(x, InputGrid(mx.array([0.02]), mx.array([127.0])))

    def each() -> mx.array:
        tables = (backend.bias_table(o, b) for o, b in zip(operands, biases, strict=True))
        parts = zip(operands, tables, strict=True)
        products = [backend.product(codes, o, mx.float16, table[1]) for o, table in parts]
        return mx.concatenate(products, axis=1)

    wanted, merged = each(), backend.merged(operands)
    table = backend.bias_table(merged, mx.concatenate(biases, axis=1))
    assert mx.array_equal(backend.product(codes, merged, mx.float16, table[1]), wanted)
    assert mx.array_equal(each(), wanted)
    assert all("tiles" not in operand for operand in operands)
    assert backend.merged(operands) is None
    narrow = backend.prepare(random_weight(rng, Case(1, 200, 200, 4))[1], mx.float16, 127)
    assert backend.merged([*operands, narrow]) is None


@needs_cuda
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_what_joins_layers_gives_what_the_layers_give(dtype):
    """An attention and an MLP of a model's block, begun with the norm and ended with the residual;
    codes are those of float32, where the plain way rounds to 16 bits four times before them."""
    pipeline = quantized_pipeline("tiny", smoothing=True, modulation=False, kernel="cuda_int8")
    pipeline.transformer.set_dtype(dtype)
    block = pipeline.transformer.multimodal_transformer_blocks[0].image_transformer_block
    attention, mlp = block.attn, block.mlp
    join(pipeline.transformer)
    hidden = pipeline.transformer.config.hidden
    x, attended = (mx.random.normal((2, 77, hidden), key=mx.random.key(i)) for i in range(2))
    parts = 0.5 * mx.random.normal((2, 6 * hidden), key=mx.random.key(3))
    x, attended, parts = (v.astype(dtype) for v in (x, attended, parts))
    shift, scale, gate = mx.split(parts, 6, axis=1)[1:4]

    def outputs(attention: nn.Module, mlp: nn.Module) -> list[mx.array]:
        return [
            *attention.project_modulated(x, shift, scale),
            attention.add_output(x, attended, gate),
            mlp.add_modulated(x, shift, scale, gate),
        ]

    joined = outputs(block.attn, block.mlp)
    # The first makes three layers' codes, each within half a scale; so are their products.
    for got, wanted in zip(joined, outputs(attention, mlp), strict=True):
        assert got.dtype == dtype
        got, wanted = (v.astype(mx.float32) for v in (got, wanted))
        assert relative_error(got, wanted) < (0.02 if dtype == mx.float16 else 0.08)
    compiled = mx.compile(lambda: outputs(block.attn, block.mlp))()
    for got, wanted in zip(compiled, joined, strict=True):
        got, wanted = (v.astype(mx.float32) for v in (got, wanted))
        assert relative_error(got, wanted) < 1e-3


@needs_cuda
@pytest.mark.parametrize("name", ["cuda_int8", "cuda_int8_packed"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", ["tiny", "tiny-3.5-medium"])
def test_a_joined_model_draws_what_the_reference_draws(name, compiled, model):
    """Everything that is joined, with dual attention too, in a whole guided velocity: no further
    from the reference in float32 than 16 bits are, which guidance makes 0.1 of a random model."""

    def velocity(kernel: str, dtype: mx.Dtype) -> mx.array:
        pipeline = quantized_pipeline(model, smoothing=True, modulation=False, kernel=kernel)
        pipeline.transformer.set_dtype(dtype)
        joined, config = join(pipeline.transformer), pipeline.transformer.config
        parts = 4 * config.depth + config.dual_attention_blocks - 1  # the last text has no MLP
        assert len(joined) == parts - (kernel == "reference") * (2 * config.depth - 1)
        found = pipeline.condition(["a large red star in the center on a night background"], 4.0)
        conditioning = Conditioning(found.text.astype(dtype), found.pooled.astype(dtype))
        latent = mx.random.normal((1, 8, 8, 16), key=mx.random.key(0))
        velocity = pipeline.velocity(conditioning, 4.0, compiled=compiled)
        return velocity(latent, mx.array(0.5)).astype(mx.float32)

    exact, dtype = velocity("reference", mx.float32), default_dtype(model)
    rounded = relative_error(velocity("reference", dtype), exact)
    assert relative_error(velocity(name, dtype), exact) < 2 * rounded
