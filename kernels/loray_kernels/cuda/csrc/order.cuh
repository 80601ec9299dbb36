// The tokens of a row from the best to the worst, equals by their ids, without sorting the row: which token stands at a
// count or at a mass of the order, and what stands before it.
//
// A key says where a token stands, and no two have the same. The row is read with a few keys at which it is cut, which
// gives the count and the mass above each; then again between two of them, until so few tokens are left that each can be
// compared with each. Masses are integers, so they do not depend on the order in which threads add.
#pragma once
#include "draw.cuh"

typedef unsigned long long u64;

constexpr int CUTS = 6, LIST = 1024;
constexpr u64 IDS = (1ull << 20) - 1;

__device__ inline u64 key_of(float logit, u64 id_part) {
  const unsigned bits = __float_as_uint(logit + 0.0f); // −0 is 0
  return static_cast<u64>(bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u)) << 20 | id_part;
}
__device__ inline i64 token_of(u64 key) { return static_cast<i64>(IDS - (key & IDS)); }
__device__ inline float logit_of(u64 key) {
  const unsigned bits = static_cast<unsigned>(key >> 20);
  return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xffffffffu));
}

// The best token's mass is 2⁴⁴; less than 2⁻⁴⁴ of it is none. 2¹⁹ tokens have at most 2⁶³.
constexpr float WHOLE = 17592186044416.0f;

struct Tokens {
  Row row;
  Weight weight;
  bool all; // also those without mass
  __device__ bool at(i64 token, u64 *key, u64 *mass) const {
    const float logit = row.at(token);
    *key = key_of(logit, IDS - static_cast<u64>(token));
    *mass = static_cast<u64>(weight(logit) * WHOLE);
    return all || *mass > 0;
  }
};

// What stands at or above keys that become smaller; the first is above all that is still looked at.
struct Cuts {
  u64 key[CUTS + 1], mass[CUTS + 1], count[CUTS + 1];
};

struct Place {
  u64 key, mass, mass_before, count_before;
};

struct OrderMemory {
  Cuts first, next;
  u64 mass[WARPS][CUTS];
  int count[WARPS][CUTS];
  u64 low, high;                                        // the listed tokens: low ≤ key < high
  u64 mass_begin, mass_end, count_begin, count_end;     // of the order, which they are
  u64 keys[LIST], masses[LIST], befores[LIST];
  int ranks[LIST], num;
  bool is_listed;
  Place found;
};

// Mass and count at each of the cuts but the first.
__device__ inline void measure(const Tokens &tokens, Cuts &cuts, OrderMemory &m) {
  const int tid = threadIdx.x, warp = tid / LANES, lane = tid % LANES;
  u64 mass[CUTS], key[CUTS];
  int count[CUTS];
#pragma unroll
  for (int c = 0; c < CUTS; c++) mass[c] = 0, count[c] = 0, key[c] = cuts.key[c + 1];
  const u64 above = cuts.key[0];
#pragma unroll 1
  for (i64 t = tid; t < tokens.row.vocab; t += THREADS) {
    u64 own_key, own_mass;
    if (!tokens.at(t, &own_key, &own_mass) || own_key >= above) continue;
#pragma unroll
    for (int c = 0; c < CUTS; c++)
      if (own_key >= key[c]) mass[c] += own_mass, count[c]++;
  }
#pragma unroll
  for (int c = 0; c < CUTS; c++) {
#pragma unroll
    for (int mask = LANES / 2; mask; mask >>= 1) {
      mass[c] += __shfl_xor_sync(0xffffffffu, mass[c], mask);
      count[c] += __shfl_xor_sync(0xffffffffu, count[c], mask);
    }
    if (lane == 0) m.mass[warp][c] = mass[c], m.count[warp][c] = count[c];
  }
  __syncthreads();
  if (tid < CUTS) {
    u64 total = cuts.mass[0], number = cuts.count[0];
#pragma unroll 1
    for (int w = 0; w < WARPS; w++) total += m.mass[w][tid], number += static_cast<u64>(m.count[w][tid]);
    cuts.mass[tid + 1] = total, cuts.count[tid + 1] = number;
  }
  __syncthreads();
}

