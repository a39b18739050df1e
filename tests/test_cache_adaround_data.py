"""The block cache: what it holds, that one pass suffices, how it goes on, what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from src.cache_adaround_data import cache_adaround_data
from src.calibration.block_cache import BlockCache
from src.calibration.capture import captured_blocks
from src.calibration.replay import transformer_inputs
from src.calibration.trajectories import Trajectories
from src.errors import UserError
from src.generate_calibration_data import generate_calibration_data
from src.models.configs import config_named
from src.models.load import load_pipeline
from src.models.mmdit import MMDiT
from src.models.paths import BLOCKS
from src.store import load_npz, read_json, read_manifest, save_npz
from src.weight_track.blocks import BlockWalk

import mlx.core as mx
import numpy as np
import pytest

from .helpers import (
    ROOT,
    assert_one_error_line,
    contents,
    random_inputs,
    random_model,
    run_here,
    run_on_two_ranks,
)

STAGE = "src.cache_adaround_data"
SMALL = {"num_images": 2, "stride": 2, "batch_size": 3}
ARGUMENTS = ["--num-images", "2", "--stride", "2", "--batch-size", "3"]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    return generate_calibration_data(
        "tiny", folder, num_images=3, num_steps=4, height=64, width=64, batch_size=3
    )


@pytest.fixture(scope="module")
def cache(calibration, tmp_path_factory) -> Path:
    return cache_adaround_data(calibration, tmp_path_factory.mktemp("cache"), **SMALL)


def test_writes_exactly_the_promised_files_and_arrays(calibration, cache):
    samples = {f"samples/{i:04d}_{s:03d}.npz" for i in (0, 1) for s in (0, 2)}
    assert set(contents(cache)) == {"manifest.json", "metadata.json"} | samples
    arrays = load_npz(cache / "samples/0001_002.npz")
    assert set(arrays) == {*("image_0", "image_1", "image_2", "text_0", "text_1", "conditioning")}
    # 64 pixels are 4 x 4 patches; the prompt's row and the negative's.
    assert arrays["image_0"].shape == (2, 16, 64) and arrays["conditioning"].shape == (2, 64)
    made_from = read_manifest(cache, "ditq-adaround-cache", 1)["made_from"]
    assert made_from["calibration_hash"] == Trajectories.open(calibration).hash
    assert made_from["model_hash"] == load_pipeline("tiny").hash
    metadata = read_json(cache / "metadata.json", "ditq-adaround-metadata", 1)
    assert metadata["pairs"] == [[0, 0], [0, 2], [1, 0], [1, 2]] and metadata["blocks"] == 2


def test_blocks_make_the_cached_outputs_of_the_cached_inputs(calibration, cache):
    transformer = load_pipeline("tiny").transformer
    opened = BlockCache.open(cache)
    inputs = transformer_inputs(Trajectories.open(calibration), [(1, 2)], mx.float32)
    entry = load_npz(cache / "samples/0001_002.npz")
    assert np.allclose(
        entry["text_0"], np.array(transformer.context_embedder(inputs[1])), atol=1e-5
    )
    assert np.allclose(
        entry["conditioning"], np.array(transformer.conditioning(*inputs[2:])), atol=1e-5
    )
    for index, data in BlockWalk(opened, transformer, batch_size=3):
        image, text = transformer[BLOCKS][index](data.image, data.text, data.conditioning)
        assert mx.allclose(image, data.target_image, atol=1e-4).item()
        assert (text is None) == (index == 1)
        assert text is None or mx.allclose(text, data.target_text, atol=1e-4).item()
    assert np.array(data.step).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert opened.step_keys == [0, 2] and opened.sigmas[0] == 1.0


def test_each_sample_is_one_forward_pass(calibration, tmp_path, monkeypatch):
    """Not one pass per block."""
    passes = []
    real = MMDiT.__call__
    monkeypatch.setattr(
        MMDiT, "__call__", lambda self, x, *rest: passes.append(len(x)) or real(self, x, *rest)
    )
    cache_adaround_data(calibration, tmp_path / "cache", **SMALL)
    assert passes == [6, 2]  # three samples, then one, each with its negative


def test_entry_only_stores_the_entry_and_the_walk_finds_the_rest(calibration, cache, tmp_path):
    folder = cache_adaround_data(calibration, tmp_path / "entry", entry_only=True, **SMALL)
    arrays = load_npz(folder / "samples/0000_000.npz")
    assert set(arrays) == {"image_0", "text_0", "conditioning"}
    transformer = load_pipeline("tiny").transformer
    walks = [BlockWalk(BlockCache.open(f), transformer, 4) for f in (cache, folder)]
    for (_, whole), (_, walked) in zip(*walks, strict=True):
        for name, array in whole.arrays().items():
            assert mx.allclose(array, walked.arrays()[name], atol=1e-4).item(), name


def test_capture_puts_the_real_blocks_back_whatever_happens():
    model = random_model(config_named("tiny"))
    blocks = list(model[BLOCKS])
    inputs = (*random_inputs(model.config, 4, 4), mx.array([1.0, 2.0]))
    before = np.array(model(*inputs))
    with captured_blocks(model) as trace:
        assert np.array_equal(np.array(model(*inputs)), before)
    assert len(trace.image) == 3 and len(trace.text) == 2
    with pytest.raises(RuntimeError), captured_blocks(model):
        raise RuntimeError
    assert all(a is b for a, b in zip(model[BLOCKS], blocks, strict=True))


def test_a_lost_sample_is_made_again_with_the_same_bytes(calibration, cache, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(cache, folder)
    (folder / "samples/0001_000.npz").unlink()
    with pytest.raises(UserError, match="0001_000.npz"):
        BlockCache.open(folder)
    cache_adaround_data(calibration, folder, **SMALL)
    assert contents(folder) == contents(cache)
    with pytest.raises(UserError, match="stride.*2.*1|stride.*1.*2"):
        cache_adaround_data(calibration, folder, **{**SMALL, "stride": 1})
    cache_adaround_data(calibration, folder, force=True, **{**SMALL, "stride": 4})
    assert len(list(folder.glob("samples/*"))) == 2


@pytest.mark.slow
def test_killed_runs_go_on_and_ranks_share_the_work(calibration, cache, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", STAGE, *ARGUMENTS, "--calib-dir", str(calibration)]
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for wait in (0.3, 0.45, 0.6):
        process = subprocess.Popen([*command, "--output-dir", str(folder)], **quiet)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run([*command, "--output-dir", str(folder)], **quiet).returncode == 0
    assert contents(folder) == contents(cache)
    shared = tmp_path / "shared"
    ranks = [STAGE, *ARGUMENTS, "--calib-dir", calibration, "--output-dir", shared]
    result = run_on_two_ranks(*ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    assert contents(shared) == contents(cache)


def test_too_small_a_disk_is_refused_with_the_way_out(calibration, tmp_path, monkeypatch):
    import src.cache_adaround_data as stage

    monkeypatch.setattr(stage, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match="needs .*1.0 kB free; --entry-only"):
        cache_adaround_data(calibration, tmp_path / "cache", **SMALL)
    assert not list((tmp_path / "cache").glob("samples/*"))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--num-images", "4"], ["--num-images 4", "valid: 1 to 3"]),
        (["--stride", "0"], ["--stride 0", "valid: 1 to 4"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--model", "tiny-3.5-large"], ["tiny-3.5-large", "made the folder"]),
        (["--calib-dir", "absent"], ["absent", "generate_calibration_data"]),
    ],
)
def test_a_mistake_is_one_error_line_and_changes_nothing(calibration, options, words, tmp_path):
    where = [] if "--calib-dir" in options else ["--calib-dir", str(calibration)]
    result = run_here(STAGE, *ARGUMENTS, *where, "--output-dir", "cache", *options, cwd=tmp_path)
    assert_one_error_line(result, *words)
    assert contents(tmp_path) == {}


def test_nan_in_a_stored_latent_is_an_error_that_names_the_file(calibration, tmp_path):
    folder = tmp_path / "calibration"
    shutil.copytree(calibration, folder)
    path = folder / "samples/0001_002.npz"
    sample = load_npz(path)
    sample["x"][1, 2, 3] = np.nan
    save_npz(path, **sample)
    with pytest.raises(UserError, match="0001_002.npz.*nan"):
        cache_adaround_data(folder, tmp_path / "cache", **SMALL)
