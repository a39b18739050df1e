"""Prompt lists: the shipped ones by name, the user's own by path."""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError

FOLDER = Path(__file__).parent
# Each model has a list to calibrate with and one, disjoint from it, to judge with.
LISTS = ("nano", "nano_evaluation", "sd3", "sd3_evaluation")


def load_prompts(source: str | Path) -> list[str]:
    """The prompts of a shipped list or of a UTF-8 file, one a line; blank lines do not count."""
    path = FOLDER / f"{source}.txt" if source in LISTS else Path(source)
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"prompt file {path} does not exist; give a text file with one prompt a line, "
            f"or one of: {', '.join(LISTS)}"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"prompt file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one a line")
    return prompts
