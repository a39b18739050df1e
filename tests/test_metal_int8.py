"""Integer kernels for Apple GPUs: what surrounds them, their text on a stand-in, and the real ones.

On Linux the kernels' own text is compiled for the CPU (metal_stand_in.py): that shows indexing,
padding, endings and fallbacks, not what a GPU does with it.
"""

from __future__ import annotations

import itertools
import json
import platform
import shutil
import sys
from pathlib import Path

from src.backends import BACKENDS, Device, Weight, named, select
from src.backends import metal_int8_check as check
from src.backends import metal_int8_kernels as kernels
from src.backends.cuda_int8_check import Case, codes_of, random_weight
from src.backends.fusing import Fusing, InputGrid
from src.backends.metal_int8 import MetalInt8, fallback, fits, refusal, status, takes, usable
from src.backends.metal_int8_check import Machine, macos_version, record, self_test, unsuited
from src.backends.remembering import GIVEN_UP
from src.errors import UserError
from src.quant.artifacts import LayerConfig
from src.quant.int8 import INT8Linear
from src.quant.linear import QuantizedLinear, Runtime

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .helpers import ROOT
from .metal_stand_in import COMPILER, StandIn

M5 = Device("metal", 17)
BACKEND = MetalInt8()
SUITED = unsuited(Machine.here()) == ""
needs_m5 = pytest.mark.skipif(not SUITED, reason="no Apple GPU from M5 on with macOS 26.2 here")
on_stand_in = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="no g++, or no Linux"
)
MODELS = [(1536, 1536), (6144, 1536), (1536, 6144), (4608, 1536), (2432, 2432), (9728, 2432)]
HOW = ("shifted", "smoothed", "per_token")
ALL_WAYS = [dict(zip(HOW, on, strict=True)) for on in itertools.product([False, True], repeat=3)]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("metal")


