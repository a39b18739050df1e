"""How kernels are chosen: crossovers of measured times, the file they are kept in, `ditq tune`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from src.backends import BACKENDS, Device, Weight, choose, metal_int8, select, tuning
from src.backends.tuning import (
    CHOICES,
    FLOATS,
    MARGIN,
    Point,
    chosen,
    crossovers,
    described,
    nearest,
    read_tuned,
    shipped,
    table_of,
)
from src.benchmarking.tuning import measured, next_rows
from src.errors import UserError
from src.store import write_json
from src.tune import SHAPES

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from .fusing_backend import FusingBackend
from .helpers import ROOT, assert_one_error_line, run, run_here

HOPPER, AMPERE = Device("cuda", 90), Device("cuda", 80)
TIMES = st.floats(1e-6, 1.0)
MEASURED = st.dictionaries(
    st.integers(1, 9000),
    st.dictionaries(st.sampled_from([*CHOICES, "unpack"]), TIMES, min_size=1),
    min_size=1,
    max_size=8,
)


def points_of(measured, N: int = 64, K: int = 64) -> list[Point]:
    return [Point(rows, N, K, seconds) for rows, seconds in measured.items()]


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """Lets a test say what was measured on this machine: the file's path."""
    path = tmp_path / "tuning.json"
    monkeypatch.setenv(tuning.SWITCH, str(path))
    for function in (tuning.tuned_here, tuning.table_for):
        function.cache_clear()
    yield path
    monkeypatch.undo()
    for function in (tuning.tuned_here, tuning.table_for):
        function.cache_clear()


def test_each_backend_holds_where_it_was_the_fastest():
    points = points_of(
        {
            1: {"dense": 2e-3, "quantized_matmul": 1e-3, "cuda_int8": 4e-3},
            64: {"dense": 2e-3, "quantized_matmul": 3e-3, "cuda_int8": 4e-3},
            512: {"dense": 5e-3, "cuda_int8": 4.9e-3},
            2048: {"dense": 9e-3, "cuda_int8": 5e-3},
            8192: {"dense": 30e-3, "cuda_int8": 15e-3},
        }
    )
    # From 512 rows on it is ahead by less than the margin there, and by far at the next.
    wanted = ((1, "quantized_matmul"), (64, "dense"), (512, "cuda_int8"))
    assert crossovers(points) == wanted
    assert crossovers(points, FLOATS) == wanted[:2]
    table = table_of(points)
    assert [chosen(table, rows, 64, 64) for rows in (0, 1, 63, 64, 511, 512, 10**6)] == [
        *("quantized_matmul",) * 3, "dense", "dense", "cuda_int8", "cuda_int8"
    ]  # fmt: skip


def test_one_slow_measurement_does_not_let_a_kernel_in_where_it_loses_at_the_next():
    points = points_of(
        {256: {"dense": 9.0, "cuda_int8": 8.0}, 512: {"dense": 1.0, "cuda_int8": 3.0}}
    )
    assert crossovers(points)[-1] == (256, "dense")


@given(MEASURED)
def test_nothing_is_chosen_that_loses_at_a_measured_number_of_rows(measured):
    """By more than what the others lose at the other end of the span that is chosen for."""
    points = points_of(measured)
    for start, name in crossovers(points):
        ends = [measured[rows] for rows in sorted(measured) if rows >= start][:2]
        ends = ends[:1] if start < min(measured) else ends
        usable = [n for n in CHOICES if all(n in seconds for seconds in ends)]
        if not usable:
            assert name == "dense"
            continue
        losses = {n: max(s[n] / min(s[m] for m in usable) for s in ends) for n in usable}
        assert losses[name] <= MARGIN * min(losses.values())


@given(MEASURED)
def test_crossovers_do_not_depend_on_the_order_of_measuring(measured):
    points = points_of(measured)
    found = crossovers(points)
    assert found == crossovers(points[::-1])
    assert found[0][0] == 1 and [s for s, _ in found] == sorted({s for s, _ in found})
    assert all(one != other for (_, one), (_, other) in zip(found, found[1:], strict=False))


def test_a_shape_that_was_not_measured_goes_by_the_largest_within_it():
    table = dict.fromkeys([(192, 192), (1536, 1536), (6144, 1536), (1536, 6144)], ((1, "dense"),))
    assert nearest(table, 4608, 1536) == (1536, 1536)
    assert nearest(table, 9728, 2432) == (6144, 1536)
    assert nearest(table, 1024, 8192) == (192, 192)
    assert nearest(table, 64, 64) == (192, 192)


