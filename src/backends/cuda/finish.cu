// What becomes of the sums. Both matrix kernels hand over pieces of 16 rows and 32 columns as the
// tensor cores leave them: of the four blocks of 8 columns, sums[4 b + 0, 1] lie in row `row`,
// columns 8 b + 2 q and the next, sums[4 b + 2, 3] in row + 8; q is the lane within its quad. What
// a thread needs of its two rows is found once a tile, whose first column is `column`: `at`. What a
// piece needs beside its sums is loaded while the one before is finished: `load`, then the call,
// both with `offset`, the piece's first column within the tile, which the compiler knows.

namespace ditq {

// Not hoisted: loads of a whole tile in flight would spill the sums.
__device__ __forceinline__ float4 load_here(const float4* place) {
  float4 v;
  asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(place) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_here(const uint4* place) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(place) : "memory");
  return v;
}
__device__ __forceinline__ unsigned load_here(const unsigned* place) {
  unsigned v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(place) : "memory");
  return v;
}
__device__ __forceinline__ float load_here(const float* place) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(place) : "memory");
  return v;
}

// A row, the tile's first column, the row's scale and that of row + 8.
struct ScaledRows {
  int row, column;
  float upper, lower;
};

__device__ __forceinline__ ScaledRows scaled_rows(
    const float* scales, int row, int column, int rows) {
  return {row, column, row < rows ? load_here(scales + row) : 0.0f,
          row + 8 < rows ? load_here(scales + row + 8) : 0.0f};
}

// A quad's 4 x 4 words transposed: word b of lane q becomes word q of lane b.
__device__ __forceinline__ void transpose(unsigned (&word)[4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = q & step;
    const int other = 3 - step;
    const unsigned first = __shfl_xor_sync(~0u, upper ? word[0] : word[step], step);
    const unsigned second = __shfl_xor_sync(~0u, upper ? word[other] : word[3], step);
    if (upper) word[0] = first, word[other] = second;
    else word[step] = first, word[3] = second;
  }
}

template <class T>
__device__ __forceinline__ unsigned pair_of(float a, float b);
template <>
__device__ __forceinline__ unsigned pair_of<__half>(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <>
__device__ __forceinline__ unsigned pair_of<__nv_bfloat16>(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&pair);
}

