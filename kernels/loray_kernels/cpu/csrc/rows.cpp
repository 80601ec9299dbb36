// Ops on single tokens: norms, with weights of adapters; scales of outputs; rotary embedding; writing the KV cache.

#include "kernels.h"
#include "simd/bytes.h"

namespace LORAY_NAMESPACE {

constexpr i64 SERIAL = 1 << 12;  // elements below which one thread is faster

// y = (x / rms(x)) rounded, times weight; with an offset x / rms(x) times offset + weight
template <class T>
static inline void normalize(const T* x, const T* weight, float eps, float offset, i64 width, T* y) {
    Vec squares[4] = {zero(), zero(), zero(), zero()};  // several, so that the additions do not depend on each other
    i64 i = 0;
    for (; i + 4 * W <= width; i += 4 * W)
        for (int v = 0; v < 4; v++) {
            const Vec xv = load(x + i + v * W);
            squares[v] = fma(xv, xv, squares[v]);
        }
    vectors(width - i, [&](i64 rest, auto n) {
        const Vec xv = load_n(x + i + rest, n);
        squares[0] = fma(xv, xv, squares[0]);
    });
    const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const Vec factor = set1(1.0f / __builtin_sqrtf(total / float(width) + eps));
    if (offset != 0.0f)
        return vectors(width, [&](i64 at, auto n) {
            store_n(y + at, (set1(offset) + load_n(weight + at, n)) * (load_n(x + at, n) * factor), n);
        });
    vectors(width, [&](i64 at, auto n) {
        store_n(y + at, load_n(weight + at, n) * rounded(load_n(x + at, n) * factor, x), n);
    });
}

// Row n, of `width` elements; valid in this thread until the next call with the same `which`.
template <class T>
static const T* row_of(const T* pool, const Rows& rows, i64 n, i64 width, int which = 0) {
    static thread_local Scratch memory[2];
    if (rows.num_segments == 1) return pool + rows.segments[0].offsets[n];
    T* joined = (T*)memory[which].get(width * sizeof(T));
    for (i64 s = 0; s < rows.num_segments; s++) {
        const RowSegment& segment = rows.segments[s];
        memcpy(joined + segment.column, pool + segment.offsets[n], segment.width * sizeof(T));
    }
    return joined;
}

// The weight of token `own.tokens[n]` is row n of `own.rows`.
template <class T>
void rms_norm(const T* x, i64 x_stride, i64 num_tokens, i64 num_heads, i64 width, const T* weight, float eps,
              float offset, T* y, const T* pool, const OwnRows& own, int threads) {
    const i64 row = num_heads * width;
#pragma omp parallel for num_threads(threads) if (num_tokens * row > SERIAL)
    for (i64 t = 0; t < num_tokens; t++)
        for (i64 h = 0; h < num_heads; h++)
            normalize(x + t * x_stride + h * width, weight, eps, offset, width, y + t * row + h * width);
#pragma omp parallel for num_threads(threads) if (own.num * row > SERIAL)
    for (i64 n = 0; n < own.num; n++) {
        if (own.rows->segments[0].offsets[n] < 0) continue;  // no weight of its own
        const T* own_weight = row_of(pool, *own.rows, n, width);
        for (i64 h = 0; h < num_heads; h++)
            normalize(x + own.tokens[n] * x_stride + h * width, own_weight, eps, offset, width,
                      y + own.tokens[n] * row + h * width);
    }
}

// y += row ⊙ (y − bias) for token `own.tokens[n]` and row n of `own.rows`; `bias` may be missing.
template <class T>
void scale_rows(T* y, i64 y_stride, i64 width, const T* bias, const T* pool, const OwnRows& own, int threads) {
#pragma omp parallel for num_threads(threads) if (own.num * width > SERIAL)
    for (i64 n = 0; n < own.num; n++) {
        const T* row = row_of(pool, *own.rows, n, width);
        T* at = y + own.tokens[n] * y_stride;
        vectors(width, [&](i64 i, auto count) {
            const Vec whole = load_n(at + i, count);
            const Vec plain = bias ? whole - load_n(bias + i, count) : whole;
            store_n(at + i, whole + load_n(row + i, count) * plain, count);
        });
    }
}

// y += row ⊙ y + turn ⊙ y′ for token `own.tokens[n]` and row n of `own.rows` and of `turn`. In groups of 2 · distance[n]
// columns, y′ has the first half in the place of the second and the second in that of the first.
template <class T>
void turn_rows(T* y, i64 y_stride, i64 width, const T* pool, const OwnRows& own, const Rows& turn, const i64* distance,
               int threads) {
#pragma omp parallel for num_threads(threads) if (own.num * width > SERIAL)
    for (i64 n = 0; n < own.num; n++) {
        const T *row = row_of(pool, *own.rows, n, width), *other = row_of(pool, turn, n, width, 1);
        T* const of_token = y + own.tokens[n] * y_stride;
        const i64 half = distance[n];
        for (i64 first = 0; first + 2 * half <= width; first += 2 * half)
            vectors(half, [&](i64 i, auto count) {
                const i64 a = first + i, b = a + half;
                const Vec ya = load_n(of_token + a, count), yb = load_n(of_token + b, count);
                store_n(of_token + a, ya + load_n(row + a, count) * ya + load_n(other + a, count) * yb, count);
                store_n(of_token + b, yb + load_n(row + b, count) * yb + load_n(other + b, count) * ya, count);
            });
    }
}

// Both products are rounded before they are added, as in torch.
template <class T>
static inline void turn(const T* x, const T* cos, const T* sin, i64 half, T* y) {
    vectors(half, [&](i64 i, auto n) {
        const Vec first = load_n(x + i, n), second = load_n(x + half + i, n);
        const Vec low = rounded(first * load_n(cos + i, n), x) - rounded(second * load_n(sin + i, n), x);
        const Vec high = rounded(second * load_n(cos + half + i, n), x) + rounded(first * load_n(sin + half + i, n), x);
        store_n(y + i, low, n);
        store_n(y + half + i, high, n);
    });
}

template <class T>
void rope(const T* x, i64 x_stride, i64 num_tokens, i64 num_heads, i64 width, i64 turned, const T* cos, const T* sin,
          T* y, int threads) {
#pragma omp parallel for num_threads(threads) if (num_tokens * num_heads * width > SERIAL)
    for (i64 t = 0; t < num_tokens; t++)
        for (i64 h = 0; h < num_heads; h++) {
            const T* from = x + t * x_stride + h * width;
            T* to = y + (t * num_heads + h) * width;
            turn(from, cos + t * turned, sin + t * turned, turned / 2, to);
            if (turned < width) memcpy((void*)(to + turned), from + turned, (width - turned) * sizeof(T));
        }
}

// Rounds `width` elements as `quantize_rows` of reference.py does, and gives their scale. `width` is a multiple of 16.
template <class T>
static float quantize(const T* x, i64 width, int8_t* q) {
    typedef int8_t Bytes __attribute__((vector_size(W)));
    const int32_t bits = largest_bits(x, width);
    float largest;
    memcpy(&largest, &bits, 4);
    const bool is_finite = bits < INFINITE;
    const Vec inverse = set1(is_finite && largest >= 1e-30f ? 127.0f / largest : 0.0f);
    for (i64 i = 0; i < width; i += W) {
        const Ints whole = is_finite ? ByteStep::whole(load(x + i) * inverse) : Ints{};
        const Bytes bytes = __builtin_convertvector(whole, Bytes);
        memcpy(q + i, &bytes, W);
    }
    return is_finite ? largest / 127.0f : __builtin_nanf("");
}

// Elements of a token's keys in a block, `width` of all its heads, as attention.cpp has them.
template <class Q>
static void write_keys(Q* block, i64 block_tokens, i64 position, const Q* k, i64 width) {
    constexpr i64 PER_UNIT = 4 / sizeof(Q);
    for (i64 i = 0; i < width; i += PER_UNIT)
        memcpy(block + i * block_tokens + position * PER_UNIT, k + i, 4);
}

// `pool` is the address of the layer's share in block 0.
template <class T>
void write_kv(T* pool, const Layout& layout, const T* k, i64 k_stride, const T* v, i64 v_stride, const i64* slots,
              i64 num_tokens, int threads) {
    const i64 block_tokens = layout.block_tokens, heads = layout.num_kv_heads, d = layout.head_dim, width = heads * d;
#pragma omp parallel for num_threads(threads) if (num_tokens * width > SERIAL)
    for (i64 t = 0; t < num_tokens; t++) {
        T* const at = pool + slots[t] / block_tokens * layout.num_layers * layout.layer_share();
        const i64 position = slots[t] % block_tokens;
        if (!layout.int8_per_element) {
            write_keys(at, block_tokens, position, k + t * k_stride, width);
            memcpy(at + (block_tokens + position) * width, v + t * v_stride, width * sizeof(T));
            continue;
        }
        static thread_local Scratch memory;
        int8_t *const block = (int8_t*)at, *const keys = (int8_t*)memory.get(d);
        float* const scales = (float*)layout.scales(block) + position;
        for (i64 h = 0; h < heads; h++) {
            scales[h * block_tokens] = quantize(k + t * k_stride + h * d, d, keys);
            write_keys(block + h * d * block_tokens, block_tokens, position, keys, d);
            scales[(heads + h) * block_tokens] =
                quantize(v + t * v_stride + h * d, d, block + (block_tokens + position) * width + h * d);
        }
    }
}

#define LORAY_INSTANTIATE(T)                                                                                     \
    template void rms_norm<T>(const T*, i64, i64, i64, i64, const T*, float, float, T*, const T*, const OwnRows&, \
                              int);                                                                              \
    template void scale_rows<T>(T*, i64, i64, const T*, const T*, const OwnRows&, int);                          \
    template void turn_rows<T>(T*, i64, i64, const T*, const OwnRows&, const Rows&, const i64*, int);            \
    template void rope<T>(const T*, i64, i64, i64, i64, i64, const T*, const T*, T*, int);                       \
    template void write_kv<T>(T*, const Layout&, const T*, i64, const T*, i64, const i64*, i64, int);

LORAY_INSTANTIATE(bf16)
LORAY_INSTANTIATE(float)

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

#define LORAY_ROWS(type, suffix)                                                                                    \
    LORAY_ENTRY(rms_norm_##suffix##_)                                                                               \
    (const type* x, i64 x_stride, i64 num_tokens, i64 num_heads, i64 width, const type* weight, float eps,          \
     float offset, type* y, const type* pool, const i64* own, i64 num_own, const Rows* rows, int threads) {         \
        rms_norm(x, x_stride, num_tokens, num_heads, width, weight, eps, offset, y, pool, {num_own, own, rows},     \
                 threads);                                                                                          \
    }                                                                                                               \
    LORAY_ENTRY(scale_rows_##suffix##_)                                                                             \
    (type * y, i64 y_stride, i64 width, const type* bias, const type* pool, const i64* own, i64 num_own,            \
     const Rows* rows, int threads) {                                                                               \
        scale_rows(y, y_stride, width, bias, pool, {num_own, own, rows}, threads);                                  \
    }                                                                                                               \
    LORAY_ENTRY(turn_rows_##suffix##_)                                                                              \
    (type * y, i64 y_stride, i64 width, const type* pool, const i64* own, i64 num_own, const Rows* rows,            \
     const Rows* turn, const i64* distance, int threads) {                                                          \
        turn_rows(y, y_stride, width, pool, {num_own, own, rows}, *turn, distance, threads);                        \
    }                                                                                                               \
    LORAY_ENTRY(rope_##suffix##_)                                                                                   \
    (const type* x, i64 x_stride, i64 num_tokens, i64 num_heads, i64 width, i64 turned, const type* cos,            \
     const type* sin, type* y, int threads) {                                                                       \
        rope(x, x_stride, num_tokens, num_heads, width, turned, cos, sin, y, threads);                              \
    }                                                                                                               \
    LORAY_ENTRY(write_kv_##suffix##_)                                                                               \
    (type * pool, const Layout* layout, const type* k, i64 k_stride, const type* v, i64 v_stride, const i64* slots, \
     i64 num_tokens, int threads) {                                                                                 \
        write_kv(pool, *layout, k, k_stride, v, v_stride, slots, num_tokens, threads);                              \
    }

LORAY_ROWS(bf16, bf16)
LORAY_ROWS(float, fp32)
