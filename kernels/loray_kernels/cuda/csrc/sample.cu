// A token for each row of logits: masks, temperature, min-p and a draw, in two passes over the row, by one block of
// threads. A row's token does not depend on other rows.
#include "draw.cuh"

// Grid (rows to sample). `numbers`: temperature (0: the best token, the first of equals), log of min-p and the uniform
// number of all rows. `out`: (token, bits of the largest allowed logit) of each; a token has no meaning where that is
// not finite. `tokens` gets it too, at its row's slot, unless it is null: the next step reads it there.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    sample_fp32(const float *logits, i64 stride, i64 vocab, const i64 *rows, const i64 *masks, const double *numbers,
                const int *words, i64 words_stride, i64 *out, const i64 *slots, i64 *tokens) {
  __shared__ DrawMemory memory;
  const i64 r = blockIdx.x, num = gridDim.x;
  const Row row = {logits + rows[r] * stride, masks[r] < 0 ? nullptr : words + masks[r] * words_stride, nullptr, vocab};
  const Best best = best_of(row, memory);
  const float temperature = static_cast<float>(numbers[r]);
  i64 token = best.token;
  if (temperature != 0.0f && is_finite(best.logit)) {
    const Weight weight = {best.logit, temperature, static_cast<float>(numbers[num + r])};
    token = draw_from(row, weight, numbers[2 * num + r], memory);
  }
  if (threadIdx.x != 0) return;
  out[2 * r] = token, out[2 * r + 1] = __float_as_uint(best.logit);
  if (tokens) tokens[slots[rows[r]]] = is_finite(best.logit) ? token : 0;
}
LORAY_EXPORT(sample_fp32)
