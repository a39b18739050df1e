"""MMDiT, the two-stream diffusion transformer of Stable Diffusion 3 and 3.5, in one class.

Parameter names are DiffusionKit's, so its checkpoints load as they are and a linear path means
the same thing everywhere. The forward pass keeps no state and never looks at a value, so a step
can be compiled and a batch may mix timesteps.

Where FLUX would join: its single-stream block is one `StreamBlock` over the concatenated tokens
with the MLP beside the attention; its rotary positions belong in `StreamBlock.project`, the one
place where q and k are made, in the stead of `PositionEmbedding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UserError
from .configs import MMDiTConfig
from .embedding import Embedder, PatchEmbedding, PositionEmbedding, timestep_features
from .gelu import gelu_tanh
from .hooks import Ends, Memory, NoiseLevel, RunBlock, run_block
from .paths import BLOCKS, MODULATION, modulates

NORM_EPS = 1e-6


def modulate(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """Layer norm, then a shift and scale per sample and channel, (batch, hidden) each."""
    return mx.fast.layer_norm(x, None, None, NORM_EPS) * (1 + scale[:, None]) + shift[:, None]


def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attention over (batch, heads, tokens, head_dim), heads merged: (batch, tokens, hidden)."""
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
    return out.transpose(0, 2, 1, 3).flatten(2)


Attend = Callable[[mx.array, mx.array, mx.array], mx.array]
# q, k and v, (batch, heads, tokens, head_dim) each; or (batch, tokens, 3, heads, head_dim).
Heads = tuple[mx.array, mx.array, mx.array] | mx.array


def apart(heads: Heads) -> tuple[mx.array, mx.array, mx.array]:
    """q, k and v, in either form."""
    if not isinstance(heads, mx.array):
        return heads
    return tuple(heads[:, :, i].transpose(0, 2, 1, 3) for i in range(3))


def beside(one: Heads, other: Heads) -> tuple[mx.array, mx.array, mx.array]:
    """q, k and v of the one's tokens and, behind them, of the other's."""
    if isinstance(one, mx.array) and isinstance(other, mx.array):
        return apart(mx.concatenate([one, other], axis=1))
    pairs = zip(apart(one), apart(other), strict=True)
    return tuple(mx.concatenate(pair, axis=2) for pair in pairs)


class Attention(nn.Module):
    """The four projections of one stream; the attention itself joins the streams."""

    def __init__(self, config: MMDiTConfig, output: bool = True) -> None:
        super().__init__()
        hidden = config.hidden
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden, bias=config.k_bias)
        self.v_proj = nn.Linear(hidden, hidden)
        if output:
            self.o_proj = nn.Linear(hidden, hidden)

    def project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """q, k and v, heads side by side."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def project_modulated(
        self, x: mx.array, shift: mx.array, scale: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The same of tokens before their modulation."""
        return self.project(modulate(x, shift, scale))

    def add_output(self, x: mx.array, attended: mx.array, gate: mx.array) -> mx.array:
        """x with the gated output projection added; a gate per sample and channel."""
        return x + self.o_proj(attended) * gate[:, None]


