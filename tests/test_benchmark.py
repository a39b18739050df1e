"""The benchmark: what its rows compute, what it writes, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from src.backends import BACKENDS, Device, cuda_int8, named
from src.benchmark import benchmark
from src.benchmarking.drawing import Job
from src.benchmarking.kernels import available, replaced_note
from src.benchmarking.memory import needed_bytes
from src.benchmarking.opening import Order, open_all
from src.benchmarking.report import headline, machine, page_lines
from src.benchmarking.rows import FLOAT, KERNEL, Spec
from src.benchmarking.simulated import Simulated
from src.benchmarking.subjects import Codes, open_subject, quantized_layers, with_kernel
from src.benchmarking.timing import in_turns, ratios, spread
from src.inference.export import save_model
from src.inference.kernels import rows_of
from src.models.load import load_pipeline

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from .helpers import assert_one_error_line, relative_error, run, run_here
from .quantized_models import quantized_pipeline
from .test_inject import config_for, rounded_layers, write_folder

QUICK = ["--num-steps", "2", "--warm-up", "0", "--repeats", "2"]
FEW = [*QUICK, "--kernel", "dense", "--modulate", "none"]
KERNELS = ["simulated", *available(()).names]


def figures(folder: Path) -> dict:
    return json.loads((folder / "benchmark.json").read_text())


def assert_sane(data: dict) -> None:
    """Every number is one that can be."""
    first, batch = data["rows"][0], data["pictures"]["batch size"]
    assert first["ratio"] == {"median": 1.0, "quartiles": [1.0, 1.0], "least": 1.0}
    for row in data["rows"]:
        for name in ("step_seconds", "picture_seconds", "ratio"):
            low, high = row[name]["quartiles"]
            assert 0 < row[name]["least"] <= low <= row[name]["median"] <= high
        picture = row["picture_seconds"]
        assert len(picture["each"]) == data["repeats"]
        assert row["pictures_a_second"] == pytest.approx(1 / picture["median"])
        steps = data["pictures"]["steps"] * row["step_seconds"]["least"]
        assert picture["least"] * batch > steps
        assert 0 < row["held_bytes"] < row["peak_bytes"]


@pytest.mark.slow
def test_all_rows_of_a_small_model(tmp_path):
    """As a user's own process."""
    result = run("src.benchmark", "--model", "tiny", *QUICK, "--use-int8", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    data = figures(tmp_path / "benchmark")
    assert_sane(data)
    names = [row["name"] for row in data["rows"]]
    wanted = [f"W4A8 {kernel}{how}" for kernel in KERNELS for how in ("", ", modulated")]
    floats = ["float32"] if Device.here().kind == "cpu" else ["float16", "float32"]
    assert names == [*floats, *wanted, "INT8 auto"]
    assert data["machine"]["device"] and data["machine"]["device"] in result.stdout
    assert set(data["left_out"]) == set(BACKENDS) - set(KERNELS)
    for name in data["left_out"]:
        assert f"note: {name} is not run: " in result.stderr
    assert "INT8 auto has 21 layers in INT8" in data["notes"]
    held = {row["name"]: row["held_bytes"] for row in data["rows"]}
    assert held["W4A8 unpack"] < held["W4A8 dense"]
    slow = [row["name"] for row in data["rows"][len(floats) :] if row["ratio"]["median"] > 1]
    assert [line.split(" is slower than ")[0] for line in data["slower"]] == slow
    for line in data["slower"]:
        assert line in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith(f"{floats[0]}: ") and "wrote benchmark in" in last
    page = (tmp_path / "benchmark" / "benchmark.md").read_text()
    assert all(f"| {name} |" in page for name in names) and "benchmark.png" in page
    assert Image.open(tmp_path / "benchmark" / "benchmark.png").width > 600


@pytest.mark.slow
def test_batches_without_guidance(tmp_path):
    data = benchmark(
        tmp_path,
        model="tiny",
        kernels=["dense"],
        modulate="fc2",
        a_scale="token",
        dtypes=["float32", "float16"],
        batch_size=3,
        num_steps=2,
        cfg_weight=0,
        height=64,
        repeats=1,
        warm_up=0,
    )
    assert_sane(data)
    names = ["float32", "float16", *(f"W4A8 {k}" for k in ("simulated", "dense"))]
    assert {row["name"] for row in data["rows"] if not row["modulated"]} == set(names)
    assert data["pictures"] == {"batch size": 3, "steps": 2, "guidance": 0, "size": [64, 128]}
    assert data["model"]["activation scales"] == "token"
    assert any("of 21 layers" in note for note in data["notes"])


@pytest.mark.slow
def test_a_saved_model_stands_beside_the_one_it_was_made_from(tmp_path):
    quantized = quantized_pipeline("tiny", smoothing=True, low_rank=2, a_scale="token")
    save_model(quantized, tmp_path / "saved", made_from={}, settings={})
    result = run_here("src.benchmark", "--model", "saved", *FEW, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    data = figures(tmp_path / "benchmark")
    assert data["model"]["name"] == "tiny" and data["model"]["weights"] == "saved"
    assert data["model"]["activation scales"] == "token"
    names = [row["name"] for row in data["rows"]]
    assert "W4A6-8 (7.0 bits) dense" in names
    arguments = ["--model", "saved", "--output", "other", "--quant-config", "x"]
    again = run_here("src.benchmark", *arguments, cwd=tmp_path)
    assert_one_error_line(again, "--quant-config x", "saved has codes and grids of its own")


@pytest.fixture
def artifacts(tmp_path) -> Path:
    """Both tracks' results for the model tiny."""
    pipeline = load_pipeline("tiny")
    layers = rounded_layers(pipeline)
    write_folder(tmp_path / "rounded", pipeline, layers)
    config = config_for(layers, model=pipeline.name, model_hash=pipeline.hash)
    config.save(tmp_path / "config.json")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "name", "modulated", "weights"),
    [
        ("--adaround-output rounded", "W4A16", "W4A8", "rounded, no quant config"),
        (
            "--adaround-output rounded --quant-config config.json",
            "W4A6-8 (7.0 bits)",
            "W4A8",
            "rounded, config.json",
        ),
        ("--quant-config config.json", "W4A6-8 (7.0 bits)", "W4A8", "nearest codes, config.json"),
    ],
)
def test_the_tracks_results_are_what_is_timed(artifacts, arguments, name, modulated, weights):
    words = ["--model", "tiny", *QUICK, "--kernel", "dense", "--modulate", "fc2"]
    result = run_here("src.benchmark", *words, *arguments.split(), cwd=artifacts)
    assert result.returncode == 0, result.stderr
    data = figures(artifacts / "benchmark")
    assert_sane(data)
    names = [row["name"] for row in data["rows"] if row["kernel"] == "dense"]
    assert names == [f"{name} dense", f"{modulated} dense, modulated"]
    assert data["model"]["weights"] == weights


