"""A complete Stable Diffusion 3 of a few megabytes, with random weights, in every published layout.

    python -m tests.tiny_sd3 FOLDER

writes, from the published packages' own classes (CLIP-L, CLIP-G and T5 of transformers, the VAE and
the transformer of diffusers, tokenizers), the same float16 weights three times:

    FOLDER/huggingface/hub/…        DiffusionKit's repositories, as the hub's cache keeps them
    FOLDER/stability/MODEL.safetensors      Stability's single files: transformer, VAE, encoders
    FOLDER/diffusers/MODEL/…        diffusers' folders: transformer/, vae/, text_encoder/, …

and the tokenizers beside Stability's files, where our reader looks for them. DiffusionKit has no
sd3.5-medium, so the hub holds the other two.

The real DiffusionPipeline runs on it inside `redirected(tiny)`, which points the hub at the folder,
offline, and tells DiffusionKit the tiny shapes; nothing else of the package is changed:

    tiny = write_tiny_sd3(folder)
    with redirected(tiny):
        pipeline = DiffusionPipeline(model_version=DIFFUSIONKIT["sd3-medium"], shift=3.0, …)

On a CPU DiffusionKit also needs `mx.metal.device_info()["memory_size"]`; that is for the caller.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.models.configs import MMDiTConfig
from src.models.mmdit import MMDiT

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from .checkpoint_layouts import to_stability
from .helpers import random_model
from .published_models import diffusers_model

CLIP_WIDTHS = {"l": 64, "g": 128}
VAE_CHANNELS = (32, 64, 64, 64)
POSITIONS = 32  # patches a side: pictures of up to 512 pixels
T5_TOKENS = 32  # the tokenizer's own limit; the published 512 cost a test too much time
COMMIT = "0" * 40

# 4096 is fixed in DiffusionKit, and a hidden size of 64 a block.
MEDIUM = MMDiTConfig(
    depth=2, hidden=128, heads=2, pooled_dim=sum(CLIP_WIDTHS.values()), position_size=POSITIONS
)
CONFIGS = {
    "sd3-medium": MEDIUM,
    "sd3.5-medium": replace(
        MEDIUM, depth=3, hidden=192, heads=3, qk_norm=True, dual_attention_blocks=2
    ),
    "sd3.5-large": replace(MEDIUM, qk_norm=True),
}
DIFFUSIONKIT = {
    "sd3-medium": "argmaxinc/mlx-stable-diffusion-3-medium",
    "sd3.5-large": "argmaxinc/mlx-stable-diffusion-3.5-large",
}
SINGLE_FILE = {"sd3-medium": "sd3_medium.safetensors", "sd3.5-large": "sd3.5_large.safetensors"}

CHARACTERS = [chr(code) for code in range(33, 127)]
CLIP_VOCABULARY = {
    token: index
    for index, token in enumerate(
        # "!" is the padding of CLIP-G and must be 0; the end of text must be the highest.
        ["!", *(c for c in CHARACTERS if c != "!"), *(f"{c}</w>" for c in CHARACTERS)]
        + ["th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
    )
}
T5_PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁the", -3.0)] + [
    (c, -4.0) for c in CHARACTERS
]


@dataclass(frozen=True)
class TinySD3:
    """Where everything lies."""

    folder: Path

    @property
    def home(self) -> Path:
        """For HF_HOME."""
        return self.folder / "huggingface"

    def single_file(self, name: str) -> Path:
        return self.folder / "stability" / f"{name}.safetensors"

    def diffusers(self, name: str) -> Path:
        return self.folder / "diffusers" / name


def write_tiny_sd3(
    folder: Path, seed: int = 0, models: Sequence[str] = tuple(CONFIGS), k_bias: bool = True
) -> TinySD3:
    """Writes the models in all layouts; without `k_bias` these biases, which DiffusionKit drops,
    are zero."""
    tiny = TinySD3(Path(folder))
    parts = {
        "text_encoder": clip_model("l", seed),
        "text_encoder_2": clip_model("g", seed + 1),
        "text_encoder_3": t5_model(seed + 2),
        "vae": vae_model(seed + 3),
    }
    write_tokenizers(tiny.folder / "stability")
    write_hub_encoders(tiny, parts)
    for name in models:
        transformer = transformer_model(CONFIGS[name], seed + 4, k_bias)
        write_diffusers(tiny.diffusers(name), transformer, parts)
        checkpoint = to_stability(transformer) | vae_tensors(parts["vae"])
        if name in DIFFUSIONKIT:
            snapshot = hub_snapshot(tiny, DIFFUSIONKIT[name])
            mx.save_safetensors(str(snapshot / SINGLE_FILE[name]), checkpoint)
            write_json(snapshot / "config.json", {})
        mx.save_safetensors(str(tiny.single_file(name)), checkpoint | encoder_tensors(parts))
    return tiny


def transformer_model(config: MMDiTConfig, seed: int, k_bias: bool) -> MMDiT:
    model = random_model(config, seed)
    if not k_bias:
        for block in model.multimodal_transformer_blocks:
            for stream in (block.image_transformer_block, block.text_transformer_block):
                for name in ("attn", "attn2"):
                    if name in stream:
                        stream[name].k_proj.bias = mx.zeros_like(stream[name].k_proj.bias)
    model.update(tree_map(lambda tensor: tensor.astype(mx.float16), model.parameters()))
    return model


def clip_model(kind: str, seed: int) -> Any:
    """CLIP-L or CLIP-G; the former's projection is the identity, as in the published SD3."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = CLIP_WIDTHS[kind]
    config = CLIPTextConfig(
        vocab_size=len(CLIP_VOCABULARY),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if kind == "l" else "gelu",
        bos_token_id=len(CLIP_VOCABULARY) - 2,
        eos_token_id=len(CLIP_VOCABULARY) - 1,
    )
    model = randomized(CLIPTextModelWithProjection(config), seed)
    if kind == "l":
        model.text_projection.weight.data = torch.eye(width, dtype=torch.float16)
    return model