def pretend(monkeypatch, home, *, architecture="applegpu_g17s", macos="26.2"):
    """This machine looks like a Mac to Python and to MLX; nothing of it can run a kernel."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "caches"))
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    forget()


def record_file():
    return record(Machine.here()).file


def forget():
    """As if the process had just begun."""
    for made in (kernels.quantize_kernel, kernels.multiply_kernel, self_test):
        made.cache_clear()


@pytest.fixture
def mac(monkeypatch, tmp_path):
    yield lambda **facts: pretend(monkeypatch, tmp_path, **facts)
    forget()


@pytest.fixture
def stand_in(monkeypatch, mac, libraries):
    """A Mac with an M5, its GPU played by the CPU."""
    mac()
    stand_in = StandIn(libraries)
    monkeypatch.setattr(mx.fast, "metal_kernel", stand_in)
    return stand_in


@pytest.fixture
def tested(stand_in):
    """The same, its self-test passed before."""
    record(Machine.here()).write("")
    return stand_in


# --- gates


def test_versions_of_macos():
    wanted = {"26.2": (26, 2), "26.2.1": (26, 2), "27": (27, 0), "15.6.1": (15, 6), "": (0, 0)}
    wanted["16.3"] = (26, 3)
    assert {text: macos_version(text) for text in wanted} == wanted


@pytest.mark.parametrize(
    "architecture, macos, why",
    [
        ("applegpu_g17s", "26.2", ""),
        ("applegpu_g17g", "16.2", ""),
        ("applegpu_g18p", "27.0", ""),
        ("applegpu_g16s", "26.2", "applegpu_g16s is older than M5"),
        ("applegpu_g17p", "26.2", "applegpu_g17p is older than M5"),
        ("applegpu_g13g", "26.2", "applegpu_g13g is older than M5"),
        ("", "26.2", " is older than M5"),
        ("applegpu_g17s", "26.1", "macOS 26.1 is older than 26.2"),
        ("applegpu_g17s", "15.7", "macOS 15.7 is older than 26.2"),
    ],
)
def test_machines_that_are_tried(mac, architecture, macos, why):
    mac(architecture=architecture, macos=macos)
    assert unsuited(Machine.here()) == why
    if why:
        assert not usable() and status() == f"not used: {why}"


@pytest.mark.skipif(SUITED, reason="here they may be used")
def test_elsewhere_it_says_so_and_is_never_chosen():
    assert not usable() and not takes(1536, 1536)
    assert status().startswith("not used: ")
    if Device.here().kind != "metal":
        _, weight = random_weight(np.random.default_rng(0), Case(1, 128, 32, 4))
        assert fallback(weight) == "dense"
    for device in (Device("cpu"), Device("cuda", 90), Device("metal", 16), M5):
        assert select(device, 4096, 1536, 1536).name != "metal_int8"


def test_shapes_that_are_taken():
    assert all(fits(*shape) for shape in MODELS)
    assert not fits(64, 1536) and not fits(1536, 48) and not fits(192, 192)
    weight = Weight(mx.zeros((128, 8), dtype=mx.uint32), mx.ones((128, 1)), 4)
    assert refusal(weight, 127) == ""
    assert refusal(weight, None) == "inputs are floats"
    narrow = Weight(weight.packed[:72], weight.scales[:72], 4)
    assert refusal(narrow, 127) == "72 outputs of 64 columns are no whole tiles"


@pytest.mark.parametrize("name", ["dense", "unpack"])
def test_before_m5_products_are_float16s_also_in_a_bfloat16_model(name):
    """Rounded once, to 11 bits: bfloat16 would keep 8."""
    rng = np.random.default_rng(0)
    codes, weight = random_weight(rng, Case(1, 48, 1536, 4))
    x = rng.integers(-127, 128, (5, 1536)).astype(np.float32)
    operand = named(name).prepare(weight, mx.bfloat16, 127)
    got = np.array(named(name).multiply(mx.array(x), mx.array(1.0), operand))
    wanted = (x.astype(np.int64) @ codes.T.astype(np.int64)) * np.array(weight.scales)[:, 0]
    np.testing.assert_allclose(got, wanted, rtol=2**-10, atol=2**-13 * np.abs(wanted).max())


@pytest.mark.parametrize("architecture, other", [("g17s", "quantized_matmul"), ("g16s", "dense")])
def test_what_multiplies_instead(mac, architecture, other):
    mac(architecture=f"applegpu_{architecture}")
    _, weight = random_weight(np.random.default_rng(0), Case(1, 128, 32, 4))
    assert fallback(weight) == other


# --- the kernels' text


def test_sources_are_installed_and_whole():
    assert '"metal/*.metal"' in (ROOT / "pyproject.toml").read_text()
    files = {path.stem for path in (ROOT / "src" / "backends" / "metal").iterdir()}
    assert files == {"quantize", "quantize_header", "multiply"}
    for text in map(kernels.text, files):
        assert all(text.count(a) == text.count(b) for a, b in ("{}", "()", "[]"))


def test_the_product_asks_for_places_and_for_nothing_that_a_chip_decides():
    text = kernels.text("multiply")
    assert text.count("is_valid_element") == 2 and "get_multidimensional_index" in text
    for fixed in ("get_mask", "thread_index", "simdgroup_index", "thread_position"):
        assert fixed not in text


@given(rows=st.integers(1, 20000), outputs=st.sampled_from(MODELS))
def test_whole_tiles_hold_every_row(rows, outputs):
    assert 0 <= kernels.whole_tiles(rows) - rows < kernels.TILE
    assert kernels.whole_tiles(rows) % (kernels.TILE) == 0 == kernels.TILE % kernels.ROWS_PER_GROUP


@pytest.mark.slow
@on_stand_in
def test_constants_threads_and_types_of_what_mlx_compiles(stand_in):
    """128 × 128 sums by 8 simdgroups, of int8 on device pointers; whole grids of threads."""
    written, starts = [], []
    keep = stand_in.written

    def kept(made, inputs, start):
        written.append(keep(made, inputs, start))
        starts.append(start)
        return written[-1]

    stand_in.written = kept
    assert check.wrong_sums(Case(300, 256, 64, 4)) == 0
    quantizer, product = written
    assert "MetalPerformancePrimitives.h" in product and "Performance" not in quantizer
    assert "TILE = 128, SIMDGROUPS = 8;" in product
    assert "const device int8_t* codes" in product and "const device int8_t* weight" in product
    assert starts[0]["output_shapes"] == [(384, 64), (300,)]
    assert starts[0]["grid"] == (32 * 384, 1, 1) and starts[0]["threadgroup"] == (256, 1, 1)
    assert starts[1]["output_shapes"] == [(300, 256)]
    assert starts[1]["grid"] == (2 * 256, 3, 1) and starts[1]["threadgroup"] == (256, 1, 1)


@on_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_random_shapes_are_exact_wherever_a_thread_holds_its_sums(stand_in, seed):
    rng = np.random.default_rng(seed)
    stand_in.seed = seed
    for seed in range(10):
        rows, outputs, columns = rng.integers(1, 400), rng.integers(1, 4), rng.integers(1, 20)
        bits = int(rng.choice([4, 8]))
        case = Case(int(rows), 128 * int(outputs), 32 * int(columns), bits)
        assert check.wrong_sums(case, seed) == 0, case


@on_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("how", ALL_WAYS, ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_codes_are_exact(stand_in, dtype, how):
    for rows, columns in ((1, 32), (77, 96), (130, 1536)):
        assert check.wrong_codes((rows, columns, dtype, how)) == 0


@pytest.mark.slow
@on_stand_in
def test_each_rows_own_grid_and_what_is_no_number(stand_in):
    """A batch of two noise levels, with a shift each; NaN and infinity stay in their rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 64)).astype(np.float32)
    shift = rng.standard_normal((2, 64)).astype(np.float32)
    grid = InputGrid(mx.array([0.05, 0.2]), mx.array([127.0, 7.0]), mx.array(shift))
    values, scales = map(np.array, kernels.quantize(mx.array(x), grid))
    for i, (scale, limit) in enumerate([(0.05, 127), (0.2, 7)]):
        wanted, _ = codes_of(x[i], np.float32(scale), limit, shift[i])
        np.testing.assert_array_equal(values[5 * i : 5 * i + 5], wanted)
        np.testing.assert_array_equal(scales[5 * i : 5 * i + 5], np.float32(scale))
    x[0, 1, 3], x[1, 2, 4] = np.nan, np.inf
    for per_token, spoilt in ((False, [1]), (True, [1, 7])):
        grid = InputGrid(mx.array([0.05]), mx.array([127.0]), per_token=per_token)
        values, scales = map(np.array, kernels.quantize(mx.array(x), grid))
        assert np.flatnonzero(np.isnan(scales)).tolist() == spoilt
        assert values[1, 3] == 0 and not values[10:].any()
        assert values[7, 4] == (0 if per_token else 127)


