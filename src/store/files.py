"""Opening files, checking names, and errors of the system as errors that a user can act on."""

from __future__ import annotations

import errno
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

_WAYS_OUT = {
    errno.ENOSPC: "free some space or choose a folder on another disk",
    errno.EDQUOT: "your disk quota is used up: free some space or choose another folder",
    errno.EFBIG: "the file is too large for this disk or limit: choose a folder on another disk",
    errno.EACCES: "change its permissions or choose another folder",
    errno.EPERM: "change its permissions or choose another folder",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.EISDIR: "a folder has this name: move it away or choose another name",
    errno.ENOTDIR: "a part of this path is a file, not a folder: choose another path",
    errno.EEXIST: "a file is where a folder is needed: move it away or choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def os_error(error: OSError, path: str | Path, doing: str) -> UserError:
    """The UserError for a system call on `path` that failed while `doing` (a verb: read, write)."""
    way_out = _WAYS_OUT.get(error.errno or 0, "check the path and the disk")
    return UserError(f"cannot {doing} {path}: {error.strerror or error}; {way_out}")


def damaged(path: str | Path, why: str) -> UserError:
    """The UserError for a file or folder whose content is not what its kind holds."""
    return UserError(f"{path} is damaged: {why}; {replacing(path)}")


def replacing(path: str | Path) -> str:
    """The way out where a file or folder must be replaced: what to delete before it comes anew."""
    # A hub's cache links to what it holds: were only a link deleted, it would be made again.
    path, what = Path(path), "it"
    if path.is_symlink():
        what = f"{path.resolve()}, to which it links,"
    elif path.is_dir() and any(entry.is_symlink() for entry in path.iterdir()):
        what = "it, with the files that its links lead to,"
    return f"delete {what} and make or download it again"


def shown(value: Any) -> str:
    """`value` as one short line for an error message, however long or strange it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 120
    short.maxlevel = 3
    return one_line(short.repr(value))


def one_line(text: object) -> str:
    """`text`, such as another library's error, without line breaks and cut at 300 characters."""
    line = " ".join(str(text)[:1000].split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= 300 else line[:297] + "..."


@contextmanager
def open_for_reading(path: str | Path, hint: str = "") -> Iterator[tuple[BinaryIO, int]]:
    """Yield the open file and its size in bytes; `hint` tells how to get a file that is missing."""
    try:
        # Opening a pipe would wait for ever, so the kind is looked at first.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path} is not a regular file; name a file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {hint or 'check the path'}") from error
    except OSError as error:
        raise os_error(error, path, "read") from error


def check_relative_name(name: Any, source: str | Path) -> str:
    """Return `name` if it stays inside its folder; `source` is the file that holds the name."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        raise damaged(source, f"{shown(name)} is not a plain file name")
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise damaged(source, f"file name {shown(name)} may lead out of its folder")
    return name


def sync_folder(folder: str | Path) -> None:
    """Make renames in `folder` durable, where the file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder and say so with EINVAL.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
