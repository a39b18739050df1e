"""One run in one folder: a lock that ends with its process, also after `kill -9`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from .files import os_error

LOCK_NAME = ".lock"


@contextmanager
def folder_lock(
    folder: str | Path, name: str = LOCK_NAME, rank: int | None = None
) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process; a second run gets an error at once.

    The processes of one distributed run share a folder: each gives its `rank`. Rank 0 holds
    the same lock as a run without ranks. The lock file stays behind.
    """
    path = Path(folder) / (f"{name}.rank-{rank}" if rank else name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise os_error(error, path, "lock") from error
    try:
        _take(descriptor, path)
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        who = f"process {holder}" if holder.isdigit() else "another process"
        raise UserError(
            f"{path.parent} is in use by {who}; wait until it ends or choose another folder"
        ) from None
    except OSError as error:
        raise os_error(error, path, "lock") from error
