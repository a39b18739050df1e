"""The second stage of the activation track: what it decides, writes, prints and refuses."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

from src.activation_track.plan import Plan, input_ranges
from src.analyze_activations import analyze_activations
from src.calibration.activations import ActivationStatistics
from src.calibration.sensitivity import Samples, spread_pairs
from src.calibration.statistics import collect
from src.calibration.trajectories import open_with_pipeline
from src.collect_layer_activations import collect_layer_activations
from src.errors import UserError
from src.generate_calibration_data import generate_calibration_data
from src.models.configs import config_named
from src.models.load import load_pipeline
from src.models.paths import block_linears, module_at
from src.models.synthetic import plant_offset, plant_outliers
from src.quant.artifacts import QuantConfig
from src.quant.clip import Regions
from src.quant.tiers import Thresholds
from src.store import load_npz, read_json, save_npz

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from .helpers import assert_one_error_line, random_inputs, random_model, run_here

pytestmark = pytest.mark.slow  # the stage as a whole, again and again

STAGE = "src.analyze_activations"
BLOCK = "multimodal_transformer_blocks.0.image_transformer_block"
FC2, FC1, QKV = f"{BLOCK}.mlp.fc2", f"{BLOCK}.mlp.fc1", f"{BLOCK}.attn.q_proj"
STEPS = [0, 2, 4]


@pytest.fixture(scope="module")
def stats(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    generate_calibration_data(
        calib_dir=folder, model="tiny", num_images=2, num_steps=5, batch_size=2
    )
    return collect_layer_activations(folder, num_images=2)


@pytest.fixture
def copy(stats, tmp_path) -> Path:
    shutil.copytree(stats.parent, tmp_path / "copy")
    return tmp_path / "copy/activations"


def plan_of(stats: Path, **changes) -> Plan:
    trajectories, pipeline = open_with_pipeline(stats.parent)
    read = ActivationStatistics.open(stats)
    samples = Samples.load(trajectories, pipeline, spread_pairs(2, read.step_keys, 3))
    settings = {"tiers": (4, 6, 8), "thresholds": Thresholds(), "segments": 3, **changes}
    return Plan(read, pipeline.transformer, samples, **settings)


@pytest.mark.parametrize("policy", ["thresholds", "error"])
def test_writes_a_config_of_every_linear_and_step(stats, tmp_path, policy):
    path = analyze_activations(stats, tmp_path, policy=policy, smooth="all")
    config = QuantConfig.load(path)
    assert set(config.layers) == set(block_linears(load_pipeline("tiny").transformer))
    assert config.step_keys == STEPS
    assert config.made_from["model"] == "tiny"
    for layer in config.layers.values():
        assert set(layer.bits) <= {4, 6, 8}
    assert config.layers[FC2].shift is not None or config.layers[FC2].coarse > 1
    for attention in ("image_transformer_block", "text_transformer_block"):
        q, k, v = (
            config.layers[f"multimodal_transformer_blocks.0.{attention}.attn.{name}_proj"]
            for name in "qkv"
        )
        assert q.bits == k.bits == v.bits and q.scale == k.scale == v.scale
    data = read_json(tmp_path / "layer_temporal_analysis.json")
    assert data["policy"] == policy
    for path, layer in data["layers"].items():
        assert layer["bits"] == config.layers[path].bits
        assert layer["scales"] <= 3 * 3
        assert (path in data["switchers"]) == (len(set(layer["bits"])) > 1)
        assert (path in data["always_a8"]) == (set(layer["bits"]) == {8})


def test_by_default_codes_off_gelu_fit_into_a_byte_and_only_what_folds_is_smoothed(stats, tmp_path):
    for tiers in ((8,), (4, 6)):
        config = QuantConfig.load(analyze_activations(stats, tmp_path, tiers=tiers))
        for path, layer in config.layers.items():
            regions = Regions(layer.coarse, layer.coarse_sides)
            if path.endswith("mlp.fc2"):
                assert layer.smoothing is None
            else:
                assert regions.largest_code(max(layer.bits)) <= 127
            assert (layer.plain_scale is None) == (layer.smoothing is None)
        assert any(layer.smoothing is not None for layer in config.layers.values())


def test_scales_without_smoothing_are_those_of_an_analysis_without_it(stats, tmp_path):
    settings = {"tiers": (8,), "two_regions": "none"}
    smoothed = QuantConfig.load(analyze_activations(stats, tmp_path / "a", **settings))
    plain = QuantConfig.load(analyze_activations(stats, tmp_path / "b", smooth="none", **settings))
    for path, layer in smoothed.layers.items():
        assert layer.unsmoothed().scale == plain.layers[path].scale


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(stats, tmp_path):
    for name in "ab":
        analyze_activations(stats, tmp_path / name, policy="error", plots=tmp_path / name)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert {"quant_config.json", "quant_config.npz", "ranges.png", "tiers.png"} <= set(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.slow
def test_plots_are_pictures_of_readme_width(stats, tmp_path):
    analyze_activations(stats, tmp_path, plots=tmp_path / "plots")
    pictures = sorted((tmp_path / "plots").iterdir())
    names = ["percentiles.png", "ranges.png", "tiers.png", "treatment.png"]
    assert [p.name for p in pictures] == names
    for picture in pictures:
        with Image.open(picture) as image:
            assert 800 <= image.width <= 1200
            assert len(image.convert("RGB").getcolors(2**24)) > 10


def test_the_summary_compares_both_policies_and_uniform_tiers(stats, tmp_path, capsys):
    analyze_activations(stats, tmp_path)
    printed = capsys.readouterr().out
    assert re.search(r"leave-one-out: 39 forwards .* about \d+ s", printed)
    for name in (r"thresholds \(chosen\)", "error", "uniform A8", "uniform A6"):
        assert re.search(rf"^{name} +\d\.\d\d +\d+\.\d dB$", printed, re.MULTILINE), printed
    assert "inputs smoothed" in printed and "scales needed" in printed


def test_a_fixed_tier_is_fixed_everywhere(stats, tmp_path):
    config = QuantConfig.load(analyze_activations(stats, tmp_path, tiers=(8,)))
    assert {bits for layer in config.layers.values() for bits in layer.bits} == {8}


def test_budgets_are_met_and_more_bits_mean_less_error(stats):
    plan = plan_of(stats)
    effects = plan.leave_one_out(lambda: None)
    reached = []
    for budget in (4.0, 5.0, 6.5, 8.0):
        bits = plan.by_error(effects, budget, None)
        assert plan.average_bits(bits) <= budget
        reached.append(plan.measure(bits))
    assert reached == sorted(reached)
    assert plan.measure(plan.by_error(effects, 6.0, None)) > plan.measure(plan.uniform(6))
    few, many = (plan.by_error(effects, None, sqnr) for sqnr in (12.0, 22.0))
    assert plan.average_bits(few) < plan.average_bits(many)
    # Effects of single layers add up well enough to aim with.
    assert plan.measure(many) == pytest.approx(22.0, abs=3.0)


def test_leave_one_out_is_what_quantizing_that_input_alone_does(stats):
    plan = plan_of(stats)
    effects = plan.leave_one_out(lambda: None)
    assert all(found.shape == (3, 3) for found in effects.values())
    for found in effects.values():
        assert (found[0].mean() > found[1].mean() > found[2].mean() > 0).all()
    linear = module_at(plan.model, FC2)
    assert type(linear).__name__ == "Linear"  # the model is as it was


@pytest.mark.parametrize("path, channels", [(FC2, [7, 90]), (FC1, [3]), (QKV, [11])])
def test_planted_outliers_are_found_exactly_and_smoothing_wins_their_error_back(path, channels):
    """The same model with and without planted channels, uniform A6, weights at 16 bits."""
    # Wide enough that two channels are less than 1%, beneath p99.
    model = random_model(replace(config_named("tiny"), hidden=256, heads=4))
    clean = plan_in_memory(model)
    before = error(clean)
    assert clean.spiked() == []
    plant_outliers(model, path, channels, 60.0)
    plan = plan_in_memory(model)
    assert plan.spiked() == [path]
    caused = error(plan)
    assert caused > 1.5 * before
    del plan.tables
    plan.search_smoothing(plan.spiked())
    assert plan.smoothed == [path]
    assert caused - error(plan) >= 0.9 * (caused - before)


def error(plan: Plan) -> float:
    return 10 ** (-plan.measure(plan.uniform(6)) / 10)


def plan_in_memory(model) -> Plan:
    """Two images at three steps, with guidance."""
    sigmas, rows = {0: 1.0, 1: 0.7, 2: 0.3}, random_inputs(model.config, 8, 8, batch=4)
    inputs = {step: (*rows, mx.full((4,), 1000 * sigma)) for step, sigma in sigmas.items()}
    found = {step: collect(model, batch, 2) for step, batch in inputs.items()}
    mixed = mx.array([1000.0, 300.0] * 2)
    samples = Samples.of(model, [(0, 0), (1, 2)], (*rows, mixed), 4.0)
    statistics = ActivationStatistics.of(model, sigmas, found)
    return Plan(statistics, model, samples, (4, 6, 8), Thresholds(), 3)


def test_a_planted_offset_is_taken_out_by_the_shift():
    model = random_model(config_named("tiny"))
    plant_offset(model, FC2, [5, 9], 150.0)
    plan = plan_in_memory(model)
    found = plan.statistics.inputs[FC2]
    assert found.absmax.max() > 140 and found.shift[:, 5].min() > 140
    assert all(r.absmax < 12 for r in plan.ranges[FC2])
    assert plan.measure(plan.uniform(8)) > 25


def test_ranges_of_post_gelu_inputs_are_those_after_the_shift(stats):
    read = ActivationStatistics.open(stats).inputs[FC2]
    (first, *_) = input_ranges(read)
    centred = np.maximum(read.shift[0] - read.minimum[0], read.maximum[0] - read.shift[0])
    assert first.shifted and first.absmax == pytest.approx(centred.max())
    assert first.absmax < read.absmax[0].max()


def test_spread_pairs_cover_the_schedule_and_the_images():
    assert spread_pairs(2, [0, 2, 4, 6], 4) == [(1, 0), (0, 2), (1, 4), (0, 6)]
    assert spread_pairs(5, [0, 2, 4, 6], 1) == [(4, 4)]
    assert len(spread_pairs(1, [0], 3)) == 3


def test_statistics_of_a_single_image_and_step_are_enough(tmp_path):
    generate_calibration_data(calib_dir=tmp_path, model="tiny", num_images=1, num_steps=1)
    folder = collect_layer_activations(tmp_path, num_images=1, stride=1)
    config = QuantConfig.load(analyze_activations(folder, samples=1))
    assert config.step_keys == [0]


def change_all(folder: Path, step: int, change) -> None:
    """Writes one step's statistics anew; the manifest goes along, as after another run."""
    path = folder / f"timestep_stats/step_{step}.npz"
    arrays = load_npz(path)
    change(arrays)
    save_npz(path, **arrays)


