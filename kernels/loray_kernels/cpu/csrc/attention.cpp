// Causal attention over the paged cache, with an online softmax in fp32 (Dao et al., FlashAttention-2; Flash-Decoding).
//
// In a block of the pool, keys lie as they are multiplied: units of four bytes, two neighbouring bf16 or one fp32, and
// the same unit of all the block's keys side by side; values lie token by token. Where both are int8, units have four; they
// are multiplied as they are, exactly, and their scales multiply scores and weights.
//
// Keys are taken in blocks of KEYS, and a new partial softmax starts every SPLIT keys, both counted from the sequence's
// start; the parts are merged in order. So a query's result is the same, bit for bit, in any batch, for any chunking of
// its prompt, and for any number of threads: decoding divides a long context among threads.

#include <omp.h>

#include "kernels.h"
#include "shares.h"
#include "simd/softmax.h"

namespace LORAY_NAMESPACE {

constexpr i64 SPLIT = 512;
constexpr i64 BLOCK_QUERIES = 32;  // queries of one prefill item
constexpr i64 DECODE_QUERIES = 4;  // up to so many queries are divided by context, more are divided by query

struct Item {
    i64 sequence, query, num_queries, head, num_heads, key, key_stop;
    i64 part;  // where a decode item writes its rows; -1 for an item that covers its whole context
};

// The memory of an item. Units of packed operands and floats are both four bytes.
template <class P>
struct Workspace : KeyBlock<P> {
    typename P::Unit* queries;
    float* lanes;
    Softmax total, part;
    Workspace(Scratch& scratch, i64 rows, i64 d) {
        const i64 sizes[] = {rows * d / P::PER_UNIT, d / P::PER_UNIT * KEYS, KEYS / P::PER_UNIT * d, P::QUERIES * KEYS,
                             P::QUERIES * KEYS, rows * W, rows * d, rows, rows, rows * d, rows, rows};
        i64 bytes = 0;
        for (i64 n : sizes) bytes += ceil_div(n * 4, 64) * 64;
        char* at = (char*)scratch.get(bytes);
        void** fields[] = {(void**)&queries, (void**)&this->keys, (void**)&this->values, (void**)&this->weights,
                           (void**)&this->scores, (void**)&lanes, (void**)&total.sums, (void**)&total.top, (void**)&total.weight,
                           (void**)&part.sums, (void**)&part.top, (void**)&part.weight};
        for (size_t i = 0; i < sizeof(sizes) / sizeof(i64); i++) {
            *fields[i] = at;
            at += ceil_div(sizes[i] * 4, 64) * 64;
        }
    }
};

static thread_local Scratch work_memory, item_memory, part_memory, zero_memory;

// T: of queries, Q: of keys and values.
template <class P, class T, class Q>
struct Attention {
    static constexpr bool HAS_SCALES = sizeof(Q) == 1;
    const T* q;
    i64 q_stride;
    T* out;
    i64 num_heads, layer;
    const T* pool;
    Layout layout;
    Meta meta;
    float scale;
    i64 window;  // keys that a query sees, its own included; 0: all up to it
    float soft_cap;
    const T* sinks;  // of each head the score of one more key, whose value is 0; may be missing
    const Q* zeros;  // a layer's share of a block, where the window is shorter than one; else missing

    static constexpr i64 PER_UNIT = 4 / sizeof(Q);

    i64 group() const { return num_heads / layout.num_kv_heads; }

    // Calls at(block, position, n, j) for the runs of keys [key, key + num) that are neighbours in a block of the pool:
    // n keys from key + j on are at `position` of the layer's share at `block`. In place of blocks that no query of the
    // item sees, which may be others' by now and hold what is no number, is the first one that they see; or zeros, where
    // that one may be the last, of which a part is not written yet.
    template <class At>
    void runs(const Item& item, i64 key, i64 num, At at) const {
        const i64* table = meta.block_table[item.sequence];
        const i64 seen = behind(first_position(item)) / layout.block_tokens;
        i64 block = key / layout.block_tokens;
        for (i64 j = 0, n, position = key % layout.block_tokens; j < num; j += n, position = 0, block++) {
            n = min_(layout.block_tokens - position, num - j);
            const T* const own = pool + (table[max_(block, seen)] * layout.num_layers + layer) * layout.layer_share();
            at(zeros && block < seen ? zeros : (const Q*)own, position, n, j);
        }
    }

    i64 width() const { return layout.num_kv_heads * layout.head_dim; }
    i64 block_width() const { return layout.block_tokens * width(); }

    // Keys of a head in a block: units of its elements, `block_tokens` keys of each.
    const float* keys_of(const Q* block, i64 head) const {
        return (const float*)(block + head * layout.head_dim * layout.block_tokens);
    }
    const Q* values_of(const Q* block, i64 head) const { return block + block_width() + head * layout.head_dim; }
    // Of keys; those of values come `num_kv_heads` heads later.
    const float* scales_of(const Q* block, i64 head) const {
        return (const float*)layout.scales(block) + head * layout.block_tokens;
    }

