"""Quantized weights into a user's own DiffusionKit pipeline, which draws with them by itself.

`inject` puts a `StandIn` in the place of the pipeline's transformer: DiffusionKit calls a few of
its methods and never sees the layers, so what it does to its own transformer (emptying modulation
weights and reading them again, deleting all of it) cannot reach them. `eject` gives the pipeline
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..backends import staying_packed
from ..errors import UserError
from ..models.checkpoints import read_weights
from ..models.load import default_dtype
from ..models.mmdit import MMDiT
from ..models.pipeline import Conditioning, compiling_is_faster
from ..models.sd3_files import PUBLISHED
from ..models.sd3_load import load_sd3
from ..models.sd3_mends import (
    Mended,
    check_pipeline,
    mend,
    model_io,
    put_before,
    take_away,
    unmend,
)
from ..quant.loading import source_of
from ..quant.schedule import Schedule
from .low_memory import ModulationAhead, check_kernels
from .open import Settings, open_artifacts

# DiffusionKit's names of the models and ours.
MODELS = {PUBLISHED[name].name: name for name in ("sd3-medium", "sd3.5-large")}
LEFTOVER = "to_offload"  # a list of modules that DiffusionKit keeps after the first picture
K_BIAS = "attn.k_proj.bias"


@dataclass(frozen=True)
class Bridge:
    """What a pipeline was given; `notes` are for the user, one line each."""

    name: str  # such as W4A8
    layers: list[str]  # paths of the quantized linears
    notes: list[str]


class StandIn:
    """What DiffusionKit's pipeline takes for its transformer.

    With `ahead` the modulation is computed for all steps of a picture first, and its weights are
    in memory for no longer than that takes. Timesteps come rounded to 16 bits from a pipeline with
    a16=True, so the exact ones are taken from its schedule.
    """

    def __init__(
        self,
        transformer: MMDiT,
        *,
        schedule: Schedule | None = None,
        ahead: ModulationAhead | None = None,
    ) -> None:
        self._transformer, self._dtype = transformer, transformer.context_embedder.weight.dtype
        self._schedule, self._ahead = schedule, ahead
        self._run = transformer
        if compiling_is_faster():
            self._run = mx.compile(transformer, inputs=transformer.state)
        self._exact: list[float] = []
        self._forget()

    def expect(self, sigmas: Sequence[float]) -> None:
        """The noise levels of the next picture; those that were never calibrated are refused."""
        levels = [float(sigma) for sigma in sigmas if sigma > 0]
        if self._schedule is not None:
            self._schedule.check(levels)
        self._exact = levels

    def cache_modulation_params(
        self, pooled_text_embeddings: mx.array, timesteps: mx.array
    ) -> None:
        """Called before the first step; the last timestep, 0, is that of the finished picture."""
        self._pooled = pooled_text_embeddings.astype(self._dtype)
        if self._ahead is not None:
            sigmas = sorted({self._nearest(t / 1000) for t in timesteps.tolist() if t > 0})
            # The modulation reads the pooled text alone.
            self._table = self._ahead(Conditioning(self._pooled, self._pooled), sigmas)

    def __call__(
        self,
        latent_image_embeddings: mx.array,
        token_level_text_embeddings: mx.array,
        timestep: mx.array,
    ) -> mx.array:
        """Velocity of the latents, (batch, height, width, channels), all at one timestep.

        The text is (batch, tokens, 1, channels).
        """
        sigma = self._nearest(timestep[0].item() / 1000)
        latent, text = latent_image_embeddings, token_level_text_embeddings.squeeze(2)
        inputs = [
            latent.astype(self._dtype),
            text.astype(self._dtype),
            self._pooled,
            mx.array([1000 * sigma], dtype=mx.float32),
        ]
        if self._table is not None:
            inputs.append(self._table(mx.array(sigma)))
        return self._run(*inputs)

    def load_weights(self, weights: Sequence[Any], strict: bool = True) -> StandIn:
        """Called after the last step, where DiffusionKit reads its modulation again."""
        self._forget()
        return self

    def parameters(self) -> dict[str, Any]:
        return self._transformer.parameters()

    def _forget(self) -> None:
        self._pooled = self._table = None

    def _nearest(self, sigma: float) -> float:
        return min(self._exact, key=lambda known: abs(known - sigma), default=sigma)


class Bridged:
    """Comes before the class of a pipeline whose transformer is a stand-in."""

    def load_mmdit(self, only_modulation_dict: bool = False) -> list[Any] | None:
        """The stand-in, which outlives the pictures; it has no modulation weights to give."""
        if only_modulation_dict:
            return []
        self.mmdit = self.ditq_bridge
        return None

    def get_sigmas(self, sampler: Any, num_steps: int) -> mx.array:
        sigmas = super().get_sigmas(sampler, num_steps)
        self.ditq_bridge.expect(sigmas.tolist())
        return sigmas

    def generate_image(
        self, text: str, num_steps: int = 2, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        # Here too, so that an impossible number of steps is refused before the text is encoded.
        self.get_sigmas(self.sampler, num_steps)
        return super().generate_image(text, num_steps, *args, **kwargs)


def inject(
    pipeline: Any,
    adaround_output: str | Path,
    quant_config: str | Path | None = None,
    *,
    checkpoint: str | Path | None = None,
    kernel: str | None = None,
    a_scale: str = "static",
    weights_only: bool = False,
) -> Bridge:
    """Quantizes a `diffusionkit.mlx.DiffusionPipeline`, whose own `generate_image` then draws.

    `checkpoint` is the file that the pipeline was made with (`local_ckpt`); unless told, it is that
    of the pipeline that was made last, or the hub's. Everything is checked before the pipeline
    changes. With low_memory_mode=True weights stay packed, and the modulation's are let go during
    the steps.
    """
    check_pipeline(pipeline)
    if isinstance(pipeline, Bridged):
        raise UserError("the pipeline is quantized already; ditq.eject(pipeline) first")
    low_memory = bool(pipeline.low_memory_mode)
    if kernel is None and low_memory:
        kernel = staying_packed()
    settings = Settings(kernel, a_scale, weights_only)
    name = check_variant(pipeline, Path(adaround_output))
    path = checkpoint_of(pipeline, checkpoint)
    check_untouched(getattr(pipeline, "mmdit", None), path, unread=low_memory)
    sixteen_bit = load_sd3(name, partial(compute_dtype, pipeline), path)
    artifacts = open_artifacts(sixteen_bit, adaround_output, quant_config, settings)
    quantized = artifacts.inject()
    schedule = None if quantized.weights_only else quantized.step.schedule
    stand_in = stand_in_of(sixteen_bit.transformer, schedule, path if low_memory else None)
    take_place(pipeline, stand_in, path)
    return Bridge(quantized.name, quantized.paths, quantized.notes)


def eject(pipeline: Any) -> None:
    """Gives an injected pipeline its 16-bit transformer back, from the checkpoint."""
    if not isinstance(pipeline, Bridged):
        raise UserError("the pipeline is not quantized; there is nothing to eject")
    take_away(pipeline, Bridged)
    mended_here = pipeline.ditq_mended_here
    for name in ("ditq_bridge", "ditq_mended_here", "mmdit"):
        vars(pipeline).pop(name, None)
    try:
        if not pipeline.low_memory_mode:  # in which the package loads it for every picture
            pipeline.load_mmdit()
    finally:
        if mended_here:
            unmend(pipeline)


def take_place(pipeline: Any, stand_in: StandIn, checkpoint: Path) -> None:
    """The stand-in becomes the pipeline's transformer."""
    mended_here = not isinstance(pipeline, Mended)
    mend(pipeline, str(checkpoint))
    put_before(pipeline, Bridged)
    pipeline.ditq_bridge, pipeline.ditq_mended_here = stand_in, mended_here
    pipeline.load_mmdit()


