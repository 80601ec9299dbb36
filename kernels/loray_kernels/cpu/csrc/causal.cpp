// Causal attention of segments to themselves, forward and backward, with a softmax in fp32 (Dao, FlashAttention-2).
//
// A result does not depend on the number of threads: each item is computed by one of them, in order, and the gradients
// of keys and values, to which R query heads contribute, are added up afterwards.

#include <initializer_list>

#include "simd/softmax.h"

namespace LORAY_NAMESPACE {

constexpr i64 STRIP = 1024;         // queries of an item of the forward pass
constexpr i64 ROWS = 96;            // of these, so many at once: whole tiles

// F segments of L positions. R query heads share keys and values: q is (F, R, L, d), k and v are (F, L, d).
struct Shape {
    i64 num, repeats, length, width;
    i64 head() const { return length * width; }
    i64 blocks() const { return ceil_div(length, KEYS); }
};

// Rows of one head in units, as blocks of KEYS rows filled up with zeros.
template <class P, class T>
struct Packed {
    using Unit = typename P::Unit;
    const Shape& shape;
    i64 row() const { return shape.width / P::PER_UNIT; }
    i64 block() const { return KEYS * row(); }
    i64 rows(i64 b) const { return min_(KEYS, shape.length - b * KEYS); }

    // Sums over the width, this side in vectors: [width][KEYS].
    void keys(Unit* out, const T* x, i64 b) const {
        const T* from[KEYS];
        P::pack_keys(start(out, from, x, b), from, rows(b), shape.width, none());
    }
    // Sums over the rows, this side in vectors: [KEYS][width].
    void values(Unit* out, const T* x, i64 b) const {
        const T* from[KEYS];
        P::pack_values(start(out, from, x, b), from, rows(b), shape.width, none());
    }
    // Sums over the width, this side element by element: [KEYS][width].
    void natural(Unit* out, const T* x, i64 b) const {
        memset(out, 0, block() * sizeof(Unit));
        for (i64 j = 0; j < rows(b); j++) P::pack_row(out + j * row(), x + (b * KEYS + j) * shape.width, shape.width);
    }
    // Sums over the rows, this side element by element: [width][KEYS].
    void columns(Unit* out, const T* x, i64 b) const {
        memset(out, 0, block() * sizeof(Unit));
        for (i64 j = 0; j < rows(b); j++)
            for (i64 i = 0; i < shape.width; i++) P::place(out, i * KEYS + j, x[(b * KEYS + j) * shape.width + i]);
    }

   private:
    Unit* start(Unit* out, const T** from, const T* x, i64 b) const {
        for (i64 j = 0; j < rows(b); j++) from[j] = x + (b * KEYS + j) * shape.width;
        if (rows(b) < KEYS) memset(out, 0, block() * sizeof(Unit));
        return out;
    }
    static Fetch& none() {
        static thread_local Fetch nothing;
        return nothing;
    }
};

// Parts of one allocation, each on its own cache lines.
struct Parts {
    char* at;
    template <class X>
    X* take(i64 num) {
        X* found = (X*)at;
        at += ceil_div(num * sizeof(X), 64) * 64;
        return found;
    }
    static i64 bytes(std::initializer_list<i64> units) {
        i64 total = 0;
        for (i64 n : units) total += ceil_div(n * 4, 64) * 64;
        return total;
    }
};

static thread_local Scratch memory;
constexpr i64 KEPT = 4 << 20;  // bytes that a thread keeps for the next call

template <class P, class T>
struct Forward {
    using Unit = typename P::Unit;
    const T *q, *k, *v;
    T* out;
    float* lse;
    Shape shape;
    float scale;

    // Queries [from, from + STRIP) of a head.
    void run(i64 head, i64 from) const {
        P::begin();
        const i64 d = shape.width, stop = min_(from + STRIP, shape.length), num_blocks = ceil_div(stop, KEYS);
        const Packed<P, T> packed = {shape};
        const i64 unit_rows = packed.row();
        Parts parts = {(char*)memory.get(Parts::bytes({num_blocks * packed.block(), num_blocks * packed.block(),
                                                       ROWS * unit_rows, P::QUERIES * KEYS, P::QUERIES * KEYS, ROWS * d, ROWS,
                                                       ROWS * W}))};
        Unit* keys = parts.take<Unit>(num_blocks * packed.block());
        Unit* values = parts.take<Unit>(num_blocks * packed.block());
        Unit* queries = parts.take<Unit>(ROWS * unit_rows);
        KeyBlock<P> block = {nullptr, nullptr, parts.take<Unit>(P::QUERIES * KEYS), parts.take<float>(P::QUERIES * KEYS)};
        const Softmax total = {parts.take<float>(ROWS * d), parts.take<float>(ROWS), nullptr};
        float* lanes = parts.take<float>(ROWS * W);
        const i64 shared = head / shape.repeats * shape.head();
        for (i64 b = 0; b < num_blocks; b++) {
            packed.keys(keys + b * packed.block(), k + shared, b);
            packed.values(values + b * packed.block(), v + shared, b);
        }
        for (i64 first = from; first < stop; first += ROWS) {
            const i64 rows = min_(ROWS, stop - first), own = head * shape.length + first;
            for (i64 r = 0; r < rows; r++) P::pack_row(queries + r * unit_rows, q + (own + r) * d, d);
            start(total, lanes, rows, d);
            for (i64 b = 0; b * KEYS < first + rows; b++) {
                block.keys = keys + b * packed.block();
                block.values = values + b * packed.block();
                attend<P>(block, queries, total, lanes, rows, packed.rows(b), 1, first + 1 - b * KEYS, d, scale,
                          packed_keys(block, packed.rows(b), d), packed_values(block, packed.rows(b), d));
            }
            for (i64 r = 0; r < rows; r++) {
                const float weight = sum(load(lanes + r * W));
                const Vec share = set1(1.0f / weight);
                for (i64 i = 0; i < d; i += W) store(out + (own + r) * d + i, load(total.sums + r * d + i) * share);
                lse[own + r] = total.top[r] + __builtin_logf(weight);
            }
        }
    }

