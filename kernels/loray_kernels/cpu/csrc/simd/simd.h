// Vectors of W floats for the instruction set that this file is compiled for: AVX-512 with BF16, AVX2, or any.
//
// The same sources are compiled once for each instruction set, each time in another namespace, so that the linker never
// takes a function of one instruction set for that of another.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__AVX512BF16__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#define LORAY_JOIN_(a, b) a##b
#define LORAY_JOIN(a, b) LORAY_JOIN_(a, b)
#define LORAY_NAMESPACE LORAY_JOIN(loray_, LORAY_ISA)
// A function that Python calls: its name ends with that of the instruction set.
#define LORAY_ENTRY(name) extern "C" __attribute__((visibility("default"))) void LORAY_JOIN(name, LORAY_ISA)

namespace LORAY_NAMESPACE {

using i64 = int64_t;

struct bf16 {
    uint16_t bits;
};

template <class F, int... I>
static inline void each_(F f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
// f(0) to f(N - 1), with constants: elements of an array that these index stay in registers, which a compiler may fail to
// see in nested loops.
template <int N, class F>
static inline void each(F f) {
    each_(f, std::make_integer_sequence<int, N>{});
}

static inline float to_float(float x) { return x; }
static inline float to_float(int8_t x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest even; a NaN stays one.
static inline bf16 round_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

static inline i64 min_(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 max_(i64 a, i64 b) { return a > b ? a : b; }
static constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

#if defined(__AVX512BF16__)

constexpr int W = 16;
using Vec = __m512;

static inline Vec set1(float x) { return _mm512_set1_ps(x); }
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline Vec widen_(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static inline Vec load(const bf16* p) { return widen_(_mm256_loadu_si256((const __m256i*)p)); }
static inline Vec load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static inline __mmask16 first_(i64 n) { return __mmask16((1u << n) - 1); }
// The first n < W elements, zeros after them.
static inline Vec load_n(const float* p, i64 n) { return _mm512_maskz_loadu_ps(first_(n), p); }
static inline Vec load_n(const bf16* p, i64 n) { return widen_(_mm256_maskz_loadu_epi16(first_(n), p)); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline void store(bf16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
static inline void store_n(float* p, Vec v, i64 n) { _mm512_mask_storeu_ps(p, first_(n), v); }
static inline void store_n(bf16* p, Vec v, i64 n) {
    _mm256_mask_storeu_epi16(p, first_(n), (__m256i)_mm512_cvtneps_pbh(v));
}
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
static inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }
// p · 2ⁿ for whole n
static inline Vec scale2(Vec p, Vec n) { return _mm512_scalef_ps(p, n); }
// The two bf16 of each lane, widened.
static inline Vec lower(Vec two) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(two), 16)); }
static inline Vec upper(Vec two) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(two), _mm512_set1_epi32(int(0xffff0000))));
}
// The n-th int8 of each lane.
template <int n>
static inline Vec byte(Vec four) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(_mm512_castps_si512(four), 24 - 8 * n), 24));
}
// x where a bit is set, in order from the lowest, and `other` elsewhere
static inline Vec where(uint32_t bits, Vec x, Vec other) { return _mm512_mask_blend_ps(__mmask16(bits), other, x); }

#elif defined(__AVX2__)

constexpr int W = 8;
using Vec = __m256;

static inline Vec set1(float x) { return _mm256_set1_ps(x); }
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline Vec load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline Vec load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline void store(bf16* p, Vec v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i even = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    __m256i rounded = _mm256_blendv_epi8(even, nan, is_nan);
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline float sum(Vec v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
static inline float largest(Vec v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static inline Vec scale2(Vec p, Vec n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return p * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
static inline Vec lower(Vec two) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(two), 16)); }
static inline Vec upper(Vec two) { return _mm256_and_ps(two, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000)))); }
template <int n>
static inline Vec byte(Vec four) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(_mm256_castps_si256(four), 24 - 8 * n), 24));
}
static inline Vec where(uint32_t bits, Vec x, Vec other) {
    const __m256i one = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i is_set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), one), one);
    return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(is_set));
}

#else

#include "generic.h"

#endif

#if !defined(__AVX512BF16__)
template <class T>
static inline Vec load_n(const T* p, i64 n) {
    T padded[W] = {};
    memcpy(padded, p, n * sizeof(T));
    return load(padded);
}
template <class T>
static inline void store_n(T* p, Vec v, i64 n) {
    T padded[W];
    store(padded, v);
    memcpy(p, padded, n * sizeof(T));
}
#endif

