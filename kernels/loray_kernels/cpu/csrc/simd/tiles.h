// Parts of attention: packing of keys and values, and products of packed operands in register-blocked tiles.
//
// Packed operands are units of four bytes: two bf16 neighbours of the summed dimension if the CPU can multiply these
// (AVX512-BF16), else one fp32. Each sum has one accumulator over the summed dimension in order.
#pragma once

#include "transpose.h"
#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace LORAY_NAMESPACE {

constexpr int KEYS = 64;               // keys of a block of the online softmax
constexpr int VECTORS = REGISTERS == 32 ? 4 : 2;

constexpr i64 KEY_STEP = 16;           // elements of a key between two calls of Fetch::some

// `num` keys rounded up to whole vectors: the part of a block that is computed.
static inline i64 padded(i64 num) { return ceil_div(num, W) * W; }

// Memory that is needed next, prefetched a few cache lines at a time during the computation.
struct Fetch {
    struct Region {
        const char* at;
        i64 lines;
    } regions[8 * KEYS];
    i64 num = 0, lines = 0, region = 0, share = 0, due = 0;  // share and due: lines · 2¹⁶

    void clear() { num = lines = region = due = 0; }

    void add(const void* at, i64 bytes) {
        regions[num++] = {(const char*)at, ceil_div(bytes, 64)};
        lines += ceil_div(bytes, 64);
    }

    // What was added, in so many calls of `some`.
    void start(i64 pauses) { share = ceil_div(lines << 16, max_(1, pauses)); }

    inline void some() {
        const i64 due_now = due + share;
        due = due_now & 0xffff;
        for (i64 left = due_now >> 16; left > 0 && region < num;) {
            const char* at = regions[region].at;
            const i64 all = regions[region].lines, here = min_(left, all);
            for (i64 n = 0; n < here; n++) __builtin_prefetch(at + n * 64, 0, 2);
            regions[region] = {at + here * 64, all - here};
            region += here == all, left -= here;
        }
    }
};

// One fp32 in a unit: for any type and any CPU.
struct Singles {
    static constexpr int PER_UNIT = 1;
    static constexpr bool BY_AMX = false;
    static void begin() {}
    static constexpr int QUERIES = 6;  // rows of a tile; with 4 (2) vectors of columns they fit the registers
    using Unit = float;
    // Calls of Fetch::some while so many values are packed.
    static i64 pauses(i64) { return 0; }
    static inline Vec mac(Vec acc, const float* a, const float* b) { return fma(set1(*a), load(b), acc); }
    // One side of a product is an element for all lanes, the other a vector of elements in the pool: the s-th of a unit.
    using Factor = Vec;
    static inline Vec factor(const float* a) { return set1(*a); }
    template <int s>
    static inline Vec in_pool(const float* b) {
        return load(b);
    }
    template <int s>
    static inline Vec in_pool(const bf16* b) {
        const Vec two = load((const float*)b);
        return s ? upper(two) : lower(two);
    }
    template <int s>
    static inline Vec in_pool(const int8_t* b) {
        return byte<s>(load((const float*)b));
    }
    static inline Vec multiply(Vec acc, Vec a, Vec b) { return fma_here(a, b, acc); }

