"""How products are timed, and cuBLAS's fp16 products through PyTorch: a process without MLX.

    echo "8192 1536 6144" | python -m tools.torch_products

answers each line of rows, outputs and columns with seconds a product under both protocols.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SETS = 3  # of operands, taken in turn, so that none is in the cache when its turn comes
HOT_SECONDS, BURST_SECONDS, REST_SECONDS, BURSTS = 0.4, 2e-3, 20e-3, 15
BATCH = 20  # products queued at once: their outputs are held until they are done
PRIMER_BYTES = 2**31  # read and written once: about a millisecond, without much power
PRIMERS = 4  # so that all of a burst is queued when the first of it begins
PROTOCOLS = (
    f"Hot: back to back for {HOT_SECONDS} s, of which the second half counts. Cool: bursts of "
    f"{1e3 * BURST_SECONDS:.0f} ms after {1e3 * REST_SECONDS:.0f} ms of rest and {PRIMERS} copies "
    "of 2 GiB, during which they are queued, less what the copies took by themselves just before; "
    f"median of {BURSTS}. Wall clock."
)

Call = Callable[[int], Any]


class Clock:
    """Seconds a call under both protocols: `queue` starts a list of prepared work."""

    def __init__(
        self, queue: Callable[[list[Any]], None], wait: Callable[[], None], primer: Call
    ) -> None:
        self.queue, self.wait, self.primer = queue, wait, primer

    def seconds(self, call: Call) -> dict[str, float]:
        self.timed([[call(i) for i in range(SETS)]])  # compiles
        rough = min(self.timed([[call(i) for i in range(BATCH)]]) for _ in range(3)) / BATCH
        return {"hot": self.hot(call, rough), "cool": self.cool(call, rough)}

    def timed(self, batches: list[list[Any]]) -> float:
        begun = time.perf_counter()
        for i in range(len(batches)):
            self.queue(batches[i])
            batches[i] = []  # released as soon as they are computed
        self.wait()
        return time.perf_counter() - begun

    def hot(self, call: Call, rough: float) -> float:
        count = max(2, int(HOT_SECONDS / 2 / rough / BATCH))
        halves = [[[call(i) for i in range(BATCH)] for _ in range(count)] for _ in range(2)]
        return [self.timed(half) for half in halves][1] / (count * BATCH)

    def cool(self, call: Call, rough: float) -> float:
        count = max(1, round(BURST_SECONDS / rough))
        found = []
        for _ in range(BURSTS):
            alone = self.rested([])
            found.append(self.rested([call(i) for i in range(count)]) - alone)
        return float(np.median(found)) / count

    def rested(self, burst: list[Any]) -> float:
        batches = [[self.primer(i) for i in range(PRIMERS)], burst]
        time.sleep(REST_SECONDS)
        return self.timed(batches)


def run(calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def main() -> None:
    """The faster of mm and linear with a bias."""
    import torch

    large = torch.zeros(PRIMER_BYTES // 4, device="cuda")
    clock = Clock(run, torch.cuda.synchronize, lambda i: lambda: large + 1)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        rows, outputs, columns = map(int, line.split())
        half = {"dtype": torch.float16, "device": "cuda"}
        x = [torch.randn(rows, columns, **half) for _ in range(SETS)]
        w = [torch.randn(outputs, columns, **half) * 0.02 for _ in range(SETS)]
        bias, y = torch.randn(outputs, **half), torch.empty(rows, outputs, **half)

        def mm(i: int, x=x, w=w, y=y) -> Callable[[], Any]:
            return lambda: torch.mm(x[i % SETS], w[i % SETS].T, out=y)

        def linear(i: int, x=x, w=w, bias=bias) -> Callable[[], Any]:
            return lambda: torch.nn.functional.linear(x[i % SETS], w[i % SETS], bias)

        found = [clock.seconds(way) for way in (mm, linear)]
        print(json.dumps({p: min(f[p] for f in found) for p in found[0]}), flush=True)


if __name__ == "__main__":
    main()
