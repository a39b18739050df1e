"""Which versions of DiffusionKit and MLX this project knows how to work with."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

from ..errors import UserError

PACKAGES = ("diffusionkit", "transformers", "sentencepiece")
SUPPORTED = ("0.5.1", "0.5.2")  # of DiffusionKit; the same code
OLDEST_MLX = (0, 32)
INSTALL = "pip install 'ditq[sd3]'"


def check_packages() -> None:
    """Raises unless all that Stable Diffusion 3 needs is installed, in versions that are known."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} is not installed; install with: {INSTALL}")
    found = importlib.metadata.version("diffusionkit")
    if found not in SUPPORTED:
        raise UserError(
            f"DiffusionKit {found} is not supported; valid: {' and '.join(SUPPORTED)}; install "
            f"with: {INSTALL}"
        )
    found = importlib.metadata.version("mlx")
    if version_numbers(found) < OLDEST_MLX:
        oldest = ".".join(map(str, OLDEST_MLX))
        raise UserError(
            f"MLX {found} is not supported; valid: {oldest} and newer; install with: "
            f"pip install --upgrade 'mlx>={oldest}'"
        )


def version_numbers(version: str) -> tuple[int, ...]:
    """(0, 32) of 0.32.4."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