    template <class T>
    static inline void pack_row(Unit* out, const T* x, i64 d) {
        for (i64 i = 0; i < d; i += W) store(out + i, load(x + i));
    }
    // out[i][key] = k[key][i]; zeros from `num` on to a whole vector, as in the values. Not inlined, as `tile_of`.
    template <class T>
    __attribute__((noinline)) static void pack_keys(Unit* out, const T* const* k, i64 num, i64 d, Fetch& fetch) {
        i64 j = 0;
        for (; j + W <= num; j += W)
            for (i64 i = 0; i < d; i += Square<T>::WIDTH) {
                Square<T>::put(out + i * KEYS + j, KEYS, k + j, i);
                fetch.some();
            }
        for (i64 i = 0; j < num && i < d; i += W) {
            Vec r[W];
            for (int n = 0; n < W; n++) r[n] = j + n < num ? load(k[j + n] + i) : zero();
            transpose(r);
            for (int n = 0; n < W; n++) store(out + (i + n) * KEYS + j, r[n]);
        }
    }
    // A vector of units of the pool: of one element, or of two or four, which go to neighbouring rows.
    static inline void take(Unit* out, const float* from, const float*) { store(out, load(from)); }
    static inline void take(Unit* out, const float* from, const bf16*) {
        const Vec two = load(from);
        store(out, lower(two));
        store(out + KEYS, upper(two));
    }
    static inline void take(Unit* out, const float* from, const int8_t*) {
        const Vec four = load(from);
        each<4>([&](auto n) { store(out + n * KEYS, byte<n>(four)); });
    }
    template <class T>
    static inline void pack_values(Unit* out, const T* const* v, i64 num, i64 d, Fetch&) {
        for (i64 j = 0; j < padded(num); j++)
            for (i64 i = 0; i < d; i += W) store(out + j * d + i, j < num ? load(v[j] + i) : zero());
    }
    static inline void pack_weights(Unit* out, const Vec* p) {
        for (int v = 0; v < KEYS / W; v++) store(out + v * W, p[v]);
    }
    // two rows that are summed over, KEYS columns in vectors
    static inline void pack_two(Unit* out, const Vec* even, const Vec* odd) {
        for (int v = 0; v < KEYS / W; v++) store(out + v * W, even[v]), store(out + KEYS + v * W, odd[v]);
    }
    template <class T>
    static inline void place(Unit* out, i64 element, T x) {
        out[element] = to_float(x);
    }
};

#if defined(__AVX512BF16__)

struct Pairs {
    static constexpr int PER_UNIT = 2;
#if defined(__AMX_BF16__)
    static constexpr bool BY_AMX = true;
    static void begin() { shaped_rows = 0; }
#else
    static constexpr bool BY_AMX = false;
    static void begin() {}
#endif
    static constexpr int QUERIES = BY_AMX ? 16 : 6;
    using Unit = uint32_t;
    static i64 pauses(i64 num) { return padded(num) / 2; }
    static inline Vec mac(Vec acc, const Unit* a, const Unit* b) {
        return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(int(*a)), (__m512bh)_mm512_loadu_si512(b));
    }
    using Factor = __m512bh;
    static inline Factor factor(const Unit* a) { return (__m512bh)_mm512_set1_epi32(int(*a)); }
    template <int s>
    static inline Factor in_pool(const bf16* b) {
        return (__m512bh)_mm512_loadu_si512(b);
    }
    template <int s>
    static inline Factor in_pool(const int8_t* b) {
        const Vec four = load((const float*)b);
        return (__m512bh)both_(byte<2 * s>(four), byte<2 * s + 1>(four));
    }
    static inline Vec multiply(Vec acc, Factor a, Factor b) { return _mm512_dpbf16_ps(acc, a, b); }

    static inline void pack_row(Unit* out, const bf16* x, i64 d) { memcpy(out, x, d * 2); }

    static inline void pack_keys(Unit* out, const bf16* const* k, i64 num, i64 d, Fetch& fetch) {
        for (i64 j = 0; j < padded(num); j += 16)
            for (i64 i = 0; i < d; i += 32) {
                const i64 units = min_(16, (d - i) / 2);
                __m512i r[16];
                if (units == 16 && j + 16 <= num)
                    for (int n = 0; n < 16; n++) r[n] = _mm512_loadu_si512(k[j + n] + i);
                else
                    for (int n = 0; n < 16; n++)
                        r[n] = j + n < num ? _mm512_maskz_loadu_epi32(__mmask16((1u << units) - 1), k[j + n] + i)
                                           : _mm512_setzero_si512();
                transpose(r);
                for (i64 n = 0; n < units; n++) _mm512_storeu_si512(out + (i / 2 + n) * KEYS + j, r[n]);
                fetch.some();
            }
    }

    static inline void take(Unit* out, const float* from, const bf16*) { store((float*)out, load(from)); }
    static inline void take(Unit* out, const float* from, const int8_t*) {
        _mm512_storeu_si512(out, (__m512i)in_pool<0>((const int8_t*)from));
        _mm512_storeu_si512(out + KEYS, (__m512i)in_pool<1>((const int8_t*)from));
    }

    static inline void pack_values(Unit* out, const bf16* const* v, i64 num, i64 d, Fetch& fetch) {
        alignas(64) static const uint16_t none[64] = {};
        for (i64 j = 0; j < padded(num); j += 2, out += d) {
            const bool zero_even = j >= num, zero_odd = j + 1 >= num;
            for (i64 i = 0; i < d; i += 16) {
                const void* even = zero_even ? (const void*)none : v[j] + i;
                const void* odd = zero_odd ? (const void*)none : v[j + 1] + i;
                __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
                __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
                _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
            fetch.some();
        }
    }

    static inline void pack_values(Unit* out, const int8_t* const* v, i64 num, i64 d, Fetch& fetch) {
        for (i64 j = 0; j < padded(num); j += 2, out += d) {
            for (i64 i = 0; i < d; i += 16) {
                const Vec even = j < num ? load(v[j] + i) : zero(), odd = j + 1 < num ? load(v[j + 1] + i) : zero();
                _mm512_storeu_si512(out + i, both_(even, odd));
            }
            fetch.some();
        }
    }

    static inline void pack_weights(Unit* out, const Vec* p) {
        for (int v = 0; v < KEYS / W; v += 2)
            _mm512_storeu_si512(out + v * W / 2, (__m512i)_mm512_cvtne2ps_pbh(p[v + 1], p[v]));
    }

    static inline void pack_two(Unit* out, const Vec* even, const Vec* odd) {
        for (int v = 0; v < KEYS / W; v++) {
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even[v]));
            const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd[v]));
            _mm512_storeu_si512(out + v * W, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }

    static inline void place(Unit* out, i64 element, bf16 x) { memcpy((char*)out + 2 * element, &x, 2); }
    static inline void place(Unit* out, i64 element, int8_t x) { place(out, element, round_bf16(x)); }

  private:
    // Units of numbers that are bf16.
    static inline __m512i both_(Vec first, Vec second) {
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second));
    }
};

