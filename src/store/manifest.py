"""The list of a stage's finished units of work: what makes a killed run go on where it was.

While a stage works, every rank (process) appends its units to its own journal,
`manifest.rank-R.jsonl`, each after the files of the unit. At the end rank 0 merges them into
`manifest.json`, which comes last and is there only when the work is complete. It holds nothing of
the clock, the machine or the process: a resumed run, or another number of ranks, gives the same
bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .atomic import remove_stale_temporaries
from .files import check_relative_name, damaged, os_error, shown
from .hashes import hash_file
from .journal import append_line, read_journal
from .jsonfile import check_header, plain, read_json, require_match, write_json

MANIFEST_NAME = "manifest.json"
_JOURNAL = re.compile(r"manifest\.rank-\d+\.jsonl")
_OTHER_WORK = (
    "repeat the command with the old values, use --force to start afresh, or choose another folder"
)


class Manifest:
    """The units that are done in a stage's folder. Make it with `Manifest.open`."""

    def __init__(self, folder: Path, head: dict[str, Any], rank: int) -> None:
        self.folder = folder
        self._head = head
        self._journal = folder / f"manifest.rank-{rank}.jsonl"
        self._units = self._read_units()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        format: str,
        version: int,
        settings: Mapping[str, Any],
        made_from: Mapping[str, Any],
        force: bool = False,
        rank: int | None = None,
    ) -> Manifest:
        """Go on with the work in `folder`, or start it; take `folder_lock` before.

        `settings` are the options that decide the bytes; `made_from` holds names and hashes of
        the inputs (model, earlier stage). Both must be those that the folder was begun with.
        `force` starts afresh. `rank` is that of a process of a distributed run, in which rank 0
        calls `clear_folder` for `force` before any rank opens.
        """
        folder = Path(folder)
        if force and rank is not None:
            raise ValueError("with ranks, call clear_folder in rank 0 before any rank opens")
        if force:
            clear_folder(folder, format)
        head = {
            "format": format,
            "version": version,
            "made_from": plain(made_from),
            "settings": plain(settings),
        }
        if not rank:
            remove_stale_temporaries(folder)
        return cls(folder, head, rank or 0)

    def done(self, unit: str) -> bool:
        """Whether `unit` was marked and its files are still there in their recorded sizes."""
        return unit in self._units and _first_wrong_file(self.folder, self._units[unit]) is None

    def pending(self, units: Iterable[str]) -> list[str]:
        """Those of `units` that are still to do, in the given order."""
        return [unit for unit in units if not self.done(unit)]

    def info(self, unit: str) -> Any:
        """What `mark` was given as `info` for a unit that is done."""
        return self._units[unit]["info"]

    def mark(
        self, unit: str, files: Iterable[str], info: Any = None, hash_files: bool = True
    ) -> None:
        """Record `unit` as done; `files` are the names, relative to the folder, that it wrote.

        Sizes and (with `hash_files`) sha256 are taken from the files; `info` is small JSON data.
        """
        described = {name: _describe(self.folder, name, hash_files) for name in files}
        record = {"files": described, "info": plain(info)}
        append_line(self._journal, self._head, {"unit": unit, **record})
        self._units[unit] = record

    def merge_ranks(self) -> None:
        """Learn what the other ranks have marked since this one opened the folder."""
        self._units = self._read_units()

    def finish(self, units: Iterable[str], summary: Any = None) -> None:
        """Write `manifest.json`; every one of `units` must be done.

        A distributed run calls it in rank 0 only, when all ranks have ended their work.
        """
        self.merge_ranks()
        pending = self.pending(units)
        if pending:
            raise UserError(
                f"{self.folder} is not complete: {len(pending)} units are still to do, first "
                f"{shown(pending[0])}; run the same command again"
            )
        data = {**self._head, "units": self._units, "summary": plain(summary)}
        write_json(self.folder / MANIFEST_NAME, data)
        for path in _journals(self.folder):
            _remove(path)

    def _read_units(self) -> dict[str, Any]:
        """All units on record in the folder, where every record must be of this very work."""
        units: dict[str, Any] = {}
        for path in [self.folder / MANIFEST_NAME, *_journals(self.folder)]:
            if os.path.exists(path):
                head, recorded = _read_record(path)
                check_header(path, head, self._head["format"], self._head["version"], _OTHER_WORK)
                found = {key: head.get(key) for key in ("made_from", "settings")}
                require_match(path, found, {key: self._head[key] for key in found}, _OTHER_WORK)
                units.update(recorded)
        return units