template <class T>
__device__ __forceinline__ float2 floats_of(unsigned pair);
template <>
__device__ __forceinline__ float2 floats_of<__half>(unsigned pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 floats_of<__nv_bfloat16>(unsigned pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// y = sum * (row's scale * column's scale) + bias. `columns` holds two columns a float4: both
// scales, then both biases; where the bias is zero y is the product as float32 rounds it.
template <class T>
struct ToFloats {
  const float* row_scales;
  const float4* columns;
  T* y;
  int rows, width;

  using Rows = ScaledRows;
  struct Ahead {
    float4 columns[4];
  };

  __device__ __forceinline__ Rows at(int row, int column) const {
    return scaled_rows(row_scales, row, column, rows);
  }

  template <int WIDTH>
  __device__ __forceinline__ void expect(int, int) const {} // nothing that is not at hand

  __device__ __forceinline__ Ahead load(const Rows& here, int offset) const {
    const int place = here.column / 2 + threadIdx.x % 4;
    Ahead found;
#pragma unroll
    for (int b = 0; b < 4; b++)
      found.columns[b] = load_here(columns + place + (offset / 2 + 4 * b));
    return found;
  }

  __device__ __forceinline__ void operator()(
      const int* sums, const Rows& here, int offset, const Ahead& ahead) const {
    const int column = here.column + offset;
    float first[8], second[8];
    scaled(first, second, sums, here, ahead);
    write(first, here.row, column);
    write(second, here.row + 8, column);
  }

  // This lane's numbers of the row and of row + 8: two of each block of 8 columns.
  static __device__ __forceinline__ void scaled(
      float (&first)[8], float (&second)[8], const int* sums, const Rows& here,
      const Ahead& ahead) {
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const float4 p = ahead.columns[b];
      first[2 * b] = fmaf(float(sums[4 * b]), here.upper * p.x, p.z);
      first[2 * b + 1] = fmaf(float(sums[4 * b + 1]), here.upper * p.y, p.w);
      second[2 * b] = fmaf(float(sums[4 * b + 2]), here.lower * p.x, p.z);
      second[2 * b + 1] = fmaf(float(sums[4 * b + 3]), here.lower * p.y, p.w);
    }
  }

  // Where the width is a multiple of 8 and T has 16 bits.
  __device__ __forceinline__ void write_words(const float (&v)[8], int row, int column) const {
    unsigned word[4];
#pragma unroll
    for (int b = 0; b < 4; b++) word[b] = pair_of<T>(v[2 * b], v[2 * b + 1]);
    transpose(word);
    const int place = column + 8 * (threadIdx.x % 4);
    if (row < rows && place < width)
      *reinterpret_cast<uint4*>(y + size_t(row) * width + place) =
          make_uint4(word[0], word[1], word[2], word[3]);
  }

  __device__ __forceinline__ void write(const float (&v)[8], int row, int column) const {
    const int q = threadIdx.x % 4;
    T* line = y + size_t(row) * width;
    if constexpr (sizeof(T) == 2) {
      if (width % 8 == 0) return write_words(v, row, column);
    } else if (width % 2 == 0) {
#pragma unroll
      for (int b = 0; b < 4; b++) {
        const int place = column + 8 * b + 2 * q;
        if (row < rows && place < width)
          *reinterpret_cast<float2*>(line + place) = make_float2(v[2 * b], v[2 * b + 1]);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int place = column + 8 * (i / 2) + 2 * q + i % 2;
      if (row < rows && place < width) line[place] = T(v[i]);
    }
  }
};

// Whether a gated sum can be read and written in words, and no piece ends beyond the last column:
// what `ToSum` calls WORDS.
template <class T>
__device__ __forceinline__ bool in_words(
    const ToFloats<T>& product, const Lines<T>& residual, const Lines<T>& gates) {
  return sizeof(T) == 2 && product.width % 32 == 0 && residual.in_words() && gates.in_pairs();
}

// residual + gate * y, rounded once; y is what ToFloats gives, the gate one vector a batch entry.
// WORDS leaves out all that other places would take: a tile's end runs once through code that is
// unrolled for every sum, and what does not fit in the instruction cache is fetched tile by tile.
template <class T, bool WORDS>
struct ToSum {
  ToFloats<T> product;
  Lines<T> residual, gates;

  struct Rows {
    ScaledRows scaled;
    // WORDS: from this lane's first column in the tile on; those of the last row for rows below.
    const T *upper, *lower, *upper_gate, *lower_gate;
  };
  struct Ahead {
    typename ToFloats<T>::Ahead product;
    uint4 upper, lower; // the residual, 8 columns of a row and of row + 8
    unsigned gate[4]; // of the upper row, two columns of each block of 8
  };

  __device__ __forceinline__ Rows at(int row, int column) const {
    Rows found = {product.at(row, column)};
    if constexpr (WORDS) {
      const int upper = last(row), lower = last(row + 8), q = threadIdx.x % 4;
      found.upper = residual.at(upper) + column + 8 * q;
      found.lower = residual.at(lower) + column + 8 * q;
      found.upper_gate = gates.at(upper) + column + 2 * q;
      found.lower_gate = gates.at(lower) + column + 2 * q;
    }
    return found;
  }

  __device__ __forceinline__ int last(int row) const { return min(row, product.rows - 1); }

  // Brings the residual of 128 rows by WIDTH columns near while 256 threads' products are made.
  template <int WIDTH>
  __device__ __forceinline__ void expect(int first_row, int first_column) const {
    if constexpr (WORDS) {
      constexpr int STEP = 64; // numbers: 128 bytes
      const int row = first_row + threadIdx.x / 2, half = threadIdx.x % 2 * STEP;
      if (row >= product.rows) return;
      const T* line = residual.at(row) + first_column + half;
#pragma unroll
      for (int i = 0; i < WIDTH; i += 2 * STEP)
        if (i + half < WIDTH && first_column + i + half < product.width)
          asm volatile("prefetch.global.L2 [%0];" ::"l"(line + i));
    }
  }

  __device__ __forceinline__ Ahead load(const Rows& here, int offset) const {
    Ahead found;
    if constexpr (WORDS) {
      if (here.scaled.column + offset < product.width) {
        found.upper = load_here(reinterpret_cast<const uint4*>(here.upper + offset));
        found.lower = load_here(reinterpret_cast<const uint4*>(here.lower + offset));
        load_gate(found.gate, here.upper_gate + offset);
      }
    }
    found.product = product.load(here.scaled, offset);
    return found;
  }

  __device__ __forceinline__ void operator()(
      const int* sums, const Rows& here, int offset, const Ahead& ahead) const {
    const int row = here.scaled.row, column = here.scaled.column + offset;
    float first[8], second[8];
    product.scaled(first, second, sums, here.scaled, ahead.product);
    if constexpr (WORDS) {
      unsigned gate[4] = {ahead.gate[0], ahead.gate[1], ahead.gate[2], ahead.gate[3]};
      add_words(first, gate, ahead.upper);
      product.write_words(first, row, column);
      if (here.upper_gate != here.lower_gate) load_gate(gate, here.lower_gate + offset);
      add_words(second, gate, ahead.lower);
      product.write_words(second, row + 8, column);
    } else {
      add(first, row, column);
      product.write(first, row, column);
      add(second, row + 8, column);
      product.write(second, row + 8, column);
    }
  }

  static __device__ __forceinline__ void load_gate(unsigned (&gate)[4], const T* from) {
#pragma unroll
    for (int b = 0; b < 4; b++)
      gate[b] = load_here(reinterpret_cast<const unsigned*>(from + 8 * b));
  }

  static __device__ __forceinline__ void add_words(
      float (&v)[8], const unsigned (&gate)[4], const uint4& beside) {
    unsigned word[4] = {beside.x, beside.y, beside.z, beside.w};
    transpose(word);
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const float2 pair = floats_of<T>(word[b]), factor = floats_of<T>(gate[b]);
      v[2 * b] = fmaf(v[2 * b], factor.x, pair.x);
      v[2 * b + 1] = fmaf(v[2 * b + 1], factor.y, pair.y);
    }
  }

  __device__ __forceinline__ void add(float (&v)[8], int row, int column) const {
    const T *beside = residual.at(last(row)), *gate = gates.at(last(row));
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int place = column + 8 * (i / 2) + 2 * (threadIdx.x % 4) + i % 2;
      if (place < product.width)
        v[i] = fmaf(v[i], float(gate[place * gates.column]),
                    float(beside[place * residual.column]));
    }
  }
};

