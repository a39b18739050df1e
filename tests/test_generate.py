"""`ditq generate` as a user runs it, and the pipeline under it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from src.backends import staying_packed
from src.errors import UserError
from src.generate import generate
from src.inference.export import save_model
from src.inference.low_memory import low_memory
from src.models.load import load_pipeline
from src.models.paths import BLOCKS
from src.sampling import Noise, denoise
from src.store import save_tensors

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from .helpers import ROOT, assert_one_error_line, run, run_here
from .quantized_models import quantized_pipeline

PROMPT = "a large red star in the center on a night background"
OTHER = "a small blue ring at the top on a night background"


def test_same_seed_same_bytes_and_other_seed_other_picture(tmp_path):
    def bytes_of(seed: int) -> bytes:
        path = tmp_path / "x.png"
        assert generate([PROMPT], path, model="tiny", seed=seed, num_steps=3) == [path]
        return path.read_bytes()

    first = bytes_of(3)
    assert bytes_of(3) == first
    assert bytes_of(4) != first


def test_a_batch_gives_each_prompt_its_own_picture(tmp_path):
    paths = generate([PROMPT, OTHER], tmp_path / "x.png", model="tiny", seed=5, num_steps=2)
    assert [p.name for p in paths] == ["x-0.png", "x-1.png"]
    (alone,) = generate([OTHER], tmp_path / "y.png", model="tiny", seed=6, num_steps=2)
    together, single = (np.asarray(Image.open(p)).astype(int) for p in (paths[1], alone))
    assert np.abs(together - single).max() <= 1
    assert Image.open(alone).text == {"prompt": OTHER, "seed": "6", "model": "tiny"}


@pytest.mark.parametrize("size", [(128, 128), (64, 112), (16, 16)])
def test_resolutions(size, tmp_path):
    height, width = size
    (path,) = generate(
        [PROMPT], tmp_path / "x.png", model="tiny", num_steps=1, height=height, width=width
    )
    assert Image.open(path).size == (width, height)


def test_loading_is_repeatable():
    weights = [dict(tree_flatten(load_pipeline("tiny").transformer.parameters())) for _ in "ab"]
    assert all(mx.array_equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_guidance_and_prompt_change_the_latent():
    pipeline = load_pipeline("tiny")
    base = pipeline.sample([PROMPT], [0], num_steps=2)
    for change in ({"cfg_weight": 1.0}, {"sampler": "ddim", "eta": 1.0}, {"negative": OTHER}):
        assert not mx.array_equal(base, pipeline.sample([PROMPT], [0], num_steps=2, **change))
    assert not mx.array_equal(base, pipeline.sample([OTHER], [0], num_steps=2))
    with pytest.raises(UserError, match="2 prompts but 1 seeds"):
        pipeline.sample([PROMPT, OTHER], [0])
    with pytest.raises(UserError, match="no prompt"):
        pipeline.sample([], [])


class Counted(nn.Module):
    """A layer that counts how often Python calls it: once a trace where its model is compiled."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.calls = layer, []

    def __call__(self, x: mx.array) -> mx.array:
        self.calls.append(None)
        return self.layer(x)


@pytest.mark.slow
@pytest.mark.parametrize("low", [False, True])
def test_fifty_quantized_steps_are_compiled_once(low):
    """On GPUs each trace would cost seconds; the activation grid changes at every step."""
    pipeline = quantized_pipeline(kernel=staying_packed())
    counted = Counted(pipeline.transformer.context_embedder)
    pipeline.transformer.context_embedder = counted
    sigmas = pipeline.sigmas(50)
    with low_memory(pipeline) if low else nullcontext():
        conditioning = pipeline.condition([PROMPT], 4.0)
        velocity = pipeline.velocity(conditioning, 4.0, sigmas[:-1].tolist(), compiled=True)
        denoise(velocity, Noise([0]), sigmas, (8, 8, 16))
    assert len(counted.calls) == 1


@pytest.mark.parametrize("pending", ["text", "weight", "operand"])
def test_a_compiled_step_leaves_nothing_to_compute_of_text_and_weights(pending):
    """What was not computed yet when the step was traced would be so at every step."""
    pipeline = quantized_pipeline(kernel=staying_packed())
    conditioning, transformer = pipeline.condition([PROMPT], 4.0), pipeline.transformer
    if pending == "text":
        conditioning = replace(conditioning, text=mx.sinh(conditioning.text))
    elif pending == "weight":
        transformer.context_embedder.weight = mx.sinh(transformer.context_embedder.weight)
    else:
        operand = transformer[BLOCKS][0].image_transformer_block.mlp.fc1._operand
        operand["scales"] = mx.sinh(operand["scales"])
    velocity = pipeline.velocity(conditioning, 4.0, compiled=True)
    graph = io.StringIO()
    mx.export_to_dot(graph, velocity(mx.zeros((1, 8, 8, 16)), mx.array(0.5)))
    assert "Concatenate" in graph.getvalue() and "Sinh" not in graph.getvalue()


