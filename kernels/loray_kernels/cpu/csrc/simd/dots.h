// Dot products of tokens with rows of the pool, in tiles that stay in registers.
//
// In every tile, each product has one accumulator over the row's columns in order. So a token's result does not depend
// on the other tokens.
#pragma once

#include "simd.h"

namespace LORAY_NAMESPACE {

// The next rows, which are prefetched while others are multiplied: with few tokens, memory is the bottleneck.
struct Next {
    const i64* offsets = nullptr;
    i64 num = 0;
    i64 shift = 0;  // of the columns that are needed
};

#if defined(__AVX512BF16__)
// out[t][r] = sum(acc[t][r]), sixteen at once: the same additions in the same order as in `sum`, a third of the work.
static inline void sums(const Vec (&acc)[4][4], float* out, i64 out_stride) {
    Vec a[8], b[4], c[2];
    const auto v = [&](int i) { return acc[i % 4][i / 4]; };
    for (int i = 0; i < 8; i++)  // lanes l and l + 8, of two vectors
        a[i] = _mm512_shuffle_f32x4(v(2 * i), v(2 * i + 1), 0x44) + _mm512_shuffle_f32x4(v(2 * i), v(2 * i + 1), 0xee);
    for (int i = 0; i < 4; i++)  // l and l + 4, of four
        b[i] = _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd);
    for (int i = 0; i < 2; i++) {  // l and l + 2, of eight
        const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
        c[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)) + _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
    const Vec all = _mm512_shuffle_ps(c[0], c[1], 0x88) + _mm512_shuffle_ps(c[0], c[1], 0xdd);
    _mm_storeu_ps(out, _mm512_extractf32x4_ps(all, 0));
    _mm_storeu_ps(out + out_stride, _mm512_extractf32x4_ps(all, 1));
    _mm_storeu_ps(out + 2 * out_stride, _mm512_extractf32x4_ps(all, 2));
    _mm_storeu_ps(out + 3 * out_stride, _mm512_extractf32x4_ps(all, 3));
}
#endif
template <int NT, int NR>
static inline void sums(const Vec (&acc)[NT][NR], float* out, i64 out_stride) {
    each<NT * NR>([&](auto i) { out[i / NR * out_stride + i % NR] = sum(acc[i / NR][i % NR]); });
}

// out[t][r] = x[t] · row[first + r] for NT tokens and NR rows.
template <int NT, int NR, class X, class T>
static inline void dot_tile(const X* x, i64 x_stride, const T* pool, const Rows& rows, i64 first, float* out,
                            i64 out_stride, const Next& next) {
    using D = Dot<X, T>;
    Vec acc[NT][NR];
    each<NT * NR>([&](auto i) { acc[i / NR][i % NR] = zero(); });
    for (i64 s = 0; s < rows.num_segments; s++) {
        const RowSegment& segment = rows.segments[s];
        const X* xs = x + segment.column;
        const T* w[NR];
        for (int r = 0; r < NR; r++) w[r] = pool + segment.offsets[first + r];
        i64 i = 0;
        for (; i + D::STEP <= segment.width; i += D::STEP) {
            typename D::X_ xv[NT];
            each<NT>([&](auto t) { xv[t] = D::x(xs + t * x_stride + i); });
            for (i64 n = 0; n < next.num; n++) __builtin_prefetch(pool + next.offsets[n] + i, 0, 2);
            each<NR>([&](auto r) {
                typename D::T_ wv = D::w(w[r] + i);
                each<NT>([&](auto t) { acc[t][r] = D::step(acc[t][r], xv[t], wv); });
            });
        }
        if (i64 rest = segment.width - i) {
            each<NR>([&](auto r) {
                typename D::T_ wv = D::w(w[r] + i, rest);
                each<NT>([&](auto t) { acc[t][r] = D::step(acc[t][r], D::x(xs + t * x_stride + i, rest), wv); });
            });
        }
    }
    sums(acc, out, out_stride);
}

template <int NT, int NR, class X, class T>
static inline void dot_rows(const X* x, i64 x_stride, const T* pool, const Rows& rows, i64 first, i64 num_rows,
                            float* out, i64 out_stride, bool fetch, const Next& after) {
    const i64* offsets = rows.segments[0].offsets + first;
    i64 r = 0;
    for (; r + NR <= num_rows; r += NR) {
        const i64 left = num_rows - r - NR;
        const Next next = fetch && left > 0 ? Next{offsets + r + NR, min_(NR, left)} : after;
        dot_tile<NT, NR>(x, x_stride, pool, rows, first + r, out + r, out_stride, next);
    }
    for (; r < num_rows; r++) dot_tile<NT, 1>(x, x_stride, pool, rows, first + r, out + r, out_stride, Next{});
}

// out[t][r] = x[t] · row[first + r] for any numbers of tokens and rows. `after`: the rows of the next call.
template <class X, class T>
static void dot_block(const X* x, i64 x_stride, i64 num_tokens, const T* pool, const Rows& rows, i64 first,
                      i64 num_rows, float* out, i64 out_stride, const Next& after = {}) {
    constexpr int NT = REGISTERS == 32 ? 4 : 2;  // sixteen or eight sums fit the registers
    i64 t = 0;
    for (; t + NT <= num_tokens; t += NT)
        dot_rows<NT, 4>(x + t * x_stride, x_stride, pool, rows, first, num_rows, out + t * out_stride, out_stride,
                        t == 0, t == 0 ? after : Next{});
    for (; t < num_tokens; t++)
        dot_rows<1, 8>(x + t * x_stride, x_stride, pool, rows, first, num_rows, out + t * out_stride, out_stride,
                       t == 0, t == 0 ? after : Next{});
}

}  // namespace LORAY_NAMESPACE
