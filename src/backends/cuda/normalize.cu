// Layer norm, its modulation, and codes in tiles: one warp a row, which is read once and kept.

namespace ditq {

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

template <class T>
__device__ __forceinline__ void load_line(
    float (&v)[CHUNK], const Lines<T>& lines, int row, int first, int columns) {
  const T* line = lines.at(row);
  if (lines.column == 1) {
    load_chunk(v, line, first, columns);
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
      v[i] = first + i < columns ? float(line[(first + i) * lines.column]) : 0.0f;
  }
}

// Each row less its mean, over its standard deviation, times 1 + gain, plus offset; this then as
// `quantize_rows` does it. All in float32. HELD chunks a lane are the whole row.
template <int HELD, bool TOKEN, bool SHIFT, bool SMOOTH, class T>
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
  float v[HELD][CHUNK], more[CHUNK];
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    load_line(v[h], x, row, (lane + 32 * h) * CHUNK, columns); // beyond the row: zeros
#pragma unroll
    for (int i = 0; i < CHUNK; i++) sum += v[h][i];
  }
  const float mean = sum_of_warp(sum) / columns;
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const int left = columns - (lane + 32 * h) * CHUNK;
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      v[h][i] = i < left ? v[h][i] - mean : 0.0f;
      squares = fmaf(v[h][i], v[h][i], squares);
    }
  }
  const float inverse = rsqrtf(sum_of_warp(squares) / columns + epsilon);
  const int entry = int((long long)(row) * entries / rows);
  const float* shift = shifts + (shift_entries > 1 ? size_t(entry) * columns : 0);
  Grid grid;
  grid.scale = given[entry], grid.limit = limits[entry];
  float largest = 0.0f;
  bool broken = false;
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const int first = (lane + 32 * h) * CHUNK;
    load_line(more, gains, row, first, columns);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[h][i] = v[h][i] * inverse * (1.0f + more[i]);
    load_line(more, offsets, row, first, columns);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[h][i] += more[i];
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
