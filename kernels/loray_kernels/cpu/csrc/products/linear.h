// y = x Wᵀ + bias with packed weights: `Product` knows how they are packed, `put` decides what is done with each sum.
//
// A panel is COLUMNS outputs of W with all their inputs, in the order in which a tile of up to TOKENS tokens reads
// them. Each output has one accumulator over the inputs in order, so a token's result is the same, bit for bit, in any
// batch. While one panel is multiplied the next is prefetched, a few cache lines at a time.
#pragma once

#include <omp.h>

#include "ahead.h"
#include "../kernels.h"
#include "../shares.h"
#include "../simd/run.h"

namespace LORAY_NAMESPACE {

// The sums of a tile, with a step's weights and an input, fit the registers. AVX2 has sixteen, and widening bf16 to fp32
// takes as many instructions there as two sums do, so more of its tokens share them. ARM has
// thirty-two, of four floats: more columns, so that one token alone has enough sums that do not wait for each other.
constexpr int VECTORS = W == 8 ? 2 : W == 4 && REGISTERS == 32 ? 5 : 3, COLUMNS = VECTORS * W;
constexpr int TOKENS = W == 16 ? 8 : W == 8 ? 6 : 4;
constexpr i64 FEW_PRODUCTS = 1 << 14;  // below which waking the other threads costs more than they save
constexpr i64 AHEAD = 4096;      // bytes that a single tile prefetches ahead
constexpr i64 BLOCK = W == 16 ? 128 : 64;  // tokens of a block, about
constexpr i64 UNROLL = 8;        // steps between two prefetches
constexpr i64 MOST_LINES = 12;   // of other rows then: more would wait for each other

// One step over the inputs: STEP inputs of one token are added to VECTORS vectors of outputs. After CHUNK steps the sums
// are added to totals: the error of one long sum grows with its length, that of a sum of sums much less. For bf16 it is
// 0, never: rounding the inputs is coarser, and the totals would take a tenth of the time.
template <class T>
struct Step {
    static constexpr int STEP = 1;
    static constexpr i64 CHUNK = sizeof(T) == 2 ? 0 : 64;
    using Operand = float;  // what the inputs are converted to, once for all panels
    using Input = Vec;
    static inline Vec input(const float* x) { return set1(*x); }
    static inline Vec last(const float* x) { return input(x); }
    // Where a step's weight of output `c` is, and vector v of them.
    static constexpr i64 place(i64 c) { return c / (R * W) * R * W + c % W * R + c / W % R; }
    template <int v>
    static inline Vec weights(const T* w) {
        return Run<T>::template part<v % R>(w + v / R * R * W);
    }
    static inline Vec mac(Vec acc, Vec x, Vec w) { return fma(x, w, acc); }

