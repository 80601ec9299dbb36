// Products with quantised weights, as `quantized_linear` of reference.py has them: inputs are quantised row by row, sums of
// whole numbers are exact, and what comes after them is computed in the same order, so that the bits are the reference's.
//
// A panel has its groups of inputs one after the other, each with the scales and the zeros of its COLUMNS outputs before
// the weights. These are bytes, q + 128 of int8, or two steps of int4 in one: zeros are stored likewise.
#pragma once

#include "linear.h"
#include "../simd/bytes.h"

namespace LORAY_NAMESPACE {

constexpr i64 UNIT = 2 * ByteStep::STEP;  // inputs of two steps
constexpr i64 HEADER = ceil_div(COLUMNS * 5, 4 * W) * 4 * W;  // bytes: scales and zeros

template <int BITS>
static i64 group_bytes(i64 group) {
    return HEADER + ceil_div(group, UNIT) * UNIT * COLUMNS * BITS / 8;
}

constexpr i64 FEW_INPUTS = 1 << 15;  // below which one thread is faster

// Inputs, `stride` apart, with zeros up to a whole vector behind them; the sum of each group, and the scale of each token.
struct QuantizedInputs {
    ByteStep::Operand* at;
    i64 stride;
    int32_t* sums;
    float* scales;
};

// The row of one token, see `quantize_rows`. `sums`: of the groups.
template <class T>
static inline float quantize_row(const T* x, i64 width, i64 group, ByteStep::Operand* to, int32_t* sums) {
    typedef ByteStep::Operand Narrow __attribute__((vector_size(W * sizeof(ByteStep::Operand))));
    Ints most = {};  // of floats without their sign, which are in the order of their bits, and infinite and NaN above all
    vectors(width, [&](i64 i, auto n) {
        const Ints bits = (Ints)load_n(x + i, n) & 0x7fffffff;
        most = bits > most ? bits : most;
    });
    int32_t bits = 0;
    for (int i = 0; i < W; i++) bits = most[i] > bits ? most[i] : bits;
    float largest;
    memcpy(&largest, &bits, 4);
    const bool is_finite = bits < 0x7f800000;
    const Vec inverse = set1(is_finite && largest >= 1e-30f ? 127.0f / largest : 0.0f);
    const Vec magic = set1(12582912.0f);  // adding 1.5 · 2²³ rounds to a whole number
    for (i64 first = 0; first < width; first += group) {
        Ints sum = {};
        vectors(min_(group, width - first), [&](i64 i, auto n) {
            Ints q = (Ints)(load_n(x + first + i, n) * inverse + magic) - (Ints)magic;
            if (!is_finite) q = Ints{};
            const Narrow narrow = __builtin_convertvector(q, Narrow);
            memcpy(to + first + i, &narrow, sizeof narrow);
            sum += q;
        });
        *sums = 0;
        for (int i = 0; i < W; i++) *sums += sum[i];
        sums++;
    }
    return is_finite ? largest / 127.0f : __builtin_nanf("");
}

// All tokens' rows, in memory that is valid in this thread until the next call.
template <class T>
static QuantizedInputs quantized(const T* x, i64 x_stride, i64 num_tokens, i64 width, i64 group, int threads) {
    static thread_local Scratch memory;
    const i64 stride = ceil_div(width, 16) * 16, groups = width / group;
    const i64 token = stride * i64(sizeof(ByteStep::Operand)) + 4 * groups + 4;
    QuantizedInputs in;
    in.at = (ByteStep::Operand*)memory.get(max_(1, num_tokens) * token);
    in.stride = stride;
    in.sums = (int32_t*)(in.at + num_tokens * stride);
    in.scales = (float*)(in.sums + num_tokens * groups);
#pragma omp parallel for num_threads(threads) if (num_tokens * width > FEW_INPUTS)
    for (i64 t = 0; t < num_tokens; t++)
        in.scales[t] = quantize_row(x + t * x_stride, width, group, in.at + t * stride, in.sums + t * groups);
    return in;
}

template <int BITS>
struct QuantizedProduct {
    using Operand = ByteStep::Operand;
    static constexpr i64 UNITS = UNROLL / 2, FETCHED = UNITS * UNIT * COLUMNS * BITS / 8;