REFUSED = {
    "columns of the codes: 128; valid: 6144": ((128, 128), (256, 6144), 256, None),
    "number of the weight's scales: 128; valid: 256": ((128, 64), (256, 64), 128, None),
    "numbers in the row of biases: 512; valid: 256": ((128, 64), (256, 64), 256, 512),
}


@pytest.mark.parametrize("words", REFUSED)
def test_operands_that_a_product_would_read_beyond_their_end_are_refused(words):
    values, weight, scales, bias = REFUSED[words]
    codes = kernels.Codes(mx.zeros(values, dtype=mx.int8), mx.ones((5,)))
    weight, bias = mx.zeros(weight, dtype=mx.int8), None if bias is None else mx.ones((bias,))
    with pytest.raises(UserError, match=f"^{words}; give [^\n]*$"):
        kernels.multiply(codes, weight, mx.ones((scales,)), bias, mx.float32)
    with pytest.raises(UserError, match="^number of factors: 3; valid: 1 or 5; "):
        codes.times(mx.ones((3,)))


# --- the self-test


@on_stand_in
@pytest.mark.slow
def test_the_self_test_passes_once_a_machine(stand_in):
    assert usable() and status() == "matmul2d on applegpu_g17s, self-test passed"
    assert json.loads(record_file().read_text())["wrong"] == ""
    launched = len(stand_in.launched)
    forget()
    assert usable() and len(stand_in.launched) == launched > 10


