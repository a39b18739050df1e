"""What a conversion will do, decided from names, shapes and dtypes before any data is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..errors import UserError
from ..store import TensorInfo, human_bytes
from .format import METADATA_KEY, SCALE, WEIGHT, Scheme, quantized_tensor, scheme_of
from .layers import Selection, in_scope, layer_path, reason_to_keep, role
from .reading import Source


@dataclass(frozen=True)
class Plan:
    """`converted` and `kept` are linear paths in the order of the source; `kept` has reasons."""

    scheme: Scheme
    tensors: dict[str, TensorInfo]
    converted: tuple[str, ...]
    kept: dict[str, str]
    metadata: dict[str, str]

    @property
    def outputs(self) -> dict[str, TensorInfo]:
        """The tensors of the converted file."""
        outputs = dict(self.tensors)
        for path in self.converted:
            rows, columns = self.tensors[path + WEIGHT].shape
            blocks = self.scheme.blocks(columns)
            outputs[path + WEIGHT] = TensorInfo("int8", (rows, columns), rows * columns)
            outputs[path + SCALE] = TensorInfo("float32", (rows, blocks), 4 * rows * blocks)
        return outputs

    @property
    def other_tensors(self) -> int:
        """Tensors that are no layer's weight: biases, tables."""
        return len(self.tensors) - len(self.converted) - len(self.kept)

    @property
    def bytes_in(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def bytes_out(self) -> int:
        return sum(info.nbytes for info in self.outputs.values())

    @property
    def converted_bytes(self) -> tuple[int, int]:
        """Bytes of the converted layers, before and after with their scales."""
        outputs = self.outputs
        before = sum(self.tensors[path + WEIGHT].nbytes for path in self.converted)
        after = sum(
            outputs[path + part].nbytes for path in self.converted for part in (WEIGHT, SCALE)
        )
        return before, after


def make_plan(source: Source, selection: Selection) -> Plan:
    """Raises where the source is quantized already."""
    selection.check()
    _check_not_quantized(source)
    converted, kept = [], {}
    for name, info in source.tensors.items():
        path = layer_path(name)
        if path is None:
            continue
        reason = reason_to_keep(path, info, selection)
        if reason is None:
            converted.append(path)
        else:
            kept[path] = reason
    metadata = {**source.metadata, METADATA_KEY: selection.scheme.metadata()}
    metadata.setdefault("format", "mlx")
    return Plan(selection.scheme, source.tensors, tuple(converted), kept, metadata)


def require_layers(plan: Plan, source: Source, selection: Selection) -> None:
    """Raises where nothing in the source would be converted."""
    if not plan.converted:
        raise _nothing_found(source, selection, plan.kept)


def described(plan: Plan) -> list[str]:
    """A line for every layer: what becomes of it and why."""
    lines = [f"convert  {path}  {_shape(plan, path)}  {role(path)}" for path in plan.converted]
    lines += [f"keep     {path}  {_shape(plan, path)}  {why}" for path, why in plan.kept.items()]
    if plan.other_tensors:
        lines.append(f"copy     {plan.other_tensors} other tensors, such as biases and tables")
    return lines


def summary(plan: Plan) -> list[str]:
    """How many layers, and sizes before and after."""
    return [
        f"Found {len(plan.converted)} layers to convert to INT8",
        f"Keeping {len(plan.kept)} layers",
        f"Converted layers: {_sizes(*plan.converted_bytes)}",
        f"Checkpoint: {_sizes(plan.bytes_in, plan.bytes_out)}",
    ]


def _sizes(before: int, after: int) -> str:
    reduction = 100 * (1 - after / before)
    return f"{human_bytes(before)} to {human_bytes(after)}, {reduction:.1f}% smaller"


def _shape(plan: Plan, path: str) -> str:
    info = plan.tensors[path + WEIGHT]
    return f"{'x'.join(map(str, info.shape))} {info.dtype}"


def _check_not_quantized(source: Source) -> None:
    dtypes = {name: info.dtype for name, info in source.tensors.items()}
    found = quantized_tensor(dtypes, source.tensors)
    scheme = scheme_of(source.metadata, source.path)
    if scheme is not None or found is not None:
        what = f"INT8, {scheme.name}" if scheme else f"it has {found}"
        raise UserError(f"{source.path} is quantized already ({what}); give the 16-bit checkpoint")


def _nothing_found(source: Source, selection: Selection, kept: dict[str, str]) -> UserError:
    if selection.scope_attr and not any(in_scope(p, selection.scope_attr) for p in kept):
        tops = sorted({path.split(".")[0] for path in kept})
        return UserError(
            f"{source.path} has no layers under scope_attr {selection.scope_attr!r}; "
            f"its layers are under {', '.join(tops[:8]) or 'no name'}"
        )
    reasons = Counter(kept.values()).most_common(4)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons) or "it has none"
    return UserError(
        f"{source.path} has no layer to convert (kept: {why}); --min_features, --skip_keywords "
        "and --scope_attr choose others"
    )
