"""A journal: one JSON object per line, of which `kill -9` can spoil the last line only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .atomic import write_bytes
from .files import damaged, open_for_reading, os_error
from .jsonfile import MAX_JSON_BYTES, parse_object, plain


def append_line(path: str | Path, head: Mapping[str, Any], line: Mapping[str, Any]) -> None:
    """Append `line` durably; a journal that is missing is begun with `head` as its first line."""
    path = Path(path)
    if not os.path.exists(path):
        write_bytes(path, _encode(head))
    try:
        with open(path, "r+b") as file:
            # A killed writer may have left half a line, onto which nothing must be joined.
            _cut_broken_tail(file)
            file.write(_encode(line))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise os_error(error, path, "write") from error


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a journal, the head first, without a last line that was cut off."""
    with open_for_reading(path) as (file, size):
        if size > MAX_JSON_BYTES:
            raise damaged(path, f"{size} bytes is more than the {MAX_JSON_BYTES} it may have")
        raw = file.read()
    lines = raw.split(b"\n")[:-1]
    if not lines:
        raise damaged(path, "it has no whole line")
    return [parse_object(path, line) for line in lines]


def _cut_broken_tail(file: BinaryIO) -> None:
    """Leave the position of `file` behind its last whole line, at its end."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) not in (b"\n", b""):
        file.seek(0)
        file.seek(file.read().rfind(b"\n") + 1)
        file.truncate()


def _encode(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(plain(data), separators=(",", ":"), ensure_ascii=False)
    return (text + "\n").encode("utf-8", "backslashreplace")