// GELU's tanh form; the approximation's error is far below half a code.
__device__ __forceinline__ float gelu(float x) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x * (0.7978845608f + 0.0356774081f * x * x)));
  return 0.5f * x * (1.0f + t);
}

// GELU, and its codes in the tiles that the next product reads. `next` holds two columns a float4,
// both factors and both terms: code = clip(round((gelu(y) * factor + term) / scale), -limit, limit).
// Codes cannot be NaN, so a row's NaN goes on in its scale.
struct ToCodes {
  const float* row_scales;
  const float4* columns;
  const float4* next;
  signed char* codes;
  float* scales;
  float scale, inverse, limit;
  int rows, depth_pieces;

  __device__ __forceinline__ unsigned code(float sum, float scale, float bias, float factor,
                                           float term) const {
    const float v = fmaf(gelu(fmaf(sum, scale, bias)), factor, term) * inverse;
    return unsigned(__float2int_rn(fmaxf(fminf(v, limit), -limit))) & 0xff;
  }

  using Rows = ScaledRows;
  struct Ahead {
    float4 columns[4], next[4];
  };

  __device__ __forceinline__ Rows at(int row, int column) const {
    return scaled_rows(row_scales, row, column, rows);
  }

  template <int WIDTH>
  __device__ __forceinline__ void expect(int, int) const {} // nothing that is not at hand

  __device__ __forceinline__ Ahead load(const Rows& here, int offset) const {
    const int place = here.column / 2 + threadIdx.x % 4;
    Ahead found;
#pragma unroll
    for (int b = 0; b < 4; b++) {
      found.columns[b] = load_here(columns + place + (offset / 2 + 4 * b));
      found.next[b] = load_here(next + place + (offset / 2 + 4 * b));
    }
    return found;
  }

  __device__ __forceinline__ void operator()(
      const int* sums, const Rows& here, int offset, const Ahead& ahead) const {
    const int column = here.column + offset;
    if (column / PIECE >= depth_pieces) return; // beyond what the next product reads
    const int q = threadIdx.x % 4, row = here.row;
    const float upper = here.upper, lower = here.lower;
    if (column == 0 && q == 0) {
      if (row < rows) scales[row] = upper != upper ? upper : scale;
      if (row + 8 < rows) scales[row + 8] = lower != lower ? lower : scale;
    }
    unsigned word[4]; // two codes of the row, and above them two of row + 8
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const float4 p = ahead.columns[b], n = ahead.next[b];
      const int* sum = sums + 4 * b;
      word[b] = code(float(sum[0]), upper * p.x, p.z, n.x, n.z) |
          code(float(sum[1]), upper * p.y, p.w, n.y, n.w) << 8 |
          code(float(sum[2]), lower * p.x, p.z, n.x, n.z) << 16 |
          code(float(sum[3]), lower * p.y, p.w, n.y, n.w) << 24;
    }
    transpose(word);
    const int place = column + 8 * q;
    signed char* to = codes + chunk_place(row, place / CHUNK, depth_pieces) + place % CHUNK;
    *reinterpret_cast<uint2*>(to) = make_uint2(
        __byte_perm(word[0], word[1], 0x5410), __byte_perm(word[2], word[3], 0x5410));
    *reinterpret_cast<uint2*>(to + 8 * PIECE) = make_uint2(
        __byte_perm(word[0], word[1], 0x7632), __byte_perm(word[2], word[3], 0x7632));
  }
};

} // namespace ditq
