"""Reads a transformer's weights as they are published: three layouts, told apart by their names.

mlx        DiffusionKit's own names, which are ours
stability  one file, `model.diffusion_model.joint_blocks…`, q, k and v fused
diffusers  a folder of shards, `transformer_blocks…`
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UserError
from ..store import check_expected, load_folder, load_tensors
from .configs import MMDiTConfig
from .mmdit import MMDiT
from .paths import BLOCKS

IMAGE, TEXT = "image_transformer_block", "text_transformer_block"
STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and everybody else's
SHARD = re.compile(r"(.+)-\d{5}-of-(?!00001)\d{5}\b.*\.safetensors$")
CODES_SCALE = ".weight_scale"  # ends the name of what stands beside a layer's INT8 codes
HEAD_DIM = 64  # of every published SD3; only a QK norm tells it otherwise
POSITIONS = "x_pos_embedder.pos_embed.weight"
PATCHES = "x_embedder.proj.weight"

# Other parts of a single-file checkpoint, which are not the transformer's.
OTHER_PARTS = ("first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.")

Rules = tuple[tuple[str, str], ...]
Fill = Callable[[nn.Module, Path], object]  # puts what a path holds into a model, nothing read yet

STABILITY: Rules = (
    (r"^model\.diffusion_model\.", ""),
    (r"^joint_blocks\.(\d+)\.x_block\.", rf"{BLOCKS}.\1.{IMAGE}."),
    (r"^joint_blocks\.(\d+)\.context_block\.", rf"{BLOCKS}.\1.{TEXT}."),
    (r"\.attn(2?)\.proj\.", r".attn\1.o_proj."),
    (r"\.attn(2?)\.ln_([qk])\.", r".qk_norm\1.\2_norm."),
    (r"adaLN_modulation\.1\.", "adaLN_modulation.layers.1."),
    (r"^([ty]_embedder)\.mlp\.(\d)\.", r"\1.mlp.layers.\2."),
    (r"^pos_embed$", POSITIONS),
)

DIFFUSERS: Rules = (
    (r"^transformer_blocks\.", f"{BLOCKS}."),
    (rf"^({BLOCKS}\.\d+)\.(attn2?)\.to_([qkv])\.", rf"\1.{IMAGE}.\2.\3_proj."),
    (rf"^({BLOCKS}\.\d+)\.(attn2?)\.to_out\.0\.", rf"\1.{IMAGE}.\2.o_proj."),
    (rf"^({BLOCKS}\.\d+)\.attn(2?)\.norm_([qk])\.", rf"\1.{IMAGE}.qk_norm\2.\3_norm."),
    (rf"^({BLOCKS}\.\d+)\.attn\.add_([qkv])_proj\.", rf"\1.{TEXT}.attn.\2_proj."),
    (rf"^({BLOCKS}\.\d+)\.attn\.to_add_out\.", rf"\1.{TEXT}.attn.o_proj."),
    (rf"^({BLOCKS}\.\d+)\.attn\.norm_added_([qk])\.", rf"\1.{TEXT}.qk_norm.\2_norm."),
    (rf"^({BLOCKS}\.\d+)\.norm1\.linear\.", rf"\1.{IMAGE}.adaLN_modulation.layers.1."),
    (rf"^({BLOCKS}\.\d+)\.norm1_context\.linear\.", rf"\1.{TEXT}.adaLN_modulation.layers.1."),
    (rf"^({BLOCKS}\.\d+)\.ff\.net\.0\.proj\.", rf"\1.{IMAGE}.mlp.fc1."),
    (rf"^({BLOCKS}\.\d+)\.ff\.net\.2\.", rf"\1.{IMAGE}.mlp.fc2."),
    (rf"^({BLOCKS}\.\d+)\.ff_context\.net\.0\.proj\.", rf"\1.{TEXT}.mlp.fc1."),
    (rf"^({BLOCKS}\.\d+)\.ff_context\.net\.2\.", rf"\1.{TEXT}.mlp.fc2."),
    (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.layers.0."),
    (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.layers.2."),
    (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.layers.0."),
    (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.layers.2."),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^pos_embed\.pos_embed$", POSITIONS),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.layers.1."),
    (r"^proj_out\.", "final_layer.linear."),
)


def load_transformer(
    path: str | Path, config: MMDiTConfig | None = None, dtype: mx.Dtype | None = None
) -> MMDiT:
    """The transformer in a file or folder; its shape is read off the tensors if not given.

    Without a dtype it computes in float32 on the CPU, where 16-bit products are slow, and in the
    checkpoint's own elsewhere.
    """
    path = Path(path)
    weights = read_weights(path)
    config = config or infer_config(weights, path)
    model = MMDiT(config)
    if dtype is None and mx.default_device() == mx.Device(mx.cpu):
        dtype = mx.float32
    fill(model, {k: v.astype(dtype or v.dtype) for k, v in weights.items()}, path)
    return model


def read_weights(path: Path) -> dict[str, mx.array]:
    """Tensors under our own names and in our own shapes, whatever the layout."""
    tensors = read_tensors(path)
    layout = layout_of(tensors, path)
    if layout == "mlx":
        return tensors
    rules = STABILITY if layout == "stability" else DIFFUSERS
    weights = {renamed(name, rules): tensor for name, tensor in tensors.items()}
    if layout == "stability":
        weights = split_fused(weights)
    else:
        weights = swap_last_modulations(weights)
    if PATCHES in weights and weights[PATCHES].ndim == 4:
        weights[PATCHES] = weights[PATCHES].transpose(0, 2, 3, 1)
    if POSITIONS in weights and weights[POSITIONS].ndim == 3:
        weights[POSITIONS] = weights[POSITIONS].squeeze(0)
    return weights


def read_tensors(path: Path) -> dict[str, mx.array]:
    """What the file or folder holds of the transformer, under the file's names."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a .safetensors file or a folder of them")
    if path.is_dir():
        folder = weights_folder(path)
        tensors = load_folder(folder, stem=stem_of(folder))
    else:
        tensors = load_tensors(path)
    return {k: v for k, v in tensors.items() if not k.startswith(OTHER_PARTS)}


