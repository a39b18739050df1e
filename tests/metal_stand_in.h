// What of Metal and of its matrix products the kernels use, for one thread at a time on a CPU.
//
// Which thread holds which sum is drawn by STAND_IN_SEED, some of what a thread holds belongs
// nowhere, and what Metal leaves undefined ends the program.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <pthread.h>
#include <thread>
#include <vector>

#define device
#define constant

[[noreturn]] inline void undefined(const char* what) {
  std::fprintf(stderr, "undefined in Metal: %s\n", what);
  std::abort();
}
inline void require(bool sound, const char* what) {
  if (!sound) undefined(what);
}

using uint = unsigned;
struct uint3 {
  uint x, y, z;
};
using float16_t = _Float16;

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t whole;
    std::memcpy(&whole, &value, 4);
    bits = std::isnan(value) ? 0x7fc0 : (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
  }
  operator float() const {
    const uint32_t whole = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &whole, 4);
    return value;
  }
};

namespace stand_in {

constexpr int LANES = 32;
inline thread_local int lane, place, threads; // of a simdgroup, of a threadgroup; its threads
inline pthread_barrier_t together;
inline float values[LANES];

// All lanes' values, put together.
template <class F>
float over_lanes(float mine, F join) {
  values[lane] = mine;
  pthread_barrier_wait(&together);
  float all = values[0];
  for (int i = 1; i < LANES; i++) all = join(all, values[i]);
  pthread_barrier_wait(&together);
  return all;
}

} // namespace stand_in

namespace metal {

inline float rint(float v) { return __builtin_rintf(v); } // ties to even
inline float fabs(float v) { return __builtin_fabsf(v); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float clamp(float v, float low, float high) { return __builtin_fminf(max(v, low), high); }
inline bool isnan(float v) { return v != v; }
inline float simd_max(float v) { return stand_in::over_lanes(v, max); }
inline bool simd_any(bool v) {
  return stand_in::over_lanes(v, [](float a, float b) { return a + b; }) > 0;
}

constexpr size_t dynamic_extent = size_t(-1);
template <int N>
struct execution_simdgroups {
  static constexpr int simdgroups = N;
};
struct tensor_inline {};

template <class Index, int RANK>
struct dextents {
  Index size[2];
  dextents(Index inner, Index outer) : size{inner, outer} {}
};

// Extents stay those of the whole when a slice moves the origin.
template <class T, class Extents, class Kind>
struct tensor {
  T* data;
  Extents extents;
  int origin[2] = {0, 0};
  tensor(T* data, Extents extents) : data(data), extents(extents) {}
  tensor slice(int inner, int outer) const {
    tensor moved = *this;
    moved.origin[0] += inner, moved.origin[1] += outer;
    return moved;
  }
};

} // namespace metal

namespace mpp::tensor_ops {

struct matmul2d_descriptor {
  enum class mode { multiply, multiply_accumulate };
  int m, n, k;
  bool transpose_left, transpose_right, relaxed_precision;
  mode matmul_mode;
  constexpr matmul2d_descriptor(
      int m, int n, int k, bool left = false, bool right = false, bool relaxed = false,
      mode how = mode::multiply)
      : m(m), n(n), k(k), transpose_left(left), transpose_right(right),
        relaxed_precision(relaxed), matmul_mode(how) {}
};

template <matmul2d_descriptor D, class Scope>
struct matmul2d {
  static_assert(D.m % 16 == 0 && D.n % 16 == 0 && D.k == -1);
  static_assert(!D.transpose_left && D.transpose_right);
  static_assert(D.matmul_mode == matmul2d_descriptor::mode::multiply_accumulate);
  static constexpr int THREADS = 32 * Scope::simdgroups, SUMS = D.m * D.n / THREADS;

  // Every fourth of what a thread holds belongs nowhere.
  struct Sums {
    int32_t held[SUMS + SUMS / 3 + 1];
    bool set[SUMS + SUMS / 3 + 1] = {};
    static constexpr uint16_t get_capacity() { return SUMS + SUMS / 3 + 1; }
    static int number(uint16_t i) { return i - (i + 3) / 4; }
    static bool is_valid_element(uint16_t i) { return i % 4 != 0 && number(i) < SUMS; }
    int32_t& operator[](uint16_t i) {
      require(is_valid_element(i), "an element that belongs nowhere");
      set[i] = true;
      return held[i];
    }
    struct Place {
      int at[2];
      int operator[](int axis) const { return at[axis]; }
    };
    Place get_multidimensional_index(uint16_t i) const {
      require(is_valid_element(i), "the place of an element that belongs nowhere");
      const long all = long(number(i)) * THREADS + stand_in::place;
      const int mixed = int((all * (2 * STAND_IN_SEED + 1) + STAND_IN_SEED) % (D.m * D.n));
      return {mixed % D.n, mixed / D.n};
    }
  };

  template <class Left, class Right, class Sum>
  Sums get_destination_cooperative_tensor() const {
    return {};
  }

  template <class Left, class Right>
  void run(const Left& left, const Right& right, Sums& sums) const {
    require(stand_in::threads == THREADS, "another number of simdgroups");
    const int depth = left.extents.size[0];
    require(depth % 32 == 0 && right.extents.size[0] == depth, "depths");
    for (uint16_t i = 0; i < sums.get_capacity(); i++) {
      if (!sums.is_valid_element(i)) continue;
      require(sums.set[i], "a sum that was not begun");
      const auto place = sums.get_multidimensional_index(i);
      const long row = left.origin[1] + place[1], column = right.origin[1] + place[0];
      require(row < left.extents.size[1] && column < right.extents.size[1], "beyond a matrix");
      const int8_t *a = left.data + row * depth, *b = right.data + column * depth;
      int32_t sum = 0;
      for (int k = 0; k < depth; k++) sum += int32_t(a[k]) * b[k];
      sums.held[i] += sum;
    }
  }
};

} // namespace mpp::tensor_ops

using namespace metal;

namespace stand_in {

// Calls `work` once for every thread of the grid; threads of a simdgroup run at the same time.
template <class F>
void each_thread(const uint* grid, const uint* group, F work) {
  pthread_barrier_init(&together, nullptr, LANES);
  std::vector<std::thread> lanes;
  for (int mine = 0; mine < LANES; mine++) {
    lanes.emplace_back([=] {
      lane = mine, threads = group[0] * group[1] * group[2];
      require(threads % LANES == 0 && group[1] == 1 && group[2] == 1, "rows of threads only");
      for (uint y = 0; y < grid[1]; y++)
        for (uint first = 0; first < grid[0]; first += LANES) {
          const uint x = first + mine;
          place = x % group[0];
          work(uint3{x, y, 0}, uint3{x / group[0], y, 0}, uint(mine));
        }
    });
  }
  for (auto& each : lanes) each.join();
  pthread_barrier_destroy(&together);
}

} // namespace stand_in
