"""The model card of a saved model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = """\
---
library_name: mlx
pipeline_tag: text-to-image
tags:
- mlx
- ditq
---
"""

MLX = """\
{named} in MLX's affine packing, so MLX's own layers read {it}:

```python
import json, mlx.core as mx, mlx.nn as nn

config = json.load(open("{folder}config.json"))["quantization"]
tensors = {tensors}
path = "{path}"
rows, words = tensors[f"{{path}}.weight"].shape
kind = config.get(path, config)
layer = nn.QuantizedLinear(
    words * 32 // kind["bits"], rows, group_size=kind["group_size"], bits=kind["bits"]
)
names = ("weight", "scales", "biases", "bias")
layer.load_weights([(name, tensors[f"{{path}}.{{name}}"]) for name in names])
```

A layer that has a `shift` or a `smoothing` in `{folder}ditq.safetensors` expects
(x - shift) / smoothing.
"""


def model_card(
    name: str, details: Mapping[str, Any], table: Mapping[str, Any], whole: bool, folder: str = ""
) -> str:
    """README.md: what the model is, which files it has, how it was made and how it runs.

    `whole` is whether text encoders and VAE travel along; `folder` is where the transformer lies,
    such as "transformer/".
    """
    made_from, layers = details["made_from"], details["layers"]
    weights = f"{table['bits']}-bit weights in {len(layers)} layers"
    inputs = "activations in floats"
    if details["sigmas"] is not None and not details["weights_only"]:
        inputs = f"quantized activations ({details['a_scale']} scales)"
    others = sorted({f"{k['bits']}-bit" for p, k in table.items() if is_other(p, k, layers)})
    modulation = f"; modulation in {', '.join(others)} weights" if others else ""
    lines = [HEAD, f"# {name}", ""]
    lines += [f"{made_from['model']}, quantized by ditq: {weights}, {inputs}"]
    lines[-1] += f"{modulation}."
    if whole:
        lines += ["", "```sh", 'ditq generate --model . --prompt "..." --output picture.png', "```"]
    else:
        lines += ["", "The folder holds the transformer only, without text encoders and VAE."]
    lines += ["", "## Made from", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in sorted(made_from.items())]
    lines += [f"| {key} | {value} |" for key, value in sorted(details["settings"].items())]
    alone = MLX.format(path=next(iter(layers)), folder=folder, **read_by_mlx(details, folder))
    return "\n".join([*lines, "", "## With MLX alone", "", alone])


def read_by_mlx(details: Mapping[str, Any], folder: str) -> dict[str, str]:
    """Of the file or the shards with what MLX's layers read: how they are named, and loaded."""
    files = sorted(details["files"])
    names = [n for n in files if n.startswith("model") and n.endswith(".safetensors")]
    named = " and ".join(f"`{folder}{name}`" for name in names)
    if len(names) == 1:
        return {"named": f"{named} is", "it": "it", "tensors": f'mx.load("{folder}{names[0]}")'}
    listed = "".join(f'    "{folder}{name}",\n' for name in names)
    tensors = "{}\nfor name in (\n" + listed + "):\n    tensors |= mx.load(name)"
    return {"named": f"{named} are", "it": "them", "tensors": tensors}


def is_other(path: str, kind: Any, layers: Mapping[str, Any]) -> bool:
    return isinstance(kind, dict) and path not in layers
