// Transposes squares of W rows in registers.
#pragma once

#include "run.h"

namespace LORAY_NAMESPACE {

#if defined(__AVX512BF16__)
// Transposes sixteen rows of sixteen units.
static inline void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    // r[4q + c] holds, in lane l, column 4l + c of rows 4q to 4q + 3.
    for (int c = 0; c < 4; c++) {
        __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44), high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xee);
        __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
        __m512i high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xee);
        t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}
// Transposes W rows of W floats.
static inline void transpose(Vec* r) {
    __m512i units[W];
    for (int i = 0; i < W; i++) units[i] = _mm512_castps_si512(r[i]);
    transpose(units);
    for (int i = 0; i < W; i++) r[i] = _mm512_castsi512_ps(units[i]);
}
#elif defined(__AVX2__)
// Transposes W rows of W floats.
static inline void transpose(Vec* r) {
    Vec t[W];
    for (int i = 0; i < W; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < W; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m256d x = _mm256_castps_pd(t[i + j]), y = _mm256_castps_pd(t[i + j + 2]);
            r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
            r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
        }
    // r[4q + c] holds, in lane l, column 4l + c of rows 4q to 4q + 3.
    for (int c = 0; c < 4; c++) {
        const Vec low = r[c], high = r[4 + c];
        r[c] = _mm256_permute2f128_ps(low, high, 0x20);
        r[4 + c] = _mm256_permute2f128_ps(low, high, 0x31);
    }
}
#else
// Transposes W rows of W floats.
static inline void transpose(Vec* r) {
    const auto low = [](Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); };
    const auto high = [](Vec a, Vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); };
    const Vec low01 = low(r[0], r[1]), high01 = high(r[0], r[1]), low23 = low(r[2], r[3]), high23 = high(r[2], r[3]);
    r[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}
#endif

// Writes W rows transposed, from column `i` on: WIDTH columns become rows, `stride` apart.
template <class T>
struct Square {
    static constexpr int WIDTH = W;
    static inline void put(float* out, i64 stride, const T* const* rows, i64 i) {
        Vec r[W];
        for (int n = 0; n < W; n++) r[n] = load(rows[n] + i);
        transpose(r);
        for (int n = 0; n < W; n++) store(out + n * stride, r[n]);
    }
};
#if defined(WIDENED_PAIRS)
// Two neighbours move as one: half the shuffles.
template <>
struct Square<bf16> {
    static constexpr int WIDTH = 2 * W;
    // r[n][row] = rows[row][i + 2 n], rows[row][i + 2 n + 1]
    static inline void pairs(Vec* r, const bf16* const* rows, i64 i) {
        for (int half = 0; half < 8; half += 4) {
            const auto quarter = [&](int n) {
                const float* at = (const float*)(rows[n] + i) + half;
                return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at)),
                                            _mm_loadu_ps((const float*)(rows[n + 4] + i) + half), 1);
            };
            const Vec q0 = quarter(0), q1 = quarter(1), q2 = quarter(2), q3 = quarter(3);
            const auto doubles = [](Vec x) { return _mm256_castps_pd(x); };
            const __m256d low01 = doubles(_mm256_unpacklo_ps(q0, q1)), high01 = doubles(_mm256_unpackhi_ps(q0, q1));
            const __m256d low23 = doubles(_mm256_unpacklo_ps(q2, q3)), high23 = doubles(_mm256_unpackhi_ps(q2, q3));
            r[half] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
            r[half + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
            r[half + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
            r[half + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
        }
    }
    static inline void put(float* out, i64 stride, const bf16* const* rows, i64 i) {
        Vec r[W];
        pairs(r, rows, i);
        for (int n = 0; n < W; n++, out += 2 * stride) {
            store(out, lower(r[n]));
            store(out + stride, upper(r[n]));
        }
    }
};
#endif

}  // namespace LORAY_NAMESPACE
