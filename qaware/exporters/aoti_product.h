// Products of activations, as int8 numbers, with packed integer weights, for CPUs with AVX512-VNNI.
//
// A weight of `bits` is stored as unsigned codes, in blocks of 16 rows. 64 bytes of a block hold, for each of
// its rows, 4 bytes of 8 / bits codes each, the first 4 columns in the lowest bits. One vector instruction
// then multiplies 4 columns of 16 rows with 4 numbers of a token. The sums of a group are exact integers;
// they are scaled and added in float32.
#ifndef QAWARE_PRODUCT
#define QAWARE_PRODUCT

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <memory>

namespace qaware {

constexpr int LANES = 16;
// Activation rows of one tile: with 2 blocks of weights their sums stay in the 32 vector registers.
constexpr int TILE = 5;

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline __m512 floats(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 floats(const Bfloat16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline __m512 floats(const Float16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m512 floats(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline __m512i four(const int8_t* from) {
  int32_t value;
  std::memcpy(&value, from, 4);
  return _mm512_set1_epi32(value);
}

template <typename Scale>
struct Weight {
  const uint8_t* codes;  // (blocks, width * bits / 32, 64)
  const Scale* scale;    // (blocks, groups, 16)
  const int8_t* zero;    // (blocks, groups, 16), or null
  const float* sums;     // (rows): of the weight's values; null where no token has a zero point
  int64_t rows, width, group, groups;
};

// How activations are rounded; scale and zero point are those of a static range.
struct Rounding {
  Activation activation;
  float scale, inverse;
  int32_t zero;
};

struct Tokens {
  int8_t* values;  // (digits, count, width)
  int32_t* sums;   // (digits, count, groups): of a group's values, times `shift`
  float* scale;    // (count)
  int32_t* zero;   // (count), or null
  int64_t count;
  bool streams;          // whether the result is too large to be kept in a cache
};

// Floats of a result that goes to memory past the caches, which stores of many long rows evict in turn.
constexpr int64_t LARGE = 1 << 18;

// What is compiled for one layer: GROUP is 0 where a group is long. A value of the weight is (code - zero - OFFSET / 2) * STEP * scale.
template <int BITS_, int DIGITS_, int GROUP_, int OFFSET_, int STEP_, bool ZEROS_>
struct Form {
  static constexpr int BITS = BITS_, DIGITS = DIGITS_, GROUP = GROUP_, OFFSET = OFFSET_, STEP = STEP_;
  static constexpr bool ZEROS = ZEROS_;
  // Whether the offset is subtracted in integers.
  static constexpr bool EXACT = !ZEROS && OFFSET % 2 == 0;
  static constexpr int SHIFT = EXACT ? -OFFSET / 2 : 1;
};

template <int BITS>
inline void unpacked(const uint8_t* from, __m512i (&to)[8 / BITS]) {
  const __m512i both = _mm512_loadu_si512(from);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
#pragma GCC unroll 8
  for (int i = 0; i < 8 / BITS; ++i)
    to[i] = BITS == 8 ? both : _mm512_and_si512(_mm512_srli_epi16(both, i * BITS), mask);
}

// The sums of R rows of tokens with N blocks of the weight, scaled by the weight's scales.
template <typename F, int BITS, int R, int N, typename Scale>
inline void multiply(const int8_t* const (&x)[R], const int32_t* const (&sums)[R],
                     const uint8_t* const (&codes)[N], const Weight<Scale>& w, int64_t block,
                     __m512 (&total)[N][R]) {
  constexpr int PARTS = 8 / BITS;
  const int64_t group = F::GROUP ? F::GROUP : w.group;
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) total[n][r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i sum[N][R];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[n][r] = F::EXACT ? _mm512_set1_epi32(sums[r][g]) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int64_t k = g * group; k < (g + 1) * group; k += 4 * PARTS) {
      __m512i part[N][PARTS];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        unpacked<BITS>(codes[n] + k * 16 / PARTS, part[n]);
        // One token reads each weight once, and the hardware looks ahead no further than a page.
        if constexpr (R <= 2) _mm_prefetch(codes[n] + k * 16 / PARTS + N * 16 * w.width / PARTS, _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int i = 0; i < PARTS; ++i)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m512i value = four(x[r] + k + 4 * i);
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) sum[n][r] = _mm512_dpbusd_epi32(sum[n][r], part[n][i], value);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const int64_t at = ((block + n) * w.groups + g) * LANES;
      const __m512 scale = floats(w.scale + at);
      __m512 offset = _mm512_set1_ps(F::OFFSET * 0.5f);
      if constexpr (F::ZEROS) offset = _mm512_add_ps(offset, floats(w.zero + at));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        __m512 y = _mm512_cvtepi32_ps(sum[n][r]);
        if constexpr (!F::EXACT)
          y = _mm512_fnmadd_ps(offset, _mm512_set1_ps(static_cast<float>(sums[r][g])), y);
        total[n][r] = _mm512_fmadd_ps(scale, y, total[n][r]);
      }
    }
  }
}

// C tokens by N blocks of the result: (sum - zero point of the token * sum of the row) * scale of the token.
template <typename F, int BITS, int C, int N, typename Scale>
inline void tile(const Tokens& t, int64_t m, const uint8_t* const (&codes)[N], const Weight<Scale>& w,
                 int64_t block, float* out) {
  constexpr int R = C * F::DIGITS;
  const int8_t* x[R];
  const int32_t* sums[R];
  for (int r = 0; r < R; ++r) {
    const int64_t at = (r % F::DIGITS) * t.count + m + r / F::DIGITS;
    x[r] = t.values + at * w.width;
    sums[r] = t.sums + at * w.groups;
  }
  __m512 total[N][R];
  multiply<F, BITS>(x, sums, codes, w, block, total);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    const int64_t row = (block + n) * LANES, left = w.rows - row;
    const __mmask16 mask = left >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << left) - 1);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      __m512 y = total[n][c * F::DIGITS];
      if constexpr (F::DIGITS == 2) y = _mm512_fmadd_ps(y, _mm512_set1_ps(256.f), total[n][c * 2 + 1]);
      if constexpr (F::STEP > 1) y = _mm512_mul_ps(y, _mm512_set1_ps(F::STEP));
      if (t.zero)
        y = _mm512_fnmadd_ps(_mm512_set1_ps(static_cast<float>(t.zero[m + c])),
                             _mm512_maskz_loadu_ps(mask, w.sums + row), y);
      y = _mm512_mul_ps(y, _mm512_set1_ps(t.scale[m + c]));
      float* to = out + (m + c) * w.rows + row;
      if (t.streams)
        _mm512_stream_ps(to, y);
      else
        _mm512_mask_storeu_ps(to, mask, y);
    }
  }
}

