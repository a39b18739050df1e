"""`ditq demo` and the sheet of pictures that it ends with."""

from __future__ import annotations

from src.demo import demo
from src.report.sheet import contact_sheet

import numpy as np
import pytest
from PIL import Image

from .helpers import run


@pytest.mark.slow
def test_demo_ends_with_a_sheet_and_goes_on_where_it_was(tmp_path):
    result = run("src.demo", "--num-images", "2", "--num-steps", "3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    sheet = tmp_path / "demo" / "pictures.png"
    assert "demo/pictures.png" in result.stdout.splitlines()[-1]
    first = sheet.read_bytes()
    assert demo(tmp_path / "demo", num_images=2, num_steps=3) == sheet
    assert sheet.read_bytes() == first


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