    // Keys and values of one tile of rows are used once. So whole vectors of keys are read from the pool, and by fp32 sums
    // values, too; others are packed, and so are int8 keys for AMX, which multiplies pairs of bf16.
    static constexpr bool CAN_READ_KEYS = !(P::BY_AMX && HAS_SCALES);
    bool keys_in_place(i64 rows) const {
        return CAN_READ_KEYS && rows <= P::QUERIES && layout.block_tokens % W == 0;
    }
    static bool values_in_place(i64 rows) { return P::PER_UNIT == 1 && rows <= P::QUERIES; }

    // Calls of Fetch::some in `add_keys`, about.
    i64 pauses(i64 rows, i64 num, i64 d) const {
        constexpr i64 units = P::BY_AMX ? 16 : UNITS;
        const i64 keys = keys_in_place(rows) ? ceil_div(num, few_vectors(rows) * W) * ceil_div(d / PER_UNIT, units)
                                             : ceil_div(num, layout.block_tokens) * ceil_div(d, KEY_STEP);
        return keys + (values_in_place(rows) ? pauses_of(rows, num, d) : P::pauses(num));
    }

    // Adds keys [key, key + num) of a head to `part`; limit and the other arguments are those of `attend`.
    void add_keys(const Workspace<P>& w, const Item& item, i64 head, i64 key, i64 num, const typename P::Unit* queries,
                  const Softmax& part, float* lanes, i64 rows, i64 limit, Fetch& fetch) const {
        Beside beside = window ? Beside{limit - window, soft_cap} : Beside{Beside().behind, soft_cap};
        const i64 d = layout.head_dim;
        const Q* values[KEYS];
        const float* keys[KEYS / W];
        float scales[HAS_SCALES ? 2 * KEYS : 1] = {};
        if constexpr (HAS_SCALES) beside.key_scales = scales, beside.value_scales = scales + KEYS;
        const bool in_place = keys_in_place(rows);
        runs(item, key, num, [&](const Q* block, i64 position, i64 n, i64 j) {
            if constexpr (HAS_SCALES)
                for (int v = 0; v < 2; v++)
                    memcpy(scales + v * KEYS + j, scales_of(block, head + v * layout.num_kv_heads) + position, n * 4);
            const float* at = keys_of(block, head) + position;
            if (in_place)
                for (i64 i = 0; i < n; i += W) keys[(j + i) / W] = at + i;
            else
                take_keys<P, Q>(w.keys + j, at, layout.block_tokens, n, d, fetch);
            for (i64 i = 0; i < n; i++) values[j + i] = values_of(block, head) + (position + i) * width();
        });
        const bool values_there = values_in_place(rows);
        if (!values_there) P::pack_values(w.values, values, num, d, fetch);
        // One function for each, whose branches cost less than the code of all their pairs.
        const auto score = [&](const typename P::Unit* of, i64 count) {
            if constexpr (CAN_READ_KEYS)
                if (in_place)
                    return product_of_keys<P, Q>(of, d / P::PER_UNIT, keys, padded(num) / W, layout.block_tokens,
                                                 d / PER_UNIT, w.scores, count, fetch);
            packed_keys(w, num, d)(of, count);
        };
        const auto add = [&](const typename P::Unit* weights, float* sums, i64 count) {
            if constexpr (P::PER_UNIT == 1)
                if (values_there) return product_of(weights, KEYS, values, num, sums, d, count, d, fetch);
            packed_values(w, num, d)(weights, sums, count);
        };
        attend<P>(w, queries, part, lanes, rows, num, group(), limit, d, scale, score, add, beside);
    }

    // Adds keys [key, key + num) of an item and their values to what is prefetched. All keys of a block of the pool share
    // their cache lines; values of all heads are neighbours.
    void expect(Fetch& fetch, const Item& item, i64 key, i64 num) const {
        const i64 bytes = item.num_heads * layout.head_dim * i64(sizeof(Q));
        runs(item, key, num, [&](const Q* block, i64 position, i64 n, i64) {
            fetch.add(keys_of(block, item.head), bytes * layout.block_tokens);
            if constexpr (HAS_SCALES)
                for (i64 h : {item.head, item.head + layout.num_kv_heads})
                    fetch.add(scales_of(block, h), item.num_heads * layout.block_tokens * 4);
            const Q* at = values_of(block, item.head) + position * width();
            if (item.num_heads == layout.num_kv_heads)
                fetch.add(at, bytes * n);
            else
                for (i64 i = 0; i < n; i++) fetch.add(at + i * width(), bytes);
        });
    }

