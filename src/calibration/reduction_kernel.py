"""The reductions of one input as CUDA kernels: it is read once, however many statistics there are.

Beside a forward pass of SD3's size MLX's own reductions, one launch or two a statistic, cost as
much as the pass itself. The same numbers come out: extremes and counts exactly, sums to float
rounding, in an order that depends on the shape alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import mlx.core as mx

from . import histogram

CHUNKS = 16  # parts of the tokens that blocks reduce side by side
LANES = 8  # parts of a chunk that threads of one block reduce side by side
THREADS = 128
COUNTS_PER_THREAD = 8
WIDTH = 4  # neighbouring channels of one thread, read at once

# Each thread follows some channels through every LANES-th token of a chunk; then a block joins its
# lanes in shared memory. Rows are (half, sample).
PARTS = """
  struct alignas(WIDTH * sizeof(T)) Values { T at[WIDTH]; };
  __shared__ float lanes[4][LANES][32 * WIDTH + 1];
  const int samples = sizes[0], chunk = blockIdx.y, sample = blockIdx.z;
  const int rows = x_shape[0], tokens = x_shape[1], channels = x_shape[2];
  const int first = blockIdx.x * 32 * WIDTH, own = threadIdx.x * WIDTH;
  float least[WIDTH], most[WIDTH], sum[WIDTH], square[WIDTH];
  for (int i = 0; i < WIDTH; i++) {
    least[i] = INFINITE, most[i] = -INFINITE, sum[i] = 0.0f, square[i] = 0.0f;
  }
  for (int row = sample; row < rows && first + own < channels; row += samples) {
    const T* from = x + size_t(row) * tokens * channels + first + own;
#pragma unroll 4
    for (int token = chunk * LANES + threadIdx.y; token < tokens; token += CHUNKS * LANES) {
      const Values values = *reinterpret_cast<const Values*>(from + size_t(token) * channels);
      for (int i = 0; i < WIDTH; i++) {
        const float value = float(values.at[i]);
        least[i] = fminf(least[i], value);
        most[i] = fmaxf(most[i], value);
        sum[i] += value;
        square[i] += value * value;
      }
    }
  }
  for (int i = 0; i < WIDTH; i++) {
    lanes[0][threadIdx.y][own + i] = least[i];
    lanes[1][threadIdx.y][own + i] = most[i];
    lanes[2][threadIdx.y][own + i] = sum[i];
    lanes[3][threadIdx.y][own + i] = square[i];
  }
  __syncthreads();
  const int moment = threadIdx.y & 3;  // LANES is a multiple of 4, and each warp joins one of them
  for (int i = threadIdx.x + (threadIdx.y >> 2) * 32; i < 32 * WIDTH; i += (LANES / 4) * 32) {
    if (first + i >= channels) break;
    float joined = lanes[moment][0][i];
    for (int lane = 1; lane < LANES; lane++) {
      const float other = lanes[moment][lane][i];
      joined = moment == 0   ? fminf(joined, other)
               : moment == 1 ? fmaxf(joined, other)
                             : joined + other;
    }
    parts[((size_t(moment) * samples + sample) * CHUNKS + chunk) * channels + first + i] = joined;
  }
"""

JOINED = """
  const int samples = parts_shape[1], channels = parts_shape[3], sample = blockIdx.y;
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  const size_t stride = size_t(samples) * CHUNKS * channels;
  const float* from = parts + size_t(sample) * CHUNKS * channels + channel;
  float least = INFINITE, most = -INFINITE, sum = 0.0f, square = 0.0f;
  for (int chunk = 0; chunk < CHUNKS; chunk++, from += channels) {
    least = fminf(least, from[0]);
    most = fmaxf(most, from[stride]);
    sum += from[2 * stride];
    square += from[3 * stride];
  }
  const float count = sizes[1];
  const size_t all = size_t(samples) * channels;
  float* place = moments + size_t(sample) * channels + channel;
  place[0] = least;
  place[all] = most;
  place[2 * all] = sum / count;
  place[3 * all] = square / count;
