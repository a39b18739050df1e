"""LoRA files of both styles: merged is as applied at run time, and INT8 comes after."""

from __future__ import annotations

from src.errors import UserError
from src.models.load import load_pipeline
from src.models.paths import BLOCKS, module_at
from src.models.published import published_linears
from src.quant.int8 import INT8Linear
from src.quant.linear import QuantizedLinear
from src.quant.lora import LoRALinear, attach_lora, merge_lora
from src.quant.replace import replace_linear_with_int8

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from .checkpoint_layouts import to_diffusers, to_stability
from .helpers import random_inputs, random_model, relative_error

WIDE, RANK = 64, 4
STYLES = {
    "peft": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "peft, bare": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [{"to_q": nn.Linear(WIDE, 96), "to_out": [nn.Linear(96, WIDE)]}]
        self.head = nn.Linear(WIDE, 8)

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = x + block["to_out"][0](block["to_q"](x))
        return self.head(x)


PATHS = {"blocks.0.to_q": (96, WIDE), "blocks.0.to_out.0": (WIDE, 96)}


def model_of() -> Model:
    mx.random.seed(0)
    model = Model()
    mx.eval(model.parameters())
    return model


def parts_of(rows: int, columns: int, seed: int) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    shapes = ((RANK, columns), (rows, RANK))
    return tuple(mx.array(rng.standard_normal(s).astype(np.float32) / 8) for s in shapes)


def file_of(folder, style: str, shapes=PATHS, alpha: float | None = None, **extra):
    """A LoRA for those linears, and W's change of each at scale 1."""
    tensors, deltas = dict(extra), {}
    for seed, (path, (rows, columns)) in enumerate(shapes.items()):
        down, up = parts_of(rows, columns, seed)
        name = path.replace(".", "_") if style == "kohya" else path
        for key, tensor in zip(STYLES[style], (down, up), strict=True):
            tensors[key.format(name)] = tensor
        if alpha is not None:
            tensors[STYLES[style][0].format(name).split(".lora_")[0] + ".alpha"] = mx.array(alpha)
        deltas[path] = (1 if alpha is None else alpha / RANK) * np.array(up) @ np.array(down)
    path = folder / "lora.safetensors"
    mx.save_safetensors(str(path), tensors)
    return path, deltas


def input_of() -> mx.array:
    return mx.array(np.random.default_rng(9).standard_normal((5, WIDE)).astype(np.float32))


@pytest.mark.parametrize(
    "style, alpha", [*((style, None) for style in STYLES), ("peft", 2.0), ("kohya", 2.0)]
)
def test_merging_adds_the_product_once(tmp_path, style, alpha):
    file, deltas = file_of(tmp_path, style, alpha=alpha)
    model, before = model_of(), model_of()
    assert sorted(merge_lora(model, file, 0.5)) == sorted(PATHS)
    for path, delta in deltas.items():
        wanted = np.array(module_at(before, path).weight) + 0.5 * delta
        np.testing.assert_allclose(np.array(module_at(model, path).weight), wanted, atol=1e-6)
    np.testing.assert_array_equal(np.array(model.head.weight), np.array(before.head.weight))


def test_the_older_processor_keys_of_diffusers(tmp_path):
    (down, up), model = parts_of(96, WIDE, 0), model_of()
    before = np.array(module_at(model, "blocks.0.to_q").weight)
    path = tmp_path / "old.safetensors"
    keys = [f"unet.blocks.0.processor.to_q_lora.{part}.weight" for part in ("down", "up")]
    mx.save_safetensors(str(path), dict(zip(keys, (down, up), strict=True)))
    assert merge_lora(model, path) == ["blocks.0.to_q"]
    after = np.array(module_at(model, "blocks.0.to_q").weight)
    np.testing.assert_allclose(after, before + np.array(up @ down), atol=1e-6)


def test_merged_is_as_applied_at_run_time(tmp_path):
    file, _ = file_of(tmp_path, "kohya", alpha=8.0)
    merged, attached, x = model_of(), model_of(), input_of()
    merge_lora(merged, file, 0.7)
    attach_lora(attached, file, 0.7)
    assert isinstance(module_at(attached, "blocks.0.to_q"), LoRALinear)
    assert relative_error(attached(x), merged(x)) < 1e-5
    assert relative_error(model_of()(x), merged(x)) > 0.05


def test_merged_weights_keep_their_dtype(tmp_path):
    file, _ = file_of(tmp_path, "peft")
    model = model_of()
    model.set_dtype(mx.bfloat16)
    merge_lora(model, file)
    assert module_at(model, "blocks.0.to_q").weight.dtype == mx.bfloat16


@pytest.mark.parametrize("apply", [merge_lora, attach_lora])
def test_int8_refuses_an_adapter_and_takes_a_merged_one(tmp_path, apply):
    file, _ = file_of(tmp_path, "peft")
    model, x = model_of(), input_of()
    replace_linear_with_int8(model)
    way_out = r"blocks.0.to_q is quantized .*its weight is codes.*merge_lora\(model, .*quantize"
    with pytest.raises(UserError, match=way_out):
        apply(model, file)
    attached = model_of()
    attach_lora(attached, file)
    with pytest.raises(UserError, match="applied at run time, which INT8 cannot take"):
        replace_linear_with_int8(attached)
    merged = model_of()
    merge_lora(merged, file)
    replace_linear_with_int8(merged)
    assert isinstance(module_at(merged, "blocks.0.to_q"), INT8Linear)
    assert relative_error(merged(x), attached(x)) < 0.02


def test_layers_of_the_weight_track_refuse_it_too(tmp_path):
    model, file = model_of(), file_of(tmp_path, "peft")[0]
    layer = QuantizedLinear.from_linear(module_at(model, "blocks.0.to_q"))
    model.blocks[0]["to_q"] = layer
    with pytest.raises(UserError, match="blocks.0.to_q is quantized"):
        merge_lora(model, file)


PUBLISHED = {
    "stability": lambda model: to_stability(model, prefix=""),
    "diffusers": to_diffusers,
}


@pytest.mark.parametrize("style", ["peft", "kohya"])
@pytest.mark.parametrize("layout", PUBLISHED)
def test_files_for_published_models_fit_ours(tmp_path, layout, style):
    """W + ΔW under the published names, read as a checkpoint, is what merging must give."""
    config = load_pipeline("tiny").transformer.config
    model, before = random_model(config), random_model(config)
    aliases = published_linears(model)
    tensors = PUBLISHED[layout](model)
    names = [n for n in aliases if f"{n}.weight" in tensors]
    assert len(names) >= 4 * config.depth
    shapes = {name: tuple(tensors[f"{name}.weight"].shape) for name in names}
    file, deltas = file_of(tmp_path, style, shapes)
    merge_lora(model, file, aliases=aliases)
    after, old = PUBLISHED[layout](model), PUBLISHED[layout](before)
    for name, tensor in after.items():
        delta = deltas.get(name.removesuffix(".weight"), 0) if name.endswith(".weight") else 0
        np.testing.assert_allclose(np.array(tensor), np.array(old[name]) + delta, atol=1e-5)


def test_all_block_linears_have_both_names():
    """But one: diffusers has the last text modulation's halves the other way round."""
    model = load_pipeline("tiny").transformer
    linears = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith(BLOCKS)
    ]
    named = [path for paths in published_linears(model).values() for path in paths]
    assert sorted(named) != [] and len(named) == 2 * len(linears) - 1


