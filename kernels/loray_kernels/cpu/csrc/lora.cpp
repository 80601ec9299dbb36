// LoRA of a batch of adapters with rows of the pool: h = A x, then y += scale · B h. Ranks are not padded.
//
// A work item is a tile of one adapter's rows (shrink) or columns (expand) with a tile of its tokens. If an adapter has
// one or two tokens that is a gather from the pool; if it has many it is a product whose rows stay in the cache.

#include "simd/dots.h"
#include "kernels.h"

namespace LORAY_NAMESPACE {

// Rows (shrink) or columns of a segment (expand) [first, first + num) of one adapter with some of its tokens.
struct Item {
    i64 table, segment, adapter, first, num, token, num_tokens;
};

constexpr i64 TOKENS = 64, RANKS = 16, COLUMNS = 1024;
constexpr i64 SERIAL = 1 << 15;  // multiply-adds below which waking the other threads costs more than they save

static thread_local Scratch item_memory;

struct Items {
    Item* items;
    i64 num = 0;
    explicit Items(i64 capacity) : items((Item*)item_memory.get(capacity * sizeof(Item))) {}
    // Rows or columns [first, stop) in tiles of `size`, for each tile of tokens [token, token_stop).
    void add(i64 table, i64 segment, i64 adapter, i64 first, i64 stop, i64 size, i64 token, i64 token_stop) {
        for (i64 t = token; t < token_stop; t += TOKENS)
            for (i64 f = first; f < stop; f += size)
                items[num++] = {table, segment, adapter, f, min_(size, stop - f), t, min_(TOKENS, token_stop - t)};
    }
};

// out[t][r] = Σₖ x[t][first + r + k · period]: a product with rows of A that are not in the pool, see ops.py.
template <class T>
static void sum_columns(const T* x, i64 x_stride, i64 num_tokens, i64 width, i64 period, i64 first, i64 num_rows,
                        float* out, i64 out_stride) {
    for (i64 t = 0; t < num_tokens; t++, x += x_stride, out += out_stride)
        vectors(num_rows, [&](i64 r, auto n) {
            const i64 wide = num_rows - r < W ? num_rows - r : W;
            Vec total = zero();
            i64 i = first + r;
            for (; i + wide <= width; i += period) total = total + load_n(x + i, n);
            if (i < width) total = total + load_n(x + i, width - i);
            store_n(out + r, total, n);
        });
}

// out[t][r] = x[t] · A[first + r] for rows of one adapter. `after`: the rows of the next call.
template <class T>
static void shrink_rows(const T* x, i64 x_stride, i64 num_tokens, const T* pool, const Rows& rows, i64 first,
                        i64 num_rows, float* out, i64 out_stride, const Next& after) {
    const i64 summed = ~rows.segments[0].offsets[first];
    if (summed < 0) {
        dot_block(x, x_stride, num_tokens, pool, rows, first, num_rows, out, out_stride, after);
        return;
    }
    const RowSegment& last = rows.segments[rows.num_segments - 1];
    sum_columns(x, x_stride, num_tokens, last.column + last.width, summed >> 32, summed & 0xffffffff, num_rows, out,
                out_stride);
}

template <class T>
void lora_shrink(const T* x, i64 x_stride, const T* pool, const Table* const* tables, const Output* outputs,
                 i64 num_tables, const Spans& spans, int threads) {
    i64 capacity = 0, work = 0;
    for (i64 k = 0; k < num_tables; k++)
        for (i64 n = 0; n < spans.num; n++) {
            i64 rank = tables[k]->rank_start[n + 1] - tables[k]->rank_start[n];
            i64 tokens = spans.stop[n] - spans.start[n];
            capacity += ceil_div(rank, RANKS) * ceil_div(tokens, TOKENS);
            for (i64 s = 0; s < tables[k]->a->num_segments; s++)
                work += rank * tokens * tables[k]->a->segments[s].width;
        }
    Items list(capacity);
    for (i64 n = 0; n < spans.num; n++)
        for (i64 k = 0; k < num_tables; k++)
            list.add(k, 0, n, tables[k]->rank_start[n], tables[k]->rank_start[n + 1], RANKS, spans.start[n],
                     spans.stop[n]);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (work > SERIAL)
    for (i64 i = 0; i < list.num; i++) {
        const Item& item = list.items[i];
        const Table& table = *tables[item.table];
        const Output& out = outputs[item.table];
        float* h = out.h + item.token * out.stride + item.first - table.rank_start[item.adapter];
        Next after;
        if (i + threads < list.num) {  // probably this thread's next item
            const Item& next = list.items[i + threads];
            const i64* offsets = tables[next.table]->a->segments[0].offsets + next.first;
            if (*offsets >= 0) after = {offsets, min_(8, next.num)};
        }
        shrink_rows(x + item.token * x_stride, x_stride, item.num_tokens, pool, *table.a, item.first, item.num, h,
                    out.stride, after);
    }
}

// y[t][c] += scale · Σᵣ h[t][r] · row[r][c] for NT tokens and NV vectors of columns; the last has `last` columns.
template <int NT, int NV, class T>
static inline void expand_tile(T* y, i64 y_stride, const float* h, i64 h_stride, const T* pool, const i64* offsets,
                               i64 rank, float scale, i64 last) {
    Vec acc[NT][NV];
    for (int t = 0; t < NT; t++)
        for (int v = 0; v < NV; v++) acc[t][v] = zero();
    for (i64 r = 0; r < rank; r++) {
        const T* row = pool + offsets[r];
        Vec hv[NT];
        for (int t = 0; t < NT; t++) hv[t] = set1(h[t * h_stride + r]);
        for (int v = 0; v < NV; v++) {
            Vec b = v + 1 < NV || last == W ? load(row + v * W) : load_n(row + v * W, last);
            for (int t = 0; t < NT; t++) acc[t][v] = fma(hv[t], b, acc[t][v]);
        }
    }
    for (int t = 0; t < NT; t++)
        for (int v = 0; v < NV; v++) {
            T* at = y + t * y_stride + v * W;
            if (v + 1 < NV || last == W)
                store(at, load(at) + acc[t][v] * set1(scale));
            else
                store_n(at, load_n(at, last) + acc[t][v] * set1(scale), last);
        }
}

template <int NT, class T>
static inline void expand_columns(T* y, i64 y_stride, const float* h, i64 h_stride, const T* pool, const i64* offsets,
                                  i64 rank, float scale, i64 num_columns) {
    constexpr int NV = W == 16 ? 4 : 2;
    i64 c = 0;
    for (; c + NV * W <= num_columns; c += NV * W)
        expand_tile<NT, NV>(y + c, y_stride, h, h_stride, pool + c, offsets, rank, scale, W);
    for (; c < num_columns; c += W)
        expand_tile<NT, 1>(y + c, y_stride, h, h_stride, pool + c, offsets, rank, scale, min_(W, num_columns - c));
}

constexpr i64 MANY = 4;  // adapters and modules for each thread, so that all have as much to do
constexpr i64 FEW = 8;  // up to so many tokens of an adapter, its rows are read from memory rather than from a cache

// Adds NR rows to the sums of NT tokens; each row is read from end to end while the next ones are prefetched.
template <int NT, int NR, class T>
static inline void add_rows(float* sums, const float* h, i64 h_stride, const T* pool, const i64* offsets,
                            i64 num_columns, const Next& next) {
    constexpr i64 LINE = 64 / sizeof(T);
    vectors(num_columns, [&](i64 i, auto n) {
        if (i % LINE == 0)
            for (i64 r = 0; r < next.num; r++) __builtin_prefetch(pool + next.offsets[r] + next.shift + i, 0, 2);
        Vec row[NR];
        for (int r = 0; r < NR; r++) row[r] = load_n(pool + offsets[r] + i, n);
        for (int t = 0; t < NT; t++) {
            Vec sum = load(sums + t * COLUMNS + i);
            for (int r = 0; r < NR; r++) sum = fma(set1(h[t * h_stride + r]), row[r], sum);
            store(sums + t * COLUMNS + i, sum);
        }
    });
}

// expand_tile for few tokens: their sums stay in the first-level cache, so that every row is read from end to end.
template <int NT, class T>
static inline void expand_few(T* y, i64 y_stride, const float* h, i64 h_stride, const T* pool, const i64* offsets,
                              i64 rank, float scale, i64 num_columns, bool fetch, const Next& after) {
    constexpr int NR = 4;
    alignas(64) float sums[NT * COLUMNS];
    for (int t = 0; t < NT; t++) memset(sums + t * COLUMNS, 0, ceil_div(num_columns, W) * W * sizeof(float));
    i64 r = 0;
    for (; r + NR <= rank; r += NR) {
        const i64 left = rank - r - NR;
        const Next next = fetch && left > 0 ? Next{offsets + r + NR, min_(NR, left)} : after;
        add_rows<NT, NR>(sums, h + r, h_stride, pool, offsets + r, num_columns, next);
    }
    for (; r < rank; r++) add_rows<NT, 1>(sums, h + r, h_stride, pool, offsets + r, num_columns, Next{});
    for (int t = 0; t < NT; t++)
        vectors(num_columns, [&](i64 i, auto n) {
            T* at = y + t * y_stride + i;
            store_n(at, load_n(at, n) + load(sums + t * COLUMNS + i) * set1(scale), n);
        });
}

// One item of an expand.
template <class T>
static inline void expand_item(const Target<T>& target, const T* pool, const Table& table, const Item& item,
                               const Next& after) {
    const RowSegment& segment = table.b->segments[item.segment];
    const i64 first = table.rank_start[item.adapter], rank = table.rank_start[item.adapter + 1] - first;
    const i64* offsets = segment.offsets + first;
    const float scale = table.scale[item.adapter];
    // Columns in the outer loop, tokens in the inner one: the tile of B stays in the first-level cache.
    constexpr i64 STEP = 4 * W;
    const i64 y_stride = target.y_stride, h_stride = target.h_stride;
    T* to = target.y + item.token * y_stride + segment.column + item.first;
    const float* from = target.h + item.token * h_stride;
    const T* rows = pool + item.first;
    i64 t = 0;
    if (item.num_tokens > FEW) {
        const i64 quads = item.num_tokens / 4 * 4;
        for (i64 c = 0; c < item.num; c += STEP)
            for (t = 0; t < quads; t += 4)
                expand_columns<4>(to + t * y_stride + c, y_stride, from + t * h_stride, h_stride, rows + c,
                                  offsets, rank, scale, min_(STEP, item.num - c));
        t = quads;
    }
    for (; t + 4 <= item.num_tokens; t += 4)
        expand_few<4>(to + t * y_stride, y_stride, from + t * h_stride, h_stride, rows, offsets, rank, scale,
                      item.num, t == 0, t == 0 ? after : Next{});
    for (; t < item.num_tokens; t++)
        expand_few<1>(to + t * y_stride, y_stride, from + t * h_stride, h_stride, rows, offsets, rank, scale,
                      item.num, t == 0, t == 0 ? after : Next{});
}

// Each table with its output and its h, all in one parallel region.
template <class T>
void lora_expand(const Target<T>* targets, const T* pool, const Table* const* tables, i64 num_tables,
                 const Spans& spans, int threads) {
    i64 capacity = 0, work = 0;
    for (i64 k = 0; k < num_tables; k++)
        for (i64 s = 0; s < tables[k]->b->num_segments; s++) {
            const i64 width = tables[k]->b->segments[s].width;
            for (i64 n = 0; n < spans.num; n++) {
                const i64 tokens = spans.stop[n] - spans.start[n];
                capacity += ceil_div(width, COLUMNS) * ceil_div(tokens, TOKENS);
                work += (tables[k]->rank_start[n + 1] - tables[k]->rank_start[n]) * tokens * width;
            }
        }
    Items list(capacity);
    for (i64 n = 0; n < spans.num; n++)
        for (i64 k = 0; k < num_tables; k++)
            if (tables[k]->rank_start[n + 1] > tables[k]->rank_start[n])
                for (i64 s = 0; s < tables[k]->b->num_segments; s++)
                    list.add(k, s, n, 0, tables[k]->b->segments[s].width, COLUMNS, spans.start[n], spans.stop[n]);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (work > SERIAL)
    for (i64 i = 0; i < list.num; i++) {
        const Item& item = list.items[i];
        const Table& table = *tables[item.table];
        Next after;
        if (i + threads < list.num) {  // probably this thread's next item
            const Item& next = list.items[i + threads];
            const Table& own = *tables[next.table];
            after = {own.b->segments[next.segment].offsets + own.rank_start[next.adapter],
                     min_(4, own.rank_start[next.adapter + 1] - own.rank_start[next.adapter]), next.first - item.first};
        }
        expand_item(targets[item.table], pool, table, item, after);
    }
}

// y += scale · B (A x) of each table with its output and its target, which refer to the same h.
//
// Where each adapter has few tokens, one thread shrinks and expands all of an adapter's rows in a table: its h stays in the
// cache, and the threads wait for each other once and not twice. The results are those of the two kernels.
template <class T>
void lora(const T* x, i64 x_stride, const Target<T>* targets, const Output* outputs, const T* pool,
          const Table* const* tables, i64 num_tables, const Spans& spans, int threads) {
    i64 most = 0;
    for (i64 n = 0; n < spans.num; n++) most = max_(most, spans.stop[n] - spans.start[n]);
    if (most > FEW || spans.num * num_tables < MANY * threads) {
        lora_shrink(x, x_stride, pool, tables, outputs, num_tables, spans, threads);
        lora_expand(targets, pool, tables, num_tables, spans, threads);
        return;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (i64 i = 0; i < spans.num * num_tables; i++) {
        const i64 n = i / num_tables, k = i % num_tables, token = spans.start[n], num_tokens = spans.stop[n] - token;
        const Table& table = *tables[k];
        const i64 first = table.rank_start[n], rank = table.rank_start[n + 1] - first;
        if (!rank) continue;
        shrink_rows(x + token * x_stride, x_stride, num_tokens, pool, *table.a, first, rank,
                    outputs[k].h + token * outputs[k].stride, outputs[k].stride,
                    Next{table.b->segments[0].offsets + first, min_(4, rank)});
        for (i64 s = 0; s < table.b->num_segments; s++)
            for (i64 c = 0; c < table.b->segments[s].width; c += COLUMNS)
                expand_item(targets[k], pool, table,
                            {k, s, n, c, min_(COLUMNS, table.b->segments[s].width - c), token, num_tokens}, Next{});
    }
}

#define LORAY_INSTANTIATE(T)                                                                                       \
    template void lora_shrink<T>(const T*, i64, const T*, const Table* const*, const Output*, i64, const Spans&, int); \
    template void lora_expand<T>(const Target<T>*, const T*, const Table* const*, i64, const Spans&, int);             \
    template void lora<T>(const T*, i64, const Target<T>*, const Output*, const T*, const Table* const*, i64,          \
                          const Spans&, int);

LORAY_INSTANTIATE(bf16)
LORAY_INSTANTIATE(float)

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

// `pool` is the address of the pool plus the layer's offset.
#define LORAY_LORA(type, suffix)                                                                                    \
    LORAY_ENTRY(lora_shrink_##suffix##_)                                                                            \
    (const type* x, i64 x_stride, const type* pool, const Table* const* tables, const Output* outputs,              \
     i64 num_tables, const Spans* spans, int threads) {                                                             \
        lora_shrink(x, x_stride, pool, tables, outputs, num_tables, *spans, threads);                                    \
    }                                                                                                               \
    LORAY_ENTRY(lora_expand_##suffix##_)                                                                            \
    (const Target<type>* targets, const type* pool, const Table* const* tables, i64 num_tables, const Spans* spans, \
     int threads) {                                                                                                 \
        lora_expand(targets, pool, tables, num_tables, *spans, threads);                                                 \
    }

LORAY_LORA(bf16, bf16)
LORAY_LORA(float, fp32)
