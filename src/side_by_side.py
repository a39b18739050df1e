"""Commands of this package run side by side, with what they say on one screen."""

from __future__ import annotations

import codecs
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import click

from .errors import UserError

BAR = re.compile(r"^(?P<what>[^:|]+):\s+\d+%\|.*\|\s*(?P<count>\d+/\d+)")  # as tqdm draws it
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
SECONDS_SCREEN, SECONDS_FILE = 0.1, 10.0  # between two lines of progress


@dataclass(frozen=True)
class Track:
    """Commands that follow each other: modules of this package with their arguments."""

    name: str
    commands: Sequence[Sequence[str]]


def run_side_by_side(tracks: Sequence[Track]) -> None:
    """Runs all tracks at once; the first error of one, or Ctrl-C, ends them all."""
    board, running = Board([track.name for track in tracks]), Running()
    environment = shared_environment(len(tracks))
    with ThreadPoolExecutor(len(tracks)) as pool:
        futures = [pool.submit(run_track, t, board, running, environment) for t in tracks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            board.close()
            running.stop()
            raise
    board.close()


def shared_environment(processes: int) -> dict[str, str]:
    """The environment of one of so many processes: its share of the cores, unless already set."""
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    # The package lies beside the working directory's own modules wherever the user stands.
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **dict.fromkeys(THREADS, threads),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }


@dataclass
class Running:
    """The processes that are at work."""

    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    stopped: bool = False
    lock: Lock = field(default_factory=Lock)

    def start(self, name: str, arguments: list[str], environment: dict) -> subprocess.Popen | None:
        """The track's next process; none once all are to stop."""
        with self.lock:
            if self.stopped:
                return None
            self.processes[name] = subprocess.Popen(
                arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            return self.processes[name]

    def stop(self) -> None:
        """Ends all processes: what they have finished is kept, wherever they are."""
        with self.lock:
            self.stopped = True
            for process in self.processes.values():
                process.terminate()


class Board:
    """Whole lines, each with its track's name, and below them one line of all tracks' bars."""

    def __init__(self, names: Sequence[str]) -> None:
        self._bars = dict.fromkeys(names, "")
        self._width = max(map(len, names))
        self._screen = sys.stderr.isatty()
        self._shown = time.monotonic()
        self._open = True
        self._lock = Lock()

    def line(self, name: str, text: str) -> None:
        with self._lock:
            if self._open:
                self._clear()
                click.echo(f"{name:<{self._width}} | {text}")

    def bar(self, name: str, text: str) -> None:
        """Keeps the bar and, where it is time, shows all of them."""
        with self._lock:
            self._bars[name] = text
            since, pause = time.monotonic() - self._shown, self._pause()
            if not self._open or since < pause:
                return
            self._clear()
            status = "   ".join(f"{name}: {bar}" for name, bar in self._bars.items() if bar)
            click.echo(status, err=True, nl=not self._screen)
            self._shown = time.monotonic()

    def close(self) -> None:
        """Nothing more is shown."""
        with self._lock:
            self._clear()
            self._open = False

    def _pause(self) -> float:
        return SECONDS_SCREEN if self._screen else SECONDS_FILE

    def _clear(self) -> None:
        if self._screen:
            click.echo("\r\x1b[K", err=True, nl=False)


def run_track(track: Track, board: Board, running: Running, environment: dict) -> None:
    """One command after the other; the first that fails is the track's error."""
    for module, *arguments in track.commands:
        command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
        process = running.start(track.name, command, environment)
        if process is None:
            return
        error = follow(track.name, process, board)
        if process.wait() != 0:
            reason = error or f"{module} ended with exit code {process.returncode}"
            raise UserError(f"{track.name}: {reason}")
    board.bar(track.name, "done")


def follow(name: str, process: subprocess.Popen, board: Board) -> str | None:
    """Shows what the process says until it ends; the error that it ended with, if it named one."""
    error = None
    for text, whole in segments(process):
        if found := BAR.match(text):
            board.bar(name, f"{found['what']} {found['count']}")
        elif whole and text.startswith("error: "):
            error = text.removeprefix("error: ")
        elif whole and text.strip():
            board.line(name, text.rstrip())
    return error


def segments(process: subprocess.Popen) -> Iterator[tuple[str, bool]]:
    """What the process writes, cut at ends of lines and at returns to their start; the flag says
    whether the end has come yet."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    with process.stdout as pipe:
        while part := os.read(pipe.fileno(), 1 << 16):
            *whole, rest = re.split(r"[\r\n]", rest + decoder.decode(part))
            yield from ((text, True) for text in whole)
            yield rest, False
    yield rest, True
