// Products with quantised weights, as `quantized_linear` of reference.py has them: inputs are quantised row by row, sums of
// whole numbers are exact, and what comes after them is computed in the same order, so that the bits are the reference's.
// Few inputs are larger than a byte. Such a one is high · 2⁷ + low: the products of the high parts are summed first and
// shifted, those of the low ones follow with all others.
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

constexpr i64 FEW_INPUTS = 1 << 12;  // below which one thread is faster

// The high parts of a tile's inputs in one step.
struct High {
    int32_t step;
    ByteStep::Operand inputs[TOKENS][4 / sizeof(ByteStep::Operand)];
};

// Inputs, `stride` apart, with zeros up to a whole vector behind them; the sum of each group and the scale of each token;
// and the high parts of each tile, a group's ones up to its end.
struct QuantizedInputs {
    i64 stride, groups, most_high;  // of a tile
    ByteStep::Operand* at;
    High* high;
    int32_t *sums, *ends;
    float* scales;
};

template <class F>
static inline int64_t sum_of(F lane) {
    int64_t sum = 0;
    for (int i = 0; i < W; i++) sum += lane(i);
    return sum;
}

// An input larger than a byte: its place in a step, of all groups' steps, and its high part.
struct Outlier {
    i64 token, step, lane;
    int32_t high;
};

// The row of token t, see `quantize_activations`; `beyond(outlier)` is told of each outlier.
template <class T, class Beyond>
static inline void quantize_row(const T* x, i64 width, i64 t, const QuantizedInputs& in, Beyond beyond) {
    using S = ByteStep;
    typedef S::Operand Narrow __attribute__((vector_size(W * sizeof(S::Operand))));
    const int32_t bits = largest_bits(x, width);
    float largest;
    memcpy(&largest, &bits, 4);
    const bool is_finite = bits < INFINITE, is_some = is_finite && largest >= 1e-30f;
    const Vec fine = set1(is_some ? 32767.0f / largest : 0.0f);
    Ints all = {};
    vectors(width, [&](i64 i, auto n) { all += S::whole((Vec)((Ints)load_n(x + i, n) & 0x7fffffff) * fine); });
    const float share = is_finite ? float(sum_of([&](int i) { return all[i]; })) / float(32767 * width) : 0.0f;
    const float wished = share * 8.0f, part = wished < 0.0078125f ? 0.0078125f : wished < 1.0f ? wished : 1.0f;
    const float limit = largest * part;
    const Vec inverse = set1(is_some ? 127.0f / limit : 0.0f);
    in.scales[t] = is_finite ? limit / 127.0f : __builtin_nanf("");

    const i64 group = width / in.groups;
    S::Operand* to = in.at + t * in.stride;
    for (i64 g = 0; g < in.groups; g++) {
        Ints sum = {};
        vectors(group, [&](i64 i, auto n) {
            const i64 at = g * group + i;
            const Ints q = is_finite ? S::whole(load_n(x + at, n) * inverse) : Ints{};
            const Narrow narrow = __builtin_convertvector(q, Narrow);
            memcpy(to + at, &narrow, sizeof narrow);
            sum += q;
            if constexpr (S::HAS_HIGH)
                for (uint32_t lanes = S::beyond(q); lanes; lanes &= lanes - 1) {
                    const int k = __builtin_ctz(lanes);
                    const int32_t high = (q[k] + 64) >> 7;
                    to[at + k] = S::Operand(q[k] - (high << 7));
                    beyond(Outlier{t, g * ceil_div(group, S::STEP) + (i + k) / S::STEP, (i + k) % S::STEP, high});
                }
        });
        in.sums[t * in.groups + g] = int32_t(sum_of([&](int i) { return sum[i]; }));
    }
}

// The rows of a tile, of which token t is the first.
template <class T>
static inline void quantize_tile(const T* x, i64 x_stride, i64 num_tokens, i64 width, i64 t, const QuantizedInputs& in) {
    using S = ByteStep;
    static thread_local Scratch memory;
    const i64 last = min_(num_tokens, t + TOKENS), steps = in.most_high, own_steps = steps / in.groups;
    Outlier* const outliers = (Outlier*)memory.get(TOKENS * width * sizeof(Outlier) + steps * (8 + 1));
    int64_t* const place = (int64_t*)(outliers + TOKENS * width);
    uint8_t* const is_high = (uint8_t*)(place + steps);
    i64 num = 0;
    for (i64 token = t; token < last; token++)
        quantize_row(x + token * x_stride, width, token, in, [&](Outlier outlier) { outliers[num++] = outlier; });
    if constexpr (S::HAS_HIGH) {
        High* const high = in.high + t / TOKENS * in.most_high;
        int32_t* const ends = in.ends + t / TOKENS * in.groups;
        i64 count = 0;
        if (num) memset(is_high, 0, steps);
        for (i64 i = 0; i < num; i++) is_high[outliers[i].step] = 1;
        for (i64 g = 0; g < in.groups; g++) {
            for (i64 s = 0; num && s < own_steps; s++)
                if (const i64 k = g * own_steps + s; is_high[k]) high[place[k] = count++] = {int32_t(s), {}};
            ends[g] = int32_t(count);
        }
        for (i64 i = 0; i < num; i++) {
            const Outlier& o = outliers[i];
            high[place[o.step]].inputs[o.token - t][o.lane] = S::Operand(o.high);
        }
    }
}