    QuantizedInputs rows;
    i64 in, group;

    i64 panel_bytes() const { return in / group * group_bytes<BITS>(group); }
    i64 fetches() const { return in / group * (group / UNIT / UNITS); }
    Inputs<Operand> inputs(i64 first, i64) const { return {rows.at + first * rows.stride, rows.stride, first}; }

    template <int NT, int NV>
    TILE void multiply(const Inputs<Operand>& inputs, i64 token, const char* at, PanelFetch& fetch,
                       Vec (&total)[NT][NV]) const {
        using S = ByteStep;
        typedef uint8_t Bytes __attribute__((vector_size(W)));
        constexpr i64 STEP = COLUMNS * S::STEP;  // bytes
        const i64 groups = in / group, units = ceil_div(group, UNIT), stride = inputs.stride;
        const Operand* from = inputs.token(token);
        for (i64 g = 0; g < groups; g++) {
            const float* const scales = (const float*)at;
            const uint8_t* const zeros = (const uint8_t*)(scales + COLUMNS);
            const uint8_t* panel = (const uint8_t*)at + HEADER;
            Ints acc[NT][NV];
            each<NT * NV>([&](auto i) { acc[i / NV][i % NV] = Ints{}; });
            const auto unit = [&](i64 u) {
                const auto step = [&](const S::Weights(&weights)[NV], i64 input) {
                    each<NT>([&](auto t) {
                        const auto value = S::input(from + t * stride + input);
                        each<NV>([&](auto v) { acc[t][v] = S::mac(acc[t][v], weights[v], value); });
                    });
                };
                S::Weights first[NV], second[NV];
                if constexpr (BITS == 4) {
                    each<NV>([&](auto v) { S::halves(panel + u * STEP + v * W * S::STEP, first[v], second[v]); });
                    step(first, u * UNIT);
                } else {
                    each<NV>([&](auto v) { first[v] = S::weights(panel + 2 * u * STEP + v * W * S::STEP); });
                    step(first, u * UNIT);
                    each<NV>([&](auto v) { second[v] = S::weights(panel + (2 * u + 1) * STEP + v * W * S::STEP); });
                }
                step(second, u * UNIT + S::STEP);
            };
            i64 k = 0;
            for (; k + UNITS <= units; k += UNITS) {
                for (i64 u = k; u < k + UNITS; u++) unit(u);
                fetch.some();
            }
            for (; k < units; k++) unit(k);
            if (fetch.lines == ceil_div(FETCHED, 64)) fetch.panel(ceil_div(HEADER, 64));  // of one tile alone
            each<NV>([&](auto v) {
                Bytes bytes;
                memcpy(&bytes, zeros + v * W, sizeof bytes);
                const Ints zero = __builtin_convertvector(bytes, Ints) - (BITS == 8 ? S::SUBTRACTED : 0);
                const Vec scale = load(scales + v * W);
                each<NT>([&](auto t) {
                    const Ints sums = acc[t][v] - zero * rows.sums[(token + t) * groups + g];
                    const Vec own = to_floats(sums) * scale;
                    total[t][v] = g ? total[t][v] + own : own;
                });
            });
            from += group, at += group_bytes<BITS>(group);
        }
        each<NT * NV>([&](auto i) {
            total[i / NV][i % NV] = total[i / NV][i % NV] * set1(rows.scales[token + i / NV]);
        });
    }
};

// y = x Wᵀ + bias with quantised weights; see `linear_of`.
template <int BITS, class T, class Put>
static inline void linear_of_integers(const T* x, i64 x_stride, i64 num_tokens, const Matrix<T>& w, Put put, int threads,
                                      Meanwhile meanwhile) {
    const QuantizedInputs rows = quantized(x, x_stride, num_tokens, w.in, w.group, threads);
    linear_by<T>(QuantizedProduct<BITS>{rows, w.in, w.group}, w, put, meanwhile)(num_tokens, threads);
}

}  // namespace LORAY_NAMESPACE