static inline Vec zero() { return set1(0.0f); }

// Vector registers: a product's tile has as many sums as they hold beside its factors.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

// f(i, n) for each vector of `num` elements, from element i: n is Whole, or the number of elements left for the last
// vector. Masked accesses are slow.
struct Whole {};
template <class T>
static inline Vec load_n(const T* p, Whole) {
    return load(p);
}
template <class T>
static inline void store_n(T* p, Vec v, Whole) {
    store(p, v);
}
template <class F>
static inline void vectors(i64 num, F f) {
    i64 i = 0;
    for (; i + W <= num; i += W) f(i, Whole{});
    if (i < num) f(i, num - i);
}

// `v` rounded to T.
static inline Vec rounded(Vec v, const float*) { return v; }
static inline Vec rounded(Vec v, const bf16*) {
#if defined(__AVX512BF16__)
    return widen_((__m256i)_mm512_cvtneps_pbh(v));
#elif defined(__AVX2__)
    bf16 narrow[W];
    store(narrow, v);
    return load(narrow);
#else
    return (Vec)(rounded_(v) & 0xffff0000);
#endif
}

// eˣ for x ≤ 0, −∞ included, to two units in the last place (Cephes' polynomial); exactly 1 at 0. A NaN stays one.
static inline Vec exp(Vec x) {
    const Vec lowest = set1(-87.0f);
    Vec y = max(lowest, x);  // in this order, so that a NaN stays one
    const Vec magic = set1(12582912.0f);  // adding 1.5 · 2²³ rounds to a whole number
    Vec n = fma(y, set1(1.44269504f), magic) - magic;
    Vec r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), y));
    Vec p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r) + set1(1.0f);
    return x < lowest ? zero() : scale2(p, n);
}

// To a few units of 2⁻²⁴, also where x is small.
static inline Vec tanh(Vec x) {
    const Vec none = zero(), one = set1(1.0f), twice = x + x;
    const Vec e = exp(x < none ? twice : none - twice), size = (one - e) / (one + e);
    return x < none ? none - size : size;
}

// One step of a dot product: STEP elements of both sides into W partial sums.
template <class X, class T>
struct Dot {
    static constexpr int STEP = W;
    using X_ = Vec;
    using T_ = Vec;
    static inline Vec x(const X* p) { return load(p); }
    static inline Vec x(const X* p, i64 n) { return load_n(p, n); }
    static inline Vec w(const T* p) { return load(p); }
    static inline Vec w(const T* p, i64 n) { return load_n(p, n); }
    static inline Vec step(Vec acc, Vec x, Vec w) { return fma(x, w, acc); }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bf16, bf16> {
    static constexpr int STEP = 32;
    using X_ = __m512bh;
    using T_ = __m512bh;
    static inline __m512bh x(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static inline __m512bh x(const bf16* p, i64 n) {
        return (__m512bh)_mm512_maskz_loadu_epi16(__mmask32((1ull << n) - 1), p);
    }
    static inline __m512bh w(const bf16* p) { return x(p); }
    static inline __m512bh w(const bf16* p, i64 n) { return x(p, n); }
    static inline Vec step(Vec acc, __m512bh x, __m512bh w) { return _mm512_dpbf16_ps(acc, x, w); }
};
#endif

constexpr size_t HUGE_PAGE = 2 << 20;

// Memory of a thread that is kept from call to call, aligned to cache lines; in huge pages if it is large.
struct Scratch {
    void* memory = nullptr;
    size_t size = 0;
    ~Scratch() { free(memory); }
    void* get(size_t bytes) {
        if (bytes > size) {
            free(memory);
            const size_t page = bytes < HUGE_PAGE / 2 ? 4096 : HUGE_PAGE;
            size = (bytes + page - 1) / page * page;
            memory = aligned_alloc(page, size);
            if (!memory) abort();
#if defined(MADV_HUGEPAGE)
            if (page == HUGE_PAGE) madvise(memory, size, MADV_HUGEPAGE);
#endif
        }
        return memory;
    }
    void keep(size_t bytes) {
        if (size <= bytes) return;
        free(memory);
        memory = nullptr;
        size = 0;
    }
};

// Rows of the pool, packed by Python.
struct RowSegment {
    i64 column, width;
    const i64* offsets;
};
struct Rows {
    i64 num_segments;
    RowSegment segments[];
};

}  // namespace LORAY_NAMESPACE
