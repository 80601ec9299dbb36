// The loops of a product's tiles: compiled once for each product, in plain.cpp or quantized.cpp.
#pragma once

#include "linear.h"

namespace LORAY_NAMESPACE {

// All that it calls is inlined, so that sums stay in registers.
template <int NT, int NV, class Product>
__attribute__((noinline, flatten)) static void tile(const Product& product,
                                                    const Inputs<typename Product::Operand>& inputs, i64 token,
                                                    const char* panel, PanelFetch& fetch, float* sums) {
    Vec all[NT][NV];
    product.template multiply<NT, NV>(inputs, token, panel, fetch, all);
    each<NT * NV>([&](auto i) { store(sums + i * W, all[i / NV][i % NV]); });
}

template <int NV, int NT, class Product>
static inline void tile_of(const Product& product, i64 count, const Inputs<typename Product::Operand>& inputs,
                           i64 token, const char* panel, PanelFetch& fetch, float* sums) {
    if (count == NT)
        tile<NT, NV>(product, inputs, token, panel, fetch, sums);
    else if constexpr (NT > 1)
        tile_of<NV, NT - 1>(product, count, inputs, token, panel, fetch, sums);
}

template <class Product>
void sums_of(const Product& product, i64 count, i64 num_vectors, const Inputs<typename Product::Operand>& inputs,
             i64 token, const char* panel, PanelFetch& fetch, float* sums) {
    if (num_vectors == VECTORS)
        tile_of<VECTORS, TOKENS>(product, count, inputs, token, panel, fetch, sums);
    else
        tile_of<1, TOKENS>(product, count, inputs, token, panel, fetch, sums);
}

#define LORAY_TILES(...)                                                                                        \
    template void sums_of(const __VA_ARGS__&, i64, i64, const Inputs<__VA_ARGS__::Operand>&, i64, const char*,  \
                          PanelFetch&, float*);

}  // namespace LORAY_NAMESPACE