  private:
    static constexpr i64 R = Run<T>::N;  // outputs W apart lie side by side, so that they are widened without shuffles
};
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
    static constexpr int STEP = 2;
    static constexpr i64 CHUNK = 0;
    using Operand = bf16;
    using Input = __m512bh;
    static inline __m512bh input(const bf16* x) {
        int pair;
        memcpy(&pair, x, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static inline __m512bh last(const bf16* x) { return (__m512bh)_mm512_set1_epi32(x->bits); }
    static constexpr i64 place(i64 c) { return c * STEP; }
    template <int v>
    static inline __m512bh weights(const bf16* w) {
        return (__m512bh)_mm512_loadu_si512(w + v * W * STEP);
    }
    static inline Vec mac(Vec acc, __m512bh x, __m512bh w) { return _mm512_dpbf16_ps(acc, x, w); }
};
#endif

// AMX multiplies tiles of 32 tokens by 32 inputs at once, see amx.h.
#if defined(__AMX_BF16__)
template <class T>
constexpr bool BY_AMX = sizeof(T) == 2;
#else
template <class T>
constexpr bool BY_AMX = false;
#endif

template <class T>
static i64 panel_size(i64 in) {
    constexpr i64 WHOLE = BY_AMX<T> ? 32 : Step<T>::STEP;
    return ceil_div(in, WHOLE) * WHOLE * COLUMNS;
}

// Cache lines that are prefetched during the multiplication: those of the next panel, `lines` at a time, and other rows,
// `row_lines` at a time.
struct PanelFetch {
    const char* at;
    i64 lines;
    Prefetch rows;
    i64 row_lines;
    inline void panel(i64 num) {
        for (i64 n = 0; n < num; n++) __builtin_prefetch(at + n * 64, 0, 2);
        at += num * 64;
    }
    inline void some() {
        panel(lines);
        rows.some(row_lines);
    }
};

// The inputs of the tokens from `first` on, `stride` apart.
template <class Operand>
struct Inputs {
    const Operand* at;
    i64 stride, first;
    const Operand* token(i64 t) const { return at + (t - first) * stride; }
};

static inline Inputs<bf16> converted(const bf16* x, i64 x_stride, i64, i64 first, i64, const bf16*) {
    return {x + first * x_stride, x_stride, first};
}
static inline Inputs<float> converted(const float* x, i64 x_stride, i64, i64 first, i64, const float*) {
    return {x + first * x_stride, x_stride, first};
}
// Tokens [first, last) in memory of the thread.
static inline Inputs<float> converted(const bf16* x, i64 x_stride, i64 width, i64 first, i64 last, const float*) {
    static thread_local Scratch memory;
    float* at = (float*)memory.get((last - first) * width * sizeof(float));
    for (i64 t = first; t < last; t++)
        vectors(width, [&](i64 i, auto n) { store_n(at + (t - first) * width + i, load_n(x + t * x_stride + i, n), n); });
    return {at, width, first};
}

// Weights and inputs of the same type T.
template <class T>
struct PlainProduct {
    using Operand = typename Step<T>::Operand;
    static constexpr bool WHOLE_TILES = false;
    static constexpr int TILE = BY_AMX<T> ? 32 : TOKENS;  // tokens
    static constexpr i64 PAUSE = BY_AMX<T> ? 32 : UNROLL * Step<T>::STEP;  // inputs between two prefetches
    static constexpr i64 FETCHED = PAUSE * COLUMNS * i64(sizeof(T));       // bytes

    const T* x;
    i64 x_stride;
    const Matrix<T>& w;

    i64 panel_bytes() const { return panel_size<T>(w.in) * i64(sizeof(T)); }
    i64 fetches() const { return w.in / PAUSE; }  // of a tile
    Inputs<Operand> inputs(i64 first, i64 last) const {
        return converted(x, x_stride, w.in, first, last, (const Operand*)nullptr);
    }

    template <int NT, int NV>
    static inline void put_aside(Vec (&acc)[NT][NV], float (&total)[NT][NV][W]) {
        each<NT * NV>([&](auto i) {
            Vec& own = acc[i / NV][i % NV];
            store(total[i / NV][i % NV], load(total[i / NV][i % NV]) + own);
            own = zero();
        });
    }

    // The first NV vectors of a panel.
    template <int NT, int NV>
    inline void multiply(const Inputs<Operand>& inputs, i64 token, const char* at, PanelFetch& fetch,
                       Vec (&sums)[NT][NV]) const {
        using S = Step<T>;
        constexpr i64 WIDTH = COLUMNS * S::STEP;
        const T* const panel = (const T*)at;
        const Operand* from = inputs.token(token);
        const i64 stride = inputs.stride;
        Vec acc[NT][NV];
        [[maybe_unused]] float total[NT][NV][W];
        each<NT * NV>([&](auto i) {
            if constexpr (S::CHUNK > 0) store(total[i / NV][i % NV], zero());
            acc[i / NV][i % NV] = zero();
        });
        const i64 steps = w.in / S::STEP, all = ceil_div(w.in, S::STEP);
        i64 k = 0;
        for (; k + UNROLL <= steps; k += UNROLL) {
            if constexpr (S::CHUNK > 0)
                if (k && k % S::CHUNK == 0) put_aside<NT, NV>(acc, total);
            for (i64 u = k; u < k + UNROLL; u++) {
                typename S::Input weights[NV];
                each<NV>([&](auto v) { weights[v] = S::template weights<v>(panel + u * WIDTH); });
                each<NT>([&](auto t) {
                    const typename S::Input value = S::input(from + t * stride + u * S::STEP);
                    each<NV>([&](auto v) { acc[t][v] = S::mac(acc[t][v], value, weights[v]); });
                });
            }
            fetch.some();
        }
        for (; k < all; k++)
            each<NT>([&](auto t) {
                const Operand* at = from + t * stride + k * S::STEP;
                const typename S::Input value = k < steps ? S::input(at) : S::last(at);
                each<NV>([&](auto v) {
                    acc[t][v] = S::mac(acc[t][v], value, S::template weights<v>(panel + k * WIDTH));
                });
            });
        if constexpr (S::CHUNK > 0) put_aside<NT, NV>(acc, total);
        each<NT * NV>([&](auto i) {
            sums[i / NV][i % NV] = S::CHUNK > 0 ? load(total[i / NV][i % NV]) : acc[i / NV][i % NV];
        });
    }
};

// The sums of `count` tokens from `token` on with the first `num_vectors` vectors of a panel: VECTORS, or 1. Whatever is
// done with them: a tile takes long to compile. See tile.h.
template <class Product>
void sums_of(const Product& product, i64 count, i64 num_vectors, const Inputs<typename Product::Operand>& inputs,
             i64 token, const char* panel, PanelFetch& fetch, float* sums);

// put(t, column, n, sums) takes the outputs of token t from `column` on; n as in `vectors`.
template <class T, class Product, class Put>
struct Linear {
    Product product;
    const Matrix<T>& w;
    Put put;
    Meanwhile meanwhile = {};

    using Operand = typename Product::Operand;

    // One vector of outputs of each token; the sums of neighbouring tokens are `num_vectors` vectors apart.
    template <class N>
    inline void finish(const float* sums, i64 num_vectors, i64 count, i64 token, i64 column, N n) const {
        const Put own = put;  // which its stores cannot change, as a compiler sees
        const Vec add = w.bias ? load_n(w.bias + column, n) : zero();
        for (i64 t = 0; t < count; t++) own(token + t, column, n, load(sums + t * num_vectors * W) + add);
    }

    // Tokens [inputs.first, last) with one panel. The tiles are as equal as possible: a small one costs as much as a full
    // one. Some products want whole ones.
    void panel(i64 p, const Inputs<Operand>& inputs, i64 last, const Prefetch& rows) const {
        const i64 size = product.panel_bytes(), num = last - inputs.first, tiles = ceil_div(num, Product::TILE);
        const char* weights = (const char*)w.packed + p * size;
        const i64 times = max_(1, tiles * product.fetches());
        PanelFetch fetch = {weights + (tiles == 1 ? AHEAD : size), ceil_div(ceil_div(Product::FETCHED, 64), tiles), rows,
                            min_(MOST_LINES, ceil_div(rows.left, times))};
        if (tiles > 32) fetch.lines = 0;  // with so many tokens, memory is no bottleneck
        const i64 num_vectors = p * COLUMNS + W < w.out ? VECTORS : 1;  // only the last panel may have fewer than all
        alignas(64) float sums[Product::TILE * COLUMNS];
        for (i64 i = 0, t = inputs.first; i < tiles; i++) {
            const i64 count = Product::WHOLE_TILES ? min_(Product::TILE, last - t) : num / tiles + (i < num % tiles);
            sums_of(product, count, num_vectors, inputs, t, weights, fetch, sums);
            for (i64 v = 0; v < num_vectors; v++) {
                const i64 column = p * COLUMNS + v * W, left = w.out - column;
                if (left >= W)
                    finish(sums + v * W, num_vectors, count, t, column, Whole{});
                else if (left > 0)
                    finish(sums + v * W, num_vectors, count, t, column, left);
            }
            t += count;
        }
    }

    i64 work(i64 num_tokens) const { return num_tokens * w.in * w.out; }

    i64 panels() const { return ceil_div(w.out, COLUMNS); }

    // Blocks of tokens that fit the second-level cache go through all panels; there are more blocks if there are too few
    // panels for the threads.
    i64 blocks(i64 num_tokens, int threads) const {
        const i64 few = min_(ceil_div(num_tokens, 8 * TOKENS), ceil_div(4 * threads, panels()));
        return max_(1, max_(few, num_tokens / BLOCK));
    }

    // Tokens of a block: of several, whole tiles.
    static i64 block(i64 num_tokens, i64 num) {
        const i64 size = ceil_div(num_tokens, num);
        return num > 1 ? ceil_div(size, Product::TILE) * Product::TILE : size;
    }

    Shares shares(i64 num_tokens, int threads) const { return {panels() * blocks(num_tokens, threads), threads}; }

    // Inside a parallel region, whose end waits for all panels.
    void multiply(Shares& shares, i64 num_tokens, int threads) const {
        const i64 num = panels() * blocks(num_tokens, threads), size = block(num_tokens, num / panels());
        const bool ahead = meanwhile.rows && num_tokens > TOKENS;  // with fewer tokens memory is the bottleneck
        Inputs<Operand> inputs = {nullptr, 0, -1};
        shares.each(omp_get_thread_num(), [&](i64 i, i64) {
            const i64 first = i / panels() * size, last = min_(num_tokens, first + size);
            if (first >= last) return;
            if (inputs.first != first) inputs = product.inputs(first, last);
            panel(i % panels(), inputs, last,
                  ahead ? meanwhile.rows->part(meanwhile, i, num) : Prefetch{});
        });
    }

    void operator()(i64 num_tokens, int threads) const {
        Shares all = shares(num_tokens, threads);
#pragma omp parallel num_threads(threads) if (work(num_tokens) > FEW_PRODUCTS)
        multiply(all, num_tokens, threads);
    }
};

template <class T, class Product, class Put>
static inline Linear<T, Product, Put> linear_by(Product product, const Matrix<T>& w, Put put, Meanwhile meanwhile = {}) {
    return {product, w, put, meanwhile};
}

// With weights of T.
template <class T, class Put>
static inline auto linear_of(const T* x, i64 x_stride, const Matrix<T>& w, Put put, Meanwhile meanwhile = {}) {
    return linear_by<T>(PlainProduct<T>{x, x_stride, w}, w, put, meanwhile);
}

}  // namespace LORAY_NAMESPACE
