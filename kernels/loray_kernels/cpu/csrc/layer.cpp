// Decoder layers in one call: the same ops as from Python, in the same order and with the same roundings.
//
// For one token a layer takes a tenth of a millisecond; a dozen calls from Python would take most of that. Between layers
// nothing is left for Python to do.

#include "products/ahead.h"
#include "kernels.h"

namespace LORAY_NAMESPACE {

constexpr i64 SERIAL = 1 << 13;  // elements below which one thread is faster

static thread_local Scratch memory[6];

template <class T>
static T* room(int i, i64 elements) {
    return (T*)memory[i].get(elements * sizeof(T));
}

// y += the adapters' LoRA of x.
template <class T>
static void add_lora(const T* x, i64 x_stride, T* y, i64 y_stride, const Group<T>& group, const StepInputs<T>& step,
                     const T* pool, int threads) {
    if (!group.num) return;
    i64 total = 0;
    for (i64 k = 0; k < group.num; k++) total += group.max_rank[k];
    float* h = room<float>(0, step.num_tokens * total);
    Output* outputs = (Output*)memory[1].get(group.num * (sizeof(Output) + sizeof(Target<T>)));
    Target<T>* targets = (Target<T>*)(outputs + group.num);
    for (i64 k = 0; k < group.num; k++) {
        outputs[k] = {h, group.max_rank[k]};
        targets[k] = {y + group.columns[k], y_stride, h, group.max_rank[k]};
        h += step.num_tokens * group.max_rank[k];
    }
    lora(x, x_stride, targets, outputs, pool, group.tables, group.num, *step.spans, threads);
}

// y += the adapters' VeRA of x.
template <class T>
static void add_vera(const T* x, i64 x_stride, T* y, i64 y_stride, const Group<T>& group, const T* pool, int threads) {
    for (const VeraSpan<T>* span = group.spans; span < group.spans + group.num_spans; span++) {
        const i64 rank = span->matrix.out;
        float* z = room<float>(0, span->num_tokens * rank);
        vera_shrink(x + span->first * x_stride, x_stride, span->num_tokens, span->matrix, z, threads);
        for (const VeraModule<T>* m = span->modules; m < span->modules + span->num; m++)
            vera_expand(y + m->first * y_stride + m->column, y_stride, z + (m->first - span->first) * rank, rank,
                        m->num_tokens, m->matrix, pool, *m->d, *m->b, threads);
    }
}

// y += LoRA and VeRA of x, then scales of y, or of y − bias.
template <class T>
static void add_adapters(const T* x, i64 x_stride, T* y, const Matrix<T>& base, const Group<T>& group,
                         const StepInputs<T>& step, const T* pool, int threads) {
    add_lora(x, x_stride, y, base.out, group, step, pool, threads);
    add_vera(x, x_stride, y, base.out, group, pool, threads);
    for (const Scaled* s = group.scaled; s < group.scaled + group.num_scaled; s++) {
        const T* bias = s->leaves_bias && base.bias ? base.bias + s->column : nullptr;
        if (s->turn)
            turn_rows(y + s->column, base.out, s->width, pool, s->own, *s->turn, s->distance, threads);
        else
            scale_rows(y + s->column, base.out, s->width, bias, pool, s->own, threads);
    }
}

template <class T>
static void add(T* x, const T* y, i64 num, int threads) {
    const i64 size = max_(W, ceil_div(ceil_div(num, threads), W) * W);
#pragma omp parallel for num_threads(threads) if (num > SERIAL)
    for (i64 first = 0; first < num; first += size)
        vectors(min_(size, num - first), [&](i64 i, auto n) {
            T* at = x + first + i;
            store_n(at, load_n(at, n) + load_n(y + first + i, n), n);
        });
}

// x (tokens, hidden) ← the layer's result. `own` and `next`: LoRA rows of this layer and of the next one.
template <class T>
static void layer(T* x, const LayerWeights<T>& w, const LayerTables<T>& tables, const Ahead& own, const Ahead& next,
                  const StepInputs<T>& step, i64 index, int threads) {
    const Layout& layout = *step.layout;
    const i64 n = step.num_tokens, d = layout.head_dim, heads = w.num_heads, kv_heads = layout.num_kv_heads;
    const i64 hidden = w.qkv.in, q_width = heads * d, kv_width = kv_heads * d, middle = w.down.in;
    T* const pool = step.pool + index * layout.layer_share();
    T* const normed = room<T>(2, n * max_(hidden, kv_width));
    T* const wide = room<T>(3, n * max_(w.qkv.out, w.gate_up.out));
    T* const turned = room<T>(4, n * max_(q_width + kv_width, middle));
    T* const narrow = room<T>(5, n * max_(q_width, hidden));

    // The rows of a layer are prefetched from the MLP before it on, during each product in proportion to its time.
    const Matrix<T>* const products[] = {&w.gate_up, &w.down, &w.qkv, &w.o};
    i64 shares[5] = {0};
    const i64 mlps = w.experts ? min_(w.experts->num, n * w.experts->per_token) : 1;  // about as many are used
    for (int k = 0; k < 4; k++) shares[k + 1] = shares[k] + products[k]->in * products[k]->out * (k < 2 ? mlps : 1);
    const auto during = [&](int k, const Ahead& rows) { return Meanwhile{&rows, shares[k], shares[k + 1], shares[4]}; };

    const auto norm = [&](const T* from, const T* weight, const OwnRows& rows, T* to) {
        rms_norm(from, hidden, n, 1, hidden, weight, w.eps, w.norm_offset, to, pool, rows, threads);
    };

    norm(x, w.attention_norm, tables.attention_norm, normed);
    linear(normed, hidden, n, w.qkv, wide, threads, during(2, own));
    add_adapters(normed, hidden, wide, w.qkv, tables.qkv, step, pool, threads);
    T *q = wide, *k = wide + q_width, *const v = wide + q_width + kv_width;
    i64 q_stride = w.qkv.out, k_stride = w.qkv.out;
    if (w.q_norm) {
        rms_norm(q, q_stride, n, heads, d, w.q_norm, w.eps, w.norm_offset, narrow, pool, tables.q_norm, threads);
        q = narrow, q_stride = q_width;
    }
    T* const keys = turned + n * q_width;
    if (w.k_norm) {
        rms_norm(k, k_stride, n, kv_heads, d, w.k_norm, w.eps, w.norm_offset, normed, pool, tables.k_norm, threads);
        k = normed, k_stride = kv_width;
    }
    rope(q, q_stride, n, heads, d, step.turned, step.cos, step.sin, turned, threads);
    rope(k, k_stride, n, kv_heads, d, step.turned, step.cos, step.sin, keys, threads);
    write_kv(pool, layout, keys, kv_width, v, w.qkv.out, step.slots, n, threads);
    paged_attention(turned, q_width, narrow, heads, step.pool, layout, index, *step.meta, w.scale, w.window, w.soft_cap,
                    w.sinks, threads);
    linear(narrow, q_width, n, w.o, normed, threads, during(3, own));
    add_adapters(narrow, q_width, normed, w.o, tables.o, step, pool, threads);
    if (w.post_attention_norm) norm(normed, w.post_attention_norm, tables.post_attention_norm, narrow);
    add(x, w.post_attention_norm ? narrow : normed, n * hidden, threads);

    norm(x, w.mlp_norm, tables.mlp_norm, normed);
    if (w.experts) {
        experts(normed, n, *w.experts, normed, threads, Meanwhile{&next, shares[0], shares[2], shares[4]});
    } else {
        linear(normed, hidden, n, w.gate_up, wide, threads, during(0, next));
        add_adapters(normed, hidden, wide, w.gate_up, tables.gate_up, step, pool, threads);
        (w.is_gelu ? gelu_mul<T> : silu_mul<T>)(wide, w.gate_up.out, n, middle, turned, threads);
        linear(turned, middle, n, w.down, normed, threads, during(1, next));
        add_adapters(turned, middle, normed, w.down, tables.down, step, pool, threads);
    }
    if (w.post_mlp_norm) norm(normed, w.post_mlp_norm, tables.post_mlp_norm, narrow);
    add(x, w.post_mlp_norm ? narrow : normed, n * hidden, threads);
}

// x ← the results of the layers `first` to first + num − 1, one after the other. `tables`: theirs, and perhaps the next
// layer's.
template <class T>
static void layers(T* x, const LayerWeights<T>* const* weights, const LayerTables<T>* const* tables, i64 num_tables,
                   const StepInputs<T>& step, i64 first, i64 num, int threads) {
    const Layout& layout = *step.layout;
    const i64 share = layout.layer_share();
    const auto rows = [&](i64 i) { return Ahead(*tables[i], step.pool + (first + i) * share, step.spans->num); };
    Ahead own, next;
    if (first > 0) own = rows(0);  // before the first layer there is no product
    for (i64 i = 0; i < num; i++, own = next) {
        next = i + 1 < num_tables ? rows(i + 1) : Ahead();
        layer(x, *weights[i], *tables[i], own, next, step, first + i, threads);
    }
}

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

#define LORAY_LAYERS(type, suffix)                                                                                   \
    LORAY_ENTRY(layers_##suffix##_)                                                                                  \
    (type * x, const LayerWeights<type>* const* weights, const LayerTables<type>* const* tables, i64 num_tables,     \
     const StepInputs<type>* step, i64 first, i64 num, int threads) {                                                \
        layers(x, weights, tables, num_tables, *step, first, num, threads);                                          \
    }

LORAY_LAYERS(bf16, bf16)
LORAY_LAYERS(float, fp32)
