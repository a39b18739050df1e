"""Mass sampling: what is kept, that it goes on after a kill and over ranks, what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from src import cli
from src.evaluation.networks import ScorerNetwork
from src.inference.residual_options import Inputs
from src.inference.residuals import Work
from src.mass_sampling.plan import Plan, Subject
from src.mass_sampling.work import kept_latents
from src.models.load import load_pipeline
from src.models.sd3_text import SD3TextEncoder, Text
from src.sample import sample
from src.store import load_npz, read_manifest

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from .helpers import (
    ROOT,
    assert_one_error_line,
    contents,
    kill_at_random_moments,
    run,
    run_here,
    run_on_two_ranks,
)
from .test_inject import config_for, rounded_layers, write_folder

STAGE = "src.sample"
SMALL = ["--timesteps", "3", "--num-samples", "5", "--batch-size", "2"]
MODULATED = ["--modulate", "--act-bit", "6", "--weight-bit", "4"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder in which the stage finds tiny's rounded weights and a quant config."""
    folder, pipeline = tmp_path_factory.mktemp("work"), load_pipeline("tiny")
    layers = rounded_layers(pipeline)
    write_folder(folder / "adaround_output", pipeline, layers)
    config = config_for(layers, model=pipeline.name, model_hash=pipeline.hash)
    config.save(folder / "calibration_data" / "activations" / "quant_config.json")
    return folder


def stage(folder: Path, output: str, *arguments: str):
    return run_here(STAGE, "--output-dir", output, *SMALL, *arguments, cwd=folder)


@pytest.fixture(scope="module")
def undisturbed(work) -> Path:
    result = stage(work, "whole", *MODULATED)
    assert result.returncode == 0, result.stderr
    return work / "whole"


def test_every_picture_is_there_with_what_made_it(undisturbed, work):
    found = contents(undisturbed)
    pictures = {f"pictures/{i:05d}.png" for i in range(5)}
    assert set(found) == pictures | {"residual_scales.json", "manifest.json"}
    manifest = read_manifest(undisturbed, "ditq-samples", 1, verify=True)
    assert manifest["settings"]["inputs"]["modulate"] == "all"
    assert set(manifest["made_from"]) == {"model_hash", "adaround_hash", "quant_config_hash"}
    with Image.open(undisturbed / "pictures/00004.png") as picture:
        assert picture.size == (128, 128) and picture.info["seed"] == "4"
    scales = json.loads((undisturbed / "residual_scales.json").read_text())
    assert all(len(found) == 3 for found in scales["scales"].values())


def test_the_same_command_goes_on_and_ends_the_same(undisturbed, work):
    before = contents(undisturbed)
    (undisturbed / "pictures/00003.png").unlink()
    assert stage(work, "whole", *MODULATED).returncode == 0
    assert contents(undisturbed) == before


def test_a_checkpoint_in_the_environment_is_that_where_no_artifacts_say(work, monkeypatch):
    """Artifacts of another model leave it; without them nothing but it names a model."""
    monkeypatch.setenv("DITQ_CHECKPOINT", "absent.safetensors")
    result = stage(work, "none", "--weight-bit", "16")
    assert_one_error_line(result, "absent.safetensors does not exist")
    result = stage(work, "named", "--model", "tiny", "--weight-bit", "16")
    assert result.returncode == 0, result.stderr
    result = stage(work, "rounded", "--weight-bit", "4", "--timesteps", "2")
    assert result.returncode == 0, result.stderr


def test_a_run_that_is_stopped_keeps_what_is_whole(work, tmp_path):
    """And the next one goes on to the same bytes."""
    source, few = work / "adaround_output", {"timesteps": 2, "num_samples": 5, "batch_size": 2}
    told = {"adaround_output": source, "quant_config": "none", "inputs": Inputs(act_bit=16)}
    sample(tmp_path / "whole", **told, **few)
    sample(tmp_path / "parts", go_on=lambda batch: batch.start < 2, **told, **few)
    assert set(contents(tmp_path / "parts")) >= {f"pictures/{i:05d}.png" for i in range(2)}
    assert not (tmp_path / "parts/pictures/00002.png").exists()
    sample(tmp_path / "parts", **told, **few)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(undisturbed, work):
    wanted = contents(undisturbed)

    def check(folder: Path) -> None:
        assert contents(folder) == wanted

    command = [sys.executable, "-m", STAGE, "--output-dir", str(work / "killed"), *SMALL]
    command += [*MODULATED, "--adaround-output", str(work / "adaround_output"), "--quant-config"]
    command += [str(work / "calibration_data" / "activations" / "quant_config.json")]
    assert kill_at_random_moments(command, work / "killed", 6, check=check, earliest=0.5)