#endif

// out[unit][key] of `num` keys that lie in a block of the pool: unit follows unit after `stride` keys. Keys that fill up
// the last vector are what stands there. With a stride that is no multiple of W, single keys.
template <class P, class T>
static inline void take_keys(typename P::Unit* out, const float* from, i64 stride, i64 num, i64 d, Fetch& fetch) {
    constexpr i64 PER_UNIT = 4 / sizeof(T);
    for (i64 i = 0; i < d; i += PER_UNIT, from += stride, out += PER_UNIT / P::PER_UNIT * KEYS) {
        if (i % KEY_STEP == 0) fetch.some();
        i64 j = 0;
        if (stride % W == 0)
            for (; j < num; j += W) P::take(out + j, from + j, (const T*)nullptr);
        for (; j < num; j++)
            for (i64 e = 0; e < PER_UNIT; e++)
                P::place(out + e / P::PER_UNIT * KEYS, j * P::PER_UNIT + e % P::PER_UNIT, ((const T*)(from + j))[e]);
    }
}

// The packing of operands of type T.
template <class T>
struct Packing {
    using P = Singles;
};
#if defined(__AVX512BF16__)
template <>
struct Packing<bf16> {
    using P = Pairs;
};
#endif

// c[q][·] (+)= Σₖ a[q][k] · b[k][·] for NQ rows and NV vectors.
template <class P, int NQ, int NV>
static inline void tile(const typename P::Unit* a, i64 a_stride, const typename P::Unit* b, i64 b_stride, i64 num,
                        float* c, i64 c_stride, bool add) {
    Vec acc[NQ][NV];
    each<NQ * NV>([&](auto i) {
        acc[i / NV][i % NV] = add ? load(c + i / NV * c_stride + i % NV * W) : zero();
    });
    for (i64 k = 0; k < num; k++)
        each<NQ>([&](auto q) {
            each<NV>([&](auto v) { acc[q][v] = P::mac(acc[q][v], a + q * a_stride + k, b + k * b_stride + v * W); });
        });
    each<NQ * NV>([&](auto i) { store(c + i / NV * c_stride + i % NV * W, acc[i / NV][i % NV]); });
}

