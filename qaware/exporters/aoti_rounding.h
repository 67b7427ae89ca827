// Activations as int8 numbers, each token (row) by itself, for CPUs with AVX512.
#ifndef QAWARE_ROUNDING
#define QAWARE_ROUNDING

#include <immintrin.h>

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace qaware {

enum class Activation { none, int8_dynamic, int8_static };

inline __mmask16 is_nan(__m512 x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }

// x * inverse to the nearest integer, plus the zero point, within 8 bits.
inline void round_to_grid(const float* x, int64_t width, float inverse, float zero, int8_t* to) {
  const __m512 factor = _mm512_set1_ps(inverse), shift = _mm512_set1_ps(zero);
  const __m512 low = _mm512_set1_ps(-128.f), high = _mm512_set1_ps(127.f);
  for (int64_t k = 0; k < width; k += 16) {
    const __mmask16 mask = first(width - k);
    __m512 y = nearest(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + k), factor));
    y = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(y, shift), low), high);
    _mm_mask_storeu_epi8(to + k, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(y)));
  }
}

// An asymmetric range that holds zero, as torchao's choose_qparams_affine chooses it.
inline void round_dynamically(const float* x, int64_t width, float* scale, int32_t* zero, int8_t* to) {
  __m512 least = _mm512_setzero_ps(), most = _mm512_setzero_ps();
  __mmask16 wrong = 0;
  for (int64_t k = 0; k < width; k += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(first(width - k), x + k);
    least = _mm512_min_ps(least, value);
    most = _mm512_max_ps(most, value);
    wrong |= is_nan(value);
  }
  const float low = _mm512_reduce_min_ps(least), high = _mm512_reduce_max_ps(most);
  const float step = std::fmax((high - low) / 255.f, FLT_MIN);
  *scale = wrong ? NAN : step;
  *zero = static_cast<int32_t>(std::fmin(std::fmax(-128.f - std::nearbyint(low / step), -128.f), 127.f));
  round_to_grid(x, width, 1.f / step, static_cast<float>(*zero), to);
}

// 16 bits in two digits of 8, symmetric: 256 * high + low.
inline void round_to_digits(const float* x, int64_t width, float* scale, int8_t* high, int8_t* low) {
  __m512 most = _mm512_set1_ps(0x1p-100f);
  __mmask16 wrong = 0;
  for (int64_t k = 0; k < width; k += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(first(width - k), x + k);
    most = _mm512_max_ps(most, _mm512_abs_ps(value));
    wrong |= is_nan(value);
  }
  const float largest = _mm512_reduce_max_ps(most) / 32639.f;
  *scale = wrong ? NAN : largest;
  const __m512 step = _mm512_set1_ps(largest);
  for (int64_t k = 0; k < width; k += 16) {
    const __mmask16 mask = first(width - k);
    const __m512i y = _mm512_cvtps_epi32(nearest(_mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + k), step)));
    const __m512i digit = _mm512_srai_epi32(_mm512_add_epi32(y, _mm512_set1_epi32(128)), 8);
    _mm_mask_storeu_epi8(high + k, mask, _mm512_cvtepi32_epi8(digit));
    _mm_mask_storeu_epi8(low + k, mask, _mm512_cvtepi32_epi8(_mm512_sub_epi32(y, _mm512_slli_epi32(digit, 8))));
  }
}

}  // namespace qaware
#endif
