// A token for each row whose logits are changed, whose candidates are cut by top-k or top-p, or whose log-probabilities
// are wanted; one block of threads for a row. Its logits are changed in place, and put back at the end.
#include "order.cuh"

constexpr int MAX_TOP = 20;
constexpr int RESULT = 4 + 2 * MAX_TOP; // 64-bit words

// What a request changes of a token's logit, kept from step to step. `logit`: what it was, while it is changed.
struct Edit {
  int token;
  float bias, factor, added, logit;
};
// An entry that is new, or is now another.
struct NewEdit {
  int place, token;
  float bias, factor, added;
};
struct Forbidden {
  int token;
  float logit;
};

// As Python packs it. Addresses are 0 where there is nothing, `mask` is −1, `top_k` 0, `top_p` 1. `num_top` is −1 where
// no log-probabilities are wanted. Temperature 0: the best token, the first of equals.
struct Choice {
  i64 row, mask, own_words, edits, num_edits, first_new, num_new, first_forbidden, num_forbidden, top_k, num_top;
  double temperature, log_min_p, uniform, top_p;
};

// Keskar et al., 2019 (CTRL), equation 3, between what is added before and after. No sum is fused with a product, as in
// torch.
__device__ inline float edited(float x, const Edit &e) {
  x = x + e.bias;
  x = x > 0.0f ? x / e.factor : __fmul_rn(x, e.factor);
  return __fadd_rn(x, e.added);
}

__device__ inline float logprob(float logit, float best, float log_sum) { return logit - best - log_sum; }

// Softmax's logarithm at the `num` best tokens; returns the logarithm of the sum.
__device__ inline float write_top(const Row &row, float best, i64 num, i64 *out, OrderMemory &m) {
  const Tokens tokens = {row, {best, 1.0f, -infinity()}, true};
  survey(tokens, m);
  const float log_sum = logf(static_cast<float>(static_cast<double>(m.first.mass[CUTS]) / WHOLE));
  if (num > 0) {
    list_at(tokens, false, static_cast<u64>(num - 1), true, m);
    for (int i = threadIdx.x; i < m.num; i += THREADS) {
      if (m.ranks[i] >= num) continue;
      out[2 * m.ranks[i]] = token_of(m.keys[i]);
      out[2 * m.ranks[i] + 1] = __float_as_uint(logprob(logit_of(m.keys[i]), best, log_sum));
    }
  }
  return log_sum;
}

// Top-k, then top-p (Holtzman et al., 2020) of what is left, and the draw, all in the order of the tokens.
__device__ inline i64 draw_in_order(const Tokens &tokens, const Choice &choice, OrderMemory &m) {
  survey(tokens, m);
  u64 mass = m.first.mass[CUTS];
  if (choice.top_k > 0 && static_cast<u64>(choice.top_k) < m.first.count[CUTS]) {
    const Place last = place_at(tokens, false, static_cast<u64>(choice.top_k - 1), m);
    mass = last.mass_before + last.mass;
  }
  if (choice.top_p < 1.0) { // the last token before which the mass has not reached top-p
    const double wanted = choice.top_p * static_cast<double>(mass);
    u64 target = static_cast<u64>(wanted);
    if (static_cast<double>(target) == wanted && target > 0) target--;
    const Place last = place_at(tokens, true, target, m);
    mass = last.mass_before + last.mass;
  }
  const u64 target = static_cast<u64>(choice.uniform * static_cast<double>(mass));
  return token_of(place_at(tokens, true, min(target, mass - 1), m).key);
}

// Grid (rows). `out`, of each: the token, the largest of the changed logits that are allowed, the token's log-probability
// among the unchanged logits and its rank, then (token, log-probability) of the best; numbers as their bits. All but the
// second have no meaning where that is not finite. `slots` and `tokens`: see sample.cu.
extern "C" __global__ void __launch_bounds__(THREADS)
    choose_fp32(float *logits, i64 stride, i64 vocab, const Choice *choices, const NewEdit *new_edits,
                Forbidden *forbidden, const int *words, i64 words_stride, i64 *out, const i64 *slots, i64 *tokens) {
  __shared__ DrawMemory draw;
  __shared__ OrderMemory order;
  const int tid = threadIdx.x;
  const Choice choice = choices[blockIdx.x];
  float *x = logits + choice.row * stride;
  out += static_cast<i64>(blockIdx.x) * RESULT;

  float top = 0.0f, log_sum = 0.0f;
  const Row whole = {x, nullptr, nullptr, vocab};
  const bool is_scored = choice.num_top >= 0;
  if (is_scored) {
    top = best_of(whole, draw).logit;
    if (is_finite(top)) log_sum = write_top(whole, top, min(choice.num_top, vocab), out + 4, order);
  }

  Edit *edits = reinterpret_cast<Edit *>(choice.edits);
  for (i64 i = tid; i < choice.num_new; i += THREADS) {
    const NewEdit e = new_edits[choice.first_new + i];
    edits[e.place] = {e.token, e.bias, e.factor, e.added, 0.0f};
  }
  __syncthreads();
  for (i64 i = tid; i < choice.num_edits; i += THREADS) {
    const float logit = x[edits[i].token];
    edits[i].logit = logit;
    x[edits[i].token] = edited(logit, edits[i]);
  }
  __syncthreads();
  forbidden += choice.first_forbidden;
  for (i64 i = tid; i < choice.num_forbidden; i += THREADS) {
    forbidden[i].logit = x[forbidden[i].token];
    x[forbidden[i].token] = -infinity();
  }
  __syncthreads();

  const int *mask = choice.mask < 0 ? nullptr : words + choice.mask * words_stride;
  const Row row = {x, mask, reinterpret_cast<const int *>(choice.own_words), vocab};
  const Best best = best_of(row, draw);
  const float temperature = static_cast<float>(choice.temperature);
  i64 token = best.token;
  if (temperature != 0.0f && is_finite(best.logit)) {
    const Weight weight = {best.logit, temperature, static_cast<float>(choice.log_min_p)};
    if (choice.top_k > 0 || choice.top_p < 1.0)
      token = draw_in_order({row, weight, false}, choice, order);
    else
      token = draw_from(row, weight, choice.uniform, draw);
  }

  __syncthreads();
  for (i64 i = tid; i < choice.num_forbidden; i += THREADS) x[forbidden[i].token] = forbidden[i].logit;
  __syncthreads();
  for (i64 i = tid; i < choice.num_edits; i += THREADS) x[edits[i].token] = edits[i].logit;
  __syncthreads();
  if (tid == 0) {
    out[0] = token, out[1] = __float_as_uint(best.logit);
    if (tokens) tokens[slots[choice.row]] = is_finite(best.logit) ? token : 0;
  }
  if (!is_scored) return;
  const float own = logprob(x[token], top, log_sum);
  int above = 0;
#pragma unroll 1
  for (i64 t = tid; t < vocab; t += THREADS) above += logprob(x[t], top, log_sum) > own;
  above = block_sum(above, draw);
  if (tid == 0) out[2] = __float_as_uint(own), out[3] = above + 1;
}
LORAY_EXPORT(choose_fp32)
