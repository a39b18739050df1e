"""How inputs are to be quantized, as it is asked for on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from ..errors import UserError
from ..quant.linear import A_SCALES
from ..quant.residual_scales import ANCHOR_BITS, DYNAMIC, GUIDANCE, KINDS
from .residuals import ALL, AUTO, NO_REST, SAME, SCALE_PICTURES, Options

SIXTEEN = 16  # bits: not quantized
Function = Callable[..., Any]


@dataclass(frozen=True)
class Inputs:
    """What was asked for; nothing: inputs are quantized as the activation track has it."""

    act_bit: int | None = None
    modulate: str | None = None
    modulate_memory: float | None = None
    residual_scale: str = KINDS[0]
    scale_pictures: int = SCALE_PICTURES
    rest_scale: str | None = None
    rest_bit: int | None = None

    def __post_init__(self) -> None:
        if self.modulate is None and self.modulate_memory is not None:
            raise UserError("--modulate-memory is for --modulate; give both")
        if self.act_bit == SIXTEEN and self.modulate is not None:
            raise UserError("--act-bit 16 leaves nothing to modulate; give 2 to 8")
        if self.options is None and self.residual_scale != KINDS[0]:
            raise UserError("--residual-scale is for --modulate or --act-bit; give one of them")
        if self.modulate != AUTO and (self.rest_scale, self.rest_bit) != (None, None):
            raise UserError(NO_REST)

    def check_beside(self, weights_only: bool, a_scale: str) -> None:
        """Raises where the layers' own options contradict what was asked for."""
        asked = self.options is not None
        if weights_only and asked:
            raise UserError(
                "--weights-only leaves inputs in 16 bits, which --modulate and --act-bit quantize; "
                "leave one of them out"
            )
        if self.layers_take_floats and a_scale != A_SCALES[0]:
            instead = f"give --residual-scale {a_scale}" if asked else "leave it out"
            raise UserError(
                f"--a-scale {a_scale} is for the quant config's own bits, not for --modulate or "
                f"--act-bit; {instead}"
            )

    @property
    def options(self) -> Options | None:
        """For the wrappers; none where there are to be none."""
        if self.act_bit == SIXTEEN or (self.act_bit is None and self.modulate is None):
            return None
        bits = ANCHOR_BITS if self.act_bit is None else self.act_bit
        return Options(
            self.modulate,
            bits,
            self.residual_scale,
            self.modulate_memory,
            self.scale_pictures,
            self.rest_scale,
            self.rest_bit,
        )

    @property
    def layers_take_floats(self) -> bool:
        """Whether the layers themselves leave their inputs alone."""
        return self.act_bit == SIXTEEN or self.options is not None


AS_THE_TRACK_HAS_IT = Inputs()


def input_options(function: Function) -> Function:
    """Adds what says how inputs are quantized; the command gets it as one `inputs`."""

    @click.option(
        "--act-bit",
        type=int,
        help="Bits of an input, 2 to 8, or 16.  [default: the quant config's; with --modulate 8]",
    )
    @click.option(
        "--modulate",
        is_flag=False,
        flag_value=ALL,
        help=f"Quantize changes: {ALL}, {AUTO}, or a part of layers' paths.  [off; alone: {ALL}]",
    )
    @click.option("--modulate-memory", type=float, help="GB that modulation may keep.  [no limit]")
    @click.option(
        "--residual-scale",
        default=KINDS[0],
        help=f"Scales for --modulate and --act-bit: {', '.join(KINDS)}.",
    )
    @click.option(
        "--scale-pictures", default=SCALE_PICTURES, help="On which static scales are measured."
    )
    @click.option(
        "--rest-scale",
        help=f"Of layers that --modulate {AUTO} leaves: {', '.join((SAME, *DYNAMIC))}.  "
        f"[{GUIDANCE}]",
    )
    @click.option("--rest-bit", type=int, help="Bits of these layers' inputs, 2 to 8.  [--act-bit]")
    @wraps(function)
    def with_inputs(
        *args: Any,
        act_bit: int | None,
        modulate: str | None,
        modulate_memory: float | None,
        residual_scale: str,
        scale_pictures: int,
        rest_scale: str | None,
        rest_bit: int | None,
        **options: Any,
    ) -> Any:
        inputs = Inputs(
            act_bit,
            modulate,
            modulate_memory,
            residual_scale,
            scale_pictures,
            rest_scale,
            rest_bit,
        )
        return function(*args, inputs=inputs, **options)

    return with_inputs
