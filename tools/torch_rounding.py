"""AdaRound of one MMDiT block, plainly in PyTorch, to be timed against ours."""

from __future__ import annotations

import statistics
import time
from typing import Any

import src  # noqa: F401  before mlx, for OpenBLAS
from src.models.configs import MMDiTConfig
from src.quant.rounding import start_between
from src.quant.standin import BlockData, StandInBlock, channel_power, stream_errors

import mlx.core as mx
import numpy as np
import torch
import torch.nn.functional as F

GAMMA, ZETA = -0.1, 1.1
STREAMS = ("image_transformer_block", "text_transformer_block")


class Block(torch.nn.Module):
    """The two streams of one block; the linears' weights are α, the step up from a floor."""

    def __init__(
        self, config: MMDiTConfig, block: StandInBlock, codes: dict, scales: dict, device: str
    ) -> None:
        super().__init__()
        self.heads, self.device = config.heads, device
        self.alpha, self.fixed = torch.nn.ParameterDict(), {}
        for path, master in block.masters().items():
            first = start_between(master, scales[path], codes[path], 1.0)
            floor = mx.floor(first)
            share = (first - floor - GAMMA) / (ZETA - GAMMA)
            alpha = mx.log(share / (1 - share))
            bias = block.stand_ins[path].get("bias")
            self.alpha[path.replace(".", "/")] = torch.nn.Parameter(self.tensor(alpha))
            self.fixed[path] = [
                self.tensor(floor),
                self.tensor(scales[path]),
                None if bias is None else self.tensor(bias),
            ]
        self.modulations = {}
        for stream in STREAMS:
            linear = block.module[stream].adaLN_modulation.layers[1]
            self.modulations[stream] = self.tensor(linear.weight), self.tensor(linear.bias)

    def tensor(self, array: mx.array) -> torch.Tensor:
        return torch.tensor(np.array(array.astype(mx.float32)), device=self.device)

    def step_up(self, path: str) -> torch.Tensor:
        soft = torch.sigmoid(self.alpha[path.replace(".", "/")]) * (ZETA - GAMMA) + GAMMA
        return torch.clamp(soft, 0, 1)

    def linear(self, x: torch.Tensor, path: str) -> torch.Tensor:
        floor, scale, bias = self.fixed[path]
        return F.linear(x, torch.clamp(floor + self.step_up(path), -8, 7) * scale, bias)

    def modulated(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return normed * (1 + scale[:, None]) + shift[:, None]

    def forward(self, image: torch.Tensor, text: torch.Tensor, c: torch.Tensor):
        streams, joined, parts = {STREAMS[0]: image, STREAMS[1]: text}, [], {}
        for name, x in streams.items():
            parts[name] = F.linear(F.silu(c), *self.modulations[name]).chunk(6, dim=-1)
            entered = self.modulated(x, *parts[name][:2])
            joined.append(
                [
                    self.linear(entered, f"{name}.attn.{kind}_proj")
                    .unflatten(-1, (self.heads, -1))
                    .transpose(1, 2)
                    for kind in "qkv"
                ]
            )
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*joined, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        split = attended.split([image.shape[1], text.shape[1]], dim=1)
        outputs = []
        for (name, x), own in zip(streams.items(), split, strict=True):
            part = parts[name]
            x = x + self.linear(own, f"{name}.attn.o_proj") * part[2][:, None]
            inner = F.gelu(
                self.linear(self.modulated(x, *part[3:5]), f"{name}.mlp.fc1"), approximate="tanh"
            )
            outputs.append(x + self.linear(inner, f"{name}.mlp.fc2") * part[5][:, None])
        return outputs


def torch_seconds(
    config: MMDiTConfig,
    block: StandInBlock,
    data: BlockData,
    codes: dict,
    scales: dict,
    iters: int,
    device: str = "cuda",
) -> dict[str, Any]:
    """Seconds of one iteration, eager and compiled, and how the first loss compares to ours."""
    torch.set_float32_matmul_precision("high")  # TF32, as MLX computes
    found: dict[str, Any] = {"version": torch.__version__}
    for name in ("eager", "compiled"):
        model = Block(config, block, codes, scales, device)
        rows = [model.tensor(array) for array in (*data.inputs, *data.targets)]
        power = [model.tensor(own) for own in channel_power(data, len(data))]

        def loss_of(
            *arrays: torch.Tensor, model: Block = model, power: list = power
        ) -> torch.Tensor:
            outputs = model(*arrays[:3])
            return sum(
                ((o - t).square() / p).mean()
                for o, t, p in zip(outputs, arrays[3:], power, strict=True)
            )

        first = loss_of(*rows).item()
        found["loss_difference"] = abs(first / our_loss(block, data, codes, scales) - 1)
        found[name] = timed(model, loss_of, rows, iters, name == "compiled")
        del model, rows, power
    return found


def our_loss(block: StandInBlock, data: BlockData, codes: dict, scales: dict) -> float:
    """The loss of the same soft weights, through our block."""
    masters = block.masters()
    soft = {
        path: mx.clip(start_between(master, scales[path], codes[path], 1.0), -8, 7) * scales[path]
        for path, master in masters.items()
    }
    try:
        block.set_weights(soft)
        return sum(stream_errors(block(data), data.targets, channel_power(data, len(data)))).item()
    finally:
        block.set_weights(masters)


def timed(model: Block, loss_of: Any, rows: list, iters: int, compiled: bool) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    loss_of = torch.compile(loss_of) if compiled else loss_of

    def iterate() -> None:
        optimizer.zero_grad(set_to_none=True)
        undecided = sum(
            (1 - (2 * model.step_up(path) - 1).abs().pow(10)).mean() for path in model.fixed
        )
        (loss_of(*rows) + 0.01 * undecided).backward()
        optimizer.step()

    for _ in range(3):
        iterate()
    taken = []
    for _ in range(3):
        synchronize(model.device)
        start = time.perf_counter()
        for _ in range(iters):
            iterate()
        synchronize(model.device)
        taken.append((time.perf_counter() - start) / iters)
    return statistics.median(taken)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