// The same for any number of rows: as many tiles of NQ rows as there are, then smaller ones.
template <class P, int NV, int NQ>
static inline void tile_rows(const typename P::Unit* a, i64 a_stride, const typename P::Unit* b, i64 b_stride, i64 num,
                             float* c, i64 c_stride, i64 rows, bool add) {
    i64 q = 0;
    for (; q + NQ <= rows; q += NQ)
        tile<P, NQ, NV>(a + q * a_stride, a_stride, b, b_stride, num, c + q * c_stride, c_stride, add);
    if constexpr (NQ > 1)
        if (q < rows)
            tile_rows<P, NV, W == 16 ? (NQ > 3 ? 3 : 1) : NQ - 1>(a + q * a_stride, a_stride, b, b_stride, num,
                                                                  c + q * c_stride, c_stride, rows - q, add);
}

// The same for any multiple of W columns: NV vectors of columns at a time, then single ones.
template <class P, int NV, int NQ>
static inline void tile_columns(const typename P::Unit* a, i64 a_stride, const typename P::Unit* b, i64 b_stride,
                                i64 num, float* c, i64 c_stride, i64 rows, i64 columns, bool add) {
    i64 i = 0;
    for (; i + NV * W <= columns; i += NV * W)
        tile_rows<P, NV, NQ>(a, a_stride, b + i, b_stride, num, c + i, c_stride, rows, add);
    for (; i < columns; i += W) tile_rows<P, 1, NQ>(a, a_stride, b + i, b_stride, num, c + i, c_stride, rows, add);
}

constexpr int FEW = 3;  // rows that leave registers for twice as many vectors
constexpr int few_vectors(i64 rows) { return W < 16 && rows <= FEW ? 2 * VECTORS : VECTORS; }
constexpr i64 STEPS = 4;  // of a sum between two calls of Fetch::some
constexpr i64 UNITS = 2;  // of keys; a unit of four vectors of keys takes two or four cache lines

// The same for any number of rows and any multiple of W columns: its tiles are compiled once for all its callers.
template <class P>
__attribute__((noinline)) static void product(const typename P::Unit* a, i64 a_stride, const typename P::Unit* b,
                                              i64 b_stride, i64 num, float* c, i64 c_stride, i64 rows, i64 columns,
                                              bool add) {
    if constexpr (P::BY_AMX)
        tiles_by_amx(a, a_stride, b, b_stride, num, c, c_stride, rows, columns, add);
    else if (W < 16 && rows <= FEW)
        tile_columns<P, 2 * VECTORS, FEW>(a, a_stride, b, b_stride, num, c, c_stride, rows, columns, add);
    else
        tile_columns<P, VECTORS, P::QUERIES>(a, a_stride, b, b_stride, num, c, c_stride, rows, columns, add);
}

// c[q][·] += Σₖ a[q][k] · b[k][·] for NQ rows of fp32, NR runs of columns, and rows of b from column `first` on, where
// they are. Inlined, the sums would not stay in registers.
template <int NQ, int NR, class T>
__attribute__((noinline)) static void tile_of(const float* a, i64 a_stride, const T* const* b, i64 first, i64 num,
                                              float* c, i64 c_stride, Fetch& fetch) {
    using R = Run<T>;
    constexpr int N = R::N;
    Vec acc[NQ][NR * N];
    each<NQ * NR * N>([&](auto i) {
        constexpr int q = i / (NR * N), v = i % (NR * N);
        acc[q][v] = R::template part<v % N>(c + q * c_stride + first + v / N * N * W);
    });
    for (i64 k = 0; k < num; fetch.some())
        for (const i64 stop = min_(num, k + STEPS); k < stop; k++) {
            Vec weight[NQ];
            each<NQ>([&](auto q) { weight[q] = set1(a[q * a_stride + k]); });
            each<NR * N>([&](auto i) {
                const Vec value = R::template part<i % N>(b[k] + first + i / N * N * W);
                each<NQ>([&](auto q) { acc[q][i] = fma_here(weight[q], value, acc[q][i]); });
            });
        }
    each<NQ * NR>([&](auto i) { R::join(c + i / NR * c_stride + first + i % NR * N * W, acc[i / NR] + i % NR * N); });
}

