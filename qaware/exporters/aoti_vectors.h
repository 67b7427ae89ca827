// What the kernels share.
#ifndef QAWARE_VECTORS
#define QAWARE_VECTORS

#include <immintrin.h>

#include <omp.h>

#include <cstdint>
#include <memory>

namespace qaware {

// The first `count` of 16 lanes.
inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1);
}

inline __m512 nearest(__m512 x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// work(i, scratch) for each i below `count`, on all threads; `scratch` is of `bytes`, each thread's own.
// Neighbours, which prefetch each other's data, stay on a thread where all take as long (`even`).
template <typename Work>
void each(int64_t count, int64_t bytes, bool even, const Work& work) {
  const int64_t threads = omp_get_max_threads(), chunk = even ? (count + threads - 1) / threads : 1;
  // A team of one still calls the kernel at each barrier, which takes as long as a small layer.
  if (count == 1 || threads == 1) {
    std::unique_ptr<uint8_t[]> scratch(new uint8_t[bytes]);
    for (int64_t i = 0; i < count; ++i) work(i, scratch.get());
    return;
  }
#pragma omp parallel
  {
    std::unique_ptr<uint8_t[]> scratch(new uint8_t[bytes]);
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < count; ++i) work(i, scratch.get());
  }
}

}  // namespace qaware
#endif
