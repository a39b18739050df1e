"""`inject` and `eject`: DiffusionKit's own pipeline draws with quantized weights."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import src
from src.backends import staying_packed
from src.errors import UserError
from src.inference import bridge
from src.inference.bridge import StandIn, eject, inject, stand_in_of, take_place
from src.inference.open import open_quantized
from src.models.checkpoints import infer_config, load_transformer, read_weights
from src.models.pipeline import Conditioning
from src.models.sd3_load import load_sd3
from src.models.sd3_mends import PACKAGE, mend, mended, unmend
from src.quant.artifacts import QuantConfig
from src.quant.linear import QuantizedLinear
from src.quant.schedule import Schedule
from src.sampling import Noise, denoise, sd3_sigmas

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from .helpers import ROOT, random_inputs, random_model, relative_error
from .test_inject import config_for, rounded_layers, write_folder
from .tiny_sd3 import CONFIGS, DIFFUSIONKIT, redirected, write_tiny_sd3

PROMPT = "a cat on the mat"
STEPS = 3
HIGH_SIGMAS = np.linspace(1.0, 0.9, 10).tolist()
sd3 = [pytest.mark.sd3, pytest.mark.slow]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    written = write_tiny_sd3(folder, models=("sd3-medium", "sd3.5-large"))
    logging.getLogger(PACKAGE).setLevel(logging.WARNING)
    with redirected(written):
        yield written


@pytest.fixture(scope="module")
def artifacts(tiny, tmp_path_factory):
    """By model, what both tracks leave behind: the arguments of `inject`."""
    found = {}
    for name in DIFFUSIONKIT:
        folder = tmp_path_factory.mktemp(name)
        model = load_sd3(name, float32, tiny.single_file(name))
        layers = rounded_layers(model)
        write_folder(folder / "adaround_output", model, layers)
        identity = {"model": model.name, "model_hash": model.hash}
        config_for(layers, **identity).save(folder / "quant_config.json")
        found[name] = (folder / "adaround_output", folder / "quant_config.json")
    return found


def float32(_: str) -> mx.Dtype:
    return mx.float32


def make(name: str = "sd3-medium", low_memory: bool = False, **options):
    from diffusionkit.mlx import DiffusionPipeline

    settings = {"shift": 3.0, "low_memory_mode": low_memory, **options}
    return DiffusionPipeline(model_version=DIFFUSIONKIT[name], **settings)


def draw(pipeline, **options) -> np.ndarray:
    settings = {"num_steps": STEPS, "cfg_weight": 5.0, "latent_size": (8, 8), "seed": 3}
    picture, _ = pipeline.generate_image(PROMPT, **{**settings, "verbose": False, **options})
    return np.array(picture).astype(int)


@pytest.fixture(scope="module")
def sixteen_bit(tiny):
    with mended(pipeline := make()):
        return draw(pipeline)


@pytest.fixture(scope="module")
def wanted(tiny, artifacts):
    """By model, the first picture of a fresh pipeline."""
    pictures = {}
    for name in DIFFUSIONKIT:
        pipeline = make(name)
        inject(pipeline, *artifacts[name])
        pictures[name] = draw(pipeline)
    return pictures


def in_place(pipeline) -> list:
    """The linears that draw, whatever DiffusionKit has done to the pipeline."""
    return [
        layer
        for _, layer in pipeline.ditq_bridge._transformer.named_modules()
        if isinstance(layer, QuantizedLinear)
    ]


class TestPictures:
    pytestmark = sd3

    @pytest.mark.parametrize("name", sorted(DIFFUSIONKIT))
    @pytest.mark.parametrize("low_memory", [False, True])
    def test_three_in_a_row_are_each_a_fresh_pipelines(
        self, artifacts, wanted, sixteen_bit, name, low_memory
    ):
        pipeline = make(name, low_memory)
        done = inject(pipeline, *artifacts[name], kernel="reference")
        assert done.name == "W4A6-8 (7.0 bits)" and done.notes == []
        assert len(done.layers) == len(in_place(pipeline)) == 21
        for _ in range(3):
            np.testing.assert_array_equal(draw(pipeline), wanted[name])
        assert len(in_place(pipeline)) == 21
        assert np.abs(wanted[name] - sixteen_bit).mean() > 1

    def test_in_low_memory_mode_weights_stay_packed(self, artifacts, wanted):
        inject(pipeline := make(low_memory=True), *artifacts["sd3-medium"])
        assert {layer.kernel for layer in in_place(pipeline)} == {staying_packed()}
        assert np.abs(draw(pipeline) - wanted["sd3-medium"]).max() <= 1
        with pytest.raises(UserError, match="kernel dense unpacks"):
            inject(make(low_memory=True), *artifacts["sd3-medium"], kernel="dense")

    @pytest.mark.parametrize("cfg_weight", [0.0, 5.0])
    def test_they_are_those_of_our_own_sampler(self, tiny, artifacts, cfg_weight):
        pipeline = make()
        inject(pipeline, *artifacts["sd3-medium"])
        text, pooled = pipeline.encode_text(PROMPT, cfg_weight)
        latent, _ = pipeline.denoise_latents(
            text, pooled, num_steps=STEPS, cfg_weight=cfg_weight, latent_size=(8, 12), seed=3
        )
        model = load_sd3("sd3-medium", float32, tiny.diffusers("sd3-medium"))
        ours = open_quantized(model, *artifacts["sd3-medium"]).pipeline
        rows = 2 if cfg_weight else 1
        velocity = ours.velocity(Conditioning(text[:rows], pooled[:rows]), cfg_weight)
        drawn = denoise(velocity, Noise([3]), sd3_sigmas(STEPS), (8, 12, 16))
        assert relative_error(latent, pipeline.latent_format.process_out(drawn)) < 1e-3

    def test_weights_only_and_artifacts_without_activations(self, artifacts, wanted):
        folder, config = artifacts["sd3-medium"]
        pictures = []
        for arguments, options in (((), {}), ((config,), {"weights_only": True})):
            done = inject(pipeline := make(), folder, *arguments, **options)
            assert done.name == "W4A16" and bool(done.notes) == (not arguments)
            pictures.append(draw(pipeline, num_steps=1))
        assert np.abs(pictures[0] - pictures[1]).mean() < 1  # but for a shift the same

    def test_a_picture_from_a_picture(self, artifacts, wanted, tmp_path):
        from PIL import Image

        path = str(tmp_path / "start.png")
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        inject(pipeline := make(), *artifacts["sd3-medium"])
        drawn = draw(pipeline, image_path=path, denoise=0.6, num_steps=5)
        assert drawn.shape == (64, 64, 3) and not np.array_equal(drawn, wanted["sd3-medium"])
        np.testing.assert_array_equal(draw(pipeline), wanted["sd3-medium"])

    @pytest.mark.parametrize("low_memory", [False, True])
    def test_pipelines_side_by_side_do_not_disturb_each_other(
        self, artifacts, wanted, sixteen_bit, low_memory
    ):
        one, other = make(low_memory=low_memory), make("sd3.5-large", low_memory)
        third = make(low_memory=not low_memory)
        inject(one, *artifacts["sd3-medium"], kernel="reference")
        inject(other, *artifacts["sd3.5-large"], kernel="reference")
        mend(third)
        for _ in range(2):
            np.testing.assert_array_equal(draw(one), wanted["sd3-medium"])
            np.testing.assert_array_equal(draw(third), sixteen_bit)
            np.testing.assert_array_equal(draw(other), wanted["sd3.5-large"])

    @pytest.mark.parametrize("low_memory", [False, True])
    def test_one_that_was_cut_short_spoils_none(self, artifacts, wanted, low_memory):
        def stop(*_):
            raise KeyboardInterrupt

        inject(
            pipeline := make(low_memory=low_memory), *artifacts["sd3-medium"], kernel="reference"
        )
        pipeline.sampler.calculate_denoised = stop
        with pytest.raises(KeyboardInterrupt):
            draw(pipeline)
        del pipeline.sampler.calculate_denoised
        np.testing.assert_array_equal(draw(pipeline), wanted["sd3-medium"])

    def test_a_pipeline_that_has_drawn_before_is_quantized_too(self, artifacts, wanted):
        for low_memory in (False, True):
            pipeline = make(low_memory=low_memory)
            mend(pipeline)
            draw(pipeline)
            assert hasattr(pipeline, "mmdit") != low_memory
            inject(pipeline, *artifacts["sd3-medium"], kernel="reference")
            np.testing.assert_array_equal(draw(pipeline), wanted["sd3-medium"])


class TestEject:
    pytestmark = sd3

    @pytest.mark.parametrize("low_memory", [False, True])
    @pytest.mark.parametrize("mended_before", [False, True])
    def test_it_gives_the_pipeline_back(self, artifacts, sixteen_bit, low_memory, mended_before):
        pipeline = make(low_memory=low_memory)
        if mended_before:
            mend(pipeline)
        kind, names = type(pipeline), set(vars(pipeline))
        inject(pipeline, *artifacts["sd3-medium"])
        with pytest.raises(UserError, match="ditq.eject"):
            unmend(pipeline)
        eject(pipeline)
        assert type(pipeline) is kind
        assert names - set(vars(pipeline)) == ({"mmdit"} if low_memory else set())
        assert set(vars(pipeline)) <= names
        with mended(pipeline):
            np.testing.assert_array_equal(draw(pipeline), sixteen_bit)

    def test_after_a_picture_and_in_again(self, artifacts, wanted, sixteen_bit):
        pipeline = make()
        for _ in range(2):
            inject(pipeline, *artifacts["sd3-medium"])
            np.testing.assert_array_equal(draw(pipeline), wanted["sd3-medium"])
            eject(pipeline)
            with mended(pipeline):
                np.testing.assert_array_equal(draw(pipeline), sixteen_bit)


@pytest.mark.sd3
@pytest.mark.slow
@pytest.mark.parametrize("low_memory", [False, True])
def test_our_sixteen_bit_picture_is_diffusionkits_own(tmp_path, low_memory):
    """k biases of zero and exact GELU, as DiffusionKit has them; float32, timesteps included."""
    tiny = write_tiny_sd3(tmp_path, models=("sd3-medium",), k_bias=False)
    with redirected(tiny):
        model_io = sys.modules[f"{PACKAGE}.model_io"]
        model_io._CONFIG[DIFFUSIONKIT["sd3-medium"]].dtype = mx.float32
        pipeline = make(low_memory=low_memory)
        with mended(pipeline):
            theirs = draw(pipeline, num_steps=10)
        path = next(tiny.home.rglob("sd3_medium.safetensors"))
        config = dataclasses.replace(infer_config(read_weights(path), path), gelu="exact")
        transformer = load_transformer(path, config, mx.float32)
        stand_in = stand_in_of(transformer, None, path if low_memory else None)
        take_place(pipeline, stand_in, path)
        assert pipeline.ditq_bridge is stand_in
        np.testing.assert_array_equal(draw(pipeline, num_steps=10), theirs)


class TestRefusals:
    """Each is one line with the way out, and leaves the pipeline as it was."""

    pytestmark = sd3

    def refused(self, pipeline, words: str, *arguments, **options) -> None:
        kind, before = type(pipeline), dict(vars(pipeline))
        with pytest.raises(UserError, match=words) as caught:
            inject(pipeline, *arguments, **options)
        assert "\n" not in str(caught.value)
        assert type(pipeline) is kind and vars(pipeline) == before

    def test_artifacts_of_another_model(self, artifacts):
        words = "from sd3.5-large, the pipeline is sd3-medium; give artifacts .*, or a pipeline of"
        self.refused(make(), words, *artifacts["sd3.5-large"])
        folder, _ = artifacts["sd3-medium"]
        words = "quant_config.json was made from .*model"
        self.refused(make(), "quant_config.json", folder, artifacts["sd3.5-large"][1])

    def test_artifacts_of_other_weights(self, artifacts, tiny, tmp_path):
        path = next(tiny.home.rglob("sd3_medium.safetensors"))
        changed = {n: t * 0.5 if "x_block" in n else t for n, t in mx.load(str(path)).items()}
        mx.save_safetensors(str(tmp_path / "other.safetensors"), changed)
        pipeline = make(local_ckpt=str(tmp_path / "other.safetensors"))
        self.refused(pipeline, "model_hash", *artifacts["sd3-medium"])

    def test_no_artifacts(self, artifacts, tmp_path):
        folder, config = artifacts["sd3-medium"]
        self.refused(make(), "no folder .*adaround_optimize", tmp_path / "none")
        self.refused(make(), "analyze_activations", folder, tmp_path / "none.json")
        (tmp_path / "empty").mkdir()
        self.refused(make(), "adaround_optimize", tmp_path / "empty")

    def test_a_lora(self, artifacts):
        folded, wrapped = make(), make()
        attention = folded.mmdit.multimodal_transformer_blocks[1].image_transformer_block.attn
        attention.q_proj.weight = attention.q_proj.weight + 1e-3
        words = (
            r"differs in .*1\.image_transformer_block\.attn\.q_proj\.weight; with a LoRA fold it"
        )
        self.refused(folded, words, *artifacts["sd3-medium"])
        attention = wrapped.mmdit.multimodal_transformer_blocks[0].text_transformer_block.attn
        attention.v_proj.lora_a = mx.zeros((128, 4))
        words = r"differs in .*0\.text_transformer_block\.attn\.v_proj\.lora_a; with a LoRA fold it"
        self.refused(wrapped, words, *artifacts["sd3-medium"])

    def test_a_file_that_the_pipeline_was_not_made_with(self, artifacts, tiny, tmp_path, wanted):
        path = next(tiny.home.rglob("sd3_medium.safetensors"))
        other = tmp_path / "other.safetensors"
        changed = {n: t * 0.5 if "x_block" in n else t for n, t in mx.load(str(path)).items()}
        mx.save_safetensors(str(other), changed)
        one = make()
        make(local_ckpt=str(other))
        self.refused(one, "other.safetensors.*with checkpoint=PATH", *artifacts["sd3-medium"])
        inject(one, *artifacts["sd3-medium"], checkpoint=path)
        np.testing.assert_array_equal(draw(one), wanted["sd3-medium"])
        sys.modules[f"{PACKAGE}.model_io"].LOCAl_SD3_CKPT = None

    def test_another_pipelines_file_is_not_taken(self, artifacts, tiny, tmp_path, wanted):
        """A pipeline on the hub's file that was mended before another was made with its own."""
        path = next(tiny.home.rglob("sd3_medium.safetensors"))
        changed = {n: t * 0.5 if "x_block" in n else t for n, t in mx.load(str(path)).items()}
        mx.save_safetensors(str(tmp_path / "other.safetensors"), changed)
        one = make()
        mend(one)
        make(local_ckpt=str(tmp_path / "other.safetensors"))
        inject(one, *artifacts["sd3-medium"])
        np.testing.assert_array_equal(draw(one), wanted["sd3-medium"])
        sys.modules[f"{PACKAGE}.model_io"].LOCAl_SD3_CKPT = None

    def test_in_low_memory_the_transformer_is_not_kept(self, artifacts, sixteen_bit):
        """While it is compared, and where it is refused for a tensor near the end."""
        pipeline = make(low_memory=True)
        parameters = tree_flatten(pipeline.mmdit.parameters())
        size, last = sum(tensor.nbytes for _, tensor in parameters), max(parameters)[0]
        changed = pipeline.mmdit.y_embedder.mlp.layers[2]
        assert last == "y_embedder.mlp.layers.2.weight"
        kept = changed.weight
        changed.weight = kept + 1e-3
        mx.eval(kept, changed.weight)
        del parameters
        mx.clear_cache()
        base = mx.get_active_memory()
        self.refused(pipeline, f"differs in {last}", *artifacts["sd3-medium"])
        assert mx.get_active_memory() - base < 0.1 * size
        changed.weight = kept
        with mended(pipeline):
            np.testing.assert_array_equal(draw(pipeline), sixteen_bit)

    def test_a_file_that_is_gone(self, artifacts, tiny, tmp_path, monkeypatch):
        from huggingface_hub import constants

        pipeline = make()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        self.refused(pipeline, "sd3_medium.safetensors .*checkpoint=", *artifacts["sd3-medium"])
        own = tiny.single_file("sd3-medium")
        inject(pipeline, *artifacts["sd3-medium"], checkpoint=own)

    def test_other_pipelines(self, artifacts):
        from diffusionkit.mlx import FluxPipeline

        for other in (object.__new__(FluxPipeline), StandInForNothing()):
            self.refused(other, "no Stable Diffusion 3 pipeline", *artifacts["sd3-medium"])
        pipeline = make()
        pipeline.model_version += "-4bit-quantized"
        self.refused(pipeline, "model_version one of", *artifacts["sd3-medium"])

    def test_twice_in_or_out(self, artifacts):
        inject(pipeline := make(), *artifacts["sd3-medium"])
        self.refused(pipeline, r"ditq.eject\(pipeline\) first", *artifacts["sd3-medium"])
        eject(pipeline)
        with pytest.raises(UserError, match="nothing to eject"):
            eject(pipeline)

    def test_noise_levels_that_were_never_calibrated(self, artifacts, tmp_path, monkeypatch):
        folder, config = artifacts["sd3-medium"]
        high = dataclasses.replace(QuantConfig.load(config), sigmas=HIGH_SIGMAS)
        high.save(tmp_path / "high.json")
        inject(pipeline := make(), folder, tmp_path / "high.json")
        monkeypatch.setattr(pipeline, "encode_text", None)  # not even asked for
        with pytest.raises(UserError, match="outside the calibrated range"):
            draw(pipeline)


