// Hopper (sm_90a): tiles of 128 rows by WIDE columns through wgmma. One warpgroup fetches pieces by
// bulk copies, two multiply 64 rows each; every block works through several tiles. `wgmma` and
// WIDE, a multiple of 64, are generated. The launch bound, which setmaxnreg needs, is put on MLX's
// generated function below.

namespace ditq {

constexpr int STAGES = 4;
constexpr int CONSUMERS = 2;
constexpr int HALF_BYTES = PIECE_BYTES / 2; // 64 rows, within which no chunk is swapped further
constexpr int STAGE_BYTES = PIECE_BYTES + WIDE * PIECE;

__device__ __forceinline__ void barrier_init(unsigned barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(unsigned barrier, int parity) {
  asm volatile("{\n.reg .pred done;\n"
               "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void fetch_piece(
    unsigned to, const signed char* from, int bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// WIDE columns from column 64 `half` on: whole pieces where the tiles begin with one, else halves.
__device__ __forceinline__ void fetch_columns(
    unsigned to, const signed char* b, int half, int depth, int k, unsigned barrier) {
  constexpr int STEP = WIDE % PIECE ? 1 : 2;
#pragma unroll
  for (int i = 0; i < WIDE / 64; i += STEP) {
    const size_t piece = size_t((half + i) / 2) * depth + k;
    fetch_piece(to + i * HALF_BYTES, b + piece * PIECE_BYTES + (half + i) % 2 * HALF_BYTES,
                STEP * HALF_BYTES, barrier);
  }
}

// wgmma's view of rows of 128 bytes, swizzled, eight rows 1024 bytes apart.
__device__ __forceinline__ unsigned long long matrix_at(unsigned address) {
  return ((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

template <int COUNT>
__device__ __forceinline__ void keep_in_place(int (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(sums[i])::"memory");
}

struct Ring {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// a: (row_tiles, depth) pieces, b: (columns / 128, depth) pieces; a tile takes WIDE columns of b.
template <class Finish>
__device__ __forceinline__ void multiply(
    const signed char* a, const signed char* b, int row_tiles, int column_tiles, int depth,
    const Finish& finish) {
  extern __shared__ unsigned char memory[];
  __shared__ alignas(8) unsigned long long full[STAGES], empty[STAGES];
  const int thread = threadIdx.x, group = __shfl_sync(~0u, thread / 128, 0);
  const unsigned stages = (shared_address(memory) + 1023) & ~1023u;
  const int tiles = row_tiles * column_tiles;
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(&full[i]), 1);
      barrier_init(shared_address(&empty[i]), CONSUMERS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  Ring ring;
  if (group < CONSUMERS) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int lane = thread % 32, warp = thread / 32 % 4;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int first_row = tile / column_tiles * PIECE, column = tile % column_tiles * WIDE;
      finish.template expect<WIDE>(first_row, column);
      int sums[WIDE / 2], used = -1;
      for (int k = 0; k < depth; k++) {
        barrier_wait(shared_address(&full[ring.stage]), ring.parity);
        const unsigned here = stages + ring.stage * STAGE_BYTES;
        const unsigned long long rows = matrix_at(here + group * (PIECE_BYTES / CONSUMERS));
        const unsigned long long columns = matrix_at(here + PIECE_BYTES);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int part = 0; part < 4; part++) // of 32 codes: 32 bytes, 2 in the descriptor's unit
          wgmma(sums, rows + 2 * part, columns + 2 * part, (k | part) != 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (used >= 0 && thread % 128 == 0) barrier_arrive(shared_address(&empty[used]));
        used = ring.stage;
        ring.advance();
      }
      const int row = first_row + group * 64 + warp * 16 + lane / 4;
      const typename Finish::Rows rows = finish.at(row, column);
      typename Finish::Ahead ahead = finish.load(rows, 0);
      keep_in_place(sums);
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      keep_in_place(sums);
      if (thread % 128 == 0) barrier_arrive(shared_address(&empty[used]));
#pragma unroll
      for (int piece = 0; piece < WIDE / 32; piece++) {
        const typename Finish::Ahead here = ahead;
        if (piece + 1 < WIDE / 32) ahead = finish.load(rows, 32 * (piece + 1));
        finish(sums + 16 * piece, rows, 32 * piece, here);
      }
    }
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (thread != CONSUMERS * 128) return;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const signed char* rows = a + size_t(tile / column_tiles) * depth * PIECE_BYTES;
      const int half = tile % column_tiles * (WIDE / 64);
      for (int k = 0; k < depth; k++) {
        barrier_wait(shared_address(&empty[ring.stage]), ring.parity ^ 1);
        const unsigned barrier = shared_address(&full[ring.stage]);
        const unsigned here = stages + ring.stage * STAGE_BYTES;
        barrier_expect(barrier, STAGE_BYTES);
        fetch_piece(here, rows + size_t(k) * PIECE_BYTES, PIECE_BYTES, barrier);
        fetch_columns(here + PIECE_BYTES, b, half, depth, k, barrier);
        ring.advance();
      }
    }
  }
}

} // namespace ditq

#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(384, 1)
