"""Stable Diffusion 3's files: found in every layout, offline, without PyTorch or DiffusionKit."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

from src.errors import UserError
from src.inference.export import save_parts
from src.inference.int8 import Int8, int8_layers, open_with_int8
from src.inference.saved import load_saved
from src.models import sd3_download, sd3_files
from src.models.configs import MMDiTConfig
from src.models.load import ModelChoice, chosen, load_pipeline
from src.models.paths import module_at
from src.models.sd3_names import decoder_tensors
from src.models.sd3_text import Text
from src.store import save_folder
from src.store.files import damaged

import mlx.core as mx
import pytest

from .checkpoint_layouts import to_diffusers, to_mlx, to_stability
from .helpers import assert_one_error_line, random_model, run_here
from .quantized_models import quantized_pipeline

CONFIG = MMDiTConfig(depth=2, hidden=128, heads=2, text_dim=64, pooled_dim=32, position_size=16)
KINDS = {
    "sd3-medium": CONFIG,
    "sd3.5-medium": replace(CONFIG, qk_norm=True, dual_attention_blocks=1),
    "sd3.5-large": replace(CONFIG, qk_norm=True),
}
PREFIX = "text_encoders.t5xxl.transformer."
needs_no_kit = pytest.mark.skipif(
    importlib.util.find_spec("diffusionkit") is not None, reason="DiffusionKit is installed"
)


@pytest.fixture(autouse=True)
def no_checkpoint(offline, monkeypatch):
    monkeypatch.delenv("DITQ_CHECKPOINT", raising=False)


def save(path: Path, tensors: dict[str, mx.array]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), {k: mx.contiguous(v) for k, v in tensors.items()})
    return path


def snapshot(cache: Path, repository: str) -> Path:
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    return folder / "snapshots" / "abc"


def everywhere(tmp_path: Path, name: str) -> dict[str, Path]:
    """One transformer in every place where a checkpoint may be."""
    model = random_model(KINDS[name])
    published = sd3_files.PUBLISHED[name]
    save(snapshot(tmp_path / "home" / "hub", published.name) / published.file, to_stability(model))
    return {
        "single file": save(tmp_path / "one" / "model.safetensors", to_stability(model)),
        "its folder": tmp_path / "one",
        "DiffusionKit's names": save(tmp_path / "kit.safetensors", to_mlx(model)),
        "diffusers' folder": save(
            tmp_path / "whole" / "transformer" / "diffusion_pytorch_model.safetensors",
            to_diffusers(model),
        ).parent.parent,
        "cache": tmp_path / "home",
    }


@pytest.mark.parametrize("name", KINDS)
def test_every_layout_is_the_same_model(tmp_path, name):
    loaded = {
        place: load_pipeline(name, checkpoint=path)
        for place, path in everywhere(tmp_path, name).items()
    }
    assert len({pipeline.hash for pipeline in loaded.values()}) == 1
    for place, pipeline in loaded.items():
        assert pipeline.name == name and pipeline.transformer.config == KINDS[name], place
        assert pipeline.defaults.height == 256, "a picture that this grid of positions can draw"


def test_shards_of_a_variant_alone_are_read(tmp_path):
    """diffusers' variant="fp16": model.fp16-00001-of-…, and an index with fp16 near its end."""
    folder = tmp_path / "text_encoder_3"
    tensors = {f"layer{i}.weight": mx.full((4, 4), i) for i in range(6)}
    save_folder(folder, tensors, max_shard_bytes=128, stem="model.fp16")
    index = folder / "model.fp16.safetensors.index.json"
    index.rename(folder / "model.safetensors.index.fp16.json")
    found = sd3_files.Location(folder).tensors()
    assert found.keys() == tensors.keys() and len(list(folder.glob("*-of-*"))) > 1
    assert all(mx.array_equal(found[name], tensors[name]) for name in tensors)
    save(folder / "model.safetensors", {"whole": mx.ones(1)})
    assert sd3_files.Location(folder).tensors().keys() == {"whole"}


def test_a_checkpoint_tells_which_model_it_is(tmp_path):
    for name in KINDS:
        path = save(tmp_path / f"{name}.safetensors", to_stability(random_model(KINDS[name])))
        assert load_pipeline(None, checkpoint=path).name == name


def test_another_model_has_another_hash(tmp_path):
    weights = to_stability(random_model(CONFIG))
    first = load_pipeline("sd3-medium", checkpoint=save(tmp_path / "a.safetensors", weights))
    weights["model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"] *= 1.01
    other = load_pipeline("sd3-medium", checkpoint=save(tmp_path / "b.safetensors", weights))
    assert first.hash != other.hash