@on_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("change", ["mlx", "macos", "architecture", "source", "version", "damage"])
def test_what_is_remembered_holds_for_nothing_else(stand_in, mac, monkeypatch, tmp_path, change):
    assert usable()
    launched = len(stand_in.launched)
    if change == "mlx":
        monkeypatch.setattr(mx, "__version__", "0.99")
    elif change == "macos":
        mac(macos="26.3")
    elif change == "architecture":
        mac(architecture="applegpu_g18d")
    elif change == "source":
        changed(copied(monkeypatch, tmp_path) / "metal" / "multiply.metal")
    elif change == "version":
        data = json.loads(record_file().read_text())
        record_file().write_text(json.dumps({**data, "version": 99}))
    else:
        record_file().write_bytes(b'{"format": ')
    forget()
    assert usable() and len(stand_in.launched) > launched
    assert json.loads(record_file().read_text())["wrong"] == ""


def copied(monkeypatch, folder: Path) -> Path:
    """The files that a result is about, in a place where they can be changed."""
    files = Path(shutil.copytree(Path(check.__file__).parent, folder / "backends"))
    monkeypatch.setattr(check, "__file__", str(files / "metal_int8_check.py"))
    return files


def changed(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


def test_every_file_that_decides_what_runs_decides_what_is_remembered(monkeypatch, tmp_path):
    """Python's too: it puts the kernels together, starts them, and says what is right."""
    machine = Machine(M5, "applegpu_g17s", "26.2", "0.32.4")
    files = copied(monkeypatch, tmp_path)
    known = [record(machine).known]
    modules = "metal_int8_kernels", "metal_int8_check", "cuda_int8_check", "fusing", "weight"
    python = [files / f"{name}.py" for name in modules]
    for file in (*python, *(files / "metal").iterdir()):
        changed(file)
        known.append(record(machine).known)
    assert len(set(known)) == len(known) == 9


WRONG = {
    "one chip's places": (
        "const auto place = sums.get_multidimensional_index(i);",
        "const int place[2] = {i % TILE, int(thread_index_in_simdgroup)};",
    ),
    "the last rows left out": ("row < rows", "row < rows / 128 * 128"),
    "sums in 16 bits": ("float(sums[i])", "float(int16_t(sums[i]))"),
    "no such function": ("product.run", "product.walk"),
}


@pytest.mark.slow
@on_stand_in
@pytest.mark.parametrize("fault", WRONG)
def test_a_kernel_that_is_wrong_or_does_not_compile_is_not_used(stand_in, monkeypatch, fault):
    text = kernels.text
    monkeypatch.setattr(kernels, "text", lambda name: text(name).replace(*WRONG[fault]))
    assert not usable()
    assert status().startswith("not used: self-test failed on applegpu_g17s: Case(rows=")
    remembered = fault != "no such function"
    way_out = f"delete {record_file()}" if remembered else "the next process tests again"
    assert status().endswith(way_out)
    launched = len(stand_in.launched)
    forget()
    assert not usable() and (len(stand_in.launched) == launched or not remembered)
    assert select(M5, 4096, 1536, 1536).name == "quantized_matmul"
    _, weight = random_weight(np.random.default_rng(0), Case(1, 128, 64, 4))
    assert not BACKEND.fuses(BACKEND.prepare(weight, mx.float16, 127))


@on_stand_in
@pytest.mark.slow
def test_a_wrong_quantizer_is_not_used(stand_in, monkeypatch):
    text = kernels.text
    monkeypatch.setattr(kernels, "text", lambda name: text(name).replace("rint(", "floor("))
    assert not usable()


@pytest.mark.skipif(mx.metal.is_available(), reason="here they can be built")
def test_where_mlx_has_no_metal_the_test_fails_and_says_why(mac):
    """As on a Mac whose kernels cannot be built: a reason in one line, and others multiply."""
    mac()
    assert not usable()
    assert "[metal_kernel] No Metal back-end." in status() and "\n" not in status()


@on_stand_in
def test_tests_that_ended_their_process_are_not_begun_again(stand_in):
    record(Machine.here()).write(GIVEN_UP)
    assert not usable() and not stand_in.launched
    assert GIVEN_UP in status()


@on_stand_in
def test_a_test_that_was_interrupted_is_begun_again(stand_in, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "multiply_kernel", interrupt)
    with pytest.raises(KeyboardInterrupt):
        usable()
    monkeypatch.undo()
    assert not record_file().exists()


@pytest.mark.slow
@on_stand_in
def test_without_a_place_to_remember_it_is_used_all_the_same(stand_in):
    record_file().parent.parent.mkdir(parents=True, exist_ok=True)
    record_file().parent.write_text("a file, no folder")
    assert usable()


# --- the backend


@on_stand_in
@pytest.mark.parametrize("rows", [(2, 5), (128,), (3, 1, 67)])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_backend_gives_what_the_reference_gives(tested, rows, bits):
    rng = np.random.default_rng(0)
    weight = QuantizedLinear.from_linear(nn.Linear(96, 256, bias=False), bits=bits)
    weight = Weight(weight.weight, weight.scales, bits)
    x = rng.integers(-127, 128, (*rows, 96)).astype(np.float32)
    x[(0,) * len(rows) + (3,)] = np.nan
    factor = mx.array(rng.uniform(0.01, 0.1, (*rows[:-1], 1, 1)).astype(np.float32))
    operand = BACKEND.prepare(weight, mx.float16, 127)
    assert BACKEND.fuses(operand)
    got = BACKEND.multiply(mx.array(x), factor, operand)
    reference = BACKENDS["reference"]
    wanted = reference.multiply(mx.array(x), factor, reference.prepare(weight, mx.float32, 127))
    assert got.dtype == mx.float32
    np.testing.assert_array_equal(np.array(got), np.array(wanted))
    assert np.isnan(np.array(got)).sum() == 256


@pytest.mark.slow
@on_stand_in
@pytest.mark.parametrize("bias", [False, True])
def test_layers_are_the_references_bit_for_bit_but_for_the_biass_rounding(tested, bias):
    """The kernel rounds product and bias once, the reference twice."""
    linear = nn.Linear(96, 128, bias=bias)
    shift = np.linspace(-1, 1, 96) if bias else None  # it makes a bias too
    grid = LayerConfig([8], [0.05], shift, np.linspace(0.5, 2, 96))
    x = mx.random.normal((2, 7, 96), key=mx.random.key(3))
    for a_scale in ("static", "token"):
        runtimes = (Runtime(a_scale=a_scale, backend=named(n)) for n in ("reference", "metal_int8"))
        layers = [QuantizedLinear.from_linear(linear, grid=grid, runtime=r) for r in runtimes]
        assert layers[1].fuses
        wanted, got = (np.array(layer(x)) for layer in layers)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=bias * 2e-7 * np.abs(wanted).max())
    assert tested.launched[-2:] == ["ditq_quantize", "ditq_multiply"]