template <typename F, int BITS, int N, typename Scale>
inline void every_token(const Tokens& t, const uint8_t* const (&codes)[N], const Weight<Scale>& w,
                        int64_t block, float* out) {
  constexpr int MANY = TILE / F::DIGITS;
  int64_t m = 0;
  for (; m + MANY <= t.count; m += MANY) tile<F, BITS, MANY>(t, m, codes, w, block, out);
  for (; m + 2 <= t.count; m += 2) tile<F, BITS, 2>(t, m, codes, w, block, out);
  for (; m < t.count; ++m) tile<F, BITS, 1>(t, m, codes, w, block, out);
}

// N blocks of the weight; with many tokens its codes are unpacked once, to bytes that stay in the cache.
template <typename F, int N, typename Scale>
inline void blocks(const Tokens& t, const Weight<Scale>& w, int64_t block, float* out, uint8_t* scratch) {
  const int64_t size = LANES * w.width, packed = size * F::BITS / 8;
  const uint8_t* codes[N];
  for (int n = 0; n < N; ++n) codes[n] = w.codes + (block + n) * packed;
  if (F::BITS == 8 || t.count * F::DIGITS <= TILE) {
    every_token<F, F::BITS>(t, codes, w, block, out);
    return;
  }
  constexpr int PARTS = 8 / F::BITS;
  for (int n = 0; n < N; ++n) {
    for (int64_t at = 0; at < packed; at += 64) {
      __m512i part[PARTS];
      unpacked<F::BITS>(codes[n] + at, part);
      _mm_prefetch(codes[n] + at + N * packed, _MM_HINT_T1);
      for (int i = 0; i < PARTS; ++i) _mm512_storeu_si512(scratch + n * size + at * PARTS + i * 64, part[i]);
    }
    codes[n] = scratch + n * size;
  }
  every_token<F, 8>(t, codes, w, block, out);
}

inline int32_t sum_of(const int8_t* values, int64_t count) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += 64) {
    const __mmask64 mask = count - k >= 64 ? ~0ull : (1ull << (count - k)) - 1;
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(mask, values + k));
  }
  return _mm512_reduce_add_epi32(sum);
}

// One token: its numbers, and the sum of each group of them.
template <typename F, typename Scale>
inline void round_token(const float* x, const Rounding& how, const Tokens& t, int64_t m, const Weight<Scale>& w) {
  int8_t* const values = t.values + m * w.width;
  if (F::DIGITS == 2) {
    round_to_digits(x, w.width, t.scale + m, values, values + t.count * w.width);
  } else if (how.activation == Activation::int8_dynamic) {
    round_dynamically(x, w.width, t.scale + m, t.zero + m, values);
  } else {
    t.scale[m] = how.scale;
    t.zero[m] = how.zero;
    round_to_grid(x, w.width, how.inverse, static_cast<float>(how.zero), values);
  }
  for (int64_t digit = 0; digit < F::DIGITS; ++digit)
    for (int64_t g = 0; g < w.groups; ++g)
      t.sums[(digit * t.count + m) * w.groups + g] =
          F::SHIFT * sum_of(values + digit * t.count * w.width + g * w.group, w.group);
}

// float32 (count, rows) of float32 (count, width).
template <typename F, typename Scale>
void product(const float* x, int64_t count, const Rounding& how, const Weight<Scale>& w, float* out) {
  std::unique_ptr<int8_t[]> values(new int8_t[F::DIGITS * count * w.width]);
  std::unique_ptr<int32_t[]> sums(new int32_t[F::DIGITS * count * w.groups]), zero(new int32_t[count]);
  std::unique_ptr<float[]> scale(new float[count]);
  const bool streams = count * w.rows > LARGE && w.rows % LANES == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  const Tokens t{values.get(), sums.get(), scale.get(), F::DIGITS == 1 ? zero.get() : nullptr, count, streams};
  each(count, 0, true, [&](int64_t m, uint8_t*) { round_token<F>(x + m * w.width, how, t, m, w); });
  each((w.rows + 2 * LANES - 1) / (2 * LANES), 2 * LANES * w.width, true, [&](int64_t pair, uint8_t* scratch) {
    if (w.rows - 2 * LANES * pair > LANES)
      blocks<F, 2>(t, w, 2 * pair, out, scratch);
    else
      blocks<F, 1>(t, w, 2 * pair, out, scratch);
    if (streams) _mm_sfence();
  });
}

}  // namespace qaware
#endif
