"""One run in one folder: a lock that ends with its process, also after `kill -9`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .files import os_error

LOCK_NAME = ".lock"


@contextmanager
def folder_lock(
    folder: str | Path, name: str = LOCK_NAME, rank: int | None = None, wait: bool = False
) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process; a second run gets an error at once,
    or with `wait` its turn.

    The processes of one distributed run share a folder: each gives its `rank`. Rank 0 holds
    the same lock as a run without ranks. The file goes when the lock is given back; after
    `kill -9` it stays, but holds nobody off.
    """
    path = Path(folder) / (f"{name}.rank-{rank}" if rank else name)
    descriptor = _take(path, wait)
    try:
        yield
    finally:
        with suppress(OSError):  # what was done under the lock is not undone by it
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path, wait: bool) -> int:
    """The descriptor of the locked file at `path`."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise os_error(error, path, "lock") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_in_place(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
            os.close(descriptor)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise os_error(error, path, "lock") from error
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise UserError(
                f"{path.parent} is in use by {who}; wait until it ends or choose another folder"
            ) from None


def _is_in_place(descriptor: int, path: Path) -> bool:
    """False where the former holder removed this very file between our opening and locking it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
