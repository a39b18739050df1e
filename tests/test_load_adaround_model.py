"""Inference with both tracks' results: what is drawn, compared and written, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from src.adaround_optimize import adaround_optimize
from src.analyze_activations import analyze_activations
from src.backends import staying_packed
from src.cache_adaround_data import cache_adaround_data
from src.collect_layer_activations import collect_layer_activations
from src.generate import generate
from src.generate_calibration_data import generate_calibration_data
from src.inference.compare import Request, draw, measure, weight_bytes
from src.inference.ladder import ladder
from src.inference.open import Settings, open_artifacts, open_quantized
from src.inference.residuals import Options, Work
from src.load_adaround_model import load_adaround_model
from src.metrics.fidelity import reference_trajectories, teacher_forced_sqnr
from src.models.load import load_pipeline
from src.models.prompts import load_prompts
from src.quant.artifacts import QuantConfig, block_file
from src.store import clear_folder

import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from .helpers import assert_one_error_line, relative_error, run, run_here
from .test_inject import FC2, SIGMAS, config_for, rounded_layers, velocity, write_folder

STAGE = "src.load_adaround_model"
PROMPTS = [
    "a large red star in the center on a night background",
    "a small blue ring at the top on a night background",
    "a large green drop on the left on a sand background",
]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline("tiny")


@pytest.fixture(scope="module")
def layers(pipeline):
    return rounded_layers(pipeline)


def identity(pipeline) -> dict[str, str]:
    return {"model": pipeline.name, "model_hash": pipeline.hash}


def with_smoothing(config: QuantConfig, path: str, columns: int) -> QuantConfig:
    smoothing = np.geomspace(0.5, 2, columns).astype(np.float32)
    smoothed = dataclasses.replace(config.layers[path], smoothing=smoothing)
    return dataclasses.replace(config, layers=config.layers | {path: smoothed})


@pytest.fixture
def work(tmp_path, pipeline, layers) -> Path:
    """A folder in which the stage finds the weights by itself, and a config under its own name."""
    write_folder(tmp_path / "adaround_output", pipeline, layers)
    config_for(layers, **identity(pipeline)).save(tmp_path / "config.json")
    return tmp_path


def stage(folder: Path, *arguments: str, steps: int = 2):
    return run_here(STAGE, "--num-steps", str(steps), *arguments, cwd=folder)


def succeed(folder: Path, *arguments: str, steps: int = 2):
    result = stage(folder, "--prompt", PROMPTS[0], *arguments, steps=steps)
    assert result.returncode == 0, result.stderr
    return result


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def notes(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("note: ")]


CONFIG = ["--quant-config", "config.json"]


def test_a_picture_is_drawn_and_the_same_seed_gives_the_same_bytes(work):
    result = succeed(work, *CONFIG, "--output-image", "a/one.png", steps=3)
    last = result.stdout.splitlines()[-1]
    assert last.startswith("W4A6-8 (7.0 bits): wrote a/one.png in ") and not notes(result)
    succeed(work, *CONFIG, "--output-image", "two.png", steps=3)
    succeed(work, *CONFIG, "--output-image", "seeded.png", "--seed", "1", steps=3)
    one, two, seeded = ((work / p).read_bytes() for p in ("a/one.png", "two.png", "seeded.png"))
    assert one == two != seeded
    with Image.open(work / "two.png") as picture:
        assert picture.size == (128, 128) and picture.text["prompt"] == PROMPTS[0]


def test_without_a_prompt_one_that_calibration_never_saw_is_drawn(work):
    result = stage(work, *CONFIG, "--output-image", "any.png")
    assert result.returncode == 0, result.stderr
    prompt = load_prompts("nano_evaluation")[0]
    assert stage(work, *CONFIG, "--prompt", prompt, "--output-image", "own.png").returncode == 0
    assert (work / "any.png").read_bytes() == (work / "own.png").read_bytes()


def test_the_ways_to_run_differ_from_each_other(work):
    ways = {
        "static": CONFIG,
        "token": [*CONFIG, "--a-scale", "token"],
        "weights": [*CONFIG, "--weights-only"],
        "modulation": [*CONFIG, "--modulation-bits", "8"],
        "reference": [*CONFIG, "--kernel", "reference"],
    }
    for name, arguments in ways.items():
        succeed(work, *arguments, "--output-image", f"{name}.png")
    found = {name: (work / f"{name}.png").read_bytes() for name in ways}
    assert found["reference"] == found["static"]
    assert len(set(found.values())) == len(ways) - 1


def test_weights_alone_say_what_they_run_as(work):
    result = succeed(work, "--output-image", "one.png")
    assert notes(result) == ["note: no quant config: activations stay in 16 bits (W4A16)"]
    assert result.stdout.startswith("W4A16: wrote one.png")
    (work / "calibration_data/activations").mkdir(parents=True)
    for suffix in ("json", "npz"):
        source = work / f"config.{suffix}"
        source.rename(work / f"calibration_data/activations/quant_config.{suffix}")
    assert succeed(work).stdout.startswith("W4A6-8 (7.0 bits): wrote quantized.png")
    assert succeed(work, "--quant-config", "none").stdout.startswith("W4A16")
    assert succeed(work, "--weights-only").stdout.startswith("W4A16")


def test_smoothing_that_was_not_folded_is_left_out_loudly(work, pipeline, layers):
    config = with_smoothing(config_for(layers, **identity(pipeline)), FC2, 256)
    config.save(work / "config.json")
    (note,) = notes(succeed(work, *CONFIG))
    assert "smoothing of 1 layers is left out" in note and FC2 in note


def test_weights_that_were_rounded_with_another_config_run_loudly(work, pipeline, layers):
    """Without it the smoothing stays as a divide; what their biases reckon with is not known."""
    config = with_smoothing(config_for(layers, **identity(pipeline)), FC2, 256)
    smoothing = config.layers[FC2].smoothing
    folded = dataclasses.replace(layers[FC2], smoothing=smoothing)
    rewrite(work, pipeline, layers | {FC2: folded}, quant_config_hash="ab" * 32)
    first, second = notes(succeed(work))
    assert "W4A16" in first and "abababababababab, which is not given" in second
    config.save(work / "config.json")
    (note,) = notes(succeed(work, *CONFIG))
    assert "were rounded with quant config abababababababab, this one is" in note
    config_for(layers, **identity(pipeline)).save(work / "config.json")
    assert_one_error_line(
        stage(work, "--prompt", PROMPTS[0], *CONFIG),
        f"{FC2} was rounded with a smoothing that is not the quant config's",
    )


def test_both_pictures_and_their_difference_are_written(work):
    succeed(work, *CONFIG, "--output-image", "p.png", "--compare")
    exact, own = (np.asarray(Image.open(work / name)) for name in ("p_16bit.png", "p.png"))
    assert exact.shape == own.shape == (128, 128, 3) and not np.array_equal(exact, own)
    sheet = np.asarray(Image.open(work / "p_compare.png")).astype(int)
    assert sheet.shape[1] == 8 + 3 * (256 + 8) and sheet.shape[0] > 8 + 256
    for place, picture in enumerate((exact, own)):
        twice = Image.fromarray(picture).resize((256, 256), Image.LANCZOS)
        left = 8 + place * 264
        np.testing.assert_array_equal(sheet[8:264, left : left + 256], np.asarray(twice))
    generate([PROMPTS[0]], work / "plain.png", model="tiny", num_steps=2)
    np.testing.assert_array_equal(exact, np.asarray(Image.open(work / "plain.png")))


def test_figures_of_one_prompt_are_printed(work):
    result = succeed(work, *CONFIG, "--diff-stats", steps=3)
    assert "p_16bit.png" not in names(work)
    for words in (
        "PSNR ",
        "SSIM ",
        "latent SQNR after every step",
        "velocity SQNR at every step",
        "SQNR of what leaves every block",
        "16-bit: weights ",
        "W4A6-8 (7.0 bits): weights ",
        "a step: 16-bit ",
    ):
        assert words in result.stdout, words
    assert "median" not in result.stdout


def test_a_list_of_prompts_gives_a_table(work):
    (work / "list.txt").write_text("\n".join(PROMPTS))
    result = stage(
        work, "--prompts", "list.txt", *CONFIG, "--diff-stats", "--output-image", "p.png"
    )
    assert result.returncode == 0, result.stderr
    assert {"p-0.png", "p-1.png", "p-2.png"} <= names(work)
    lines = result.stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["median", "worst"])
    assert [line.split("  ")[0] for line in lines[head + 1 : head + 4]] == [
        *("PSNR", "SSIM", "latent SQNR")
    ]
    psnrs = [float(line.split()[1]) for line in lines[:3]]
    median, worst = (float(x) for x in (lines[head + 1].split()[1], lines[head + 1].split()[3]))
    assert median == sorted(psnrs)[1] and worst == min(psnrs)


def test_a_prompt_is_drawn_alike_alone_and_in_a_list(work):
    done = load_adaround_model(
        PROMPTS[:2],
        work / "list.png",
        adaround_output=work / "adaround_output",
        quant_config=work / "config.json",
        num_steps=2,
    )
    assert [path.name for path in done.files] == ["list-0.png", "list-1.png"]
    alone = load_adaround_model(
        PROMPTS[1:2],
        work / "alone.png",
        adaround_output=work / "adaround_output",
        quant_config=work / "config.json",
        num_steps=2,
        seed=1,
    )
    assert done.files[1].read_bytes() == alone.files[0].read_bytes()


def test_the_report_holds_every_part(work):
    result = succeed(work, *CONFIG, "--report", "report")
    assert "report/report.html" in result.stdout
    page = (work / "report/report.html").read_text()
    for words in ("tiny at W4A6-8", "ours W4A16", "RTN W4A16", PROMPTS[0], "weights on disk"):
        assert words in page, words


def test_a_saved_model_draws_the_same_bytes(work):
    result = succeed(work, *CONFIG, "--output-image", "before.png", "--save", "model")
    assert result.stdout.splitlines()[-1].count("model") == 1
    generate([PROMPTS[0]], work / "after.png", model=str(work / "model"), num_steps=2)
    assert (work / "before.png").read_bytes() == (work / "after.png").read_bytes()
    assert_one_error_line(stage(work, *CONFIG, "--save", "model"), "--force")
    assert stage(work, *CONFIG, "--save", "model", "--force").returncode == 0


def test_low_memory_changes_no_byte(work):
    kernel = ["--kernel", staying_packed()]
    succeed(work, *CONFIG, *kernel, "--output-image", "held.png")
    succeed(work, *CONFIG, "--low-memory", "--output-image", "released.png")
    assert (work / "held.png").read_bytes() == (work / "released.png").read_bytes()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(work: Path, pipeline, layers, **how) -> None:
    clear_folder(work / "adaround_output", "ditq-adaround")
    write_folder(work / "adaround_output", pipeline, layers, **how)


def narrow_config(work: Path, pipeline, layers) -> None:
    """Measured at the first three noise levels only."""
    config = config_for(layers, **identity(pipeline))
    cut = {
        p: dataclasses.replace(c, bits=c.bits[:3], scale=c.scale[:3])
        for p, c in config.layers.items()
    }
    QuantConfig(config.made_from, [0, 1, 2], SIGMAS[:3], cut).save(work / "config.json")


def foreign_config(work: Path, pipeline, layers) -> None:
    config_for(layers, model="tiny", model_hash="0" * 64).save(work / "config.json")


def nowhere(work: Path, pipeline, layers) -> None:
    rewrite(work, pipeline, layers | {FC2.replace("fc2", "fc3"): layers[FC2]})


def mixed(work: Path, pipeline, layers) -> None:
    rewrite(work, pipeline, layers | {FC2: rounded_layers(pipeline, bits=8)[FC2]})


def incomplete(work: Path, pipeline, layers) -> None:
    rewrite(work, pipeline, {path: layer for path, layer in layers.items() if path != FC2})


def one_block(work: Path, pipeline, layers) -> None:
    rewrite(work, pipeline, layers, blocks=(0,))


def damaged(work: Path, pipeline, layers) -> None:
    damage(work / "adaround_output" / block_file(1))


def taken(work: Path, pipeline, layers) -> None:
    (work / "taken").mkdir()
    (work / "taken/thesis.txt").write_text("years of work")


BAD_ARTIFACTS = [
    (foreign_config, CONFIG, ["config.json", "model_hash"]),
    (narrow_config, CONFIG, ["sigma", "outside the calibrated range"]),
    (nowhere, CONFIG, ["no linear", "mlp.fc3"]),
    (incomplete, CONFIG, ["lacks 1 of the model's", FC2]),
    (mixed, CONFIG, ["mm0.npz", FC2, "4 bits of the other blocks"]),
    (one_block, CONFIG, ["lacks 1 of 2 blocks: mm1.npz"]),
    (damaged, CONFIG, ["mm1.npz", "was changed"]),
    (taken, [*CONFIG, "--save", "taken"], ["taken holds something else"]),
    (None, ["--adaround-output", "none"], ["no folder none", "adaround_optimize"]),
    (None, ["--adaround-output", "."], ["manifest.json", "adaround_optimize"]),
    (None, ["--quant-config", "nowhere.json"], ["nowhere.json", "analyze_activations"]),
    (None, ["--model", "tiny-3.5-medium"], ["model", "tiny", "give the model"]),
    (None, ["--model", "mona-lisa"], ["unknown model 'mona-lisa'"]),
]


@pytest.mark.parametrize(("spoil", "arguments", "words"), BAD_ARTIFACTS)
def test_artifacts_that_do_not_fit_are_refused_before_anything_is_written(
    work, pipeline, layers, spoil, arguments, words
):
    if spoil is not None:
        spoil(work, pipeline, layers)
    before = names(work)
    result = stage(work, "--prompt", PROMPTS[0], "--compare", *arguments, steps=4)
    assert_one_error_line(result, *words)
    assert names(work) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", PROMPTS[0], "--prompts", "nano"], ["exclude each other"]),
        (["--prompts", "missing.txt"], ["missing.txt does not exist"]),
        (["--prompt", "a purple elephant"], ["elephant"]),
        (["--prompt", PROMPTS[0], "--kernel", "fast"], ["unknown kernel 'fast'", "dense"]),
        (
            ["--prompt", PROMPTS[0], "--a-scale", "row"],
            ["unknown --a-scale 'row'", "static, token"],
        ),
        (["--prompt", PROMPTS[0], "--modulation-bits", "4"], ["--modulation-bits 4", "8 or 16"]),
        (["--prompt", PROMPTS[0], "--num-steps", "0"], ["steps"]),
        (["--prompt", PROMPTS[0], "--cfg-weight", "-1"], ["guidance weight"]),
        (["--prompt", PROMPTS[0], "--seed", "-1"], ["seed -1"]),
        (["--prompt", PROMPTS[0], "--output-image", "p.jpg"], ["p.jpg must end in .png"]),
        (["--prompt", PROMPTS[0], "--report", "config.json"], ["config.json"]),
        (["--prompt", PROMPTS[0], "--low-memory", "--kernel", "dense"], ["--low-memory", "dense"]),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(work, arguments, words):
    before = names(work)
    assert_one_error_line(stage(work, *CONFIG, *arguments), *words)
    assert names(work) == before


def test_the_sixteen_bit_model_is_at_hand_where_it_is_kept(work, pipeline):
    output = work / "adaround_output"
    artifacts = open_artifacts("tiny", output, work / "config.json", Settings(modulation_bits=8))
    exact = velocity(artifacts.pipeline, 0.5)
    quantized = artifacts.inject(keep=True)
    own = velocity(quantized.pipeline, 0.5)
    assert 1e-3 < relative_error(own, exact) < 0.5
    with quantized.sixteen_bit() as same:
        np.testing.assert_array_equal(velocity(same, 0.5), exact)
        held = weight_bytes(same.transformer)
    np.testing.assert_array_equal(velocity(quantized.pipeline, 0.5), own)
    assert weight_bytes(quantized.pipeline.transformer).disk < held.disk
    parameters = tree_flatten(pipeline.transformer.parameters())
    assert held.resident == sum(tensor.nbytes for _, tensor in parameters)


def test_the_python_function_opens_a_pipeline(work):
    quantized = open_quantized(
        None, work / "adaround_output", work / "config.json", a_scale="token", sigmas=SIGMAS
    )
    assert quantized.name == "W4A6-8 (7.0 bits)" and quantized.pipeline.name == "tiny"
    latent = quantized.pipeline.sample(PROMPTS[:1], [0], num_steps=2)
    assert np.all(np.isfinite(np.array(latent)))
    with pytest.raises(ValueError, match="were not kept"), quantized.sixteen_bit():
        pass


def test_the_ladder_leaves_the_model_as_it_was(work):
    artifacts = open_artifacts(None, work / "adaround_output", work / "config.json", Settings())
    reference = reference_trajectories(artifacts.pipeline, PROMPTS[:2], num_steps=4, stride=2)
    largest = dict.fromkeys(artifacts.config.layers, 8.0)
    rungs = ladder(artifacts, [reference], largest)
    assert [rung.name for rung in rungs] == [
        "RTN W4A8, one scale",
        "RTN W4A16",
        "ours W4A16",
        "ours W4A6-8 (7.0 bits) per token",
        "ours W4A6-8 (7.0 bits) static",
    ]
    assert all(rung.low <= rung.db <= rung.high for rung in rungs)
    # These weights are the nearest, so both rungs differ by the shift of fc2 only.
    assert rungs[1].db == pytest.approx(rungs[2].db, abs=0.2) and rungs[0].db < rungs[1].db
    assert np.all(teacher_forced_sqnr(artifacts.pipeline.transformer, reference) > 100)
    assert len(ladder(artifacts, [reference])) == 4


@pytest.mark.slow
def test_all_stages_end_in_a_comparison(tmp_path, monkeypatch):
    """Both tracks on nano, as little as they take, then the loader with everything at once."""
    monkeypatch.chdir(tmp_path)
    generate_calibration_data("nano", num_images=2, num_steps=6)
    cache_adaround_data(num_images=2, stride=2)
    collect_layer_activations(num_images=2, stride=1)
    config = analyze_activations(tiers=(8,), smooth="spikes", samples=2)
    adaround_optimize(method="rtn", quant_config=config)
    arguments = ["--prompts", "list.txt", "--num-steps", "6", "--compare", "--diff-stats"]
    Path("list.txt").write_text("\n".join(load_prompts("nano_evaluation")[:2]))
    result = run(STAGE, *arguments, "--report", "report", "--save", "model", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "note: " not in result.stderr and "W4A8: wrote quantized-0.png" in result.stdout
    psnrs = [float(line.split()[1]) for line in result.stdout.splitlines()[:2]]
    assert min(psnrs) > 15
    page = Path("report/report.html").read_text()
    for words in ("RTN W4A8, one scale", "ours W4A8 static", "ours W4A8 per token", "rtn"):
        assert words in page, words
    generate(load_prompts("nano_evaluation")[:1], "again.png", model="model", num_steps=6)
    assert Path("again.png").read_bytes() == Path("quantized-0.png").read_bytes()


def test_changes_are_quantized_and_the_model_is_saved_without(work):
    """What is drawn, measured and reported is modulated; what is saved is the layers alone."""
    options = ["--modulate", "--act-bit", "6", "--residual-scale", "token"]
    result = succeed(work, *options, "--diff-stats", "--report", "report", "--save", "saved")
    assert "modulation keeps" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith("W4A6 modulated: wrote quantized.png, report/report.html, saved (W4A16)")
    assert notes(result)[-1] == "note: saved without modulation: saved runs as W4A16"
    page = (work / "report" / "report.html").read_text()
    assert "W4A6 modulated" in page and "largest value" in page
    plain = succeed(work, "--weights-only", "--save", "plain", "--output-image", "plain.png")
    assert plain.returncode == 0
    saved, wanted = (
        (work / name / "model.safetensors").read_bytes() for name in ("saved", "plain")
    )
    assert saved == wanted
    cards = [(work / name / "README.md").read_text() for name in ("saved", "plain")]
    assert all("W4A16" in card and "modulated" not in card for card in cards)
    assert (work / "quantized.png").read_bytes() != (work / "plain.png").read_bytes()


def test_where_it_only_saves_nothing_is_measured_and_it_says_what_it_saves(work):
    """Neither scales nor what memory would have to hold: no picture is drawn on them."""
    result = stage(work, *CONFIG, "--modulate", "--scale-pictures", "100000000", "--save", "only")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith("W4A16: wrote only in ")
    assert notes(result) == [
        "note: saved without modulation: only runs as W4A16; the quant config's grids are not used "
        "there"
    ]
    result = stage(work, "--act-bit", "6", "--save", "values")
    assert notes(result) == ["note: saved without quantized inputs: values runs as W4A16"]
    assert all("W4A16" in (work / name / "README.md").read_text() for name in ("only", "values"))
    assert_one_error_line(stage(work, "--modulate", "fc9", "--save", "none"), "matches none of 21")


def test_blocks_are_measured_along_the_whole_way(work):
    """Static scales are those of changes from each step to the next: where steps between the
    measured ones were left out, changes would be clipped."""
    opened = open_artifacts("tiny", work / "adaround_output", None, Settings(weights_only=True))
    request = Request.of(opened.pipeline, PROMPTS[:1], 0, 12, None)
    way = draw(opened.pipeline, request, trails=1)[0].trail
    quantized = opened.inject(keep=True)
    steps = Work.of(quantized.pipeline, 12, request.cfg_weight)
    quantized = quantized.quantize_inputs(Options("all", 8, scale_pictures=1), steps, print)
    quantized.set_quant_state(weights=False)
    measured = measure(quantized, request, way)
    assert len(measured.traced) == 3
    assert min(measured.blocks["image"]) > 32  # dB; 28 where steps are left out


def test_modulation_that_cannot_be_is_one_line(work):
    for arguments, words in (
        (["--modulate", "--act-bit", "1"], ["--act-bit must be 2 to 8"]),
        (["--modulate", "auto"], ["needs --modulate-memory"]),
        (["--modulate", "fc9"], ["matches none of 21 layers"]),
        (["--residual-scale", "token"], ["is for --modulate or --act-bit"]),
        (["--weights-only", "--modulate"], ["--weights-only leaves inputs in 16 bits"]),
        (["--weights-only", "--act-bit", "4"], ["--weights-only leaves inputs in 16 bits"]),
        (["--a-scale", "token", "--act-bit", "8"], ["give --residual-scale token"]),
        (["--a-scale", "token", "--act-bit", "16"], ["--a-scale token", "leave it out"]),
    ):
        assert_one_error_line(stage(work, "--prompt", PROMPTS[0], *arguments), *words)
    assert not (work / "quantized.png").exists()


def test_a_quantized_model_can_be_switched_back_and_forth(work, pipeline):
    """Weights, inputs and changes, each on or off; off altogether it is the 16-bit model."""
    settings = Settings(weights_only=True)
    opened = open_artifacts("tiny", work / "adaround_output", work / "config.json", settings)
    wanted = pipeline.sample(PROMPTS[:1], [0], num_steps=2)
    quantized = opened.inject(keep=True)
    steps = Work.of(quantized.pipeline, 2, pipeline.defaults.cfg_weight)
    quantized = quantized.quantize_inputs(Options("all", 8, "token"), steps, print)

    def drawn(**state: bool) -> np.ndarray:
        quantized.set_quant_state(**state)
        return np.array(quantized.pipeline.sample(PROMPTS[:1], [0], num_steps=2))

    found = [drawn(), drawn(modulate=False), drawn(activations=False), drawn(weights=False)]
    assert all(
        relative_error(one, other) > 1e-4 for one, other in zip(found, found[1:], strict=False)
    )
    assert relative_error(drawn(weights=False, activations=False), wanted) < 1e-4
    with quantized.sixteen_bit() as exact:
        again = exact.sample(PROMPTS[:1], [0], num_steps=2)
    np.testing.assert_array_equal(np.array(again), np.array(wanted))
    np.testing.assert_array_equal(drawn(), found[0])