// The same for up to NQ rows and whole runs of columns: each element of b is converted to fp32 once. The sums are those
// of `product` with packed rows.
template <class T, int NQ = Singles::QUERIES>
static inline void product_of(const float* a, i64 a_stride, const T* const* b, i64 num, float* c, i64 c_stride,
                              i64 rows, i64 columns, Fetch& fetch) {
    if (rows < NQ) {
        if constexpr (NQ > 1) product_of<T, NQ - 1>(a, a_stride, b, num, c, c_stride, rows, columns, fetch);
        return;
    }
    constexpr int WIDTH = Run<T>::N * W, NR = few_vectors(NQ) / Run<T>::N;
    i64 i = 0;
    for (; i + NR * WIDTH <= columns; i += NR * WIDTH) tile_of<NQ, NR>(a, a_stride, b, i, num, c, c_stride, fetch);
    for (; i < columns; i += WIDTH) tile_of<NQ, 1>(a, a_stride, b, i, num, c, c_stride, fetch);
}

// Its calls of Fetch::some.
static i64 pauses_of(i64 rows, i64 num, i64 d) {
    return ceil_div(d, few_vectors(rows) * W) * ceil_div(num, STEPS);
}

// c[q][v · W + ·] = Σᵢ a[q][i] · b[v][i][·] for NQ rows and NV vectors of keys, where these are in the pool: unit follows
// unit after `stride` keys. The sums are those of `product` with packed keys.
template <class P, int NQ, int NV, class T>
__attribute__((noinline)) static void tile_of_keys(const typename P::Unit* a, i64 a_stride, const float* const* b,
                                                   i64 stride, i64 units, float* c, Fetch& fetch) {
    constexpr i64 PARTS = 4 / i64(sizeof(T)) / P::PER_UNIT;
    Vec acc[NQ][NV];
    each<NQ * NV>([&](auto i) { acc[i / NV][i % NV] = zero(); });
    for (i64 u = 0; u < units; fetch.some())
        for (const i64 stop = min_(units, u + UNITS); u < stop; u++)
            each<PARTS>([&](auto s) {
                typename P::Factor factor[NQ];
                each<NQ>([&](auto q) { factor[q] = P::factor(a + q * a_stride + u * PARTS + s); });
                each<NV>([&](auto v) {
                    const typename P::Factor keys = P::template in_pool<s>((const T*)(b[v] + u * stride));
                    each<NQ>([&](auto q) { acc[q][v] = P::multiply(acc[q][v], factor[q], keys); });
                });
            });
    each<NQ * NV>([&](auto i) { store(c + i / NV * KEYS + i % NV * W, acc[i / NV][i % NV]); });
}

// The same for up to NQ rows and any number of vectors.
template <class P, class T, int NQ = P::QUERIES>
static inline void product_of_keys(const typename P::Unit* a, i64 a_stride, const float* const* b, i64 num, i64 stride,
                                   i64 units, float* c, i64 rows, Fetch& fetch) {
    if constexpr (P::BY_AMX) {
        rows_by_amx(a, a_stride, [&](i64 v) { return (const uint32_t*)b[v]; }, stride, units, c, KEYS, rows, num, false,
                    [&] { fetch.some(); });
        return;
    }
    if (rows < NQ) {
        if constexpr (NQ > 1) product_of_keys<P, T, NQ - 1>(a, a_stride, b, num, stride, units, c, rows, fetch);
        return;
    }
    constexpr int NV = few_vectors(NQ);
    i64 v = 0;
    for (; v + NV <= num; v += NV) tile_of_keys<P, NQ, NV, T>(a, a_stride, b + v, stride, units, c + v * W, fetch);
    for (; v < num; v++) tile_of_keys<P, NQ, 1, T>(a, a_stride, b + v, stride, units, c + v * W, fetch);
}

}  // namespace LORAY_NAMESPACE
