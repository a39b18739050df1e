"""A sheet of pictures, each with its caption beneath."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..store import atomic_write

MARGIN = 8  # pixels around each picture
FONT_SIZE = 13
LINE_HEIGHT = 16


def contact_sheet(
    pictures: np.ndarray, path: Path, captions: Sequence[str] = (), columns: int = 8, scale: int = 2
) -> None:
    """Writes a PNG of 8-bit pictures (n, height, width, 3) in rows, `scale` times as large."""
    height, width = (scale * side for side in pictures.shape[1:3])
    font = ImageFont.load_default(size=FONT_SIZE)
    letters = max(1, int(width / font.getlength("n")) + 2)
    texts = ["\n".join(textwrap.wrap(caption, letters)) for caption in captions]
    lines = max((text.count("\n") + 1 for text in texts), default=0)
    step_x, step_y = width + MARGIN, height + MARGIN + LINE_HEIGHT * lines
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * step_x, MARGIN + rows * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        left, top = MARGIN + index % columns * step_x, MARGIN + index // columns * step_y
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.LANCZOS), (left, top))
        if index < len(texts):
            draw.multiline_text((left, top + height), texts[index], "black", font, spacing=2)
    with atomic_write(path) as file:
        sheet.save(file, "PNG")
