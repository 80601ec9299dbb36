// The sums of products with weights of the inputs' type.

#include "products/tile.h"
#if defined(__AMX_BF16__)
#include "products/amx.h"
#endif

namespace LORAY_NAMESPACE {

#if !defined(__AMX_BF16__)
LORAY_TILES(PlainProduct<bf16>)
#endif
LORAY_TILES(PlainProduct<float>)

}  // namespace LORAY_NAMESPACE
