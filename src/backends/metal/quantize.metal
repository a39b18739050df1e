// Rows of numbers to codes, one simdgroup a row: clip(round((x - shift) / smoothing / scale)).
//
// Entry e of `given` scales, `limits` and `shifts` (1 or entries, columns) holds for rows / entries
// rows. TOKEN: the scale is the row's own largest value over the limit instead. A row with a NaN in
// it (TOKEN: or infinity) gets the scale NaN; codes of rows beyond the last are zeros.

const int rows = x_shape[0], columns = x_shape[1], entries = limits_shape[0];
const int row = thread_position_in_grid.x / 32, lane = thread_index_in_simdgroup;
device int8_t* line = codes + size_t(row) * columns;
if (row >= rows) {
  for (int k = lane; k < columns; k += 32) line[k] = 0;
  return;
}
const size_t start = size_t(row) * columns;
const int entry = int(long(row) * entries / rows);
const size_t shift_start = shifts_shape[0] > 1 ? size_t(entry) * columns : 0;
const float limit = limits[entry];
float scale = given[entry];
bool broken = false;
if (TOKEN) {
  float largest = 0.0f;
  for (int k = lane; k < columns; k += 32) {
    const float size =
        fabs(ditq_centred<SHIFT, SMOOTH>(x + start, shifts + shift_start, smoothing, k));
    broken |= !(size < INFINITY);
    largest = max(largest, size);
  }
  scale = max(simd_max(largest) / limit, 1e-12f);
}
broken |= !(1.0f / scale < INFINITY); // of a scale too small to divide by
for (int k = lane; k < columns; k += 32) {
  const float value =
      ditq_centred<SHIFT, SMOOTH>(x + start, shifts + shift_start, smoothing, k) / scale;
  broken |= isnan(value);
  line[k] = isnan(value) ? int8_t(0) : int8_t(clamp(rint(value), -limit, limit));
}
if (simd_any(broken)) scale = NAN;
if (lane == 0) scales[row] = scale;
