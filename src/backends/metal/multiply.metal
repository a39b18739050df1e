// One threadgroup of SIMDGROUPS simdgroups makes a tile of y: row's factor × column's scale × sum.
// Codes are (whole tiles of rows, depth), the weight (width, depth), both int8, widths whole tiles.
//
// Which thread holds which sum is the chip's own affair, so each is asked where it belongs, and
// whether it belongs anywhere.

const int rows = factors_shape[0], width = weight_shape[0], depth = weight_shape[1];
const int first_row = threadgroup_position_in_grid.y * TILE;
const int first_column = threadgroup_position_in_grid.x * TILE;
constexpr auto tile = mpp::tensor_ops::matmul2d_descriptor(
    TILE, TILE, static_cast<int>(dynamic_extent), false, true, false,
    mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
mpp::tensor_ops::matmul2d<tile, execution_simdgroups<SIMDGROUPS>> product;

// Extents come innermost first.
using Matrix = tensor<device int8_t, dextents<int32_t, 2>, tensor_inline>;
Matrix left((device int8_t*)codes, dextents<int32_t, 2>(depth, codes_shape[0]));
Matrix right((device int8_t*)weight, dextents<int32_t, 2>(depth, width));
auto tile_left = left.slice(0, first_row);
auto tile_right = right.slice(0, first_column);
auto sums = product.get_destination_cooperative_tensor<
    decltype(tile_left), decltype(tile_right), int32_t>();
#pragma unroll
for (uint16_t i = 0; i < sums.get_capacity(); i++) {
  if (sums.is_valid_element(i)) sums[i] = 0;
}
product.run(tile_left, tile_right, sums);
#pragma unroll
for (uint16_t i = 0; i < sums.get_capacity(); i++) {
  if (!sums.is_valid_element(i)) continue;
  const auto place = sums.get_multidimensional_index(i);
  const int column = first_column + place[0], row = first_row + place[1];
  if (row < rows) {
    const float unit = factors[row] * scales[column];
    const float sum = float(sums[i]);
    y[size_t(row) * width + column] = T(BIAS ? fma(sum, unit, bias[column]) : sum * unit);
  }
}
