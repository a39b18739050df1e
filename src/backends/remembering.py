"""What a self-test of kernels has found on this machine, kept in a file: it runs once a machine.

A file that is damaged or about anything else counts for nothing. Who is testing holds a lock, for
which others wait, and which ends with its process. Whoever then finds a test without an end knows
that it took its process with it, or was killed with it: it is begun once more, and no third time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..store import folder_lock, hash_file, hash_json, read_json, write_json
from .tuning import cache_folder

VERSION = 2
UNFINISHED, GIVEN_UP = "a test did not come to its end", "two tests did not come to their end"
# How a reason ends that was found by counting. Others, such as too little memory or a compiler that
# finds no headers, may be gone by the next time.
COUNTED = "wrong numbers"


@dataclass(frozen=True)
class Record:
    """Where it is kept what one self-test has found: nothing where all was exact, else a reason."""

    name: str  # of the kernels
    known: tuple[str, ...]  # what it holds for: GPU, system, MLX, source

    @property
    def file(self) -> Path:
        return cache_folder() / f"{self.name}-{hash_json(list(self.known))[:8]}.json"

    @property
    def way_out(self) -> str:
        """What a user does about a failure."""
        known = self.file.exists()
        return f"to test again delete {self.file}" if known else "the next process tests again"

    @property
    def format(self) -> str:
        return f"ditq-{self.name.replace('_', '-')}-self-test"

    def data(self, wrong: str) -> dict[str, Any]:
        head = {"format": self.format, "version": VERSION}
        return {**head, "machine": list(self.known), "wrong": wrong}

    def read(self) -> str | None:
        """What an earlier test has found, none where there was none of these kernels here."""
        try:
            found = read_json(self.file, self.format, VERSION)
        except UserError:
            return None
        wrong = found.get("wrong")
        return wrong if isinstance(wrong, str) and found == self.data(wrong) else None

    def write(self, wrong: str) -> None:
        """Where nothing can be written, each process tests anew."""
        try:
            write_json(self.file, self.data(wrong))
        except UserError:
            self.forget()

    def forget(self) -> None:
        with suppress(OSError):
            self.file.unlink(missing_ok=True)


def source_hash(kernels: Iterable[Path], folder: Path, modules: Iterable[str]) -> str:
    """What a result holds for of the kernels' files and of a folder's modules: whole files, since
    Python puts the kernels' source together and starts them, and says what is tested."""
    files = [*sorted(kernels), *(folder / f"{name}.py" for name in modules)]
    return hash_json([hash_file(file) for file in files])


def found_once(record: Record, test: Callable[[], str]) -> str:
    """What the test finds, or has found here before; `record` says what for."""
    with one_at_a_time(record):
        known = record.read()
        if known not in (None, UNFINISHED):
            return known
        record.write(UNFINISHED if known is None else GIVEN_UP)
        return recorded(record, test)


@contextmanager
def one_at_a_time(record: Record) -> Iterator[None]:
    """Waits for a process that is testing these kernels; where nothing can be locked it does not.
    No number of a process could tell whether that one still is: two containers, or two machines
    with one home folder, number theirs alike."""
    with ExitStack() as held:
        with suppress(UserError):
            held.enter_context(folder_lock(cache_folder(), f".{record.file.stem}.lock", wait=True))
        yield


def recorded(record: Record, test: Callable[[], str]) -> str:
    """What the test finds, written down; one that ends the process leaves what was written."""
    try:
        wrong = test()
    except BaseException:
        record.forget()
        raise
    if not wrong or wrong.endswith(COUNTED):
        record.write(wrong)
    else:
        record.forget()
    return wrong
