// Rows of numbers to codes in tiles, one warp a row, and packed weights to the same tiles.

namespace ditq {

constexpr int ROWS_PER_BLOCK = 8;
// 1.5 * 2^23: beside it a float has no digits after the point, and its lowest byte is the number.
constexpr float NO_FRACTION = 12582912.0f;
// From here on `quick` below, which errs by 5e-5 at most at codes up to 128, may be beyond a tie.
constexpr float NEAR_TIE = 0.4999f;

template <class T>
struct alignas(16) Numbers {
  T value[CHUNK];
};

struct Grid {
  float scale, inverse, limit;
};

// The numbers of a row or of a vector, `apart` from one to the next.
template <class T>
struct Strided {
  const T* first;
  long long apart;
};

// An input's grids: `entries` scales and limits, as many shifts or one, and a smoothing.
struct Grids {
  Strided<float> scales, limits, shifts, smoothing;
  long long shift; // numbers from one shift to the next
  int entries, shift_entries;
};

template <class T>
__device__ __forceinline__ void load_chunk(
    float (&v)[CHUNK], const T* row, int first, int columns, float beyond = 0.0f) {
  if (size_t(row) % 16 == 0 && first + CHUNK <= columns) {
    const Numbers<T> numbers = *reinterpret_cast<const Numbers<T>*>(row + first);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[i] = float(numbers.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[i] = first + i < columns ? float(row[first + i]) : beyond;
  }
}

template <class T>
__device__ __forceinline__ void load_chunk(
    float (&v)[CHUNK], const Strided<T>& row, int first, int columns, float beyond = 0.0f) {
  if (row.apart == 1) {
    load_chunk(v, row.first, first, columns, beyond);
  } else {
    const T* place = row.first + first * row.apart;
    long long apart = row.apart;
    asm volatile("" : "+l"(apart)); // or its multiples would be kept in registers
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[i] = first + i < columns ? float(place[i * apart]) : beyond;
  }
}

// Whether all chunks of these rows can be read in words.
template <class T>
__device__ __forceinline__ bool in_chunks(const Lines<T>& x, int columns) {
  constexpr int NUMBERS = 16 / sizeof(T); // of a word
  return columns % CHUNK == 0 && x.column == 1 && x.entry % NUMBERS == 0 &&
      x.row % NUMBERS == 0 && size_t(x.first) % 16 == 0;
}

// A chunk as it lies in memory. Words, since zeros are put into numbers of 16 bits one by one.
template <class T>
struct Words {
  static constexpr int COUNT = CHUNK * sizeof(T) / sizeof(uint4);
  uint4 word[COUNT];
};

// Of a row that is aligned and ends with a chunk; beyond it zeros.
template <class T>
__device__ __forceinline__ Words<T> whole_chunk(const T* row, int first, int columns) {
  Words<T> words;
#pragma unroll
  for (int k = 0; k < Words<T>::COUNT; k++)
    words.word[k] = first < columns ? reinterpret_cast<const uint4*>(row + first)[k]
                                    : make_uint4(0, 0, 0, 0);
  return words;
}

template <class T>
__device__ __forceinline__ void spread(float (&v)[CHUNK], const Words<T>& words) {
  const T* numbers = reinterpret_cast<const T*>(words.word);
#pragma unroll
  for (int i = 0; i < CHUNK; i++) v[i] = float(numbers[i]);
}

// x less the shift, and the smoothing, of one chunk.
template <bool SHIFT, bool SMOOTH>
__device__ __forceinline__ void change_input(
    float (&v)[CHUNK], float (&smooth)[CHUNK], const Strided<float>& shift,
    const Strided<float>& smoothing, int first, int columns) {
  if constexpr (SHIFT) {
    float z[CHUNK];
    load_chunk(z, shift, first, columns);
#pragma unroll
    for (int i = 0; i < CHUNK; i++) v[i] = v[i] - z[i];
  }
  if constexpr (SMOOTH) load_chunk(smooth, smoothing, first, columns, 1.0f);
}

__device__ __forceinline__ float rounded(float v, float limit) {
  return fmaxf(fminf(v, limit), -limit) + NO_FRACTION;
}

// clip(round(v / smoothing / scale), -limit, limit) exactly as two float32 divisions give it, as
// bytes, the first lowest. Divisions are slow, so they are made only for a chunk with a number that
// an approximation could round to another code.
template <bool SMOOTH>
__device__ __forceinline__ uint4 codes_of(
    const float (&v)[CHUNK], const float (&smooth)[CHUNK], const Grid& grid) {
  int code[CHUNK];
  bool near = false;
#pragma unroll
  for (int i = 0; i < CHUNK; i++) {
    float quick = v[i] * grid.inverse;
    if (SMOOTH) quick = __fdividef(quick, smooth[i]);
    quick = fmaxf(fminf(quick, grid.limit), -grid.limit);
    const float whole = quick + NO_FRACTION;
    near |= !(fabsf(quick - (whole - NO_FRACTION)) < NEAR_TIE);
    code[i] = __float_as_int(whole);
  }
  if (near) {
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      const float even = SMOOTH ? __fdiv_rn(v[i], smooth[i]) : v[i];
      code[i] = __float_as_int(rounded(__fdiv_rn(even, grid.scale), grid.limit));
    }
  }
  unsigned word[4];
#pragma unroll
  for (int i = 0; i < 4; i++) // the lowest byte of each, which is its code
    word[i] = __byte_perm(__byte_perm(code[4 * i], code[4 * i + 1], 0x0040),
                          __byte_perm(code[4 * i + 2], code[4 * i + 3], 0x0040), 0x5410);
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// What lies below the last row.
__device__ __forceinline__ void write_zeros(
    signed char* codes, float* scales, int row, int depth_pieces) {
  const int lane = threadIdx.x % 32;
  for (int c = lane; c < depth_pieces * (PIECE / CHUNK); c += 32)
    *reinterpret_cast<uint4*>(codes + chunk_place(row, c, depth_pieces)) = make_uint4(0, 0, 0, 0);
  if (lane == 0) scales[row] = 0.0f;
}

__device__ __forceinline__ float largest_of_warp(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
  return v;
}

__device__ __forceinline__ float scale_of_token(float largest, float limit) {
  return fmaxf(__fdiv_rn(largest, limit), 1e-12f);
}

// An entry's number; most often there is but one, and a 64-bit division is slow.
__device__ __forceinline__ int entry_of(int row, int entries, int rows) {
  return entries == 1 ? 0 : int((long long)(row) * entries / rows);
}

// GROUP chunks that a lane has of a row, side by side in registers.
template <bool WHOLE, int GROUP, class T>
struct Group {
  Words<T> words[WHOLE ? GROUP : 1];

  // From chunk c on, 32 chunks apart. All are on their way before any is waited for.
  __device__ __forceinline__ void load(const Strided<T>& line, int c, int columns) {
    if constexpr (WHOLE) {
#pragma unroll
      for (int g = 0; g < GROUP; g++)
        words[g] = whole_chunk(line.first, (c + 32 * g) * CHUNK, columns);
    }
  }

  __device__ __forceinline__ void give(
      float (&v)[CHUNK], int g, const Strided<T>& line, int c, int columns) const {
    if constexpr (WHOLE) spread(v, words[g]);
    else load_chunk(v, line, c * CHUNK, columns);
  }
};

// Entry e of the grids holds for rows / entries rows. TOKEN: the scale is the row's own largest
// value over the limit instead. A row with a NaN in it (TOKEN: or infinity) gets the scale NaN;
// rows beyond the last get zeros. WHOLE: x is `in_chunks`, and the grids' vectors lie side by side.
template <bool WHOLE, bool TOKEN, bool SHIFT, bool SMOOTH, class T>
__device__ __forceinline__ void quantize_rows(
    const Lines<T>& x, const Grids& grids, signed char* codes, float* scales, int rows,
    int columns) {
  // As many as leave registers for three blocks a multiprocessor.
  constexpr int GROUP = !WHOLE || (SHIFT && SMOOTH) ? 1 : SHIFT || SMOOTH || sizeof(T) == 4 ? 2 : 4;
  const float infinity = __int_as_float(0x7f800000);
  const int lane = threadIdx.x % 32;
  const int row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / 32;
  const int depth_pieces = (columns + PIECE - 1) / PIECE, chunks = depth_pieces * (PIECE / CHUNK);
  if (row >= rows) {
    write_zeros(codes, scales, row, depth_pieces);
    return;
  }
  // Divisions are slow, and most often there is but one entry.
  const Strided<T> line = {
      x.rows == rows ? x.first + row * x.row : x.at(row), WHOLE ? 1 : x.column};
  const int entry = entry_of(row, grids.entries, rows);
  const Strided<float> shift = {
      grids.shifts.first + (grids.shift_entries > 1 ? entry * grids.shift : 0),
      WHOLE ? 1 : grids.shifts.apart};
  const Strided<float> smoothing = {grids.smoothing.first, WHOLE ? 1 : grids.smoothing.apart};
  Grid grid;
  grid.scale = grids.scales.first[entry * grids.scales.apart];
  grid.limit = grids.limits.first[entry * grids.limits.apart];
  float v[CHUNK], smooth[CHUNK];
  Group<WHOLE, GROUP, T> group;
  bool broken = false;
  if constexpr (TOKEN) {
    float largest = 0.0f;
#pragma unroll 1
    for (int begin = lane; begin < chunks; begin += 32 * GROUP) {
      group.load(line, begin, columns);
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        const int c = begin + 32 * g;
        group.give(v, g, line, c, columns);
        change_input<SHIFT, SMOOTH>(v, smooth, shift, smoothing, c * CHUNK, columns);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) {
          const float size = fabsf(SMOOTH ? __fdiv_rn(v[i], smooth[i]) : v[i]);
          broken |= !(size < infinity);
          largest = fmaxf(largest, size);
        }
      }
    }
    grid.scale = scale_of_token(largest_of_warp(largest), grid.limit);
  }
  grid.inverse = __frcp_rn(grid.scale);
  broken |= !(grid.inverse < infinity); // of a scale too small to divide by
#pragma unroll 1
  for (int begin = lane; begin < chunks; begin += 32 * GROUP) {
    group.load(line, begin, columns);
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      const int c = begin + 32 * g;
      if (c >= chunks) break;
      group.give(v, g, line, c, columns);
      change_input<SHIFT, SMOOTH>(v, smooth, shift, smoothing, c * CHUNK, columns);
      if (!TOKEN) {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) broken |= v[i] != v[i];
      }
      *reinterpret_cast<uint4*>(codes + chunk_place(row, c, depth_pieces)) =
          codes_of<SMOOTH>(v, smooth, grid);
    }
  }
  broken = __any_sync(~0u, broken);
  if (lane == 0) scales[row] = broken ? __int_as_float(0x7fc00000) : grid.scale;
}

