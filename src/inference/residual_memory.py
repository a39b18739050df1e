"""Whether memory is large enough, before it is taken."""

from __future__ import annotations

from ..cli import memory_bytes
from ..errors import UserError
from ..models.mmdit import MMDiT
from ..store import human_bytes


def require_memory(needed: float, why: str, ways_out: str) -> None:
    """Raises where the device, or the machine, has fewer bytes than are needed."""
    if needed > (there := memory_bytes()):
        raise UserError(f"{why}, this machine has {human_bytes(there)}; {ways_out}")


def held_bytes(model: MMDiT) -> int:
    """Of every array that the model holds, also of what backends have unpacked."""
    arrays = {id(array): array.nbytes for array in model.arrays(vectors_are_given=False)}
    return sum(arrays.values())
