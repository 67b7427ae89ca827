// Causal attention of a few heads that share keys and values, in float32, for CPUs with AVX512.
//
// The keys are turned into blocks of 16, so that one vector instruction multiplies a number of a query with
// 16 keys. Several rows, which are queries of neighbouring tokens and of heads with the same keys, are
// computed together, and no key is read that none of them sees.
#ifndef QAWARE_ATTENTION
#define QAWARE_ATTENTION

#include <immintrin.h>

#include <cstdint>
#include <memory>

namespace qaware {

struct Heads {
  const float* query;      // (tokens, heads, dim)
  const float* keys;       // (kv_heads, held, dim)
  const float* values;     // (kv_heads, held, out_dim)
  const int64_t* positions;  // (tokens): of the last key that a token sees
  int64_t tokens, heads, kv_heads, held, dim, out_dim;
  float scale;
};

// 16 rows, those from `rows` on as zeros, of 16 columns.
inline void transpose(const float* from, int64_t stride, int64_t rows, float* to) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? _mm512_loadu_ps(from + i * stride) : _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; ++i) {
    const __m512d a = _mm512_castps_pd(t[i / 4 * 4 + i % 4 / 2]), b = _mm512_castps_pd(t[i / 4 * 4 + i % 4 / 2 + 2]);
    r[i] = _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    const __m512 c = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD), d = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
    _mm512_storeu_ps(to + 16 * i, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(to + 16 * (i + 4), _mm512_shuffle_f32x4(c, d, 0x88));
    _mm512_storeu_ps(to + 16 * (i + 8), _mm512_shuffle_f32x4(a, b, 0xDD));
    _mm512_storeu_ps(to + 16 * (i + 12), _mm512_shuffle_f32x4(c, d, 0xDD));
  }
}

// e^x for x <= 0: 2^n times a polynomial of the rest, whose error is below that of float32.
inline __m512 exponential(__m512 x) {
  const __m512 n = nearest(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)));
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 y = _mm512_set1_ps(1.f / 5040);
  for (const float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// Products of R queries with the first `most` keys of (blocks, dim, 16).
template <int R>
inline void score(const float* const (&query)[R], const float* keys, int64_t dim, int64_t most, float scale,
                  float* scores, int64_t stride) {
  for (int64_t at = 0; at < most; at += 32) {
    const float* left = keys + at * dim;
    // The second block may not exist; its scores are not looked at then.
    const float* right = at + 16 < most ? left + 16 * dim : left;
    __m512 a[R], b[R];
    for (int r = 0; r < R; ++r) a[r] = b[r] = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; ++d) {
      const __m512 x = _mm512_loadu_ps(left + 16 * d), y = _mm512_loadu_ps(right + 16 * d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 q = _mm512_set1_ps(query[r][d]);
        a[r] = _mm512_fmadd_ps(q, x, a[r]);
        b[r] = _mm512_fmadd_ps(q, y, b[r]);
      }
    }
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_ps(scores + r * stride + at, _mm512_mul_ps(a[r], _mm512_set1_ps(scale)));
      _mm512_storeu_ps(scores + r * stride + at + 16, _mm512_mul_ps(b[r], _mm512_set1_ps(scale)));
    }
  }
}

// e^(score - largest) of those `seen`, zeros up to `most`; returns their sum.
inline float exponentials(float* scores, int64_t seen, int64_t most) {
  __m512 largest = _mm512_set1_ps(scores[0]);
  for (int64_t at = 0; at < seen; at += 16)
    largest = _mm512_mask_max_ps(largest, first(seen - at), largest, _mm512_loadu_ps(scores + at));
  const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t at = 0; at < most; at += 16) {
    __m512 y = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + at), shift));
    y = _mm512_maskz_mov_ps(first(seen - at), y);
    _mm512_storeu_ps(scores + at, y);
    sum = _mm512_add_ps(sum, y);
  }
  return _mm512_reduce_add_ps(sum);
}