// Eight 4-bit numbers, each a code raised by 8, as two words of four codes.
__device__ __forceinline__ uint2 codes_of_nibbles(unsigned word) {
  const unsigned even = word & 0x0f0f0f0f, odd = (word >> 4) & 0x0f0f0f0f;
  const unsigned low = __byte_perm(even, odd, 0x5140), high = __byte_perm(even, odd, 0x7362);
  // Subtracts 8 from each byte: the bit on top keeps a byte from borrowing of the next.
  return make_uint2(
      ((low | 0x80808080) - 0x08080808) ^ 0x80808080,
      ((high | 0x80808080) - 0x08080808) ^ 0x80808080);
}

// MLX's packing of BITS (4 or 8) to tiles, one thread a chunk of the tiles, which are whole blocks;
// what is beyond the weight is zero.
template <int BITS>
__device__ __forceinline__ void unpack_weight(
    const unsigned* packed, signed char* tiles, int rows, int words_per_row) {
  constexpr int WORDS = CHUNK * BITS / 32;
  const int depth_pieces = (words_per_row * 32 / BITS + PIECE - 1) / PIECE;
  const int chunks = depth_pieces * (PIECE / CHUNK);
  const size_t thread = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int row = int(thread / chunks), chunk = int(thread % chunks);
  uint4 codes = make_uint4(0, 0, 0, 0);
  if (row < rows && (chunk + 1) * WORDS <= words_per_row) {
    const unsigned* word = packed + size_t(row) * words_per_row + chunk * WORDS;
    if constexpr (BITS == 4) {
      const uint2 low = codes_of_nibbles(word[0]), high = codes_of_nibbles(word[1]);
      codes = make_uint4(low.x, low.y, high.x, high.y);
    } else {
      codes = make_uint4(word[0] ^ 0x80808080, word[1] ^ 0x80808080, word[2] ^ 0x80808080,
                         word[3] ^ 0x80808080);
    }
  }
  *reinterpret_cast<uint4*>(tiles + chunk_place(row, chunk, depth_pieces)) = codes;
}

} // namespace ditq
