// The layout that both matrix kernels read. A matrix of codes (rows, depth) is stored as pieces of
// 128 rows by 128 codes, (rows / 128, depth / 128, 128, 128), 16 KB each. Within a piece the eight
// 16-byte chunks of row r are permuted by xor with r % 8: a piece copied to shared memory as it is
// can then be read by wgmma and ldmatrix without bank conflicts.

namespace ditq {

constexpr int PIECE = 128;
constexpr int PIECE_BYTES = PIECE * PIECE;
constexpr int CHUNK = 16;

__device__ __forceinline__ size_t chunk_place(int row, int chunk, int depth_pieces) {
  const int within = row % PIECE;
  const size_t piece = size_t(row / PIECE) * depth_pieces + chunk / 8;
  return piece * PIECE_BYTES + within * PIECE + ((chunk % 8) ^ (within % 8)) * CHUNK;
}

// Rows of numbers wherever they lie: `rows` of them, one below the other, belong to an entry of the
// batch. A vector an entry is rows that are `row` = 0 numbers apart.
template <class T>
struct Lines {
  const T* first;
  long long entry, row, column; // numbers from one to the next
  int rows;

  __device__ __forceinline__ const T* at(int r) const {
    return first + (r / rows) * entry + (r % rows) * row;
  }

  // Whether every eight numbers lie side by side and can be read at once.
  __device__ __forceinline__ bool in_words() const {
    return column == 1 && entry % 8 == 0 && row % 8 == 0 && size_t(first) % 16 == 0;
  }

  // The same of every two.
  __device__ __forceinline__ bool in_pairs() const {
    return column == 1 && entry % 2 == 0 && row % 2 == 0 && size_t(first) % (2 * sizeof(T)) == 0;
  }
};

__device__ __forceinline__ unsigned shared_address(const void* place) {
  return unsigned(__cvta_generic_to_shared(place));
}

} // namespace ditq