def t5_model(seed: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(T5_PIECES),
        d_model=4096,
        d_kv=64,
        d_ff=64,
        num_layers=2,
        num_heads=1,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    return randomized(T5EncoderModel(config), seed)


def vae_model(seed: int) -> Any:
    from diffusers import AutoencoderKL

    blocks = len(VAE_CHANNELS)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=VAE_CHANNELS,
        layers_per_block=2,
        latent_channels=16,
        sample_size=512,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomized(model, seed)


def randomized(model: Any, seed: int) -> Any:
    """Every parameter drawn by NumPy in the order of the names, so that each matters."""
    import torch

    rng = np.random.default_rng(seed)
    for name, parameter in sorted(model.named_parameters()):
        shape = tuple(parameter.shape)
        if parameter.ndim > 1:
            fan_in = 1 if "embed" in name or "shared" in name else np.prod(shape[1:])
            value = rng.standard_normal(shape) / np.sqrt(fan_in)
        elif name.endswith("bias"):
            value = 0.1 * rng.standard_normal(shape)
        else:  # the scale of a norm
            value = rng.uniform(0.5, 1.5, shape)
        parameter.data = torch.from_numpy(value.astype(np.float16))
    return model.eval()


def tensors_of(model: Any) -> dict[str, mx.array]:
    return {name: mx.array(value.numpy()) for name, value in model.state_dict().items()}


def vae_tensors(vae: Any) -> dict[str, mx.array]:
    """diffusers' VAE under the names of the latent diffusion code."""
    last = len(VAE_CHANNELS) - 1
    rules = (
        (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
        (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
        (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
        (r"\.down_blocks\.(\d)\.resnets\.", r".down.\1.block."),
        (r"\.down_blocks\.(\d)\.downsamplers\.0\.", r".down.\1.downsample."),
        (r"\.up_blocks\.(\d)\.resnets\.", lambda m: f".up.{last - int(m[1])}.block."),
        (r"\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f".up.{last - int(m[1])}.upsample."),
        (r"\.group_norm\.", ".norm."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.to_out\.0\.", ".proj_out."),
        (r"\.conv_shortcut\.", ".nin_shortcut."),
        (r"\.conv_norm_out\.", ".norm_out."),
    )
    renamed = {}
    for name, tensor in tensors_of(vae).items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        renamed[f"first_stage_model.{name}"] = tensor
    return renamed


def encoder_tensors(parts: dict[str, Any]) -> dict[str, mx.array]:
    """The text encoders inside a single file; CLIP-L's projection is left out there."""
    places = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
    found = {}
    for part, place in places.items():
        for name, tensor in with_both_embeddings(tensors_of(parts[part])).items():
            found[f"text_encoders.{place}.transformer.{name}"] = tensor
    del found["text_encoders.clip_l.transformer.text_projection.weight"]
    return found


def with_both_embeddings(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """T5's token embedding under both of its names, as the published single file has it."""
    for one, other in (
        ("shared.weight", "encoder.embed_tokens.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
    ):
        if one in tensors and other not in tensors:
            tensors[other] = tensors[one] + 0
    return tensors


def write_diffusers(folder: Path, transformer: MMDiT, parts: dict[str, Any]) -> None:
    """As StableDiffusion3Pipeline.save_pretrained lays it out."""
    half = diffusers_model(transformer).half()
    half.save_pretrained(folder / "transformer")
    for name, model in parts.items():
        model.save_pretrained(folder / name)
    write_tokenizers(folder)
    classes = {
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
    }
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusion3Pipeline", **classes})
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
    )


def write_tokenizers(folder: Path, t5_tokens: int = T5_TOKENS) -> None:
    """tokenizer/ and tokenizer_2/ of CLIP, tokenizer_3/ of T5."""
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_clip_tokenizer(folder / name)
        settings = {"tokenizer_class": "CLIPTokenizer", "pad_token": padding}
        write_json(folder / name / "tokenizer_config.json", {**settings, "model_max_length": 77})
    write_t5_tokenizer(folder / "tokenizer_3", t5_tokens)


def write_clip_tokenizer(folder: Path) -> None:
    write_json(folder / "vocab.json", CLIP_VOCABULARY)
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n", encoding="utf-8")


def write_t5_tokenizer(folder: Path, tokens: int = T5_TOKENS) -> None:
    from transformers import T5Tokenizer

    T5Tokenizer(vocab=T5_PIECES, extra_ids=0, model_max_length=tokens).save_pretrained(folder)


def hub_snapshot(tiny: TinySD3, repository: str) -> Path:
    """The folder of the repository's only commit in the hub's cache."""
    cache = tiny.home / "hub" / f"models--{repository.replace('/', '--')}"
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(COMMIT)
    return snapshot


def write_hub_encoders(tiny: TinySD3, parts: dict[str, Any]) -> None:
    """Text encoders and tokenizers where DiffusionKit asks for them."""
    snapshot = hub_snapshot(tiny, "argmaxinc/stable-diffusion")
    for letter, part in (("l", "text_encoder"), ("g", "text_encoder_2")):
        folder = snapshot / f"clip_{letter}"
        config = parts[part].config.to_dict()
        write_json(
            folder / "config.json", {**config, "architectures": ["CLIPTextModelWithProjection"]}
        )
        mx.save_safetensors(str(folder / "model.fp16.safetensors"), tensors_of(parts[part]))
        write_clip_tokenizer(snapshot / f"tokenizer_{letter}")
    t5 = with_both_embeddings(tensors_of(parts["text_encoder_3"]))
    (snapshot / "t5").mkdir(exist_ok=True)
    mx.save_safetensors(str(snapshot / "t5" / "t5xxl.safetensors"), t5)
    google = hub_snapshot(tiny, "google/t5-v1_1-xxl")
    write_t5_tokenizer(google)
    parts["text_encoder_3"].config.save_pretrained(google)
    config = json.loads((google / "config.json").read_text())
    # transformers 5 leaves it out, and DiffusionKit's tokenizer reads it.
    write_json(google / "config.json", {**config, "decoder_start_token_id": 0})


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


@contextmanager
def replaced(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@contextmanager
def redirected(
    tiny: TinySD3, t5_tokens: int = T5_TOKENS, features: mx.Dtype | None = None
) -> Iterator[None]:
    """The hub's cache is the tiny one, offline, and DiffusionKit's shapes are the tiny ones.

    `features` is the type of its timestep features; none: its own, of 16 bits.
    """
    import diffusionkit.mlx as kit
    from diffusionkit.mlx import config, model_io
    from huggingface_hub import constants

    shapes = dict(model_io._CONFIG)
    for name, key in DIFFUSIONKIT.items():
        theirs = CONFIGS[name]
        shapes[key] = config.MMDiTConfig(
            depth_multimodal=theirs.depth,
            num_heads=theirs.heads,
            max_latent_resolution=theirs.position_size,
            pooled_text_embed_dim=theirs.pooled_dim,
            use_qk_norm=theirs.qk_norm,
            dtype=features or (mx.bfloat16 if theirs.qk_norm else mx.float16),
            float16_dtype=mx.bfloat16 if theirs.qk_norm else mx.float16,
        )
    decoder, encoder = config.VAEDecoderConfig, config.VAEEncoderConfig
    lengths = {key: t5_tokens for key in kit.T5_MAX_LENGTH}
    with (
        replaced(constants, HF_HUB_CACHE=str(tiny.home / "hub"), HF_HUB_OFFLINE=True),
        replaced(
            model_io,
            _CONFIG=shapes,
            VAEDecoderConfig=lambda: decoder(block_out_channels=VAE_CHANNELS),
            VAEEncoderConfig=lambda: encoder(block_out_channels=VAE_CHANNELS),
            LOCAl_SD3_CKPT=None,
        ),
        replaced(kit, T5_MAX_LENGTH=lengths),
    ):
        yield


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    written = write_tiny_sd3(target)
    size = sum(os.path.getsize(path) for path in target.rglob("*") if path.is_file())
    print(f"{size / 1e6:.0f} MB in {written.folder}; HF_HOME={written.home} HF_HUB_OFFLINE=1")
