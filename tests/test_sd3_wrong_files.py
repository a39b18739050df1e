"""A Stable Diffusion 3 of which a file is wrong, or not whole: the file is named, early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from src.errors import UserError
from src.models.load import load_pipeline

import mlx.core as mx
import pytest

from .tiny_sd3 import write_json

pytestmark = [pytest.mark.sd3, pytest.mark.slow, pytest.mark.usefixtures("offline")]

PROMPT = "a cat on the mat"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokenizer/vocab.json", "vocab.json is damaged"),
        ("tokenizer/merges.txt", "merges.txt is damaged: it has .* merges"),
        ("tokenizer_3/tokenizer_config.json", "tokenizer_config.json is damaged"),
        ("tokenizer_3/tokenizer.json", "tokenizer_3 is damaged: its tokenizer cannot be read"),
        ("vae/diffusion_pytorch_model.safetensors", "model.safetensors is damaged"),
    ],
)
def test_half_a_file_is_named_before_any_step(tiny, tmp_path, name, words):
    folder = tmp_path / "model"
    shutil.copytree(tiny.diffusers("sd3-medium"), folder)
    pipeline, file = load_pipeline("sd3-medium", checkpoint=folder), folder / name
    pipeline.check([PROMPT])
    content = file.read_bytes().rstrip()
    file.write_bytes(content[:-6] if name.endswith(".txt") else content[: len(content) // 2])
    with pytest.raises(UserError, match=words):
        pipeline.check([PROMPT])


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def change_tensor(path: Path, name: str, change: Callable[[mx.array], mx.array]) -> None:
    tensors = mx.load(str(path))
    tensors[name] = mx.contiguous(change(tensors[name]))
    mx.eval(tensors)
    path.unlink()
    mx.save_safetensors(str(path), tensors)


def copy_weights(model: Path, source: str, target: str) -> None:
    (weights,) = (model / target).glob("*.safetensors")
    shutil.copyfile(model / source / "model.safetensors", weights)


def swap(model: Path) -> None:
    (model / "text_encoder").rename(model / "first")
    (model / "text_encoder_2").rename(model / "text_encoder")
    (model / "first").rename(model / "text_encoder_2")


VAE = "vae/diffusion_pytorch_model.safetensors"
END, MORE = "<|endoftext|>", [[f"more{i}", -9.0] for i in range(200_000)]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda model: (model / "tokenizer/merges.txt").write_bytes(b"#\nt h\n\xff e\n"),
            r"tokenizer/merges\.txt is damaged: it is not text in UTF-8",
        ),
        (
            lambda model: change_json(model / "tokenizer_2/vocab.json", lambda v: v.pop(END)),
            r"tokenizer_2/vocab\.json is damaged: it has no <\|endoftext\|>",
        ),
        (
            lambda model: change_json(model / "tokenizer/vocab.json", lambda v: v.update(c=10**9)),
            r"tokenizer/vocab\.json is damaged: .* below 192, as many as .*text_encoder knows",
        ),
        (
            lambda model: change_json(model / "tokenizer/vocab.json", lambda v: v.update(c="1")),
            r"tokenizer/vocab\.json is damaged: .* whole numbers",
        ),
        (
            lambda model: change_json(
                model / "tokenizer_3/tokenizer.json",
                lambda v: v["model"].update(vocab=[*v["model"]["vocab"][:3], *MORE]),
            ),
            r"tokenizer_3 is damaged: .* below 99, as many as .*text_encoder_3 knows",
        ),
        (
            lambda model: copy_weights(model, "text_encoder", "text_encoder_2"),
            r"text_encoder_2: its pooled text has 64 values, .* CLIP-G text encoder 128",
        ),
        (
            lambda model: copy_weights(model, "text_encoder_2", "text_encoder"),
            r"text_encoder: its pooled text has 128 values, .* CLIP-L text encoder 64",
        ),
        (swap, r"text_encoder: its pooled text has 128 values, .* CLIP-L text encoder 64"),
        (
            lambda model: copy_weights(model, "text_encoder", "text_encoder_3"),
            r"text_encoder_3: tensor wte\.weight is missing",
        ),
        (
            lambda model: copy_weights(model, "text_encoder", "vae"),
            r"vae: tensor decoder\.conv_in\.weight is missing \(it holds text_model",
        ),
        (
            lambda model: change_tensor(model / VAE, "decoder.conv_out.bias", lambda b: b[:1]),
            r"vae: array 'conv_out\.bias' has shape \(1,\)",
        ),
        (
            lambda model: change_tensor(model / VAE, "decoder.conv_in.weight", lambda w: w[:, :4]),
            r"vae: the VAE decodes 4 channels, the model draws 16",
        ),
    ],
)
def test_a_wrong_file_is_named_before_any_step(tiny, tmp_path, spoil, words):
    folder = tmp_path / "model"
    shutil.copytree(tiny.diffusers("sd3-medium"), folder)
    spoil(folder)
    pipeline = load_pipeline("sd3-medium", checkpoint=folder)
    with pytest.raises(UserError, match=words):
        pipeline.check([PROMPT])
    with pytest.raises(UserError, match=words):  # and by whoever does not check
        pipeline.decode(pipeline.sample([PROMPT], [0], num_steps=1, height=64, width=64))


def test_without_a_vae_no_step_is_begun(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.diffusers("sd3-medium"), folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="has no VAE"):
        load_pipeline("sd3-medium", checkpoint=folder).check([PROMPT])
