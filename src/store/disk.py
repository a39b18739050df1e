"""Is there room, and may we write: asked before long work and not after it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from ..errors import UserError
from .files import os_error


def human_bytes(count: int | float) -> str:
    """A number of bytes in decimal units, such as "1.5 GB"."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        # 999.95 would be printed as 1000.0.
        if abs(value) < (999.5 if unit == "B" else 999.95):
            break
        value /= 1000
    else:
        unit = "PB"
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def free_bytes(folder: str | Path) -> int:
    """Bytes that may still be written to the disk of `folder`, which need not exist yet."""
    existing = _nearest_existing(Path(folder))
    try:
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise os_error(error, existing, "look at") from error


def require_space(folder: str | Path, bytes: int, what: str) -> None:
    """Raise if `what` (a noun: "the calibration data") of `bytes` bytes cannot fit."""
    free = free_bytes(folder)
    if bytes > free:
        raise UserError(
            f"{what} needs {human_bytes(bytes)}, the disk of {folder} has {human_bytes(free)} "
            "free; free some space or choose a folder on another disk"
        )


def require_writable(folder: str | Path) -> None:
    """Raise if no file can be made in `folder`, or in the folder in which it would be made."""
    existing = _nearest_existing(Path(folder))
    try:
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        # Permission bits do not tell of read-only disks, so a file is really made.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise os_error(error, folder, "write to") from error


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    # A file in the middle of a path makes lexists fail below it and is then found itself.
    return next(p for p in (path, *path.parents) if os.path.lexists(p))
