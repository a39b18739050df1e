"""What a self-test has found: remembered once it is over, whatever becomes of the process."""

from __future__ import annotations

import json
import subprocess
import sys
from threading import Thread

from src.backends.remembering import COUNTED, GIVEN_UP, UNFINISHED, Record, found_once

import pytest

from .helpers import ROOT

WRONG = f"Case(rows=1): 3 {COUNTED}"
RECORD = Record("stand_in", ("a GPU", "a source"))
CODE = """
import os, sys
from src.backends.remembering import Record, found_once

def test():
    print("begun", flush=True)
    exec(sys.argv[1])
    return ""

found_once(Record("stand_in", ("a GPU", "a source")), test)
"""


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


def never() -> str:
    raise AssertionError("it was tested again")


def in_another_process(does: str) -> subprocess.Popen:
    """One whose test does that, after it has said that it has begun."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, does],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("wrong", ["", WRONG])
def test_it_is_tested_once(wrong):
    assert found_once(RECORD, lambda: wrong) == wrong
    assert found_once(RECORD, never) == wrong
    assert list(RECORD.file.parent.iterdir()) == [RECORD.file]
    assert str(RECORD.file) in RECORD.way_out
    RECORD.file.unlink()
    assert found_once(RECORD, lambda: "another") == "another"


@pytest.mark.parametrize(
    "other",
    [
        Record("stand_in", ("another GPU", "a source")),
        Record("stand_in", ("a GPU", "another source")),
        Record("stand_in_192", RECORD.known),
    ],
    ids=lambda record: "-".join((record.name, *record.known)),
)
def test_it_holds_for_nothing_else(other):
    found_once(RECORD, lambda: "")
    assert found_once(other, lambda: WRONG) == WRONG
    assert found_once(other, never) == WRONG
    assert found_once(RECORD, never) == ""


@pytest.mark.parametrize(
    "change",
    [{"version": 1, "process": 0}, {"format": "another"}, {"wrong": None}, {"wrong": 0}, {"x": 1}],
    ids=str,
)
def test_another_format_counts_for_nothing(change):
    found_once(RECORD, lambda: "")
    RECORD.file.write_text(json.dumps(json.loads(RECORD.file.read_text()) | change))
    assert found_once(RECORD, lambda: "tested") == "tested"


@pytest.mark.parametrize("content", [b"", b'{"format": ', b"[]", b"\xff\x00"])
def test_a_damaged_file_counts_for_nothing(content):
    found_once(RECORD, lambda: "")
    RECORD.file.write_bytes(content)
    assert found_once(RECORD, lambda: WRONG) == WRONG
    assert found_once(RECORD, never) == WRONG


@pytest.mark.parametrize("end", ["os._exit(7)", "os.kill(os.getpid(), 9)"])
def test_a_test_that_ended_its_process_is_begun_once_more(end):
    for left in (UNFINISHED, GIVEN_UP):
        with in_another_process(end) as process:
            assert process.wait() in (7, -9)
        assert RECORD.read() == left
    assert found_once(RECORD, never) == GIVEN_UP
    RECORD.file.unlink()
    assert found_once(RECORD, lambda: "") == ""


@pytest.mark.parametrize("killed", [False, True])
def test_who_comes_while_another_is_testing_waits_for_what_it_finds(killed):
    """Also for the end of one that is killed, whose place it takes."""
    found = []
    with in_another_process("input()") as process:
        second = Thread(target=lambda: found.append(found_once(RECORD, lambda: "again")))
        second.start()
        second.join(timeout=0.2)
        assert second.is_alive() and RECORD.read() == UNFINISHED
        process.kill() if killed else process.communicate("\n")
    second.join()
    assert found == ["again" if killed else ""]


def test_a_test_that_was_interrupted_is_begun_again():
    def interrupt() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found_once(RECORD, interrupt)
    assert found_once(RECORD, lambda: "") == ""


@pytest.mark.parametrize(
    "words", ["[malloc] Unable to allocate 99 bytes.", "cannot open source file", "no back-end"]
)
def test_what_may_be_gone_by_the_next_time_is_said_and_not_remembered(words):
    assert found_once(RECORD, lambda: f"Case(rows=1): {words}").endswith(words)
    assert RECORD.way_out == "the next process tests again"
    assert found_once(RECORD, lambda: "") == ""
    assert found_once(RECORD, never) == ""


def test_without_a_place_to_remember_each_process_tests():
    RECORD.file.parent.parent.mkdir(parents=True)
    RECORD.file.parent.write_text("a file, no folder")
    for wrong in ("", "wrong"):
        assert found_once(RECORD, lambda wrong=wrong: wrong) == wrong
