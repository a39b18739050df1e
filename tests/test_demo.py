"""`ditq demo`: all stages to the report, both tracks side by side; and the sheet of pictures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from src.demo import demo
from src.errors import UserError
from src.report.sheet import contact_sheet
from src.side_by_side import Board, Track, follow, run_side_by_side

import numpy as np
import pytest
from PIL import Image

from .helpers import ROOT, assert_one_error_line, run

SMALL = ("--model", "tiny", "--num-images", "2", "--num-steps", "4", "--prompts", "2")
# What a second run finds there and leaves as it is.
FINISHED = (
    "calibration_data/samples",
    "calibration_data/adaround_cache/samples",
    "adaround_output/weights",
)


@pytest.mark.slow
def test_demo_ends_with_the_report_and_goes_on_where_it_was(tmp_path):
    result = run("src.demo", *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    page = tmp_path / "demo" / "report" / "report.html"
    assert str(page.relative_to(tmp_path)) in result.stdout.splitlines()[-1]
    text = page.read_text()
    for part in ("pictures", "ladder", "tiers", "errors", "costs", "settings"):
        assert f'<section id="{part}">' in text
    for name in ("weights", "activations"):
        assert any(line.startswith(f"{name} ") for line in result.stdout.splitlines())
    finished = [tmp_path / "demo" / folder for folder in FINISHED]
    files = [path for folder in finished for path in sorted(folder.glob("*.npz"))]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = demo(tmp_path / "demo", model="tiny", num_images=2, num_steps=4, prompts=2)
    assert again == page and len(files) == 2 * 4 + 2 * 4 + 2
    assert {path: path.stat().st_mtime_ns for path in files} == before


@pytest.mark.slow
def test_ctrl_c_during_the_tracks_leaves_nothing_behind_and_is_gone_on_from(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "src.demo", *SMALL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What was started in a shell's background is deaf to Ctrl-C, and so are its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if "|" in line:  # a track has said something
            break
    process.send_signal(signal.SIGINT)  # to the demo alone: its tracks hear of it from there
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; what is finished is kept" in errors.splitlines()[-1]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of its session is left
    result = run("src.demo", *SMALL, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_an_error_of_one_track_ends_both_with_its_line(tmp_path):
    endless = ["generate_calibration_data", "--model", "tiny", "--num-images", "5000"]
    tracks = [
        Track("long", [[*endless, "--calib-dir", str(tmp_path / "long")]]),
        Track("broken", [["cache_adaround_data", "--calib-dir", str(tmp_path / "nowhere")]]),
    ]
    with pytest.raises(UserError, match=r"^broken: .*nowhere") as raised:
        run_side_by_side(tracks)
    assert "error:" not in str(raised.value)
    assert not (tmp_path / "long" / "manifest.json").exists()


@pytest.mark.slow
def test_commands_of_a_track_follow_each_other_until_one_fails(tmp_path, capfd):
    fails = ["generate", "--output", str(tmp_path / "x.jpg"), "--prompt", "a"]
    last = ["generate", "--model", "tiny", "--output", str(tmp_path / "y.png"), "--prompt", "a"]
    with pytest.raises(UserError, match=r"^one: output .*x\.jpg must end in \.png"):
        run_side_by_side([Track("one", [["doctor"], fails, last])])
    assert "one | mlx " in capfd.readouterr().out and not (tmp_path / "y.png").exists()


@pytest.mark.slow
def test_impossible_settings_are_refused_before_any_work(tmp_path):
    result = run("src.demo", "--prompts", "0", cwd=tmp_path)
    assert_one_error_line(result, "--prompts", "0", "576")
    assert not (tmp_path / "demo").exists()


def spoken(program: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


class Screen(Board):
    """A terminal, whatever the test runs in, that shows every change of a bar."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(names)
        self._screen = True

    def _pause(self) -> float:
        return 0.0


def test_bars_of_all_tracks_share_one_line_and_errors_are_kept_for_the_end(capfd):
    program = (
        "import sys; from tqdm import tqdm\n"
        "print('four things to do: é', flush=True)\n"
        "[None for _ in tqdm(range(4), desc='rounding', unit='block', mininterval=0)]\n"
        "print('error: it is broken: badly', file=sys.stderr, flush=True)"
    )
    board = Screen(["one", "other"])
    board.bar("other", "counting 7/9")
    process = spoken(program)
    assert follow("one", process, board) == "it is broken: badly"
    process.wait()
    board.close()
    board.line("one", "too late")
    out, shown = capfd.readouterr()
    assert out == "one   | four things to do: é\n"
    assert "one: rounding 4/4   other: counting 7/9" in shown
    assert "it/s" not in shown and "broken" not in shown and "\n" not in shown


def test_without_a_terminal_progress_is_whole_lines_now_and_then(capfd):
    board = Board(["one"])
    for count in range(5):
        board.bar("one", f"rounding {count}/5")
    board.close()
    assert capfd.readouterr().err == ""  # so soon after the start
    board = Board(["one"])
    board._shown -= 60
    board.bar("one", "rounding 3/5")
    assert capfd.readouterr().err == "one: rounding 3/5\n"


def test_sheet_holds_every_picture_and_its_caption(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    words = ["a caption that is far too long for one line of this small picture", *"bcde"]
    contact_sheet(pictures, tmp_path / "bare.png", columns=3, scale=2)
    contact_sheet(pictures, tmp_path / "sheet.png", words, columns=3, scale=2)
    bare, sheet = (np.asarray(Image.open(tmp_path / f"{n}.png")) for n in ("bare", "sheet"))
    assert bare.shape[1] == sheet.shape[1] and sheet.shape[0] > bare.shape[0] + 2 * 16
    enlarged = np.asarray(Image.fromarray(pictures[4]).resize((32, 32), Image.LANCZOS))
    found = [
        (y, x)
        for y in range(sheet.shape[0] - 32)
        for x in (8, 48, 88)
        if np.array_equal(sheet[y : y + 32, x : x + 32], enlarged)
    ]
    assert len(found) == 1
    beneath = sheet[found[0][0] + 32 : found[0][0] + 48, 48:80]
    assert (beneath < 128).any()  # its caption in black