"""

# Each block counts in shared memory first: few bins hold nearly all values.
COUNTED = """
  __shared__ int bins[(CENTRED ? 2 : 1) * BINS];
  const int samples = sizes[0], stride = sizes[2], sample = blockIdx.y;
  const int tokens = x_shape[1], channels = x_shape[2], halves = x_shape[0] / samples;
  for (int i = threadIdx.x; i < (CENTRED ? 2 : 1) * BINS; i += blockDim.x) bins[i] = 0;
  __syncthreads();
  const int values = tokens * channels, counted = (values + stride - 1) / stride;
  const int first = blockIdx.x * blockDim.x * PER_THREAD + threadIdx.x;
  for (int i = 0; i < PER_THREAD; i++) {
    const int number = first + i * blockDim.x;
    if (number >= halves * counted) break;
    const int half = number / counted, place = (number - half * counted) * stride;
    const float value = float(x[(size_t(half) * samples + sample) * values + place]);
    atomicAdd(&bins[bin_of(value)], 1);
    if (CENTRED) {
      const int channel = place % channels;
      const float* least = moments + size_t(sample) * channels + channel;
      const float most = least[size_t(samples) * channels];
      atomicAdd(&bins[BINS + bin_of(value - 0.5f * (*least + most))], 1);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (CENTRED ? 2 : 1) * BINS; i += blockDim.x) {
    if (bins[i] == 0) continue;
    const int which = i / BINS;
    atomicAdd(&counts[(which * samples + sample) * BINS + i - which * BINS], bins[i]);
  }
"""

HEADER = f"""
#define INFINITE __int_as_float(0x7f800000)

__device__ inline int bin_of(float value) {{
  const int code = int(__float_as_uint(fabsf(value)) >> {histogram.DROPPED_BITS});
  return min(max(code - {histogram.FIRST_CODE}, 0), {histogram.BINS - 1});
}}
"""


@lru_cache
def kernel(name: str, inputs: tuple[str, ...], output: str, source: str) -> Callable:
    return mx.fast.cuda_kernel(
        name=f"ditq_{name}",
        input_names=list(inputs),
        output_names=[output],
        source=source,
        header=HEADER,
    )


@lru_cache
def on_device(*values: int) -> mx.array:
    """Made once: every new array waits for its way there."""
    return mx.array(values, dtype=mx.int32)


def padded(threads: int) -> int:
    """Whole blocks of them."""
    return -(-threads // THREADS) * THREADS


def reduce_on_cuda(x: mx.array, samples: int, centred: bool) -> tuple[mx.array, mx.array]:
    """What `reductions.reduce_input` gives, of a (rows, …, channels) input."""
    rows, channels = len(x), x.shape[-1]
    x = x.reshape(rows, -1, channels)
    halves, tokens = rows // samples, x.shape[1]
    width = WIDTH if channels % WIDTH == 0 else 1
    stride = histogram.counting_stride(halves * tokens * channels, channels)
    sizes = on_device(samples, halves * tokens, stride)
    (parts,) = kernel("parts", ("x", "sizes"), "parts", PARTS)(
        inputs=[x, sizes],
        template=[("T", x.dtype), ("CHUNKS", CHUNKS), ("LANES", LANES), ("WIDTH", width)],
        grid=(-(-channels // (32 * width)) * 32, CHUNKS * LANES, samples),
        threadgroup=(32, LANES, 1),
        output_shapes=[(4, samples, CHUNKS, channels)],
        output_dtypes=[mx.float32],
    )
    (moments,) = kernel("joined", ("parts", "sizes"), "moments", JOINED)(
        inputs=[parts, sizes],
        template=[("CHUNKS", CHUNKS)],
        grid=(padded(channels), samples, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(4, samples, channels)],
        output_dtypes=[mx.float32],
    )
    counted = halves * -(-tokens * channels // stride)
    (counts,) = kernel("counted", ("x", "moments", "sizes"), "counts", COUNTED)(
        inputs=[x, moments, sizes],
        template=[
            ("T", x.dtype),
            ("CENTRED", centred),
            ("BINS", histogram.BINS),
            ("PER_THREAD", COUNTS_PER_THREAD),
        ],
        grid=(padded(-(-counted // COUNTS_PER_THREAD)), samples, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(1 + centred, samples, histogram.BINS)],
        output_dtypes=[mx.int32],
        init_value=0,
    )
    return moments, counts
