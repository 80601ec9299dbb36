// The running softmax of attention, one block of keys at a time (Dao, FlashAttention-2).
#pragma once

#include "tiles.h"

namespace LORAY_NAMESPACE {

// Running softmax of queries: for each row the weighted sums (d), the maximum and the sum of weights.
struct Softmax {
    float *sums, *top, *weight;
};

static inline float exp1(float x) {
    float lanes[W];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

// Merges `part` into `total`, for one row. An empty part changes nothing.
static inline void merge(const Softmax& total, const Softmax& part, i64 d) {
    float top = *total.top > *part.top ? *total.top : *part.top;
    if (top == -__builtin_inff()) return;
    float keep = exp1(*total.top - top), take = exp1(*part.top - top);
    *total.top = top;
    *total.weight = *total.weight * keep + *part.weight * take;
    for (i64 i = 0; i < d; i += W)
        store(total.sums + i, fma(load(part.sums + i), set1(take), load(total.sums + i) * set1(keep)));
}

static inline Softmax row(const Softmax& s, i64 r, i64 d) { return {s.sums + r * d, s.top + r, s.weight + r}; }

static inline void copy(const Softmax& to, const Softmax& from, i64 rows, i64 d) {
    memcpy(to.sums, from.sums, rows * d * sizeof(float));
    memcpy(to.top, from.top, rows * sizeof(float));
    memcpy(to.weight, from.weight, rows * sizeof(float));
}

static inline void start(const Softmax& s, float* lanes, i64 rows, i64 d) {
    memset(s.sums, 0, rows * d * sizeof(float));
    memset(lanes, 0, rows * W * sizeof(float));
    for (i64 r = 0; r < rows; r++) s.top[r] = -__builtin_inff();
}

// A block of packed keys, the memory for the scores and weights of a tile of queries, and that for packed values.
template <class P>
struct KeyBlock {
    typename P::Unit *keys, *values, *weights;
    float* scores;
};

// What attention has beside causal: row r does not see the first `behind + r / group` keys of the block; a score s, scaled,
// is cap · tanh(s / cap), where there is a cap; keys and values that are int8 have scales, KEYS of each.
struct Beside {
    i64 behind = -(i64(1) << 40);
    float cap = 0.0f;
    const float *key_scales = nullptr, *value_scales = nullptr;
};

// Adds one block of `num_keys` keys to the softmax of `rows` rows. Row r sees the first `limit + r / group` keys of the
// block; other scores are set to −∞. `score(queries, num)` computes the scores of `num` rows; `add(weights, sums, num)`
// adds their weighted values to their sums. A block of which a row sees nothing does not change its bits.
template <class P, class Score, class Add>
static inline void attend(const KeyBlock<P>& w, const typename P::Unit* queries, const Softmax& part, float* lanes,
                          i64 rows, i64 num_keys, i64 group, i64 limit, i64 d, float scale, Score score, Add add,
                          Beside beside = {}) {
    constexpr int NV = KEYS / W;
    float iota[W];
    for (int i = 0; i < W; i++) iota[i] = float(i);
    const Vec lane = load(iota), hidden = set1(-__builtin_inff());
    const i64 units = d / P::PER_UNIT;
    for (i64 first = 0; first < rows; first += P::QUERIES) {
        const i64 num = min_(P::QUERIES, rows - first);
        if (limit + (first + num - 1) / group <= 0 || beside.behind + first / group >= num_keys) continue;
        score(queries + first * units, num);
        for (i64 q = 0; q < num; q++) {
            const i64 r = first + q, visible = limit + r / group, behind = beside.behind + r / group;
            Vec s[NV];
            for (int v = 0; v < NV; v++) s[v] = load(w.scores + q * KEYS + v * W) * set1(scale);
            if (beside.key_scales)
                for (int v = 0; v < NV; v++) s[v] = s[v] * load(beside.key_scales + v * W);
            if (beside.cap > 0.0f)
                for (int v = 0; v < NV; v++) s[v] = set1(beside.cap) * tanh(s[v] * set1(1.0f / beside.cap));
            if (behind > 0)
                for (int v = 0; v < NV; v++) s[v] = lane < set1(float(behind - v * W)) ? hidden : s[v];
            if (visible < KEYS)
                for (int v = 0; v < NV; v++) s[v] = lane < set1(float(visible - v * W)) ? s[v] : hidden;
            Vec high = s[0];
            for (int v = 1; v < NV; v++) high = max(high, s[v]);
            float before = part.top[r], top = largest(high);
            if (top > before) {
                const Vec keep = exp(set1(before - top));
                for (i64 i = 0; i < d; i += W) store(part.sums + r * d + i, load(part.sums + r * d + i) * keep);
                store(lanes + r * W, load(lanes + r * W) * keep);
                part.top[r] = top;
            } else {
                top = before == -__builtin_inff() ? 0.0f : before;
            }
            Vec sum = load(lanes + r * W);
            for (int v = 0; v < NV; v++) {
                s[v] = exp(s[v] - set1(top));
                sum = sum + s[v];
            }
            store(lanes + r * W, sum);
            if (beside.value_scales)
                for (int v = 0; v < NV; v++) s[v] = s[v] * load(beside.value_scales + v * W);
            P::pack_weights(w.weights + q * (KEYS / P::PER_UNIT), s);
        }
        add(w.weights, part.sums + first * d, num);
    }
}

// Scores of packed keys.
template <class P>
static inline auto packed_keys(const KeyBlock<P>& w, i64 num_keys, i64 d) {
    return [=](const typename P::Unit* queries, i64 num) {
        const i64 units = d / P::PER_UNIT;
        product<P>(queries, units, w.keys, KEYS, units, w.scores, KEYS, num, padded(num_keys), false);
    };
}

// Sums of packed values.
template <class P>
static inline auto packed_values(const KeyBlock<P>& w, i64 num_keys, i64 d) {
    return [=](const typename P::Unit* weights, float* sums, i64 num) {
        const i64 units = padded(num_keys) / P::PER_UNIT;
        product<P>(weights, KEYS / P::PER_UNIT, w.values, d, units, sums, d, num, d, true);
    };
}

}  // namespace LORAY_NAMESPACE