def test_all_zero_channels_and_inputs_are_quantized_to_zero(copy):
    """An input that was never anything but zero gets a scale, and codes of 0."""

    def silence(arrays):
        for name in arrays:
            if name.startswith(FC2):
                arrays[name] = np.zeros_like(arrays[name])

    for step in STEPS:
        change_all(copy, step, silence)
    config = QuantConfig.load(analyze_activations(copy))
    assert config.layers[FC2].bits == [4, 4, 4]
    assert all(0 < scale < 1e-6 for scale in config.layers[FC2].scale)
    shift = config.layers[FC2].shift
    assert shift is None or (shift == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(copy, value):
    def spoil(arrays):
        arrays[f"{FC2}__maximum"][3] = value

    change_all(copy, 2, spoil)
    with pytest.raises(UserError, match=r"step_2\.npz.*fc2__maximum.*only finite"):
        analyze_activations(copy)


def test_missing_steps_and_truncated_files_are_named(copy):
    path = copy / "timestep_stats/step_4.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(UserError, match=r"step_4\.npz"):
        analyze_activations(copy)
    path.unlink()
    with pytest.raises(UserError, match=r"step_4\.npz.*missing"):
        analyze_activations(copy)


def test_statistics_of_another_model_or_calibration_are_refused(stats, tmp_path):
    other = tmp_path / "other"
    generate_calibration_data(calib_dir=other, model="tiny", num_images=1, num_steps=3)
    with pytest.raises(UserError, match="calibration_hash"):
        analyze_activations(stats, tmp_path, calib_dir=other)
    with pytest.raises(UserError, match="tiny-3.5-large"):
        analyze_activations(stats, tmp_path, model="tiny-3.5-large")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--policy", "best"], ["--policy 'best'", "thresholds, error"]),
        (["--smooth", "some"], ["--smooth 'some'", "spikes"]),
        (["--two-regions", "some"], ["--two-regions 'some'", "post-gelu"]),
        (["--tiers", "4;6"], ["--tiers '4;6'"]),
        (["--tiers", "4,12"], ["--tiers", "12"]),
        (["--segments", "0"], ["--segments 0"]),
        (["--samples", "0"], ["--samples 0"]),
        (["--a4-below", "12"], ["out of order", "--a4-below 12.0", "--a6-below 10.0"]),
        (["--average-bits", "3"], ["--average-bits 3.0", "lowest tier, 4"]),
        (["--stats", "absent"], ["absent", "collect_layer_activations"]),
    ],
)
def test_a_mistake_is_one_error_line_and_writes_nothing(options, words, stats, tmp_path):
    folder = [] if "--stats" in options else ["--stats", str(stats)]
    result = run_here(STAGE, *folder, "--output", str(tmp_path / "out"), *options, cwd=tmp_path)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    result.stderr = "\n".join(lines)  # a progress bar may stand before it
    assert_one_error_line(result, *words)
    assert not (tmp_path / "out").exists()


def test_simulated_models_leave_no_trace(stats):
    plan = plan_of(stats)
    latent, text, pooled, timestep = plan.samples.inputs
    before = np.array(plan.model(latent, text, pooled, timestep))
    plan.measure(plan.uniform(4))
    assert np.array_equal(np.array(plan.model(latent, text, pooled, timestep)), before)
    assert mx.isfinite(plan.samples.wanted).all().item()
