// A token for each row of logits: masks, temperature, min-p and a draw, in two passes over a row that stays in cache.
//
// A row is cut into blocks of 512 tokens. The first pass finds the largest allowed logit of each block. The second sums
// the weights of each block and keeps only the sums; the drawn token's block is computed once more. So nothing as large
// as the vocabulary is written, tokens without an allowed one near them cost a look at their word of the mask, and a
// row's token does not depend on other rows.

#include <cmath>

#include "kernels.h"

namespace LORAY_NAMESPACE {

constexpr i64 BLOCK = 512, BITS = 32, WORDS = BLOCK / BITS;
constexpr float INF = __builtin_inff();

// How the token of a row is chosen; packed by Python.
struct Choice {
    i64 row, mask;  // mask < 0: all tokens are allowed
    double temperature, log_min_p, uniform;  // temperature 0: the best token
};

// `n` logits of a block. Of a block with a mask, only vectors in which a token is allowed.
struct Block {
    const float* x;
    i64 n;
    const int16_t* starts;  // where in the block each vector begins; missing if they are all there

    i64 token(i64 i) const { return starts ? starts[i / W] + i % W : i; }
};

struct Copy {
    alignas(64) float x[BLOCK];
    int16_t starts[BLOCK / W];
};

// One row with its mask, block by block.
struct Row {
    const float* logits;
    const uint32_t* words;  // may be missing
    i64 vocab;

    // The block, with −∞ where a token is not allowed; none of its logits if none is.
    Block block(i64 block, Copy& copy) const {
        const float* x = logits + block * BLOCK;
        const i64 width = min_(BLOCK, vocab - block * BLOCK);
        if (!words) return {x, width, nullptr};
        const i64 num_words = ceil_div(width, BITS);
        const uint32_t* own = words + block * WORDS;
        uint32_t any = 0, all = ~0u;
        for (i64 w = 0; w < num_words; w++) {
            any |= own[w];
            all &= own[w];
        }
        if (all == ~0u) return {x, width, nullptr};
        i64 num = 0;
        for (i64 w = 0; any && w < num_words; w++)
            for (i64 i = 0; i < BITS && own[w] >> i; i += W) {
                const i64 start = w * BITS + i, left = width - start;
                uint32_t bits = own[w] >> i & ((1u << W) - 1);
                if (left < W) bits &= (1u << max_(0, left)) - 1;
                if (!bits) continue;
                const Vec from = left < W ? load_n(x + start, left) : load(x + start);
                store(copy.x + num * W, where(bits, from, set1(-INF)));
                copy.starts[num++] = int16_t(start);
            }
        return {copy.x, num * W, copy.starts};
    }
};

// NaN if one of the elements is.
static inline float largest_of(const float* x, i64 n) {
    Vec top = set1(-INF), bad = zero();
    i64 i = 0;
    for (; i + W <= n; i += W) {
        const Vec v = load(x + i);
        top = max(top, v);
        bad = v == v ? bad : set1(1.0f);
    }
    float found = largest(top);
    bool is_bad = largest(bad) > 0;
    for (; i < n; i++) {
        found = x[i] > found ? x[i] : found;
        is_bad |= x[i] != x[i];
    }
    return is_bad ? NAN : found;
}

// The weight of a logit; it is 0 below `floor`, which is by `best` and after the temperature.
struct Weight {
    Vec best, temperature, floor;

    Vec operator()(Vec x) const {
        const Vec scaled = (x - best) / temperature;
        return scaled < floor ? zero() : exp(scaled);
    }
};

static inline double sum_of(const Block& block, const Weight& weight) {
    const float* x = block.x;
    const i64 n = block.n;
    Vec total = zero();
    i64 i = 0;
    for (; i + W <= n; i += W) total = total + weight(load(x + i));
    double sum_ = sum(total);
    if (i < n) {
        float left[W];
        store(left, weight(load_n(x + i, n - i)));
        for (i64 k = 0; k < n - i; k++) sum_ += left[k];
    }
    return sum_;
}

// The element in which the cumulative weight passes `share` of its total; it has a weight.
static inline i64 find(const float* x, i64 n, const Weight& weight, double share) {
    float weights[BLOCK];
    vectors(n, [&](i64 i, auto count) { store_n(weights + i, weight(load_n(x + i, count)), count); });
    double total = 0;
    for (i64 i = 0; i < n; i++) total += weights[i];
    const double target = share * total;
    double mass = 0;
    i64 found = 0;
    for (i64 i = 0; i < n; i++) {
        if (weights[i] <= 0) continue;
        found = i;
        mass += weights[i];
        if (mass > target) break;
    }
    return found;
}

// `tops` and `sums` have room for each block.
static i64 choose(const Row& row, const Choice& choice, float* tops, double* sums, float* best) {
    Copy copy;
    const i64 num_blocks = ceil_div(row.vocab, BLOCK);
    *best = -INF;
    i64 best_block = 0;
    for (i64 b = 0; b < num_blocks; b++) {
        const Block block = row.block(b, copy);
        tops[b] = largest_of(block.x, block.n);
        if (tops[b] != tops[b]) {
            *best = NAN;
            return 0;
        }
        if (tops[b] > *best) {
            *best = tops[b];
            best_block = b;
        }
    }
    if (std::isinf(*best)) return 0;
    if (choice.temperature == 0) {
        const Block block = row.block(best_block, copy);
        for (i64 i = 0;; i++)
            if (block.x[i] == *best) return best_block * BLOCK + block.token(i);
    }
    const Weight weight = {set1(*best), set1(float(choice.temperature)), set1(float(choice.log_min_p))};
    double total = 0;
    for (i64 b = 0; b < num_blocks; b++) {
        // exp gives 0 below −87
        const bool counts = tops[b] > -INF && (tops[b] - *best) / float(choice.temperature) >= -87.0f;
        sums[b] = counts ? sum_of(row.block(b, copy), weight) : 0;
        total += sums[b];
    }
    const double target = choice.uniform * total;
    double mass = 0;
    i64 found = best_block;
    for (i64 b = 0; b < num_blocks; b++) {
        if (sums[b] <= 0) continue;
        found = b;
        if (mass + sums[b] > target) break;
        mass += sums[b];
    }
    const double share = (target - mass) / sums[found];
    const Block block = row.block(found, copy);
    return found * BLOCK + block.token(find(block.x, block.n, weight, share));
}

}  // namespace LORAY_NAMESPACE

using namespace LORAY_NAMESPACE;

LORAY_ENTRY(sample_)
(const float* logits, i64 stride, i64 vocab, const Choice* choices, i64 num_rows, const uint32_t* words,
 i64 words_stride, i64* tokens, float* best, int threads) {
    static thread_local Scratch memory;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (num_rows > 1)
    for (i64 r = 0; r < num_rows; r++) {
        const Choice& choice = choices[r];
        const i64 num_blocks = ceil_div(vocab, BLOCK);
        double* sums = (double*)memory.get(num_blocks * (sizeof(double) + sizeof(float)));
        const uint32_t* own = choice.mask < 0 ? nullptr : words + choice.mask * words_stride;
        const Row row = {logits + choice.row * stride, own, vocab};
        tokens[r] = choose(row, choice, (float*)(sums + num_blocks), sums, best + r);
    }
}