def test_as_shipped():
    """What the design promises without a measurement."""
    cpu, m4, m5 = Device("cpu"), Device("metal", 16), Device("metal", 17)
    apples = "metal_int8" if metal_int8.usable() else "quantized_matmul"
    for rows, device, name in (
        (4096, cpu, "dense"),
        (1, cpu, "dense"),
        (4096, m4, "dense"),
        (1, m4, "quantized_matmul"),
        (4096, m5, apples),
        (256, m5, "quantized_matmul"),
        (8192, HOPPER, "cuda_int8"),
        (308, HOPPER, "cuda_int8"),  # SD3's text
        (255, HOPPER, "dense"),
        (8, HOPPER, "quantized_matmul"),
        (8192, AMPERE, "dense"),  # not measured
    ):
        for shape in ((1536, 1536), (6144, 1536), (1536, 6144), (2432, 9728)):
            assert select(device, rows, *shape).name == name
    assert select(HOPPER, 8192, 192, 768).name == "dense"
    assert select(HOPPER, 8192, 1536, 1536, integers=False).name == "dense"
    for device in (cpu, m4, m5, HOPPER, AMPERE):
        names = {name for found in shipped(device).values() for _, name in found}
        assert names <= set(BACKENDS) & set(CHOICES)


def test_what_is_no_product_of_whole_numbers_gets_no_integer_kernel():
    one, groups = (
        Weight(mx.zeros((1536, 192), dtype=mx.uint32), mx.ones((1536, count)), 4)
        for count in (1, 12)
    )
    for weight, largest in ((one, 127), (one, None), (one, 240), (groups, 127)):
        if Device.here() != HOPPER:
            assert choose(weight, 8192, largest).name in FLOATS
        elif weight is groups or largest != 127:
            assert choose(weight, 8192, largest).name == "dense"


def test_what_was_measured_here_decides_here_and_nowhere_else(afresh):
    slow, fast = {"dense": 2.0, "quantized_matmul": 1.0}, {"dense": 1.0, "quantized_matmul": 2.0}
    points = points_of({100: slow, 1000: fast}, 1536, 1536)
    write_json(afresh, described(points, "2026-01-02"))
    here = Device.here()
    assert select(here, 99, 1536, 1536).name == "quantized_matmul"
    assert select(here, 1000, 1536, 1536).name == "dense"
    assert select(Device("metal", 16), 1000, 1536, 1536).name == "dense"
    assert tuning.status() == f"measured on 2026-01-02 ({afresh})"
    afresh.unlink()
    assert select(here, 99, 1536, 1536).name == "quantized_matmul"  # read once a process


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "off"):
        monkeypatch.setenv(tuning.SWITCH, value)
        assert tmp_path in tuning.default_path().parents
        assert re.fullmatch(r"tuning-[a-z0-9-]+\.json", tuning.default_path().name)
    monkeypatch.setenv(tuning.SWITCH, str(tmp_path / "off"))
    assert tuning.default_path() == tmp_path / "off"


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not JSON"),
        ("{}", "format"),
        ({"version": 99}, "version"),
        ({"device": "cuda Other"}, "device"),
        ({"mlx": "0.0.1"}, "mlx 0.0.1"),
        ({"points": []}, "damaged"),
        ({"points": [{"N": 1, "K": 64, "rows": 5}]}, "damaged"),
        ({"points": [{"N": 1, "K": 64, "rows": 0, "seconds": {"dense": 1.0}}]}, "damaged"),
        ({"points": [{"N": 1, "K": 64, "rows": 5, "seconds": {"dense": -1.0}}]}, "damaged"),
        ({"points": [{"N": 1, "K": 64, "rows": 5, "seconds": 3}]}, "damaged"),
        ({"points": "none"}, "damaged"),
    ],
)
def test_a_file_that_is_no_use_is_left_aside_with_a_note(afresh, capsys, content, words):
    if isinstance(content, str):
        afresh.write_text(content)
    else:
        sound = described(points_of({1: {"dense": 1.0, "quantized_matmul": 0.1}}), "")
        afresh.write_text(json.dumps({**sound, **content}))
    with pytest.raises(UserError, match=words):
        read_tuned(afresh)
    here = Device.here()
    for _ in range(3):
        assert select(here, 64, 64, 64).name == chosen(shipped(here), 64, 64, 64)
    noted = capsys.readouterr().err
    assert noted.count("note: kernels are chosen as shipped, since") == 1 and words in noted
    assert noted.count("\n") == 1 and "ditq tune" in tuning.status()


def test_a_file_that_is_named_but_missing_is_noted(afresh, monkeypatch, capsys):
    here = Device.here()
    assert select(here, 64, 64, 64).name == chosen(shipped(here), 64, 64, 64)
    noted = capsys.readouterr().err
    assert noted.count("\n") == 1 and f"since {afresh} (DITQ_TUNING) is missing" in noted
    monkeypatch.setenv("DITQ_TUNING", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(afresh.parent))
    monkeypatch.setenv("HOME", str(afresh.parent))
    tuning.tuned_here.cache_clear()
    assert tuning.tuned_here() is None and not capsys.readouterr().err


@pytest.mark.slow
def test_tune_measures_and_the_next_process_reads_it(tmp_path):
    """The real command, with few sizes."""
    sizes = ["--shape", "96x64", "--rows", "3", "--rows", "40", "--rounds", "2"]
    result = run("src.tune", *sizes, **home_at(tmp_path))
    assert result.returncode == 0, result.stderr
    (path,) = [p for p in tmp_path.rglob("*.json") if p.name.startswith("tuning-")]
    points = read_tuned(path).points
    assert [(p.rows, p.N, p.K) for p in points] == [(3, 96, 64), (40, 96, 64)]
    for point in points:
        assert {"dense", "quantized_matmul"} <= set(point.seconds) <= set(CHOICES)
    last = result.stdout.splitlines()[-1]
    assert last.startswith("measured 2 sizes in ") and str(path) in last
    assert "N 96, K 64: from 1 rows on " in result.stdout
    assert str(path) in status_of(tmp_path)