def test_parts_are_found_inside_then_beside(tmp_path):
    weights = to_stability(random_model(CONFIG))
    bare = save(tmp_path / "bare" / "model.safetensors", weights)
    files = sd3_files.files_of(bare, None)
    assert files.part("t5") is None and files.part("vae") is None and files.tokenizer("t5") is None
    beside = save(tmp_path / "bare" / "text_encoders" / "t5xxl_fp16.safetensors", weights)
    assert files.part("t5").path == beside
    full = save(tmp_path / "full.safetensors", weights | {f"{PREFIX}x": mx.zeros((1,))})
    part = sd3_files.files_of(full, None).part("t5")
    assert part.path == full and list(part.tensors()) == ["x"]
    (tmp_path / "tokenizer_3").mkdir()
    (tmp_path / "tokenizer_3" / "spiece.model").write_bytes(b"")
    assert sd3_files.files_of(full, None).tokenizer("t5") == tmp_path / "tokenizer_3"


def test_half_a_tokenizer_is_none(tmp_path):
    half, whole = tmp_path / "tokenizer", snapshot(tmp_path / "hub", sd3_files.ENCODERS)
    half.mkdir()
    (half / "vocab.json").write_text("{}")
    files = sd3_files.Files(tmp_path / "model.safetensors", (tmp_path, whole), tmp_path)
    assert files.tokenizer("clip_l") is None
    (whole / "tokenizer_l").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (whole / "tokenizer_l" / name).write_text("{}")
    assert files.tokenizer("clip_l") == whole / "tokenizer_l", "the next place has all of it"
    (half / "merges.txt").write_text("")
    assert files.tokenizer("clip_l") == half


def test_what_was_downloaded_since_is_found_unless_a_place_was_named(tmp_path):
    """Or the hub would be asked for it again at every batch of a first run."""
    cache, published = tmp_path / "no-cache" / "hub", sd3_files.PUBLISHED["sd3-medium"]
    file = snapshot(cache, published.name) / published.file
    save(file, to_stability(random_model(CONFIG)))
    files = sd3_files.find_cached("sd3-medium")
    named = sd3_files.files_of(file, None)
    assert files.part("clip_g") is None and files.tokenizer("t5") is None
    encoders, google = (snapshot(cache, n) for n in (sd3_files.ENCODERS, sd3_files.T5_TOKENIZER))
    path = save(encoders / "clip_g" / "model.fp16.safetensors", {"x": mx.zeros((1,))})
    (google / "spiece.model").write_bytes(b"")
    assert files.part("clip_g").path == path
    assert files.tokenizer("t5").resolve() == google.resolve()
    assert named.part("clip_g") is None, "looked for once, when the place was named"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "nothing", ["does not exist", "--checkpoint"]),
        (lambda folder: folder, ["no Stable Diffusion 3"]),
        (
            lambda folder: save(folder / "lora.safetensors", {"a.lora_A.weight": mx.zeros((2, 2))}),
            ["is a LoRA"],
        ),
        (
            lambda folder: save(folder / "other.safetensors", {"unet.weight": mx.zeros((2, 2))}),
            ["not an SD3"],
        ),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, make, words):
    path = make(tmp_path)
    with pytest.raises(UserError) as error:
        load_pipeline("sd3-medium", checkpoint=path)
    assert all(word in str(error.value) for word in [*words, str(path)])


def test_a_half_downloaded_file_is_named(tmp_path):
    path = save(tmp_path / "half.safetensors", to_stability(random_model(CONFIG)))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"half\.safetensors"):
        load_pipeline("sd3-medium", checkpoint=path)