class QKNorm(nn.Module):
    """RMS norm of q and k within each head (SD3.5)."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.q_norm = nn.RMSNorm(head_dim, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(head_dim, eps=NORM_EPS)


class FeedForward(nn.Module):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.hidden * config.mlp_ratio)
        self.fc2 = nn.Linear(config.hidden * config.mlp_ratio, config.hidden)
        self._activation = gelu_tanh if config.gelu == "tanh" else nn.gelu

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self._activation(self.fc1(x)))

    def add_modulated(
        self, x: mx.array, shift: mx.array, scale: mx.array, gate: mx.array
    ) -> mx.array:
        """x with the gated output for modulated x added."""
        return x + self(modulate(x, shift, scale)) * gate[:, None]


class Modulation(nn.Module):
    """SiLU and one linear: the conditioning vector to `parts` vectors of the hidden size."""

    def __init__(self, config: MMDiTConfig, parts: int) -> None:
        super().__init__()
        self.layers = [nn.SiLU(), nn.Linear(config.hidden, parts * config.hidden)]
        self._parts = parts

    def __call__(self, conditioning: mx.array) -> list[mx.array]:
        return self.split(self.vector(conditioning))

    def vector(self, conditioning: mx.array) -> mx.array:
        """All parts in one, (batch, parts·hidden)."""
        for layer in self.layers:
            conditioning = layer(conditioning)
        return conditioning

    def split(self, vector: mx.array) -> list[mx.array]:
        return mx.split(vector, self._parts, axis=-1)


class StreamBlock(nn.Module):
    """One stream (image or text) of a block: what happens before and after the attention.

    The modulation's parts are, in this order: shift, scale and gate of the attention; shift,
    scale and gate of the MLP; with dual attention, shift, scale and gate of the second one. The
    last text block ends at the attention and has the first two parts only.
    """

    def __init__(self, config: MMDiTConfig, *, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        self._attend: Attend = attend
        self._heads = config.heads
        self.attn = Attention(config, output=not last)
        if config.qk_norm:
            self.qk_norm = QKNorm(config.head_dim)
        if dual:
            self.attn2 = Attention(config)
            if config.qk_norm:
                self.qk_norm2 = QKNorm(config.head_dim)
        if not last:
            self.mlp = FeedForward(config)
        self.adaLN_modulation = Modulation(config, 2 if last else 9 if dual else 6)

    def project(
        self, x: mx.array, parts: list[mx.array], attention: Attention, norm: QKNorm | None
    ) -> Heads:
        """q, k and v under a shift and a scale; in one array where they are one product."""
        found = attention.project_modulated(x, *parts)
        if isinstance(found, mx.array):
            heads: Heads = mx.unflatten(found, -1, (3, self._heads, -1))
        else:
            each = (mx.unflatten(part, -1, (self._heads, -1)) for part in found)
            heads = tuple(part.transpose(0, 2, 1, 3) for part in each)
        if norm is None:
            return heads
        q, k, v = apart(heads)
        return norm.q_norm(q), norm.k_norm(k), v

    def before(self, x: mx.array, parts: list[mx.array]) -> tuple[Heads, mx.array | None]:
        """q, k, v for the joint attention, and what the second attention found, if there is one."""
        qkv = self.project(x, parts[:2], self.attn, self.get("qk_norm"))
        if "attn2" not in self:
            return qkv, None
        inner = self.project(x, parts[6:8], self.attn2, self.get("qk_norm2"))
        return qkv, self._attend(*apart(inner))

    def after(
        self, x: mx.array, attended: mx.array, inner: mx.array | None, parts: list[mx.array]
    ) -> mx.array:
        """The stream's tokens after attention and MLP."""
        x = self.attn.add_output(x, attended, parts[2])
        if inner is not None:
            x = self.attn2.add_output(x, inner, parts[8])
        return self.mlp.add_modulated(x, *parts[3:6])