def status_of(home) -> str:
    """What `ditq doctor` would say in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", "from src.backends import tuning; print(tuning.status())"],
        cwd=ROOT,
        env={**os.environ, **home_at(home)},
        capture_output=True,
        text=True,
    )
    return done.stdout


def home_at(folder) -> dict[str, str]:
    return {"DITQ_TUNING": "", "XDG_CACHE_HOME": str(folder), "HOME": str(folder)}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--shape", "15"], "--shape 15 is not possible"),
        (["--shape", "64x100"], "a multiple of 32"),
        (["--shape", "0x64"], "--shape 0x64"),
        (["--rows", "0"], "--rows 0 is not possible; valid: 1 or more"),
        (["--shape", "64x64", "--rows", "99999999999"], "TB, this machine has"),
        (["--rounds", "-1"], "--rounds -1"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--seconds", "0"], "--seconds 0"),
        (["--rows", "many"], "many"),
    ],
)
def test_bad_input_is_one_error_line(arguments, words, tmp_path):
    output = tmp_path / "out.json"
    assert_one_error_line(run_here("src.tune", *arguments, "--output", str(output)), words)
    assert not output.exists()


@pytest.mark.parametrize("inside", [".", "file/below.json"])
def test_a_file_that_cannot_be_written_is_one_error_line_before_measuring(tmp_path, inside):
    (tmp_path / "file").touch()
    output = tmp_path / inside
    result = run_here("src.tune", "--shape", "32768x32768", "--output", str(output))
    assert_one_error_line(result, str(tmp_path))


def test_the_most_rows_of_the_first_shapes_come_first():
    """So that what the largest layers want is known when the time ends, which it does at once."""
    shapes = [(96, 64), (64, 64), (96, 64)]
    points = list(measured(["dense"], shapes, [1, 2, 3], 1, 1e-9, pytest.fail))
    assert [point.shape for point in points] == shapes[:2]
    points = list(measured(["dense"], shapes, [1, 2, 3], 1, 60.0, pytest.fail))
    assert [point.rows for point in points] == [3, 3, 1, 1, 2, 2]


@given(
    rows=st.lists(st.integers(1, 9000), min_size=1, max_size=40, unique=True).map(sorted),
    crossing=st.integers(0, 9001),
)
def test_a_crossover_is_found_by_halving(rows, crossing):
    """Everything is measured in the end, but where another kernel takes over within few turns."""
    fastest: dict[int, str] = {}
    turns = 0
    while (count := next_rows(fastest, rows)) is not None:
        assert count in rows and count not in fastest
        fastest[count] = "cuda_int8" if count >= crossing else "dense"
        turns += 1
        if turns == 2 + len(rows).bit_length():
            below = [r for r in rows if r < crossing]
            above = [r for r in rows if r >= crossing]
            if below and above:
                assert {below[-1], above[0]} <= set(fastest)
    assert list(fastest)[0] == rows[-1] and set(fastest) == set(rows)


class Refusing:
    """A kernel that MLX does not compute with more rows than two."""

    name = "refusing"

    def prepare(self, weight, dtype, largest):
        return {}

    def multiply(self, x, factor, operand):
        if x.shape[-2] > 2:
            raise RuntimeError("[matmul] no such\n kernel")
        return mx.zeros((*x.shape[:-1], 96))


def test_a_kernel_that_mlx_refuses_is_left_out_and_the_others_measured(monkeypatch):
    monkeypatch.setitem(BACKENDS, "refusing", Refusing())
    notes: list[str] = []
    names = ["refusing", "dense"]
    points = list(measured(names, [(96, 64)], [2, 3, 5], 1, 60.0, notes.append))
    found = {point.rows: list(point.seconds) for point in points}
    assert found == {5: ["dense"], 2: names, 3: ["dense"]}
    assert notes == ["refusing is not measured: [matmul] no such kernel"]
    assert not list(measured(names[:1], [(96, 64)], [3], 1, 60.0, notes.append))


def test_a_layer_that_a_kernel_leaves_to_others_is_not_timed_under_its_name(monkeypatch):
    monkeypatch.setitem(BACKENDS, "fusing", FusingBackend(refuses={64}))
    shapes, names = [(96, 64), (96, 96)], ["dense", "fusing"]
    points = list(measured(names, shapes, [2], 1, 60.0, pytest.fail))
    assert [list(point.seconds) for point in points] == [["dense"], names]


def test_what_is_measured_holds_shapes_that_every_kernel_takes():
    """So that a layer of whole tiles goes by one where integer kernels were measured too."""
    for shape in ((256, 256), (768, 768), (1024, 8192), (9728, 2432)):
        assert metal_int8.fits(*nearest(dict.fromkeys(SHAPES, ()), *shape))
