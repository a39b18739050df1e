"""DiffusionKit's own pipeline on today's MLX: what still fails without a mend, and works with it.

A test named `…_is_still_needed` fails when DiffusionKit or MLX has mended it: then that mend goes.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from src.errors import UserError
from src.models.sd3_mends import PACKAGE, Mended, mend, mended, unmend

import mlx.core as mx
import numpy as np
import pytest

from .tiny_sd3 import DIFFUSIONKIT, redirected, write_tiny_sd3

pytestmark = [pytest.mark.sd3, pytest.mark.slow]

PROMPT = "a cat on the mat"
MEDIUM = DIFFUSIONKIT["sd3-medium"]
NOT_ON_A_MAC = pytest.mark.skipif(platform.system() == "Darwin", reason="it works on a Mac")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    written = write_tiny_sd3(tmp_path_factory.mktemp("tiny"), models=("sd3-medium",))
    with redirected(written):
        yield written


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger(PACKAGE).setLevel(logging.WARNING)


@pytest.fixture
def memory_size(monkeypatch):
    """The one thing without which no picture is drawn here, so that the others can be looked at."""
    monkeypatch.setattr(mx.metal, "device_info", lambda: {"memory_size": 2**33})


def make(low_memory: bool = False, **options):
    from diffusionkit.mlx import DiffusionPipeline

    return DiffusionPipeline(model_version=MEDIUM, shift=3.0, low_memory_mode=low_memory, **options)


def draw(pipeline, **options) -> np.ndarray:
    settings = {"num_steps": 2, "cfg_weight": 5.0, "latent_size": (8, 8), "seed": 3}
    picture, _ = pipeline.generate_image(PROMPT, **{**settings, "verbose": False, **options})
    return np.array(picture).astype(int)


@pytest.fixture(scope="module")
def wanted(tiny):
    """What the package draws by itself, where all it lacks is a number of Metal's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.metal, "device_info", lambda: {"memory_size": 2**33})
        return draw(make())


@contextmanager
def still_failing(name: str, error: type[Exception], match: str) -> Iterator[None]:
    try:
        yield
    except error as found:
        assert match in str(found)
    else:
        pytest.fail(f"this works now: drop the mend {name!r} from sd3_mends.py, and this test")


def no_longer(name: str, broken: bool) -> None:
    assert broken, f"this works now: drop the mend {name!r} from sd3_mends.py, and this test"


def test_a_mended_pipeline_draws_the_same_in_both_memory_modes(tiny, wanted):
    assert wanted.std() > 20
    for low_memory in (False, True):
        pipeline = make(low_memory)
        mend(pipeline)
        for _ in range(3):
            np.testing.assert_array_equal(draw(pipeline), wanted)


@pytest.mark.skipif(mx.metal.is_available(), reason="Metal knows its memory size")
def test_memory_is_still_needed(tiny):
    with still_failing("memory", KeyError, "memory_size"):
        draw(make())


def test_the_memory_limit_of_mlx_stays_the_callers(tiny, memory_size):
    before = mx.set_memory_limit(2**34)
    try:
        with mended(pipeline := make(True)):
            draw(pipeline)
        assert mx.set_memory_limit(2**34) == 2**34
        draw(make())
        no_longer("memory", mx.set_memory_limit(2**34) != 2**34)
    finally:
        mx.set_memory_limit(before)


def test_attend_is_still_needed(tiny, memory_size):
    with still_failing("attend", TypeError, "memory_efficient_threshold"):
        draw(make(True))


@NOT_ON_A_MAC
def test_report_is_still_needed(tiny, memory_size):
    with still_failing("report", IndexError, "list index out of range"):
        draw(make(), verbose=True)


def test_with_verbose_the_picture_comes_with_a_summary(tiny, wanted, caplog):
    pipeline = make()
    mend(pipeline)
    with caplog.at_level(logging.INFO, PACKAGE):
        np.testing.assert_array_equal(draw(pipeline, verbose=True), wanted)
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("Denoising: ") for line in said)
    assert any(line.startswith("Peak memory: ") for line in said)