@on_stand_in
def test_int8_layers_are_the_references_bit_for_bit(tested):
    linear, x = nn.Linear(96, 128), mx.random.normal((2, 7, 96), key=mx.random.key(3))
    wanted, got = (INT8Linear.from_linear(linear, name)(x) for name in ("reference", "metal_int8"))
    assert tested.launched[-1] == "ditq_multiply" and mx.array_equal(wanted, got)


@on_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_a_whole_linear_in_two_kernels(tested, dtype):
    rng = np.random.default_rng(0)
    _, weight = random_weight(rng, Case(1, 128, 96, 4))
    operand = BACKEND.prepare(weight, mx.float16, 127)
    x = mx.array(rng.standard_normal((2, 33, 96)).astype(np.float32)).astype(dtype)
    bias = mx.array(rng.standard_normal(128).astype(np.float32))
    assert isinstance(BACKEND, Fusing)
    grid = InputGrid(mx.array([0.05]), mx.array([127.0]))
    table = BACKEND.bias_table(operand, bias[None])[0]
    got = BACKEND.product(BACKEND.quantize(x, grid), operand, dtype, table)
    codes, _ = codes_of(np.array(x.astype(mx.float32)).reshape(66, 96), 0.05, 127)
    factor = mx.array(np.float32(0.05))
    plain = BACKEND.multiply(mx.array(codes.astype(np.float32)), factor, operand)
    wanted = np.array(plain).astype(np.float64) + np.array(bias)
    assert got.dtype == dtype and got.shape == (66, 128)
    digits = {mx.float16: 11, mx.bfloat16: 8, mx.float32: 22}[dtype]
    np.testing.assert_allclose(
        np.array(got.astype(mx.float32)), wanted, rtol=2.0**-digits, atol=1e-6
    )
    alone = BACKEND.product(BACKEND.quantize(x, grid), operand, dtype)
    assert mx.array_equal(alone, plain.astype(dtype))


