// The sums of a tile of bf16 by AMX. A panel's pairs lie as the instruction reads its second factor: sixteen pairs of
// inputs, each of sixteen outputs.
#pragma once

#include "linear.h"
#include "../simd/amx.h"

namespace LORAY_NAMESPACE {

// 32 inputs of tokens, and what they are multiplied with. The registers' numbers are part of the instructions, so that
// these are macros.
#define LORAY_MULTIPLY(inputs, stride, weights, first, second, third) \
    _tile_loadd(6, inputs, stride);                                   \
    _tile_loadd(7, weights, ROW);                                     \
    _tile_dpbf16ps(first, 6, 7);                                      \
    if constexpr (NV > 1) {                                           \
        _tile_loadd(7, weights + 2 * W, ROW);                         \
        _tile_dpbf16ps(second, 6, 7);                                 \
        _tile_loadd(7, weights + 4 * W, ROW);                         \
        _tile_dpbf16ps(third, 6, 7);                                  \
    }
#define LORAY_STORE(at, first, second, third)         \
    _tile_stored(first, at, NV * W * 4);              \
    if constexpr (NV > 1) {                           \
        _tile_stored(second, at + W, NV * W * 4);     \
        _tile_stored(third, at + 2 * W, NV * W * 4);  \
    }

// Sums of `count` tokens. More than sixteen are two tiles of equal height, which may share a token: registers 0 to 2 have
// the first one's sums, 3 to 5 the second one's, 6 inputs, 7 weights.
template <int NV>
static void sums_by_amx(i64 in, i64 count, const bf16* x, i64 x_stride, const bf16* panel, PanelFetch& fetch,
                        float* sums) {
    static_assert(NV == 1 || NV == 3, "");
    constexpr i64 INPUTS = 32, ROW = 2 * COLUMNS * i64(sizeof(bf16));
    const i64 rows = count > TILE_ROWS ? ceil_div(count, 2) : count, second = count - rows;
    const auto multiply = [&](const bf16* from, i64 stride, const bf16* weights) {
        LORAY_MULTIPLY(from, stride * i64(sizeof(bf16)), weights, 0, 1, 2)
        if (second) {
            LORAY_MULTIPLY(from + second * stride, stride * i64(sizeof(bf16)), weights, 3, 4, 5)
        }
    };
    TileShapes shapes;
    shapes.set(0, 6, rows, 64);
    shapes.set(7, 7, TILE_ROWS, 64);
    shapes.load();  // and the registers are zeros
    i64 k = 0;
    for (; k + INPUTS <= in; k += INPUTS) {
        multiply(x + k, x_stride, panel + k * COLUMNS);
        fetch.some();
    }
    if (k < in) {  // the weights behind them are zeros
        alignas(64) bf16 rest[32 * INPUTS];
        memset((void*)rest, 0, sizeof rest);
        for (i64 t = 0; t < count; t++) memcpy((void*)(rest + t * INPUTS), x + t * x_stride + k, (in - k) * sizeof(bf16));
        written();
        multiply(rest, INPUTS, panel + k * COLUMNS);
    }
    LORAY_STORE(sums, 0, 1, 2)
    if (second) {
        float* const others = sums + second * NV * W;
        LORAY_STORE(others, 3, 4, 5)
    }
}

template <>
void sums_of(const PlainProduct<bf16>& product, i64 count, i64 num_vectors, const Inputs<bf16>& inputs, i64 token,
             const char* panel, PanelFetch& fetch, float* sums) {
    const auto sums_by = num_vectors == VECTORS ? sums_by_amx<VECTORS> : sums_by_amx<1>;
    sums_by(product.w.in, count, inputs.token(token), inputs.stride, (const bf16*)panel, fetch, sums);
}

#undef LORAY_MULTIPLY
#undef LORAY_STORE

}  // namespace LORAY_NAMESPACE
