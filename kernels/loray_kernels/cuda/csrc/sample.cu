// A token for each row of logits: masks, temperature, min-p and a draw, in two passes over the row, by one block of
// threads.
//
// The draw inverts the cumulative distribution as `sampling.draw` does: over blocks of 512 tokens first, then in one
// block, whose weights are computed once more. So nothing as large as the vocabulary is written, and a row's token does
// not depend on other rows.
#include "device.cuh"

constexpr int THREADS = 512;
constexpr int BLOCK = 512; // tokens
constexpr int MAX_BLOCKS = 1024;
constexpr int LANES = 32, WARPS = THREADS / LANES, PART = BLOCK / LANES;
constexpr double BELOW_ONE = 1.0 - 1.0 / 4503599627370496.0; // 2⁻⁵²

// A row of logits with its mask: 32 tokens a word; nullptr: all are allowed.
struct Row {
  const float *logits;
  const int *words;
  i64 vocab;
  __device__ float at(i64 token) const {
    if (words && !(words[token / 32] >> (token % 32) & 1)) return -__uint_as_float(0x7f800000u);
    return logits[token];
  }
};

struct Weight {
  float best, temperature, floor;
  __device__ float operator()(float logit) const {
    const float scaled = (logit - best) / temperature;
    return scaled < floor ? 0.0f : expf(scaled);
  }
};

// The element in which the cumulative weight passes `target`, and how much there is before it. It has a weight.
template <class T> __device__ i64 find(const T *weights, i64 begin, i64 end, double target, double *before) {
  i64 found = begin;
  double mass = *before;
#pragma unroll 1
  for (i64 i = begin; i < end; i++) {
    if (!(weights[i] > 0)) continue;
    found = i, *before = mass;
    mass += static_cast<double>(weights[i]);
    if (mass > target) break;
  }
  return found;
}

// Grid (rows to sample). `numbers`: temperature (0: the best token, the first of equals), log of min-p and the uniform
// number of all rows. `out`: (token, bits of the largest allowed logit) of each; a token has no meaning where that is
// not finite.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample_fp32(const float *logits, i64 stride, i64 vocab, const i64 *rows, const i64 *masks, const double *numbers,
                const int *words, i64 words_stride, i64 *out) {
  __shared__ double sums[MAX_BLOCKS];
  __shared__ double parts[LANES];
  __shared__ float weights[BLOCK];
  __shared__ float tops[WARPS];
  __shared__ i64 places[WARPS];
  __shared__ int bad[WARPS];
  __shared__ i64 found;
  __shared__ double share;
  const i64 r = blockIdx.x, num = gridDim.x;
  const int tid = threadIdx.x, warp = tid / LANES, lane = tid % LANES;
  const Row row = {logits + rows[r] * stride, masks[r] < 0 ? nullptr : words + masks[r] * words_stride, vocab};

  float best = -__uint_as_float(0x7f800000u);
  i64 place = 0;
  int is_bad = 0;
#pragma unroll 1
  for (i64 t = tid; t < vocab; t += THREADS) {
    const float x = row.at(t);
    if (x > best) best = x, place = t;
    is_bad |= x != x;
  }
#pragma unroll
  for (int mask = LANES / 2; mask; mask >>= 1) {
    const float x = __shfl_xor_sync(0xffffffffu, best, mask);
    const i64 t = __shfl_xor_sync(0xffffffffu, place, mask);
    is_bad |= __shfl_xor_sync(0xffffffffu, is_bad, mask);
    if (x > best || (x == best && t < place)) best = x, place = t;
  }
  if (lane == 0) tops[warp] = best, places[warp] = place, bad[warp] = is_bad;
  __syncthreads();
  best = tops[0], place = places[0], is_bad = bad[0];
#pragma unroll 1
  for (int w = 1; w < WARPS; w++) {
    if (tops[w] > best || (tops[w] == best && places[w] < place)) best = tops[w], place = places[w];
    is_bad |= bad[w];
  }
  if (is_bad) best = __uint_as_float(0x7fc00000u);
  const float temperature = static_cast<float>(numbers[r]);
  const bool drawn = temperature != 0.0f && best - best == 0.0f; // finite
  if (tid == 0) out[2 * r] = place, out[2 * r + 1] = __float_as_uint(best);
  if (!drawn) return;

  const Weight weight = {best, temperature, static_cast<float>(numbers[num + r])};
  const int num_blocks = static_cast<int>((vocab + BLOCK - 1) / BLOCK);
  for (int b = warp; b < num_blocks; b += WARPS) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = lane; i < BLOCK; i += LANES) {
      const i64 t = static_cast<i64>(b) * BLOCK + i;
      if (t < vocab) sum += weight(row.at(t));
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[b] = sum;
  }
  __syncthreads();
  const int each = (num_blocks + LANES - 1) / LANES; // blocks of a part
  if (tid < LANES) {
    parts[tid] = 0.0;
#pragma unroll 1
    for (int b = tid * each; b < min(num_blocks, (tid + 1) * each); b++) parts[tid] += sums[b];
  }
  __syncthreads();
  if (tid == 0) {
    double total = 0.0, before = 0.0;
#pragma unroll 1
    for (int p = 0; p < LANES; p++) total += parts[p];
    const double target = numbers[2 * num + r] * total;
    const i64 part = find(parts, 0, LANES, target, &before);
    found = find(sums, part * each, min(static_cast<i64>(num_blocks), (part + 1) * each), target, &before);
    share = min(max((target - before) / sums[found], 0.0), BELOW_ONE);
  }
  __syncthreads();
  const i64 token = found * BLOCK + tid;
  weights[tid] = token < vocab ? weight(row.at(token)) : 0.0f;
  __syncthreads();
  if (tid < LANES) {
    parts[tid] = 0.0;
#pragma unroll 1
    for (int i = tid * PART; i < (tid + 1) * PART; i++) parts[tid] += static_cast<double>(weights[i]);
  }
  __syncthreads();
  if (tid == 0) {
    double total = 0.0, before = 0.0;
#pragma unroll 1
    for (int p = 0; p < LANES; p++) total += parts[p];
    const i64 part = find(parts, 0, LANES, share * total, &before);
    out[2 * r] = found * BLOCK + find(weights, part * PART, (part + 1) * PART, share * total, &before);
  }
}
LORAY_EXPORT(sample_fp32)
