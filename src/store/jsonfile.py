"""JSON files: the same data gives the same bytes, and nothing is read that was not checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .atomic import write_bytes
from .files import damaged, one_line, open_for_reading, shown

MAX_JSON_BYTES = 256 * 2**20


def json_bytes(data: Any) -> bytes:
    """`data` as indented UTF-8 JSON: keys sorted (`format` and `version` first), NaN refused."""
    text = json.dumps(_plain(data, ""), indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


def write_json(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write `data` atomically; numpy scalars are taken as numbers, tuples as lists."""
    try:
        content = json_bytes(data)
    except UserError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    write_bytes(path, content)


def read_json(
    path: str | Path,
    format: str | None = None,
    version: int | None = None,
    hint: str = "",
    max_bytes: int = MAX_JSON_BYTES,
) -> dict[str, Any]:
    """Read an object; its `format` and `version` must be the given ones.

    `hint` says how to make the file, for example "run `python -m src.evaluate` first".
    """
    with open_for_reading(path, hint) as (file, size):
        if size > max_bytes:
            raise damaged(path, f"{size} bytes is more than the {max_bytes} such a file may have")
        raw = file.read()
    data = parse_object(path, raw)
    check_header(path, data, format, version, hint)
    return data


def parse_object(path: str | Path, raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`, which was read from `path`; no key twice, no NaN."""
    try:
        data = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=reject_duplicates,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except (ValueError, RecursionError, MemoryError) as error:
        raise damaged(path, f"not JSON that this program reads ({one_line(error)})") from error
    if not isinstance(data, dict):
        raise damaged(path, f"it holds a {type(data).__name__}, not an object")
    return data


def check_header(
    path: str | Path,
    data: Mapping[str, Any],
    format: str | None,
    version: int | None,
    hint: str = "",
) -> None:
    """Raise unless `data` from `path` has this format and version; the error names both sides."""
    found = data.get("format")
    if format is not None and found != format:
        raise UserError(
            f"{path} has format {shown(found)}, this program reads {shown(format)}; "
            f"{hint or 'name a file of that format'}"
        )
    found = data.get("version")
    if version is not None and (type(found) is not int or found != version):
        raise UserError(
            f"{path} has version {shown(found)} of its format, this program reads version "
            f"{version}; {hint or 'make it again with this program'}"
        )


def first_difference(found: Any, wanted: Any, key: str = "") -> tuple[str, str, str] | None:
    """The first key, dotted and in sorted order, in which two objects differ, with both values."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for name in sorted({*found, *wanted}):
            inner = f"{key}.{name}" if key else name
            if name not in found:
                return inner, "absent", shown(wanted[name])
            if name not in wanted:
                return inner, shown(found[name]), "absent"
            difference = first_difference(found[name], wanted[name], inner)
            if difference:
                return difference
        return None
    return None if found == wanted else (key, shown(found), shown(wanted))


def require_match(
    path: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any], way_out: str
) -> None:
    """Raise unless what `path` records (`found`) is what this run needs (`wanted`)."""
    difference = first_difference(found, plain(wanted))
    if difference:
        key, old, new = difference
        raise UserError(f"{path} has {key} = {old}, this run has {key} = {new}; {way_out}")


def plain(data: Any) -> Any:
    """`data` as it comes back from a JSON file: tuples are lists, numpy scalars are numbers."""
    return _plain(data, "")


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"JSON keys at {where or 'the top'} must be strings")
        first = ("format", "version") if not where else ()
        order = sorted(value, key=lambda key: (key not in first, key))
        return {key: _plain(value[key], f"{where}.{key}" if where else key) for key in order}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where or 'the value'} is {value}; only finite numbers can be stored")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"{where or 'the value'} is a {type(value).__name__}, which JSON has not")


def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object hook for `json.loads` that refuses a key which is there twice."""
    data = dict(pairs)
    if len(data) == len(pairs):
        return data
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"key {shown(key)} is there twice")
        seen.add(key)
    return data


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is not a finite number")
    return value
