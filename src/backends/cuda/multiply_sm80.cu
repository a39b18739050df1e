// From sm_80 on: tiles of 128 by 128 through mma.sync, one a block, eight warps of 64 rows by 32
// columns. Pieces come by cp.async as they are, since they are stored as ldmatrix wants them.

namespace ditq {

constexpr int STAGES = 3;
constexpr int THREADS = 256;
constexpr int STAGE_BYTES = 2 * PIECE_BYTES;

__device__ __forceinline__ void fetch_piece(unsigned to, const signed char* from) {
#pragma unroll
  for (int i = 0; i < PIECE_BYTES / CHUNK / THREADS; i++) {
    const int place = (i * THREADS + threadIdx.x) * CHUNK;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + place), "l"(from + place));
  }
}

// Four 8 x 16-byte matrices; this lane names chunk `chunk` of row `row` of the piece.
__device__ __forceinline__ void load_matrices(unsigned (&word)[4], unsigned piece, int row,
                                              int chunk) {
  const unsigned place = piece + row * PIECE + ((chunk ^ (row % 8)) * CHUNK);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(place) : "memory");
}

__device__ __forceinline__ void multiply_add(int* sums, const unsigned (&a)[4], unsigned b0,
                                             unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_stage(int (&sums)[4][16], unsigned stage, int first_row,
                                               int first_column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int part = 0; part < 4; part++) {
    unsigned a[4][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      load_matrices(a[i], stage, first_row + 16 * i + lane % 16, 2 * part + lane / 16);
#pragma unroll
    for (int j = 0; j < 2; j++)
      load_matrices(b[j], stage + PIECE_BYTES, first_column + 16 * j + lane % 8 + lane / 16 * 8,
                    2 * part + lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        multiply_add(sums[i] + 4 * j, a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

// a: (rows, depth) pieces, b: (columns, depth) pieces; the grid has a block for every pair.
template <class Finish>
__device__ __forceinline__ void multiply(
    const signed char* a, const signed char* b, int row_tiles, int column_tiles, int depth,
    const Finish& finish) {
  extern __shared__ unsigned char memory[];
  const unsigned stages = (shared_address(memory) + 1023) & ~1023u;
  const int row_tile = blockIdx.x / column_tiles, column_tile = blockIdx.x % column_tiles;
  if (row_tile >= row_tiles) return;
  const signed char* rows = a + size_t(row_tile) * depth * PIECE_BYTES;
  const signed char* columns = b + size_t(column_tile) * depth * PIECE_BYTES;
  const int warp = threadIdx.x / 32, first_row = warp / 4 * 64, first_column = warp % 4 * 32;
  auto fetch = [&](int k) {
    const unsigned stage = stages + k % STAGES * STAGE_BYTES;
    if (k < depth) {
      fetch_piece(stage, rows + size_t(k) * PIECE_BYTES);
      fetch_piece(stage + PIECE_BYTES, columns + size_t(k) * PIECE_BYTES);
    }
    asm volatile("cp.async.commit_group;" ::: "memory"); // also when empty: the waits count groups
  };
  int sums[4][16] = {};
  for (int k = 0; k < STAGES - 1; k++) fetch(k);
  for (int k = 0; k < depth; k++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncthreads(); // the stage has come for all, and all have left the one fetched next
    fetch(k + STAGES - 1);
    multiply_stage(sums, stages + k % STAGES * STAGE_BYTES, first_row, first_column);
  }
  const int row = row_tile * PIECE + first_row + threadIdx.x % 32 / 4;
  const int column = column_tile * PIECE + first_column;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const typename Finish::Rows here = finish.at(row + 16 * i, column);
    finish(sums[i], here, 0, finish.load(here, 0));
  }
}

} // namespace ditq

#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(256)
