// The structs that Python packs for the kernels, and the signatures of the kernels, which layer.cpp calls.
#pragma once

#include "simd/simd.h"

namespace LORAY_NAMESPACE {

// -- attention --

// See KvLayout of kv.py.
struct Layout {
    i64 num_layers, block_tokens, num_kv_heads, head_dim, int8_per_element;

    i64 layer_share() const {
        const i64 heads = 2 * block_tokens * num_kv_heads;
        return int8_per_element ? heads * (head_dim + 4) / int8_per_element : heads * head_dim;
    }
    // Of a block's share of a layer, where K and V are int8: of K first.
    template <class Q>
    Q* scales(Q* share) const {
        return share + 2 * block_tokens * num_kv_heads * head_dim;
    }
};

// S + 1 offsets of queries, S context lengths, S block tables.
struct Meta {
    i64 num_sequences;
    const i64 *query_start, *context_len;
    const i64* const* block_table;
};

// -- LoRA --

struct Table {
    const Rows *a, *b;
    const i64* rank_start;
    const float* scale;
};

struct Spans {
    i64 num;
    const i64 *start, *stop;
};

struct Output {
    float* h;
    i64 stride;
};

// Where an expand adds, y, and what it expands, h.
template <class T>
struct Target {
    T* y;
    i64 y_stride;
    const float* h;
    i64 h_stride;
};

// -- a layer --

// Weights of T if `bits` is 0, else whole numbers of so many bits, of which `group` inputs share a scale.
template <class T>
struct Matrix {
    i64 in, out;
    const void* packed;
    const T* bias;
    i64 bits, group;
};

// A token passes the experts with its `per_token` largest logits of the router; its shares of their results are a
// softmax over these, where they are `normalised`, else over all.
template <class T>
struct Experts {
    Matrix<T> router;
    const Matrix<T> *gate_up, *down;  // of each expert
    i64 num, per_token, normalised;
    double limit;  // of gate and up; 0: there is none
};

template <class T>
struct LayerWeights {
    const T *attention_norm, *q_norm, *k_norm, *mlp_norm;  // q_norm and k_norm may be missing
    const T *post_attention_norm, *post_mlp_norm;          // of results, may be missing
    Matrix<T> qkv, o, gate_up, down;
    i64 num_heads;
    double eps, scale, norm_offset, soft_cap;
    i64 window, is_gelu;
    const T* sinks;             // of attention, may be missing
    const Experts<T>* experts;  // may be missing; else gate_up and down are the first one's
};

// Tokens with a row of an adapter: the weight of a norm, or scales of outputs; `num` is 0 if there are none.
struct OwnRows {
    i64 num;
    const i64* tokens;
    const Rows* rows;
};

// VeRA of one module for `num_tokens` tokens from `first` on, each with a row of d and b; added from `column` on.
template <class T>
struct VeraModule {
    Matrix<T> matrix;
    const Rows *d, *b;
    i64 first, num_tokens, column;
};

// Neighbouring tokens that share a pair, with the modules of one input.
template <class T>
struct VeraSpan {
    Matrix<T> matrix;
    i64 first, num_tokens, num;
    const VeraModule<T>* modules;
};

// Columns of the result that are scaled: without the base's bias where `leaves_bias` is not 0; in pairs, a token's so far
// apart, where there is a `turn`.
struct Scaled {
    OwnRows own;
    i64 column, width, leaves_bias;
    const Rows* turn;
    const i64* distance;
};

// The adapters of the modules of one input. For LoRA: a table for each module, the column of the result where it is
// added, and its largest rank. For VeRA: the spans of tokens. For DoRA, IA³ and RoAd: the scaled columns.
template <class T>
struct Group {
    i64 num;
    const Table* const* tables;
    const i64 *columns, *max_rank;
    i64 num_spans;
    const VeraSpan<T>* spans;
    i64 num_scaled;
    const Scaled* scaled;
};

template <class T>
struct LayerTables {
    OwnRows attention_norm, q_norm, k_norm, mlp_norm, post_attention_norm, post_mlp_norm;
    Group<T> qkv, o, gate_up, down;
};

template <class T>
struct StepInputs {
    i64 num_tokens;
    T* pool;
    const T *cos, *sin;
    const Layout* layout;
    const Meta* meta;
    const i64* slots;
    const Spans* spans;
    i64 turned;  // elements of a head that RoPE turns
};

// -- the kernels of a layer; each is instantiated for bf16 and float in its source --

class Ahead;

// What is prefetched during a product: rows between the shares `first` and `last`, of `whole`; see ahead.h.
struct Meanwhile {
    const Ahead* rows = nullptr;
    i64 first = 0, last = 0, whole = 1;