@pytest.mark.parametrize("option", ["--adaround-output rounded", "--quant-config config.json"])
def test_results_of_another_model_are_refused(artifacts, option):
    words = ["--model", "tiny-3.5-large", *option.split()]
    result = run_here("src.benchmark", *words, *FEW, cwd=artifacts)
    assert_one_error_line(result, option.split()[1], "tiny", "tiny-3.5-large")
    assert not (artifacts / "benchmark").exists()


@pytest.mark.slow
def test_finished_work_is_only_replaced_by_force(tmp_path):
    arguments = ["src.benchmark", "--model", "tiny", *FEW]
    assert run_here(*arguments, cwd=tmp_path).returncode == 0
    before = (tmp_path / "benchmark" / "benchmark.json").read_bytes()
    again = run_here(*arguments, cwd=tmp_path)
    assert_one_error_line(again, "benchmark.json is there already", "--force")
    assert (tmp_path / "benchmark" / "benchmark.json").read_bytes() == before
    assert run_here(*arguments, "--force", cwd=tmp_path).returncode == 0
    assert (tmp_path / "benchmark" / "benchmark.json").read_bytes() != before


@pytest.fixture(scope="module")
def subject():
    return open_subject("tiny", mx.float32, Codes(), 4)


def velocity_of(pipeline) -> mx.array:
    conditioning = pipeline.condition(["a small blue ring"], 4.0)
    latent = mx.random.normal((1, *pipeline.latent_shape(128, 128)), key=mx.random.key(0))
    return pipeline.velocity(conditioning, 4.0)(latent, mx.array(0.7))


