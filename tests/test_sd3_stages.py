"""The stages on a tiny Stable Diffusion 3, and the folders that they save."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

from src.errors import UserError
from src.evaluate import beside, open_against, own_reference
from src.evaluation.sources import Order
from src.generate_calibration_data import generate_calibration_data
from src.inference.export import save_model
from src.inference.int8 import Int8
from src.inference.saved import load_saved, open_pipeline
from src.models.load import ModelChoice, load_pipeline
from src.models.sd3 import Reading
from src.models.sd3_text import Text

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from .helpers import ROOT, assert_one_error_line, run_here
from .quantized_models import quantized_pipeline
from .test_docs import shell_lines

pytestmark = [pytest.mark.sd3, pytest.mark.slow, pytest.mark.usefixtures("offline")]

PROMPT = "a cat on the mat"
SIZE = {"height": 64, "width": 64}


def stage(name: str, folder: Path, *options: str) -> str:
    result = run_here(f"src.{name}", *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def worked(tiny, tmp_path_factory) -> Path:
    """A folder in which both tracks have run, and whose model is saved."""
    folder = tmp_path_factory.mktemp("worked")
    given = ("--checkpoint", str(tiny.diffusers("sd3-medium")))
    size = ("--height", "64", "--width", "64")
    stage(
        *("generate_calibration_data", folder, *given, *size),
        *("--num-images", "2", "--num-steps", "4"),
    )
    stage("collect_layer_activations", folder, *given, "--num-images", "2", "--stride", "1")
    stage("analyze_activations", folder, *given)
    stage("cache_adaround_data", folder, *given, "--num-images", "2", "--stride", "2")
    stage(
        *("adaround_optimize", folder, *given, "--method", "gptq", "--refine", "0"),
        *("--quant-config", "calibration_data/activations/quant_config.json"),
    )
    stage(
        *("load_adaround_model", folder, *given, *size, "--prompt", PROMPT, "--num-steps", "4"),
        *("--save", "saved", "--quantize-text-encoders", "8"),
    )
    return folder


def test_all_stages_run(worked):
    drawn = np.array(Image.open(worked / "quantized.png"))
    assert drawn.shape == (64, 64, 3) and drawn.std() > 20
    manifest = json.loads((worked / "calibration_data" / "manifest.json").read_text())
    assert manifest["made_from"]["model"] == "sd3-medium"
    assert manifest["settings"]["text_encoders"] == {"t5": True, "bits": 16}


def test_the_pages_recipe_draws_a_w4a8_picture(tiny, tmp_path, monkeypatch):
    """Word by word, but for the pictures' size."""
    monkeypatch.setenv("DITQ_CHECKPOINT", str(tiny.diffusers("sd3-medium")))
    said = ""
    for line in shell_lines(ROOT / "docs" / "sd3.md"):
        words = shlex.split(line.replace(" 512", " 64"))
        if words[:2] == ["python", "-m"] and words[2] != "src.doctor":
            said += stage(words[2].removeprefix("src."), tmp_path, *words[3:])
        elif words[:2] == ["ditq", "generate"] and "sd3-w4a8" in words:
            said += stage("generate", tmp_path, *words[2:])
    assert "W4A8" in said and "relative error" in said
    assert {path.name for path in tmp_path.glob("*.png")} == {"picture.png", "quantized.png"}


def test_every_text_encoder_is_read_once_for_all_images(tiny, tmp_path, monkeypatch):
    """T5 is the largest of all parts; batches are as they were when it was read for each."""
    read, original = [], Reading._read

    def noting(self, mapping, kind):
        read.append(kind.__name__)
        return original(self, mapping, kind)

    monkeypatch.setattr(Reading, "_read", noting)
    model = ModelChoice("sd3-medium", tiny.diffusers("sd3-medium"))
    options = {"num_images": 3, "num_steps": 2, "batch_size": 2, "prompts": None, **SIZE}
    folder = generate_calibration_data(model, tmp_path / "data", **options)
    assert read == ["ClipShape", "ClipShape", "T5Shape"]
    pipeline = load_pipeline(model)
    for images in ([0, 1], [2]):
        prompts = json.loads((folder / "manifest.json").read_text())["settings"]["prompts"]
        wanted = pipeline.condition([prompts[image] for image in images], 7.5)
        for row, image in enumerate(images):
            with np.load(folder / "conditioning" / f"{image:04d}.npz") as stored:
                assert np.array_equal(stored["text"], wanted.text[row])
                assert np.array_equal(stored["negative_pooled"], wanted.pooled[len(images) + row])


def test_a_saved_model_has_one_component_in_memory_too(worked):
    pipeline = open_pipeline(str(worked / "saved"), kernel="quantized_matmul")
    transformer = sum(t.nbytes for _, t in tree_flatten(pipeline.transformer.parameters()))
    mx.clear_cache()
    base = mx.get_active_memory()
    conditioning = pipeline.condition([PROMPT], 5.0)
    kept = conditioning.text.nbytes + conditioning.pooled.nbytes
    assert mx.get_active_memory() - base < kept + 0.1 * transformer, "nothing is read yet"


def test_going_on_with_other_text_encoders_is_refused(worked, tiny):
    given = ("--checkpoint", str(tiny.diffusers("sd3-medium")), "--no-t5")
    size = ("--height", "64", "--width", "64", "--num-images", "2", "--num-steps", "4")
    result = run_here("src.generate_calibration_data", *given, *size, cwd=worked)
    assert_one_error_line(result, "t5")