    // Parts `from` to `to`, of `num` equal ones.
    Meanwhile part(i64 from, i64 to, i64 num) const {
        return {rows, first + (last - first) * from / num, first + (last - first) * to / num, whole};
    }
};

// `y` may be fp32; the results are rounded to T in any case.
template <class T, class Y>
void linear(const T* x, i64 x_stride, i64 num_tokens, const Matrix<T>& weights, Y* y, int threads,
            Meanwhile meanwhile = {});

template <class T>
void silu_mul(const T* x, i64 x_stride, i64 num_tokens, i64 width, T* y, int threads);

// y (tokens, hidden) ← the sums of the results of each token's experts; x and y may be the same.
template <class T>
void experts(const T* x, i64 num_tokens, const Experts<T>& weights, T* y, int threads, Meanwhile meanwhile = {});

template <class T>
void gelu_mul(const T* x, i64 x_stride, i64 num_tokens, i64 width, T* y, int threads);

template <class T>
void rms_norm(const T* x, i64 x_stride, i64 num_tokens, i64 num_heads, i64 width, const T* weight, float eps,
              float offset, T* y, const T* pool, const OwnRows& own, int threads);

template <class T>
void scale_rows(T* y, i64 y_stride, i64 width, const T* bias, const T* pool, const OwnRows& own, int threads);

template <class T>
void turn_rows(T* y, i64 y_stride, i64 width, const T* pool, const OwnRows& own, const Rows& turn, const i64* distance,
               int threads);

template <class T>
void rope(const T* x, i64 x_stride, i64 num_tokens, i64 num_heads, i64 width, i64 turned, const T* cos, const T* sin,
          T* y, int threads);

template <class T>
void write_kv(T* pool, const Layout& layout, const T* k, i64 k_stride, const T* v, i64 v_stride, const i64* slots,
              i64 num_tokens, int threads);

template <class T>
void paged_attention(const T* q, i64 q_stride, T* out, i64 num_heads, const T* pool, const Layout& layout, i64 layer,
                     const Meta& meta, float scale, i64 window, float soft_cap, const T* sinks, int threads);

template <class T>
void lora_shrink(const T* x, i64 x_stride, const T* pool, const Table* const* tables, const Output* outputs,
                 i64 num_tables, const Spans& spans, int threads);

template <class T>
void lora_expand(const Target<T>* targets, const T* pool, const Table* const* tables, i64 num_tables,
                 const Spans& spans, int threads);

template <class T>
void lora(const T* x, i64 x_stride, const Target<T>* targets, const Output* outputs, const T* pool,
          const Table* const* tables, i64 num_tables, const Spans& spans, int threads);

template <class T>
void vera_shrink(const T* x, i64 x_stride, i64 num_tokens, const Matrix<T>& matrix, float* z, int threads);

template <class T>
void vera_expand(T* y, i64 y_stride, const float* z, i64 z_stride, i64 num_tokens, const Matrix<T>& matrix,
                 const T* pool, const Rows& d, const Rows& b, int threads);

}  // namespace LORAY_NAMESPACE