def test_several_transformers_in_a_folder_are_listed(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.safetensors", to_stability(random_model(CONFIG)))
    with pytest.raises(UserError, match=r"a\.safetensors, b\.safetensors.*--checkpoint"):
        load_pipeline("sd3-medium", checkpoint=tmp_path)


def test_a_file_of_another_variant_is_refused(tmp_path):
    path = save(tmp_path / "large.safetensors", to_stability(random_model(KINDS["sd3.5-large"])))
    with pytest.raises(UserError, match=r"is sd3\.5-large, not sd3-medium"):
        load_pipeline("sd3-medium", checkpoint=path)


def test_options_that_a_model_has_no_use_for_are_refused(tmp_path):
    path = save(tmp_path / "model.safetensors", to_stability(random_model(CONFIG)))
    with pytest.raises(UserError, match="nano"):
        load_pipeline("nano", checkpoint=path)
    for said in (False, True):
        with pytest.raises(UserError, match="--t5"):
            load_pipeline("nano", t5=said)
    with pytest.raises(UserError, match=r"3.*4 or 8"):
        load_pipeline("sd3-medium", checkpoint=path, text_bits=3)


def test_a_pipelines_folder_is_given_with_checkpoint(tmp_path):
    folder = everywhere(tmp_path, "sd3-medium")["diffusers' folder"]
    with pytest.raises(UserError, match=f"give it with --checkpoint {folder}$"):
        load_pipeline(str(folder))
    with pytest.raises(UserError, match="without text encoder and codec"):
        load_pipeline(str(folder / "transformer"))


def test_what_links_lead_to_is_to_be_deleted_too(tmp_path):
    """The hub's client makes a link again to what its cache still has."""
    held, folder = save(tmp_path / "blobs" / "x.safetensors", {"x": mx.ones(1)}), tmp_path / "vae"
    folder.mkdir()
    link = folder / "model.safetensors"
    link.symlink_to(held)
    for path, words in ((link, f"delete {held}, to which"), (folder, "files that its links lead")):
        with pytest.raises(UserError, match=f"conv_in.weight is missing .*{words}"):
            decoder_tensors(sd3_files.Location(path).tensors(), path)
    with pytest.raises(UserError, match="is damaged: .*files that its links lead"):
        raise damaged(folder, "why")


def test_what_was_recorded_fills_in_for_a_name():
    assert chosen(None, "nano") == "nano" and chosen("tiny", "nano") == "tiny"
    assert chosen(ModelChoice(text=Text(t5=False)), "sd3-medium").name == "sd3-medium"
    given = ModelChoice(checkpoint=Path("x"))
    assert chosen(given, "sd3-medium") is given, "a checkpoint tells by itself"


@needs_no_kit
def test_without_diffusionkit_a_prompt_is_one_error_line(tmp_path):
    path = save(tmp_path / "model.safetensors", to_stability(random_model(CONFIG)))
    result = run_here("src.generate", "--checkpoint", str(path), "--prompt", "a cat", cwd=tmp_path)
    assert_one_error_line(result, "diffusionkit", "ditq[sd3]")


@needs_no_kit
def test_without_a_client_nothing_is_downloaded():
    with pytest.raises(UserError, match="huggingface_hub is not installed"):
        load_pipeline("sd3-medium")


class Response:
    def __init__(self, status: int) -> None:
        self.status_code = status


def hub_error(name: str, status: int | None = None, base: type = Exception) -> Exception:
    """As the hub's client raises it: classes differ between its versions, names do not."""
    error = type(name, (base,), {})("long\ntext")
    if status is not None:
        error.response = Response(status)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_error("GatedRepoError", 403), ["accept its licence", "https://", "hf auth login"]),
        (hub_error("HfHubHTTPError", 401), ["accept its licence", "hf auth login"]),
        (hub_error("RepositoryNotFoundError", 404), ["any more", "--checkpoint"]),
        (
            hub_error("LocalEntryNotFoundError"),
            ["does not hold the weights", "cannot be reached", "--checkpoint"],
        ),
        (hub_error("OfflineModeIsEnabled", base=ConnectionError), ["cannot be reached"]),
        (OSError(28, "No space left on device"), ["disk", "is full", "no room for"]),
    ],
)
def test_a_failed_download_says_what_to_do(error, words):
    text = sd3_download.explained(error, "org/name", "the weights of sd3-medium")
    assert all(word in text for word in ["the weights of sd3-medium", *words]), text
    assert "\n" not in text


def test_the_caches_own_variables_are_heeded(tmp_path, monkeypatch):
    assert sd3_files.cache_folder() == tmp_path / "no-cache" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "own"))
    assert sd3_files.cache_folder() == tmp_path / "own"
    published = sd3_files.PUBLISHED["sd3-medium"]
    save(
        snapshot(tmp_path / "own", published.name) / published.file,
        to_stability(random_model(CONFIG)),
    )
    assert load_pipeline("sd3-medium").name == "sd3-medium", "found without a download"


def test_encoders_of_float8_are_named(tmp_path):
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "eight.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"eight\.safetensors.*F8_E4M3"):
        load_pipeline("sd3-medium", checkpoint=path)


def test_int8_codes_are_of_the_checkpoints_own_values(tmp_path):
    """Not of those that a cast to the run's dtype has rounded."""
    path = save(tmp_path / "a.safetensors", to_stability(random_model(CONFIG)))
    exact, cast = (
        open_with_int8(
            ModelChoice(None, path), dtype, int8=Int8(use_int8=True), tell=lambda line: None
        ).transformer
        for dtype in (mx.float32, mx.bfloat16)
    )
    assert cast.context_embedder.weight.dtype == mx.bfloat16
    for layer in int8_layers(exact):
        one, other = (module_at(model, layer) for model in (exact, cast))
        assert mx.array_equal(one.weight, other.weight)
        assert mx.array_equal(one.weight_scale, other.weight_scale)


def test_t5_is_left_out_only_of_a_model_that_was_saved_without(tmp_path):
    """Of a checkpoint that was named, what it lacks is told."""
    checkpoint = save(tmp_path / "a.safetensors", to_stability(random_model(CONFIG)))
    pipeline = quantized_pipeline(ModelChoice(None, checkpoint))
    described = {
        "made_from": {"model": "sd3-medium"},
        "settings": {},
        "sampling": asdict(pipeline.defaults),
    }
    saved = tmp_path / "saved"
    saved.mkdir()
    save_parts(pipeline.transformer, {}, saved / "transformer", described, False)
    assert not load_saved(saved).encode_text.text.t5
    encoder = load_saved(ModelChoice(str(saved), checkpoint)).encode_text
    with pytest.raises(UserError, match="has no T5 text encoder .* --no-t5"):
        for name in encoder.parts():
            if name == "t5":
                encoder.location(name)
    without = ModelChoice(str(saved), checkpoint, Text(t5=False))
    assert not load_saved(without).encode_text.text.t5
