"""Both tracks' results and their model: checked as a whole, then put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..backends import named
from ..errors import UserError
from ..models.load import Model, chosen, load_pipeline
from ..models.mmdit import MMDiT
from ..models.paths import BLOCKS, MODULATION, block_linears, input_of
from ..models.pipeline import Pipeline
from ..quant.artifacts import LayerConfig, QuantConfig
from ..quant.inject import Checked, check_layers, linears_at, put_in
from ..quant.linear import Runtime
from ..quant.loading import HINT, RoundedModel, check_config, load_rounded, source_of
from ..quant.modulated import Modulated, set_quant_state
from ..quant.schedule import Schedule, Step
from ..sampling import StepCallback
from ..store import MANIFEST_NAME, hash_file, short_hash
from .kernels import join, rows_of
from .modulation import quantize_modulation
from .residual_setup import Prepared, apply, prepare
from .residuals import Options, Work, unwrap

MODULATION_BITS = (8, 16)


@dataclass(frozen=True)
class Settings:
    """How the quantized layers are to run."""

    kernel: str | None = None  # the name of a backend; none: each layer's fastest
    a_scale: str = "static"
    weights_only: bool = False
    modulation_bits: int = 16

    def __post_init__(self) -> None:
        Runtime(**self.options())  # refuses what is not known
        if self.modulation_bits not in MODULATION_BITS:
            valid = " or ".join(map(str, MODULATION_BITS))
            raise UserError(f"--modulation-bits {self.modulation_bits} is unknown; valid: {valid}")

    def options(self) -> dict[str, Any]:
        """As the layers take them."""
        backend = None if self.kernel is None else named(self.kernel)
        return {"backend": backend, "a_scale": self.a_scale, "weights_only": self.weights_only}


@dataclass(frozen=True)
class Sources:
    """What was opened."""

    adaround_output: Path
    quant_config: Path | None
    hashes: dict[str, str]  # model_hash, adaround_hash and, with a quant config, its own

    def described(self) -> dict[str, str]:
        """For people: each source with the beginning of its hash."""
        opened = {"weights": ("adaround_hash", self.adaround_output)}
        if self.quant_config is not None:
            opened["quant config"] = ("quant_config_hash", self.quant_config)
        return {
            what: f"{path} ({short_hash(self.hashes[name])})"
            for what, (name, path) in opened.items()
        }


@dataclass(frozen=True)
class Artifacts:
    """A model in 16 bits and what is to be put into it: everything is checked, nothing changed."""

    pipeline: Pipeline
    rounded: RoundedModel
    config: QuantConfig | None
    settings: Settings
    checked: Checked
    sources: Sources
    notes: list[str]

    def inject(self, *, keep: bool = False) -> Quantized:
        """Quantizes the pipeline's transformer; with `keep` the 16-bit layers stay at hand."""
        model = self.pipeline.transformer
        linears = linears_at(model, self.checked.layers) if keep else {}
        if self.settings.modulation_bits != 16:
            modulation = modulation_linears(model) if keep else {}
            linears = {**linears, **modulation}
            quantize_modulation(model, self.settings.modulation_bits)
        rows = rows_of(model.config, self.pipeline.defaults)
        result = put_in(model, self.checked, rows=rows, **self.settings.options())
        join(model)
        return Quantized(
            pipeline=self.pipeline,
            bits=self.rounded.bits,
            method=str(self.rounded.settings.get("method", "unknown")),
            paths=result.layers,
            config=self.config,
            step=result.step,
            settings=self.settings,
            sources=self.sources,
            notes=self.notes,
            originals=linears,
        )


@dataclass(frozen=True)
class Quantized:
    """A pipeline whose transformer runs on codes."""

    pipeline: Pipeline
    bits: int  # of a weight
    method: str  # by which they were rounded
    paths: list[str]  # of the quantized layers
    config: QuantConfig | None
    step: Step | None  # that the layers read; none without a config
    settings: Settings
    sources: Sources
    notes: list[str]
    originals: Mapping[str, nn.Linear] = field(default_factory=dict, repr=False)
    inputs: Prepared | None = None  # how wrappers quantize them, or their changes

    @property
    def name(self) -> str:
        """Such as W4A8."""
        if self.inputs is not None:
            changes = "" if self.inputs.options.modulate is None else " modulated"
            return f"W{self.bits}A{self.inputs.options.act_bit}{changes}"
        return f"W{self.bits}{activations(self.config, self.settings.weights_only)}"

    @property
    def weights_only(self) -> bool:
        """Whether activations stay in 16 bits, for whatever reason."""
        return self.config is None or self.settings.weights_only

    def quantize_inputs(
        self,
        options: Options,
        work: Work,
        say: Callable[[str], None],
        callbacks: Sequence[StepCallback] = (),
    ) -> Quantized:
        """The same with wrappers that quantize the layers' inputs, or the changes of these; the
        layers themselves have to leave them in floats."""
        prepared = prepare(self.pipeline, options, work, self.step, say, callbacks)
        apply(self.pipeline, prepared, self.step, self.originals)
        return replace(self, inputs=prepared)

    def set_quant_state(
        self, *, weights: bool = True, activations: bool = True, modulate: bool = True
    ) -> None:
        """Switches each of the three on or off, where there are wrappers; weights only where the
        16-bit layers were kept."""
        set_quant_state(
            self.pipeline.transformer, weights=weights, activations=activations, modulate=modulate
        )

    @contextmanager
    def sixteen_bit(self) -> Iterator[Pipeline]:
        """The 16-bit model while the context lasts; only where its layers were kept."""
        if not self.originals:
            raise ValueError("the 16-bit layers were not kept")
        with self.instead(self.originals, None):
            yield self.pipeline

    @contextmanager
    def without_wrappers(self) -> Iterator[Pipeline]:
        """The layers alone while the context lasts, their inputs in floats."""
        modules = self.pipeline.transformer.named_modules()
        inner = {path: m.layer for path, m in modules if isinstance(m, Modulated)}
        with self.instead(inner, self.step) if inner else nullcontext():
            yield self.pipeline

    @contextmanager
    def instead(self, layers: Mapping[str, nn.Module], step: Step | None) -> Iterator[None]:
        """Other layers in the place of those of the same paths while the context lasts."""
        model = self.pipeline.transformer
        modules, memory, level = dict(model.named_modules()), model.memory, model.level
        unwrap(model, layers, step)
        try:
            yield
        finally:
            unwrap(model, {path: modules[path] for path in layers}, level)
            model.memory = memory


