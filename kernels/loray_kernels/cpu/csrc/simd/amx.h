// AMX: products of tiles of up to 16 rows of pairs of bf16 (Intel's manual, volume 2, TDPBF16PS).
//
// The sums of each row are computed alike whatever the other rows are. The registers' numbers are part of the instructions.
#pragma once

#include "simd.h"

namespace LORAY_NAMESPACE {

// Compilers do not know that the instructions read memory: what is written before stays before them.
static inline void written() { __asm__ volatile("" ::: "memory"); }

// Rows and bytes of a row of the eight registers, for the calling thread.
struct alignas(64) TileShapes {
    uint8_t palette = 1, unused[15] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int first, int last, i64 num, i64 bytes) {
        for (int i = first; i <= last; i++) rows[i] = uint8_t(num), row_bytes[i] = uint16_t(bytes);
    }
    void load() const {
        written();
        _tile_loadconfig(this);
    }
};

constexpr i64 TILE_ROWS = 16;  // and units of a row, each a pair of inputs or a sum

// Rows of the products' first factors, as `shape_rows` left the registers of this thread. Setting them takes as long as
// several products. Other libraries set their own, so whoever computes forgets them first.
static thread_local i64 shaped_rows = 0;

static inline void shape_rows(i64 rows) {
    if (rows == shaped_rows) return;
    shaped_rows = rows;
    TileShapes shapes;
    shapes.set(0, 4, rows, 64);
    shapes.set(5, 5, TILE_ROWS, 64);
    shapes.set(6, 6, rows, 32);
    shapes.set(7, 7, TILE_ROWS / 2, 64);
    shapes.load();
}

// c[q][·] (+)= Σₖ a[q][k] · b[k][·] for up to TILE_ROWS rows and four vectors of columns: `at(v)` is the first unit of
// vector v of b, whose rows are `b_stride` units apart. `num`, of units that are summed, is a multiple of 8; `between` is
// called after each 16 of them.
template <class At, class Between>
static inline void rows_by_amx(const uint32_t* a, i64 a_stride, At at, i64 b_stride, i64 num, float* c, i64 c_stride,
                               i64 rows, i64 vectors, bool add, Between between) {
    shape_rows(rows);
    written();
    const i64 a_bytes = a_stride * 4, b_bytes = b_stride * 4, c_bytes = c_stride * 4;
    if (add) {
        _tile_loadd(0, c, c_bytes);
        if (vectors > 1) _tile_loadd(1, c + W, c_bytes);
        if (vectors > 2) _tile_loadd(2, c + 2 * W, c_bytes);
        if (vectors > 3) _tile_loadd(3, c + 3 * W, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
#define LORAY_MULTIPLY(sums, factor, other)                    \
    if (vectors > sums) {                                      \
        _tile_loadd(other, at(sums) + k * b_stride, b_bytes);  \
        _tile_dpbf16ps(sums, factor, other);                   \
    }
    i64 k = 0;
    for (; k + TILE_ROWS <= num; k += TILE_ROWS) {
        _tile_loadd(4, a + k, a_bytes);
        LORAY_MULTIPLY(0, 4, 5)
        LORAY_MULTIPLY(1, 4, 5)
        LORAY_MULTIPLY(2, 4, 5)
        LORAY_MULTIPLY(3, 4, 5)
        between();
    }
    if (k < num) {
        _tile_loadd(6, a + k, a_bytes);
        LORAY_MULTIPLY(0, 6, 7)
        LORAY_MULTIPLY(1, 6, 7)
        LORAY_MULTIPLY(2, 6, 7)
        LORAY_MULTIPLY(3, 6, 7)
        between();
    }
#undef LORAY_MULTIPLY
    _tile_stored(0, c, c_bytes);
    if (vectors > 1) _tile_stored(1, c + W, c_bytes);
    if (vectors > 2) _tile_stored(2, c + 2 * W, c_bytes);
    if (vectors > 3) _tile_stored(3, c + 3 * W, c_bytes);
}

// The same for any number of rows and any multiple of W columns of a packed b.
static inline void tiles_by_amx(const uint32_t* a, i64 a_stride, const uint32_t* b, i64 b_stride, i64 num, float* c,
                                i64 c_stride, i64 rows, i64 columns, bool add) {
    for (i64 q = 0; q < rows; q += TILE_ROWS)
        for (i64 i = 0; i < columns; i += 4 * W)
            rows_by_amx(a + q * a_stride, a_stride, [&](i64 v) { return b + i + v * W; }, b_stride, num,
                        c + q * c_stride + i, c_stride, min_(TILE_ROWS, rows - q), min_(4, (columns - i) / W), add, [] {});
}

}  // namespace LORAY_NAMESPACE