def test_plain_is_still_needed(tiny, memory_size):
    with still_failing("plain", ValueError, "layer_norm"):
        draw(make(), cfg_weight=0.0)


@pytest.mark.parametrize("low_memory", [False, True])
def test_without_guidance_the_prompt_alone_is_drawn(tiny, low_memory):
    """A weight of 1 is the prompt's own velocity too, by way of both."""
    pipeline = make(low_memory)
    mend(pipeline)
    plain = draw(pipeline, cfg_weight=0.0)
    assert plain.std() > 20 and np.abs(plain - draw(pipeline, cfg_weight=1.0)).max() <= 1


def test_t5_is_still_needed(tiny, memory_size):
    draw(pipeline := make(use_t5=False))
    no_longer("t5", pipeline.use_t5 and hasattr(pipeline, "t5_encoder"))


@pytest.mark.parametrize("low_memory", [False, True])
def test_t5_is_used_only_when_asked_for(tiny, wanted, low_memory):
    pipeline = make(low_memory, use_t5=False)
    mend(pipeline)
    without = draw(pipeline)
    assert not hasattr(pipeline, "t5_encoder") and not pipeline.use_t5
    np.testing.assert_array_equal(draw(pipeline), without)
    assert not np.array_equal(without, wanted)
    pipeline.use_t5 = True
    np.testing.assert_array_equal(draw(pipeline), wanted)


def test_t5_can_be_unloaded_and_asked_for_again(tiny, wanted):
    pipeline = make()
    mend(pipeline)
    pipeline.unload_t5()
    without = draw(pipeline)
    assert pipeline.t5_encoder is None and not np.array_equal(without, wanted)
    pipeline.use_t5 = True
    np.testing.assert_array_equal(draw(pipeline), wanted)


def numpy_state() -> list:
    return [np.asarray(part).tolist() for part in np.random.get_state()]


def test_noise_is_still_needed(tiny):
    state = numpy_state()
    make().get_noise(20_000, mx.zeros((1, 8, 8, 16)))
    no_longer("noise", numpy_state() != state)


def test_seeds_are_the_packages_and_numpys_generator_the_callers(tiny):
    latent, pipeline = mx.zeros((1, 8, 12, 16)), make()
    theirs = np.array(pipeline.get_noise(3, latent))
    mend(pipeline)
    state = numpy_state()
    np.testing.assert_allclose(np.array(pipeline.get_noise(3, latent)), theirs, rtol=1e-6)
    one, other = draw(pipeline, seed=3), draw(pipeline, seed=4)
    assert not np.array_equal(one, other)
    assert numpy_state() == state


@pytest.fixture
def other_file(tiny, tmp_path):
    """The same model with another modulation and another decoder."""
    (file,) = tiny.home.rglob("sd3_medium.safetensors")
    weights = mx.load(str(file))
    changed = {
        name: tensor * 0.5 if "adaLN" in name or "decoder.conv_in" in name else tensor
        for name, tensor in weights.items()
    }
    mx.save_safetensors(str(tmp_path / "other.safetensors"), changed)
    return str(tmp_path / "other.safetensors")


def test_file_is_still_needed(tiny, other_file, memory_size):
    one = make()
    first = draw(one)
    make(local_ckpt=other_file)
    draw(one)
    no_longer("file", not np.array_equal(draw(one), first))


@pytest.mark.parametrize("low_memory", [False, True])
def test_pipelines_of_two_files_do_not_disturb_each_other(tiny, wanted, other_file, low_memory):
    one = make(low_memory)
    mend(one)
    other = make(low_memory, local_ckpt=other_file)
    mend(other)
    first = draw(other)
    assert not np.array_equal(first, wanted)
    for _ in range(2):
        np.testing.assert_array_equal(draw(one), wanted)
        np.testing.assert_array_equal(draw(other), first)