def test_a_saved_model_is_evaluated_against_the_checkpoints_own(worked, tiny):
    """The 16-bit one comes from the same checkpoint, and draws at the same size."""
    checkpoint = tiny.diffusers("sd3-medium")
    order = Order(num_images=1, num_steps=1)
    found = order.open(ModelChoice(str(worked / "saved"), checkpoint), 0)
    reference = beside(own_reference(found), found.model)
    other = open_against(reference, None, order, found, 0)
    assert other.pipeline.hash == load_pipeline(None, checkpoint=checkpoint).hash
    assert other.size == found.size == (64, 64)


def test_a_saved_folder_draws_the_same_by_itself(worked):
    names = {path.name for path in (worked / "saved").iterdir()}
    assert {"transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"} <= names
    stage(
        *("generate", worked, "--model", "saved", "--prompt", PROMPT, "--steps", "4"),
        *("--height", "64", "--width", "64", "--output", "again.png"),
    )
    first, again = (
        np.array(Image.open(worked / name)).astype(int) for name in ("quantized.png", "again.png")
    )
    assert np.abs(first - again).max() <= 2


def test_a_saved_folders_own_parts_come_before_a_checkpoint_for_all_commands(worked, tiny):
    saved, checkpoint = str(worked / "saved"), tiny.diffusers("sd3-medium")
    for_all = load_saved(ModelChoice(saved, checkpoint, for_all=True))
    assert for_all.encode_text.location("clip_l").path == worked / "saved" / "text_encoder"
    named = load_saved(ModelChoice(saved, checkpoint))
    assert named.encode_text.location("clip_l").path == checkpoint / "text_encoder"
    with pytest.raises(UserError, match="is sd3.5-medium, and .*saved.* was made from sd3-medium"):
        load_saved(ModelChoice(saved, tiny.diffusers("sd3.5-medium")))


def test_other_bits_than_the_stored_ones_are_refused(worked):
    given = ("--model", "saved", "--prompt", PROMPT, "--quantize-text-encoders", "4")
    assert_one_error_line(run_here("src.generate", *given, cwd=worked), "8 bits", "4")


FEW = ("--prompt", PROMPT, "--height", "64", "--width", "64", "--steps", "2")


def test_a_saved_folder_goes_without_t5_where_it_has_none(tiny, tmp_path):
    choice = ModelChoice(None, tiny.single_file("sd3-medium"), Text(t5=False))
    save_model(quantized_pipeline(choice), tmp_path / "saved")
    stage("generate", tmp_path, "--model", "saved", *FEW)
    result = run_here("src.generate", "--model", "saved", "--t5", *FEW, cwd=tmp_path)
    assert_one_error_line(result, "saved has no T5 text encoder", "--checkpoint", "--no-t5")


def test_a_saved_folder_that_has_lost_t5_says_so(worked, tmp_path):
    folder = tmp_path / "saved"
    shutil.copytree(worked / "saved", folder)
    shutil.rmtree(folder / "text_encoder_3")
    given = ("--model", str(folder), *FEW)
    result = run_here("src.generate", *given, cwd=tmp_path)
    assert_one_error_line(result, "has no T5 text encoder", "text_encoder_3", "--no-t5")
    stage("generate", tmp_path, *given, "--no-t5")
    settings = folder / "transformer" / "config.json"
    config = json.loads(settings.read_text())
    assert config["ditq"].pop("t5") is True
    settings.write_text(json.dumps(config))
    stage("generate", tmp_path, *given)  # as a folder that does not tell
    settings.write_text(json.dumps({**config, "ditq": {**config["ditq"], "t5": "yes"}}))
    assert_one_error_line(run_here("src.generate", *given, cwd=tmp_path), "config.json is damaged")


def test_artifacts_of_another_variant_are_refused(worked, tiny):
    given = ("--checkpoint", str(tiny.single_file("sd3.5-large")))
    result = run_here("src.load_adaround_model", *given, "--prompt", PROMPT, cwd=worked)
    assert_one_error_line(result, "sd3.5-large", "sd3-medium")


def test_int8_is_evaluated_against_the_checkpoints_sixteen_bits(tiny):
    model, int8 = ModelChoice(None, tiny.single_file("sd3-medium")), Int8(use_int8=True)
    found = Order(num_images=1, num_steps=1, int8=int8).open(model, 0)
    other = open_against(own_reference(found, int8), None, Order(), found, 0)
    assert other.pipeline.hash == load_pipeline(model).hash != found.pipeline.hash


def test_the_card_of_a_saved_model_tells_how_it_is_used(tiny, tmp_path, monkeypatch):
    pipeline = quantized_pipeline(ModelChoice(None, tiny.single_file("sd3-medium")))
    folder = save_model(pipeline, tmp_path / "my-model")
    card = (folder / "README.md").read_text()
    assert "# my-model\n" in card and "ditq generate --model ." in card
    assert "transformer only" not in card
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["layer"](mx.zeros((1, 128))).ndim == 2


def test_a_disk_too_small_for_the_encoders_is_told_before_anything_is_written(
    tiny, tmp_path, monkeypatch
):
    pipeline = quantized_pipeline(ModelChoice(None, tiny.single_file("sd3-medium")))
    whole = save_model(pipeline, tmp_path / "whole")
    transformer = sum(path.stat().st_size for path in (whole / "transformer").iterdir())
    weights = sum(path.stat().st_size for path in whole.rglob("*.safetensors"))
    assert weights > 1.2 * transformer
    free = (weights + transformer) // 2
    small = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    with pytest.raises(UserError, match="the model other needs"):
        save_model(pipeline, tmp_path / "other")
    assert not (tmp_path / "other").exists()
