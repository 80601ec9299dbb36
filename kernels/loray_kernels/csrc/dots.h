// Dot products of tokens with rows of the pool, in tiles that stay in registers.
//
// Every product is one accumulator over the row's columns in order, whatever the tile: a token's result depends
// neither on its neighbours nor on how many there are.
#pragma once

#include "simd.h"

namespace LORAY_NAMESPACE {

// Rows that come next, fetched from memory while others are multiplied: a lone token waits for nothing else.
struct Next {
    const i64* offsets = nullptr;
    i64 num = 0;
};

// out[t][r] = x[t] · row[first + r] for NT tokens and NR rows.
template <int NT, int NR, class X, class T>
static inline void dot_tile(const X* x, i64 x_stride, const T* pool, const Rows& rows, i64 first, float* out,
                            i64 out_stride, const Next& next) {
    using D = Dot<X, T>;
    Vec acc[NT][NR];
    for (int t = 0; t < NT; t++)
        for (int r = 0; r < NR; r++) acc[t][r] = zero();
    for (i64 s = 0; s < rows.num_segments; s++) {
        const RowSegment& segment = rows.segments[s];
        const X* xs = x + segment.column;
        const T* w[NR];
        for (int r = 0; r < NR; r++) w[r] = pool + segment.offsets[first + r];
        i64 i = 0;
        for (; i + D::STEP <= segment.width; i += D::STEP) {
            typename D::X_ xv[NT];
            for (int t = 0; t < NT; t++) xv[t] = D::x(xs + t * x_stride + i);
            if (NT == 1)
                for (i64 n = 0; n < next.num; n++) __builtin_prefetch(pool + next.offsets[n] + i, 0, 2);
            for (int r = 0; r < NR; r++) {
                typename D::T_ wv = D::w(w[r] + i);
                for (int t = 0; t < NT; t++) acc[t][r] = D::step(acc[t][r], xv[t], wv);
            }
        }
        if (i64 rest = segment.width - i) {
            for (int r = 0; r < NR; r++) {
                typename D::T_ wv = D::w(w[r] + i, rest);
                for (int t = 0; t < NT; t++)
                    acc[t][r] = D::step(acc[t][r], D::x(xs + t * x_stride + i, rest), wv);
            }
        }
    }
    for (int t = 0; t < NT; t++)
        for (int r = 0; r < NR; r++) out[t * out_stride + r] = sum(acc[t][r]);
}

template <int NT, int NR, class X, class T>
static inline void dot_rows(const X* x, i64 x_stride, const T* pool, const Rows& rows, i64 first, i64 num_rows,
                            float* out, i64 out_stride, const Next& after) {
    const i64* offsets = rows.segments[0].offsets + first;
    i64 r = 0;
    for (; r + NR <= num_rows; r += NR) {
        const i64 left = num_rows - r - NR;
        const Next next = left > 0 ? Next{offsets + r + NR, min_(NR, left)} : after;
        dot_tile<NT, NR>(x, x_stride, pool, rows, first + r, out + r, out_stride, next);
    }
    for (; r < num_rows; r++) dot_tile<NT, 1>(x, x_stride, pool, rows, first + r, out + r, out_stride, Next{});
}

// out[t][r] = x[t] · row[first + r] for any numbers of tokens and rows. `after` is what will be asked for next.
template <class X, class T>
static void dot_block(const X* x, i64 x_stride, i64 num_tokens, const T* pool, const Rows& rows, i64 first,
                      i64 num_rows, float* out, i64 out_stride, const Next& after = {}) {
    constexpr int NT = W == 16 ? 4 : 2;  // sixteen or eight sums: what the registers hold
    i64 t = 0;
    for (; t + NT <= num_tokens; t += NT)
        dot_rows<NT, 4>(x + t * x_stride, x_stride, pool, rows, first, num_rows, out + t * out_stride, out_stride,
                        Next{});
    for (; t < num_tokens; t++)
        dot_rows<1, 8>(x + t * x_stride, x_stride, pool, rows, first, num_rows, out + t * out_stride, out_stride,
                       after);
}

}  // namespace LORAY_NAMESPACE
