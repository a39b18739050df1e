"""A whole Stable Diffusion 3 of random weights on disk, in Stability's layout, tensor by tensor.

    python -m tools.sd3_full_weights sd3.5-large FOLDER [--no-t5] [--tiny]

writes the single file with the transformer and the VAE's decoder, text_encoders/ and the three
tokenizers. At no time is there more of it in memory than one block or one tensor. Some inputs of
the transformer's linears have channels that are far wider than the others, or far off centre.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from src.inference.sd3_memory import CLIP_G, CLIP_L, T5_XXL, VAE
from src.models.checkpoints import IMAGE, PATCHES, POSITIONS, TEXT
from src.models.configs import MMDiTConfig, config_named
from src.models.load import SD3
from src.models.mmdit import MMDiT
from src.models.paths import BLOCKS
from src.models.sd3_files import PARTS, PUBLISHED, TRANSFORMER
from src.models.sd3_files import VAE as VAE_PREFIX
from src.models.sd3_names import ClipShape, DecoderShape, T5Shape
from src.models.sd3_text import T5_TOKENS
from src.models.synthetic import plant_offset, plant_outliers
from src.store import TensorInfo, stream_tensors
from src.store.arrays import raw_bytes

import click
import mlx.core as mx
from mlx.utils import tree_flatten

from tests.tiny_sd3 import write_tokenizers
from tools.bench_sd3_activations import OUTLIER_FACTOR, offset_paths, outlier_paths
from tools.synthetic import drawn, fill_part, outside_of_blocks

Names = dict[str, tuple[int, ...]]  # shapes of tensors

CONV = (3, 3)
ITEM_BYTES = 2
# Where bits are kept: SD3.5's values are of bfloat16's range.
DTYPES = {"sd3-medium": "float16", "sd3.5-medium": "bfloat16", "sd3.5-large": "bfloat16"}
STABILITY = (
    (rf"^{BLOCKS}\.(\d+)\.{IMAGE}\.", r"joint_blocks.\1.x_block."),
    (rf"^{BLOCKS}\.(\d+)\.{TEXT}\.", r"joint_blocks.\1.context_block."),
    (r"\.(attn2?)\.o_proj\.", r".\1.proj."),
    (r"\.qk_norm(2?)\.([qk])_norm\.", r".attn\1.ln_\2."),
    (r"adaLN_modulation\.layers\.1\.", "adaLN_modulation.1."),
    (r"^([ty]_embedder)\.mlp\.layers\.(\d)\.", r"\1.mlp.\2."),
    (rf"^{re.escape(POSITIONS)}$", "pos_embed"),
)


@dataclass(frozen=True)
class Shapes:
    """Of all parts of a model."""

    transformer: MMDiTConfig
    clips: Mapping[str, ClipShape]
    t5: T5Shape
    vae: DecoderShape
    t5_tokens: int

    @classmethod
    def of(cls, model: str, tiny: bool) -> Shapes:
        """The published ones, or of the same kind what a CPU can take through all stages."""
        config = config_named(model)
        if not tiny:
            return cls(config, {"clip_l": CLIP_L, "clip_g": CLIP_G}, T5_XXL, VAE, T5_TOKENS)
        clips = {
            "clip_l": ClipShape(3, 64, 1, 77, 256, 64),
            "clip_g": ClipShape(3, 128, 2, 77, 256, 128),
        }
        small = replace(
            config,
            depth=3,
            hidden=192,
            heads=3,
            pooled_dim=sum(clip.width for clip in clips.values()),
            position_size=32,
            dual_attention_blocks=min(2, config.dual_attention_blocks),
        )
        return cls(
            small,
            clips,
            T5Shape(2, 4096, 1, 64, 64, 128, 32),
            DecoderShape((32, 64, 64, 64), 3, 16),
            32,
        )


def write_checkpoint(folder: Path, model: str, *, t5: bool = True, tiny: bool = False) -> Path:
    """Fills the folder; the path of the single file."""
    shapes, path = Shapes.of(model, tiny), folder / PUBLISHED[model].file
    encoders = {name: clip_names(shape) for name, shape in shapes.clips.items()}
    if t5:
        encoders["t5"] = t5_names(shapes.t5)
    for seed, (name, names) in enumerate(encoders.items()):
        place = folder / PARTS[name].places[1]
        place.parent.mkdir(parents=True, exist_ok=True)
        with stream_tensors(place, infos(names, "float16")) as writer:
            for key, tensor in random_tensors(names, mx.float16, seed):
                writer.write(key, raw_bytes(tensor))
    write_tokenizers(folder, shapes.t5_tokens)
    write_single_file(path, model, shapes)
    return path


def write_single_file(path: Path, model: str, shapes: Shapes) -> None:
    """Transformer and VAE; the transformer's blocks are drawn, written and let go in turn."""
    transformer, dtype = MMDiT(shapes.transformer), getattr(mx, DTYPES[model])
    vae = {VAE_PREFIX + name: shape for name, shape in decoder_names(shapes.vae).items()}
    # Nothing is drawn before a tensor is read, so that this tells shapes alone.
    wanted = {name: tensor.shape for name, tensor in stability(parameters(transformer)).items()}
    with stream_tensors(path, infos(wanted, DTYPES[model]) | infos(vae, "float16")) as writer:
        for name, tensor in random_tensors(vae, mx.float16, seed=0):
            writer.write(name, raw_bytes(tensor))
        for part in drawn_parts(transformer, dtype):
            for name, tensor in stability(part).items():
                writer.write(name, raw_bytes(tensor.astype(dtype)))
            mx.clear_cache()


