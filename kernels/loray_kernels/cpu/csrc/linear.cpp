// Packs weights; y = x Wᵀ + bias with packed weights; and the activation of an MLP.

#include "products/quantized.h"

namespace LORAY_NAMESPACE {

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
                panel[k / S * COLUMNS * S + Step<T>::place(c) + k % S] = weight[(p * COLUMNS + c) * in + k];
    }
}

// q (out, in), int8 or two columns a byte, with scales and zeros of each output's groups.
template <int BITS>
static void pack_integers(const uint8_t* q, const float* scales, const float* zeros, i64 in, i64 out, i64 group,
                          uint8_t* packed, int threads) {
    constexpr i64 S = ByteStep::STEP, OFFSET = BITS == 8 ? 128 : 0;
    const i64 groups = in / group, size = group_bytes<BITS>(group);
#pragma omp parallel for num_threads(threads)
    for (i64 i = 0; i < ceil_div(out, COLUMNS) * groups; i++) {
        const i64 p = i / groups, g = i % groups;
        uint8_t* const at = packed + i * size;
        memset(at, 0, size);
        for (i64 c = 0; c < min_(COLUMNS, out - p * COLUMNS); c++) {
            const i64 row = p * COLUMNS + c, own = row * groups + g;
            ((float*)at)[c] = scales[own];
            at[4 * COLUMNS + c] = uint8_t(int(zeros[own]) + OFFSET);
            for (i64 k = 0; k < group; k++) {
                const i64 step = k / S, input = row * in + g * group + k;
                uint8_t* const unit = at + HEADER + c * S + k % S;
                if constexpr (BITS == 8)
                    unit[step * COLUMNS * S] = uint8_t(q[input] + OFFSET);
                else
                    unit[step / 2 * COLUMNS * S] |= (q[input / 2] >> input % 2 * 4 & 15) << step % 2 * 4;
            }
        }
    }
}

template <class T, class Y>
void linear(const T* x, i64 x_stride, i64 num_tokens, const Matrix<T>& w, Y* y, int threads, Meanwhile meanwhile) {
    const auto put = [y, width = w.out](i64 t, i64 column, auto n, Vec sums) {
        store_n(y + t * width + column, rounded(sums, (const T*)nullptr), n);
    };
    if (w.bits == 8)
        linear_of_integers<8>(x, x_stride, num_tokens, w, put, threads, meanwhile);
    else if (w.bits == 4)
        linear_of_integers<4>(x, x_stride, num_tokens, w, put, threads, meanwhile);
    else
        linear_of(x, x_stride, w, put, meanwhile)(num_tokens, threads);
}

// y = g σ(argument(g)) · u, with the first factor rounded before the product, as in torch.
template <class T, class Argument>
static void gated(const T* x, i64 x_stride, i64 num_tokens, i64 width, T* y, int threads, Argument argument) {
#pragma omp parallel for num_threads(threads) if (num_tokens * width > FEW_PRODUCTS / 8)
    for (i64 t = 0; t < num_tokens; t++) {
        const T *gate = x + t * x_stride, *up = gate + width;
        T* to = y + t * width;
        vectors(width, [&](i64 i, auto n) {
            const Vec g = load_n(gate + i, n), none = zero(), one = set1(1.0f);
            const Vec a = argument(g), e = exp(a < none ? a : none - a);  // e^−|a|, which cannot overflow
            const Vec activated = rounded(g * (a < none ? e : one) / (one + e), x);
            store_n(to + i, activated * load_n(up + i, n), n);
        });
    }
}

template <class T>
void silu_mul(const T* x, i64 x_stride, i64 num_tokens, i64 width, T* y, int threads) {
    gated(x, x_stride, num_tokens, width, y, threads, [](Vec g) { return g; });
}

// ½ g (1 + tanh a) = g σ(2 a), where a = √(2/π) (g + 0.044715 g³) approximates the error function's argument.
template <class T>
void gelu_mul(const T* x, i64 x_stride, i64 num_tokens, i64 width, T* y, int threads) {
    gated(x, x_stride, num_tokens, width, y, threads, [](Vec g) {
        return set1(1.5957691216f) * fma(set1(0.044715f) * g * g, g, g);
    });
}

#define LORAY_INSTANTIATE(T)                                                                  \
    template void linear<T, T>(const T*, i64, i64, const Matrix<T>&, T*, int, Meanwhile);                \
    template void silu_mul<T>(const T*, i64, i64, i64, T*, int);                                         \
    template void gelu_mul<T>(const T*, i64, i64, i64, T*, int);

LORAY_INSTANTIATE(bf16)
LORAY_INSTANTIATE(float)
template void linear<bf16, float>(const bf16*, i64, i64, const Matrix<bf16>&, float*, int, Meanwhile);

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

// Elements of a packed matrix.
LORAY_ENTRY(packed_size_)(i64 in, i64 out, i64 width, i64* size) {
    *size = ceil_div(out, COLUMNS) * (width == 2 ? panel_size<bf16>(in) : panel_size<float>(in));
}

// Bytes of a packed matrix of integers.
LORAY_ENTRY(packed_bytes_)(i64 in, i64 out, i64 bits, i64 group, i64* size) {
    *size = ceil_div(out, COLUMNS) * (in / group) * (bits == 8 ? group_bytes<8>(group) : group_bytes<4>(group));
}

LORAY_ENTRY(pack_integers_)
(const uint8_t* q, const float* scales, const float* zeros, i64 in, i64 out, i64 bits, i64 group, uint8_t* packed,
 int threads) {
    (bits == 8 ? pack_integers<8> : pack_integers<4>)(q, scales, zeros, in, out, group, packed, threads);
}

#define LORAY_LINEAR(type, suffix)                                                                                   \
    LORAY_ENTRY(pack_linear_##suffix##_)(const type* weight, i64 in, i64 out, type* packed, int threads) {           \
        pack(weight, in, out, packed, threads);                                                                      \
    }                                                                                                                \
    LORAY_ENTRY(linear_##suffix##_)                                                                                  \
    (const type* x, i64 x_stride, i64 num_tokens, const Matrix<type>* weights, type* y, int threads) {               \
        linear(x, x_stride, num_tokens, *weights, y, threads, {});                                                       \
    }                                                                                                                \
    LORAY_ENTRY(logits_##suffix##_)                                                                                  \
    (const type* x, i64 x_stride, i64 num_tokens, const Matrix<type>* weights, float* y, int threads) {              \
        linear(x, x_stride, num_tokens, *weights, y, threads, {});                                                       \
    }                                                                                                                \
    LORAY_ENTRY(silu_mul_##suffix##_)(const type* x, i64 x_stride, i64 num_tokens, i64 width, type* y, int threads) { \
        silu_mul(x, x_stride, num_tokens, width, y, threads);                                                        \
    }                                                                                                                \
    LORAY_ENTRY(gelu_mul_##suffix##_)(const type* x, i64 x_stride, i64 num_tokens, i64 width, type* y, int threads) { \
        gelu_mul(x, x_stride, num_tokens, width, y, threads);                                                        \
    }

LORAY_LINEAR(bf16, bf16)
LORAY_LINEAR(float, fp32)