def stand_in_of(transformer: MMDiT, schedule: Schedule | None, released_to: Path | None) -> StandIn:
    """With a checkpoint in `released_to`, modulation weights are let go and read there again."""
    if released_to is None:
        mx.eval(transformer.parameters())
        return StandIn(transformer, schedule=schedule)
    check_kernels(transformer)
    ahead = ModulationAhead(transformer, lambda: read_weights(released_to))
    ahead.release()
    return StandIn(transformer, schedule=schedule, ahead=ahead)


def compute_dtype(pipeline: Any, name: str) -> mx.Dtype:
    """Of what is not quantized: float32 where the pipeline was made without w16=True."""
    return mx.float32 if pipeline.dtype == mx.float32 else default_dtype(name)


def check_variant(pipeline: Any, adaround_output: Path) -> str:
    """Our name of the pipeline's model; raises for artifacts of another."""
    version = pipeline.model_version
    if version not in MODELS:
        raise UserError(
            f"{version} cannot be quantized again or is unknown; make the pipeline with "
            f"model_version one of {', '.join(MODELS)}"
        )
    source, name = source_of(adaround_output)["model"], MODELS[version]
    if source != name:
        others = [f", or a pipeline of {key}" for key, known in MODELS.items() if known == source]
        raise UserError(
            f"{adaround_output} was made from {source}, the pipeline is {name}; give artifacts "
            f"of {name}{''.join(others)}"
        )
    return name


def checkpoint_of(pipeline: Any, given: str | Path | None) -> Path:
    """The file that the pipeline's transformer is read from; nothing is downloaded."""
    module = model_io()
    own = pipeline.ditq_checkpoint if isinstance(pipeline, Mended) else module.LOCAl_SD3_CKPT
    if given or own:
        return Path(given or own)
    repository = pipeline.mmdit_ckpt
    file = module._MMDIT[repository][pipeline.model_version]
    try:
        return Path(module.hf_hub_download(repository, file, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} of {repository} is not in the hub's cache any more ({type(error).__name__}); "
            "give it with checkpoint=PATH"
        ) from None


def check_untouched(theirs: Any, checkpoint: Path, unread: bool) -> None:
    """Raises where the pipeline's transformer is not what the checkpoint holds, such as with a
    LoRA: the weights were rounded without that. In low memory there may be none, which is well.

    With `unread` one tensor at a time is in memory: comparing reads it, so each that is equal
    makes way for the checkpoint's, which is not read yet.
    """
    if theirs is None:
        return
    again = read_weights(checkpoint) if unread else {}
    found = {n: t for n, t in tree_flatten(theirs.parameters()) if not n.startswith(LEFTOVER)}
    # DiffusionKit drops the k biases.
    wanted = {n: t for n, t in read_weights(checkpoint).items() if n in found or K_BIAS not in n}
    for name in sorted(found.keys() | wanted.keys()):
        same = name in found and name in wanted and not differs(found[name], wanted.pop(name))
        if not same:
            raise UserError(
                f"the pipeline's transformer is not that of {checkpoint}, which differs in {name}; "
                "with a LoRA fold it into a checkpoint and quantize that, else give the "
                "pipeline's own file with checkpoint=PATH"
            )
        tensor = found.pop(name)
        if unread and tensor.size:
            theirs.load_weights([(name, again.pop(name).astype(tensor.dtype))], strict=False)


def differs(found: mx.array, stored: mx.array) -> bool:
    if found.size == 0:  # the modulation of a picture that was cut short
        return False
    return found.shape != stored.shape or not mx.array_equal(found, stored.astype(found.dtype))