@pytest.mark.slow
def test_two_ranks_give_the_files_of_one(undisturbed, work):
    options = ["--backend", "ring", "--cwd", work, "--env", f"PYTHONPATH={ROOT}"]
    command = [STAGE, "--output-dir", "ranks", *SMALL, *MODULATED]
    done = run_on_two_ranks(*command, options=options)
    assert done.returncode == 0, done.stderr
    assert contents(work / "ranks") == contents(undisturbed)


@pytest.mark.slow
def test_it_runs_as_a_users_process(work):
    arguments = ["--output-dir", "process", *SMALL, "--num-samples", "2", "--weight-bit", "16"]
    result = run(STAGE, *arguments, "--model", "tiny", cwd=work)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("2 samples are in process, ")


@pytest.mark.slow
def test_inputs_are_quantized_as_told(work):
    """Nothing, the track's own grid, values, changes: four different pictures."""
    ways = {
        "floats": ["--act-bit", "16"],
        "track": [],
        "values": ["--act-bit", "6", "--residual-scale", "token"],
        "changes": ["--act-bit", "6", "--residual-scale", "token", "--modulate", "fc2"],
    }
    drawn = set()
    for name, arguments in ways.items():
        result = stage(work, name, *arguments)
        assert result.returncode == 0, result.stderr
        drawn.add((work / name / "pictures/00000.png").read_bytes())
    assert len(drawn) == 4
    choice = json.loads((work / "changes" / "residual_scales.json").read_text())
    assert choice["scales"] is None and len(choice["layers"]) == 3


@pytest.mark.slow
def test_features_alone_tell_what_the_pictures_would(tmp_path):
    """nano's scorer reads pictures of nano's size; latents of the first ones are kept beside."""
    eyes, batches = ScorerNetwork(), [range(0, 2), range(2, 4)]
    folder = sample(
        tmp_path / "both",
        model="nano",
        weight_bit=16,
        timesteps=2,
        num_samples=4,
        batch_size=2,
        keep="both",
        keep_latents=3,
    )
    shown = []
    for index in range(4):
        with Image.open(folder / f"pictures/{index:05d}.png") as picture:
            shown.append(np.asarray(picture))
    wanted = np.concatenate([eyes(np.stack(shown[b.start : b.stop])).pooled for b in batches])
    stored = [load_npz(folder / f"features/{b.start:05d}.npz")["pooled"] for b in batches]
    np.testing.assert_array_equal(np.concatenate(stored), wanted)
    assert kept_latents(folder, batches).shape == (3, 16, 16, 16)
    arrays = load_npz(folder / "statistics.npz")
    np.testing.assert_allclose(arrays["mu"], wanted.mean(axis=0), rtol=1e-5)
    assert arrays["count"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--act-bit", "1"], ["--act-bit must be 2 to 8, got 1"]),
        (["--act-bit", "16", "--modulate"], ["nothing to modulate"]),
        (["--modulate-memory", "1"], ["is for --modulate"]),
        (["--modulate", "auto"], ["needs --modulate-memory"]),
        (["--modulate", "nothing"], ["'nothing' matches none of 21 layers"]),
        (["--modulate", "--modulate-memory", "1e-6"], ["draw fewer pictures at once"]),
        (
            ["--modulate", "--residual-scale", "row"],
            ["static, tensor, token, range, guidance, channel"],
        ),
        (["--modulate", "--rest-bit", "8"], ["for the layers that --modulate auto leaves"]),
        (["--rest-scale", "token"], ["for the layers that --modulate auto leaves"]),
        (["--weight-bit", "8"], ["weights of 4 bits, not 8", "--bits-w 8"]),
        (["--weight-bit", "1"], ["--weight-bit 1 is not possible; valid: 2 to 8, or 16"]),
        (["--modulate", "--modulate-memory", "inf"], ["must be above 0 GB, got inf"]),
        (["--modulate", "auto", "--modulate-memory", "1e-9"], ["no layer fits"]),
        (
            ["--modulate", "auto", "--modulate-memory", "1", "--timesteps", "1"],
            ["one step has none; draw in more"],
        ),
        (["--keep", "all"], ["unknown --keep 'all'"]),
        (["--keep-latents", "2"], ["give --keep features or both"]),
        (["--inception", "weights.npz"], ["--inception is for features"]),
        (["--keep", "features", "--inception", "weights.npz"], ["weights.npz"]),
        (["--num-samples", "0"], ["--num-samples must be at least 1"]),
        (["--timesteps", "0"], ["number of steps must be at least 1"]),
        (["--dtype", "int8"], ["--dtype int8 is unknown; valid: float16, float32"]),
        (["--seed", "-1"], ["seed -1 is out of range"]),
        # What no model could give is said before one is looked for.
        (["--adaround-output", "nowhere", "--keep", "all"], ["unknown --keep 'all'"]),
        (["--adaround-output", "nowhere", "--batch-size", "0"], ["--batch-size must be at least"]),
        (["--adaround-output", "nowhere"], ["no folder nowhere"]),
    ],
)
def test_what_cannot_be_is_one_line(work, arguments, words):
    assert_one_error_line(stage(work, "refused", *arguments), *words)
    assert not (work / "refused" / "manifest.json").exists()


