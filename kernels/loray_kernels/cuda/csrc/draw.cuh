// What the kernels that choose tokens share: a row of logits with its masks, its largest element, and the draw over the
// whole vocabulary. A block of threads has a row.
#pragma once
#include "device.cuh"

constexpr int THREADS = 512;
constexpr int BLOCK = 512; // tokens
constexpr int MAX_BLOCKS = 1024;
constexpr int LANES = 32, WARPS = THREADS / LANES, PART = BLOCK / LANES;
constexpr double BELOW_ONE = 1.0 - 1.0 / 4503599627370496.0; // 2⁻⁵²

__device__ inline float infinity() { return __uint_as_float(0x7f800000u); }
__device__ inline bool is_finite(float x) { return x - x == 0.0f; }

// 32 tokens a word; nullptr: all are allowed.
__device__ inline bool allows(const int *words, i64 token) {
  return !words || (words[token / 32] >> (token % 32) & 1);
}

// A row of logits with a step's mask and a request's own.
struct Row {
  const float *logits;
  const int *words, *own;
  i64 vocab;
  __device__ float at(i64 token) const {
    return allows(words, token) && allows(own, token) ? logits[token] : -infinity();
  }
};

struct Weight {
  float best, temperature, floor;
  __device__ float operator()(float logit) const {
    const float scaled = (logit - best) / temperature;
    return scaled < floor ? 0.0f : expf(scaled);
  }
};

struct Best {
  float logit; // NaN if one of the row's is
  i64 token;   // the first of equals
};

struct DrawMemory {
  double sums[MAX_BLOCKS], parts[LANES], share;
  float weights[BLOCK], tops[WARPS];
  i64 places[WARPS], found;
  int counts[WARPS];
};

// The sum over all threads.
__device__ inline int block_sum(int count, DrawMemory &m) {
#pragma unroll
  for (int mask = LANES / 2; mask; mask >>= 1) count += __shfl_xor_sync(0xffffffffu, count, mask);
  __syncthreads();
  if (threadIdx.x % LANES == 0) m.counts[threadIdx.x / LANES] = count;
  __syncthreads();
  count = 0;
#pragma unroll 1
  for (int w = 0; w < WARPS; w++) count += m.counts[w];
  return count;
}

__device__ inline Best best_of(const Row &row, DrawMemory &m) {
  const int tid = threadIdx.x, warp = tid / LANES, lane = tid % LANES;
  float best = -infinity();
  i64 place = 0;
  int is_bad = 0;
#pragma unroll 1
  for (i64 t = tid; t < row.vocab; t += THREADS) {
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
  __syncthreads(); // what an earlier call left has been read
  if (lane == 0) m.tops[warp] = best, m.places[warp] = place, m.counts[warp] = is_bad;
  __syncthreads();
  best = m.tops[0], place = m.places[0], is_bad = m.counts[0];
#pragma unroll 1
  for (int w = 1; w < WARPS; w++) {
    if (m.tops[w] > best || (m.tops[w] == best && m.places[w] < place)) best = m.tops[w], place = m.places[w];
    is_bad |= m.counts[w];
  }
  return {is_bad ? __uint_as_float(0x7fc00000u) : best, place};
}

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

// Inverts the cumulative distribution as `sampling.draw` does: over blocks of 512 tokens first, then in one block, whose
// weights are computed once more. So nothing as large as the vocabulary is written.
__device__ inline i64 draw_from(const Row &row, const Weight &weight, double uniform, DrawMemory &m) {
  const int tid = threadIdx.x, warp = tid / LANES, lane = tid % LANES;
  const int num_blocks = static_cast<int>((row.vocab + BLOCK - 1) / BLOCK);
  for (int b = warp; b < num_blocks; b += WARPS) {
    float sum = 0.0f;
#pragma unroll 4
    for (int i = lane; i < BLOCK; i += LANES) {
      const i64 t = static_cast<i64>(b) * BLOCK + i;
      if (t < row.vocab) sum += weight(row.at(t));
    }
    sum = warp_sum(sum);
    if (lane == 0) m.sums[b] = sum;
  }
  __syncthreads();
  const int each = (num_blocks + LANES - 1) / LANES; // blocks of a part
  if (tid < LANES) {
    m.parts[tid] = 0.0;
#pragma unroll 1
    for (int b = tid * each; b < min(num_blocks, (tid + 1) * each); b++) m.parts[tid] += m.sums[b];
  }
  __syncthreads();
  if (tid == 0) {
    double total = 0.0, before = 0.0;
#pragma unroll 1
    for (int p = 0; p < LANES; p++) total += m.parts[p];
    const double target = uniform * total;
    const i64 part = find(m.parts, 0, LANES, target, &before);
    m.found = find(m.sums, part * each, min(static_cast<i64>(num_blocks), (part + 1) * each), target, &before);
    m.share = min(max((target - before) / m.sums[m.found], 0.0), BELOW_ONE);
  }
  __syncthreads();
  const i64 token = m.found * BLOCK + tid;
  m.weights[tid] = token < row.vocab ? weight(row.at(token)) : 0.0f;
  __syncthreads();
  if (tid < LANES) {
    m.parts[tid] = 0.0;
#pragma unroll 1
    for (int i = tid * PART; i < (tid + 1) * PART; i++) m.parts[tid] += static_cast<double>(m.weights[i]);
  }
  __syncthreads();
  if (tid == 0) {
    double total = 0.0, before = 0.0;
#pragma unroll 1
    for (int p = 0; p < LANES; p++) total += m.parts[p];
    const i64 part = find(m.parts, 0, LANES, m.share * total, &before);
    m.found = m.found * BLOCK + find(m.weights, part * PART, (part + 1) * PART, m.share * total, &before);
  }
  __syncthreads();
  return m.found;
}