def test_a_pipelines_folder_loads_from_any_path(tmp_path):
    """What nano ships as: config.json beside the tensors of each part."""
    pipeline_folder(tmp_path)
    path, named = (load_pipeline(m).sample([PROMPT], [0], num_steps=2) for m in (tmp_path, "tiny"))
    assert mx.array_equal(path, named)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda c: c.pop("codec"), "no settings of the codec"),
        (lambda c: c.update(version=9), "9"),
        (lambda c: c["sampling"].update(speed=1), "speed"),
        (lambda c: c["transformer"].update(hidden=128), "shape"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(damage, words, tmp_path):
    pipeline_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    damage(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        load_pipeline(str(tmp_path))


def pipeline_folder(folder: Path) -> None:
    """The tiny model as a folder."""
    from dataclasses import asdict

    from src.models.configs import config_named
    from src.models.nano.assembly import DEFAULTS, tiny_parts

    parts = tiny_parts("tiny")
    for name, module in zip(("transformer", "text_encoder", "codec"), parts, strict=True):
        save_tensors(folder / f"{name}.safetensors", dict(tree_flatten(module.parameters())))
    config = {
        "format": "ditq-pipeline",
        "version": 1,
        "name": "tiny",
        "transformer": config_named("tiny").to_dict(),
        "text_encoder": {"dim": 32, "layers": 1},
        "codec": {"quarter": 16, "eighth": 32, "quarter_blocks": 1, "edge": 8},
        "sampling": asdict(DEFAULTS),
    }
    (folder / "config.json").write_text(json.dumps(config))


def arguments(*options: str, prompt: str = PROMPT) -> list[str]:
    return ["src.generate", "--model", "tiny", "--prompt", prompt, *options]


def test_command_ends_with_one_line_about_what_was_made(tmp_path):
    result = run(*arguments("--output", "x.png", "--steps", "2"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("wrote x.png in ") and "peak" in result.stdout
    assert len(result.stdout.splitlines()) == 1
    assert "2/2" in result.stderr  # the bar reached its true total
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.png"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model", "sd4"], ["'sd4'", "nano", "tiny"]),
        (["--steps", "0"], ["at least 1, got 0"]),
        (["--steps", "-5"], ["at least 1, got -5"]),
        (["--steps", "many"], ["many"]),
        (["--height", "100"], ["height 100", "multiples of 16 from 16 to 128"]),
        (["--width", "0"], ["width 0"]),
        (["--width", "4096"], ["width 4096"]),
        (["--seed", "-1"], ["seed -1"]),
        (["--cfg-weight", "-2"], ["guidance", "-2"]),
        (["--sampler", "heun"], ["'heun'", "euler, ddim"]),
        (["--eta", "0.5"], ["ddim"]),
        (["--kernel", "dense"], ["--kernel dense", "tiny"]),
        (["--output", "x.jpg"], ["x.jpg", ".png"]),
        (["--output", "."], [".png"]),
        (["--output", "/dev/null/x.png"], ["/dev/null"]),
        (["--frobnicate"], ["--frobnicate", "--help"]),
    ],
)
def test_a_mistake_is_one_error_line_and_nothing_is_written(options, words, tmp_path):
    result = run_here(*arguments(*options), cwd=tmp_path)
    assert_one_error_line(result, *words)
    assert list(tmp_path.iterdir()) == []


def test_unknown_word_and_foreign_checkpoint(tmp_path):
    result = run_here(*arguments(prompt="a photo of a cat"), cwd=tmp_path)
    assert_one_error_line(result, "'photo'")
    foreign = tmp_path / "flux.safetensors"
    save_tensors(foreign, {"double_blocks.0.img_attn.qkv.weight": mx.zeros((6, 2))})
    result = run_here(*arguments("--model", str(foreign)), cwd=tmp_path)
    assert_one_error_line(result, str(foreign), "not an SD3")
    assert [p.name for p in tmp_path.iterdir()] == ["flux.safetensors"]


def test_debug_shows_the_traceback(tmp_path):
    result = run(*arguments("--steps", "0"), cwd=tmp_path, DITQ_DEBUG="1")
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_without_mlx_the_import_ends_with_a_hint(tmp_path):
    """An mlx.core that cannot load, as on Linux without the cpu or cuda extra."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("")
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open')")
    path = f"{tmp_path}:{ROOT}"
    for module in ("src.generate", "src.cli", "src.doctor"):
        result = run(module, cwd=tmp_path, PYTHONPATH=path)
        words = ["MLX", "libmlx.so"] + ([] if sys.platform == "darwin" else ["[cpu]", "[cuda]"])
        assert_one_error_line(result, *words)


def test_a_checkpoint_in_the_environment_is_for_stable_diffusion_3(tmp_path, monkeypatch):
    """A model that is named stays that model, be it the default's name."""
    monkeypatch.setenv("DITQ_CHECKPOINT", str(tmp_path / "absent.safetensors"))
    base = ("src.generate", "--prompt", PROMPT, "--steps", "1")
    for name in ("nano", "tiny"):
        result = run_here(*base, "--model", name, "--output", f"{name}.png", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert Image.open(tmp_path / f"{name}.png").text["model"] == name
    for more in ((), ("--model", "sd3-medium")):
        assert_one_error_line(run_here(*base, *more, cwd=tmp_path), "absent.safetensors does not")
    given = ("--model", "nano", "--checkpoint", "absent.safetensors")
    assert_one_error_line(run_here(*base, *given, cwd=tmp_path), "nano has its own weights")


def test_a_models_name_is_that_model_also_beside_a_folder_of_that_name(tmp_path):
    save_model(quantized_pipeline(), tmp_path / "nano")
    result = run_here(
        "src.generate", "--model", "nano", "--low-memory", "--prompt", PROMPT, "--steps", "1",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "picture.png").text["model"] == "nano"


def test_low_memory_writes_nothing_that_is_on_disk_already(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    generate([PROMPT], tmp_path / "x.png", num_steps=1, low_memory=True)
    with pytest.raises(UserError, match="the modulation, for a while,"):
        generate([PROMPT], tmp_path / "x.png", model="tiny", num_steps=1, low_memory=True)