// C * 16 columns of the weighted means of the first `most` values.
template <int R, int C>
inline void average(const float* scores, int64_t stride, const float (&sum)[R], const float* values, int64_t width,
                    int64_t most, float* const (&out)[R]) {
  __m512 total[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) total[r][c] = _mm512_setzero_ps();
  for (int64_t k = 0; k < most; ++k) {
    __m512 value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = _mm512_loadu_ps(values + k * width + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 p = _mm512_set1_ps(scores[r * stride + k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) total[r][c] = _mm512_fmadd_ps(p, value[c], total[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      _mm512_storeu_ps(out[r] + 16 * c, _mm512_div_ps(total[r][c], _mm512_set1_ps(sum[r])));
}

// R rows from `row` on of the queries of one head of keys: heads of a token follow one another.
template <int R>
inline void attend_rows(const Heads& h, int64_t head, int64_t row, const float* keys, float* scores, int64_t stride,
                        float* out) {
  const int64_t shared = h.heads / h.kv_heads;
  const float* query[R];
  float* to[R];
  int64_t seen[R], most = 0;
  for (int r = 0; r < R; ++r) {
    const int64_t token = (row + r) / shared, at = token * h.heads + head * shared + (row + r) % shared;
    query[r] = h.query + at * h.dim;
    to[r] = out + at * h.out_dim;
    seen[r] = h.positions[token] + 1;
    most = seen[r] > most ? seen[r] : most;
  }
  score<R>(query, keys, h.dim, most, h.scale, scores, stride);
  float sum[R];
  for (int r = 0; r < R; ++r) sum[r] = exponentials(scores + r * stride, seen[r], most);
  const float* values = h.values + head * h.held * h.out_dim;
  int64_t column = 0;
  for (; column + 64 <= h.out_dim; column += 64) {
    average<R, 4>(scores, stride, sum, values + column, h.out_dim, most, to);
    for (int r = 0; r < R; ++r) to[r] += 64;
  }
  for (; column < h.out_dim; column += 16) {
    average<R, 1>(scores, stride, sum, values + column, h.out_dim, most, to);
    for (int r = 0; r < R; ++r) to[r] += 16;
  }
}

// float32 (tokens, heads, out_dim).
inline void attend(const Heads& h, float* out) {
  int64_t most = 0;
  for (int64_t i = 0; i < h.tokens; ++i) most = h.positions[i] + 1 > most ? h.positions[i] + 1 : most;
  const int64_t blocks = (most + 15) / 16, stride = (blocks + 1) * 16, size = blocks * 16 * h.dim;
  const int64_t rows = h.tokens * (h.heads / h.kv_heads), tiles = (rows + 5) / 6;
  std::unique_ptr<float[]> keys(new float[h.kv_heads * size]);
  each(h.kv_heads * blocks, 0, true, [&](int64_t i, uint8_t*) {
    const int64_t head = i / blocks, at = i % blocks * 16;
    const float* from = h.keys + (head * h.held + at) * h.dim;
    for (int64_t d = 0; d < h.dim; d += 16) {
      transpose(from + d, h.dim, h.held - at, keys.get() + head * size + at * h.dim + d * 16);
      for (int j = 16; j < 32; ++j) _mm_prefetch(from + d + j * h.dim, _MM_HINT_T0);
    }
  });
  each(h.kv_heads * tiles, 6 * stride * sizeof(float), false, [&](int64_t i, uint8_t* scratch) {
    // The last tokens see most.
    const int64_t head = i % h.kv_heads, end = (tiles - i / h.kv_heads) * 6;
    const float* from = keys.get() + head * size;
    float* scores = reinterpret_cast<float*>(scratch);
    int64_t row = end - 6;
    if (end <= rows) {
      attend_rows<6>(h, head, row, from, scores, stride, out);
      return;
    }
    for (; row + 2 <= rows; row += 2) attend_rows<2>(h, head, row, from, scores, stride, out);
    for (; row < rows; ++row) attend_rows<1>(h, head, row, from, scores, stride, out);
  });
}

}  // namespace qaware
#endif
