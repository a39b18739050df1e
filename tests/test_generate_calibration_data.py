"""Stage 1 end to end: what it writes, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

from src.calibration.trajectories import as_numpy, stored_dtype
from src.errors import UserError
from src.generate_calibration_data import generate_calibration_data
from src.models.load import load_pipeline
from src.models.prompts import LISTS, load_prompts
from src.sampling import guided
from src.store import load_npz, read_manifest

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from .helpers import (
    assert_one_error_line,
    contents,
    kill_at_random_moments,
    run,
    run_here,
    run_on_two_ranks,
    start_quietly,
)

SMALL = {"model": "tiny", "num_images": 3, "num_steps": 4, "batch_size": 2}
ARGUMENTS = ["--model", "tiny", "--num-images", "3", "--num-steps", "4", "--batch-size", "2"]
STAGE = "src.generate_calibration_data"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    return generate_calibration_data(calib_dir=tmp_path_factory.mktemp("calibration"), **SMALL)


def test_writes_exactly_the_promised_files(undisturbed):
    images, steps = range(3), range(4)
    wanted = {"manifest.json"}
    wanted |= {f"samples/{i:04d}_{s:03d}.npz" for i in images for s in steps}
    wanted |= {f"conditioning/{i:04d}.npz" for i in images}
    wanted |= {f"latents/{i:04d}.npz" for i in images}
    wanted |= {f"images/{i:04d}.png" for i in images}
    assert set(contents(undisturbed)) == wanted


def test_manifest_says_what_it_was_made_from(undisturbed):
    data = read_manifest(undisturbed, "ditq-calibration", 1, verify=True)
    settings = data["settings"]
    assert settings["prompts"] == load_prompts("nano")[:3]
    assert settings["seeds"] == [0, 1, 2]
    assert (settings["cfg_weight"], settings["num_steps"]) == (4.0, 4)
    assert len(settings["schedule"]["sigmas"]) == 5
    assert data["made_from"]["model"] == "tiny"
    assert data["made_from"]["model_hash"] == load_pipeline("tiny").hash
    assert list(data["units"]) == ["0000", "0001", "0002"]


def test_samples_replay_to_the_next_sample(undisturbed):
    """x of a step, its sigma and the stored conditioning give x of the next step."""
    transformer = load_pipeline("tiny").transformer
    sigmas = read_manifest(undisturbed, "ditq-calibration", 1)["settings"]["schedule"]["sigmas"]
    for image in range(3):
        c = load_npz(undisturbed / f"conditioning/{image:04d}.npz")
        text = mx.array(np.stack([c["text"], c["negative_text"]]))
        pooled = mx.array(np.stack([c["pooled"], c["negative_pooled"]]))
        names = [f"samples/{image:04d}_{s:03d}.npz" for s in range(4)]
        chain = [load_npz(undisturbed / n) for n in [*names, f"latents/{image:04d}.npz"]]
        for step, (sample, following) in enumerate(zip(chain, chain[1:], strict=False)):
            assert sample["sigma"] == np.float32(sigmas[step])
            assert sample["timestep"] == pytest.approx(1000 * sigmas[step])
            x, sigma = mx.array(sample["x"][None]), mx.array(sample["sigma"])
            velocity = guided(transformer, x, sigma, text, pooled, 4.0)
            replayed = x + velocity * (sigmas[step + 1] - sigmas[step])
            assert np.allclose(np.array(replayed[0]), following["x"], atol=1e-4)
        decoded = load_pipeline("tiny").decode(mx.array(chain[-1]["x"][None]))[0]
        picture = np.asarray(Image.open(undisturbed / f"images/{image:04d}.png"))
        assert np.abs(decoded.astype(int) - picture).max() <= 1


def test_finished_work_is_left_alone_and_done_again_only_with_force(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.npz")}
    generate_calibration_data(calib_dir=folder, **SMALL)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.npz")} == before
    (folder / "samples/0007_000.npz").write_bytes(b"left by a killed run of another size")
    (folder / "notes.txt").write_text("the user's own")
    with pytest.raises(UserError, match="num_steps.*4.*5|num_steps.*5.*4"):
        generate_calibration_data(calib_dir=folder, **{**SMALL, "num_steps": 5})
    generate_calibration_data(calib_dir=folder, force=True, **SMALL)
    left = contents(folder)
    assert left.pop("notes.txt") and left == contents(undisturbed)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.npz")} != before


def test_a_checkpoint_in_the_environment_is_not_for_the_recorded_model(
    undisturbed, tmp_path, monkeypatch
):
    """It is Stable Diffusion 3's, and these pictures are of another model."""
    monkeypatch.setenv("DITQ_CHECKPOINT", str(tmp_path / "absent.safetensors"))
    shutil.copytree(undisturbed, tmp_path / "calibration_data")
    options = ("--num-images", "1", "--stride", "2")
    for stage in ("collect_layer_activations", "cache_adaround_data"):
        result = run_here(f"src.{stage}", *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        given = ("--checkpoint", "absent.safetensors")
        assert_one_error_line(run_here(f"src.{stage}", *options, *given, cwd=tmp_path), "absent")


def test_a_lost_file_is_made_again(undisturbed, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed, folder)
    (folder / "samples/0001_002.npz").unlink()
    (folder / "images/0002.png").write_bytes(b"cut")
    generate_calibration_data(calib_dir=folder, **SMALL)
    assert contents(folder) == contents(undisturbed)


@pytest.mark.slow
def test_killed_at_20_random_moments_the_same_command_ends_with_the_same_bytes(
    undisturbed, tmp_path
):
    folder = tmp_path / "calibration"
    command = [sys.executable, "-m", STAGE, *ARGUMENTS, "--calib-dir", str(folder)]
    assert kill_at_random_moments(command, folder, 20, check=whole) >= 10
    assert start_quietly(command).wait() == 0
    assert contents(folder) == contents(undisturbed)


def whole(folder: Path) -> None:
    read_manifest(folder, "ditq-calibration", 1, verify=True)


@pytest.mark.slow
def test_ranks_make_the_same_folder_as_one_process(undisturbed, tmp_path):
    folder = tmp_path / "calibration"
    result = run_on_two_ranks(STAGE, *ARGUMENTS, "--calib-dir", folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert contents(folder) == contents(undisturbed)


@pytest.mark.slow
def test_second_run_in_the_same_folder_stops(tmp_path):
    from src.store import folder_lock

    with folder_lock(tmp_path / "calibration"):
        result = run(STAGE, *ARGUMENTS, "--calib-dir", str(tmp_path / "calibration"))
    assert_one_error_line(result, "in use by process", str(os.getpid()))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model", "sd4"], ["'sd4'", "nano"]),
        (["--num-images", "0"], ["--num-images", "0"]),
        (["--num-images", "-4"], ["--num-images", "-4"]),
        (["--num-steps", "0"], ["steps", "0"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--cfg-weight", "-1"], ["guidance", "-1"]),
        (["--height", "100"], ["height 100", "multiples of 16"]),
        (["--seed", "-1"], ["seed -1"]),
        (["--prompts", "absent.txt"], ["absent.txt", "does not exist"]),
        (["--prompts", "empty.txt"], ["empty.txt", "no prompt"]),
        (["--prompts", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["--prompts", "photo.txt"], ["'photo'"]),
        (["--calib-dir", "/dev/null/calibration"], ["/dev/null"]),
    ],
)
def test_a_mistake_is_one_error_line_and_changes_nothing(options, words, tmp_path):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "photo.txt").write_text("a photo of a cat\n")
    before = contents(tmp_path)
    folder = [] if "--calib-dir" in options else ["--calib-dir", "calibration"]
    result = run_here(STAGE, *ARGUMENTS, *folder, *options, cwd=tmp_path)
    assert_one_error_line(result, *words)
    assert contents(tmp_path) == before


def test_other_models_damaged_and_full_folders_are_refused(undisturbed, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(undisturbed, folder)
    with pytest.raises(UserError, match="model.*tiny.*tiny-3.5-large|model.*3.5-large.*tiny"):
        generate_calibration_data(calib_dir=folder, **{**SMALL, "model": "tiny-3.5-large"})
    assert contents(folder) == contents(undisturbed)
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:200])
    with pytest.raises(UserError, match="manifest.json"):
        generate_calibration_data(calib_dir=folder, **SMALL)
    with pytest.raises(UserError, match="needs .* TB.*free"):
        # 10 million images: more than any disk this runs on.
        generate_calibration_data(
            calib_dir=tmp_path / "huge", **{**SMALL, "num_images": 100_000, "num_steps": 1000}
        )


def test_truncated_sample_is_an_error_that_names_it(undisturbed, tmp_path):
    path = tmp_path / "0000_000.npz"
    path.write_bytes((undisturbed / "samples/0000_000.npz").read_bytes()[:-40])
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_npz(path)


def test_disk_is_asked_for_as_many_bytes_as_are_stored():
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        assert as_numpy(mx.ones((3,), dtype=dtype)).nbytes == 3 * stored_dtype(dtype).size


def test_shipped_lists_are_long_enough_and_disjoint():
    lists = {name: load_prompts(name) for name in LISTS}
    assert all(len(set(lines)) == len(lines) for lines in lists.values())
    assert len(lists["sd3"]) >= 128 and len(lists["nano"]) >= 128
    for name in ("sd3", "nano"):
        assert len(lists[f"{name}_evaluation"]) >= 64
        assert not set(lists[name]) & set(lists[f"{name}_evaluation"])
    load_pipeline("tiny").encode_text.check(lists["nano"] + lists["nano_evaluation"])


def test_manifest_is_plain_json_without_clock_or_path(undisturbed):
    text = (undisturbed / "manifest.json").read_text()
    assert json.loads(text)["version"] == 1
    assert str(undisturbed) not in text and time.strftime("%Y-") not in text
