// The sums of products with weights of the inputs' type.

#include "products/tile.h"

namespace LORAY_NAMESPACE {

LORAY_TILES(PlainProduct<bf16>)
LORAY_TILES(PlainProduct<float>)

}  // namespace LORAY_NAMESPACE