    void finish(const Softmax& total, i64 rows, i64 token, i64 head) const {
        const i64 d = layout.head_dim, g = group();
        for (i64 r = 0; r < rows; r++) {
            T* to = out + ((token + r / g) * num_heads + head * g + r % g) * d;
            float weight = total.weight[r];
            if (sinks) {
                float sink[W];
                store(sink, load_n(sinks + head * g + r % g, i64(1)));
                const float above = sink[0] - total.top[r];
                weight += exp1(above < 80.0f ? above : 80.0f);  // more would overflow, and leaves nothing as well
            }
            const Vec share = set1(1.0f / weight);
            for (i64 i = 0; i < d; i += W) store(to + i, load(total.sums + r * d + i) * share);
        }
    }

    i64 first_position(const Item& item) const {
        const i64* start = meta.query_start + item.sequence;
        return meta.context_len[item.sequence] - (start[1] - start[0]) + item.query;
    }

    // The first key that no query of the item sees.
    i64 stop(const Item& item) const { return min_(item.key_stop, first_position(item) + item.num_queries); }

    // The key from which on the item's are read: of the first block that one of its queries sees.
    i64 first_key(const Item& item) const { return max_(item.key, behind(first_position(item)) / KEYS * KEYS); }

    // Keys that the query at `position` does not see, nor later ones.
    i64 behind(i64 position) const { return window ? max_(i64(0), position - window + 1) : 0; }

    i64 first_split(i64 sequence) const {
        const i64* start = meta.query_start + sequence;
        return behind(meta.context_len[sequence] - (start[1] - start[0])) / SPLIT;
    }

    i64 num_splits(i64 sequence) const { return ceil_div(meta.context_len[sequence], SPLIT) - first_split(sequence); }

    // The item's keys, split by split, with the heads in the inner loop, so that a block of the pool is read at once.
    // `next` is the thread's next item, or missing: its first keys are prefetched.
    void run(const Item& item, const Item* next, const Softmax* parts) const {
        const i64 d = layout.head_dim, g = group(), rows = item.num_queries * g, all = rows * item.num_heads;
        const i64 token = meta.query_start[item.sequence] + item.query;
        const i64 position = first_position(item), context = stop(item), begin = first_key(item);
        const Workspace<P> w(work_memory, all, d);
        P::begin();
        for (i64 h = 0; h < item.num_heads; h++)
            for (i64 r = 0; r < rows; r++)
                P::pack_row(w.queries + (h * rows + r) * (d / P::PER_UNIT),
                            q + (token + r / g) * q_stride + ((item.head + h) * g + r % g) * d, d);
        Fetch fetch;
        for (i64 from = begin / SPLIT * SPLIT; from < context; from += SPLIT) {
            start(w.part, w.lanes, all, d);
            for (i64 key = max_(from, begin); key < min_(from + SPLIT, context); key += KEYS) {
                const i64 num = min_(KEYS, context - key), left = context - key - num;
                if (left > 0 || key == begin) {  // else the block before has begun what is left
                    i64 calls = item.num_heads * pauses(rows, num, d);
                    fetch.clear();
                    if (left > 0) expect(fetch, item, key + num, min_(KEYS, left));
                    if (next && left <= KEYS) {
                        expect(fetch, *next, first_key(*next), min_(KEYS, stop(*next) - first_key(*next)));
                        calls += item.num_heads * pauses(rows, left, d);
                    }
                    fetch.start(calls);
                }
                for (i64 h = 0; h < item.num_heads; h++)
                    add_keys(w, item, item.head + h, key, num, w.queries + h * rows * (d / P::PER_UNIT),
                             row(w.part, h * rows, d), w.lanes + h * rows * W, rows, position + 1 - key, fetch);
            }
            for (i64 r = 0; r < all; r++) w.part.weight[r] = sum(load(w.lanes + r * W));
            if (from <= begin)
                copy(w.total, w.part, all, d);
            else
                for (i64 r = 0; r < all; r++) merge(row(w.total, r, d), row(w.part, r, d), d);
        }
        if (item.part >= 0)
            copy(row(*parts, item.part, d), w.total, all, d);
        else
            for (i64 h = 0; h < item.num_heads; h++)
                finish(row(w.total, h * rows, d), rows, token, item.head + h);
    }

    // Merges the splits of a decoded sequence. In `parts` its rows are ordered by split, then by head.
    void gather(i64 sequence, i64 first, const Softmax& parts) const {
        const i64 d = layout.head_dim, num = meta.query_start[sequence + 1] - meta.query_start[sequence];
        const i64 rows = num * group(), all = rows * layout.num_kv_heads;
        const i64 splits = num_splits(sequence);
        for (i64 s = 1; s < splits; s++)
            for (i64 r = 0; r < all; r++) merge(row(parts, first + r, d), row(parts, first + s * all + r, d), d);
        for (i64 h = 0; h < layout.num_kv_heads; h++)
            finish(row(parts, first + h * rows, d), rows, meta.query_start[sequence], h);
    }

