// Products with quantised weights, as `quantized_linear` of reference.py has them: inputs are quantised row by row, sums of
// whole numbers are exact, and what comes after them is computed in the same order, so that the bits are the reference's.
// Few inputs are larger than an operand: what they have beyond it is added in further steps, which a row has a list of.
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

// What an input has beyond ByteStep::MOST, in one more of its step in a group.
struct Extra {
    int32_t step;
    ByteStep::Operand inputs[4 / sizeof(ByteStep::Operand)];
};

// Inputs, `stride` apart, with zeros up to a whole vector behind them; the sum of each group, and the end of its extras
// among those of the token; the scale of each token.
struct QuantizedInputs {
    i64 stride, groups, most_extras;  // of a token
    ByteStep::Operand* at;
    Extra* extras;
    int32_t *sums, *ends;
    float* scales;
};

template <class F>
static inline int64_t sum_of(F lane) {
    int64_t sum = 0;
    for (int i = 0; i < W; i++) sum += lane(i);
    return sum;
}

// The row of token t, see `quantize_activations`.
template <class T>
static inline void quantize_row(const T* x, i64 width, i64 t, const QuantizedInputs& in) {
    using S = ByteStep;
    typedef S::Operand Narrow __attribute__((vector_size(W * sizeof(S::Operand))));
    const Vec magic = set1(12582912.0f);  // adding 1.5 · 2²³ rounds to a whole number
    const auto whole = [&](Vec v) { return (Ints)(v + magic) - (Ints)magic; };
    Ints most = {};  // of floats without their sign, which are in the order of their bits, and infinite and NaN above all
    vectors(width, [&](i64 i, auto n) {
        const Ints bits = (Ints)load_n(x + i, n) & 0x7fffffff;
        most = bits > most ? bits : most;
    });
    int32_t bits = 0;
    for (int i = 0; i < W; i++) bits = most[i] > bits ? most[i] : bits;
    float largest;
    memcpy(&largest, &bits, 4);
    const bool is_finite = bits < 0x7f800000, is_some = is_finite && largest >= 1e-30f;
    const Vec fine = set1(is_some ? 32767.0f / largest : 0.0f);
    Ints all = {};
    vectors(width, [&](i64 i, auto n) {
        all += whole((Vec)((Ints)load_n(x + i, n) & 0x7fffffff) * fine) & (is_finite ? -1 : 0);
    });
    const float share = float(sum_of([&](int i) { return all[i]; })) / float(32767 * width);
    const float beyond = largest * (share * 8.0f), limit = beyond < largest ? beyond : largest;
    const Vec inverse = set1(is_some ? 127.0f / limit : 0.0f);
    in.scales[t] = is_finite ? limit / 127.0f : __builtin_nanf("");

    const i64 group = width / in.groups;
    S::Operand* to = in.at + t * in.stride;
    Extra* const extras = in.extras + t * in.most_extras;
    int32_t num = 0;
    for (i64 g = 0; g < in.groups; g++, x += group, to += group) {
        Ints sum = {};
        vectors(group, [&](i64 i, auto n) {
            Ints q = whole(load_n(x + i, n) * inverse);
            if (!is_finite) q = Ints{};
            Ints inside = q > S::MOST ? Ints{} + S::MOST : q;
            inside = inside < -S::MOST ? Ints{} - S::MOST : inside;
            const Narrow narrow = __builtin_convertvector(inside, Narrow);
            memcpy(to + i, &narrow, sizeof narrow);
            sum += q;
            if (!S::any(q - inside)) return;
            for (i64 k = 0; k < W; k++)
                for (int32_t left = q[k] - inside[k]; left;) {
                    const int32_t now = int32_t(max_(-S::MOST, min_(S::MOST, left)));
                    Extra& extra = extras[num++] = {int32_t((i + k) / S::STEP), {}};
                    extra.inputs[(i + k) % S::STEP] = S::Operand(now);
                    left -= now;
                }
        });
        in.sums[t * in.groups + g] = int32_t(sum_of([&](int i) { return sum[i]; }));
        in.ends[t * in.groups + g] = num;
    }
}

// All tokens' rows, in memory that is valid in this thread until the next call.
template <class T>
static QuantizedInputs quantized(const T* x, i64 x_stride, i64 num_tokens, i64 width, i64 group, int threads) {
    static thread_local Scratch memory;
    QuantizedInputs in;
    in.stride = ceil_div(width, 16) * 16, in.groups = width / group;
    in.most_extras = width / 4 + width / 4 * width / 65536 + 16;  // as the mean is rounded, too
    const i64 sizes[] = {in.stride * i64(sizeof(ByteStep::Operand)), in.most_extras * i64(sizeof(Extra)), 4 * in.groups,
                         4 * in.groups, 4};
    void** const fields[] = {(void**)&in.at, (void**)&in.extras, (void**)&in.sums, (void**)&in.ends, (void**)&in.scales};
    char* at = (char*)memory.get(max_(1, num_tokens) * (sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4]));
    for (int i = 0; i < 5; i++) *fields[i] = at, at += num_tokens * sizes[i];
#pragma omp parallel for num_threads(threads) if (num_tokens * width > FEW_INPUTS)
    for (i64 t = 0; t < num_tokens; t++) quantize_row(x + t * x_stride, width, t, in);
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
        const i64 groups = rows.groups, units = ceil_div(group, UNIT), stride = inputs.stride;
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
            each<NT>([&](auto t) {
                const i64 own = (token + t) * groups + g;
                const Extra* const extras = rows.extras + (token + t) * rows.most_extras;
                for (i64 e = g ? rows.ends[own - 1] : 0; e < rows.ends[own]; e++) {
                    const auto value = S::input(extras[e].inputs);
                    const i64 at_step = extras[e].step;
                    each<NV>([&](auto v) {
                        S::Weights one[2];
                        if constexpr (BITS == 4)
                            S::halves(panel + at_step / 2 * STEP + v * W * S::STEP, one[0], one[1]);
                        else
                            one[0] = one[1] = S::weights(panel + at_step * STEP + v * W * S::STEP);
                        acc[t][v] = S::mac(acc[t][v], at_step % 2 ? one[1] : one[0], value);
                    });
                }
            });
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
