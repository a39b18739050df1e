"""Scoped replacement and the order of loading, on models of other shapes than ours too."""

from __future__ import annotations

import importlib.util
import json

from src.errors import UserError
from src.models.load import load_pipeline
from src.models.paths import BLOCKS, block_linears
from src.quant.int8 import INT8Linear
from src.quant.int8_operators import INT8Quantizer
from src.quant.lora import Adapter, LoRALinear
from src.quant.replace import (
    LoadOrder,
    QuantizationBlock,
    collect_replace_targets,
    prepare_int8,
    replace_linear_with_int8,
)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from .helpers import random_inputs, relative_error

WIDE = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDE, WIDE)
        self.norm = nn.LayerNorm(WIDE)
        self.to_k = nn.Linear(WIDE, WIDE, bias=False)
        self.ff = nn.Sequential(nn.Linear(WIDE, 2 * WIDE), nn.GELU(), nn.Linear(2 * WIDE, WIDE))

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.ff(self.norm(self.to_q(x) + self.to_k(x)))


class Model(nn.Module):
    """Three blocks between two linears that are not theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDE, WIDE)
        self.blocks = [Block() for _ in range(11)]
        self.head = nn.Linear(WIDE, 8)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model_of(seed: int = 0) -> Model:
    mx.random.seed(seed)
    model = Model()
    mx.eval(model.parameters())
    return model


def tensors_of(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def input_of(rows: int = 5) -> mx.array:
    return mx.array(np.random.default_rng(2).standard_normal((rows, WIDE)).astype(np.float32))


def quantized_checkpoint(model: Model, paths: list[str], block: int = 0) -> dict[str, mx.array]:
    """As the converter writes it: codes and scales of some layers, the rest as it is."""
    tensors = tensors_of(model)
    for path in paths:
        weight = tensors[f"{path}.weight"]
        quantize = INT8Quantizer.quantize_per_channel
        found = INT8Quantizer.quantize_blockwise(weight, block) if block else quantize(weight)
        tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"] = found
    return tensors


ON = QuantizationBlock(enabled=True)
CONVERTED = QuantizationBlock(enabled=True, checkpoint_is_quantized=True)


def test_targets_are_the_scopes_linears_in_module_order():
    names = ("to_q", "to_k", "ff.layers.0", "ff.layers.2")
    wanted = [f"blocks.{i}.{name}" for i in range(11) for name in names]
    assert list(collect_replace_targets(model_of())) == wanted
    kept = collect_replace_targets(model_of(), "blocks.10", ("to_", "layers.2"))
    assert list(kept) == ["blocks.10.ff.layers.0"]


def test_only_the_scope_is_replaced():
    model, x = model_of(), input_of()
    wanted = model(x)
    paths = replace_linear_with_int8(model, skip_keywords=["to_k"])
    modules = dict(model.named_modules())
    assert len(paths) == 33 and all(isinstance(modules[path], INT8Linear) for path in paths)
    floats = {p for p, m in modules.items() if isinstance(m, nn.Linear)}
    assert floats == {"embed", "head", *(f"blocks.{i}.to_k" for i in range(11))}
    assert 0 < relative_error(model(x), wanted) < 0.03


def test_the_transformers_own_blocks_are_a_scope():
    pipeline = load_pipeline("tiny")
    model = pipeline.transformer
    inputs = (*random_inputs(model.config, 8, 8), mx.array([900.0, 100.0]))
    wanted, linears = model(*inputs), list(block_linears(model))
    paths = replace_linear_with_int8(model, BLOCKS, skip_keywords=["adaLN_modulation"])
    assert sorted(paths) == sorted(linears)
    assert relative_error(model(*inputs), wanted) < 0.03


@pytest.mark.parametrize(
    "scope, words, message",
    [
        ("layers", (), "scope_attr 'layers' leads nowhere at 'layers'; valid here: embed, blocks"),
        ("blocks.11", (), "leads nowhere at '11'; valid here: 0, 1, 2"),
        ("blocks.0.norm", (), "there is no linear under 'blocks.0.norm'"),
        ("blocks", ("to_", "ff"), "all 44 linears under 'blocks' have one of 'to_', 'ff'"),
        ("blocks", "ff", "skip_keywords is 'ff'; valid: a list of words"),
        ("blocks", ("",), "valid: a list of words that are not empty"),
    ],
)
def test_a_scope_that_matches_nothing_is_an_error(scope, words, message):
    with pytest.raises(UserError, match=message):
        replace_linear_with_int8(model_of(), scope, skip_keywords=words)


def test_a_refusal_leaves_the_model_as_it_was():
    model = model_of()
    model.blocks[10].to_q.weight[0, 0] = mx.inf
    with pytest.raises(UserError, match="blocks.10.to_q holds weights that are NaN or infinite"):
        replace_linear_with_int8(model)
    with pytest.raises(UserError, match="block size 128 does not divide the 64 .* blocks.0.to_q"):
        replace_linear_with_int8(model, block_size=128)
    with pytest.raises(UserError, match="unknown backend 'fast'"):
        replace_linear_with_int8(model, backend="fast")
    assert not any(isinstance(m, INT8Linear) for m in model.modules())
    other = model_of()
    replace_linear_with_int8(other)
    with pytest.raises(UserError, match="under 'blocks' are INT8 already"):
        replace_linear_with_int8(other)


def test_an_adapter_at_run_time_is_refused_with_the_way_out():
    model = model_of()
    adapter = Adapter(mx.zeros((4, WIDE)), mx.zeros((WIDE, 4)))
    model.blocks[2].to_k = LoRALinear(model.blocks[2].to_k, adapter)
    with pytest.raises(UserError, match=r"blocks.2.to_k has a LoRA .* merge_lora\(model, file, sc"):
        replace_linear_with_int8(model)


@pytest.mark.parametrize("block", [0, 32])
def test_a_converted_checkpoint_gives_what_quantizing_here_gives(tmp_path, block):
    here, x = model_of(), input_of()
    paths = replace_linear_with_int8(here, skip_keywords=["layers.2"], block_size=block)
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), quantized_checkpoint(model_of(), paths, block))
    loaded = model_of(seed=1)
    # The keywords are not given: the file says itself which layers it has kept.
    assert prepare_int8(loaded, CONVERTED, path, dtype=mx.float32) == paths
    np.testing.assert_array_equal(np.array(loaded(x)), np.array(here(x)))


def test_codes_and_scales_are_as_loaded_after_the_cast():
    paths = list(collect_replace_targets(model_of()))
    tensors, model = quantized_checkpoint(model_of(), paths), model_of(1)
    prepare_int8(model, CONVERTED, tensors, dtype=mx.bfloat16)
    layer = model.blocks[3].to_q
    assert layer.weight.dtype == mx.int8 and layer.weight_scale.dtype == mx.float32
    scale = tensors["blocks.3.to_q.weight_scale"]
    np.testing.assert_array_equal(np.array(layer.weight_scale), np.array(scale))
    assert model.embed.weight.dtype == layer.bias.dtype == mx.bfloat16


def test_a_sixteen_bit_checkpoint_is_quantized_from_its_own_values():
    """After loading and before the cast: 16 bits would round them twice."""
    tensors, model = tensors_of(model_of()), model_of(1)
    prepare_int8(model, ON, tensors, dtype=mx.bfloat16)
    codes, scale = INT8Quantizer.quantize_per_channel(tensors["blocks.3.to_q.weight"])
    layer = model.blocks[3].to_q
    np.testing.assert_array_equal(np.array(layer.weight), np.array(codes))
    np.testing.assert_array_equal(np.array(layer.weight_scale), np.array(scale))


def test_off_by_default():
    model, tensors = model_of(1), tensors_of(model_of())
    assert prepare_int8(model, QuantizationBlock.read({}), tensors, dtype=mx.float16) == []
    assert model.blocks[0].to_q.weight.dtype == mx.float16
    assert not any(isinstance(m, INT8Linear) for m in model.modules())


@pytest.mark.parametrize(
    "block, steps, message",
    [
        (CONVERTED, ["load"], "load before replace is refused: .* need INT8 layers .*; the order"),
        (CONVERTED, ["cast"], "cast before replace is refused: the cast would round"),
        (CONVERTED, ["replace", "cast"], "cast before load is refused: .* replace → load → cast"),
        (CONVERTED, ["replace", "replace"], "replace was done already"),
        (ON, ["replace", "load"], "replace before load is refused: the codes would be those of we"),
        (ON, ["cast"], "cast before replace is refused: .* load → replace → cast"),
        (QuantizationBlock(), ["replace"], "quantization.enabled is false"),
    ],
)
def test_another_order_is_refused_with_the_reason(block, steps, message):
    model = model_of()
    tensors = tensors_of(model)
    if block.checkpoint_is_quantized:
        tensors = quantized_checkpoint(model, list(collect_replace_targets(model)))
    order = LoadOrder(model, block)
    take = {
        "replace": order.replace,
        "load": lambda: order.load(tensors),
        "cast": lambda: order.cast(mx.float16),
    }
    for step in steps[:-1]:
        take[step]()
    with pytest.raises(UserError, match=message):
        take[steps[-1]]()


def test_checkpoints_that_are_not_what_the_block_says_are_refused():
    model = model_of()
    floats, paths = tensors_of(model), list(collect_replace_targets(model))
    with pytest.raises(UserError, match="no checkpoint was given to load into the empty INT8"):
        prepare_int8(model_of(), CONVERTED)
    with pytest.raises(UserError, match="no INT8 codes of blocks.0.to_q .*is_quantized: false"):
        prepare_int8(model_of(), CONVERTED, floats)
    with pytest.raises(UserError, match="is INT8 at blocks.0.ff.* checkpoint_is_quantized: true"):
        prepare_int8(model_of(), ON, quantized_checkpoint(model, paths))
    wrong = quantized_checkpoint(model, paths)
    wrong["blocks.0.to_q.weight_scale"] = wrong["blocks.0.to_q.weight_scale"].astype(mx.float16)
    with pytest.raises(UserError, match="weight_scale of the checkpoint is .*float16.*float32"):
        prepare_int8(model_of(), CONVERTED, wrong)
    wrong = quantized_checkpoint(model, paths)
    del wrong["blocks.0.to_q.weight_scale"]  # codes of what scale?
    with pytest.raises(UserError, match="to_q.weight of the checkpoint is .*int8.*needs .*float32"):
        prepare_int8(model_of(), CONVERTED, wrong)
    wrong = quantized_checkpoint(model, paths)
    del wrong["head.bias"]
    with pytest.raises(UserError, match=r"the checkpoint lacks head.bias \(1 missing, 0 too many"):
        prepare_int8(model_of(), CONVERTED, wrong)


YAML = """
model: nano
quantization:
  enabled: true
  checkpoint_is_quantized: false
  scope_attr: multimodal_transformer_blocks
  skip_keywords: [adaLN_modulation, fc2]
