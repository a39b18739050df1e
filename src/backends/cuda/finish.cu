// What becomes of the sums. Both matrix kernels hand over pieces of 16 rows and 32 columns as the
// tensor cores leave them: of the four blocks of 8 columns, sums[4 b + 0, 1] lie in row `row`,
// columns 8 b + 2 q and the next, sums[4 b + 2, 3] in row + 8; q is the lane within its quad. What
// a piece needs beside its sums is loaded while the one before is finished: `load`, then the call.

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

// A row's scale and that of row + 8.
struct RowScales {
  float upper, lower;
};

__device__ __forceinline__ RowScales load_scales(const float* scales, int row, int rows) {
  return {row < rows ? load_here(scales + row) : 0.0f,
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

  struct Ahead {
    RowScales scales;
    float4 columns[4];
  };

  __device__ __forceinline__ Ahead load(int row, int column) const {
    Ahead found;
    found.scales = load_scales(row_scales, row, rows);
#pragma unroll
    for (int b = 0; b < 4; b++)
      found.columns[b] = load_here(columns + (column + 8 * b) / 2 + threadIdx.x % 4);
    return found;
  }

  __device__ __forceinline__ void operator()(
      const int* sums, int row, int column, const Ahead& ahead) const {
    float first[8], second[8];
    scaled(first, second, sums, ahead);
    write(first, row, column);
    write(second, row + 8, column);
  }

  // This lane's numbers of the row and of row + 8: two of each block of 8 columns.
  static __device__ __forceinline__ void scaled(
      float (&first)[8], float (&second)[8], const int* sums, const Ahead& ahead) {
    const float upper = ahead.scales.upper, lower = ahead.scales.lower;
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const float4 p = ahead.columns[b];
      first[2 * b] = fmaf(float(sums[4 * b]), upper * p.x, p.z);
      first[2 * b + 1] = fmaf(float(sums[4 * b + 1]), upper * p.y, p.w);
      second[2 * b] = fmaf(float(sums[4 * b + 2]), lower * p.x, p.z);
      second[2 * b + 1] = fmaf(float(sums[4 * b + 3]), lower * p.y, p.w);
    }
  }

  __device__ __forceinline__ void write(const float (&v)[8], int row, int column) const {
    const int q = threadIdx.x % 4;
    T* line = y + size_t(row) * width;
    if constexpr (sizeof(T) == 2) {
      if (width % 8 == 0) {
        unsigned word[4];
#pragma unroll
        for (int b = 0; b < 4; b++) word[b] = pair_of<T>(v[2 * b], v[2 * b + 1]);
        transpose(word);
        const int place = column + 8 * q;
        if (row < rows && place < width)
          *reinterpret_cast<uint4*>(line + place) = make_uint4(word[0], word[1], word[2], word[3]);
        return;
      }
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

// residual + gate * y, rounded once; y is what ToFloats gives, the gate one vector a batch entry.
template <class T>
struct ToSum {
  ToFloats<T> product;
  Lines<T> residual, gates;
  bool in_words; // of the residual and of the product's width

  __device__ __forceinline__ ToSum(
      const ToFloats<T>& product, const Lines<T>& residual, const Lines<T>& gates)
      : product(product), residual(residual), gates(gates),
        in_words(sizeof(T) == 2 && product.width % 8 == 0 && residual.in_words()) {}

  struct Ahead {
    typename ToFloats<T>::Ahead product;
    uint4 upper, lower; // the residual, 8 columns of a row and of row + 8
  };

  __device__ __forceinline__ Ahead load(int row, int column) const {
    Ahead found;
    found.upper = words(row, column);
    found.lower = words(row + 8, column);
    found.product = product.load(row, column);
    return found;
  }

  __device__ __forceinline__ uint4 words(int row, int column) const {
    const int place = column + 8 * (threadIdx.x % 4);
    if (!in_words || row >= product.rows || place >= product.width) return make_uint4(0, 0, 0, 0);
    return load_here(reinterpret_cast<const uint4*>(residual.at(row) + place));
  }

  __device__ __forceinline__ void operator()(
      const int* sums, int row, int column, const Ahead& ahead) const {
    float first[8], second[8], gate[8];
    product.scaled(first, second, sums, ahead.product);
    const T* upper = gate_of(row);
    const T* lower = gate_of(row + 8);
    load_gate(gate, upper, column);
    add(first, gate, ahead.upper, row, column);
    product.write(first, row, column);
    if (upper != lower) load_gate(gate, lower, column);
    add(second, gate, ahead.lower, row + 8, column);
    product.write(second, row + 8, column);
  }

  __device__ __forceinline__ const T* gate_of(int row) const {
    return gates.at(min(row, product.rows - 1));
  }

  // Two columns of each block of 8; zero beyond the last.
  __device__ __forceinline__ void load_gate(float (&gate)[8], const T* line, int column) const {
    const int q = threadIdx.x % 4, width = product.width;
    if constexpr (sizeof(T) == 2) {
      if (width % 2 == 0 && gates.column == 1 && size_t(line) % 4 == 0) {
#pragma unroll
        for (int b = 0; b < 4; b++) {
          const int place = column + 8 * b + 2 * q;
          const unsigned* word = reinterpret_cast<const unsigned*>(line + place);
          const float2 pair = floats_of<T>(place < width ? load_here(word) : 0u);
          gate[2 * b] = pair.x, gate[2 * b + 1] = pair.y;
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int place = column + 8 * (i / 2) + 2 * q + i % 2;
      gate[i] = place < width ? float(line[place * gates.column]) : 0.0f;
    }
  }

  __device__ __forceinline__ void add(
      float (&v)[8], const float (&gate)[8], const uint4& beside, int row, int column) const {
    const int q = threadIdx.x % 4;
    if constexpr (sizeof(T) == 2) {
      if (in_words) {
        unsigned word[4] = {beside.x, beside.y, beside.z, beside.w};
        transpose(word);
#pragma unroll
        for (int b = 0; b < 4; b++) {
          const float2 pair = floats_of<T>(word[b]);
          v[2 * b] = fmaf(v[2 * b], gate[2 * b], pair.x);
          v[2 * b + 1] = fmaf(v[2 * b + 1], gate[2 * b + 1], pair.y);
        }
        return;
      }
    }
    if (row >= product.rows) return;
    const T* line = residual.at(row);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int place = column + 8 * (i / 2) + 2 * q + i % 2;
      if (place < product.width) v[i] = fmaf(v[i], gate[i], float(line[place * residual.column]));
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
// both factors and both terms: code = clip(round(gelu(y) * factor + term), -limit, limit). Codes
// cannot be NaN, so a row's NaN goes on in its scale.
struct ToCodes {
  const float* row_scales;
  const float4* columns;
  const float4* next;
  signed char* codes;
  float* scales;
  float scale, limit;
  int rows, depth_pieces;

  __device__ __forceinline__ unsigned code(float sum, float scale, float bias, float factor,
                                           float term) const {
    const float v = fmaf(gelu(fmaf(sum, scale, bias)), factor, term);
    return unsigned(__float2int_rn(fmaxf(fminf(v, limit), -limit))) & 0xff;
  }

  struct Ahead {
    RowScales scales;
    float4 columns[4], next[4];
  };

  __device__ __forceinline__ Ahead load(int row, int column) const {
    Ahead found;
    found.scales = load_scales(row_scales, row, rows);
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const int place = (column + 8 * b) / 2 + threadIdx.x % 4;
      found.columns[b] = load_here(columns + place);
      found.next[b] = load_here(next + place);
    }
    return found;
  }

  __device__ __forceinline__ void operator()(
      const int* sums, int row, int column, const Ahead& ahead) const {
    if (column / PIECE >= depth_pieces) return; // beyond what the next product reads
    const int q = threadIdx.x % 4;
    const float upper = ahead.scales.upper, lower = ahead.scales.lower;
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
