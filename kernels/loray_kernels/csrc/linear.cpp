// y = x Wᵀ + bias on weights that were packed once, and what stands between two of them in an MLP.
//
// A panel is COLUMNS outputs of W with all their inputs, in the order in which a tile of up to TOKENS tokens reads
// them. Every output is one accumulator over the inputs in order: a token's result is the same, bit for bit, whatever
// the batch. While one panel is multiplied the next comes out of memory, a few cache lines at a time.

#include "kernels.h"

namespace LORAY_NAMESPACE {

constexpr int VECTORS = 3, COLUMNS = VECTORS * W, TOKENS = W == 16 ? 8 : 4;
constexpr i64 SERIAL = 1 << 14;  // multiply-adds below which waking the other threads costs more than they save
constexpr i64 AHEAD = 4096;      // bytes that a lone tile fetches ahead of itself
constexpr i64 BLOCK = 128;       // tokens, about
constexpr i64 UNROLL = 8;        // steps between two pauses for fetching

// One step over the inputs: STEP of them, of one token, into VECTORS vectors of outputs. After CHUNK steps the sums are
// put aside: the error of a long sum grows with its length, that of a sum of sums much less.
template <class T>
struct Step {
    static constexpr int STEP = 1;
    static constexpr i64 CHUNK = 64;
    using Input = Vec;
    static inline Vec input(const T* x) { return set1(to_float(*x)); }
    static inline Vec last(const T* x) { return input(x); }
    static inline Vec mac(Vec acc, Vec x, const T* w) { return fma(x, load(w), acc); }
};
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
    static constexpr int STEP = 2;
    static constexpr i64 CHUNK = 0;  // never: bf16 itself is coarser
    using Input = __m512bh;
    static inline __m512bh input(const bf16* x) {
        int pair;
        memcpy(&pair, x, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static inline __m512bh last(const bf16* x) { return (__m512bh)_mm512_set1_epi32(x->bits); }
    static inline Vec mac(Vec acc, __m512bh x, const bf16* w) {
        return _mm512_dpbf16_ps(acc, x, (__m512bh)_mm512_loadu_si512(w));
    }
};
#endif

template <class T>
static i64 panel_size(i64 in) {
    return ceil_div(in, Step<T>::STEP) * Step<T>::STEP * COLUMNS;
}

template <class T>
static void pack(const T* weight, i64 in, i64 out, T* packed, int threads) {
    constexpr int S = Step<T>::STEP;
    const i64 size = panel_size<T>(in);
#pragma omp parallel for num_threads(threads)
    for (i64 p = 0; p < ceil_div(out, COLUMNS); p++) {
        T* panel = packed + p * size;
        memset((void*)panel, 0, size * sizeof(T));
        for (i64 c = 0; c < min_(COLUMNS, out - p * COLUMNS); c++)
            for (i64 k = 0; k < in; k++)
                panel[k / S * COLUMNS * S + c * S + k % S] = weight[(p * COLUMNS + c) * in + k];
    }
}

// Cache lines that the multiplication fetches on its way, `lines` at each pause.
struct PanelFetch {
    const char* at;
    i64 lines;
    inline void some() {
        for (i64 n = 0; n < lines; n++) __builtin_prefetch(at + n * 64, 0, 2);
        at += lines * 64;
    }
};

template <class T, class Y>
struct Linear {
    const T* x;
    i64 x_stride;
    i64 in, out;
    const T *packed, *bias;
    Y* y;
    i64 y_stride;

    template <int NT>
    static inline void put_aside(Vec (&acc)[NT][VECTORS], float (&total)[NT][VECTORS][W]) {
        for (int t = 0; t < NT; t++)
            for (int v = 0; v < VECTORS; v++) {
                store(total[t][v], load(total[t][v]) + acc[t][v]);
                acc[t][v] = zero();
            }
    }

    template <int NT>
    inline void tile(const T* from, const T* panel, i64 column, Y* to, PanelFetch& fetch) const {
        using S = Step<T>;
        constexpr i64 WIDTH = COLUMNS * S::STEP;
        Vec acc[NT][VECTORS];
        [[maybe_unused]] float total[NT][VECTORS][W];
        if constexpr (S::CHUNK > 0) memset(total, 0, sizeof(total));
        for (int t = 0; t < NT; t++)
            for (int v = 0; v < VECTORS; v++) acc[t][v] = zero();
        const i64 steps = in / S::STEP, all = ceil_div(in, S::STEP);
        i64 k = 0;
        for (; k + UNROLL <= steps; k += UNROLL) {
            if constexpr (S::CHUNK > 0)
                if (k && k % S::CHUNK == 0) put_aside<NT>(acc, total);
            for (i64 u = k; u < k + UNROLL; u++)
                for (int t = 0; t < NT; t++) {
                    const typename S::Input value = S::input(from + t * x_stride + u * S::STEP);
                    for (int v = 0; v < VECTORS; v++)
                        acc[t][v] = S::mac(acc[t][v], value, panel + u * WIDTH + v * W * S::STEP);
                }
            fetch.some();
        }
        for (; k < all; k++)
            for (int t = 0; t < NT; t++) {
                const T* at = from + t * x_stride + k * S::STEP;
                const typename S::Input value = k < steps ? S::input(at) : S::last(at);
                for (int v = 0; v < VECTORS; v++)
                    acc[t][v] = S::mac(acc[t][v], value, panel + k * WIDTH + v * W * S::STEP);
            }
        if constexpr (S::CHUNK > 0) {
            put_aside<NT>(acc, total);
            for (int t = 0; t < NT; t++)
                for (int v = 0; v < VECTORS; v++) acc[t][v] = load(total[t][v]);
        }
        if (column + COLUMNS <= out)
            finish<NT>(acc, column, to, [](int) { return Whole{}; });
        else
            finish<NT>(acc, column, to, [&](int v) { return max_(0, min_(W, out - column - v * W)); });
    }

    // `width(v)`: how much of vector v there is.
    template <int NT, class F>
    inline void finish(const Vec (&acc)[NT][VECTORS], i64 column, Y* to, F width) const {
        for (int v = 0; v < VECTORS; v++) {
            const Vec add = bias ? load_n(bias + column + v * W, width(v)) : zero();
            for (int t = 0; t < NT; t++)
                store_n(to + t * y_stride + column + v * W, rounded(acc[t][v] + add, x), width(v));
        }
    }

    // Tokens [first, last) with one panel. The tiles are as equal as can be: a small one costs as much as a full one.
    void panel(i64 p, i64 first, i64 last) const {
        const i64 size = panel_size<T>(in), num = last - first, tiles = ceil_div(num, TOKENS);
        if (num <= 0) return;
        const T* weights = packed + p * size;
        const i64 lines = ceil_div(UNROLL * COLUMNS * Step<T>::STEP * i64(sizeof(T)), 64);
        PanelFetch fetch = {(const char*)weights + (tiles == 1 ? AHEAD : size * i64(sizeof(T))), ceil_div(lines, tiles)};
        if (tiles > 32) fetch.lines = 0;  // so many tokens make the memory's part nothing
        for (i64 i = 0, t = first; i < tiles; i++) {
            const i64 count = num / tiles + (i < num % tiles);
            const T* from = x + t * x_stride;
            Y* to = y + t * y_stride;
            switch (count) {
                case 1: tile<1>(from, weights, p * COLUMNS, to, fetch); break;
                case 2: tile<2>(from, weights, p * COLUMNS, to, fetch); break;
                case 3: tile<3>(from, weights, p * COLUMNS, to, fetch); break;
                case 4: tile<4>(from, weights, p * COLUMNS, to, fetch); break;
#if defined(__AVX512BF16__)
                case 5: tile<5>(from, weights, p * COLUMNS, to, fetch); break;
                case 6: tile<6>(from, weights, p * COLUMNS, to, fetch); break;
                case 7: tile<7>(from, weights, p * COLUMNS, to, fetch); break;
                case 8: tile<8>(from, weights, p * COLUMNS, to, fetch); break;
#endif
            }
            t += count;
        }
    }

    // Blocks of tokens that the second cache holds go through all panels; more of them where there are fewer panels
    // than threads could use. Every thread has a stretch of panels, or of blocks.
    void operator()(i64 num_tokens, int threads) const {
        const i64 panels = ceil_div(out, COLUMNS);
        const i64 few = min_(ceil_div(num_tokens, 8 * TOKENS), ceil_div(4 * threads, panels));
        const i64 blocks = max_(1, max_(few, num_tokens / BLOCK)), size = ceil_div(num_tokens, blocks);
#pragma omp parallel for schedule(static) num_threads(threads) if (num_tokens * in * out > SERIAL)
        for (i64 i = 0; i < panels * blocks; i++)
            panel(i % panels, i / panels * size, min_(num_tokens, (i / panels + 1) * size));
    }
};

template <class T, class Y>
void linear(const T* x, i64 x_stride, i64 num_tokens, const Matrix<T>& w, Y* y, int threads) {
    Linear<T, Y>{x, x_stride, w.in, w.out, w.packed, w.bias, y, w.out}(num_tokens, threads);
}

// y = silu(g) · u, with silu(g) rounded before the product, as torch does it.
template <class T>
void silu_mul(const T* x, i64 x_stride, i64 num_tokens, i64 width, T* y, int threads) {
#pragma omp parallel for num_threads(threads) if (num_tokens * width > SERIAL / 8)
    for (i64 t = 0; t < num_tokens; t++) {
        const T *gate = x + t * x_stride, *up = gate + width;
        T* to = y + t * width;
        vectors(width, [&](i64 i, auto n) {
            const Vec g = load_n(gate + i, n), none = zero(), one = set1(1.0f);
            const Vec e = exp(g < none ? g : none - g);  // e^−|g|, which cannot overflow
            const Vec silu = rounded(g * (g < none ? e : one) / (one + e), x);
            store_n(to + i, silu * load_n(up + i, n), n);
        });
    }
}

#define LORAY_INSTANTIATE(T)                                                                  \
    template void linear<T, T>(const T*, i64, i64, const Matrix<T>&, T*, int);                \
    template void silu_mul<T>(const T*, i64, i64, i64, T*, int);

LORAY_INSTANTIATE(bf16)
LORAY_INSTANTIATE(float)

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

// Elements of a packed matrix.
LORAY_ENTRY(packed_size_)(i64 in, i64 out, i64 width, i64* size) {
    *size = ceil_div(out, COLUMNS) * (width == 2 ? panel_size<bf16>(in) : panel_size<float>(in));
}

#define LORAY_LINEAR(type, suffix)                                                                                   \
    LORAY_ENTRY(pack_linear_##suffix##_)(const type* weight, i64 in, i64 out, type* packed, int threads) {           \
        pack(weight, in, out, packed, threads);                                                                      \
    }                                                                                                                \
    LORAY_ENTRY(linear_##suffix##_)                                                                                  \
    (const type* x, i64 x_stride, i64 num_tokens, const Matrix<type>* weights, type* y, int threads) {               \
        linear(x, x_stride, num_tokens, *weights, y, threads);                                                       \
    }                                                                                                                \
    LORAY_ENTRY(logits_##suffix##_)                                                                                  \
    (const type* x, i64 x_stride, i64 num_tokens, const Matrix<type>* weights, float* y, int threads) {              \
        linear(x, x_stride, num_tokens, *weights, y, threads);                                                       \
    }                                                                                                                \
    LORAY_ENTRY(silu_mul_##suffix##_)(const type* x, i64 x_stride, i64 num_tokens, i64 width, type* y, int threads) { \
        silu_mul(x, x_stride, num_tokens, width, y, threads);                                                        \
    }

LORAY_LINEAR(bf16, bf16)
LORAY_LINEAR(float, fp32)