def drawn_parts(transformer: MMDiT, dtype: mx.Dtype) -> Iterator[dict[str, mx.array]]:
    """The tensors of one block after the other, then of all else, by the transformer's names."""
    blocks, config = transformer[BLOCKS], transformer.config
    for index in range(len(blocks)):
        fill_part(blocks[index], mx.float32, seed=index)
        plant(transformer, config, f"{BLOCKS}.{index}.")
        yield {f"{BLOCKS}.{index}.{n}": t for n, t in tree_flatten(blocks[index].parameters())}
        blocks[index] = None
    for seed, part in enumerate(outside_of_blocks(transformer)):
        fill_part(part, dtype, seed=len(blocks) + seed)
    rest = tree_flatten(transformer.parameters())
    yield {name: tensor for name, tensor in rest if not name.startswith(f"{BLOCKS}.")}


def plant(transformer: MMDiT, config: MMDiTConfig, block: str) -> None:
    """What is hard to quantize, where it is this block's turn."""
    for path in outlier_paths(config):
        if path.startswith(block):
            plant_outliers(transformer, path, [3, config.hidden // 2], OUTLIER_FACTOR)
    for path, centre in offset_paths(config).items():
        if path.startswith(block):
            plant_offset(transformer, path, [7, 11, config.hidden], centre)


def parameters(module: MMDiT) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def stability(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Under the names of Stability's single file: q, k, v in one, convolutions channels first."""
    found = {}
    for name, tensor in tensors.items():
        if match := re.search(r"\.([qkv])_proj\.(weight|bias)$", name):
            if match[1] != "q":
                continue
            parts = [tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            name, tensor = name.replace(".q_proj.", ".qkv."), mx.concatenate(parts)
        if name == PATCHES:
            tensor = tensor.transpose(0, 3, 1, 2)
        if name == POSITIONS:
            tensor = tensor[None]
        for pattern, replacement in STABILITY:
            name = re.sub(pattern, replacement, name)
        found[TRANSFORMER + name] = tensor
    return found


def infos(names: Names, dtype: str) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(dtype, tuple(shape), ITEM_BYTES * math.prod(shape))
        for name, shape in names.items()
    }


def random_tensors(names: Names, dtype: mx.Dtype, seed: int) -> Iterator[tuple[str, mx.array]]:
    """One tensor after the other, drawn on the device."""
    key = mx.random.key(1000 + seed)
    for name, shape in names.items():
        key, own = mx.random.split(key)
        yield name, drawn(name, mx.zeros(shape), own).astype(dtype)
        mx.clear_cache()


def clip_names(shape: ClipShape) -> Names:
    width, names = shape.width, {}
    names["text_model.embeddings.token_embedding.weight"] = (shape.vocabulary, width)
    names["text_model.embeddings.position_embedding.weight"] = (shape.positions, width)
    for index in range(shape.layers):
        layer = f"text_model.encoder.layers.{index}."
        for name in "qkv":
            names |= linear(f"{layer}self_attn.{name}_proj", width, width)
        names |= linear(f"{layer}self_attn.out_proj", width, width)
        names |= linear(f"{layer}mlp.fc1", 4 * width, width) | linear(
            f"{layer}mlp.fc2", width, 4 * width
        )
        names |= norm(f"{layer}layer_norm1", width) | norm(f"{layer}layer_norm2", width)
    names |= norm("text_model.final_layer_norm", width)
    return names | {"text_projection.weight": (shape.projection or width, width)}


def t5_names(shape: T5Shape) -> Names:
    width, inner = shape.width, shape.heads * shape.head_width
    names: Names = {"shared.weight": (shape.vocabulary, width)}
    for index in range(shape.layers):
        layer = f"encoder.block.{index}.layer."
        attention, dense = f"{layer}0.SelfAttention.", f"{layer}1.DenseReluDense."
        names |= {f"{attention}{name}.weight": (inner, width) for name in "qkv"}
        names[f"{attention}o.weight"] = (width, inner)
        names |= {f"{dense}wi_{i}.weight": (shape.hidden, width) for i in (0, 1)}
        names[f"{dense}wo.weight"] = (width, shape.hidden)
        names |= {f"{layer}{i}.layer_norm.weight": (width,) for i in (0, 1)}
    biases = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return names | {
        biases: (shape.buckets, shape.heads),
        "encoder.final_layer_norm.weight": (width,),
    }


def decoder_names(shape: DecoderShape) -> Names:
    """The VAE's decoder, the half of it that pictures need."""
    top = shape.channels[-1]
    names = linear("decoder.conv_in", top, shape.latent_channels, CONV)
    names |= resnet("decoder.mid.block_1", top, top) | resnet("decoder.mid.block_2", top, top)
    names |= norm("decoder.mid.attn_1.norm", top)
    for name in ("q", "k", "v", "proj_out"):
        names |= linear(f"decoder.mid.attn_1.{name}", top, top, (1, 1))
    before = top
    for level, channels in reversed(list(enumerate(shape.channels))):
        for index in range(shape.resnets):
            names |= resnet(f"decoder.up.{level}.block.{index}", before, channels)
            before = channels
        if level:
            names |= linear(f"decoder.up.{level}.upsample.conv", channels, channels, CONV)
    names |= norm("decoder.norm_out", before)
    return names | linear("decoder.conv_out", 3, before, CONV)


def resnet(path: str, before: int, after: int) -> Names:
    names = norm(f"{path}.norm1", before) | linear(f"{path}.conv1", after, before, CONV)
    names |= norm(f"{path}.norm2", after) | linear(f"{path}.conv2", after, after, CONV)
    return names | (
        linear(f"{path}.nin_shortcut", after, before, (1, 1)) if before != after else {}
    )


def linear(path: str, rows: int, columns: int, kernel: Iterable[int] = ()) -> Names:
    return {f"{path}.weight": (rows, columns, *kernel), f"{path}.bias": (rows,)}


def norm(path: str, width: int) -> Names:
    return {f"{path}.weight": (width,), f"{path}.bias": (width,)}


@click.command()
@click.argument("model", type=click.Choice(SD3))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--t5/--no-t5", default=True, show_default=True)
@click.option("--tiny", is_flag=True, help="Of the same kind, a few megabytes.")
def main(model: str, folder: Path, t5: bool, tiny: bool) -> None:
    """Write a model of random weights."""
    start = time.perf_counter()
    path = write_checkpoint(folder, model, t5=t5, tiny=tiny)
    click.echo(f"{model} is in {path.parent}, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
