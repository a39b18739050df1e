"""Manifests: going on, other settings, ranks, --force."""

from __future__ import annotations

import json
from pathlib import Path

from src.errors import UserError
from src.store import (
    MANIFEST_NAME,
    Manifest,
    clear_folder,
    hash_file,
    read_manifest,
    save_npz,
    write_bytes,
)

import numpy as np
import pytest

UNITS = [f"unit{i}" for i in range(6)]


def opened(folder: Path, **changes) -> Manifest:
    arguments = {
        "format": "ditq-toy",
        "version": 1,
        "settings": {"steps": 4, "sizes": (1, 2)},
        "made_from": {"model": "nano", "model_hash": "abc"},
    }
    return Manifest.open(folder, **{**arguments, **changes})


def work(manifest: Manifest, unit: str) -> None:
    name = f"samples/{unit}.npz"
    save_npz(manifest.folder / name, x=np.full(5, int(unit[4:])))
    manifest.mark(unit, [name], info={"loss": np.float32(0.5), "place": (1, 2)})


def complete(folder: Path, **changes) -> None:
    manifest = opened(folder, **changes)
    for unit in manifest.pending(UNITS):
        work(manifest, unit)
    manifest.finish(UNITS, summary={"images": len(UNITS)})


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_run_that_stopped_goes_on_and_ends_with_the_same_bytes(tmp_path):
    complete(tmp_path / "whole")
    first = opened(tmp_path / "parts")
    work(first, "unit3")
    work(first, "unit0")
    second = opened(tmp_path / "parts")
    assert second.pending(UNITS) == ["unit1", "unit2", "unit4", "unit5"]
    assert second.info("unit3") == {"loss": 0.5, "place": [1, 2]}
    with pytest.raises(UserError, match="4 units are still to do, first 'unit1'"):
        second.finish(UNITS)
    with pytest.raises(UserError, match="is not complete; run the toy again"):
        read_manifest(tmp_path / "parts", "ditq-toy", 1, hint="run the toy again")
    complete(tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    complete(tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert str(tmp_path) not in (tmp_path / "whole" / MANIFEST_NAME).read_text()


def test_a_journal_line_that_was_cut_off_is_work_to_do_again(tmp_path):
    complete(tmp_path / "whole")
    manifest = opened(tmp_path / "cut")
    work(manifest, "unit0")
    work(manifest, "unit1")
    journal = tmp_path / "cut" / "manifest.rank-0.jsonl"
    raw = journal.read_bytes()
    start = raw.index(b"\n", raw.index(b"unit0")) + 1
    for length in range(start, len(raw)):
        journal.write_bytes(raw[:length])
        assert opened(tmp_path / "cut").pending(UNITS) == UNITS[1:]
    complete(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_files_that_went_missing_or_changed_size_are_made_again(tmp_path):
    complete(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "samples/unit1.npz").unlink()
    (tmp_path / "samples/unit4.npz").write_bytes(b"short")
    assert opened(tmp_path).pending(UNITS) == ["unit1", "unit4"]
    with pytest.raises(UserError, match="unit1.npz of unit 'unit1' is missing or was changed"):
        read_manifest(tmp_path, "ditq-toy", 1)
    complete(tmp_path)
    assert contents(tmp_path) == before


def test_later_stages_read_a_complete_and_unchanged_folder(tmp_path):
    complete(tmp_path)
    data = read_manifest(tmp_path, "ditq-toy", 1, verify=True)
    assert data["made_from"]["model"] == "nano" and data["summary"] == {"images": 6}
    name = "samples/unit2.npz"
    assert data["units"]["unit2"]["files"][name]["sha256"] == hash_file(tmp_path / name)
    raw = bytearray((tmp_path / name).read_bytes())
    raw[40] ^= 1
    write_bytes(tmp_path / name, bytes(raw))
    assert read_manifest(tmp_path, "ditq-toy", 1) == data
    with pytest.raises(UserError, match="unit2"):
        read_manifest(tmp_path, "ditq-toy", 1, verify=True)
    with pytest.raises(UserError, match="has format 'ditq-toy', this program reads 'ditq-other'"):
        read_manifest(tmp_path, "ditq-other", 1)
    with pytest.raises(UserError, match="missing; run the toy"):
        read_manifest(tmp_path / "none", "ditq-toy", 1, hint="run the toy")


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"steps": 8, "sizes": [1, 2]}}, "settings.steps = 4, .*settings.steps = 8"),
        ({"settings": {"steps": 4}}, r"settings.sizes = \[1, 2\], .*settings.sizes = absent"),
        ({"made_from": {"model": "nano", "model_hash": "d"}}, "model_hash = 'abc', .* = 'd'"),
        ({"version": 2}, "version 1 .* version 2"),
        ({"format": "ditq-b"}, "'ditq-toy', .* 'ditq-b'"),
    ],
)
def test_other_work_in_the_folder_is_refused_with_both_values(tmp_path, finished, changes, message):
    work(opened(tmp_path), "unit0")
    if finished:
        complete(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path, **changes)
    assert "--force" in str(error.value) and "choose another folder" in str(error.value)
    assert contents(tmp_path) == before


