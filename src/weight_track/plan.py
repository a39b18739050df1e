"""What a run of the weight track is to do: checked before any long work, and estimated."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.block_cache import BlockCache
from ..calibration.trajectories import Trajectories
from ..cli import memory_bytes
from ..errors import UserError
from ..models.configs import MMDiTConfig
from ..models.load import Model, chosen, load_pipeline
from ..models.paths import BLOCKS, block_linears
from ..models.pipeline import Pipeline, compiling_is_faster
from ..quant.artifacts import BEFORE_REFINING, FINAL, QuantConfig
from ..quant.block_rounding import LEARNED, METHODS, RoundingSettings
from ..quant.grid import GROUP_SIZES, check_bits, grouped
from ..quant.learning import Learning
from ..store import MANIFEST_NAME, hash_file, human_bytes, require_match
from .blocks import block_paths, full_path

PREFIXES = ("fp", "quantized")
# Of Adam: found on nano, where a block's loss is 1 at the start. AdaRound's is constant and has to
# bring every α from the middle to an end; the other's, in steps of the grid, falls to 0.
RATES = {"adaround": 1e-1, "ste": 2e-3}
# Float32 copies of a block's weights at once: master, base, state, two moments, weight, gradient.
WEIGHT_COPIES = 9
# Float32 values of the hidden size that one token of a minibatch leaves for the gradient.
ACTIVATIONS_PER_TOKEN = 150
# Without learning: codes, Hessians and candidates; and what a token's forward computes and records.
LADDER_COPIES, FORWARD_PER_TOKEN = 7, 25
ATTENTION_COPIES = 4  # of (heads, tokens, tokens) for each row, where attention is not fused
# Refining is the default for networks that a plain machine refines in minutes.
REFINE, REFINED_BY_DEFAULT = 400, 100_000_000  # iterations; weights
# Float32 copies of all weights: master, the rest of the network, state, two moments, weight,
# gradient, and its product with the scales.
NETWORK_COPIES = 8


@dataclass(frozen=True)
class Options:
    """The command's options, by the same names."""

    bits_w: int = 4
    bits_a: int = 8
    iters: int = 1000
    method: str = "adaround"
    group_size: int = 0
    batch_size: int = 8
    lr: float | None = None  # None: the method's own, see RATES
    warmup: float = 0.2
    b_range: tuple[float, float] = (20.0, 2.0)
    reg: float = 0.01
    activations_from: float = 0.75
    bias_correction: bool = True
    refine: int | None = None  # None: the model's own
    calib_dir: str | Path | None = None  # None: the folder above the cache
    prefix: str = "fp"
    blocks: str | None = None
    quant_config: str | Path | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises for a value that is not possible, whatever the model."""
        check_bits(self.bits_w, "--bits-w")
        check_bits(self.bits_a, "--bits-a")
        for name, value, valid in (
            ("method", self.method, METHODS),
            ("group-size", self.group_size, GROUP_SIZES),
            ("prefix", self.prefix, PREFIXES),
        ):
            if value not in valid:
                raise UserError(f"--{name} {value} is unknown; valid: {', '.join(map(str, valid))}")
        for name, value, least in (
            ("iters", self.iters, 0),
            ("batch-size", self.batch_size, 1),
            ("seed", self.seed, 0),
            ("refine", self.refine, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"--{name} must be at least {least}, got {value}")
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"--lr must be above 0, got {self.lr}")
        if not 0 <= self.warmup < 1:
            raise UserError(f"--warmup must be from 0 to below 1, got {self.warmup}")
        if not 0 <= self.activations_from <= 1:
            raise UserError(f"--activations-from must be 0 to 1, got {self.activations_from}")
        if not self.reg >= 0:
            raise UserError(f"--reg must be at least 0, got {self.reg}")
        if not self.b_range[0] >= self.b_range[1] > 1:
            raise UserError(
                f"--b-range must fall and end above 1, got {self.b_range[0]} {self.b_range[1]}"
            )

    def rounding(self) -> RoundingSettings:
        """What decides the codes of a block."""
        learning = Learning(
            iters=self.iters,
            batch_size=self.batch_size,
            lr=self.lr or RATES.get(self.method, RATES["ste"]),
            warmup=self.warmup,
            b_range=tuple(self.b_range),
            reg=self.reg,
            activations_from=self.activations_from,
            seed=self.seed,
        )
        return RoundingSettings(
            self.method,
            self.bits_w,
            self.bits_a,
            self.group_size,
            learning,
            self.bias_correction,
        )


@dataclass(frozen=True)
class Plan:
    """What decides every byte of the output folder."""

    folder: Path
    pipeline: Pipeline
    cache: BlockCache
    options: Options
    blocks: list[int]
    config: QuantConfig | None
    trajectories: Trajectories | None  # only where the network is to be refined

    @property
    def refines(self) -> bool:
        """Whether blocks are written for refining, and not as they are."""
        return bool(self.options.refine)

    @property
    def whole(self) -> bool:
        return len(self.blocks) == len(self.pipeline.transformer[BLOCKS])

    @property
    def part(self) -> str:
        """Where rounded blocks are written."""
        return BEFORE_REFINING if self.refines else FINAL

    def settings(self) -> dict[str, Any]:
        """Blocks are not among them, unless what is rounded depends on them."""
        chosen = dataclasses.asdict(self.options)
        del chosen["quant_config"], chosen["blocks"], chosen["calib_dir"]
        if self.options.prefix == "quantized":
            chosen["blocks"] = self.blocks
        return chosen

    def made_from(self) -> dict[str, Any]:
        hashes = {
            "model": self.pipeline.name,
            "model_hash": self.pipeline.hash,
            "cache_hash": self.cache.hash,
        }
        if self.config is not None:
            hashes["quant_config_hash"] = hash_file(self.options.quant_config)
            hashes["smoothing_hash"] = self.config.smoothing_hash
        return hashes


def make_plan(cache_dir: Path, folder: Path, model: Model | None, options: Options) -> Plan:
    """Refuses what cannot be done, before anything is written."""
    options.check()
    cache = BlockCache.open(cache_dir)
    pipeline = load_pipeline(chosen(model, cache.made_from["model"]))
    cache = BlockCache.open(cache_dir, pipeline)
    depth = len(pipeline.transformer[BLOCKS])
    blocks = parse_blocks(options.blocks, depth)
    options = dataclasses.replace(options, refine=refine_iterations(options, pipeline))
    for index in blocks:
        check_groups(pipeline, index, options.group_size)
    config = None
    if options.quant_config is not None:
        config = open_config(Path(options.quant_config), pipeline, blocks)
    trajectories = open_trajectories(options, cache, pipeline) if options.refine else None
    return Plan(folder, pipeline, cache, options, blocks, config, trajectories)


def refine_iterations(options: Options, pipeline: Pipeline) -> int:
    """As asked for; else none for some blocks alone, or where the network is large."""
    if options.refine is not None:
        return options.refine
    small = network_weights(pipeline) <= REFINED_BY_DEFAULT
    return REFINE if small and options.blocks is None and options.method in LEARNED else 0


def network_weights(pipeline: Pipeline) -> int:
    """Of all linears that are rounded."""
    return sum(linear.weight.size for linear in block_linears(pipeline.transformer).values())


def open_trajectories(options: Options, cache: BlockCache, pipeline: Pipeline) -> Trajectories:
    """The calibration folder that the cache was made from; refining noises its latents afresh."""
    folder = Path(options.calib_dir or cache.folder.parent)
    try:
        trajectories = Trajectories.open(folder, pipeline)
    except UserError as error:
        raise UserError(
            f"refining needs the calibration data that {cache.folder} was made from ({error}); "
            "give its folder as --calib-dir, or --refine 0"
        ) from None
    wanted = {**cache.made_from, "calibration_hash": trajectories.hash}
    way_out = "give the folder that it was made from as --calib-dir, or --refine 0"
    require_match(cache.folder / MANIFEST_NAME, cache.made_from, wanted, way_out)
    return trajectories


def parse_blocks(text: str | None, depth: int) -> list[int]:
    """Block numbers of "0-3,7"; all of them if nothing is given."""
    if text is None:
        return list(range(depth))
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= depth:
            raise UserError(
                f"--blocks {text} is not possible: {part.strip()!r} names no block; "
                f"valid: numbers and ranges from 0 to {depth - 1}, such as 0-{depth - 1}"
            )
        found.update(range(first, last + 1))
    return sorted(found)


def check_groups(pipeline: Pipeline, index: int, group_size: int) -> None:
    for path, linear in block_paths(pipeline.transformer, index).items():
        try:
            grouped(linear.weight, group_size)
        except UserError as error:
            raise UserError(f"{error} of {full_path(index, path)}") from None


def open_config(path: Path, pipeline: Pipeline, blocks: list[int]) -> QuantConfig:
    """The activation track's file, which must be of this model and name every layer."""
    config = QuantConfig.load(path)
    wanted = {**config.made_from, "model": pipeline.name, "model_hash": pipeline.hash}
    require_match(path, config.made_from, wanted, "make it again for this model")
    for index in blocks:
        for name, linear in block_paths(pipeline.transformer, index).items():
            full, columns = full_path(index, name), linear.weight.shape[1]
            if full not in config.layers:
                raise UserError(f"{path} has no layer {full}; make it again for this model")
            for kind in ("shift", "smoothing"):
                vector = getattr(config.layers[full], kind)
                if vector is not None and vector.shape != (columns,):
                    raise UserError(
                        f"{path}: {kind} of {full} has {len(vector)} channels, the layer has "
                        f"{columns}; make it again for this model"
                    )
    return config


