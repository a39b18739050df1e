"""The first stage of the activation track: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from src.calibration.activations import ActivationStatistics
from src.calibration.trajectories import Trajectories
from src.collect_layer_activations import collect_layer_activations
from src.errors import UserError
from src.generate_calibration_data import generate_calibration_data
from src.models.load import load_pipeline
from src.models.paths import block_linears
from src.quant.schedule import Schedule
from src.store import load_npz, read_json, read_manifest, save_npz

import numpy as np
import pytest

from .helpers import (
    assert_one_error_line,
    contents,
    kill_at_random_moments,
    run_here,
    run_on_two_ranks,
    start_quietly,
)

STAGE = "src.collect_layer_activations"
SMALL = {"num_images": 3, "stride": 2, "batch_size": 2}
ARGUMENTS = ["--num-images", "3", "--stride", "2", "--batch-size", "2"]
STEPS = [0, 2, 4]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    return generate_calibration_data(
        calib_dir=folder, model="tiny", num_images=3, num_steps=5, batch_size=3
    )


@pytest.fixture(scope="module")
def undisturbed(calibration) -> Path:
    return collect_layer_activations(calibration, **SMALL)


@pytest.fixture
def copy(undisturbed, tmp_path) -> Path:
    """A copy of the calibration folder, activations included."""
    shutil.copytree(undisturbed.parent, tmp_path / "copy")
    return tmp_path / "copy"


def test_what_is_calibrated_reaches_the_schedules_end(tmp_path):
    """Else the trajectories' own noise levels could not be drawn; the last step is added."""
    generate_calibration_data(calib_dir=tmp_path, model="tiny", num_images=1, num_steps=8)
    sigmas = Trajectories.open(tmp_path).sigmas[:8]
    for stride, steps in ((3, [0, 3, 6]), (4, [0, 4, 7]), (8, [0, 7])):
        folder = collect_layer_activations(tmp_path, num_images=1, stride=stride, force=True)
        known = ActivationStatistics.open(folder)
        assert known.step_keys == steps
        Schedule(tuple(known.sigmas)).check(sigmas)


def test_writes_exactly_the_promised_files(undisturbed):
    wanted = {"manifest.json", "layer_statistics.json"}
    wanted |= {f"images/{i:04d}_{s:03d}.npz" for i in range(3) for s in STEPS}
    wanted |= {f"timestep_stats/step_{s}.npz" for s in STEPS}
    wanted |= {f"timestep_stats/step_{s}_index.json" for s in STEPS}
    assert set(contents(undisturbed)) == wanted
    read_manifest(undisturbed, "ditq-activations", 1, verify=True)


def test_every_linear_has_its_statistics_at_every_step(undisturbed):
    head = read_json(undisturbed / "layer_statistics.json")
    calibration = read_manifest(undisturbed.parent, "ditq-calibration", 1)
    sigmas = calibration["settings"]["schedule"]["sigmas"]
    assert head["step_keys"] == STEPS
    assert head["sigma_map"] == {str(s): sigmas[s] for s in STEPS}
    linears = block_linears(load_pipeline("tiny").transformer)
    assert set(head["layers"]) == set(linears)
    for step in STEPS:
        arrays = load_npz(undisturbed / f"timestep_stats/step_{step}.npz", finite=True)
        index = read_json(undisturbed / f"timestep_stats/step_{step}_index.json")["layers"]
        for path, linear in linears.items():
            layer = head["layers"][path]
            assert layer["channels"] == linear.weight.shape[1]
            for name in ("avg_min", "avg_max", "mean", "square"):
                assert arrays[f"{layer['input']}__{name}"].shape == (layer["channels"],)
            assert layer["post_gelu"] == (f"{layer['input']}__shift" in arrays)
            numbers = index[layer["input"]]
            assert numbers["hist_p50"] <= numbers["hist_p99"] <= numbers["hist_p999"]
            assert numbers["hist_p999"] <= numbers["hist_p100"] == numbers["tensor_absmax"]


