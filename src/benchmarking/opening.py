"""From what was asked for to rows that can be timed: everything is checked before the first is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..inference.int8 import OFF, Int8
from ..inference.residuals import ALL, Options
from ..inference.saved import check_sigmas
from ..models.load import Model
from ..quant.int8_operators import AUTO
from ..quant.linear import Runtime
from ..quant.residual_scales import STATIC
from .drawing import Job
from .kernels import Available
from .memory import needed_bytes, require_memory
from .rows import Maker, Spec, Wanted, chosen_layers, specs_of
from .subjects import Codes, Subject, open_subject

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
NO_LAYERS = "none"  # in the place of layers to modulate

Say = Callable[[str], object]


@dataclass(frozen=True)
class Order:
    """What is to be compared, named as on the command line."""

    codes: Codes = Codes()
    a_scale: str | None = None
    modulate: str = ALL
    modulate_memory: float | None = None
    dtypes: Sequence[str] = ()
    batch_size: int = 1
    num_steps: int | None = None
    cfg_weight: float | None = None
    height: int | None = None
    width: int | None = None
    int8: Int8 = OFF

    def __post_init__(self) -> None:
        if self.a_scale is not None:
            Runtime(a_scale=self.a_scale)  # refuses what is not known
        for name in self.dtypes:
            if name not in DTYPES:
                raise UserError(f"--dtype {name} is unknown; valid: {', '.join(DTYPES)}")
        self.modulation(STATIC)
        self.int8.block()

    def modulation(self, a_scale: str) -> Options | None:
        """Changes are scaled as values are: from a table, or each token by itself."""
        if self.modulate == NO_LAYERS:
            return None
        kind = STATIC if a_scale == STATIC else "token"
        memory = self.modulate_memory
        return Options(self.modulate, residual_scale=kind, modulate_memory=memory)


@dataclass(frozen=True)
class Opened:
    """What makes the rows, which they are, and what was drawn with, for the report."""

    maker: Maker
    specs: list[Spec]
    described: dict[str, Any]


def open_all(model: Model, order: Order, kernels: Available, asked: bool, say: Say) -> Opened:
    """Raises for whatever cannot be measured; `asked` says that the kernels were named."""
    wanted_dtypes = [DTYPES[name] for name in dict.fromkeys(order.dtypes)]
    first = wanted_dtypes[0] if wanted_dtypes else None
    subject = open_subject(model, first, order.codes, order.num_steps)
    for pipeline in (subject.exact, subject.quantized):
        pipeline.resize(order.height, order.width)
    job = Job.of(subject.exact, order.batch_size, order.num_steps, order.cfg_weight)
    check_sigmas(subject.quantized.transformer, job.sigmas(subject.exact))
    a_scale = order.a_scale or subject.a_scale
    options = order.modulation(a_scale)
    wanted = Wanted(
        kernels.names,
        wanted_dtypes or default_dtypes(subject),
        a_scale,
        options,
        order.int8,
        kernels.names if asked else [AUTO],
    )
    specs, one = specs_of(wanted), job.conditioning(subject.exact)
    config, tokens = subject.exact.transformer.config, one.text.shape[1]
    needed = needed_bytes(specs, config, job, tokens, subject.exact.dtype, subject.packed_bytes)
    require_memory(needed, len(specs))
    choice = chosen_layers(subject, options, job, say)
    kept = 0 if choice is None else choice.taken
    require_memory(needed + kept, len(specs))
    maker = Maker(model, subject, wanted, job, choice, job.for_batch(one))
    maker.notes += subject.notes
    if choice is not None:
        maker.notes.append(choice.described(job.batch_size))
    described = {
        "name": subject.exact.name,
        "sha256": subject.exact.hash,
        "weights": subject.weights,
        "activation scales": a_scale,
    }
    return Opened(maker, specs, described)


def default_dtypes(subject: Subject) -> list[mx.Dtype]:
    """The device's own, and float32 beside 16 bits."""
    return list(dict.fromkeys([subject.exact.dtype, mx.float32]))