@on_stand_in
def test_more_rows_than_can_be_counted_are_taken_in_parts(tested, monkeypatch):
    monkeypatch.setattr(kernels, "INDEX_BELOW", 32 * 200)
    assert check.wrong_sums(Case(300, 128, 32, 4)) == 0
    assert tested.launched.count("ditq_multiply") == 3


@on_stand_in
def test_bytes_are_multiplied_as_they_lie(tested):
    linear, x = nn.Linear(64, 128), mx.random.normal((640, 64), key=mx.random.key(1))
    wanted, got = (INT8Linear.from_linear(linear, name)(x) for name in ("reference", "auto"))
    assert mx.array_equal(wanted, got)
    assert tested.launched[-1] == "ditq_multiply"


@on_stand_in
def test_it_is_chosen_where_it_pays(tested):
    for N, K in MODELS:
        assert select(M5, 512, N, K).name == "metal_int8"
        assert select(M5, 511, N, K).name == "quantized_matmul"
    assert select(M5, 4096, 192, 192).name == "quantized_matmul"
    assert select(M5, 4096, 1536, 1536, integers=False).name == "quantized_matmul"


@on_stand_in
@pytest.mark.parametrize("bits, groups, largest", [(4, 2, 127), (4, 1, None), (4, 1, 240)])
def test_what_is_no_product_of_whole_bytes_goes_elsewhere(tested, bits, groups, largest):
    rng = np.random.default_rng(0)
    _, weight = random_weight(rng, Case(1, 128, 64, bits))
    weight = Weight(weight.packed, mx.repeat(weight.scales, groups, axis=1), bits)
    operand = BACKEND.prepare(weight, mx.float32, largest)
    x, factor = mx.ones((3, 64)), None if largest is None else mx.array(0.5)
    wanted = named("reference").multiply(
        x, factor, named("reference").prepare(weight, mx.float32, largest)
    )
    assert not BACKEND.fuses(operand)
    assert mx.allclose(BACKEND.multiply(x, factor, operand), wanted, rtol=1e-5)


# --- on an Apple GPU from M5 on


@needs_m5
def test_the_self_test_passes_here(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    forget()
    assert status().endswith("self-test passed"), status()


@needs_m5
@pytest.mark.parametrize("outputs, columns", MODELS)
def test_models_shapes_are_exact(outputs, columns):
    for rows, bits in ((1, 4), (333, 8), (1024, 4)):
        assert check.wrong_sums(Case(rows, outputs, columns, bits)) == 0


@needs_m5
@pytest.mark.slow
def test_two_hundred_random_shapes_are_exact_here():
    rng = np.random.default_rng(0)
    for seed in range(200):
        rows, outputs, columns = (int(n) for n in rng.integers(1, (1500, 20, 60)))
        case = Case(rows, 128 * outputs, 32 * columns, int(rng.choice([4, 8])))
        assert check.wrong_sums(case, seed) == 0, case


@needs_m5
@pytest.mark.parametrize("how", ALL_WAYS, ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_codes_are_exact_here(dtype, how):
    for rows, columns in ((1, 32), (77, 1536), (300, 6144)):
        assert check.wrong_codes((rows, columns, dtype, how)) == 0
