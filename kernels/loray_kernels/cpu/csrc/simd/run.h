// Neighbouring elements as fp32, and sums that stay in registers while these are multiplied.
#pragma once

#include "simd.h"

namespace LORAY_NAMESPACE {

// `p`, from which the compiler loads again: what it would keep in registers would push sums out of them.
template <class T>
static inline const T* again(const T* p) {
    asm volatile("" : "+r"(p));
    return p;
}

// fma(a, b, sum) that leaves `sum` in its register. A compiler that is free to choose moves sums about, and one that
// goes to memory and back at each step takes longer than the whole tile.
static inline Vec fma_here(Vec a, Vec b, Vec sum) {
#if defined(__AVX2__) && !defined(__AVX512BF16__)
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
#else
    return fma(a, b, sum);
#endif
}

// N · W neighbouring elements as fp32 in N vectors, in the order that costs least; `join` restores theirs.
template <class T>
struct Run {
    static constexpr int N = 1;
    template <int n, class X>
    static inline Vec part(const X* from) {
        return load(from);
    }
    static inline void join(float* to, const Vec* v) { store(to, *v); }
};

#if defined(__AVX2__) && !defined(__AVX512BF16__)
#define WIDENED_PAIRS  // bf16 is widened to be multiplied, two neighbours at a time

// The even elements and the odd ones, without shuffles. Each part is loaded by itself, as sums need the registers.
template <>
struct Run<bf16> {
    static constexpr int N = 2;
    template <int n>
    static inline Vec part(const bf16* from) {
        alignas(32) static const uint32_t ODD[W] = {UPPER, UPPER, UPPER, UPPER, UPPER, UPPER, UPPER, UPPER};
        __m256i pairs = _mm256_loadu_si256((const __m256i*)again(from));
        if constexpr (n)
            asm volatile("vpand %1, %0, %0" : "+x"(pairs) : "m"(*(const __m256i*)ODD));
        else
            pairs = _mm256_slli_epi32(pairs, 16);
        return _mm256_castsi256_ps(pairs);
    }
    template <int n>
    static inline Vec part(const float* from) {
        const Vec mixed = _mm256_shuffle_ps(load(from), load(from + W), n ? 0xdd : 0x88);
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
    }
    static inline void join(float* to, const Vec* v) {
        const Vec low = _mm256_unpacklo_ps(v[0], v[1]), high = _mm256_unpackhi_ps(v[0], v[1]);
        store(to, _mm256_permute2f128_ps(low, high, 0x20));
        store(to + W, _mm256_permute2f128_ps(low, high, 0x31));
    }

  private:
    static constexpr uint32_t UPPER = 0xffff0000;
};
#endif

}  // namespace LORAY_NAMESPACE