def test_a_merged_lora_moves_the_transformers_velocity(tmp_path):
    config = load_pipeline("tiny").transformer.config
    model = random_model(config)
    inputs = (*random_inputs(config, 8, 8), mx.array([900.0, 100.0]))
    wanted = model(*inputs)
    shape = module_at(model, f"{BLOCKS}.0.image_transformer_block.attn.q_proj").weight.shape
    file, _ = file_of(tmp_path, "peft", {"transformer_blocks.0.attn.to_q": tuple(shape)})
    merge_lora(model, file, 0.0, aliases=published_linears(model))
    np.testing.assert_array_equal(np.array(model(*inputs)), np.array(wanted))
    merge_lora(model, file, 5.0, aliases=published_linears(model))
    assert relative_error(model(*inputs), wanted) > 1e-4


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "holds no adapter"),
        ({"x.lora_A.weight": (4, 64), "x.lora_B.weight": (96, 4)}, "the model has no linear 'x'"),
        ({"blocks.0.to_q.lora_A.weight": (4, 64)}, "blocks.0.to_q has no up weight"),
        ({"blocks.0.to_q.dora_scale": (96,)}, "dora_scale is no part of a LoRA .* valid endings"),
        ({"lora_te1_x.lora_down.weight": (4, 64)}, "for a text encoder"),
        (
            {"blocks.0.to_q.lora_A.weight": (4, 64), "blocks.0.to_q.lora_B.weight": (96, 5)},
            r"down \(4, 64\) and up \(96, 5\); valid",
        ),
        (
            {"blocks.0.to_q.lora_A.weight": (4, 32), "blocks.0.to_q.lora_B.weight": (96, 4)},
            r"is for \(96, 32\) weights, the model's are \(96, 64\)",
        ),
        (
            {
                **{f"{p}blocks.0.to_q.lora_A.weight": (4, 64) for p in ("", "transformer.")},
                **{f"{p}blocks.0.to_q.lora_B.weight": (96, 4) for p in ("", "transformer.")},
            },
            "two adapters are for blocks.0.to_q",
        ),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, tensors, message):
    path, model = tmp_path / "lora.safetensors", model_of()
    mx.save_safetensors(str(path), {name: mx.ones(shape) for name, shape in tensors.items()})
    with pytest.raises(UserError, match=message):
        merge_lora(model, path)
    wanted = np.array(module_at(model_of(), "blocks.0.to_q").weight)
    np.testing.assert_array_equal(np.array(module_at(model, "blocks.0.to_q").weight), wanted)


@pytest.mark.parametrize("apply", [merge_lora, attach_lora])
@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_a_scale_that_is_not_finite_is_refused(tmp_path, apply, scale):
    model, file = model_of(), file_of(tmp_path, "peft")[0]
    with pytest.raises(UserError, match=f"scale {scale} of a LoRA is not finite; valid: any fin"):
        apply(model, file, scale)
    wanted = np.array(module_at(model_of(), "blocks.0.to_q").weight)
    np.testing.assert_array_equal(np.array(module_at(model, "blocks.0.to_q").weight), wanted)


def test_nan_and_missing_files_are_refused(tmp_path):
    file, _ = file_of(tmp_path, "kohya", **{"lora_unet_head.alpha": mx.array(mx.nan)})
    with pytest.raises(UserError, match="lora_unet_head has no"):
        merge_lora(model_of(), file)
    down, up = parts_of(96, WIDE, 0)
    down[0, 0] = mx.nan
    keys = [key.format("blocks.0.to_q") for key in STYLES["peft"]]
    mx.save_safetensors(str(file), dict(zip(keys, (down, up), strict=True)))
    with pytest.raises(UserError, match="holds NaN or infinity"):
        merge_lora(model_of(), file)
    with pytest.raises(UserError, match="none.safetensors is missing"):
        merge_lora(model_of(), tmp_path / "none.safetensors")
