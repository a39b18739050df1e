// Layer norm, its modulation, and codes in tiles: one warp a row, which is read once and kept.

namespace ditq {

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// HELD chunks a lane of a row that lies anywhere, or WHOLE: side by side, aligned, ending with a
// chunk. EARLY are the chunks that are fetched by `load`, before they are wanted; others by `give`.
template <bool WHOLE, int EARLY, class T>
struct Line {
  const T* first;
  long long apart;
  int columns;
  Words<T> words[EARLY ? EARLY : 1];

  __device__ __forceinline__ void load() {
    if constexpr (WHOLE) {
#pragma unroll
      for (int h = 0; h < EARLY; h++) words[h] = whole_chunk(first, place(h), columns);
    }
  }

  __device__ __forceinline__ void give(float (&v)[CHUNK], int h) const {
    if constexpr (WHOLE) {
      spread(v, EARLY ? words[h] : whole_chunk(first, place(h), columns));
    } else {
      load_chunk(v, Strided<T>{first, apart}, place(h), columns);
    }
  }

  static __device__ __forceinline__ int place(int h) {
    return (threadIdx.x % 32 + 32 * h) * CHUNK;
  }
};

// Each row less its mean, over its standard deviation, times 1 + gain, plus offset; this then as
// `quantize_rows` does it. All in float32. HELD chunks a lane are the whole row.
template <bool WHOLE, int HELD, bool TOKEN, bool SHIFT, bool SMOOTH, class T>
__device__ __forceinline__ void normalize_rows(
    const Lines<T>& x, const Lines<T>& gains, const Lines<T>& offsets, const float* given,
    const float* limits, const float* shifts, const float* smoothing, signed char* codes,
    float* scales, int rows, int columns, int entries, int shift_entries, float epsilon) {
  const float infinity = __int_as_float(0x7f800000);
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / 32;
  const int depth_pieces = (columns + PIECE - 1) / PIECE, chunks = depth_pieces * (PIECE / CHUNK);
  if (row >= rows) {
    write_zeros(codes, scales, row, depth_pieces);
    return;
  }
  // Two vectors in registers beside the row, while there is room for two blocks a multiprocessor.
  constexpr int EARLY = WHOLE && !SHIFT && HELD * sizeof(T) <= 6 ? HELD : 0;
  Line<WHOLE, WHOLE ? HELD : 0, T> line = {x.at(row), x.column, columns};
  Line<WHOLE, EARLY, T> gain = {gains.at(row), gains.column, columns};
  Line<WHOLE, EARLY, T> offset = {offsets.at(row), offsets.column, columns};
  line.load(), gain.load(), offset.load();
  const int entry = entry_of(row, entries, rows);
  const float* shift = shifts + (shift_entries > 1 ? size_t(entry) * columns : 0);
  Grid grid;
  grid.scale = given[entry], grid.limit = limits[entry];
  float v[HELD][CHUNK], more[CHUNK];
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    line.give(v[h], h); // beyond the row: zeros
#pragma unroll
    for (int i = 0; i < CHUNK; i++) sum += v[h][i];
  }
  const float mean = sum_of_warp(sum) / columns;
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const int left = columns - (lane + 32 * h) * CHUNK;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      v[h][i] = (WHOLE ? 0 : i) < left ? v[h][i] - mean : 0.0f;
      squares = fmaf(v[h][i], v[h][i], squares);
    }
  }
  const float inverse = rsqrtf(sum_of_warp(squares) / columns + epsilon);
  float largest = 0.0f;
  bool broken = false;
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const int first = (lane + 32 * h) * CHUNK;
    gain.give(more, h);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[h][i] = v[h][i] * inverse * (1.0f + more[i]);
    offset.give(more, h);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[h][i] = __fadd_rn(v[h][i], more[i]); // never fused
    if constexpr (SHIFT) {
      load_chunk(more, shift, first, columns);
#pragma unroll
      for (int i = 0; i < CHUNK; i++) v[h][i] -= more[i];
    }
    if constexpr (TOKEN && SMOOTH) load_chunk(more, smoothing, first, columns, 1.0f);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      if (!TOKEN) {
        broken |= v[h][i] != v[h][i];
      } else {
        const float size = fabsf(SMOOTH ? __fdiv_rn(v[h][i], more[i]) : v[h][i]);
        broken |= !(size < infinity);
        largest = fmaxf(largest, size);
      }
    }
  }
  if (TOKEN) grid.scale = scale_of_token(largest_of_warp(largest), grid.limit);
  grid.inverse = __frcp_rn(grid.scale);
  broken |= !(grid.inverse < infinity); // of a scale too small to divide by
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const int c = lane + 32 * h;
    if constexpr (SMOOTH) load_chunk(more, smoothing, c * CHUNK, columns, 1.0f);
    if (c < chunks)
      *reinterpret_cast<uint4*>(codes + chunk_place(row, c, depth_pieces)) =
          codes_of<SMOOTH>(v[h], more, grid);
  }
  broken = __any_sync(~0u, broken);
  if (lane == 0) scales[row] = broken ? __int_as_float(0x7fc00000) : grid.scale;
}

} // namespace ditq