def weights_folder(folder: Path) -> Path:
    """Where a folder has the transformer's files: in a whole pipeline's, diffusers keeps them in
    one of their own."""
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def stem_of(folder: Path) -> str:
    """The file name, without endings, under which the folder holds its weights."""
    names = [path.name for path in sorted(folder.glob("*.safetensors*"))]
    for variant in ("", ".fp16"):  # whole ones first
        for stem in STEMS:
            single, index = (
                f"{stem}{variant}.safetensors",
                f"{stem}.safetensors.index{variant}.json",
            )
            if single in names or index in names:
                return f"{stem}{variant}"
    sharded = [match[1] for name in names if (match := SHARD.match(name))]
    if sharded and all(name.startswith(sharded[0]) for name in names):
        return sharded[0]  # and the store says so where the index of the shards is missing
    if len(names) == 1 and names[0].endswith(".safetensors"):
        return names[0].removesuffix(".safetensors")
    held = ", ".join(names) or "none"
    raise UserError(f"{folder} holds no single set of weights ({held}); give one .safetensors file")


def layout_of(names: Iterable[str], path: Path) -> str:
    """Which published layout the names are of."""
    names = set(names)
    if any(name.endswith(".scales") for name in names):
        raise UserError(f"{path} is quantized already; give the 16-bit checkpoint")
    if any("lora_" in name for name in names):
        raise UserError(f"{path} is a LoRA, not a model; give the model that it was merged into")
    if any(name.startswith(f"{BLOCKS}.") for name in names):
        return "mlx"
    if any(re.match(r"(model\.diffusion_model\.)?joint_blocks\.", name) for name in names):
        return "stability"
    if any(
        name.startswith("transformer_blocks.") and ".attn.add_q_proj." in name for name in names
    ):
        if "time_text_embed.timestep_embedder.linear_1.weight" in names and any(
            name.startswith("pos_embed.") for name in names
        ):
            return "diffusers"
    sample = ", ".join(sorted(names)[:2]) or "no tensors"
    raise UserError(
        f"{path} is not an SD3 or SD3.5 transformer ({sample}…); known layouts: "
        "DiffusionKit's, Stability's single file, diffusers' folder"
    )