class JointBlock(nn.Module):
    """One MMDiT block: both streams attend to each other, then go on by themselves."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self._attend: Attend = attend
        self._last = index == config.depth - 1
        self.image_transformer_block = StreamBlock(
            config, dual=index < config.dual_attention_blocks
        )
        self.text_transformer_block = StreamBlock(config, last=self._last)

    def use_attention(self, attend: Attend) -> None:
        """Computes attention by another function of q, k and v from now on."""
        for module in (self, self.image_transformer_block, self.text_transformer_block):
            module._attend = attend

    def __call__(
        self, image: mx.array, text: mx.array, conditioning: mx.array
    ) -> tuple[mx.array, mx.array | None]:
        """(batch, tokens, hidden) of both streams in and out; the last block gives no text."""
        image_block, text_block = self.image_transformer_block, self.text_transformer_block
        vectors = (b.adaLN_modulation.vector(conditioning) for b in (image_block, text_block))
        return self.modulated(image, text, *vectors)

    def modulated(
        self, image: mx.array, text: mx.array, image_vector: mx.array, text_vector: mx.array
    ) -> tuple[mx.array, mx.array | None]:
        """The same under what the two modulations have made of the conditioning."""
        image_block, text_block = self.image_transformer_block, self.text_transformer_block
        image_parts = image_block.adaLN_modulation.split(image_vector)
        text_parts = text_block.adaLN_modulation.split(text_vector)
        image_qkv, image_inner = image_block.before(image, image_parts)
        text_qkv, _ = text_block.before(text, text_parts)
        attended = self._attend(*beside(image_qkv, text_qkv))
        image_attended, text_attended = mx.split(attended, [image.shape[1]], axis=1)
        image = image_block.after(image, image_attended, image_inner, image_parts)
        if self._last:
            return image, None
        return image, text_block.after(text, text_attended, None, text_parts)


class FinalLayer(nn.Module):
    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden, config.patch**2 * config.latent_channels)
        self.adaLN_modulation = Modulation(config, 2)

    def __call__(self, x: mx.array, vector: mx.array) -> mx.array:
        """`vector` is what the modulation has made of the conditioning."""
        return self.linear(modulate(x, *self.adaLN_modulation.split(vector)))


class MMDiT(nn.Module):
    """Predicts the velocity of a noised latent, for all sizes of SD3 and SD3.5 and for nano."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbedding(config)
        self.x_pos_embedder = PositionEmbedding(config)
        self.y_embedder = Embedder(config.pooled_dim, config.hidden)
        self.t_embedder = Embedder(config.frequency_dim, config.hidden)
        self.context_embedder = nn.Linear(config.text_dim, config.hidden)
        self.multimodal_transformer_blocks = [JointBlock(config, i) for i in range(config.depth)]
        self.final_layer = FinalLayer(config)
        self._level: NoiseLevel | None = None
        self._run_block: RunBlock = run_block
        self._ends: Ends | None = None
        self.memory: Memory | None = None  # of layers that keep something, where there are such

    def run_blocks_with(self, run: RunBlock | None, ends: Ends | None = None) -> None:
        """Every call lets this run each block from now on, and takes these in the place of `begin`
        and `end`; None ends that."""
        self._run_block, self._ends = run or run_block, ends

    @property
    def can_be_compiled(self) -> bool:
        """Whether nothing runs the blocks that has to see each of them finished."""
        return self._run_block is run_block

    def follow(self, level: NoiseLevel | None) -> None:
        """Every call sets the level from its timesteps from now on; None ends that."""
        self._level = level

    @property
    def level(self) -> NoiseLevel | None:
        """What every call sets."""
        return self._level

    def set_sigma(self, sigma: mx.array | float) -> None:
        """Sets the level for calls of single blocks; nothing where no layer depends on it."""
        if self._level is not None:
            self._level.set_sigma(sigma)

    def reset_cache(self, guided: bool = False) -> None:
        """Begins another picture; nothing where no layer remembers one. `guided`: its batch is the
        prompts' rows and, behind them, the negative prompts'."""
        if self.memory is not None:
            self.memory.reset(guided)

    def arrays(self, vectors_are_given: bool) -> list[mx.array]:
        """All that a call reads, of parameters and of what layers have made of them."""
        return [
            array
            for name, array in tree_flatten(self.state)
            if isinstance(array, mx.array) and not (vectors_are_given and modulates(name))
        ]

    def modulation_layers(self) -> dict[str, Modulation]:
        """All modulations by path: both streams' of each block, then the final layer's."""
        layers = {
            f"{BLOCKS}.{index}.{stream}.{MODULATION}": block[stream].adaLN_modulation
            for index, block in enumerate(self.multimodal_transformer_blocks)
            for stream in ("image_transformer_block", "text_transformer_block")
        }
        return {**layers, f"final_layer.{MODULATION}": self.final_layer.adaLN_modulation}

    def conditioning(self, pooled: mx.array, timestep: mx.array) -> mx.array:
        """What every modulation reads, (batch, hidden)."""
        # As many rows as there are texts: the product of one row may be rounded otherwise.
        timestep = mx.broadcast_to(timestep, (len(pooled),))
        features = timestep_features(timestep, self.config.frequency_dim)
        return self.y_embedder(pooled) + self.t_embedder(features.astype(pooled.dtype))

    def __call__(
        self,
        latent: mx.array,
        text: mx.array,
        pooled: mx.array,
        timestep: mx.array,
        vectors: Sequence[mx.array] | None = None,
    ) -> mx.array:
        """Velocity of the (batch, height, width, channels) latent.

        text is (batch, tokens, text_dim), pooled (batch, pooled_dim), timestep (batch,) in
        thousandths of sigma, one per sample, or (1,) where it is the same for all. `vectors` are
        what the modulation layers, in their order, have made of pooled and timestep, where that is
        known already.
        """
        with nullcontext() if self._level is None else self._level.at(timestep / 1000):
            return self.velocity(latent, text, pooled, timestep, vectors)

    def velocity(
        self,
        latent: mx.array,
        text: mx.array,
        pooled: mx.array,
        timestep: mx.array,
        vectors: Sequence[mx.array] | None = None,
    ) -> mx.array:
        """The call itself, at the level that is set."""
        rows, columns = self.patch_grid(latent)
        blocks, run = self.multimodal_transformer_blocks, self._run_block
        begin, end = self._ends or (self.begin, self.end)
        given = None if vectors is not None else timestep
        image, text, conditioning = begin(latent, text, pooled, given)
        for index, block in enumerate(blocks):
            if vectors is None:
                image, text = run(index, block, image, text, conditioning)
            else:
                own = vectors[2 * index : 2 * index + 2]
                image, text = run(index, block.modulated, image, text, *own)
        last = None if vectors is None else vectors[-1]
        return end(image, conditioning, last, rows, columns)

    def begin(
        self, latent: mx.array, text: mx.array, pooled: mx.array, timestep: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """Both streams as the first block takes them, and what modulations read, if there is a
        timestep."""
        image = self.x_embedder(latent) + self.x_pos_embedder(*self.patch_grid(latent))
        conditioning = None if timestep is None else self.conditioning(pooled, timestep)
        return image, self.context_embedder(text), conditioning

    def end(
        self,
        image: mx.array,
        conditioning: mx.array | None,
        vector: mx.array | None,
        rows: int,
        columns: int,
    ) -> mx.array:
        """Velocity of the last block's tokens; `vector` is the final modulation's, where that is
        known already."""
        if vector is None:
            vector = self.final_layer.adaLN_modulation.vector(conditioning)
        return self.unpatch(self.final_layer(image, vector), rows, columns)

    def patch_grid(self, latent: mx.array) -> tuple[int, int]:
        """Rows and columns of patches; an impossible resolution is an error."""
        patch, side = self.config.patch, self.config.position_size
        height, width = latent.shape[1:3]
        limit = patch * side
        if height % patch or width % patch or not (0 < height <= limit and 0 < width <= limit):
            raise UserError(
                f"latent of {height}x{width} does not fit: both sides must be multiples of {patch} "
                f"from {patch} to {limit}"
            )
        return height // patch, width // patch

    def unpatch(self, x: mx.array, rows: int, columns: int) -> mx.array:
        """Tokens back to (batch, height, width, channels)."""
        patch, channels = self.config.patch, self.config.latent_channels
        x = x.reshape(-1, rows, columns, patch, patch, channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * patch, columns * patch, channels)
