"""sha256 of files, arrays and JSON data, as 64 hex digits; `short_hash` keeps the first 16."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .arrays import dtype_name, raw_bytes
from .files import open_for_reading
from .jsonfile import json_bytes

_CHUNK_BYTES = 2**20


def hash_file(path: str | Path, hint: str = "") -> str:
    """The sha256 of a file's bytes; `hint` says how to make a file that is missing."""
    digest = hashlib.sha256()
    with open_for_reading(path, hint) as (file, _):
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_arrays(arrays: Mapping[str, Any]) -> str:
    """The sha256 over names, dtypes, shapes and bytes, whatever the order of the mapping.

    An MLX array and a numpy array of the same content count as the same.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        head = json_bytes([name, dtype_name(array.dtype), list(array.shape)])
        # The length in front keeps two neighbouring parts from being read as one.
        digest.update(len(head).to_bytes(8, "little"))
        digest.update(head)
        digest.update(raw_bytes(array))
    return digest.hexdigest()


def hash_json(data: Any) -> str:
    """The sha256 of data that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json_bytes(data)).hexdigest()


def short_hash(digest: str) -> str:
    """The first 16 hex digits, the form for names and messages."""
    return digest[:16]
