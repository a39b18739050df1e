"""The weight track end to end: what it writes, how it goes on, what it shares and refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from src.adaround_optimize import adaround_optimize
from src.cache_adaround_data import cache_adaround_data
from src.calibration.block_cache import BlockCache
from src.errors import UserError
from src.generate_calibration_data import generate_calibration_data
from src.models.load import load_pipeline
from src.models.paths import block_linears
from src.quant import grid
from src.quant.artifacts import LayerConfig, QuantConfig, load_rounded_block
from src.store import load_npz, read_json, save_npz
from src.weight_track import plan as planning

import mlx.core as mx
import numpy as np
import pytest

from .helpers import (
    assert_one_error_line,
    kill_at_random_moments,
    run_here,
    run_on_two_ranks,
    start_quietly,
)

pytestmark = pytest.mark.slow  # the stage as a whole, again and again

STAGE = "src.adaround_optimize"
SMALL = {"iters": 16, "batch_size": 4, "refine": 8}
ARGUMENTS = ["--iters", "16", "--batch-size", "4", "--refine", "8"]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name, without the lock and what a clock has written."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.name == "config.json":
            found[name] = json.dumps({**json.loads(path.read_text()), "clock": None}).encode()
        elif not path.name.startswith(".lock") and "clock" not in name:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    calibration = generate_calibration_data(
        "tiny", tmp_path_factory.mktemp("c"), num_images=2, num_steps=4, height=64, width=64
    )
    return cache_adaround_data(calibration, num_images=2, stride=1)


@pytest.fixture(scope="module")
def rounded(cache, tmp_path_factory) -> Path:
    return adaround_optimize(cache, tmp_path_factory.mktemp("rounded"), **SMALL)


def quant_config(cache: Path, smoothed: bool = True) -> QuantConfig:
    """As the activation track would write it: random scales, shifts and smoothing."""
    rng, pipeline = np.random.default_rng(0), load_pipeline("tiny")
    layers = {}
    for path, linear in block_linears(pipeline.transformer).items():
        columns = linear.weight.shape[1]
        layers[path] = LayerConfig(
            bits=[8, 6],
            scale=[float(s) for s in rng.uniform(0.02, 0.1, 2).astype(np.float32)],
            shift=rng.standard_normal(columns).astype(np.float32) if "fc2" in path else None,
            smoothing=rng.uniform(0.5, 2, columns).astype(np.float32)
            if smoothed and "fc1" in path
            else None,
        )
    made_from = {"model": pipeline.name, "model_hash": pipeline.hash}
    sigmas = BlockCache.open(cache).sigmas
    return QuantConfig(made_from, [0, 2], [sigmas[0], sigmas[2]], layers)


def test_writes_every_linear_of_every_block(rounded):
    paths = []
    for index in range(2):
        layers = load_rounded_block(rounded, index)
        paths += layers
        for path, layer in layers.items():
            assert layer.codes.dtype == np.int8 and np.abs(layer.codes + 0.5).max() <= 7.5
            assert layer.scale.dtype == np.float32 and layer.scale.shape == (len(layer.codes), 1)
            assert layer.a_scale.shape == (4,) and np.all(layer.a_scale > 0), path
    assert sorted(paths) == sorted(block_linears(load_pipeline("tiny").transformer))
    names = set(load_npz(rounded / "weights/mm0.npz"))
    first = "multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj"
    assert {f"{first}__weight_int", f"{first}__scale", f"{first}__a_scale"} <= names


def test_config_says_what_was_done_and_how_well(rounded, cache):
    config = read_json(rounded / "config.json", "ditq-adaround", 1)
    assert config["settings"]["bits_w"] == 4 and config["settings"]["iters"] == 16
    assert config["made_from"]["cache_hash"] == BlockCache.open(cache).hash
    assert config["made_from"]["model_hash"] == load_pipeline("tiny").hash
    assert config["step_keys"] == [0, 1, 2, 3] and len(config["sigmas"]) == 4
    for block in ("0", "1"):
        errors = config["blocks"][block]["error_db"]
        assert list(sorted(errors)) == sorted(["rtn", "grid", "gptq", config["settings"]["method"]])
        assert errors[config["blocks"][block]["kept"]] == max(errors.values()) > errors["rtn"]
        assert 0 < config["blocks"][block]["not_nearest"] < 1
        assert config["clock"][block]["seconds"] >= 0
        assert config["clock"][block]["peak_memory_bytes"] > 0


def test_weights_are_near_the_models(rounded):
    for path, linear in block_linears(load_pipeline("tiny").transformer).items():
        layer = load_rounded_block(rounded, int(path.split(".")[1]))[path]
        back = grid.dequantize(mx.array(layer.codes), mx.array(layer.scale))
        difference = mx.linalg.norm(back - linear.weight) / mx.linalg.norm(linear.weight)
        assert difference.item() < 0.3


def test_rtn_is_nearest_rounding_on_absmax_scales(cache, tmp_path):
    folder = adaround_optimize(cache, tmp_path / "rtn", method="rtn", bits_w=3, group_size=32)
    for path, linear in block_linears(load_pipeline("tiny").transformer).items():
        layer = load_rounded_block(folder, int(path.split(".")[1]))[path]
        scale = grid.absmax_scale(linear.weight, 3, 32)
        assert np.array_equal(layer.scale, np.array(scale))
        assert np.array_equal(layer.codes, np.array(grid.nearest_codes(linear.weight, scale, 3)))


def test_finished_work_is_left_alone_and_other_settings_are_refused(cache, rounded, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(rounded, folder)
    (folder / "blocks/mm1.npz").unlink()
    before = {
        name: (folder / name).stat().st_mtime_ns for name in ("blocks/mm0.npz", "weights/mm0.npz")
    }
    adaround_optimize(cache, folder, **SMALL)
    assert contents(folder) == contents(rounded)
    assert before == {name: (folder / name).stat().st_mtime_ns for name in before}
    (folder / "weights/mm1.npz").unlink()  # refining is one unit of work
    adaround_optimize(cache, folder, **SMALL)
    assert contents(folder) == contents(rounded)
    assert (folder / "blocks/mm0.npz").stat().st_mtime_ns == before["blocks/mm0.npz"]
    with pytest.raises(UserError, match="bits_w.*4.*3|bits_w.*3.*4"):
        adaround_optimize(cache, folder, bits_w=3, **SMALL)
    assert contents(folder) == contents(rounded)
    adaround_optimize(cache, folder, bits_w=3, force=True, **SMALL)
    assert contents(folder) != contents(rounded)


def test_blocks_may_be_rounded_one_run_after_the_other(cache, rounded, tmp_path):
    for blocks in ("1", "0-1"):
        adaround_optimize(cache, tmp_path / "o", blocks=blocks, **SMALL)
    assert contents(tmp_path / "o") == contents(rounded)


def test_quantized_prefix_feeds_blocks_what_the_rounded_ones_give(cache, rounded, tmp_path):
    settings = {**SMALL, "prefix": "quantized", "refine": 0}
    folder = adaround_optimize(cache, tmp_path / "quantized", **settings)
    first, second = (contents(folder)[f"weights/mm{i}.npz"] for i in (0, 1))
    assert first == contents(rounded)["blocks/mm0.npz"]
    assert second != contents(rounded)["blocks/mm1.npz"]
    whole = contents(folder)
    (folder / "weights/mm1.npz").unlink()
    adaround_optimize(cache, folder, **settings)
    assert contents(folder) == whole


def test_smoothing_is_folded_in_and_recorded(cache, tmp_path):
    config = quant_config(cache)
    config.save(tmp_path / "quant_config.json")
    folder = adaround_optimize(
        cache, tmp_path / "o", quant_config=tmp_path / "quant_config.json", method="gptq"
    )
    recorded = read_json(folder / "config.json", "ditq-adaround", 1)["made_from"]
    assert recorded["smoothing_hash"] == config.smoothing_hash
    for path, linear in block_linears(load_pipeline("tiny").transformer).items():
        layer, own = load_rounded_block(folder, int(path.split(".")[1]))[path], config.layers[path]
        back = grid.dequantize(mx.array(layer.codes), mx.array(layer.scale))
        wanted = linear.weight * (1 if own.smoothing is None else mx.array(own.smoothing))
        assert (mx.linalg.norm(back - wanted) / mx.linalg.norm(wanted)).item() < 0.3
        assert (layer.smoothing is None) == (own.smoothing is None)
        assert layer.smoothing is None or np.array_equal(layer.smoothing, own.smoothing)
        assert layer.a_scale[0] == np.float32(own.scale[0])
        # The step between two measured ones takes the wider tier.
        assert layer.a_scale[1] < layer.a_scale[0] or own.scale[1] * 31 > own.scale[0] * 127


def test_quant_config_survives_saving_and_reading(cache, tmp_path):
    config = quant_config(cache)
    config.save(tmp_path / "q.json")
    back = QuantConfig.load(tmp_path / "q.json")
    assert back.sigmas == config.sigmas and back.step_keys == config.step_keys
    assert back.smoothing_hash == config.smoothing_hash
    assert quant_config(cache, smoothed=False).smoothing_hash != config.smoothing_hash
    for path, layer in config.layers.items():
        assert back.layers[path].bits == layer.bits and back.layers[path].scale == layer.scale
        for kind in ("shift", "smoothing"):
            ours, theirs = getattr(layer, kind), getattr(back.layers[path], kind)
            assert (ours is None) == (theirs is None)
            assert ours is None or np.array_equal(ours, theirs)
    first = bytes((tmp_path / "q.json").read_bytes())
    back.save(tmp_path / "q.json")
    assert (tmp_path / "q.json").read_bytes() == first


def test_any_sigma_finds_bits_and_a_scale(cache):
    config = quant_config(cache)
    path, high, low = next(iter(config.layers)), *config.sigmas
    own = config.layers[path]
    assert config.at(path, high) == (8, own.scale[0]) == config.at(path, 2 * high)
    assert config.at(path, low) == (6, own.scale[1]) == config.at(path, low / 2)
    bits, scale = config.at(path, (high * low) ** 0.5)
    assert bits == 8  # the wider of the two
    assert scale * 127 == pytest.approx((own.scale[0] * 127 * own.scale[1] * 31) ** 0.5)


def test_wrong_quant_configs_are_refused(cache, tmp_path):
    path, good = tmp_path / "quant_config.json", quant_config(cache)
    good.save(path)
    vectors = load_npz(path.with_suffix(".npz"))
    save_npz(path.with_suffix(".npz"), **{k: v + 1 for k, v in vectors.items()})
    with pytest.raises(UserError, match="quant_config.npz has sha256"):
        adaround_optimize(cache, tmp_path / "o", quant_config=path)
    other = {**good.made_from, "model_hash": "0" * 64}
    QuantConfig(other, good.step_keys, good.sigmas, good.layers).save(path)
    with pytest.raises(UserError, match="model_hash.*make it again for this model"):
        adaround_optimize(cache, tmp_path / "o", quant_config=path)
    fewer = dict(list(good.layers.items())[:-1])
    QuantConfig(good.made_from, good.step_keys, good.sigmas, fewer).save(path)
    with pytest.raises(UserError, match="has no layer"):
        adaround_optimize(cache, tmp_path / "o", quant_config=path)
    path.write_text(json.dumps({"format": "ditq-quant-config", "version": 1}))
    with pytest.raises(UserError, match="not a whole quantization config"):
        adaround_optimize(cache, tmp_path / "o", quant_config=path)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(
    cache, rounded, tmp_path
):
    folder = tmp_path / "o"
    command = [sys.executable, "-m", STAGE, *ARGUMENTS]
    command += ["--cache-dir", str(cache), "--output-dir", str(folder)]

    def same(folder: Path) -> None:
        assert contents(folder) == contents(rounded)

    assert kill_at_random_moments(command, folder, 8, check=same) >= 4
    assert start_quietly(command).wait() == 0
    same(folder)


@pytest.mark.slow
def test_ranks_make_the_same_files_as_one_process(cache, rounded, tmp_path):
    command = [STAGE, *ARGUMENTS, "--cache-dir", cache, "--output-dir", tmp_path / "o"]
    result = run_on_two_ranks(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    shared, alone = contents(tmp_path / "o"), contents(rounded)
    assert shared.keys() == alone.keys()
    assert all(shared[name] == alone[name] for name in alone if name.startswith("blocks/"))
    # Half the gradient from each rank: the same sum, but for its last bits.
    for index in range(2):
        for path, layer in load_rounded_block(rounded, index).items():
            other = load_rounded_block(tmp_path / "o", index)[path]
            assert np.mean(layer.codes != other.codes) < 0.001
            np.testing.assert_allclose(layer.scale, other.scale, rtol=1e-3)
    result = run_on_two_ranks(*command, "--prefix", "quantized", "--force")
    assert "every block waits for the one before it" in result.stdout + result.stderr


@pytest.mark.parametrize(
    "options, words",
    [
        (["--bits-w", "9"], ["--bits-w", "2 to 8", "9"]),
        (["--bits-a", "1"], ["--bits-a", "2 to 8", "1"]),
        (["--group-size", "48"], ["48", "0, 32, 64, 128"]),
        (["--group-size", "128"], ["128 does not divide 64", "k_proj"]),
        (["--method", "magic"], ["magic", "rtn", "ste"]),
        (["--prefix", "none"], ["none", "fp", "quantized"]),
        (["--iters", "-1"], ["--iters", "-1"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
        (["--lr", "0"], ["--lr", "0"]),
        (["--warmup", "1"], ["--warmup", "1"]),
        (["--b-range", "2", "20"], ["--b-range", "2.0 20.0"]),
        (["--blocks", "1-2"], ["--blocks 1-2", "0 to 1"]),
        (["--blocks", "x"], ["--blocks x", "0 to 1"]),
        (["--quant-config", "absent.json"], ["absent.json", "analyze_activations"]),
        (["--cache-dir", "absent"], ["absent", "cache_adaround_data"]),
        (["--model", "tiny-3.5-large"], ["tiny-3.5-large", "made the cache"]),
        (["--refine", "-1"], ["--refine", "-1"]),
        (["--calib-dir", "absent"], ["absent", "generate_calibration_data", "--refine 0"]),
        (["--activations-from", "2"], ["--activations-from", "0 to 1"]),
    ],
)
def test_a_mistake_is_one_error_line_and_changes_nothing(cache, options, words, tmp_path):
    where = [] if "--cache-dir" in options else ["--cache-dir", str(cache)]
    result = run_here(STAGE, *ARGUMENTS, *where, "--output-dir", "o", *options, cwd=tmp_path)
    assert_one_error_line(result, *words)
    assert contents(tmp_path) == {}


def test_damaged_caches_are_refused(cache, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(cache, folder)
    (folder / "samples/0001_002.npz").unlink()
    settings = {**SMALL, "calib_dir": cache.parent}
    with pytest.raises(UserError, match="0001_002.npz.*missing"):
        adaround_optimize(folder, tmp_path / "o", **settings)
    sample = load_npz(cache / "samples/0001_002.npz")
    sample["text_0"][0, 1, 2] = np.nan
    save_npz(folder / "samples/0001_002.npz", **sample)
    with pytest.raises(UserError, match="0001_002.npz.*text_0.*nan"):
        adaround_optimize(folder, tmp_path / "o", **settings)
    assert not list((tmp_path / "o").glob("weights/*"))


def test_rounding_that_learns_nothing_is_not_refused_for_what_learning_needs(
    cache, tmp_path, monkeypatch
):
    monkeypatch.setattr(planning, "memory_bytes", lambda: 10**5)
    needed = {}
    for method in ("gptq", "adaround"):
        with pytest.raises(UserError, match="of memory") as refused:
            adaround_optimize(cache, tmp_path / "o", **{**SMALL, "refine": 0, "method": method})
        needed[method] = float(re.search(r"about ([\d.]+) MB", str(refused.value))[1])
    assert needed["gptq"] < 0.8 * needed["adaround"]


def test_too_little_memory_is_refused_before_the_work(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "memory_bytes", lambda: 10**6)
    with pytest.raises(UserError, match="needs about .* MB of memory.*1.0 MB.*--batch-size"):
        adaround_optimize(cache, tmp_path / "o", **{**SMALL, "refine": 0})
    monkeypatch.setattr(planning, "memory_bytes", lambda: 10**6)
    with pytest.raises(UserError, match="--refine 8 needs about .* MB.*more GPUs.*--refine 0"):
        adaround_optimize(cache, tmp_path / "o", **SMALL)
    assert not (tmp_path / "o").exists()
