// VeRA's shared pair as dense products: z = A x, then y += b ⊙ (B (d ⊙ z)) with each token's own d and b.

#include "dots.h"

namespace LORAY_NAMESPACE {

constexpr i64 TOKENS = 32, COLUMNS = 32, SERIAL = 1 << 15;
constexpr i64 CHUNK = 512;  // tokens whose intermediates are held at once

template <class T>
static void gather_row(const T* pool, const Rows& rows, i64 n, float* out) {
    for (i64 s = 0; s < rows.num_segments; s++) {
        const RowSegment& segment = rows.segments[s];
        const T* from = pool + segment.offsets[n];
        for (i64 i = 0; i < segment.width; i++) out[segment.column + i] = to_float(from[i]);
    }
}

// out[t][r] = x[t] · matrix[r], with `rows` the offsets of the matrix's rows
template <class X, class T>
static void dense(const X* x, i64 x_stride, i64 num_tokens, const T* matrix, const Rows& rows, i64 num_rows,
                  float* out, int threads) {
    const i64 across = ceil_div(num_rows, COLUMNS), items = across * ceil_div(num_tokens, TOKENS);
    const i64 work = num_tokens * num_rows * rows.segments[0].width;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (work > SERIAL)
    for (i64 i = 0; i < items; i++) {
        const i64 t = i / across * TOKENS, r = i % across * COLUMNS;
        dot_block(x + t * x_stride, x_stride, min_(TOKENS, num_tokens - t), matrix, rows, r,
                  min_(COLUMNS, num_rows - r), out + t * num_rows + r, num_rows);
    }
}

// `first` is the token that `y` and `z` start with, of those that have rows in `d` and `b`.
template <class T>
static void expand_chunk(T* y, i64 y_stride, const float* z, i64 z_stride, i64 first, i64 num_tokens, i64 rank,
                         i64 width, const T* matrix, const Rows& matrix_rows, const T* pool, const Rows& d,
                         const Rows& b, int threads) {
    static thread_local Scratch memory;
    float* scaled = (float*)memory.get(num_tokens * (rank + 2 * width) * sizeof(float));
    float* delta = scaled + num_tokens * rank;
    float* own = delta + num_tokens * width;
#pragma omp parallel for num_threads(threads) if (num_tokens * (rank + width) > SERIAL)
    for (i64 t = 0; t < num_tokens; t++) {
        gather_row(pool, d, first + t, scaled + t * rank);
        gather_row(pool, b, first + t, own + t * width);
        for (i64 i = 0; i < rank; i++) scaled[t * rank + i] *= z[t * z_stride + i];
    }
    dense(scaled, rank, num_tokens, matrix, matrix_rows, width, delta, threads);
#pragma omp parallel for num_threads(threads) if (num_tokens * width > SERIAL)
    for (i64 t = 0; t < num_tokens; t++) {
        const float *by = own + t * width, *from = delta + t * width;
        T* to = y + t * y_stride;
        i64 c = 0;
        for (; c + W <= width; c += W) store(to + c, load(to + c) + load(from + c) * load(by + c));
        if (const i64 n = width - c) store_n(to + c, load_n(to + c, n) + load_n(from + c, n) * load_n(by + c, n), n);
    }
}

template <class T>
static void vera_expand(T* y, i64 y_stride, const float* z, i64 z_stride, i64 num_tokens, i64 rank, i64 width,
                        const T* matrix, const Rows& matrix_rows, const T* pool, const Rows& d, const Rows& b,
                        int threads) {
    for (i64 t = 0; t < num_tokens; t += CHUNK)
        expand_chunk(y + t * y_stride, y_stride, z + t * z_stride, z_stride, t, min_(CHUNK, num_tokens - t), rank,
                     width, matrix, matrix_rows, pool, d, b, threads);
}

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

#define LORAY_VERA(type, suffix)                                                                                    \
    LORAY_ENTRY(vera_shrink_##suffix##_)                                                                            \
    (const type* x, i64 x_stride, i64 num_tokens, const type* matrix, const Rows* rows, i64 rank, float* z,         \
     int threads) {                                                                                                 \
        dense(x, x_stride, num_tokens, matrix, *rows, rank, z, threads);                                            \
    }                                                                                                               \
    LORAY_ENTRY(vera_expand_##suffix##_)                                                                            \
    (type * y, i64 y_stride, const float* z, i64 z_stride, i64 num_tokens, i64 rank, i64 width, const type* matrix, \
     const Rows* matrix_rows, const type* pool, const Rows* d, const Rows* b, int threads) {                        \
        vera_expand(y, y_stride, z, z_stride, num_tokens, rank, width, matrix, *matrix_rows, pool, *d, *b, threads); \
    }

LORAY_VERA(bf16, bf16)
LORAY_VERA(float, fp32)
