"""A tiny Stable Diffusion 3 of the real packages' own classes, through our pipeline."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

from src.errors import UserError
from src.inference import sd3_memory
from src.inference.self_tests import sd3_checks
from src.models.configs import MMDiTConfig
from src.models.load import load_pipeline
from src.models.mmdit import MMDiT
from src.models.pipeline import Pipeline
from src.models.sd3 import Reading, random_decoder, t5_tokenizer, t5_tokens
from src.models.sd3_decode import decode_in_strips
from src.models.sd3_names import DecoderShape
from src.models.sd3_save import save_companions

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from .helpers import (
    random_inputs,
    random_model,
    relative_error,
)
from .tiny_sd3 import (
    CONFIGS,
    DIFFUSIONKIT,
    T5_TOKENS,
    TinySD3,
    redirected,
    write_json,
    write_tiny_sd3,
)

pytestmark = [pytest.mark.sd3, pytest.mark.slow]

PROMPT = "a cat on the mat"
SIZE = {"height": 64, "width": 64}


@pytest.fixture(autouse=True)
def quiet(offline):
    logging.getLogger("diffusionkit").setLevel(logging.ERROR)


def places(tiny: TinySD3, name: str) -> list[Path]:
    found = [tiny.single_file(name), tiny.diffusers(name)]
    return [*found, tiny.home] if name in DIFFUSIONKIT else found


def picture(pipeline: Pipeline, seed: int = 3, **options) -> np.ndarray:
    settings = {"num_steps": 3, "cfg_weight": 5.0, **SIZE, **options}
    return pipeline.decode(pipeline.sample([PROMPT], [seed], **settings))[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_all_layouts_draw_the_same_picture(tiny, name):
    pipelines = [load_pipeline(name, checkpoint=place) for place in places(tiny, name)]
    first = picture(pipelines[0])
    assert first.shape == (64, 64, 3) and 20 < first.std(), "not a blank picture"
    for pipeline in pipelines[1:]:
        assert pipeline.hash == pipelines[0].hash
        assert np.array_equal(picture(pipeline), first)


@pytest.mark.parametrize("name", DIFFUSIONKIT)
def test_the_picture_is_diffusionkits_own(tmp_path, name, monkeypatch):
    """Its GELU, no k bias, float32: text, VAE and the whole picture."""
    info = {**mx.device_info(), "memory_size": 2**33}
    monkeypatch.setattr(mx.metal, "device_info", lambda: info)
    import diffusionkit.mlx as kit

    tiny = write_tiny_sd3(tmp_path, models=[name], k_bias=False)
    with redirected(tiny, features=mx.float32):
        theirs = kit.DiffusionPipeline(
            model_version=DIFFUSIONKIT[name], shift=3.0, low_memory_mode=False
        )
        wanted, _ = theirs.generate_image(
            PROMPT, num_steps=3, cfg_weight=5.0, latent_size=(8, 8), seed=3, verbose=False
        )
        text, pooled = theirs.encode_text(PROMPT, 5.0, "")
    ours = load_pipeline(name, checkpoint=tiny.home)
    conditioning = ours.condition([PROMPT], 5.0)
    assert relative_error(conditioning.text, text) < 1e-6
    assert relative_error(conditioning.pooled, pooled) < 1e-6
    latent = mx.random.normal((1, 20, 12, 16))
    whole = theirs.decode_latents_to_image(theirs.latent_format.process_out(latent))
    assert relative_error(mx.clip(ours.codec.decode(latent), 0, 1), whole) < 1e-5
    exact = MMDiT(replace(ours.transformer.config, gelu="exact"))
    exact.load_weights(tree_flatten(ours.transformer.parameters()))
    ours.transformer = exact
    latent = ours.sample([PROMPT], [3], num_steps=3, cfg_weight=5.0, **SIZE)
    drawn = np.array(mx.clip(ours.codec.decode(latent)[0], 0, 1) * 255)
    # It cuts decimals off, so that ours must lie within the next whole number.
    gap = drawn - np.array(wanted)
    assert -0.01 < gap.min() and gap.max() < 1.01


def test_text_and_vae_are_those_of_transformers_and_diffusers(tiny):
    import torch
    from diffusers import StableDiffusion3Pipeline

    theirs = StableDiffusion3Pipeline.from_pretrained(
        str(tiny.diffusers("sd3-medium")), torch_dtype=torch.float32
    )
    text, _, pooled, _ = theirs.encode_prompt(PROMPT, None, None, max_sequence_length=32)
    ours = load_pipeline("sd3-medium", checkpoint=tiny.diffusers("sd3-medium"))
    conditioning = ours.condition([PROMPT], 0)
    assert relative_error(conditioning.pooled, pooled.detach().numpy()) < 1e-4
    clip = relative_error(conditioning.text[:, :77], text[:, :77].detach().numpy())
    # DiffusionKit's T5 has the exact GELU where the published one has the tanh approximation.
    t5 = relative_error(conditioning.text[:, 77:], text[:, 77:].detach().numpy())
    assert clip < 1e-4 and t5 < 5e-3
    latent = np.random.default_rng(0).standard_normal((1, 8, 8, 16)).astype(np.float32)
    with torch.no_grad():
        z = torch.from_numpy(latent).permute(0, 3, 1, 2) / 1.5305 + 0.0609
        wanted = theirs.vae.decode(z).sample.permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert relative_error(ours.codec.decode(mx.array(latent)), wanted) < 1e-4


def test_without_t5_it_is_not_read(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.diffusers("sd3-medium"), folder)
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    without = load_pipeline("sd3-medium", checkpoint=folder, t5=False)
    conditioning = without.condition([PROMPT], 0)
    assert conditioning.text.shape == (1, 154, 4096)
    assert not np.array(conditioning.text[:, 77:]).any()
    with pytest.raises(UserError, match=r"T5 text encoder.*text_encoder_3.*--no-t5"):
        load_pipeline("sd3-medium", checkpoint=folder).encode_text.check([PROMPT])


def test_seeds_reproduce_and_leave_numpys_state_alone(tiny):
    pipeline = load_pipeline("sd3-medium", checkpoint=tiny.single_file("sd3-medium"))
    np.random.seed(11)
    wanted = np.random.random(4)
    np.random.seed(11)
    first, second, other = picture(pipeline), picture(pipeline), picture(pipeline, seed=4)
    assert np.array_equal(first, second) and not np.array_equal(first, other)
    assert np.array_equal(np.random.random(4), wanted)


def test_sizes_are_multiples_of_16_in_range(tiny):
    pipeline = load_pipeline("sd3-medium", checkpoint=tiny.single_file("sd3-medium"))
    assert picture(pipeline, num_steps=1, height=48, width=80).shape == (48, 80, 3)
    for size in (40, 0, 528):
        with pytest.raises(UserError, match=r"multiples of 16 from 16 to 512"):
            pipeline.latent_shape(size, 64)


def test_equal_prompts_in_a_batch_are_equal_to_single_ones(tiny):
    pipeline = load_pipeline("sd3-medium", checkpoint=tiny.single_file("sd3-medium"))
    together = pipeline.condition([PROMPT, "a dog", PROMPT], 5.0)
    alone = pipeline.condition(["a dog"], 5.0)
    assert together.text.shape[0] == 6
    assert np.array_equal(together.text[0], together.text[2])
    assert relative_error(together.text[1], alone.text[0]) < 1e-5
    assert relative_error(together.text[3], alone.text[1]) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_encoders_say_how_far_they_are_off(tiny, bits, capsys):
    place = tiny.single_file("sd3-medium")
    wanted = load_pipeline("sd3-medium", checkpoint=place).condition([PROMPT], 0)
    pipeline = load_pipeline("sd3-medium", checkpoint=place, text_bits=bits)
    found = pipeline.condition([PROMPT], 0)
    error = relative_error(found.text, wanted.text)
    assert 0 < error < {4: 0.5, 8: 0.05}[bits]
    said = capsys.readouterr().out
    assert f"{bits} bits" in said and "T5 text encoder" in said and "CLIP-G" in said
    pipeline.condition([PROMPT], 0)
    assert capsys.readouterr().out == "", "it says so once"


def test_one_component_is_in_memory_at_a_time(tiny):
    pipeline = load_pipeline("sd3-medium", checkpoint=tiny.single_file("sd3-medium"))
    transformer = sum(t.nbytes for _, t in tree_flatten(pipeline.transformer.parameters()))
    mx.clear_cache()
    base = mx.get_active_memory()
    conditioning = pipeline.condition([PROMPT], 5.0)
    kept = conditioning.text.nbytes + conditioning.pooled.nbytes
    assert mx.get_active_memory() - base < kept + 0.1 * transformer, "the encoders are gone"
    latent = pipeline.sample([PROMPT], [0], num_steps=1, **SIZE)
    assert mx.get_active_memory() - base > 0.9 * transformer
    pipeline.finish(latent)
    assert mx.get_active_memory() - base < kept + 0.1 * transformer, "the transformer is gone too"


@pytest.mark.parametrize(
    ("height", "width", "rows"), [(8, 8, 4), (10, 6, 4), (14, 24, 5), (6, 6, 16)]
)
def test_strips_decode_what_the_decoder_does(height, width, rows):
    mx.random.seed(0)
    decoder = random_decoder((32, 64, 64, 64))
    latent = mx.random.normal((1, height, width, 16))
    wanted = decoder(latent)
    found = decode_in_strips(decoder, latent, rows)
    assert relative_error(found, wanted) < 2e-5
    # No seam: the rows where two strips meet are as near as all others.
    errors = np.abs(np.array(found - wanted)).max(axis=(0, 2, 3))
    assert errors.max() < 2e-4 * float(mx.abs(wanted).max())


def peak(work) -> int:
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    return mx.get_peak_memory() - base


def test_the_memory_that_is_told_is_what_mlx_needs():
    shape = DecoderShape((32, 64, 128, 128), 3, 16)
    decoder = random_decoder(shape.channels)
    mx.eval(decoder.parameters())
    latent = mx.random.normal((1, 32, 32, 16))
    mx.eval(latent)
    estimate = max(sd3_memory.decoder_layers(256, 256, shape, 4))
    measured = peak(lambda: decode_in_strips(decoder, latent))
    assert 0.6 < estimate / measured < 1.6
    assert measured < 0.5 * peak(lambda: decoder(latent))
    weights = sum(t.nbytes for _, t in tree_flatten(decoder.parameters())) / 4
    assert sd3_memory.decoder_parameters(shape) == pytest.approx(weights, rel=0.01)
    config = MMDiTConfig(depth=2, hidden=256, heads=4, position_size=32)
    model = random_model(config)
    inputs = (*random_inputs(config, 32, 32, tokens=154), mx.array([500.0, 20.0]))
    mx.eval(model.parameters(), inputs)
    estimate = sd3_memory.step_bytes(
        config, 256, 256, text_tokens=154, float_bytes=4, fused_attention=False
    )
    assert 0.6 < estimate / (peak(lambda: model(*inputs)) + inputs[1].nbytes) < 1.6


def test_the_memory_that_is_told_of_t5_is_what_mlx_needs(tiny):
    """A layer at a time, for two prompts."""
    encoder = load_pipeline("sd3-medium", checkpoint=tiny.single_file("sd3-medium")).encode_text
    with Reading(encoder.location("t5"), mx.float32) as reading:
        next(reading.t5_stages(T5_TOKENS))
        shape = reading.shape
    estimate = sd3_memory.t5_bytes(shape, T5_TOKENS, width=4)
    measured = peak(lambda: encoder._t5([PROMPT, f"{PROMPT} {PROMPT}"], {}))
    assert 0.6 < estimate / measured < 1.6


def test_an_unknown_character_is_named(tiny):
    pipeline = load_pipeline("sd3-medium", checkpoint=tiny.single_file("sd3-medium"))
    with pytest.raises(UserError, match="猫"):
        pipeline.encode_text.check(["a 猫"])


@pytest.mark.parametrize(("package", "version"), [("diffusionkit", "0.6.0"), ("mlx", "0.20.0")])
def test_versions_that_are_not_known_are_refused(tiny, monkeypatch, package, version):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == package else real(name)
    )
    pipeline = load_pipeline("sd3-medium", checkpoint=tiny.single_file("sd3-medium"))
    with pytest.raises(UserError, match=rf"{version} is not supported.*pip install"):
        pipeline.condition([PROMPT], 0)


def test_the_machines_own_checks_pass(tiny):
    checks = sd3_checks(tiny.single_file("sd3-medium"))
    assert not [check for check in checks if check.passed is False]
    assert sum(check.passed is True for check in checks) >= 6
    assert any("CLIP-L, CLIP-G, T5, VAE" in check.found for check in checks)


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory) -> Path:
    """A folder whose text encoders are stored at 8 bits."""
    folder, source = tmp_path_factory.mktemp("stored"), tiny.diffusers("sd3-medium")
    pipeline = load_pipeline("sd3-medium", checkpoint=source, text_bits=8)
    save_companions(pipeline.encode_text, pipeline.codec, folder)
    shutil.copytree(source / "transformer", folder / "transformer")
    return folder


def test_encoders_that_are_stored_quantized_are_compared_with_nothing(stored, capsys):
    wanted = load_pipeline("sd3-medium", checkpoint=stored).condition([PROMPT], 0)
    given = load_pipeline("sd3-medium", checkpoint=stored, text_bits=8).condition([PROMPT], 0)
    assert np.array_equal(given.text, wanted.text)
    assert capsys.readouterr().out == "", "an error of 0.0% against itself says nothing"


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("text_encoder", {"version": 2}, r"version 2 .*reads version 1"),
        ("text_encoder", {"shape": {"layers": 3}}, r"is damaged: its shape must tell heads, "),
        ("text_encoder_2", {"bits": "8"}, r"is damaged: its bits must be"),
        ("text_encoder_3", {"shape": None}, r"is damaged: its shape must tell buckets, "),
    ],
)
def test_settings_of_a_stored_encoder_that_cannot_be_read(stored, tmp_path, part, changes, words):
    folder = tmp_path / "model"
    shutil.copytree(stored, folder)
    settings = folder / part / "config.json"
    write_json(settings, {**json.loads(settings.read_text()), **changes})
    with pytest.raises(UserError, match=f"{part}/config.json.*{words}"):
        load_pipeline("sd3-medium", checkpoint=folder).condition([PROMPT], 0)


def test_a_saved_tokenizer_of_pieces_opens_by_itself(tiny, tmp_path):
    """As google/t5-v1_1-xxl has it: only the model's config.json tells the tokenizer's class."""
    import sentencepiece

    folder, saved, pieces = tmp_path / "model", tmp_path / "saved", io.BytesIO()
    shutil.copytree(tiny.diffusers("sd3-medium"), folder)
    shutil.rmtree(folder / "tokenizer_3")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT] * 50),
        model_writer=pieces,
        hard_vocab_limit=False,
        **{"vocab_size": 20, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    (folder / "tokenizer_3").mkdir()
    (folder / "tokenizer_3" / "spiece.model").write_bytes(pieces.getvalue())
    write_json(folder / "tokenizer_3" / "tokenizer_config.json", {"model_max_length": 32})
    write_json(folder / "tokenizer_3" / "config.json", {"model_type": "t5"})
    pipeline = load_pipeline("sd3-medium", checkpoint=folder)
    saved.mkdir()
    save_companions(pipeline.encode_text, pipeline.codec, saved)
    wanted, found = (
        t5_tokens(t5_tokenizer(place / "tokenizer_3", 32), [PROMPT], 32)
        for place in (folder, saved)
    )
    assert len(np.unique(wanted)) > 4 and np.array_equal(found, wanted)


def test_a_first_run_reads_as_many_tokens_as_the_next(tiny, tmp_path, monkeypatch):
    """The text encoders come into the hub's cache after the transformer was found there."""
    from huggingface_hub import constants

    cache, source = tmp_path / "hub", tiny.home / "hub"
    model = f"models--{DIFFUSIONKIT['sd3-medium'].replace('/', '--')}"
    shutil.copytree(source / model, cache / model)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    first = load_pipeline("sd3-medium")
    shutil.copytree(source, cache, dirs_exist_ok=True)
    wanted = load_pipeline("sd3-medium").condition([PROMPT], 0).text
    assert wanted.shape == (1, 77 + T5_TOKENS, 4096)
    assert np.array_equal(first.condition([PROMPT], 0).text, wanted)
