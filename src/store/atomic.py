"""Files that are either the old one or the new one, also after `kill -9` or a power cut."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .files import os_error, sync_folder

_TEMPORARY = re.compile(r"\..+\.tmp-\d+-[0-9a-f]{8}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends without an exception.

    Folders that are missing are made. After an exception the old file, if any, is as it was.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        file, temporary = _create_temporary(target)
    except OSError as error:
        raise os_error(error, target, "write") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # An error that carries another name comes from another file that the block opened.
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise os_error(error, target, "write") from error
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_write(path) as file:
        file.write(data)


def remove_stale_temporaries(folder: str | Path) -> list[Path]:
    """Remove what killed writers left in `folder` and below; a living writer's files stay."""
    found = [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if _TEMPORARY.fullmatch(name)
    ]
    return [path for path in sorted(found) if _remove_if_stale(path)]


def remove_stale_temporaries_of(path: str | Path) -> list[Path]:
    """Remove what killed writers of the one file `path` left beside it."""
    target = Path(path)
    start = f".{target.name}.tmp-"
    names = os.listdir(target.parent) if target.parent.is_dir() else []
    found = [target.parent / n for n in names if n.startswith(start) and _TEMPORARY.fullmatch(n)]
    return [path for path in sorted(found) if _remove_if_stale(path)]


def _create_temporary(target: Path) -> tuple[BinaryIO, Path]:
    """A new file beside `target`, locked for as long as it is open: the sign that it is in use."""
    while True:
        token = secrets.token_hex(4)
        temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{token}")
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        file = os.fdopen(os.open(temporary, flags, 0o666), "wb")
        # A lock and not the process id marks the owner: ids are used again, and mean nothing in
        # another container. Where locks are missing, remove_stale_temporaries removes nothing.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()  # taken for stale between its creation and its lock


def _remove_if_stale(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