def test_force_removes_what_is_listed_and_nothing_else(tmp_path):
    complete(tmp_path)
    work(opened(tmp_path, rank=3), "unit6")
    (tmp_path / "samples" / "notes.txt").write_text("mine")
    (tmp_path / "samples" / ".unit1.npz.tmp-1-0123abcd").write_bytes(b"half")
    fresh = opened(tmp_path, settings={"steps": 8}, force=True)
    assert list(contents(tmp_path)) == ["samples/notes.txt"]
    assert fresh.pending(UNITS) == UNITS


def test_force_does_not_touch_a_folder_of_another_kind(tmp_path):
    complete(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="will not remove it; choose another folder"):
        opened(tmp_path, format="ditq-b", force=True)
    (tmp_path / MANIFEST_NAME).write_text('{"units": {}}')
    with pytest.raises(UserError, match="will not remove it"):
        clear_folder(tmp_path, "ditq-toy")
    assert contents(tmp_path).keys() == before.keys()


def test_a_damaged_manifest_is_named_and_force_gets_past_it(tmp_path):
    complete(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text('{"format": "ditq-toy", "version"')
    with pytest.raises(UserError, match="manifest.json is damaged"):
        opened(tmp_path)
    opened(tmp_path, force=True)
    complete(tmp_path)
    assert read_manifest(tmp_path, "ditq-toy", 1)["summary"] == {"images": 6}


@pytest.mark.parametrize("name", ["../victim", "/etc/hosts", "samples/../../victim", "a\\b", ""])
def test_a_manifest_cannot_reach_files_outside_its_folder(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    folder = tmp_path / "folder"
    complete(folder)
    data = json.loads((folder / MANIFEST_NAME).read_text())
    data["units"]["unit0"]["files"] = {name: {"bytes": 8}}
    (folder / MANIFEST_NAME).write_text(json.dumps(data))
    for read in (opened, lambda folder: read_manifest(folder, "ditq-toy", 1)):
        with pytest.raises(UserError, match="manifest.json is damaged"):
            read(folder)
    opened(folder, force=True)
    assert victim.read_bytes() == b"precious"


def test_a_unit_without_its_file_cannot_be_marked(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nothing.npz"):
        opened(tmp_path).mark("unit0", ["nothing.npz"])
    assert opened(tmp_path).pending(UNITS) == UNITS


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_end_with_the_same_bytes_as_one_process(tmp_path, ranks):
    complete(tmp_path / "one")
    folder = tmp_path / "many"
    manifests = [opened(folder, rank=rank) for rank in range(ranks)]
    for index, unit in enumerate(UNITS):
        work(manifests[index % ranks], unit)
    assert manifests[0].pending(UNITS) != []
    manifests[0].merge_ranks()
    assert manifests[0].pending(UNITS) == []
    manifests[0].finish(UNITS, summary={"images": len(UNITS)})
    assert contents(folder) == contents(tmp_path / "one")


def test_another_number_of_ranks_takes_over(tmp_path):
    complete(tmp_path / "one")
    folder = tmp_path / "many"
    for rank in range(3):
        work(opened(folder, rank=rank), UNITS[rank])
    assert opened(folder, rank=1).pending(UNITS) == UNITS[3:]
    complete(folder)
    assert contents(folder) == contents(tmp_path / "one")
    with pytest.raises(ValueError, match="clear_folder"):
        opened(folder, rank=0, force=True)
