// VeRA's shared pair as dense products: z = A x, then y += b ⊙ (B (d ⊙ z)) with each token's d and b.
//
// A and B are packed like a layer's matrices, so both products are as fast. d ⊙ z is rounded to T.

#include "products/linear.h"

namespace LORAY_NAMESPACE {

constexpr i64 CHUNK = 1024;  // tokens whose intermediates are in memory at once

// The addresses of the rows of `num` tokens from `first` on: in the pool, or joined in `room` if a row has several
// segments.
template <class T>
static const T* const* rows_of(const T* pool, const Rows& rows, i64 width, i64 first, i64 num, Scratch& room) {
    const T** at = (const T**)room.get(num * (sizeof(T*) + width * sizeof(T)));
    const RowSegment* segments = rows.segments;
    if (rows.num_segments == 1) {
        for (i64 t = 0; t < num; t++) at[t] = pool + segments->offsets[first + t];
        return at;
    }
    T* joined = (T*)(at + num);
    for (i64 t = 0; t < num; t++) {
        at[t] = joined + t * width;
        for (const RowSegment* s = segments; s < segments + rows.num_segments; s++)
            memcpy((void*)(at[t] + s->column), pool + s->offsets[first + t], s->width * sizeof(T));
    }
    return at;
}

template <class T>
void vera_shrink(const T* x, i64 x_stride, i64 num_tokens, const Matrix<T>& matrix, float* z, int threads) {
    linear_of(x, x_stride, matrix, [z, width = matrix.out](i64 t, i64 column, auto n, Vec sums) {
        store_n(z + t * width + column, sums, n);
    })(num_tokens, threads);
}

// `first`: index, among the tokens that have rows in `d` and `b`, of the first token of `y` and `z`.
template <class T>
static void expand_chunk(T* y, i64 y_stride, const float* z, i64 z_stride, i64 first, i64 num_tokens,
                         const Matrix<T>& matrix, const T* pool, const Rows& d, const Rows& b, int threads) {
    static thread_local Scratch memory[3];
    const i64 rank = matrix.in;
    const T* const* d_rows = rows_of(pool, d, rank, first, num_tokens, memory[0]);
    const T* const* b_rows = rows_of(pool, b, matrix.out, first, num_tokens, memory[1]);
    T* scaled = (T*)memory[2].get(num_tokens * rank * sizeof(T));
    const auto expand = linear_of((const T*)scaled, rank, matrix, [=](i64 t, i64 column, auto n, Vec sums) {
        T* to = y + t * y_stride + column;
        store_n(to, load_n(to, n) + sums * load_n(b_rows[t] + column, n), n);
    });
    Shares panels = expand.shares(num_tokens, threads);
#pragma omp parallel num_threads(threads) if (expand.work(num_tokens) > FEW_PRODUCTS)
    {
#pragma omp for schedule(static)
        for (i64 t = 0; t < num_tokens; t++)
            vectors(rank, [&](i64 i, auto n) {
                store_n(scaled + t * rank + i, load_n(z + t * z_stride + i, n) * load_n(d_rows[t] + i, n), n);
            });
        expand.multiply(panels, num_tokens, threads);
    }
}

template <class T>
void vera_expand(T* y, i64 y_stride, const float* z, i64 z_stride, i64 num_tokens, const Matrix<T>& matrix,
                 const T* pool, const Rows& d, const Rows& b, int threads) {
    for (i64 t = 0; t < num_tokens; t += CHUNK)
        expand_chunk(y + t * y_stride, y_stride, z + t * z_stride, z_stride, t, min_(CHUNK, num_tokens - t), matrix,
                     pool, d, b, threads);
}

template void vera_shrink<bf16>(const bf16*, i64, i64, const Matrix<bf16>&, float*, int);
template void vera_shrink<float>(const float*, i64, i64, const Matrix<float>&, float*, int);
template void vera_expand<bf16>(bf16*, i64, const float*, i64, i64, const Matrix<bf16>&, const bf16*, const Rows&,
                                const Rows&, int);
template void vera_expand<float>(float*, i64, const float*, i64, i64, const Matrix<float>&, const float*, const Rows&,
                                 const Rows&, int);

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

#define LORAY_VERA(type, suffix)                                                                                      \
    LORAY_ENTRY(vera_shrink_##suffix##_)                                                                              \
    (const type* x, i64 x_stride, i64 num_tokens, const Matrix<type>* matrix, float* z, int threads) {                \
        vera_shrink(x, x_stride, num_tokens, *matrix, z, threads);                                                    \
    }                                                                                                                 \
    LORAY_ENTRY(vera_expand_##suffix##_)                                                                              \
    (type * y, i64 y_stride, const float* z, i64 z_stride, i64 num_tokens, const Matrix<type>* matrix,                \
     const type* pool, const Rows* d, const Rows* b, int threads) {                                                   \
        vera_expand(y, y_stride, z, z_stride, num_tokens, *matrix, pool, *d, *b, threads);                            \
    }

LORAY_VERA(bf16, bf16)
LORAY_VERA(float, fp32)
