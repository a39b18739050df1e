"""safetensors files read and written piece by piece, for those that are larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .atomic import atomic_write
from .files import damaged, open_for_reading
from .tensors import METADATA, TensorInfo, lay_out


def read_pieces(path: str | Path, info: TensorInfo, piece_bytes: int) -> Iterator[np.ndarray]:
    """The bytes of a tensor of a file whose header was read, in pieces of `piece_bytes`."""
    with open_for_reading(path) as (file, _):
        file.seek(info.start)
        for begin in range(0, info.nbytes, piece_bytes):
            piece = np.empty(min(piece_bytes, info.nbytes - begin), np.uint8)
            if file.readinto(piece) != piece.size:
                raise damaged(path, "it became shorter while it was read")
            yield piece


class TensorWriter:
    """Takes the tensors of one file in any order, each in pieces from its start to its end."""

    def __init__(self, file: BinaryIO, head: bytes, spans: Mapping[str, tuple[int, int]]) -> None:
        self._file, self._spans = file, dict(spans)
        file.write(head)

    def write(self, name: str, data: np.ndarray) -> None:
        """Append an array's bytes to a tensor."""
        position, end = self._spans[name]
        if position + data.nbytes > end:
            raise ValueError(f"tensor {name} gets {position + data.nbytes - end} bytes too many")
        self._file.seek(position)
        self._file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        self._spans[name] = (position + data.nbytes, end)

    def finish(self) -> None:
        """Raise unless every tensor is whole."""
        for name, (position, end) in self._spans.items():
            if position != end:
                raise ValueError(f"tensor {name} lacks {end - position} bytes")


@contextmanager
def stream_tensors(
    path: str | Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] = METADATA
) -> Iterator[TensorWriter]:
    """A writer for a file of these tensors, which appears when the block ends, whole or never.

    The bytes are those that `save_tensors` would write of the same tensors.
    """
    head, places = lay_out(path, tensors, metadata)
    spans = {name: (place, place + tensors[name].nbytes) for name, place in places.items()}
    with atomic_write(path) as file:
        writer = TensorWriter(file, head, spans)
        yield writer
        writer.finish()