@pytest.mark.parametrize("a_scale", ["static", "token"])
def test_all_rows_compute_the_same_quantized_model(subject, a_scale):
    """What is timed is what is meant: simulated or not, the codes are those of the reference."""
    wanted = velocity_of(with_kernel(subject.quantized, named("reference"), a_scale)[0])
    for backend in (Simulated(), *map(named, KERNELS[1:])):
        pipeline, _ = with_kernel(subject.quantized, backend, a_scale)
        assert {x.kernel for x in quantized_layers(pipeline.transformer).values()} == {backend.name}
        assert relative_error(velocity_of(pipeline), wanted) < 2e-3, backend.name
    exact = velocity_of(subject.exact)
    assert relative_error(exact, velocity_of(load_pipeline("tiny", mx.float32))) == 0
    assert relative_error(wanted, exact) > 0.01


def test_a_model_as_it_was_saved_is_the_same_under_its_own_kernel():
    options = {"smoothing": True, "low_rank": 2, "shifts": 10, "coarse": 3, "group_size": 32}
    quantized = quantized_pipeline("tiny", kernel="dense", **options)
    again, _ = with_kernel(quantized, named("dense"), "static")
    assert relative_error(velocity_of(again), velocity_of(quantized)) == 0


def test_kernels_share_the_codes(subject):
    one, other = (
        with_kernel(subject.quantized, named(n), "static")[0] for n in ("dense", "unpack")
    )
    before = mx.get_active_memory()
    kept = with_kernel(subject.quantized, named("unpack"), "static")
    mx.eval(velocity_of(kept[0]))
    layers = quantized_layers(one.transformer)
    assert mx.get_active_memory() - before < sum(x.weight.nbytes for x in layers.values())
    assert one.transformer.x_embedder is not other.transformer.x_embedder


def test_layers_choose_their_kernel_by_the_rows_that_they_meet(subject):
    made, _ = with_kernel(subject.quantized, None, "static")
    rows = rows_of(made.transformer.config, subject.quantized.defaults)
    layers = quantized_layers(made.transformer)
    assert {path: layer.runtime.rows for path, layer in layers.items()} == {
        p: rows(p) for p in layers
    }
    assert len({layer.runtime.rows for layer in layers.values()}) == 2  # picture and text