def disk_bytes(plan: Plan) -> int:
    """Of all chosen blocks: one byte a code, and the scales."""
    total = 0
    for index in plan.blocks:
        for linear in block_paths(plan.pipeline.transformer, index).values():
            rows, columns = linear.weight.shape
            groups = columns // (plan.options.group_size or columns)
            total += rows * (columns + 4 * groups + 4) + 4 * columns
    return 2 * total if plan.refines else total


def values_per_row(config: MMDiTConfig, tokens: int, learns: bool = True) -> int:
    """Float32 values that one block keeps of one row of a minibatch, for the gradient if any."""
    values = tokens * config.hidden * (ACTIVATIONS_PER_TOKEN if learns else FORWARD_PER_TOKEN)
    if not compiling_is_faster():
        values += config.heads * tokens**2 * ATTENTION_COPIES
    return values


def iterations_at_once() -> int:
    """On a GPU the next iteration takes its memory while this one computes."""
    return 2 if compiling_is_faster() else 1


def memory_bytes_needed(plan: Plan) -> int:
    """At once, roughly: one block's data, its float32 copies and a minibatch's activations."""
    config, metadata = plan.pipeline.transformer.config, plan.cache.metadata
    rows, tokens = metadata["rows"] * len(plan.cache.pairs), sum(metadata["tokens"])
    size = 4 if plan.cache.settings["dtype"] in ("float32", "bfloat16") else 2
    data = 2 * rows * tokens * config.hidden * size
    weights = sum(
        linear.weight.size for linear in block_paths(plan.pipeline.transformer, 0).values()
    )
    batch = min(plan.options.batch_size, rows)
    learns = plan.options.method in LEARNED
    copies = WEIGHT_COPIES if learns else LADDER_COPIES
    per_row = values_per_row(config, tokens, learns)
    streams = 2 if plan.options.prefix == "quantized" or plan.cache.entry_only else 1
    return streams * data + 4 * iterations_at_once() * (copies * weights + batch * per_row)