def read_manifest(
    folder: str | Path, format: str, version: int, hint: str = "", verify: bool = False
) -> dict[str, Any]:
    """The manifest of an earlier stage, which must be complete and all its files there.

    `hint` says how to make the folder. `verify` also compares the sha256 of every file.
    `hash_file(folder / MANIFEST_NAME)` stands for the whole folder in a later `made_from`.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not os.path.exists(path) and _journals(folder):
        raise UserError(
            f"{folder} is not complete; {hint or 'run the command that makes it again'}"
        )
    data = read_json(path, format, version, hint)
    for unit, record in _checked_units(path, data.get("units")).items():
        wrong = _first_wrong_file(folder, record, verify)
        if wrong:
            raise UserError(
                f"{folder / wrong} of unit {shown(unit)} is missing or was changed; "
                f"{hint or 'run the command that made it again'}"
            )
    return data


def clear_folder(folder: str | Path, format: str) -> None:
    """Remove the files that the records in `folder` list, then the records; other files stay.

    A damaged record is removed alone. A folder of another format is refused.
    """
    folder = Path(folder)
    records = [p for p in [*_journals(folder), folder / MANIFEST_NAME] if os.path.exists(p)]
    listed: set[str] = set()
    for path in records:
        try:
            head, units = _read_record(path)
        except UserError:
            continue
        if head.get("format") != format:
            raise UserError(
                f"{path} has format {shown(head.get('format'))}, this program writes "
                f"{shown(format)} and will not remove it; choose another folder"
            )
        listed.update(name for record in units.values() for name in record["files"])
    for name in sorted(listed):
        _remove(folder / name)
    for path in records:
        _remove(path)
    remove_stale_temporaries(folder)


def _journals(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if _JOURNAL.fullmatch(path.name))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise os_error(error, folder, "read") from error


def _read_record(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The head and the units of a manifest or a journal."""
    if path.name == MANIFEST_NAME:
        head = read_json(path)
        return head, _checked_units(path, head.get("units"))
    lines = read_journal(path)
    units = {}
    for line in lines[1:]:
        unit = line.pop("unit", None)
        if not isinstance(unit, str):
            raise damaged(path, "a line names no unit")
        units[unit] = line
    return lines[0], _checked_units(path, units)


def _checked_units(path: Path, units: Any) -> dict[str, Any]:
    """`units` as read from `path`, whose file names may come from anybody."""
    if not isinstance(units, dict):
        raise damaged(path, "it has no units")
    for unit, record in units.items():
        if not isinstance(record, dict) or set(record) != {"files", "info"}:
            raise damaged(path, f"unit {shown(unit)} has no files and info")
        if not isinstance(record["files"], dict):
            raise damaged(path, f"the files of unit {shown(unit)} are not an object")
        for name, described in record["files"].items():
            check_relative_name(name, path)
            if not isinstance(described, dict) or type(described.get("bytes")) is not int:
                raise damaged(path, f"file {shown(name)} has no size in bytes")
    return units


def _describe(folder: Path, name: str, hash_files: bool) -> dict[str, Any]:
    path = folder / check_relative_name(name, folder)
    try:
        described: dict[str, Any] = {"bytes": path.stat().st_size}
    except OSError as error:
        raise os_error(error, path, "read") from error
    if hash_files:
        described["sha256"] = hash_file(path)
    return described


def _first_wrong_file(folder: Path, record: dict[str, Any], verify: bool = False) -> str | None:
    for name, described in record["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return name
        if size != described["bytes"]:
            return name
        if verify and hash_file(folder / name) != described.get("sha256", ""):
            return name
    return None


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise os_error(error, path, "remove") from error