class StandInForNothing:
    """Somebody's own class."""


def test_timesteps_that_were_rounded_to_sixteen_bits_are_exact_again():
    model = random_model(CONFIGS["sd3-medium"])
    latent, text, pooled = random_inputs(model.config, 8, 8)
    sigmas = sd3_sigmas(10).tolist()
    stand_in = StandIn(model)
    stand_in.expect(sigmas)
    rounded = (1000 * mx.array(sigmas)).astype(mx.float16)
    stand_in.cache_modulation_params(pooled, rounded)
    assert float(rounded[3]) != 1000 * sigmas[3]
    velocity = stand_in(
        latent_image_embeddings=latent,
        token_level_text_embeddings=text[:, :, None],
        timestep=mx.broadcast_to(rounded[3], (2,)),
    )
    exact = model(latent, text, pooled, mx.full((2,), 1000 * sigmas[3]))
    np.testing.assert_array_equal(np.array(velocity), np.array(exact))


def test_a_stand_in_refuses_what_was_not_calibrated():
    model, schedule = random_model(CONFIGS["sd3-medium"]), Schedule(tuple(HIGH_SIGMAS))
    stand_in = StandIn(model, schedule=schedule)
    stand_in.expect([1.0, 0.95, 0.91, 0.0])
    with pytest.raises(UserError, match="outside the calibrated range"):
        stand_in.expect(sd3_sigmas(4).tolist())


def test_the_package_offers_both_and_imports_them_when_asked():
    assert src.inject is bridge.inject and src.eject is bridge.eject
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        src.nothing  # noqa: B018
    code = (
        "import sys, src; assert 'src.inference' not in sys.modules; src.inject; "
        "assert not any(name.startswith('diffusionkit') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