"""


def test_json_and_yaml_say_the_same(tmp_path):
    yaml = pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text(YAML)
    (tmp_path / "a.json").write_text(json.dumps(yaml.safe_load(YAML)))
    wanted = QuantizationBlock(True, False, BLOCKS, ("adaLN_modulation", "fc2"))
    for name in ("a.yaml", "a.json"):
        assert QuantizationBlock.read(tmp_path / name) == wanted
    for nothing in (None, {}, {"model": "nano"}, {"quantization": None}):
        assert QuantizationBlock.read(nothing) == QuantizationBlock()


def test_a_file_without_the_block_is_refused(tmp_path):
    """Or settings that stand one level too high would be left out in silence."""
    (tmp_path / "a.json").write_text('{"enabled": true}')
    with pytest.raises(UserError, match="a.json has no table 'quantization', only enabled; put"):
        QuantizationBlock.read(tmp_path / "a.json")


def test_yaml_without_its_package_names_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text(YAML)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs PyYAML: `pip install pyyaml`, or write it as JSON"):
        QuantizationBlock.read(tmp_path / "a.yaml")


def test_a_yaml_key_may_take_the_place_of_a_merged_one(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "a.yaml").write_text(
        "deep: {base: &base {<<: &on {enabled: true}, enabled: false, scope_attr: a}}\n"
        "quantization: {<<: *base, enabled: true}"
    )
    assert QuantizationBlock.read(tmp_path / "a.yaml") == QuantizationBlock(True, scope_attr="a")


@pytest.mark.parametrize(
    "block, message",
    [
        ({"enable": True}, "quantization.enable is unknown; valid: enabled, checkpoint_is_quant"),
        ({"enabled": "yes"}, "quantization.enabled is 'yes'; valid: true or false"),
        ({"scope_attr": ""}, "scope_attr is ''"),
        ({"skip_keywords": "fc2"}, "skip_keywords is 'fc2'; valid: a list of words"),
        ({"skip_keywords": [1]}, "valid: a list of words"),
        ([True], "quantization is .*; valid: a table of its settings"),
    ],
)
def test_a_block_that_says_something_else_is_refused(block, message):
    with pytest.raises(UserError, match=message):
        QuantizationBlock.read({"quantization": block})


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.toml", "", "valid endings: .json, .yaml, .yml"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.yaml", "quantization: {}\nmodel: a\nquantization: {}", "'quantization' is there twice"),
        ("a.yml", "quantization: {enabled: true, enabled: false}", "'enabled' is there twice"),
        ("a.json", '{"quantization": {}, "quantization": {}}', "'quantization' is there twice"),
        ("a.yaml", "made: 2001-99-99", "is not YAML that this program reads"),
        ("a.yaml", "- 1", "holds a list, not a table"),
        ("a.yml", None, "does not exist"),
        ("a.json", "[]", "not an object"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path, name, text, message):
    if name.endswith("ml") and name != "a.toml":
        pytest.importorskip("yaml")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        QuantizationBlock.read(tmp_path / name)
