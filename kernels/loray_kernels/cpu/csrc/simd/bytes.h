// One step of products of whole numbers: STEP inputs of a token times the weights of W outputs, added to W sums of 32 bits.
// All is exact. Weights are bytes without a sign, or half of one.
#pragma once

#include "simd.h"

namespace LORAY_NAMESPACE {

typedef int32_t Ints __attribute__((vector_size(4 * W)));

static inline Vec to_floats(Ints v) { return __builtin_convertvector(v, Vec); }

// The bits of the largest of `num` numbers without their sign. They are in the order of the numbers, with an infinite one and
// then NaN above all.
constexpr int32_t INFINITE = 0x7f800000;
template <class T>
static inline int32_t largest_bits(const T* x, i64 num) {
    Ints most = {};
    vectors(num, [&](i64 i, auto n) {
        const Ints bits = (Ints)load_n(x + i, n) & 0x7fffffff;
        most = bits > most ? bits : most;
    });
    int32_t bits = 0;
    for (int i = 0; i < W; i++) bits = most[i] > bits ? most[i] : bits;
    return bits;
}

// The weights of a step are W · STEP bytes, output by output. `halves` takes two steps from as many bytes, which have
// the first one's weights in their lower halves.
//
// Where an `Operand` has 16 bits, so have the weights in registers: sums of two products of bytes would not fit 16 bits.
// `weights` gives the bytes less SUBTRACTED. AVX2's instructions are written out, as in `fma_here`: a compiler that is free
// to choose makes several products before their additions, and moves sums to memory and back.
struct ByteStep {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
    static constexpr int STEP = 4, SUBTRACTED = 0;
    using Operand = int8_t;
    using Weights = Ints;
#if defined(__AVX512VNNI__)
    static inline Weights weights(const uint8_t* p) { return (Ints)_mm512_loadu_si512(p); }
    static inline Weights input(const Operand* x) { return (Ints)_mm512_set1_epi32(four(x)); }
    static inline Ints mac(Ints sums, Weights w, Weights x) {
        return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
    }
#else
    static inline Weights weights(const uint8_t* p) { return (Ints)_mm256_loadu_si256((const __m256i*)p); }
    static inline Weights input(const Operand* x) { return (Ints)_mm256_set1_epi32(four(x)); }
    static inline Ints mac(Ints sums, Weights w, Weights x) {
        return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, (__m256i)x);
    }
#endif
    static inline void halves(const uint8_t* p, Weights& first, Weights& second) {
        const Ints both = weights(p);
        first = both & 0x0f0f0f0f, second = both >> 4 & 0x0f0f0f0f;
    }
#elif defined(__AVX2__)
    static constexpr int STEP = 2, SUBTRACTED = 0;
    using Operand = int16_t;
    using Weights = __m256i;
    static inline Weights weights(const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); }
    static inline void halves(const uint8_t* p, Weights& first, Weights& second) {
        const __m256i both = weights(p);
        first = _mm256_and_si256(both, _mm256_set1_epi16(15)), second = _mm256_srli_epi16(both, 4);
    }
    static inline Weights input(const Operand* x) { return _mm256_set1_epi32(four(x)); }
    static inline Ints mac(Ints sums, Weights w, Weights x) {
        Ints two;
        asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(two) : "x"(w), "x"(x));
        return sums;
    }
#elif defined(__SSE2__)
    static constexpr int STEP = 2, SUBTRACTED = 0;
    using Operand = int16_t;
    using Weights = __m128i;
    static inline Weights weights(const uint8_t* p) {
        return _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)p), _mm_setzero_si128());
    }
    static inline void halves(const uint8_t* p, Weights& first, Weights& second) {
        const __m128i both = weights(p);
        first = _mm_and_si128(both, _mm_set1_epi16(15)), second = _mm_srli_epi16(both, 4);
    }
    static inline Weights input(const Operand* x) { return _mm_set1_epi32(four(x)); }
    static inline Ints mac(Ints sums, Weights w, Weights x) { return sums + (Ints)_mm_madd_epi16(w, x); }
#elif defined(__aarch64__)
    static constexpr int STEP = 2, SUBTRACTED = 128;
    using Operand = int8_t;
    using Weights = int8x8_t;
    static inline Weights weights(const uint8_t* p) { return vreinterpret_s8_u8(veor_u8(vld1_u8(p), vdup_n_u8(128))); }
    static inline void halves(const uint8_t* p, Weights& first, Weights& second) {
        const uint8x8_t both = vld1_u8(p);
        first = vreinterpret_s8_u8(vand_u8(both, vdup_n_u8(15))), second = vreinterpret_s8_u8(vshr_n_u8(both, 4));
    }
    static inline Weights input(const Operand* x) {
        int16_t two;
        memcpy(&two, x, 2);
        return vreinterpret_s8_s16(vdup_n_s16(two));
    }
    static inline Ints mac(Ints sums, Weights w, Weights x) {
        return (Ints)vpadalq_s16((int32x4_t)sums, vmull_s8(w, x));
    }
#else
    static constexpr int STEP = 2, SUBTRACTED = 0;
    using Operand = int16_t;
    struct Weights {
        uint8_t of[2 * W];
    };
    static inline Weights weights(const uint8_t* p) {
        Weights w;
        memcpy(w.of, p, sizeof w.of);
        return w;
    }
    static inline void halves(const uint8_t* p, Weights& first, Weights& second) {
        for (int i = 0; i < 2 * W; i++) first.of[i] = p[i] & 15, second.of[i] = p[i] >> 4;
    }
    static inline const Operand* input(const Operand* x) { return x; }
    static inline Ints mac(Ints sums, const Weights& w, const Operand* x) {
        for (int i = 0; i < W; i++) sums[i] += w.of[2 * i] * x[0] + w.of[2 * i + 1] * x[1];
        return sums;
    }
#endif

    static constexpr bool HAS_HIGH = sizeof(Operand) == 1;  // whether inputs may be too large for it

    // The nearest whole numbers, even ones of two, of numbers below 2²².
    static inline Ints whole(Vec v) {
#if defined(__AVX512VNNI__)
        return (Ints)_mm512_cvtps_epi32(v);
#elif defined(__AVX2__)
        return (Ints)_mm256_cvtps_epi32(v);
#else
        const Vec magic = set1(12582912.0f);  // adding 1.5 · 2²³ rounds
        return (Ints)(v + magic) - (Ints)magic;
#endif
    }

    // A bit for each lane that does not fit seven bits and a sign.
    static inline uint32_t beyond(Ints q) {
#if defined(__AVX512VNNI__)
        return _mm512_cmpgt_epi32_mask(_mm512_abs_epi32((__m512i)q), _mm512_set1_epi32(127));
#elif defined(__AVX2__)
        return uint32_t(_mm256_movemask_ps((__m256)(q > 127 | q < -127)));
#else
        uint32_t bits = 0;
        for (int i = 0; i < W; i++) bits |= uint32_t(q[i] > 127 || q[i] < -127) << i;
        return bits;
#endif
    }

  private:
    [[maybe_unused]] static inline int four(const void* x) {  // bytes
        int bytes;
        memcpy(&bytes, x, 4);
        return bytes;
    }
};

}  // namespace LORAY_NAMESPACE