def renamed(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def split_fused(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Cuts every fused qkv into its three projections."""
    split: dict[str, mx.array] = {}
    for name, tensor in weights.items():
        if ".qkv." not in name or tensor.shape[0] % 3:
            split[name] = tensor
            continue
        for letter, part in zip("qkv", mx.split(tensor, 3), strict=True):
            split[name.replace(".qkv.", f".{letter}_proj.")] = part
    return split


def swap_last_modulations(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """diffusers stores scale before shift where a modulation has only these two."""
    last = f"{BLOCKS}.{depth_of(weights) - 1}.{TEXT}."
    swapped = {}
    for name, tensor in weights.items():
        if "adaLN_modulation" in name and name.startswith((last, "final_layer.")):
            half = tensor.shape[0] // 2
            tensor = mx.concatenate([tensor[half:], tensor[:half]])
        swapped[name] = tensor
    return swapped


def depth_of(weights: Iterable[str]) -> int:
    """Number of blocks among the names."""
    found = (re.match(rf"{BLOCKS}\.(\d+)\.", name) for name in weights)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def infer_config(weights: dict[str, mx.array], path: Path) -> MMDiTConfig:
    """The transformer's shape, read off its tensors."""

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        if name not in weights:
            raise UserError(f"{path}: tensor {name} is missing")
        if weights[name].ndim != dimensions:
            raise UserError(
                f"{path}: tensor {name} has shape {weights[name].shape}, "
                f"not {dimensions} dimensions"
            )
        return weights[name].shape

    first = f"{BLOCKS}.0.{IMAGE}"
    hidden, text_dim = shape("context_embedder.weight")
    qk_norm = f"{first}.qk_norm.q_norm.weight" in weights
    head_dim = shape(f"{first}.qk_norm.q_norm.weight", 1)[0] if qk_norm else HEAD_DIM
    _, patch, _, latent_channels = shape(PATCHES, 4)
    dual = {name.split(".")[1] for name in weights if ".attn2." in name}
    return MMDiTConfig(
        depth=depth_of(weights),
        hidden=hidden,
        heads=max(1, hidden // max(1, head_dim)),
        text_dim=text_dim,
        pooled_dim=shape("y_embedder.mlp.layers.0.weight")[1],
        position_size=math.isqrt(shape(POSITIONS)[0]),
        latent_channels=latent_channels,
        patch=patch,
        mlp_ratio=shape(f"{first}.mlp.fc1.weight")[0] // max(1, hidden),
        frequency_dim=shape("t_embedder.mlp.layers.0.weight")[1],
        qk_norm=qk_norm,
        dual_attention_blocks=len(dual),
        k_bias=any(name.endswith(".k_proj.bias") for name in weights),
    )


def fill(model: nn.Module, weights: dict[str, mx.array], path: str | Path) -> None:
    """Loads every tensor; one that is missing, unknown or of another shape is an error."""
    if any(name.endswith(CODES_SCALE) for name in weights):
        raise UserError(
            f"{path} is INT8; `ditq generate` and `ditq evaluate` draw with it, all else needs the "
            "16-bit model: give that, and to `ditq benchmark` this file as --int8_checkpoint"
        )
    found = {name: (str(w.dtype), w.shape) for name, w in weights.items()}
    wanted = {name: (None, w.shape) for name, w in tree_flatten(model.parameters())}
    check_expected(path, found, wanted, allow_extra=False)
    model.load_weights(list(weights.items()))


def fill_published(model: nn.Module, path: Path) -> None:
    """The same from a file or folder of any published layout."""
    fill(model, read_weights(path), path)
