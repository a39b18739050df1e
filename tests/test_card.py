"""The model card: what it says of the folder that it lies in, and whether that is so."""

from __future__ import annotations

import json
from pathlib import Path

from src.inference.card import model_card
from src.inference.export import save_model, save_transformer
from src.store import load_tensors, save_folder

import mlx.core as mx

from .quantized_models import quantized_pipeline


def layer_of_the_card(folder: Path, card: str, monkeypatch) -> object:
    """What the card's own lines make, run beside it."""
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    return names["layer"]


def test_the_card_of_shards_names_and_reads_them(tmp_path, monkeypatch):
    folder = save_model(quantized_pipeline(), tmp_path / "saved")
    whole = layer_of_the_card(folder, (folder / "README.md").read_text(), monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    details = config["ditq"]
    del details["files"]["model.safetensors"]
    tensors = load_tensors(folder / "model.safetensors")
    mx.eval(tensors)
    names = save_folder(
        folder, tensors, max_shard_bytes=sum(t.nbytes for t in tensors.values()) // 2
    )
    assert len(names) > 2
    card = model_card(
        "saved", {**details, "files": dict.fromkeys([*details["files"], *names])},
        config["quantization"], True,
    )  # fmt: skip
    assert "`model-00001-of-" in card and "model.safetensors`" not in card
    layer = layer_of_the_card(folder, card, monkeypatch)
    assert mx.array_equal(layer.weight, whole.weight) and mx.array_equal(layer.bias, whole.bias)


def test_a_transformer_by_itself_says_so(tmp_path):
    alone = save_transformer(quantized_pipeline().transformer, tmp_path / "alone")
    whole = save_model(quantized_pipeline(), tmp_path / "whole")
    assert "transformer only" in (alone / "README.md").read_text()
    assert "ditq generate" not in (alone / "README.md").read_text()
    assert "transformer only" not in (whole / "README.md").read_text()
