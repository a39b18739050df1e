"""An MMDiT forward in plain NumPy, float64, written from the SD3 and SD3.5 papers' formulas.

It shares nothing with the package but the names of the tensors.
"""

from __future__ import annotations

import math

import numpy as np


def linear(w: dict, path: str, x: np.ndarray) -> np.ndarray:
    y = np.einsum("...k,nk->...n", x, w[f"{path}.weight"])
    return y + w[f"{path}.bias"] if f"{path}.bias" in w else y


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def heads_of(w: dict, stream: str, which: str, x: np.ndarray, heads: int) -> list[np.ndarray]:
    """q, k, v of (batch, tokens, heads, head_dim) from one stream's normed tokens."""
    out = []
    for letter in "qkv":
        y = linear(w, f"{stream}.attn{which}.{letter}_proj", x)
        y = y.reshape(*y.shape[:2], heads, -1)
        norm = f"{stream}.qk_norm{which}.{letter}_norm.weight"
        out.append(rms_norm(y, w[norm]) if norm in w else y)
    return out


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhij,bjhd->bihd", weights, v)
    return out.reshape(*out.shape[:2], -1)


def embed_patches(w: dict, latent: np.ndarray) -> np.ndarray:
    kernel = w["x_embedder.proj.weight"]  # out, rows, columns, in
    p = kernel.shape[1]
    b, height, width, c = latent.shape
    patches = latent.reshape(b, height // p, p, width // p, p, c)
    tokens = np.einsum("brpsqc,npqc->brsn", patches, kernel) + w["x_embedder.proj.bias"]
    grid = w["x_pos_embedder.pos_embed.weight"]
    side = math.isqrt(len(grid))
    grid = grid.reshape(side, side, -1)
    rows, columns = height // p, width // p
    top, left = (side - rows) // 2, (side - columns) // 2
    tokens = tokens + grid[top : top + rows, left : left + columns]
    return tokens.reshape(b, rows * columns, -1)


def condition(w: dict, pooled: np.ndarray, timestep: np.ndarray, size: int) -> np.ndarray:
    half = size // 2
    phase = timestep[:, None] * 10000.0 ** (-np.arange(half) / half)
    features = np.concatenate([np.cos(phase), np.sin(phase)], -1)
    total = 0.0
    for name, x in (("t_embedder", features), ("y_embedder", pooled)):
        hidden = silu(linear(w, f"{name}.mlp.layers.0", x))
        total = total + linear(w, f"{name}.mlp.layers.2", hidden)
    return total


def forward(w: dict, config, latent, text, pooled, timestep) -> np.ndarray:
    """Velocity for tensors under the package's names; all arrays float64."""
    c = silu(condition(w, pooled, timestep, config.frequency_dim))[:, None]
    image = embed_patches(w, latent)
    text = linear(w, "context_embedder", text)

    def scaled(x, shift, scale):
        return layer_norm(x) * (1 + scale) + shift

    for i in range(config.depth):
        block = f"multimodal_transformer_blocks.{i}"
        streams = {"image": image, "text": text}
        parts, qkv = {}, {}
        for kind, x in streams.items():
            path = f"{block}.{kind}_transformer_block"
            m = linear(w, f"{path}.adaLN_modulation.layers.1", c)
            parts[kind] = np.split(m, m.shape[-1] // config.hidden, -1)
            normed = scaled(x, parts[kind][0], parts[kind][1])
            qkv[kind] = heads_of(w, path, "", normed, config.heads)
        mixed = attention(
            *(np.concatenate(pair, 1) for pair in zip(qkv["image"], qkv["text"], strict=True))
        )
        joined = {"image": mixed[:, : image.shape[1]], "text": mixed[:, image.shape[1] :]}
        for kind, x in streams.items():
            path, m = f"{block}.{kind}_transformer_block", parts[kind]
            if f"{path}.mlp.fc1.weight" not in w:
                continue
            y = x + m[2] * linear(w, f"{path}.attn.o_proj", joined[kind])
            if f"{path}.attn2.q_proj.weight" in w:
                inner = attention(*heads_of(w, path, "2", scaled(x, m[6], m[7]), config.heads))
                y = y + m[8] * linear(w, f"{path}.attn2.o_proj", inner)
            hidden = gelu(linear(w, f"{path}.mlp.fc1", scaled(y, m[3], m[4])), config.gelu)
            streams[kind] = y + m[5] * linear(w, f"{path}.mlp.fc2", hidden)
        image, text = streams["image"], streams["text"]

    shift, scale = np.split(linear(w, "final_layer.adaLN_modulation.layers.1", c), 2, -1)
    out = linear(w, "final_layer.linear", scaled(image, shift, scale))
    p, ch = config.patch, config.latent_channels
    b, height, width, _ = latent.shape
    out = out.reshape(b, height // p, width // p, p, p, ch)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(b, height, width, ch)