// To be called first. The first cuts are by nats below the best token, which few tokens are near.
__device__ inline void survey(const Tokens &tokens, OrderMemory &m) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const float best = tokens.weight.best, nat = tokens.weight.temperature;
    m.first.key[0] = key_of(best, IDS) + 1, m.first.mass[0] = m.first.count[0] = 0;
    m.first.key[1] = key_of(best - 1.5f * nat, 0), m.first.key[2] = key_of(best - 4.0f * nat, 0);
    m.first.key[3] = key_of(best - 8.0f * nat, 0), m.first.key[4] = key_of(best - 14.0f * nat, 0);
    m.first.key[5] = key_of(best - 31.0f * nat, 0), m.first.key[6] = 0; // below 31 there is no mass
    m.is_listed = false;
  }
  __syncthreads();
  measure(tokens, m.first, m);
}

// Lists tokens among which the order's count, or its mass, passes `target`; `from_top`: and all before them.
__device__ inline void list_at(const Tokens &tokens, bool by_mass, u64 target, bool from_top, OrderMemory &m) {
  const int tid = threadIdx.x;
  const Cuts *cuts = &m.first;
#pragma unroll 1
  for (;;) {
    if (tid == 0) {
      int c = 1;
      while (c < CUTS && (by_mass ? cuts->mass[c] : cuts->count[c]) <= target) c++;
      const bool is_short = cuts->count[c] <= LIST;
      m.is_listed = is_short || (!from_top && cuts->count[c] - cuts->count[c - 1] <= LIST);
      m.low = cuts->key[c], m.mass_end = cuts->mass[c], m.count_end = cuts->count[c];
      const int above = m.is_listed && is_short ? 0 : c - 1;
      const Cuts &from = m.is_listed && is_short ? m.first : *cuts;
      m.high = from.key[above], m.mass_begin = from.mass[above], m.count_begin = from.count[above];
      m.num = 0;
    }
    __syncthreads();
    if (m.is_listed) break;
    if (tid == 0) {
      m.next.key[0] = m.high, m.next.mass[0] = m.mass_begin, m.next.count[0] = m.count_begin;
      for (int c = 1; c < CUTS; c++) m.next.key[c] = m.high - c * ((m.high - m.low) / CUTS);
      m.next.key[CUTS] = m.low;
    }
    __syncthreads();
    measure(tokens, m.next, m);
    cuts = &m.next;
  }
#pragma unroll 1
  for (i64 t = tid; t < tokens.row.vocab; t += THREADS) {
    u64 key, mass;
    if (!tokens.at(t, &key, &mass) || key < m.low || key >= m.high) continue;
    const int i = atomicAdd(&m.num, 1);
    m.keys[i] = key, m.masses[i] = mass;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = tid; i < m.num; i += THREADS) {
    u64 before = m.mass_begin;
    int rank = static_cast<int>(m.count_begin);
#pragma unroll 4
    for (int j = 0; j < m.num; j++)
      if (m.keys[j] > m.keys[i]) before += m.masses[j], rank++;
    m.befores[i] = before, m.ranks[i] = rank;
  }
  __syncthreads();
}

// The token at which the order's count, or its mass, passes `target`, which is less than that of all.
__device__ inline Place place_at(const Tokens &tokens, bool by_mass, u64 target, OrderMemory &m) {
  const u64 begin = by_mass ? m.mass_begin : m.count_begin, end = by_mass ? m.mass_end : m.count_end;
  const bool is_known = m.is_listed && begin <= target && target < end;
  __syncthreads();
  if (!is_known) list_at(tokens, by_mass, target, false, m);
  for (int i = threadIdx.x; i < m.num; i += THREADS) {
    const u64 before = by_mass ? m.befores[i] : static_cast<u64>(m.ranks[i]);
    if (before <= target && target - before < (by_mass ? m.masses[i] : 1ull))
      m.found = {m.keys[i], m.masses[i], m.befores[i], static_cast<u64>(m.ranks[i])};
  }
  __syncthreads();
  return m.found; // the next call waits before it writes
}