def cut_short(pipeline) -> None:
    """Ctrl-C after the first step."""

    def stop(*_):
        raise KeyboardInterrupt

    pipeline.sampler.calculate_denoised = stop
    with pytest.raises(KeyboardInterrupt):
        draw(pipeline)
    del pipeline.sampler.calculate_denoised


def test_again_is_still_needed(tiny, memory_size):
    cut_short(pipeline := make())
    with still_failing("again", ValueError, "addmm"):
        draw(pipeline)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_picture_that_was_cut_short_spoils_none(tiny, wanted, low_memory):
    pipeline = make(low_memory)
    mend(pipeline)
    cut_short(pipeline)
    np.testing.assert_array_equal(draw(pipeline), wanted)


def test_a_text_can_be_encoded_again_in_low_memory_mode(tiny, wanted):
    """T5 lets its layers go one after the other: the next text needs them all."""
    mend(pipeline := make(low_memory=True))
    one, other = (pipeline.encode_text(PROMPT)[0] for _ in range(2))
    np.testing.assert_array_equal(np.array(one), np.array(other))

    def stop(*_, **__):
        raise KeyboardInterrupt

    pipeline.set_up_t5()
    pipeline.t5_encoder.encoder.layers[1] = stop
    with pytest.raises(KeyboardInterrupt):
        draw(pipeline)
    np.testing.assert_array_equal(draw(pipeline), wanted)


def package() -> dict[str, object]:
    """Every name of the package's modules and classes, but two that the package itself changes."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith(("diffusionkit", "argmaxtools.test_utils")):
            for key, value in vars(module).items():
                found[f"{name}.{key}"] = value
                if isinstance(value, type):
                    found |= {f"{name}.{key}.{k}": v for k, v in vars(value).items()}
    ours = (f"{PACKAGE}.model_io.LOCAl_SD3_CKPT", f"{PACKAGE}.model_io._FLOAT16")
    return {k: v for k, v in found.items() if k not in ours and not k.endswith("__doc__")}


def test_nothing_of_the_package_changes_and_the_pipeline_comes_back_as_it_was(tiny, other_file):
    pipeline = make(local_ckpt=other_file)
    module = sys.modules[f"{PACKAGE}.model_io"]
    before, own, kind = package(), dict(vars(pipeline)), type(pipeline)
    block = pipeline.mmdit.multimodal_transformer_blocks[0]
    attention, stack = block.sdpa, type(pipeline.t5_encoder.encoder)
    device_info = mx.metal.device_info
    with mended(pipeline):
        assert isinstance(pipeline, Mended) and isinstance(pipeline, kind)
        with mended(pipeline):  # a second time changes nothing, and ends nothing
            draw(pipeline)
        assert isinstance(pipeline, Mended)
        assert module.LOCAl_SD3_CKPT == other_file and mx.metal.device_info is device_info
    after = package()
    assert all(after[key] is value for key, value in before.items())
    assert type(pipeline) is kind and vars(pipeline) == own
    assert block.sdpa is attention and type(pipeline.t5_encoder.encoder) is stack


def test_what_is_no_pipeline_of_sd3_is_refused(tiny):
    from diffusionkit.mlx import FluxPipeline

    for other in (object(), object.__new__(FluxPipeline)):
        with pytest.raises(UserError, match=r"no Stable Diffusion 3 pipeline; give a diffusionkit"):
            mend(other)
        unmend(other)  # nothing to undo


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("diffusionkit", "0.4.0", r"DiffusionKit 0.4.0 .*0.5.1.*pip install 'ditq\[sd3\]'"),
        ("mlx", "0.31.9", r"MLX 0.31.9 .*valid: 0.32 and newer.*pip install --upgrade 'mlx>=0.32'"),
    ],
)
def test_versions_that_are_not_known_are_refused(tiny, monkeypatch, package, version, words):
    installed = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == package else installed(name)
    )
    pipeline = object.__new__(sys.modules[PACKAGE].DiffusionPipeline)
    with pytest.raises(UserError, match=words):
        mend(pipeline)
