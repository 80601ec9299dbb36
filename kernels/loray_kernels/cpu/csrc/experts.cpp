// Experts: each token passes those that its router gives the largest logits, and their results are added up.
//
// Pairs of a token and an expert are put together by expert, so that a step reads an expert's matrices once. A token's
// products do not depend on who is beside it, and its results are added in the order of its own experts: its sum is the
// same, bit for bit, in any batch.

#include "kernels.h"

namespace LORAY_NAMESPACE {

constexpr i64 SERIAL = 1 << 12;  // elements below which one thread is faster

static thread_local Scratch memory[5];

template <class T>
static T* room(int i, i64 elements) {
    return (T*)memory[i].get(elements * sizeof(T));
}

// The experts of one token and its shares; of equal logits the first one's counts as larger. `weights` has room for all.
static inline void choose(const float* logits, i64 num, i64 per_token, bool normalised, i64* experts, float* shares,
                          float* weights) {
    for (i64 k = 0; k < per_token; k++) {
        i64 best = -1;
        for (i64 e = 0; e < num; e++) {
            bool is_free = best < 0 || logits[e] > logits[best];
            for (i64 j = 0; is_free && j < k; j++) is_free = experts[j] != e;
            if (is_free) best = e;
        }
        experts[k] = best;
    }
    const Vec largest = set1(logits[experts[0]]);
    vectors(num, [&](i64 i, auto n) { store_n(weights + i, exp(load_n(logits + i, n) - largest), n); });
    float total = 0;
    if (normalised)
        for (i64 k = 0; k < per_token; k++) total += weights[experts[k]];
    else
        for (i64 e = 0; e < num; e++) total += weights[e];
    for (i64 k = 0; k < per_token; k++) shares[k] = weights[experts[k]] / total;
}

static void choose_all(const float* logits, i64 num_tokens, i64 num, i64 per_token, bool normalised, i64* experts,
                       float* shares, int threads) {
#pragma omp parallel num_threads(threads) if (num_tokens * num > SERIAL)
    {
        static thread_local Scratch own;
        float* weights = (float*)own.get(num * sizeof(float));
#pragma omp for
        for (i64 t = 0; t < num_tokens; t++)
            choose(logits + t * num, num, per_token, normalised, experts + t * per_token, shares + t * per_token,
                   weights);
    }
}

// y = g · σ(1.702 g) · (u + 1), with g = min(gate, limit) and u = up within ± limit.
template <class T>
static void clamped_mul(const T* x, i64 x_stride, i64 num_tokens, i64 width, float limit, T* y, int threads) {
#pragma omp parallel for num_threads(threads) if (num_tokens * width > SERIAL)
    for (i64 t = 0; t < num_tokens; t++) {
        const T *gate = x + t * x_stride, *up = gate + width;
        vectors(width, [&](i64 i, auto n) {
            const Vec most = set1(limit), least = set1(-limit), none = zero(), one = set1(1.0f);
            Vec g = load_n(gate + i, n), u = load_n(up + i, n);
            g = most < g ? most : g;
            u = most < u ? most : u < least ? least : u;
            const Vec z = g * set1(1.702f), e = exp(z < none ? z : none - z);  // e^−|z|, which cannot overflow
            store_n(y + t * width + i, g * ((z < none ? e : one) / (one + e)) * (u + one), n);
        });
    }
}

template <class T>
void experts(const T* x, i64 num_tokens, const Experts<T>& w, T* y, int threads, Meanwhile meanwhile) {
    const i64 hidden = w.router.in, wide = w.gate_up->out, middle = w.down->in, pairs = num_tokens * w.per_token;
    float* const logits = room<float>(0, num_tokens * w.num);
    i64* const chosen = room<i64>(1, 3 * pairs + w.num + 1);
    i64 *const place = chosen + pairs, *const tokens = place + pairs, *const first = tokens + pairs;
    float* const shares = room<float>(2, pairs);
    T* const by_expert = room<T>(3, pairs * hidden);
    T* const gate_up = room<T>(4, pairs * (wide + middle));
    T* const product = gate_up + pairs * wide;

    linear(x, hidden, num_tokens, w.router, logits, threads);
    choose_all(logits, num_tokens, w.num, w.per_token, w.normalised, chosen, shares, threads);
    for (i64 e = 0; e <= w.num; e++) first[e] = 0;
    for (i64 p = 0; p < pairs; p++) first[chosen[p] + 1]++;
    for (i64 e = 0; e < w.num; e++) first[e + 1] += first[e];
    for (i64 p = 0; p < pairs; p++) {  // moves each expert's first pair to behind its last one
        place[p] = first[chosen[p]]++;
        tokens[place[p]] = p / w.per_token;
    }
#pragma omp parallel for num_threads(threads) if (pairs * hidden > SERIAL)
    for (i64 p = 0; p < pairs; p++) memcpy((void*)(by_expert + p * hidden), x + tokens[p] * hidden, hidden * sizeof(T));
    i64 used = 0, part = 0;  // experts with tokens; parts of `meanwhile`, two for gate and up, one for down
    for (i64 e = 0, start = 0; e < w.num; start = first[e++]) used += first[e] > start;
    const auto each = [&](const Matrix<T>* matrices, i64 parts, const T* from, T* to) {
        for (i64 e = 0, start = 0; e < w.num; start = first[e++]) {
            if (first[e] == start) continue;
            const Matrix<T>& m = matrices[e];
            linear(from + start * m.in, m.in, first[e] - start, m, to + start * m.out, threads,
                   meanwhile.part(part, part + parts, 3 * used));
            part += parts;
        }
    };
    each(w.gate_up, 2, by_expert, gate_up);
    if (w.limit > 0)
        clamped_mul(gate_up, wide, pairs, middle, float(w.limit), product, threads);
    else
        silu_mul(gate_up, wide, pairs, middle, product, threads);
    each(w.down, 1, product, by_expert);
#pragma omp parallel for num_threads(threads) if (pairs * hidden > SERIAL)
    for (i64 t = 0; t < num_tokens; t++) {
        const i64* own = place + t * w.per_token;
        const float* share = shares + t * w.per_token;
        vectors(hidden, [&](i64 i, auto n) {
            Vec sum = load_n(by_expert + own[0] * hidden + i, n) * set1(share[0]);
            for (i64 k = 1; k < w.per_token; k++)
                sum = sum + load_n(by_expert + own[k] * hidden + i, n) * set1(share[k]);
            store_n(y + t * hidden + i, sum, n);
        });
    }
}

template void experts<bf16>(const bf16*, i64, const Experts<bf16>&, bf16*, int, Meanwhile);
template void experts<float>(const float*, i64, const Experts<float>&, float*, int, Meanwhile);

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

#define LORAY_EXPERTS(type, suffix)                                                                                   \
    LORAY_ENTRY(choose_experts_##suffix##_)                                                                           \
    (const float* logits, i64 num_tokens, i64 num, i64 per_token, i64 normalised, i64* experts, float* shares,        \
     int threads) {                                                                                                   \
        choose_all(logits, num_tokens, num, per_token, normalised, experts, shares, threads);                         \
    }                                                                                                                 \
    LORAY_ENTRY(clamped_mul_##suffix##_)                                                                              \
    (const type* x, i64 x_stride, i64 num_tokens, i64 width, float limit, type* y, int threads) {                     \
        clamped_mul(x, x_stride, num_tokens, width, limit, y, threads);                                               \
    }                                                                                                                 \
    LORAY_ENTRY(experts_##suffix##_)                                                                                  \
    (const type* x, i64 num_tokens, const Experts<type>* weights, type* y, int threads) {                             \
        experts(x, num_tokens, *weights, y, threads);                                                                 \
    }

LORAY_EXPERTS(bf16, bf16)
LORAY_EXPERTS(float, fp32)