    void operator()(int threads) const {
        const i64 strips = ceil_div(shape.length, STRIP), num = shape.num * shape.repeats * strips;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (num > 1)
        for (i64 i = 0; i < num; i++)  // the last queries have most keys, so they come first
            run(i % (num / strips), (strips - 1 - i / (num / strips)) * STRIP);
#pragma omp parallel num_threads(threads) if (num > 1)
        memory.keep(KEPT);
    }
};

template <class P, class T>
struct Backward {
    using Unit = typename P::Unit;
    static constexpr int NV = KEYS / W;
    const T *dout, *q, *k, *v, *out;
    const float* lse;
    T *dq, *dk, *dv;
    float* sums;  // (2, F, R, L, d): the gradients of keys and values by query head
    Shape shape;
    float scale;

    i64 num_heads() const { return shape.num * shape.repeats; }

    // One query head: block by block of keys, all queries that see it. In the tiles a row is a key and a column a query.
    void run(i64 head) const {
        P::begin();
        const i64 d = shape.width, n = shape.blocks(), own = head * shape.head();
        const i64 shared = head / shape.repeats * shape.head();
        const Packed<P, T> packed = {shape};
        const i64 size = packed.block(), tile = KEYS * KEYS, pairs = tile / P::PER_UNIT;
        Parts parts = {(char*)memory.get(Parts::bytes({n * size, n * size, n * size, n * size, n * KEYS * d, n * KEYS,
                                                       n * KEYS, size, size, size, tile, tile, pairs, pairs, pairs,
                                                       KEYS * d, KEYS * d}))};
        Unit* q_keys = parts.take<Unit>(n * size);
        Unit* q_values = parts.take<Unit>(n * size);
        Unit* dout_keys = parts.take<Unit>(n * size);
        Unit* dout_values = parts.take<Unit>(n * size);
        float* dq_columns = parts.take<float>(n * KEYS * d);  // by block: [width][queries]
        float* normaliser = parts.take<float>(n * KEYS);
        float* delta = parts.take<float>(n * KEYS);
        Unit* k_rows = parts.take<Unit>(size);
        Unit* v_rows = parts.take<Unit>(size);
        Unit* k_columns = parts.take<Unit>(size);
        float* weights = parts.take<float>(tile);
        float* slopes = parts.take<float>(tile);
        Unit* weight_rows = parts.take<Unit>(pairs);
        Unit* slope_rows = parts.take<Unit>(pairs);
        Unit* slope_pairs = parts.take<Unit>(pairs);
        float* dk_block = parts.take<float>(KEYS * d);
        float* dv_block = parts.take<float>(KEYS * d);

        for (i64 b = 0; b < n; b++) {
            packed.keys(q_keys + b * size, q + own, b);
            packed.values(q_values + b * size, q + own, b);
            packed.keys(dout_keys + b * size, dout + own, b);
            packed.values(dout_values + b * size, dout + own, b);
        }
        memset(dq_columns, 0, n * KEYS * d * sizeof(float));
        for (i64 t = 0; t < n * KEYS; t++) {  // positions after the end have weight 0
            const bool is_real = t < shape.length;
            normaliser[t] = is_real ? lse[head * shape.length + t] : __builtin_inff();
            Vec dot = zero();
            for (i64 i = 0; is_real && i < d; i += W)
                dot = fma(load(dout + own + t * d + i), load(out + own + t * d + i), dot);
            delta[t] = sum(dot);
        }
        for (i64 kb = 0; kb < n; kb++) {
            packed.natural(k_rows, k + shared, kb);
            packed.natural(v_rows, v + shared, kb);
            packed.columns(k_columns, k + shared, kb);
            memset(dk_block, 0, KEYS * d * sizeof(float));
            memset(dv_block, 0, KEYS * d * sizeof(float));
            for (i64 qb = kb; qb < n; qb++) {
                const i64 row = packed.row();
                product<P>(k_rows, row, q_keys + qb * size, KEYS, row, weights, KEYS, KEYS, KEYS, false);
                product<P>(v_rows, row, dout_keys + qb * size, KEYS, row, slopes, KEYS, KEYS, KEYS, false);
                differentiate(weights, slopes, normaliser + qb * KEYS, delta + qb * KEYS, qb == kb, weight_rows,
                              slope_rows, slope_pairs);
                constexpr i64 half = KEYS / P::PER_UNIT;
                product<P>(weight_rows, half, dout_values + qb * size, d, half, dv_block, d, KEYS, d, true);
                product<P>(slope_rows, half, q_values + qb * size, d, half, dk_block, d, KEYS, d, true);
                product<P>(k_columns, half, slope_pairs, KEYS, half, dq_columns + qb * KEYS * d, KEYS, d, KEYS, true);
            }
            const i64 bytes = packed.rows(kb) * d * sizeof(float);
            memcpy(sums + own + kb * KEYS * d, dk_block, bytes);
            memcpy(sums + num_heads() * shape.head() + own + kb * KEYS * d, dv_block, bytes);
        }
        for (i64 t = 0; t < shape.length; t++)
            for (i64 i = 0; i < d; i += W) {
                float lanes[W];
                for (int j = 0; j < W; j++) lanes[j] = dq_columns[(t / KEYS * d + i + j) * KEYS + t % KEYS];
                store(dq + own + t * d + i, load(lanes));
            }
    }

