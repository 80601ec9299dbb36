// The sums of products with quantised weights.

#include "products/quantized.h"
#include "products/tile.h"

namespace LORAY_NAMESPACE {

LORAY_TILES(QuantizedProduct<8>)
LORAY_TILES(QuantizedProduct<4>)

}  // namespace LORAY_NAMESPACE
