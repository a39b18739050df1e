"""The rows of the table: which there are, and the pipeline of each."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
from mlx.utils import tree_flatten

from ..backends import named
from ..inference.int8 import OFF, Int8, int8_layers, open_with_int8
from ..inference.residual_measures import gains_of
from ..inference.residual_setup import Prepared, apply
from ..inference.residuals import Choice, Options, Work, choose, layers_of
from ..models.load import Model, load_pipeline
from ..models.pipeline import Conditioning, Pipeline
from ..quant.int8_operators import AUTO
from ..quant.residual_scales import STATIC
from ..quant.schedule import Step
from .drawing import Job
from .kernels import replaced_note
from .simulated import Simulated
from .subjects import SCALE, Subject, parameter_bytes, with_kernel

FLOAT, SIMULATED, KERNEL, INT8 = "float", "simulated", "kernel", "int8"  # kinds of rows
MODULATED = "modulated"


@dataclass(frozen=True)
class Wanted:
    """What is to be compared, named as on the command line; kernels run here."""

    kernels: list[str]
    dtypes: list[mx.Dtype]  # the first is the one that all others are compared with
    a_scale: str | None = None
    modulation: Options | None = None
    int8: Int8 = OFF
    int8_kernels: list[str] = field(default_factory=lambda: [AUTO])


@dataclass(frozen=True)
class Spec:
    """A row before it is made."""

    kind: str
    kernel: str | None = None
    modulated: bool = False
    dtype: mx.Dtype | None = None  # of a float row


@dataclass(frozen=True)
class Row:
    """A model to be timed."""

    name: str
    spec: Spec
    pipeline: Pipeline
    conditioning: Conditioning
    held: int  # bytes of the transformer's arrays


def specs_of(wanted: Wanted) -> list[Spec]:
    """All rows, in their order; the first is what the others are compared with."""
    specs = [Spec(FLOAT, dtype=dtype) for dtype in wanted.dtypes]
    kernels = [(SIMULATED, Simulated.name), *((KERNEL, name) for name in wanted.kernels)]
    ways = (False, True) if wanted.modulation is not None else (False,)
    specs += [Spec(kind, name, modulated) for kind, name in kernels for modulated in ways]
    if wanted.int8.block().enabled:
        specs += [Spec(INT8, name) for name in wanted.int8_kernels]
    return specs


@dataclass
class Maker:
    """Makes rows; what several of them share is made once."""

    model: Model
    subject: Subject
    wanted: Wanted
    job: Job
    choice: Choice | None  # of layers to modulate
    conditioning: Conditioning
    notes: list[str] = field(default_factory=list)

    def name(self, spec: Spec) -> str:
        """As it stands in the table."""
        if spec.kind == FLOAT:
            return dtype_name(spec.dtype)
        if spec.kind == INT8:
            return f"INT8 {spec.kernel}"
        if not spec.modulated:
            return f"{self.subject.name} {spec.kernel}"
        bits = self.wanted.modulation.act_bit
        return f"{self.subject.weight_name}A{bits} {spec.kernel}, {MODULATED}"

    def make(self, spec: Spec) -> Row:
        """The row, all of its arrays computed."""
        if spec.kind == FLOAT:
            return self.float_row(spec)
        return self.int8_row(spec) if spec.kind == INT8 else self.quantized_row(spec)

    def float_row(self, spec: Spec) -> Row:
        pipeline, conditioning = self.subject.exact, self.conditioning
        if spec.dtype != pipeline.dtype:
            pipeline = load_pipeline(self.subject.source, spec.dtype)
            pipeline.resize(self.job.height, self.job.width)
            conditioning = cast(conditioning, spec.dtype)
        mx.eval(pipeline.transformer.parameters())
        held = parameter_bytes(pipeline.transformer)
        return Row(self.name(spec), spec, pipeline, conditioning, held)

    def quantized_row(self, spec: Spec) -> Row:
        backend = Simulated() if spec.kind == SIMULATED else named(spec.kernel)
        a_scale = self.wanted.a_scale or self.subject.a_scale
        mx.eval(self.subject.quantized.transformer.parameters())  # a saved model's are read late
        before = active_bytes()
        pipeline, step = with_kernel(
            self.subject.quantized, backend, a_scale, joined=not spec.modulated
        )
        if spec.modulated:
            self.modulate(pipeline, step, a_scale)
        elif note := replaced_note(pipeline.transformer, backend):
            self.notes.append(note)
        transformer = pipeline.transformer
        mx.eval([array for _, array in tree_flatten(transformer) if isinstance(array, mx.array)])
        held = parameter_bytes(transformer) + max(0, active_bytes() - before)
        return Row(self.name(spec), spec, pipeline, self.conditioning, held)

    def modulate(self, pipeline: Pipeline, step: Step | None, a_scale: str) -> None:
        """Wraps the chosen layers. Static scales are any: times do not depend on them."""
        options, sigmas = self.wanted.modulation, self.job.sigmas(pipeline)
        layers = layers_of(pipeline.transformer)
        scales = None
        if options.residual_scale == STATIC:
            scales = dict.fromkeys(layers, [SCALE] * len(sigmas))
        work = work_of(self.job)
        apply(pipeline, Prepared(options, work, self.choice, scales, sigmas), step)

    def int8_row(self, spec: Spec) -> Row:
        pipeline = open_with_int8(
            self.model,
            self.subject.exact.dtype,
            kernel=None if spec.kernel == AUTO else spec.kernel,
            int8=self.wanted.int8,
        )
        pipeline.resize(self.job.height, self.job.width)
        mx.eval(pipeline.transformer.parameters())
        layers = len(int8_layers(pipeline.transformer))
        self.notes.append(f"{self.name(spec)} has {layers} layers in INT8")
        held = parameter_bytes(pipeline.transformer)
        return Row(self.name(spec), spec, pipeline, self.conditioning, held)


def chosen_layers(
    subject: Subject, options: Options | None, job: Job, say: Callable[[str], None]
) -> Choice | None:
    """Which layers are modulated, and what they keep."""
    if options is None:
        return None
    pipeline, level = with_kernel(subject.quantized, named("reference"), subject.a_scale)
    work = work_of(job)
    return choose(pipeline, options, work, lambda: gains_of(pipeline, options, work, level, say))


def work_of(job: Job) -> Work:
    return Work(job.num_steps, job.cfg_weight, job.height, job.width, job.batch_size)


def cast(conditioning: Conditioning, dtype: mx.Dtype) -> Conditioning:
    return Conditioning(conditioning.text.astype(dtype), conditioning.pooled.astype(dtype))


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def active_bytes() -> int:
    """What MLX holds now, computed and referred to."""
    gc.collect()
    return mx.get_active_memory()