    // Scores and the gradients of weights → weights and the gradients of scores, packed for the products that follow.
    void differentiate(const float* scores, const float* slopes, const float* normaliser, const float* delta,
                       bool is_diagonal, Unit* weight_rows, Unit* slope_rows, Unit* slope_pairs) const {
        float iota[W];
        for (int i = 0; i < W; i++) iota[i] = float(i);
        const Vec lane = load(iota);
        Vec ds[2][NV];
        for (i64 key = 0; key < KEYS; key++) {
            Vec p[NV];
            for (int i = 0; i < NV; i++) {
                const i64 at = key * KEYS + i * W;
                p[i] = exp(fma(load(scores + at), set1(scale), zero() - load(normaliser + i * W)));
                if (is_diagonal) p[i] = lane < set1(float(key - i * W)) ? zero() : p[i];
                ds[key % 2][i] = p[i] * (load(slopes + at) - load(delta + i * W)) * set1(scale);
            }
            P::pack_weights(weight_rows + key * (KEYS / P::PER_UNIT), p);
            P::pack_weights(slope_rows + key * (KEYS / P::PER_UNIT), ds[key % 2]);
            if (key % 2) P::pack_two(slope_pairs + (key - 1) * (KEYS / P::PER_UNIT), ds[0], ds[1]);
        }
    }

    void operator()(int threads) const {
        const i64 num = num_heads(), size = shape.head();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (num > 1)
        for (i64 h = 0; h < num; h++) run(h);
#pragma omp parallel num_threads(threads) if (num > 1)
        memory.keep(KEPT);
#pragma omp parallel for num_threads(threads)
        for (i64 t = 0; t < shape.num * shape.length; t++)
            for (i64 i = 0; i < shape.width; i += W) {
                const float* from = sums + t / shape.length * shape.repeats * size + t % shape.length * shape.width + i;
                Vec k_sum = zero(), v_sum = zero();
                for (i64 r = 0; r < shape.repeats; r++) {
                    k_sum = k_sum + load(from + r * size);
                    v_sum = v_sum + load(from + num * size + r * size);
                }
                store(dk + t * shape.width + i, k_sum);
                store(dv + t * shape.width + i, v_sum);
            }
    }
};

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

#define LORAY_CAUSAL(type, suffix)                                                                                   \
    LORAY_ENTRY(causal_forward_##suffix##_)                                                                          \
    (const type* q, const type* k, const type* v, type* out, float* lse, i64 num, i64 repeats, i64 length, i64 width, \
     float scale, int threads) {                                                                                     \
        Forward<Packing<type>::P, type>{q, k, v, out, lse, {num, repeats, length, width}, scale}(threads);           \
    }                                                                                                                \
    LORAY_ENTRY(causal_backward_##suffix##_)                                                                         \
    (const type* dout, const type* q, const type* k, const type* v, const type* out, const float* lse, type* dq,     \
     type* dk, type* dv, float* sums, i64 num, i64 repeats, i64 length, i64 width, float scale, int threads) {       \
        const Shape shape = {num, repeats, length, width};                                                           \
        Backward<Packing<type>::P, type>{dout, q, k, v, out, lse, dq, dk, dv, sums, shape, scale}(threads);          \
    }

LORAY_CAUSAL(bf16, bf16)
LORAY_CAUSAL(float, fp32)