def refining_bytes_needed(plan: Plan, ranks: int) -> int:
    """At once, roughly: copies of all weights, and a minibatch's activations in every block."""
    config, rows = plan.pipeline.transformer.config, plan.cache.metadata["rows"]
    per_row = values_per_row(config, sum(plan.cache.metadata["tokens"]))
    batch = rows * -(-plan.options.batch_size // ranks)
    return 4 * (NETWORK_COPIES * network_weights(plan.pipeline) + batch * config.depth * per_row)


def require_memory(plan: Plan, ranks: int = 1) -> int:
    """The estimate in bytes; more than the machine has is an error."""
    needed, available = memory_bytes_needed(plan), memory_bytes()
    if plan.refines:
        refining = refining_bytes_needed(plan, ranks)
        if refining > available:
            raise UserError(
                f"--refine {plan.options.refine} needs about {human_bytes(refining)} of memory, "
                f"there are {human_bytes(available)}; lower --batch-size "
                f"{plan.options.batch_size}, share it among more GPUs, or give --refine 0"
            )
        needed = max(needed, refining)
    if needed > available:
        raise UserError(
            f"rounding needs about {human_bytes(needed)} of memory, there are "
            f"{human_bytes(available)}; lower --batch-size {plan.options.batch_size}, or cache "
            "fewer samples"
        )
    return needed