// Room for all tokens' rows, in memory that is valid in this thread until the next call.
static QuantizedInputs room_for(i64 num_tokens, i64 width, i64 group) {
    static thread_local Scratch memory;
    QuantizedInputs in;
    in.stride = ceil_div(width, 16) * 16, in.groups = width / group;
    in.most_high = ByteStep::HAS_HIGH ? in.groups * ceil_div(group, ByteStep::STEP) : 0;
    const i64 tiles = ceil_div(num_tokens, TOKENS);
    const i64 sizes[] = {num_tokens * in.stride * i64(sizeof(ByteStep::Operand)), tiles * in.most_high * i64(sizeof(High)),
                         num_tokens * in.groups * 4, tiles * in.groups * 4, num_tokens * 4};
    void** const fields[] = {(void**)&in.at, (void**)&in.high, (void**)&in.sums, (void**)&in.ends, (void**)&in.scales};
    i64 all = 0;
    for (i64 size : sizes) all += size;
    char* at = (char*)memory.get(max_(1, all));
    for (int i = 0; i < 5; i++) *fields[i] = at, at += sizes[i];
    return in;
}

template <int BITS>
struct QuantizedProduct {
    using Operand = ByteStep::Operand;
    static constexpr bool WHOLE_TILES = true;  // as the inputs are prepared tile by tile
    static constexpr int TILE = TOKENS;
    static constexpr i64 UNITS = UNROLL / 2, FETCHED = UNITS * UNIT * COLUMNS * BITS / 8;

    QuantizedInputs rows;
    i64 in, group;

    i64 panel_bytes() const { return in / group * group_bytes<BITS>(group); }
    i64 fetches() const { return in / group * (group / UNIT / UNITS); }
    Inputs<Operand> inputs(i64 first, i64) const { return {rows.at + first * rows.stride, rows.stride, first}; }

    static constexpr int32_t CENTRE = 128 - ByteStep::SUBTRACTED;

    // Whether a group's zeros are those of weights without zeros, so that its sums can begin with them.
    static bool are_centred(const uint8_t* zeros) {
        uint32_t others = 0;
        for (i64 c = 0; c < COLUMNS; c += 4) {
            uint32_t four;
            memcpy(&four, zeros + c, 4);
            others |= four ^ 0x80808080u;
        }
        return others == 0;
    }

    template <int NT, int NV>
    inline void multiply(const Inputs<Operand>& inputs, i64 token, const char* at, PanelFetch& fetch,
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
            const bool centred = BITS == 8 && are_centred(zeros);
            Ints acc[NT][NV];
            each<NT * NV>([&](auto i) { acc[i / NV][i % NV] = Ints{}; });
            if constexpr (S::HAS_HIGH) {
                const High* const all = rows.high + token / TOKENS * rows.most_high;
                const int32_t* const ends = rows.ends + token / TOKENS * groups;
                for (const High* high = all + (g ? ends[g - 1] : 0); high < all + ends[g]; high++) {
                    const i64 at_step = high->step;
                    S::Weights weights[NV];
                    each<NV>([&](auto v) {
                        S::Weights other;
                        const uint8_t* const own = panel + v * W * S::STEP;
                        if constexpr (BITS == 8)
                            weights[v] = S::weights(own + at_step * STEP);
                        else if (at_step % 2)
                            S::halves(own + at_step / 2 * STEP, other, weights[v]);
                        else
                            S::halves(own + at_step / 2 * STEP, weights[v], other);
                    });
                    each<NT>([&](auto t) {
                        const auto value = S::input(high->inputs[t]);
                        each<NV>([&](auto v) { acc[t][v] = S::mac(acc[t][v], weights[v], value); });
                    });
                }
                each<NT * NV>([&](auto i) { acc[i / NV][i % NV] <<= 7; });
            }
            if (centred)
                each<NT>([&](auto t) {
                    const Ints start = Ints{} - CENTRE * rows.sums[(token + t) * groups + g];
                    each<NV>([&](auto v) { acc[t][v] += start; });
                });
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
                    const Ints sums = centred ? acc[t][v] : acc[t][v] - zero * rows.sums[(token + t) * groups + g];
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
    const QuantizedInputs rows = room_for(num_tokens, w.in, w.group);
    const auto linear = linear_by<T>(QuantizedProduct<BITS>{rows, w.in, w.group}, w, put, meanwhile);
    const bool few = num_tokens * w.in <= FEW_INPUTS;
    const auto quantize = [&](i64 t) { quantize_tile(x, x_stride, num_tokens, w.in, t, rows); };
    for (i64 t = 0; few && t < num_tokens; t += TOKENS) quantize(t);
    Shares shares = linear.shares(num_tokens, threads);
#pragma omp parallel num_threads(threads) if (linear.work(num_tokens) > FEW_PRODUCTS)
    {
        if (!few) {
#pragma omp for
            for (i64 t = 0; t < num_tokens; t += TOKENS) quantize(t);
        }
        linear.multiply(shares, num_tokens, threads);
    }
}

}  // namespace LORAY_NAMESPACE
