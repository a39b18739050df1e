"""Published layouts: told apart by their names, read to the same model, wrong ones named."""

from __future__ import annotations

from pathlib import Path

from src.errors import UserError
from src.models.checkpoints import load_transformer
from src.models.configs import config_named
from src.store import save_folder, save_tensors

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from .checkpoint_layouts import to_diffusers, to_mlx, to_stability
from .helpers import random_inputs, random_model

TINY = ("tiny", "tiny-3.5-medium", "tiny-3.5-large")
LAYOUTS = {"mlx": to_mlx, "stability": to_stability, "diffusers": to_diffusers}
# SD3-medium has no QK norm to read the head size off; published heads are 64 wide, tiny's are 32.
CONFIG = {"config": config_named("tiny")}


def write(model, layout: str, folder: Path) -> Path:
    tensors = LAYOUTS[layout](model)
    if layout == "diffusers":
        inner = folder / "transformer"
        inner.mkdir()
        save_folder(inner, tensors, max_shard_bytes=200_000, stem="diffusion_pytorch_model")
        return folder
    if layout == "stability":  # a single file carries the other parts too
        tensors["first_stage_model.decoder.conv_in.weight"] = mx.zeros((4, 4))
        tensors["text_encoders.clip_l.logit_scale"] = mx.zeros((1,))
    save_tensors(folder / "model.safetensors", tensors)
    return folder / "model.safetensors"


@pytest.mark.parametrize("name", TINY)
def test_three_layouts_give_the_same_output(name, tmp_path):
    model = random_model(config_named(name))
    inputs = (*random_inputs(model.config, 8, 12), mx.array([900.0, 9.0]))
    wanted = model(*inputs)
    given = None if model.config.qk_norm else model.config
    for layout in LAYOUTS:
        folder = tmp_path / layout
        folder.mkdir()
        loaded = load_transformer(write(model, layout, folder), given)
        assert loaded.config == model.config
        assert mx.array_equal(loaded(*inputs), wanted), layout


def test_published_head_size_is_assumed_without_qk_norm(tmp_path):
    path = write(random_model(config_named("nano")), "stability", tmp_path)
    assert load_transformer(path).config.heads == 3


def test_checkpoint_that_lost_its_k_bias_still_loads(tmp_path):
    model = random_model(config_named("tiny"))
    tensors = {k: v for k, v in to_mlx(model).items() if not k.endswith("k_proj.bias")}
    save_tensors(tmp_path / "model.safetensors", tensors)
    loaded = load_transformer(tmp_path)
    assert not loaded.config.k_bias
    assert "bias" not in loaded.multimodal_transformer_blocks[0].text_transformer_block.attn.k_proj


def test_half_precision_checkpoint_computes_in_float32_on_the_cpu(tmp_path):
    model = random_model(config_named("tiny"))
    model.set_dtype(mx.float16)
    save_tensors(tmp_path / "model.safetensors", to_mlx(model))
    kept = load_transformer(tmp_path, **CONFIG, dtype=mx.float16)
    assert {v.dtype for _, v in tree_flatten(kept.parameters())} == {mx.float16}
    if mx.default_device() == mx.Device(mx.cpu):
        loaded = load_transformer(tmp_path, **CONFIG)
        assert {v.dtype for _, v in tree_flatten(loaded.parameters())} == {mx.float32}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_extra_and_misshapen_tensors_are_named(layout, tmp_path):
    tensors = LAYOUTS[layout](random_model(config_named("tiny")))
    fc1 = next(k for k in sorted(tensors) if k.endswith(("mlp.fc1.bias", "net.0.proj.bias")))
    path = tmp_path / "model.safetensors"

    def error_of(changed: dict) -> str:
        save_tensors(path, changed)
        with pytest.raises(UserError) as error:
            load_transformer(path, **CONFIG)
        return str(error.value)

    assert "mlp.fc1.bias" in error_of({k: v for k, v in tensors.items() if k != fc1})
    assert "mlp.fc1.bias" in (message := error_of({**tensors, fc1: mx.zeros((7,))}))
    assert "(7,)" in message and "(256,)" in message
    assert "stray.weight" in error_of({**tensors, "stray.weight": mx.zeros((3,))})


@pytest.mark.parametrize(
    "names, words",
    [
        (["double_blocks.0.img_attn.qkv.weight"], "not an SD3"),  # FLUX
        (["model.diffusion_model.input_blocks.0.0.weight"], "not an SD3"),  # a UNet
        (["transformer_blocks.0.attn.to_q.weight"], "not an SD3"),  # another DiT of diffusers'
        (["joint_blocks.0.x_block.attn.qkv.weight"], "missing"),
        (["multimodal_transformer_blocks.0.a.weight", "multimodal.scales"], "quantized already"),
    ],
)
def test_other_architectures_are_refused(names, words, tmp_path):
    path = tmp_path / "other.safetensors"
    save_tensors(path, {name: mx.zeros((6, 2)) for name in names})
    with pytest.raises(UserError, match=words) as error:
        load_transformer(path)
    assert str(path) in str(error.value)


def test_paths_that_hold_nothing_useful(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_transformer(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="no single set of weights"):
        load_transformer(tmp_path)
    save_tensors(tmp_path / "a.safetensors", {"x": mx.zeros((1,))})
    save_tensors(tmp_path / "b.safetensors", {"x": mx.zeros((1,))})
    with pytest.raises(UserError, match="a.safetensors, b.safetensors"):
        load_transformer(tmp_path)


def test_transformer_with_impossible_sizes_is_an_error(tmp_path):
    tensors = to_mlx(random_model(config_named("tiny")))
    for name, shape in (
        ("context_embedder.weight", (0, 32)),
        ("x_embedder.proj.weight", (64, 0, 0, 16)),
        ("x_embedder.proj.weight", (64, 16)),
        ("x_pos_embedder.pos_embed.weight", (0, 64)),
    ):
        save_tensors(tmp_path / "model.safetensors", {**tensors, name: mx.zeros(shape)})
        with pytest.raises(UserError):
            load_transformer(tmp_path)
