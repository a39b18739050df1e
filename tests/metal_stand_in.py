"""A stand-in for an Apple GPU: kernels as MLX puts them together, compiled for the CPU.

MLX writes a kernel's whole source while it exports a function, also where it cannot run it. What
the source asks of Metal is in metal_stand_in.h.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

HEADER = Path(__file__).with_name("metal_stand_in.h")
COMPILER = shutil.which("g++")
INCLUDED = "MetalPerformancePrimitives/MetalPerformancePrimitives.h"
# Floats as written: nothing put together that Metal's safe mode would not.
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w")
ATTRIBUTES = {
    "thread_position_in_grid": "at",
    "threadgroup_position_in_grid": "group_at",
    "thread_index_in_simdgroup": "lane",
}
INSTANCE = re.compile(r'\ntemplate \[\[host_name\(".*"\)\]\] \[\[kernel\]\] decltype\((.*)\) .*;')
PARAMETER = re.compile(
    r"const (?:device|constant) (\w+)([*&]) (\w+) \[\[buffer|device (\w+)\* (\w+) \[\[buffer"
)


class StandIn:
    """Takes the place of `mx.fast.metal_kernel`; `seed` draws which thread holds which sum."""

    def __init__(self, folder: Path, seed: int = 5) -> None:
        self.folder, self.seed, self.launched = folder, seed, []
        self.make = mx.fast.metal_kernel
        (folder / INCLUDED).parent.mkdir(parents=True, exist_ok=True)
        (folder / INCLUDED).write_text("")

    def __call__(self, **kernel: Any) -> Any:
        made = self.make(**kernel)

        def run(*, inputs: list[mx.array], **start: Any) -> list[mx.array]:
            self.launched.append(kernel["name"])
            source = self.written(made, inputs, start)
            library = self.compiled(program(source))
            return launched(library, source, inputs, start)

        return run

    def written(self, made: Any, inputs: list[mx.array], start: dict[str, Any]) -> str:
        """The source that MLX would give Metal."""

        def traced(*arrays: mx.array) -> Any:
            return made(inputs=list(arrays), verbose=True, **start)

        with tempfile.TemporaryFile() as printed:
            kept = os.dup(1)
            os.dup2(printed.fileno(), 1)
            try:
                mx.export_function(str(self.folder / "kernel.mlxfn"), traced, *inputs)
            finally:
                os.dup2(kept, 1)
                os.close(kept)
            printed.seek(0)
            return printed.read().decode().split("```")[1]

    def compiled(self, text: str) -> ctypes.CDLL:
        text = f"#define STAND_IN_SEED {self.seed}\n" + text
        name = hashlib.sha256((text + HEADER.read_text()).encode()).hexdigest()[:16]
        library, source = self.folder / f"{name}.so", self.folder / f"{name}.cpp"
        if not library.exists():
            source.write_text(text)
            command = [COMPILER, *FLAGS, f"-I{self.folder}", str(source), "-o", str(library)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"[metal::Device] Unable to build metal library\n{done.stderr}")
        return ctypes.CDLL(str(library))


def program(source: str) -> str:
    """The kernel and a function that runs every thread of it."""
    instance = INSTANCE.search(source)[1]
    arguments = []
    for i, (kind, reference, _) in enumerate(parameters(source)):
        arguments.append(f"{'*' if reference == '&' else ''}({kind}*)buffers[{i}]")
    signature = source[source.index("[[kernel]]") :]
    names = re.findall(r"\[\[(\w+)\]\][,)]", signature[: signature.index(") {\n") + 1])
    arguments += [ATTRIBUTES[name] for name in names if name in ATTRIBUTES]
    return f"""#include "{HEADER}"
{INSTANCE.sub("", source)}
extern "C" void run(void** buffers, const uint* grid, const uint* group) {{
  stand_in::each_thread(grid, group, [=](uint3 at, uint3 group_at, uint lane) {{
    {instance}({", ".join(arguments)});
  }});
}}
"""


def parameters(source: str) -> list[tuple[str, str, str]]:
    """Type, * or &, and name of every buffer."""
    found = PARAMETER.findall(source)
    return [(kind or out, how or "*", name or out_name) for kind, how, name, out, out_name in found]


def launched(
    library: ctypes.CDLL, source: str, inputs: list[mx.array], start: dict[str, Any]
) -> list[mx.array]:
    """Runs it; what no thread writes stays 0x7f, or NaN's like."""
    arrays = [np.ascontiguousarray(as_numpy(x)) for x in inputs]
    made = [
        np.full(np.prod(shape, dtype=int) * dtype.size, 0x7F, np.uint8)
        for shape, dtype in zip(start["output_shapes"], start["output_dtypes"], strict=True)
    ]
    buffers, last = [], -1
    for _, _, name in parameters(source)[: -len(made)]:
        if name.endswith("_shape"):
            buffers.append(np.array(arrays[last].shape, np.int32))
        else:
            last += 1
            buffers.append(arrays[last])
    pointers = (ctypes.c_void_p * (len(buffers) + len(made)))(
        *[b.ctypes.data for b in (*buffers, *made)]
    )
    sizes = [(ctypes.c_uint * 3)(*start[key]) for key in ("grid", "threadgroup")]
    library.run(pointers, *sizes)
    return [
        as_mlx(out, shape, dtype)
        for out, shape, dtype in zip(
            made, start["output_shapes"], start["output_dtypes"], strict=True
        )
    ]


def as_numpy(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint16)) if x.dtype == mx.bfloat16 else np.array(x)


def as_mlx(data: np.ndarray, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(data).view(dtype).reshape(shape)