    void operator()(int threads) const {
        const i64 num_kv = layout.num_kv_heads, d = layout.head_dim;
        i64 capacity = 0, num_parts = 0, splits = 0, work = 0;
        for (i64 s = 0; s < meta.num_sequences; s++) {
            const i64 num = meta.query_start[s + 1] - meta.query_start[s], own = num_splits(s);
            work += num * meta.context_len[s] * num_heads * d;
            if (num <= DECODE_QUERIES) {
                capacity += own * num_kv;
                splits += own;
                if (own > 1) num_parts += own * num * num_heads;
            } else {
                capacity += ceil_div(num, BLOCK_QUERIES) * num_kv;
            }
        }
        const i64 heads = splits >= 4 * threads ? num_kv : 1;  // few items: divide them by head as well
        Item* items = (Item*)item_memory.get(capacity * sizeof(Item));
        float* memory = (float*)part_memory.get((num_parts * (d + 2) + 64) * sizeof(float));
        const Softmax parts = {memory, memory + num_parts * d, memory + num_parts * (d + 1)};
        i64 num_items = 0, part = 0;
        for (i64 s = 0; s < meta.num_sequences; s++) {
            const i64 num = meta.query_start[s + 1] - meta.query_start[s], context = meta.context_len[s];
            if (num > DECODE_QUERIES) {  // the last queries have most keys, so they come first
                for (i64 b = ceil_div(num, BLOCK_QUERIES) - 1; b >= 0; b--)
                    for (i64 h = 0; h < num_kv; h++)
                        items[num_items++] = {s, b * BLOCK_QUERIES, min_(BLOCK_QUERIES, num - b * BLOCK_QUERIES), h, 1,
                                              0, context, -1};
            } else if (num > 0) {
                const bool whole = num_splits(s) == 1;
                for (i64 k = first_split(s) * SPLIT; k < context; k += SPLIT)
                    for (i64 h = 0; h < num_kv; h += heads) {
                        items[num_items++] = {s, 0, num, h, heads, k, min_(k + SPLIT, context), whole ? -1 : part};
                        if (!whole) part += heads * num * group();
                    }
            }
        }
        Shares shares(num_items, threads);
#pragma omp parallel num_threads(threads) if (work > 1 << 14)
        shares.each(omp_get_thread_num(), [&](i64 i, i64 end) {
            run(items[i], i + 1 < end ? &items[i + 1] : nullptr, &parts);
        });
        for (i64 s = 0, first = 0; s < meta.num_sequences; s++) {
            const i64 num = meta.query_start[s + 1] - meta.query_start[s];
            if (num <= 0 || num > DECODE_QUERIES || num_splits(s) <= 1) continue;
            gather(s, first, parts);
            first += num_splits(s) * num * num_heads;
        }
    }
};

template <class T>
void paged_attention(const T* q, i64 q_stride, T* out, i64 num_heads, const T* pool, const Layout& layout, i64 layer,
                     const Meta& meta, float scale, i64 window, float soft_cap, const T* sinks, int threads) {
    void* zeros = nullptr;
    if (window && window < layout.block_tokens) {
        const i64 bytes = layout.layer_share() * i64(sizeof(T));
        zeros = zero_memory.get(bytes);
        memset(zeros, 0, bytes);
    }
    const auto by = [&](auto of_kv) {
        using Q = decltype(of_kv);
        Attention<typename Packing<T>::P, T, Q>{q,     q_stride, out,      num_heads, layer,          pool, layout, meta,
                                                scale, window,   soft_cap, sinks,     (const Q*)zeros}(threads);
    };
    layout.int8_per_element ? by(int8_t{}) : by(T{});
}

#define LORAY_INSTANTIATE(T)                                                                                        \
    template void paged_attention<T>(const T*, i64, T*, i64, const T*, const Layout&, i64, const Meta&, float, i64,  \
                                     float, const T*, int);

LORAY_INSTANTIATE(bf16)
LORAY_INSTANTIATE(float)

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

#define LORAY_ATTENTION(type, suffix)                                                                               \
    LORAY_ENTRY(paged_attention_##suffix##_)                                                                        \
    (const type* q, i64 q_stride, type* out, i64 num_heads, const type* pool, const Layout* layout, i64 layer,      \
     const Meta* meta, float scale, i64 window, float soft_cap, const type* sinks, int threads) {                   \
        paged_attention(q, q_stride, out, num_heads, pool, *layout, layer, *meta, scale, window, soft_cap, sinks,   \
                        threads);                                                                                   \
    }

LORAY_ATTENTION(bf16, bf16)
LORAY_ATTENTION(float, fp32)