def open_quantized(
    model: Model | Pipeline | None,
    adaround_output: str | Path,
    quant_config: str | Path | None = None,
    *,
    kernel: str | None = None,
    a_scale: str = "static",
    weights_only: bool = False,
    sigmas: Sequence[float] = (),
) -> Quantized:
    """The quantized pipeline of a finished weight track, and of an activation track if given.

    `model` is a name, a folder or a pipeline, which is changed; none: the weights' own. `sigmas`
    are those that it will be asked for, so that they are refused here rather than later.
    """
    settings = Settings(kernel, a_scale, weights_only)
    artifacts = open_artifacts(model, adaround_output, quant_config, settings)
    check_sigmas(artifacts, sigmas)
    return artifacts.inject()


def open_artifacts(
    model: Model | Pipeline | None,
    adaround_output: str | Path,
    quant_config: str | Path | None,
    settings: Settings,
) -> Artifacts:
    """Reads and checks everything; the model itself stays as it is."""
    folder = Path(adaround_output)
    source = source_of(folder)["model"]
    config = None if quant_config is None else QuantConfig.load(quant_config)
    pipeline = model if isinstance(model, Pipeline) else load_pipeline(chosen(model, source))
    blocks = len(pipeline.transformer[BLOCKS])
    rounded = load_rounded(folder, pipeline.name, pipeline.hash, blocks)
    require_all_layers(folder, pipeline.transformer, rounded)
    hashes = {
        "model_hash": pipeline.hash,
        "adaround_hash": hash_file(folder / MANIFEST_NAME),
    }
    if config is not None:
        check_config(quant_config, config, pipeline.name, pipeline.hash)
        hashes["quant_config_hash"] = hash_file(quant_config)
    given = hashes.get("quant_config_hash")
    known = rounded.made_from.get("quant_config_hash")
    checked = check_layers(
        pipeline.transformer,
        rounded.layers,
        bits=rounded.bits,
        config=config,
        folded=known is not None,
    )
    # That inputs stay in floats without a config is no news to who has asked for it.
    asked = config is None and settings.weights_only
    notes = [*([] if asked else checked.notes), *origin_notes(known, given)]
    sources = Sources(folder, None if config is None else Path(quant_config), hashes)
    return Artifacts(pipeline, rounded, config, settings, checked, sources, notes)


def require_all_layers(folder: Path, model: MMDiT, rounded: RoundedModel) -> None:
    """Raises where a block's file does not hold all of its linears."""
    wanted = block_linears(model)
    if missing := [path for path in wanted if path not in rounded.layers]:
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's {len(wanted)} layers, first "
            f"{missing[0]}; {HINT}"
        )


def modulation_linears(model: MMDiT) -> dict[str, nn.Linear]:
    """By path, the linears that `quantize_modulation` replaces."""
    linears = ((p, m) for p, m in model.named_modules() if isinstance(m, nn.Linear))
    return {path: linear for path, linear in linears if MODULATION in path}


def origin_notes(known: str | None, given: str | None) -> list[str]:
    """What to say where the weights were rounded with another quant config than is given."""
    if known is None or known == given:
        return []
    text = f"the weights were rounded with quant config {short_hash(known)}"
    consequence = "their biases reckon with its shifts, if it has any, which are not known here"
    if given is None:
        return [
            f"{text}, which is not given: its smoothing stays in the layers, as a divide; "
            f"{consequence}; give it, with --weights-only, for exact biases"
        ]
    return [f"{text}, this one is {short_hash(given)}: {consequence}; round again with this one"]


def check_sigmas(artifacts: Artifacts, sigmas: Sequence[float]) -> None:
    """Raises for sigmas outside the calibrated ones, where activations are quantized."""
    if artifacts.config is not None and not artifacts.settings.weights_only:
        Schedule(tuple(artifacts.config.sigmas)).check([float(s) for s in sigmas if s > 0])


def activations(config: QuantConfig | None, weights_only: bool = False) -> str:
    """Such as A8, or "A4-8 (6.2 bits)" where tiers differ: the mean over inputs and steps."""
    if config is None or weights_only:
        return "A16"
    bits = [b for layer in distinct_inputs(config).values() for b in layer.bits]
    low, high = min(bits), max(bits)
    return f"A{high}" if low == high else f"A{low}-{high} ({sum(bits) / len(bits):.1f} bits)"


def distinct_inputs(config: QuantConfig) -> dict[str, LayerConfig]:
    """Layers by the path of their input: q, k and v of one attention share theirs."""
    return {input_of(path): layer for path, layer in config.layers.items()}