def test_statistics_read_back_as_written(undisturbed):
    read = ActivationStatistics.open(undisturbed)
    assert read.step_keys == STEPS and len(read.layers) == 21
    path = "multimodal_transformer_blocks.0.image_transformer_block.mlp.fc2"
    arrays = load_npz(undisturbed / "timestep_stats/step_2.npz")
    assert np.array_equal(read.inputs[path].shift[1], arrays[f"{path}__shift"])
    assert (read.inputs[path].absmax >= np.abs(read.inputs[path].mean)).all()


def test_a_lost_file_is_made_again_and_finished_work_is_left_alone(copy, undisturbed):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*.npz")}
    collect_layer_activations(copy, **SMALL)
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*.npz")} == before
    (copy / "activations/images/0001_002.npz").unlink()
    (copy / "activations/timestep_stats/step_2.npz").write_bytes(b"cut")
    collect_layer_activations(copy, **SMALL)
    assert contents(copy / "activations") == contents(undisturbed)


def test_other_settings_need_force(copy):
    with pytest.raises(UserError, match="num_images.*3.*2|num_images.*2.*3"):
        collect_layer_activations(copy, **{**SMALL, "num_images": 2})
    collect_layer_activations(copy, **{**SMALL, "num_images": 2}, force=True)
    assert len(list((copy / "activations/images").iterdir())) == 2 * len(STEPS)


@pytest.mark.slow
def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(undisturbed, tmp_path):
    shutil.copytree(
        undisturbed.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("activations")
    )
    folder = tmp_path / "copy/activations"
    command = [sys.executable, "-m", STAGE, *ARGUMENTS, "--calib-dir", str(folder.parent)]
    assert kill_at_random_moments(command, folder, 8, check=whole, earliest=0.4) >= 4
    assert start_quietly(command).wait() == 0
    assert contents(folder) == contents(undisturbed)


def whole(folder: Path) -> None:
    read_manifest(folder, "ditq-activations", 1, verify=True)


@pytest.mark.slow
def test_ranks_make_the_same_folder_as_one_process(undisturbed, tmp_path):
    shutil.copytree(
        undisturbed.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("activations")
    )
    result = run_on_two_ranks(STAGE, *ARGUMENTS, "--calib-dir", tmp_path / "copy")
    assert result.returncode == 0, result.stdout + result.stderr
    assert contents(tmp_path / "copy/activations") == contents(undisturbed)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--num-images", "4"], ["--num-images 4", "1 to 3"]),
        (["--num-images", "0"], ["--num-images 0"]),
        (["--num-images", "3", "--stride", "6"], ["--stride 6", "1 to 5"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--model", "tiny-3.5-large"], ["tiny-3.5-large", "tiny"]),
        (["--calib-dir", "absent"], ["absent", "generate_calibration_data"]),
    ],
)
def test_a_mistake_is_one_error_line(options, words, calibration, tmp_path):
    folder = [] if "--calib-dir" in options else ["--calib-dir", str(calibration)]
    before = contents(calibration)
    assert_one_error_line(run_here(STAGE, *folder, *options, cwd=tmp_path), *words)
    assert contents(calibration) == before


def test_a_sample_with_nan_is_named(copy):
    path = copy / "samples/0001_002.npz"
    arrays = load_npz(path)
    arrays["x"][0, 0, 0] = np.nan
    save_npz(path, **arrays)
    with pytest.raises(UserError, match="0001_002.npz.*nan"):
        collect_layer_activations(copy, **SMALL, force=True)


@pytest.mark.parametrize("damage", ["truncated", "nan", "missing", "other"])
def test_damaged_statistics_are_refused_with_their_name(copy, damage):
    folder = copy / "activations"
    path = folder / "timestep_stats/step_2.npz"
    arrays = load_npz(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing":
        path.unlink()
    elif damage == "nan":
        name = next(n for n in arrays if n.endswith("__mean"))
        arrays[name] = np.full_like(arrays[name], np.nan)
        save_npz(path, **arrays)
    else:
        del arrays[next(iter(arrays))]
        save_npz(path, **arrays)
    with pytest.raises(UserError, match="step_2.npz"):
        ActivationStatistics.open(folder)