def test_a_saved_models_first_row_holds_no_more_than_its_second(tmp_path):
    """Its arrays are read when they are first used."""
    quantized = quantized_pipeline("tiny", kernel="dense")
    save_model(quantized, tmp_path / "saved", made_from={}, settings={})
    order = Order(modulate="none", num_steps=2)
    opened = open_all(tmp_path / "saved", order, available(["unpack"]), True, pytest.fail)
    spec = Spec(KERNEL, "unpack")
    first, second = (opened.maker.make(spec).held for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kernel", ["cuda_int8", "metal_int8"])
def test_memory_of_a_byte_a_weight_beside_the_packed_codes(subject, kernel):
    job, config = Job.of(subject.exact, 1, 2, None), subject.exact.transformer.config
    packed = subject.packed_bytes
    needed = {
        name: needed_bytes([Spec(KERNEL, name)], config, job, 8, mx.float32, packed)
        for name in ("reference", kernel)
    }
    assert needed[kernel] - needed["reference"] == 2 * packed
    twice = replace(subject, quantized=quantized_pipeline("tiny", bits=8))
    assert twice.packed_bytes == 2 * packed


def test_layers_that_metals_kernel_leaves_to_another_are_said(subject):
    made, _ = with_kernel(subject.quantized, named("metal_int8"), "static")
    note = replaced_note(made.transformer, named("metal_int8"))
    assert note.startswith("metal_int8 leaves ") and "are no whole tiles" in note
    assert replaced_note(made.transformer, named("cuda_int8")) is None


def test_kernels_that_cannot_run_are_named_with_the_reason():
    found = available(["dense", "cuda_int8", "dense"])
    assert found.names[0] == "dense" and len(found.names) + len(found.left_out) == 2
    assert ("cuda_int8" in found.left_out) == (cuda_int8.usable() is None)
    assert all(found.left_out.values())


def test_a_report_without_a_quantized_row_says_so():
    """Every one was left out, with its reason."""
    one = spread([0.25])
    sizes = {"pictures_a_second": 4.0, "held_bytes": 1, "peak_bytes": 2}
    row = {"name": "float32", "kind": FLOAT, "ratio": ratios([1.0], [1.0]), **sizes}
    data = {
        "machine": machine(),
        "model": {"name": "x", "sha256": "0" * 64, "weights": "", "activation scales": "static"},
        "pictures": {"batch size": 1, "steps": 1, "guidance": 0, "size": [64, 64]},
        "warm_up": 0,
        "repeats": 1,
        "rows": [{**row, "step_seconds": one, "picture_seconds": one}],
        "left_out": {"W4A8 dense": "no such kernel"},
        "notes": [],
        "slower": [],
    }
    assert headline(data) == "float32: 250.00 ms a step; no quantized row was run"
    assert "No quantized row was run." in page_lines(data)


def test_turns_go_round_and_warm_up_does_not_count():
    order: list[str] = []

    def call(name: str) -> int:
        order.append(name)
        return len(order)

    found = in_turns({n: lambda n=n: call(n) for n in "abc"}, rounds=2, warm_up=1)
    assert order == list("abcabcabc")
    assert found == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20), st.floats(0.1, 10))
def test_ratios_are_those_of_the_same_round(values, factor):
    """A machine that is busy in some rounds changes no ratio."""
    found = ratios([factor * value for value in values], values)
    for value in (found["median"], found["least"], *found["quartiles"]):
        assert value == pytest.approx(factor)
    own = spread(values)
    assert own["median"] == pytest.approx(float(np.median(values)))
    assert own["least"] == min(values)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--kernel fast", ["unknown kernel 'fast'", "dense"]),
        ("--repeats 0", ["--repeats 0", "1 or more"]),
        ("--warm-up -1", ["--warm-up -1", "0 or more"]),
        ("--batch-size 0", ["--batch-size 0", "1 or more"]),
        ("--num-steps 0", ["steps", "0"]),
        ("--height 100", ["height 100", "multiples of 16"]),
        ("--cfg-weight -1", ["guidance", "-1"]),
        ("--a-scale channel", ["--a-scale 'channel'", "static, token"]),
        ("--dtype int8", ["--dtype int8 is unknown", "float16, bfloat16, float32"]),
        ("--modulate fc7", ["--modulate 'fc7' matches none of 21 layers"]),
        ("--modulate auto", ["--modulate auto needs --modulate-memory"]),
        ("--modulate-memory 0", ["--modulate-memory", "above 0"]),
        ("--modulate-memory 1e-6", ["more than --modulate-memory"]),
        ("--batch-size 100000", ["rows need about", "this machine has", "--kernel"]),
        ("--model absent", ["unknown model 'absent'"]),
        ("--adaround-output absent", ["absent"]),
        ("--quant-config absent.json", ["absent.json"]),
        ("--quantization absent.json --use-int8", ["absent.json"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, arguments, words):
    words_given = arguments.split()
    model = [] if "--model" in words_given else ["--model", "tiny"]
    result = run_here("src.benchmark", *model, *QUICK, *words_given, cwd=tmp_path)
    assert_one_error_line(result, *words)
    assert not list(tmp_path.iterdir())