def test_modulation_that_memory_has_no_room_for_is_refused_before_the_folder_is_begun(
    work, monkeypatch
):
    """So that the same command with fewer pictures at once may fill it."""
    dynamic = [*MODULATED, "--residual-scale", "token"]
    monkeypatch.setattr(cli, "memory_bytes", lambda: 10**6)
    words = ["2 pictures at once", "this machine has 1.0 MB", "a smaller --batch-size"]
    assert_one_error_line(stage(work, "large", *dynamic), *words)
    auto = [*dynamic, "--modulate", "auto", "--modulate-memory", "5"]
    assert_one_error_line(stage(work, "large", *auto), "--modulate-memory 5.0 GB lets modulation")
    assert not (work / "large" / "manifest.json").exists()


def test_a_folder_of_other_work_is_left_alone(undisturbed, work):
    before = contents(undisturbed)
    assert_one_error_line(stage(work, "whole", "--act-bit", "4"), "--force")
    assert contents(undisturbed) == before


@pytest.mark.parametrize("other", [["--act-bit", "16"], ["--kernel", "reference"]])
def test_the_same_weights_that_run_otherwise_are_other_work(work, other):
    """Neither shows in how wrappers quantize inputs: there are none."""
    output, few = f"runs{other[0]}", ["--num-samples", "1", "--timesteps", "1"]
    assert stage(work, output, *few).returncode == 0
    before = contents(work / output)
    assert_one_error_line(stage(work, output, *few, *other), "--force")
    assert contents(work / output) == before


def test_what_reads_the_prompts_is_part_of_the_work():
    """Pictures that T5 had no part in are not gone on with by a run in which it has."""
    found = []
    for text in (Text(), Text(t5=False), Text(bits=8)):
        pipeline = replace(
            load_pipeline("tiny"), encode_text=SD3TextEncoder(None, mx.float32, text)
        )
        subject = Subject(pipeline, None, 16, {}, [], {})
        work = Work.of(pipeline, 1, 0.0)
        found.append(Plan(subject, None, work, ["a"], [0], "pictures", 0, None).settings())
    assert found[0] != found[1] != found[2] != found[0]


def test_scales_that_were_lost_are_measured_again(undisturbed, work):
    before = contents(undisturbed)
    (undisturbed / "residual_scales.json").unlink()
    (undisturbed / "pictures/00000.png").unlink()
    assert stage(work, "whole", *MODULATED).returncode == 0
    assert contents(undisturbed) == before
